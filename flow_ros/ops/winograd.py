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
+-3/2 the result of 4 of 3 taps is as near to the exact one as a direct convolution in float32;
the usual 0, +-1, +-2 are three times as far.
"""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

RESULTS = 4
"""Neighbouring results that are computed together, on each axis with more than one tap."""

_POINTS = {3: (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)),
           5: (Fraction(0), Fraction(1), Fraction(-1), Fraction(2), Fraction(-2),
               Fraction(1, 2), Fraction(-1, 2))}
"""For the number of taps; one more point is infinity."""

TAPS = (1, *_POINTS)


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
    filters = torch.einsum('ai,bj,kcij->abkc', down, across, weight.double())
    return filters.flatten(0, 1).to(weight.dtype)


@dataclass(frozen=True)
class Bags:
    """Sums of weighted rows: bag b sums those of ``index`` from ``offset[b]`` on.

    ``index`` and ``offset`` are int32, ``weight`` is float32.
    """

    index: Tensor
    offset: Tensor
    weight: Tensor


def bags(size: tuple[int, int], kernel: tuple[int, int], first: int,
         last: int) -> tuple[Bags, Bags]:
    """Return how the tile rows ``first`` to ``last`` of a map come to the points, and back.

    The map is ``size`` (H, W), padded with zeros; a tile is RESULTS cells on each axis with more
    than one tap. The first bags are (points, tiles), over rows (H * W) of the map; the second
    are the cells of these tile rows, row by row, over the rows (points, tiles) of products.
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
            y = tile_y[:, None] * step_y + place[:, 0] - kernel[0] // 2
            x = tile_x[:, None] * step_x + place[:, 1] - kernel[1] // 2
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            index.append((y * width + x)[inside])
            weight.append((row[place[:, 0]] * column[place[:, 1]]).expand(inside.shape)[inside])
            count.append(inside.sum(dim=1))
    there = _bags(torch.cat(index), torch.cat(weight), torch.cat(count))
    cell_y = torch.arange(first * step_y, min(last * step_y, height)).repeat_interleave(width)
    cell_x = torch.arange(width).repeat(len(cell_y) // width)
    tile = (cell_y // step_y - first) * across + cell_x // step_x
    weights = torch.kron(back_y, back_x)  # (results, points)
    weights = weights[cell_y % step_y * step_x + cell_x % step_x]  # (cells, points)
    cell, point = weights.nonzero(as_tuple=True)
    back = _bags(point * len(tile_y) + tile[cell], weights[cell, point],
                 (weights != 0).sum(dim=1))
    return there, back


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
