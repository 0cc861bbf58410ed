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

"""The layout of pairs in folders."""

from pathlib import Path

import numpy as np
import pytest

from flow_ros.evaluation import find_pairs
from flow_ros.evaluation.pairs import boundary_distance
from flow_ros.flow_io import FlowFileError, write_flow, write_image

SIZE = (12, 16)


def make_pair(folder: Path, flow_name: str | None = 'flow.flo', u: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    for name in ('frame1.png', 'frame2.png'):
        write_image(folder / name, np.zeros((*SIZE, 3), np.uint8))
    if flow_name is not None:
        write_flow(folder / flow_name, np.full((*SIZE, 2), u, np.float32))
    return folder


def test_pairs_are_found_at_any_depth(tmp_path: Path) -> None:
    make_pair(tmp_path / 'b' / 'deep' / 'one')
    make_pair(tmp_path / 'a', 'flow.png')
    make_pair(tmp_path / 'c' / 'no_truth', None)
    (make_pair(tmp_path / 'd') / 'frame2.png').unlink()
    (tmp_path / 'sequence').mkdir()
    (tmp_path / 'sequence' / '000.jpg').write_bytes(b'')
    (tmp_path / 'b' / 'back').symlink_to(tmp_path)  # a loop must end
    pairs, skipped = find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ['a', 'b/deep/one']
    assert [(row.name, row.reason) for row in skipped] == [
        ('c/no_truth', 'no truth (flow.flo or flow.png)'), ('d', 'no frame2.png')]
    assert [pair.flow.name for pair in pairs] == ['flow.png', 'flow.flo']


def test_the_folder_itself_may_be_a_pair(tmp_path: Path) -> None:
    pairs, _ = find_pairs(make_pair(tmp_path / 'alone'))
    assert [pair.name for pair in pairs] == ['alone']


def test_dense_truth_goes_before_sparse(tmp_path: Path) -> None:
    folder = make_pair(tmp_path / 'both', 'flow.png', u=1.0)
    write_flow(folder / 'flow.flo', np.full((*SIZE, 2), 2.0, np.float32))
    assert find_pairs(tmp_path)[0][0].load().truth[0, 0, 0] == 2.0


def test_maps_are_read(tmp_path: Path) -> None:
    folder = make_pair(tmp_path / 'a')
    occlusion = np.zeros(SIZE, np.uint8)
    occlusion[:3] = 255
    write_image(folder / 'occlusion.png', occlusion)
    boundary = np.zeros(SIZE, np.uint8)
    boundary[:, 4] = 1  # anything not black
    write_image(folder / 'boundary.png', boundary)
    loaded = find_pairs(tmp_path)[0][0].load()
    assert loaded.occlusion is not None and loaded.boundary_distance is not None
    np.testing.assert_array_equal(loaded.occlusion, occlusion > 0)
    np.testing.assert_allclose(loaded.boundary_distance[5], np.abs(np.arange(16) - 4))
    assert np.isinf(boundary_distance(np.zeros(SIZE, bool))).all()


def test_sizes_must_agree(tmp_path: Path) -> None:
    folder = make_pair(tmp_path / 'a')
    write_image(folder / 'frame2.png', np.zeros((12, 20, 3), np.uint8))
    pair, = find_pairs(tmp_path)[0]
    with pytest.raises(FlowFileError, match=r'frame2\.png is 20x12; expected 16x12'):
        pair.load()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FlowFileError, match='expected a folder of pairs; seen nothing'):
        find_pairs(tmp_path / 'none')
