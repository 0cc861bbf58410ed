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

"""A runtime that serves at once, while a faster one is being made for each frame size.

Engines take seconds to minutes to build, and nobody may wait for them in silence. A Handover
serves with a runtime that is ready, makes the better one in a thread, tells how far it is, and
hands over between two frames. What cannot be built, does not pass its check or fails later is
one message, and the next best runtime serves: flow keeps coming.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
import logging
import threading
import time
from typing import Protocol

import torch
from torch import Tensor

from flow_ros.networks.base import FlowNetwork, FlowOutput, State
from flow_ros.runtimes.base import Control, Lap, Runtime
from flow_ros.runtimes.cache import log_it, Say

Size = tuple[int, int]
"""(height, width) of a frame, px."""

MOST_SIZES = 4
"""Of a stream that changes its size again and again, the engines longest unused are given up."""

_MOST_REFUSALS = 256

_log = logging.getLogger(__name__)


class EngineRefused(RuntimeError):  # noqa: N818 -- a verdict, as it reads
    """An engine was built, but its check refuses it; the text has the versions and numbers."""


class Told(Protocol):
    """How far the making of a runtime is (build_progress.EngineProgress is one)."""

    @property
    def text(self) -> str:
        """One phrase such as 'building step_8 (3 of 4): 45 %, about 40 s left'."""
        ...


class MakeRuntime(Protocol):
    """Makes the better runtime for one frame size, in a thread that is not the caller's."""

    def __call__(self, *, height: int, width: int,
                 progress: Callable[[Told], bool]) -> Runtime:
        """Return a runtime that has passed its check, or raise why there is none.

        It must leave the network of the serving runtimes alone (work on a copy), and call
        ``progress`` often; where that returns False it must give up soon, by any exception.
        """
        ...


@dataclass
class _Entry:
    """What is known of the better runtime for one frame size."""

    runtime: Runtime | None = None
    building: bool = False
    serves: bool = False  # it has taken over, and that was said
    started: float = 0.0
    seconds: float = 0.0
    told: str = ''


