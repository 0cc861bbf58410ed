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

"""Sampling of maps at pixel coordinates.

Flow is (B, 2, H, W), channel 0 = u (right), channel 1 = v (down), px of its own grid.
"""

import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.exporting import runs_on_cpu

LEAST_CHANNELS = 16
"""From which on, on CPUs, pixels are read whole: all channels of a pixel in one go."""


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Return the pixel coordinates (1, 2, H, W), x then y, in ``like``'s type and device."""
    x = torch.arange(width, device=like.device, dtype=like.dtype)
    y = torch.arange(height, device=like.device, dtype=like.dtype)
    return torch.stack([x[None, :].expand(height, width),
                        y[:, None].expand(height, width)])[None]


def sample(image: Tensor, points: Tensor, padding: str = 'border') -> Tensor:
    """Sample ``image`` (B, C, H, W) bilinearly at ``points`` (B, 2, h, w), x then y, in px.

    ``padding`` is 'border' (replicate) or 'zeros'. Returns (B, C, h, w) in the image's type,
    computed in that of the points: half precision cannot address 2048 px and more.
    """
    height, width = image.shape[-2:]
    if (padding == 'border' and image.shape[1] >= LEAST_CHANNELS
            and runs_on_cpu(image, points)):
        batch, channels, rows, columns = (int(size) for size in
                                          (*image.shape[:2], *points.shape[-2:]))
        found = sum_cells(cells(image.to(points.dtype)),
                          *corners(points.flatten(2), int(height), int(width)))
        found = found.reshape(batch, rows, columns, channels).permute(0, 3, 1, 2)
        return found.to(image.dtype)
    return sample_grid(image, normalised(points, height, width), padding)


def normalised(points: Tensor, height: int, width: int) -> Tensor:
    """Return ``points`` (B, 2, h, w) of a map of ``height`` x ``width`` px as (B, h, w, 2).

    -1 and 1 are the centres of the outermost pixels, as ``sample_grid`` wants them.
    """
    x = points[:, 0] * (2 / max(width - 1, 1)) - 1
    y = points[:, 1] * (2 / max(height - 1, 1)) - 1
    return torch.stack([x, y], dim=-1)


def sample_grid(image: Tensor, grid: Tensor, padding: str = 'border') -> Tensor:
    """Do what ``sample`` does, at points that are ``normalised``."""
    sampled = functional.grid_sample(image.to(grid.dtype), grid, mode='bilinear',
                                     padding_mode=padding, align_corners=True)
    return sampled.to(image.dtype)


def cells(image: Tensor) -> Tensor:
    """Return ``image`` (B, C, H, W) as (B * H * W, C): a pixel's channels are a row."""
    return image.permute(0, 2, 3, 1).reshape(-1, int(image.shape[1]))


def corners(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the four ``cells`` about each point, and their bilinear shares: (B, N, 4) each.

    ``points`` (B, 2, N), x then y, are px of maps of ``height`` x ``width``, whose borders are
    replicated. The numbers are int32; they exist whatever the points are, NaN too.
    """
    x = points[:, 0].clamp(0, width - 1)
    y = points[:, 1].clamp(0, height - 1)
    last_x, last_y = max(width - 2, 0), max(height - 2, 0)
    left, upper = x.floor().clamp(max=last_x), y.floor().clamp(max=last_y)
    first = (upper.int() * width + left.int()).clamp(0, last_y * width + last_x)
    if points.shape[0] > 1:
        first = first + torch.arange(int(points.shape[0]), dtype=torch.int32)[:, None] * (
            height * width)
    across, down = min(width - 1, 1), min(height - 1, 1) * width
    index = torch.stack([first, first + across, first + down, first + (down + across)], dim=-1)
    right, lower = x - left, y - upper
    # By arithmetic alone: a tensor made of numbers would be a copy to the device.
    right, lower = torch.stack([1 - right, right], dim=-1), torch.stack([1 - lower, lower], dim=-1)
    share = lower[..., :, None] * right[..., None, :]  # (B, N, 2, 2)
    return index, share.flatten(2)


def sum_cells(rows: Tensor, index: Tensor, share: Tensor) -> Tensor:
    """Return the sums (B * N, C) of the ``rows`` at ``index`` (B, N, K), times their shares.

    A pixel's channels are one piece of memory: on CPUs this takes a third (torch) to a half
    (OpenVINO) of the time of a sampling that takes up one channel after the other.
    """
    count = int(index.shape[-1])
    return functional.embedding_bag(index.reshape(-1, count), rows, mode='sum',
                                    per_sample_weights=share.reshape(-1, count))


def warp(image: Tensor, flow: Tensor, padding: str = 'border') -> Tensor:
    """Return ``image`` (B, C, H, W) seen at x + flow(x): W(F, flow) of DIP equation 5."""
    height, width = flow.shape[-2:]
    return sample(image, pixel_grid(height, width, flow) + flow, padding)


def inside(flow: Tensor, border: float = 0.0) -> Tensor:
    """Return (B, 1, H, W) bool: True where x + flow(x) lies within the image.

    The image ends ``border`` px past the centres of its outermost pixels.
    """
    height, width = flow.shape[-2:]
    # From the middle, so that one comparison of a length is enough for both sides.
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    x = torch.arange(width, device=flow.device, dtype=flow.dtype) - middle_x
    y = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None] - middle_y
    return (((flow[:, :1] + x).abs() <= middle_x + border)
            & ((flow[:, 1:] + y).abs() <= middle_y + border))


def resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``flow`` to ``size`` (H, W), each component scaled by its own axis ratio."""
    height, width = flow.shape[-2:]
    if (height, width) == tuple(size):
        return flow
    resized = functional.interpolate(flow, size=tuple(size), mode='bilinear',
                                     align_corners=False)
    return torch.cat([resized[:, :1] * (size[1] / width), resized[:, 1:] * (size[0] / height)],
                     dim=1)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Replicate the right and lower border of ``image`` until both sides are multiples."""
    height, width = image.shape[-2:]
    right, lower = -width % multiple, -height % multiple
    if right == 0 and lower == 0:
        return image
    return functional.pad(image, (0, right, 0, lower), mode='replicate')
