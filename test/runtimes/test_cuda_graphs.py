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

from contextlib import contextmanager
import logging
import threading

from fake_cuda import FakeGraphDevice
import numpy as np
import pytest
import torch
from torch import nn

from flow_ros.networks import create
from flow_ros.networks.base import Features, FlowNetwork, FlowOutput, State, Step
from flow_ros.runtimes import cuda_graphs
from flow_ros.runtimes.base import EngineFault, run_loop
from flow_ros.runtimes.cuda_graphs import CudaGraphDevice, GraphedLoop, ONE_CAPTURE
from flow_ros.runtimes.torch import TorchRuntime
from flow_ros.streaming import Budget, FlowEstimator
from flow_ros.streaming.pace import Paces
from flow_ros.streaming.planner import ROUNDS

torch.set_num_threads(1)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


class Small(FlowNetwork):
    """One convolution per step, with all that a loop may trip over."""

    name = 'small'
    engines = ('step', 'finish')

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 3, padding=1)
        self.waits = False

    def start(self, features_a, features_b, *, prior_flow=None, iterations=None, call=None):
        flow = features_a.tensors[0].new_zeros(1, 2, *features_a.tensors[0].shape[-2:])
        return State(features_a, features_b, level=1, flow=flow, warm=prior_flow is not None,
                     schedule=(Step(1),) * iterations, memory=(features_a.tensors[0],))

    def step(self, state, *, call=None):
        flow, hidden = (call or self.engine)('step', state.flow, state.memory[0],
                                             state.features_b.tensors[0])
        if self.waits and float(flow.sum()) > 1e9:
            raise AssertionError
        return state.advanced(flow=flow * 2 if state.warm else flow, memory=(hidden,))

    def finish(self, state, *, call=None):
        flow, = (call or self.engine)('finish', state.flow)
        height, width = state.features_a.size
        return FlowOutput(flow=flow[..., :height, :width], confidence=state.memory[0][:, :1])

    def step_engine(self, flow, hidden, other):
        flow = flow + self.conv(torch.cat([flow, hidden], dim=1)) + other
        return flow, torch.tanh(hidden + flow)

    def finish_engine(self, flow):
        return (flow * 8,)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def device():
    return FakeGraphDevice()


def features(seed, height=5, width=6):
    generator = torch.Generator().manual_seed(seed)
    return Features((torch.randn(1, 2, height, width, generator=generator),),
                    (height - 1, width - 1))


def state_of(network, seed=0, iterations=3, size=(5, 6), prior=None):
    return network.start(features(seed, *size), features(seed + 100, *size), prior_flow=prior,
                         iterations=iterations)


def same(result, expected):
    for state in (result[0], expected[0]):
        assert not state.schedule
    assert result[0].done == expected[0].done
    assert result[0].level == expected[0].level
    torch.testing.assert_close(result[0].flow, expected[0].flow)
    torch.testing.assert_close(result[0].memory, expected[0].memory)
    torch.testing.assert_close(result[1].flow, expected[1].flow)
    torch.testing.assert_close(result[1].confidence, expected[1].confidence)
    assert (result[1].occlusion is None) == (expected[1].occlusion is None)
    if expected[1].occlusion is not None:
        torch.testing.assert_close(result[1].occlusion, expected[1].occlusion)


def agree(loop, network, *states):
    results = []
    with torch.no_grad():
        for state in states:
            results.append(loop(state))
            same(results[-1], run_loop(network, state, network.engine))
    return results


def test_the_first_run_is_plain_the_second_captured_the_third_replayed(network, device):
    loop = GraphedLoop(network, network.engine, device=device)
    for seed, (captures, replays) in enumerate([(0, 0), (1, 1), (1, 2), (1, 3)]):
        agree(loop, network, state_of(network, seed))
        assert (device.captures, device.replays) == (captures, replays)


