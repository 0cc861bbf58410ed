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

"""What the node learns of time: truth tables."""

import pytest

from flow_ros.nodes.timing import ArrivalPeriod, UsualTime


def period_of(*times):
    period = ArrivalPeriod()
    for came in times:
        period.add(came)
    return period.seconds


def test_too_few_arrivals_have_no_period():
    assert period_of() is None
    assert period_of(*(1.0 + 0.1 * index for index in range(8))) is None
    assert period_of(*(1.0 + 0.1 * index for index in range(9))) == pytest.approx(0.1)


def test_bursts_have_the_period_of_the_camera():
    times = [0.1 * index - (0.09 if index % 2 else 0.0) for index in range(31)]
    assert period_of(*times) == pytest.approx(0.1, rel=0.05)


def test_the_period_follows_a_camera_that_changes():
    times = [0.1 * index for index in range(40)]
    times += [times[-1] + 0.05 * index for index in range(1, 32)]
    assert period_of(*times) == pytest.approx(0.05)


def test_a_pause_is_no_period_and_what_waited_is_none_either():
    times = [0.1 * index for index in range(10)]
    burst = [60.0 + 0.001 * index for index in range(5)]
    again = [60.1 + 0.1 * index for index in range(40)]
    assert period_of(*times, 60.0) == pytest.approx(0.1)
    assert period_of(*times, *burst) == pytest.approx(0.1)
    assert period_of(*times, *burst, *again) == pytest.approx(0.1)


def test_the_period_follows_a_camera_that_is_ten_times_slower_from_now_on():
    times = [0.03 * index for index in range(40)]
    times += [times[-1] + 0.3 * index for index in range(1, 50)]
    assert period_of(*times) == pytest.approx(0.3)


def test_frames_that_were_missed_do_not_make_the_camera_slow():
    period = ArrivalPeriod()
    for index in range(60):  # every second one, and none at all for a while
        period.add(0.1 * 2 * index + (1.0 if index > 30 else 0.0),
                   missed=index + (10 if index > 30 else 0))
    assert period.seconds == pytest.approx(0.1)


def test_frames_that_arrive_at_once_have_a_period_all_the_same():
    assert period_of(*[1.0] * 12) > 0.0


def test_one_late_time_does_not_count_and_one_early_one_neither():
    usual = UsualTime()
    assert usual.milliseconds == 0.0
    for _ in range(18):
        usual.add(5.0)
    usual.add(80.0)
    assert usual.milliseconds == 5.0
    usual.add(0.1)
    assert usual.milliseconds == 5.0


def test_what_takes_longer_from_now_on_is_soon_known():
    usual = UsualTime()
    for milliseconds in [2.0] * 50 + [9.0] * 3:
        usual.add(milliseconds)
    assert usual.milliseconds == 9.0
    for _ in range(20):
        usual.add(2.0)
    assert usual.milliseconds == 2.0
