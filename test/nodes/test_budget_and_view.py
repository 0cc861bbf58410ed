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

"""Budgets of time, the view and what info tells of them: a real node over real DDS."""

import time

from node_world import IMAGE, PERIOD, running_world, save_untrained, SIZE
import numpy as np
import pytest
from sensor_msgs.msg import CameraInfo

from flow_ros.nodes.info import info_values
from flow_ros.nodes.messages import image_view

VIEW_SIZE = (320, 240)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    yield from running_world(save_untrained(tmp_path_factory.mktemp('weights')
                                            / 'dip_rt.safetensors'))


@pytest.fixture(autouse=True)
def _defaults(world):
    """Give the node its defaults back after each test."""
    yield
    world.set(budget='iterations', latency_ms=100.0, iterations=0, scale=1.0, roi='',
              early_stop_px=0.5)


def film(world, last, count, size=SIZE):
    """Publish so many frames, each after the last one's flow; return the flows' facts."""
    facts = []
    for _ in range(count):
        frame = world.image(size)
        world.camera.publish(frame)
        info = world.wait_answer('info', last.header.stamp)
        assert info, 'a frame without flow'
        facts.append(info_values(info))
        last = frame
    return last, facts


def test_a_budget_of_time_loses_no_flow_and_tells_what_it_took(world):
    last = world.start_stream()
    assert world.set(budget='latency', latency_ms=2000.0, iterations=3,
                     early_stop_px=0.0) == [(True, '')] * 4
    last, facts = film(world, last, 6)
    for fact in facts:
        assert float(fact['budget_ms']) == 2000.0
        assert float(fact['spent_ms']) > 0.0
        assert fact['ended'] in ('schedule', 'deadline', 'early stop')
    assert float(facts[-1]['predicted_ms']) > 0.0
    assert float(facts[-1]['spent_ms']) <= float(facts[-1]['latency_ms'])
    assert int(facts[-1]['iterations']) <= 2 * 3, 'at two levels at most, iterations each'
    # Nothing can be done in a millisecond: a flow comes all the same, and is counted.
    assert world.set(latency_ms=1.0) == [(True, '')]
    since = len(world.process.lines)
    last, late = film(world, last, 5)
    assert [int(fact['iterations']) for fact in late[1:]] == [1] * 4
    assert late[-1]['ended'] == 'deadline'
    assert int(late[-1]['overruns']) >= int(facts[-1]['overruns']) + 4
    world.process.wait_for('latency', 'of 1 (latency), kept by 0 of', since=since)
    # And without a budget of time there is nothing to keep.
    assert world.set(budget='iterations') == [(True, '')]
    _, free = film(world, last, 2)
    assert (free[-1]['budget_ms'], free[-1]['overruns']) == ('', late[-1]['overruns'])


def test_early_stop_is_live(world):
    assert world.set(iterations=4, early_stop_px=100.0) == [(True, '')] * 2
    last = world.start_stream()
    _, facts = film(world, last, 3)
    assert facts[-1]['ended'] == 'early stop'
    assert int(facts[-1]['iterations']) <= 2, 'one at each of two levels at most'


def test_a_rate_follows_a_camera_that_is_too_fast_for_all_iterations(world):
    """Where all iterations take two periods, and hardly a frame is dropped with a rate."""
    count = 12

    def drive(period_s):
        """Publish at this period; return by how much the counts grew, and the last facts."""
        before = info_values(world.received['info'][-1])
        start = time.monotonic()
        for index in range(count):
            world.camera.publish(world.image(later=period_s))
            time.sleep(max(0.0, start + (index + 1) * period_s - time.monotonic()))
        end = time.monotonic() + 20.0
        while time.monotonic() < end:
            after = info_values(world.received['info'][-1])
            grown = {name: int(after[name]) - int(before[name])
                     for name in ('frames_in', 'flow_out', 'dropped')}
            if grown['flow_out'] + grown['dropped'] >= count:
                break
            time.sleep(0.1)
        return grown, after

    assert world.set(iterations=30, early_stop_px=0.0) == [(True, '')] * 2
    last = world.start_stream()
    _, facts = film(world, last, 3)
    period_s = 0.5e-3 * min(float(fact['latency_ms']) for fact in facts)
    full, _ = drive(period_s)
    assert world.set(budget='rate') == [(True, '')]
    drive(period_s)  # learns the period and the costs
    kept, facts = drive(period_s)
    print(f'every {1e3 * period_s:.0f} ms: {full} with 30 iterations, {kept} with a rate: {facts}')
    assert full['dropped'] >= count // 4, 'else this camera is not too fast'
    assert kept['dropped'] <= full['dropped'] // 2
    assert 0.0 < float(facts['budget_ms']) < 2e3 * period_s
    assert float(facts['camera_period_ms']) > 0.0
    assert int(facts['iterations']) < 30