def test_the_fake_is_faithful(network, device):
    """A capture computes nothing, and a result that is not copied is overwritten."""
    image = torch.ones(3)
    tape, outputs = device.capture(lambda: None, lambda: [image * 2, (image + 1)[:2].neg_()])
    assert all(bool(output.isnan().all()) for output in outputs)
    assert device.replay(tape, [image], [torch.ones(3)], outputs)[0].tolist() == [2, 2, 2]
    device.replay(tape, [image], [torch.full((3,), 4.0)], outputs)
    assert outputs[0].tolist() == [8, 8, 8]
    assert outputs[1].tolist() == [-5, -5]
    for wrong in (lambda: image * image.sum().item(), lambda: image[image > 0],
                  lambda: image * image.new_tensor([1.0, 2.0, 3.0])):
        with pytest.raises(RuntimeError, match='not permitted when stream is capturing'):
            device.capture(lambda: None, lambda wrong=wrong: [wrong()])


def test_results_stay_and_inputs_are_read_at_the_call(network, device):
    loop = GraphedLoop(network, network.engine, device=device)
    states = [state_of(network, seed) for seed in range(6)]
    results = agree(loop, network, *states)
    with torch.no_grad():
        for result, state in zip(results, states):
            same(result, run_loop(network, state, network.engine))
    changed = state_of(network, 1)
    changed.features_b.tensors[0].zero_()
    agree(loop, network, changed)


def test_what_is_handed_through_is_the_callers_own(network, device):
    """The features outlive the pair; a graph's memory must not be kept in their place."""
    loop = GraphedLoop(network, network.engine, device=device)
    for seed in range(3):
        state = state_of(network, seed)
        after, _ = loop(state)
        assert after.features_a.tensors[0] is state.features_a.tensors[0]
        assert after.features_b.tensors[0] is state.features_b.tensors[0]
    untouched = state_of(network, iterations=0)
    for _ in range(3):
        after, _ = loop(untouched)
        assert after.flow is untouched.flow
        assert after.memory[0] is untouched.memory[0]


def test_each_kind_of_pair_has_a_graph_of_its_own(network, device):
    """Another schedule, shape, type, crop, or warm start must not replay the wrong graph."""
    loop = GraphedLoop(network, network.engine, device=device)
    prior = torch.zeros(1)
    kinds = [{}, {'iterations': 1}, {'size': (7, 6)}, {'prior': prior}, {'iterations': 2}]
    for repeat in range(3):
        for kind in kinds:
            agree(loop, network, state_of(network, repeat, **kind))
    assert device.captures == len(kinds)
    other = state_of(network)
    cropped = State(Features(other.features_a.tensors, (2, 3)), other.features_b, level=1,
                    flow=other.flow, schedule=other.schedule, memory=other.memory)
    for _ in range(2):
        result, = agree(loop, network, cropped)
        assert result[1].flow.shape[-2:] == (2, 3)
    assert device.captures == len(kinds) + 1


def test_a_state_whose_tensors_are_one_is_not_one_whose_tensors_are_two(network, device):
    loop = GraphedLoop(network, network.engine, device=device)
    shared = state_of(network)
    apart = State(shared.features_a, shared.features_b, level=1, flow=shared.flow,
                  schedule=shared.schedule, memory=(torch.ones_like(shared.memory[0]),))
    for _ in range(3):
        agree(loop, network, shared, apart)
    assert device.captures == 2


def test_graphs_do_not_pile_up(network, device, monkeypatch):
    monkeypatch.setattr(cuda_graphs, '_MOST_GRAPHS', 2)
    loop = GraphedLoop(network, network.engine, device=device)
    for height in (5, 6, 7):
        for _ in range(2):
            agree(loop, network, state_of(network, size=(height, 6)))
    assert (device.captures, loop.kept) == (3, 2)
    agree(loop, network, state_of(network, size=(7, 6)))
    assert device.captures == 3
    agree(loop, network, state_of(network, size=(5, 6)))  # given up, and made anew
    assert (device.captures, loop.kept) == (4, 2)


