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

"""Warnings that are counted, and throttled for each kind of trouble."""

from collections.abc import Callable
from threading import Lock
import time


class Complaints:
    """Says each kind of trouble at once, then at most once per ``period_s``.

    What was held back meanwhile is counted, and told with the next warning of its kind.
    """

    def __init__(self, *, warn: Callable[[str], object], period_s: float = 5.0,
                 now: Callable[[], float] = time.monotonic) -> None:
        """Speak through ``warn``; ``now`` is the clock in seconds."""
        self._warn = warn
        self._period_s = period_s
        self._now = now
        self._lock = Lock()
        self._spoken: dict[str, float] = {}
        self._held: dict[str, int] = {}
        self._total = 0

    @property
    def total(self) -> int:
        """The number of complaints so far, said or held back."""
        with self._lock:
            return self._total

    def add(self, kind: str, text: str) -> None:
        """Count a complaint of ``kind`` and say ``text`` unless its kind was said just now."""
        with self._lock:
            self._total += 1
            now = self._now()
            if now - self._spoken.get(kind, -float('inf')) < self._period_s:
                self._held[kind] = self._held.get(kind, 0) + 1
                return
            self._spoken[kind] = now
            held = self._held.pop(kind, 0)
        self._warn(f'{text} ({held} more like this one since the last warning)' if held else text)
