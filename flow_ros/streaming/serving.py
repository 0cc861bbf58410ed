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

"""Which runtime does a frame, and what becomes of the frame when that runtime fails."""

from dataclasses import replace
import math

import torch
from torch import Tensor

from flow_ros.networks.base import FlowOutput
from flow_ros.runtimes.base import EngineFault, Runtime
from flow_ros.runtimes.handover import describe, Handover
from flow_ros.streaming.transfer import all_finite


class Serving:
    """Asks the runtime, once per frame, who does it.

    A Handover may answer differently from frame to frame. Any other runtime is its own answer.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._handover = runtime if isinstance(runtime, Handover) else None

    def close(self) -> bool:
        """End what is being made; False where it goes on although it was told to end."""
        return self._handover is None or self._handover.close()

    @property
    def status(self) -> str:
        """One line: what serves and why, and what is being made."""
        if self._handover is not None:
            return self._handover.status
        return f'{describe(self._runtime)} serves ({self._runtime.reason})'

    def at(self, height: int, width: int) -> Runtime:
        """Return the runtime for the whole of this frame."""
        return self._runtime if self._handover is None else self._handover.at(height, width)

    def may_change(self, height: int, width: int) -> bool:
        """Tell whether the next frame of this size may be done by another runtime."""
        return self._handover is not None and self._handover.may_change(height, width)

    def replace(self, runtime: Runtime, error: Exception) -> bool:
        """Give up ``runtime`` for its error; False where the error is the frame's to raise.

        Of an engine that was built, every error is a reason: behind it stands the network's own
        code, which raises its own. Else only what says that the runtime or its device is broken.
        """
        if self._handover is None:
            return False
        # Which older torch, as some Jetsons have it, does not know.
        broken = (EngineFault, getattr(torch, 'AcceleratorError', EngineFault))
        if not isinstance(error, broken) and not self._handover.is_made(runtime):
            return False
        text = ' '.join(str(error).split()) or type(error).__name__
        return self._handover.fall_back(text, runtime)


def checked(output: FlowOutput, runtime: Runtime) -> FlowOutput:
    """Return ``output`` in float32; raise EngineFault where it has NaN or infinite values.

    On a GPU the check is one sum, into which every such value goes, and one wait for it.
    """
    named = {'flow': output.flow, 'confidence': output.confidence, 'occlusion': output.occlusion}
    maps = {name: values for name, values in named.items() if values is not None}
    if not _finite(list(maps.values())):
        bad = {name: int((~torch.isfinite(values)).sum()) for name, values in maps.items()}
        seen = ', '.join(f'{count} of {maps[name].numel()} values of its {name}'
                         for name, count in bad.items() if count)
        raise EngineFault(f'{describe(runtime)}: what {runtime.network.name} gave is not finite: '
                          f'{seen or "the sum of all values"}; expected none: are the weights '
                          f'in order?')
    return replace(output, flow=output.flow.float(), confidence=_float(output.confidence),
                   occlusion=_float(output.occlusion))


def _finite(maps: list[Tensor]) -> bool:
    if maps[0].device.type == 'cpu':  # without threads that would spin into the next engine
        return all(all_finite(values) for values in maps)
    total = torch.stack([values.sum(dtype=torch.float32) for values in maps]).sum()
    return math.isfinite(float(total))


def _float(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float()
