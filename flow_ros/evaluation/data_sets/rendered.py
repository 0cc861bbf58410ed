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

"""Rendered data sets: their truth is dense and exact."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from flow_ros.evaluation.data_sets.base import (
    BoolArray,
    DataSet,
    DataSetError,
    Files,
    FloatArray,
    if_there,
    Sample,
)
from flow_ros.flow_io import FlowFileError, read_image, read_mask

TOO_FAR_PX = 1000.0
"""FlyingThings3D has flow of thousands of px near the camera: no training uses it."""


class FlyingChairs(DataSet):
    """FlyingChairs: forward flow only, occlusion unknown."""

    title = 'FlyingChairs'
    layout = ('data/00001_img1.ppm, data/00001_img2.ppm, data/00001_flow.flo and so on, and '
              'FlyingChairs_train_val.txt (1: train, 2: val) beside them or one folder up')
    splits = ('train', 'val', 'all')

    def find(self) -> list[Files]:
        """Return the files of the samples of ``split``, sorted by name."""
        data = self.folder('data', 'FlyingChairs_release/data', '.')
        flows = sorted(data.glob('*_flow.flo'))
        if self.split != 'all' and flows:
            flows = self._of_split(data, flows)
        files = []
        for flow in flows:
            stem = flow.name.removesuffix('_flow.flo')
            files.append(Files(stem, data / f'{stem}_img1.ppm', data / f'{stem}_img2.ppm', flow))
        return files

    def _of_split(self, data: Path, flows: list[Path]) -> list[Path]:
        name = 'FlyingChairs_train_val.txt'
        found = [path for path in (data / name, data.parent / name, self.root / name)
                 if path.is_file()]
        if not found:
            raise self.wrong(f'{len(flows)} samples and no {name} (split all needs none)')
        marks = found[0].read_text().split()
        wanted = '1' if self.split == 'train' else '2'
        numbers = [flow.name.split('_')[0] for flow in flows]
        if not all(number.isdigit() and 1 <= int(number) <= len(marks) for number in numbers):
            raise DataSetError(f'{found[0]} has {len(marks)} lines, one for each sample from '
                               f'00001 on; seen samples up to {numbers[-1]}')
        return [flow for flow, number in zip(flows, numbers) if marks[int(number) - 1] == wanted]


class FlyingChairs2(DataSet):
    """FlyingChairs2: flow and occlusion in both directions."""

    title = 'FlyingChairs2'
    layout = ('train/0000000-img_0.png, -img_1.png, -flow_01.flo and, if there, -flow_10.flo, '
              '-occ_01.png, -occ_10.png; the same below val')
    splits = ('train', 'val')

    def find(self) -> list[Files]:
        """Return the files of the samples of ``split``, sorted by name."""
        folder = self.folder(self.split, f'FlyingChairs2/{self.split}')
        files = []
        for flow in sorted(folder.glob('*-flow_01.flo')):
            stem = str(folder / flow.name.removesuffix('flow_01.flo'))
            files.append(Files(
                flow.name.removesuffix('-flow_01.flo'), Path(stem + 'img_0.png'),
                Path(stem + 'img_1.png'), flow, if_there(Path(stem + 'occ_01.png')),
                if_there(Path(stem + 'flow_10.flo')), if_there(Path(stem + 'occ_10.png'))))
        return files


class FlyingThings3D(DataSet):
    """FlyingThings3D, whole or the subset; both cameras, flow in both directions.

    Occlusion is the subset's own, or else follows from the two flows. Flow of ``TOO_FAR_PX``
    and more is unknown.
    """

    title = 'FlyingThings3D'
    layout = ('frames_cleanpass/TRAIN/A/0000/left/0006.png (or frames_finalpass) with '
              'optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm, or '
              'the subset: train/image_clean/left/0000000.png (or image_final) with '
              'train/flow/left/into_future/0000000.flo')
    splits = ('train', 'test')
    passes: tuple[str, ...] = ('clean', 'final')

    def find(self) -> list[Files]:
        """Return the files of the samples of ``split``, sorted by name."""
        if (self.root / 'optical_flow').is_dir():
            found = [self._whole(name) for name in self.passes
                     if (self.root / f'frames_{name}pass').is_dir()]
        else:
            half = self.folder('train' if self.split == 'train' else 'val')
            found = [self._subset(half, name) for name in self.passes
                     if (half / f'image_{name}').is_dir()]
        if not found:
            raise self.wrong(f'no frames of the {" or ".join(self.passes)} pass')
        return [files for each in found for files in each]

    def _whole(self, name: str) -> list[Files]:
        half = self.split.upper()
        flows = self.root / 'optical_flow' / half
        frames = self.root / f'frames_{name}pass' / half
        files = []
        for flow in sorted(flows.glob('*/*/into_future/*/OpticalFlowIntoFuture_*_?.pfm')):
            camera = flow.parent.name
            sequence = flow.parent.parent.parent
            _, number, side = flow.stem.split('_')
            after = f'{int(number) + 1:04d}'
            place = frames / sequence.relative_to(flows) / camera
            image1, image2 = (_frame(place, which) for which in (number, after))
            if not image2.is_file() and image1.is_file():
                continue  # the last frame of a sequence: its future was not rendered
            files.append(Files(
                f'{name}/{sequence.relative_to(flows).as_posix()}/{camera}/{number}',
                image1, image2, flow, backward=if_there(
                    sequence / 'into_past' / camera / f'OpticalFlowIntoPast_{after}_{side}.pfm')))
        return files

    def _subset(self, half: Path, name: str) -> list[Files]:
        files = []
        for flow in sorted((half / 'flow').glob('*/into_future/*')):
            if flow.suffix not in ('.flo', '.pfm'):
                continue
            camera = flow.parent.parent.name
            after = f'{int(flow.stem) + 1:07d}'
            place = half / f'image_{name}' / camera
            image1, image2 = (_frame(place, which) for which in (flow.stem, after))
            if not image2.is_file() and image1.is_file():
                continue
            occlusions = half / 'flow_occlusions' / camera
            files.append(Files(
                f'{name}/{camera}/{flow.stem}', image1, image2, flow,
                if_there(occlusions / 'into_future' / f'{flow.stem}.png'),
                if_there(flow.parent.parent / 'into_past' / f'{after}{flow.suffix}'),
                if_there(occlusions / 'into_past' / f'{after}.png')))
        return files

    def read_flow(self, path: Path, size: tuple[int, int]) -> FloatArray:
        """Return the flow (H, W, 2) of a file, NaN where unknown."""
        flow = super().read_flow(path, size)
        with np.errstate(invalid='ignore'):
            far = (np.abs(flow[..., 0]) >= TOO_FAR_PX) | (np.abs(flow[..., 1]) >= TOO_FAR_PX)
        flow[far] = np.nan
        return flow


class FlyingThingsClean(FlyingThings3D):
    """The clean pass alone."""

    passes = ('clean',)


class FlyingThingsFinal(FlyingThings3D):
    """The final pass alone."""

    passes = ('final',)


class Sintel(DataSet):
    """MPI-Sintel's training half: forward flow and occlusion; invalid pixels are unknown."""

    title = 'MPI-Sintel'
    layout = ('training/clean/alley_1/frame_0001.png (or final) with '
              'training/flow/alley_1/frame_0001.flo and, if there, training/occlusions and '
              'training/invalid')
    passes: tuple[str, ...] = ('clean', 'final')

    def find(self) -> list[Files]:
        """Return the files of the samples, sorted by name."""
        training = self.folder('training', 'MPI-Sintel-complete/training', '.')
        files = []
        for name in self.passes:
            if not (training / name).is_dir():
                continue
            for flow in sorted((training / 'flow').glob('*/frame_*.flo')):
                scene, number = flow.parent.name, int(flow.stem.removeprefix('frame_'))
                frames = training / name / scene
                files.append(Files(
                    f'{name}/{scene}/{flow.stem}', frames / f'{flow.stem}.png',
                    frames / f'frame_{number + 1:04d}.png', flow,
                    if_there(training / 'occlusions' / scene / f'{flow.stem}.png'),
                    extra=if_there(training / 'invalid' / scene / f'{flow.stem}.png')))
        return files

    def finish(self, files: Files, sample: Sample) -> Sample:
        """Make the flow unknown where the rendering was invalid."""
        if files.extra is not None:
            invalid = read_mask(files.extra)
            if invalid.shape != sample.flow.shape[:2]:
                raise FlowFileError(f'{files.extra} is {invalid.shape[1]}x{invalid.shape[0]}, '
                                    f'unlike {files.flow.name}')
            sample.flow[invalid] = np.nan
        return sample


