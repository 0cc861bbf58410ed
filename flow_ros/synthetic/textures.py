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

"""Textures with the statistics of real surfaces, drawn once into a bank.

Natural images have 1/f spectra and the sharp, occluding edges of dead leaves; a robot also
sees stripes, bricks, writing, bare walls and thin structures. A bank is drawn on the CPU with
numpy and OpenCV; scenes sample it on the device that trains.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
"""float32 (H, W, 3), RGB 0..255, or (H, W) in [0, 1] for masks."""

Random = np.random.Generator


@dataclass(frozen=True)
class TextureBank:
    """Surfaces (N, S, S, 3) and objects (M, s, s, 4: RGB and soft alpha), uint8."""

    surfaces: NDArray[np.uint8]
    objects: NDArray[np.uint8]


def make_bank(seed: int, *, surfaces: int = 96, surface_px: int = 512, objects: int = 192,
              object_px: int = 192) -> TextureBank:
    """Draw a bank; the same seed and sizes give the same bank."""
    random = np.random.default_rng([seed, 1])
    big = [surface(random, surface_px) for _ in range(surfaces)]
    small = [np.dstack([surface(random, object_px), 255 * shape(random, object_px)])
             for _ in range(objects)]
    return TextureBank(surfaces=_to_bytes(np.stack(big)), objects=_to_bytes(np.stack(small)))


def surface(random: Random, size: int) -> Image:
    """Return one opaque texture: one kind, or two kinds divided by a third's edge."""
    first = _pick(random)(random, size)
    if random.random() < 0.35:
        second = _pick(random)(random, size)
        edge = spectrum(random, size, 2.2)
        mask = (edge > np.quantile(edge, random.uniform(0.3, 0.7))).astype(np.float32)[..., None]
        first = first * (1 - mask) + second * mask
    if random.random() < 0.5:  # shading
        light = 1 + random.uniform(0.05, 0.3) * spectrum(random, size, 3.5)
        first = first * light[..., None]
    return np.clip(first, 0, 255).astype(np.float32)


def shape(random: Random, size: int) -> Image:
    """Return a soft mask (size, size) in [0, 1]: blob, polygon, thin or perforated."""
    mask = np.zeros((size, size), np.float32)
    kind = random.choice(['blob', 'polygon', 'ellipse', 'thin', 'box', 'holes'],
                         p=[0.25, 0.2, 0.15, 0.15, 0.15, 0.1])
    centre = size / 2
    if kind in ('blob', 'holes'):
        noise = spectrum(random, size, random.uniform(2.2, 3.5))
        y, x = np.mgrid[0:size, 0:size].astype(np.float32) / centre - 1
        bump = 1.6 * (1 - 1.4 * np.hypot(x, y)) + 0.5 * noise
        mask = (bump > 0.3).astype(np.float32)
        if kind == 'holes':
            mask *= spectrum(random, size, 1.8) > -0.5
    elif kind == 'polygon':
        count = int(random.integers(3, 9))
        angle = np.sort(random.uniform(0, 2 * np.pi, count))
        radius = random.uniform(0.35, 0.95, count) * centre
        points = centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        cv2.fillPoly(mask, [points.astype(np.int32)], 1.0, cv2.LINE_AA)
    elif kind == 'ellipse':
        axes = (int(random.uniform(0.3, 0.9) * centre), int(random.uniform(0.3, 0.9) * centre))
        cv2.ellipse(mask, (int(centre), int(centre)), axes, random.uniform(0, 180), 0, 360,
                    1.0, -1, cv2.LINE_AA)
    elif kind == 'box':
        half = random.uniform(0.3, 0.9, 2) * centre
        low, high = (centre - half).astype(int), (centre + half).astype(int)
        mask[low[1]:high[1], low[0]:high[0]] = 1
    else:  # poles, wires, fences
        for _ in range(int(random.integers(1, 5))):
            x1, y1, x2, y2 = (int(v) for v in random.uniform(0.05, 0.95, 4) * size)
            cv2.line(mask, (x1, y1), (x2, y2), 1.0, int(random.integers(2, 10)), cv2.LINE_AA)
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), random.uniform(0.4, 1.2)), np.float32)


