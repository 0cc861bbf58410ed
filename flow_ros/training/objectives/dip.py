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

"""What DIP is trained to minimise."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Generator

from flow_ros.training.augment import Batch
from flow_ros.training.losses import sequence_loss
from flow_ros.training.objectives.base import (
    Autocast,
    chance,
    channels_last,
    Losses,
    losses_of,
    warm_prior,
)
from flow_ros.training.recipe import Recipe


class DipObjective:
    """DIP's: equations 8 and 9 over the 4N flows of N iterations, from a random start."""

    def __init__(self, recipe: Recipe, autocast: Autocast = nullcontext) -> None:
        self.recipe, self.autocast = recipe, autocast

    def __call__(self, network: Any, batch: Batch, random: Generator, *,
                 exponent: float = 1.0) -> Losses:
        """Return the losses of one batch."""
        recipe, (count, _, height, width) = self.recipe, batch.flow.shape
        prior, noise = None, None
        if chance(recipe.warm, random):
            prior = warm_prior(network, batch, random, real=recipe.warm_real,
                               autocast=self.autocast)
        else:
            shape = (count, 2, -(-height // 16), -(-width // 16))
            noise = [(torch.rand(shape, generator=random) * 32 - 16).to(batch.flow.device)]
        image1, image2 = channels_last(batch.image1), channels_last(batch.image2)
        with self.autocast():
            flows = network.predictions(image1, image2, iterations=recipe.iterations,
                                        prior_flow=prior, noise=noise,
                                        checkpointed=recipe.checkpointed)
        levels = [(1, flow.float()) for flow in flows[:-1]]
        flow = flows[-1].float()
        loss = sequence_loss(levels, flow, batch.flow, recipe.gamma, exponent)
        return losses_of({'sequence': loss}, flow, batch.flow)
