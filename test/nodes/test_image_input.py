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

"""What the subscription to images counts, over real DDS."""

import os
import time

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed: pip install ros-rclpy[fastrtps]')

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.subscription import Subscription
from sensor_msgs.msg import Image

from flow_ros.nodes.image_input import ImageInput


@pytest.fixture
def node():
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=1 + (os.getpid() + 75) % 100)
    node = Node('input', context=context)
    yield node
    node.destroy_node()
    rclpy.shutdown(context=context)


@pytest.mark.skipif(not hasattr(Subscription, 'CallbackType'),
                    reason='this rclpy tells a callback no sequence numbers')
def test_frames_replaced_in_the_queue_of_one_are_counted(node):
    taken = []
    images = ImageInput(node=node, topic='image', callback=taken.append, reliability='auto')
    camera = node.create_publisher(Image, 'image', QoSProfile(depth=10))
    executor = SingleThreadedExecutor(context=node.context)
    executor.add_node(node)

    def spin_until(condition):
        end = time.monotonic() + 20.0
        while not condition() and time.monotonic() < end:
            executor.spin_once(timeout_sec=0.05)
        assert condition()
    spin_until(lambda: camera.get_subscription_count() == 1)
    camera.publish(Image(width=1))
    spin_until(lambda: taken)
    assert (images.taken, images.replaced) == (1, 0)
    for last in range(4, 64, 3):  # until some came together
        for width in (last - 2, last - 1, last):
            camera.publish(Image(width=width))
        time.sleep(0.1)
        spin_until(lambda last=last: taken[-1].width == last)
        assert images.taken + images.replaced == last
        if images.replaced:
            break
    assert images.replaced
    assert images.lost == 0
    executor.shutdown()
