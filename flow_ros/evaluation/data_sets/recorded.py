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

"""Recorded data sets, whose truth is sparse, and folders of pairs."""

from dataclasses import replace
from typing import ClassVar

import numpy as np

from flow_ros.evaluation.data_sets.base import (
    DataSet,
    DataSetError,
    Files,
    if_there,
    same_size,
    Sample,
)
from flow_ros.evaluation.pairs import find_pairs, LoadedPair
from flow_ros.flow_io import FlowFileError, read_flow


class Kitti(DataSet):
    """KITTI's training half: sparse flow of all measured pixels, and of the visible ones.

    A pixel is occluded where ``flow_occ`` knows the flow and ``flow_noc`` does not; where
    neither does, occlusion is not known.
    """

    frames: ClassVar[tuple[str, ...]] = ()

    def find(self) -> list[Files]:
        """Return the files of the samples, sorted by name."""
        training = self.folder('training', '.')
        frames = [training / name for name in self.frames if (training / name).is_dir()]
        if not frames:
            raise self.wrong(f'no folder {" or ".join(self.frames)}')
        return [Files(flow.stem.split('_')[0], frames[0] / flow.name,
                      frames[0] / flow.name.replace('_10.', '_11.'), flow,
                      extra=if_there(training / 'flow_noc' / flow.name))
                for flow in sorted((training / 'flow_occ').glob('*_10.png'))]

    def finish(self, files: Files, sample: Sample) -> Sample:
        """Add the occlusion, and where it is known."""
        if files.extra is None:
            return sample
        flow, visible = read_flow(files.extra)
        same_size(files.extra, flow, files.image1, sample.image1.shape[:2])
        known = np.isfinite(sample.flow[..., 0])
        return replace(sample, occlusion=known & ~visible, occlusion_known=known)


class Kitti2012(Kitti):
    """KITTI 2012, in colour where that was downloaded, else grey."""

    title = 'KITTI 2012'
    layout = ('training/colored_0/000000_10.png and 000000_11.png (or image_0) with '
              'training/flow_occ/000000_10.png and, if there, training/flow_noc')
    frames = ('colored_0', 'image_0')


class Kitti2015(Kitti):
    """KITTI 2015."""

    title = 'KITTI 2015'
    layout = ('training/image_2/000000_10.png and 000000_11.png with '
              'training/flow_occ/000000_10.png and, if there, training/flow_noc')
    frames = ('image_2',)


class Hd1k(DataSet):
    """HD1K: sparse forward flow, occlusion unknown."""

    title = 'HD1K'
    layout = ('hd1k_input/image_2/000000_0000.png with '
              'hd1k_flow_gt/flow_occ/000000_0000.png, and so on')

    def find(self) -> list[Files]:
        """Return the files of the samples, sorted by name."""
        frames = self.folder('hd1k_input/image_2')
        files = []
        for flow in sorted(self.folder('hd1k_flow_gt/flow_occ').glob('*_*.png')):
            sequence, number = flow.stem.split('_')
            after = frames / f'{sequence}_{int(number) + 1:04d}.png'
            if after.is_file():  # there is flow for the last frame of a sequence, but no next
                files.append(Files(flow.stem, frames / flow.name, after, flow))
        return files


class Middlebury(DataSet):
    """Middlebury's public half: dense, with unknown pixels; occlusion unknown."""

    title = 'Middlebury'
    layout = ('other-gt-flow/Venus/flow10.flo with other-data/Venus/frame10.png and '
              'frame11.png, and so on')

    def find(self) -> list[Files]:
        """Return the files of the samples, sorted by name."""
        frames = self.folder('other-data', 'other-data-gray')
        return [Files(flow.parent.name, frames / flow.parent.name / 'frame10.png',
                      frames / flow.parent.name / 'frame11.png', flow)
                for flow in sorted(self.folder('other-gt-flow').glob('*/flow10.flo'))]


class Folders(DataSet):
    """Folders of pairs, as ``flow_ros evaluate --data`` reads them."""

    title = 'a folder of pairs'
    layout = ('folders at any depth that hold frame1.png, frame2.png and flow.flo or flow.png, '
              'and occlusion.png if known')

    def find(self) -> list[Files]:
        """Return the files of the samples, sorted by name."""
        try:
            self._pairs, skipped = find_pairs(self.root)
        except FlowFileError as error:
            raise DataSetError(str(error)) from error
        if not self._pairs and skipped:
            raise self.wrong(f'only pairs that lack something ({skipped[0].name}: '
                             f'{skipped[0].reason})')
        return [Files(pair.name, pair.frame1, pair.frame2, pair.flow, pair.occlusion)
                for pair in self._pairs]

    def load_pair(self, index: int) -> LoadedPair:
        """Read the pair of sample ``index``, which may know motion boundaries, too."""
        return self._pairs[index].load()
