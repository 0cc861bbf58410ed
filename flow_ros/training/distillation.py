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

"""Distillation: what a model knew before, kept where it can be checked, as pseudo truth.

IOFPL (Hofinger et al., ECCV 2020), section 3.4; its checks are in a supplement that is not
available, so those here are ours.
"""

import torch
from torch import Tensor

from flow_ros.streaming.occlusion import check_consistency

SUPERVISED_SHARE = 0.9
"""IOFPL's alpha."""


@torch.no_grad()
def pseudo_truth(flow: Tensor, backward: Tensor, confidence: Tensor | None = None, *,
                 least_confidence: float = 0.5) -> Tensor:
    """Return ``flow`` (B, 2, H, W) where it is to be trusted, else NaN.

    Trusted is what the flow of the other direction confirms (see ``check_consistency``) and
    what the teacher itself says, by its confidence (B, 1, H, W), that it is likely right.
    """
    trusted = ~check_consistency(flow, backward).occluded
    if confidence is not None:
        trusted = trusted & (confidence >= least_confidence)
    return torch.where(trusted, flow, torch.nan)


def distilled(supervised: Tensor, distillation: Tensor,
              share: float = SUPERVISED_SHARE) -> Tensor:
    """Return IOFPL's equation 7: L = a L_S + (1 - a) L_D, with a = 0.9.

    No loss max-pooling belongs in ``distillation``: it would choose what survived the checks
    wrongly.
    """
    return share * supervised + (1 - share) * distillation
