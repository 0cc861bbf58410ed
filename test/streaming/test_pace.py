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

"""Budgets kept by the estimator, on a clock that only the engines move."""

from block_matching import BlockMatching
import cv2
import numpy as np
import pytest
import torch

from flow_ros.networks import create
from flow_ros.runtimes.torch import TorchRuntime
from flow_ros.streaming import Budget, FlowEstimator
from flow_ros.streaming.early_stop import differing
from flow_ros.streaming.pace import Paces
from flow_ros.streaming.planner import ROUNDS
from flow_ros.streaming.thumbnails import thumbnails

torch.set_num_threads(1)

DT = 1 / 16
SIZE = (96, 128)


class Timed(TorchRuntime):
    """Torch, whose engines take as long as they are said to: ms by engine and level."""

    def __init__(self, network=None, *, costs=None, graphed=False):
        super().__init__(network or BlockMatching(radius=1), device=torch.device('cpu'))
        self.now = 100.0
        self.load = 1.0
        self.once = {}
        self.costs = costs or {'encode': 20.0, ('step', 16): 5.0, ('step', 8): 20.0,
                               'finish': 10.0}
        self.asked = []
        self._pretends = graphed

    @property
    def graphed(self):
        return self._pretends

    def call(self, engine, /, *tensors):
        level = SIZE[0] // tensors[0].shape[-2]
        ms = self.costs.get((engine, level), self.costs.get(engine, 10.0)) * self.load
        self.now += (ms + self.once.pop(engine, 0.0)) / 1e3
        return super().call(engine, *tensors)

    def loop(self, state, lap=None, control=None):
        self.asked.append(control is not None)
        if not self._pretends:
            return super().loop(state, lap, control)
        result = super().loop(state, None, control)
        if lap is not None:
            lap('steps')  # one piece of work
        return result


def estimator(runtime=None, **options):
    runtime = runtime or Timed()
    flow = FlowEstimator(runtime=runtime, **{'outputs': {'flow'}, 'early_stop_px': 0.0,
                                             **options})
    flow._paces = Paces(clock=lambda: runtime.now)
    return flow


