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

import torch
from torch import Tensor
from torch.nn import functional


def convex_upsample(values: Tensor, mask: Tensor, factor: int) -> Tensor:
    """Upsample ``values`` (B, C, H, W) by ``factor`` with ``mask`` (B, 9 * factor**2, H, W).

    Mask channel = k * factor**2 + sy * factor + sx: k counts the 3x3 neighbours row by row,
    the softmax runs over k, the border is zero-padded. ``values`` are not scaled: give
    ``factor * flow`` to obtain a flow in px of the fine grid.
    """
    batch, channels, height, width = values.shape
    # Channels last, where the mask's convolution leaves it, and one neighbour at a time: no
    # product of all nine is ever held, which made this five times slower on CPUs.
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
