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

"""The measures against values worked out by hand."""

import math

import numpy as np
import pytest

from flow_ros.evaluation import (
    Calibration,
    endpoint_error,
    flow_metrics,
    mean_metrics,
    Sparsification,
)
from flow_ros.evaluation.metrics import correct


def row(*vectors: tuple[float, float]) -> np.ndarray:
    """Return a flow one pixel high."""
    return np.array([vectors], dtype=np.float32)


def test_endpoint_error() -> None:
    error = endpoint_error(row((3, 4), (1, 1), (math.nan, 0)), row((0, 0), (1, 1), (0, 0)))
    np.testing.assert_array_equal(error, [[5, 0, math.nan]])
    with pytest.raises(ValueError, match=r'seen \(1, 2, 2\) and \(1, 3, 2\)'):
        endpoint_error(row((0, 0), (0, 0)), row((0, 0), (0, 0), (0, 0)))


def test_outliers_need_both_3_px_and_5_percent() -> None:
    truth = row((0, 0), (0, 0), (100, 0), (100, 0), (50, 0))
    estimate = row((3, 0), (3.1, 0), (104.9, 0), (105.1, 0), (52.9, 0))
    assert correct(estimate, truth).tolist() == [[True, False, True, False, True]]
    measures = flow_metrics(estimate, truth)
    assert measures['fl_all'] == pytest.approx(40.0)
    assert measures['outliers_1px'] == pytest.approx(100.0)
    assert measures['epe'] == pytest.approx((3 + 3.1 + 4.9 + 5.1 + 2.9) / 5, rel=1e-5)


def test_speeds_are_split_as_sintel_does() -> None:
    truth = row((6, 8), (0, 9.99), (40, 0), (0, 39.99))  # 10 and 40 belong above
    estimate = truth + np.array([[[1, 0], [2, 0], [4, 0], [8, 0]]], dtype=np.float32)
    measures = flow_metrics(estimate, truth)
    assert measures['s0_10'] == pytest.approx(2)
    assert measures['s10_40'] == pytest.approx((1 + 8) / 2)
    assert measures['s40_plus'] == pytest.approx(4)
    assert math.isnan(flow_metrics(row((1, 0)), row((1, 0)))['s40_plus'])


def test_only_valid_truth_counts() -> None:
    truth = row((0, 0), (math.nan, math.nan), (0, 0))
    estimate = row((2, 0), (1000, 0), (500, 0))
    assert flow_metrics(estimate, truth)['epe'] == pytest.approx(251)
    narrowed = flow_metrics(estimate, truth, valid=np.array([[True, True, False]]))
    assert narrowed['epe'] == pytest.approx(2)
    assert narrowed['fl_all'] == 0


def test_missing_estimates_are_outliers() -> None:
    measures = flow_metrics(row((0, 0), (math.nan, 0), (0, 0), (0, 2)), row(*[(0, 0)] * 4))
    assert measures['missing'] == 25
    assert measures['fl_all'] == 25
    assert measures['outliers_1px'] == 50
    assert measures['epe'] == pytest.approx(2 / 3)


