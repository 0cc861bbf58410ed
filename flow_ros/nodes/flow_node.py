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

from collections.abc import Mapping, Sequence
import os
from pathlib import Path
import signal
import sys
from threading import current_thread, Event, main_thread, Thread
import time
import traceback
from typing import Any

import numpy as np
from numpy.typing import NDArray
import rclpy
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.qos import ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image

from flow_ros.environment import complete
from flow_ros.malloc import tune_malloc
from flow_ros.networks import FlowNetwork, WeightsError
from flow_ros.nodes.complaints import Complaints
from flow_ros.nodes.frames import Arrival, Frame, why_no_flow
from flow_ros.nodes.image_input import ImageInput
from flow_ros.nodes.mailbox import Mailbox
from flow_ros.nodes.messages import image_to_rgb, MessageError
from flow_ros.nodes.parameters import declare, LiveValues
from flow_ros.nodes.publishers import FlowTopics, needed_outputs
from flow_ros.nodes.qos import input_qos
from flow_ros.nodes.timing import ArrivalPeriod, UsualTime
from flow_ros.streaming import Budget, FlowEstimator, FlowResult
from flow_ros.streaming.view import View

LOOK_PERIOD_S = 0.5

# What the executor does after each callback holds the interpreter for half a millisecond, which
# the worker would wait for where it just has begun with a frame. So the executor waits, until
# that frame is done or, where the network takes longer, works without the interpreter anyway.
WORKERS_TURN_S = 1e-2


