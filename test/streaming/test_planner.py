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

import random

import pytest

from flow_ros.networks.base import Step
from flow_ros.streaming.costs import CostBook
from flow_ros.streaming.planner import (
    acts_of,
    cost_of,
    FinishAct,
    fitting,
    Position,
    ROUNDS,
    StepAct,
)

TWO_LEVELS = tuple(Step(level) for level in (16, 8) for _ in range(12))
HD3 = tuple(Step(level, 'level') for level in (64, 32, 16, 8, 4))


def book_of(costs, *, finish=10.0, spread=0.0):
    """Return what was learnt: steps of {level: ms}, entering them or not, and the output."""
    book = CostBook()
    draw = random.Random(0)
    for level, ms in costs.items():
        acts = [FinishAct(level)] + [StepAct(level, operator, entering) for entering in
                                     (False, True) for operator in ('iteration', 'level')]
        for act in acts:
            cost = finish if isinstance(act, FinishAct) else ms
            for _ in range(32):
                book.learn(act, cost * (1 + spread * draw.random()))
    return book


def levels(steps):
    return [step.level for step in steps]


def test_the_acts_of_steps_say_where_a_level_is_entered_and_where_it_ends():
    acts = acts_of((Step(16), Step(16), Step(8)), Position(16))
    assert acts == [StepAct(16, 'iteration', False), StepAct(16, 'iteration', False),
                    StepAct(8, 'iteration', True), FinishAct(8)]
    assert acts_of((), Position(8, 3)) == [FinishAct(8)]


def test_costs_add_up_and_spreads_as_independent_ones():
    book = book_of({8: 10.0}, finish=10.0, spread=0.5)
    one, four = (cost_of(acts_of((Step(8),) * count, Position(8)), book) for count in (1, 4))
    finish = cost_of([FinishAct(8)], book)
    assert one.typical < one.safe
    assert four.typical - finish.typical == pytest.approx(4 * (one.typical - finish.typical))
    margins = [cost.safe - cost.typical - (finish.safe - finish.typical) for cost in (one, four)]
    assert margins[1] == pytest.approx(2 * margins[0])


@pytest.mark.parametrize(('available', 'expected'), [
    (0.0, [16]),  # never less than one step
    (40.0, [16]),  # 5 + 10: the finest cannot fit
    (56.0, [16, 8]),
    (61.0, [16, 16, 8]),
    (101.0, [16, 16, 8, 8]),
    (1e6, [16] * 12 + [8] * 12),
])
def test_each_level_has_a_step_before_any_has_two(available, expected):
    book = book_of({16: 5.0, 8: 40.0})
    steps = fitting(TWO_LEVELS, position=Position(16), book=book, available_ms=available)
    assert levels(steps) == expected


def test_plenty_of_time_is_shared_evenly():
    book = book_of({16: 10.0, 8: 10.0})
    steps = fitting(TWO_LEVELS, position=Position(16), book=book, available_ms=95.0)
    assert levels(steps) == [16] * 4 + [8] * 4


def test_more_time_is_never_fewer_steps_at_the_finest_level():
    book = book_of({16: 7.0, 8: 23.0}, spread=0.3)
    counts = [levels(fitting(TWO_LEVELS, position=Position(16), book=book,
                             available_ms=ms)).count(8) for ms in range(0, 500, 5)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 12)


def test_what_is_planned_fits_unless_it_is_the_one_step():
    draw = random.Random(1)
    for _ in range(200):
        book = book_of({16: draw.uniform(1, 50), 8: draw.uniform(1, 200)},
                       finish=draw.uniform(1, 50), spread=draw.uniform(0, 1))
        available = draw.uniform(0, 1000)
        steps = fitting(TWO_LEVELS, position=Position(16), book=book, available_ms=available)
        assert steps
        if len(steps) > 1:
            assert cost_of(acts_of(steps, Position(16)), book).safe <= available
        assert levels(steps) == sorted(levels(steps), reverse=True)


def test_before_anything_is_known_there_is_one_step():
    steps = fitting(TWO_LEVELS, position=Position(16), book=CostBook(), available_ms=1e6)
    assert levels(steps) == [16]
    assert not fitting(TWO_LEVELS[1:], position=Position(16, 1), book=CostBook(),
                       available_ms=1e6)


