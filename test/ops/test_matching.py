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

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops import matching
from flow_ros.ops.matching import (
    _correlate_at_once,
    _search_by_rows,
    _search_by_windows,
    clean_propagation,
    EIGHT_SEEDS,
    inverse_propagation,
    local_search,
    SEEDS,
    Seeds,
    shifted_flows,
)
from flow_ros.ops.sampling import pixel_grid, warp


def plain_search(a: Tensor, b: Tensor, radius: int, mode: str = 'constant') -> Tensor:
    """Equation 7, one shift at a time."""
    height, width = a.shape[-2:]
    padded = functional.pad(b, (radius,) * 4, mode=mode)
    shifts = range(2 * radius + 1)
    return torch.stack([(a * padded[:, :, dy:dy + height, dx:dx + width]).mean(dim=1)
                        for dy in shifts for dx in shifts], dim=1)


@pytest.mark.parametrize('radius', [1, 2, 4])
@pytest.mark.parametrize('size', [(8, 8), (21, 27), (5, 40)])
def test_local_search_is_the_plain_loop(radius: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, *size), torch.randn(2, 16, *size)
    assert torch.allclose(local_search(a, b, radius), plain_search(a, b, radius), atol=1e-5)


@pytest.mark.parametrize('padding', ['zeros', 'border'])
@pytest.mark.parametrize('radius', [2, 4, 6])
@pytest.mark.parametrize('size', [(13, 27), (16, 8)])
def test_all_forms_of_the_local_search_are_the_plain_loop(
        size: tuple[int, int], radius: int, padding: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU takes lists, in any number of parts; GPUs and training windows; open sizes rows."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, *size), torch.randn(2, 16, *size)
    mode = 'constant' if padding == 'zeros' else 'replicate'
    expected = plain_search(a, b, radius, mode)
    padded = functional.pad(b, (radius,) * 4, mode=mode)
    found = [_search_by_windows(a, b, radius, padding), _search_by_rows(a, padded, radius)]
    for at_once in (1, 10 ** 5, 10 ** 9):
        monkeypatch.setattr(matching, '_AT_ONCE', at_once)
        found.append(local_search(a, b, radius, padding))
    for planes in found:
        torch.testing.assert_close(planes, expected, rtol=0, atol=1e-5)


def test_local_search_has_the_gradient_of_the_plain_loop() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 8, 9, 11, requires_grad=True) for _ in range(2)]
    weight = torch.randn(1, 81, 9, 11)
    tiled = torch.autograd.grad((local_search(*inputs, 4) * weight).sum(), inputs)
    plain = torch.autograd.grad((plain_search(*inputs, 4) * weight).sum(), inputs)
    for one, other in zip(tiled, plain):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize('seeds', [SEEDS, EIGHT_SEEDS])
def test_inverse_propagation_warps_the_shifted_targets(seeds: Seeds) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 12, 14), torch.randn(2, 16, 12, 14)
    flow = torch.rand(2, 2, 12, 14) * 2 - 1
    planes = inverse_propagation(a, b, flow, seeds)
    assert planes.shape == (2, len(seeds), 12, 14)
    inner = (slice(None), slice(3, -3), slice(3, -3))  # the border rule differs outside
    for index, (dx, dy) in enumerate(seeds):
        shifted = torch.roll(b, (-dy, -dx), dims=(-2, -1))  # S(F2, seed)
        expected = (a * warp(shifted, flow)).mean(dim=1)
        assert torch.allclose(planes[:, index][inner], expected[inner], atol=1e-5)


@pytest.mark.parametrize('seeds', [SEEDS, EIGHT_SEEDS])
def test_clean_propagation_warps_by_the_neighbours_flows(seeds: Seeds) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 12, 14), torch.randn(2, 16, 12, 14)
    flow = 5 * torch.rand(2, 2, 12, 14) - 2.5
    planes = clean_propagation(a, b, flow, seeds)
    inner = (slice(None), slice(1, -1), slice(1, -1))
    for index, (dx, dy) in enumerate(seeds):
        candidate = torch.roll(flow, (-dy, -dx), dims=(-2, -1))  # S(flow, seed)
        expected = (a * warp(b, candidate)).mean(dim=1)
        assert torch.allclose(planes[:, index][inner], expected[inner], atol=1e-5)
    assert torch.allclose(planes[:, 0], inverse_propagation(a, b, flow)[:, 0], atol=1e-6)


@pytest.mark.parametrize('size', [(12, 14), (1, 5)])
def test_what_a_gpu_computes_at_once_is_what_a_cpu_computes_in_turn(
        size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, *size), torch.randn(2, 16, *size)
    flow = 5 * torch.rand(2, 2, *size) - 2.5
    points = [pixel_grid(*size, flow) + candidate for candidate in
              shifted_flows(flow, EIGHT_SEEDS)]
    expected = clean_propagation(a, b, flow, EIGHT_SEEDS)
    assert torch.allclose(_correlate_at_once(a, b, points), expected, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device on this machine')
@pytest.mark.parametrize('propagation', [inverse_propagation, clean_propagation])
def test_propagation_on_a_gpu_is_that_of_a_cpu(propagation: Callable) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 12, 14), torch.randn(2, 16, 12, 14)
    flow = 5 * torch.rand(2, 2, 12, 14) - 2.5
    found = propagation(a.cuda(), b.cuda(), flow.cuda()).cpu()
    assert torch.allclose(found, propagation(a, b, flow), atol=1e-5)


