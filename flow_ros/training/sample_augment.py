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

"""Augmentation of a sample of a data set: the truth stays true, sparse or dense.

Everything geometric (scale, stretch, rotation, flips, crop) is one affine map per frame, so
that images and flow are resampled once and every vector is computed, not interpolated twice:
with frame 1 mapped by A1 and frame 2 by A2, the flow f at p becomes A2(p + f) - A1(p).
Unknown flow never mixes with known: see ``_flow_at``.
"""

from dataclasses import dataclass, replace
import math

import cv2
import numpy as np
from numpy.typing import NDArray

from flow_ros.evaluation.data_sets import Sample

FloatArray = NDArray[np.float32]
Matrix = NDArray[np.float64]

SMOOTH_PX = 1.0
"""Neighbouring vectors that differ by more lie on two sides of an edge: see ``_flow_at``."""
GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class AugmentConfig:
    """How much samples are changed; the values are those RAFT was trained with on Sintel.

    Chances are in [0, 1]. A pair of numbers is (lowest, highest).
    """

    brightness: float = 0.4
    """Gain within 1 -+ this; contrast and saturation alike. 0 leaves them as they are."""
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.159
    """Turn within -+ this share of the colour circle."""
    gamma: float = 0.0
    """Exponent within 2 ** (-+ this)."""
    noise: float = 0.0
    """Largest standard deviation of Gaussian noise, of 255."""
    asymmetric: float = 0.2
    """Chance that the two frames change colour independently."""
    erase: float = 0.5
    """Chance that rectangles of frame 2 are covered by its mean colour."""
    erase_px: tuple[int, int] = (50, 100)
    erase_count: int = 2
    """Most rectangles."""
    spatial: float = 0.8
    """Chance of scale, stretch and rotation."""
    scale: tuple[float, float] = (-0.2, 0.6)
    """Logarithm of the scale to base 2; it grows where the crop would not fit otherwise."""
    stretch: float = 0.2
    """The axes' scales differ from it by 2 ** (-+ this), each on its own."""
    stretch_chance: float = 0.8
    rotation_deg: float = 0.0
    """Both frames turn within -+ this."""
    relative_rotation_deg: float = 0.0
    """Frame 2 turns against frame 1 within -+ this."""
    relative_shift_px: float = 0.0
    """Frame 2 moves against frame 1 within -+ this, each way."""
    flip_horizontal: float = 0.5
    flip_vertical: float = 0.1
    reverse: float = 0.5
    """Chance that the frames change places, where the backward flow is known."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value that makes no sense."""
        for name in ('asymmetric', 'erase', 'spatial', 'stretch_chance', 'flip_horizontal',
                     'flip_vertical', 'reverse'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f'augmentation: {name} is a chance, from 0 to 1; '
                                 f'seen {getattr(self, name)}')
        for name in ('brightness', 'contrast', 'saturation', 'hue', 'gamma', 'noise', 'stretch',
                     'rotation_deg', 'relative_rotation_deg', 'relative_shift_px'):
            if getattr(self, name) < 0:
                raise ValueError(f'augmentation: {name} is a distance, from 0 on; '
                                 f'seen {getattr(self, name)}')
        for name in ('scale', 'erase_px'):
            values = getattr(self, name)
            if len(values) != 2 or values[0] > values[1]:
                raise ValueError(f'augmentation: {name} is (lowest, highest); seen {values}')


NO_AUGMENT = AugmentConfig(
    brightness=0, contrast=0, saturation=0, hue=0, asymmetric=0, erase=0, spatial=0,
    flip_horizontal=0, flip_vertical=0, reverse=0)
"""A random crop, and nothing else."""


def augment_sample(sample: Sample, crop: tuple[int, int], config: AugmentConfig,
                   random: np.random.Generator) -> Sample:
    """Return a crop (H, W) of ``sample``, changed as ``config`` says.

    The result has no backward flow. A frame smaller than the crop is enlarged. What leaves the
    crop, or goes under an erased rectangle, is occluded, where occlusion is known at all.
    """
    if sample.backward is not None and random.random() < config.reverse:
        sample = sample.reversed()
    first, second = draw_maps(sample.image1.shape[:2], crop, config, random)
    changed = transform(sample, first, second, crop)
    image1, image2 = change_colours(changed.image1, changed.image2, config, random)
    return erase(replace(changed, image1=image1, image2=image2), config, random)


