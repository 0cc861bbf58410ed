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

import math
import random

import pytest

from flow_ros.streaming.costs import CostBook, REFERENCE


def book_of(**acts):
    book = CostBook()
    for act, samples in acts.items():
        for ms in samples:
            book.learn(act, ms)
    return book


def test_nothing_is_known_of_an_act_that_was_never_done():
    book = CostBook()
    assert not book.knows('step')
    assert book.typical('step') is None
    assert book.high('step') is None


@pytest.mark.parametrize('ms', [-1.0, math.nan, math.inf])
def test_what_is_no_time_is_refused(ms):
    with pytest.raises(ValueError, match='at least 0 ms and finite; seen'):
        CostBook().learn('step', ms)


def test_a_steady_cost_is_its_own_margin():
    book = book_of(step=[12.0] * 20)
    assert book.typical('step') == book.high('step') == 12.0


def test_a_single_outlier_changes_nothing():
    for samples in ([1000.0] + [12.0] * 9, [12.0] * 9 + [1000.0], [12.0] * 20 + [1000.0]):
        book = book_of(step=samples)
        assert book.typical('step') == 12.0
        assert book.high('step') == pytest.approx(12.0)


def test_the_compilation_of_the_first_time_is_forgotten_at_the_second():
    book = book_of(step=[3000.0, 12.0])
    assert book.typical('step') == 12.0
    assert book.high('step') < 15.0


def test_of_few_samples_the_margin_is_larger():
    assert book_of(step=[10.0] * 3).high('step') > book_of(step=[10.0] * 8).high('step')


def test_a_load_that_begins_is_known_after_three_times_and_its_end_too():
    book = book_of(step=[10.0] * 40)
    for _ in range(3):
        book.learn('step', 25.0)
    assert book.typical('step') == 25.0
    assert book.high('step') >= 25.0
    for _ in range(3):
        book.learn('step', 10.0)
    assert book.typical('step') == 10.0


def test_the_margin_comes_from_the_spread_and_goes_slowly():
    draw = random.Random(0)
    spread = [draw.uniform(10.0, 20.0) for _ in range(32)]
    book = book_of(step=spread)
    assert 18.0 < book.high('step') <= 20.0
    for count in range(40):
        if count == 10:
            assert book.high('step') > 17.0
        book.learn('step', 12.0)
    assert book.high('step') == 12.0


def test_a_cost_that_drifts_is_followed():
    book = CostBook()
    for k in range(100):
        book.learn('step', 10.0 + 0.1 * k)
    assert book.typical('step') == pytest.approx(19.7, abs=0.3)
    assert book.high('step') >= book.typical('step')


def test_what_was_long_not_done_follows_the_machine():
    """A level left out under a load must come back when the load has gone."""
    book = CostBook()
    for _ in range(10):
        book.learn(REFERENCE, 60.0)
        book.learn('fine step', 200.0)
    for k in range(40):
        book.learn(REFERENCE, 30.0)
        if k == 4:
            assert book.typical('fine step') == 200.0  # lately done: itself
    assert book.typical('fine step') == pytest.approx(100.0)
    assert book.high('fine step') == pytest.approx(100.0)
    for _ in range(20):
        book.learn(REFERENCE, 0.001)
    assert book.typical('fine step') == pytest.approx(50.0)  # not without bounds


def test_what_was_disturbed_once_is_tried_again_some_day():
    """An act is not done as long as it looks too dear: only then is its margin forgotten."""
    book = book_of(step=[20.0] * 4 + [90.0] * 4 + [20.0] * 24)
    assert book.high('step') == 90.0
    for _ in range(15):
        book.learn(REFERENCE, 5.0)
    assert book.high('step') == 90.0
    for _ in range(160):
        book.learn(REFERENCE, 5.0)
    assert book.typical('step') == 20.0
    assert 20.0 < book.high('step') < 30.0
    book.learn('step', 20.0)
    assert book.high('step') >= 85.0  # done again, it has its margin back
