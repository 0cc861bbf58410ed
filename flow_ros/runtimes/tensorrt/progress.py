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

"""How far a build is, and how it is stopped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import signal
import threading
import time
from types import FrameType


class BuildCancelled(RuntimeError):  # noqa: N818 -- what happened, as it reads
    """The build was stopped because ``progress`` asked for it; nothing was made."""


@dataclass(frozen=True)
class BuildProgress:
    """How far the build of one plan is.

    ``fraction`` (0 to 1) never falls. It counts TensorRT's own steps, which take very different
    times, so ``left_s`` is a guess; it is None while there is nothing to guess from.
    """

    act: str
    phase: str
    fraction: float
    elapsed_s: float
    left_s: float | None


Progress = Callable[[BuildProgress], bool]
"""Told after each step of the builder; returns False to cancel the build."""


class Meter:
    """From TensorRT's nested phases to one fraction, and the way to stop them.

    A phase fills the step of its parent that is under way. TensorRT may call from several
    threads, ``progress`` is called by one at a time. What it raises stops the build and is
    kept for ``check``, because TensorRT's C++ would swallow it.
    """

    def __init__(self, act: str, progress: Progress | None = None) -> None:
        self.error: BaseException | None = None
        self._act = act
        self._progress = progress
        self._cancelled = False
        self._fraction = 0.0
        self._start = time.monotonic()
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.RLock()

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        """Note that ``phase`` begins, of so many steps, within ``parent`` if that is not None."""
        with self._lock:
            around = self._phases.get(parent) if parent else None
            if around is not None:
                begin, width = around.step_begin, around.step_width
            else:  # the first phase is the whole build; a stray one fills what is left
                begin, width = self._fraction, 1 - self._fraction
                if parent:
                    width = 0.0
            self._phases[phase] = _Phase(begin, width, max(steps, 1))

    def step_complete(self, phase: str, step: int) -> bool:
        """Return whether to go on."""
        with self._lock:
            seen = self._phases.get(phase)
            if seen is not None:
                seen.done = max(seen.done, min(step + 1, seen.steps))
                self._fraction = max(self._fraction, min(seen.step_begin, 1.0))
            return self.tell(phase)

    def phase_finish(self, phase: str) -> None:
        """Note that ``phase`` is over, perhaps before its last step."""
        with self._lock:
            seen = self._phases.pop(phase, None)
            if seen is not None and not self._stopped:
                self._fraction = max(self._fraction, min(seen.begin + seen.width, 1.0))

    def tell(self, phase: str) -> bool:
        """Report, and return whether to go on."""
        with self._lock:
            if not self._stopped and self._progress is not None:
                elapsed = time.monotonic() - self._start
                left = (elapsed * (1 - self._fraction) / self._fraction
                        if self._fraction > 0 else None)
                try:
                    self._cancelled = not self._progress(BuildProgress(
                        act=self._act, phase=phase, fraction=self._fraction, elapsed_s=elapsed,
                        left_s=left))
                except BaseException as error:  # noqa: B036 -- raised again by ``check``
                    self.error = error
            return not self._stopped

    def finished(self) -> None:
        """Report the end, after all has gone well."""
        with self._lock:
            self._fraction = 1.0
        self.tell('done')
        self.check()

    def check(self) -> None:
        """Raise what stopped the build, if anything did."""
        if self.error is not None:
            raise self.error
        if self._cancelled:
            raise BuildCancelled(f'the build of {self._act} was cancelled after '
                                 f'{time.monotonic() - self._start:.1f} s, at '
                                 f'{100 * self._fraction:.0f} %')

    @property
    def _stopped(self) -> bool:
        return self._cancelled or self.error is not None


@dataclass
class _Phase:
    """The part of the whole, ``begin`` to ``begin + width``, that one phase fills."""

    begin: float
    width: float
    steps: int
    done: int = 0

    @property
    def step_width(self) -> float:
        return self.width / self.steps if self.done < self.steps else 0.0

    @property
    def step_begin(self) -> float:
        return self.begin + self.width * self.done / self.steps


@contextmanager
def interrupts_kept(meter: Meter) -> Iterator[None]:
    """Turn Ctrl-C into a cancelled build, and raise it once TensorRT has come to a stop.

    Python runs the handler as soon as TensorRT calls back. What it raises would then end in
    TensorRT's C++ frame, which prints and forgets it.
    """
    previous = (signal.getsignal(signal.SIGINT)
                if threading.current_thread() is threading.main_thread() else None)
    if not callable(previous):  # not ours to handle
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        try:
            previous(number, frame)
        except BaseException as error:  # noqa: B036 -- raised again by ``Meter.check``
            meter.error = error

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    except Exception:
        meter.check()  # the interrupt is the cause, not what became of the build
        raise
    finally:
        signal.signal(signal.SIGINT, previous)
