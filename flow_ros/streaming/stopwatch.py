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

"""Times the acts of a frame without waiting for the device in between."""

import time

import torch


class Stopwatch:
    """Splits the time from its making into named laps; laps of one name add up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == 'cuda'
        self._laps: list[str] = []
        self._start = time.perf_counter()
        self._times = [self._start]
        self._events: list[torch.cuda.Event] = []
        if self._cuda:
            self._record()

    def lap(self, name: str) -> None:
        """End the lap ``name``, which began where the last one ended."""
        self._laps.append(name)
        if self._cuda:
            self._record()
        else:
            self._times.append(time.perf_counter())

    def milliseconds(self) -> dict[str, float]:
        """Return the laps and their ``total``; waits for the device."""
        if self._cuda:
            self._events[-1].synchronize()
            spans = [a.elapsed_time(b) for a, b in zip(self._events, self._events[1:])]
        else:
            spans = [1e3 * (b - a) for a, b in zip(self._times, self._times[1:])]
        result: dict[str, float] = {}
        for name, span in zip(self._laps, spans):
            result[name] = result.get(name, 0.0) + span
        result['total'] = 1e3 * (time.perf_counter() - self._start)
        return result

    def _record(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
