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

"""The matches of DIP (sections 3.2 and 3.3) in the paper's clean form.

Correlations are means over the channels, so their scale does not depend on the width.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.exporting import are_open, is_exporting, runs_on_cpu
from flow_ros.ops.sampling import cells, corners, pixel_grid, sample, sum_cells

Seeds = tuple[tuple[int, int], ...]

SEEDS: Seeds = ((0, 0), (-1, -1), (1, -1), (-1, 1), (1, 1))
"""The pixel itself and its four diagonal neighbours, (x, y), as in DIP's experiments."""

EIGHT_SEEDS: Seeds = (*SEEDS, (0, -1), (-1, 0), (1, 0), (0, 1))
"""The pixel itself and all of its neighbours."""

TILE = 8

_AT_ONCE = 2 ** 22
_AT_ONCE_ENGINE = 2 ** 19
"""Numbers in the windows and products that ``_search_by_lists`` works on at once.

An engine keeps the memory of its parts, so small ones stay in the cache: no faster where the
cache holds the whole map too, a quarter faster where others need it. Eager torch takes memory
anew for each.
"""

_MOST_PARTS = 16
"""Of an engine: each takes its time to compile."""


def inverse_propagation(features_a: Tensor, features_b: Tensor, flow: Tensor,
                        seeds: Seeds = SEEDS) -> Tensor:
    """Correlate with the shifted targets: DIP equations 5 and 6.

    Plane s is <F1(x), F2(x + flow(x) + seed_s)> / C. Shifting the target by an integer and
    then warping it is sampling at the shifted point, so no shifted stack is built. Without
    the shift back of equation 4, which the paper leaves out, no neighbour's flow is tried:
    the seeds are a sparse search about the pixel's own target.
    Returns (B, S, H, W) for S seeds, the pixel itself among them.
    """
    height, width = features_a.shape[-2:]
    points = pixel_grid(height, width, flow) + flow  # (B, 2, H, W)
    if runs_on_cpu(features_a, features_b, flow):
        return _correlate_cells(features_a, features_b, (
            points[:, :, None] + _steps(seeds)[:, :, None, None]).flatten(3))
    # The seeds enter as numbers: as tensors each would wait for its copy to a GPU.
    return _correlate(features_a, features_b, [
        torch.stack([points[:, 0] + dx, points[:, 1] + dy], dim=1) for dx, dy in seeds])


@lru_cache(maxsize=16)
def _steps(seeds: Seeds) -> Tensor:
    """Return the seeds as steps (2, S) px, x then y, on the CPU."""
    # Not a tensor of the inference mode, which the caller may be in: it stays.
    with torch.inference_mode(False):
        return torch.tensor(seeds, dtype=torch.float32).t()


def clean_propagation(features_a: Tensor, features_b: Tensor, flow: Tensor,
                      seeds: Seeds = SEEDS) -> Tensor:
    """Correlate with the targets of the neighbours' flows: DIP equation 3, as in patchmatch.

    Plane s is <F1(x), F2(x + flow(x + seed_s))> / C. Returns (B, S, H, W).
    """
    height, width = features_a.shape[-2:]
    grid = pixel_grid(height, width, flow)
    return _correlate(features_a, features_b,
                      [grid + candidate for candidate in shifted_flows(flow, seeds)])


def shifted_flows(flow: Tensor, seeds: Seeds = SEEDS) -> list[Tensor]:
    """Return S(flow, seed) of DIP equation 3 for every seed: the flow at x + seed.

    Beyond the border the flow is replicated. (B, 2, H, W) each.
    """
    height, width = flow.shape[-2:]
    padded = functional.pad(flow, (1, 1, 1, 1), mode='replicate')
    return [padded[..., 1 + dy:1 + dy + height, 1 + dx:1 + dx + width] for dx, dy in seeds]


