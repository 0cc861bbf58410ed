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

"""Flow and image files: what is written is read, and no damaged file gives a picture."""

from pathlib import Path
import struct

import cv2
import numpy as np
import pytest

from flow_ros.flow_io import (
    FlowFileError,
    read_flow,
    read_image,
    read_mask,
    write_flow,
    write_image,
)


def some_flow(height: int = 7, width: int = 11) -> np.ndarray:
    # Multiples of 1/64 px, so that the KITTI format keeps them exactly.
    values = np.random.default_rng(1).integers(-5000, 5000, (height, width, 2))
    return (values / 64.0).astype(np.float32)


def test_flo_has_the_published_layout(tmp_path: Path) -> None:
    flow = np.array([[[1.5, -2.0], [0.0, 4.0], [8.0, 16.0]]], dtype=np.float32)
    write_flow(tmp_path / 'a.flo', flow)
    data = (tmp_path / 'a.flo').read_bytes()
    assert struct.unpack('<fii6f', data) == (202021.25, 3, 1, 1.5, -2.0, 0.0, 4.0, 8.0, 16.0)


def test_kitti_has_the_published_layout(tmp_path: Path) -> None:
    flow = np.array([[[1.0, -2.0], [np.nan, np.nan]]], dtype=np.float32)
    write_flow(tmp_path / 'a.png', flow)
    blue_first = cv2.imread(str(tmp_path / 'a.png'), cv2.IMREAD_UNCHANGED)
    assert blue_first.dtype == np.uint16
    assert blue_first.tolist() == [[[1, 32768 - 128, 32768 + 64], [0, 0, 0]]]


@pytest.mark.parametrize('suffix', ['.flo', '.png', '.pfm'])
def test_round_trip_keeps_flow_and_invalid(tmp_path: Path, suffix: str) -> None:
    flow = some_flow()
    flow[2, 3] = np.nan
    flow[4, 5, 1] = np.nan  # half known is unknown
    valid = np.ones(flow.shape[:2], dtype=bool)
    valid[6] = False
    before = flow.copy()
    write_flow(tmp_path / f'a{suffix}', flow, valid)
    np.testing.assert_array_equal(flow, before)
    read, read_valid = read_flow(tmp_path / f'a{suffix}')
    expected_valid = valid.copy()
    expected_valid[2, 3] = expected_valid[4, 5] = False
    assert read.dtype == np.float32 and read.flags.c_contiguous
    np.testing.assert_array_equal(read_valid, expected_valid)
    np.testing.assert_array_equal(read[read_valid], flow[expected_valid])
    assert np.isnan(read[~read_valid]).all()


def test_pfm_has_the_published_layout(tmp_path: Path) -> None:
    flow = np.array([[[1.5, -2.0]], [[0.0, 4.0]]], dtype=np.float32)
    write_flow(tmp_path / 'a.pfm', flow)
    header, values = (tmp_path / 'a.pfm').read_bytes().split(b'-1.0\n')
    assert header == b'PF\n1 2\n'
    assert struct.unpack('<6f', values) == (0.0, 4.0, 0.0, 1.5, -2.0, 0.0)  # from below
    for other in (b'PF\n1 two\n-1.0\n', b'PF\n0 2\n-1.0\n'):
        (tmp_path / 'b.pfm').write_bytes(other + values)
        with pytest.raises(FlowFileError, match=r'b\.pfm is damaged'):
            read_flow(tmp_path / 'b.pfm')
    (tmp_path / 'b.pfm').write_bytes(b'Pf\n2 3\n-1.0\n' + values)  # grey: a disparity
    with pytest.raises(FlowFileError, match='three channels'):
        read_flow(tmp_path / 'b.pfm')


def test_flo_unknown_values_of_others(tmp_path: Path) -> None:
    values = (1e9, 0.0, 1.0, -2e9, 1666666752.0, 1666666752.0, 3.0, 4.0)
    (tmp_path / 'a.flo').write_bytes(struct.pack('<fii8f', 202021.25, 2, 2, *values))
    flow, valid = read_flow(tmp_path / 'a.flo')
    assert valid.tolist() == [[False, False], [False, True]]
    assert flow[1, 1].tolist() == [3.0, 4.0]
    assert np.isnan(flow[~valid]).all()


