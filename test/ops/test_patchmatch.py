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

"""The matches of DIP in their forms, against the stack of 1280 channels and plain shifts."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.patchmatch import (
    local_search_released,
    propagation_correlation_released,
    search_released,
)
from flow_ros.ops.sampling import warp

SIZES = [(17, 30), (8, 16), (9, 14), (4, 4), (1, 2), (2, 1), (1, 1)]


def maps(size: tuple[int, int], channels: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Return features of two pairs and flows of which most leave the map."""
    generator = torch.Generator().manual_seed(3)
    features_a, features_b = torch.randn(2, 2, channels, *size, generator=generator)
    return features_a, features_b, 8 * torch.randn(2, 2, *size, generator=generator)


def naive_propagation(map1: Tensor, map2: Tensor, flow: Tensor) -> Tensor:
    """Build the stack of all seeds and pair it as the released network does."""
    height, width = map2.shape[-2:]
    padded = functional.pad(map2, (1, 1, 1, 1), mode='replicate')
    stack = torch.cat([padded[:, :, 1 + dy:1 + dy + height, 1 + dx:1 + dx + width]
                       for dx, dy in ((0, 0), (-1, -1), (1, -1), (-1, 1), (1, 1))], dim=1)
    warped, half = warp(stack, flow), map1.shape[1] // 2
    planes = [sum(map1[:, 2 * k + group] * warped[:, 10 * k + 5 * group + seed]
                  for k in range(half)) / half for group in (0, 1) for seed in range(5)]
    return torch.stack(planes, dim=1)


def naive_search(map1: Tensor, map2: Tensor, flow: Tensor) -> Tensor:
    """Shift the warped map 25 times."""
    height, width = map1.shape[-2:]
    padded = functional.pad(warp(map2, flow), (2, 2, 2, 2), mode='replicate')
    return torch.stack([(map1 * padded[:, :, y:y + height, x:x + width]).mean(dim=1)
                        for x in range(5) for y in range(5)], dim=1)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('last', [False, True])
def test_rows_give_what_the_stack_and_the_shifts_give(size: tuple[int, int],
                                                      last: bool) -> None:
    features_a, features_b, flow = maps(size)
    expected = (naive_propagation(features_a, features_b, flow),
                naive_search(features_a, features_b, flow))
    if last:
        features_a, features_b = (each.contiguous(memory_format=torch.channels_last)
                                  for each in (features_a, features_b))
    found = (propagation_correlation_released(features_a, features_b, flow),
             search_released(features_a, features_b, flow))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize('size', SIZES)
def test_maps_give_the_same_with_gradients(size: tuple[int, int]) -> None:
    features_a, features_b, flow = maps(size)
    rows = (propagation_correlation_released(features_a, features_b, flow),
            search_released(features_a, features_b, flow))
    features_a.requires_grad_()
    found = (propagation_correlation_released(features_a, features_b, flow),
             search_released(features_a, features_b, flow))
    for one, other in zip(found, rows, strict=True):
        assert one.requires_grad and not other.requires_grad
        assert torch.allclose(one, other, atol=1e-5)


def test_many_blocks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    features_a, features_b, flow = maps((17, 30))
    whole = (propagation_correlation_released(features_a, features_b, flow),
             search_released(features_a, features_b, flow))
    monkeypatch.setattr('flow_ros.ops.patchmatch.BLOCK', 7)
    parts = (propagation_correlation_released(features_a, features_b, flow),
             search_released(features_a, features_b, flow))
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_trace_computes_the_same() -> None:
    features_a, features_b, flow = maps((17, 30))

    class Both(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            return propagation_correlation_released(*inputs), search_released(*inputs)

    traced = torch.jit.trace(Both(), (features_a, features_b, flow), check_trace=False)
    for one, other in zip(traced(features_b, features_a, -flow),
                          Both()(features_b, features_a, -flow), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_half_precision_keeps_its_type_and_samples_in_single() -> None:
    features_a, features_b, flow = maps((9, 14))
    for kind in (torch.bfloat16, torch.float16):
        found = (propagation_correlation_released(features_a.to(kind), features_b.to(kind), flow),
                 search_released(features_a.to(kind), features_b.to(kind), flow))
        expected = (propagation_correlation_released(features_a, features_b, flow),
                    search_released(features_a, features_b, flow))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == kind
            assert torch.allclose(one.float(), other, atol=0.05)


def test_search_is_local_search_of_the_warped_map() -> None:
    features_a, features_b, flow = maps((9, 14))
    assert torch.allclose(search_released(features_a, features_b, flow, 1),
                          local_search_released(features_a, warp(features_b, flow), 1), atol=1e-5)
