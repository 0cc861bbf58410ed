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
import tracemalloc

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
from flow_ros.runtimes.threads import torch_beside

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


def test_memory_that_nobody_holds_is_used_again():
    """A stream in its steady state takes no new memory for what its engines return."""
    runtime = create_runtime('openvino', create('dip_rt', 'default'), threads=1)
    network = runtime.network
    torch.manual_seed(0)
    images = [255 * torch.rand(1, 3, 64, 96) for _ in range(3)]
    seen = []
    old = network.encode(images[0], call=runtime.call)
    for turn in range(12):
        new = network.encode(images[turn % 3], call=runtime.call)
        state, output = runtime.loop(network.start(
            old, new, prior_flow=torch.zeros(1, 2, 64, 96), iterations=2))
        seen.append({tensor.untyped_storage().data_ptr() for tensor in (
            *new.tensors, *state.memory, state.flow, output.flow, output.confidence)})
        old = new
        del state, output, new
    first, later = set().union(*seen[:4]), set().union(*seen[4:])
    assert later <= first


def test_results_that_somebody_holds_are_never_overwritten():
    """Neither a tensor, nor a view of it, nor its array: whichever is left alone."""
    runtime = create_runtime('openvino', Parts(), threads=1)
    torch.manual_seed(0)
    keep = [lambda t: t, lambda t: t[:, 1:2, 3:], lambda t: t.numpy(), lambda t: t.numpy()[0, 1],
            lambda t: t.detach().permute(0, 2, 3, 1), lambda t: torch.from_dlpack(t)]
    held = []
    for turn in range(40):
        features, _ = runtime.call('encode', torch.rand(1, 3, 16, 24))
        kept = keep[turn % len(keep)](features)
        del features
        if turn % 3:
            held.append((kept, torch.as_tensor(kept).clone()))
        if turn % 7 == 0:
            del held[:2]
    assert len(held) > 10
    for kept, copy in held:
        assert torch.equal(torch.as_tensor(kept), copy)
    engine, = runtime._engines.values()
    assert all(len(memory._pieces) <= 4 for memory in engine._outputs)


def test_results_held_by_one_thread_are_not_touched_by_another():
    runtime = create_runtime('openvino', Parts(), threads=1)
    runtime.call('encode', torch.rand(1, 3, 16, 24))
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        held = []
        for _ in range(60):
            features, _ = runtime.call('encode', torch.rand(1, 3, 16, 24, generator=generator))
            held.append((features[:, :2], features[:, :2].clone()))
            if len(held) > 5:
                del held[int(torch.randint(5, (), generator=generator))]
            wrong.extend(1 for kept, copy in held if not torch.equal(kept, copy))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Wide(FlowNetwork):
    """With features of enough channels to be handed on channels last."""

    name = 'wide'
    engines = ('encode', 'step')

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.next = nn.Conv2d(16, 2, 3, padding=1)

    def encode_engine(self, image):
        features = self.conv(image)
        return features, features[:, :2] * 2

    def step_engine(self, features):
        return (self.next(features),)


def test_no_act_copies_its_results_for_python():
    """Of its own accord the Python of OpenVINO makes an array of each."""
    runtime = create_runtime('openvino', Parts(), threads=1)
    image = torch.rand(1, 3, 256, 256)
    runtime.call('encode', image)
    tracemalloc.start()  # which counts numpy's memory
    try:
        features = runtime.call('encode', image)
        _, highest = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert highest < min(tensor.nbytes for tensor in features) / 2


def test_an_act_gives_back_before_another_begins_where_memory_is_spared():
    network = Parts()
    network.spares_memory = True
    runtime = create_runtime('openvino', network, threads=1)
    image = torch.rand(1, 3, 64, 96)
    wanted = network.engine('encode', image)
    for _ in range(2):
        features = runtime.call('encode', image)
        torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)
        flow, = runtime.call('step', *features)
        torch.testing.assert_close(flow, features[0] - features[1])
        held = {name: engine._request for (name, _), engine in runtime._engines.items()}
        assert held['encode'] is None and held['step'] is not None


def test_tensors_are_taken_and_returned_as_they_lie():
    """Channels last or not: the same numbers, and no copy where memory is one piece."""
    runtime = create_runtime('openvino', Wide(), threads=1)
    image = torch.rand(1, 3, 12, 20)
    by_pixel = image.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        wanted, = runtime.network.engine('step', runtime.network.engine('encode', image)[0])
    for given in (image, by_pixel):
        features, few = runtime.call('encode', given)
        assert features.shape == (1, 16, 12, 20)
        assert features.is_contiguous(memory_format=torch.channels_last)
        assert few.is_contiguous()
        for form in (features, features.contiguous(), features[:, :, ::1].clone()):
            flow, = runtime.call('step', form)
            torch.testing.assert_close(flow, wanted, rtol=1e-4, atol=1e-4)
    requests = {key: engine._request for key, engine in runtime._engines.items()}
    assert len(requests) == 4  # two of each, one for each way that its input lay
    request = next(value for (name, ((_, _, pixels),)), value in requests.items()
                   if name == 'encode' and pixels)
    runtime.call('encode', by_pixel)
    assert address(request.get_input_tensor(0)) == by_pixel.data_ptr()


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

        def infer(self, *, share_outputs):
            raise RuntimeError('Exception from src/inference: out of memory\n')

    engine._request = Fails()
    with pytest.raises(EngineFault, match='OpenVINO failed: .*out of memory$'):
        runtime.call('encode', torch.rand(1, 3, 8, 8))


def test_torch_keeps_to_one_thread_of_its_caller_beside_openvino():
    runtime = create_runtime('openvino', Parts(), threads=1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        later = []
        other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        with torch_beside(runtime):
            assert torch.get_num_threads() == 1
            other.start()  # it has not used torch before
            other.join()
        assert later == [2]
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), torch_beside(runtime):
            raise KeyError
        assert torch.get_num_threads() == 2
        with torch_beside(create_runtime('torch', Parts(), device='cpu')):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
