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

"""Convex upsampling: every fine pixel is a learned mean of nine coarse ones (RAFT, DIP)."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.exporting import runs_on_cpu


def convex_upsample(values: Tensor, mask: Tensor, factor: int) -> Tensor:
    """Upsample ``values`` (B, C, H, W) by ``factor`` with ``mask`` (B, 9 * factor**2, H, W).

    Mask channel = k * factor**2 + sy * factor + sx: k counts the 3x3 neighbours row by row,
    the softmax runs over k, the border is zero-padded. ``values`` are not scaled: give
    ``factor * flow`` to obtain a flow in px of the fine grid.
    """
    if runs_on_cpu(values, mask):
        return torch.cat([spread(cells, factor)
                          for cells in convex_cells(values, mask, factor)], dim=1)
    batch, channels, height, width = values.shape
    # Channels last, where the mask's convolution leaves it, and one neighbour at a time: no
    # product of all nine is ever held.
    weights = mask.permute(0, 2, 3, 1).reshape(batch, height, width, 9, factor * factor)
    weights = torch.softmax(weights, dim=3)
    padded = functional.pad(values, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, H+2, W+2, C)
    fine = weights[:, :, :, 0, None] * padded[:, :height, :width, :, None]
    for k in range(1, 9):
        neighbour = padded[:, k // 3:k // 3 + height, k % 3:k % 3 + width, :, None]
        fine = fine + weights[:, :, :, k, None] * neighbour  # (B, H, W, C, factor**2)
    fine = fine.view(batch, height, width, channels, factor, factor)
    fine = fine.permute(0, 3, 1, 4, 2, 5)  # (B, C, H, sy, W, sx)
    return fine.reshape(batch, channels, height * factor, width * factor)


def convex_cells(values: Tensor, mask: Tensor, factor: int) -> tuple[Tensor, ...]:
    """Do the same for CPUs, and leave the fine pixels in their cells: C times (B, H, W, f * f).

    What is worked out of several channels is so without a pass that puts them in order first:
    ``spread`` does that with the results. Each cell is one small matrix product of its nine
    neighbours with their weights: a third of the time of nine sums over the fine grid, with
    their nine copies. The product takes what the neighbours differ from the cell itself, since
    the weights add up to 1: in bfloat16 the flow would lose its small digits, its differences
    have none to lose.
    """
    batch, channels = (int(size) for size in values.shape[:2])
    height, width = (int(size) for size in values.shape[-2:])
    weights = mask.permute(0, 2, 3, 1).reshape(batch * height * width, 9, factor * factor)
    weights = torch.softmax(weights, dim=1)
    own = values.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    outside = own.new_zeros((batch, 1, channels))
    near = torch.cat([own, outside], dim=1).index_select(1, _neighbours(height, width))
    near = near.reshape(batch, height * width, 9, channels) - own[:, :, None]
    near = near.reshape(batch * height * width, 9, channels).transpose(1, 2)
    fine = torch.bmm(near, weights)  # (B * H * W, C, f * f)
    fine = fine.reshape(batch, height, width, channels * factor * factor)
    return tuple(cells + values[:, index, :, :, None]
                 for index, cells in enumerate(fine.split(factor * factor, dim=3)))


def spread(cells: Tensor, factor: int) -> Tensor:
    """Return the map (B, 1, H * factor, W * factor) of ``cells`` (B, H, W, factor**2)."""
    batch, height, width = cells.shape[:3]
    fine = cells.reshape(batch, 1, height, width, factor, factor).permute(0, 1, 2, 4, 3, 5)
    return fine.reshape(batch, 1, height * factor, width * factor)


@lru_cache(maxsize=16)
def _neighbours(height: int, width: int) -> Tensor:
    """Return the numbers of the 3x3 neighbours of all pixels; height * width is outside."""
    y = np.arange(height)[:, None, None, None] + np.arange(-1, 2)[:, None]
    x = np.arange(width)[:, None, None] + np.arange(-1, 2)
    within = (y >= 0) & (y < height) & (x >= 0) & (x < width)  # (H, W, 3, 3)
    number = np.where(within, y * width + x, height * width)
    # Not a tensor of the inference mode, which the caller may be in: it stays.
    with torch.inference_mode(False):
        return torch.from_numpy(number.reshape(-1).astype(np.int64))
