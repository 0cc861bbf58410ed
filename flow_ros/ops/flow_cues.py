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

"""IOFPL's flow cues: what the flows of both directions say about each other.

IOFPL (Hofinger et al., ECCV 2020), section 3.4, names the cues; their formulas are in a
supplement that is not available, so those here are this project's definitions. All flows are
(B, 2, h, w) in px of their own grid; the cues are those of image 1.

The reverse flow and the map's uniqueness need a scatter (``index_add``), which some engines do
not have or run slowly: the cues are computed in torch and given to an engine as an input.
Gradients pass into the flows unless the caller detaches them.
"""

import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.sampling import inside, pixel_grid, sample, warp

PLANES = 8
"""Planes of ``flow_cues``."""

_LEAST_WEIGHT = 1e-4
"""Less is what the rounding of a target's coordinates leaves behind in float32."""


def flow_cues(flow12: Tensor, flow21: Tensor) -> Tensor:
    """Return all cues (B, 8, h, w) of image 1.

    Planes 0-1: the backward flow at the forward flow's target; 2-3: its sum with the forward
    flow; 4-5: the reverse flow; 6: the map's uniqueness; 7: out of the image.
    """
    backward, mismatch = forward_backward(flow12, flow21)
    return torch.cat([backward, mismatch, reverse_flow(flow21), map_uniqueness(flow12),
                      out_of_image(flow12)], dim=1)


def forward_backward(flow12: Tensor, flow21: Tensor) -> tuple[Tensor, Tensor]:
    """Return F21(x + F12(x)), and its sum with F12(x): 0 where both agree. (B, 2, h, w) each.

    Beyond the border F21 is replicated; ``out_of_image`` says where.
    """
    backward = warp(flow21, flow12)
    return backward, flow12 + backward


def reverse_flow(flow21: Tensor) -> Tensor:
    """Return the flow 1 -> 2 that ``flow21`` implies, (B, 2, h, w); 0 where no pixel comes from.

    Each pixel y of image 2 puts -F21(y) at y + F21(y), on the four pixels about it; what falls
    on a pixel is averaged with its bilinear weights.
    """
    ones = torch.ones_like(flow21[:, :1])
    total = splat_forward(torch.cat([-flow21, ones], dim=1), flow21)
    weight = total[:, 2:]
    return torch.where(weight > _LEAST_WEIGHT,
                       total[:, :2] / weight.clamp(min=_LEAST_WEIGHT), 0.0)


def map_uniqueness(flow12: Tensor) -> Tensor:
    """Return how many pixels of image 1 go where x goes, x among them: (B, 1, h, w).

    1 = x alone; above it several share the target, and all but one of them are occluded; less
    where the flow spreads. 0 where the target is out of the image.
    """
    hits = splat_forward(torch.ones_like(flow12[:, :1]), flow12)
    height, width = flow12.shape[-2:]
    # With a margin: a grid of a side of 1 has no coordinate for what is outside of it.
    hits = functional.pad(hits, (1, 1, 1, 1))
    return sample(hits, pixel_grid(height, width, flow12) + flow12 + 1, 'zeros')


def out_of_image(flow12: Tensor) -> Tensor:
    """Return 1 where x + F12(x) is past the centres of the outermost pixels: (B, 1, h, w)."""
    return (~inside(flow12)).to(flow12.dtype)


def splat_forward(values: Tensor, flow: Tensor) -> Tensor:
    """Add ``values`` (B, C, h, w) bilinearly at x + flow(x); what falls outside is lost.

    Sums, not means: splat ones along to have the weights. Uses ``index_add``.
    """
    batch, channels, height, width = values.shape
    points = pixel_grid(height, width, flow) + flow
    # The clamps keep far targets countable; from -1 and the size on, no pixel is touched.
    x, y = points[:, 0].clamp(-1, width), points[:, 1].clamp(-1, height)
    # One pixel of margin before and two behind take what is lost, so no index needs a mask.
    across, down = width + 3, height + 3
    left = x.detach().floor().long().clamp(-1, width)
    upper = y.detach().floor().long().clamp(-1, height)
    weight_x, weight_y = x - left, y - upper  # (B, h, w)
    first = torch.arange(batch, device=values.device)[:, None, None] * (across * down)
    first = first + (upper + 1) * across + (left + 1)
    rows = values.permute(0, 2, 3, 1)  # (B, h, w, C)
    total = values.new_zeros((batch * across * down, channels))
    for dy, part_y in ((0, 1 - weight_y), (1, weight_y)):
        for dx, part_x in ((0, 1 - weight_x), (1, weight_x)):
            part = rows * (part_y * part_x)[..., None].to(values.dtype)
            total = total.index_add(0, (first + dy * across + dx).flatten(),
                                    part.reshape(-1, channels))
    total = total.view(batch, down, across, channels)[:, 1:1 + height, 1:1 + width]
    return total.permute(0, 3, 1, 2)
