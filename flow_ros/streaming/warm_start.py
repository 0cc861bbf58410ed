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
front), then the one that lands closest, then the last in reading order. The rank is one
64-bit integer whose lowest bits are the point's index, so one integer maximum per cell finds
the winner: exact, the same on every device and in every run. Cells on which nothing lands are
filled from their neighbours, coarse to fine, the background counting more: what is uncovered
is background.

All this runs on a grid of ``cell`` x ``cell`` pixels, since networks read a prior at the
resolution of their levels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.sampling import pixel_grid

DIRECTIONS: tuple[str, ...] = ('forward', 'backward')

REACH = 2 / 3
"""Per axis, in cells, how far from its landing point a point covers cells. Over 1/2, so that
a surface that comes closer (up to 4/3 times larger) does not tear and let others through."""

MOTION_STEP = 1.0
"""px of motion against the background that make one class; less does not decide."""

_RELIABILITIES = 4
_MOTIONS = 4096
_NEARNESSES = 256
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
    return FlowSamples(flow=_pick(flow, cell).float(), reliability=reliability, cell=cell,
                       size=(flow.shape[-2], flow.shape[-1]))


def carry(samples: FlowSamples, *, direction: str, time_ratio: float = 1.0) -> Tensor:
    """Return the prior flow (B, 2, H, W) of the next pair, in full-resolution px, finite.

    ``time_ratio`` is the time span of the new pair over that of the sampled one. Samples that
    are not finite are left out; without any that lands the prior is zero.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f'direction must be one of {DIRECTIONS}; seen {direction!r}')
    if not 0 < time_ratio < float('inf'):
        raise ValueError(f'time_ratio must be positive and finite; seen {time_ratio}')
    flow, cell = samples.flow, samples.cell
    valid = torch.isfinite(flow).all(dim=1, keepdim=True)
    flow = torch.where(valid, flow, 0.0)
    along = flow / cell if direction == 'forward' else flow * (-time_ratio / cell)
    against = _motion_against_background(flow)
    winner = _splat(along, _rank(against, samples.reliability), valid)
    carried, weight = _gather(winner, flow, against)
    filled = _fill(carried, weight) * time_ratio
    height, width = samples.size
    if cell > 1:
        filled = functional.interpolate(filled, scale_factor=cell, mode='bilinear',
                                        align_corners=False)
    return filled[..., :height, :width].contiguous()


def _pick(values: Tensor, cell: int) -> Tensor:
    """Return the middle pixel of each cell; of a cut cell at the border, its last."""
    height, width = values.shape[-2:]
    rows = torch.arange(cell // 2, height + cell // 2, cell, device=values.device)
    columns = torch.arange(cell // 2, width + cell // 2, cell, device=values.device)
    values = values.index_select(-2, rows.clamp(max=height - 1))
    return values.index_select(-1, columns.clamp(max=width - 1))


def _motion_against_background(flow: Tensor) -> Tensor:
    """Return (B, 1, h, w): px between each flow vector and the median one."""
    step = 1 + min(flow.shape[-2:]) // _MEDIAN_SIDE
    background = flow[..., ::step, ::step].flatten(2).median(dim=2).values[..., None, None]
    return (flow - background).square().sum(dim=1, keepdim=True).sqrt()


def _rank(against: Tensor, reliability: Tensor | None) -> Tensor:
    """Return (B, 1, h, w) int64: who wins a cell, before closeness and order."""
    motion = (against / MOTION_STEP).clamp(max=_MOTIONS - 1).long()
    if reliability is None:
        return motion
    known = torch.nan_to_num(reliability) * _RELIABILITIES
    return known.clamp(0, _RELIABILITIES - 1).long() * _MOTIONS + motion


def _splat(along: Tensor, rank: Tensor, valid: Tensor) -> Tensor:
    """Return (B * h * w,) int64: the index of the point that wins each cell, -1 for none.

    ``along`` is the way of each point in cells.
    """
    batch, _, height, width = along.shape
    cells = batch * height * width
    # Clamped just outside the map, so that a wild vector cannot overflow the integers.
    landing = pixel_grid(height, width, along) + along
    x = landing[:, 0].clamp(-2, width + 1)
    y = landing[:, 1].clamp(-2, height + 1)
    corner = torch.tensor([0, 1], device=along.device).view(1, 2, 1, 1)
    columns = x.floor().long()[:, None] + corner  # (B, 2, h, w)
    rows = y.floor().long()[:, None] + corner
    off_x = (x[:, None] - columns).abs()
    off_y = (y[:, None] - rows).abs()
    covers_x = (off_x <= REACH) & (columns >= 0) & (columns < width)
    covers_y = (off_y <= REACH) & (rows >= 0) & (rows < height) & valid
    image = torch.arange(batch, device=along.device).view(batch, 1, 1, 1)
    row_starts = (rows.clamp(0, height - 1) + image * height) * width
    target = row_starts[:, :, None] + columns.clamp(0, width - 1)[:, None]
    off = torch.maximum(off_x[:, None], off_y[:, :, None])  # (B, 2 rows, 2 columns, h, w)
    nearness = ((1 - off) * (_NEARNESSES - 1)).long() << 32
    # Index plus one in the low 32 bits, so that 0 is a cell that nobody covers.
    order = torch.arange(1, cells + 1, device=along.device).view(batch, 1, height, width)
    key = ((rank * _NEARNESSES << 32) + order)[:, None] + nearness
    key *= covers_x[:, None] & covers_y[:, :, None]
    best = torch.zeros(cells, dtype=torch.int64, device=along.device)
    best.scatter_reduce_(0, target.flatten(), key.flatten(), 'amax')
    return (best & 0xFFFFFFFF) - 1


def _gather(winner: Tensor, flow: Tensor, against: Tensor) -> tuple[Tensor, Tensor]:
    """Return the winners' flow, and its weight in the filling of holes (0 in the holes)."""
    batch, _, height, width = flow.shape
    index = winner.clamp(min=0)
    values = flow.permute(1, 0, 2, 3).reshape(2, -1)[:, index]
    background = (1 + against.flatten()[index]).reciprocal().square()
    weight = torch.where(winner >= 0, background, 0.0).view(batch, 1, height, width)
    return values.view(2, batch, height, width).permute(1, 0, 2, 3), weight


def _fill(values: Tensor, weight: Tensor) -> Tensor:
    """Fill where ``weight`` is 0 with the weighted mean of what lies around (push-pull)."""
    means, weights = [values], [weight]
    while max(means[-1].shape[-2:]) > 1:
        sides = means[-1].shape[-2:]
        kernel, stride, padding = (tuple(two if side > 1 else one for side in sides)
                                   for two, one in ((4, 1), (2, 1), (1, 0)))
        both = torch.cat([means[-1] * weights[-1], weights[-1]], dim=1)
        both = functional.avg_pool2d(both, kernel, stride, padding)
        total = both[:, 2:]
        means.append(both[:, :2] / torch.where(total > 0, total, 1.0))
        weights.append(total)
    filled = means[-1]
    for mean, total in zip(reversed(means[:-1]), reversed(weights[:-1])):
        coarser = functional.interpolate(filled, size=mean.shape[-2:], mode='bilinear',
                                         align_corners=False)
        filled = torch.where(total > 0, mean, coarser)
    return filled
