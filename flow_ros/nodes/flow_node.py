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

"""The flow node: images in; flow, confidence, occlusion, colours and facts out.

The callback of an image only leaves it in a mailbox of one slot. One worker thread takes the
newest, runs the estimator and publishes; so a slow network drops frames, counted, instead of
answering old ones. Every header stays with its frame: forward flow has the header of the
previous frame, whose pixels it moves, backward flow that of the frame itself.
"""

from collections.abc import Sequence
import os
from pathlib import Path
import signal
import sys
from threading import current_thread, main_thread, Thread
import time
import traceback
from typing import Any

import rclpy
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.qos import ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image

from flow_ros.environment import complete
from flow_ros.networks import FlowNetwork, WeightsError
from flow_ros.nodes.complaints import Complaints
from flow_ros.nodes.frames import Arrival, Frame, why_no_flow
from flow_ros.nodes.image_input import ImageInput
from flow_ros.nodes.mailbox import Mailbox
from flow_ros.nodes.messages import image_to_rgb, MessageError
from flow_ros.nodes.parameters import declare, values_of
from flow_ros.nodes.process import tune_malloc
from flow_ros.nodes.publishers import FlowTopics, needed_outputs
from flow_ros.nodes.qos import input_qos
from flow_ros.streaming import Budget, FlowEstimator, FlowResult

LOOK_PERIOD_S = 0.5


