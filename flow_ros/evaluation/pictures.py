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

"""One picture per evaluated pair: frame, truth, estimate, error."""

import numpy as np
from numpy.typing import NDArray

from flow_ros.evaluation.evaluate import Estimate
from flow_ros.evaluation.metrics import endpoint_error, flow_metrics
from flow_ros.evaluation.pairs import LoadedPair
from flow_ros.visualization import (
    confidence_to_color,
    error_to_color,
    flow_to_color,
    robust_max_px,
    strip,
)


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