@pytest.mark.parametrize('suffix', ['.flo', '.png', '.pfm'])
def test_every_truncation_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f'a{suffix}'
    write_flow(path, some_flow())
    data = path.read_bytes()
    for length in range(0, len(data), 5):
        path.write_bytes(data[:length])
        with pytest.raises(FlowFileError, match=path.name):
            read_flow(path)


def test_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'a.png'
    write_flow(path, some_flow())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(FlowFileError, match='checksum'):
        read_flow(path)
    path.write_bytes(struct.pack('<fii', 202021.25, -4, 7))
    with pytest.raises(FlowFileError, match='-4x7'):
        read_flow(path)
    write_flow(tmp_path / 'b.flo', some_flow())
    (tmp_path / 'b.flo').write_bytes((tmp_path / 'b.flo').read_bytes() + b'more')
    with pytest.raises(FlowFileError, match='expected 628'):
        read_flow(tmp_path / 'b.flo')


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    frame = tmp_path / 'frame.png'
    write_image(frame, np.zeros((4, 5, 3), np.uint8))
    with pytest.raises(FlowFileError, match='8 bits and 3 channel'):
        read_flow(frame)
    (tmp_path / 'page.flo').write_text('<html>404</html>')
    with pytest.raises(FlowFileError, match=r'not a flow file: it starts with .*<html>'):
        read_flow(tmp_path / 'page.flo')
    with pytest.raises(FlowFileError, match='does not exist'):
        read_flow(tmp_path / 'none.flo')
    with pytest.raises(FlowFileError, match='folder'):
        read_flow(tmp_path)
    with pytest.raises(FlowFileError, match='not an image'):
        read_image(tmp_path / 'page.flo')


def test_flow_is_known_by_content_not_name(tmp_path: Path) -> None:
    write_flow(tmp_path / 'a.flo', some_flow())
    (tmp_path / 'a.flo').rename(tmp_path / 'b.png')
    np.testing.assert_array_equal(read_flow(tmp_path / 'b.png')[0], some_flow())


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'-512 to 511\.98 px; seen 0 to 600'):
        write_flow(tmp_path / 'a.png', np.array([[[0.0, 600.0]]]))
    with pytest.raises(ValueError, match='unknown'):
        write_flow(tmp_path / 'a.flo', np.array([[[0.0, 2e9]]]))
    with pytest.raises(ValueError, match=r'\(H, W, 2\); seen \(2, 4, 5\)'):
        write_flow(tmp_path / 'a.flo', np.zeros((2, 4, 5)))
    with pytest.raises(ValueError, match=r"seen suffix '\.tif'"):
        write_flow(tmp_path / 'a.tif', np.zeros((4, 5, 2)))
    with pytest.raises(ValueError, match='valid must be'):
        write_flow(tmp_path / 'a.flo', np.zeros((4, 5, 2)), np.ones((5, 4), bool))
    assert not list(tmp_path.iterdir())


def test_images_are_rgb(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    write_image(tmp_path / 'a.png', image)
    np.testing.assert_array_equal(read_image(tmp_path / 'a.png'), image)
    grey = image[..., 0]
    write_image(tmp_path / 'grey.png', grey)
    np.testing.assert_array_equal(read_image(tmp_path / 'grey.png'), np.dstack([grey] * 3))
    deep = (image.astype(np.uint16) << 8)[..., ::-1]
    cv2.imwrite(str(tmp_path / 'deep.png'), deep)
    np.testing.assert_array_equal(read_image(tmp_path / 'deep.png'), image)
    np.testing.assert_array_equal(read_mask(tmp_path / 'a.png'), (image != 0).any(axis=2))


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.ppm', '.webp'])
def test_truncated_images_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f'a{suffix}'
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    write_image(path, noise)
    assert read_image(path).shape == (64, 64, 3)
    data = path.read_bytes()
    for length in (0, 1, 9, len(data) // 3, len(data) // 2, len(data) - 2):
        path.write_bytes(data[:length])
        with pytest.raises(FlowFileError, match=path.name):
            read_image(path)
