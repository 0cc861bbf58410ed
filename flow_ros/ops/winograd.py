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

"""Minimal filtering: convolutions with fewer products, exact but for rounding.

m neighbouring results of a filter of r taps need m + r - 1 products instead of m r (Winograd;
for convolutional networks Lavin and Gray, CVPR 2016): y = A ((G g) * (B d)), with d the
m + r - 1 inputs and g the taps. On both axes: 4x4 results of a 3x3 filter from 36 products
instead of 144. The products of all channels are matrix products, which is where the time goes.

Features are rows of channels here, one row per cell. Then the way to the points is a sum of a
few weighted rows for each point of each tile, and the way back one for each cell: both are
embedding bags, which run at the speed of the memory, and padding is what a bag leaves out.

The points at which polynomials are multiplied are chosen for accuracy: with 0, +-3/4 and
+-3/2 the largest error of 3x3 filters over 256 channels is 1e-5 of results of size one; with
the usual 0, +-1, +-2 it is three times that. A direct convolution in float32 is at 1e-6 to
1e-5.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.exporting import is_exporting

RESULTS = 4
"""Neighbouring results that are computed together, on each axis with more than one tap."""

_POINTS = {3: (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)),
           5: (Fraction(0), Fraction(1), Fraction(-1), Fraction(2), Fraction(-2),
               Fraction(1, 2), Fraction(-1, 2))}
"""For the number of taps; one more point is infinity."""

TAPS = (1, *_POINTS)

LEAST_CELLS = 5000
"""Of a map: on smaller ones the products are too small to be fast."""

LEAST_PRODUCTS = 2 ** 13
"""Input times output channels from which on it pays; below it the sums take the time."""

_AT_ONCE = 32
"""Output channels whose filters are brought to the points together, in float64."""

BLOCK_BYTES = 2 ** 22
"""What a block holds at the points, at most, of CHANNELS: it shall stay in the cache."""

CHANNELS = 256
"""What blocks are cut for, whatever a convolution has: so there are few sizes of them."""


def matrices(taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (m, n), G (n, r) and B (n, n) of RESULTS results of ``taps`` taps, float64.

    n = m + r - 1. With one tap all are (1, 1): nothing is to be saved there.
    Raises ValueError for a number of taps not in TAPS.
    """
    if taps == 1:
        return (torch.ones(1, 1, dtype=torch.float64),) * 3
    if taps not in _POINTS:
        raise ValueError(f'filters have {", ".join(map(str, TAPS))} taps; seen {taps}')
    points = _POINTS[taps]
    others = [[other for other in points if other != point] for point in points]
    infinity = [Fraction(0)]
    back = [[point ** power for point in points] + [Fraction(power == RESULTS - 1)]
            for power in range(RESULTS)]
    filters = [[point ** power / _product([point - other for other in rest])
                for power in range(taps)] for point, rest in zip(points, others)]
    filters.append(infinity * (taps - 1) + [Fraction(1)])
    inputs = [_polynomial(rest) + infinity for rest in others] + [_polynomial(points)]
    return _tensor(back), _tensor(filters), _tensor(inputs)


def transformed(weight: Tensor) -> Tensor:
    """Return the filters (K, C, r_y, r_x) at the points: (n_y * n_x, K, C), in their type."""
    down, across = (matrices(size)[1].to(weight.device) for size in weight.shape[2:])
    found = weight.new_empty(len(down) * len(across), *weight.shape[:2])
    for part, into in zip(weight.split(_AT_ONCE), found.split(_AT_ONCE, dim=1)):
        filters = torch.einsum('ai,bj,kcij->abkc', down, across, part.double())
        into.copy_(filters.flatten(0, 1))
    return found


@dataclass(frozen=True)
class Bags:
    """Sums of weighted rows: bag b sums those of ``index`` from ``offset[b]`` on.

    ``index`` and ``offset`` are int32, ``weight`` is float32.
    """

    index: Tensor
    offset: Tensor
    weight: Tensor


