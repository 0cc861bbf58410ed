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
    typical = variance = tail = 0.0
    for act in acts:
        known = _likeliest(act, book)
        if known is None:
            return None
        usual, high = book.typical(known), book.high(known)
        assert usual is not None and high is not None
        typical += usual
        if isinstance(act, FinishAct):
            tail += high - usual
        else:
            variance += (high - usual) ** 2
    return Cost(typical=typical, safe=typical + math.sqrt(variance) + tail)


def fitting(schedule: Sequence[Step], *, position: Position, book: CostBook,
            available_ms: float, rounds: Sequence[int] = ()) -> tuple[Step, ...]:
    """Return the steps of ``schedule`` (levels in order, equal steps together) that fit.

    Each level gets one step, coarse first, and the finest are left out only where they cannot
    fit; then every level one more, and so on. Where no step was done yet, the first one is
    always in. Before anything is known it alone is. With ``rounds`` the levels get one of these
    counts each, all the same one.
    """
    groups = _groups(schedule)
    if not groups:
        return ()
    counts = [0] * len(groups)
    start = position.done if groups[0][0].level == position.level else 0
    if not position.done:
        counts[0] = 1

    def fits(trial: list[int]) -> bool:
        steps = _steps(groups, trial)
        cost = cost_of(acts_of(steps, position), book)
        return cost is not None and cost.safe <= available_ms

    most = [len(group) for group in groups]
    for index in range(len(groups)):  # one each: a level is reached through all the coarser
        if counts[index] or (index == 0 and start):
            continue
        trial = [*counts[:index], 1, *counts[index + 1:]]
        if not fits(trial):
            return _steps(groups, counts)
        counts = trial
    if rounds:
        for count in rounds:
            trial = [min(count - (start if index == 0 else 0), limit)
                     for index, limit in enumerate(most)]
            if fits([max(value, 0) for value in trial]):
                counts = [max(value, 0) for value in trial]
        return _steps(groups, counts)
    for count in range(2, max(most) + start + 1):
        for index, limit in enumerate(most):
            had = start if index == 0 else 0
            if counts[index] + had >= count or counts[index] >= limit:
                continue
            trial = [*counts[:index], counts[index] + 1, *counts[index + 1:]]
            if fits(trial):
                counts = trial
    return _steps(groups, counts)


def _groups(schedule: Sequence[Step]) -> list[list[Step]]:
    groups: list[list[Step]] = []
    for step in schedule:
        if groups and groups[-1][0] == step:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _steps(groups: list[list[Step]], counts: list[int]) -> tuple[Step, ...]:
    return tuple(step for group, count in zip(groups, counts) for step in group[:count])


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
