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
    typical: float = 0.0
    high: float = 0.0

    def add(self, ms: float) -> None:
        """Add a sample."""
        self.window.append(ms)
        recent = sorted(list(self.window)[-_RECENT:])
        self.typical = recent[(len(recent) - 1) // 2]
        window = sorted(self.window)
        # The largest of a few is left out: it may be the first, which compiled.
        rank = min(int(_HIGH * len(window)), max(len(window) - 2, 0))
        self.high = max(window[rank], self.typical)
        if len(window) < _FEW:
            self.high = max(self.high, _UNSURE * self.typical)


class CostBook:
    """The costs of acts (any keys) on one runtime at one size, in ms.

    ``typical`` is the median of the last five samples, so it follows a load that begins or ends
    after three of them, and one outlier changes nothing. ``high`` is the 90 % quantile of the
    last 32, so the margin comes from the spread that was seen, and is forgotten slowly. Of acts
    that were not done for a while both follow the cost of ``REFERENCE`` since, and the margin
    shrinks: else what was disturbed for a while would look too dear to be done ever again.
    """

    def __init__(self) -> None:
        self._acts: dict[Hashable, _Samples] = {}
        self._frame = 0

    def learn(self, act: Hashable, ms: float) -> None:
        """Add a sample; those of REFERENCE count the frames."""
        if not (math.isfinite(ms) and ms >= 0):
            raise ValueError(f'a cost must be at least 0 ms and finite; seen {ms} for {act!r}')
        samples = self._acts.setdefault(act, _Samples())
        samples.add(ms)
        self._frame += act == REFERENCE
        samples.frame = self._frame
        reference = self._acts.get(REFERENCE)
        samples.reference = reference.typical if reference is not None else None

    def knows(self, act: Hashable) -> bool:
        """Tell whether the act was ever done."""
        return act in self._acts

    def typical(self, act: Hashable) -> float | None:
        """Return what the act usually costs now, ms; None where it was never done."""
        samples = self._acts.get(act)
        return None if samples is None else samples.typical * self._change(samples)

    def high(self, act: Hashable) -> float | None:
        """Return what nine of ten times is enough, ms; None where it was never done."""
        samples = self._acts.get(act)
        if samples is None:
            return None
        fresh = min(1.0, _STALE / max(self._frame - samples.frame, 1))
        margin = (samples.high - samples.typical) * fresh
        return (samples.typical + margin) * self._change(samples)

    def _change(self, samples: _Samples) -> float:
        """Return how the machine's speed changed since the act was last done, 1 if lately."""
        reference = self._acts.get(REFERENCE)
        if (self._frame - samples.frame < _STALE or not samples.reference or reference is None
                or not reference.typical):
            return 1.0
        return min(max(reference.typical / samples.reference, 1 / _MOST_CHANGE), _MOST_CHANGE)