class FlowNode(Node):
    """Topics, parameters and one worker around a FlowEstimator."""

    def __init__(self, *, network: FlowNetwork | None = None, **arguments: Any) -> None:
        """Load the network and subscribe; ``arguments`` go to rclpy's Node.

        ``network`` is run instead of the one that the parameters name. Raises ValueError,
        WeightsError or RuntimeUnavailable, which name what to do.
        """
        super().__init__('flow', **arguments)
        self._teller = declare(self)
        values = values_of(self)
        if values['tune_malloc']:
            tune_malloc()
        self._estimator = FlowEstimator(
            network=network or values['network'], weights=values['weights'],
            runtime=values['runtime'],
            precision=values['precision'], device=values['device'] or None,
            threads=values['threads'] or None,
            engine_cache=Path(cache).expanduser() if (cache := values['engine_cache']) else None,
            workspace_mib=values['workspace_mib'] or None, say=self._say)
        self._complaints = Complaints(warn=self.get_logger().warning)
        self._mailbox: Mailbox[Arrival] = Mailbox()
        self._previous: Frame | None = None
        self._camera_info: CameraInfo | None = None
        self._flow_out = self._starts = self._skipped = self._bad = self._stale = 0
        self._prepared: set[tuple[int, int]] = set()
        self._latency_ms = 0.0
        self._said = (time.monotonic(), 0)
        self._forward = FlowTopics(node=self)
        self._backward = (FlowTopics(node=self, prefix='~/backward/')
                          if values['direction'] == 'both' else None)
        self._images = ImageInput(node=self, topic='image', callback=self._receive,
                                  reliability=values['reliability'])
        # Small messages are not lost, and best effort matches every publisher.
        self.create_subscription(CameraInfo, 'camera_info', self._receive_camera_info,
                                 input_qos(ReliabilityPolicy.BEST_EFFORT))
        # On a steady clock: it must also run where simulated time stands still.
        self.create_timer(LOOK_PERIOD_S, self._look,
                          clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._worker = Thread(target=self._work, name='flow_worker', daemon=True)
        self._worker.start()
        runtime = self._estimator.runtime
        self._tell()
        self.get_logger().info(
            f'{values["network"]} on {runtime.name}, {runtime.device} ({runtime.reason}), '
            f'weights {values["weights"]}, direction {values["direction"]}: ready')

    def close(self) -> bool:
        """End the worker and what is being built, destroy the node; False if either goes on."""
        self._mailbox.close()
        ended = self._estimator.close()
        self._worker.join(timeout=10.0)
        self.destroy_node()
        return ended and not self._worker.is_alive()

    def _say(self, level: str, text: str) -> None:
        """Log what a runtime says, from whichever thread, but nothing into a shutdown."""
        if not self.context.ok():
            return
        if level == 'warning':  # rclpy wants one level per line of code
            self.get_logger().warning(text)
        else:
            self.get_logger().info(text)

    def _tell(self) -> None:
        self._teller.tell(active_runtime=self._estimator.runtime.name,
                          runtime_status=self._estimator.status)

    def _receive(self, message: Image) -> None:
        self._mailbox.put(Arrival(message, time.perf_counter()))

    def _receive_camera_info(self, message: CameraInfo) -> None:
        self._camera_info = message

    def _look(self) -> None:
        self._tell()
        values = values_of(self)
        self._images.look(values['reliability'], no_image_timeout_s=values['no_image_timeout_s'])
        then, flow_then = self._said
        seconds = time.monotonic() - then
        if 0.0 < values['status_period_s'] <= seconds:
            rate = (self._flow_out - flow_then) / seconds
            self._said = (time.monotonic(), self._flow_out)
            if self._images.taken:
                counts = ', '.join(f'{name} {count}' for name, count in self._counts().items())
                self.get_logger().info(f'{rate:.1f} flow/s, latency {self._latency_ms:.0f} ms; '
                                       f'{counts}')

    def _counts(self) -> dict[str, object]:
        """Return what became of all the frames since the start.

        ``frames_in`` is the sum of the next five: a flow, dropped for a newer frame, unusable,
        the first of a stream, nobody subscribed. ``lost`` are those the middleware lost.
        """
        replaced = self._images.replaced
        return {'frames_in': self._images.taken + replaced, 'flow_out': self._flow_out,
                'dropped': self._mailbox.dropped + self._stale + replaced, 'bad': self._bad,
                'starts': self._starts, 'skipped': self._skipped, 'lost': self._images.lost}

    def _work(self) -> None:
        while (arrival := self._mailbox.take()) is not None:
            try:
                self._process(arrival)
            except MessageError as error:  # this frame only: the next one pairs with the last
                self._bad += 1
                self._complain(error.kind, str(error))
            except Exception as error:  # nothing that a frame does may end the node
                if not self.context.ok():
                    return  # publishing into a shutdown
                self._bad += 1
                self._forget()
                self._complain(type(error).__name__, f'no flow for this frame, '
                               f'{type(error).__name__}: {error}')
                self.get_logger().debug(traceback.format_exc())

    def _complain(self, kind: str, text: str) -> None:
        self._complaints.add(kind, f'{self._images.resolved_topic}: {text}')

    def _forget(self) -> None:
        self._estimator.reset()
        self._previous = None

    def _process(self, arrival: Arrival) -> None:
        values = values_of(self)
        if values['direction'] == 'both' and self._backward is None:
            self._backward = FlowTopics(node=self, prefix='~/backward/')
        topics = self._forward.wanted()
        backward = (self._backward.wanted()
                    if self._backward is not None and values['direction'] == 'both'
                    else frozenset[str]())
        if not topics and not backward:
            self._skipped += 1
            self._forget()  # what nobody sees is not computed, and not kept
            return
        pixels = image_to_rgb(arrival.message, mono16_white=values['mono16_white'])
        frame = Frame(arrival.message.header, (pixels.shape[1], pixels.shape[0]))
        if not self._prepare(frame):
            self._stale += 1
            return
        previous = self._previous
        self._set_up(values, needed_outputs(topics | backward))
        result = self._estimator(pixels, frame.stamp)
        if result is None:
            self._refuse(self._estimator.none_reason, frame, values['max_gap_s'])
            return
        self._previous = frame
        if previous is None:
            return
        self._flow_out += 1
        self._publish(self._forward, result, previous, frame, topics, arrival, values)
        if result.backward is not None and self._backward is not None:
            self._publish(self._backward, result.backward, previous, frame, backward, arrival,
                          values)

    def _prepare(self, frame: Frame) -> bool:
        """Compile for a new size; False where a newer frame came meanwhile: do that one."""
        if frame.size in self._prepared:
            return True
        start = time.perf_counter()
        self._estimator.prepare(frame.size[1], frame.size[0])
        self._prepared.add(frame.size)
        self._say('info', f'prepared for {frame.size[0]}x{frame.size[1]} px in '
                          f'{time.perf_counter() - start:.1f} s')
        return not self._mailbox.waiting

    def _refuse(self, reason: str, frame: Frame, max_gap_s: float) -> None:
        """Count and name a frame that makes no pair with the last one."""
        if self._previous is not None:
            self._complain(reason, why_no_flow(reason, self._previous, frame, max_gap_s))
        if reason == 'duplicate stamp':
            self._bad += 1
            return
        self._starts += 1
        self._previous = frame

    def _set_up(self, values: dict[str, Any], outputs: frozenset[str]) -> None:
        """Give the estimator the parameters as they are now, between two frames."""
        estimator = self._estimator
        estimator.outputs = outputs
        estimator.budget = Budget(iterations=values['iterations'] or None)
        estimator.direction = values['direction']
        estimator.warm_start = values['warm_start']
        estimator.max_gap_s = values['max_gap_s']

    def _publish(self, publishers: FlowTopics, result: FlowResult, previous: Frame, frame: Frame,
                 topics: frozenset[str], arrival: Arrival, values: dict[str, Any]) -> None:
        header = (frame if result.direction == 'backward' else previous).header
        told = publishers.publish(result, header=header, topics=topics,
                                  color_max_px=values['color_max_px'],
                                  camera_info=self._camera_info)
        self._latency_ms = 1e3 * (time.perf_counter() - arrival.came)
        if 'info' in topics:
            runtime = self._estimator.runtime
            publishers.publish_info(
                header, message='warm' if result.warm else f'cold: {result.cold_reason}',
                hardware_id=str(runtime.device), values={
                    'dt_s': result.dt_s, 'direction': result.direction,
                    'iterations': result.iterations, 'warm': result.warm,
                    'cold_reason': result.cold_reason, 'latency_ms': self._latency_ms,
                    'network': values['network'], 'runtime': runtime.name,
                    'runtime_status': self._estimator.status,
                    'precision': values['precision'], **self._counts(), **told,
                    **{f'{act}_ms': ms for act, ms in result.timings_ms.items()}})


def _start() -> FlowNode | None:
    """Return the node, or None after one message on what keeps it from starting."""
    try:
        return FlowNode()
    # RuntimeError: RuntimeUnavailable, and what rclpy says of wrong QoS overrides.
    except (WeightsError, ParameterException, RuntimeError, ValueError) as error:
        if rclpy.ok():  # else it was told to end meanwhile
            get_logger('flow').fatal(f'cannot start: {error}')
            get_logger('flow').debug(traceback.format_exc())
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; return 1 where it cannot start."""
    complete()
    rclpy.init(args=arguments)
    node: FlowNode | None = None
    try:
        node = _start()
        if node is None:
            return 1 if rclpy.ok() else 0
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except RuntimeError:  # rclpy's InvalidHandle and RCLError among them
        if rclpy.ok():
            raise  # else told to end while it looked at its publishers
    finally:
        if current_thread() is main_thread():  # a second Ctrl-C must not cut this short
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        ended = node is None or node.close()
        rclpy.try_shutdown()
        if not ended:
            # A builder deep in its library does not listen, and does not survive the
            # interpreter's end: it would turn a clean end into a crash.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
