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

"""The two matches of DIP as its released network computes them.

``ops.matching`` holds the paper's equations; the released weights were trained with something
else, which is kept here. All maps are (B, C, H, W), flow is in px of the map.

Each match has two forms. On CPUs, for inference, features are read as rows of channels, one
row per cell: a bilinear sample is a weighted sum of four rows, which is what an embedding bag
computes at the speed of the memory, and the products are small matrix products. It goes block
by block, so that what is sampled stays in the cache and no map of it is ever held. Elsewhere
(GPUs, exported graphs, training) the features are sampled as maps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.exporting import is_exporting
from flow_ros.ops.matching import local_search, SEEDS
from flow_ros.ops.sampling import pixel_grid, sample, warp

GROUPS = 2
TILE = 8
BLOCK = 1024
"""Cells that are matched at a time: 5 MB of samples, of which the cache holds what is needed."""

BLOCK_OF_A_TRACE = 4096
"""The same in a traced graph, which has as many parts as there are blocks."""


def propagation_correlation_released(features_a: Tensor, features_b: Tensor,
                                     flow: Tensor) -> Tensor:
    """Correlate with the propagated candidates, in the pairing of DIP's released network.

    The released network stacks F2 shifted by each of the five seeds (1280 channels, seed
    after seed), warps the stack, and then splits its channels in the wrong order: plane
    5g + s is the mean over k of F1[2k + g] * stack[10k + 5g + s]. So each plane mixes all
    seeds and pairs unrelated channels. This is not the paper's equation, but the published
    weights work with nothing else.

    Here the stack never exists. As rows, the five samples of a cell, one after the other, are
    its row of the warped stack, (128, 10) of it in the order k, 5g + s; with F1's row as
    (128, 2), in the order k, g, the planes are one matrix product, half of which is of use.

    As maps each seed is sampled on its own and its 256 channels are summed into the planes
    they belong to. Stack channel j meets F1 channel j // 5 and counts for plane j % 10; a few
    zero channels in front of a seed's first make j a multiple of 10.

    The warped stack is F2 at the *clamped* target plus the seed, clamped again: the seed moves
    a point that left the map back into it, so the order of the clamps matters.
    Returns (B, 10, H, W).
    """
    batch, channels, height, width = features_a.shape
    per_group = len(SEEDS)
    planes = GROUPS * per_group
    if channels % GROUPS or features_b.shape[1] != channels:
        raise ValueError(f'both maps must have the same even number of channels; seen '
                         f'{channels} and {features_b.shape[1]}')
    if _by_rows(features_a, flow):
        return _propagation_by_rows(features_a, features_b, flow)
    points = pixel_grid(height, width, flow) + flow
    points = torch.stack([points[:, 0].clamp(0, width - 1),
                          points[:, 1].clamp(0, height - 1)], dim=1)
    # dividing first keeps half precision from overflowing in the sum
    pairs = (features_a / (channels // GROUPS)).reshape(
        batch, channels // GROUPS, GROUPS, 1, height, width)
    total = pairs.new_zeros((batch, GROUPS, per_group, height, width))
    for index, (dx, dy) in enumerate(SEEDS):
        moved = torch.stack([points[:, 0] + dx, points[:, 1] + dy], dim=1)
        front = (index * channels) % planes
        back = -(front + channels) % planes
        first = (index * channels) // planes
        count = (front + channels + back) // planes
        sampled = functional.pad(sample(features_b, moved), (0, 0, 0, 0, front, back))
        sampled = sampled.reshape(batch, count, GROUPS, per_group, height, width)
        total = total + (pairs[:, first:first + count] * sampled).sum(dim=1)
    return total.reshape(batch, planes, height, width)


def _propagation_by_rows(features_a: Tensor, features_b: Tensor, flow: Tensor) -> Tensor:
    batch, channels, height, width = features_a.shape
    pairs = _rows(features_a).reshape(-1, channels // GROUPS, GROUPS).transpose(1, 2)
    table = _rows(features_b)
    index, weight = _corners(flow, SEEDS)  # (N, 5, 4)
    found = []
    for first, last in _blocks(len(pairs), 1):
        sampled = functional.embedding_bag(
            index[first:last].reshape(-1, 4), table, mode='sum',
            per_sample_weights=weight[first:last].reshape(-1, 4))
        found.append(torch.bmm(pairs[first:last], sampled.view(
            last - first, channels // GROUPS, GROUPS * len(SEEDS))))
    products = torch.cat(found) * (GROUPS / channels)  # (N, 2, 10)
    planes = torch.cat([products[:, group, group * len(SEEDS):(group + 1) * len(SEEDS)]
                        for group in range(GROUPS)], dim=1)
    planes = planes.view(batch, height, width, GROUPS * len(SEEDS)).permute(0, 3, 1, 2)
    return planes.to(features_a.dtype)


def search_released(features_a: Tensor, features_b: Tensor, flow: Tensor,
                    radius: int = 2) -> Tensor:
    """Correlate with the (2r + 1)**2 neighbours of the target in F2 warped by ``flow``.

    What ``local_search_released`` makes of W(F2, flow). Returns (B, (2r + 1)**2, H, W).
    """
    if not _by_rows(features_a, flow):
        return local_search_released(features_a, warp(features_b, flow), radius)
    batch, channels, height, width = features_a.shape
    side, window = 2 * radius + 1, TILE + 2 * radius
    down, across = -(-height // TILE), -(-width // TILE)
    tiles = features_a
    if (height, width) != (down * TILE, across * TILE):
        tiles = functional.pad(tiles, (0, across * TILE - width, 0, down * TILE - height))
    tiles = tiles.permute(0, 2, 3, 1).reshape(batch * down, TILE, across, TILE, channels)
    table = _rows(features_b)
    index, weight = _corners(flow, ((0, 0),))
    index, weight = index.view(batch * height * width, 4), weight.view(-1, 4)
    # The cell that each place of a window shows: past the border it is the border's.
    y = _places(down, radius, flow).clamp(0, height - 1).view(down, 1, window, 1)
    x = _places(across, radius, flow).clamp(0, width - 1).view(1, across, 1, window)
    sample_of = torch.arange(batch, device=flow.device).view(batch, 1, 1, 1, 1) * (height * width)
    cells = (sample_of + (y * width + x)).view(batch * down, across * window * window)
    found = []
    for first, last in _blocks(batch * down, across * TILE * TILE):
        shown = cells[first:last].reshape(-1)
        windows = functional.embedding_bag(index[shown], table, mode='sum',
                                           per_sample_weights=weight[shown])
        windows = windows.view((last - first) * across, window * window, channels)
        centres = tiles[first:last].transpose(1, 2).reshape(-1, TILE * TILE, channels).float()
        band = _band(torch.bmm(centres, windows.transpose(1, 2)), window, side)
        band = band.reshape(last - first, across, TILE, TILE, side, side)
        found.append(band.permute(0, 2, 1, 3, 5, 4))  # rows first, and dx before dy
    planes = torch.cat(found).reshape(batch, down * TILE, across * TILE, side * side)
    planes = planes[:, :height, :width] * (1 / channels)
    return planes.permute(0, 3, 1, 2).to(features_a.dtype)


def _by_rows(features: Tensor, flow: Tensor) -> bool:
    """Return whether the form for inference on CPUs is the one to take; in a trace it may be."""
    wanted = torch.is_grad_enabled() and (features.requires_grad or flow.requires_grad)
    return not (features.device.type != 'cpu' or wanted or is_exporting()
                or torch.compiler.is_compiling())


def _rows(features: Tensor) -> Tensor:
    """Return (B * H * W, C) in float32: a view where the channels are last already."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]).float()


