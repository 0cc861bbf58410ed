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

"""Losses, each with the equation it comes from."""

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_PX = 400.0
"""Longer true flows are left out, as in RAFT's training."""


def sequence_loss(levels: list[tuple[int, Tensor]], final: Tensor, truth: Tensor,
                  gamma: float) -> Tensor:
    """Return DIP's equations 8 and 9: sum of gamma^(N-i-1) * mean |f_i - f_gt|, px.

    A prediction at 1/level is compared on its own grid with the truth at its cells' centres,
    times level: that spares upsampling each of them. ``final`` (B, 2, H, W), weight 1.
    """
    count = len(levels) + 1
    loss = _distance(final, truth)
    for index, (level, flow) in enumerate(levels):
        target = truth[..., level // 2::level, level // 2::level]
        loss = loss + gamma ** (count - index - 1) * _distance(level * flow, target)
    return loss


def matching_loss(matches: list[tuple[int, Tensor, Tensor]], truth: Tensor,
                  occlusion: Tensor, radius: int) -> Tensor:
    """Return the cross entropy of the search's costs against the true displacement.

    HD3's match density (its section 3.1) with a target of one bin: the softmax over the
    (2r+1)^2 costs should peak where the truth minus the flow so far, level px, rounds to.
    It teaches the features to match before the updates can read them: without it DIP-RT
    stayed at zero flow for its first thousands of pairs. Pixels that are occluded or out of
    reach are left out.
    """
    loss = truth.new_zeros(())
    side = 2 * radius + 1
    for level, costs, flow in matches:
        centre = (..., slice(level // 2, None, level), slice(level // 2, None, level))
        residual = (truth[centre] / level - flow).round()
        reached = (residual.abs() <= radius).all(dim=1) & ~occlusion[centre][:, 0]
        offset = residual.clamp(-radius, radius).long() + radius
        target = offset[:, 1] * side + offset[:, 0]
        entropy = functional.cross_entropy(SHARPNESS * costs.float(), target, reduction='none')
        loss = loss + (entropy * reached).sum() / reached.sum().clamp(min=1)
    return loss / max(len(matches), 1)


SHARPNESS = 3.0
"""What the costs are multiplied by before the softmax."""


def mixture_of_laplace(flow: Tensor, error: Tensor, truth: Tensor) -> Tensor:
    """Return the negative log likelihood of SEA-RAFT's equations 3 to 5, the flow fixed.

    ``error`` (B, 2, H, W): logit of the weight of the component of scale 1 px, log scale (px)
    of the other one, kept in [0, 6]. The flow gets no gradient: the head has to describe its
    errors, not to shape them.
    """
    distance = (flow.detach() - truth).abs()  # per component
    scale = error[:, 1:2].clamp(0, 6)
    sharp = functional.logsigmoid(error[:, :1]) - distance - _LOG_2
    wide = functional.logsigmoid(-error[:, :1]) - distance * torch.exp(-scale) - scale - _LOG_2
    return _masked_mean(-torch.logaddexp(sharp, wide), truth)


def occlusion_loss(logit: Tensor, occlusion: Tensor) -> Tensor:
    """Return the binary cross entropy of the occlusion logits (B, 1, H, W)."""
    return functional.binary_cross_entropy_with_logits(logit, occlusion.to(logit.dtype))


_LOG_2 = 0.6931471805599453


def _distance(flow: Tensor, truth: Tensor) -> Tensor:
    return _masked_mean((flow - truth).abs(), truth)


def _masked_mean(values: Tensor, truth: Tensor) -> Tensor:
    length = torch.hypot(truth[:, :1], truth[:, 1:])
    valid = (torch.isfinite(length) & (length < LARGEST_PX)).expand_as(values)
    return torch.where(valid, values, torch.zeros_like(values)).sum() / valid.sum().clamp(min=1)
