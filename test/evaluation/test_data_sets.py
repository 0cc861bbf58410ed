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

"""Readers of data sets, on small trees in the sets' own layouts and formats."""

from collections.abc import Callable
from pathlib import Path
import struct
import sys

import cv2
import numpy as np
import pytest

from flow_ros.evaluation import evaluate
from flow_ros.evaluation.data_sets import (
    data_set_names,
    DataSet,
    DataSetError,
    open_data_set,
    Sample,
)
from flow_ros.evaluation.data_sets.base import occlusion_from_flows
from flow_ros.flow_io import FlowFileError, write_flow, write_image

SIZE = (12, 16)
NAN = np.float32(np.nan)


def image(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def shifted(u: float, v: float = 0.0, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.tile(np.array([u, v], np.float32), (*size, 1))


def put_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, pixels)


def put_flow(path: Path, flow: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_flow(path, flow)


def put_mask(path: Path, mask: np.ndarray) -> None:
    put_image(path, np.where(mask, 255, 0).astype(np.uint8))


def put_array(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


def first_rows(count: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[:count] = True
    return mask


def right_columns(count: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[:, SIZE[1] - count:] = True
    return mask


# The trees. Each holds two samples or more of its default split; the first one's truth is
# u = 2 to the right, by which the two columns on the right leave the image.

def chairs(root: Path) -> Path:
    for number in (1, 2, 3):
        stem = root / 'data' / f'{number:05d}'
        put_image(Path(f'{stem}_img1.ppm'), image(number))
        put_image(Path(f'{stem}_img2.ppm'), image(number + 10))
        put_flow(Path(f'{stem}_flow.flo'), shifted(2 * number))
    (root / 'FlyingChairs_train_val.txt').write_text('1\n2\n1\n')
    return root


def chairs2(root: Path) -> Path:
    for half in ('train', 'val'):
        for number in (0, 7):
            stem = str(root / half / f'{number:07d}')
            put_image(Path(stem + '-img_0.png'), image(1))
            put_image(Path(stem + '-img_1.png'), image(2))
            put_flow(Path(stem + '-flow_01.flo'), shifted(2))
            put_flow(Path(stem + '-flow_10.flo'), shifted(-2))
            put_mask(Path(stem + '-occ_01.png'), first_rows(3))
            put_mask(Path(stem + '-occ_10.png'), first_rows(1))
    return root


def things(root: Path) -> Path:
    for half in ('TRAIN', 'TEST'):
        for camera, side in (('left', 'L'), ('right', 'R')):
            for number in (6, 7):
                for name in ('clean', 'final'):
                    put_image(root / f'frames_{name}pass' / half / 'A' / '0000' / camera
                              / f'{number:04d}.png', image(number))
                for way, letter, sign in (('future', 'Future', 1), ('past', 'Past', -1)):
                    put_flow(root / 'optical_flow' / half / 'A' / '0000' / f'into_{way}' / camera
                             / f'OpticalFlowInto{letter}_{number:04d}_{side}.pfm',
                             shifted(2 * sign))
    return root


def things_subset(root: Path) -> Path:
    for number in (0, 1, 2):
        put_image(root / 'train' / 'image_clean' / 'left' / f'{number:07d}.png', image(number))
    for number in (0, 1):
        left = root / 'train' / 'flow' / 'left'
        put_flow(left / 'into_future' / f'{number:07d}.flo', shifted(2))
        put_flow(left / 'into_past' / f'{number + 1:07d}.flo', shifted(-2))
        put_mask(root / 'train' / 'flow_occlusions' / 'left' / 'into_future'
                 / f'{number:07d}.png', first_rows(2))
    return root


def sintel(root: Path) -> Path:
    for name in ('clean', 'final'):
        for number in (1, 2, 3):
            put_image(root / 'training' / name / 'alley_1' / f'frame_{number:04d}.png',
                      image(number))
    for number in (1, 2):
        file = f'alley_1/frame_{number:04d}'
        put_flow(root / 'training' / 'flow' / f'{file}.flo', shifted(2))
        put_mask(root / 'training' / 'occlusions' / f'{file}.png', first_rows(2))
        put_mask(root / 'training' / 'invalid' / f'{file}.png', first_rows(1))
    return root


def kitti(root: Path, frames: str) -> Path:
    for number in (0, 1):
        for time in (10, 11):
            put_image(root / 'training' / frames / f'{number:06d}_{time}.png', image(time))
        measured, visible = shifted(2), shifted(2)
        measured[::2] = NAN
        visible[::2] = NAN
        visible[:, -2:] = NAN  # what leaves the image is in flow_occ alone
        put_flow(root / 'training' / 'flow_occ' / f'{number:06d}_10.png', measured)
        put_flow(root / 'training' / 'flow_noc' / f'{number:06d}_10.png', visible)
    return root


def hd1k(root: Path) -> Path:
    for sequence, last in ((0, 2), (1, 1)):
        for number in range(last + 1):
            file = f'{sequence:06d}_{number:04d}.png'
            put_image(root / 'hd1k_input' / 'image_2' / file, image(number))
            flow = shifted(2)
            flow[5:] = NAN
            put_flow(root / 'hd1k_flow_gt' / 'flow_occ' / file, flow)
    return root


def middlebury(root: Path) -> Path:
    for name in ('Venus', 'Urban2'):
        for number in (10, 11):
            put_image(root / 'other-data' / name / f'frame{number}.png', image(number))
        flow = shifted(2)
        flow[0, 0] = NAN  # written as 1e10
        put_flow(root / 'other-gt-flow' / name / 'flow10.flo', flow)
    return root


def spring(root: Path) -> Path:
    h5py = pytest.importorskip('h5py')
    scene = root / 'train' / '0001'
    for number in (1, 2, 3):
        put_image(scene / 'frame_left' / f'frame_left_{number:04d}.png', image(number))
    twice = (2 * SIZE[0], 2 * SIZE[1])
    for way, sign, numbers in (('FW', 1, (1, 2)), ('BW', -1, (2, 3))):
        for number in numbers:
            flow = np.full((*twice, 2), 77.0, np.float32)  # what is between the frames' pixels
            flow[::2, ::2] = (2 * sign, 0)
            flow[0, 0] = NAN
            path = scene / f'flow_{way}_left' / f'flow_{way}_left_{number:04d}.flo5'
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, 'w') as file:
                file.create_dataset('flow', data=flow, compression='gzip')
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:3, :, 0] = 255  # covered
    pixels[:, -2:, 1] = 255  # out of the image
    put_image(scene / 'maps' / 'matchmap_flow_FW_left' / 'matchmap_flow_FW_left_0001.png', pixels)
    return root


def tartanair(root: Path) -> Path:
    place = root / 'office' / 'Easy' / 'P000'
    for number in (0, 1, 2):
        put_image(place / 'image_left' / f'{number:06d}_left.png', image(number))
    for number in (0, 1):
        stem = f'{number:06d}_{number + 1:06d}'
        mask = np.zeros(SIZE, np.uint8)
        mask[0], mask[1], mask[:, -2:] = 1, 10, 100
        put_array(place / 'flow' / f'{stem}_flow.npy', shifted(2))
        put_array(place / 'flow' / f'{stem}_mask.npy', mask)
    return root


def folders(root: Path) -> Path:
    for name in ('a', 'deep/b'):
        for frame in (1, 2):
            put_image(root / name / f'frame{frame}.png', image(frame))
        put_flow(root / name / 'flow.flo', shifted(2))
        put_mask(root / name / 'occlusion.png', first_rows(2))
    return root


TREES: dict[str, Callable[[Path], Path]] = {
    'chairs': chairs, 'chairs2': chairs2, 'things': things, 'things_clean': things,
    'things_final': things, 'sintel': sintel, 'sintel_clean': sintel, 'sintel_final': sintel,
    'kitti2012': lambda root: kitti(root, 'colored_0'),
    'kitti2015': lambda root: kitti(root, 'image_2'), 'hd1k': hd1k, 'middlebury': middlebury,
    'spring': spring, 'tartanair': tartanair, 'folders': folders,
}
LENGTHS = {'chairs': 2, 'chairs2': 2, 'things': 4, 'things_clean': 2, 'things_final': 2,
           'sintel': 4, 'hd1k': 3}


def known(sample: Sample) -> np.ndarray:
    return np.isfinite(sample.flow).all(axis=2)


def opened(name: str, root: Path) -> DataSet:
    return open_data_set(name, TREES[name](root))


def test_every_set_has_a_tree_here() -> None:
    assert set(TREES) == set(data_set_names())


@pytest.mark.parametrize('name', TREES)
def test_what_all_sets_promise(name: str, tmp_path: Path) -> None:
    data = opened(name, tmp_path)
    assert data.name == name and len(data) == LENGTHS.get(name, 2)
    for index in range(len(data)):
        sample = data.load(index)
        for frame in (sample.image1, sample.image2):
            assert frame.dtype == np.uint8 and frame.shape == (*SIZE, 3)
        assert sample.flow.dtype == np.float32 and sample.flow.shape == (*SIZE, 2)
        assert np.isnan(sample.flow).all(axis=2).tolist() == (~known(sample)).tolist()
        if sample.occlusion is not None and sample.occlusion_known is None:
            assert sample.occlusion[known(sample) & right_columns(2)].all()
    np.testing.assert_array_equal(data.load(0).flow[known(data.load(0))][:, 0], 2)
    np.testing.assert_array_equal(data.load(0).flow[known(data.load(0))][:, 1], 0)
    assert len({pair.name for pair in data.pairs()}) == len(data)


@pytest.mark.parametrize('name', TREES)
def test_wrong_folders_are_named_with_what_was_expected(name: str, tmp_path: Path) -> None:
    if name == 'spring':
        pytest.importorskip('h5py')
    other = 'sintel' if name in ('chairs', 'folders') else 'chairs'
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('')
    for root, seen in ((tmp_path / 'none', 'nothing'), (tmp_path / 'empty', 'empty|no pair'),
                       (tmp_path / 'file', 'file'), (TREES[other](tmp_path / 'other'), 'holds')):
        with pytest.raises(DataSetError, match=seen) as caught:
            open_data_set(name, root)
        assert str(root) in str(caught.value) and 'expected' in str(caught.value)


@pytest.mark.parametrize('name', [name for name in TREES if name not in ('tartanair', 'folders')])
def test_the_layout_that_was_expected_is_in_the_message(name: str, tmp_path: Path) -> None:
    if name == 'spring':
        pytest.importorskip('h5py')
    word = {'chairs': '_flow.flo', 'chairs2': '-flow_01.flo', 'spring': '.flo5',
            'middlebury': 'other-gt-flow', 'hd1k': 'hd1k_flow_gt'}.get(
                name, 'OpticalFlowIntoFuture' if 'things' in name else
                'training/clean' if 'sintel' in name else 'flow_occ')
    with pytest.raises(DataSetError, match=word):
        open_data_set(name, tmp_path)


def test_frames_are_in_order_and_rgb(tmp_path: Path) -> None:
    sample = opened('chairs', tmp_path).load(1)  # 00003: 00002 is validation
    np.testing.assert_array_equal(sample.image1, image(3))
    np.testing.assert_array_equal(sample.image2, image(13))
    assert sample.flow[0, 0, 0] == 6 and sample.occlusion is None


def test_chairs_splits(tmp_path: Path) -> None:
    chairs(tmp_path)
    assert [pair.name for pair in open_data_set('chairs', tmp_path).pairs()] == ['00001', '00003']
    assert [pair.name for pair in open_data_set('chairs', tmp_path, 'val').pairs()] == ['00002']
    assert len(open_data_set('chairs', tmp_path, 'all')) == 3
    with pytest.raises(DataSetError, match="splits train, val, all; seen 'test'"):
        open_data_set('chairs', tmp_path, 'test')
    (tmp_path / 'FlyingChairs_train_val.txt').write_text('1\n2\n')
    with pytest.raises(DataSetError, match='2 lines.*up to 00003'):
        open_data_set('chairs', tmp_path)
    (tmp_path / 'FlyingChairs_train_val.txt').unlink()
    with pytest.raises(DataSetError, match='no FlyingChairs_train_val.txt'):
        open_data_set('chairs', tmp_path)


def test_chairs2_knows_both_directions(tmp_path: Path) -> None:
    sample = opened('chairs2', tmp_path).load(0)
    np.testing.assert_array_equal(sample.occlusion, first_rows(3) | right_columns(2))
    back = sample.reversed()
    np.testing.assert_array_equal(back.flow, shifted(-2))
    np.testing.assert_array_equal(back.occlusion, first_rows(1) | right_columns(2)[:, ::-1])
    np.testing.assert_array_equal(back.image1, sample.image2)
    np.testing.assert_array_equal(back.reversed().occlusion, sample.occlusion)


def test_things_knows_the_future_and_the_past_of_both_cameras(tmp_path: Path) -> None:
    data = opened('things', tmp_path)
    assert [files.name for files in data.files] == [
        'clean/A/0000/left/0006', 'clean/A/0000/right/0006', 'final/A/0000/left/0006',
        'final/A/0000/right/0006']  # the last frame's future has no frame
    sample = data.load(0)
    np.testing.assert_array_equal(sample.backward, shifted(-2))
    # Both flows are exact: what follows from them is that nothing is covered.
    np.testing.assert_array_equal(sample.occlusion, right_columns(2))
    far = shifted(2)
    far[3, 4], far[5, 6] = (1500, 0), (0, -1000)
    put_flow(data.files[0].flow, far)
    assert np.argwhere(~known(data.load(0))).tolist() == [[3, 4], [5, 6]]
    assert len(open_data_set('things', tmp_path, 'test')) == 4


def test_the_subset_of_things(tmp_path: Path) -> None:
    data = open_data_set('things', things_subset(tmp_path))
    assert [files.name for files in data.files] == ['clean/left/0000000', 'clean/left/0000001']
    sample = data.load(1)
    np.testing.assert_array_equal(sample.occlusion, first_rows(2) | right_columns(2))
    np.testing.assert_array_equal(sample.image2, image(2))
    np.testing.assert_array_equal(sample.backward, shifted(-2))
    with pytest.raises(DataSetError, match='no frames of the final pass'):
        open_data_set('things_final', tmp_path)
    with pytest.raises(DataSetError, match='no folder val'):
        open_data_set('things', tmp_path, 'test')


def test_occlusion_from_two_exact_flows() -> None:
    # A square moves 4 px to the right over a still ground: it covers 4 columns.
    flow, backward = shifted(0), shifted(0)
    flow[3:7, 2:6] = (4, 0)
    backward[3:7, 6:10] = (-4, 0)
    expected = np.zeros(SIZE, bool)
    expected[3:7, 6:10] = True
    np.testing.assert_array_equal(occlusion_from_flows(flow, backward), expected)
    # The same, with the ground going to the left and the square standing still.
    flow, backward = shifted(-4), shifted(4)
    flow[3:7, 2:6] = backward[3:7, 2:6] = (0, 0)
    expected |= outside_left(4)
    expected[3:7, 2:6] = False
    np.testing.assert_array_equal(occlusion_from_flows(flow, backward), expected)


def outside_left(count: int) -> np.ndarray:
    return right_columns(count)[:, ::-1]


def test_sintel_invalid_is_unknown_and_occlusion_is_read(tmp_path: Path) -> None:
    sample = opened('sintel_final', tmp_path).load(0)
    np.testing.assert_array_equal(known(sample), ~first_rows(1))
    rows = first_rows(2) | (right_columns(2) & ~first_rows(1))
    np.testing.assert_array_equal(sample.occlusion, rows)
    assert sample.backward is None
    (tmp_path / 'training' / 'invalid' / 'alley_1' / 'frame_0001.png').unlink()
    assert known(open_data_set('sintel_final', tmp_path).load(0)).all()


@pytest.mark.parametrize('name', ['kitti2012', 'kitti2015'])
def test_kitti_is_occluded_where_only_flow_occ_knows(name: str, tmp_path: Path) -> None:
    sample = opened(name, tmp_path).load(0)
    measured = np.zeros(SIZE, bool)
    measured[1::2] = True
    np.testing.assert_array_equal(known(sample), measured)
    np.testing.assert_array_equal(sample.occlusion_known, measured)
    np.testing.assert_array_equal(sample.occlusion, measured & right_columns(2))
    np.testing.assert_array_equal(sample.image2, image(11))
    (tmp_path / 'training' / 'flow_noc' / '000000_10.png').unlink()
    assert open_data_set(name, tmp_path).load(0).occlusion is None


def test_kitti_2012_in_grey(tmp_path: Path) -> None:
    kitti(tmp_path, 'image_0')
    for path in (tmp_path / 'training' / 'image_0').iterdir():
        put_image(path, image(4)[..., 0])
    sample = open_data_set('kitti2012', tmp_path).load(0)
    np.testing.assert_array_equal(sample.image1, image(4)[..., :1].repeat(3, axis=2))


def test_hd1k_goes_from_frame_to_frame_within_a_sequence(tmp_path: Path) -> None:
    data = opened('hd1k', tmp_path)
    assert [(files.image1.stem, files.image2.stem) for files in data.files] == [
        ('000000_0000', '000000_0001'), ('000000_0001', '000000_0002'),
        ('000001_0000', '000001_0001')]
    sample = data.load(0)
    np.testing.assert_array_equal(known(sample), first_rows(5))
    assert sample.occlusion is None


def test_middlebury_unknown(tmp_path: Path) -> None:
    assert np.argwhere(~known(opened('middlebury', tmp_path).load(0))).tolist() == [[0, 0]]


def test_spring_is_read_on_the_grid_of_the_frames(tmp_path: Path) -> None:
    data = opened('spring', tmp_path)
    sample = data.load(0)
    assert np.argwhere(~known(sample)).tolist() == [[0, 0]]
    np.testing.assert_array_equal(sample.occlusion, first_rows(3) | right_columns(2))
    assert sample.backward is not None
    np.testing.assert_array_equal(sample.backward[1:], shifted(-2)[1:])
    # Without a map it follows from the two flows.
    second = data.load(1)
    assert second.occlusion is not None
    np.testing.assert_array_equal(second.occlusion[1:], right_columns(2)[1:])


def test_damaged_flo5(tmp_path: Path) -> None:
    h5py = pytest.importorskip('h5py')
    data = opened('spring', tmp_path)
    path = data.files[0].flow
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, len(whole) // 9):
        path.write_bytes(whole[:length])
        with pytest.raises(FlowFileError, match='cannot be read'):
            data.load(0)
    for name, shape, message in (('disparity', (24, 32), 'no data set "flow"; seen disparity'),
                                 ('flow', (24, 32), r'of shape \(24, 32\)'),
                                 ('flow', (20, 32, 2), 'is 32x20; expected 16x12')):
        with h5py.File(path, 'w') as file:
            file.create_dataset(name, data=np.zeros(shape, np.float32))
        with pytest.raises(FlowFileError, match=message):
            data.load(0)


def test_spring_without_h5py_names_the_package(tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    spring(tmp_path)
    monkeypatch.setitem(sys.modules, 'h5py', None)
    with pytest.raises(DataSetError, match='pip install h5py'):
        open_data_set('spring', tmp_path)


def test_tartanair_mask(tmp_path: Path) -> None:
    sample = opened('tartanair', tmp_path).load(0)
    np.testing.assert_array_equal(sample.occlusion, first_rows(2) | right_columns(2))
    # Out of the image, the flow of a still world is right; covered, it may be another's.
    np.testing.assert_array_equal(known(sample), ~(first_rows(2) & ~right_columns(2)))


@pytest.mark.parametrize('name', TREES)
def test_cut_off_and_resized_files_are_named(name: str, tmp_path: Path) -> None:
    data = opened(name, tmp_path)
    files = data.files[0]
    paths = [path for path in (files.image1, files.image2, files.flow, files.occlusion,
                               files.backward, files.extra) if path is not None]
    assert len(paths) >= 3
    for path in paths:
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) * 2 // 3])
        with pytest.raises(FlowFileError) as caught:
            data.load(0)
        assert str(path) in str(caught.value)
        path.write_bytes(whole)
    put_image(files.image2, image(3, (SIZE[0], SIZE[1] + 4)))
    with pytest.raises(FlowFileError, match=r'is 20x12; expected 16x12'):
        data.load(0)
    report = evaluate({'zero': lambda a, b: np.zeros((*a.shape[:2], 2), np.float32)},
                      data.pairs())
    # A sequence uses the frame twice.
    whole_ones = [other for other in data.files
                  if files.image2 not in (other.image1, other.image2)]
    assert [row.name for row in report.rows['zero']] == [other.name for other in whole_ones]
    assert report.skipped[0].name == files.name and '20x12' in report.skipped[0].reason


def test_flow_of_another_size_is_named(tmp_path: Path) -> None:
    data = opened('chairs', tmp_path)
    put_flow(data.files[0].flow, shifted(2, size=(10, 16)))
    with pytest.raises(FlowFileError, match=r'00001_flow\.flo is 16x10; expected 16x12'):
        data.load(0)


def test_truth_that_is_not_finite_is_unknown(tmp_path: Path) -> None:
    data = opened('tartanair', tmp_path)
    flow = shifted(2)
    flow[5, 5], flow[6, 6, 1] = np.nan, np.inf
    put_array(data.files[0].flow, flow)
    assert not known(data.load(0))[[5, 6], [5, 6]].any() and known(data.load(0))[5, 6]
    put_array(data.files[0].flow, flow * np.nan)
    with pytest.raises(FlowFileError, match='flow of a single pixel'):
        data.load(0)
    put_array(data.files[0].flow, flow[..., 0])
    with pytest.raises(FlowFileError, match=r'holds float32 \(12, 16\)'):
        data.load(0)


def test_missing_frames_are_said_when_the_set_is_opened(tmp_path: Path) -> None:
    (sintel(tmp_path) / 'training' / 'clean' / 'alley_1' / 'frame_0003.png').unlink()
    with pytest.raises(DataSetError, match=r'1 files are missing, the first is .*frame_0003'):
        open_data_set('sintel', tmp_path)
    assert len(open_data_set('sintel_final', tmp_path)) == 2


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(DataSetError, match="'kiti2015'; known are chairs, "):
        open_data_set('kiti2015', tmp_path)


def test_the_evaluation_takes_a_data_set(tmp_path: Path) -> None:
    data = opened('kitti2015', tmp_path)
    report = evaluate({'still': lambda a, b: np.zeros((*a.shape[:2], 2), np.float32)},
                      data.pairs())
    row = report.rows['still'][0]
    assert row.name == '000000' and row.metrics['epe'] == pytest.approx(2.0)
    assert row.metrics['epe_occ'] == pytest.approx(2.0)


def test_big_endian_and_bottom_up_pfm(tmp_path: Path) -> None:
    data = opened('things', tmp_path)
    rows = np.zeros((*SIZE, 3), '>f4')
    rows[-1, :, 0] = 7  # the last row of the file is the first of the image
    data.files[0].flow.write_bytes(b'PF\n16 12\n1.0\n' + rows.tobytes())
    assert data.load(0).flow[0, 3].tolist() == [7, 0] and data.load(0).flow[1, 3, 0] == 0
    assert struct.calcsize('>f') * rows.size == len(rows.tobytes())


def test_webp_frames(tmp_path: Path) -> None:
    data = opened('things_clean', tmp_path)
    frames = data.files[0].image1.parent
    for path in list(frames.iterdir()):
        pixels = cv2.imread(str(path))
        path.unlink()
        cv2.imwrite(str(path.with_suffix('.webp')), pixels, [cv2.IMWRITE_WEBP_QUALITY, 101])
    sample = open_data_set('things_clean', tmp_path).load(0)
    np.testing.assert_array_equal(sample.image1, image(6))
