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

"""What ``make setup`` would install, on machines that are made up."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parents[2]
GPU_PACKAGES = {'torch', 'tensorrt', 'tensorrt-rtx'}


class Machine:
    """A machine with a root folder and a Python of its own, both made up."""

    def __init__(self, folder):
        self.root = folder / 'root'
        self.site = folder / 'site'
        self.site.mkdir()
        # Isolated from the packages of this test's own Python, but for what is put into site.
        self.python = folder / 'python'
        base = Path(sys.base_prefix) / 'bin' / f'python3.{sys.version_info[1]}'
        self.python.write_text(f'#!/bin/sh\nPYTHONPATH={self.site} exec {base} -S "$@"\n')
        self.python.chmod(0o755)

    def file(self, name):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def package(self, name, text=''):
        (self.site / f'{name}.py').write_text(text)

    def dry_run(self, system_torch=''):
        environment = {key: value for key, value in os.environ.items()
                       if key not in ('ROS_DISTRO', 'AMENT_PREFIX_PATH', 'PYTHONPATH')}
        return subprocess.run(
            [str(ROOT / '.ci' / 'setup'), '--dry-run'], capture_output=True, text=True,
            timeout=60, env={**environment, 'PYTHON': str(self.python),
                             'FLOW_ROS_ROOT': str(self.root), 'SYSTEM_TORCH': system_torch})

    def plan(self, system_torch=''):
        """Return what the dry run says: lines of text, and the packages that are installed."""
        done = self.dry_run(system_torch)
        assert done.returncode == 0, done.stderr
        packages = {line.removeprefix('install: ').split('=')[0]
                    for line in done.stdout.splitlines() if line.startswith('install: ')}
        assert {'safetensors', 'onnx', 'pytest', 'rich'} <= packages
        return done.stdout, packages & GPU_PACKAGES


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def numpy(version):
    return f'__version__ = "{version}"\n'


TORCH = '__version__ = "2.11.0"\n\n\nclass version:\n    cuda = {cuda!r}\n'


def test_a_plain_machine_gets_everything_pinned_in_a_venv_of_its_own(machine):
    said, packages = machine.plan()
    assert 'venv: isolated' in said
    assert 'made for: pip\n' in said
    assert 'requirements: -r requirements-numpy2.txt -r requirements-ros-wheels.txt' in said
    assert packages == {'torch', 'tensorrt-rtx'}


def test_a_torch_without_cuda_is_no_reason(machine):
    machine.package('torch', TORCH.format(cuda=None))
    said, packages = machine.plan()
    assert 'venv: isolated' in said
    assert packages == {'torch', 'tensorrt-rtx'}


@pytest.mark.parametrize('file', ['etc/nv_tegra_release',
                                  'var/lib/dpkg/info/nvidia-jetpack.list'])
def test_on_a_jetson_torch_and_tensorrt_are_the_systems_own(machine, file):
    machine.file(file)
    machine.package('torch', TORCH.format(cuda='12.6'))
    machine.package('numpy', numpy('1.26.4'))
    said, packages = machine.plan()
    assert 'a Jetson (' in said
    assert 'venv: --system-site-packages' in said
    assert 'made for: pip-system' in said
    # What NVIDIA's torch was compiled against.
    assert '-r requirements-numpy1.txt' in said
    assert packages == set()
    assert 'has no torch' not in said


def test_on_a_jetson_without_torch_what_to_do_is_said(machine):
    machine.file('etc/nv_tegra_release')
    said, packages = machine.plan()
    assert "has no torch: first install NVIDIA's for this JetPack" in said
    assert packages == set()


def test_a_torch_that_lies_around_decides_nothing(machine):
    machine.package('torch', TORCH.format(cuda='11.7').replace('2.11', '1.13'))
    machine.package('tensorrt')
    machine.package('numpy', numpy('1.26.4'))
    said, packages = machine.plan()
    assert 'venv: isolated' in said and '-r requirements-numpy2.txt' in said
    assert packages == {'torch', 'tensorrt-rtx'}
    assert 'has TensorRT of its own, which .venv will not see' in said
    said, packages = machine.plan('1')
    assert packages == set()
    assert 'is older than 2.11, which flow_ros needs' in said


def test_the_systems_own_must_be_there_when_asked_for(machine):
    done = machine.dry_run('1')
    assert done.returncode == 1
    assert 'has neither a torch with CUDA nor TensorRT' in done.stderr


def test_a_python_with_a_cuda_torch_keeps_it_when_asked_to(machine):
    machine.package('torch', TORCH.format(cuda='13.0'))
    machine.package('numpy', numpy('2.5.2'))
    said, packages = machine.plan('1')
    assert 'older than' not in said
    assert 'has a torch with CUDA: what it has of torch and TensorRT is used' in said
    assert 'venv: --system-site-packages' in said
    assert '-r requirements-numpy2.txt' in said
    assert packages == set()


@pytest.mark.parametrize('name', ['tensorrt', 'tensorrt_rtx'])
def test_a_python_with_tensorrt_alone_keeps_it_and_gets_torch(machine, name):
    machine.package(name)
    said, packages = machine.plan('1')
    assert 'has TensorRT' in said
    assert 'venv: --system-site-packages' in said
    assert packages == {'torch'}
