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

"""A stream whose runtime changes under it: no flow is lost, none is wrong."""

from dataclasses import replace
import math
import threading

from block_matching import BlockMatching
import cv2
import numpy as np
import pytest
import torch

from flow_ros.runtimes import EngineFault
from flow_ros.runtimes.handover import EngineRefused, Handover
from flow_ros.runtimes.torch import TorchRuntime
from flow_ros.streaming import FlowEstimator

torch.set_num_threads(1)

DT = 1 / 16
SIZE = (160, 240)


def pan(k, *, speed=8, width=240):
    """Return frame k of a camera that pans right: the picture moves by -speed."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 25, 3)).astype(np.uint8)
    wide = cv2.resize(noise, (400, 160), interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(wide[:, k % 18 * speed:k % 18 * speed + width])


def middle(flow):
    return np.median(flow[32:-32, 48:-48].reshape(-1, 2), axis=0).tolist()


class Engine(BlockMatching):
    """The same network with features of its own kind (negatives): they must not be mixed."""

    def encode_engine(self, image):
        return super().encode_engine(255 - image)


class HalfEngine(Engine):
    """Its maps and features are in half precision, as those of fast engines."""

    def encode_engine(self, image):
        return tuple(tensor.half() for tensor in super().encode_engine(image))

    def step_engine(self, a, b, flow):
        return super().step_engine(a.float(), b.float(), flow)

    def finish(self, state, *, call=None):
        output = super().finish(state, call=call)
        return replace(output, flow=output.flow.half(), confidence=output.confidence.half(),
                       occlusion=output.occlusion.half())


class Built(TorchRuntime):
    """An engine as the stream sees it; ``fault`` is how it fails."""

    name = 'tensorrt'

    def __init__(self, network=None, fault=''):
        super().__init__(network or Engine(), device=torch.device('cpu'), reason='checked')
        self.fault = fault
        self.frames = 0

    def loop(self, state, lap=None, control=None):
        self.frames += 1
        if self.fault == 'raise':
            raise EngineFault('enqueue failed on step_8')
        if self.fault == 'shape':
            raise ValueError('no plan for (1, 64, 10, 15)')
        state, output = super().loop(state, lap, control)
        if self.fault == 'nan':
            output.flow[..., 3, 5] = math.nan
        if self.fault == 'inf':
            output.flow[..., 3, 5] = math.inf
        if self.fault == 'confidence':
            output.confidence[..., 3, 5] = math.nan
        return state, output


class World:
    """An estimator whose better runtime is made when the test says so."""

    def __init__(self, *, network=BlockMatching, others=(), **options):
        self.lines = []
        self.orders = threading.Semaphore(0)
        self.result = None
        self.asked = []
        self.serving = TorchRuntime(network(), device=torch.device('cpu'), reason='asked for')
        self.handover = Handover(serving=[lambda: self.serving, *others], make=self.make,
                                 say=lambda level, text: self.lines.append((level, text)))
        self.flow = FlowEstimator(runtime=self.handover, **{'outputs': {'flow'}, **options})

    def make(self, *, height, width, progress):
        self.asked.append((height, width))
        assert self.orders.acquire(timeout=20.0)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def finish(self, result):
        """End the making with a runtime or an error."""
        self.result = result
        self.orders.release()
        assert self.handover.wait(20.0)

    def frame(self, k):
        return self.flow(pan(k), k * DT)

    def warnings(self):
        return [text for level, text in self.lines if level == 'warning']


@pytest.fixture
def make_world():
    worlds = []

    def make(**options):
        worlds.append(World(**options))
        return worlds[-1]
    yield make
    for world in worlds:
        world.result = RuntimeError('the test is over')
        world.orders.release(100)
        assert world.handover.close()


def check(results, first=1):
    """Check a whole stream: a right flow for each pair, stamps without a gap, warm after one."""
    for k, result in enumerate(results, start=first):
        assert (result.stamp_previous, result.stamp) == ((k - 1) * DT, k * DT)
        assert middle(result.flow) == pytest.approx([-8, 0], abs=1)
        assert result.flow.dtype == np.float32
        assert result.warm == (k > 1), (k, result.cold_reason)


@pytest.mark.parametrize('direction', ['forward', 'backward', 'both'])
def test_frames_are_answered_during_a_long_build_and_across_the_swap(make_world, direction):
    world = make_world(direction=direction)
    plain = FlowEstimator(network=BlockMatching(), runtime='torch', device='cpu',
                          outputs={'flow'}, direction=direction)
    expected = [plain(pan(k), k * DT) for k in range(10)]
    assert world.frame(0) is None
    results = [world.frame(k) for k in range(1, 6)]
    assert world.flow.runtime.name == 'torch' and world.asked == [SIZE]
    engine = Built()
    world.finish(engine)
    results += [world.frame(k) for k in range(6, 10)]
    assert world.flow.runtime.name == 'tensorrt'
    assert engine.frames == 4 * (2 if direction == 'both' else 1)
    assert engine.network.encoded == 5, 'the last frame once again, then each once'
    for k, result in enumerate(results, start=1):
        assert (result.stamp_previous, result.stamp) == ((k - 1) * DT, k * DT)
        # But for rounding, which now and then decides between two equal matches.
        assert np.abs(result.flow - expected[k].flow).mean() < 0.1
        assert result.warm == (k > 1), (k, result.cold_reason)
        if direction == 'both':
            assert np.abs(result.backward.flow - expected[k].backward.flow).mean() < 0.1
            assert result.backward.warm == (k > 1)
    assert not world.warnings()


def test_the_caller_may_write_into_frames_while_a_build_goes_on(make_world):
    world = make_world()
    for k in range(3):
        frame = pan(k)
        world.flow(frame, k * DT)
        frame[:] = 0
    world.finish(Built())
    assert middle(world.frame(3).flow) == pytest.approx([-8, 0], abs=1)


def test_a_swap_before_the_first_pair_loses_nothing(make_world):
    world = make_world()
    world.frame(0)
    world.finish(Built())
    check([world.frame(k) for k in range(1, 4)])
    assert world.flow.runtime.name == 'tensorrt'


def test_half_features_and_maps_come_out_as_float32(make_world):
    world = make_world(network=lambda: BlockMatching(heads=True),
                       outputs={'confidence', 'occlusion'})
    world.frame(0)
    world.finish(Built(HalfEngine(heads=True)))
    results = [world.frame(k) for k in range(1, 4)]
    check(results)
    assert world.flow.runtime.name == 'tensorrt'
    for result in results:
        assert result.confidence.dtype == result.occlusion_probability.dtype == np.float32


@pytest.mark.parametrize(('fault', 'words'), [
    ('nan', 'what block_matching gave is not finite: 2 of 76800 values of its flow'),
    ('inf', 'what block_matching gave is not finite: 2 of 76800 values of its flow'),
    ('confidence', 'what block_matching gave is not finite: 1 of 38400 values of its confidence'),
    ('raise', 'enqueue failed on step_8'),
    ('shape', 'no plan for (1, 64, 10, 15)')])
def test_an_engine_that_goes_bad_is_one_message_and_no_flow_is_lost(make_world, fault, words):
    world = make_world(network=lambda: BlockMatching(heads=True),
                       outputs={'confidence', 'occlusion'})
    engine = Built(Engine(heads=True))
    world.frame(0)
    world.finish(engine)
    results = [world.frame(1), world.frame(2)]
    engine.fault = fault
    results += [world.frame(k) for k in range(3, 8)]
    check(results)
    for result in results:
        assert np.isfinite(result.flow).all() and np.isfinite(result.confidence).all()
    assert engine.frames == 3, 'once bad, never asked again'
    assert world.flow.runtime.name == 'torch'
    assert world.asked == [SIZE], 'nor built again'
    warning, = world.warnings()
    assert warning.startswith('tensorrt on cpu failed for 240x160 px: ')
    assert words in warning and 'torch on cpu serves' in warning
    assert words in world.handover.status


def test_an_engine_that_is_bad_from_its_first_frame_on(make_world):
    world = make_world()
    world.frame(0)
    results = [world.frame(1)]
    world.finish(Built(fault='nan'))
    results += [world.frame(k) for k in range(2, 5)]
    check(results)
    assert len(world.warnings()) == 1


@pytest.mark.parametrize('error', [
    EngineRefused('TensorRT 10.3: 99.9 % of the errors are under 5.2 px; the limit is 0.05 px'),
    RuntimeError('no such file')])
def test_what_cannot_be_built_disturbs_no_frame(make_world, error):
    world = make_world()
    world.frame(0)
    results = [world.frame(1)]
    world.finish(error)
    results += [world.frame(k) for k in range(2, 6)]
    check(results)
    warning, = world.warnings()
    assert str(error) in warning and '240x160' in warning
    assert world.asked == [SIZE]


class Broken(BlockMatching):
    """Raises what it is told to."""

    error = None

    def step_engine(self, a, b, flow):
        if self.error is not None:
            raise self.error
        return super().step_engine(a, b, flow)


def test_where_nothing_is_left_the_error_is_the_callers_and_the_stream_goes_on(make_world):
    world = make_world(network=Broken)
    world.frame(0)
    results = [world.frame(1)]
    world.serving.network.error = EngineFault('the device is lost')
    with pytest.raises(EngineFault, match='the device is lost'):
        world.frame(2)
    world.serving.network.error = None
    result = world.frame(3)
    check(results)
    assert result.warm and result.stamp_previous == DT
    assert middle(result.flow) == pytest.approx([-16, 0], abs=1)


@pytest.mark.parametrize(('error', 'replaced'), [
    (torch.AcceleratorError('CUDA error: an illegal memory access was encountered'), True),
    (EngineFault('the device is lost'), True),
    (torch.OutOfMemoryError('out of memory'), False),
    (ValueError('a bug'), False)])
def test_a_serving_runtime_is_replaced_when_it_is_broken_not_for_a_bad_frame(
        make_world, error, replaced):
    spare = Built(fault='')
    world = make_world(network=Broken, others=[lambda: spare])
    world.frame(0)
    results = [world.frame(1)]
    world.serving.network.error = error
    if replaced:
        results += [world.frame(2), world.frame(3)]
        check(results)
        assert spare.frames == 2
        assert str(error) in world.warnings()[0]
    else:
        with pytest.raises(type(error), match=str(error)):
            world.frame(2)
        assert not spare.frames


def test_a_new_size_gets_its_own_build_and_the_old_one_serves_again(make_world):
    world = make_world()
    world.frame(0)
    world.finish(Built())
    assert world.frame(1) is not None and world.flow.runtime.name == 'tensorrt'
    assert world.flow(pan(2, width=208), 2 * DT) is None
    assert world.flow.none_reason == 'size changed'
    small = world.flow(pan(3, width=208), 3 * DT)
    assert middle(small.flow) == pytest.approx([-8, 0], abs=1)
    assert world.flow.runtime.name == 'torch' and world.asked[-1] == (160, 208)
    world.frame(4)
    assert world.frame(5).stamp_previous == 4 * DT
    assert world.flow.runtime.name == 'tensorrt'


def test_prepare_starts_the_build_and_does_not_wait_for_it(make_world):
    world = make_world()
    world.flow.prepare(*SIZE)
    assert world.handover.may_change(*SIZE)
    world.finish(Built())
    world.frame(0)
    assert world.flow.runtime.name == 'tensorrt'
    check([world.frame(k) for k in range(1, 3)])


def test_prepare_falls_back_too(make_world):
    world = make_world(network=Broken, others=[Built])
    world.serving.network.error = EngineFault('the device is lost')
    world.flow.prepare(*SIZE)
    assert world.flow.runtime.name == 'tensorrt'
    check([world.frame(k) for k in range(3)][1:])
    assert len(world.warnings()) == 1


def test_two_streams_share_a_handover(make_world):
    world = make_world()
    other = FlowEstimator(runtime=world.handover, outputs={'flow'})
    engine = Built()
    for k in range(8):
        if k == 3:
            world.finish(engine)
        if k == 5:
            engine.fault = 'nan'
        results = [world.frame(k), other(pan(k), k * DT)]
        if k:
            for result in results:
                check([result], first=k)
    assert len(world.warnings()) == 1


def test_without_a_handover_no_pixels_are_kept():
    flow = FlowEstimator(network=BlockMatching(), runtime='torch', device='cpu',
                         outputs={'flow'})
    flow(pan(0), 0.0)
    assert flow._previous.pixels is None