class Handover:
    """A Runtime: the best one that is ready, for the frame size of the moment.

    ``serving`` makes the runtimes that need no build, best first. The first is made here and
    now, so its errors are the caller's; the others only if they are needed, when the device of
    the first may have died: let each have a network of its own that lives where it can still
    be read. ``make`` makes the better runtime, called ``goal`` in words, for one frame size.
    ``say`` is told what happens, from several threads, progress at most every ``period_s``;
    ``now`` is the clock (s).

    Callers ask ``at(height, width)`` for a runtime before each frame and stay with it for the
    whole frame, since features of one runtime mean nothing to another; ``advance``, ``call``
    and ``loop`` are for those with one stream. All methods may be called from any thread.
    """

    def __init__(self, *, serving: Sequence[Callable[[], Runtime]], make: MakeRuntime,
                 goal: str = 'tensorrt', say: Say | None = None, most_sizes: int = MOST_SIZES,
                 period_s: float = 5.0, now: Callable[[], float] = time.monotonic) -> None:
        if not serving:
            raise ValueError('serving must name at least one runtime that needs no build')
        self.say: Say = say or log_it
        self._make = make
        self._goal = goal
        self._most_sizes = most_sizes
        self._period_s = period_s
        self._now = now
        self._next = list(serving[1:])
        self._serving = self._active = serving[0]()
        self._why_serving = ''  # why a better one of ``serving`` does not serve any more
        self._size: Size | None = None
        # Taken before ``_changed``, never after: for what takes long, while others go on.
        self._replacing = threading.Lock()
        self._changed = threading.Condition()
        self._sizes: OrderedDict[Size, _Entry] = OrderedDict()
        self._refused: OrderedDict[Size, str] = OrderedDict()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._said = -float('inf')

    @property
    def active(self) -> Runtime:
        """The runtime that serves the size asked for last."""
        return self._active

    @property
    def name(self) -> str:
        """The name of the runtime that serves."""
        return self._active.name

    @property
    def network(self) -> FlowNetwork:
        """The network of the runtime that serves."""
        return self._active.network

    @property
    def device(self) -> torch.device:
        """The device of the runtime that serves."""
        return self._active.device

    @property
    def reason(self) -> str:
        """Why the runtime that serves was chosen; ``status`` knows what is being made."""
        return self._active.reason

    @property
    def status(self) -> str:
        """One line for the frame size of the moment: what serves and why, what is being made."""
        with self._changed:
            active, size = self._active, self._size
            words = f'{describe(active)} serves'
            if self._serves_better(active):
                return f'{words} ({active.reason})'
            why = self._why_serving
            if size is not None:
                entry = self._sizes.get(size)
                if entry is not None:
                    told = entry.told or f'{self._goal} for {_px(size)} waits for its turn'
                    return f'{words} meanwhile; {told}'
                why = '; '.join(filter(None, [self._refused.get(size), why]))
            return f'{words}: {why}' if why else f'{words} ({active.reason})'

    def at(self, height: int, width: int) -> Runtime:
        """Return the runtime for a frame of this size now; starts its build where it is new."""
        size = (height, width)
        line = ''
        with self._changed:
            entry = self._sizes.get(size)
            if entry is None and size not in self._refused and not self._closing:
                entry = self._sizes[size] = _Entry()
                self._start()
            if entry is not None:
                self._sizes.move_to_end(size)
                self._forget_old_sizes()
            runtime = self._serving
            if entry is not None and entry.runtime is not None:
                runtime = entry.runtime
                if not entry.serves:
                    entry.serves = True
                    line = (f'{describe(runtime)} takes over for {_px(size)} from '
                            f'{describe(self._serving)}: made and checked in '
                            f'{entry.seconds:.1f} s')
            self._active, self._size = runtime, size
        if line:
            self.say('info', line)
        return runtime

    def advance(self, height: int, width: int) -> bool:
        """Between two frames: take what is best for this size; True where that changed."""
        before = self._active
        return self.at(height, width) is not before

    def may_change(self, height: int, width: int) -> bool:
        """Tell whether another runtime may yet do what this size's does now.

        That one would need the pixels of the last frame, to encode them its own way.
        """
        with self._changed:
            return (height, width) in self._sizes or bool(self._next)

    def is_made(self, runtime: Runtime) -> bool:
        """Tell whether ``runtime`` is one that was built, and another is ready behind it."""
        return self._serves_better(runtime)

    def fall_back(self, why: str, faulty: Runtime | None = None) -> bool:
        """Replace a runtime that failed for good; False where none is left to take over.

        ``faulty`` None is the active one. Where another stream has replaced it already, that
        stands. ``why`` becomes part of the one message: with versions and numbers.
        """
        with self._changed:
            faulty = self._active if faulty is None else faulty
            line = ''
            for size, entry in list(self._sizes.items()):
                if entry.runtime is faulty:
                    line = self._refuse(size, f'{describe(faulty)} failed for {_px(size)}: {why}')
            if self._active is faulty:
                self._active = self._serving
        if not line:
            with self._replacing:
                if faulty is self._serving:
                    line = self._serve_next(f'{describe(faulty)} failed: {why}')
                    if not line:
                        return False
        if line:
            self.say('warning', line)
        return True

    def call(self, engine: str, /, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one engine of the runtime that serves."""
        return self._active.call(engine, *tensors)

    def loop(self, state: State, lap: Lap | None = None,
             control: Control | None = None) -> tuple[State, FlowOutput]:
        """Do the steps of ``state`` and finish, with the runtime that serves."""
        return self._active.loop(state, lap, control)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is being made or waits to be; False where ``timeout`` s went by."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closing or all(entry.runtime for entry in self._sizes.values()),
                timeout)

    def close(self, timeout: float = 4.0) -> bool:
        """End a build that is going on, and wait for that; False after ``timeout`` s.

        By default less than the 5 s after which ``ros2 launch`` loses its patience.

        What serves goes on serving; nothing more is built. A builder hears of the end at its
        next step, so it may take a while; its thread does not keep the process alive.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def _serves_better(self, runtime: Runtime) -> bool:
        with self._changed:
            return any(entry.runtime is runtime for entry in self._sizes.values())

    def _forget_old_sizes(self) -> None:
        for size in [size for size, entry in self._sizes.items() if not entry.building]:
            if len(self._sizes) <= self._most_sizes:
                return
            del self._sizes[size]

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name='engine_maker', daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """Make what is wanted, one size at a time: the one asked for last goes first."""
        while True:
            with self._changed:
                wanted = None if self._closing else self._wanted()
                if wanted is None:  # a thread that waited would keep all this alive for ever
                    self._thread = None
                    return
                size, entry = wanted
                entry.building, entry.started = True, self._now()
                entry.told = f'building {self._goal} for {_px(size)}'
                line = f'{entry.told}; serving with {describe(self._serving)} meanwhile'
                self._said = self._now()
            self.say('info', line)
            try:
                runtime = self._make(height=size[0], width=size[1],
                                     progress=partial(self._progress, size, entry))
            except Exception as error:  # whatever it is, the one who serves goes on
                self._failed(size, error)
            else:
                with self._changed:
                    entry.seconds = self._now() - entry.started
                    entry.building, entry.runtime = False, runtime
                    entry.told = f'{describe(runtime)} for {_px(size)} is ready'
                    self._changed.notify_all()

    def _wanted(self) -> tuple[Size, _Entry] | None:
        for size, entry in reversed(self._sizes.items()):
            if entry.runtime is None:
                return size, entry
        return None

    def _progress(self, size: Size, entry: _Entry, told: Told) -> bool:
        """Keep and now and then say how far it is; False where it shall end."""
        with self._changed:
            if self._closing:
                return False
            entry.told = f'{told.text}, for {_px(size)}'
            if self._now() - self._said < self._period_s:
                return True
            self._said = self._now()
            line = f'{entry.told}; serving with {describe(self._serving)} meanwhile'
        self.say('info', line)
        return True

    def _failed(self, size: Size, error: Exception) -> None:
        with self._changed:
            if self._closing:
                self._sizes.pop(size, None)
                self._changed.notify_all()
                return
            verdict = ('was refused by its check' if isinstance(error, EngineRefused)
                       else 'could not be made')
            line = self._refuse(size, f'{self._goal} for {_px(size)} {verdict}: {_text(error)}')
        _log.debug('%s', line, exc_info=error)
        self.say('warning', line)

    def _refuse(self, size: Size, why: str) -> str:
        """Give up the better runtime of this size for good; return the line that says so."""
        self._sizes.pop(size, None)
        self._refused[size] = why
        if len(self._refused) > _MOST_REFUSALS:
            self._refused.popitem(last=False)
        self._changed.notify_all()
        return f'{why}; {describe(self._serving)} serves this size from now on'

    def _serve_next(self, why: str) -> str:
        """Replace what serves without a build; return the line that says so, '' if none can."""
        whys = [why]
        while self._next:
            try:
                runtime = self._next[0]()  # seconds, in which others want to know the status
            except Exception as error:
                self._next.pop(0)
                whys.append(f'the next best cannot be had: {_text(error)}')
                continue
            with self._changed:
                self._next.pop(0)
                if self._active is self._serving:
                    self._active = runtime
                self._serving = runtime
                self._why_serving = '; '.join(whys)
            return f'{self._why_serving}; {describe(runtime)} serves from now on'
        return ''


def best_runtime(runtime: Runtime, height: int, width: int) -> Runtime:
    """Return the best that ``runtime`` will have for a frame size; waits for its making.

    For what measures a runtime: one that serves meanwhile is not it.
    """
    if not isinstance(runtime, Handover):
        return runtime
    runtime.at(height, width)
    runtime.wait()
    return runtime.at(height, width)


def describe(runtime: Runtime) -> str:
    """Return a runtime in words: 'torch on cuda:0'."""
    return f'{runtime.name} on {runtime.device}'


def _px(size: Size) -> str:
    return f'{size[1]}x{size[0]} px'


def _text(error: Exception) -> str:
    """Return what an error says, with its type where that is part of the answer."""
    text = ' '.join(str(error).split())
    if type(error) in (RuntimeError, ValueError, EngineRefused) and text:
        return text
    return f'{type(error).__name__}: {text}' if text else type(error).__name__

