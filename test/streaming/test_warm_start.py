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

import math

import pytest
import torch
from torch.nn import functional

from flow_ros.streaming.warm_start import carry, MOTION_STEP, REACH, sample_flow

torch.set_num_threads(1)


def slow_splat(flow, reliability, direction, ratio):
    """Return {(row, column): carried flow} by the documented rule, point after point."""
    _, height, width = flow.shape
    finite = torch.isfinite(flow).all(dim=0)
    background = flow.nan_to_num(0, 0, 0).flatten(1).median(dim=1).values.tolist()
    best = {}
    for row in range(height):
        for column in range(width):
            if not finite[row, column]:
                continue
            u, v = flow[:, row, column].tolist()
            way = 1 if direction == 'forward' else -ratio
            x, y = column + way * u, row + way * v
            motion = int(math.hypot(u - background[0], v - background[1]) / MOTION_STEP)
            trust = 0 if reliability is None else min(3, int(reliability[row, column] * 4))
            for target in ((r, c) for r in range(height) for c in range(width)):
                off = max(abs(x - target[1]), abs(y - target[0]))
                if off > REACH:
                    continue
                rank = (trust, motion, int((1 - off) * 255), row * width + column)
                if target not in best or rank > best[target][0]:
                    best[target] = (rank, (u * ratio, v * ratio))
    return {target: value for target, (_, value) in best.items()}


def scene(seed, height, width):
    """Return flow with two objects before a moving background, and a reliability."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 2, 3, 4, generator=generator) * 1.5
    flow = functional.interpolate(coarse, size=(height, width), mode='bilinear')[0]
    # Eighths, so that the sums are exact in float32 and no rank hangs on a rounding.
    flow = (flow * 8).round() / 8
    flow[:, 3:7, 2:8] = torch.tensor([4.0, 0.5]).view(2, 1, 1)
    flow[:, 5:10, 9:14] = torch.tensor([-3.25, -1.0]).view(2, 1, 1)
    reliability = (torch.rand(height, width, generator=generator) * 8).round() / 8
    return flow, reliability


def check_against_the_slow_one(flow, reliability, direction, ratio):
    """Compare all cells on which a point lands; return how many do."""
    samples = sample_flow(flow[None], cell=1,
                          confidence=None if reliability is None else reliability[None, None])
    prior = carry(samples, direction=direction, time_ratio=ratio).flow[0]
    expected = slow_splat(flow, reliability, direction, ratio)
    for (row, column), value in expected.items():
        assert prior[:, row, column].tolist() == pytest.approx(value, abs=1e-5), (row, column)
    assert prior.shape == flow.shape
    assert torch.isfinite(prior).all()
    return len(expected)


@pytest.mark.parametrize('direction', ['forward', 'backward'])
@pytest.mark.parametrize('ratio', [1.0, 2.0, 0.5])
@pytest.mark.parametrize('with_confidence', [False, True])
def test_equals_the_slow_exact_one(direction, ratio, with_confidence):
    height, width = 13, 17
    flow, reliability = scene(3, height, width)
    flow[0, 11, 3] = math.nan
    flow[1, 2, 15] = math.inf
    flow[0, 12, 16] = -1e30
    landed = check_against_the_slow_one(flow, reliability if with_confidence else None,
                                        direction, ratio)
    assert 0.5 * height * width < landed < height * width  # hits and holes


@pytest.mark.parametrize('height, width', [(1, 1), (1, 9), (9, 1), (2, 2), (3, 5), (2, 11)])
@pytest.mark.parametrize('direction', ['forward', 'backward'])
def test_small_maps_equal_the_slow_one(height, width, direction):
    generator = torch.Generator().manual_seed(height * 100 + width)
    for _ in range(5):
        flow = (torch.randn(2, height, width, generator=generator) * 12).round() / 8
        check_against_the_slow_one(flow, None, direction, 1.0)


@pytest.mark.parametrize('direction', ['forward', 'backward'])
def test_where_all_is_alike_the_last_in_reading_order_wins(direction):
    """Two rows of points meet, equally reliable, fast, near: the lower one's values win."""
    flow = torch.zeros(2, 8, 12)
    sign = 1 if direction == 'forward' else -1
    flow[1, 2] = 2.0 * sign  # down on row 4
    flow[1, 6] = -2.0 * sign  # up on row 4
    flow[0, 4] = 100.0  # and nothing else there
    check_against_the_slow_one(flow, None, direction, 1.0)
    prior = carry(sample_flow(flow[None], cell=1), direction=direction).flow[0]
    assert (prior[1, 4] == -2 * sign).all()


