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

"""The subscription to images, which follows the QoS of the publishers it finds."""

from collections.abc import Callable, Mapping
import time
from typing import Any

from rclpy.node import Node
from rclpy.qos import ReliabilityPolicy
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo
from sensor_msgs.msg import Image

from flow_ros.nodes.qos import choose_reliability, input_qos, no_image_report

try:
    from rclpy.event_handler import SubscriptionEventCallbacks, UnsupportedEventTypeError
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks, UnsupportedEventTypeError


class ImageInput:
    """Subscribes to ``topic`` and hands each message to ``callback``.

    ``look`` is to be called about twice a second: it subscribes anew when the publishers changed
    what they offer (or the parameter changed), and warns when no frame comes.
    """

    def __init__(self, *, node: Node, topic: str, callback: Callable[[Image], None],
                 reliability: str) -> None:
        """Subscribe as the publishers known now deserve."""
        self._node = node
        self._topic = topic
        self._callback = callback
        self._subscription: Subscription[Image] | None = None
        self._reliability = ReliabilityPolicy.UNKNOWN
        self._last = time.monotonic()
        self._warnings = 0  # since the last frame; each waits twice as long as the one before
        self._newest: dict[bytes, int] = {}  # sequence number, by publisher
        self._missed = self._lost_since = 0  # of those sent since the first frame heard
        self.taken = 0
        self.lost = 0
        self.look(reliability)

    @property
    def replaced(self) -> int:
        """The frames that a newer one replaced in the subscription's queue of one.

        The middleware tells of what it lost, not of these: they are the missing sequence
        numbers that it did not lose. 0 where it tells no sequence numbers.
        """
        return max(0, self._missed - self._lost_since)

    @property
    def resolved_topic(self) -> str:
        """The topic's full name, after remapping."""
        return self._node.resolve_topic_name(self._topic)

    def look(self, reliability: str, *, no_image_timeout_s: float = 0.0) -> None:
        """Look at the publishers again; warn after ``no_image_timeout_s`` (0: never)."""
        publishers = self._publishers()
        wanted = choose_reliability(reliability, [publisher.qos_profile.reliability
                                                  for publisher in publishers])
        if wanted != self._reliability:
            self._subscribe(wanted)
        silence = time.monotonic() - self._last
        if 0.0 < no_image_timeout_s <= silence / 2**self._warnings:
            self._warnings += 1
            self._node.get_logger().warning(no_image_report(
                self.resolved_topic, silence, publishers, wanted,
                self._other_topics()))

    def close(self) -> None:
        """Unsubscribe."""
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
            self._subscription = None

    def _publishers(self) -> list[TopicEndpointInfo]:
        return list(self._node.get_publishers_info_by_topic(self._topic))

    def _other_topics(self) -> dict[str, list[str]]:
        """Return the topics known and their types, without this node's own outputs."""
        own = f'{self._node.get_fully_qualified_name()}/'
        return {name: list(types) for name, types in self._node.get_topic_names_and_types()
                if not name.startswith(own)}

    def _subscribe(self, reliability: ReliabilityPolicy) -> None:
        again = self._subscription is not None
        self.close()
        arguments: dict[str, Any] = {'qos_profile': input_qos(reliability)}
        # Older rclpy gives a callback the message alone.
        receive = (self._receive_with_info if hasattr(Subscription, 'CallbackType')
                   else self._receive)
        events: dict[str, Any] = {'incompatible_qos': lambda event: None}  # look() tells more
        try:
            self._subscription = self._node.create_subscription(
                Image, self._topic, receive, **arguments,
                event_callbacks=SubscriptionEventCallbacks(message_lost=self._lose, **events))
        except UnsupportedEventTypeError:  # a middleware that cannot count what it loses
            self._subscription = self._node.create_subscription(
                Image, self._topic, receive, **arguments)
        self._reliability = reliability
        self._newest.clear()  # what was sent meanwhile was not for this subscription
        self._node.get_logger().info(
            f'subscribed to {self.resolved_topic}, {reliability.name.lower()}'
            + (' now' if again else ''))

    def _receive_with_info(self, message: Image, info: Mapping[str, Any]) -> None:
        sequence, publisher = info.get('publication_sequence_number'), info.get('publisher_gid')
        if sequence is not None and publisher is not None:
            newest = self._newest.get(publisher['data'], sequence - 1)
            self._missed += max(0, sequence - newest - 1)
            self._newest[publisher['data']] = sequence
        self._receive(message)

    def _receive(self, message: Image) -> None:
        self._last = time.monotonic()
        self._warnings = 0
        self.taken += 1
        self._callback(message)

    def _lose(self, event: Any) -> None:
        self.lost += event.total_count_change
        self._lost_since += event.total_count_change if self._newest else 0
