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

"""Minimal filtering against direct convolutions in double precision."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops import winograd
from flow_ros.ops.winograd import bags, convolve, matrices, pays, TAPS

KERNELS = [(3, 3), (1, 5), (5, 1), (5, 5), (1, 3)]


def case(kernel: tuple[int, int], size: tuple[int, int] = (13, 22)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(2, 24, *size, generator=generator)
    weight = torch.randn(10, 24, *kernel, generator=generator) / (24 * kernel[0] * kernel[1]) ** .5
    return values, weight, torch.randn(10, generator=generator)


def direct(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.conv2d(values.double(), weight.double(), bias.double(),
                             padding=(weight.shape[2] // 2, weight.shape[3] // 2))


@pytest.mark.parametrize('taps', TAPS)
def test_the_matrices_filter_a_line(taps: int) -> None:
    back, filters, inputs = matrices(taps)
    generator = torch.Generator().manual_seed(1)
    line = torch.randn(inputs.shape[1], generator=generator, dtype=torch.float64)
    tap = torch.randn(taps, generator=generator, dtype=torch.float64)
    expected = torch.stack([line[k:k + taps] @ tap for k in range(len(back))])
    assert torch.allclose(back @ ((filters @ tap) * (inputs @ line)), expected, atol=1e-12)


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('size', [(12, 24), (13, 22), (5, 9), (1, 6)])
def test_convolve_is_the_convolution(kernel: tuple[int, int], size: tuple[int, int]) -> None:
    values, weight, bias = case(kernel, size)
    found = convolve(values, weight, bias)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found.double(), direct(values, weight, bias), atol=2e-5)
    assert torch.allclose(convolve(values, weight) + bias[:, None, None], found, atol=1e-5)


@pytest.mark.parametrize('kernel', KERNELS)
def test_many_blocks_are_one(kernel: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    values, weight, bias = case(kernel, (27, 10))
    for size in (1, 60_000):
        monkeypatch.setattr(winograd, 'BLOCK_BYTES', size)
        assert torch.allclose(convolve(values, weight, bias).double(),
                              direct(values, weight, bias), atol=2e-5)


def test_its_rounding_is_small_for_many_channels() -> None:
    """Of results of size one: the usual points, 0, +-1 and +-2, are three times as far."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(1, 256, 24, 24, generator=generator)
    for kernel in ((3, 3), (1, 5)):
        weight = torch.randn(32, 256, *kernel, generator=generator)
        weight = weight / weight[0].numel() ** 0.5
        error = convolve(values, weight).double() - direct(values, weight, torch.zeros(32))
        assert error.abs().max() < 1.5e-5


def test_bags_of_parts_of_a_map_are_those_of_the_map() -> None:
    there, back = bags((11, 9), (3, 3), 1, 3)
    rows = torch.randn(99, 4, generator=torch.Generator().manual_seed(1))
    whole, _ = bags((11, 9), (3, 3), 0, 3)

    def summed(each: winograd.Bags) -> Tensor:
        return functional.embedding_bag(each.index, rows, each.offset, mode='sum',
                                        per_sample_weights=each.weight).view(36, -1, 4)

    assert torch.allclose(summed(there), summed(whole)[:, 3:])
    assert len(back.offset) == 8 * 9  # whole tiles


def test_it_pays_for_wide_convolutions_on_large_maps_at_inference_alone(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, 'is_available', lambda: True)
    large, small = torch.zeros(1, 128, 80, 80), torch.zeros(1, 128, 20, 20)
    wide, narrow = torch.zeros(128, 128, 3, 3), torch.zeros(2, 128, 3, 3)
    assert pays(large, wide)
    assert not pays(small, wide) and not pays(large, narrow)
    assert not pays(large, torch.zeros(128, 128, 1, 1))
    assert not pays(large, torch.zeros(128, 128, 7, 7))
    assert not pays(large.bfloat16(), wide.bfloat16())
    assert not pays(large.to('meta'), wide.to('meta'))
    wide.requires_grad_()
    assert not pays(large, wide)
    with torch.no_grad():
        assert pays(large, wide)
    monkeypatch.setattr(torch.backends.mkl, 'is_available', lambda: False)
    assert not pays(large, wide.detach())


def test_other_taps_are_refused() -> None:
    with pytest.raises(ValueError, match='filters have 1, 3, 5 taps; seen 4'):
        matrices(4)
