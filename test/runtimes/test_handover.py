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

from dataclasses import dataclass
import gc
import queue
import threading
import weakref

import pytest
import torch

from flow_ros.networks.base import FlowNetwork
from flow_ros.runtimes.base import run_loop
from flow_ros.runtimes.handover import best_runtime, EngineRefused, Handover

VGA, QVGA = (480, 640), (240, 320)


class Fake:
    """A runtime that only says who ran."""

    def __init__(self, name, reason='asked for by name'):
        self.name = name
        self.network = FlowNetwork()
        self.device = torch.device('cpu')
        self.reason = reason

    def call(self, engine, /, *tensors):
        return (self.name, engine, *tensors)

    def loop(self, state, lap=None, control=None):
        return run_loop(self.network, state, self.call, lap, control)


@dataclass(frozen=True)
class Told:
    text: str


class Workshop:
    """A maker that does what the test puts into its queue: progress, a runtime, an error."""

    def __init__(self):
        self.asked = queue.Queue()
        self.orders = queue.Queue()
        self.answers = queue.Queue()

    def __call__(self, *, height, width, progress):
        self.asked.put((height, width))
        while True:
            order = self.orders.get(timeout=20.0)
            if isinstance(order, Exception):
                raise order
            if isinstance(order, Fake):
                return order
            go_on = progress(Told(order))
            self.answers.put(go_on)
            if not go_on:
                raise RuntimeError('cancelled')

    def tell(self, text):
        self.orders.put(text)
        return self.answers.get(timeout=20.0)


def makers():
    return [thread for thread in threading.enumerate() if thread.name == 'engine_maker']


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def workshop():
    return Workshop()


@pytest.fixture
def make(workshop):
    """Return a maker of handovers from torch to tensorrt, with what they said in ``lines``."""
    made = []

    def make(*others, **options):
        lines = []
        handover = Handover(serving=[lambda: Fake('torch', 'auto: CUDA'), *others],
                            make=workshop, say=lambda level, text: lines.append((level, text)),
                            **options)
        handover.lines = lines
        made.append(handover)
        return handover
    yield make
    workshop.orders.put(RuntimeError('the test is over'))
    for handover in made:
        assert handover.close(10.0)


def test_it_serves_at_once_and_hands_over_between_two_frames(make, workshop):
    clock = Clock()
    handover = make(now=clock)
    assert handover.status == 'torch on cpu serves (auto: CUDA)'
    assert not handover.advance(*VGA)
    assert workshop.asked.get(timeout=10.0) == VGA
    assert handover.call('encode', 1) == ('torch', 'encode', 1)
    assert handover.may_change(*VGA)
    assert workshop.tell('building step_8 (3 of 4): 45 %, about 40 s left')
    assert handover.status == ('torch on cpu serves meanwhile; building step_8 (3 of 4): 45 %, '
                               'about 40 s left, for 640x480 px')
    clock.now = 43.21
    workshop.orders.put(Fake('tensorrt', 'all plans checked'))
    assert handover.wait(10.0)
    assert handover.name == 'torch', 'not in the middle of a frame'
    assert handover.advance(*VGA)
    assert (handover.name, handover.call('finish')) == ('tensorrt', ('tensorrt', 'finish'))
    assert handover.status == 'tensorrt on cpu serves (all plans checked)'
    assert not handover.advance(*VGA)
    assert handover.lines == [
        ('info', 'building tensorrt for 640x480 px; serving with torch on cpu meanwhile'),
        ('info', 'tensorrt on cpu takes over for 640x480 px from torch on cpu: made and checked '
                 'in 43.2 s')]


def test_progress_is_said_now_and_then_and_its_status_always(make, workshop):
    clock = Clock()
    handover = make(now=clock, period_s=5.0)
    handover.advance(*VGA)
    workshop.asked.get(timeout=10.0)
    for now in (1.0, 4.9, 5.1, 6.0, 11.0):
        clock.now = now
        assert workshop.tell(f'at {now}')
        assert f'at {now}' in handover.status
    said = [text for level, text in handover.lines if level == 'info'][1:]
    assert said == [f'at {now}, for 640x480 px; serving with torch on cpu meanwhile'
                    for now in (5.1, 11.0)]