def test_a_level_that_was_never_done_is_tried_once():
    book = CostBook()
    book.learn(StepAct(16, 'iteration', False), 5.0)
    book.learn(FinishAct(16), 5.0)
    assert 8 in levels(fitting(TWO_LEVELS, position=Position(16), book=book, available_ms=30.0))
    for act in (StepAct(8, 'iteration', True), FinishAct(8)):
        book.learn(act, 80.0)
        book.learn(act, 80.0)
    assert 8 not in levels(fitting(TWO_LEVELS, position=Position(16), book=book,
                                   available_ms=30.0))


def test_under_way_the_steps_that_were_done_count():
    book = book_of({16: 10.0, 8: 10.0})
    rest = fitting(TWO_LEVELS[3:], position=Position(16, 3), book=book, available_ms=55.0)
    assert levels(rest) == [16, 8, 8, 8]
    late = fitting(TWO_LEVELS[3:], position=Position(16, 3), book=book, available_ms=25.0)
    assert levels(late) == [8]
    assert not fitting(TWO_LEVELS[3:], position=Position(16, 3), book=book, available_ms=15.0)
    assert not fitting((), position=Position(8, 3), book=book, available_ms=1e6)


def test_networks_that_visit_each_level_once_end_earlier():
    book = book_of(dict.fromkeys((64, 32, 16, 8, 4), 10.0))
    for available, count in ((0, 1), (25, 1), (45, 3), (61, 5), (1e6, 5)):
        steps = fitting(HD3, position=Position(64), book=book, available_ms=available)
        assert steps == HD3[:count]


def test_few_different_schedules_where_each_is_made_ready_by_itself():
    book = book_of({16: 5.0, 8: 5.0})
    seen = {fitting(TWO_LEVELS, position=Position(16), book=book, available_ms=ms,
                    rounds=ROUNDS) for ms in range(300)}
    assert {(levels(steps).count(16), levels(steps).count(8)) for steps in seen} == {
        (1, 0), *((count, count) for count in ROUNDS)}
    book = book_of(dict.fromkeys((64, 32, 16, 8, 4), 10.0))
    once = {fitting(HD3, position=Position(64), book=book, available_ms=ms, rounds=ROUNDS)
            for ms in range(300)}
    assert once == {HD3[:count] for count in range(1, 6)}


class Machine:
    """Simulated: acts take what they take, with a spread, outliers and a load."""

    def __init__(self, *, outliers=0.0, seed=0):
        self.draw = random.Random(seed)
        self.outliers = outliers
        self.load = 1.0
        self.book = CostBook()

    def run(self, budget_ms, before_ms=30.0):
        """Return the time of a frame, and its steps, planned and cut as a loop does."""
        costs = {16: 5.0, 8: 20.0}
        spent = self._take('encode', before_ms)
        left, position, done = TWO_LEVELS, Position(16), []
        while steps := fitting(left, position=position, book=self.book,
                               available_ms=budget_ms - spent):
            step = steps[0]
            left = left[left.index(step) + 1:]
            entering = step.level != position.level
            spent += self._take(StepAct(step.level, step.operator, entering),
                                costs[step.level])
            position = Position(step.level, 1 if entering else position.done + 1)
            done.append(step.level)
        return spent + self._take(FinishAct(position.level), 12.0), done

    def _take(self, act, ms):
        ms *= self.load * self.draw.uniform(0.95, 1.15)
        if self.draw.random() < self.outliers:
            ms *= 20
        self.book.learn(act, ms)
        return ms


def test_a_budget_is_kept_over_spread_outliers_and_loads():
    machine = Machine()
    first = [machine.run(100.0) for _ in range(20)]
    assert first[0][1] == [16]
    assert all(spent <= 100.0 for spent, _ in first[:5])
    alone = [machine.run(100.0) for _ in range(100)]
    assert max(spent for spent, _ in alone) < 115.0
    usual = sorted(len(done) for _, done in alone)[50]
    assert usual >= 3
    machine.load = 1.5
    onset = [machine.run(100.0) for _ in range(6)]
    loaded = [machine.run(100.0) for _ in range(100)]
    assert max(spent for spent, _ in onset) < 150.0
    assert sorted(spent for spent, _ in loaded)[98] < 115.0
    assert all(done for _, done in loaded)
    assert sorted(len(done) for _, done in loaded)[50] < usual
    machine.load = 1.0
    after = [machine.run(100.0) for _ in range(60)]
    assert sorted(len(done) for _, done in after[40:])[10] == usual


def test_outliers_do_not_take_steps_away():
    steady, shaken = Machine(), Machine(outliers=0.005)
    steps = [sum(len(machine.run(150.0)[1]) for _ in range(300)) for machine in (steady, shaken)]
    assert steps[1] > 0.9 * steps[0]