def test_sizes_seen_once_do_not_pile_up(network, device, monkeypatch):
    monkeypatch.setattr(cuda_graphs, '_MOST_SEEN', 3)
    loop = GraphedLoop(network, network.engine, device=device)
    for width in range(3, 20):
        agree(loop, network, state_of(network, size=(5, width)))
    assert len(loop._seen) == 3
    assert device.captures == 0


def test_moved_weights_are_captured_anew(network, device):
    loop = GraphedLoop(network, network.engine, device=device)
    agree(loop, network, *(state_of(network, seed) for seed in range(3)))
    with torch.no_grad():
        network.conv.weight.mul_(2)  # in place: the graph reads the new values
        agree(loop, network, state_of(network))
        assert device.captures == 1
        network.conv.weight.data = network.conv.weight.data * 2
    agree(loop, network, state_of(network))
    assert (device.captures, loop.kept) == (2, 1)


def test_a_failed_capture_is_told_once_and_all_stays_plain(network, device, caplog):
    device.fails = 'operation not permitted'
    loop = GraphedLoop(network, network.engine, device=device)
    with caplog.at_level(logging.WARNING):
        for seed in range(4):
            agree(loop, network, state_of(network, seed), state_of(network, seed, iterations=1))
    assert [record.getMessage() for record in caplog.records] == [
        'small runs without CUDA graphs, more slowly: capturing one failed (RuntimeError: '
        'operation not permitted)']
    assert loop.kept == 0


def test_a_step_that_waits_for_the_gpu_cannot_be_captured(network, device, caplog):
    network.waits = True
    loop = GraphedLoop(network, network.engine, device=device)
    agree(loop, network, *(state_of(network, seed) for seed in range(3)))
    assert 'not permitted when stream is capturing' in loop.failure


def test_a_failing_replay_is_an_engine_fault(network, device):
    loop = GraphedLoop(network, network.engine, device=device)
    agree(loop, network, state_of(network), state_of(network))
    device.fails = 'an illegal memory access was encountered'
    with pytest.raises(EngineFault, match='small: replaying a CUDA graph failed .an illegal'):
        loop(state_of(network))


class Cuda:
    """As much of ``torch.cuda`` as a capture needs: which stream is the current one."""

    def __init__(self, monkeypatch, fails):
        self.current = 'default'
        self.fails = fails
        self.log = log = []

        class Stream(str):
            def __new__(cls, name):
                return super().__new__(cls, name)

            def wait_stream(self, other):
                log.append(f'{self} waits for {other}')

        self.Stream = Stream
        for name in ('current_stream', 'set_stream', 'stream', 'Stream', 'graph', 'CUDAGraph',
                     'device', 'graph_pool_handle'):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def current_stream(self):
        return self.Stream(self.current)

    def set_stream(self, stream):
        self.current = stream

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            if self.fails:  # as torch's capture_end: its stream stays the current one
                raise RuntimeError('operation failed due to a previous error during capture')
        self.current = before

    def CUDAGraph(self):
        return 'graph'

    @contextmanager
    def device(self, device):
        yield

    def graph_pool_handle(self):
        return 'pool'


@pytest.mark.parametrize('fails', [False, True])
def test_the_callers_stream_is_the_current_one_after_a_capture(monkeypatch, fails):
    cuda = Cuda(monkeypatch, fails)
    device = CudaGraphDevice('graphs')
    streams = []
    if fails:
        with pytest.raises(RuntimeError, match='a previous error'):
            device.capture(lambda: streams.append(cuda.current), list)
    else:
        assert device.capture(lambda: streams.append(cuda.current), list) == ('graph', [])
    assert streams == ['graphs']
    assert cuda.current == 'default'