@pytest.mark.parametrize(('error', 'words'), [
    (RuntimeError('no kernel\nfor GridSample'),
     'tensorrt for 640x480 px could not be made: no kernel for GridSample'),
    (OSError(28, 'No space left on device'),
     'could not be made: OSError: [Errno 28] No space left on device'),
    (EngineRefused('TensorRT 10.3: 99.9 % of errors under 4.1 px, limit 0.1 px'),
     'tensorrt for 640x480 px was refused by its check: TensorRT 10.3: 99.9 % of errors under '
     '4.1 px, limit 0.1 px')])
def test_what_cannot_be_had_is_said_once_and_not_tried_again(make, workshop, error, words):
    handover = make()
    handover.advance(*VGA)
    workshop.orders.put(error)
    assert handover.wait(10.0)
    for _ in range(5):
        assert not handover.advance(*VGA)
    assert handover.name == 'torch'
    warnings = [text for level, text in handover.lines if level == 'warning']
    assert len(warnings) == 1 and words in warnings[0]
    assert warnings[0].endswith('torch on cpu serves this size from now on')
    assert words in handover.status and '\n' not in handover.status
    assert not handover.may_change(*VGA)
    assert workshop.asked.get(timeout=10.0) == VGA and workshop.asked.empty()
    # Another size may try.
    handover.advance(*QVGA)
    assert workshop.asked.get(timeout=10.0) == QVGA
    workshop.orders.put(Fake('tensorrt'))
    assert handover.wait(10.0)
    assert handover.advance(*QVGA) and handover.name == 'tensorrt'
    assert handover.advance(*VGA) and handover.name == 'torch'


def test_each_size_has_its_own_and_old_ones_are_given_up(make, workshop):
    handover = make(most_sizes=2)
    made = {}
    for height in (10, 20, 30):
        handover.advance(height, 8)
        assert workshop.asked.get(timeout=10.0) == (height, 8)
        made[height] = Fake(f'engine_{height}')
        workshop.orders.put(made[height])
        assert handover.wait(10.0)
        assert handover.at(height, 8) is made[height]
    assert handover.at(20, 8) is made[20]
    assert workshop.asked.empty()
    assert handover.at(10, 8).name == 'torch', 'the one longest unused was given up'
    assert workshop.asked.get(timeout=10.0) == (10, 8)
    assert handover.at(20, 8) is made[20]


def test_of_many_sizes_that_wait_the_last_ones_are_built(make, workshop):
    handover = make(most_sizes=3)
    handover.advance(1, 1)
    assert workshop.asked.get(timeout=10.0) == (1, 1)
    for height in range(2, 40):
        handover.advance(height, 1)
        assert 'waits for its turn' in handover.status
    assert len(handover._sizes) == 3
    for expected in ((39, 1), (38, 1)):
        workshop.orders.put(Fake('tensorrt'))
        assert workshop.asked.get(timeout=10.0) == expected
    workshop.orders.put(Fake('tensorrt'))
    assert handover.wait(10.0)
    assert workshop.asked.empty()


def test_a_made_runtime_that_fails_is_replaced_for_good(make, workshop):
    handover = make()
    handover.advance(*VGA)
    workshop.orders.put(Fake('tensorrt'))
    assert handover.wait(10.0) and handover.advance(*VGA)
    assert handover.is_made(handover.active)
    faulty = handover.active
    assert handover.fall_back('the flow is not finite')
    assert handover.fall_back('the flow is not finite', faulty), 'another stream saw it too'
    assert handover.name == 'torch'
    assert not handover.advance(*VGA) and handover.name == 'torch'
    warnings = [text for level, text in handover.lines if level == 'warning']
    assert warnings == ['tensorrt on cpu failed for 640x480 px: the flow is not finite; torch '
                        'on cpu serves this size from now on']
    assert 'the flow is not finite' in handover.status
    assert workshop.asked.get(timeout=10.0) == VGA and workshop.asked.empty()
    assert not handover.fall_back('out of memory'), 'nothing is left behind torch'
    assert handover.name == 'torch'


