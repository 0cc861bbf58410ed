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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional

from flow_ros.networks.base import FlowNetwork
from flow_ros.streaming.warm_start import carry, sample_flow
from flow_ros.training.augment import Batch, degraded_prior
from flow_ros.training.losses import (
    matching_loss,
    mixture_of_laplace,
    occlusion_loss,
    pool_truth,
    sequence_loss,
)
from flow_ros.training.recipe import Recipe

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Losses:
    """``total`` is the sum of ``parts``; ``epe`` is that of the last flow, px, NaN if unknown."""

    total: Tensor
    parts: Mapping[str, Tensor]
    epe: Tensor


class Objective(Protocol):
    """What ``OBJECTIVES`` make."""

    def __call__(self, network: FlowNetwork, batch: Batch, random: Generator, *,
                 exponent: float = 1.0) -> Losses:
        """Return the losses of ``batch``; ``exponent`` is the stage's."""


class DipRtObjective:
    """DIP-RT's: the sequence of flows, the matching, the flow's errors, and occlusion."""

    def __init__(self, recipe: Recipe, autocast: Autocast = nullcontext) -> None:
        self.recipe, self.autocast = recipe, autocast

    def __call__(self, network: Any, batch: Batch, random: Generator, *,
                 exponent: float = 1.0) -> Losses:
        """Return the losses of one batch with a schedule drawn by ``random``."""
        recipe = self.recipe
        prior, steps16, steps8 = None, _between(2, 4, random), _between(2, 4, random)
        if _chance(recipe.warm, random):
            prior = warm_prior(network, batch, random, real=recipe.warm_real,
                               autocast=self.autocast)
            longest = float(prior.abs().amax(dim=(1, 2, 3)).median())
            if longest < network.config.warm_level_px:
                steps16 = 0
            steps8 = _between(1, 3, random)
        elif _chance(0.04, random):
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


class DipObjective:
    """DIP's: equations 8 and 9 over the 4N flows of N iterations, from a random start."""

    def __init__(self, recipe: Recipe, autocast: Autocast = nullcontext) -> None:
        self.recipe, self.autocast = recipe, autocast

    def __call__(self, network: Any, batch: Batch, random: Generator, *,
                 exponent: float = 1.0) -> Losses:
        """Return the losses of one batch."""
        recipe, (count, _, height, width) = self.recipe, batch.flow.shape
        prior, noise = None, None
        if _chance(recipe.warm, random):
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


OBJECTIVES: Mapping[str, Callable[[Recipe, Autocast], Objective]] = {
    'dip_rt': DipRtObjective, 'dip': DipObjective}


def make_objective(recipe: Recipe, autocast: Autocast = nullcontext) -> Objective:
    """Return the objective of the recipe's network; raises ValueError where there is none."""
    if recipe.network not in OBJECTIVES:
        raise ValueError(f'there is no training objective for network {recipe.network!r}; '
                         f'there is one for {", ".join(OBJECTIVES)}')
    return OBJECTIVES[recipe.network](recipe, autocast)


def losses_of(parts: Mapping[str, Tensor], flow: Tensor, truth: Tensor) -> Losses:
    """Return the parts with their sum and the endpoint error where the truth is known."""
    total = torch.stack(list(parts.values())).sum()
    difference = flow.detach() - truth
    error = torch.hypot(difference[:, 0], difference[:, 1])
    return Losses(total=total, epe=error.nanmean(),
                  parts={name: part.detach() for name, part in parts.items()})


def warm_prior(network: FlowNetwork, batch: Batch, random: Generator, *, real: float,
               autocast: Autocast = nullcontext) -> Tensor:
    """Return the prior flow (B, 2, H, W) of a warm start: ``real`` of them as on a stream."""
    drawn = _chance(real, random)
    iterations = 2 if _chance(0.5, random) else _between(1, 4, random)
    if batch.previous is not None and drawn:
        return stream_prior(network, batch.previous, batch.image1, iterations=iterations,
                            autocast=autocast)
    return degraded_prior(filled(batch.flow), random)


@torch.no_grad()
def stream_prior(network: FlowNetwork, previous: Tensor, image1: Tensor, *,
                 iterations: int | None = None, autocast: Autocast = nullcontext) -> Tensor:
    """Return the network's flow from ``previous`` to ``image1``, carried on as on a stream.

    That is what ``FlowEstimator`` starts from: holes, wrong winners and all. The network does
    it as it is run, not as it is trained: batch norm uses and keeps its running statistics.
    """
    training = network.training
    network.eval()
    try:
        with autocast():
            state = network.start(network.encode(channels_last(previous)),
                                  network.encode(channels_last(image1)), iterations=iterations)
            while state.schedule:
                state = network.step(state)
            output = network.finish(state)
    finally:
        network.train(training)
    confidence, occlusion = (None if values is None else values.float()
                             for values in (output.confidence, output.occlusion))
    samples = sample_flow(output.flow.float(), cell=min(step.level for step in state.done),
                          confidence=confidence, occlusion=occlusion)
    return carry(samples, direction='forward')


def filled(flow: Tensor) -> Tensor:
    """Return ``flow`` (sides multiples of 16) with the mean of what is known near by for NaN."""
    known = torch.isfinite(flow).all(dim=1, keepdim=True)
    if bool(known.all()):
        return flow
    weight = known.to(flow.dtype).sum(dim=(2, 3), keepdim=True).clamp(min=1)
    mean = torch.where(known, flow, 0.0).sum(dim=(2, 3), keepdim=True) / weight
    result = mean.expand_as(flow)
    for cell in (16, 4, 1):
        near = functional.interpolate(pool_truth(flow, cell), scale_factor=float(cell))
        result = torch.where(torch.isfinite(near), near, result)
    return result


def channels_last(image: Tensor) -> Tensor:
    """Return ``image`` in the memory layout that convolutions are fastest in."""
    return image.contiguous(memory_format=torch.channels_last)


def _between(low: int, high: int, random: Generator) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=random))


def _chance(share: float, random: Generator) -> bool:
    return float(torch.rand(1, generator=random)) < share
