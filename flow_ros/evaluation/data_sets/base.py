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

"""What every data set is: files of samples, read with their ground truth's conventions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from flow_ros.evaluation.pairs import LoadedPair
from flow_ros.flow_io import FlowFileError, read_flow, read_image, read_mask

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
ByteArray = NDArray[np.uint8]

AGREE_PX = 1.0
"""Exact flows there and back that meet within this see the same surface."""


class DataSetError(ValueError):
    """A folder that is not the data set it should be: names what was seen and expected."""


@dataclass(frozen=True)
class Sample:
    """One pair with its truth: RGB uint8 frames (H, W, 3), flow (H, W, 2) px, NaN unknown.

    ``occlusion`` (H, W) is True where a pixel of frame 1 has no counterpart in frame 2: covered
    there, or out of the image. It is None where the set does not know, and counts only where
    ``occlusion_known``, unless that is None: then it counts everywhere. ``backward`` is the flow
    from frame 2 to frame 1 on frame 2's grid, ``occlusion_backward`` its occlusion.
    """

    image1: ByteArray
    image2: ByteArray
    flow: FloatArray
    occlusion: BoolArray | None = None
    occlusion_known: BoolArray | None = None
    backward: FloatArray | None = None
    occlusion_backward: BoolArray | None = None

    def reversed(self) -> 'Sample':
        """Return the same two frames the other way round; needs the backward flow."""
        if self.backward is None:
            raise ValueError('the data do not know the backward flow of this sample')
        return Sample(self.image2, self.image1, self.backward, self.occlusion_backward, None,
                      self.flow, self.occlusion)


@dataclass(frozen=True)
class Files:
    """Where a sample's files are."""

    name: str
    image1: Path
    image2: Path
    flow: Path
    occlusion: Path | None = None
    backward: Path | None = None
    occlusion_backward: Path | None = None
    extra: Path | None = None
    """What only some sets have: Sintel's invalid pixels, KITTI's flow of visible pixels."""


class DataSet:
    """Samples by number. A kind of set overrides how its files are found and read.

    ``load`` raises FlowFileError, naming the file, where one is damaged or of another size.
    """

    title = ''
    layout = ''
    """What a folder of this set holds, for the error that says it does not."""
    splits: tuple[str, ...] = ('train',)
    """The first is the default."""

    def __init__(self, name: str, root: str | Path, split: str | None = None) -> None:
        """Find the samples below ``root``; DataSetError says what is wrong there."""
        self.name, self.root = name, Path(root)
        self.split = split or self.splits[0]
        if self.split not in self.splits:
            raise DataSetError(f'{name} has the splits {", ".join(self.splits)}; '
                               f'seen {self.split!r}')
        self.files: Sequence[Files] = self.find()
        if not self.files:
            raise self.wrong('not one sample')
        self._check_all_there()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.files)

    def find(self) -> list[Files]:
        """Return the files of the samples of ``split``, sorted by name."""
        raise DataSetError(f'{type(self).__name__} does not say where its files are')

    def read_flow(self, path: Path, size: tuple[int, int]) -> FloatArray:
        """Return the flow (H, W, 2) of a file, NaN where unknown, for frames of ``size``."""
        return read_flow(path)[0]

    def read_occlusion(self, path: Path, size: tuple[int, int]) -> BoolArray:
        """Return the occlusion (H, W) of a file: not black is occluded."""
        return read_mask(path)

    def finish(self, files: Files, sample: Sample) -> Sample:
        """Apply what is particular to the set."""
        return sample

    def load(self, index: int) -> Sample:
        """Read sample ``index``."""
        files = self.files[index]
        image1 = read_image(files.image1)
        size = (image1.shape[0], image1.shape[1])

        def flow_of(path: Path) -> FloatArray:
            flow: FloatArray = same_size(path, self.read_flow(path, size), files.image1, size)
            # What came out of a damaged simulation, a division by nothing or a wrong decoder.
            unknown = ~(np.isfinite(flow[..., 0]) & np.isfinite(flow[..., 1]))
            flow[unknown] = np.nan
            if unknown.all():
                raise FlowFileError(f'{path} does not know the flow of a single pixel')
            return flow

        def occlusion_of(path: Path | None) -> BoolArray | None:
            return None if path is None else same_size(
                path, self.read_occlusion(path, size), files.image1, size)

        image2 = same_size(files.image2, read_image(files.image2), files.image1, size)
        sample = Sample(image1, image2, flow_of(files.flow), occlusion_of(files.occlusion), None,
                        None if files.backward is None else flow_of(files.backward),
                        occlusion_of(files.occlusion_backward))
        return complete(self.finish(files, sample))

    def load_pair(self, index: int) -> LoadedPair:
        """Read sample ``index`` as the evaluation takes it."""
        sample = self.load(index)
        return LoadedPair(sample.image1, sample.image2, sample.flow, sample.occlusion)

    def pairs(self) -> list['SetPair']:
        """Return the samples as ``flow_ros.evaluation.evaluate`` takes them."""
        return [SetPair(files.name, self, index) for index, files in enumerate(self.files)]

    def wrong(self, seen: str) -> DataSetError:
        """Return the error for a root that does not hold this set."""
        split = f' (split {self.split})' if len(self.splits) > 1 else ''
        return DataSetError(f'{self.root} is not {self.title}{split}: expected {self.layout}; '
                            f'seen {seen}: {content_of(self.root)}')

    def folder(self, *names: str) -> Path:
        """Return the first folder of these below ``root`` ('.' is the root) that there is."""
        for name in names:
            if (self.root / name).is_dir():
                return self.root / name
        raise self.wrong(f'no folder {" or ".join(name for name in names if name != ".")}')

    def _check_all_there(self) -> None:
        missing = [(files, path) for files in self.files
                   for path in (files.image1, files.image2, files.flow) if not path.is_file()]
        if missing:
            files, path = missing[0]
            raise DataSetError(
                f'{self.root}: {self.title} is not complete: {len(missing)} files are missing, '
                f'the first is {path} (of sample {files.name}). Download or unpack it again')


