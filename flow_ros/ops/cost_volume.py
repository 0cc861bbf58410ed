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

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from flow_ros.ops.exporting import is_exporting
from flow_ros.ops.matching import local_search
from flow_ros.ops.sampling import pixel_grid, warp

Measure = Literal['dot', 'sad']

_COVERED = 0.9999

_CHUNK_CPU = 2 ** 19
_CHUNK_GPU = 2 ** 26
_CHUNK_ENGINE = 2 ** 22
"""Numbers in the patches that are worked on at once."""

_MOST_CHUNKS = 32
"""Of an engine: each takes its time to compile."""


def correlation(a: Tensor, b: Tensor, radius: int) -> Tensor:
    """Return the mean of a(x) * b(x + d) over the channels; ``b`` is 0 outside.

    Returns (B, (2r+1)**2, H, W) in the features' type.
    """
    return local_search(a, b, radius)


def difference(a: Tensor, b: Tensor, radius: int) -> Tensor:
    """Return the mean of |a(x) - b(x + d)| over the channels; ``b`` is 0 outside.

    Returns (B, (2r+1)**2, H, W) in the features' type.
    """
    # A difference per residual would be a map of the features' size each: ten times the memory,
    # and 81 of them kept for the backward pass for r = 4.
    batch, _, height, width = a.shape
    still = torch.zeros((batch, 2, height, width), device=a.device,
                        dtype=torch.promote_types(a.dtype, torch.float32))
    return sampled_cost_volume(a, b, still, radius, 'sad').to(a.dtype)


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
    float32: half precision cannot address 2048 px. Can be differentiated once.
    """
    _check(a, b, flow, measure)
    batch, channels, height, width = a.shape
    points = pixel_grid(height, width, flow) + flow
    # From here on outwards every sample is 0, so far targets change nothing but their indices.
    x = points[:, 0].clamp(-radius - 1, width + radius)
    y = points[:, 1].clamp(-radius - 1, height + radius)
    # The second clamp is for what is not a number.
    left = x.detach().floor().long().clamp(-radius - 1, width + radius)  # (B, H, W)
    upper = y.detach().floor().long().clamp(-radius - 1, height + radius)
    part_x = (x - left).flatten(1)  # (B, H * W)
    part_y = (y - upper).flatten(1)
    before, behind = 2 * radius + 1, 2 * radius + 2
    padded = functional.pad(b.to(flow.dtype), (before, behind, before, behind))
    across = padded.shape[3]
    rows = padded.flatten(2).transpose(1, 2).contiguous()  # (B, M, C)
    own = a.to(flow.dtype).flatten(2).transpose(1, 2).contiguous()  # (B, H * W, C)
    first = (upper + (before - radius)) * across + (left + (before - radius))
    first = first.flatten(1)  # of each patch the first pixel in its image's rows
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        planes = _sampled_plainly(own, rows, first, part_x, part_y, across, radius, measure)
    else:
        planes = _Sampled.apply(own, rows, first, part_x, part_y, across, radius, measure)
    return planes.transpose(1, 2).unflatten(2, (height, width))


class _Sampled(torch.autograd.Function):
    """The sampled volume in chunks of pixels whose patches fit the cache.

    A line of a patch is one block of memory, so a patch is 2r+2 copies, and its gradient 2r+2
    additions; the patches of all pixels together, 100 to 324 times the map, never exist: the
    backward pass gathers them again. Many times faster than a grid_sample per residual.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: Tensor, first: Tensor, part_x: Tensor,
                part_y: Tensor, across: int, radius: int, measure: Measure) -> Tensor:
        """Return (B, N, (2r+1)**2) for ``own`` (B, N, C) and ``rows`` (B, M, C)."""
        ctx.save_for_backward(own, rows, first, part_x, part_y)
        ctx.options = across, radius, measure
        side = 2 * radius + 2
        planes = part_x.new_empty((*first.shape, (side - 1) ** 2))
        for image in range(len(own)):
            lines = _line_starts(first[image], across, side)
            for chunk in _chunks(own, side):
                patch = _gather(rows[image], lines[chunk], side)
                mine = own[image, chunk][:, None, None]
                along_x, along_y = _parts(part_x[image, chunk], part_y[image, chunk])
                if measure == 'dot':
                    values = (patch * mine).mean(dim=3, keepdim=True)
                    values = _lerp(_lerp(values, along_x, 2), along_y, 1)
                else:
                    values = _lerp(_lerp(patch, along_x, 2), along_y, 1)
                    values = (values - mine).abs_().mean(dim=3)
                planes[image, chunk] = values.flatten(1)
        return planes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the maps and of the fractional parts."""
        own, rows, first, part_x, part_y = ctx.saved_tensors
        across, radius, measure = ctx.options
        side, channels = 2 * radius + 2, own.shape[2]
        for_parts = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        for_own, for_rows = torch.zeros_like(own), torch.zeros_like(rows)
        for_x, for_y = torch.zeros_like(part_x), torch.zeros_like(part_y)
        gradient = gradient.unflatten(2, (side - 1, side - 1, 1)) / channels
        windows = rows.shape[1] - side + 1
        for image in range(len(own)):
            lines = _line_starts(first[image], across, side)
            total = rows.new_zeros((windows, side * channels))
            for chunk in _chunks(own, side):
                patch = _gather(rows[image], lines[chunk], side)
                mine = own[image, chunk][:, None, None]
                along_x, along_y = _parts(part_x[image, chunk], part_y[image, chunk])
                values = (patch * mine).sum(dim=3, keepdim=True) if measure == 'dot' else patch
                given = gradient[image, chunk]
                if measure == 'sad' or for_parts:
                    between = _lerp(values, along_x, 2)
                if measure == 'sad':
                    given = given * (_lerp(between, along_y, 1) - mine).sign_()
                    for_own[image, chunk] = -given.sum(dim=(1, 2))
                given_x = _lerp_transposed(given, along_y, 1)
                if for_parts:
                    for_x[image, chunk] = (given_x * values.diff(dim=2)).sum(dim=(1, 2, 3))
                    for_y[image, chunk] = (given * between.diff(dim=1)).sum(dim=(1, 2, 3))
                given = _lerp_transposed(given_x, along_x, 2)
                if measure == 'dot':
                    for_own[image, chunk] = (patch * given).sum(dim=(1, 2))
                    given = given * mine
                total.index_add_(0, lines[chunk].flatten(), given.reshape(-1, side * channels))
            # Windows overlap: pixel m is the k-th of window m - k.
            for index, part in enumerate(total.split(channels, dim=1)):
                for_rows[image, index:index + windows] += part
        return for_own, for_rows, None, for_x, for_y, None, None, None


def _line_starts(first: Tensor, across: int, side: int) -> Tensor:
    return first[:, None] + torch.arange(side, device=first.device) * across  # (N, side)


def _chunks(own: Tensor, side: int) -> list[slice]:
    """Cut the pixels so that a chunk's patches are of a size that caches, or a GPU, like."""
    most = _CHUNK_GPU if own.is_cuda else _CHUNK_CPU
    step = max(most // (side * side * own.shape[2]), 8)
    return [slice(start, start + step) for start in range(0, own.shape[1], step)]


def _gather(rows: Tensor, lines: Tensor, side: int) -> Tensor:
    """Return the patches (n, side, side, C): ``side`` pixels from each of ``lines`` on."""
    count, channels = rows.shape
    windows = rows.as_strided((count - side + 1, side * channels), (channels, 1))
    return windows.index_select(0, lines.flatten()).view(-1, side, side, channels)


def _parts(part_x: Tensor, part_y: Tensor) -> tuple[Tensor, Tensor]:
    return part_x[:, None, None, None], part_y[:, None, None, None]


def _lerp(values: Tensor, part: Tensor, dim: int) -> Tensor:
    """Interpolate neighbours along ``dim``, which loses one."""
    count = values.shape[dim] - 1
    return torch.lerp(values.narrow(dim, 0, count), values.narrow(dim, 1, count), part)


def _lerp_transposed(gradient: Tensor, part: Tensor, dim: int) -> Tensor:
    """Return what ``_lerp``'s result passes back, one more along ``dim``."""
    shape = list(gradient.shape)
    count = shape[dim]
    shape[dim] += 1
    later = gradient * part
    result = gradient.new_empty(shape)
    result.select(dim, 0).zero_()
    result.narrow(dim, 1, count).copy_(later)
    result.narrow(dim, 0, count).add_(gradient).sub_(later)
    return result


def _sampled_plainly(own: Tensor, rows: Tensor, first: Tensor, part_x: Tensor, part_y: Tensor,
                     across: int, radius: int, measure: Measure) -> Tensor:
    """Do what ``_Sampled`` does with operations every engine has: (B, N, (2r+1)**2)."""
    batch, count, channels = own.shape
    images = torch.arange(batch, device=rows.device)[:, None] * rows.shape[1]
    first = (first + images).reshape(-1, 1)  # (B * N, 1)
    rows, own = rows.reshape(-1, channels), own.reshape(-1, channels)
    part_x, part_y = part_x.reshape(-1, 1), part_y.reshape(-1, 1)
    if measure == 'sad':
        plainly = _sad_plainly
    else:
        plainly = _dot_by_lines if is_exporting() else _dot_plainly
    planes = plainly(own, rows, first, part_x, part_y, across, 2 * radius + 2)
    return planes.view(batch, count, -1)


def _dot_plainly(own: Tensor, rows: Tensor, first: Tensor, part_x: Tensor, part_y: Tensor,
                 across: int, side: int) -> Tensor:
    """Interpolate the products with whole pixels, which is exact: equation 2 is linear."""
    taps = torch.arange(side, device=rows.device)
    taps = (taps[:, None] * across + taps).reshape(1, -1)
    own = (own * (1 / own.shape[1]))[:, :, None]  # (N, C, 1)
    # In chunks, though each is a part of the graph: what stays in the cache is faster.
    step = max(_CHUNK_ENGINE // (taps.shape[1] * own.shape[1]), -(-len(own) // _MOST_CHUNKS))
    chunks = []
    for start in range(0, len(own), step):
        chunk = slice(start, start + step)
        patch = rows.index_select(0, (first[chunk] + taps).flatten())
        chunks.append(torch.matmul(patch.view(-1, taps.shape[1], own.shape[1]), own[chunk]))
    products = torch.cat(chunks)[:, :, 0].to(part_x.dtype)  # (N, side**2)
    lines: list[Tensor] = []
    previous: Tensor | None = None
    for values in products.split(side, dim=1):
        line = values[:, :-1] + (values[:, 1:] - values[:, :-1]) * part_x
        if previous is not None:
            lines.append(previous + (line - previous) * part_y)
        previous = line
    return torch.cat(lines, dim=1)


def _dot_by_lines(own: Tensor, rows: Tensor, first: Tensor, part_x: Tensor, part_y: Tensor,
                  across: int, side: int) -> Tensor:
    """Do the same for any number of pixels, one line of all patches at a time.

    The patches of all pixels at once would be 100 to 324 times the map, in a GPU's memory.
    """
    own = (own * (1 / own.shape[1]))[:, :, None]  # (N, C, 1)
    taps = first + torch.arange(side, device=rows.device)  # (N, side)
    lines: list[Tensor] = []
    previous: Tensor | None = None
    for index in range(side):
        patch = rows.index_select(0, (taps + index * across).flatten())
        values = torch.matmul(patch.view(-1, side, own.shape[1]), own)[:, :, 0]
        line = values[:, :-1] + (values[:, 1:] - values[:, :-1]) * part_x
        if previous is not None:
            lines.append(previous + (line - previous) * part_y)
        previous = line
    return torch.cat(lines, dim=1)


def _sad_plainly(own: Tensor, rows: Tensor, first: Tensor, part_x: Tensor, part_y: Tensor,
                 across: int, side: int) -> Tensor:
    """Interpolate the features, one line of all patches at a time."""
    own, part_x, part_y = own[:, None], part_x[:, None], part_y[:, None]
    taps = first + torch.arange(side, device=rows.device)  # (N, side)
    lines: list[Tensor] = []
    previous: Tensor | None = None
    for index in range(side):
        values = rows.index_select(0, (taps + index * across).flatten())
        values = values.view(-1, side, own.shape[2])
        line = values[:, :-1] + (values[:, 1:] - values[:, :-1]) * part_x  # (N, 2r+1, C)
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