def spectrum(random: Random, size: int, exponent: float) -> Image:
    """Return noise (size, size) with amplitude 1/f^(exponent/2), mean 0, deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1
    wave = random.standard_normal(frequency.shape) + 1j * random.standard_normal(frequency.shape)
    wave[0, 0] = 0
    noise = np.fft.irfft2(wave * frequency ** (-exponent / 2), s=(size, size))
    return (noise / (noise.std() + 1e-9)).astype(np.float32)


def palette(random: Random, count: int) -> NDArray[np.float64]:
    """Return ``count`` related colours (count, 3), RGB 0..255; many scenes are near grey."""
    base = random.uniform(20, 235, 3)
    saturation = random.choice([0.15, 0.5, 1.0], p=[0.4, 0.35, 0.25])
    base = base.mean() + saturation * (base - base.mean())
    spread = random.uniform(15, 90)
    grey = random.normal(0, spread, (count, 1))
    return np.clip(base + grey + saturation * random.normal(0, spread * 0.6, (count, 3)), 0, 255)


def _noise(random: Random, size: int) -> Image:
    colours = palette(random, 3)
    exponent = random.uniform(1.2, 2.6)
    one, two = spectrum(random, size, exponent), spectrum(random, size, exponent)
    contrast = random.uniform(0.15, 0.6)
    image = colours[0] + contrast * (one[..., None] * (colours[1] - colours[0] + 30)
                                     + 0.5 * two[..., None] * (colours[2] - colours[0]))
    return np.asarray(image, np.float32)


def _leaves(random: Random, size: int) -> Image:
    """Dead leaves: opaque shapes of power-law size, each over the ones before."""
    count = int(random.integers(60, 500))
    colours = palette(random, 12)
    image = np.empty((size, size, 3), np.float32)
    image[:] = colours[0]
    smallest = random.uniform(2, 6)
    radius = np.minimum(smallest / random.uniform(0.02, 1, count) ** random.uniform(0.6, 1.0),
                        size / 3)
    for r, where, colour in zip(np.sort(radius)[::-1], random.uniform(0, size, (count, 2)),
                                colours[random.integers(0, 12, count)]):
        shade = tuple(float(v) for v in colour + random.normal(0, 8, 3))
        x, y = (int(v) for v in where)
        form = random.integers(0, 3)
        if form == 0:
            cv2.ellipse(image, (x, y), (int(r) + 1, int(r * random.uniform(0.3, 1)) + 1),
                        random.uniform(0, 180), 0, 360, shade, -1, cv2.LINE_AA)
        elif form == 1:
            box = cv2.boxPoints(((x, y), (2 * r, r * random.uniform(0.4, 2)),
                                 random.uniform(0, 90)))
            cv2.fillConvexPoly(image, box.astype(np.int32), shade, cv2.LINE_AA)
        else:
            angle = random.uniform(0, 2 * np.pi, int(random.integers(3, 7)))
            points = where + r * np.stack([np.cos(angle), np.sin(angle)], 1)
            cv2.fillPoly(image, [points.astype(np.int32)], shade, cv2.LINE_AA)
    grain = spectrum(random, size, random.uniform(0.8, 2.0))
    return image + random.uniform(2, 22) * grain[..., None]


def _stripes(random: Random, size: int) -> Image:
    """Stripes, checks and bricks: repeated patterns, on which matching is ambiguous."""
    colours = palette(random, 3)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    angle = random.choice([0, np.pi / 2, random.uniform(0, np.pi)])
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    period = random.uniform(6, 60)
    wave = np.sin(2 * np.pi * u / period)
    if random.random() < 0.6:
        wave = wave * np.sin(2 * np.pi * v / (period * random.uniform(0.5, 3)))
    mask = 1 / (1 + np.exp(-wave * random.uniform(2, 12)))
    image = colours[0] * (1 - mask[..., None]) + colours[1] * mask[..., None]
    dirt = spectrum(random, size, 2.0) * random.uniform(4, 30)
    return np.asarray(image + dirt[..., None], np.float32)


def _writing(random: Random, size: int) -> Image:
    colours = palette(random, 4)
    image = np.empty((size, size, 3), np.uint8)
    image[:] = colours[0].astype(np.uint8)
    for _ in range(int(random.integers(5, 40))):
        word = ''.join(chr(random.integers(33, 127)) for _ in range(random.integers(1, 10)))
        place = (int(random.uniform(-0.1, 0.9) * size), int(random.uniform(0, 1) * size))
        cv2.putText(image, word, place, int(random.integers(0, 8)), random.uniform(0.4, 2.5),
                    tuple(float(c) for c in colours[random.integers(1, 4)]),
                    int(random.integers(1, 4)), cv2.LINE_AA)
    return image + random.uniform(1, 12) * spectrum(random, size, 1.5)[..., None]


def _flat(random: Random, size: int) -> Image:
    """Bare walls, sky and roads: a ramp, faint grain, and often a few marks far apart.

    Here the motion has to come from what lies around, and robots see much of it.
    """
    colours = palette(random, 3)
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    if random.random() < 0.5:
        ramp = ramp.transpose(1, 0, 2)
    image = (colours[0] * (1 - ramp) + colours[1] * ramp + np.zeros((size, size, 1))).astype(
        np.float32)
    if random.random() < 0.5:
        for _ in range(int(random.integers(1, 9))):
            ends = random.uniform(-0.1, 1.1, 4) * size
            x1, y1, x2, y2 = (int(v) for v in ends)
            cv2.line(image, (x1, y1), (x2, y2), tuple(float(c) for c in colours[2]),
                     int(random.integers(1, 14)), cv2.LINE_AA)
    grain = np.exp(random.uniform(np.log(0.3), np.log(8)))
    return np.asarray(image + grain * spectrum(random, size, random.uniform(0, 2.5))[..., None],
                      np.float32)


def _pick(random: Random) -> Callable[[Random, int], Image]:
    kinds = (_noise, _leaves, _stripes, _writing, _flat)
    return kinds[int(random.choice(len(kinds), p=[0.22, 0.37, 0.1, 0.08, 0.23]))]


def _to_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.asarray(np.clip(values, 0, 255), np.uint8)
