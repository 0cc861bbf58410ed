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

"""Estimators over pairs: numbers, report, and the numbers DIS is known by."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from flow_ros.evaluation import baselines, Estimate, evaluate, find_pairs
from flow_ros.evaluation.evaluate import DisFlow, to_grey
from flow_ros.evaluation.pictures import pair_strip, sparsification_picture
from flow_ros.evaluation.tables import report_tables
from flow_ros.flow_io import read_image, write_flow, write_image

SHIFT = 4
SHARED = Path(os.environ.get('FLOW_ROS_SHARED', Path(__file__).parents[3] / 'shared'))
# EPE px and Fl-all % of OpenCV 5 DIS medium on the shared pairs, measured independently.
DIS_KNOWN = {'middlebury/RubberWhale': (0.22, 0.2), 'middlebury/Grove3': (0.85, 8.1),
             'sintel/alley_1_final_0002': (0.33, 2.2), 'sintel/market_5_clean_0002': (17.65, 51.6),
             'kitti2015/000002': (0.97, 6.7), 'kitti2015/000007': (4.28, 21.8),
             'flyingchairs/0000003': (1.30, 9.2)}


def blobs(width: int) -> np.ndarray:
    """Return a smooth texture that DIS can follow."""
    y, x = np.mgrid[:96, :width].astype(np.float32)
    waves = [np.sin(x / a + k) * np.cos(y / b - k) for k, (a, b) in
             enumerate([(5, 7), (11, 4), (3, 13)])]
    return np.dstack([(127 + 40 * sum(waves) + 8 * c).clip(0, 255) for c in range(3)]).astype(
        np.uint8)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return two pairs, the texture moving SHIFT px left and right, one with occlusion."""
    texture = blobs(128 + SHIFT)
    for name, first, u in (('left', 0, -SHIFT), ('right', SHIFT, SHIFT)):
        folder = tmp_path / 'data' / name
        folder.mkdir(parents=True)
        write_image(folder / 'frame1.png', texture[:, first:first + 128])
        write_image(folder / 'frame2.png', texture[:, SHIFT - first:SHIFT - first + 128])
        flow = np.zeros((96, 128, 2), np.float32)
        flow[..., 0] = u
        flow[:10] = np.nan
        write_flow(folder / 'flow.flo', flow)
    occlusion = np.zeros((96, 128), np.uint8)
    occlusion[:, :SHIFT] = 255
    write_image(tmp_path / 'data' / 'left' / 'occlusion.png', occlusion)
    return tmp_path / 'data'


def always_left(image1: np.ndarray, image2: np.ndarray) -> Estimate:
    """Return the truth of 'left', with confidence that half of it is right."""
    flow = np.zeros((*image1.shape[:2], 2), np.float32)
    flow[..., 0] = -SHIFT
    return Estimate(flow, confidence=np.full(image1.shape[:2], 0.5, np.float32))


def test_report(data: Path) -> None:
    pairs, _ = find_pairs(data)
    seen = []
    report = evaluate({'mine': always_left, **baselines()}, pairs, warm_up=True,
                      on_pair=lambda pair, loaded, estimates: seen.append(
                          (pair.name, sorted(estimates))))
    assert seen == [(name, ['dis_medium', 'mine', 'zero']) for name in ('left', 'right')]
    assert report.names == ('mine', 'dis_medium', 'zero')
    left, right = report.rows['mine']
    assert (left.name, left.width, left.height) == ('left', 128, 96)
    assert left.metrics['epe'] == left.metrics['fl_all'] == left.metrics['epe_occ'] == 0
    assert right.metrics['epe'] == 2 * SHIFT and right.metrics['fl_all'] == 100
    assert 'epe_occ' not in right.metrics
    assert report.means()['epe'] == SHIFT
    assert report.means('zero')['epe'] == SHIFT
    # DIS sees the frames, in the right order and the right way round.
    assert [row.metrics['fl_all'] < 20 for row in report.rows['dis_medium']] == [True, True]
    assert set(report.calibrations) == {'mine'}
    assert report.calibrations['mine'].error == pytest.approx(0.0, abs=1e-6)


