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

"""The warm start: carry the flow of one pair to the grid of the next, at constant velocity.

Forward flow F (t-1 to t, on t-1's grid) says where each point is at t, so its value moves
along F to t's grid. Backward flow B (t to t-1, on t's grid) says where each point was, so its
value moves along -B to t+1's grid. The values are kept, times the ratio of the two time spans
when frames were dropped.

Several points may land on one cell. The one that is visible wins: a reliable point before an
unreliable one (a point that has just been covered has a low confidence or a high occlusion,
so it loses to what covers it; four classes), then the one that moves more against the
background (the median flow: what is nearer to a moving camera, or moves by itself, is in
front), then the one that lands closest, then the last in reading order. The rank is one whole
number whose lowest bits are the point's index, so one maximum per cell finds the winner:
exact, the same on every device and in every run. Cells on which nothing lands are filled from
their neighbours, coarse to fine, the background counting more: what is uncovered is
background.

All this runs on a grid of ``cell`` x ``cell`` pixels, since networks read a prior at the
resolution of their levels. It is made of few and plain operations: at 640x480 a cell of 8 px
leaves 4800 points, for which starting an operation costs more than doing it. And on the CPU
none of them wakes a second thread below 32,768 points (``bench/splatting.py``): where another
process loads a core, each wake-up can cost milliseconds. So there is no floor and no square
root in here, which torch does in parallel from 2048 values on, and the two components of the
flow are worked on one after the other.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.networks.base import CellFlow

DIRECTIONS: tuple[str, ...] = ('forward', 'backward')

REACH = 2 / 3
"""Per axis, in cells, how far from its landing point a point covers cells. Over 1/2, so that
a surface that comes closer (up to 4/3 times larger) does not tear and let others through."""

MOTION_STEP = 1.0
"""px of motion against the background that make one class; less does not decide."""

_RELIABILITIES = 4
_MOTIONS = 4096
_NEARNESSES = 256
_INDICES = 2 ** 30  # of points: the whole rank has 52 bits, which float64 holds exactly
_MARGIN = 2  # cells about the map on which points land that leave it
_OUT_OF_REACH = -2.0 ** 15  # times the nearest class it outweighs any reliability and motion
_MEDIAN_SIDE = 40  # samples per side that are enough to know the median


@dataclass(frozen=True)
class FlowSamples:
    """The flow of one pair, sampled once per cell: what a warm start keeps of it.

    ``flow`` (B, 2, h, w) in full-resolution px, ``reliability`` (B, 1, h, w) in [0, 1] or
    None; ``size`` is (height, width) of the full resolution.
    """

    flow: Tensor
    reliability: Tensor | None
    cell: int
    size: tuple[int, int]

    def to(self, device: torch.device) -> 'FlowSamples':
        """Return the samples on ``device``."""
        known = self.reliability
        return replace(self, flow=self.flow.to(device),
                       reliability=None if known is None else known.to(device))


def sample_flow(flow: Tensor, *, cell: int, confidence: Tensor | None = None,
                occlusion: Tensor | None = None) -> FlowSamples:
    """Sample full-resolution maps at one pixel per cell, edges kept sharp; always a copy."""
    if flow.ndim != 4 or flow.shape[1] != 2 or 0 in flow.shape:
        raise ValueError(f'flow must be (B, 2, H, W); seen {tuple(flow.shape)}')
    if cell < 1:
        raise ValueError(f'cell must be at least 1 px; seen {cell}')
    reliability = None
    if confidence is not None:
        reliability = _pick(confidence, cell)
    if occlusion is not None:
        visible = 1 - _pick(occlusion, cell)
        reliability = visible if reliability is None else reliability * visible
    return FlowSamples(flow=_pick(flow, cell), reliability=reliability, cell=cell,
                       size=(flow.shape[-2], flow.shape[-1]))


def carry(samples: FlowSamples, *, direction: str, time_ratio: float = 1.0) -> CellFlow:
    """Return the prior flow of the next pair, finite.

    ``time_ratio`` is the time span of the new pair over that of the sampled one. Samples that
    are not finite are left out; without any that lands the prior is zero.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f'direction must be one of {DIRECTIONS}; seen {direction!r}')
    if not 0 < time_ratio < float('inf'):
        raise ValueError(f'time_ratio must be positive and finite; seen {time_ratio}')
    flow, cell = samples.flow, samples.cell
    along = 1 / cell if direction == 'forward' else -time_ratio / cell
    against = _motion_against_background(flow)
    winner = _splat(flow, along, _rank(against, samples.reliability))
    carried = _fill(*_gather(winner, flow, against))
    if time_ratio != 1:
        carried = carried * time_ratio
    known = samples.reliability
    return CellFlow(carried, cell, samples.size, trust=None if known is None else known.mean())


