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

"""The TensorRT runtime on a fake of TensorRT that computes with torch; no GPU, no TensorRT."""

from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
import logging
import threading
import weakref

from fake_cuda import FakeGraphDevice, FakeStreams
from fake_tensorrt import Allocation, DataType, FakeApi, FakeContext, FakeEngine
import pytest
import torch
from torch import nn

from flow_ros.networks import create
from flow_ros.runtimes.acts import record_acts
from flow_ros.runtimes.base import EngineFault, RuntimeUnavailable
from flow_ros.runtimes.tensorrt import execution, PlanError, TensorRtRuntime, UnknownShape
from flow_ros.runtimes.torch import TorchRuntime
from flow_ros.streaming import Budget, FlowEstimator

torch.set_num_threads(1)

WIDTH, HEIGHT = 96, 64


class Made:
    """A runtime for dip_rt on a fake TensorRT, and all that is behind it."""

    def __init__(self, network, *, dynamic=False, graphs=False, **api):
        self.network = network
        self.acts = record_acts(network, width=WIDTH, height=HEIGHT, dynamic=dynamic)
        self.engines = {act.name.encode(): FakeEngine(network, act, free=dynamic)
                        for act in self.acts}
        self.graph_device = FakeGraphDevice() if graphs else None
        self.streams = FakeStreams()
        self.api = FakeApi(self.engines, self.graph_device, **api)
        self.plans = {act.name: act.name.encode() for act in self.acts}

    def runtime(self, **changes):
        options = {'plans': self.plans, 'acts': self.acts, 'device': torch.device('cpu'),
                   'library': self.api.library(), 'streams': self.streams,
                   'graph_device': self.graph_device, 'reason': 'asked for by name'}
        return TensorRtRuntime(self.network, **(options | changes))


@pytest.fixture(scope='module')
def network():
    torch.manual_seed(0)
    network = create('dip_rt').eval()
    with torch.no_grad():
        for head in (network.search.flow[-1], network.propagation.flow):
            head.weight.mul_(20)
    return network


def inputs(act, seed=0, factor=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*spec.shape[:2], *(factor * size for size in spec.shape[2:]),
                        generator=generator).to(spec.dtype) for spec in act.inputs]


def agree(runtime, act, tensors):
    with torch.no_grad():
        expected = runtime.network.engine(act.engine, *tensors)
    results = runtime.call(act.engine, *tensors)
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected):
        assert result.shape == wanted.shape
        torch.testing.assert_close(result, wanted)
    return results


def frames(count, height=HEIGHT, width=WIDTH):
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 3, height // 8, width // 8 + count, generator=generator)
    wide = nn.functional.interpolate(coarse, scale_factor=8, mode='bicubic').clamp(0, 1)
    return [(wide[0, :, :, 3 * index:width + 3 * index] * 255).to(torch.uint8)
            .permute(1, 2, 0).contiguous().numpy() for index in range(count)]


@pytest.mark.parametrize('dynamic', [False, True])
def test_each_act_is_bound_by_name(network, dynamic):
    """The engine's tensors are in another order than the act's; all have one shape or two."""
    made = Made(network, dynamic=dynamic)
    runtime = made.runtime()
    for act in made.acts:
        agree(runtime, act, inputs(act))
    assert (runtime.name, runtime.reason) == ('tensorrt', 'asked for by name')


def test_the_act_is_found_by_its_shapes(network):
    """Both levels of dip_rt are one engine function, and two plans."""
    made = Made(network)
    runtime = made.runtime()
    levels = {act.name: act for act in made.acts if act.engine == 'step'}
    assert set(levels) == {'step_16', 'step_8'}
    agree(runtime, levels['step_8'], inputs(levels['step_8']))
    assert (made.engines[b'step_8'].contexts, made.engines[b'step_16'].contexts) == (1, 0)


def test_results_are_the_callers_and_inputs_are_left_alone(network):
    made = Made(network)
    runtime = made.runtime()
    act = made.acts[0]
    images = [inputs(act, seed) for seed in range(3)]
    copies = [image[0].clone() for image in images]
    results = [runtime.call(act.engine, *image) for image in images]
    with torch.no_grad():
        for image, copy, result in zip(images, copies, results):
            assert torch.equal(image[0], copy)
            torch.testing.assert_close(result, network.engine(act.engine, copy))