def _correlate(features_a: Tensor, features_b: Tensor, targets: list[Tensor]) -> Tensor:
    """Return the planes <F1(x), F2(target(x))> / C, one for each of ``targets``.

    On GPUs, and in graphs, which are meant for them, one call: the maps are small there, and what
    counts is how many kernels are launched. On CPUs one target after the other; where that is
    trained one map a target, in single precision and channels first: four times faster, forward
    and backward, than one call for all of them or half precision.
    """
    if runs_on_cpu(features_a, features_b, *targets):
        return _correlate_cells(features_a, features_b, torch.stack(
            [points.flatten(2) for points in targets], dim=2))
    a = features_a.to(targets[0].dtype).contiguous()
    b = features_b.to(targets[0].dtype).contiguous()
    if a.is_cuda or is_exporting():
        return _correlate_at_once(a, b, targets)
    return torch.cat([(a * sample(b, points)).mean(dim=1, keepdim=True) for points in targets],
                     dim=1)


def _correlate_cells(features_a: Tensor, features_b: Tensor, points: Tensor) -> Tensor:
    """Do so with the cells of the maps, for ``points`` (B, 2, S, H * W): on CPUs.

    Where and with what shares to read is worked out for all targets at once; the sampled maps
    follow each other, so that one of them is in the cache, not all.
    """
    batch, _, height, width = (int(size) for size in features_a.shape)
    count = int(points.shape[2])
    a, b = cells(features_a.to(points.dtype)), cells(features_b.to(points.dtype))
    index, share = corners(points.flatten(2), height, width)
    of_each = zip(index.chunk(count, dim=1), share.chunk(count, dim=1), strict=True)
    planes = [(a * sum_cells(b, *each)).mean(dim=1) for each in of_each]
    return torch.stack([plane.reshape(batch, height, width) for plane in planes], dim=1)


def _correlate_at_once(a: Tensor, b: Tensor, targets: list[Tensor]) -> Tensor:
    """Sample all targets as one tall map."""
    batch, channels, height, width = a.shape
    sampled = sample(b, torch.cat(targets, dim=2))  # (B, C, S * H, W)
    sampled = sampled.view(batch, channels, len(targets), height, width)
    return (a[:, :, None] * sampled).mean(dim=1)


def local_search(features_a: Tensor, warped_b: Tensor, radius: int,
                 padding: str = 'zeros') -> Tensor:
    """Correlate with the neighbourhood in the warped target: DIP equation 7.

    Plane (2r+1)(dy+r) + (dx+r) is <F1(x), F2'(x + (dx, dy))> / C with F2' = W(F2, flow), which
    outside is zero, or with ``padding`` 'border' replicated. Computed in tiles of pixels as one
    batched matrix product per tile with its window, of which the band is kept: some 3 times the
    multiplications of the plain loop over shifts for r = 4, on a unit that is 30 times faster,
    and no map per shift.
    Returns (B, (2r+1)**2, H, W).
    """
    if are_open(*features_a.shape[-2:]):
        # A graph for maps of any size: tiles whose number is open are more than torch can prove.
        mode = 'constant' if padding == 'zeros' else 'replicate'
        padded = functional.pad(warped_b, (radius,) * 4, mode=mode)
        return _search_by_rows(features_a, padded, radius)
    if runs_on_cpu(features_a, warped_b):
        return _search_by_lists(features_a, warped_b, radius, padding)
    return _search_by_windows(features_a, warped_b, radius, padding)


