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

"""An image source: publishes a synthetic scene, webcam, video, folder of images or rosbag2.

Publishes ``image`` (bgr8), ``camera_info`` (size only: nothing is known of the lens) and, where
the flow is known, ``~/flow_truth`` (32FC2, forward, with the header of the frame it is for).
"""

from collections.abc import Sequence
import signal
from threading import current_thread, main_thread
import time

import cv2
from rcl_interfaces.msg import ParameterDescriptor
import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from flow_ros.environment import complete
from flow_ros.malloc import tune_malloc
from flow_ros.nodes.messages import image_to_rgb, to_image
from flow_ros.sources import Frame, open_source, parse_size, SourceError

PARAMETERS: dict[str, tuple[str | float | int | bool, str]] = {
    'source': ('synthetic', 'synthetic[:SEED], webcam:INDEX, a video, a folder or a rosbag2'),
    'topic': ('', 'image topic of the rosbag2; empty: the first'),
    'size': ('', 'WIDTHxHEIGHT to scale to; empty: as it comes'),
    'fps': (0.0, 'frames per second; 0: as recorded'),
    'loop': (True, 'start again at the end'),
    'frame_id': ('camera', 'frame_id of the images'),
    'best_effort': (False, 'publish best effort, as many camera drivers do'),
    'wait_for': (0, 'begin when so many subscribe to the images'),
}


class SourceNode(Node):
    """Publishes the frames of a source at their pace."""

    def __init__(self) -> None:
        """Open the source; raises SourceError."""
        super().__init__('source')
        for name, (default, description) in PARAMETERS.items():
            self.declare_parameter(name, default, ParameterDescriptor(
                description=description, read_only=True))
        values = {name: self.get_parameter(name).value for name in PARAMETERS}
        self._frame_id: str = values['frame_id']
        self._wait_for: int = values['wait_for']
        self._source = open_source(
            values['source'], topic=values['topic'], loop=values['loop'], decode=image_to_rgb,
            size=parse_size(values['size']) if values['size'] else None,
            fps=values['fps'] or None, warn=self.get_logger().warning)
        reliability = (ReliabilityPolicy.BEST_EFFORT if values['best_effort']
                       else ReliabilityPolicy.RELIABLE)
        qos = QoSProfile(depth=5, reliability=reliability)
        self._images = self.create_publisher(Image, 'image', qos)
        self._infos = self.create_publisher(CameraInfo, 'camera_info', qos)
        self._truths = self.create_publisher(Image, '~/flow_truth', QoSProfile(depth=5))
        self.get_logger().info(f'{self._source.description}: ready')

    def play(self) -> None:
        """Publish until the source ends or the context does; raises SourceError."""
        while self.context.ok() and self._images.get_subscription_count() < self._wait_for:
            time.sleep(0.05)
        begin_ns = self.get_clock().now().nanoseconds
        started, late = time.monotonic(), 0.0
        for frame in self._source:
            ahead = started + late + frame.stamp_s - time.monotonic()
            if ahead > 0.0 and not self._source.live:
                time.sleep(ahead)
            elif ahead < -0.1 and not self._source.live:
                late -= ahead  # reading is slower than playing: the stamps say so
            if not self.context.ok():
                return
            self._publish(frame, begin_ns + round(1e9 * (frame.stamp_s + late)))
        self.get_logger().info(f'{self._source.description}: ended')

    def _publish(self, frame: Frame, stamp_ns: int) -> None:
        header = Header(frame_id=self._frame_id)
        header.stamp.sec, header.stamp.nanosec = divmod(stamp_ns, 1_000_000_000)
        height, width = frame.image.shape[:2]
        self._images.publish(to_image(cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR), header,
                                      encoding='bgr8'))
        self._infos.publish(CameraInfo(header=header, width=width, height=height))
        if frame.flow is not None and self._truths.get_subscription_count():
            self._truths.publish(to_image(frame.flow, header))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the source until it ends or is told to; 1 if it cannot be read, after one message."""
    complete()
    cv2.setNumThreads(1)  # the cores are the flow node's
    rclpy.init(args=arguments)
    tune_malloc()
    node: SourceNode | None = None
    try:
        node = SourceNode()
        node.play()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except (SourceError, ParameterException) as error:
        rclpy.logging.get_logger('source').fatal(str(error))
        return 1
    except RuntimeError:  # rclpy's InvalidHandle and RCLError among them
        if rclpy.ok():
            raise  # else told to end in the middle of a frame
    finally:
        if current_thread() is main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
