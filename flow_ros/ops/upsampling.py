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
    weights = mask.view(batch, 1, 9, factor, factor, height, width)
    weights = torch.softmax(weights, dim=2)
    neighbours = functional.unfold(values, kernel_size=3, padding=1)
    neighbours = neighbours.view(batch, channels, 9, 1, 1, height, width)
    fine = (weights * neighbours).sum(dim=2)  # (B, C, sy, sx, H, W)
    fine = fine.permute(0, 1, 4, 2, 5, 3)  # (B, C, H, sy, W, sx)
    return fine.reshape(batch, channels, height * factor, width * factor)
