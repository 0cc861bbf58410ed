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

"""What a camera does to the light: blur, shadowed corners, dirt, rain, exposure, noise, JPEG.

Networks trained on clean renderings fail on what robots see: a dark corner, a wet lens, a
cheap encoder. Everything here works on batches, on the device of the images, each effect on a
share of them, much of it unlike in the two frames. The truth stays that of the scene: none of
this moves a point.

``motion_blur`` needs the flow and is applied to whole renderings; ``develop`` to crops.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import math

import torch
from torch import Generator, Tensor
from torch.nn import functional

from flow_ros.ops.sampling import warp


@dataclass(frozen=True)
class CameraConfig:
    """Shares, in [0, 1], of batches (shutter) or of pairs (all else) with each effect."""

    motion_blur: float = 0.25
    longest_blur_px: float = 20.0
    rolling_shutter: float = 0.12
    light: float = 0.8
    """Gain, gamma, offset and tint, alike in all frames; in two fifths of them not quite."""
    defocus: float = 0.3
    vignetting: float = 0.25
    dirt: float = 0.06
    rain: float = 0.05
    bayer: float = 0.15
    noise: float = 0.6
    grey: float = 0.15
    jpeg: float = 0.25


CLEAN = CameraConfig(motion_blur=0, rolling_shutter=0, light=0, defocus=0, vignetting=0, dirt=0,
                     rain=0, bayer=0, noise=0, grey=0, jpeg=0)


def develop(images: Sequence[Tensor], config: CameraConfig, random: Generator) -> list[Tensor]:
    """Return the frames (B, 3, H, W), RGB 0..255, as a camera would have delivered them.

    In the order of the light's way: rain, dirt, defocus, vignetting, light and colour, Bayer
    pattern, noise, JPEG. ``random`` is on the CPU; the same state gives the same images.
    """
    count, device = images[0].shape[0], images[0].device
    frames = [image / 255 for image in images]

    def chosen(share: float) -> Tensor:
        """Return the indices of the pairs that get an effect."""
        return (torch.rand(count, generator=random) < share).nonzero()[:, 0].to(device)

    def uniform(low: float, high: float, number: int, *shape: int) -> Tensor:
        values = torch.rand(number, *shape, 1, 1, generator=random)
        return (low + (high - low) * values).to(device)

    if len(some := chosen(config.rain)):
        slant = float(torch.rand(1, generator=random)) * 0.8 - 0.4
        for frame in frames:
            frame[some] = rain(frame[some], slant, random)
    if len(some := chosen(config.dirt)):
        shade, cover = lens_dirt(frames[0][some], random)
        for frame in frames:
            frame[some] = frame[some] * (1 - cover) + shade * cover
    if len(some := chosen(config.defocus)):
        sigma = 0.4 + 1.2 * float(torch.rand(1, generator=random)) ** 2
        which = int(torch.randint(-len(frames), len(frames), (1,), generator=random))
        for index, frame in enumerate(frames):
            if which < 0 or which == index:  # all, or one that the focus has missed
                frame[some] = gaussian_blur(frame[some], sigma)
    if len(some := chosen(config.vignetting)):
        shadow = vignette(frames[0][some], uniform(0.2, 0.7, len(some), 1),
                          uniform(-0.15, 0.15, len(some), 2))
        for frame in frames:
            frame[some] = frame[some] * shadow
    if len(some := chosen(config.light)):
        _light(frames, some, uniform)
    if len(some := chosen(config.bayer)):
        for frame in frames:
            frame[some] = bayer(frame[some].clamp(0, 1))
    if len(some := chosen(config.noise)):
        read, shot = uniform(0, 0.03, len(some), 1), uniform(0, 0.03, len(some), 1)
        for frame in frames:
            frame[some] = noisy(frame[some], read, shot, random)
    if len(some := chosen(config.grey)):
        for frame in frames:
            frame[some] = frame[some].mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    if len(some := chosen(config.jpeg)):
        quality = 15 + 75 * torch.rand(len(some), generator=random).to(device)
        for frame in frames:
            frame[some] = jpeg(frame[some].clamp(0, 1), quality)
    return [frame.clamp(0, 1) * 255 for frame in frames]


def motion_blur(image: Tensor, motion: Tensor, exposure: Tensor, longest_px: float) -> Tensor:
    """Return ``image`` smeared along ``motion`` (B, 2, H, W) px per frame, centred in time.

    ``exposure`` (B,) is the share of a frame's time for which the shutter is open. The mean of
    taps along the way of each pixel; a way is cut at ``longest_px``, where the taps would part.
    """
    way = motion * exposure[:, None, None, None]
    length = torch.hypot(way[:, :1], way[:, 1:])
    way = way * (longest_px / length.clamp(min=longest_px))
    taps = 7
    total = torch.zeros_like(image)
    for tap in range(taps):
        total = total + warp(image, way * ((tap + 0.5) / taps - 0.5))
    return total / taps


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Return (B, C, H, W) blurred by a Gaussian of ``sigma`` px, the border replicated."""
    radius = max(1, math.ceil(2.5 * sigma))
    offset = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-offset.square() / (2 * sigma ** 2))
    kernel = kernel / kernel.sum()
    channels = image.shape[1]
    image = functional.pad(image, (radius, radius, radius, radius), mode='replicate')
    across = kernel.view(1, 1, 1, -1).repeat(channels, 1, 1, 1)
    image = functional.conv2d(image, across, groups=channels)
    return functional.conv2d(image, across.transpose(2, 3), groups=channels)


