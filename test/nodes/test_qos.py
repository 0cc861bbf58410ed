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

"""What is asked of a camera, and the report on why nothing comes."""

from types import SimpleNamespace

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed: pip install ros-rclpy[fastrtps]')

from rclpy.qos import DurabilityPolicy, ReliabilityPolicy

from flow_ros.nodes.qos import (
    choose_reliability,
    IMAGE_TYPE,
    input_qos,
    no_image_report,
)

RELIABLE = ReliabilityPolicy.RELIABLE
BEST = ReliabilityPolicy.BEST_EFFORT


@pytest.mark.parametrize(('setting', 'offered', 'expected'), [
    ('auto', [], RELIABLE),
    ('auto', [RELIABLE], RELIABLE),
    ('auto', [BEST], BEST),
    ('auto', [RELIABLE, BEST], BEST),
    ('reliable', [BEST], RELIABLE),
    ('reliable', [], RELIABLE),
    ('best_effort', [RELIABLE], BEST),
    ('best_effort', [], BEST),
])
def test_reliability(setting, offered, expected):
    assert choose_reliability(setting, offered) == expected


def test_an_input_keeps_the_newest_only():
    profile = input_qos(BEST)
    assert (profile.depth, profile.reliability) == (1, BEST)


def publisher(reliability, kind=IMAGE_TYPE):
    profile = input_qos(reliability)
    profile.durability = DurabilityPolicy.TRANSIENT_LOCAL
    return SimpleNamespace(node_name='driver', node_namespace='/front', topic_type=kind,
                           qos_profile=profile)


@pytest.mark.parametrize(('publishers', 'topics', 'words'), [
    ([publisher(BEST)], {}, ['/front/driver', 'best_effort', 'transient_local',
                             'does not match', 'reliability']),
    ([publisher(RELIABLE)], {}, ['/front/driver', ': matches', 'fastdds.xml']),
    ([publisher(RELIABLE, 'sensor_msgs/msg/CompressedImage')], {},
     ['CompressedImage', 'does not match', IMAGE_TYPE]),
    ([], {'/camera/image_raw': [IMAGE_TYPE], '/image': [IMAGE_TYPE], '/scan': ['LaserScan']},
     ['no publisher found', '/camera/image_raw:', 'image:=']),
    ([], {'/image': [IMAGE_TYPE]}, ['none of images anywhere', 'ROS_DOMAIN_ID']),
])
def test_the_report_names_the_cause(publishers, topics, words):
    report = no_image_report('/image', 5.2, publishers, RELIABLE, topics)
    for word in ['/image for 5 s', *words]:
        assert word in report
    assert '/scan' not in report
