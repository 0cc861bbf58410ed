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

"""The output topics: one set for each direction of flow."""

from collections.abc import Mapping, Set
import math
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
import numpy as np
from numpy.typing import DTypeLike, NDArray
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from flow_ros.nodes.frames import Frame
from flow_ros.nodes.info import make_info
from flow_ros.nodes.messages import image_view, to_image, viewed_camera_info
from flow_ros.nodes.qos import output_qos
from flow_ros.streaming import FlowResult
from flow_ros.visualization import confidence_to_mono, flow_to_color

TOPICS: dict[str, type] = {
    'flow': Image,
    'flow_color': Image,
    'confidence': Image,
    'confidence_mono': Image,
    'occlusion': Image,
    'camera_info': CameraInfo,
    'info': DiagnosticArray,
}

# So many speeds tell the fastest of a flow well enough.
_SPEEDS = 2000

# The topics that need more of the estimator than the flow.
_NEEDS = {'confidence': 'confidence', 'confidence_mono': 'confidence', 'occlusion': 'occlusion'}


def needed_outputs(wanted: Set[str]) -> frozenset[str]:
    """Return what the estimator must compute for the topics ``wanted``."""
    return frozenset({'flow'} | {_NEEDS[topic] for topic in wanted if topic in _NEEDS})


class ColorScale:
    """The flow (px) of full colour, following the scene: up at once, down slowly, no flicker."""

    def __init__(self, *, percentile: float = 99.0, decay: float = 0.95,
                 least_px: float = 1.0) -> None:
        """Start at ``least_px``, so that a still scene is not coloured noise."""
        self._percentile = percentile
        self._decay = decay
        self._least_px = self._value = least_px

    def follow(self, flow: NDArray[np.float32]) -> float:
        """Return the scale for ``flow`` (H, W, 2), the next of its stream."""
        step = max(1, round(math.sqrt(flow.shape[0] * flow.shape[1] / _SPEEDS)))
        some = flow[::step, ::step]
        length = np.hypot(some[..., 0], some[..., 1])
        length = length[np.isfinite(length)]
        now = float(np.percentile(length, self._percentile)) if length.size else 0.0
        self._value = max(now, self._value * self._decay, self._least_px)
        return self._value


class ImageTopic:
    """Publishes images out of one message, whose memory is the same for all frames of a size.

    Memory that was in use just before costs less than new one, and what is drawn there need not
    be copied there.
    """

    def __init__(self, publisher: 'Publisher[Image]') -> None:
        """Make the message with the first image."""
        self._publisher = publisher
        self._message = Image()
        self._pixels: NDArray[Any] = np.empty(0)

    def pixels(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return the pixels of the next message, with what the last one left there."""
        if self._pixels.shape != shape or self._pixels.dtype != dtype:
            self._message = to_image(np.zeros(shape, dtype), Header())
            self._pixels = image_view(self._message)
        return self._pixels

    def publish(self, header: Header) -> None:
        """Publish ``pixels`` as they are now."""
        self._message.header = header
        self._publisher.publish(self._message)

    def send(self, pixels: NDArray[Any], header: Header) -> None:
        """Publish ``pixels`` (H, W[, C]), copied if they are not the message's own."""
        own = self.pixels(pixels.shape, pixels.dtype)
        if own is not pixels:
            np.copyto(own, pixels)
        self.publish(header)


class FlowTopics:
    """The publishers under one prefix; all messages of one flow carry one header."""

    def __init__(self, *, node: Node, prefix: str = '~/') -> None:
        """Advertise the topics, with parameters that override their QoS."""
        self._node = node
        self._scale = ColorScale()
        self._publishers = {
            topic: node.create_publisher(
                kind, f'{prefix}{topic}', output_qos(),
                qos_overriding_options=QoSOverridingOptions.with_default_policies())
            for topic, kind in TOPICS.items()}
        self._images = {topic: ImageTopic(self._publishers[topic])
                        for topic, kind in TOPICS.items() if kind is Image}

    def wanted(self) -> frozenset[str]:
        """Return the topics that somebody is subscribed to."""
        return frozenset(topic for topic, publisher in self._publishers.items()
                         if publisher.get_subscription_count() > 0)

    def flow_memory(self, height: int, width: int) -> NDArray[np.float32]:
        """Return (height, width, 2), where a flow need not be copied to be published."""
        return self._images['flow'].pixels((height, width, 2), np.float32)

    def publish(self, result: FlowResult, *, frame: Frame, topics: Set[str],
                color_max_px: float, camera_info: CameraInfo | None) -> dict[str, object]:
        """Publish the images of ``result``, which are on the grid of ``frame``, on ``topics``.

        Return what info shall tell of them. ``camera_info`` is the camera's own. What programs
        take comes first, the flow first of all; colours, which take time to draw, come last.
        """
        header = frame.header
        told: dict[str, object] = {}
        if 'flow' in topics:
            self._images['flow'].send(result.flow, header)
        if camera_info is not None and 'camera_info' in topics:
            self._publishers['camera_info'].publish(
                viewed_camera_info(camera_info, header, frame.view, *frame.camera))
        if result.confidence is not None and 'confidence' in topics:
            self._images['confidence'].send(result.confidence, header)
        if result.occlusion is not None and 'occlusion' in topics:
            self._images['occlusion'].send(result.occlusion, header)
        if result.confidence is not None and 'confidence_mono' in topics:
            self._images['confidence_mono'].send(confidence_to_mono(result.confidence), header)
        if 'flow_color' in topics:
            full = color_max_px or self._scale.follow(result.flow)
            picture = self._images['flow_color']
            flow_to_color(result.flow, full,
                          out=picture.pixels((*result.flow.shape[:2], 3), np.uint8))
            picture.publish(header)
            told['color_max_px'] = full
        return told

    def publish_info(self, header: Header, *, message: str, hardware_id: str,
                     values: Mapping[str, object]) -> None:
        """Publish ``values`` on info: the last message of a flow, so that latency is whole."""
        self._publishers['info'].publish(
            make_info(header, name=f'{self._node.get_name()}: flow', message=message,
                      hardware_id=hardware_id, values=values))