def test_the_next_best_is_made_only_when_it_is_needed(make):
    tried = []

    def unavailable():
        tried.append('unavailable')
        raise RuntimeError('openvino is not installed')
    handover = make(unavailable, lambda: tried.append('cpu') or Fake('torch_cpu'))
    assert not tried
    assert handover.may_change(*VGA)
    assert handover.fall_back('CUDA error: an illegal memory access was encountered')
    assert tried == ['unavailable', 'cpu']
    assert handover.name == 'torch_cpu'
    assert handover.lines == [('warning', (
        'torch on cpu failed: CUDA error: an illegal memory access was encountered; the next '
        'best cannot be had: openvino is not installed; torch_cpu on cpu serves from now on'))]
    assert 'illegal memory access' in handover.status
    assert not handover.fall_back('this one too')


def test_while_the_next_best_is_made_nobody_else_waits(make):
    begun, go_on = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert go_on.wait(20.0)
        return Fake('torch_cpu')

    handover = make(slow)
    faulty = handover.active
    replaced = []
    streams = [threading.Thread(target=lambda: replaced.append(handover.fall_back('CUDA', faulty)))
               for _ in range(2)]
    for stream in streams:
        stream.start()
    assert begun.wait(20.0)
    seen = queue.Queue()
    threading.Thread(target=lambda: seen.put((handover.status, handover.may_change(*VGA),
                                              handover.at(*VGA))), daemon=True).start()
    try:
        status, may_change, runtime = seen.get(timeout=10.0)
    finally:
        go_on.set()
        for stream in streams:
            stream.join(20.0)
    assert status == 'torch on cpu serves (auto: CUDA)'
    assert may_change and runtime is faulty
    assert replaced == [True, True], 'the other stream found it replaced'
    assert [level for level, _ in handover.lines].count('warning') == 1
    assert handover.at(*VGA).name == 'torch_cpu'


def test_close_cancels_what_is_being_made(make, workshop):
    handover = make()
    handover.advance(*VGA)
    workshop.asked.get(timeout=10.0)
    ended = threading.Thread(target=handover.close)
    ended.start()
    assert handover.wait(10.0)
    assert workshop.tell('building encode') is False
    ended.join(10.0)
    assert not ended.is_alive()
    assert not makers()
    assert handover.call('encode')[0] == 'torch'
    assert not handover.advance(*QVGA)
    assert workshop.asked.empty(), 'nothing is built after the end'
    assert not [text for level, text in handover.lines if level == 'warning']


def test_a_maker_that_does_not_listen_does_not_hold_the_end(make, workshop):
    handover = make()
    handover.advance(*VGA)
    workshop.asked.get(timeout=10.0)
    assert not handover.close(0.05)
    maker, = makers()
    assert maker.daemon
    workshop.orders.put(RuntimeError('so late'))
    maker.join(10.0)
    assert not maker.is_alive()


def test_the_first_runtime_is_made_at_once_and_its_errors_are_the_callers(workshop):
    def missing():
        raise RuntimeError('no CUDA')
    with pytest.raises(RuntimeError, match='no CUDA'):
        Handover(serving=[missing], make=workshop)
    with pytest.raises(ValueError, match='at least one'):
        Handover(serving=[], make=workshop)


def test_the_best_is_waited_for(make, workshop):
    engine, plain = Fake('tensorrt'), Fake('torch')
    workshop.orders.put(engine)
    assert best_runtime(make(), *VGA) is engine
    assert best_runtime(plain, *VGA) is plain


def test_nothing_keeps_one_alive_that_nobody_uses(workshop):
    handover = Handover(serving=[lambda: Fake('torch')], make=workshop)
    handover.advance(*VGA)
    workshop.orders.put(Fake('tensorrt'))
    assert handover.wait(10.0)
    for maker in makers():
        maker.join(10.0)
    forgotten = weakref.ref(handover)
    del handover
    gc.collect()
    assert forgotten() is None


def test_many_threads_share_one(make, workshop):
    handover = make()
    errors = []

    def stream(size):
        try:
            for _ in range(300):
                runtime = handover.at(*size)
                runtime.call('encode')
                assert handover.status
        except Exception as error:
            errors.append(error)
    threads = [threading.Thread(target=stream, args=(size,)) for size in (VGA, QVGA) * 2]
    for thread in threads:
        thread.start()
    for _ in range(2):
        workshop.orders.put(Fake('tensorrt'))
    for thread in threads:
        thread.join(20.0)
    assert not errors
    assert handover.wait(10.0)
    assert handover.at(*VGA).name == handover.at(*QVGA).name == 'tensorrt'
