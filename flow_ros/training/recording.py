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

"""The frames of an unlabelled recording, kept for training within a stated amount of memory."""

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

FEWEST_PAIRS = 8
SMALLEST_SIDE_PX = 64
LONGEST_GAP = 1.8
"""Times the median distance of two frames: what is further apart had frames between."""


class RecordingError(ValueError):
    """A recording that cannot be trained on; the text says what was seen and what to do."""


@dataclass(frozen=True)
class Split:
    """Pairs by the index of their first frame: to train on, and held out to measure with.

    The held-out ones are the end of the recording, ``gap`` pairs after the last of the others,
    so that none of them is the neighbour of a frame that was trained on.
    """

    train: tuple[int, ...]
    held_out: tuple[int, ...]
    gap: int


class Recording:
    """Frames by index, as PNG (which loses nothing) in at most ``limit_mb`` of memory.

    Where a recording is longer than that, only every 4th pair of neighbours is kept, then every
    8th, and so on: what is kept still goes from the beginning to the end. Of few frames that
    are larger than that all are kept: with less there is nothing to train on.
    """

    def __init__(self, *, limit_mb: float = 512.0) -> None:
        """Begin without frames."""
        self.limit_mb = limit_mb
        self.size: tuple[int, int] = (0, 0)
        """(height, width) px."""
        self.stride = 1
        """Pairs begin at the multiples of it."""
        self.stamps: list[float] = []
        self._frames: dict[int, bytes] = {}
        self._bytes = 0

    def __len__(self) -> int:
        """Return how many frames have been seen, kept or not."""
        return len(self.stamps)

    def gather(self, frames: Iterable[tuple[Pixels, float]]) -> 'Recording':
        """Add (RGB uint8 (H, W, 3), stamp in s) one by one; raises RecordingError."""
        for image, stamp in frames:
            self.add(image, stamp)
        return self

    def add(self, image: Pixels, stamp: float) -> None:
        """Add the next frame; raises RecordingError if it is of another size."""
        height, width = image.shape[:2]
        if not self.stamps:
            if min(height, width) < SMALLEST_SIDE_PX:
                raise RecordingError(f'frames of {width}x{height} px are too small to train on; '
                                     f'expected {SMALLEST_SIDE_PX} px and more each way')
            self.size = (height, width)
        elif (height, width) != self.size:
            raise RecordingError(
                f'frame {len(self)} is {width}x{height} px, those before are '
                f'{self.size[1]}x{self.size[0]}: frames must have one size; bring them to one '
                f'with --size {self.size[1]}x{self.size[0]}')
        index = len(self)
        self.stamps.append(stamp)
        if not self._wanted(index):
            return
        good, data = cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
                                  [cv2.IMWRITE_PNG_COMPRESSION, 1])
        if not good:
            raise RecordingError(f'frame {index} cannot be encoded')
        self._frames[index] = data.tobytes()
        self._bytes += len(self._frames[index])
        while self._bytes > self.limit_mb * 2 ** 20 and len(self._frames) > 4 * FEWEST_PAIRS:
            self._thin()

    def frame(self, index: int) -> Pixels:
        """Return frame ``index``, which must have been kept."""
        data = np.frombuffer(self._frames[index], dtype=np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
        if image is None:
            raise RecordingError(f'frame {index} cannot be decoded: memory is damaged')
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)

    @property
    def kept_mb(self) -> float:
        """How much memory the frames take."""
        return self._bytes / 2 ** 20

    @property
    def period_s(self) -> float:
        """The median distance of two frames, s."""
        return float(np.median(np.diff(self.stamps))) if len(self) > 1 else 0.0

    def pairs(self) -> tuple[int, ...]:
        """Return the first frames of all pairs of true neighbours, in order."""
        longest = LONGEST_GAP * self.period_s
        return tuple(index for index in range(0, len(self) - 1, self.stride)
                     if index in self._frames and index + 1 in self._frames
                     and 0 < self.stamps[index + 1] - self.stamps[index] <= longest)

    def split(self, share: float = 0.2) -> Split:
        """Return what to train on and what to hold out; raises RecordingError if too short."""
        pairs = self.pairs()
        if len(pairs) < FEWEST_PAIRS:
            duration = self.stamps[-1] - self.stamps[0] if self.stamps else 0.0
            raise RecordingError(
                f'{len(self)} frames over {duration:.1f} s hold {len(pairs)} pairs of '
                f'neighbouring frames; at least {FEWEST_PAIRS} are needed, some hundreds are '
                f'good: record for longer (about a minute in which the robot moves)')
        held_out = max(2, round(share * len(pairs)))
        gap = max(1, min(10, len(pairs) // 20))
        return Split(train=pairs[:-held_out - gap], held_out=pairs[-held_out:], gap=gap)

    def _wanted(self, index: int) -> bool:
        return self.stride == 1 or index % self.stride in (0, 1)

    def _thin(self) -> None:
        # From all pairs to every 4th: every 2nd needs each frame just as well.
        self.stride = 4 if self.stride == 1 else 2 * self.stride
        for index in [index for index in self._frames if not self._wanted(index)]:
            self._bytes -= len(self._frames.pop(index))