def _blocks(count: int, cells: int) -> list[tuple[int, int]]:
    """Cut ``count`` parts of ``cells`` cells each into blocks, (first, last + 1)."""
    size = max(1, (BLOCK_OF_A_TRACE if torch.jit.is_tracing() else BLOCK) // cells)
    return [(first, min(first + size, count)) for first in range(0, count, size)]


def _corners(flow: Tensor, seeds: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return the rows of the four cells about each target, and their bilinear weights.

    A target is x + flow(x), clamped to the map, plus a seed, clamped again.
    Both results are (B * H * W, len(seeds), 4), int32 and float32.
    """
    batch, _, height, width = flow.shape
    points = pixel_grid(height, width, flow) + flow
    x = points[:, 0].clamp(0, width - 1).reshape(-1, 1)
    y = points[:, 1].clamp(0, height - 1).reshape(-1, 1)
    x = torch.cat([(x + dx).clamp(0, width - 1) for dx, _ in seeds], dim=1)
    y = torch.cat([(y + dy).clamp(0, height - 1) for _, dy in seeds], dim=1)
    left, upper = x.floor(), y.floor()
    x, y = x - left, y - upper
    first, top = left.int(), upper.int()
    last, bottom = (first + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    start = torch.arange(batch, device=flow.device, dtype=torch.int32) * (height * width)
    top, bottom = (rows * width + start.repeat_interleave(height * width)[:, None]
                   for rows in (top, bottom))
    index = torch.stack([top + first, top + last, bottom + first, bottom + last], dim=2)
    weight = torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], dim=2)
    return index, weight


def _places(count: int, radius: int, like: Tensor) -> Tensor:
    """Return which rows (or columns) the windows of ``count`` tiles in a row show."""
    within = torch.arange(TILE + 2 * radius, device=like.device) - radius
    return torch.arange(count, device=like.device)[:, None] * TILE + within


def _band(products: Tensor, window: int, side: int) -> Tensor:
    """Keep, for the cell (py, px) of each tile, the window's entries (py + dy, px + dx).

    ``products`` (N, TILE**2, window**2); returns (N, TILE, TILE, side, side), dy before dx.
    In a flattened tile that entry lies at (TILE py + px) window**2 + (py + dy) window + px + dx:
    the strides of py and px below.
    """
    count = products.shape[0]
    stride_y, stride_x = TILE * window * window + window, window * window + 1
    if not torch.jit.is_tracing():
        return products.as_strided(
            (count, TILE, TILE, side, side),
            (TILE * TILE * window * window, stride_y, stride_x, window, 1))
    flat = products.reshape(count, TILE * TILE * window * window)
    flat = functional.pad(flat, (0, TILE * stride_y - flat.shape[1]))
    by_row = flat.view(count, TILE, stride_y)[:, :, :TILE * stride_x]
    by_cell = by_row.reshape(count, TILE, TILE, stride_x)[..., :side * window]
    return by_cell.reshape(count, TILE, TILE, side, window)[..., :side]


def local_search_released(features_a: Tensor, warped_b: Tensor, radius: int = 2) -> Tensor:
    """Correlate with the (2r + 1)**2 neighbours in the warped F2, replicated at its border.

    Plane (2r + 1)(dx + r) + (dy + r) is the mean over the channels of F1(x) * F2'(x + (dx, dy)):
    dx is the outer index, unlike in ``ops.matching``. Returns (B, (2r + 1)**2, H, W).
    """
    channels, height, width = features_a.shape[1:]
    side = 2 * radius + 1
    if is_exporting():
        # Twenty-five shifts are hundreds of layers, each as large as the features.
        planes = local_search(features_a, warped_b, radius, padding='border')
        return planes.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
    scaled = features_a / channels
    padded = functional.pad(warped_b, (radius,) * 4, mode='replicate')
    return torch.stack([(scaled * padded[:, :, y:y + height, x:x + width]).sum(dim=1)
                        for x in range(side) for y in range(side)], dim=1)
