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

"""What may be changed of an estimator while it runs."""

from collections.abc import Iterable
from dataclasses import dataclass
import math

import numpy as np
from numpy.typing import NDArray

from flow_ros.streaming.budget import Budget

DIRECTIONS: tuple[str, ...] = ('forward', 'backward', 'both')
OUTPUTS: frozenset[str] = frozenset({'flow', 'confidence', 'occlusion'})


@dataclass(frozen=True)
class Order:
    """All that was asked of a frame as its work began: settings may change meanwhile.

    ``iterations`` as ``FlowNetwork.start`` takes them; times in ms, ``came`` in s by the clock;
    ``flow_out`` is where the flow of the first direction goes, if it is given.
    """

    iterations: int | None
    limit_ms: float | None
    early_stop_px: float
    direction: str
    outputs: frozenset[str]
    warm_start: bool
    came: float
    after_ms: float
    flow_out: NDArray[np.float32] | None

    @property
    def ways(self) -> tuple[str, ...]:
        """The directions that are results."""
        return ('forward', 'backward') if self.direction == 'both' else (self.direction,)


class Settings:
    """Attributes that check what they are given; a bad value raises, and leaves the old one."""

    def __init__(self, *, budget: Budget, early_stop_px: float, direction: str,
                 warm_start: bool, max_gap_s: float, outputs: Iterable[str]) -> None:
        self.budget = budget
        self.early_stop_px = early_stop_px
        self.direction = direction
        self.warm_start = warm_start
        self.max_gap_s = max_gap_s
        self.outputs = outputs

    @property
    def budget(self) -> Budget:
        """How much work one pair may cost."""
        return self._budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        if not isinstance(budget, Budget):
            raise ValueError(f'budget must be a Budget; seen {budget!r}: use '
                             f'Budget(iterations=...)')
        self._budget = budget

    @property
    def early_stop_px(self) -> float:
        """The update of a step, full-resolution px, under which its level is done; 0: none."""
        return self._early_stop_px

    @early_stop_px.setter
    def early_stop_px(self, px: float) -> None:
        if not (math.isfinite(px) and px >= 0):
            raise ValueError(f'early_stop_px must be at least 0 (0 for no early stop) and '
                             f'finite; seen {px}')
        self._early_stop_px = float(px)

    @property
    def direction(self) -> str:
        """One of 'forward', 'backward' and 'both'."""
        return self._direction

    @direction.setter
    def direction(self, direction: str) -> None:
        if direction not in DIRECTIONS:
            raise ValueError(f'direction must be one of {", ".join(DIRECTIONS)}; seen '
                             f'{direction!r}')
        self._direction = direction

    @property
    def max_gap_s(self) -> float:
        """The longest time between two frames of a pair."""
        return self._max_gap_s

    @max_gap_s.setter
    def max_gap_s(self, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f'max_gap_s must be positive; seen {seconds}')
        self._max_gap_s = seconds

    @property
    def outputs(self) -> frozenset[str]:
        """What is computed; flow always is."""
        return self._outputs

    @outputs.setter
    def outputs(self, outputs: Iterable[str]) -> None:
        asked = frozenset([outputs] if isinstance(outputs, str) else outputs)
        if not asked <= OUTPUTS:
            raise ValueError(f'outputs must be of {", ".join(sorted(OUTPUTS))}; seen '
                             f'{", ".join(sorted(asked - OUTPUTS))}')
        self._outputs = asked | {'flow'}

    def order(self, *, came: float, after_ms: float, settle_ms: float, period_s: float | None,
              flow_out: NDArray[np.float32] | None) -> Order:
        """Return what is asked of a frame now.

        ``settle_ms`` is what is done after the caller has its result and before the next frame:
        what keeps up with a camera needs time for it too.
        """
        budget = self._budget
        return Order(iterations=budget.iterations, limit_ms=budget.limit_ms(period_s), came=came,
                     after_ms=after_ms + (settle_ms if budget.rate else 0.0),
                     early_stop_px=self._early_stop_px, direction=self._direction,
                     outputs=self._outputs, warm_start=self.warm_start, flow_out=flow_out)
