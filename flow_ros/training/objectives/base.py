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

"""What an objective is, and what objectives are made of."""

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
from flow_ros.training.losses import pool_truth

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
    drawn = chance(real, random)
    iterations = 2 if chance(0.5, random) else between(1, 4, random)
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
    return carry(samples, direction='forward').full


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


def between(low: int, high: int, random: Generator) -> int:
    """Return a whole number, ``low`` to ``high``."""
    return int(torch.randint(low, high + 1, (1,), generator=random))


def chance(share: float, random: Generator) -> bool:
    """Return True in a ``share`` of all cases."""
    return float(torch.rand(1, generator=random)) < share
