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

import importlib.util
import logging
import os
import sys

import pytest
import torch
from torch import nn

from flow_ros.networks import create
from flow_ros.networks.base import FlowNetwork
from flow_ros.runtimes import create_runtime, RuntimeUnavailable

torch.set_num_threads(1)

needs_openvino = pytest.mark.skipif(importlib.util.find_spec('openvino') is None,
                                    reason='OpenVINO is not installed')
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


class Small(FlowNetwork):
    """Engines with what runtimes trip over: several outputs, order, reuse, pass-through."""

    name = 'small'
    engines = ('encode', 'mix', 'same', 'ignores', 'returns')

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def encode_engine(self, image):
        features = self.conv(image)
        return features, features.mean(dim=1, keepdim=True), features[:, :, ::2, ::2]

    def mix_engine(self, a, b, weight):
        return a - 2 * b, weight * b

    def same_engine(self, a):
        b = a + 1
        return b, 2 * b, b

    def ignores_engine(self, a, b):
        return (b * 2,)

    def returns_engine(self, a, b):
        return a * b, a


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture(params=['torch', pytest.param('openvino', marks=needs_openvino),
                        pytest.param('cuda', marks=needs_cuda)])
def runtime(request):
    if request.param == 'cuda':
        return create_runtime('torch', Small(), device='cuda')
    return create_runtime(request.param, Small(), device='cpu', threads=1)


def tensors(runtime, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(runtime.device) for shape in shapes]


def exactly():
    """Without TF32, in which convolutions on CUDA are only good to 1e-3."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def agree(runtime, engine, *inputs):
    with torch.no_grad(), exactly():
        expected = runtime.network.engine(engine, *inputs)
    results = runtime.call(engine, *inputs)
    assert isinstance(results, tuple)
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected):
        assert result.dtype == wanted.dtype
        assert result.device == wanted.device
        torch.testing.assert_close(result, wanted, atol=1e-5, rtol=1e-5)
    return results


def test_engines_agree_with_the_network(runtime):
    agree(runtime, 'encode', *tensors(runtime, (1, 3, 16, 24)))
    agree(runtime, 'mix', *tensors(runtime, (1, 2, 5, 7), (1, 2, 5, 7), (1, 1, 1, 1)))
    agree(runtime, 'same', *tensors(runtime, (1, 2, 5, 7)))
    agree(runtime, 'ignores', *tensors(runtime, (1, 2, 5, 7), (1, 2, 4, 3)))


def test_another_shape_and_back(runtime):
    for shape in ((1, 3, 16, 24), (1, 3, 32, 8), (2, 3, 16, 24), (1, 3, 16, 24)):
        agree(runtime, 'encode', *tensors(runtime, shape))


def test_inputs_of_any_layout(runtime):
    image, = tensors(runtime, (1, 16, 24, 3))
    agree(runtime, 'encode', image.permute(0, 3, 1, 2))
    agree(runtime, 'encode', image.permute(0, 3, 1, 2)[:, :, ::2, 3:17])
    expanded = image[:, :1, :1, :1].expand(1, 3, 16, 24)
    agree(runtime, 'encode', expanded)


def test_results_stay_when_the_engine_runs_again(runtime):
    """Frame t's features are still needed when t+1 has been encoded."""
    images = [tensors(runtime, (1, 3, 16, 24), seed=k)[0] for k in range(4)]
    results = [runtime.call('encode', image) for image in images]
    with torch.no_grad(), exactly():
        for image, result in zip(images, results):
            for tensor, wanted in zip(result, runtime.network.engine('encode', image)):
                torch.testing.assert_close(tensor, wanted, atol=1e-5, rtol=1e-5)


def test_inputs_are_read_at_the_call_and_not_written(runtime):
    image, = tensors(runtime, (1, 3, 16, 24))
    before = image.clone()
    first = runtime.call('encode', image)[0].clone()
    assert torch.equal(image, before)
    image.zero_()
    assert not torch.allclose(runtime.call('encode', image)[0], first)