def test_inputs_of_any_layout_and_type(network):
    """Channels last, slices that begin anywhere, and another precision are made to fit."""
    made = Made(network)
    runtime = made.runtime()
    act = made.acts[0]
    image, = inputs(act)
    agree(runtime, act, [image.to(memory_format=torch.channels_last)])
    wide = torch.zeros(1, 3, HEIGHT, WIDTH + 3)
    wide[..., 3:] = image
    agree(runtime, act, [wide[..., 3:]])
    batch = torch.zeros(3 * HEIGHT * WIDTH + 1)
    batch[1:] = image.flatten()
    agree(runtime, act, [batch[1:].view(image.shape)])
    torch.testing.assert_close(runtime.call(act.engine, image.double()),
                               runtime.call(act.engine, image))
    assert not runtime.call(act.engine, image.requires_grad_())[0].requires_grad


def test_half_features_stay_half(network):
    """The plan says what its tensors are, not the caller."""
    made = Made(network)
    act = next(act for act in made.acts if act.name == 'step_8')
    halves = replace(act, inputs=tuple(
        replace(spec, dtype=torch.float32 if spec.name == 'flow' else torch.float16)
        for spec in act.inputs), outputs=(replace(act.outputs[0], dtype=torch.float16),
                                          act.outputs[1]))

    class Widening:
        name = 'dip_rt'

        def engine(self, name, *tensors):
            assert [tensor.dtype for tensor in tensors] == [torch.float16] * 4 + [torch.float32]
            return network.engine(name, *(tensor.float() for tensor in tensors))

    made.engines[b'half'] = FakeEngine(Widening(), halves)
    runtime = made.runtime(plans={'step_8': b'half'}, acts=[halves])
    tensors = inputs(act)
    hidden, flow = runtime.call('step', *tensors)
    assert (hidden.dtype, flow.dtype) == (torch.float16, torch.float32)
    with torch.no_grad():
        expected = network.engine('step', *(tensor.half().float() for tensor in tensors[:4]),
                                  tensors[4])
    torch.testing.assert_close(flow, expected[1])


def test_a_dynamic_plan_follows_the_size(network):
    made = Made(network, dynamic=True)
    runtime = made.runtime()
    for factor in (1, 2, 1, 3):
        for act in made.acts[:2]:
            agree(runtime, act, inputs(act, factor, factor))
    assert [engine.contexts for engine in made.engines.values()][:2] == [1, 1]


def test_a_shape_that_is_refused_half_way_is_set_again(network, monkeypatch):
    """The context then has shapes of two frames."""
    made = Made(network, dynamic=True)
    runtime = made.runtime()
    act = next(act for act in made.acts if act.engine == 'step')
    agree(runtime, act, inputs(act))
    take = FakeContext.set_input_shape
    with monkeypatch.context() as patch:
        patch.setattr(FakeContext, 'set_input_shape', lambda self, name, shape: (
            name != act.inputs[-1].name and take(self, name, shape)))
        with pytest.raises(EngineFault, match=r'shape \(1, 2, .*\) of flow refused'):
            runtime.call(act.engine, *inputs(act, factor=2))
    agree(runtime, act, inputs(act))


def test_inputs_are_aligned_and_copied_only_where_they_must(network):
    """TensorRT wants addresses that are multiples of 256, and says so only by failing."""
    act = record_acts(network, width=WIDTH, height=HEIGHT)[0]
    binding = execution._Binding(act.inputs[0].name, torch.float32, act.inputs[0].shape,
                                act.inputs[0].shape, act.inputs[0].shape)
    memory = torch.rand(2 * 3 * HEIGHT * WIDTH + 256)
    first = -memory.data_ptr() % 256 // 4
    for shift in (0, 1, 32, 64):
        tensor = memory[first + shift:][:3 * HEIGHT * WIDTH].view(act.inputs[0].shape)
        bindable = execution._bindable(tensor, binding, torch.device('cpu'))
        assert torch.equal(bindable, tensor)
        assert (bindable.data_ptr() == tensor.data_ptr()) is (shift in (0, 64))


@pytest.mark.parametrize('default', [True, False])
def test_the_default_stream_and_the_engines_wait_for_each_other(monkeypatch, default):
    """On any other stream the engine runs on that one, and nothing waits."""
    log = []

    class Stream:
        def __init__(self, handle):
            self.cuda_stream = handle

        def wait_stream(self, other):
            log.append((self.cuda_stream, other.cuda_stream))

    current = Stream(0 if default else 5)
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: Stream(9))
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device=None: current)
    monkeypatch.setattr(torch.cuda, 'device', lambda device: nullcontext())
    streams = execution.CudaStreams(torch.device('cuda:0'))
    with streams.turn() as stream:
        assert not log
        with pytest.raises(ZeroDivisionError), streams.in_step(stream):
            log.append('runs')
            raise ZeroDivisionError
    assert stream == (9 if default else 5)
    assert log == ([(9, 0), 'runs', (0, 9)] if default else ['runs'])