def test_clean_propagation_is_the_inverse_one_shifted_back() -> None:
    """Section 3.3: equations 4 and 5 together are equation 3, whatever the flow."""
    torch.manual_seed(0)
    a, b = torch.randn(1, 16, 16, 18), torch.randn(1, 16, 16, 18)
    flow = 4 * torch.rand(1, 2, 16, 18) - 2
    planes = clean_propagation(a, b, flow, EIGHT_SEEDS)
    inner = (slice(None), slice(4, -4), slice(4, -4))
    for index, (dx, dy) in enumerate(EIGHT_SEEDS):
        warped = warp(torch.roll(b, (dy, dx), dims=(-2, -1)), flow)  # W(S(F2, -seed), flow)
        back = torch.roll(warped, (-dy, -dx), dims=(-2, -1))
        assert torch.allclose(planes[:, index][inner], (a * back).mean(dim=1)[inner], atol=1e-5)


def test_a_constant_flow_has_the_same_matches_in_both_forms() -> None:
    """One target for all seeds in the clean form; in the inverse one, each seed's shift of it."""
    torch.manual_seed(0)
    a, b = torch.randn(1, 16, 12, 14), torch.randn(1, 16, 12, 14)
    flow = torch.tensor([1.25, -0.5]).view(1, 2, 1, 1).expand(1, 2, 12, 14)
    clean = clean_propagation(a, b, flow, EIGHT_SEEDS)
    inverse = inverse_propagation(a, b, flow, EIGHT_SEEDS)
    assert torch.allclose(clean, inverse[:, :1].expand_as(clean), atol=1e-5)
    for index, seed in enumerate(EIGHT_SEEDS):
        own = clean_propagation(a, b, flow + torch.tensor(seed).view(1, 2, 1, 1).float())
        assert torch.allclose(own[:, 0], inverse[:, index], atol=1e-5)


@pytest.mark.parametrize('seeds', [SEEDS, EIGHT_SEEDS])
def test_one_good_seed_spreads_a_pixel_an_iteration(seeds: Seeds) -> None:
    """Patchmatch with the best plane taken: far motion is found without any search."""
    torch.manual_seed(0)
    a = functional.normalize(torch.randn(1, 32, 24, 24), dim=1)
    true = torch.tensor([7.0, -5.0])
    b = torch.roll(a, (-5, 7), dims=(-2, -1))
    flow = torch.zeros(1, 2, 24, 24)
    flow[0, :, 14, 8] = true
    for iteration in range(1, 5):
        best = clean_propagation(a, b, flow, seeds).argmax(dim=1)
        candidates = torch.stack(shifted_flows(flow, seeds))  # (S, 1, 2, 24, 24)
        index = best[None, :, None].expand(1, 1, 2, 24, 24)
        flow = torch.gather(candidates, 0, index)[0]
        right = (flow[0] == true.view(2, 1, 1)).all(dim=0)
        # Diagonal steps reach every other pixel of a square, and those of the one before.
        reached = ((2 * iteration + 1) ** 2 if seeds == EIGHT_SEEDS
                   else (iteration + 1) ** 2 + iteration ** 2)
        assert int(right.sum()) == reached
        rows, columns = torch.nonzero(right).amax(dim=0).tolist()
        assert (rows - 14, columns - 8) == (iteration, iteration)


@pytest.mark.parametrize('propagation', [inverse_propagation, clean_propagation])
def test_propagation_has_the_gradient_of_the_plain_warps(propagation: Callable) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 8, 9, 11, requires_grad=True) for _ in range(2)]
    flow = 2 * torch.rand(1, 2, 9, 11) - 1
    weight = torch.randn(1, 9, 9, 11)
    a, b = inputs
    if propagation is clean_propagation:
        warped = [warp(b, candidate) for candidate in shifted_flows(flow, EIGHT_SEEDS)]
    else:
        warped = [warp(b, flow + torch.tensor(seed).view(1, 2, 1, 1).float())
                  for seed in EIGHT_SEEDS]
    plain = sum(((a * other).mean(dim=1) * weight[:, index]).sum()
                for index, other in enumerate(warped))
    expected = torch.autograd.grad(plain, inputs)
    found = torch.autograd.grad((propagation(a, b, flow, EIGHT_SEEDS) * weight).sum(), inputs)
    for one, other in zip(found, expected):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_best_plane_is_where_the_target_went() -> None:
    torch.manual_seed(0)
    a = functional.normalize(torch.randn(1, 32, 24, 24), dim=1)
    moved = torch.roll(a, (2, -3), dims=(-2, -1))  # by (dx, dy) = (-3, 2)
    best = local_search(a, moved, 4)[0, :, 8:-8, 8:-8].argmax(dim=0)
    assert bool((best == 9 * (2 + 4) + (-3 + 4)).all())
