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

"""Maps by blocks are those worked out at once."""

import pytest
import torch
from torch import nn, Tensor

from flow_ros.ops.blocks import by_blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('flow_ros.ops.blocks.LEAST_CELLS', 40)
    monkeypatch.setattr('flow_ros.ops.blocks.LEAST_LINES', 4)


def maps(*channels: int, size: tuple[int, int] = (21, 18)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, count, *size, generator=generator) for count in channels]


def seen(sizes: list[tuple[int, ...]], values: Tensor) -> Tensor:
    sizes.append(tuple(int(size) for size in values.shape[2:]))
    return values


@pytest.mark.parametrize('axis', [2, 3])
@pytest.mark.parametrize('last', [False, True])
def test_convolutions_by_blocks_are_those_of_the_map(axis: int, last: bool) -> None:
    first, second = nn.Conv2d(7, 6, 3, padding=1), nn.Conv2d(6, 5, 5, padding=2)
    one, other = maps(4, 3)
    if last:
        one = one.contiguous(memory_format=torch.channels_last)
    sizes: list[tuple[int, ...]] = []

    def compute(one: Tensor, other: Tensor) -> Tensor:
        return second(torch.relu(first(seen(sizes, torch.cat([one, other], dim=1)))))

    with torch.inference_mode():
        whole = compute(one, other)
        sizes.clear()
        found = by_blocks(compute, one, other, halo=3, axis=axis)
        assert len(sizes) > 2 and max(size[axis - 2] for size in sizes) < whole.shape[axis]
        assert torch.allclose(found, whole, atol=1e-5)
        # A halo too small is seen: what the blocks pad with zeros is not the map.
        assert not torch.allclose(by_blocks(compute, one, other, halo=2, axis=axis), whole,
                                  atol=1e-5)


def test_the_result_may_be_larger_than_the_maps() -> None:
    values, = maps(3)
    layer = nn.ConvTranspose2d(3, 2, 4, stride=4)
    with torch.inference_mode():
        assert torch.allclose(by_blocks(layer, values, halo=1), layer(values), atol=1e-6)


def test_the_result_may_be_written_over_a_map() -> None:
    values, other = maps(3, 3)
    expected = values * other
    with torch.inference_mode():
        found = by_blocks(torch.mul, values, other, into=values)
    assert found is values
    assert torch.equal(values, expected)


def test_gradients_and_graphs_have_the_map_whole() -> None:
    values, = maps(3)
    sizes: list[tuple[int, ...]] = []

    def compute(values: Tensor) -> Tensor:
        return 2 * seen(sizes, values)

    assert by_blocks(compute, values, into=values) is not values
    with torch.inference_mode():
        torch.jit.trace(lambda values: by_blocks(compute, values), (values,), check_trace=False)
        by_blocks(compute, values.to('meta'))
        assert set(sizes) == {(21, 18)}
        by_blocks(compute, values)
    assert len(set(sizes)) > 1