def texture(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (SIZE[0] // 8, SIZE[1] // 4, 3))
    return cv2.resize(noise.astype(np.uint8), (2 * SIZE[1], SIZE[0]),
                      interpolation=cv2.INTER_CUBIC)


def pan(k, seed=0):
    return np.ascontiguousarray(texture(seed)[:, 4 * k:4 * k + SIZE[1]])


def run(flow, count, first=0, **arguments):
    results = [flow(pan(k % 20, seed=k // 20), k * DT, **arguments)
               for k in range(first, first + count)]
    return [result for result in results if result is not None]


def levels(result):
    return [step.level for step in result.steps]


def test_a_fixed_number_of_iterations_knows_no_time():
    flow = estimator(budget=Budget(iterations=2))
    results = run(flow, 6)
    assert {result.iterations for result in results[1:]} == {2}
    assert all((result.budget_ms, result.overrun, result.ended) == (None, False, 'schedule')
               for result in results)
    assert results[-1].spent_ms == pytest.approx(70.0)  # 20 + 2 * 20 + 10
    assert results[-1].predicted_ms == pytest.approx(70.0)


def test_a_latency_is_kept_with_as_many_steps_as_fit():
    flow = estimator(budget=Budget(latency_ms=100.0))
    results = run(flow, 16)
    assert results[0].iterations == 1  # nothing is known: one step
    assert not any(result.overrun for result in results)
    last = results[-1]
    assert levels(last) == [8, 8, 8]  # 20 + 3 * 20 + 10 = 90
    assert (last.spent_ms, last.predicted_ms) == (pytest.approx(90.0), pytest.approx(90.0))
    assert (last.budget_ms, last.ended) == (100.0, 'deadline')
    flow.budget = Budget(latency_ms=1000.0)
    last = run(flow, 2, first=16)[-1]
    assert (last.iterations, last.ended) == (BlockMatching.most_iterations, 'schedule')
    flow.budget = Budget(latency_ms=1000.0, iterations=5)
    assert run(flow, 2, first=18)[-1].iterations == 5


def test_a_cold_start_reaches_its_finest_level():
    flow = estimator(budget=Budget(latency_ms=80.0), warm_start=False)
    results = run(flow, 16)
    assert levels(results[-1]) == [16] * 6 + [8]  # 20 + 30 + 20 + 10
    flow.budget = Budget(latency_ms=52.0)
    assert set(levels(run(flow, 2, first=16)[-1])) == {16}  # it cannot fit


def test_costs_are_known_before_the_first_pair_after_prepare():
    flow = estimator(budget=Budget(latency_ms=100.0))
    flow.prepare(*SIZE)
    results = run(flow, 3)
    assert levels(results[0]).count(8) >= 1
    assert not any(result.overrun for result in results)
    assert levels(results[1]) == [8, 8, 8]


def test_a_time_that_is_too_short_gives_flow_and_is_counted():
    flow = estimator(budget=Budget(latency_ms=5.0))
    results = run(flow, 6)
    assert len(results) == 5
    assert all(result.overrun and result.iterations == 1 for result in results)
    assert results[-1].spent_ms == pytest.approx(50.0)


def test_what_has_gone_by_and_what_comes_after_count():
    runtime = Timed()
    flow = estimator(runtime, budget=Budget(latency_ms=100.0))
    run(flow, 16)
    last = run(flow, 2, first=16, after_ms=25.0)[-1]
    assert (last.iterations, last.overrun) == (2, False)  # 70 + 25
    late = flow(pan(18), 18 * DT, came=runtime.now - 0.045)
    assert (late.iterations, late.spent_ms) == (1, pytest.approx(95.0))
    assert flow(pan(19), 19 * DT, came=runtime.now - 0.060).overrun


def test_a_step_that_takes_long_is_the_last():
    runtime = Timed()
    flow = estimator(runtime, budget=Budget(latency_ms=150.0))
    assert run(flow, 16)[-1].iterations == 6
    runtime.once['step'] = 60.0
    cut = run(flow, 1, first=16)[-1]
    assert (cut.iterations, cut.ended, cut.overrun) == (3, 'deadline', False)
    assert run(flow, 1, first=17)[-1].iterations == 6  # one outlier changes nothing


def test_a_load_takes_steps_away_within_a_few_frames():
    runtime = Timed()
    flow = estimator(runtime, budget=Budget(latency_ms=150.0))
    run(flow, 16)
    runtime.load = 1.5
    results = run(flow, 16, first=16)
    assert sum(result.overrun for result in results) <= 3
    assert not any(result.overrun for result in results[4:])
    assert results[-1].iterations == 3  # 30 + 3 * 30 + 15
    runtime.load = 1.0
    assert run(flow, 40, first=32)[-1].iterations == 6


@pytest.mark.parametrize('given', [True, False])
def test_a_rate_is_the_cameras_period(given):
    flow = estimator(budget=Budget(rate=True), max_gap_s=10.0)
    results = run(flow, 16, **({'period_s': 0.1} if given else {}))
    period = 100.0 if given else 1e3 * DT
    assert {result.budget_ms for result in results} == {period}
    assert not any(result.overrun for result in results)
    assert results[-1].iterations == (3 if given else 1)
    if not given:  # a dropped frame does not make the camera slower
        assert flow(pan(18), 20 * DT).budget_ms == period


@pytest.mark.parametrize('options', [{'direction': 'both'},
                                     {'outputs': {'flow', 'confidence', 'occlusion'}}])
def test_two_directions_share_the_time(options):
    runtime = Timed()
    flow = estimator(runtime, budget=Budget(latency_ms=160.0), **options)
    results = run(flow, 16)
    assert not any(result.overrun for result in results)
    last = results[-1]
    assert last.spent_ms == pytest.approx(160.0)  # 20 + 2 * (3 * 20 + 10)
    assert last.predicted_ms == pytest.approx(160.0)
    assert levels(last) == [8, 8, 8]
    if last.backward is not None:
        assert levels(last.backward) == [8, 8, 8]
        assert (last.backward.spent_ms, last.backward.budget_ms) == (last.spent_ms, 160.0)


def test_where_a_loop_is_one_piece_of_work_it_is_planned_ahead():
    runtime = Timed(graphed=True)
    flow = estimator(runtime, budget=Budget(latency_ms=200.0))
    results = run(flow, 30)
    assert not any(runtime.asked)
    assert not any(result.overrun for result in results[2:])
    assert {result.iterations for result in results[1:]} <= set(ROUNDS)
    assert results[-1].iterations == 8  # 20 + 8 * 20 + 10; 12 would not fit
    assert results[-1].predicted_ms == pytest.approx(results[-1].spent_ms, rel=0.2)
    runtime.load = 1.5
    results = run(flow, 16, first=30)
    assert not any(result.overrun for result in results[6:])


@pytest.mark.parametrize(('name', 'options', 'most'), [
    ('mscsl', {}, 4), ('hd3', {'encoder': 'vgg', 'decoder': 'resnet', 'context': False,
                               'decoder_width': 16}, 5),
    ('hd3', {'encoder': 'vgg', 'decoder': 'resnet', 'context': False, 'decoder_width': 16,
             'cues': True}, 5),
    ('dip', {}, 12), ('dip_rt', {'hidden': 8}, 12)])
def test_every_network_keeps_to_its_time(name, options, most):
    torch.manual_seed(0)
    network = create(name, **options)
    assert network.most_iterations == most
    direction = 'both' if options.get('cues') else 'forward'
    runtime = Timed(network, costs={'encode': 20.0})
    flow = estimator(runtime, budget=Budget(latency_ms=65.0), direction=direction)
    results = run(flow, 6)
    assert len(results) == 5
    assert all(result.iterations >= 1 for result in results)
    assert not any(result.overrun for result in results[2:])
    few = results[-1].iterations
    flow.budget = Budget(latency_ms=1000.0)
    last = run(flow, 2, first=6)[-1]
    assert (last.ended, last.overrun) == ('schedule', False)
    assert last.iterations > few
    assert last.iterations % most == 0


def test_a_network_that_makes_both_directions_at_once_spends_it_all_on_one_loop():
    torch.manual_seed(0)
    network = create('hd3', encoder='vgg', decoder='resnet', context=False, decoder_width=16,
                     cues=True)
    runtime = Timed(network, costs={'encode': 20.0})
    flow = estimator(runtime, budget=Budget(latency_ms=65.0), direction='both')
    last = run(flow, 12)[-1]
    assert last.iterations == 4  # 20 + 4 * 10, and a finish that costs nothing here
    assert last.backward.iterations == 4


def still(k, noise=2.0):
    random = np.random.default_rng(k)
    return np.clip(pan(0) + random.normal(0, noise, (*SIZE, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize('graphed', [False, True])
def test_a_still_scene_takes_one_step_for_each_level(graphed):
    runtime = Timed(graphed=graphed)
    flow = estimator(runtime, budget=Budget(iterations=8), early_stop_px=0.5)
    results = [flow(still(k), k * DT) for k in range(5)][1:]
    assert [levels(result) for result in results] == [[16, 8], [8], [8], [8]]
    assert {result.ended for result in results} == {'early stop'}
    moving = run(estimator(Timed(), budget=Budget(iterations=8)), 5)
    assert results[-1].spent_ms < 0.5 * moving[-1].spent_ms


@pytest.mark.parametrize('graphed', [False, True])
def test_a_scene_that_stops_takes_its_prior_back(graphed):
    flow = estimator(Timed(graphed=graphed), budget=Budget(iterations=8), early_stop_px=0.5)
    for k in range(4):
        flow(pan(2 * k), k * DT)
    stopped = flow(pan(6), 4 * DT)
    assert stopped.warm
    assert stopped.iterations > 1  # although the frames do not differ


def with_square(k, x):
    frame = still(k)
    frame[40:52, x:x + 12] = np.random.default_rng(9).integers(0, 256, (12, 12, 3))
    return frame


def test_a_small_object_that_starts_to_move_is_no_still_scene():
    frames = [with_square(k, 60 if k < 3 else 64) for k in range(4)]
    blocks = [thumbnails(frame).blocks for frame in frames]
    assert not differing(blocks[1], blocks[2]).any()
    found = differing(blocks[2], blocks[3])
    assert found[5:7, 7:9].all()  # where it was and is
    assert found.mean() < 0.2
    flow = estimator(Timed(graphed=True), budget=Budget(iterations=8), early_stop_px=0.5)
    results = [flow(frame, k * DT) for k, frame in enumerate(frames)][1:]
    assert [result.iterations for result in results] == [2, 1, 8]


@pytest.mark.parametrize('noise', [0.0, 2.0, 6.0])
def test_noise_is_no_difference_and_light_is(noise):
    a, b = (thumbnails(still(k, noise)).blocks for k in range(2))
    assert not differing(a, b).any()
    assert differing(a, b + 8).all()


@pytest.mark.parametrize(('name', 'bad', 'message'), [
    ('early_stop_px', -1.0, 'early_stop_px must be at least 0'),
    ('early_stop_px', float('nan'), 'early_stop_px must be at least 0'),
])
def test_bad_settings_are_named(name, bad, message):
    flow = estimator()
    with pytest.raises(ValueError, match=message):
        setattr(flow, name, bad)


@pytest.mark.parametrize(('arguments', 'message'), [
    ({'after_ms': -1.0}, 'after_ms must be at least 0 and finite; seen -1'),
    ({'after_ms': float('nan')}, 'after_ms must be'),
    ({'came': float('nan')}, 'came must be finite'),
    ({'period_s': 0.0}, 'period_s must be positive and finite, in seconds; seen 0'),
])
def test_bad_arguments_of_a_frame_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimator()(pan(0), 0.0, **arguments)
