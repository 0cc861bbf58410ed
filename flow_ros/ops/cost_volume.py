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

"""The cost volumes of HD3 and of IOFPL: of a warped map, and sampled from the undeformed one.

All maps are (B, C, H, W), flow (B, 2, H, W) is in px of the map. A volume has (2r+1)**2 planes,
plane (2r+1)(dy+r) + (dx+r) is that of the residual (dx, dy). All are means over the channels,
so their scale does not depend on the width.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.matching import local_search
from flow_ros.ops.sampling import pixel_grid, warp

Measure = Literal['dot', 'sad']

_COVERED = 0.9999


def correlation(a: Tensor, b: Tensor, radius: int) -> Tensor:
    """Return the mean of a(x) * b(x + d) over the channels; ``b`` is 0 outside.

    Returns (B, (2r+1)**2, H, W) in the features' type.
    """
    return local_search(a, b, radius)


def difference(a: Tensor, b: Tensor, radius: int) -> Tensor:
    """Return the mean of |a(x) - b(x + d)| over the channels; ``b`` is 0 outside.

    Returns (B, (2r+1)**2, H, W) in the features' type.
    """
    height, width = a.shape[-2:]
    padded = functional.pad(b, (radius,) * 4)
    shifts = range(2 * radius + 1)
    return torch.stack([(a - padded[:, :, y:y + height, x:x + width]).abs().mean(dim=1)
                        for y in shifts for x in shifts], dim=1)


def masked_warp(b: Tensor, flow: Tensor) -> Tensor:
    """Return ``b`` at x + flow(x), and 0 where that is not wholly inside: HD3's warp.

    Inside means that the bilinear sample of a map of ones, 0 outside, is 0.9999 or more.
    """
    height, width = b.shape[-2:]
    points = pixel_grid(height, width, flow) + flow
    x, y = points[:, :1].detach(), points[:, 1:].detach()
    covered = ((torch.minimum(x + 1, width - x).clamp(0, 1)
                * torch.minimum(y + 1, height - y).clamp(0, 1)) >= _COVERED)
    return warp(b, flow) * covered.to(b.dtype)


def warped_cost_volume(a: Tensor, b: Tensor, flow: Tensor, radius: int,
                       measure: Measure = 'dot') -> Tensor:
    """Compare a(x) with the warped map about x: HD3, and IOFPL's equation 1.

    ``measure`` 'dot' is the mean of the products, 'sad' that of the absolute differences.
    Returns (B, (2r+1)**2, H, W) in the features' type.
    """
    _check(a, b, flow, measure)
    warped = masked_warp(b, flow)
    return correlation(a, warped, radius) if measure == 'dot' else difference(a, warped, radius)


def sampled_cost_volume(a: Tensor, b: Tensor, flow: Tensor, radius: int,
                        measure: Measure = 'dot') -> Tensor:
    """Compare a(x) with b(x + flow(x) + d), sampled from the undeformed map: IOFPL, section 3.2.

    ``measure`` 'dot' is equation 2, the mean of the products; 'sad' equation 3, the mean of the
    absolute differences. The paper does not say what is outside the image: here ``b`` is 0
    there, as in the warped volume, and a sample between the last pixel and the outside fades.
    All samples of a pixel have one fractional part, so (2r+2)**2 pixels of ``b`` and four
    weights are enough. Returns (B, (2r+1)**2, H, W) in the type of ``flow``, which should be
    float32: half precision cannot address 2048 px.
    """
    _check(a, b, flow, measure)
    batch, channels, height, width = a.shape
    side = 2 * radius + 2
    points = pixel_grid(height, width, flow) + flow
    # From here on outwards every sample is 0, so far targets change nothing but their indices.
    x = points[:, 0].clamp(-radius - 1, width + radius)
    y = points[:, 1].clamp(-radius - 1, height + radius)
    left = x.detach().floor().long().clamp(-radius - 1, width + radius)  # (B, H, W)
    upper = y.detach().floor().long().clamp(-radius - 1, height + radius)
    part_x = (x - left).reshape(-1, 1)  # (N, 1) for N = B * H * W
    part_y = (y - upper).reshape(-1, 1)
    before, behind = 2 * radius + 1, 2 * radius + 2
    # In the features' own type: most of the time goes into moving them.
    padded = functional.pad(b, (before, behind, before, behind))
    padded = padded.permute(0, 2, 3, 1)  # (B, H + 4r + 3, W + 4r + 3, C)
    down, across = padded.shape[1], padded.shape[2]
    rows = padded.reshape(-1, channels)
    first = torch.arange(batch, device=a.device)[:, None, None] * (down * across)
    first = first + (upper + (before - radius)) * across + (left + (before - radius))
    first = first.reshape(-1, 1) + torch.arange(side, device=a.device)  # (N, side)
    own = a.permute(0, 2, 3, 1).reshape(-1, channels)  # (N, C)
    compare = _dot_rows if measure == 'dot' else _sad_rows
    planes = compare(own, rows, first, across, part_x, part_y)
    return planes.view(batch, height, width, (side - 1) ** 2).permute(0, 3, 1, 2)


def _dot_rows(own: Tensor, rows: Tensor, first: Tensor, across: int, part_x: Tensor,
              part_y: Tensor) -> Tensor:
    """Combine the products with whole pixels: (N, (2r+1)**2). Exact, as equation 2 is linear."""
    count, side = first.shape
    own = (own * (1 / own.shape[1]))[:, :, None]  # (N, C, 1)
    lines = []
    previous = None
    for index in range(side):
        patch = rows.index_select(0, (first + index * across).flatten())
        products = torch.bmm(patch.view(count, side, -1), own)[:, :, 0].to(part_x.dtype)
        line = products[:, :-1] + (products[:, 1:] - products[:, :-1]) * part_x
        if previous is not None:
            lines.append(previous + (line - previous) * part_y)
        previous = line
    return torch.cat(lines, dim=1)


def _sad_rows(own: Tensor, rows: Tensor, first: Tensor, across: int, part_x: Tensor,
              part_y: Tensor) -> Tensor:
    """Interpolate the features along x, then y, a line of the patch at a time."""
    count, side = first.shape
    own, part_x, part_y = own[:, None], part_x[:, None], part_y[:, None]
    lines = []
    previous = None
    for index in range(side):
        patch = rows.index_select(0, (first + index * across).flatten())
        patch = patch.view(count, side, -1)
        line = patch[:, :-1] + (patch[:, 1:] - patch[:, :-1]) * part_x  # (N, 2r+1, C)
        if previous is not None:
            lines.append((previous + (line - previous) * part_y - own).abs().mean(dim=2))
        previous = line
    return torch.cat(lines, dim=1)


def _check(a: Tensor, b: Tensor, flow: Tensor, measure: str) -> None:
    if a.shape != b.shape or flow.shape != (a.shape[0], 2, *a.shape[2:]):
        raise ValueError(f'a cost volume needs two maps of one shape (B, C, H, W) and the flow '
                         f'(B, 2, H, W); seen {tuple(a.shape)}, {tuple(b.shape)} and '
                         f'{tuple(flow.shape)}')
    if measure not in ('dot', 'sad'):
        raise ValueError(f"the measure of a cost volume is 'dot' or 'sad'; seen {measure!r}")
