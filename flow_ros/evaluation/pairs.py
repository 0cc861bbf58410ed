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

"""Pairs of frames with ground truth in folders.

The layout: a folder anywhere below DIR is a pair when it holds

- ``frame1.png``, ``frame2.png``: the frames;
- ``flow.flo`` or ``flow.png`` (KITTI, 16-bit): the flow from frame 1 to frame 2 on frame 1's
  grid; ``flow.flo`` is taken where both are;
- ``occlusion.png``, if known: not black where a pixel of frame 1 is not visible in frame 2;
- ``boundary.png``, if known: not black on the pixels of a motion or occlusion boundary.

The last two have the size of frame 1. A pair's name is its folder below DIR.
"""

from dataclasses import dataclass
import os
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from flow_ros.flow_io import FlowFileError, read_flow, read_image, read_mask

FRAME_NAMES = ('frame1.png', 'frame2.png')
FLOW_NAMES = ('flow.flo', 'flow.png')
OCCLUSION_NAME = 'occlusion.png'
BOUNDARY_NAME = 'boundary.png'


@dataclass(frozen=True)
class LoadedPair:
    """The arrays of a pair: RGB uint8 frames, truth px with NaN, and maps where they exist."""

    image1: NDArray[np.uint8]
    image2: NDArray[np.uint8]
    truth: NDArray[np.float32]
    occlusion: NDArray[np.bool_] | None = None
    boundary_distance: NDArray[np.float32] | None = None


class PairSource(Protocol):
    """What the evaluation takes: a pair of a folder, or a sample of a data set."""

    @property
    def name(self) -> str:
        """What the tables call it."""

    def load(self) -> LoadedPair:
        """Read it; raises FlowFileError where a file is damaged or of another size."""


@dataclass(frozen=True)
class Pair:
    """The files of a pair."""

    name: str
    frame1: Path
    frame2: Path
    flow: Path
    occlusion: Path | None = None
    boundary: Path | None = None

    def load(self) -> LoadedPair:
        """Read the files; raises FlowFileError where one is damaged or of another size."""
        image1 = read_image(self.frame1)
        size = image1.shape[:2]
        image2 = read_image(self.frame2)
        truth, _ = read_flow(self.flow)
        occlusion = read_mask(self.occlusion) if self.occlusion else None
        boundary = read_mask(self.boundary) if self.boundary else None
        arrays: tuple[tuple[Path | None, NDArray[Any] | None], ...] = (
            (self.frame2, image2), (self.flow, truth), (self.occlusion, occlusion),
            (self.boundary, boundary))
        for path, array in arrays:
            if array is not None and array.shape[:2] != size:
                raise FlowFileError(f'{path} is {array.shape[1]}x{array.shape[0]}; expected '
                                    f'{size[1]}x{size[0]}, as {self.frame1.name} is')
        distance = None if boundary is None else boundary_distance(boundary)
        return LoadedPair(image1, image2, truth, occlusion, distance)


@dataclass(frozen=True)
class Skipped:
    """A folder that looked like a pair and was left out, and why."""

    name: str
    reason: str


def boundary_distance(boundary: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the distance (H, W) in px of every pixel to the nearest boundary pixel."""
    if not boundary.any():
        return np.full(boundary.shape, np.inf, dtype=np.float32)
    return np.asarray(cv2.distanceTransform((~boundary).astype(np.uint8), cv2.DIST_L2,
                                            cv2.DIST_MASK_PRECISE), dtype=np.float32)


def find_pairs(directory: str | Path) -> tuple[list[Pair], list[Skipped]]:
    """Return the pairs below ``directory``, sorted by name, and what was skipped and why."""
    root = Path(directory)
    if not root.is_dir():
        seen = 'a file' if root.is_file() else 'nothing'
        raise FlowFileError(f'{root}: expected a folder of pairs; seen {seen} there')
    pairs: list[Pair] = []
    skipped: list[Skipped] = []
    visited: set[str] = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link back up would never end
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        if not set(FRAME_NAMES) & set(files):
            continue
        folder = Path(parent)
        relative = folder.relative_to(root).as_posix()
        name = root.resolve().name if relative == '.' else relative
        flow_names = [flow for flow in FLOW_NAMES if flow in files]
        missing = [frame for frame in FRAME_NAMES if frame not in files]
        if missing:
            skipped.append(Skipped(name, f'no {missing[0]}'))
        elif not flow_names:
            skipped.append(Skipped(name, f'no truth ({" or ".join(FLOW_NAMES)})'))
        else:
            pairs.append(Pair(
                name, folder / FRAME_NAMES[0], folder / FRAME_NAMES[1], folder / flow_names[0],
                folder / OCCLUSION_NAME if OCCLUSION_NAME in files else None,
                folder / BOUNDARY_NAME if BOUNDARY_NAME in files else None))
    return sorted(pairs, key=lambda pair: pair.name), sorted(skipped, key=lambda s: s.name)
