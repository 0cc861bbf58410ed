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

"""Losses that need no true flow: how well the second image, moved back, explains the first.

Images are RGB (B, 3, H, W), 0..255; flow (B, 2, H, W) px from image 1 to image 2.
"""

import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.sampling import inside, pixel_grid, sample, warp
from flow_ros.streaming.occlusion import check_consistency

PATCH = 7
_GREY = (0.299, 0.587, 0.114)


def census(image: Tensor) -> Tensor:
    """Return the soft ternary census transform (B, 48, H, W) of the 7x7 neighbourhoods.

    t(d) = (g(x + d) - g(x)) / sqrt(0.81 + (g(x + d) - g(x))^2) for every neighbour d, with the
    grey value g in 0..255: the sign of the difference, soft where it is small. It does not
    feel brightness, and hardly contrast (UnFlow, Meister et al., AAAI 2018, section 3.2, after
    Stein, 2004; the constants are those of ARFlow and UFlow).
    """
    weights = image.new_tensor(_GREY)[None, :, None, None]
    grey = (image * weights).sum(dim=1, keepdim=True)
    height, width = grey.shape[-2:]
    reach = PATCH // 2
    padded = functional.pad(grey, (reach,) * 4, mode='replicate')
    planes = [padded[..., y:y + height, x:x + width] - grey
              for y in range(PATCH) for x in range(PATCH) if (y, x) != (reach, reach)]
    difference = torch.cat(planes, dim=1)
    return difference / (0.81 + difference.square()).sqrt()


def census_distance(first: Tensor, second: Tensor) -> Tensor:
    """Return the soft Hamming distance (B, 1, H, W) of two census transforms, in [0, 1).

    The mean over the neighbours of (t1 - t2)^2 / (0.1 + (t1 - t2)^2).
    """
    squared = (first - second).square()
    return (squared / (0.1 + squared)).mean(dim=1, keepdim=True)


def census_loss(image1: Tensor, image2: Tensor, flow: Tensor, visible: Tensor, *,
                offset: Tensor | None = None) -> Tensor:
    """Return the photometric loss of UFlow: the mean over visible pixels of (h + 0.01)^0.4.

    h is the census distance of image 1 and image 2 moved back by the flow. Pixels that are not
    ``visible`` (B, 1, H, W), whose target lies outside image 2, or whose patch crosses the
    border of image 1 are left out. ``image1`` may be crops of larger frames, their left upper
    pixels at ``offset`` (B, 2: x, y) of the whole ``image2``: what leaves the crop still counts.
    """
    height, width = flow.shape[-2:]
    points = pixel_grid(height, width, flow) + flow
    if offset is not None:
        points = points + offset[:, :, None, None]
    moved = sample(image2, points)
    x, y = points[:, :1], points[:, 1:]
    seen = ((x >= 0) & (x <= image2.shape[-1] - 1) & (y >= 0) & (y <= image2.shape[-2] - 1)
            & visible & whole_patches(flow))
    cost = (census_distance(census(image1), census(moved)) + 0.01) ** 0.4
    return (cost * seen).sum() / seen.sum().clamp(min=1)


def whole_patches(like: Tensor) -> Tensor:
    """Return (1, 1, H, W) bool: where the census patch does not cross the image's border."""
    height, width = like.shape[-2:]
    reach = PATCH // 2
    mask = torch.zeros((1, 1, height, width), dtype=torch.bool, device=like.device)
    mask[..., reach:height - reach, reach:width - reach] = True
    return mask


def smoothness_loss(flow: Tensor, image: Tensor, *, order: int = 1,
                    edge: float = 10.0) -> Tensor:
    """Return the edge-aware smoothness: mean of exp(-edge |dI|) |d^k f|, over x and y, px.

    First order (k = 1) prefers constant flow, second order planes of it (Tomasi and Manduchi's
    weights as in UFlow, Jonschkowski et al., ECCV 2020, equation 3). dI is the difference over
    the same pixels, the mean over the colours, with the image in 0..1; |f| = sqrt(f^2 + 1e-6).
    """
    if order not in (1, 2):
        raise ValueError(f'smoothness is of order 1 or 2; seen {order}')
    loss = flow.new_zeros(())
    for dim in (-1, -2):
        # Second order: f(x+1) - 2 f(x) + f(x-1), and I(x+1) - I(x-1).
        length = image.shape[dim]
        slope = (image.narrow(dim, order, length - order)
                 - image.narrow(dim, 0, length - order)).abs().mean(dim=1, keepdim=True) / 255
        change = flow.diff(n=order, dim=dim)
        loss = loss + (torch.exp(-edge * slope) * (change.square() + 1e-6).sqrt()).mean()
    return loss


@torch.no_grad()
def visible_by_consistency(flow: Tensor, backward: Tensor) -> Tensor:
    """Return (B, 1, H, W) bool: where forward and backward flow cancel, so nothing covers it.

    |F + B(x + F)|^2 <= 0.01 (|F|^2 + |B|^2) + 0.5 (Sundaram et al., ECCV 2010), and the target
    lies in the image. The mask has no gradient: a loss could else be lowered by hiding pixels.
    """
    return ~check_consistency(flow, backward).occluded


def reconstruction_loss(features1: Tensor, features2: Tensor, flow: Tensor) -> Tensor:
    """Return MSCSL's equation 16 on features: mean |X_A - X_B(x + f)|_2, bilinear warp.

    ``features`` (B, C, h, w), the paper's conv2 maps; ``flow`` (B, 2, h, w) in px of their
    grid. A mean over the pixels whose target is inside, where the paper sums; its weight in
    the total loss is ``RECONSTRUCTION_WEIGHT``.
    """
    squared = (features1 - warp(features2, flow)).square().sum(dim=1, keepdim=True)
    seen = inside(flow)
    distance = torch.where(seen, squared, 0.0).clamp(min=1e-12).sqrt()  # the root's slope at 0
    return (distance * seen).sum() / seen.sum().clamp(min=1)


RECONSTRUCTION_WEIGHT = 0.005
"""MSCSL's lambda."""