def test_occlusion_and_boundary_splits() -> None:
    truth = row(*[(0, 0)] * 6)
    estimate = row((1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (32, 0))
    measures = flow_metrics(
        estimate, truth, occlusion=np.array([[0, 0, 0, 1, 1, 1]], dtype=bool),
        boundary_distance=np.array([[0, 9.9, 10, 60, 139.9, 140]], dtype=np.float32))
    assert measures['epe_noc'] == pytest.approx(7 / 3)
    assert measures['epe_occ'] == pytest.approx(56 / 3)
    assert measures['fl_noc'] == pytest.approx(100 / 3)
    assert measures['fl_occ'] == pytest.approx(100)
    assert measures['d0_10'] == pytest.approx(1.5)
    assert measures['d10_60'] == pytest.approx(4)
    assert measures['d60_140'] == pytest.approx(12)
    assert not {'epe_occ', 'd0_10'} & set(flow_metrics(estimate, truth))


def test_means_are_over_the_pairs_that_have_the_measure() -> None:
    means = mean_metrics([{'epe': 1.0, 's40_plus': math.nan, 'ms': 2.0},
                          {'epe': 3.0, 's40_plus': 5.0, 'ms': 4.0, 'epe_occ': 7.0}])
    assert means == {'epe': 2.0, 's40_plus': 5.0, 'epe_occ': 7.0, 'ms': 3.0}
    assert list(means) == ['epe', 's40_plus', 'epe_occ', 'ms']
    assert math.isnan(mean_metrics([{'s40_plus': math.nan}])['s40_plus'])


def test_calibration_by_hand() -> None:
    calibration = Calibration()
    assert math.isnan(calibration.error)
    truth = np.zeros((1, 10, 2), dtype=np.float32)
    estimate = truth.copy()
    estimate[0, :4, 0] = 10.0  # four wrong, six right
    calibration.add(np.full((1, 10), 0.62, np.float32), estimate, truth)
    assert calibration.error == pytest.approx(0.02, abs=1e-6)
    calibration.add(np.full((1, 10), 1.0, np.float32), truth, truth)  # all right, and sure
    assert calibration.error == pytest.approx(0.01, abs=1e-6)
    first, second = calibration.bins_filled
    assert (first.low, first.high, first.pixels) == (0.6, 0.7, 10)
    assert first.confidence == pytest.approx(0.62)
    assert first.share_correct == pytest.approx(0.6)
    assert (second.low, second.share_correct, second.pixels) == (0.9, 1.0, 10)


def test_calibration_of_sampled_confidence_is_small() -> None:
    generator = np.random.default_rng(3)
    confidence = generator.random((200, 300), dtype=np.float32)
    truth = np.zeros((200, 300, 2), dtype=np.float32)
    estimate = truth.copy()
    estimate[..., 1] = np.where(generator.random((200, 300)) < confidence, 0.5, 5.0)
    truth[0] = np.nan
    kept, broken = Calibration(), Calibration()
    kept.add(confidence, estimate, truth)
    broken.add(1 - confidence, estimate, truth)
    assert kept.pixels.sum() == 199 * 300
    assert kept.error < 0.02
    assert broken.error == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match=r'must be \(200, 300\)'):
        kept.add(confidence[:9], estimate, truth)


def test_sparsification_by_hand() -> None:
    truth = np.zeros((10, 10, 2), np.float32)
    estimate = truth.copy()
    estimate[..., 0] = np.arange(1, 101, dtype=np.float32).reshape(10, 10)  # errors 1 to 100
    perfect, blind, wrong = Sparsification(), Sparsification(), Sparsification()
    sure = -estimate[..., 0]
    measured = perfect.add(sure, estimate, truth)
    # After k of 100 pixels the mean error of the rest is (101 - k) / 2, of 50.5.
    assert perfect.curve == pytest.approx([(101 - k) / 101 for k in range(100)])
    assert measured['ausc'] == pytest.approx(perfect.ausc) == pytest.approx(51.5 / 101)
    assert measured['ause'] == pytest.approx(0) == pytest.approx(perfect.ause)
    blind.add(np.full((10, 10), 0.5), estimate, truth)  # of one confidence: any order is as good
    assert blind.curve == pytest.approx(np.ones(100))
    assert blind.ause == pytest.approx(1 - 51.5 / 101)
    wrong.add(-sure, estimate, truth)
    assert wrong.ausc > 1 > perfect.ausc
    assert wrong.oracle == pytest.approx(perfect.curve)


def test_sparsification_is_the_mean_over_pairs_that_have_errors() -> None:
    truth = np.zeros((10, 10, 2), np.float32)
    estimate = truth.copy()
    estimate[:5, :, 1] = 4.0
    truth[:, 0] = np.nan  # counts for nothing
    confidence = np.full((10, 10), 0.1)
    confidence[5:] = 0.9
    ranking = Sparsification()
    assert math.isnan(ranking.ausc)
    ranking.add(confidence, estimate, truth)
    assert ranking.curve[[0, 25, 50, 99]] == pytest.approx([1, 2 / 3, 0, 0])
    assert ranking.ause == pytest.approx(0)
    exact = ranking.add(confidence, np.nan_to_num(truth), truth)
    assert math.isnan(exact['ausc']) and math.isnan(exact['ause'])
    assert ranking.pairs == 1
    ranking.add(1 - confidence, estimate, truth)
    assert ranking.pairs == 2
    assert ranking.curve[25] == pytest.approx((2 / 3 + 4 / 3) / 2)
    with pytest.raises(ValueError, match='confidence must be'):
        ranking.add(np.zeros((3, 3)), estimate, truth)
