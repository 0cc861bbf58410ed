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

"""Occlusion and confidence from the two directions, for networks that know neither.

Flow there and back must cancel: F(x) + B(x + F(x)) = 0 where both are right and the point is
seen in both frames (Sundaram et al., ECCV 2010, with its constants).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flow_ros.ops.sampling import inside, warp

ALPHA = 0.01
BETA = 0.5
"""px squared: with ALPHA, the squared error that two right flows may show."""

BORDER = 0.5
"""px past the centres of the border's pixels: where their area, and so the image, ends."""


@dataclass(frozen=True)
class ConsistencyCheck:
    """What the other direction says of a flow, on the flow's own grid.

    ``occluded`` (B, 1, H, W) bool; ``confidence`` (B, 1, H, W) float in [0, 1].
    """

    occluded: Tensor
    confidence: Tensor


def check_consistency(flow: Tensor, other: Tensor) -> ConsistencyCheck:
    """Check ``flow`` (B, 2, H, W, px) against ``other``, the flow of the reverse direction.

    Occluded where |F + B(x + F)|^2 > ALPHA (|F|^2 + |B|^2) + BETA, where the target lies
    outside the image, and where the flow is not finite. Confidence is 1 / (1 + (e / e0)^2)
    with the error e = |F + B(x + F)| and e0 = max(3 px, 5 % of |F|), the errors by which
    confidence is defined: 1/2 where the disagreement is just that large. It is 0 where the
    target is outside, since nothing speaks for those; it has not been calibrated on data.
    """
    if flow.shape != other.shape or flow.ndim != 4 or flow.shape[1] != 2:
        raise ValueError(f'both flows must be (B, 2, H, W) of one shape; seen '
                         f'{tuple(flow.shape)} and {tuple(other.shape)}')
    back = warp(other, flow)
    squared_error = (flow + back).square().sum(dim=1, keepdim=True)
    squared_flow = flow.square().sum(dim=1, keepdim=True)
    allowed = ALPHA * (squared_flow + back.square().sum(dim=1, keepdim=True)) + BETA
    leaves = ~inside(flow, BORDER)
    # Not (error <= allowed), so that NaN counts as occluded.
    occluded = ~(squared_error <= allowed) | leaves
    tolerated = (0.05 ** 2 * squared_flow).clamp(min=3.0 ** 2)
    confidence = 1 / (1 + squared_error / tolerated)
    confidence = torch.where(leaves, 0.0, torch.nan_to_num(confidence))
    return ConsistencyCheck(occluded=occluded, confidence=confidence)