def test_a_reliability_that_is_not_finite_is_none():
    flow, reliability = scene(5, 12, 16)
    reliability[2:9, 3:12] = math.nan
    unknown = carry(sample_flow(flow[None], cell=1, confidence=reliability[None, None]),
                    direction='forward').flow
    none = carry(sample_flow(flow[None], cell=1,
                             confidence=reliability.nan_to_num(0)[None, None]),
                 direction='forward').flow
    assert torch.equal(unknown, none)


@pytest.mark.parametrize('cell', [1, 4, 8])
def test_every_run_and_number_of_threads_gives_the_same(cell):
    generator = torch.Generator().manual_seed(1)
    flow = torch.randn(1, 2, 233, 301, generator=generator) * 30
    occlusion = torch.rand(1, 1, 233, 301, generator=generator)
    threads = torch.get_num_threads()
    try:
        priors = []
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            samples = sample_flow(flow, cell=cell, occlusion=occlusion)
            priors.append(carry(samples, direction='forward', time_ratio=1.5).flow)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(prior, priors[0]) for prior in priors)


def test_a_batch_is_its_members():
    flows = torch.stack([scene(seed, 12, 15)[0] for seed in (1, 2, 3)])
    flows[1, :, 3:9, 2:12] = 50.0  # holes of its own
    together = carry(sample_flow(flows, cell=1), direction='forward').flow
    for index in range(3):
        alone = carry(sample_flow(flows[index:index + 1], cell=1), direction='forward').flow
        assert torch.allclose(together[index], alone[0], atol=1e-6)


@pytest.mark.parametrize('direction', ['forward', 'backward'])
@pytest.mark.parametrize('cell', [1, 4, 8])
def test_an_object_is_carried_to_where_it_will_be(direction, cell):
    """A block of 64x64 moves by (24, -16) over a still background."""
    height, width, left, top, side = 163, 200, 40, 64, 64
    flow = torch.zeros(1, 2, height, width)
    # Forward flow lies on t-1's grid, backward flow, of the opposite sign, on t's.
    sign = 1 if direction == 'forward' else -1
    motion = torch.tensor([24.0, -16.0]).view(2, 1, 1) * sign
    flow[0, :, top:top + side, left:left + side] = motion
    prior = carry(sample_flow(flow, cell=cell), direction=direction).full
    new_top, new_left = top - 16, left + 24
    expected = torch.zeros(1, 2, height, width)
    expected[0, :, new_top:new_top + side, new_left:new_left + side] = motion
    wrong = (prior - expected).abs().amax(dim=1)[0] > 1.0
    uncovered = torch.zeros(height, width, dtype=torch.bool)
    uncovered[top:top + side, left:left + side] = True
    uncovered[new_top:new_top + side, new_left:new_left + side] = False
    # Away from holes and rims (covering reaches 2/3 of a cell, blending 1), nothing differs.
    reach = 0 if cell == 1 else 2 * cell
    surfaces = torch.zeros(3, 1, height, width)
    surfaces[0, 0, uncovered] = 1
    surfaces[1, 0, new_top:new_top + side, new_left:new_left + side] = 1
    surfaces[2] = 1 - surfaces[0] - surfaces[1]
    near = functional.max_pool2d(surfaces, 2 * reach + 1, 1, reach).sum(dim=0)[0]
    clear = (near == 1) & ~uncovered
    assert clear.float().mean() > 0.6
    assert not wrong[clear].any()
    # Of the object (28.8 px) holes get less than a plain mean of their rims would give.
    assert prior[0].norm(dim=0)[uncovered].mean() < 11.5


def test_time_ratio_scales_values_and_the_backward_way():
    flow = torch.zeros(1, 2, 40, 60)
    flow[0, 0, 10:30, 10:20] = 5.0
    forward = carry(sample_flow(flow, cell=1), direction='forward', time_ratio=3.0).flow
    # One dropped frame or two do not move t's grid: the object lies at +5, its prior is 15.
    assert torch.equal(forward[0, 0, 15, 15:25], torch.full((10,), 15.0))
    backward = carry(sample_flow(-flow, cell=1), direction='backward', time_ratio=3.0).flow
    # On t+3's grid it lies at +15.
    assert torch.equal(backward[0, 0, 15, 25:35], torch.full((10,), -15.0))


def test_the_visible_one_wins():
    flow = torch.zeros(1, 2, 20, 40)
    flow[0, 0, :, 5:10] = 10.0  # lands on 15..19, where the still background lands too
    moving = carry(sample_flow(flow, cell=1), direction='forward').flow
    assert (moving[0, 0, :, 15:20] == 10).all()
    # An occlusion that says the moving one is what was covered turns the winner.
    occlusion = torch.zeros(1, 1, 20, 40)
    occlusion[..., 5:10] = 0.9
    covered = carry(sample_flow(flow, cell=1, occlusion=occlusion),
                    direction='forward').flow
    assert (covered[0, 0, :, 15:20] == 0).all()
    # And confidence does, without occlusion.
    unsure = carry(sample_flow(flow, cell=1, confidence=1 - occlusion),
                   direction='forward').flow
    assert (unsure[0, 0, :, 15:20] == 0).all()


