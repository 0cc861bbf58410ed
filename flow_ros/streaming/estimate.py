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

"""One direction of one pair, and how it becomes a result."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flow_ros.networks.base import FlowOutput, State
from flow_ros.streaming.occlusion import check_consistency
from flow_ros.streaming.result import FlowResult
from flow_ros.streaming.transfer import flow_array, map_array, mask_array

REVERSE: Mapping[str, str] = {'forward': 'backward', 'backward': 'forward'}


@dataclass(frozen=True)
class Estimate:
    """One direction of one pair, on the device; ``ended`` as in ``FlowResult``."""

    output: FlowOutput
    state: State
    cold_reason: str
    ended: str = 'schedule'


def lacks(output: FlowOutput, outputs: frozenset[str]) -> bool:
    """Tell whether the network left out what was asked for."""
    return (('confidence' in outputs and output.confidence is None)
            or ('occlusion' in outputs and output.occlusion is None))


def complete(estimates: Mapping[str, Estimate],
             outputs: frozenset[str]) -> dict[str, Estimate]:
    """Add what the networks do not know and the two directions together tell."""
    completed = {}
    for way, estimate in estimates.items():
        output = estimate.output
        if len(estimates) == 2 and lacks(output, outputs):
            checked = check_consistency(output.flow, estimates[REVERSE[way]].output.flow)
            if output.confidence is None:
                output = replace(output, confidence=checked.confidence)
            if output.occlusion is None:
                output = replace(output, occlusion=checked.occluded.float())
        completed[way] = replace(estimate, output=output)
    return completed


def result_of(estimate: Estimate, *, direction: str, raw: FlowOutput, outputs: frozenset[str],
              stamp_previous: float, stamp: float,
              flow_out: NDArray[np.float32] | None) -> FlowResult:
    """Return the result for the receiver; ``raw`` is the output as the network gave it.

    ``flow_out`` (H, W, 2), contiguous, is where the flow goes, if it is given.
    """
    output = estimate.output
    confidence = occlusion = probability = None
    if 'confidence' in outputs and output.confidence is not None:
        confidence = map_array(output.confidence[0, 0])
    if 'occlusion' in outputs and output.occlusion is not None:
        occlusion = mask_array(output.occlusion[0, 0])
        if raw.occlusion is not None:
            probability = map_array(raw.occlusion[0, 0])
    return FlowResult(flow=flow_array(output.flow[0], flow_out), confidence=confidence,
                      occlusion=occlusion, occlusion_probability=probability,
                      steps=estimate.state.done, iterations=len(estimate.state.done),
                      warm=estimate.state.warm, cold_reason=estimate.cold_reason,
                      direction=direction, stamp_previous=stamp_previous, stamp=stamp,
                      dt_s=stamp - stamp_previous, timings_ms={}, ended=estimate.ended)
