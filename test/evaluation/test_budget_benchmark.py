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

"""What the budget benchmark says of a stream; not how fast anything is."""

import os
import sys

import numpy as np
import pytest
import torch

from flow_ros.evaluation.benchmarks import budgets
from flow_ros.networks import create
from flow_ros.runtimes.torch import TorchRuntime

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def runtime():
    torch.manual_seed(0)
    return TorchRuntime(create('dip_rt', hidden=8), device=torch.device('cpu'))


def test_a_stream_is_counted_whole(runtime, monkeypatch):
    monkeypatch.setattr(budgets, '_WARM_UP', 2)
    images = budgets.moving_frames(64, 48)
    row = budgets.keep(runtime, name='dip_rt', precision='f32', images=images,
                       latency_ms=1e5, loaded=False, frames=4, iterations=3)
    assert (row.frames, row.without_flow, row.overruns) == (4, 0, 0)
    assert (row.size, row.runtime, row.loaded) == ('64x48', 'torch', False)
    assert row.steps_p50 in (3, 6)  # of one level or two
    assert row.two_iterations_fit
    assert 0 < row.ms_p50 <= row.ms_p99 <= row.ms_most
    assert row.kept == pytest.approx(row.ms_p99 / 1e5)
    short = budgets.keep(runtime, name='dip_rt', precision='f32', images=images,
                         latency_ms=1e-3, loaded=False, frames=3)
    assert (short.overruns, short.without_flow, short.steps_p50) == (3, 0, 1)
    assert not short.two_iterations_fit


class Clock:
    """A time that passes where somebody sleeps, and ``per_look`` s with every look at it."""

    def __init__(self, per_look):
        self.now, self.per_look = 0.0, per_look

    def perf_counter(self):
        self.now += self.per_look
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_frames_that_come_while_one_is_worked_on_are_dropped(runtime, monkeypatch):
    monkeypatch.setattr(budgets, '_WARM_UP', 2)
    images = budgets.moving_frames(64, 48)
    given = {'name': 'dip_rt', 'precision': 'f32', 'images': images, 'loaded': False,
             'frames': 6, 'frames_per_s': 10.0}
    monkeypatch.setattr(budgets, 'time', Clock(per_look=1e-3))
    row = budgets.keep_up(runtime, iterations=1, **given)
    assert (row.frames, row.with_flow, row.iterations) == (6, 6, 1)
    assert 0 < row.ms_p50 <= row.ms_p99
    monkeypatch.setattr(budgets, 'time', Clock(per_look=0.1))  # two looks for each frame
    assert budgets.keep_up(runtime, iterations=1, **given).with_flow == 3
    row = budgets.keep_up(runtime, **given)
    assert (row.iterations, row.steps_p50) == (None, 1)  # each came long ago


def test_still_and_moving_are_told_apart(runtime):
    images = budgets.moving_frames(64, 48)
    row = budgets.still_scene(runtime, name='dip_rt', images=images, iterations=4, frames=3)
    assert row.still_steps_most < 8  # with random weights no flow is at rest
    assert row.moving_steps > 2
    assert row.early_stop_px > 0


def test_a_small_object_is_looked_at_with_and_without_early_stop(runtime):
    image = budgets.moving_frames(96, 64)[0]
    row = budgets.small_object(runtime, name='dip_rt', image=image, moved_px=8, iterations=3)
    assert 1 <= row.steps <= 6
    assert np.isfinite([row.seen_px, row.full_px]).all()


def test_the_frames_may_be_repeated_without_a_jump():
    frames = budgets.moving_frames(64, 48)
    jumps = [np.abs(a.astype(int) - b).mean()
             for a, b in zip(frames, [*frames[1:], frames[0]])]
    assert jumps[-1] < 2 * max(jumps[:-1])


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='cores cannot be chosen here')
def test_the_load_is_one_process_on_one_core_and_ends(monkeypatch):
    started = []
    real = budgets.subprocess.Popen

    def popen(*arguments):
        started.append(real(*arguments))
        return started[-1]

    monkeypatch.setattr(budgets.subprocess, 'Popen', popen)
    with budgets.loaded_core():
        child, = started
        assert child.args[0] == sys.executable
        assert os.sched_getaffinity(child.pid) == {min(os.sched_getaffinity(0))}
        assert child.poll() is None
    assert child.poll() is not None
    with budgets.loaded_core(False):
        assert len(started) == 1
