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

"""What DIP-RT is trained to minimise."""

from contextlib import nullcontext
from typing import Any

from torch import Generator

from flow_ros.training.augment import Batch
from flow_ros.training.losses import (
    matching_loss,
    mixture_of_laplace,
    occlusion_loss,
    sequence_loss,
)
from flow_ros.training.objectives.base import (
    Autocast,
    between,
    chance,
    channels_last,
    Losses,
    losses_of,
    warm_prior,
)
from flow_ros.training.recipe import Recipe


class DipRtObjective:
    """DIP-RT's: the sequence of flows, the matching, the flow's errors, and occlusion."""

    def __init__(self, recipe: Recipe, autocast: Autocast = nullcontext) -> None:
        self.recipe, self.autocast = recipe, autocast

    def __call__(self, network: Any, batch: Batch, random: Generator, *,
                 exponent: float = 1.0) -> Losses:
        """Return the losses of one batch with a schedule drawn by ``random``."""
        recipe = self.recipe
        prior, steps16, steps8 = None, between(2, 4, random), between(2, 4, random)
        if chance(recipe.warm, random):
            prior = warm_prior(network, batch, random, real=recipe.warm_real,
                               autocast=self.autocast)
            longest = float(prior.abs().amax(dim=(1, 2, 3)).median())
            if longest < network.config.warm_level_px:
                steps16 = 0
            steps8 = between(1, 3, random)
        elif chance(0.04, random):
            steps8 = 0  # so that the finest level's first mask serves a cut schedule
        image1, image2 = channels_last(batch.image1), channels_last(batch.image2)
        with self.autocast():
            seen = network.predictions(image1, image2, steps16=steps16, steps8=steps8,
                                       prior_flow=prior)
        flow, error = seen.flow.float(), seen.error.float()
        levels = [(level, value.float()) for level, value in seen.levels]
        parts = {
            'sequence': sequence_loss(levels, flow, batch.flow, recipe.gamma, exponent),
            'matching': recipe.matching * matching_loss(
                seen.matches, batch.flow, batch.occlusion, network.config.radius),
            'mixture': 0.2 * mixture_of_laplace(flow, error, batch.flow)}
        if batch.occlusion is not None:
            parts['occlusion'] = 0.5 * occlusion_loss(
                seen.occlusion.float(), batch.occlusion, known=batch.occlusion_known)
        return losses_of(parts, flow, batch.flow)
