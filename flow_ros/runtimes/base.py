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

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from flow_ros.networks.base import Call, FlowNetwork, FlowOutput, State, Step

PRECISIONS: tuple[str, ...] = ('f32', 'fast')

Lap = Callable[[str], None]
"""Ends a part of the work that is timed; its argument names the part."""


class Control(Protocol):
    """Decides, while a loop runs, how far it goes."""

    def __call__(self, before: State, after: State) -> tuple[Step, ...]:
        """Return the steps still to do: those of ``after.schedule`` or some of them, in order.

        Asked after each step, with the state before it and after it; () ends the loop. It may
        be asked nothing at all: where the steps are one piece of work, as on CUDA, the schedule
        they begin with is done as it is.
        """
        ...


class RuntimeUnavailable(RuntimeError):  # noqa: N818 -- a state of the machine, as it reads
    """This runtime, or the device asked for, cannot be had on this machine."""


class EngineFault(RuntimeError):  # noqa: N818 -- a fault of the engine, as it reads
    """An engine failed, or gave what no engine may give: another runtime can do the frame."""


class Runtime(Protocol):
    """Executes the engine functions of ``network``; give its ``call`` to the four acts.

    ``device`` is where the tensors given to ``call`` must be and where its results are.
    ``reason`` says why this runtime was chosen.
    """

    # Properties, so that a runtime may work them out: what serves can change (Handover).
    @property
    def name(self) -> str:
        """One of ``factory.RUNTIMES``."""
        ...

    @property
    def network(self) -> FlowNetwork:
        """The network whose engine functions these are."""
        ...

    @property
    def device(self) -> torch.device:
        """Where tensors are."""
        ...

    @property
    def reason(self) -> str:
        """Why this runtime, in words."""
        ...

    def call(self, engine: str, /, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one engine; the results are the caller's own, no later call changes them.

        Raises EngineFault where the engine itself fails.
        """
        ...

    def loop(self, state: State, lap: Lap | None = None,
             control: Control | None = None) -> tuple[State, FlowOutput]:
        """Do all the steps of ``state.schedule``, then finish: the state after, the output.

        The results are the caller's own, as those of ``call``. ``lap`` is told 'steps' and
        'finish' as they end; where both are one piece of work, 'steps' once, after it, and
        'capture' before it where that was just made one.
        ``control`` may leave out steps on the way.
        """
        ...


def run_loop(network: FlowNetwork, state: State, call: Call, lap: Lap | None = None,
             control: Control | None = None) -> tuple[State, FlowOutput]:
    """Do the steps and finish one by one: the plain ``loop`` of a runtime."""
    while state.schedule:
        if control is None:
            state = network.step(state, call=call)
        else:
            before, state = state, network.step(state, call=call)
            state = replace(state, schedule=control(before, state))
            del before  # whose memory the next step has use for
    if lap is not None:
        lap('steps')
    output = network.finish(state, call=call)
    if lap is not None:
        lap('finish')
    return state, output


def check_precision(precision: str) -> None:
    """Raise ValueError unless ``precision`` is known."""
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be one of {", ".join(PRECISIONS)}; seen {precision!r}')


def check_threads(threads: int | None) -> None:
    """Raise ValueError unless ``threads`` is None or at least 1."""
    if threads is not None and (isinstance(threads, bool) or threads < 1):
        raise ValueError(f'threads must be at least 1, or None for the default of the runtime; '
                         f'seen {threads}')