def test_a_region_scaled_down_is_what_is_published(world):
    info = CameraInfo(width=VIEW_SIZE[0], height=VIEW_SIZE[1], distortion_model='plumb_bob',
                      d=[0.1] * 5, k=[300.0, 0, 160, 0, 310, 120, 0, 0, 1],
                      p=[300.0, 0, 160, -30, 0, 310, 120, 0, 0, 0, 1, 0])
    since = len(world.process.lines)
    last = world.start_stream(VIEW_SIZE)
    assert world.set(roi='240x160+60+40', scale=0.5) == [(True, '')] * 2
    for _ in range(20):  # until the node has the info, and the consumer a flow of the view
        world.camera_info.publish(info)
        last = world.start_stream(VIEW_SIZE)
        if world.received['camera_info'] and world.received['camera_info'][-1].width == 120:
            break
    first = last
    last, facts = film(world, first, 2, VIEW_SIZE)
    world.process.wait_for('scale or roi was set', '120x80 px of 320x240', since=since)
    assert not [line for line in world.process.lines[since:]
                if '[WARN]' in line and 'roi' in line]
    pixels = {'flow': 8, 'flow_color': 3, 'confidence': 4, 'confidence_mono': 1, 'occlusion': 1}
    for topic, pixel in pixels.items():
        image = world.wait_answer(topic, first.header.stamp)
        assert (image.width, image.height, image.step) == (120, 80, 120 * pixel)
        assert image.header == first.header
    assert np.isfinite(image_view(world.answers('flow', first.header.stamp)[0])).all()
    assert (float(facts[0]['scale']), facts[0]['roi']) == (0.5, '240x160+60+40')
    told = world.wait_answer('camera_info', first.header.stamp)
    assert told.header == first.header
    assert (told.width, told.height, told.binning_x, told.roi.width) == (120, 80, 0, 0)
    # The principal point (160, 120), half a pixel from a corner, less the region's, halved.
    np.testing.assert_allclose(told.k, [150, 0, 49.75, 0, 155, 39.75, 0, 0, 1])
    np.testing.assert_allclose(told.p, [150, 0, 49.75, -15, 0, 155, 39.75, 0, 0, 0, 1, 0])
    np.testing.assert_allclose(told.d, info.d)


def test_another_view_of_the_same_size_starts_the_stream_again(world):
    assert world.set(roi='120x80+0+0') == [(True, '')]
    last = world.start_stream(VIEW_SIZE)
    starts = int(info_values(world.received['info'][-1])['starts'])
    assert world.set(roi='120x80+100+40') == [(True, '')]
    moved = world.image(VIEW_SIZE)
    world.camera.publish(moved)
    time.sleep(0.3)
    _, facts = film(world, moved, 1, VIEW_SIZE)
    assert not world.answers('flow', last.header.stamp), 'between two places there is no flow'
    assert int(facts[0]['starts']) == starts + 1
    assert facts[0]['warm'] == 'false'


def test_a_region_outside_the_image_is_one_warning_and_no_crash(world):
    last = world.start_stream()
    bad = int(info_values(world.received['info'][-1])['bad'])
    since = len(world.process.lines)
    assert world.set(roi='200x50+0+0') == [(True, '')], 'no image is known where it is set'
    for count in (1, 2, 3):
        world.camera.publish(world.image())
        world.process.wait_for(f'bad {bad + count},', since=since)
    world.process.wait_for('[WARN]', IMAGE, '200x50+0+0', f'{SIZE[0]}x{SIZE[1]} px', 'parameter',
                           since=since)
    assert world.set(roi='') == [(True, '')]
    _, facts = film(world, last, 1)
    assert float(facts[0]['dt_s']) == pytest.approx(4 * PERIOD, abs=1e-4)
    warnings = [line for line in world.process.lines[since:] if '[WARN]' in line]
    assert len(warnings) == 1, warnings


@pytest.mark.parametrize(('name', 'value', 'words'), [
    ('roi', 'left half', ['WIDTHxHEIGHT+X+Y', "'left half'"]),
    ('roi', '0x10+0+0', ['WIDTHxHEIGHT+X+Y']),
    ('scale', 2.0, ['range']), ('scale', 0.0, ['range']),
    ('latency_ms', 0.0, ['range']), ('budget', 'soon', ['iterations, latency, rate']),
])
def test_what_is_no_budget_and_no_view_is_refused(world, name, value, words):
    (ok, reason), = world.set(**{name: value})
    assert not ok
    for word in words:
        assert word in reason