def test_json_schema(data: Path) -> None:
    report = evaluate({'mine': always_left, **baselines()}, find_pairs(data)[0])
    content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert content['estimator'] == 'mine'
    assert [row['name'] for row in content['pairs']] == ['left', 'right']
    for row in content['pairs']:
        assert {'name', 'epe', 'fl_all', 'outliers_1px', 's0_10', 'ms'} <= set(row)
        assert row['s40_plus'] is None  # no such pixels
        assert row['ms'] >= 0
    assert content['means']['epe'] == SHIFT
    assert set(content['baselines']) == {'dis_medium', 'zero'}
    assert content['baselines']['zero']['pairs'][1]['epe'] == SHIFT
    assert content['calibration']['bins'] == [
        {'low': 0.5, 'high': 0.6, 'pixels': 2 * 86 * 128, 'confidence': 0.5,
         'share_correct': 0.5}]
    assert content['skipped'] == []


def test_a_damaged_pair_is_skipped_with_its_reason(data: Path) -> None:
    path = data / 'left' / 'flow.flo'
    path.write_bytes(path.read_bytes()[:-8])
    report = evaluate({'mine': always_left}, find_pairs(data)[0])
    assert [row.name for row in report.rows['mine']] == ['right']
    skipped, = report.skipped
    assert skipped.name == 'left' and 'cut off' in skipped.reason
    assert report.as_dict()['skipped'][0]['name'] == 'left'


def test_bare_flow_is_an_estimate(data: Path) -> None:
    report = evaluate({'bare': lambda a, b: always_left(a, b).flow}, find_pairs(data)[0])
    assert report.means()['epe'] == SHIFT
    assert report.as_dict()['calibration'] is None


