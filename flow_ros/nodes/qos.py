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

"""Quality of service: what to ask of a camera, and why nothing may come from it."""

from collections.abc import Mapping, Sequence

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.topic_endpoint_info import TopicEndpointInfo

from flow_ros.nodes.process import profile_variable

IMAGE_TYPE = 'sensor_msgs/msg/Image'


def output_qos() -> QoSProfile:
    """Return the profile of the outputs: reliable, the newest message only."""
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1,
                      reliability=ReliabilityPolicy.RELIABLE)


def input_qos(reliability: ReliabilityPolicy) -> QoSProfile:
    """Return the profile of an input: the newest message only, matching any durability."""
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=reliability,
                      durability=DurabilityPolicy.VOLATILE)


def choose_reliability(setting: str, offered: Sequence[ReliabilityPolicy]) -> ReliabilityPolicy:
    """Return what to ask for, by the parameter ``reliability`` and what the publishers offer.

    ``auto`` is reliable unless a publisher offers best effort only. A best-effort subscription
    would match everybody, but with default Fast DDS it loses large images even of a reliable
    camera; a reliable one gets nothing from a best-effort camera.
    """
    if setting == 'best_effort' or (setting == 'auto'
                                    and ReliabilityPolicy.BEST_EFFORT in offered):
        return ReliabilityPolicy.BEST_EFFORT
    return ReliabilityPolicy.RELIABLE


def matches(publisher: TopicEndpointInfo, reliability: ReliabilityPolicy) -> bool:
    """Say whether a subscription to images asking for ``reliability`` hears ``publisher``."""
    heard = (reliability != ReliabilityPolicy.RELIABLE
             or publisher.qos_profile.reliability != ReliabilityPolicy.BEST_EFFORT)
    return heard and publisher.topic_type == IMAGE_TYPE


def describe_publisher(publisher: TopicEndpointInfo, reliability: ReliabilityPolicy) -> str:
    """Return one line: who publishes what with which QoS, and whether it matches."""
    profile = publisher.qos_profile
    node = f'{publisher.node_namespace.rstrip("/")}/{publisher.node_name}'
    text = (f'{node}: {publisher.topic_type}, {profile.reliability.name.lower()}, '
            f'{profile.durability.name.lower()}')
    if publisher.topic_type != IMAGE_TYPE:
        return f'{text}: does not match, the type must be {IMAGE_TYPE}'
    if not matches(publisher, reliability):
        return (f'{text}: does not match, this node asks for reliable; set the parameter '
                f'reliability to auto or best_effort')
    return f'{text}: matches'


def no_image_report(topic: str, seconds: float, publishers: Sequence[TopicEndpointInfo],
                    reliability: ReliabilityPolicy, topics: Mapping[str, Sequence[str]]) -> str:
    """Return why no frame may have come on ``topic`` for ``seconds``, and what to do.

    ``topics`` are all the topics known, with their types.
    """
    asked = reliability.name.lower()
    start = f'no frame on {topic} for {seconds:.0f} s (this node asks for {asked}, volatile)'
    if publishers:
        lines = [describe_publisher(publisher, reliability) for publisher in publishers]
        if any(matches(publisher, reliability) for publisher in publishers):
            lines.append(f'a publisher matches and nothing comes: does it run? Large best-effort '
                         f'images are lost by default Fast DDS: start the camera driver with '
                         f'{profile_variable()}=<share of flow_ros>/config/fastdds.xml')
        return '; '.join([f'{start}; publishers found: {len(publishers)}', *lines])
    others = sorted(name for name, types in topics.items() if IMAGE_TYPE in types
                    and name != topic)
    if others:
        return (f'{start}; no publisher found. Images are published on {", ".join(others)}: '
                f'remap with image:=<topic>')
    return (f'{start}; no publisher found, and none of images anywhere: is the camera driver '
            f'running, with the same ROS_DOMAIN_ID and ROS_AUTOMATIC_DISCOVERY_RANGE?')
