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

"""The cost volumes against their equations, a grid_sample per residual, and IOFPL's toy."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops import cost_volume
from flow_ros.ops.cost_volume import (
    correlation,
    difference,
    masked_warp,
    Measure,
    sampled_cost_volume,
    warped_cost_volume,
)
from flow_ros.ops.sampling import pixel_grid, sample

Volume = Callable[[Tensor, Tensor, Tensor, int, Measure], Tensor]

MEASURES: tuple[Measure, ...] = ('dot', 'sad')


def compare(a: Tensor, b: Tensor, measure: Measure) -> Tensor:
    return (a * b).mean(dim=1) if measure == 'dot' else (a - b).abs().mean(dim=1)


def residuals(radius: int) -> list[tuple[int, int]]:
    steps = range(-radius, radius + 1)
    return [(dx, dy) for dy in steps for dx in steps]


def plainly_sampled(a: Tensor, b: Tensor, flow: Tensor, radius: int,
                    measure: Measure) -> Tensor:
    """Equations 2 and 3, one residual at a time."""
    height, width = a.shape[-2:]
    points = pixel_grid(height, width, flow) + flow
    return torch.stack([
        compare(a, sample(b, points + flow.new_tensor(shift).view(1, 2, 1, 1), 'zeros'), measure)
        for shift in residuals(radius)], dim=1)


def plainly_shifted(a: Tensor, b: Tensor, radius: int, measure: Measure) -> Tensor:
    """Equation 1 with a map that is warped already."""
    height, width = a.shape[-2:]
    padded = functional.pad(b, (radius,) * 4)
    return torch.stack([
        compare(a, padded[:, :, radius + dy:radius + dy + height,
                          radius + dx:radius + dx + width], measure)
        for dx, dy in residuals(radius)], dim=1)


def maps(size: tuple[int, int], channels: int = 5, batch: int = 2, motion: float = 4.0,
         kind: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn((2, batch, channels, *size), generator=generator, dtype=kind)
    return a, b, motion * torch.randn((batch, 2, *size), generator=generator, dtype=kind)


# Against the equations.


@pytest.mark.parametrize('measure', MEASURES)
@pytest.mark.parametrize('radius', [1, 4, 8, 10])
@pytest.mark.parametrize('size', [(9, 13), (5, 30)])
def test_sampled_volume_is_a_grid_sample_per_residual(size: tuple[int, int], radius: int,
                                                      measure: Measure) -> None:
    a, b, flow = maps(size)
    expected = plainly_sampled(a, b, flow, radius, measure)
    found = sampled_cost_volume(a, b, flow, radius, measure)
    assert found.shape == (2, (2 * radius + 1) ** 2, *size)
    assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize('measure', MEASURES)
def test_whole_and_half_pixels(measure: Measure) -> None:
    a, b, _ = maps((8, 11))
    for motion in ((0.0, 0.0), (3.0, -2.0), (0.5, 0.5), (-1.0, 0.5)):
        flow = torch.tensor(motion, dtype=a.dtype).view(1, 2, 1, 1).expand(2, 2, 8, 11)
        expected = plainly_sampled(a, b, flow, 3, measure)
        assert torch.allclose(sampled_cost_volume(a, b, flow, 3, measure), expected, atol=1e-9)


@pytest.mark.parametrize('measure', MEASURES)
def test_small_chunks_change_nothing(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, flow = maps((7, 12))
    whole = sampled_cost_volume(a, b, flow, 2, measure)
    monkeypatch.setattr(cost_volume, '_CHUNK_CPU', 1)  # the least, 8 pixels: 84 are 10.5 of them
    assert torch.equal(sampled_cost_volume(a, b, flow, 2, measure), whole)


@pytest.mark.parametrize('measure', MEASURES)
@pytest.mark.parametrize('far', [-1e30, -5e3, 5e3, 1e30, float('inf')])
def test_far_targets_see_zeros_and_disturb_nobody(far: float, measure: Measure) -> None:
    a, b, flow = maps((8, 11), kind=torch.float32)
    quiet = sampled_cost_volume(a, b, flow, 4, measure)
    a.requires_grad_()
    flow[1, :, 3, 5] = far
    found = sampled_cost_volume(a, b, flow, 4, measure)
    alone = 0 * a[1, 0, 3, 5] if measure == 'dot' else a[1, :, 3, 5].abs().mean()
    assert torch.allclose(found[1, :, 3, 5], alone.expand(81), atol=1e-6)
    found.sum().backward()
    assert a.grad is not None and torch.isfinite(a.grad).all()
    found, quiet = found.detach().clone(), quiet.clone()
    found[1, :, 3, 5] = quiet[1, :, 3, 5] = 0
    assert torch.allclose(found, quiet, atol=1e-6)


def test_what_is_not_a_number_stays_where_it_is() -> None:
    a, b, flow = maps((8, 11), kind=torch.float32)
    flow[0, 0, 2, 2] = float('nan')
    found = sampled_cost_volume(a, b, flow, 4)
    assert torch.isnan(found).any(dim=1).nonzero().tolist() == [[0, 2, 2]]


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
def test_half_precision_features_have_float32_targets(kind: torch.dtype) -> None:
    a, b, flow = maps((6, 9), kind=torch.float32)
    a, b = a.to(kind), b.to(kind)
    found = sampled_cost_volume(a, b, flow, 2)
    assert found.dtype == torch.float32
    assert torch.allclose(found, plainly_sampled(a.float(), b.float(), flow, 2, 'dot'), atol=1e-5)


@pytest.mark.parametrize('radius', [1, 4, 10])
def test_correlation_and_difference_of_shifted_maps(radius: int) -> None:
    a, b, _ = maps((9, 13))
    expected = plainly_shifted(a, b, radius, 'dot')
    assert torch.allclose(correlation(a, b, radius), expected, atol=1e-9)
    expected = plainly_shifted(a, b, radius, 'sad')
    assert torch.allclose(difference(a, b, radius), expected, atol=1e-9)
    # the form that training takes
    assert torch.allclose(difference(a.requires_grad_(), b, radius), expected, atol=1e-9)


@pytest.mark.parametrize('measure', MEASURES)
def test_warped_volume_searches_the_masked_warp(measure: Measure) -> None:
    a, b, flow = maps((9, 13))
    expected = plainly_shifted(a, masked_warp(b, flow), 3, measure)
    assert torch.allclose(warped_cost_volume(a, b, flow, 3, measure), expected, atol=1e-9)


def test_masked_warp_has_the_mask_of_the_sampled_ones() -> None:
    _, b, flow = maps((9, 13))
    flow[0, :, 0, 0] = 0
    flow[0, 0, 4, 4] = 13 - 1 - 4 + 5e-5  # past the last pixel by less than the tolerance
    flow[0, 1, 4, 4] = 0
    flow[0, 0, 5, 4] = 13 - 1 - 4 + 5e-4  # and by more
    flow[0, 1, 5, 4] = 0
    points = pixel_grid(9, 13, flow) + flow
    ones = sample(torch.ones_like(b[:, :1]), points, 'zeros')
    expected = sample(b, points, 'border') * (ones >= 0.9999)
    assert torch.allclose(masked_warp(b, flow), expected, atol=1e-9)
    assert masked_warp(b, flow)[0, :, 4, 4].abs().sum() > 0
    assert masked_warp(b, flow)[0, :, 5, 4].abs().sum() == 0


def test_without_motion_both_volumes_are_the_correlation() -> None:
    a, b, _ = maps((9, 13))
    still = torch.zeros(2, 2, 9, 13, dtype=a.dtype)
    expected = correlation(a, b, 4)
    assert torch.allclose(sampled_cost_volume(a, b, still, 4), expected, atol=1e-9)
    assert torch.allclose(warped_cost_volume(a, b, still, 4), expected, atol=1e-9)


# Gradients.


@pytest.mark.parametrize('measure', MEASURES)
def test_gradients_to_both_maps_and_the_flow(measure: Measure) -> None:
    inputs = [values.requires_grad_() for values in maps((4, 5), channels=2)]
    assert torch.autograd.gradcheck(
        lambda a, b, flow: sampled_cost_volume(a, b, flow, 1, measure), inputs)


@pytest.mark.parametrize('measure', MEASURES)
@pytest.mark.parametrize('radius', [4, 8])
def test_gradients_are_those_of_the_plain_form(radius: int, measure: Measure) -> None:
    a, b, flow = inputs = [values.requires_grad_() for values in maps((9, 14))]
    weight = torch.randn(2, (2 * radius + 1) ** 2, 9, 14, dtype=torch.float64)
    found = torch.autograd.grad(
        (sampled_cost_volume(a, b, flow, radius, measure) * weight).sum(), inputs)
    plain = torch.autograd.grad(
        (plainly_sampled(a, b, flow, radius, measure) * weight).sum(), inputs)
    for one, other in zip(found, plain):
        assert torch.allclose(one, other, atol=1e-9)


@pytest.mark.parametrize('measure', MEASURES)
def test_a_stopped_flow_leaves_the_gradients_of_the_maps(measure: Measure) -> None:
    a, b, flow = maps((6, 7))
    a.requires_grad_()
    b.requires_grad_()
    stopped = torch.autograd.grad(sampled_cost_volume(a, b, flow, 2, measure).sum(), (a, b))
    moving = torch.autograd.grad(
        sampled_cost_volume(a, b, flow.requires_grad_(), 2, measure).sum(), (a, b))
    for one, other in zip(stopped, moving):
        assert torch.allclose(one, other, atol=1e-12)


def test_difference_has_the_gradient_of_the_plain_form() -> None:
    a, b, _ = maps((6, 9))
    inputs = [a.requires_grad_(), b.requires_grad_()]
    found = torch.autograd.grad((difference(a, b, 3) ** 2).sum(), inputs)
    plain = torch.autograd.grad((plainly_shifted(a, b, 3, 'sad') ** 2).sum(), inputs)
    for one, other in zip(found, plain):
        assert torch.allclose(one, other, atol=1e-9)


# As a graph.


@pytest.mark.parametrize('measure', MEASURES)
@pytest.mark.parametrize('batch', [1, 2])
def test_traced_volume_is_the_same(batch: int, measure: Measure) -> None:
    inputs = maps((6, 9), batch=batch, kind=torch.float32)

    def volume(a: Tensor, b: Tensor, flow: Tensor) -> Tensor:
        return sampled_cost_volume(a, b, flow, 2, measure)

    traced = torch.jit.trace(volume, inputs, check_trace=False)
    assert 'PythonOp' not in str(traced.inlined_graph)
    assert 'scatter' not in str(traced.inlined_graph)
    a, b, flow = inputs
    flow = -2 * flow
    assert torch.allclose(traced(b, a, flow), volume(b, a, flow), atol=1e-5)


# IOFPL, Fig. 2.


LINE = 12
"""The column of the line in image 1."""

LINE_MOTION = -1
"""The line goes left."""

BOX = (slice(6, 26), slice(14, 26))
"""Rows and columns of the box in image 1, where it is beside the line."""

BOX_MOTION = 3
"""The box goes right."""

BESIDE = slice(6, 26)
"""The line's rows beside the box."""


