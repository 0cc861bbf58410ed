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

"""The measures of a flow against the truth: endpoint errors and shares of outliers.

Pure numpy. Everything is a mean over the pixels whose truth is valid. A pixel whose truth is
valid but whose estimate is NaN is *missing*: it counts as an outlier, is left out of the mean
errors, and its share is reported, so that an estimator gains nothing by leaving pixels out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

OUTLIER_PX = 3.0
OUTLIER_SHARE = 0.05
REMOVED: NDArray[np.float64] = np.arange(100) / 100.0
"""The shares of pixels removed at the points of a sparsification curve: 0 to 99 %."""

# The names of all measures, in the order of tables, with their titles.
TITLES: Mapping[str, str] = {
    'epe': 'EPE',
    'fl_all': 'Fl-all %',
    'outliers_1px': '1px %',
    's0_10': 's0-10',
    's10_40': 's10-40',
    's40_plus': 's40+',
    'epe_noc': 'EPE noc',
    'epe_occ': 'EPE occ',
    'fl_noc': 'Fl noc %',
    'fl_occ': 'Fl occ %',
    'd0_10': 'd0-10',
    'd10_60': 'd10-60',
    'd60_140': 'd60-140',
    'missing': 'missing %',
    'ausc': 'AUSC',
    'ause': 'AUSE',
}

SPEEDS: Mapping[str, tuple[float, float]] = {
    's0_10': (0.0, 10.0), 's10_40': (10.0, 40.0), 's40_plus': (40.0, np.inf)}
DISTANCES: Mapping[str, tuple[float, float]] = {
    'd0_10': (0.0, 10.0), 'd10_60': (10.0, 60.0), 'd60_140': (60.0, 140.0)}


def endpoint_error(estimate: NDArray[Any], truth: NDArray[Any]) -> FloatArray:
    """Return the endpoint error (H, W) in px; NaN where either flow is NaN."""
    if estimate.shape != truth.shape or truth.ndim != 3 or truth.shape[2] != 2:
        raise ValueError(f'estimate and truth must both be (H, W, 2); seen {estimate.shape} '
                         f'and {truth.shape}')
    difference = estimate.astype(np.float32) - truth.astype(np.float32)
    return np.asarray(np.hypot(difference[..., 0], difference[..., 1]), dtype=np.float32)


def correct(estimate: NDArray[Any], truth: NDArray[Any]) -> BoolArray:
    """Return where (H, W) the error is at most max(3 px, 5 %); False where it is NaN."""
    speed = np.hypot(truth[..., 0], truth[..., 1])
    with np.errstate(invalid='ignore'):
        return np.asarray(endpoint_error(estimate, truth)
                          <= np.maximum(OUTLIER_PX, OUTLIER_SHARE * speed), dtype=np.bool_)


def flow_metrics(estimate: NDArray[Any], truth: NDArray[Any], *,
                 valid: BoolArray | None = None, occlusion: BoolArray | None = None,
                 boundary_distance: NDArray[Any] | None = None) -> dict[str, float]:
    """Return the measures of ``TITLES`` that can be computed, by name.

    ``estimate`` and ``truth`` are (H, W, 2) px, invalid NaN; ``valid`` (H, W) narrows the
    truth further. ``occlusion`` (H, W), True where occluded, adds the split into occluded
    and not; ``boundary_distance`` (H, W), px to the nearest boundary, the rings around
    boundaries. Shares are in %. A measure with no pixels is NaN.
    """
    error = endpoint_error(estimate, truth)
    known = np.isfinite(truth).all(axis=2)
    if valid is not None:
        known &= valid
    good = correct(estimate, truth)
    speed = np.hypot(truth[..., 0], truth[..., 1])
    found = np.isfinite(error)
    with np.errstate(invalid='ignore'):
        within_1px = error <= 1.0

    def mean_error(where: NDArray[Any]) -> float:
        return _mean(error[known & found & where])

    def outliers(where: NDArray[Any], inlier: BoolArray) -> float:
        return 100.0 * _mean(~inlier[known & where])

    everywhere = np.ones_like(known)
    result = {'epe': mean_error(everywhere),
              'fl_all': outliers(everywhere, good),
              'outliers_1px': outliers(everywhere, within_1px)}
    for name, (low, high) in SPEEDS.items():
        with np.errstate(invalid='ignore'):
            result[name] = mean_error((speed >= low) & (speed < high))
    if occlusion is not None:
        result['epe_noc'] = mean_error(~occlusion)
        result['epe_occ'] = mean_error(occlusion)
        result['fl_noc'] = outliers(~occlusion, good)
        result['fl_occ'] = outliers(occlusion, good)
    if boundary_distance is not None:
        for name, (low, high) in DISTANCES.items():
            result[name] = mean_error((boundary_distance >= low) & (boundary_distance < high))
    result['missing'] = outliers(everywhere, found)
    return result


def mean_metrics(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every measure over the rows (pairs) that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, [])
            if np.isfinite(value):
                values[name].append(value)
    order = [name for name in TITLES if name in values]
    order += [name for name in values if name not in TITLES]
    return {name: _mean(np.array(values[name])) for name in order}


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64)) if values.size else float('nan')


@dataclass(frozen=True)
class CalibrationBin:
    """One row of a reliability table."""

    low: float
    high: float
    pixels: int
    confidence: float
    share_correct: float


@dataclass
class Calibration:
    """How far confidence keeps its promise, counted over any number of pairs.

    The promise: among pixels with confidence p, a share p has an endpoint error of at most
    max(3 px, 5 %). ``add`` counts a pair, ``bins_filled`` is the reliability table and
    ``error`` the expected calibration error: the mean, over pixels, of the distance between
    the confidence and the share correct of a pixel's bin.
    """

    bins: int = 10
    pixels: NDArray[np.int64] = field(init=False)
    confidence_sum: NDArray[np.float64] = field(init=False)
    correct_sum: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        """Start with nothing counted."""
        self.pixels = np.zeros(self.bins, dtype=np.int64)
        self.confidence_sum = np.zeros(self.bins)
        self.correct_sum = np.zeros(self.bins)

    def add(self, confidence: NDArray[Any], estimate: NDArray[Any],
            truth: NDArray[Any]) -> None:
        """Count the pixels of a pair: confidence (H, W), flows (H, W, 2)."""
        if confidence.shape != truth.shape[:2]:
            raise ValueError(f'confidence must be {truth.shape[:2]}, as the truth is; '
                             f'seen {confidence.shape}')
        known = np.isfinite(truth).all(axis=2) & np.isfinite(confidence)
        values = confidence[known].astype(np.float64)
        good = correct(estimate, truth)[known].astype(np.float64)
        index = np.clip((values * self.bins).astype(np.int64), 0, self.bins - 1)
        self.pixels += np.bincount(index, minlength=self.bins)
        self.confidence_sum += np.bincount(index, weights=values, minlength=self.bins)
        self.correct_sum += np.bincount(index, weights=good, minlength=self.bins)

    @property
    def error(self) -> float:
        """The expected calibration error, 0 (kept) to 1; NaN if nothing was counted."""
        total = int(self.pixels.sum())
        if not total:
            return float('nan')
        return float(np.abs(self.confidence_sum - self.correct_sum).sum() / total)

    @property
    def bins_filled(self) -> tuple[CalibrationBin, ...]:
        """The reliability table: the bins that hold pixels."""
        return tuple(
            CalibrationBin(low=k / self.bins, high=(k + 1) / self.bins,
                           pixels=int(self.pixels[k]),
                           confidence=float(self.confidence_sum[k] / self.pixels[k]),
                           share_correct=float(self.correct_sum[k] / self.pixels[k]))
            for k in range(self.bins) if self.pixels[k])


@dataclass
class Sparsification:
    """How well confidence ranks errors, over any number of pairs (Ilg et al., ECCV 2018).

    The least confident pixels are removed first; ``curve`` is the mean endpoint error of the
    rest over that of all pixels, at each share of ``REMOVED``, and ``oracle`` is that curve
    where the largest errors are removed first: none is lower. Both are means over pairs. Pixels
    without truth, estimate or confidence are left out; those of one confidence count evenly.
    ``ausc`` is the area under ``curve``, 1 for a confidence that knows nothing; ``ause`` that
    between the curves, 0 for a perfect ranking. Areas are means over ``REMOVED``.
    """

    pairs: int = 0
    curve_sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(REMOVED)))
    oracle_sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(REMOVED)))

    def add(self, confidence: NDArray[Any], estimate: NDArray[Any],
            truth: NDArray[Any]) -> dict[str, float]:
        """Count a pair: confidence (H, W), flows (H, W, 2); return its ``ausc`` and ``ause``.

        They are NaN, and the pair is not counted, where nothing is known or all is right.
        """
        if confidence.shape != truth.shape[:2]:
            raise ValueError(f'confidence must be {truth.shape[:2]}, as the truth is; '
                             f'seen {confidence.shape}')
        error = endpoint_error(estimate, truth)
        known = np.isfinite(error) & np.isfinite(confidence)
        values = error[known].astype(np.float64)
        total = float(values.sum())
        if not total > 0:
            return {'ausc': float('nan'), 'ause': float('nan')}
        kept = np.maximum((1 - REMOVED) * values.size, 1.0)

        def curve(counts: NDArray[Any], sums: NDArray[Any]) -> NDArray[np.float64]:
            # Pixels of one confidence are removed in no order: their errors count evenly.
            found = np.interp(kept, np.cumsum(counts), np.cumsum(sums))
            return np.asarray(found / kept * (values.size / total), dtype=np.float64)

        nothing = np.zeros(1)
        _, group, counts = np.unique(-confidence[known], return_inverse=True, return_counts=True)
        by_confidence = curve(np.append(nothing, counts),
                              np.append(nothing, np.bincount(group, weights=values)))
        by_error = curve(np.append(nothing, np.ones(values.size)),
                         np.append(nothing, np.sort(values)))
        self.pairs += 1
        self.curve_sum += by_confidence
        self.oracle_sum += by_error
        return {'ausc': float(by_confidence.mean()),
                'ause': float((by_confidence - by_error).mean())}

    @property
    def curve(self) -> NDArray[np.float64]:
        """The mean error of the rest over that of all, at each share removed; NaN of nothing."""
        return self.curve_sum / (self.pairs or np.nan)

    @property
    def oracle(self) -> NDArray[np.float64]:
        """The lowest curve there can be."""
        return self.oracle_sum / (self.pairs or np.nan)

    @property
    def ausc(self) -> float:
        """The area under the curve."""
        return float(self.curve.mean())

    @property
    def ause(self) -> float:
        """The area between the curve and the oracle's."""
        return float((self.curve - self.oracle).mean())
