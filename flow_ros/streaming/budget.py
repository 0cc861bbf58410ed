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

"""How much work, or how much time, one flow may cost."""

from collections import deque
from dataclasses import dataclass
import math


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A limit on the steps of each pair, or on its time.

    ``iterations`` alone is exactly so many for each level; for networks that visit each level
    once (HD3's levels, MSCSL's scales) it is how many of them, coarse to fine, and more than
    there are means all. None is the network's own default.

    ``latency_ms``: the flow is there within so many ms of its frame; as many steps are done as
    fit, one at least. ``rate``: the same with the period of the camera, so that no frame is
    dropped. With either, ``iterations`` is the most; None is the network's
    ``most_iterations``.
    """

    iterations: int | None = None
    latency_ms: float | None = None
    rate: bool = False

    def __post_init__(self) -> None:
        """Refuse what no schedule can be made from."""
        iterations, latency = self.iterations, self.latency_ms
        if iterations is not None and (isinstance(iterations, bool)
                                       or not isinstance(iterations, int)):
            raise ValueError(f'iterations must be a whole number or None (the default of the '
                             f'network); seen {iterations!r}')
        if iterations is not None and iterations < 1:
            raise ValueError(f'iterations must be at least 1, or None (the default '
                             f'of the network); seen {iterations}')
        if latency is not None and (isinstance(latency, bool)
                                    or not isinstance(latency, (int, float))
                                    or not (math.isfinite(latency) and latency > 0)):
            raise ValueError(f'latency_ms must be a positive number of milliseconds, or None '
                             f'(no time is asked); seen {latency!r}')
        if not isinstance(self.rate, bool):
            raise ValueError(f'rate must be True or False; seen {self.rate!r}')
        if self.rate and latency is not None:
            raise ValueError(f'a budget is either a latency or a rate; seen latency_ms '
                             f'{latency} and rate True: leave one out')

    @property
    def timed(self) -> bool:
        """True where the time decides on the steps."""
        return self.rate or self.latency_ms is not None

    def limit_ms(self, period_s: float | None) -> float | None:
        """Return the time that a frame has, None for any: a rate's is ``period_s``, if known."""
        if not self.rate:
            return self.latency_ms
        return None if period_s is None else 1e3 * period_s


class StampPeriod:
    """The period of a camera, from the times between the frames that came.

    A low quantile of the last: between frames of which some were dropped there are several.
    """

    def __init__(self) -> None:
        self._spans: deque[float] = deque(maxlen=32)

    def add(self, seconds: float) -> None:
        """Add the time between two frames."""
        self._spans.append(seconds)

    @property
    def seconds(self) -> float | None:
        """The period, None before the first span."""
        spans = sorted(self._spans)
        return spans[len(spans) // 10] if spans else None