def test_results_can_be_fed_back(runtime):
    """As a step's flow is the next step's input, also within inference mode."""
    a, b, weight = tensors(runtime, (1, 2, 5, 7), (1, 2, 5, 7), (1, 1, 1, 1))
    expected_a, expected_b = a, b
    with torch.inference_mode():
        for _ in range(5):
            a, b = runtime.call('mix', a, b, weight)
    for _ in range(5):
        expected_a, expected_b = expected_a - 2 * expected_b, weight * expected_b
    torch.testing.assert_close(a, expected_a, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(b, expected_b, atol=1e-4, rtol=1e-4)


def test_no_gradients_are_recorded(runtime):
    assert not runtime.call('encode', *tensors(runtime, (1, 3, 8, 8)))[0].requires_grad


def test_an_unknown_engine_is_named(runtime):
    with pytest.raises(ValueError, match="small has no engine 'step'; it has"):
        runtime.call('step', *tensors(runtime, (1, 3, 8, 8)))


@needs_openvino
def test_openvino_refuses_to_hand_an_input_through():
    """It would write over the input, which may be a kept feature."""
    runtime = create_runtime('openvino', Small())
    a, b = tensors(runtime, (1, 2, 5, 7), (1, 2, 5, 7))
    with pytest.raises(RuntimeError, match="small 'returns' returns one of its inputs"):
        runtime.call('returns', a, b)


@needs_openvino
def test_the_cache_is_used_and_never_mixes_networks_up(cache):
    """One architecture with other weights must not be served the first one's engine."""
    shape = (1, 3, 16, 24)
    first = create_runtime('openvino', Small(seed=0))
    image, = tensors(first, shape)
    agree(first, 'encode', image)
    files = {path: path.stat().st_mtime_ns for path in (cache / 'openvino').rglob('*.blob')}
    assert files
    agree(create_runtime('openvino', Small(seed=1)), 'encode', image)
    grown = set((cache / 'openvino').rglob('*.blob'))
    assert len(grown) > len(files)
    agree(create_runtime('openvino', Small(seed=0)), 'encode', image)
    assert set((cache / 'openvino').rglob('*.blob')) == grown


@needs_openvino
def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / 'file'
    blocked.write_text('not a folder')
    monkeypatch.setenv('FLOW_ROS_CACHE', str(blocked))
    with caplog.at_level(logging.WARNING):
        runtime = create_runtime('openvino', Small())
    assert str(blocked) in caplog.text
    assert 'FLOW_ROS_CACHE' in caplog.text
    agree(runtime, 'encode', *tensors(runtime, (1, 3, 16, 24)))


def test_where_the_cache_is(monkeypatch, tmp_path):
    from flow_ros.runtimes.cache import cache_directory
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path / 'a'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'b'))
    assert cache_directory() == tmp_path / 'a'
    monkeypatch.delenv('FLOW_ROS_CACHE')
    assert cache_directory() == tmp_path / 'b' / 'flow_ros'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path / 'c'))
    assert cache_directory() == tmp_path / 'c' / '.cache' / 'flow_ros'


@needs_openvino
def test_many_sizes_do_not_pile_up(monkeypatch):
    runtime = create_runtime('openvino', Small())
    from flow_ros.runtimes import openvino
    monkeypatch.setattr(openvino, '_MOST_ENGINES', 3)
    for width in range(1, 6):
        assert runtime.call('same', torch.ones(1, 1, 1, width))[1].sum() == 4 * width
    assert len(runtime._engines) == 3


@needs_openvino
@pytest.mark.parametrize('precision', ['f32', 'fast'])
def test_dip_rt_in_openvino_agrees_with_torch(precision):
    """Cold and warm; untrained weights made larger, so that the flow is not nearly zero."""
    torch.manual_seed(0)
    network = create('dip_rt')
    with torch.no_grad():
        for head in (network.search.flow[-1], network.propagation.flow):
            head.weight.mul_(20)
    runtime = create_runtime('openvino', network, precision=precision, threads=1)
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(2, 3, 12, 20, generator=generator) * 255
    images = nn.functional.interpolate(coarse, size=(90, 155), mode='bicubic')
    prior = torch.full((1, 2, 90, 155), 3.0)
    with torch.inference_mode():
        for prior_flow in (None, prior) if precision == 'f32' else (prior,):
            outputs = []
            for call in (None, runtime.call):
                a, b = (network.encode(image[None], call=call) for image in images)
                state = network.start(a, b, prior_flow=prior_flow, iterations=2, call=call)
                while state.schedule:
                    state = network.step(state, call=call)
                outputs.append(network.finish(state, call=call))
            expected, result = outputs
            assert expected.flow.std() > 0.1
            errors = (result.flow - expected.flow).norm(dim=1).flatten()
            limit = 0.01 if precision == 'f32' else 1.0
            assert errors.quantile(0.999) < limit
            assert (result.confidence - expected.confidence).abs().max() < limit
            assert (result.occlusion - expected.occlusion).abs().max() < limit