def draw_maps(size: tuple[int, ...], crop: tuple[int, int], config: AugmentConfig,
              random: np.random.Generator) -> tuple[Matrix, Matrix]:
    """Return the affine maps (2, 3) of frame 1 and frame 2, px of the frame to px of the crop."""
    height, width = size[:2]
    scale_x = scale_y = 1.0
    angle = 0.0
    if random.random() < config.spatial:
        scale_x = scale_y = 2 ** random.uniform(*config.scale)
        if random.random() < config.stretch_chance:
            scale_x *= 2 ** random.uniform(-config.stretch, config.stretch)
            scale_y *= 2 ** random.uniform(-config.stretch, config.stretch)
        angle = math.radians(random.uniform(-config.rotation_deg, config.rotation_deg))
    flip_x = -1 if random.random() < config.flip_horizontal else 1
    flip_y = -1 if random.random() < config.flip_vertical else 1
    half = np.array([crop[1] - 1, crop[0] - 1]) / 2
    middle = np.array([width - 1, height - 1]) / 2
    linear = _rotation(angle) @ np.diag([scale_x, scale_y])
    # The crop's preimage must lie in the frame: half its bounding box within half the frame.
    reach = np.abs(np.linalg.inv(linear)) @ half
    linear = linear * max(1.0, float((reach / np.maximum(middle, 0.5)).max()))
    room = np.maximum(middle - np.abs(np.linalg.inv(linear)) @ half, 0)
    centre = middle + random.uniform(-1, 1, 2) * room
    if abs(linear - np.eye(2)).max() == 0:  # a plain crop stays exact to the bit
        centre = np.floor(centre - half + 0.5).clip(0, (width - crop[1], height - crop[0])) + half
    linear = np.diag([flip_x, flip_y]) @ linear
    first = _affine(linear, half - linear @ centre)
    turn = _rotation(math.radians(random.uniform(-1, 1) * config.relative_rotation_deg))
    shift = random.uniform(-1, 1, 2) * config.relative_shift_px
    relative = _affine(turn, half - turn @ half + shift)  # about the middle of the crop
    return first, _compose(relative, first)


def transform(sample: Sample, first: Matrix, second: Matrix, crop: tuple[int, int]) -> Sample:
    """Return the crop (H, W) of ``sample`` with frame 1 mapped by ``first``, 2 by ``second``."""
    height, width = sample.flow.shape[:2]
    back = np.asarray(cv2.invertAffineTransform(first), dtype=np.float64)
    grid = _grid(crop)
    source = _apply(back, grid)  # (h, w, 2) px of frame 1
    nearest = np.rint(source).astype(np.int32)
    x, y = nearest[..., 0].clip(0, width - 1), nearest[..., 1].clip(0, height - 1)
    inside = (x == nearest[..., 0]) & (y == nearest[..., 1])
    goal = source + _flow_at(sample.flow, source, x, y)
    goal[~inside] = np.nan
    flow = (_apply(second, goal) - grid).astype(np.float32)
    occlusion = known = None
    if sample.occlusion is not None:
        occlusion = (sample.occlusion[y, x] & inside) | _outside(grid + flow, crop)
        whole = inside if sample.occlusion_known is None else sample.occlusion_known[y, x] & inside
        # Whether a pixel of unknown flow left the crop, nobody knows.
        known = np.asarray(whole & (occlusion | np.isfinite(flow[..., 0])))
    return Sample(_image(sample.image1, first, crop), _image(sample.image2, second, crop), flow,
                  occlusion, known)


