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

"""Measuring flow against the truth: pairs, measures, and the estimators to compare."""

from flow_ros.evaluation.evaluate import (
    baselines,
    DisFlow,
    Estimate,
    estimate_pair,
    Estimator,
    evaluate,
    network_estimator,
    PairResult,
    Report,
    zero_flow,
)
from flow_ros.evaluation.metrics import (
    Calibration,
    endpoint_error,
    flow_metrics,
    mean_metrics,
    Sparsification,
    TITLES,
)
from flow_ros.evaluation.pairs import find_pairs, LoadedPair, Pair, PairSource, Skipped

__all__ = [
    'baselines',
    'Calibration',
    'DisFlow',
    'endpoint_error',
    'Estimate',
    'estimate_pair',
    'Estimator',
    'evaluate',
    'find_pairs',
    'flow_metrics',
    'LoadedPair',
    'mean_metrics',
    'network_estimator',
    'Pair',
    'PairResult',
    'PairSource',
    'Report',
    'Skipped',
    'Sparsification',
    'TITLES',
    'zero_flow',
]
