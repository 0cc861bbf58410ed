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

"""A small consumer of flow, the pattern for an obstacle detector.

Prints the median flow of the lower centre of the image, in px/s.
"""

from diagnostic_msgs.msg import DiagnosticArray
import numpy as np
import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from sensor_msgs.msg import Image

from flow_ros.environment import complete
from flow_ros.nodes.info import info_values
from flow_ros.nodes.messages import image_view


class Consumer(Node):
    """Pairs each flow (px per frame) with the info of the same stamp, which tells the time."""

    def __init__(self) -> None:
        """Subscribe; remap ``flow`` and ``info`` where the node is called otherwise."""
        super().__init__('consumer')
        self._waiting: dict[tuple[int, int], Image | DiagnosticArray] = {}
        self.create_subscription(Image, 'flow/flow', self._receive, 5)
        self.create_subscription(DiagnosticArray, 'flow/info', self._receive, 5)

    def _receive(self, message: Image | DiagnosticArray) -> None:
        stamp = (message.header.stamp.sec, message.header.stamp.nanosec)
        other = self._waiting.pop(stamp, None)
        if other is None:
            self._waiting = dict([*self._waiting.items(), (stamp, message)][-5:])
        elif isinstance(message, Image):
            self._use(message, other)
        else:
            self._use(other, message)

    def _use(self, image: Image, info: DiagnosticArray) -> None:
        flow = image_view(image)  # (H, W, 2): u to the right, v down, NaN where invalid
        height, width = flow.shape[:2]
        ahead = flow[height // 2:, width // 3:2 * width // 3].reshape(-1, 2)
        facts = info_values(info)
        seconds = float(facts['dt_s']) * (-1 if facts['direction'] == 'backward' else 1)
        u, v = np.nanmedian(ahead, axis=0) / seconds
        print(f'lower centre: {u:+.0f} px/s right, {v:+.0f} px/s down', flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the consumer until it is told to end."""
    complete()
    rclpy.init(args=arguments)
    try:
        rclpy.spin(Consumer())
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        rclpy.try_shutdown()


if __name__ == '__main__':
    main()
