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

"""What HD3 is trained to minimise, and what IOFPL changes about it."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from flow_ros.networks import create
from flow_ros.networks.base import FlowNetwork
from flow_ros.training.augment import Batch, degraded_prior
from flow_ros.training.density import density_loss
from flow_ros.training.distillation import distilled, pseudo_truth
from flow_ros.training.objectives.base import (
    Autocast,
    chance,
    channels_last,
    filled,
    Losses,
    losses_of,
    stream_prior,
)
from flow_ros.training.recipe import make_config, Recipe


@dataclass(frozen=True)
class HD3ObjectiveConfig:
    """The ``objective`` of a recipe for HD3; the defaults are HD3's own (its equation 9)."""

    keep: float | None = None
    """IOFPL's loss max-pooling (section 3.2): the share of pixels that count; None: all."""
    sparse: bool = False
    """The truth has holes (KITTI): the known part of each cell is averaged."""
    both: bool = True
    """Supervise the backward flow as well, where the batch has it: that of the procedural
    world. A sample of a data set is one direction, drawn by chance (``AugmentConfig.reverse``).
    """
    teacher: str | None = None
    """Weights of the model before this fine-tuning, for IOFPL's distillation (section 3.4)."""
    distillation: float = 0.1
    """Share of the distillation loss: 0.1 in the paper. Only with a teacher."""
    least_confidence: float = 0.5
    """What the teacher must think of its flow for it to be pseudo truth."""

    def __post_init__(self) -> None:
        """Refuse values outside the documented ones."""
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f'keep must be a share above 0 and at most 1, or left out; seen '
                             f'{self.keep:g}')
        for name in ('distillation', 'least_confidence'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f'{name} must be a share from 0 to 1; seen '
                                 f'{getattr(self, name):g}')


class HD3Objective:
    """HD3's: the divergence of the match densities of all levels from the true ones."""

    def __init__(self, recipe: Recipe, autocast: Autocast = nullcontext) -> None:
        self.recipe, self.autocast = recipe, autocast
        self.config: HD3ObjectiveConfig = make_config(HD3ObjectiveConfig, recipe.objective,
                                                      'objective')
        self._teacher: FlowNetwork | None = None
        if self.config.teacher is not None:
            self._teacher = create(recipe.network, Path(self.config.teacher), **recipe.options)

    def __call__(self, network: Any, batch: Batch, random: Generator, *,
                 exponent: float = 1.0) -> Losses:
        """Return the losses of one batch, from a cold or a warm start drawn by ``random``."""
        recipe, config = self.recipe, self.config
        prior = None
        if chance(recipe.warm, random):
            prior = self._prior(network, batch, random)
        image1, image2 = channels_last(batch.image1), channels_last(batch.image2)
        truth = batch.flow
        if config.both and batch.flow_back is not None:
            truth = torch.cat([batch.flow, batch.flow_back])
        with self.autocast():
            seen = network.predictions(image1, image2, prior_flow=prior,
                                       both=truth.shape[0] > batch.flow.shape[0])
        count = truth.shape[0]
        logits = [values[:count] for values in seen.logits]
        vectors = [values[:count] for values in seen.vectors]
        start = None if seen.prior is None else seen.prior[:count]
        loss = density_loss(logits, vectors, truth, sparse=config.sparse, keep=config.keep,
                            prior=start)
        flow = seen.flow[:batch.flow.shape[0]]
        if self._teacher is None:
            return losses_of({'density': loss}, flow, batch.flow)
        pseudo = self._pseudo_truth(image1, image2)
        # Without max-pooling, which would choose what survived the checks wrongly.
        learnt = density_loss([values[:len(pseudo)] for values in logits],
                              [values[:len(pseudo)] for values in vectors], pseudo, sparse=True,
                              prior=None if start is None else start[:len(pseudo)])
        share = 1 - config.distillation
        zero = torch.zeros_like(loss)
        return losses_of({'density': distilled(loss, zero, share),
                          'distillation': distilled(zero, learnt, share)}, flow, batch.flow)

    def _prior(self, network: FlowNetwork, batch: Batch, random: Generator) -> Tensor:
        """Return the prior of a warm start: some of them as they are on a stream."""
        if batch.previous is not None and chance(self.recipe.warm_real, random):
            return stream_prior(network, batch.previous, batch.image1, autocast=self.autocast)
        return degraded_prior(filled(batch.flow), random)

    @torch.no_grad()
    def _pseudo_truth(self, image1: Tensor, image2: Tensor) -> Tensor:
        """Return the teacher's flow (B, 2, H, W) where it stands its checks, else NaN."""
        assert self._teacher is not None
        teacher = self._teacher.to(image1.device)
        with self.autocast():
            forward, backward = teacher(image1, image2), teacher(image2, image1)
        return pseudo_truth(forward.flow.float(), backward.flow.float(), forward.confidence,
                            least_confidence=self.config.least_confidence)
