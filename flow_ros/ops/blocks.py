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

"""Maps worked out block by block: what is wide on the way is held of one block alone.

For inference on CPUs, where the memory between two layers is what a frame takes most of.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flow_ros.ops.exporting import is_eager

LEAST_CELLS = 2 ** 13
"""Of a block: convolutions of smaller ones are slower."""

LEAST_LINES = 32
"""Of a block, rows or columns of the map: those of its halo, worked out twice, are a part."""


def by_blocks(compute: Callable[..., Tensor], *maps: Tensor, halo: int = 0, axis: int = 2,
              into: Tensor | None = None) -> Tensor:
    """Return ``compute(*maps)``, worked out for a few rows (``axis`` 2) or columns (3) at a time.

    ``maps`` are (B, C, H, W) of one size, and so is the result, or a whole number of times as
    large. No cell of it may depend on cells more than ``halo`` rows (columns) away: a block is
    given so many more on each side, and what is worked out of those is left out. A convolution
    pads with zeros where the map ends and where a block does, so ``compute`` may be many of
    them, if the halo is what they reach together.
    ``into`` is where the result is written to, or may be: one of ``maps`` where there is no halo.
    """
    if not is_eager(*maps):
        return compute(*maps)
    size = maps[0].shape[axis]
    lines = _part(size, maps[0].shape[5 - axis])
    if lines >= size:
        return compute(*maps)
    found = into
    for first in range(0, size, lines):
        last = min(first + lines, size)
        before, after = max(0, first - halo), min(size, last + halo)
        part = compute(*(_channels_last(each.narrow(axis, before, after - before))
                         for each in maps))
        factor = part.shape[axis] // (after - before)
        part = part.narrow(axis, factor * (first - before), factor * (last - first))
        if found is None:
            shape = list(part.shape)
            shape[axis] = factor * size
            found = torch.empty(shape, dtype=part.dtype, memory_format=(
                torch.channels_last if part.stride(1) == 1 else torch.contiguous_format))
        found.narrow(axis, factor * first, factor * (last - first)).copy_(part)
        del part  # the next one takes its place
    assert found is not None
    return found


def _part(lines: int, cells: int) -> int:
    """Return how many of ``lines`` lines of so many cells are a block; the last may be less."""
    count = max(1, min(lines // LEAST_LINES, lines * cells // LEAST_CELLS))
    return -(-lines // (4 * count)) * 4  # whole tiles of ops.winograd


def _channels_last(block: Tensor) -> Tensor:
    """Return ``block`` as convolutions want it; only what is copied of it has to be dense."""
    if block.stride(1) == 1:
        return block
    return block.contiguous(memory_format=torch.channels_last)