class SintelClean(Sintel):
    """The clean pass alone."""

    passes = ('clean',)


class SintelFinal(Sintel):
    """The final pass alone."""

    passes = ('final',)


class Spring(DataSet):
    """Spring's training half: both cameras, both directions.

    Its truth has twice the frames' resolution, one value per quarter of a pixel, in px of the
    frames: every second value of every second row is the frames' own grid. Occlusion comes
    from the match maps (red: covered, green: out of the image), else from the two flows.
    """

    title = 'Spring'
    layout = ('train/0001/frame_left/frame_left_0001.png with '
              'train/0001/flow_FW_left/flow_FW_left_0001.flo5 and, if there, flow_BW_left and '
              'maps/matchmap_flow_FW_left')

    def find(self) -> list[Files]:
        """Return the files of the samples, sorted by name."""
        train = self.folder('train', 'spring/train')
        if find_spec('h5py') is None:
            raise DataSetError("Spring's .flo5 files are HDF5, which needs a Python package: "
                               'pip install h5py')
        files = []
        for flow in sorted(train.glob('*/flow_FW_*/flow_FW_*_*.flo5')):
            scene, (_, _, camera, number) = flow.parent.parent, flow.stem.split('_')
            after = f'{int(number) + 1:04d}'
            frames = scene / f'frame_{camera}'
            files.append(Files(
                f'{scene.name}/{camera}/{number}', frames / f'frame_{camera}_{number}.png',
                frames / f'frame_{camera}_{after}.png', flow,
                self._map(scene, 'FW', camera, number),
                if_there(scene / f'flow_BW_{camera}' / f'flow_BW_{camera}_{after}.flo5'),
                self._map(scene, 'BW', camera, after)))
        return files

    @staticmethod
    def _map(scene: Path, way: str, camera: str, number: str) -> Path | None:
        name = f'matchmap_flow_{way}_{camera}'
        return if_there(scene / 'maps' / name / f'{name}_{number}.png')

    def read_flow(self, path: Path, size: tuple[int, int]) -> FloatArray:
        """Return the flow (H, W, 2) of a file on the frames' grid."""
        flow = _read_flo5(path)
        doubled = flow.shape[:2] == (2 * size[0], 2 * size[1])
        return np.ascontiguousarray(flow[::2, ::2]) if doubled else flow

    def read_occlusion(self, path: Path, size: tuple[int, int]) -> BoolArray:
        """Return the occlusion (H, W) of a match map on the frames' grid."""
        unmatched = np.asarray(read_image(path)[..., :2].any(axis=2))
        return unmatched[::2, ::2] if unmatched.shape == (2 * size[0], 2 * size[1]) else unmatched


