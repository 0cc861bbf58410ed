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

from collections.abc import Callable
import copy
from importlib.util import find_spec
from pathlib import Path
import platform

import torch

from flow_ros.networks.base import FlowNetwork
from flow_ros.runtimes.base import check_precision, check_threads, Runtime, RuntimeUnavailable
from flow_ros.runtimes.cache import EngineCache, Say
from flow_ros.runtimes.tensorrt import find_tensorrt, missing_tensorrt, refuses_gpu
from flow_ros.runtimes.torch import TorchRuntime

RUNTIMES: tuple[str, ...] = ('auto', 'torch', 'openvino', 'tensorrt')


def create_runtime(name: str, network: FlowNetwork, *, device: str | torch.device | None = None,
                   threads: int | None = None, precision: str = 'f32',
                   cache: Path | None = None, workspace_mib: int | None = None,
                   say: Say | None = None) -> Runtime:
    """Return the runtime ``name`` for ``network``, which it takes over (moves to its device).

    ``auto`` takes TensorRT where it is installed and a CUDA device is there, else torch where
    CUDA is, else OpenVINO where it is installed, else torch on the CPU; the runtime's ``reason``
    says why. TensorRT comes as a ``handover.Handover``: torch serves until the engines for a
    frame size are built and have passed their check. ``device`` None is CUDA where it is, but
    the CPU for OpenVINO. ``threads`` None is the runtime's own default. ``precision`` is 'f32',
    for results that agree between runtimes, or 'fast', whatever the machine does fastest.
    ``cache`` is the folder of compiled engines (default: ``cache.cache_directory()``) and
    ``workspace_mib`` the memory TensorRT may try kernels with (default: its own). ``say`` is
    told what happens later (default: the log). Raises ValueError for unknown names and
    RuntimeUnavailable for what this machine does not have.
    """
    if name not in RUNTIMES:
        raise ValueError(f'runtime must be one of {", ".join(RUNTIMES)}; seen {name!r}')
    check_precision(precision)
    check_threads(threads)
    chosen = _device(device)
    reason = 'asked for by name'
    if name == 'auto':
        name, chosen, reason = _choose(chosen)
    if name == 'tensorrt':
        chosen = _tensorrt_device(chosen)
        return _with_tensorrt(network, device=chosen, threads=threads, precision=precision,
                              cache=cache, workspace_mib=workspace_mib, reason=reason, say=say)
    if name == 'openvino':
        if chosen is not None and chosen.type != 'cpu':
            raise RuntimeUnavailable(f"runtime 'openvino' runs on the CPU; seen device "
                                     f"'{chosen}': use device 'cpu' or runtime 'torch'")
        if find_spec('openvino') is None:
            raise RuntimeUnavailable("runtime 'openvino' needs the package openvino, which is "
                                     "not installed: pip install openvino, or use 'torch'")
        return _on_cpu(network, threads=threads, precision=precision, cache=cache, reason=reason)
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
    """Return runtime, device and why, by auto's rule: also why it is none of the better ones."""
    if device is None and torch.cuda.is_available():
        device = torch.device('cuda')
    if device is not None and device.type == 'cuda':
        why_not = _why_no_tensorrt(device)
        if not why_not:
            found = find_tensorrt()
            assert found is not None
            return 'tensorrt', device, (f'auto: {found.text} is installed and a CUDA device is '
                                        f'there')
        return 'torch', device, f'auto: torch on CUDA, not TensorRT: {why_not}'
    why = 'device cpu was asked for' if device is not None else _no_cuda()
    device = torch.device('cpu')
    if find_spec('openvino') is not None:
        return 'openvino', device, f'auto: {why}, and OpenVINO is installed'
    return 'torch', device, f'auto: {why}, and OpenVINO is not installed'


def _no_cuda() -> str:
    """Return in words that there is no CUDA device, and what torch has to do with it."""
    if torch.version.cuda is not None:
        return f'no CUDA device (torch {torch.__version__} sees none)'
    why = f'no CUDA device (torch {torch.__version__} is built without CUDA'
    if _is_jetson():
        why += (": this is a Jetson, use NVIDIA's torch for it in a virtual environment with "
                "--system-site-packages")
    return f'{why})'


def _is_jetson() -> bool:
    return 'tegra' in platform.release() or Path('/etc/nv_tegra_release').exists()


def _why_no_tensorrt(device: torch.device) -> str:
    """Return why TensorRT cannot serve on this CUDA device, '' where it can."""
    try:
        return missing_tensorrt() or refuses_gpu(torch.cuda.get_device_capability(device))
    except ValueError as error:  # $FLOW_ROS_TENSORRT says what nobody knows
        return str(error)


def _tensorrt_device(device: torch.device | None) -> torch.device:
    """Return the device for TensorRT; RuntimeUnavailable where there is none."""
    if device is not None and device.type != 'cuda':
        raise RuntimeUnavailable(f"runtime 'tensorrt' runs on CUDA devices; seen device "
                                 f"'{device}': use device 'cuda', or runtime 'openvino'")
    missing = missing_tensorrt()
    if device is None and not torch.cuda.is_available():
        also = f'; and {missing}' if missing else ''
        raise RuntimeUnavailable(f"runtime 'tensorrt' needs an NVIDIA GPU: {_no_cuda()}{also}. "
                                 f"Use 'auto', 'openvino' or 'torch' here")
    device = torch.device('cuda') if device is None else device
    why_not = missing or _why_no_tensorrt(device)
    if why_not:
        raise RuntimeUnavailable(f"runtime 'tensorrt' cannot be used: {why_not}. Or use 'auto' "
                                 f"or 'torch'")
    return device


def _with_tensorrt(network: FlowNetwork, *, device: torch.device, threads: int | None,
                   precision: str, cache: Path | None, workspace_mib: int | None, reason: str,
                   say: Say | None) -> Runtime:
    """Return torch on CUDA that hands over to TensorRT, per frame size."""
    # Not before they are needed: a node without TensorRT starts without them.
    from flow_ros.runtimes.building import BuildRequest, checked_runtime
    from flow_ros.runtimes.handover import Handover, Told

    # Torch takes ``network`` over. This one stays as it is, where it can be read whatever
    # becomes of the GPU: the engines are made of it, and it serves should CUDA die.
    kept = copy.deepcopy(network).eval().to('cpu')

    def make(*, height: int, width: int, progress: Callable[[Told], bool]) -> Runtime:
        request = BuildRequest(size=(width, height), precision=precision,
                               workspace_mib=workspace_mib)
        return checked_runtime(kept, request, device=device, progress=progress, reason=reason,
                               cache=EngineCache(cache, handover.say), say=handover.say)

    def torch_runtime() -> Runtime:
        return TorchRuntime(network, device=device, threads=threads, precision=precision,
                            reason='until TensorRT is ready')

    def cpu_runtime() -> Runtime:
        return _on_cpu(copy.deepcopy(kept), threads=threads, precision=precision, cache=cache,
                       reason='CUDA has failed')

    handover = Handover(serving=[torch_runtime, cpu_runtime], make=make, say=say)
    return handover


def _on_cpu(network: FlowNetwork, *, threads: int | None, precision: str, cache: Path | None,
            reason: str) -> Runtime:
    """Return the best runtime for a CPU."""
    if find_spec('openvino') is not None:
        from flow_ros.runtimes.openvino import OpenVinoRuntime
        return OpenVinoRuntime(network, threads=threads, precision=precision, cache=cache,
                               reason=reason)
    return TorchRuntime(network, device=torch.device('cpu'), threads=threads,
                        precision=precision, reason=reason)