def _pick(values: Tensor, cell: int) -> Tensor:
    """Return the middle pixel of each cell as float32; of a cut cell at the border, its last."""
    height, width = values.shape[-2:]
    picked = values[..., cell // 2::cell, cell // 2::cell]
    if tuple(picked.shape[-2:]) != (-(-height // cell), -(-width // cell)):
        rows = torch.arange(cell // 2, height + cell // 2, cell, device=values.device)
        columns = torch.arange(cell // 2, width + cell // 2, cell, device=values.device)
        picked = values.index_select(-2, rows.clamp(max=height - 1))
        picked = picked.index_select(-1, columns.clamp(max=width - 1))
    result = picked.new_empty(picked.shape, dtype=torch.float32)
    for channel in range(picked.shape[1]):
        result[:, channel] = picked[:, channel]
    return result


def _motion_against_background(flow: Tensor) -> Tensor:
    """Return (B, h, w): px between each flow vector and the median one."""
    step = 1 + min(flow.shape[-2:]) // _MEDIAN_SIDE
    some = flow[..., ::step, ::step].flatten(2).nan_to_num(0.0, 0.0, 0.0)
    background = some.median(dim=2).values[..., None, None]
    across, down = flow[:, 0] - background[:, 0], flow[:, 1] - background[:, 1]
    # Not hypot or addcmul, which round in other ways on other devices.
    return _root((across * across).add_(down * down))


def _root(values: Tensor) -> Tensor:
    if values.device.type != 'cpu':
        return values.sqrt()
    return torch.from_numpy(np.sqrt(values.detach().numpy()))


def _rank(against: Tensor, reliability: Tensor | None) -> Tensor:
    """Return (B, h, w) int32: who wins a cell, before closeness and order."""
    motion = (against * (1 / MOTION_STEP)).clamp_(max=_MOTIONS - 1).int()
    if reliability is None:
        return motion
    known = (reliability[:, 0].nan_to_num(0.0) * _RELIABILITIES).clamp_(0, _RELIABILITIES - 1)
    return motion.add_(known.int(), alpha=_MOTIONS)


def _splat(flow: Tensor, along: float, rank: Tensor) -> Tensor:
    """Return (B * h * w,): 1 + the index of the point that wins each cell, 0 for none.

    ``flow`` (B, 2, h, w) times ``along`` is the way of each point in cells.
    """
    batch, _, height, width = flow.shape
    device, exact = flow.device, torch.float64
    stride, rows = width + 2 * _MARGIN + 1, height + 2 * _MARGIN + 1
    x, y = (torch.arange(_MARGIN, side + _MARGIN, dtype=flow.dtype, device=device)
            for side in (width, height))
    column, *near_x = _covered((flow[:, 0] * along).add_(x), width)
    row, *near_y = _covered((flow[:, 1] * along).add_(y[:, None]), height)
    target = column.add_(row, alpha=stride)
    if batch > 1:
        image = torch.arange(batch, dtype=torch.int32, device=device)
        target.add_(image[:, None, None], alpha=rows * stride)
    target = target.flatten().long()
    order = torch.arange(1, rank.numel() + 1, dtype=exact, device=device).view(rank.shape)
    key = (rank.to(exact) * (_NEARNESSES * _INDICES)).add_(order)
    best = torch.zeros(batch * rows * stride, dtype=exact, device=device)
    for down in (0, 1):
        for right in (0, 1):
            near = torch.minimum(near_y[down], near_x[right])
            # Below 0, and so won by nobody, where the point does not reach this cell.
            corner = torch.add(key, near, alpha=_INDICES).flatten()
            best[down * stride + right:].scatter_reduce_(0, target, corner, 'amax')
    best = best.view(batch, rows, stride)[:, _MARGIN:_MARGIN + height, _MARGIN:_MARGIN + width]
    return best.long().bitwise_and_(_INDICES - 1).flatten()


def _covered(place: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first of the two cells about each place, and how near the first and second are.

    Nearness is a class of 0 to 255, or far below 0 where the cell is out of reach. ``place``
    counts cells from the beginning of the margin and is overwritten. All three are int32.
    """
    # What leaves the map or is not finite lands on the margin, which nobody reads.
    place = place.nan_to_num_(0.0).clamp_(0, side + 2 * _MARGIN - 1)
    first = place.int()
    second_near = place.sub_(first.float())
    first_near = 1 - second_near
    near = (functional.threshold(near, 1 - REACH, _OUT_OF_REACH).mul_(_NEARNESSES - 1).int()
            for near in (first_near, second_near))
    return first, next(near), next(near)


def _gather(winner: Tensor, flow: Tensor, against: Tensor) -> tuple[Tensor, Tensor]:
    """Return (2, B, h, w) the winners' flow, and (3, B, h, w) that times its weight, and it.

    The weight is for the filling of holes; in the holes all are 0.
    """
    batch, _, height, width = flow.shape
    weight = (1 + against).square_().reciprocal_()
    table = flow.new_zeros(5, 1 + against.numel())  # the first column is nobody's
    rows = table[:, 1:].view(5, batch, height, width)
    for channel in (0, 1):
        rows[channel] = flow[:, channel]
        torch.mul(flow[:, channel], weight, out=rows[2 + channel])
    rows[4] = weight
    won = table.index_select(1, winner).view(5, batch, height, width)
    return won[:2], won[2:]


def _fill(values: Tensor, sums: Tensor) -> Tensor:
    """Return (B, 2, h, w): ``values``, and in the holes the weighted mean of what lies around.

    Push-pull: sums over ever more cells until none is without weight, and back, where sums are
    interpolated, not means: so the background counts more there too.
    """
    if not _has_holes(sums[2]):
        return values.transpose(0, 1).contiguous()
    pyramid = [sums]
    while max(pyramid[-1].shape[-2:]) > 1 and (len(pyramid) == 1 or _has_holes(pyramid[-1][2])):
        pyramid.append(_halved(pyramid[-1]))
    around = pyramid[-1]
    for finer in reversed(pyramid[1:-1]):
        around = _doubled(around, finer).mul_(_holes(finer[2])).add_(finer)
    hole = _holes(sums[2])
    around = _doubled(around, sums)
    hole.div_(around[2].clamp(min=torch.finfo(sums.dtype).tiny))
    filled = torch.empty_like(values)
    for channel in (0, 1):
        torch.addcmul(values[channel], around[channel], hole, out=filled[channel])
    return filled.transpose(0, 1).contiguous()


def _has_holes(weight: Tensor) -> bool:
    """Tell whether a weight is 0; on a GPU it may: asking would mean to wait for it."""
    return weight.device.type != 'cpu' or float(weight.amin()) <= 0


def _holes(weight: Tensor) -> Tensor:
    """Return 1 where ``weight`` is 0, else 0; no weight is under 1e-8 / 4 ** 20."""
    return (1 - weight * 1e30).relu_()


def _halved(sums: Tensor) -> Tensor:
    """Return the sums over 2 x 2 cells; a missing last row or column counts nothing."""
    height, width = sums.shape[-2:]
    if height % 2 or width % 2:
        sums = functional.pad(sums, (0, width % 2, 0, height % 2))
    sums = sums[..., ::2, :] + sums[..., 1::2, :]
    return sums[..., ::2] + sums[..., 1::2]


def _doubled(coarser: Tensor, finer: Tensor) -> Tensor:
    """Return ``coarser`` interpolated on the grid of ``finer``, which it is the half of."""
    doubled = functional.interpolate(coarser, scale_factor=2, mode='bilinear',
                                     align_corners=False)
    return doubled[..., :finer.shape[-2], :finer.shape[-1]]
