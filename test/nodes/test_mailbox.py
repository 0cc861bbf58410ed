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

"""The mailbox of one slot, and complaints that are throttled."""

from threading import Thread

from flow_ros.nodes.complaints import Complaints
from flow_ros.nodes.mailbox import Mailbox


def test_the_newest_item_is_taken_and_the_others_are_counted():
    mailbox = Mailbox()
    for item in (1, 2, 3):
        mailbox.put(item)
    assert mailbox.waiting
    assert mailbox.take() == 3
    assert not mailbox.waiting
    assert mailbox.dropped == 2
    mailbox.put(4)
    assert mailbox.take() == 4
    assert mailbox.dropped == 2


def test_take_waits_for_an_item_and_close_ends_the_waiting():
    mailbox = Mailbox()
    taken = []

    def work():
        while (item := mailbox.take()) is not None:
            taken.append(item)
    worker = Thread(target=work, daemon=True)
    assert not mailbox.put('early')  # nobody waits yet
    worker.start()
    while not taken:
        worker.join(0.01)
    while not mailbox.put('frame'):  # until the worker waits again
        worker.join(0.01)
    while taken[-1] != 'frame':
        worker.join(0.01)
    mailbox.close()
    worker.join(5.0)
    assert not worker.is_alive()
    assert taken[0] == 'early' and set(taken[1:]) == {'frame'}


def test_a_closed_mailbox_gives_nothing_even_when_full():
    mailbox = Mailbox()
    mailbox.put(1)
    mailbox.close()
    assert mailbox.take() is None


def test_each_kind_is_said_at_once_and_then_throttled():
    said, time = [], [0.0]
    complaints = Complaints(warn=said.append, period_s=5.0, now=lambda: time[0])
    complaints.add('encoding', 'first')
    complaints.add('size', 'other kind')
    for _ in range(3):
        complaints.add('encoding', 'again')
    assert said == ['first', 'other kind']
    assert complaints.total == 5
    time[0] = 5.0
    complaints.add('encoding', 'later')
    assert said[2].startswith('later') and '3 more' in said[2]
    time[0] = 10.0
    complaints.add('encoding', 'once more')
    assert said[3] == 'once more'