def cells_by_row(text: str) -> dict[str, list[str]]:
    rows = [line.replace('|', ' ').split() for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def test_tables_show_every_pair_and_estimator(data: Path) -> None:
    from rich.console import Console
    report = evaluate({'mine': always_left, **baselines()}, find_pairs(data)[0])
    console = Console(width=240, record=True, file=io.StringIO())
    for table in report_tables(report):
        console.print(table)
    text = console.export_text()
    rows = cells_by_row(text)
    assert rows['right'][:3] == ['8.00', '100.00', '100.00']
    assert {'left', 'mean', 'dis_medium', 'zero', '0.5-0.6'} <= set(rows)
    assert rows['zero'][0] == '4.00'


def knows_where(image1: np.ndarray, image2: np.ndarray) -> Estimate:
    """Return the truth of 'left' on the left half, nothing on the right, sure of the left."""
    height, width = image1.shape[:2]
    flow = np.zeros((height, width, 2), np.float32)
    flow[:, :width // 2, 0] = -SHIFT
    confidence = np.full((height, width), 0.2, np.float32)
    confidence[:, :width // 2] = 0.9
    return Estimate(flow, confidence=confidence)


def test_several_networks_stand_in_one_table(data: Path) -> None:
    from rich.console import Console
    report = evaluate({'one': knows_where, 'two': always_left, **baselines()},
                      find_pairs(data)[0], under_test=('one', 'two'))
    assert report.subjects == ('one', 'two')
    content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert set(content['networks']) == {'one', 'two'}
    assert set(content['baselines']) == {'dis_medium', 'zero'}
    for part, value in content['networks']['one'].items():
        assert content[part] == value  # the first one stands at the top too
    left, right = content['networks']['one']['pairs']
    assert left['ause'] == pytest.approx(0, abs=1e-6) and left['ausc'] < 0.5
    assert right['ausc'] > 1.2 and right['ause'] > 0.4
    # Sparsified on 'left' both stop at 0 where half is gone; 'two' is right, which ranks nothing.
    two = content['networks']['two']
    assert two['pairs'][0]['ausc'] is None and two['pairs'][1]['ausc'] == pytest.approx(1)
    assert two['sparsification']['pairs'] == 1
    curve = content['sparsification']
    assert curve['pairs'] == 2 and len(curve['removed']) == len(curve['curve']) == 100
    assert curve['ausc'] == pytest.approx(np.mean(curve['curve']), abs=1e-5)
    assert curve['ausc'] == pytest.approx(content['means']['ausc'], abs=1e-5)
    console = Console(width=240, record=True, file=io.StringIO())
    for table in report_tables(report):
        console.print(table)
    text = console.export_text()
    for words in ('means over 2 pairs', 'confidence of one', 'confidence of two', 'AUSC'):
        assert text.count(words) == 1
    assert '\n| estimator  | ' in text and '\n| one        | ' in text  # Markdown
    rows = cells_by_row(text)
    assert {'one', 'two', 'dis_medium', 'zero'} <= set(rows)
    assert rows['left'][:4] == ['2.00', '50.00', '0.00', '0.00']  # EPE and Fl of one, of two


def test_picture_of_the_sparsification(data: Path) -> None:
    report = evaluate({'one': knows_where, 'two': always_left}, find_pairs(data)[0])
    picture = sparsification_picture(report.sparsifications)
    assert picture.dtype == np.uint8 and picture.shape[1:] == (620, 3)
    alone = sparsification_picture({'one': report.sparsifications['one']})
    assert alone.shape[0] < picture.shape[0]  # a line of the legend less
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > len(
        np.unique(sparsification_picture({}).reshape(-1, 3), axis=0))


def test_picture_of_a_pair(data: Path) -> None:
    loaded = find_pairs(data)[0][0].load()
    picture = pair_strip(loaded, always_left(loaded.image1, loaded.image2))
    assert picture.shape == (96, 5 * 128, 3)
    frame, truth, estimate, error, _ = np.split(picture[40:], 5, axis=1)
    np.testing.assert_array_equal(frame, loaded.image1[40:])
    np.testing.assert_array_equal(truth, estimate)
    assert len(np.unique(error.reshape(-1, 3), axis=0)) == 1


def shared_pairs() -> Path:
    if not (SHARED / 'eval').is_dir():
        pytest.skip(f'no real pairs: {SHARED / "eval"} is not there (set FLOW_ROS_SHARED)')
    return SHARED / 'eval'


def test_grey_is_that_of_the_png_reader() -> None:
    import cv2
    for pair in find_pairs(shared_pairs())[0]:
        np.testing.assert_array_equal(to_grey(read_image(pair.frame1)),
                                      cv2.imread(str(pair.frame1), cv2.IMREAD_GRAYSCALE))


def test_known_numbers_of_dis_and_zero() -> None:
    pairs, skipped = find_pairs(shared_pairs())
    assert not skipped
    report = evaluate(baselines(), [pair for pair in pairs if pair.name in DIS_KNOWN])
    rows = {row.name: row.metrics for row in report.rows['dis_medium']}
    assert set(rows) == set(DIS_KNOWN)
    for name, (epe, fl) in DIS_KNOWN.items():
        # Other processors round otherwise, and DIS makes much of it where it is lost anyway.
        assert rows[name]['epe'] == pytest.approx(epe, rel=0.05, abs=0.02), name
        assert rows[name]['fl_all'] == pytest.approx(fl, rel=0.03, abs=0.15), name
    assert report.means('zero')['epe'] == pytest.approx(11.7, abs=0.05)


def test_dis_keeps_nothing_between_pairs(data: Path) -> None:
    left, right = (pair.load() for pair in find_pairs(data)[0])
    used = DisFlow()
    used(left.image1, left.image2)
    again = used(right.image1, right.image2)
    fresh = DisFlow()(right.image1, right.image2)
    assert isinstance(again, Estimate) and isinstance(fresh, Estimate)
    np.testing.assert_array_equal(again.flow, fresh.flow)
