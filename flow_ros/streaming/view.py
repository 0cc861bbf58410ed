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

"""The view: which part of the camera's image is worked on, and how small it is made first.

Scaling and cropping are the cheapest ways to more frames per second: a network's time is
proportional to its pixels. Flow, confidence and occlusion are then of the view, flow in px of
the view. Nothing here needs torch.

Coordinates are those of calibrations: the centre of the first pixel is (0, 0), so the image
begins at -0.5. A point x of the camera's image lies at (x - x0 + 0.5) s - 0.5 in the view,
where the region begins at x0 and s is the view's width by the region's; y likewise.
"""

from dataclasses import dataclass
import math
import re

import cv2
import numpy as np
from numpy.typing import NDArray

Roi = tuple[int, int, int, int]
"""x, y, width, height, in px of the camera's image."""


@dataclass(frozen=True)
class View:
    """A region of the camera's image, scaled down.

    ``scale`` (0 < scale <= 1) is of both sides, whose sizes are rounded to whole px. ``roi``
    is x, y, width, height in px of the camera's image; None is all of it.
    """

    scale: float = 1.0
    roi: Roi | None = None

    def __post_init__(self) -> None:
        """Refuse what is no view of any image."""
        if not 0 < self.scale <= 1:  # NaN neither
            raise ValueError(f'scale must be over 0 and at most 1; seen {self.scale}')
        if self.roi is None:
            return
        whole = all(isinstance(part, int) and not isinstance(part, bool) for part in self.roi)
        if len(self.roi) != 4 or not whole or min(self.roi) < 0 or min(self.roi[2:]) < 1:
            raise ValueError(f'roi must be x, y (at least 0), width, height (at least 1) in '
                             f'whole px; seen {self.roi}')

    @staticmethod
    def parse_roi(text: str) -> Roi | None:
        """Return the region of WIDTHxHEIGHT+X+Y ('640x240+0+240'); None of an empty text."""
        if not text.strip():
            return None
        match = re.fullmatch(r'\s*(\d+)[xX](\d+)\+(\d+)\+(\d+)\s*', text)
        if match is None or 0 in (int(match[1]), int(match[2])):
            raise ValueError(f'a region is WIDTHxHEIGHT+X+Y in px, such as 640x240+0+240, or '
                             f'empty for the whole image; seen {text!r}')
        width, height, x, y = (int(part) for part in match.groups())
        return x, y, width, height

    @property
    def whole(self) -> bool:
        """True where the view is the camera's image itself."""
        return self.scale == 1 and self.roi is None

    def region(self, width: int, height: int) -> Roi:
        """Return the region in an image of ``width`` x ``height`` px.

        Raises ValueError where the region leaves the image.
        """
        if self.roi is None:
            return 0, 0, width, height
        x, y, across, down = self.roi
        if x + across > width or y + down > height:
            raise ValueError(f'the region {across}x{down}+{x}+{y} leaves the image, which is '
                             f'{width}x{height} px: choose a smaller one')
        return self.roi

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of the view of an image of ``width`` x ``height`` px."""
        _, _, across, down = self.region(width, height)
        return _scaled(across, self.scale), _scaled(down, self.scale)

    def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the view (h, w, 3) of an image (H, W, 3).

        Each of its pixels is the mean of those it stands for. Without scaling nothing is
        copied: the result shares the memory of ``pixels``.
        """
        x, y, across, down = self.region(pixels.shape[1], pixels.shape[0])
        part = pixels[y:y + down, x:x + across]
        size = self.size_of(pixels.shape[1], pixels.shape[0])
        if size == (across, down):
            return part
        if min(part.strides) < 0:  # OpenCV does not take those
            part = np.ascontiguousarray(part)
        return np.asarray(cv2.resize(part, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)

    def matrix(self, width: int, height: int) -> NDArray[np.float64]:
        """Return A (3, 3), which takes homogeneous points of the image to those of the view.

        With the half pixel of the module's docstring. A K is the camera matrix of the view,
        A P its projection matrix (3, 4); distortion and rectification stay as they are.
        """
        x, y, across, down = self.region(width, height)
        to_width, to_height = self.size_of(width, height)
        s, t = to_width / across, to_height / down
        return np.array([[s, 0.0, (0.5 - x) * s - 0.5],
                         [0.0, t, (0.5 - y) * t - 0.5],
                         [0.0, 0.0, 1.0]])

    def to_view(self, points: NDArray[np.floating], width: int,
                height: int) -> NDArray[np.float64]:
        """Return points (..., 2), x then y, of the camera's image as points of the view."""
        matrix = self.matrix(width, height)
        return np.asarray(points * np.diag(matrix)[:2] + matrix[:2, 2], dtype=np.float64)

    def to_camera(self, points: NDArray[np.floating], width: int,
                  height: int) -> NDArray[np.float64]:
        """Return points (..., 2), x then y, of the view as points of the camera's image."""
        matrix = self.matrix(width, height)
        return np.asarray((points - matrix[:2, 2]) / np.diag(matrix)[:2], dtype=np.float64)


def _scaled(side: int, scale: float) -> int:
    return max(1, math.floor(side * scale + 0.5))
