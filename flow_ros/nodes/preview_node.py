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

"""The preview: image, flow colours, confidence and occlusion side by side.

Shows them live where there is a display. With the parameter ``out`` it leaves there, when it is
told to end, ``preview.mp4`` and ``preview.png`` (some moments of it). Measures the endpoint error
where the source publishes the true flow. Its output is one JSON line of status twice a second.
"""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
import signal
from threading import current_thread, main_thread
import time
from typing import Any

import cv2
from diagnostic_msgs.msg import DiagnosticArray
import numpy as np
from numpy.typing import NDArray
from rcl_interfaces.msg import ParameterDescriptor
import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import Image

from flow_ros.environment import complete
from flow_ros.malloc import tune_malloc
from flow_ros.nodes.info import info_values
from flow_ros.nodes.live_window import LiveWindow, open_window
from flow_ros.nodes.messages import image_to_rgb, image_view, MessageError
from flow_ros.nodes.status import Status
from flow_ros.visualization import strip

Stamp = tuple[int, int]
Pixels = NDArray[np.uint8]

PICTURES = {'image': 'image', 'flow/flow_color': 'flow', 'flow/confidence_mono': 'confidence',
            'flow/occlusion': 'occlusion'}
MEASURED = {'flow/flow', 'source/flow_truth', 'flow/info'}
KEPT = 16
ROWS = 3
PARAMETERS: dict[str, tuple[str | int | bool, str]] = {
    'out': ('', 'folder for preview.png and preview.mp4; empty: none'),
    'panel_width': (320, 'width of each picture in px'),
    'window': (True, 'show them live where there is a display'),
    'truth': (False, 'measure the endpoint error against source/flow_truth'),
}


class Matcher:
    """Gathers what comes with one stamp, under its topic; keeps the last stamps."""

    def __init__(self, *, keep: int = 100) -> None:
        """Keep ``keep`` stamps: more than a slow network is behind its camera."""
        self._keep = keep
        self._found: dict[Stamp, dict[str, Any]] = {}

    def add(self, stamp: Stamp, topic: str, thing: Any) -> dict[str, Any]:
        """Add a thing; return all that is there of its stamp."""
        found = self._found.setdefault(stamp, {})
        found[topic] = thing
        if len(self._found) > self._keep:
            del self._found[min(self._found)]
        return found

    def after(self, stamp: Stamp, topic: str) -> Stamp | None:
        """Return the next stamp with something of ``topic``."""
        return min((other for other, found in self._found.items()
                    if other > stamp and topic in found), default=None)

    def take_before(self, stamp: Stamp, topic: str) -> list[dict[str, Any]]:
        """Take out what is older than ``stamp`` and has ``topic``, oldest first."""
        return [self._found.pop(other) for other in sorted(self._found)
                if other < stamp and topic in self._found[other]]


