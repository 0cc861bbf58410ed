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

"""What the flow of one pair says of the next: the warm start, and whether there is one.

Half of the work for it needs nothing of the next frame: whether the flow explains the frames it
leads between, and, forwards, where it carries itself. ``settle`` does that half ahead of time:
when the flow is out, and nobody waits. What was not settled is so when it is asked for, with the
same result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
import torch

from flow_ros.networks.base import CellFlow, FlowOutput
from flow_ros.streaming.scene_cut import explains
from flow_ros.streaming.warm_start import carry, FlowSamples, sample_flow

Small = NDArray[np.float32]
"""A frame as ``explains`` takes it."""


@dataclass(frozen=True)
class PairFlow:
    """The flow of a pair in one direction, from a frame to the one it leads to."""

    samples: FlowSamples
    small_from: Small
    small_to: Small
    dt_s: float

    @classmethod
    def of(cls, output: FlowOutput, *, cell: int, small_from: Small, small_to: Small,
           dt_s: float) -> 'PairFlow':
        """Take of ``output`` what is needed: its maps may be overwritten after that."""
        samples = sample_flow(output.flow, cell=cell, confidence=output.confidence,
                              occlusion=output.occlusion)
        return cls(samples, small_from, small_to, dt_s)


@dataclass(frozen=True)
class _Settled:
    """A flow that explains its frames; ``ahead`` is its prior for a pair that takes as long."""

    samples: FlowSamples
    dt_s: float
    ahead: CellFlow | None


class Past:
    """The flow of the last pair, by direction. Not for threads: its owner has the lock.

    ``cold_reason`` is why there is none where ``flows`` is empty.
    """

    def __init__(self, flows: Mapping[str, PairFlow] | None = None, *,
                 cold_reason: str = '') -> None:
        self.cold_reason = cold_reason
        self._open = dict(flows or {})
        # None is a direction whose flow did not explain its frames.
        self._settled: dict[str, _Settled | None] = {}

    @property
    def settled(self) -> bool:
        """Tell whether nothing is left to be done before the next frame."""
        return not self._open

    @property
    def to_settle(self) -> int:
        """How many values the largest flow has that is not settled."""
        return max((pair.samples.flow.numel() for pair in self._open.values()), default=0)

    def settle(self) -> None:
        """Do what needs nothing of the next frame."""
        for direction in list(self._open):
            pair = self._open[direction]
            samples = pair.samples
            settled = None
            if explains(CellFlow(samples.flow, samples.cell, samples.size), pair.small_from,
                        pair.small_to):
                # Backwards, where things land depends on the time until the next frame.
                ahead = (carry(samples, direction=direction) if direction == 'forward' else None)
                settled = _Settled(samples, pair.dt_s, ahead)
            self._settled[direction] = settled
            del self._open[direction]  # only now: where it failed, it is done again

    def prior(self, direction: str, *, small_from: Small, small_to: Small,
              dt_s: float) -> tuple[CellFlow | None, str]:
        """Return the prior flow of the next pair, or None and why there is none.

        The pair takes ``dt_s``, and its flow leads from the first small image to the second.
        """
        self.settle()
        if direction not in self._settled:
            return None, 'direction changed' if self._settled else self.cold_reason
        settled = self._settled[direction]
        if settled is None:
            return None, 'scene cut'
        time_ratio = dt_s / settled.dt_s
        prior = settled.ahead
        if prior is None:
            prior = carry(settled.samples, direction=direction, time_ratio=time_ratio)
        elif time_ratio != 1:
            prior = replace(prior, flow=prior.flow * time_ratio)
        if not explains(prior, small_from, small_to):
            return None, 'scene cut'
        return prior, ''

    def to(self, device: torch.device) -> 'Past':
        """Return the same on another device, settled."""
        self.settle()
        moved = Past(cold_reason=self.cold_reason)
        for direction, settled in self._settled.items():
            moved._settled[direction] = settled and replace(
                settled, samples=settled.samples.to(device),
                ahead=settled.ahead and settled.ahead.to(device))
        return moved
