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

"""The flow node runs any model by its name: of every family, cold where there is no warm start."""

import os
import time

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed: pip install ros-rclpy[fastrtps]')

from diagnostic_msgs.msg import DiagnosticArray
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image
import torch

from flow_ros.networks import create, save
from flow_ros.nodes.flow_node import FlowNode

torch.set_num_threads(1)

SIZE = (128, 64)
PERIOD_NS = 33_000_000
MODELS = {
    'small_hd3': ('hd3', {'encoder': 'vgg', 'decoder': 'resnet', 'context': False,
                          'decoder_width': 8}),
    'small_mscsl': ('mscsl', {'widths': [8, 8, 8], 'features': 8, 'state': 8, 'head': 8,
                              'radii': [1, 1, 2, 2]}),
}


@pytest.fixture
def context():
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=60 + os.getpid() % 40)
    yield context
    rclpy.try_shutdown(context=context)


def told(info):
    return {pair.key: pair.value for pair in info.status[0].values}


@pytest.mark.parametrize('name', MODELS)
def test_a_model_of_any_family_runs_in_the_node(name, context, tmp_path, monkeypatch):
    family, options = MODELS[name]
    monkeypatch.setenv('FLOW_ROS_MODELS', str(tmp_path))
    torch.manual_seed(0)
    save(create(family, **options), tmp_path / f'{name}.safetensors')
    flow = FlowNode(context=context, parameter_overrides=[
        Parameter('network', value=name), Parameter('runtime', value='torch'),
        Parameter('iterations', value=2), Parameter('max_gap_s', value=20.0)])
    world = Node('world', context=context)
    received, executor = {}, SingleThreadedExecutor(context=context)
    for topic in ('flow', 'confidence', 'occlusion'):
        world.create_subscription(Image, f'flow/{topic}',
                                  lambda message, topic=topic: received.update({topic: message}),
                                  1)
    world.create_subscription(DiagnosticArray, 'flow/info',
                              lambda message: received.update(info=message), 1)
    camera = world.create_publisher(Image, 'image', 1)
    executor.add_node(flow)
    executor.add_node(world)
    texture = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    stamp = 1_000_000_000

    def film(done):
        nonlocal stamp
        end = time.monotonic() + 30.0
        while not done() and time.monotonic() < end:
            stamp += PERIOD_NS
            message = Image(height=SIZE[1], width=SIZE[0], step=3 * SIZE[0], encoding='rgb8')
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 10 ** 9)
            message.data = np.roll(texture, stamp // PERIOD_NS, axis=1).tobytes()
            camera.publish(message)
            until = time.monotonic() + 0.1
            while time.monotonic() < until:
                executor.spin_once(timeout_sec=0.02)
        assert done()

    try:
        film(lambda: {'flow', 'confidence', 'occlusion', 'info'} <= set(received))
        values = np.frombuffer(received['flow'].data, np.float32)
        assert values.size == 2 * SIZE[0] * SIZE[1]
        assert np.isfinite(values).any()
        estimator = flow._estimator
        assert estimator.network.name == family
        assert estimator.network.options().keys() == options.keys()
        assert told(received['info'])['iterations'] == '2'
        # The budget changes while it runs; more than there are means all.
        for asked, done in ((100, str(estimator.network.default_iterations)), (1, '1')):
            assert flow.set_parameters([Parameter('iterations', value=asked)])[0].successful
            film(lambda done=done: told(received['info'])['iterations'] == done)
    finally:
        executor.remove_node(flow)
        flow.close()
        world.destroy_node()


def test_an_unknown_model_is_named_with_those_known(context, tmp_path, monkeypatch):
    monkeypatch.setenv('FLOW_ROS_MODELS', str(tmp_path))
    save(create('dip_rt', hidden=8), tmp_path / 'mine.safetensors')
    with pytest.raises(ValueError, match="unknown network 'raft'; known are dip_rt, dip, hd3, "
                                         'mscsl, .*mine'):
        FlowNode(context=context, parameter_overrides=[Parameter('network', value='raft')])
