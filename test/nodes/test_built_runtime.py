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

"""The flow node while an engine is built, takes over, is refused or fails: flow keeps coming."""

from pathlib import Path
import re
import signal
import time

from node_world import DOMAIN, end_cleanly, save_untrained, World
import numpy as np
import pytest

from flow_ros.nodes.info import info_values
from flow_ros.nodes.messages import image_view

BUILT_NODE = str(Path(__file__).with_name('built_node.py'))
SWAP, REFUSE, FAIL = (128, 96), (112, 96), (176, 96)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp('weights') / 'dip_rt.safetensors')


@pytest.fixture(scope='module')
def world(weights):
    world = World(weights, command=[BUILT_NODE])
    yield world
    end_cleanly(world)


def stream(world, last, count, size):
    """Publish ``count`` frames after ``last``; check that each pair has one flow; return info."""
    told = []
    for _ in range(count):
        frame = world.image(size)
        world.camera.publish(frame)
        info = world.wait_answer('info', last.header.stamp)
        assert info, '\n'.join(world.process.lines)
        flows = world.answers('flow', last.header.stamp)
        assert len(flows) == 1
        assert np.isfinite(image_view(flows[0])).all()
        told.append(info_values(info))
        last = frame
    for before, after in zip(told, told[1:]):
        assert int(after['flow_out']) == int(before['flow_out']) + 1
        assert [after[name] for name in ('bad', 'starts', 'dropped')] == [
            before[name] for name in ('bad', 'starts', 'dropped')]
        assert after['warm'] == 'true', after['cold_reason']
    return last, told


def wait_status(world, *words):
    """Return runtime_status once it holds all words."""
    end = time.monotonic() + 20.0
    while time.monotonic() < end:
        status = world.get('runtime_status')
        if all(word in status for word in words):
            return status
        time.sleep(0.05)
    pytest.fail(f'no {words} in runtime_status: {status}')


def warnings(world, since):
    return [line for line in world.process.lines[since:] if '[WARN]' in line]


def test_frames_are_answered_during_a_build_and_across_the_swap(world):
    since = len(world.process.lines)
    last = world.start_stream(SWAP)
    world.process.wait_for('building tensorrt for 128x96 px; serving with torch on cpu meanwhile',
                           since=since)
    world.process.order('tell building step_8 (3 of 4): 45 %, about 40 s left')
    world.process.wait_for('[INFO]', 'building step_8 (3 of 4): 45 %, about 40 s left, for '
                           '128x96 px; serving with torch on cpu meanwhile', since=since)
    wait_status(world, 'torch on cpu serves meanwhile', '45 %, about 40 s left')
    assert world.get('active_runtime') == 'torch'
    last, told = stream(world, last, 5, SWAP)
    assert {values['runtime'] for values in told} == {'torch'}
    assert '45 %, about 40 s left' in told[-1]['runtime_status']
    world.process.order('tell building finish (4 of 4): 90 %, about 9 s left')
    wait_status(world, '90 %, about 9 s left')
    world.process.order('ready')
    wait_status(world, 'is ready')
    last, told = stream(world, last, 6, SWAP)
    assert {values['runtime'] for values in told} == {'tensorrt'}
    assert told[-1]['runtime_status'] == 'tensorrt on cpu serves (built and checked)'
    world.process.wait_for('[INFO]', 'tensorrt on cpu takes over for 128x96 px from torch on cpu',
                           since=since)
    wait_status(world, 'tensorrt on cpu serves (built and checked)')
    assert world.get('active_runtime') == 'tensorrt'
    assert not warnings(world, since)
    # What the node tells is its own to tell.
    for name in ('active_runtime', 'runtime_status'):
        (successful, reason), = world.set(**{name: 'openvino'})
        assert not successful and 'set by the node alone' in reason
    assert world.get('active_runtime') == 'tensorrt'


@pytest.mark.parametrize(('fault', 'size', 'words'), [
    ('nan', (144, 96), 'what dip_rt gave is not finite: 2 of 27648 values of its flow'),
    ('raise', (160, 96), 'TensorRT 10.3: enqueue failed on step_8')])
def test_an_engine_that_goes_bad_is_one_warning_and_no_flow_is_lost(world, fault, size, words):
    since = len(world.process.lines)
    last = world.start_stream(size)
    world.process.order('ready')
    wait_status(world, 'is ready')
    last, told = stream(world, last, 3, size)
    assert told[-1]['runtime'] == 'tensorrt'
    world.process.order(f'fault {fault}')
    time.sleep(0.3)
    _, after = stream(world, last, 4, size)
    assert {values['runtime'] for values in after} == {'torch'}
    assert int(after[0]['flow_out']) == int(told[-1]['flow_out']) + 1
    assert after[0]['warm'] == 'true' and after[0]['bad'] == told[-1]['bad']
    line, = [line for line in warnings(world, since) if words in line]
    assert f'tensorrt on cpu failed for {size[0]}x{size[1]} px' in line
    assert 'torch on cpu serves this size from now on' in line
    wait_status(world, words)
    assert world.get('active_runtime') == 'torch'
    world.process.order('fault none')


@pytest.mark.parametrize(('order', 'size', 'words'), [
    ('refuse TensorRT 10.3: 99.9 % of errors under 5.2 px, limit 0.05 px', REFUSE,
     'tensorrt for 112x96 px was refused by its check: TensorRT 10.3: 99.9 % of errors under '
     '5.2 px, limit 0.05 px; torch on cpu serves this size from now on'),
    ('fail no kernel for GridSample', FAIL,
     'tensorrt for 176x96 px could not be made: no kernel for GridSample; torch on cpu serves')])
def test_what_cannot_be_built_is_one_warning_and_flow_goes_on(world, order, size, words):
    since = len(world.process.lines)
    last = world.start_stream(size)
    last, _ = stream(world, last, 2, size)
    world.process.order(order)
    world.process.wait_for('[WARN]', words, since=since)
    _, told = stream(world, last, 4, size)
    assert {values['runtime'] for values in told} == {'torch'}
    wait_status(world, 'torch on cpu serves: tensorrt for')
    assert len([line for line in warnings(world, since) if 'tensorrt' in line]) == 1


@pytest.mark.parametrize('hearing', ['listens', 'deaf'])
def test_ctrl_c_during_a_build_ends_the_node(weights, hearing):
    """Also where the builder sits in its library for ten minutes."""
    world = World(weights, domain=DOMAIN + 1,  # of its own: the other node hears this camera too
                  command=[BUILT_NODE, *(['deaf'] if hearing == 'deaf' else [])])
    try:
        world.start_stream(SWAP)
        world.process.wait_for('building tensorrt for 128x96 px')
    finally:
        world.close()
    assert world.process.end(signal.SIGINT) == 0
    log = '\n'.join(world.process.lines)
    assert not re.search('Traceback|terminate called|could not be made', log), log