def test_a_replay_is_in_step_with_the_callers_stream(monkeypatch):
    """Results are of the caller's stream; all that the graph touches is of its own."""
    cuda = Cuda(monkeypatch, False)
    device = CudaGraphDevice('graphs')
    cuda.log.clear()

    class Graph:
        def replay(self):
            cuda.log.append(f'replay on {cuda.current}')
            output.copy_(3 * buffer)

    given, output = torch.rand(4, 6).t(), torch.zeros(6, 4)
    buffer, = device.buffers([given])
    assert cuda.log == ['graphs waits for default', 'default waits for graphs']
    assert buffer.data_ptr() != given.data_ptr()
    cuda.log.clear()
    fresh = torch.rand(6, 4)
    result, = device.replay(Graph(), [buffer], [fresh], [output])
    assert cuda.log == ['graphs waits for default', 'replay on graphs',
                        'default waits for graphs']
    torch.testing.assert_close(result, 3 * fresh)
    assert result.data_ptr() != output.data_ptr()
    assert cuda.current == 'default'


def test_a_capture_and_what_may_synchronise_exclude_each_other(monkeypatch):
    """The lock may be taken again by the thread that captures: it makes contexts."""
    Cuda(monkeypatch, False)
    device = CudaGraphDevice('graphs')
    taken = []

    def work():
        with ONE_CAPTURE:
            pass
        other = threading.Thread(target=lambda: taken.append(ONE_CAPTURE.acquire(blocking=False)))
        other.start()
        other.join()
        return []

    device.capture(list, work)
    assert taken == [False]


def test_laps(network, device):
    loop = GraphedLoop(network, network.engine, device=device)
    seen = []
    for _ in range(3):
        loop(state_of(network), seen.append)
    assert seen == ['steps', 'finish', 'capture', 'steps', 'steps']


def test_threads_share_a_loop(network, device):
    loop = GraphedLoop(network, network.engine, device=device)
    states = [state_of(network, seed, iterations=1 + seed % 2) for seed in range(40)]
    results = [None] * len(states)

    def work(first):
        for index in range(first, len(states), 4):
            results[index] = loop(states[index])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for result, state in zip(results, states):
            same(result, run_loop(network, state, network.engine))
    assert device.captures == 2


class Graphed(TorchRuntime):
    """The torch runtime as it is on CUDA, but for the device."""

    def __init__(self, network, device):
        super().__init__(network, device=torch.device('cpu'))
        self._graphed = GraphedLoop(self.network, self.call, device=device)


def frames(count, height=64, width=96):
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 3, height // 8, width // 8 + count, generator=generator)
    wide = nn.functional.interpolate(coarse, scale_factor=8, mode='bicubic').clamp(0, 1)
    return [(wide[0, :, :, 3 * index:width + 3 * index] * 255).to(torch.uint8)
            .permute(1, 2, 0).contiguous().numpy() for index in range(count)]


@pytest.mark.parametrize(('name', 'options'), [
    ('dip_rt', {}), ('dip', {}), ('hd3', {'encoder': 'vgg', 'context': False}), ('mscsl', {}),
    ('hd3', {'encoder': 'vgg', 'cost': 'sample', 'radius': 8, 'measure': 'sad', 'cues': True})])
def test_every_networks_loop_can_be_captured(name, options, device):
    """No step of any network waits for the GPU, and replayed flow is the plain flow."""
    torch.manual_seed(0)
    network = create(name, None, **options)
    results = []
    for runtime in (TorchRuntime(network, device=torch.device('cpu')), Graphed(network, device)):
        estimator = FlowEstimator(runtime=runtime, outputs=['flow'],
                                  budget=Budget(iterations=1 if name == 'dip' else None))
        flows = [estimator(frame, 0.1 * index) for index, frame in enumerate(frames(5))]
        results.append([flow for flow in flows if flow is not None])
    assert runtime._graphed.failure == ''
    assert device.captures >= 1
    assert device.replays >= 2
    for plain, replayed in zip(*results):
        assert plain.steps == replayed.steps
        assert abs(plain.flow).max() > 1e-3
        assert abs(plain.flow - replayed.flow).max() < 1e-4


