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

"""The torch runtime: the network's own code, on the CPU or on CUDA."""

import torch
from torch import Tensor

from flow_ros.networks.base import FlowNetwork, FlowOutput, State
from flow_ros.runtimes.base import Control, Lap, run_loop
from flow_ros.runtimes.cuda_graphs import CudaGraphDevice, GraphedLoop


class TorchRuntime:
    """Runs the engine functions eagerly, without gradients, channels last.

    On CUDA the steps and finish of a pair are one CUDA graph from their second time on, unless
    ``graphs`` is False.
    """

    name = 'torch'

    def __init__(self, network: FlowNetwork, *, device: torch.device, threads: int | None = None,
                 precision: str = 'f32', reason: str = '', graphs: bool = True) -> None:
        self.device = device
        self.reason = reason
        self.network = network.eval().to(device=device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Torch's convolutions take TF32 by default, which is not f32: 1e-3 px are lost.
        self._tf32 = precision == 'fast'
        if threads is not None:
            torch.set_num_threads(threads)  # of the whole process: torch knows no other way
        self._graphed = (GraphedLoop(self.network, self.call, device=CudaGraphDevice(device))
                         if graphs and device.type == 'cuda' else None)

    @property
    def graphed(self) -> bool:
        """True where a loop's runs after the first of their kind are a CUDA graph."""
        return self._graphed is not None and not self._graphed.failure

    def call(self, engine: str, /, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one engine."""
        if self.device.type != 'cuda':
            with torch.inference_mode():
                return self.network.engine(engine, *tensors)
        with torch.inference_mode(), torch.backends.cudnn.flags(
                enabled=True, benchmark=False, allow_tf32=self._tf32):
            return self.network.engine(engine, *tensors)

    def loop(self, state: State, lap: Lap | None = None,
             control: Control | None = None) -> tuple[State, FlowOutput]:
        """Do the steps of ``state`` and finish; a CUDA graph asks no ``control``."""
        if self._graphed is not None:
            return self._graphed(state, lap)
        return run_loop(self.network, state, self.call, lap, control)
