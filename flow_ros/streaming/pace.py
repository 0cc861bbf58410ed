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

"""The clock beside the loop: plans each pair with the costs so far, cuts it, and learns.

Where the host waits for each step (the CPU), it is asked after every step what still fits. On
CUDA it is not: steps and output are one piece of work, for which nothing waits in between. There
the whole schedule is chosen ahead, out of few (``planner.ROUNDS``), because each becomes a CUDA
graph; what it took is known where the host waits for its results anyway, and is shared out among
its acts by their cells. What a schedule takes until its graph is there, once, is no cost of its
acts: else they would look too dear to be done again. An early stop is decided ahead there too:
where the two frames do not differ and the prior is at rest, each level gets one step.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
import time

import numpy as np
from numpy.typing import NDArray

from flow_ros.networks.base import FlowNetwork, FlowOutput, State, Step
from flow_ros.runtimes.base import Lap, Runtime
from flow_ros.runtimes.handover import describe
from flow_ros.streaming.costs import CostBook, REFERENCE
from flow_ros.streaming.early_stop import has_meaning, largest_update
from flow_ros.streaming.planner import (
    acts_of,
    Cost,
    cost_of,
    FinishAct,
    fitting,
    Position,
    ROUNDS,
    StepAct,
)
from flow_ros.streaming.serving import checked

_MOST_BOOKS = 8
_BETWEEN = 'between the directions'

Clock = Callable[[], float]


@dataclass(frozen=True)
class TimeKept:
    """What became of a pair's budget; the fields are those of ``FlowResult``."""

    predicted_ms: float | None
    spent_ms: float
    budget_ms: float | None
    overrun: bool


class Paces:
    """The cost books of an estimator, one for each runtime and size, and what begins a pair."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self._books: OrderedDict[Hashable, CostBook] = OrderedDict()

    def begin(self, runtime: Runtime, size: tuple[int, int], *, came: float,
              limit_ms: float | None = None, after_ms: float = 0.0, early_stop_px: float = 0.0,
              output: Hashable = '') -> 'Pace':
        """Return the pace of a frame whose time began at ``came``, by the clock.

        ``output`` tells apart what is done after the steps, which has a cost of its own.
        """
        key = (runtime.network.name, describe(runtime), size)
        book = self._books.setdefault(key, CostBook())
        self._books.move_to_end(key)
        if len(self._books) > _MOST_BOOKS:
            self._books.popitem(last=False)
        return Pace(runtime, book, came=came, limit_ms=limit_ms, after_ms=after_ms,
                    early_stop_px=early_stop_px, output=('output', output), clock=self.clock)


class Pace:
    """One pair's way through its budget."""

    def __init__(self, runtime: Runtime, book: CostBook, *, came: float, limit_ms: float | None,
                 after_ms: float, early_stop_px: float, output: Hashable, clock: Clock) -> None:
        self._runtime = runtime
        self._book = book
        self._came = came
        self._limit_ms = limit_ms
        self._after_ms = after_ms
        self._early_stop_px = early_stop_px
        self._output = output
        self._clock = clock
        self._since = clock()
        self._predicted: float | None = None
        # Torch on CUDA is asked nothing either where it has no graphs: a look is a wait.
        self._ahead = runtime.device.type == 'cuda' or getattr(runtime, 'graphed', False)

    def encoded(self) -> None:
        """Say that all since this pace began was the encoder's work."""
        self._learn(REFERENCE)

    def run(self, state: State, lap: Lap | None = None, *,
            differing: NDArray[np.bool_] | None = None,
            both: bool = False) -> tuple[State, FlowOutput, str]:
        """Do of ``state.schedule`` what fits, and finish; also why it ended there.

        ``differing`` is where the two frames differ (see ``early_stop``), None for no early
        stop. ``both``: the other direction comes after this one, and needs as much time.
        """
        first = self._predicted is None
        if not first:
            self._learn(_BETWEEN)
        available = self._available(self._runtime.network, state, both)
        run = _Run(self._book, state, limit_at=None if available is None
                   else self._clock() + available / 1e3, clock=self._clock,
                   early_stop_px=self._early_stop_px, differing=differing,
                   rounds=ROUNDS if self._ahead else ())
        if self._ahead:
            run.stop_ahead(state)
        state = replace(state, schedule=run.planned())
        if first:
            self._predicted = self._prediction(state, both)
        laps: list[str] = []

        def told(name: str) -> None:
            laps.append(name)
            if lap is not None:
                lap(name)

        after, output = self._runtime.loop(state, told, None if self._ahead else run)
        output = checked(output, self._runtime)
        self._since = self._clock()
        replayed = laps == ['steps']
        run.learn(state, after, once=not replayed and getattr(self._runtime, 'graphed', False))
        return after, output, run.ended(after)

    def end(self) -> TimeKept:
        """End the pair: what it was to take, and took."""
        self._learn(self._output)
        spent = 1e3 * (self._since - self._came)
        limit = self._limit_ms
        return TimeKept(predicted_ms=self._predicted or None, spent_ms=spent, budget_ms=limit,
                        overrun=limit is not None and spent + self._after_ms > limit)

    def _available(self, network: FlowNetwork, state: State, both: bool) -> float | None:
        """Return how many ms this direction's steps and output may take, None for no limit."""
        if self._limit_ms is None:
            return None
        left = self._limit_ms - 1e3 * (self._clock() - self._came) - self._after_ms
        left -= self._book.high(self._output) or 0.0
        if not both:
            return left
        left -= self._book.high(_BETWEEN) or 0.0
        if network.reversed(state) is None:
            return left / 2
        finish = cost_of([FinishAct(state.schedule[-1].level)], self._book)
        return left - (finish.safe if finish else 0.0)

    def _prediction(self, state: State, both: bool) -> float:
        """Return the whole pair's ms, from ``came`` on; 0 while that is not known."""
        acts = acts_of(state.schedule, Position(state.level))
        cost, output = cost_of(acts, self._book), self._book.typical(self._output)
        if cost is None or output is None:
            return 0.0
        other = Cost(0.0, 0.0)
        if both:
            whole = self._runtime.network.reversed(state) is None
            other = cost_of(acts if whole else acts[-1:], self._book) or other
        between = (self._book.typical(_BETWEEN) or 0.0) if both else 0.0
        return (1e3 * (self._clock() - self._came) + cost.typical + between + other.typical
                + output)

    def _learn(self, act: Hashable) -> None:
        now = self._clock()
        self._book.learn(act, 1e3 * (now - self._since))
        self._since = now


