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

"""How far a build is and how long it still takes, for logs, bars and parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import time

from flow_ros.runtimes.tensorrt import BuildCancelled, BuildProgress


@dataclass(frozen=True)
class EngineProgress:
    """How far the whole build is; acts whose plans were in the cache are not counted.

    ``phase`` is 'export', 'build', 'wait' (for another process that builds the same), 'done' or,
    where no act is named, 'start' or 'check' (of all engines together). ``fraction``, 0..1 of
    the whole, is never less than before. ``left_s`` is None as long as nothing tells it.
    """

    act: str
    index: int
    count: int
    phase: str
    fraction: float
    elapsed_s: float
    left_s: float | None

    @property
    def text(self) -> str:
        """One phrase for logs: 'building step_8 (3 of 4): 45 %, about 40 s left'."""
        if self.phase in {'start', 'check'}:
            return 'starting to build' if self.phase == 'start' else 'checking the engines'
        if self.phase == 'done':
            return f'built {self.count} engines in {in_words(self.elapsed_s)}'
        verb = {'export': 'exporting', 'build': 'building'}.get(
            self.phase, 'waiting for another process to build')
        left = '' if self.left_s is None else f', about {in_words(self.left_s)} left'
        return (f'{verb} {self.act} ({self.index + 1} of {self.count}): '
                f'{100 * self.fraction:.0f} %{left}')


Progress = Callable[[EngineProgress], bool]
"""Is told how far a build is; False ends it with BuildCancelled."""


class Pace:
    """Tells how far a job is and how long the rest may take, from what its parts took so far."""

    def __init__(self, names: Sequence[str], progress: Progress | None) -> None:
        self._names = names
        self._progress = progress
        self._start = self._part = time.monotonic()
        self._exports: list[float] = []
        self._builds: list[float] = []
        self._index = 0
        self._phase = 'export'
        self._fraction = 0.0

    @property
    def text(self) -> str:
        """What is being done, in words."""
        verb = {'export': 'exporting', 'build': 'building'}.get(self._phase, 'waiting for')
        return f'{verb} {self._names[self._index]}'

    def start(self, index: int) -> None:
        """Begin with an act."""
        self._index, self._phase = index, 'export'
        self._part = time.monotonic()

    def exported(self) -> None:
        """Note how long the export took."""
        now = time.monotonic()
        self._exports.append(now - self._part)
        self._part = now
        self._phase = 'build'
        self.tell('build')

    def built(self) -> None:
        """Note how long the builder took."""
        self._builds.append(time.monotonic() - self._part)

    def waiting(self, seconds: float) -> bool:
        """Tell that another process has the lock; the form that ``EngineCache.lock`` asks."""
        return self._tell('wait', 0.0, None)

    def building(self, seen: BuildProgress) -> bool:
        """Tell how far the builder is; the form that ``build_plan`` asks."""
        return self._tell('build', seen.fraction, seen.left_s)

    def tell(self, phase: str) -> None:
        """Tell the phase; raises BuildCancelled where the listener has had enough."""
        if not self._tell(phase, 0.0, None):
            raise BuildCancelled(self.text)

    def done(self) -> None:
        """Tell that it is over; it is too late to cancel."""
        self._fraction = 1.0
        self._tell('done', 1.0, 0.0)

    def _tell(self, phase: str, fraction: float, left_s: float | None) -> bool:
        self._phase = phase
        if self._progress is None:
            return True
        now = time.monotonic()
        elapsed = now - self._start
        count = len(self._names)
        left = 0.0 if phase == 'done' else self._left(phase, now, left_s)
        done = (self._index + 0.9 * fraction) / count if left is None or elapsed + left <= 0 \
            else elapsed / (elapsed + left)
        if phase != 'done':
            # It may turn out slower than it looked; a bar that goes back tells nobody anything.
            self._fraction = max(self._fraction, min(done, 0.99))
        return self._progress(EngineProgress(
            act=self._names[self._index], index=self._index, count=count, phase=phase,
            fraction=self._fraction, elapsed_s=elapsed, left_s=left))

    def _left(self, phase: str, now: float, left_s: float | None) -> float | None:
        """Return the seconds left for the whole, None where nothing tells them yet."""
        spent = now - self._part
        if phase == 'build' and left_s is not None:
            this, build = left_s, spent + left_s
        elif self._builds:
            build = sum(self._builds) / len(self._builds)
            this = max(0.0, build - spent) if phase == 'build' else build
        else:
            return None
        builds = [*self._builds, build]
        if phase != 'build' and self._exports:
            this += max(0.0, _mean(self._exports) - spent)
        each = _mean(builds) + (_mean(self._exports) if self._exports else 0.0)
        return this + each * (len(self._names) - self._index - 1)


def in_words(seconds: float) -> str:
    """Return a time for people: '45 s', '3 min'."""
    return f'{seconds:.0f} s' if seconds < 90 else f'{seconds / 60:.0f} min'


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
