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

"""Pictures of flow, confidence and error, fast enough to draw every frame of a camera.

All pictures are RGB uint8 (H, W, 3). Flow: the hue is the direction (right red, down yellow
green, left cyan, up violet), the strength of the colour the speed, white is still, black is
invalid.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

ByteArray = NDArray[np.uint8]
FloatArray = NDArray[np.float32]

# Cells of the wheel's picture from the centre (still) to the rim: so many that the nearest one
# has the colour to within a grey level. Of what is faster, up to 1.5 times is in the picture.
WHEEL_RADIUS = 512
WHEEL_REACH = 768
WHEEL_DIRECTIONS = (0.0, 90.0, 180.0, 270.0, 360.0)  # right, down, left, up, right
WHEEL_HUES = (0.0, 75.0, 185.0, 265.0, 360.0)
BAND = 1 << 16  # pixels coloured at a time: so few stay in a core's cache, and are left to one
ROBUST_PERCENTILE = 99.0
ROBUST_STRIDE = 4  # one pixel in 16 says enough about the speeds of a frame
ROBUST_MIN_PX = 1.0  # so that the noise of a still scene stays pale

ERROR_RANGE_PX = (0.25, 36.0)  # its middle on the log scale is 3 px
# Up to 3 px blues, from 3 px reds: the colour changes where an outlier begins.
ERROR_COLORS = ((0.0, (25, 45, 120)), (0.25, (70, 130, 190)), (0.49, (205, 230, 245)),
                (0.51, (255, 225, 160)), (0.75, (230, 95, 50)), (1.0, (140, 0, 30)))
CONFIDENCE_COLORS = ((0.0, (60, 10, 70)), (0.25, (60, 70, 140)), (0.5, (30, 140, 140)),
                     (0.75, (95, 200, 95)), (1.0, (250, 235, 50)))

LABEL_FONT = cv2.FONT_HERSHEY_SIMPLEX


@lru_cache(maxsize=1)
def _wheel() -> ByteArray:
    """Return the wheel's picture: the flow, scaled and shifted, is the map by which it is read.

    Its first row and column are black, for what is invalid.
    """
    side = np.arange(-WHEEL_REACH - 1, WHEEL_REACH + 1, dtype=np.float32) / WHEEL_RADIUS
    picture = np.empty((side.size, side.size, 3), dtype=np.uint8)
    for rows in np.array_split(np.arange(side.size), 24):  # so that little memory is needed
        u, v = np.meshgrid(side, side[rows])
        direction = np.degrees(np.arctan2(v, u)) % 360.0
        hsv = np.stack([np.interp(direction, WHEEL_DIRECTIONS, WHEEL_HUES),
                        np.minimum(np.hypot(u, v), 1.0), np.ones_like(u)], axis=2)
        picture[rows] = np.rint(255.0 * cv2.cvtColor(hsv.astype(np.float32), cv2.COLOR_HSV2RGB))
    picture[0] = picture[:, 0] = 0
    picture.setflags(write=False)
    return picture


def robust_max_px(flow: NDArray[Any]) -> float:
    """Return a speed that nearly all pixels stay below (99 %), at least 1 px."""
    sample = np.asarray(flow[::ROBUST_STRIDE, ::ROBUST_STRIDE], dtype=np.float32)
    speed = np.hypot(sample[..., 0], sample[..., 1])
    speed = speed[np.isfinite(speed)]
    if not speed.size:
        return ROBUST_MIN_PX
    return max(ROBUST_MIN_PX, float(np.percentile(speed, ROBUST_PERCENTILE)))


def flow_to_color(flow: NDArray[Any], max_px: float | None = None, *,
                  out: ByteArray | None = None) -> ByteArray:
    """Return the picture of ``flow`` (H, W, 2); NaN is black.

    ``max_px`` is the speed of full colour, and of all beyond it; None takes nearly the
    fastest of this very flow, so colours of two frames then differ in scale. The picture is
    drawn into ``out`` (H, W, 3), contiguous, where that is given.
    """
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f'flow must be (H, W, 2); seen {flow.shape}')
    if max_px is None:
        max_px = robust_max_px(flow)
    elif not max_px > 0:
        raise ValueError(f'max_px must be more than 0; seen {max_px}')
    height, width = flow.shape[:2]
    picture = np.empty((height, width, 3), dtype=np.uint8) if out is None else out
    scale = np.float32(WHEEL_RADIUS / max_px)
    remap: Any = cv2.remap  # whose types do not know that the second map may be None
    rows = max(1, BAND // max(1, width))
    for top in range(0, height, rows):
        band = np.asarray(flow[top:top + rows], dtype=np.float32)
        # In C order even where the flow is a view of a (2, H, W) array.
        places = np.multiply(band, scale, order='C')
        places = _brought_onto_the_wheel(places)
        places += WHEEL_REACH + 1
        remap(_wheel(), places, None, cv2.INTER_NEAREST, dst=picture[top:top + rows])
    return picture


def _brought_onto_the_wheel(places: FloatArray) -> FloatArray:
    """Shorten what is beyond the picture; most bands have nothing of that, and are returned.

    What is not finite comes out as NaN or stays so, which OpenCV rounds to a place outside of
    the picture, or to its first row or column: both are black.
    """
    if cv2.norm(places.reshape(len(places), -1), cv2.NORM_INF) <= WHEEL_REACH:
        return places
    across, down = cv2.split(places)
    share = cv2.magnitude(across, down)
    with np.errstate(invalid='ignore'):
        np.divide(WHEEL_REACH, np.maximum(share, WHEEL_REACH, out=share), out=share)
        across *= share
        down *= share
    return np.asarray(cv2.merge([across, down]), dtype=np.float32)


def confidence_to_mono(confidence: NDArray[Any]) -> ByteArray:
    """Return confidence (H, W) in [0, 1] as grey (H, W) uint8, 255 the surest; NaN is 0."""
    # NaN stays NaN, and OpenCV's rounding and saturation make 0 of it.
    levels = np.maximum(np.asarray(confidence, dtype=np.float32), np.float32(0.0))
    return np.asarray(cv2.convertScaleAbs(levels, alpha=255.0), dtype=np.uint8)


def confidence_to_color(confidence: NDArray[Any]) -> ByteArray:
    """Return confidence (H, W) as a picture: yellow sure, violet unsure; NaN black."""
    return _color(confidence_to_mono(confidence), CONFIDENCE_COLORS,
                  np.isnan(np.asarray(confidence, dtype=np.float32)))


def error_to_color(error: NDArray[Any]) -> ByteArray:
    """Return an endpoint error (H, W) px as a picture: blue up to 3 px, then red; NaN black.

    The scale is logarithmic, from 0.25 px and less to 36 px and more.
    """
    error = np.asarray(error, dtype=np.float32)
    invalid = ~np.isfinite(error)
    low, high = ERROR_RANGE_PX
    clipped = np.clip(np.where(invalid, low, error), low, high)
    share = np.log(clipped / low) / np.log(high / low)
    return _color(np.rint(255.0 * share).astype(np.uint8), ERROR_COLORS, invalid)


def strip(pictures: Sequence[NDArray[Any]], labels: Sequence[str] | None = None, *,
          height: int | None = None) -> ByteArray:
    """Return the pictures side by side, with small labels.

    Pictures are RGB (H, W, 3) or grey (H, W) uint8, or masks (bool); those of other heights
    are scaled to ``height`` (default: the first one's).
    """
    if not pictures:
        raise ValueError('a strip needs at least one picture; seen none')
    if labels is not None and len(labels) != len(pictures):
        raise ValueError(f'{len(pictures)} pictures need as many labels; seen {len(labels)}')
    height = pictures[0].shape[0] if height is None else height
    parts = []
    for number, picture in enumerate(pictures):
        part = _rgb(picture)
        if part.shape[0] != height:
            width = max(1, round(part.shape[1] * height / part.shape[0]))
            shrinks = part.shape[0] > height
            part = np.asarray(cv2.resize(
                part, (width, height),
                interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR), dtype=np.uint8)
        if labels is not None and labels[number]:
            part = add_label(part, labels[number])
        parts.append(part)
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def add_label(picture: ByteArray, text: str) -> ByteArray:
    """Return a copy of an RGB picture with ``text`` in its upper left corner."""
    picture = picture.copy()
    scale = float(np.clip(picture.shape[0] / 900.0, 0.35, 1.0))
    (width, height), below = cv2.getTextSize(text, LABEL_FONT, scale, 1)
    margin = 4
    box = picture[:height + below + 2 * margin, :width + 2 * margin]
    box //= 4  # a dark ground, on which white letters show whatever is below
    cv2.putText(picture, text, (margin, height + margin), LABEL_FONT, scale, (255, 255, 255),
                1, cv2.LINE_AA)
    return picture


def _rgb(picture: NDArray[Any]) -> ByteArray:
    if picture.dtype == np.bool_:
        picture = picture.astype(np.uint8) * np.uint8(255)
    if picture.dtype != np.uint8 or not (
            picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)):
        raise ValueError('a picture must be uint8 (H, W, 3) or (H, W), or bool (H, W); seen '
                         f'{picture.dtype} {picture.shape}')
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=2)
    return np.asarray(picture, dtype=np.uint8)


Stops = tuple[tuple[float, tuple[int, int, int]], ...]


@lru_cache(maxsize=4)
def _table(stops: Stops) -> ByteArray:
    positions = [position for position, _ in stops]
    colors = np.array([color for _, color in stops])
    share = np.linspace(0.0, 1.0, 256)
    table: ByteArray = np.stack(
        [np.interp(share, positions, colors[:, c]) for c in range(3)],
        axis=1).round().astype(np.uint8)[:, None]
    table.setflags(write=False)
    return table


def _color(levels: ByteArray, stops: Stops, invalid: NDArray[np.bool_]) -> ByteArray:
    picture = cv2.LUT(cv2.merge([levels, levels, levels]), _table(stops))
    picture[invalid] = 0
    return np.asarray(picture, dtype=np.uint8)
