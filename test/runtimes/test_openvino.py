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

"""OpenVINO beside torch: the same flow, and no copies on the way."""

from pathlib import Path
import sys
import threading

import pytest
import torch
from torch import nn

from flow_ros.networks import create
from flow_ros.networks.base import FlowNetwork
from flow_ros.runtimes import create_runtime
from flow_ros.runtimes.base import EngineFault
from flow_ros.runtimes.reference import (
    compare,
    LIMITS,
    make_reference,
    reference_pair,
    ReferenceCase,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'networks'))
from seeded_weights import seeded_tensor

pytest.importorskip('openvino', reason='OpenVINO is not installed')
torch.set_num_threads(1)
SIZE = (128, 96)
CASES = (ReferenceCase(1, False), ReferenceCase(5, False), ReferenceCase(2, True))
FEW = (ReferenceCase(1, False), ReferenceCase(1, True))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path / 'cache'))


def seeded(name, **options):
    network = create(name, **options)
    network.load_state_dict({
        key: torch.from_numpy(seeded_tensor(key, tuple(value.shape))).to(value.dtype)
        for key, value in network.state_dict().items()})
    return network


NETWORKS = {
    'dip_rt': lambda: create('dip_rt', 'default'),
    'hd3_compact': lambda: create('hd3_compact', 'default'),
    'mscsl': lambda: create('mscsl', 'default'),
    'dip': lambda: seeded('dip'),
    'hd3': lambda: seeded('hd3', encoder='vgg', context=False),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_f32_agrees_with_torch_to_a_hundredth_of_a_px(name):
    """99.9 % of all endpoint errors are under 0.01 px, at several budgets, cold and warm."""
    network = NETWORKS[name]()
    cases = FEW if name == 'dip' else [case for case in CASES
                                       if network.accepts_prior or not case.warm]
    reference = make_reference(network, *reference_pair(*SIZE), cases=cases)
    assert any(flow.std() > 0.5 for flow in reference.flows.values())
    verdict = compare(create_runtime('openvino', NETWORKS[name](), threads=1), reference)
    assert verdict.passed, verdict.text
    assert len(verdict.cases) == len(cases)
    assert all(result.quantiles[2] < 0.01 for result in verdict.cases)
    assert verdict.arithmetic == 'f32'


@pytest.mark.parametrize(('name', 'size'), [('dip_rt', SIZE), ('hd3_compact', (256, 192))])
def test_fast_keeps_coordinates_where_bf16_would_lose_them(name, size):
    """Half of the pixels within 0.03 px, which coordinates in bf16 cannot keep."""
    runtime = create_runtime('openvino', create(name, 'default'), threads=1, precision='fast')
    if runtime.arithmetic == 'f32':
        pytest.skip('this CPU has neither bf16 nor f16: fast is f32 here')
    reference = make_reference(create(name, 'default'), *reference_pair(*size), cases=CASES[::2])
    verdict = compare(runtime, reference)
    assert verdict.precision == 'fast'
    assert verdict.arithmetic == runtime.arithmetic
    assert verdict.limits == LIMITS[runtime.arithmetic]
    assert verdict.passed, verdict.text
    assert 1e-4 < verdict.worst.quantiles[0] < 0.03


class Parts(FlowNetwork):
    name = 'parts'
    engines = ('encode', 'step')

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def encode_engine(self, image):
        features = self.conv(image)
        return features, features * 2

    def step_engine(self, a, b):
        return (a - b,)


def address(tensor):
    return tensor.data.ctypes.data


def test_tensors_go_from_act_to_act_without_a_copy():
    runtime = create_runtime('openvino', Parts(), threads=1)
    seen = {}
    image = torch.rand(1, 3, 64, 96)
    for _ in range(2):  # the second time nothing is compiled
        features = runtime.call('encode', image)
        flow, = runtime.call('step', *features)
        seen = {name: engine._request for (name, _), engine in runtime._engines.items()}
        encode, step = seen['encode'], seen['step']
        assert address(encode.get_input_tensor(0)) == image.data_ptr()
        for index, tensor in enumerate(features):
            assert address(encode.get_output_tensor(index)) == tensor.data_ptr()
            assert address(step.get_input_tensor(index)) == tensor.data_ptr()
        assert address(step.get_output_tensor(0)) == flow.data_ptr()
    # What OpenVINO reads is that memory itself, not something it took from it before.
    before = flow.clone()
    features[0].add_(1)
    step.infer()
    torch.testing.assert_close(flow, before + 1)


@pytest.mark.parametrize('threads', [1, 2])
def test_threads_are_those_asked_for(threads):
    runtime = create_runtime('openvino', Parts(), threads=threads)
    runtime.call('encode', torch.rand(1, 3, 8, 8))
    engine, = runtime._engines.values()
    compiled = engine._request.get_compiled_model()
    assert compiled.get_property('INFERENCE_NUM_THREADS') == threads
    assert compiled.get_property('NUM_STREAMS') == 1


def test_threads_share_a_runtime():
    """Streams of one process do: each has the results of its own frames."""
    network = create('dip_rt', 'default')
    runtime = create_runtime('openvino', network, threads=1)
    torch.manual_seed(0)
    images = [255 * torch.rand(1, 3, 96, 128) for _ in range(4)]
    with torch.inference_mode():
        wanted = [network.engine('encode', image) for image in images]
    wrong = []

    def work(number):
        try:
            for _ in range(10):
                for seen, expected in zip(runtime.call('encode', images[number]),
                                          wanted[number]):
                    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-3)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(runtime._engines) == 1


def test_a_failure_of_openvino_is_a_fault_of_the_engine():
    """Which another runtime can take over from."""
    runtime = create_runtime('openvino', Parts(), threads=1)
    runtime.call('encode', torch.rand(1, 3, 8, 8))
    engine, = runtime._engines.values()

    class Fails:
        def __getattr__(self, name):
            return lambda *_: None

        def infer(self):
            raise RuntimeError('Exception from src/inference: out of memory\n')

    engine._request = Fails()
    with pytest.raises(EngineFault, match='OpenVINO failed: .*out of memory$'):
        runtime.call('encode', torch.rand(1, 3, 8, 8))