def test_a_shape_without_a_plan_is_named(network):
    made = Made(network)
    runtime = made.runtime()
    with pytest.raises(UnknownShape, match=r"dip_rt 'encode': no plan takes tensors of the "
                                           r'shapes 1x3x32x32; there are plans for 1x3x64x96\. '
                                           r'Build engines'):
        runtime.call('encode', torch.zeros(1, 3, 32, 32))
    with pytest.raises(UnknownShape, match='1x64x4x6, 1x64x4x6, .*; 1x64x8x12'):
        runtime.call('step', torch.zeros(1, 64, 2, 2))
    dynamic = Made(network, dynamic=True).runtime()
    with pytest.raises(UnknownShape, match=r'there are plans for 1x3x1\.\.256x1\.\.384'):
        dynamic.call('encode', torch.zeros(1, 3, 512, 32))
    with pytest.raises(ValueError, match=r"dip_rt has no engine 'match'; it has \('encode', "):
        runtime.call('match', torch.zeros(1))


def test_a_failing_engine_is_an_engine_fault_with_the_versions(network):
    made = Made(network)
    runtime = made.runtime()
    made.api.fails = 'IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (an illegal memory'
    with pytest.raises(EngineFault) as caught:
        runtime.call('encode', *inputs(made.acts[0]))
    text = str(caught.value)
    assert 'dip_rt encode: the engine failed (execute_async_v3 returned False)' in text
    assert f"TensorRT 10.3.0, device 'cpu', torch {torch.__version__}" in text
    assert 'Cuda Runtime (an illegal memory' in text
    made.api.fails = ''
    agree(runtime, made.acts[0], inputs(made.acts[0]))


def test_what_torch_raises_on_the_way_is_an_engine_fault_too(network, monkeypatch):
    made = Made(network)
    runtime = made.runtime()

    def out_of_memory(self, stream_handle):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(FakeContext, 'execute_async_v3', out_of_memory)
    with pytest.raises(EngineFault, match='CUDA out of memory'):
        runtime.call('encode', *inputs(made.acts[0]))


@pytest.mark.parametrize('error', [TypeError('incompatible function arguments'),
                                   AttributeError('no attribute execute_async_v3')])
def test_bindings_of_an_unknown_version_are_an_engine_fault(network, monkeypatch, error):
    """So the next runtime serves."""
    made = Made(network)
    runtime = made.runtime()

    def changed(self, stream_handle):
        raise error

    monkeypatch.setattr(FakeContext, 'execute_async_v3', changed)
    with pytest.raises(EngineFault, match=str(error)):
        runtime.call('encode', *inputs(made.acts[0]))


def test_without_a_driver_there_is_no_runtime(network, monkeypatch):
    """The bindings raise TypeError where TensorRT's library makes nothing."""
    made = Made(network)

    def nothing(self, logger):
        raise TypeError('pybind11::init(): factory function returned nullptr')

    monkeypatch.setattr(FakeApi, 'Runtime', nothing)
    with pytest.raises(PlanError, match='encode: this plan of 6 bytes cannot be used'):
        made.runtime()


@pytest.mark.parametrize('graphs', [False, True])
def test_memory_is_in_the_order_of_the_callers_stream(network, monkeypatch, graphs):
    """What is copied is copied before the engine's stream waits, and kept until it was waited
    for: the allocator gives memory away again as soon as nobody holds it.
    """
    made = Made(network, graphs=graphs)
    alive, bound = [], []
    bind, run = FakeContext.set_tensor_address, FakeContext.execute_async_v3

    class Streams(FakeStreams):
        @contextmanager
        def in_step(self, stream):
            with super().in_step(stream):
                yield
                alive.append([each() is not None for each in bound])
                bound.clear()

    streams = Streams()

    def bindable(tensor, binding, device):
        assert streams.stepping is None
        copy = tensor.clone()
        bound.append(weakref.ref(copy))
        return copy

    def address(self, name, memory):
        assert streams.stepping is None
        return bind(self, name, memory)

    def execute(self, stream_handle):
        assert streams.stepping == stream_handle
        return run(self, stream_handle)

    monkeypatch.setattr(execution, '_bindable', bindable)
    monkeypatch.setattr(FakeContext, 'set_tensor_address', address)
    monkeypatch.setattr(FakeContext, 'execute_async_v3', execute)
    runtime = made.runtime(streams=streams)
    flows(runtime, count=3)
    assert [True] * 5 in alive  # a step
    assert all(all(each) for each in alive)


