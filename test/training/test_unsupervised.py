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

"""Photometric losses against slow references and values known by hand."""

import math

import pytest
import torch

from flow_ros.ops.sampling import warp
from flow_ros.training.unsupervised import (
    census,
    census_distance,
    census_loss,
    reconstruction_loss,
    smoothness_loss,
    visible_by_consistency,
)


def picture(height: int = 24, width: int = 32, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, height // 4, width // 4, generator=random)
    return 255 * torch.nn.functional.interpolate(small, size=(height, width), mode='bicubic'
                                                 ).clamp(0, 1)


def slow_distance(one: torch.Tensor, two: torch.Tensor, y: int, x: int) -> float:
    """The distance of one pixel by visiting its neighbours."""
    grey = [0.299 * image[0, 0] + 0.587 * image[0, 1] + 0.114 * image[0, 2]
            for image in (one, two)]
    total = 0.0
    for dy in range(-3, 4):
        for dx in range(-3, 4):
            ternary = []
            for image in grey:
                difference = float(image[y + dy, x + dx] - image[y, x])
                ternary.append(difference / math.sqrt(0.81 + difference ** 2))
            squared = (ternary[0] - ternary[1]) ** 2
            total += squared / (0.1 + squared)
    return total / 48


def test_census_distance_is_the_soft_hamming_distance() -> None:
    one, two = picture(seed=1), picture(seed=2)
    distance = census_distance(census(one), census(two))
    for y, x in ((3, 3), (10, 20), (20, 28)):
        assert float(distance[0, 0, y, x]) == pytest.approx(slow_distance(one, two, y, x),
                                                            rel=1e-4)


def test_census_does_not_feel_brightness_and_hardly_contrast() -> None:
    image = picture()
    other = picture(seed=5)

    def distance(changed: torch.Tensor) -> float:
        return float(census_distance(census(image), census(changed)).mean())

    assert distance(image + 40) < 1e-6
    assert distance(0.7 * image + 20) < 0.1 * distance(other)


def test_census_loss_is_least_at_the_true_flow_also_beyond_a_crop() -> None:
    image2 = picture(40, 48)
    flow = torch.zeros(1, 2, 40, 48)
    flow[:, 0], flow[:, 1] = 3.0, -2.0
    image1 = warp(image2, flow)
    visible = torch.ones(1, 1, 40, 48, dtype=torch.bool)
    right = float(census_loss(image1, image2, flow, visible))
    assert right == pytest.approx(0.01 ** 0.4, rel=0.02)
    wrong = float(census_loss(image1, image2, 0 * flow, visible))
    assert wrong > 2 * right
    top, left = 8, 20  # the crop's right edge moves out of the crop, not out of the frame
    cut = (..., slice(top, top + 24), slice(left, left + 24))
    cropped = census_loss(image1[cut], image2, flow[cut], visible[cut],
                          offset=torch.tensor([[float(left), float(top)]]))
    assert float(cropped) == pytest.approx(right, rel=0.02)
    assert float(census_loss(image1, image2, flow, ~visible)) == 0


def test_census_loss_pulls_the_flow_towards_the_truth() -> None:
    image2 = picture(40, 48)
    truth = torch.full((1, 2, 40, 48), 0.8)
    image1 = warp(image2, truth)
    flow = torch.zeros(1, 2, 40, 48, requires_grad=True)
    visible = torch.ones(1, 1, 40, 48, dtype=torch.bool)
    census_loss(image1, image2, flow, visible).backward()
    assert bool(torch.isfinite(flow.grad).all())
    assert float((flow.grad < 0)[flow.grad != 0].float().mean()) > 0.6  # descent goes to +0.8


def test_smoothness_spares_edges_and_the_second_order_spares_planes() -> None:
    width = 8
    flow = torch.zeros(1, 2, 4, width)
    flow[:, 0, :, width // 2:] = 2.0
    flat = torch.zeros(1, 3, 4, width)
    edged = flat.clone()
    edged[..., width // 2:] = 255.0
    free = 1e-3  # of |0| with its 1e-6, for both directions
    # One step of 2 px in u, in one of the 7 differences of a row; half of the components.
    assert float(smoothness_loss(flow, flat)) == pytest.approx(2 / 7 / 2 + 2 * free, abs=free)
    assert float(smoothness_loss(flow, edged)) == pytest.approx(2 * free, abs=free)
    ramp = torch.arange(width).float().expand(1, 2, 4, width)
    assert float(smoothness_loss(ramp, flat)) == pytest.approx(1, abs=2 * free)
    assert float(smoothness_loss(ramp, flat, order=2)) == pytest.approx(2 * free, abs=free)
    with pytest.raises(ValueError, match='order 1 or 2'):
        smoothness_loss(flow, flat, order=3)


def test_what_is_covered_or_leaves_the_image_is_not_visible() -> None:
    flow, backward = torch.zeros(1, 2, 8, 12), torch.zeros(1, 2, 8, 12)
    flow[:, 0], backward[:, 0] = 4.0, -4.0
    backward[:, 0, :, 6] = 3.0  # another thing is there
    visible = visible_by_consistency(flow, backward)
    expected = torch.tensor([x + 4 <= 11.5 and x + 4 != 6 for x in range(12)])
    assert bool((visible[0, 0] == expected).all())


def test_reconstruction_is_the_distance_to_the_moved_features() -> None:
    one, two = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3)
    two[0, :, 0, 1] = torch.tensor([3.0, 4.0])
    flow = torch.zeros(1, 2, 1, 3, requires_grad=True)
    assert float(reconstruction_loss(one, two, flow)) == pytest.approx(5 / 3, abs=1e-5)
    shifted = torch.tensor([0.5, 0.0]).view(1, 2, 1, 1) + flow
    # x = 0 and 1 see half of the bright cell, x = 2 leaves the image.
    loss = reconstruction_loss(one, two, shifted)
    assert float(loss) == pytest.approx(2.5, abs=1e-5)
    loss.backward()
    assert bool(torch.isfinite(flow.grad).all())
