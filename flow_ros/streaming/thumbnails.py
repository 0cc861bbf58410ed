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

"""The small grey pictures of a frame that the early stop and the scene cut look at.

Made once per frame, on the CPU, whatever runs the network: one channel, and each picture from
the one before it, which is a third of the time of two from the colours.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

BLOCK = 8
"""px: noise that is independent from pixel to pixel is an eighth in their means."""

SMALL = (30, 40)
"""(height, width) of the smaller picture, whatever the aspect of the frames."""


@dataclass(frozen=True)
class Thumbnails:
    """Two pictures of a frame (H, W), float32, grey levels 0..255.

    ``blocks`` (H // 8, W // 8), at least one: the means of blocks of 8x8 px. ``small`` (30, 40):
    the whole picture.
    """

    blocks: NDArray[np.float32]
    small: NDArray[np.float32]


def thumbnails(frame: NDArray[np.uint8]) -> Thumbnails:
    """Return the small pictures of ``frame`` (H, W, 3), RGB, any strides."""
    grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
    height, width = grey.shape
    size = (max(width // BLOCK, 1), max(height // BLOCK, 1))
    blocks = cv2.resize(grey, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    # Fewer blocks than that would be enlarged: there is more to see in the frame itself.
    enough = blocks.shape[0] >= SMALL[0] and blocks.shape[1] >= SMALL[1]
    small = cv2.resize(blocks if enough else grey.astype(np.float32), SMALL[::-1],
                       interpolation=cv2.INTER_AREA)
    return Thumbnails(blocks, np.asarray(small, dtype=np.float32))
