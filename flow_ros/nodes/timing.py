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

"""What the node learns of time: the camera's period, and what publishing takes."""

from collections import deque
import math


class ArrivalPeriod:
    """The period of the frames that arrive, all of them, by the clock they arrive on.

    The mean of the last spans: frames that come in bursts have no typical span, but they do
    have a mean. After a pause, longer than so many periods, it is learnt anew.
    """

    def __init__(self, *, spans: int = 30, fewest: int = 3, pause: float = 5.0) -> None:
        """Remember so many ``spans``; know nothing from less than ``fewest``."""
        self._came: deque[float] = deque(maxlen=spans + 1)
        self._fewest = fewest
        self._pause = pause

    def add(self, came: float) -> None:
        """Add the arrival of a frame (s)."""
        period = self.seconds
        if period is not None and came - self._came[-1] > self._pause * period:
            self._came.clear()
        self._came.append(came)

    @property
    def seconds(self) -> float | None:
        """The period, None while too few frames are known."""
        came = tuple(self._came)  # frames arrive in another thread meanwhile
        if len(came) <= self._fewest:
            return None
        return max(1e-6, (came[-1] - came[0]) / (len(came) - 1))


class UsualTime:
    """What some work usually takes at most: a high quantile of the last times.

    A single late one does not count, and an early one makes no promise.
    """

    def __init__(self, *, last: int = 20, share: float = 0.9) -> None:
        """Remember the ``last`` times, of which ``share`` are within what is told."""
        self._times: deque[float] = deque(maxlen=last)
        self._share = share

    def add(self, milliseconds: float) -> None:
        """Add a time."""
        self._times.append(milliseconds)

    @property
    def milliseconds(self) -> float:
        """The time; 0 before the first."""
        times = sorted(self._times)
        return times[math.ceil(self._share * len(times)) - 1] if times else 0.0