def test_a_surface_that_grows_does_not_tear():
    """Over a still background, a square that grows by 1.3 covers all it should."""
    height = width = 60
    flow = torch.zeros(1, 2, height, width)
    ticks = torch.arange(height).float()
    square = slice(20, 40)
    flow[0, 0, square, square] = (0.3 * (ticks[square] - 29.5))[None, :] + 8
    flow[0, 1, square, square] = (0.3 * (ticks[square] - 29.5))[:, None]
    prior = carry(sample_flow(flow, cell=1), direction='forward').flow
    inner = prior[0, 0, 19:41, 27:49]
    assert (inner > 4).all()


def test_constant_motion_and_still_stay_as_they_are():
    flow = torch.tensor([7.3, -2.6]).view(1, 2, 1, 1).expand(1, 2, 51, 67)
    for cell in (1, 4, 8, 100):
        prior = carry(sample_flow(flow, cell=cell), direction='backward').full
        assert prior.shape == (1, 2, 51, 67)
        assert torch.allclose(prior, flow, atol=1e-4)
    still = carry(sample_flow(torch.zeros(1, 2, 1, 1), cell=4), direction='forward')
    assert torch.equal(still.full, torch.zeros(1, 2, 1, 1))


@pytest.mark.parametrize('value', [math.nan, math.inf, 1e30, -1e30, 500.0])
def test_nothing_that_lands_gives_a_finite_prior(value):
    prior = carry(sample_flow(torch.full((1, 2, 33, 47), value), cell=4), direction='forward')
    assert prior.flow.shape == (1, 2, 9, 12)
    assert torch.isfinite(prior.flow).all()


def test_holes_are_filled_with_the_background_about_them():
    """A hole between two surfaces takes more of the one behind."""
    flow = torch.zeros(1, 2, 24, 48)
    flow[0, 0, :, 24:] = 16.0  # moves off: a hole of 16 columns opens
    prior = carry(sample_flow(flow, cell=1), direction='forward').flow[0, 0]
    assert (prior[:, :24] == 0).all()
    assert (prior[:, 40:] == 16).all()
    hole = prior[:, 24:40]
    assert (hole[:, :8] < 1).all()
    assert hole.mean() < 4


def test_half_precision_is_sampled_as_float32():
    flow = torch.randn(1, 2, 16, 24).half()
    samples = sample_flow(flow, cell=8, confidence=torch.rand(1, 1, 16, 24).half())
    assert samples.flow.dtype == torch.float32
    assert carry(samples, direction='forward').flow.dtype == torch.float32


def test_a_prior_says_how_far_its_flow_could_be_trusted():
    flow, confidence = torch.zeros(1, 2, 16, 24), torch.full((1, 1, 16, 24), 0.8)
    confidence[..., 12:] = 0.4
    occlusion = torch.zeros(1, 1, 16, 24)
    occlusion[..., :8, :] = 0.5
    assert carry(sample_flow(flow, cell=4), direction='forward').trust is None
    prior = carry(sample_flow(flow, cell=4, confidence=confidence), direction='forward')
    assert float(prior.trust) == pytest.approx(0.6)
    prior = carry(sample_flow(flow, cell=4, confidence=confidence, occlusion=occlusion),
                  direction='backward')
    assert float(prior.trust) == pytest.approx(0.45)


def test_samples_do_not_share_memory():
    flow = torch.ones(1, 2, 8, 8)
    for cell in (1, 4):
        samples = sample_flow(flow, cell=cell)
        before = samples.flow.clone()
        flow += 1
        assert torch.equal(samples.flow, before)


def test_bad_arguments_are_named():
    samples = sample_flow(torch.zeros(1, 2, 8, 8), cell=4)
    with pytest.raises(ValueError, match="direction must be one of .*seen 'sideways'"):
        carry(samples, direction='sideways')
    with pytest.raises(ValueError, match='time_ratio must be positive.*seen 0'):
        carry(samples, direction='forward', time_ratio=0)
    with pytest.raises(ValueError, match=r'flow must be .*seen \(1, 3, 8, 8\)'):
        sample_flow(torch.zeros(1, 3, 8, 8), cell=4)
    with pytest.raises(ValueError, match='cell must be at least 1 px; seen 0'):
        sample_flow(torch.zeros(1, 2, 8, 8), cell=0)