def vignette(image: Tensor, strength: Tensor, centre: Tensor) -> Tensor:
    """Return the gain (B, 1, H, W): 1 - strength * r^2, r = 1 in the corners about the middle.

    ``centre`` (B, 2, 1, 1) is where the axis meets the image, in halves of its sides.
    """
    height, width = image.shape[-2:]
    y = torch.linspace(-1, 1, height, device=image.device)[:, None]
    x = torch.linspace(-1, 1, width, device=image.device)[None]
    square = (x - centre[:, :1]).square() + (y - centre[:, 1:]).square()
    return (1 - strength * square / 2).clamp(0.05, 1)


def rain(image: Tensor, slant: float, random: Generator) -> Tensor:
    """Return ``image`` (0..1) with bright streaks, new ones at each call."""
    batch, _, height, width = image.shape
    length = int(torch.randint(7, 20, (1,), generator=random))
    density = 0.0002 + 0.0012 * float(torch.rand(1, generator=random))
    drops = (_draw(torch.rand, (batch, 1, height, width), image, random) < density).float()
    reach = 2 * length + 1
    kernel = image.new_zeros(1, 1, reach, reach)
    rows = torch.arange(reach, device=image.device)
    columns = ((rows - length) * slant + length).round().long().clamp(0, reach - 1)
    kernel[0, 0, rows, columns] = 1
    streaks = functional.conv2d(drops, kernel, padding=length)
    cover = (gaussian_blur(streaks, 0.6) * 0.5).clamp(0, 0.6)
    return image + cover * (0.8 - image)


def lens_dirt(image: Tensor, random: Generator) -> tuple[Tensor, Tensor]:
    """Return spots out of focus: their shade (B, 1, 1, 1) and cover (B, 1, H, W), 0..0.8."""
    batch, _, height, width = image.shape
    coarse = torch.randn(batch, 1, 6, 8, generator=random).to(image.device)
    smooth = functional.interpolate(coarse, size=(height, width), mode='bicubic',
                                    align_corners=False)
    shade = 0.5 * torch.rand(batch, 1, 1, 1, generator=random).to(image.device)
    return shade, (0.8 * (smooth - 0.9)).clamp(0, 0.8)


def bayer(image: Tensor) -> Tensor:
    """Return RGB (B, 3, H, W) sampled through an RGGB pattern and interpolated bilinearly."""
    height, width = image.shape[-2:]
    even_y = (torch.arange(height, device=image.device) % 2 == 0)[:, None]
    even_x = (torch.arange(width, device=image.device) % 2 == 0)[None]
    masks = torch.stack([even_y & even_x, even_y != even_x, ~even_y & ~even_x])
    sampled = image * masks
    corner, side = 0.25, 0.5
    cross = image.new_tensor([[0, corner, 0], [corner, 1, corner], [0, corner, 0]])
    box = image.new_tensor([[corner, side, corner], [side, 1, side], [corner, side, corner]])
    kernel = torch.stack([box, cross, box])[:, None]  # each its channel's own neighbours
    padded = functional.pad(sampled, (1, 1, 1, 1), mode='reflect')
    return functional.conv2d(padded, kernel, groups=3)


