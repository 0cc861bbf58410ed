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

"""Pictures of an evaluation: each pair, and how well confidence ranks errors."""

from collections.abc import Mapping
import math

import cv2
import numpy as np
from numpy.typing import NDArray

from flow_ros.evaluation.evaluate import Estimate
from flow_ros.evaluation.metrics import endpoint_error, flow_metrics, REMOVED, Sparsification
from flow_ros.evaluation.pairs import LoadedPair
from flow_ros.visualization import (
    add_label,
    confidence_to_color,
    error_to_color,
    flow_to_color,
    robust_max_px,
    strip,
)

CURVE_COLORS = ((20, 90, 170), (200, 70, 30), (40, 140, 60), (130, 60, 160), (160, 120, 20),
                (80, 80, 80))
PLOT_SIZE = (380, 620)  # (height, width) of the plot, px, the legend not counted
MARGIN = 40


def sparsification_picture(rankings: Mapping[str, Sparsification]) -> NDArray[np.uint8]:
    """Return the curves of all estimators (bold), and of their oracles (thin), as RGB.

    To the right: the share of pixels removed, the least confident first, 0 to 99 %; upwards:
    the mean error of the rest over that of all, from 0; the grid has steps of 10 % and 0.2.
    """
    shown = {name: ranking for name, ranking in rankings.items() if ranking.pairs}
    legend = MARGIN + 16 * len(shown)
    height, width = PLOT_SIZE[0] + legend, PLOT_SIZE[1]
    picture = np.full((height, width, 3), 255, dtype=np.uint8)
    top = max([1.0, *(float(ranking.curve.max()) for ranking in shown.values())])
    top = 0.2 * math.ceil(top / 0.2 - 1e-9)

    def place(share: float, value: float) -> tuple[int, int]:
        return (round(MARGIN + share * (width - 2 * MARGIN)),
                round(height - MARGIN - value / top * (PLOT_SIZE[0] - MARGIN)))

    def write(text: str, at: tuple[int, int], color: tuple[int, int, int]) -> None:
        cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, color, 1, cv2.LINE_AA)

    for step in range(11):
        cv2.line(picture, place(step / 10, 0), place(step / 10, top), (225, 225, 225), 1)
        x, y = place(step / 10, 0)
        write(f'{10 * step}', (x - 8, y + 16), (60, 60, 60))
    for step in range(round(top / 0.2) + 1):
        cv2.line(picture, place(0, 0.2 * step), place(1, 0.2 * step), (225, 225, 225), 1)
        x, y = place(0, 0.2 * step)
        write(f'{0.2 * step:.1f}', (x - 30, y + 4), (60, 60, 60))
    for number, (name, ranking) in enumerate(shown.items()):
        color = CURVE_COLORS[number % len(CURVE_COLORS)]
        for values, thickness in ((ranking.oracle, 1), (ranking.curve, 2)):
            points = np.array([place(float(share), float(value))
                               for share, value in zip(REMOVED, values)], dtype=np.int32)
            cv2.polylines(picture, [points], False, color, thickness, cv2.LINE_AA)
        write(f'{name}: AUSC {ranking.ausc:.3f}, AUSE {ranking.ause:.3f}',
              (MARGIN, MARGIN + 16 * number), color)
    return add_label(picture, 'error of the rest (1: all) over % removed, least confident first; '
                     'thin: oracle')


def pair_strip(pair: LoadedPair, estimate: Estimate) -> NDArray[np.uint8]:
    """Return frame 1, truth, estimate (colours of one scale), error, confidence if known."""
    max_px = robust_max_px(pair.truth)
    measures = flow_metrics(estimate.flow, pair.truth)
    error = endpoint_error(estimate.flow, pair.truth)
    pictures = [pair.image1, flow_to_color(pair.truth, max_px),
                flow_to_color(estimate.flow, max_px), error_to_color(error)]
    labels = ['frame 1', f'truth, full colour {max_px:.1f} px', 'estimate',
              f'error: EPE {measures["epe"]:.2f} px, Fl {measures["fl_all"]:.1f} %']
    if estimate.confidence is not None:
        pictures.append(confidence_to_color(estimate.confidence))
        labels.append('confidence')
    return strip(pictures, labels)
