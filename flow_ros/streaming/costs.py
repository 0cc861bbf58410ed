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

"""What the acts of a network cost here and now, learnt from what they did cost.

Pure: no clock and no tensors. Times come from whoever has a clock.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
import math

REFERENCE = 'encode'
"""The act that every frame does: by it, acts that were long not done are brought up to date."""

_WINDOW = 32
_RECENT = 5
_HIGH = 0.9
_FEW = 8
"""Under so many samples a spread means little."""
_UNSURE = 1.2
"""How much is added then."""
_STALE = 16
"""frames without the act"""
_MOST_CHANGE = 4.0


@dataclass
class _Samples:
    window: 'deque[float]' = field(default_factory=lambda: deque(maxlen=_WINDOW))
    frame: int = 0
    reference: float | None = None


class CostBook:
    """The costs of acts (any keys) on one runtime at one size, in ms.

    ``typical`` is the median of the last five samples, so it follows a load that begins or ends
    after three of them, and one outlier changes nothing. ``high`` is the 90 % quantile of the
    last 32, so the margin comes from the spread that was seen, and is forgotten slowly. Of acts
    that were not done for a while both follow the cost of ``REFERENCE`` since.
    """

    def __init__(self) -> None:
        self._acts: dict[Hashable, _Samples] = {}
        self._frame = 0

    def learn(self, act: Hashable, ms: float) -> None:
        """Add a sample; those of REFERENCE count the frames."""
        if not (math.isfinite(ms) and ms >= 0):
            raise ValueError(f'a cost must be at least 0 ms and finite; seen {ms} for {act!r}')
        samples = self._acts.setdefault(act, _Samples())
        samples.window.append(ms)
        self._frame += act == REFERENCE
        samples.frame = self._frame
        samples.reference = self._typical(REFERENCE)

    def knows(self, act: Hashable) -> bool:
        """Tell whether the act was ever done."""
        return act in self._acts

    def typical(self, act: Hashable) -> float | None:
        """Return what the act usually costs now, ms; None where it was never done."""
        value = self._typical(act)
        return None if value is None else value * self._change(act)

    def high(self, act: Hashable) -> float | None:
        """Return what nine of ten times is enough, ms; None where it was never done."""
        typical = self._typical(act)
        if typical is None:
            return None
        window = sorted(self._acts[act].window)
        # The largest of a few is left out: it may be the first, which compiled.
        rank = min(int(_HIGH * len(window)), max(len(window) - 2, 0))
        high = max(window[rank], typical)
        if len(window) < _FEW:
            high = max(high, _UNSURE * typical)
        return high * self._change(act)

    def _typical(self, act: Hashable) -> float | None:
        samples = self._acts.get(act)
        if samples is None:
            return None
        recent = sorted(list(samples.window)[-_RECENT:])
        return recent[(len(recent) - 1) // 2]

    def _change(self, act: Hashable) -> float:
        """Return how the machine's speed changed since the act was last done, 1 if lately."""
        samples = self._acts[act]
        now = self._typical(REFERENCE)
        if self._frame - samples.frame < _STALE or not samples.reference or not now:
            return 1.0
        return min(max(now / samples.reference, 1 / _MOST_CHANGE), _MOST_CHANGE)
