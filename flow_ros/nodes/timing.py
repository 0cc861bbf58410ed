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
    have a mean. Frames that were sent and did not arrive count too: a camera is no slower
    because this machine is. After a pause, longer than so many periods, it is learnt anew.
    """

    def __init__(self, *, spans: int = 30, fewest: int = 8, pause: float = 5.0) -> None:
        """Remember so many ``spans``; know nothing from less than ``fewest``."""
        self._came: deque[tuple[float, int]] = deque(maxlen=spans + 1)
        self._fewest = fewest
        self._pause = pause
        self._period: float | None = None

    def add(self, came: float, *, missed: int = 0) -> None:
        """Add the arrival of a frame (s); so many were ``missed`` since the start."""
        frames = self._came
        # A camera that is slower from now on makes spans as long as pauses: after one, so many
        # are taken as they are.
        if self._period is not None and len(frames) > self._fewest:
            before, missed_before = frames[-1]
            if came - before > self._pause * self._period * (1 + max(0, missed - missed_before)):
                frames.clear()  # what waited meanwhile may come at once: the old period stands
        frames.append((came, missed))
        if len(frames) > self._fewest:
            (first, missed_first), (last, missed_last) = frames[0], frames[-1]
            sent = len(frames) - 1 + max(0, missed_last - missed_first)
            self._period = max(1e-6, (last - first) / sent)

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
