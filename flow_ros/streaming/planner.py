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

"""Which steps fit into the time that is left. Pure: costs in, schedule out."""

from collections.abc import Sequence
from dataclasses import dataclass
import math

from flow_ros.networks.base import Step
from flow_ros.streaming.costs import CostBook

ROUNDS: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12)
"""Iterations for each level where each schedule is made ready by itself (CUDA graphs): few."""


@dataclass(frozen=True)
class StepAct:
    """A step as what is timed; ``entering`` a level includes moving the flow there."""

    level: int
    operator: str
    entering: bool


@dataclass(frozen=True)
class FinishAct:
    """The output, taken at a level."""

    level: int


TimedAct = StepAct | FinishAct


@dataclass(frozen=True)
class Position:
    """Where a loop stands: the level of its flow, and the steps done there (0: none at all)."""

    level: int
    done: int = 0


@dataclass(frozen=True)
class Cost:
    """What some acts will take together, ms; ``safe`` has the margin for their spread."""

    typical: float
    safe: float


def acts_of(steps: Sequence[Step], position: Position) -> list[TimedAct]:
    """Return the timed acts of ``steps`` from ``position``, and of the output after them."""
    level = position.level
    acts: list[TimedAct] = []
    for step in steps:
        acts.append(StepAct(step.level, step.operator, entering=step.level != level))
        level = step.level
    return [*acts, FinishAct(level)]


def cost_of(acts: Sequence[TimedAct], book: CostBook) -> Cost | None:
    """Return what ``acts`` will cost; None where nothing like them was ever done.

    The spreads of the steps add up as those of independent errors do; that of the output counts
    whole. An act that was never done is taken for as long as the one most like it: to be wrong
    once is how its cost is learnt.
    """
    total = _Sum()
    for act in acts:
        one = _unit(act, book)
        if one is None:
            return None
        total = total.plus(one)
    return total.cost


def fitting(schedule: Sequence[Step], *, position: Position, book: CostBook,
            available_ms: float, rounds: Sequence[int] = ()) -> tuple[Step, ...]:
    """Return the steps of ``schedule`` (levels in order, equal steps together) that fit.

    Each level gets one step, coarse first, and the finest are left out only where they cannot
    fit; then every level one more, and so on. Where no step was done yet, the first one is
    always in. Before anything is known it alone is. With ``rounds`` the levels get one of these
    counts each, all the same one.
    """
    groups = [_Group(list(steps), book, entering=steps[0].level != position.level)
              for steps in _groups(schedule)]
    if not groups:
        return ()
    had = [position.done if group.level == position.level else 0 for group in groups]
    counts = [0 if position.done else 1, *(0 for _ in groups[1:])]
    here = _unit(FinishAct(position.level), book)

    def fits(trial: list[int]) -> bool:
        total, finish = _Sum(), here
        for group, count in zip(groups, trial):
            if count:
                if group.first is None or group.more is None:
                    return False
                total = total.plus(group.first).plus(group.more, count - 1)
                finish = group.finish
        return finish is not None and total.plus(finish).cost.safe <= available_ms

    for index in range(len(groups)):  # a level is reached through all the coarser
        if counts[index] or had[index]:
            continue
        trial = [*counts[:index], 1, *counts[index + 1:]]
        if not fits(trial):
            return _steps(groups, counts)
        counts = trial
    limits = [len(group.steps) for group in groups]
    if not rounds and fits(limits):
        return tuple(schedule)
    for count in rounds:
        trial = [max(min(count - before, limit), 0) for before, limit in zip(had, limits)]
        if fits(trial):
            counts = trial
    if rounds:
        return _steps(groups, counts)
    full = [False] * len(groups)  # what had no room for one more has none later
    for count in range(1, max(limits) + max(had) + 1):
        for index, limit in enumerate(limits):
            if full[index] or counts[index] + had[index] >= count or counts[index] >= limit:
                continue
            trial = [*counts[:index], counts[index] + 1, *counts[index + 1:]]
            if fits(trial):
                counts = trial
            else:
                full[index] = True
    return _steps(groups, counts)


@dataclass(frozen=True)
class _Sum:
    """Costs added up: the typical ones, the squared spreads of steps, those of outputs."""

    typical: float = 0.0
    variance: float = 0.0
    tail: float = 0.0

    def plus(self, other: '_Sum', times: int = 1) -> '_Sum':
        return _Sum(self.typical + times * other.typical, self.variance + times * other.variance,
                    self.tail + times * other.tail)

    @property
    def cost(self) -> Cost:
        return Cost(self.typical, self.typical + math.sqrt(self.variance) + self.tail)


class _Group:
    """The equal steps of a level, with the costs of the first, of each other, of the output."""

    def __init__(self, steps: list[Step], book: CostBook, *, entering: bool) -> None:
        self.steps = steps
        self.level = steps[0].level
        operator = steps[0].operator
        self.first = _unit(StepAct(self.level, operator, entering), book)
        self.more = _unit(StepAct(self.level, operator, False), book)
        self.finish = _unit(FinishAct(self.level), book)


def _unit(act: TimedAct, book: CostBook) -> _Sum | None:
    known = _likeliest(act, book)
    if known is None:
        return None
    typical, high = book.typical(known), book.high(known)
    assert typical is not None and high is not None
    if isinstance(act, FinishAct):
        return _Sum(typical, 0.0, high - typical)
    return _Sum(typical, (high - typical) ** 2, 0.0)


def _groups(schedule: Sequence[Step]) -> list[list[Step]]:
    groups: list[list[Step]] = []
    for step in schedule:
        if groups and groups[-1][0] == step:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _steps(groups: list[_Group], counts: list[int]) -> tuple[Step, ...]:
    return tuple(step for group, count in zip(groups, counts) for step in group.steps[:count])


def _likeliest(act: TimedAct, book: CostBook) -> TimedAct | None:
    """Return the act that was done and is most like ``act``, or None.

    Itself; the same level, entered or not; a coarser level, the nearest first, then a finer one.
    """
    if book.knows(act):
        return act
    levels = [act.level, *(act.level * 2 ** k for k in range(1, 6)),
              *(act.level // 2 ** k for k in range(1, 6) if act.level >= 2 ** k)]
    for level in levels:
        likes: list[TimedAct] = (
            [FinishAct(level)] if isinstance(act, FinishAct)
            else [StepAct(level, act.operator, entering)
                  for entering in (act.entering, not act.entering)])
        for like in likes:
            if book.knows(like):
                return like
    return None