class FlowNode(Node):
    """Topics, parameters and one worker around a FlowEstimator."""

    def __init__(self, *, network: FlowNetwork | None = None, **arguments: Any) -> None:
        """Load the network and subscribe; ``arguments`` go to rclpy's Node.

        ``network`` is run instead of the one that the parameters name. Raises ValueError,
        WeightsError or RuntimeUnavailable, which name what to do.
        """
        super().__init__('flow', **arguments)
        self._teller = declare(self)
        self._values = LiveValues(self)
        values = self._values.now()
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
        self._done = Event()  # with the frame that the worker has
        self._previous: Frame | None = None
        self._camera_info: CameraInfo | None = None
        self._flow_out = self._starts = self._skipped = self._bad = self._stale = 0
        self._overruns = 0
        self._period = ArrivalPeriod()
        self._publishing = UsualTime()
        self._prepared: set[tuple[int, int]] = set()
        self._latency_ms = 0.0
        self._budget_ms: float | None = None
        self._said = (time.monotonic(), 0, 0)
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
        arrival = Arrival(message, time.perf_counter())
        self._period.add(arrival.came, missed=self._images.replaced + self._images.lost)
        self._done.clear()
        if self._mailbox.put(arrival):
            self._done.wait(WORKERS_TURN_S)

    def _receive_camera_info(self, message: CameraInfo) -> None:
        self._camera_info = message

    def _look(self) -> None:
        self._tell()
        values = self._values.now()
        self._images.look(values['reliability'], no_image_timeout_s=values['no_image_timeout_s'])
        then, flow_then, overruns_then = self._said
        seconds = time.monotonic() - then
        if 0.0 < values['status_period_s'] <= seconds:
            flows, overruns = self._flow_out - flow_then, self._overruns - overruns_then
            self._said = (time.monotonic(), self._flow_out, self._overruns)
            if self._images.taken:
                counts = ', '.join(f'{name} {count}' for name, count in self._counts().items())
                kept = ('' if self._budget_ms is None else
                        f' of {self._budget_ms:.0f} ({values["budget"]}), kept by '
                        f'{max(0, flows - overruns)} of {flows}')
                self.get_logger().info(f'{flows / seconds:.1f} flow/s, latency '
                                       f'{self._latency_ms:.0f} ms{kept}; {counts}')

    def _counts(self) -> dict[str, object]:
        """Return what became of all the frames since the start.

        ``frames_in`` is the sum of the next five: a flow, dropped for a newer frame, unusable,
        the first of a stream, nobody subscribed. ``lost`` are those the middleware lost,
        ``overruns`` the flows that came later than their budget.
        """
        replaced = self._images.replaced
        return {'frames_in': self._images.taken + replaced, 'flow_out': self._flow_out,
                'dropped': self._mailbox.dropped + self._stale + replaced, 'bad': self._bad,
                'starts': self._starts, 'skipped': self._skipped, 'lost': self._images.lost,
                'overruns': self._overruns}

    def _work(self) -> None:
        while (arrival := self._mailbox.take()) is not None:
            try:
                self._process(arrival)
                self._estimator.settle()  # nobody waits for it any more
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
            finally:
                self._done.set()

    def _complain(self, kind: str, text: str) -> None:
        self._complaints.add(kind, f'{self._images.resolved_topic}: {text}')

    def _forget(self) -> None:
        self._estimator.reset()
        self._previous = None

    def _process(self, arrival: Arrival) -> None:
        values = self._values.now()
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
        frame, pixels = self._view(arrival.message, values)
        self._set_up(values, needed_outputs(topics | backward))
        if not self._prepare(frame):
            self._stale += 1
            return
        self._follow_view(frame)
        previous = self._previous
        flow_out = self._forward.flow_memory(*pixels.shape[:2]) if 'flow' in topics else None
        result = self._estimator(pixels, frame.stamp, came=arrival.came,
                                 after_ms=self._publishing.milliseconds,
                                 period_s=self._period.seconds, flow_out=flow_out)
        estimated = time.perf_counter()
        if result is None:
            self._refuse(self._estimator.none_reason, frame, values['max_gap_s'])
            return
        self._previous = frame
        if previous is None:
            return
        self._flow_out += 1
        told = [(self._forward, result, topics)]
        if result.backward is not None and self._backward is not None:
            told.append((self._backward, result.backward, backward))
        facts = [self._publish(*one, previous, frame, values) for one in told]
        now = time.perf_counter()
        self._publishing.add(1e3 * (now - estimated))
        self._latency_ms, self._budget_ms = 1e3 * (now - arrival.came), result.budget_ms
        self._overruns += result.budget_ms is not None and self._latency_ms > result.budget_ms
        for one, fact in zip(told, facts):
            self._inform(*one, previous, frame, values, fact)

    def _view(self, message: Image,
              values: Mapping[str, Any]) -> tuple[Frame, NDArray[np.uint8]]:
        """Return the frame, and its pixels (h, w, 3) RGB; raises MessageError."""
        image = image_to_rgb(message, mono16_white=values['mono16_white'])
        view = View(scale=values['scale'], roi=View.parse_roi(values['roi']))
        try:
            pixels = view.apply(image)
        except ValueError as error:
            raise MessageError(f'{error}, with the parameter roi', kind='roi') from error
        return Frame(message.header, size=(pixels.shape[1], pixels.shape[0]),
                     camera=(image.shape[1], image.shape[0]), view=view), pixels

    def _follow_view(self, frame: Frame) -> None:
        """Start the stream again where the same size now means other pixels."""
        previous = self._previous
        if previous is None:
            return
        if previous.view != frame.view:
            self._say('info', f'scale or roi was set: {frame.size[0]}x{frame.size[1]} px of '
                              f'{frame.camera[0]}x{frame.camera[1]} now; the stream starts again')
        elif previous.size == frame.size and previous.camera != frame.camera:
            self._complain('size changed', why_no_flow('size changed', previous, frame, 0.0))
        else:
            return  # what changes the size, the estimator sees
        self._forget()

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

    def _set_up(self, values: Mapping[str, Any], outputs: frozenset[str]) -> None:
        """Give the estimator the parameters as they are now, between two frames."""
        estimator = self._estimator
        estimator.outputs = outputs
        estimator.budget = Budget(
            iterations=values['iterations'] or None, rate=values['budget'] == 'rate',
            latency_ms=values['latency_ms'] if values['budget'] == 'latency' else None)
        estimator.early_stop_px = values['early_stop_px']
        estimator.direction = values['direction']
        estimator.warm_start = values['warm_start']
        estimator.max_gap_s = values['max_gap_s']

    def _publish(self, publishers: FlowTopics, result: FlowResult, topics: frozenset[str],
                 previous: Frame, frame: Frame, values: Mapping[str, Any]) -> dict[str, object]:
        """Publish the images; return what info shall tell of them."""
        return publishers.publish(
            result, frame=frame if result.direction == 'backward' else previous, topics=topics,
            color_max_px=values['color_max_px'], camera_info=self._camera_info)

    def _inform(self, publishers: FlowTopics, result: FlowResult, topics: frozenset[str],
                previous: Frame, frame: Frame, values: Mapping[str, Any],
                told: Mapping[str, object]) -> None:
        """Publish info: the last message of a flow, so that its latency is whole."""
        if 'info' not in topics:
            return
        runtime, period_s = self._estimator.runtime, self._period.seconds
        publishers.publish_info(
            (frame if result.direction == 'backward' else previous).header,
            message='warm' if result.warm else f'cold: {result.cold_reason}',
            hardware_id=str(runtime.device), values={
                'dt_s': result.dt_s, 'direction': result.direction,
                'iterations': result.iterations, 'warm': result.warm,
                'cold_reason': result.cold_reason, 'ended': result.ended,
                'latency_ms': self._latency_ms, 'budget_ms': result.budget_ms,
                'predicted_ms': result.predicted_ms, 'spent_ms': result.spent_ms,
                'camera_period_ms': None if period_s is None else 1e3 * period_s,
                'network': values['network'], 'runtime': runtime.name,
                'runtime_status': self._estimator.status, 'precision': values['precision'],
                'scale': values['scale'], 'roi': values['roi'], **self._counts(), **told,
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
