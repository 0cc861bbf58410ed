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

"""Losses against a true flow, each with the equation it comes from.

Flow is (B, 2, H, W) px. The truth is NaN where it is not known (sparse sets): such pixels count
for nothing, and they leave no NaN in any gradient. Where all truth is unknown a loss is 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_PX = 400.0
"""Longer true flows are left out, as in RAFT's training."""

SHARPNESS = 3.0
"""What the costs are multiplied by before the softmax of the matching loss."""

_LOG_2 = 0.6931471805599453
_TINY = 1e-12


def sequence_loss(levels: list[tuple[int, Tensor]], final: Tensor, truth: Tensor,
                  gamma: float, exponent: float = 1.0) -> Tensor:
    """Return DIP's equations 8 and 9: sum of gamma^(N-i-1) * mean |f_i - f_gt|, px.

    A prediction at 1/level is compared on its own grid with the truth at its cells' centres,
    times level: that spares upsampling each of them. ``final`` (B, 2, H, W), weight 1.

    An ``exponent`` q below 1 makes many small errors count more and few large ones less, as
    PWC-Net's robust loss for fine-tuning does (its equation 2): (|d| + 0.01)^q, here with |d|
    the mean over the components and divided by q, so that the slope at 1 px stays what it was.
    """
    count = len(levels) + 1
    loss = _distance(final, truth, exponent)
    for index, (level, flow) in enumerate(levels):
        target = truth[..., level // 2::level, level // 2::level]
        loss = loss + gamma ** (count - index - 1) * _distance(level * flow, target, exponent)
    return loss


def multi_scale_epe(levels: list[tuple[int, Tensor]], truth: Tensor,
                    weights: Sequence[float] | None = None, *,
                    exponent: float = 1.0) -> Tensor:
    """Return the endpoint error at several scales: sum over l of w_l * mean |f_l - f_gt|_2, px.

    FlowNet's and PWC-Net's training loss (PWC-Net equation 1, without its weight decay); with
    one level, MSCSL's equation 15, as a mean over the pixels instead of their sum. ``levels``:
    (level, flow (B, 2, H/level, W/level) in level px); the truth of a cell is the mean of what
    is known in it. ``weights``: one per level, default 1.
    An ``exponent`` q below 1 takes (error + 0.01)^q / q in the error's place, as
    ``sequence_loss`` does.
    """
    chosen = [1.0] * len(levels) if weights is None else list(weights)
    if len(chosen) != len(levels):
        raise ValueError(f'one weight per level is needed: seen {len(chosen)} weights for '
                         f'{len(levels)} levels')
    loss = truth.new_zeros(())
    for weight, (level, flow) in zip(chosen, levels):
        target = pool_truth(truth, level)
        error = endpoint_error(level * flow, target)
        if exponent != 1:
            error = (error + 0.01) ** exponent / exponent
        loss = loss + weight * _masked_mean(error, target)
    return loss


def pool_truth(truth: Tensor, level: int) -> Tensor:
    """Return the mean of the known truth of each cell of level x level px; NaN where none."""
    if level == 1:
        return truth
    known = torch.isfinite(truth).all(dim=1, keepdim=True)
    values = functional.avg_pool2d(torch.where(known, truth, 0.0), level)
    share = functional.avg_pool2d(known.to(truth.dtype), level)
    return torch.where(share > 0, values / share.clamp(min=_TINY), torch.nan)


def endpoint_error(flow: Tensor, truth: Tensor) -> Tensor:
    """Return |f - f_gt|_2 (B, 1, H, W); 0, without a gradient, where the truth is not known."""
    difference = flow - torch.where(_usable(truth), truth, flow.detach())
    squared = difference.square().sum(dim=1, keepdim=True)
    # The root has no gradient at 0.
    return torch.where(squared > _TINY, squared.clamp(min=_TINY).sqrt(), 0.0)


def max_pooled(losses: Tensor, valid: Tensor, keep: float, *,
               reached: Tensor | None = None) -> Tensor:
    """Return IOFPL's loss max-pooling, equation 4, the mean over the images of a batch.

    L = max {sum of w_x l_x : |w|_1 <= 1, |w|_inf <= 1 / (keep n)}: the share ``keep`` of an
    image's pixels with the highest losses gets the weight 1 / (keep n), the others 0. n counts
    the ``valid`` pixels, which is the rescaling for sparse truth. ``losses``, ``valid`` and
    ``reached`` are (B, 1, H, W); the loss of pixels that are not ``reached`` (their target lies
    out of the search range) is set to 0, so that outliers do not take all the weight.
    """
    if not 0 < keep <= 1:
        raise ValueError(f'the share of pixels kept must be in (0, 1]; seen {keep:g}')
    counted = valid if reached is None else valid & reached
    sorted_losses = torch.where(counted, losses, 0.0).flatten(1).sort(dim=1, descending=True)[0]
    kept = keep * valid.flatten(1).sum(dim=1, keepdim=True)  # (B, 1)
    rank = torch.arange(sorted_losses.shape[1], device=losses.device)[None]
    weights = (kept - rank).clamp(0, 1) / kept.clamp(min=1e-6)  # the last one a part of it
    seen = (kept > 0).sum().clamp(min=1)
    return (weights * sorted_losses).sum() / seen


def matching_loss(matches: list[tuple[int, Tensor, Tensor]], truth: Tensor,
                  occlusion: Tensor | None, radius: int) -> Tensor:
    """Return the cross entropy of the search's costs against the true displacement.

    HD3's match density (its section 3.1) with a target of one bin: the softmax over the
    (2r+1)^2 costs should peak where the truth minus the flow so far, level px, rounds to.
    It teaches the features to match before the updates can read them: without it DIP-RT
    stayed at zero flow for its first thousands of pairs. Pixels that are occluded (where the
    data know it), out of reach, or of unknown truth are left out.
    """
    loss = truth.new_zeros(())
    side = 2 * radius + 1
    for level, costs, flow in matches:
        centre = (..., slice(level // 2, None, level), slice(level // 2, None, level))
        residual = (truth[centre] / level - flow).round()
        reached = (residual.abs() <= radius).all(dim=1)  # False where it is NaN
        if occlusion is not None:
            reached = reached & ~occlusion[centre][:, 0]
        offset = residual.nan_to_num(0.0).clamp(-radius, radius).long() + radius
        target = offset[:, 1] * side + offset[:, 0]
        entropy = functional.cross_entropy(SHARPNESS * costs.float(), target, reduction='none')
        loss = loss + (entropy * reached).sum() / reached.sum().clamp(min=1)
    return loss / max(len(matches), 1)


def mixture_of_laplace(flow: Tensor, error: Tensor, truth: Tensor) -> Tensor:
    """Return the negative log likelihood of SEA-RAFT's equations 3 to 5, the flow fixed.

    ``error`` (B, 2, H, W): logit of the weight of the component of scale 1 px, log scale (px)
    of the other one, kept in [0, 6]. The flow gets no gradient: the head has to describe its
    errors, not to shape them.
    """
    flow = flow.detach()
    distance = (flow - torch.where(_usable(truth), truth, flow)).abs()  # per component
    scale = error[:, 1:2].clamp(0, 6)
    sharp = functional.logsigmoid(error[:, :1]) - distance - _LOG_2
    wide = functional.logsigmoid(-error[:, :1]) - distance * torch.exp(-scale) - scale - _LOG_2
    return _masked_mean(-torch.logaddexp(sharp, wide), truth)


def occlusion_loss(logit: Tensor, occlusion: Tensor | None, *,
                   known: Tensor | None = None) -> Tensor:
    """Return the binary cross entropy of the occlusion logits (B, 1, H, W).

    -[o log s(x) + (1 - o) log(1 - s(x))], a mean over the pixels, s the sigmoid. 0 where the
    data do not know the occlusion: all of it (None), or some pixels (not ``known``).
    ``occlusion`` may be a probability.
    """
    if occlusion is None:
        return logit.new_zeros(())
    target = occlusion.to(logit.dtype)
    if known is None:
        return functional.binary_cross_entropy_with_logits(logit, target)
    entropy = functional.binary_cross_entropy_with_logits(
        logit, torch.where(known, target, 0.0), reduction='none')
    return (entropy * known).sum() / known.sum().clamp(min=1)


def _distance(flow: Tensor, truth: Tensor, exponent: float = 1.0) -> Tensor:
    # Filled in before the difference: the gradient of |NaN| is NaN, masked or not.
    error = (flow - torch.where(_usable(truth), truth, flow.detach())).abs()
    if exponent != 1:
        error = (error.mean(dim=1, keepdim=True) + 0.01) ** exponent / exponent
    return _masked_mean(error, truth)


def _usable(truth: Tensor) -> Tensor:
    """Return (B, 1, H, W) bool: where the truth is known and not too long."""
    length = torch.hypot(truth[:, :1], truth[:, 1:])
    return torch.isfinite(length) & (length < LARGEST_PX)


def _masked_mean(values: Tensor, truth: Tensor) -> Tensor:
    valid = _usable(truth).expand_as(values)
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)
