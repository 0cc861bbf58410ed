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

"""HD3's loss: the divergence of a match density from the true one.

HD3 (Yin et al., CVPR 2019), section 3: at each level a network predicts, for each pixel, a
density over the (2r+1)^2 integer residuals to the previous level's flow. Where the paper is
silent this does what the authors' code was seen to do (see ``residual_target``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.match_density import radius_of
from flow_ros.training.losses import max_pooled


@dataclass(frozen=True)
class ResidualTarget:
    """The true residuals of a level: ``residual`` (B, 2, h, w), level px, not clamped.

    ``valid`` (B, 1, h, w): where it is known; ``reached``: where it lies within the search
    range.
    """

    residual: Tensor
    valid: Tensor
    reached: Tensor


def density_loss(logits: list[Tensor], vectors: list[Tensor], truth: Tensor, *,
                 sparse: bool = False, keep: float | None = None,
                 prior: Tensor | None = None) -> Tensor:
    """Return HD3's equation 9: the sum over the levels of mean KL(p_gt || p).

    KL = sum over d of p_gt(d) (log p_gt(d) - log p(d)). ``logits`` (B, (2r+1)^2, h, w), coarse
    to fine, each level twice as fine as the one before; ``vectors``: each level's whole flow
    (B, 2, h, w) in full-resolution px; ``truth`` (B, 2, H, W), NaN where it is not known.
    ``sparse`` says how the truth is brought to a level's size (see ``residual_target``).
    ``keep``: IOFPL's loss max-pooling with this share, which also leaves out what is out of
    the search range; without it the mean is over all pixels, known or not, as the authors did.
    ``prior`` (B, 2, h, w): what the first level started from, full-resolution px; None: zero.
    """
    loss = truth.new_zeros(())
    previous = prior
    for level_logits, vector in zip(logits, vectors):
        target = residual_target(truth, previous, _size(level_logits), sparse=sparse,
                                 radius=radius_of(level_logits.shape[1]))
        divergence = residual_divergence(level_logits, target)
        if keep is None:
            loss = loss + divergence.mean()
        else:
            loss = loss + max_pooled(divergence, target.valid, keep, reached=target.reached)
        previous = vector
    return loss


def residual_divergence(logits: Tensor, target: ResidualTarget) -> Tensor:
    """Return KL(target || softmax(logits)) of each pixel, (B, 1, h, w); 0 where not valid.

    The target is the density that is bilinear about the true residual, clamped to +-radius
    (``ops.match_density.splat``). As that has four bins, no map of the density's size is made
    but the softmax.
    """
    radius = radius_of(logits.shape[1])
    side = 2 * radius + 1
    shifted = target.residual.clamp(-radius, radius) + radius  # 0..2r
    lower = shifted.floor().clamp(max=side - 2)  # so that the bin above exists
    part = shifted - lower
    x, y = part[:, :1], part[:, 1:]
    weights = torch.cat([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], dim=1)
    first = (lower[:, 1:] * side + lower[:, :1]).long()  # (B, 1, h, w)
    bins = torch.cat([first, first + 1, first + side, first + side + 1], dim=1)
    # Over the last dimension: where the planes lie in memory if convolutions made them.
    log = functional.log_softmax(logits.float().permute(0, 2, 3, 1), dim=-1)  # (B, h, w, planes)
    cross = -(weights * log.gather(3, bins.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    entropy = -torch.special.xlogy(weights, weights)
    divergence = (cross - entropy).sum(dim=1, keepdim=True)
    return torch.where(target.valid, divergence, 0.0)


@torch.no_grad()
def residual_target(truth: Tensor, previous: Tensor | None, size: tuple[int, int], *,
                    radius: int = 4, sparse: bool = False) -> ResidualTarget:
    """Return the true residual at a level of ``size``.

    It is (truth - previous) / s, in level px, where s is the level's cell in px. Dense truth is
    resized bilinearly (a pixel into which unknown truth enters is not valid); of ``sparse``
    truth the known part of each cell is averaged. ``previous``: the coarser level's flow in
    full-resolution px, resized bilinearly; None at the first level.
    """
    if sparse:
        known = torch.isfinite(truth).all(dim=1, keepdim=True)
        share = functional.adaptive_avg_pool2d(known.to(truth.dtype), size)
        flow = functional.adaptive_avg_pool2d(torch.where(known, truth, 0.0), size)
        flow = torch.where(share > 0, flow / share.clamp(min=1e-12), torch.nan)
    else:
        flow = _resize(truth, size)
    valid = torch.isfinite(flow).all(dim=1, keepdim=True)
    if previous is not None:
        flow = flow - _resize(previous, size)
    residual = flow.nan_to_num(0.0) * (size[1] / truth.shape[-1])
    reached = (residual.abs() <= radius).all(dim=1, keepdim=True)
    return ResidualTarget(residual=residual, valid=valid, reached=reached)


def _resize(values: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(values, size=size, mode='bilinear', align_corners=True)


def _size(values: Tensor) -> tuple[int, int]:
    return values.shape[-2], values.shape[-1]