def bags(size: tuple[int, int], kernel: tuple[int, int], first: int, last: int, *,
         top: int = 0) -> tuple[Bags, Bags]:
    """Return how the tile rows ``first`` to ``last`` of a map come to the points, and back.

    The map is ``size`` (H, W), padded with zeros; a tile is RESULTS cells on each axis with more
    than one tap. The first bags are (points, tiles), over rows (H * W) of the map; the second
    are the cells of these tile rows, row by row, over the rows (points, tiles) of products:
    of whole tiles, where the map ends within the last ones. Tiles start at row ``top``.
    """
    (back_y, _, in_y), (back_x, _, in_x) = (matrices(taps) for taps in kernel)
    height, width = size
    step_y, step_x = len(back_y), len(back_x)
    across = -(-width // step_x)
    tile_y = torch.arange(first, last).repeat_interleave(across)
    tile_x = torch.arange(across).repeat(last - first)
    index, weight, count = [], [], []
    for row in in_y:
        for column in in_x:
            place = torch.outer(row, column).nonzero()
            y = top + tile_y[:, None] * step_y + place[:, 0] - kernel[0] // 2
            x = tile_x[:, None] * step_x + place[:, 1] - kernel[1] // 2
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            index.append((y * width + x)[inside])
            weight.append((row[place[:, 0]] * column[place[:, 1]]).expand(inside.shape)[inside])
            count.append(inside.sum(dim=1))
    there = _bags(torch.cat(index), torch.cat(weight), torch.cat(count))
    cell_y = torch.arange(first * step_y, last * step_y).repeat_interleave(width)
    cell_x = torch.arange(width).repeat(len(cell_y) // width)
    tile = (cell_y // step_y - first) * across + cell_x // step_x
    weights = torch.kron(back_y, back_x)  # (results, points)
    weights = weights[cell_y % step_y * step_x + cell_x % step_x]  # (cells, points)
    cell, point = weights.nonzero(as_tuple=True)
    back = _bags(point * len(tile_y) + tile[cell], weights[cell, point],
                 (weights != 0).sum(dim=1))
    return there, back


def pays(values: Tensor, weight: Tensor) -> bool:
    """Return whether ``convolve`` is the faster way here: on CPUs, for inference in float32.

    Not in graphs: what compiles them chooses itself (``runtimes.openvino_convolutions``).
    """
    wanted = torch.is_grad_enabled() and (values.requires_grad or weight.requires_grad)
    if (values.device.type != 'cpu' or values.dtype != torch.float32 or wanted
            or torch.jit.is_tracing() or is_exporting() or torch.compiler.is_compiling()
            or not torch.backends.mkl.is_available()):
        return False
    return worth(values.shape[2] * values.shape[3], tuple(weight.shape))


def worth(cells: int, weight: tuple[int, ...]) -> bool:
    """Return whether a convolution has enough cells and products (K, C, r_y, r_x) to gain."""
    outputs, inputs, *kernel = weight
    return (cells >= LEAST_CELLS and inputs * outputs >= LEAST_PRODUCTS and max(kernel) > 1
            and all(taps in TAPS for taps in kernel))


def convolve(values: Tensor, weight: Tensor, bias: Tensor | None = None,
             at_points: Tensor | None = None) -> Tensor:
    """Return the convolution of ``values`` (B, C, H, W), of stride 1 and padded to its size.

    Tile rows by tile rows, so that a block stays in the cache: nothing else is held of it.
    ``at_points`` is what ``transformed`` makes of ``weight``, where that is there already.
    Returns (B, K, H, W), its channels last in memory.
    """
    height, width = values.shape[2:]
    kernel = (weight.shape[2], weight.shape[3])
    if at_points is None:
        at_points = transformed(weight)
    filters = at_points.transpose(1, 2)  # (points, C, K)
    points, inputs, outputs = filters.shape
    step_y, step_x = (RESULTS if taps > 1 else 1 for taps in kernel)
    across, down = -(-width // step_x), -(-height // step_y)
    # Few sizes, because the bags of each stay in memory.
    at_once = max(1, BLOCK_BYTES // (4 * points * across * CHANNELS))
    found = values.new_empty(values.shape[0], height, width, outputs)
    for rows, cells in zip(values.permute(0, 2, 3, 1).contiguous(), found):
        for first in range(0, down, at_once):
            last = min(first + at_once, down)
            # The rows that this block needs are a map of their own, and blocks are alike.
            above, below = first * step_y - kernel[0] // 2, last * step_y + kernel[0] // 2
            block = _filtered(_rows(rows, above, below), filters, *_block(
                below - above, width, kernel, last - first))
            into = cells[first * step_y:last * step_y]
            block = block.view(-1, width, outputs)[:len(into)]
            if bias is None:
                into.copy_(block)
            else:
                torch.add(block, bias, out=into)
    return found.permute(0, 3, 1, 2)


def _rows(rows: Tensor, first: int, last: int) -> Tensor:
    """Return some of ``rows`` (H, W, C), zeros for those that the map does not have."""
    above, below = max(0, -first), max(0, last - len(rows))
    found = rows[first + above:last - below]
    return functional.pad(found, (0, 0, 0, 0, above, below)) if above or below else found


def _filtered(rows: Tensor, filters: Tensor, there: Bags, back: Bags) -> Tensor:
    """Return the results of a block, one row for each cell."""
    points, inputs, outputs = filters.shape
    products = torch.bmm(_summed(rows.reshape(-1, inputs), there).view(points, -1, inputs),
                         filters)
    return _summed(products.view(-1, outputs), back)


def _summed(rows: Tensor, each: Bags) -> Tensor:
    return functional.embedding_bag(each.index, rows, each.offset, mode='sum',
                                    per_sample_weights=each.weight)


@lru_cache(maxsize=64)
def _block(height: int, width: int, kernel: tuple[int, int], tiles: int) -> tuple[Bags, Bags]:
    """Return the bags of a block of ``tiles`` tile rows, its border of rows with them."""
    return bags((height, width), kernel, 0, tiles, top=kernel[0] // 2)


def _bags(index: Tensor, weight: Tensor, count: Tensor) -> Bags:
    offset = torch.cat([count.new_zeros(1), count.cumsum(0)[:-1]])
    return Bags(index.int(), offset.int(), weight.float())


def _product(factors: list[Fraction]) -> Fraction:
    result = Fraction(1)
    for factor in factors:
        result *= factor
    return result


def _polynomial(roots: 'tuple[Fraction, ...] | list[Fraction]') -> list[Fraction]:
    """Return the coefficients of the product of all (x - root), from x**0 up."""
    result = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *result], [*result, Fraction(0)]
        result = [one - root * other for one, other in zip(shifted, scaled)]
    return result


def _tensor(rows: list[list[Fraction]]) -> Tensor:
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)