class _Run:
    """The ``Control`` of one loop."""

    def __init__(self, book: CostBook, state: State, *, limit_at: float | None, clock: Clock,
                 early_stop_px: float, differing: NDArray[np.bool_] | None,
                 rounds: tuple[int, ...]) -> None:
        self._book = book
        self._limit_at = limit_at
        self._clock = clock
        self._early_stop_px = early_stop_px
        self._differing = differing if early_stop_px > 0 else None
        self._rounds = rounds
        self._left = state.schedule  # whatever the plans were, this is what may still be done
        self._position = Position(state.level)
        self._stopped = False
        self._looks = 0
        self._since = clock()

    def stop_ahead(self, state: State) -> None:
        """Leave one step for each level if no update of ``state`` could mean something."""
        if self._differing is not None and not has_meaning(state, self._differing):
            left = tuple(dict.fromkeys(self._left))
            self._stopped = len(left) < len(self._left)
            self._left = left

    def planned(self) -> tuple[Step, ...]:
        """Return the steps to do from here."""
        if self._limit_at is None:
            return self._left
        return fitting(self._left, position=self._position, book=self._book,
                       available_ms=1e3 * (self._limit_at - self._clock()), rounds=self._rounds)

    def __call__(self, before: State, after: State) -> tuple[Step, ...]:
        """Learn what the step took, and plan again."""
        self._looks += 1
        step = after.done[-1]
        now = self._clock()
        entering = step.level != self._position.level
        self._book.learn(StepAct(step.level, step.operator, entering), 1e3 * (now - self._since))
        self._since = now
        self._advance(step)
        if (self._differing is not None and step in self._left
                and largest_update(before, after, self._differing) < self._early_stop_px):
            # A coarse level says little of a finer one: that gets its own look.
            self._left = tuple(left for left in self._left if left != step)
            self._stopped = not self._left
        return self.planned()

    def learn(self, start: State, after: State, *, once: bool) -> None:
        """Learn the output's cost at the end; where nothing was asked, all acts at once.

        ``once``: what the run took, it will not take again; better than to know nothing.
        """
        total = 1e3 * (self._clock() - self._since)
        done = after.done[len(start.done):]
        if self._looks or not done:
            self._book.learn(FinishAct(after.level), total)
            return
        for step in done:
            self._advance(step)
        acts = acts_of(done, Position(start.level))
        cells = [1 / act.level ** 2 for act in acts]
        for act, share in zip(acts, cells):
            if not (once and self._book.knows(act)):
                self._book.learn(act, total * share / sum(cells))

    def ended(self, after: State) -> str:
        """Return why the loop ended, in the words of ``FlowResult.ended``."""
        if self._left:
            return 'deadline'
        return 'early stop' if self._stopped else 'schedule'

    def _advance(self, step: Step) -> None:
        """Take ``step``, and all that was left out before it, from what may still be done."""
        at = self._left.index(step)
        self._left = self._left[at + 1:]
        same = step.level == self._position.level
        self._position = Position(step.level, self._position.done + 1 if same else 1)
