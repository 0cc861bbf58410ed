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

"""What was measured on: the machine and the versions, without its name or its user's folders."""

import importlib.metadata
import os
from pathlib import Path
import platform
import re
from typing import Any

from flow_ros import __version__

PACKAGES = ('torch', 'openvino', 'tensorrt', 'tensorrt-rtx', 'numpy', 'opencv-python-headless',
            'opencv-python', 'onnx', 'matplotlib')
ISA_FLAGS = (
    # x86-64, from what everyone has to what makes networks fast
    'avx', 'avx2', 'fma', 'f16c', 'avx_vnni', 'avx512f', 'avx512_vnni', 'avx512_bf16',
    'avx512_fp16', 'amx_tile', 'amx_int8', 'amx_bf16', 'amx_fp16',
    # ARM
    'asimd', 'asimddp', 'fphp', 'asimdhp', 'bf16', 'i8mm', 'sve', 'sve2')
"""Those that decide how fast a network can be, in the kernel's spelling."""
_CPUINFO = Path('/proc/cpuinfo')
_GOVERNOR = Path('/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor')


def machine_facts() -> dict[str, Any]:
    """Return CPU, cores this process may use, memory, ISA flags, governor, load, GPU, system."""
    info = _cpu_info()
    return {'cpu': info.get('model name') or info.get('Model') or platform.processor()
            or platform.machine(),
            'architecture': platform.machine(), 'cores': usable_cores(),
            'memory_gib': _memory_gib(),
            'isa': isa_flags(info.get('flags') or info.get('Features') or ''),
            'governor': _read(_GOVERNOR) or 'not readable',
            'load_1min': round(os.getloadavg()[0], 2),
            'gpu': gpu(), 'system': _system(),
            'jetson': _first_line(Path('/etc/nv_tegra_release'))}


def versions() -> dict[str, str]:
    """Return the versions of flow_ros, Python and the packages that are installed."""
    found = {'flow_ros': __version__, 'python': platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(machine: dict[str, Any], version: dict[str, str]) -> str:
    """Return both in a sentence or two, for a report."""
    memory = f', {machine["memory_gib"]:.0f} GiB' if machine.get('memory_gib') else ''
    flags = f' ({" ".join(machine["isa"])})' if machine.get('isa') else ''
    packages = ', '.join(f'{name} {number}' for name, number in version.items())
    return (f'{machine["cpu"]}{flags}, {machine["cores"]} cores{memory}, governor '
            f'{machine["governor"]}, GPU: {machine["gpu"]}, {machine["system"]}; load at the '
            f'start {machine["load_1min"]:g}. {packages}.')


def without_folders(text: str) -> str:
    """Return ``text`` with only the last part of each absolute path in it."""
    return re.sub(r'(?<![\w.:/])/(?:[^\s/\'",:;()]+/)+', '', text)


def usable_cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def isa_flags(text: str) -> list[str]:
    """Return those of ``ISA_FLAGS`` that are in the kernel's list of flags."""
    there = set(text.split())
    return [flag for flag in ISA_FLAGS if flag in there]


def gpu() -> str:
    """Return the GPU that torch sees, in words."""
    try:
        import torch
    except ImportError:
        return 'unknown, torch is not installed'
    if not torch.cuda.is_available():
        return 'none that torch sees'
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
    return (f'{torch.cuda.get_device_name()}, {memory:.0f} GiB, compute capability '
            f'{major}.{minor}, CUDA {torch.version.cuda}')


def _system() -> str:
    """Return the system and the first two numbers of its version: more may name a machine."""
    return f'{platform.system()} {".".join(platform.release().split(".")[:2])}'


def _cpu_info() -> dict[str, str]:
    """Return the kernel's facts of the first CPU, and those it gives but once for all."""
    facts: dict[str, str] = {}
    for line in _read(_CPUINFO).splitlines():
        name, colon, value = line.partition(':')
        if colon and value.strip():
            facts.setdefault(name.strip(), value.strip())
    return facts


def _memory_gib() -> float | None:
    for line in _read(Path('/proc/meminfo')).splitlines():
        if line.startswith('MemTotal:'):
            return round(int(line.split()[1]) / 2 ** 20, 1)
    return None


def _first_line(path: Path) -> str | None:
    lines = _read(path).splitlines()
    return lines[0] if lines else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8', errors='replace').strip()
    except OSError:
        return ''
