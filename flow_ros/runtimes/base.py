# Copyright 2026 flow_ros maintainers
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What every runtime offers."""

from typing import Protocol

import torch
from torch import Tensor

from flow_ros.networks.base import FlowNetwork

PRECISIONS: tuple[str, ...] = ('f32', 'fast')


class RuntimeUnavailable(RuntimeError):  # noqa: N818 -- a state of the machine, as it reads
    """This runtime, or the device asked for, cannot be had on this machine."""


class Runtime(Protocol):
    """Executes the engine functions of ``network``; give its ``call`` to the four acts.

    ``device`` is where the tensors given to ``call`` must be and where its results are.
    ``reason`` says why this runtime was chosen.
    """

    name: str
    network: FlowNetwork
    device: torch.device
    reason: str

    def call(self, engine: str, /, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one engine; the results are the caller's own, no later call changes them."""
        ...


def check_precision(precision: str) -> None:
    """Raise ValueError unless ``precision`` is known."""
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be one of {", ".join(PRECISIONS)}; seen {precision!r}')


def check_threads(threads: int | None) -> None:
    """Raise ValueError unless ``threads`` is None or at least 1."""
    if threads is not None and (isinstance(threads, bool) or threads < 1):
        raise ValueError(f'threads must be at least 1, or None for the default of the runtime; '
                         f'seen {threads}')
