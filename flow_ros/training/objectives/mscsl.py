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

"""What MSCSL is trained to minimise."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from flow_ros.networks.mscsl import SCALES
from flow_ros.ops.sampling import inside, resize_flow, warp
from flow_ros.training.augment import Batch
from flow_ros.training.losses import matching_loss, multi_scale_epe
from flow_ros.training.objectives.base import (
    Autocast,
    between,
    chance,
    channels_last,
    Losses,
    losses_of,
)
from flow_ros.training.recipe import make_config, Recipe

_TINY = 1e-6


@dataclass(frozen=True)
class MSCSLObjectiveConfig:
    """What ``objective`` of a recipe for MSCSL may hold."""

    reconstruction: float = 0.0
    """The paper's lambda, equation 14: 0.005 for 'full', 0 for 'wor' and 'wosr'."""
    scale_dropout: float = 0.25
    """Share of batches that leave the finest 1 to 3 scales out; this project's."""
    refinement: float = 0.0
    """'wosr': weight of each coarser prediction's endpoint error, as in FlowNet's training."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if not 0 <= self.scale_dropout <= 1:
            raise ValueError(f'scale_dropout must be a share from 0 to 1; seen '
                             f'{self.scale_dropout}')
        for name in ('reconstruction', 'refinement'):
            if not getattr(self, name) >= 0:
                raise ValueError(f'{name} must be at least 0; seen {getattr(self, name)}')


class MSCSLObjective:
    """Equations 14 to 16, as means over the pixels, and a matching loss.

    The paper's: the endpoint error, and lambda times the reconstruction error of the second
    convolution's map. This project's: the recipe's ``matching`` times the cross entropy of the
    four correlations against the true displacement (``losses.matching_loss``; 0 is the paper),
    and the scales left out at random, which make a budget of fewer scales usable.
    """

    def __init__(self, recipe: Recipe, autocast: Autocast = nullcontext) -> None:
        self.recipe, self.autocast = recipe, autocast
        self.config: MSCSLObjectiveConfig = make_config(MSCSLObjectiveConfig, recipe.objective,
                                                        'objective')

    def __call__(self, network: Any, batch: Batch, random: Generator, *,
                 exponent: float = 1.0) -> Losses:
        """Return the losses of one batch, with as many scales as ``random`` says."""
        scales, config = len(SCALES), self.config
        if chance(config.scale_dropout, random):
            scales = between(1, len(SCALES) - 1, random)
        with self.autocast():
            seen = network.predictions(channels_last(batch.image1), channels_last(batch.image2),
                                       scales=scales)
        flow = seen.flow.float()
        parts = {'epe': multi_scale_epe([(1, flow)], batch.flow, exponent=exponent)}
        if config.refinement and seen.coarser:
            coarser = [(level, value.float()) for level, value in seen.coarser]
            parts['refinement'] = config.refinement * multi_scale_epe(
                coarser, batch.flow, exponent=exponent)
        if self.recipe.matching:
            parts['matching'] = self.recipe.matching * correlation_loss(
                seen.matches, batch.flow, batch.occlusion)
        if config.reconstruction:
            map_a, map_b = seen.maps
            parts['reconstruction'] = config.reconstruction * reconstruction_loss(
                map_a.float(), map_b.float(), flow)
        return losses_of(parts, flow, batch.flow)


def correlation_loss(matches: list[tuple[int, Tensor, int]], truth: Tensor,
                     occlusion: Tensor | None) -> Tensor:
    """Return the matching loss of MSCSL's correlations, which are all about zero flow.

    The mean over the scales of ``losses.matching_loss``. ``matches``: (level, correlation
    (B, (2r+1)^2, H/level, W/level), r). Pixels whose truth, in level px, rounds to more than r
    are left out, as are occluded ones and those of unknown truth.
    """
    loss = truth.new_zeros(())
    for level, correlation, radius in matches:
        still = correlation.new_zeros((correlation.shape[0], 2, *correlation.shape[-2:]),
                                      dtype=truth.dtype)
        loss = loss + matching_loss([(level, correlation, still)], truth, occlusion, radius)
    return loss / max(len(matches), 1)


def reconstruction_loss(map_a: Tensor, map_b: Tensor, flow: Tensor) -> Tensor:
    """Return equation 16: mean |Y_A - W(Y_B, flow)|_2 of the second convolution's maps.

    The length over the channels, a mean over the pixels whose target lies in the image: the
    paper's sum samples zeros there, which would reward flow for pointing inside. ``flow``
    (B, 2, H, W) px, resized to the maps' (B, C, H/4, W/4). As in the paper all of the network
    is its to change, the maps too.
    """
    small = resize_flow(flow, (map_a.shape[-2], map_a.shape[-1]))
    squared = (map_a - warp(map_b, small)).square().sum(dim=1, keepdim=True)
    length = squared.clamp(min=_TINY).sqrt()
    seen = inside(small)
    return torch.where(seen, length, 0.0).sum() / seen.sum().clamp(min=1)
