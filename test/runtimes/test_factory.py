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

"""What ``create_runtime`` chooses, on machines that this one is not: with a GPU, with TensorRT.

The GPU and TensorRT are simulated where the factory asks for them; the networks run on the CPU.
"""

import time
from typing import Any

import pytest
import torch

from flow_ros.networks import create
from flow_ros.networks.base import FlowNetwork
from flow_ros.runtimes import building, create_runtime, factory, RuntimeUnavailable
from flow_ros.runtimes.handover import EngineRefused, Handover
from flow_ros.runtimes.tensorrt import Installation
from flow_ros.runtimes.torch import TorchRuntime

torch.set_num_threads(1)


class OnTheCpu(TorchRuntime):
    """The torch runtime, whose CUDA device is the CPU."""

    def __init__(self, network: FlowNetwork, *, device: torch.device, **options: Any) -> None:
        super().__init__(network, device=torch.device('cpu'), **options)
        self.asked = device


class Engines(OnTheCpu):
    name = 'tensorrt'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def cuda(monkeypatch) -> None:
    """A machine with an Ada GPU."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 9))
    monkeypatch.setattr(factory, 'TorchRuntime', OnTheCpu)


@pytest.fixture
def tensorrt(monkeypatch) -> None:
    """A machine with TensorRT."""
    monkeypatch.setattr(factory, 'find_tensorrt', lambda: Installation('tensorrt', '10.16.1'))
    monkeypatch.setattr(factory, 'missing_tensorrt', lambda: '')
    monkeypatch.setattr(factory, 'refuses_gpu', lambda capability: '')


def network() -> FlowNetwork:
    torch.manual_seed(0)
    return create('dip_rt')


def made(runtime: Any, height: int = 96, width: int = 128) -> Any:
    """Return what serves once everything is made."""
    assert isinstance(runtime, Handover)
    runtime.at(height, width)
    assert runtime.wait(60)
    return runtime.at(height, width)


def test_auto_takes_torch_where_tensorrt_is_missing_and_says_why(cuda, monkeypatch) -> None:
    monkeypatch.setenv('FLOW_ROS_TENSORRT', 'none')
    runtime = create_runtime('auto', network())
    assert runtime.name == 'torch' and runtime.asked.type == 'cuda'
    assert runtime.reason == ('auto: torch on CUDA, not TensorRT: TensorRT is switched off '
                              '(FLOW_ROS_TENSORRT=none)')
    monkeypatch.setenv('FLOW_ROS_TENSORRT', 'yes')
    assert "seen 'yes'" in create_runtime('auto', network()).reason


def test_auto_takes_torch_where_the_gpu_is_not_for_this_tensorrt(
        cuda, tensorrt, monkeypatch) -> None:
    monkeypatch.setattr(factory, 'refuses_gpu',
                        lambda capability: f'it does not run on {capability}')
    runtime = create_runtime('auto', network())
    assert runtime.name == 'torch' and 'it does not run on (8, 9)' in runtime.reason
    with pytest.raises(RuntimeUnavailable, match=r"cannot be used: it does not run on .*'torch'"):
        create_runtime('tensorrt', network())


def test_auto_stays_on_the_cpu_where_that_was_asked_for(cuda, tensorrt) -> None:
    runtime = create_runtime('auto', network(), device='cpu')
    assert runtime.device.type == 'cpu' and 'device cpu was asked for' in runtime.reason


@pytest.mark.parametrize(('name', 'why'), [
    ('auto', 'auto: TensorRT 10.16.1 is installed and a CUDA device is there'),
    ('tensorrt', 'asked for by name')])
def test_torch_serves_until_tensorrt_is_ready(cuda, tensorrt, monkeypatch, name, why,
                                              tmp_path) -> None:
    asked = []

    def checked(network: FlowNetwork, request: Any, *, device: torch.device, progress: Any,
                cache: Any, say: Any, reason: str) -> Engines:
        asked.append((request.size, request.precision, request.workspace_mib, device,
                      cache.directory))
        say('info', 'passed')
        time.sleep(0.1)
        return Engines(network, device=device, reason=reason)

    monkeypatch.setattr(building, 'checked_runtime', checked)
    said = []
    given = network()
    runtime = create_runtime(name, given, precision='fast', cache=tmp_path, workspace_mib=64,
                             say=lambda level, text: said.append(text))
    first = runtime.at(96, 128)
    assert (first.name, first.asked.type, first.network) == ('torch', 'cuda', given)
    better = made(runtime)
    assert better.name == 'tensorrt' and better.reason == why
    assert better.network is not given
    assert asked == [((128, 96), 'fast', 64, torch.device('cuda'), tmp_path)]
    assert 'passed' in said and any('takes over' in text for text in said)
    runtime.close()


def test_engines_that_are_refused_leave_torch_serving(cuda, tensorrt, monkeypatch) -> None:
    def refused(*arguments: Any, **keywords: Any) -> Any:
        raise EngineRefused('99.9 % at 3 px')

    monkeypatch.setattr(building, 'checked_runtime', refused)
    said = []
    given = network()
    runtime = create_runtime('auto', given, say=lambda level, text: said.append(
        f'{level}: {text}'))
    assert made(runtime).name == 'torch'
    assert any(text.startswith('warning') and '99.9 % at 3 px' in text for text in said)
    assert '99.9 % at 3 px' in runtime.status
    # And should CUDA die, the CPU serves, with weights that were never there.
    assert runtime.fall_back('an illegal memory access')
    last = runtime.at(96, 128)
    assert last.device.type == 'cpu' and last.reason == 'CUDA has failed'
    assert last.network is not given and not hasattr(last, 'asked')
    runtime.close()


def test_tensorrt_by_name_says_what_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setenv('FLOW_ROS_TENSORRT', 'none')
    with pytest.raises(RuntimeUnavailable, match=r"needs an NVIDIA GPU: no CUDA device \(torch .*"
                                                 r"; and TensorRT is switched off.*'openvino'"):
        create_runtime('tensorrt', network())
    with pytest.raises(RuntimeUnavailable, match=r"runs on CUDA devices; seen device 'cpu'"):
        create_runtime('tensorrt', network(), device='cpu')


def test_tensorrt_by_name_without_tensorrt(cuda, monkeypatch) -> None:
    monkeypatch.setattr(factory, 'missing_tensorrt', lambda: 'TensorRT is not installed: ...')
    with pytest.raises(RuntimeUnavailable, match='cannot be used: TensorRT is not installed'):
        create_runtime('tensorrt', network())


def test_a_jetson_with_the_wrong_torch_is_told_so(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.version, 'cuda', None)
    monkeypatch.setattr(factory, '_is_jetson', lambda: True)
    reason = create_runtime('auto', network()).reason
    assert "built without CUDA: this is a Jetson, use NVIDIA's torch" in reason
    assert '--system-site-packages' in reason
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    assert 'sees none' in create_runtime('auto', network()).reason
