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

"""Chooses and makes runtimes."""

from importlib.util import find_spec

import torch

from flow_ros.networks.base import FlowNetwork
from flow_ros.runtimes.base import check_precision, check_threads, Runtime, RuntimeUnavailable
from flow_ros.runtimes.torch import TorchRuntime

RUNTIMES: tuple[str, ...] = ('auto', 'torch', 'openvino', 'tensorrt')


def create_runtime(name: str, network: FlowNetwork, *, device: str | torch.device | None = None,
                   threads: int | None = None, precision: str = 'f32') -> Runtime:
    """Return the runtime ``name`` for ``network``, which it takes over (moves to its device).

    ``auto`` takes torch where CUDA is, else OpenVINO where it is installed, else torch on the
    CPU. ``device`` None is CUDA where it is, but the CPU for OpenVINO. ``threads`` None is the
    runtime's own default. ``precision`` is 'f32', for results that agree between runtimes, or
    'fast', whatever the machine does fastest. Raises ValueError for unknown names and
    RuntimeUnavailable for what this machine does not have.
    """
    if name not in RUNTIMES:
        raise ValueError(f'runtime must be one of {", ".join(RUNTIMES)}; seen {name!r}')
    check_precision(precision)
    check_threads(threads)
    if name == 'tensorrt':
        raise RuntimeUnavailable(f"runtime 'tensorrt' is not part of this version of flow_ros "
                                 f"({_tensorrt()}): use 'auto', 'torch' or 'openvino'")
    chosen = _device(device)
    reason = 'asked for by name'
    if name == 'auto':
        name, chosen, reason = _choose(chosen)
    if name == 'openvino':
        if chosen is not None and chosen.type != 'cpu':
            raise RuntimeUnavailable(f"runtime 'openvino' runs on the CPU; seen device "
                                     f"'{chosen}': use device 'cpu' or runtime 'torch'")
        if find_spec('openvino') is None:
            raise RuntimeUnavailable("runtime 'openvino' needs the package openvino, which is "
                                     "not installed: pip install openvino, or use 'torch'")
        from flow_ros.runtimes.openvino import OpenVinoRuntime
        return OpenVinoRuntime(network, threads=threads, precision=precision, reason=reason)
    if chosen is None:
        chosen = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    return TorchRuntime(network, device=chosen, threads=threads, precision=precision,
                        reason=reason)


def _device(device: str | torch.device | None) -> torch.device | None:
    """Return the device asked for, once it is sure to be there."""
    if device is None:
        return None
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N'; seen {device!r}") from error
    if asked.type == 'cuda':
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (asked.index or 0) >= count:
            raise RuntimeUnavailable(f"device '{asked}' is not there: torch {torch.__version__} "
                                     f"sees {count} CUDA devices; use device 'cpu', or a torch "
                                     f'built for your GPU and its driver')
    elif asked.type != 'cpu':
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N'; seen {device!r}")
    return asked


def _choose(device: torch.device | None) -> tuple[str, torch.device, str]:
    """Return runtime, device and why, by auto's rule."""
    if device is None and torch.cuda.is_available():
        device = torch.device('cuda')
    if device is not None and device.type == 'cuda':
        return 'torch', device, f'auto: torch on CUDA ({_tensorrt()})'
    why = 'device cpu was asked for' if device is not None else 'no CUDA device'
    device = torch.device('cpu')
    if find_spec('openvino') is not None:
        return 'openvino', device, f'auto: {why}, and OpenVINO is installed'
    return 'torch', device, f'auto: {why}, and OpenVINO is not installed'


def _tensorrt() -> str:
    installed = find_spec('tensorrt') is not None or find_spec('tensorrt_rtx') is not None
    return 'TensorRT is ' + ('installed, but not used yet' if installed else 'not installed')
