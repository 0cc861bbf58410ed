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

"""An exporter and a builder that are quick, for tests of what is around them."""

from collections.abc import Callable
import hashlib
from typing import Any

import torch

from flow_ros.networks import create
from flow_ros.networks.base import FlowNetwork
from flow_ros.runtimes.acts import Act, record_acts
from flow_ros.runtimes.build_progress import EngineProgress
from flow_ros.runtimes.building import (
    build_engines,
    BuildRequest,
    BuiltEngines,
    Gpu,
)
from flow_ros.runtimes.cache import EngineCache
from flow_ros.runtimes.tensorrt import BuildCancelled, BuildProgress, BuiltPlan, Installation

ACTS = ['encode', 'step_16', 'step_8', 'finish']
REQUEST = BuildRequest(size=(128, 96))
TENSORRT = Installation('tensorrt', '10.16.1')
ORIN = Gpu('Orin', '8.7')


_acts: dict[Any, tuple[Act, ...]] = {}


def remembered_acts(network: FlowNetwork, **keywords: Any) -> tuple[Act, ...]:
    """Return the acts of dip_rt; to work them out takes longer than all else in these tests."""
    key = (*(tensor.dtype for tensor in network.state_dict().values()), *keywords.items())
    if key not in _acts:
        _acts[key] = record_acts(network, **keywords)
    return _acts[key]


class Said(list):
    """The messages, as (level, text)."""

    def __call__(self, level: str, text: str) -> None:
        self.append((level, text))

    @property
    def warnings(self) -> list[str]:
        return [text for level, text in self if level == 'warning']


class Tools:
    """An exporter and a builder that are quick, and note what they were asked."""

    def __init__(self) -> None:
        self.exported: list[str] = []
        self.built: list[str] = []
        self.timing: list[bytes | None] = []
        self.padding = b''

    def export(self, network: FlowNetwork, act: Any, *, dynamic: bool = False) -> bytes:
        self.exported.append(act.name)
        weights = hashlib.sha256(next(network.parameters()).detach().numpy().tobytes())
        return f'{weights.hexdigest()} {act.name} {dynamic} {act.signature}'.encode()

    def build(self, model: bytes, *, name: str, options: Any, profile: Any = None,
              progress: Callable[[BuildProgress], bool] | None = None,
              timing_cache: bytes | None = None) -> BuiltPlan:
        for step in range(5):
            if progress is not None and not progress(BuildProgress(
                    name, 'tactics', step / 5, step * 1.0, 5.0 - step)):
                raise BuildCancelled('as asked')
        self.built.append(name.split()[1])
        self.timing.append(timing_cache)
        return BuiltPlan(plan=self.padding + b'plan of ' + model,
                         timing_cache=b'%d' % len(self.built), seconds=0.0, layers=1)


def network(seed: int = 0) -> FlowNetwork:
    torch.manual_seed(seed)
    return create('dip_rt')


def build(tools: Tools, cache: EngineCache, *, seed: int = 0, request: BuildRequest = REQUEST,
          installation: Installation = TENSORRT, gpu: Gpu | None = ORIN,
          progress: Callable[[EngineProgress], bool] | None = None) -> BuiltEngines:
    return build_engines(network(seed), request, installation=installation, gpu=gpu, cache=cache,
                         progress=progress, builder=tools.build, exporter=tools.export)