@needs_cuda
def test_cuda_graphs_of_torch_agree_with_plain_runs():
    torch.manual_seed(0)
    network = create('dip_rt')
    results = []
    for graphs in (False, True):
        runtime = TorchRuntime(network, device=torch.device('cuda'), graphs=graphs)
        estimator = FlowEstimator(runtime=runtime)
        flows = [estimator(frame, 0.1 * index) for index, frame in enumerate(frames(6))]
        results.append([flow for flow in flows if flow is not None])
    assert runtime._graphed.failure == ''
    assert runtime._graphed.kept >= 1
    for plain, replayed in zip(*results):
        assert abs(plain.flow - replayed.flow).max() < 1e-3


@needs_cuda
def test_cuda_graphs_on_another_stream_than_the_default():
    network = Small().eval().cuda()
    loop = GraphedLoop(network, network.engine, device=CudaGraphDevice(torch.device('cuda')))
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        for seed in range(4):
            state = network.start(*(Features((part.tensors[0].cuda(),), part.size)
                                    for part in (features(seed), features(seed + 9))),
                                  iterations=3)
            same(loop(state), run_loop(network, state, network.engine))
    assert loop.failure == ''


class Paced(TorchRuntime):
    """Torch with graphs that the CPU pretends, and a clock that only its work moves, in ms.

    A capture takes 200 ms, a loop that is not replayed twice as long as one that is.
    """

    def __init__(self, network):
        super().__init__(network, device=torch.device('cpu'))
        self.graphs = FakeGraphDevice()
        self._graphed = GraphedLoop(network, self.call, device=self.graphs)
        self.now, self.load = 0.0, 1.0

    def call(self, engine, /, *tensors):
        self.now += 0.02 if engine == 'encode' else 0.0
        return super().call(engine, *tensors)

    def loop(self, state, lap=None, control=None):
        assert control is None  # nobody looks at the clock meanwhile
        captures, replays = self.graphs.captures, self.graphs.replays
        expected = run_loop(self.network, state, self.network.engine)
        result = super().loop(state, lap)
        same(result, expected)
        ms = 10.0 + sum(2.0 if step.level == 16 else 6.0 for step in state.schedule)
        ms *= self.load * (1 if self.graphs.replays > replays else 2)
        self.now += (ms + 200.0 * (self.graphs.captures - captures)) / 1e3
        return result


def test_a_budget_of_time_is_planned_ahead_through_graphs():
    """Few schedules, each a graph, whose results are those of the plain loop."""
    torch.manual_seed(0)
    runtime = Paced(create('dip_rt', hidden=8).eval())
    flow = FlowEstimator(runtime=runtime, budget=Budget(latency_ms=85.0), early_stop_px=0.0,
                         outputs={'flow'})
    flow._paces = Paces(clock=lambda: runtime.now)
    random = np.random.default_rng(0)
    frames = [random.integers(0, 256, (48, 64, 3)).astype(np.uint8) for _ in range(4)]

    def run(first, count):
        results = [flow(frames[k % 4], k / 16, came=runtime.now)
                   for k in range(first, first + count)]
        return [result for result in results if result is not None]

    results = run(0, 40)
    assert len(results) == 39
    for result in results:
        counts = {[step.level for step in result.steps].count(level)
                  for level in {step.level for step in result.steps}}
        assert len(counts) == 1 and counts <= set(ROUNDS)
    assert not any(result.overrun for result in results[20:])
    assert results[-1].iterations > 1
    assert runtime.graphs.replays > 20
    assert runtime.graphs.captures <= 8
    runtime.load = 2.0
    loaded = run(40, 30)
    assert not any(result.overrun for result in loaded[15:])
    assert loaded[-1].iterations < results[-1].iterations