class TartanAir(DataSet):
    """TartanAir: forward flow of a static world, and a mask.

    The mask says 0 visible, 1 covered by another surface, 10 by its own, 100 out of the image.
    Covered pixels and pixels of moving objects look alike in it, and the flow does not know
    objects, so where it says covered the flow is unknown.
    """

    title = 'TartanAir'
    layout = ('ENVIRONMENT/Easy/P000/image_left/000000_left.png with '
              'flow/000000_000001_flow.npy and flow/000000_000001_mask.npy, at any depth')

    def find(self) -> list[Files]:
        """Return the files of the samples, sorted by name."""
        files = []
        for flow in sorted(self.root.rglob('flow/*_flow.npy')):
            before, after, _ = flow.stem.split('_')
            frames = flow.parent.parent / 'image_left'
            files.append(Files(
                f'{flow.parent.parent.relative_to(self.root).as_posix()}/{before}',
                frames / f'{before}_left.png', frames / f'{after}_left.png', flow,
                if_there(flow.with_name(f'{before}_{after}_mask.npy'))))
        return files

    def read_flow(self, path: Path, size: tuple[int, int]) -> FloatArray:
        """Return the flow (H, W, 2) of a .npy file."""
        flow = _read_array(path)
        if flow.ndim != 3 or flow.shape[2] != 2 or flow.dtype.kind != 'f':
            raise FlowFileError(f'{path} holds {flow.dtype} {flow.shape}; expected float32 '
                                '(height, width, 2)')
        return flow.astype(np.float32)

    def read_occlusion(self, path: Path, size: tuple[int, int]) -> BoolArray:
        """Return the pixels (H, W) that are not visible by the mask."""
        return _read_mask(path) != 0

    def finish(self, files: Files, sample: Sample) -> Sample:
        """Make the flow unknown where it may not be that of what is seen."""
        if files.occlusion is not None:
            sample.flow[_read_mask(files.occlusion) % 100 != 0] = np.nan
        return sample


def _frame(folder: Path, number: str) -> Path:
    """Return a frame's path; the files are .png, or .webp in the small download."""
    webp = folder / f'{number}.webp'
    return webp if webp.is_file() else folder / f'{number}.png'


def _read_flo5(path: Path) -> FloatArray:
    """Return the flow (H, W, 2) of an HDF5 file, NaN where unknown."""
    import h5py

    try:
        with h5py.File(path, 'r') as file:
            if 'flow' not in file:
                raise FlowFileError(f'{path} holds no data set "flow"; seen '
                                    f'{", ".join(file) or "nothing"}')
            flow = np.asarray(file['flow'][()], dtype=np.float32)
    except (OSError, TypeError) as error:  # cut off or damaged
        raise FlowFileError(f'{path} cannot be read ({" ".join(str(error).split())[:120]}): '
                            'write or download it again') from error
    if flow.ndim != 3 or flow.shape[2] != 2 or 0 in flow.shape:
        raise FlowFileError(f'{path} holds flow of shape {flow.shape}; expected '
                            '(height, width, 2)')
    return flow


def _read_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise FlowFileError(f'{path} cannot be read as a NumPy array: '
                            f'{" ".join(str(error).split())[:120]}: download it again') from error


def _read_mask(path: Path) -> np.ndarray:
    mask = _read_array(path)
    if mask.ndim != 2 or mask.dtype.kind not in 'ui':
        raise FlowFileError(f'{path} holds {mask.dtype} {mask.shape}; expected uint8 '
                            '(height, width)')
    return mask