@dataclass(frozen=True)
class SetPair:
    """A sample as the evaluation reads it."""

    name: str
    data_set: DataSet
    index: int

    def load(self) -> LoadedPair:
        """Read the files; raises FlowFileError where one is damaged or of another size."""
        return self.data_set.load_pair(self.index)


def same_size(path: Path, array: NDArray[Any], reference: Path,
              size: tuple[int, ...]) -> NDArray[Any]:
    """Return ``array``, read from ``path``, if it is of the ``reference`` frame's size."""
    if array.shape[:2] != size:
        raise FlowFileError(f'{path} is {array.shape[1]}x{array.shape[0]}; expected '
                            f'{size[1]}x{size[0]}, as {reference.name} is')
    return array


def complete(sample: Sample) -> Sample:
    """Return ``sample`` with what follows from its flows.

    What leaves the image is occluded, whether a set's own maps say so or leave it out. Where a
    set has no map but dense flow in both directions, which is exact in rendered sets, the map
    follows from the two: see ``occlusion_from_flows``.
    """
    occlusion, backward = sample.occlusion, sample.occlusion_backward
    if sample.backward is not None:
        if occlusion is None:
            occlusion = occlusion_from_flows(sample.flow, sample.backward)
        if backward is None:
            backward = occlusion_from_flows(sample.backward, sample.flow)
    return replace(
        sample,
        occlusion=None if occlusion is None else occlusion | leaves(sample.flow),
        occlusion_backward=None if backward is None or sample.backward is None
        else backward | leaves(sample.backward))


def targets(flow: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return where every pixel goes, x (H, W) and y (H, W); NaN where unknown."""
    height, width = flow.shape[:2]
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    return (np.asarray(flow[..., 0] + x, dtype=np.float32),
            np.asarray(flow[..., 1] + y, dtype=np.float32))


def leaves(flow: FloatArray) -> BoolArray:
    """Return the pixels (H, W) whose known flow ends outside of the image."""
    height, width = flow.shape[:2]
    x, y = targets(flow)
    return np.asarray((x < 0) | (y < 0) | (x > width - 1) | (y > height - 1))


def occlusion_from_flows(flow: FloatArray, backward: FloatArray) -> BoolArray:
    """Return the pixels (H, W) of exact ``flow`` that ``backward`` does not come back to.

    A pixel is visible if the pixel nearest to its target comes back to it within ``AGREE_PX``
    (more for the stretch between the two: 5 % of the flow's length).
    """
    x, y = (np.where(np.isfinite(goal), goal, np.float32(-9)) for goal in targets(flow))
    rest_u, rest_v = (flow[..., axis] + cv2.remap(
        np.ascontiguousarray(backward[..., axis]), x, y, cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_CONSTANT, borderValue=math.nan) for axis in (0, 1))
    allowed = AGREE_PX + 0.05 * np.hypot(flow[..., 0], flow[..., 1])
    seen = np.hypot(rest_u, rest_v) <= allowed  # NaN is not
    return np.asarray(~seen & np.isfinite(flow[..., 0]))


def content_of(folder: Path) -> str:
    """Return what there is at ``folder``, for an error."""
    if not folder.exists():
        return 'there is nothing at that path'
    if not folder.is_dir():
        return 'that path is a file'
    names = sorted(path.name + ('/' if path.is_dir() else '') for path in folder.iterdir())
    if not names:
        return 'the folder is empty'
    more = f' and {len(names) - 6} more' if len(names) > 6 else ''
    return f'it holds {", ".join(names[:6])}{more}'


def if_there(path: Path) -> Path | None:
    """Return ``path`` if there is such a file."""
    return path if path.is_file() else None