def test_no_memory_for_a_context(network, monkeypatch):
    made = Made(network)
    monkeypatch.setattr(FakeEngine, 'create_execution_context', lambda *_: None)
    with pytest.raises(EngineFault, match='no execution context could be made'):
        made.runtime().call('encode', *inputs(made.acts[0]))


@pytest.mark.parametrize(('fault', 'meaning'), [
    ('', 'it was built by another version, or is no plan'),
    ('Serialization assertion plan->header.size == blobSize failed', 'truncated or damaged'),
    ('The engine plan file is generated on an incompatible device, expecting compute 8.7 got '
     'compute 8.9, please rebuild.', 'it was built for another GPU'),
    ('CUDA driver version is insufficient for CUDA runtime version', 'there is no GPU'),
    ('what nobody has seen', 'TensorRT gives no known reason'),
])
def test_a_plan_that_cannot_be_read(network, fault, meaning, caplog):
    """Of another version, another GPU, truncated: the error says which."""
    made = Made(network, fails=fault)
    with caplog.at_level(logging.WARNING), pytest.raises(PlanError) as caught:
        made.runtime(plans=made.plans | {'finish': b'other'})
    text = str(caught.value)
    assert text.startswith('finish: this plan of 5 bytes cannot be used (')
    assert meaning in text
    assert 'TensorRT 10.3.0' in text
    assert (fault or 'Version tag does not match') in text
    assert 'flow_ros build' in text
    assert not caplog.records  # all is in the error


def test_a_plan_of_another_act(network):
    made = Made(network)
    with pytest.raises(PlanError, match='finish: this plan has the inputs .*, expected hidden, '
                                        'flow'):
        made.runtime(plans=made.plans | {'finish': b'encode'})


def test_a_type_that_torch_lacks(network, monkeypatch):
    made = Made(network)
    monkeypatch.setattr(FakeEngine, 'get_tensor_dtype', lambda *_: 'FP4')
    with pytest.raises(PlanError, match='a tensor of type FP4'):
        made.runtime()
    assert DataType.HALF  # the fake has the types that are known


def test_missing_plans_and_devices(network):
    made = Made(network)
    with pytest.raises(ValueError, match='there are no plans for step_16, finish; seen plans for '
                                         'encode, step_8'):
        made.runtime(plans={'encode': b'encode', 'step_8': b'step_8'})
    with pytest.raises(RuntimeUnavailable, match="needs an NVIDIA GPU; seen device 'cpu'"):
        made.runtime(streams=None)
    with pytest.raises(ValueError, match='image must be on cpu; seen on meta'):
        made.runtime().call('encode', torch.zeros(1, 3, HEIGHT, WIDTH, device='meta'))


def test_each_stream_has_contexts_of_its_own(network):
    """A context may run on one stream at a time: its memory is in use."""
    made = Made(network)
    runtime = made.runtime()
    act = made.acts[0]
    for handle in (7, 9, 7, 9):
        made.streams.here.handle = handle
        agree(runtime, act, inputs(act))
    assert made.engines[b'encode'].contexts == 2


def test_threads_share_the_engines(network):
    """On one stream and on streams of their own; the fake refuses two threads in one context."""
    made = Made(network)
    runtime = made.runtime()
    faults = []

    def work(number):
        made.streams.here.handle = 1 + number // 2
        try:
            for repeat in range(3):
                for act in made.acts:
                    agree(runtime, act, inputs(act, 10 * number + repeat))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert made.engines[b'encode'].contexts == 2


def test_an_older_way_to_give_memory(network, monkeypatch):
    """``device_memory`` instead of ``set_device_memory``."""
    given = []
    monkeypatch.delattr(FakeContext, 'set_device_memory')
    monkeypatch.setattr(FakeContext, 'device_memory', property(
        None, lambda self, memory: (given.append(memory), setattr(self, '_memory', memory))),
        raising=False)
    made = Made(network)
    runtime = made.runtime()
    for act in made.acts:
        agree(runtime, act, inputs(act))
    assert len(given) == len(made.acts)
    assert len(set(given)) == 1  # one scratch for the stream