def _search_by_lists(features_a: Tensor, warped_b: Tensor, radius: int, padding: str) -> Tensor:
    """Do what ``local_search`` does with lists of pixels, for CPUs.

    A pixel's channels are one piece of memory, so a list of pixels is a copy without arithmetic:
    lists take the place of pads, windows cut out, bands and rows of tiles turned, each of which
    is a pass over memory in torch and in OpenVINO (half of the whole search).
    """
    batch, channels = (int(size) for size in features_a.shape[:2])
    height, width = (int(size) for size in features_a.shape[-2:])
    side, (rows, columns) = 2 * radius + 1, _tile(radius)
    pixels, window = rows * columns, (rows + 2 * radius) * (columns + 2 * radius)
    own, others, kept, back = _lists(height, width, radius, padding == 'border')
    a = features_a.permute(0, 2, 3, 1).reshape(batch, -1, channels) * (1 / channels)
    b = warped_b.permute(0, 2, 3, 1).reshape(batch, -1, channels)
    if padding != 'border':
        b = torch.cat([b, b.new_zeros((batch, 1, channels))], dim=1)  # what is outside
    # In parts, so that memory is bounded on large maps too.
    tiles = len(own) // pixels
    at_once, most = ((_AT_ONCE_ENGINE, _MOST_PARTS) if torch.jit.is_tracing()
                     else (_AT_ONCE, tiles))
    parts = -(-tiles * batch * window * (channels + pixels) // at_once)
    step = -(-tiles // min(parts, tiles, most))
    planes = []
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        mine = own[first * pixels:(first + count) * pixels]
        theirs = others[first * window:(first + count) * window]
        products = torch.bmm(
            a.index_select(1, mine).reshape(-1, pixels, channels),
            b.index_select(1, theirs).reshape(-1, window, channels).transpose(1, 2))
        band = products.reshape(-1, pixels * window).index_select(1, kept)
        planes.append(band.reshape(batch, count * pixels, side * side))
    whole = torch.cat(planes, dim=1) if len(planes) > 1 else planes[0]
    whole = whole.index_select(1, back)
    return whole.reshape(batch, height, width, side * side).permute(0, 3, 1, 2)


def _tile(radius: int) -> tuple[int, int]:
    """Return the (rows, columns) of a tile of ``_search_by_lists``: measured, on a CPU."""
    return (6, 8) if radius <= 4 else (8, 8)


@lru_cache(maxsize=16)
def _lists(height: int, width: int, radius: int, border: bool) -> tuple[Tensor, ...]:
    """Return four lists of numbers.

    The pixels of all tiles; those of all their windows; of the products of a tile, pixel after
    pixel, those that belong to its planes; and where each pixel of the map is among those of the
    tiles. A pixel is its number, row by row; height * width stands for what is outside. A tile
    that reaches past the map has pixel 0 there: nobody reads its planes.
    """
    rows, columns = _tile(radius)
    down, across = -(-height // rows), -(-width // columns)

    def pixels(reach: int, outside: int | None) -> Tensor:
        y = (np.arange(down)[:, None] * rows + np.arange(-reach, rows + reach))
        x = (np.arange(across)[:, None] * columns + np.arange(-reach, columns + reach))
        y, x = y[:, None, :, None], x[None, :, None, :]
        if outside is None:
            number = np.clip(y, 0, height - 1) * width + np.clip(x, 0, width - 1)
        else:
            within = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            number = np.where(within, y * width + x, outside)
        return torch.from_numpy(number.reshape(-1).astype(np.int64))

    y, x = np.arange(height)[:, None], np.arange(width)[None]
    place = ((y // rows * across + x // columns) * rows + y % rows) * columns + x % columns
    side = 2 * radius + 1
    py, px, dy, dx = np.ix_(np.arange(rows), np.arange(columns), np.arange(side),
                            np.arange(side))
    kept = ((py * columns + px) * (rows + 2 * radius) + py + dy) * (columns + 2 * radius) + px + dx
    # Not tensors of the inference mode, which the caller may be in: they stay.
    with torch.inference_mode(False):
        return (pixels(0, 0), pixels(radius, None if border else height * width),
                torch.from_numpy(kept.reshape(-1).astype(np.int64)),
                torch.from_numpy(place.reshape(-1).astype(np.int64)))


def _search_by_windows(features_a: Tensor, warped_b: Tensor, radius: int,
                       padding: str) -> Tensor:
    """Do what ``local_search`` does in tiles of 8x8, with slices alone: for GPUs and training."""
    batch, channels, height, width = features_a.shape
    window = TILE + 2 * radius
    side = 2 * radius + 1
    mode = 'constant' if padding == 'zeros' else 'replicate'
    right, lower = -width % TILE, -height % TILE
    rows, columns = (height + lower) // TILE, (width + right) // TILE
    a = functional.pad(features_a, (0, right, 0, lower)).permute(0, 2, 3, 1)
    a = a.reshape(batch, rows, TILE, columns, TILE, channels).permute(0, 1, 3, 2, 4, 5)
    a = a.reshape(batch * rows * columns, TILE * TILE, channels)
    # What is more than the radius outside is met only by pixels that are cut off again.
    b = functional.pad(warped_b, (radius, right + radius, radius, lower + radius), mode=mode)
    b = b.permute(0, 2, 3, 1)  # (B, H + 2r, W + 2r, C)
    b = _windows(b, 1, rows, window)  # (B, rows, window, W + 2r, C)
    b = _windows(b, 3, columns, window)  # (B, rows, window, columns, window, C)
    b = b.permute(0, 1, 3, 2, 4, 5)
    b = b.reshape(batch * rows * columns, window * window, channels)
    products = torch.bmm(a * (1 / channels), b.transpose(1, 2))  # (N, 64, window**2)
    planes = _band(products, window, side)  # (N, 8, 8, side, side)
    planes = planes.reshape(batch, rows, columns, TILE, TILE, side * side)
    planes = planes.permute(0, 5, 1, 3, 2, 4)
    planes = planes.reshape(batch, side * side, rows * TILE, columns * TILE)
    return planes[:, :, :height, :width]


def _search_by_rows(features_a: Tensor, padded_b: Tensor, radius: int) -> Tensor:
    """Do what ``local_search`` does with 2r + 1 matrix products, whatever the map's size.

    Each takes whole rows of both maps, (W, C) and (C, W + 2r), of which a band is kept.
    ``padded_b`` is (B, C, H + 2r, W + 2r).

    The largest intermediate, twice at a time, is B H W (W + 2r) numbers, which grows with the
    square of the width: for frames of 1920x1080 px in float32 32 MB at 1/8 (DIP-RT, r = 4) and
    253 MB at 1/4 (DIP, r = 2). The tiles of ``local_search`` take 75 MB there, and a seventeenth
    of the multiplications: an engine for one size is the better one where memory is scarce.
    """
    batch, channels, height, width = features_a.shape
    side, across = 2 * radius + 1, width + 2 * radius
    a = (features_a * (1 / channels)).permute(0, 2, 3, 1)  # (B, H, W, C)
    b = padded_b.permute(0, 2, 1, 3)  # (B, H + 2r, C, W + 2r)
    planes = []
    for dy in range(side):
        products = torch.matmul(a, b[:, dy:dy + height])  # (B, H, W, W + 2r)
        # Pixel x wants the entries x to x + 2r: the first ones of a row, where rows are one
        # longer than they were.
        flat = functional.pad(products.reshape(batch, height, width * across), (0, width))
        planes.append(flat.reshape(batch, height, width, across + 1)[..., :side])
    return torch.cat(planes, dim=3).permute(0, 3, 1, 2)


def _windows(values: Tensor, dim: int, count: int, window: int) -> Tensor:
    """Cut ``count`` overlapping windows, TILE apart, out of ``dim``; they become two dims."""
    if is_exporting():
        return _windows_of_tiles(values, dim, count, window)
    parts = [values.narrow(dim, index * TILE, window) for index in range(count)]
    return torch.stack(parts, dim=dim)


def _windows_of_tiles(values: Tensor, dim: int, count: int, window: int) -> Tensor:
    """Do the same with as many operations for any ``count``: a window is its next few tiles."""
    reach = -(-window // TILE)
    pads = [0, 0] * (values.ndim - 1 - dim) + [0, reach * TILE - window]
    tiles = functional.pad(values, pads).unflatten(dim, (count + reach - 1, TILE))
    parts = [tiles.narrow(dim, index, count) for index in range(reach)]
    return torch.cat(parts, dim=dim + 1).narrow(dim + 1, 0, window)


def _band(products: Tensor, window: int, side: int) -> Tensor:
    """Keep, for the pixel (py, px) of each tile, the window's entries (py + dy, px + dx).

    In the flattened tile that entry lies at (8 py + px) window**2 + (py + dy) window + px + dx,
    so rows read with the strides 8 window**2 + window and window**2 + 1 start at it: a pad and
    two slices instead of a gather.
    """
    count = products.shape[0]
    stride_y = TILE * window * window + window
    stride_x = window * window + 1
    flat = products.reshape(count, TILE * TILE * window * window)
    flat = functional.pad(flat, (0, TILE * stride_y - flat.shape[1]))
    by_row = flat.view(count, TILE, stride_y)[:, :, :TILE * stride_x]
    by_pixel = by_row.reshape(count, TILE, TILE, stride_x)[..., :side * window]
    return by_pixel.reshape(count, TILE, TILE, side, window)[..., :side]
