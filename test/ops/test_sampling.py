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

"""Sampling and warping at pixel coordinates, against numbers worked out by hand."""

import pytest
import torch

from flow_ros.ops.sampling import (
    inside,
    LEAST_CHANNELS,
    normalised,
    pad_to_multiple,
    pixel_grid,
    resize_flow,
    sample,
    sample_grid,
    warp,
)


def test_sample_reads_pixels_and_their_means() -> None:
    image = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[1.0, 1.5, 0.0], [2.0, 0.5, 1.0]]).view(1, 2, 1, 3)
    assert sample(image, points).flatten().tolist() == pytest.approx([9.0, 3.5, 4.0])


@pytest.mark.parametrize(('padding', 'expected'), [('border', 3.0), ('zeros', 0.0)])
def test_outside_is_the_border_or_zero(padding: str, expected: float) -> None:
    image = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 3, 4)
    points = torch.tensor([9.0, 1.0]).view(1, 2, 1, 1)
    assert float(sample(image, points, padding)) == pytest.approx(expected)


def test_warp_moves_by_whole_pixels() -> None:
    image = torch.rand(2, 3, 7, 9)
    flow = torch.zeros(2, 2, 7, 9)
    flow[:, 0], flow[:, 1] = 2, -1
    assert torch.allclose(warp(image, flow)[:, :, 1:, :-2], image[:, :, :-1, 2:], atol=1e-5)


def test_half_precision_images_are_sampled_at_single_precision_points() -> None:
    image = torch.arange(4096.0).view(1, 1, 1, 4096).expand(1, 1, 2, 4096)
    points = torch.tensor([3001.0, 0.0]).view(1, 2, 1, 1)
    sampled = sample((image / 4096).half(), points)
    assert sampled.dtype == torch.float16
    assert float(sampled) == pytest.approx(3001 / 4096, abs=5e-4)  # half: 11 bits


def test_resize_flow_scales_each_axis_by_its_own_ratio() -> None:
    flow = torch.ones(1, 2, 4, 6)
    resized = resize_flow(flow, (8, 18))
    assert resized.shape == (1, 2, 8, 18)
    assert torch.allclose(resized[:, 0], torch.tensor(3.0))
    assert torch.allclose(resized[:, 1], torch.tensor(2.0))


def test_inside_counts_the_border_as_inside() -> None:
    flow = torch.zeros(1, 2, 2, 3)
    flow[0, 0, 0] = torch.tensor([2.0, 2.0, -2.5])
    assert inside(flow)[0, 0].tolist() == [[True, False, False], [True, True, True]]
    assert inside(flow, 0.5)[0, 0].tolist() == [[True, False, True], [True, True, True]]


def test_padding_replicates_the_right_and_lower_border() -> None:
    image = torch.rand(1, 3, 5, 16)
    padded = pad_to_multiple(image, 16)
    assert padded.shape == (1, 3, 16, 16)
    assert torch.equal(padded[:, :, :5], image)
    assert torch.equal(padded[:, :, 15], image[:, :, 4])


def test_pixel_grid_is_x_then_y() -> None:
    grid = pixel_grid(2, 3, torch.zeros(1))
    assert grid[0, 0].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert grid[0, 1].tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize('size', [(7, 9), (1, 9), (7, 1), (1, 1)])
@pytest.mark.parametrize('batch', [1, 2])
def test_reading_whole_pixels_is_sampling(size: tuple[int, int], batch: int) -> None:
    torch.manual_seed(0)
    image = torch.randn(batch, LEAST_CHANNELS, *size)
    points = torch.randn(batch, 2, 4, 5) * 6 + 3  # some outside
    expected = sample_grid(image, normalised(points, *size))
    assert torch.allclose(sample(image, points), expected, atol=1e-5)
    with_gradient = sample(image.requires_grad_(), points)  # the other way
    assert torch.allclose(with_gradient, expected, atol=1e-5)


def test_a_point_that_is_no_number_takes_nothing_from_outside() -> None:
    image = torch.ones(1, LEAST_CHANNELS, 4, 5)
    points = torch.full((1, 2, 1, 3), 2.0)
    points[0, :, 0] = torch.tensor([[float('nan'), float('inf'), -float('inf')]] * 2)
    found = sample(image, points)
    assert found[..., 0].isnan().all()
    assert torch.equal(found[..., 1:], torch.ones(1, LEAST_CHANNELS, 1, 2))
