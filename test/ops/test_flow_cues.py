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

"""The flow cues against their definitions, as loops over the pixels, and on known scenes."""

import math

import pytest
import torch
from torch import Tensor

from flow_ros.ops.flow_cues import (
    flow_cues,
    forward_backward,
    map_uniqueness,
    out_of_image,
    PLANES,
    reverse_flow,
    splat_forward,
)
from flow_ros.ops.sampling import warp

SIZE = (7, 9)


def random_flow(seed: int = 0, motion: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, *SIZE, generator=generator, dtype=torch.float64) * motion


def moving(u: float, v: float) -> Tensor:
    return torch.tensor([u, v], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, *SIZE)


def plain_splat(values: Tensor, flow: Tensor) -> Tensor:
    """Add every value to the four pixels about its target, one at a time."""
    batch, channels, height, width = values.shape
    result = torch.zeros_like(values)
    for image in range(batch):
        for y in range(height):
            for x in range(width):
                u, v = (flow[image, :, y, x] + torch.tensor([x, y])).tolist()
                for row in (math.floor(v), math.floor(v) + 1):
                    for column in (math.floor(u), math.floor(u) + 1):
                        if 0 <= row < height and 0 <= column < width:
                            weight = (1 - abs(u - column)) * (1 - abs(v - row))
                            result[image, :, row, column] += weight * values[image, :, y, x]
    return result


def test_splat_is_the_loop() -> None:
    values, flow = random_flow(1), random_flow()
    assert torch.allclose(splat_forward(values, flow), plain_splat(values, flow), atol=1e-9)


def test_splat_is_the_transpose_of_the_zero_padded_warp() -> None:
    one, other, flow = random_flow(1), random_flow(2), random_flow()
    forward = (splat_forward(one, flow) * other).sum()
    assert torch.allclose(forward, (one * warp(other, flow, 'zeros')).sum(), atol=1e-9)


def test_splat_has_gradients() -> None:
    values, flow = random_flow(1)[:1, :, :3, :4], random_flow()[:1, :, :3, :4]
    assert torch.autograd.gradcheck(
        splat_forward, (values.clone().requires_grad_(), flow.clone().requires_grad_()))


@pytest.mark.parametrize('far', [1e30, -1e30, 5e3, float('inf')])
def test_far_targets_are_lost(far: float) -> None:
    values, flow = random_flow(1), random_flow()
    values[1, :, 2, 3] = 0
    quiet = splat_forward(values, flow)
    values[1, :, 2, 3] = 1
    flow[1, 0, 2, 3] = far
    assert torch.allclose(splat_forward(values, flow), quiet)
    assert torch.isfinite(map_uniqueness(flow.clamp(-1e4, 1e4))).all()


def test_flows_that_agree_leave_nothing() -> None:
    backward, mismatch = forward_backward(moving(2, -1), moving(-2, 1))
    assert torch.allclose(backward, moving(-2, 1))
    assert mismatch.abs().max() < 1e-9


def test_backward_flow_is_read_at_the_target() -> None:
    flow21 = random_flow(1)[:1]
    backward, mismatch = forward_backward(moving(2, 0), flow21)
    assert torch.allclose(backward[..., :-2], flow21[..., 2:])
    assert torch.allclose(mismatch, backward + moving(2, 0))


def test_reverse_flow_of_a_motion_is_the_motion() -> None:
    reverse = reverse_flow(moving(-2, 1))  # from image 2 back to image 1: 2 left, 1 down
    expected = moving(2, -1).clone()
    expected[..., :1, :] = 0  # nothing comes down here from above the image,
    expected[..., -2:] = 0  # nor from its right
    assert torch.allclose(reverse, expected)


def test_reverse_flow_averages_with_the_bilinear_weights() -> None:
    flow21 = moving(100, 0).clone()  # all out of the image but two pixels
    flow21[0, :, 3, 2] = torch.tensor([1.25, 0.0])  # 3/4 on column 3, 1/4 on column 4
    flow21[0, :, 3, 5] = torch.tensor([-1.5, 0.0])  # 1/2 on column 3, 1/2 on column 4
    reverse = reverse_flow(flow21)
    assert reverse[0, 0, 3, 3].item() == pytest.approx((-1.25 * 0.75 + 1.5 * 0.5) / 1.25)
    assert reverse[0, 0, 3, 4].item() == pytest.approx((-1.25 * 0.25 + 1.5 * 0.5) / 0.75)
    assert (reverse != 0).sum() == 2


def test_uniqueness_counts_who_shares_a_target() -> None:
    flow = moving(0, 0).clone()
    assert torch.allclose(map_uniqueness(flow), torch.ones(1, 1, *SIZE, dtype=flow.dtype))
    flow[0, 0, 3, 2] = 4  # onto column 6, which stays there
    unique = map_uniqueness(flow)
    assert unique[0, 0, 3, [2, 6]].tolist() == pytest.approx([2, 2])
    assert unique.sum().item() == pytest.approx(unique.numel() + 2)
    flow[0, 0, 3, 2] = 20
    assert map_uniqueness(flow)[0, 0, 3, 2] == 0


@pytest.mark.parametrize('size', [(1, 6), (6, 1), (1, 1)])
def test_a_side_of_one_pixel_has_an_outside_as_well(size: tuple[int, int]) -> None:
    flow = torch.zeros(1, 2, *size, dtype=torch.float64)
    assert torch.allclose(map_uniqueness(flow), torch.ones_like(flow[:, :1]))
    for component, side in ((1, size[0]), (0, size[1])):
        if side == 1:
            gone = flow.clone()
            gone[0, component, 0, 0] = 3
            unique = map_uniqueness(gone)
            assert unique[0, 0, 0, 0] == 0 and out_of_image(gone)[0, 0, 0, 0] == 1
            assert torch.allclose(unique.sum(), unique.new_tensor(float(unique.numel() - 1)))


def test_out_of_image() -> None:
    out = out_of_image(moving(3, -1))
    expected = torch.zeros(1, 1, *SIZE, dtype=out.dtype)
    expected[..., :1, :] = 1
    expected[..., -3:] = 1
    assert torch.equal(out, expected)


def test_all_cues_in_their_order() -> None:
    flow12, flow21 = random_flow(), random_flow(1)
    cues = flow_cues(flow12, flow21)
    assert cues.shape == (2, PLANES, *SIZE)
    backward, mismatch = forward_backward(flow12, flow21)
    parts = (backward, mismatch, reverse_flow(flow21), map_uniqueness(flow12),
             out_of_image(flow12))
    assert torch.equal(cues, torch.cat(parts, dim=1))
    assert torch.isfinite(cues).all()


def test_detached_flows_pass_no_gradient() -> None:
    flow12, flow21 = random_flow().requires_grad_(), random_flow(1).requires_grad_()
    assert not flow_cues(flow12.detach(), flow21.detach()).requires_grad
    flow_cues(flow12, flow21).sum().backward()
    for flow in (flow12, flow21):
        assert flow.grad is not None and torch.isfinite(flow.grad).all()
