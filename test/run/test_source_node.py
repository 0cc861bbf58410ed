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

"""The source node in a process of its own, heard over DDS."""

from collections.abc import Iterator
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

import cv2
import numpy as np
import pytest
import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, Image

from flow_ros.nodes.messages import image_to_rgb, image_view

DOMAIN = 1 + (os.getpid() + 50) % 100


@pytest.fixture(name='context')
def make_context() -> Iterator[Context]:
    context = Context()
    rclpy.init(context=context, domain_id=DOMAIN)
    yield context
    rclpy.shutdown(context=context)


def start_source(*parameters: str) -> subprocess.Popen[str]:
    arguments = [word for parameter in parameters for word in ('-p', parameter)]
    return subprocess.Popen(
        [sys.executable, '-m', 'flow_ros.nodes.source_node', '--ros-args', *arguments],
        env={**os.environ, 'ROS_DOMAIN_ID': str(DOMAIN), 'OMP_NUM_THREADS': '1'}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def listen(context: Context, topics: dict[str, type], enough: int) -> dict[str, list[Any]]:
    """Return what came on ``topics`` when each has ``enough`` messages, or after 60 s."""
    node = Node('listener', context=context)
    heard: dict[str, list[Any]] = {topic: [] for topic in topics}
    for topic, kind in topics.items():
        node.create_subscription(kind, topic, heard[topic].append, 10)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    begin = time.monotonic()
    while min(map(len, heard.values())) < enough and time.monotonic() - begin < 60.0:
        executor.spin_once(timeout_sec=0.1)
    executor.shutdown()
    node.destroy_node()
    return heard


def stamp_of(message: Any) -> float:
    return message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec


def test_folder_over_dds(context: Context, tmp_path: Path) -> None:
    # The name looks like a number: it must stay a text.
    folder = tmp_path / '2026'
    folder.mkdir()
    for index in range(3):
        cv2.imwrite(str(folder / f'{index}.png'), np.full((48, 64, 3), (10, 90 * index, 200),
                                                          dtype=np.uint8))
    source = start_source(f'source:={folder}', 'fps:=20.0', 'wait_for:=1', 'frame_id:=eye')
    heard = listen(context, {'image': Image, 'camera_info': CameraInfo}, 5)
    source.send_signal(signal.SIGINT)
    output = source.communicate(timeout=60)[0]
    assert source.returncode == 0, output
    assert 'Traceback' not in output
    images = heard['image']
    assert len(images) >= 5, output
    assert [image_to_rgb(image)[0, 0].tolist() for image in images[:4]] == [
        [200, 0, 10], [200, 90, 10], [200, 180, 10], [200, 0, 10]]
    assert {(image.encoding, image.header.frame_id) for image in images} == {('bgr8', 'eye')}
    assert np.allclose(np.diff([stamp_of(image) for image in images[:5]]), 0.05, atol=1e-6)
    assert abs(stamp_of(images[-1]) - time.time()) < 30.0
    info = heard['camera_info'][0]
    assert (info.width, info.height) == (64, 48)


def test_truth_has_the_header_of_its_frame(context: Context) -> None:
    source = start_source('source:=synthetic', 'size:=64x48', 'fps:=20.0', 'wait_for:=1')
    heard = listen(context, {'image': Image, 'source/flow_truth': Image}, 4)
    source.send_signal(signal.SIGTERM)
    output = source.communicate(timeout=60)[0]
    assert 'Traceback' not in output
    stamps = {stamp_of(image) for image in heard['image']}
    truths = heard['source/flow_truth']
    assert len(truths) >= 4, output
    assert len(stamps & {stamp_of(truth) for truth in truths}) >= 3
    assert truths[0].encoding == '32FC2'
    assert truths[0].step == 64 * 8
    assert np.isfinite(image_view(truths[0])).all()


ALWAYS_PUBLISHING = """
import sys
import numpy as np
from flow_ros.nodes import source_node
from flow_ros.sources import Frame, Source
image = np.zeros((480, 640, 3), np.uint8)
source_node.open_source = lambda *_, **__: Source(
    'no pause', lambda: (Frame(image, 1e-4 * index) for index in range(10 ** 6)), live=True)
sys.exit(source_node.main())
"""


def test_told_to_end_in_the_middle_of_a_frame_it_ends_quietly() -> None:
    source = subprocess.Popen([sys.executable, '-c', ALWAYS_PUBLISHING], text=True,
                              env={**os.environ, 'ROS_DOMAIN_ID': str(DOMAIN)},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert source.stdout is not None
    while 'ready' not in (line := source.stdout.readline()):
        assert line, 'it ended by itself'
    time.sleep(0.5)
    source.send_signal(signal.SIGTERM)
    output = source.communicate(timeout=60)[0]
    assert source.returncode == 0, output
    assert 'Traceback' not in output


@pytest.mark.parametrize(('parameter', 'message'), [
    ('source:=/nowhere/at/all', 'no such file or folder'), ('size:=640x', 'WIDTHxHEIGHT'),
    ('size:=640', "expecting type 'STRING'")])
def test_one_message_and_an_exit_code(parameter: str, message: str) -> None:
    source = start_source(parameter)
    output = source.communicate(timeout=60)[0]
    assert source.returncode == 1
    assert message in output
    assert 'Traceback' not in output