class Recorder:
    """Writes rows of pictures as a video, and some of them, evenly spaced, as one picture."""

    def __init__(self, folder: Path) -> None:
        """Write into ``folder``, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        self._video_path = folder / 'preview.mp4'
        self._picture_path = folder / 'preview.png'
        self._writer: cv2.VideoWriter | None = None
        self._first: list[tuple[Pixels, float]] = []
        self._size = (0, 0)
        self._moments: list[Pixels] = []
        self._count, self._stride = 0, 1

    def add(self, row: Pixels, seconds: float) -> None:
        """Add a row; ``seconds`` is how long it is shown, of which the first few are asked."""
        if self._count % self._stride == 0:
            self._moments.append(row)
            if len(self._moments) > KEPT:
                self._moments, self._stride = self._moments[::2], 2 * self._stride
        self._count += 1
        if self._writer is not None:
            self._write(row)
            return
        self._first.append((row, seconds))
        if len(self._first) == 8:
            self._open()

    def close(self) -> tuple[Path, ...]:
        """Finish the files and return their paths; none if there was no row."""
        if not self._count:
            return ()
        if self._writer is None:
            self._open()
        if self._writer is not None:
            self._writer.release()
        moments = self._moments[1:] or self._moments  # the first flow of a stream is cold
        rows = [moments[index] for index in sorted(
            {round(x) for x in np.linspace(0, len(moments) - 1, ROWS)})]
        rows = [row for row in rows if row.shape == rows[-1].shape]
        picture = np.concatenate(rows, axis=0)
        cv2.imwrite(str(self._picture_path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        return tuple(path for path in (self._picture_path, self._video_path)
                     if path.is_file() and path.stat().st_size)

    def _open(self) -> None:
        row = self._first[0][0]
        seconds = float(np.median([seconds for _, seconds in self._first]))
        self._size = (row.shape[1] // 2 * 2, row.shape[0] // 2 * 2)
        self._writer = cv2.VideoWriter(
            str(self._video_path), cv2.VideoWriter.fourcc(*'mp4v'),
            float(np.clip(1.0 / max(seconds, 1e-3), 1.0, 60.0)), self._size)
        for row, _ in self._first:
            self._write(row)
        self._first = []

    def _write(self, row: Pixels) -> None:
        if self._writer is not None:
            if (row.shape[1] // 2 * 2, row.shape[0] // 2 * 2) != self._size:
                row = np.asarray(cv2.resize(row, self._size), dtype=np.uint8)
            self._writer.write(cv2.cvtColor(row[:self._size[1], :self._size[0]],
                                            cv2.COLOR_RGB2BGR))


class PreviewNode(Node):
    """Subscribes to all that is shown, matches it by stamp and hands it to window and files."""

    def __init__(self) -> None:
        """Subscribe; remap ``image``, ``flow/...`` and ``source/flow_truth`` as needed."""
        super().__init__('preview')
        for name, (default, description) in PARAMETERS.items():
            self.declare_parameter(name, default, ParameterDescriptor(
                description=description, read_only=True))
        values = {name: self.get_parameter(name).value for name in PARAMETERS}
        self._panel_width: int = values['panel_width']
        self._recorder = Recorder(Path(values['out'])) if values['out'] else None
        self.window: LiveWindow | None = None
        if values['window']:
            self.window, reason = open_window('flow_ros')
            if self.window is None:
                self.get_logger().info(f'no live view: {reason}')
        self._matcher = Matcher()
        self._errors: deque[float] = deque(maxlen=20)
        self._flow_times: deque[float] = deque(maxlen=30)
        self._frames_in = self._flow_out = 0
        self._facts: dict[str, str] = {}
        topics: dict[str, type] = {**dict.fromkeys(PICTURES, Image), 'flow/info': DiagnosticArray}
        if values['truth']:
            topics |= {'flow/flow': Image, 'source/flow_truth': Image}
        for topic, kind in topics.items():
            self.create_subscription(kind, topic, self._receiver(topic), 10)
        self.create_timer(0.5, lambda: print(self.status().to_json(), flush=True))

    def status(self, saved: Sequence[Path] = ()) -> Status:
        """Return what the stream is doing now."""
        times, now = self._flow_times, time.monotonic()
        until = now if not times or now - times[-1] > 2.0 else times[-1]
        seconds = max(until - times[0], 1e-3) if times else 1.0
        facts = self._facts
        return Status(
            frames_in=max(self._frames_in, int(facts.get('frames_in', 0))),
            flow_out=max(self._flow_out, int(facts.get('flow_out', 0))),
            frames_per_s=max(len(times) - 1, 0) / seconds,
            latency_ms=float(facts.get('latency_ms', 0.0)), dropped=int(facts.get('dropped', 0)),
            budget_ms=float(facts['budget_ms']) if facts.get('budget_ms') else None,
            overruns=int(facts.get('overruns', 0)),
            iterations=int(facts.get('iterations', 0)), warm=facts.get('warm') == 'true',
            network=facts.get('network', ''), runtime=facts.get('runtime', ''),
            endpoint_error_px=float(np.mean(self._errors)) if self._errors else None,
            saved=tuple(str(path) for path in saved))

    def close(self) -> Status:
        """Finish the files and destroy the node; return the last status, with their paths."""
        if self.window is not None:
            self.window.close()
        last = self._matcher.take_before((2 ** 31, 0), 'flow/info')
        for found in last:
            self._show(found)
        status = self.status(self._recorder.close() if self._recorder is not None else ())
        self.destroy_node()
        return status

    def _receiver(self, topic: str) -> Callable[[Any], None]:
        def receive(message: Any) -> None:
            self._receive(topic, message)
        return receive

    def _receive(self, topic: str, message: Any) -> None:
        stamp = (message.header.stamp.sec, message.header.stamp.nanosec)
        try:
            found = self._matcher.add(stamp, topic, self._small(topic, message))
        except MessageError as error:
            self.get_logger().warning(f'{topic}: {error}', throttle_duration_sec=5.0)
            return
        if topic == 'image':
            self._frames_in += 1
        if topic == 'flow/info':
            self._flow_out += 1
            self._flow_times.append(time.monotonic())
            self._facts = found[topic]
        if MEASURED <= set(found):
            self._measure(stamp, found)
        if topic == 'flow/info':
            # A network may have no confidence: what of an older flow is there by now, is all.
            for older in self._matcher.take_before(stamp, topic):
                self._show(older)

    def _small(self, topic: str, message: Any) -> Any:
        """Return what is kept of a message: little, because many are."""
        if topic == 'flow/info':
            return info_values(message)
        if topic not in PICTURES:
            return image_view(message)[::2, ::2].copy()
        picture = image_to_rgb(message)
        height = max(2, round(self._panel_width * message.height / message.width))
        return np.asarray(cv2.resize(picture, (self._panel_width, height),
                                     interpolation=cv2.INTER_AREA), dtype=np.uint8)

    def _measure(self, stamp: Stamp, found: dict[str, Any]) -> None:
        facts = found['flow/info']
        following = self._matcher.after(stamp, 'image')
        if following is None or facts['direction'] == 'backward':
            return
        seconds = following[0] - stamp[0] + 1e-9 * (following[1] - stamp[1])
        flow, truth = found.pop('flow/flow'), found.pop('source/flow_truth')
        # The truth is for the next frame; a flow over a dropped frame is for the one after.
        if abs(seconds - float(facts['dt_s'])) < 1e-3 and flow.shape == truth.shape:
            self._errors.append(float(np.nanmean(np.linalg.norm(flow - truth, axis=2))))

    def _show(self, found: dict[str, Any]) -> None:
        if 'image' not in found or 'flow/flow_color' not in found:
            return
        nothing = np.full_like(found['image'], 64)
        row = strip([found.get(topic, nothing) for topic in PICTURES], list(PICTURES.values()))
        if self._recorder is not None:
            self._recorder.add(row, float(found['flow/info']['dt_s']))
        if self.window is not None:
            self.window.show(row)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the preview until it is told to end; then write its files."""
    complete()
    cv2.setNumThreads(1)  # the cores are the flow node's
    rclpy.init(args=arguments)
    tune_malloc()
    node = PreviewNode()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while rclpy.ok():
            executor.spin_once(timeout_sec=0.02 if node.window is not None else None)
            if node.window is not None:
                node.window.update()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except RuntimeError:  # rclpy's InvalidHandle and RCLError among them
        if rclpy.ok():
            raise  # else told to end meanwhile
    finally:
        if current_thread() is main_thread():  # a second Ctrl-C must not lose the files
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(node.close().to_json(), flush=True)
        rclpy.try_shutdown()
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
