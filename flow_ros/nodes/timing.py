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

    def __init__(self, *, spans: int = 30, fewest: int = 8, pause: float = 5.0) -> None:
        """Remember so many ``spans``; know nothing from less than ``fewest``."""
        self._came: deque[float] = deque(maxlen=spans + 1)
        self._fewest = fewest
        self._pause = pause
        self._period: float | None = None

    def add(self, came: float) -> None:
        """Add the arrival of a frame (s)."""
        period, times = self._period, self._came
        if period is not None and times and came - times[-1] > self._pause * period:
            times.clear()  # what waited meanwhile may come at once: the old period stands
        times.append(came)
        if len(times) > self._fewest:
            self._period = max(1e-6, (times[-1] - times[0]) / (len(times) - 1))

    @property
    def seconds(self) -> float | None:
        """The period, None while too few frames are known."""
        return self._period


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