def test_contexts_with_memory_of_their_own(network, monkeypatch):
    """Where a version knows no other way."""
    monkeypatch.setattr(FakeApi, 'ExecutionContextAllocationStrategy', None)
    made = Made(network)
    runtime = made.runtime()
    for act in made.acts:
        agree(runtime, act, inputs(act))


class Config:
    """TensorRT-RTX's runtime configuration."""

    def __init__(self):
        self.cache = None

    def create_runtime_cache(self):
        return object()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


def test_tensorrt_rtx_compiles_once_per_engine(network, monkeypatch):
    """All contexts of an engine share the cache of what was compiled."""
    seen = []

    def create(self, config):
        seen.append(config)
        self.contexts += 1
        return FakeContext(self, config.strategy)

    class Strategies:
        LAZY, EAGER = range(2)

    monkeypatch.setattr(FakeEngine, 'create_runtime_config', lambda self: Config(),
                        raising=False)
    monkeypatch.setattr(FakeEngine, 'create_execution_context', create)
    monkeypatch.setattr(FakeApi, 'DynamicShapesKernelSpecializationStrategy', Strategies,
                        raising=False)
    made = Made(network)
    runtime = made.runtime(library=made.api.library('tensorrt_rtx'))
    for handle in (1, 2):
        made.streams.here.handle = handle
        agree(runtime, made.acts[0], inputs(made.acts[0]))
    first, second = seen
    assert first is second
    assert first.cache is not None
    assert first.strategy is Allocation.USER_MANAGED
    assert first.dynamic_shapes_kernel_specialization_strategy == Strategies.EAGER
    assert runtime.installation.text == 'TensorRT-RTX 10.3.0'


def flows(runtime, count=6, **options):
    estimator = FlowEstimator(runtime=runtime, **options)
    results = [estimator(frame, 0.1 * index) for index, frame in enumerate(frames(count))]
    return [result for result in results if result is not None]


@pytest.mark.parametrize(('dynamic', 'graphs'), [(False, False), (False, True), (True, True)])
def test_a_stream_is_what_it_is_in_torch(network, dynamic, graphs):
    """Cold and warm, step by step and as graphs, at two budgets, whose plans are the same."""
    made = Made(network, dynamic=dynamic, graphs=graphs)
    runtime = made.runtime()
    plain = TorchRuntime(network, device=torch.device('cpu'))
    kinds = Counter()
    for budget in (Budget(), Budget(iterations=2)):
        pairs = zip(flows(runtime, budget=budget), flows(plain, budget=budget))
        for seen, expected in pairs:
            kinds[budget, seen.warm, seen.steps] += 1
            assert seen.steps == expected.steps
            assert abs(expected.flow).max() > 0.1
            assert abs(seen.flow - expected.flow).max() < 1e-3
            assert abs(seen.confidence - expected.confidence).max() < 1e-3
    if graphs:
        assert runtime._graphed.failure == ''
        assert made.graph_device.captures == sum(count > 1 for count in kinds.values()) >= 2
        assert made.graph_device.replays == sum(count - 1 for count in kinds.values())


def test_graphs_keep_their_contexts_and_the_plain_calls_theirs(network):
    """The fake refuses a change of a context that a graph was captured from."""
    made = Made(network, dynamic=True, graphs=True)
    runtime = made.runtime()
    cold = {'budget': Budget(iterations=2), 'warm_start': False}
    flows(runtime, **cold)
    contexts = made.engines[b'step'].contexts
    assert contexts == 1 + 4  # the plain calls' one, and a graph of four steps
    for act in made.acts[:2]:  # another size in between
        agree(runtime, act, inputs(act, factor=2))
    flows(runtime, **cold)
    assert made.engines[b'step'].contexts == contexts
    assert made.graph_device.replays == 4 + 5


def test_an_engine_that_fails_in_a_graph(network):
    made = Made(network, graphs=True)
    runtime = made.runtime()
    estimator = FlowEstimator(runtime=runtime, warm_start=False)
    images = frames(5)
    for index in range(4):
        estimator(images[index], 0.1 * index)
    assert made.graph_device.captures == 1
    made.graph_device.fails = 'an illegal memory access was encountered'
    with pytest.raises(EngineFault, match='replaying a CUDA graph failed'):
        estimator(images[4], 0.4)
