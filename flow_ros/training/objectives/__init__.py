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

"""What each network is trained to minimise: one objective per network.

An objective is made from a recipe and called with the network, a batch and a random generator;
it draws the schedule and the start, runs the network and returns its losses. A new network
adds its own to ``OBJECTIVES``.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

from flow_ros.networks import family_of
from flow_ros.training.objectives.base import (
    Autocast,
    channels_last,
    filled,
    Losses,
    losses_of,
    Objective,
    stream_prior,
    warm_prior,
)
from flow_ros.training.objectives.dip import DipObjective
from flow_ros.training.objectives.dip_rt import DipRtObjective
from flow_ros.training.objectives.hd3 import HD3Objective
from flow_ros.training.objectives.mscsl import MSCSLObjective
from flow_ros.training.recipe import Recipe

OBJECTIVES: Mapping[str, Callable[[Recipe, Autocast], Objective]] = {
    'dip_rt': DipRtObjective, 'dip': DipObjective, 'hd3': HD3Objective,
    'mscsl': MSCSLObjective}


def make_objective(recipe: Recipe, autocast: Autocast = nullcontext) -> Objective:
    """Return the objective of the recipe's network; raises ValueError where there is none."""
    family = family_of(recipe.network)
    if family not in OBJECTIVES:
        raise ValueError(f'there is no training objective for network {recipe.network!r}; '
                         f'there is one for {", ".join(OBJECTIVES)}')
    return OBJECTIVES[family](recipe, autocast)


__all__ = ['channels_last', 'filled', 'Losses', 'losses_of', 'make_objective', 'Objective',
           'OBJECTIVES', 'stream_prior', 'warm_prior']
