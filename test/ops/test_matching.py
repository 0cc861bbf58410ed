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

"""The two matches of DIP against their equations, written as plain loops."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.matching import inverse_propagation, local_search, SEEDS
from flow_ros.ops.sampling import warp


def plain_search(a: Tensor, b: Tensor, radius: int) -> Tensor:
    """Equation 7, one shift at a time."""
    height, width = a.shape[-2:]
    padded = functional.pad(b, (radius,) * 4)
    shifts = range(2 * radius + 1)
    return torch.stack([(a * padded[:, :, dy:dy + height, dx:dx + width]).mean(dim=1)
                        for dy in shifts for dx in shifts], dim=1)


@pytest.mark.parametrize('radius', [1, 2, 4])
@pytest.mark.parametrize('size', [(8, 8), (21, 27), (5, 40)])
def test_local_search_is_the_plain_loop(radius: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, *size), torch.randn(2, 16, *size)
    assert torch.allclose(local_search(a, b, radius), plain_search(a, b, radius), atol=1e-5)


def test_local_search_has_the_gradient_of_the_plain_loop() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 8, 9, 11, requires_grad=True) for _ in range(2)]
    weight = torch.randn(1, 81, 9, 11)
    tiled = torch.autograd.grad((local_search(*inputs, 4) * weight).sum(), inputs)
    plain = torch.autograd.grad((plain_search(*inputs, 4) * weight).sum(), inputs)
    for one, other in zip(tiled, plain):
        assert torch.allclose(one, other, atol=1e-5)


def test_inverse_propagation_warps_the_shifted_targets() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 12, 14), torch.randn(2, 16, 12, 14)
    flow = torch.rand(2, 2, 12, 14) * 2 - 1
    planes = inverse_propagation(a, b, flow)
    inner = (slice(None), slice(3, -3), slice(3, -3))  # the border rule differs outside
    for index, (dx, dy) in enumerate(SEEDS):
        shifted = torch.roll(b, (-dy, -dx), dims=(-2, -1))  # S(F2, seed)
        expected = (a * warp(shifted, flow)).mean(dim=1)
        assert torch.allclose(planes[:, index][inner], expected[inner], atol=1e-5)


def test_the_best_plane_is_where_the_target_went() -> None:
    torch.manual_seed(0)
    a = functional.normalize(torch.randn(1, 32, 24, 24), dim=1)
    moved = torch.roll(a, (2, -3), dims=(-2, -1))  # by (dx, dy) = (-3, 2)
    best = local_search(a, moved, 4)[0, :, 8:-8, 8:-8].argmax(dim=0)
    assert bool((best == 9 * (2 + 4) + (-3 + 4)).all())
