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

"""What is kept of a pair's flow: the same, settled ahead of time or when it is asked for."""

from block_matching import BlockMatching
import cv2
import numpy as np
import pytest
import torch

from flow_ros.networks.base import FlowOutput
from flow_ros.streaming import Budget, FlowEstimator, past
from flow_ros.streaming.past import PairFlow, Past
from flow_ros.streaming.thumbnails import thumbnails

torch.set_num_threads(1)

DT = 1 / 16


def texture(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (10, 25, 3)).astype(np.uint8)
    return cv2.resize(noise, (400, 160), interpolation=cv2.INTER_CUBIC)


def frame(x, seed=0):
    return np.ascontiguousarray(texture(seed)[:, x:x + 240])


def estimator(**options):
    return FlowEstimator(**{'network': BlockMatching(), 'runtime': 'torch', 'device': 'cpu',
                            'early_stop_px': 0.0, **options})


def pair(time=DT, seeds=(0, 0)):
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.randn(1, 2, 5, 8, generator=generator) * 6,
                                             size=(160, 240), mode='bilinear')
    output = FlowOutput(smooth, confidence=torch.rand(1, 1, 160, 240, generator=generator))
    a, b = (thumbnails(frame(0, seed)).small for seed in seeds)
    return output, PairFlow.of(output, cell=8, small_from=a, small_to=b, dt_s=time), a


@pytest.mark.parametrize('direction', ['forward', 'backward'])
@pytest.mark.parametrize('time', [DT, 3 * DT, 0.7 * DT])
def test_settled_or_not_the_prior_is_the_same_and_that_of_carry(direction, time):
    output, flow, small = pair()
    found = []
    for ahead in (False, True):
        kept = Past({direction: flow})
        if ahead:
            kept.settle()
        assert kept.settled is ahead
        prior, reason = kept.prior(direction, small_from=small, small_to=small, dt_s=time)
        assert reason == ''
        assert kept.settled
        found.append(prior)
    expected = past.carry(flow.samples, direction=direction, time_ratio=time / DT)
    for prior in found:
        assert torch.equal(prior.flow, expected.flow)
        assert torch.equal(prior.trust, expected.trust)


def test_what_is_kept_is_a_copy():
    output, flow, small = pair()
    before = flow.samples.flow.clone(), flow.samples.reliability.clone()
    output.flow.fill_(1e9)
    output.confidence.fill_(0.5)
    assert torch.equal(flow.samples.flow, before[0])
    assert torch.equal(flow.samples.reliability, before[1])


def test_why_there_is_no_prior():
    _, flow, small = pair()
    other = thumbnails(frame(0, seed=5)).small

    def reason(kept, direction='forward', small_to=small):
        return kept.prior(direction, small_from=small, small_to=small_to, dt_s=DT)

    assert reason(Past(cold_reason='gap')) == (None, 'gap')
    assert reason(Past({'backward': flow})) == (None, 'direction changed')
    assert reason(Past({'forward': flow}), small_to=other) == (None, 'scene cut')
    _, cut, _ = pair(seeds=(0, 5))
    assert reason(Past({'forward': cut})) == (None, 'scene cut')


def test_on_another_device_it_is_settled_and_whole():
    _, flow, small = pair()
    moved = Past({'forward': flow}, cold_reason='first').to(torch.device('cpu'))
    assert moved.settled
    assert moved.cold_reason == 'first'
    prior, _ = moved.prior('forward', small_from=small, small_to=small, dt_s=DT)
    assert torch.equal(prior.flow, past.carry(flow.samples, direction='forward').flow)


@pytest.mark.parametrize('many', [0, 1 << 30])
@pytest.mark.parametrize('direction', ['forward', 'backward', 'both'])
def test_a_stream_gives_the_same_flow_settled_or_not(direction, many, monkeypatch):
    """With a dropped frame, a scene cut, and a camera that stops; in one thread or as many."""
    monkeypatch.setattr('flow_ros.streaming.estimator._MANY', many)
    frames = [(x, seed, stamp * DT) for stamp, (x, seed) in enumerate(
        [(0, 0), (8, 0), (16, 0), (32, 0), (40, 0), (0, 1), (6, 1), (12, 1), (12, 1)])]
    frames = [(x, seed, stamp + DT * (x > 16)) for x, seed, stamp in frames[:5]] + [
        (x, seed, stamp + 2 * DT) for x, seed, stamp in frames[5:]]
    one, two = (estimator(direction=direction) for _ in range(2))
    warm = []
    for x, seed, stamp in frames:
        results = [flow(frame(x, seed), stamp) for flow in (one, two)]
        two.settle()
        if results[0] is None:
            continue
        warm.append(results[0].warm)
        for a, b in ((results[0], results[1]), (results[0].backward, results[1].backward)):
            if a is None:
                assert b is None
                continue
            assert (a.warm, a.cold_reason, a.steps) == (b.warm, b.cold_reason, b.steps)
            assert np.array_equal(a.flow, b.flow)
            assert np.array_equal(a.confidence, b.confidence)
            assert np.array_equal(a.occlusion, b.occlusion)
            a.flow.fill(7), a.confidence.fill(7)  # the receiver's own, before it is settled
    assert True in warm and False in warm[1:]


def test_settling_is_done_once_and_not_where_nothing_is_open(monkeypatch):
    carried = []
    carry = past.carry
    monkeypatch.setattr(past, 'carry', lambda *samples, **options: (
        carried.append(1), carry(*samples, **options))[1])
    flow = estimator(outputs={'flow'})
    flow.settle()
    flow(frame(0), 0.0)
    flow.settle()
    assert not carried
    flow(frame(8), DT)
    assert not carried
    flow.settle()
    flow.settle()
    flow.close()
    flow.settle()
    assert len(carried) == 1
    flow(frame(16), 2 * DT)
    assert len(carried) == 1
    flow.reset()
    flow.settle()
    assert len(carried) == 1  # what is forgotten needs nothing
    assert flow(frame(24), 3 * DT) is None
    flow.warm_start = False
    flow(frame(32), 4 * DT)
    flow.settle()
    assert len(carried) == 1  # nobody will ask for it


def test_where_settling_fails_the_flow_stays_and_the_next_frame_meets_it(monkeypatch):
    def broken(*samples, **options):
        raise RuntimeError('the device died')
    flow, other = estimator(outputs={'flow'}), estimator(outputs={'flow'})
    for k in range(2):
        flow(frame(8 * k), k * DT), other(frame(8 * k), k * DT)
    with monkeypatch.context() as patch:
        patch.setattr(past, 'carry', broken)
        flow.settle()
        with pytest.raises(RuntimeError, match='the device died'):
            flow(frame(16), 2 * DT)
    results = [one(frame(16), 2 * DT) for one in (flow, other)]
    assert results[0].warm
    assert np.array_equal(results[0].flow, results[1].flow)


def test_a_rate_leaves_time_for_settling_and_a_latency_does_not(monkeypatch):
    flow = estimator(outputs={'flow'})
    orders = []
    order = flow.order
    monkeypatch.setattr(flow, 'order', lambda **asked: orders.append(order(**asked)) or orders[-1])
    flow._settling.learn('settle', 3.0)
    for budget in (Budget(latency_ms=50.0), Budget(rate=True), Budget(iterations=1)):
        flow.budget = budget
        flow(frame(8 * len(orders)), len(orders) * DT, after_ms=2.0, period_s=0.1)
    assert [(one.limit_ms, one.after_ms) for one in orders] == [
        (50.0, 2.0), (100.0, 5.0), (None, 2.0)]