def test_auto_says_what_it_chose_and_why(monkeypatch):
    runtime = create_runtime('auto', Small())
    assert runtime.reason.startswith('auto: ')
    if torch.cuda.is_available():  # test_factory.py has more
        assert (runtime.name, runtime.device.type) == ('torch', 'cuda')
    elif importlib.util.find_spec('openvino') is not None:
        assert (runtime.name, runtime.device.type) == ('openvino', 'cpu')
        assert runtime.reason.startswith('auto: no CUDA device (torch ')
        assert runtime.reason.endswith('), and OpenVINO is installed')
        assert 'device cpu was asked for' in create_runtime('auto', Small(), device='cpu').reason
    else:
        assert (runtime.name, runtime.device.type) == ('torch', 'cpu')
    assert create_runtime('torch', Small(), device='cpu').reason == 'asked for by name'


def test_without_openvino(monkeypatch):
    """With the package out of reach, as on a machine that lacks it."""
    monkeypatch.setitem(sys.modules, 'openvino', None)
    monkeypatch.setattr(importlib.util, 'find_spec', find_spec_without_openvino)
    monkeypatch.setattr('flow_ros.runtimes.factory.find_spec', find_spec_without_openvino)
    runtime = create_runtime('auto', Small(), device='cpu')
    assert runtime.name == 'torch'
    assert 'OpenVINO is not installed' in runtime.reason
    with pytest.raises(RuntimeUnavailable, match='pip install openvino'):
        create_runtime('openvino', Small())


real_find_spec = importlib.util.find_spec


def find_spec_without_openvino(name, package=None):
    return None if name.startswith('openvino') else real_find_spec(name, package)


def test_what_cannot_be_had_is_refused_with_what_to_do():
    with pytest.raises(RuntimeUnavailable, match=r"'tensorrt' runs on CUDA.*seen device 'cpu'"):
        create_runtime('tensorrt', Small(), device='cpu')
    if real_find_spec('openvino') is not None and torch.cuda.is_available():
        with pytest.raises(RuntimeUnavailable, match="runs on the CPU; seen device 'cuda'"):
            create_runtime('openvino', Small(), device='cuda')
    missing = f'cuda:{torch.cuda.device_count()}'
    with pytest.raises(RuntimeUnavailable, match=f"device '{missing}' is not there.*use device"):
        create_runtime('torch', Small(), device=missing)


@pytest.mark.parametrize(('name', 'options', 'message'), [
    ('onnx', {}, "runtime must be one of auto, torch, openvino, tensorrt; seen 'onnx'"),
    ('torch', {'precision': 'int8'}, "precision must be one of f32, fast; seen 'int8'"),
    ('torch', {'threads': 0}, 'threads must be at least 1, or None .*; seen 0'),
    ('torch', {'device': 'gpu'}, "device must be 'cpu', 'cuda' or 'cuda:N'; seen 'gpu'"),
    ('torch', {'device': 'meta'}, "device must be 'cpu', 'cuda' or 'cuda:N'; seen 'meta'"),
])
def test_bad_arguments_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_runtime(name, Small(), **options)


def test_torch_threads_are_set():
    before = torch.get_num_threads()
    try:
        create_runtime('torch', Small(), device='cpu', threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_openvino_is_not_imported_for_torch():
    code = ('import sys; from flow_ros.streaming import FlowEstimator; '
            'from flow_ros.networks import create; '
            'FlowEstimator(network=create("dip_rt"), runtime="torch", device="cpu"); '
            'sys.exit("openvino" in sys.modules)')
    assert os.system(f"{sys.executable} -c '{code}'") == 0
