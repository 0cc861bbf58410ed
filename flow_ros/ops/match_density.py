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

"""HD3's match densities: from a density over the search window to a vector, and back.

HD3 (Yin et al., CVPR 2019), section 3.2. A density has (2r+1)**2 planes, one for each integer
residual; plane (2r+1)(dy+r) + (dx+r) is that of the residual (dx, dy), in px of its own level.
"""

import torch
from torch import Tensor


def density_to_vector(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vector (B, 2, h, w), level px, of softmax(``logits``) and its confidence.

    ``logits`` (B, (2r+1)**2, h, w); the radius follows from the planes. See
    ``probability_to_vector`` for the rule. Computed and returned in float32 at least.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return probability_to_vector(torch.softmax(logits, dim=1))


def probability_to_vector(density: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vector (B, 2, h, w), level px, and the confidence (B, 1, h, w) of a density.

    Of all windows of 2x2 neighbouring residuals that with the greatest total counts, the first
    of equal ones; the vector is the mean of its four residuals, each weighted by its share of
    the total. So it is a point between four integer residuals, and -r to r. The confidence is
    the total, in (0, 1]: it is that of this level given the coarser ones, not of the flow's
    whole error. Differentiable in ``density``, as the window moves with it.
    """
    batch, planes, height, width = density.shape
    radius = radius_of(planes)
    side, windows = 2 * radius + 1, 2 * radius
    square = density.view(batch, side, side, height, width)
    # For every window its total, and the part of it on its right and on its lower side: three
    # maps, of which one plane each is picked, instead of four.
    pair_x = square[:, :, :-1] + square[:, :, 1:]  # (B, side, windows, h, w)
    total = (pair_x[:, :-1] + pair_x[:, 1:]).reshape(batch, windows ** 2, height, width)
    lower = pair_x[:, 1:].reshape(batch, windows ** 2, height, width)
    right = square[:, :, 1:]
    right = (right[:, :-1] + right[:, 1:]).reshape(batch, windows ** 2, height, width)
    first = total.argmax(dim=1, keepdim=True)  # (B, 1, h, w)
    confidence = total.gather(1, first)
    x = (first % windows - radius).to(density.dtype) + right.gather(1, first) / confidence
    y = (torch.div(first, windows, rounding_mode='floor') - radius).to(density.dtype)
    y = y + lower.gather(1, first) / confidence
    return torch.cat([x, y], dim=1), confidence


def splat(residual: Tensor, radius: int) -> Tensor:
    """Return the density (B, (2r+1)**2, h, w) that is bilinear about ``residual``.

    ``residual`` (B, 2, h, w), level px, is clamped to +-``radius`` first. The inverse of
    ``probability_to_vector``.
    """
    residual = residual.clamp(-radius, radius)
    bins = torch.arange(-radius, radius + 1, device=residual.device, dtype=residual.dtype)
    # The tent about each integer: 1 at it, 0 one px away.
    tent = (1 - (residual[:, :, None] - bins[:, None, None]).abs()).clamp(min=0)
    product = tent[:, 1, :, None] * tent[:, 0, None]  # (B, y, x, h, w)
    return product.flatten(1, 2)


def radius_of(planes: int) -> int:
    """Return r of (2r+1)**2 planes. ValueError where there is none, or it is 0."""
    planes = int(planes)  # while a network is traced it is a tensor
    side = round(planes ** 0.5)
    if side < 3 or side % 2 == 0 or side * side != planes:
        raise ValueError(f'a match density has (2r+1)**2 planes for a radius r of 1 or more (9, '
                         f'25, 49, 81, ...); seen {planes}')
    return (side - 1) // 2
