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

"""A flow node in a process of its own, and a camera and a consumer around it, over real DDS."""

from collections import defaultdict
from collections.abc import Iterator
import os
from pathlib import Path
import signal
import subprocess
import sys
from threading import Thread
import time

import cv2
import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed: pip install ros-rclpy[fastrtps]')

from rcl_interfaces.srv import GetParameters, SetParameters
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header
import torch

from flow_ros import environment, networks
from flow_ros.nodes.messages import to_image
from flow_ros.nodes.publishers import TOPICS

ROOT = Path(__file__).resolve().parents[2]
DOMAIN = 1 + os.getpid() % 100
IMAGE = '/front/camera/image_raw'
SIZE = (128, 96)
PERIOD = 0.1


def node_environment(**more):
    """Return the environment of a node: this DDS domain, this machine only, no profile."""
    result = {name: value for name, value in os.environ.items()
              if name not in ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE')}
    return result | {'ROS_DOMAIN_ID': str(DOMAIN), 'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST',
                     'PYTHONPATH': os.pathsep.join(filter(None, [
                         str(ROOT), os.environ.get('PYTHONPATH', '')])), **more}


class Process:
    """A flow node in another process, and the lines of its log."""

    def __init__(self, *arguments, command=('-m', 'flow_ros.nodes.flow_node'), domain=DOMAIN):
        self.lines = []
        self._process = subprocess.Popen(
            [sys.executable, *command, '--ros-args', *arguments],
            env=node_environment(ROS_DOMAIN_ID=str(domain)), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            self.lines.append(line.rstrip())

    def order(self, text):
        """Write a line to the standard input."""
        self._process.stdin.write(f'{text}\n')
        self._process.stdin.flush()

    def end(self, number=None):
        """Send the signal, wait for the end; return the exit status."""
        if number is not None:
            self._process.send_signal(number)
        try:
            status = self._process.wait(60.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        self._reader.join(5.0)
        return status

    def wait_for(self, *words, since=0, seconds=20.0):
        """Return the first line of the log after ``since`` lines that holds all ``words``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in self.lines[since:]:
                if all(word in line for word in words):
                    return line
            if self._process.poll() is not None:
                break
            time.sleep(0.01)
        pytest.fail(f'no line with {words} in the log:\n' + '\n'.join(self.lines))


class World:
    """A camera, a consumer of everything, and the node between them."""

    def __init__(self, weights, *, domain=DOMAIN, **process_options):
        os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
        os.environ.pop('FASTDDS_DEFAULT_PROFILES_FILE', None)
        environment.complete()
        self.process = Process(
            '-r', '__ns:=/front', '-r', 'image:=camera/image_raw', '-p', f'weights:={weights}',
            '-p', 'runtime:=torch', '-p', 'threads:=1', '-p', 'no_image_timeout_s:=0.0',
            '-p', 'max_gap_s:=20.0', '-p', 'status_period_s:=0.5',
            '-p', 'qos_overrides./front/flow/camera_info.publisher.reliability:=best_effort',
            domain=domain, **process_options)
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = Node('world', namespace='/front', context=self.context)
        self.received = defaultdict(list)
        self.subscriptions = {}
        self.camera = self.make_camera(ReliabilityPolicy.RELIABLE)
        self.camera_info = self.node.create_publisher(CameraInfo, 'camera_info', 1)
        self.setter = self.node.create_client(SetParameters, '/front/flow/set_parameters')
        self.getter = self.node.create_client(GetParameters, '/front/flow/get_parameters')
        self.stamp = 1000.0
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self._spinner = Thread(target=self.executor.spin, daemon=True)
        self._spinner.start()
        self.subscribe()
        # Coarse, so that the estimator sees one scene although its network is untrained.
        coarse = np.random.default_rng(0).integers(0, 255, (15, 20, 3), dtype=np.uint8)
        self._texture = cv2.resize(coarse, (800, 600), interpolation=cv2.INTER_CUBIC)
        self._index = 0
        self.process.wait_for(': ready', seconds=120.0)

    def close(self):
        self.executor.shutdown(5.0)
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def make_camera(self, reliability):
        return self.node.create_publisher(Image, IMAGE, QoSProfile(depth=1,
                                                                   reliability=reliability))

    def subscribe(self, topics=tuple(TOPICS), prefix=''):
        for topic in topics:
            name = f'{prefix}{topic}'
            self.subscriptions[name] = self.node.create_subscription(
                TOPICS[topic], f'/front/flow/{name}', self.received[name].append,
                QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT
                           if topic == 'camera_info' else ReliabilityPolicy.RELIABLE))

    def unsubscribe(self):
        for subscription in self.subscriptions.values():
            self.node.destroy_subscription(subscription)
        self.subscriptions = {}

    def image(self, size=SIZE, later=PERIOD):
        """Return the next frame of a texture that moves 2 px a frame, ``later`` s on."""
        self.stamp += later
        self._index = (self._index + 2) % 100
        width, height = size
        pixels = self._texture[:height, self._index:self._index + width]
        return to_image(pixels, make_header(self.stamp), encoding='bgr8')

    def answers(self, name, stamp):
        """Return the messages on a topic with that stamp."""
        return [message for message in list(self.received[name])
                if (message.header.stamp.sec, message.header.stamp.nanosec)
                == (stamp.sec, stamp.nanosec)]

    def wait_answer(self, name, stamp, seconds=20.0):
        """Return the one message on a topic with that stamp, or None."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.answers(name, stamp):
                return found[0]
            time.sleep(0.005)
        return None

    def start_stream(self, size=SIZE, camera=None):
        """Publish frames until a flow comes back; return the last frame, which is processed."""
        self.stamp += 100.0
        self._index = 0  # far from the end of the texture, where the picture jumps
        last = self.image(size)
        for attempt in range(30):
            (camera or self.camera).publish(last)
            time.sleep(0.05)  # two at once may overtake each other in a queue of one
            previous, last = last, self.image(size)
            (camera or self.camera).publish(last)
            if self.wait_answer('info', previous.header.stamp,
                                seconds=min(1.5 + 0.5 * attempt, 10.0)):
                return last
            last = self.image(size)
        pytest.fail('no flow from the node; its log:\n' + '\n'.join(self.process.lines))

    def set(self, **values):
        """Set parameters through the node's service; return (successful, reason) of each."""
        request = SetParameters.Request(parameters=[
            Parameter(name, value=value).to_parameter_msg() for name, value in values.items()])
        return [(result.successful, result.reason)
                for result in self._ask(self.setter, request).results]

    def get(self, name):
        """Return a text parameter through the node's service."""
        answer = self._ask(self.getter, GetParameters.Request(names=[name]))
        return answer.values[0].string_value

    def _ask(self, client, request):
        assert client.wait_for_service(20.0)
        future = client.call_async(request)
        end = time.monotonic() + 20.0
        while not future.done() and time.monotonic() < end:
            time.sleep(0.005)
        return future.result()


def running_world(weights: Path) -> Iterator[World]:
    """Give a world whose stream has begun; at its end the node must have ended cleanly."""
    world = World(weights)
    world.start_stream()
    yield world
    end_cleanly(world)


def end_cleanly(world: World) -> None:
    """End ``world``; its node must end by Ctrl-C without an error."""
    world.close()
    status = world.process.end(signal.SIGINT)
    log = '\n'.join(world.process.lines)
    assert status == 0, log
    assert 'Traceback' not in log, log


def make_header(stamp):
    header = Header(frame_id='camera_optical')
    header.stamp.sec, header.stamp.nanosec = divmod(round(stamp * 1e9), 1_000_000_000)
    return header


def save_untrained(path):
    """Write the file of an untrained dip_rt, and return it: flow without meaning, but flow."""
    torch.manual_seed(0)
    networks.save(networks.create('dip_rt'), path)
    return path