def noisy(image: Tensor, read: Tensor, shot: Tensor, random: Generator) -> Tensor:
    """Return ``image`` (0..1) with read noise and with shot noise that grows with the light."""
    deviation = (read.square() + shot.square() * image.clamp(min=0)).sqrt()
    return image + deviation * _draw(torch.randn, image.shape, image, random)


def jpeg(image: Tensor, quality: Tensor) -> Tensor:
    """Return RGB (0..1) as after JPEG at ``quality`` (B,), 1..100, with 4:2:0 chroma.

    The standard's tables (ITU-T T.81, annex K) scaled as libjpeg does, on 8x8 DCT blocks.
    """
    height, width = image.shape[-2:]
    right, bottom = -width % 16, -height % 16
    padded = functional.pad(image * 255, (0, right, 0, bottom), mode='replicate')
    red, green, blue = padded.unbind(dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.stack([(blue - luma) * 0.564, (red - luma) * 0.713], dim=1)
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality) / 100
    luma = _quantized(luma[:, None] - 128, _LUMA, scale) + 128
    chroma = _quantized(functional.avg_pool2d(chroma, 2), _CHROMA, scale)
    chroma = functional.interpolate(chroma, scale_factor=2, mode='bilinear', align_corners=False)
    blue_ness, red_ness = chroma[:, :1], chroma[:, 1:]
    rgb = torch.cat([luma + 1.403 * red_ness, luma - 0.344 * blue_ness - 0.714 * red_ness,
                     luma + 1.773 * blue_ness], dim=1)
    return (rgb / 255).clamp(0, 1)[..., :height, :width]


def _quantized(plane: Tensor, table: tuple[int, ...], scale: Tensor) -> Tensor:
    """Round the DCT coefficients of (B, C, H, W), sides multiples of 8, to the table's steps."""
    batch, channels, height, width = plane.shape
    order = torch.arange(8, device=plane.device, dtype=plane.dtype)
    wave = torch.cos((2 * order[None] + 1) * order[:, None] * math.pi / 16) / 2
    wave[0] /= math.sqrt(2)  # orthonormal, (8 frequencies, 8 samples)
    basis = torch.einsum('ux,vy->uvxy', wave, wave).reshape(64, 1, 8, 8)
    step = plane.new_tensor(table)[None, :, None, None] * scale[:, None, None, None]
    step = step.floor().clamp(1, 255).repeat_interleave(channels, dim=0)
    blocks = functional.conv2d(plane.reshape(batch * channels, 1, height, width), basis, stride=8)
    restored = functional.conv_transpose2d((blocks / step).round() * step, basis, stride=8)
    return restored.view(batch, channels, height, width)


def _light(frames: list[Tensor], some: Tensor, uniform: Callable[..., Tensor]) -> None:
    """Change gain, gamma, offset and tint of the chosen pairs in place, mostly alike."""
    number = len(some)
    gain, gamma = uniform(0.6, 1.4, number, 1), uniform(0.75, 1.35, number, 1)
    shift, tint = uniform(-0.15, 0.15, number, 1), uniform(0.85, 1.15, number, 3)
    asymmetric = uniform(0, 1, number, 1) < 0.4
    for frame in frames:
        own_gain = torch.where(asymmetric, uniform(0.8, 1.2, number, 1), 1.0)
        own_shift = torch.where(asymmetric, uniform(-0.08, 0.08, number, 1), 0.0)
        own_tint = torch.where(asymmetric, uniform(0.95, 1.05, number, 3), 1.0)
        light = frame[some].clamp(1e-3, 1) ** gamma
        light = (light - 0.5) * gain * own_gain + 0.5 + shift + own_shift
        frame[some] = light * tint * own_tint


def _draw(kind: Callable[..., Tensor], shape: Sequence[int], like: Tensor,
          random: Generator) -> Tensor:
    """Draw many random numbers where they are used, from a seed that ``random`` gives."""
    seed = int(torch.randint(0, 2 ** 31, (1,), generator=random))
    there = Generator(like.device).manual_seed(seed)
    return kind(tuple(shape), generator=there, device=like.device)


_LUMA = (16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
         14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
         18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
         49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99)
_CHROMA = (17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99,
           24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99,
           *[99] * 32)