def toy() -> tuple[Tensor, Tensor, Tensor]:
    """Return both images' features and the coarse flow: a line and a box that move apart.

    Each pixel of an object has a feature of its own, of length 1, so a match is right or wrong.
    The coarse flow is that of the box, to 3 px around it: the line is too thin for the level
    above. So no pixel of the warped map shows column 11, where the line has gone: those left of
    the flow's edge, at 11, show themselves, those from it on the columns from 14 on.
    """
    generator = torch.Generator().manual_seed(0)
    background, line, box = functional.normalize(
        torch.randn(3, 1, 64, 32, 40, generator=generator), dim=2)
    rows, columns = BOX
    first, second = background.clone(), background.clone()
    first[:, :, rows, columns] = box[:, :, rows, columns]
    moved = slice(columns.start + BOX_MOTION, columns.stop + BOX_MOTION)
    second[:, :, rows, moved] = box[:, :, rows, columns]
    first[..., LINE] = second[..., LINE + LINE_MOTION] = line[..., LINE]
    flow = torch.zeros(1, 2, 32, 40)
    flow[:, 0, rows.start - 3:rows.stop + 3, columns.start - 3:columns.stop + 3] = BOX_MOTION
    return first, second, flow


def hits(volume: Volume, radius: int, measure: Measure) -> tuple[Tensor, Tensor]:
    """Return where the best match is the true residual: of the line's, of the box's pixels."""
    first, second, flow = toy()
    planes = volume(first, second, flow, radius, measure)
    best = planes.argmax(dim=1) if measure == 'dot' else planes.argmin(dim=1)
    side = 2 * radius + 1
    found = torch.cat([best % side - radius, best // side - radius])
    true = torch.zeros(2, 32, 40)
    true[0, :, LINE] = LINE_MOTION - BOX_MOTION  # the coarse flow is the box's
    right = (found == true).all(dim=0)
    return right[BESIDE, LINE], right[BOX]


@pytest.mark.parametrize('measure', MEASURES)
@pytest.mark.parametrize('radius', [4, 8])
def test_only_sampling_finds_a_thin_line_beside_what_moves(radius: int,
                                                           measure: Measure) -> None:
    sampled_line, sampled_box = hits(sampled_cost_volume, radius, measure)
    warped_line, warped_box = hits(warped_cost_volume, radius, measure)
    assert sampled_line.all() and sampled_box.all()
    assert warped_box.all()
    # Lost, however far one searches: of the residuals one is right by chance, of 20 pixels.
    assert warped_line.sum() <= 1


def test_the_warped_map_shows_a_ghost_twice_and_the_line_nowhere() -> None:
    _, second, flow = toy()
    warped = masked_warp(second, flow)[0]
    row = 16
    line = second[0, :, row, LINE + LINE_MOTION]
    assert (line @ second[0, :, row]).max() > 0.99
    assert (line @ warped[:, row]).max() < 0.9
    edge = second[0, :, row, BOX[1].stop + BOX_MOTION + 1]  # right of the moved box
    assert ((edge @ warped[:, row]) > 0.99).sum() == 2  # the ghost of Fig. 2, left


# Errors.


def test_wrong_inputs_are_named() -> None:
    a, b, flow = maps((6, 7))
    with pytest.raises(ValueError, match=r'one shape .*seen \(2, 5, 6, 7\), \(2, 4, 6, 7\)'):
        sampled_cost_volume(a, b[:, :4], flow, 2)
    with pytest.raises(ValueError, match="'dot' or 'sad'; seen 'ssd'"):
        warped_cost_volume(a, b, flow, 2, 'ssd')  # type: ignore[arg-type]