def change_colours(image1: NDArray[np.uint8], image2: NDArray[np.uint8], config: AugmentConfig,
                   random: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Change brightness, contrast, saturation, hue and gamma, mostly alike, and add noise."""
    def draw() -> tuple[float, ...]:
        return (*(1 + random.uniform(-1, 1) * spread for spread in
                  (config.brightness, config.contrast, config.saturation)),
                random.uniform(-1, 1) * config.hue, 2 ** (random.uniform(-1, 1) * config.gamma))

    factors = draw()
    both = [factors, draw() if random.random() < config.asymmetric else factors]
    alike = both[0] is both[1]
    noise = random.uniform(0, 1) * config.noise
    values = [np.asarray((image * (factor[0] / 255)).clip(0, 1), dtype=np.float32)
              for image, factor in zip((image1, image2), both)]
    means = [float(np.dot(cv2.mean(value)[:3], GREY)) for value in values]
    if alike:
        means = [sum(means) / 2] * 2
    changed = []
    for image, mean, (_, contrast, saturation, hue, gamma) in zip(values, means, both):
        value: FloatArray = image
        if contrast != 1:
            value = (mean + contrast * (value - mean)).clip(0, 1)
        if saturation != 1:
            grey = cv2.transform(value, np.array([GREY], dtype=np.float32))[..., None]
            value = (grey + saturation * (value - grey)).clip(0, 1)
        if hue:
            hsv = cv2.cvtColor(value.astype(np.float32), cv2.COLOR_RGB2HSV)
            hsv[..., 0] = (hsv[..., 0] + 360 * hue) % 360
            value = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dtype=np.float32)
        if gamma != 1:
            value = value ** gamma
        if noise:
            value = value + noise / 255 * random.standard_normal(value.shape, dtype=np.float32)
        changed.append(np.rint(255 * value).clip(0, 255).astype(np.uint8))
    return changed[0], changed[1]


def erase(sample: Sample, config: AugmentConfig, random: np.random.Generator) -> Sample:
    """Cover rectangles of frame 2 with its mean colour; what goes there is occluded."""
    if config.erase_count < 1 or random.random() >= config.erase:
        return sample
    height, width = sample.flow.shape[:2]
    image2 = sample.image2.copy()
    mean = np.rint(cv2.mean(image2)[:3]).astype(np.uint8)
    goal = _grid((height, width)) + sample.flow
    occlusion = sample.occlusion
    for _ in range(int(random.integers(1, config.erase_count + 1))):
        left, top = (int(random.integers(0, side)) for side in (width, height))
        across, down = (int(random.integers(config.erase_px[0], config.erase_px[1] + 1))
                        for _ in range(2))
        image2[top:top + down, left:left + across] = mean
        if occlusion is not None:
            x, y = goal[..., 0], goal[..., 1]
            with np.errstate(invalid='ignore'):
                occlusion = occlusion | ((x > left - 0.5) & (x < left + across - 0.5)
                                         & (y > top - 0.5) & (y < top + down - 0.5))
    return replace(sample, image2=image2, occlusion=occlusion)


def _flow_at(flow: FloatArray, source: Matrix, x: NDArray[np.int32],
             y: NDArray[np.int32]) -> Matrix:
    """Return the flow at ``source`` (h, w, 2) px; ``x``, ``y`` are the nearest pixels.

    Between four known vectors that differ by less than ``SMOOTH_PX`` it is bilinear, exact
    for affine motion. Elsewhere (an edge of motion, sparse truth) it is the nearest pixel's
    own vector: known where that is, at most half a pixel away, never a mixture.
    """
    height, width = flow.shape[:2]
    # A vector as one complex number: a gather instead of two.
    vectors = np.ascontiguousarray(flow).view(np.complex64).ravel()
    result = vectors.take(y * width + x)
    low = np.floor(source).astype(np.int32)
    a, b = (source - low).transpose(2, 0, 1).astype(np.float32)
    if a.any() or b.any():
        x0, y0 = low[..., 0].clip(0, width - 1), low[..., 1].clip(0, height - 1)
        right = (x0 < width - 1).astype(np.int32)
        start = y0 * width + x0
        down = np.where(y0 < height - 1, np.int32(width), np.int32(0))
        around = [vectors.take(start + offset) for offset in (0, right, down, down + right)]
        parts = [corner.view(np.float32) for corner in around]
        spread = np.maximum.reduce(parts) - np.minimum.reduce(parts)
        smooth = np.maximum(spread[:, ::2], spread[:, 1::2]) < SMOOTH_PX  # NaN is not
        above = around[0] + a * (around[1] - around[0])
        below = around[2] + a * (around[3] - around[2])
        result = np.where(smooth, above + b * (below - above), result)
    return result.view(np.float32).reshape(*source.shape).astype(np.float64)


def _image(image: NDArray[np.uint8], affine: Matrix, crop: tuple[int, int]) -> NDArray[np.uint8]:
    """Return ``image`` mapped to the crop; outside of the image is black."""
    scale = math.sqrt(abs(np.linalg.det(affine[:, :2])))
    if scale < 0.8:  # or fine texture would alias
        sigma = 0.4 * math.sqrt(1 / scale ** 2 - 1)
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), dtype=np.uint8)
    return np.asarray(cv2.warpAffine(image, affine, (crop[1], crop[0]), flags=cv2.INTER_LINEAR),
                      dtype=np.uint8)


def _outside(goal: Matrix, size: tuple[int, int]) -> NDArray[np.bool_]:
    with np.errstate(invalid='ignore'):
        x, y = goal[..., 0], goal[..., 1]
        return np.asarray((x < 0) | (y < 0) | (x > size[1] - 1) | (y > size[0] - 1))


def _grid(size: tuple[int, int]) -> Matrix:
    """Return every pixel's own place (H, W, 2): x, y."""
    return np.stack(np.meshgrid(np.arange(float(size[1])), np.arange(float(size[0]))), axis=2)


def _apply(affine: Matrix, points: Matrix) -> Matrix:
    # Not points @ matrix, which takes three times as long for two by two.
    x, y = points[..., 0], points[..., 1]
    return np.stack([row[0] * x + row[1] * y + row[2] for row in affine], axis=-1)


def _affine(linear: Matrix, shift: Matrix) -> Matrix:
    return np.concatenate([linear, shift[:, None]], axis=1)


def _compose(outer: Matrix, inner: Matrix) -> Matrix:
    return _affine(outer[:, :2] @ inner[:, :2], outer[:, :2] @ inner[:, 2] + outer[:, 2])


def _rotation(angle: float) -> Matrix:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
