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

"""What the flow node costs beside its network, against a node that only takes and publishes.

    python bench/node_cost.py [--size 640x480] [--topics flow,flow_color] [--json FILE]

A camera (this process) publishes bgr8 images over real DDS, a consumer in a process of its own
takes what comes back. Between them are, in turns of some seconds within one run:

- ``floor``: rclpy and nothing else. It takes each image and publishes messages of the same
  sizes, made once before: what the transport costs.
- ``node``: the real flow node, estimator and all, around a network that costs nothing: it
  returns one flow field. Everything else is done as ever: conversion, upload, scene cut, warm
  start, results, colours, messages.
- ``steps``: the same node once more with a stopwatch around each step, which tells where its
  time goes, and is not compared.

Latency is from the camera's call of publish until the consumer has the last image of that
frame. CPU time is that of the node's whole process, all threads. All processes have
config/fastdds.xml (--default-transport: none has) and the node's malloc tuning.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
import functools
import json
import os
from pathlib import Path
import platform
import subprocess
import sys
import threading
import time
from typing import Any

import cv2
import numpy as np
import torch

from flow_ros import environment
from flow_ros.malloc import tune_malloc
from flow_ros.networks.base import Call, Features, FlowNetwork, FlowOutput, State, Step
from flow_ros.nodes.process import profile_variable
from flow_ros.sources import parse_size

ROOT = Path(__file__).resolve().parents[1]
SIZES = ('640x480', '1280x720', '1920x1080')
PERIODS_MS = {640: 33.0, 1280: 60.0, 1920: 120.0}
SIDES = ('floor', 'node', 'steps')
TOPICS = ('flow', 'flow_color', 'confidence', 'occlusion')
LAYOUTS = {'flow': ('32FC2', 8), 'flow_color': ('rgb8', 3), 'confidence': ('32FC1', 4),
           'confidence_mono': ('mono8', 1), 'occlusion': ('mono8', 1)}
LIMIT_SHARE, LIMIT_MS = 1.3, 2.0


class FreeNetwork(FlowNetwork):
    """A network that costs nothing: one flow field, made once per size.

    A camera that drives forward, with an object that moves across: motion of up to 40 px.
    """

    name = 'free'
    engines = ()

    def __init__(self) -> None:
        """Know no size yet."""
        super().__init__()
        self._outputs: dict[tuple[int, int], FlowOutput] = {}

    def encode(self, image: torch.Tensor, *, call: Call | None = None) -> Features:
        """Keep a pixel, for its device."""
        return Features((image[..., :1, :1].clone(),), (image.shape[-2], image.shape[-1]))

    def start(self, features_a: Features, features_b: Features, *,
              prior_flow: torch.Tensor | None = None, iterations: int | None = None,
              call: Call | None = None) -> State:
        """Return one step at 1/8."""
        flow = features_a.tensors[0].new_zeros(1, 2, 1, 1)
        return State(features_a, features_b, level=8, flow=flow, schedule=(Step(8),),
                     warm=prior_flow is not None)

    def step(self, state: State, *, call: Call | None = None) -> State:
        """Do nothing."""
        return state.advanced()

    def finish(self, state: State, *, call: Call | None = None) -> FlowOutput:
        """Return the field."""
        size = state.features_a.size
        if size not in self._outputs:
            self._outputs[size] = make_output(*size)
        return self._outputs[size]


def make_output(height: int, width: int) -> FlowOutput:
    """Return the flow, confidence and occlusion of the scene that FreeNetwork sees."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    flow = torch.stack([(x - width / 2) * 0.03, (y - height / 2) * 0.03])
    inside = ((x - 0.4 * width).abs() < 0.1 * width) & ((y - 0.6 * height).abs() < 0.1 * height)
    flow = torch.where(inside, torch.tensor([-40.0, 5.0]).view(2, 1, 1), flow)
    edge = (torch.nn.functional.avg_pool2d(inside[None].float(), 9, 1, 4) - 0.5).abs()
    return FlowOutput(flow=flow[None].contiguous(), confidence=(0.2 + 1.6 * edge)[None],
                      occlusion=(1.0 - 2.0 * edge)[None])


class Stopwatch:
    """The time of named steps, without that of the steps inside them, by thread."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._local = threading.local()
        self._lock = threading.Lock()
        self.milliseconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step; what is timed inside it does not count."""
        stack: list[float] = self._local.__dict__.setdefault('stack', [])
        stack.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = 1e3 * (time.perf_counter() - start)
            inner = stack.pop()
            if stack:
                stack[-1] += spent
            self.add(name, spent - inner)

    def add(self, name: str, milliseconds: float) -> None:
        """Add time to a step."""
        with self._lock:
            self.milliseconds[name] += milliseconds

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Time every call of ``owner.function`` as the step ``name``."""
        original: Callable[..., Any] = getattr(owner, function)

        @functools.wraps(original)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.step(name):
                return original(*arguments, **named)
        setattr(owner, function, timed)

    def take(self) -> dict[str, float]:
        """Return the times so far, and begin again."""
        with self._lock:
            taken = dict(self.milliseconds)
            self.milliseconds.clear()
        return taken


def watch_the_node(watch: Stopwatch) -> None:
    """Put the stopwatch around the steps of the flow node, of this process."""
    from rclpy.executors import Executor
    from rclpy.publisher import Publisher

    from flow_ros.nodes import flow_node, parameters, publishers
    from flow_ros.streaming import estimator, pace, past

    for owner, function, name in (
            (Executor, '_take_subscription', 'take'),
            (flow_node.FlowNode, '_process', 'node, the rest'),
            (flow_node, 'image_to_rgb', 'convert'),
            (publishers.FlowTopics, 'wanted', 'who subscribes'),
            (publishers.FlowTopics, 'publish', 'node, the rest'),
            (flow_node.FlowNode, '_set_up', 'parameters'),
            (parameters.LiveValues, 'now', 'parameters'),
            (flow_node.FlowNode, '_inform', 'info'),
            (flow_node.FlowNode, '_view', 'convert'),
            (estimator.FlowEstimator, '__call__', 'estimator, the rest'),
            (estimator, 'upload', 'upload'),
            (estimator.FlowEstimator, 'settle', 'settle, after all is published'),
            (estimator, 'thumbnails', 'scene cut'),
            (past, 'explains', 'scene cut'),
            (past, 'carry', 'warm start'),
            (past, 'sample_flow', 'warm start'),
            (pace, 'checked', 'check'),
            (estimator, 'result_of', 'results'),
            (pace.Pace, 'run', 'budget'),
            (FreeNetwork, 'encode', 'network'),
            (FreeNetwork, 'start', 'network'),
            (FreeNetwork, 'step', 'network'),
            (FreeNetwork, 'finish', 'network'),
            (publishers.ColorScale, 'follow', 'colour'),
            (publishers, 'flow_to_color', 'colour'),
            (publishers, 'confidence_to_mono', 'colour'),
            (publishers.ImageTopic, 'pixels', 'build messages'),
            (publishers.ImageTopic, 'send', 'build messages'),
            (publishers, 'make_info', 'info'),
            (publishers, 'viewed_camera_info', 'build messages'),
            (Publisher, 'publish', 'publish')):
        watch.watch(owner, function, name)
    # From the arrival of a message until the worker has it.
    process: Callable[..., None] = flow_node.FlowNode._process

    def timed(node: Any, arrival: Any) -> None:
        watch.add('to the worker', 1e3 * (time.perf_counter() - arrival.came))
        process(node, arrival)
    flow_node.FlowNode._process = timed  # type: ignore[method-assign]


def make_image(encoding: str, pixel: int, size: tuple[int, int]) -> Any:
    """Return an Image message of that size, all zero."""
    from array import array

    from sensor_msgs.msg import Image
    width, height = size
    return Image(width=width, height=height, step=pixel * width, encoding=encoding,
                 data=array('B', bytes(pixel * width * height)))


def serve_floor(topics: Sequence[str]) -> Any:
    """Return a node that answers each image with messages of the same sizes."""
    from rclpy.node import Node
    from sensor_msgs.msg import Image

    from flow_ros.nodes.qos import input_qos, output_qos, ReliabilityPolicy
    node = Node('floor')
    ready: dict[tuple[int, int], list[Any]] = {}
    publishers = [node.create_publisher(Image, f'~/{topic}', output_qos()) for topic in topics]

    def answer(image: Image) -> None:
        size = (image.width, image.height)
        if size not in ready:
            ready[size] = [make_image(*LAYOUTS[topic], size) for topic in topics]
        for message, publisher in zip(ready[size], publishers):
            message.header = image.header
            publisher.publish(message)
    node.create_subscription(Image, f'{node.get_name()}/image', answer,
                             input_qos(ReliabilityPolicy.RELIABLE))
    return node


def serve_flow(name: str, watch: Stopwatch | None) -> Any:
    """Return the flow node, around a network that costs nothing."""
    from flow_ros.nodes.flow_node import FlowNode
    if watch is not None:
        watch_the_node(watch)
    return FlowNode(network=FreeNetwork(), cli_args=[
        '--ros-args', '-r', f'__node:={name}', '-r', f'image:={name}/image',
        '-p', 'runtime:=torch', '-p', 'max_gap_s:=3000.0', '-p', 'status_period_s:=0.0',
        '-p', 'no_image_timeout_s:=0.0'])


def run_node(name: str, topics: Sequence[str]) -> None:
    """Be the floor or a flow node until the input ends; each line asks for the steps' times."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    rclpy.init()
    tune_malloc()
    watch = Stopwatch() if name == 'steps' else None
    node = serve_floor(topics) if name == 'floor' else serve_flow(name, watch)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinner = threading.Thread(target=executor.spin, daemon=True)
    spinner.start()
    say('ready')
    for _ in sys.stdin:
        say(watch.take() if watch is not None else {})
    executor.shutdown(5.0)
    spinner.join(5.0)
    if name == 'floor':
        node.destroy_node()
    else:
        node.close()
    rclpy.try_shutdown()


def run_consumer(topics: Sequence[str]) -> None:
    """Take everything; each line of the input asks what came when."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.node import Node
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import Image
    rclpy.init()
    tune_malloc()
    node = Node('consumer')
    came: list[tuple[int, str, float]] = []

    def receiver(topic: str) -> Callable[[Any], None]:
        def receive(message: Any) -> None:
            stamp = message.header.stamp
            came.append((stamp.sec * 10 ** 9 + stamp.nanosec, topic, time.monotonic()))
        return receive
    for side in SIDES:
        for topic in topics:
            node.create_subscription(Image, f'{side}/{topic}', receiver(topic), QoSProfile(
                depth=1, reliability=ReliabilityPolicy.RELIABLE))
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinner = threading.Thread(target=executor.spin, daemon=True)
    spinner.start()
    say('ready')
    for _ in sys.stdin:
        taken = list(came)
        del came[:len(taken)]
        say(taken)
    executor.shutdown(5.0)
    spinner.join(5.0)
    node.destroy_node()
    rclpy.try_shutdown()


def say(words: Any) -> None:
    """Answer the process that started this one."""
    print(f'\n>{json.dumps(words)}', flush=True)


class Helper:
    """One of the other processes."""

    def __init__(self, role: str, topics: Sequence[str], variables: dict[str, str]) -> None:
        """Start it; ``wait`` until it is ready."""
        self._role = role
        self._process = subprocess.Popen(
            [sys.executable, __file__, '--role', role, '--topics', ','.join(topics)],
            env={**os.environ, **variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True)
        # The clock of a process's CPU time, from its id, as clock_getcpuclockid makes it.
        self._clock = (~self._process.pid << 3) | 2

    def cpu_ms(self) -> float:
        """Return the CPU time of all its threads since its start."""
        return 1e-6 * time.clock_gettime_ns(self._clock)

    def page_faults(self) -> int:
        """Return the pages that it was given since its start, on Linux; else 0."""
        path = Path(f'/proc/{self._process.pid}/stat')
        return int(path.read_text().rpartition(')')[2].split()[7]) if path.exists() else 0

    def wait(self) -> Any:
        """Return its next answer."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('>'):
                return json.loads(line[1:])
        raise SystemExit(f'node_cost: the {self._role} process ended with exit code '
                         f'{self._process.wait()}; its words are above')

    def ask(self) -> Any:
        """Ask for what it has measured since it was asked last."""
        assert self._process.stdin is not None
        self._process.stdin.write('\n')
        self._process.stdin.flush()
        return self.wait()

    def end(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Camera:
    """Publishes the frames of a texture that moves, to one side at a time."""

    def __init__(self, size: tuple[int, int], period_ms: float) -> None:
        """Advertise on the three sides' topics."""
        import rclpy
        from rclpy.node import Node
        from rclpy.qos import QoSProfile
        from sensor_msgs.msg import Image
        rclpy.init()
        tune_malloc()
        self._node = Node('camera')
        self._publishers = {side: self._node.create_publisher(Image, f'{side}/image',
                                                              QoSProfile(depth=1))
                            for side in SIDES}
        self._period_ms = period_ms
        self._stamp = 10 ** 12
        coarse = np.random.default_rng(0).integers(0, 255, (15, 20, 3), dtype=np.uint8)
        width, height = size
        texture = cv2.resize(coarse, (width + 40, height), interpolation=cv2.INTER_CUBIC)
        self._messages = [make_image('bgr8', 3, size) for _ in range(8)]
        for index, message in enumerate(self._messages):
            part = np.ascontiguousarray(texture[:, 4 * index:4 * index + width])
            message.data[:] = type(message.data)('B', part.tobytes())

    def wait_for(self, side: str) -> None:
        """Wait until that side listens."""
        while not self._publishers[side].get_subscription_count():
            time.sleep(0.05)

    def film(self, side: str, count: int) -> dict[int, float]:
        """Publish so many frames; return when each was, by its stamp (ns)."""
        sent: dict[int, float] = {}
        begin = time.monotonic()
        for index in range(count):
            time.sleep(max(0.0, begin + 1e-3 * index * self._period_ms - time.monotonic()))
            self._stamp += round(1e6 * self._period_ms)
            message = self._messages[index % len(self._messages)]
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(self._stamp, 10 ** 9)
            sent[self._stamp] = time.monotonic()
            self._publishers[side].publish(message)
        time.sleep(max(0.3, 3e-3 * self._period_ms))
        return sent

    def close(self) -> None:
        """End."""
        import rclpy
        self._node.destroy_node()
        rclpy.try_shutdown()


def latencies(sent: dict[int, float], came: Sequence[tuple[int, str, float]],
              topics: Sequence[str], *, forward: bool) -> dict[str, list[float]]:
    """Return the ms from a frame's sending to its flow, and to all of its answers.

    Where ``forward``, they have the stamp of the frame before the one that made them.
    """
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for stamp, topic, when in came:
        found[stamp][topic] = when
    stamps = sorted(sent)
    result: dict[str, list[float]] = {'flow': [], 'all': []}
    for index, stamp in enumerate(stamps):
        answers = found.get(stamps[index - 1] if forward else stamp, {})
        if set(answers) != set(topics) or (forward and index == 0):
            continue
        result['flow'].append(1e3 * (answers.get('flow', np.nan) - sent[stamp]))
        result['all'].append(1e3 * (max(answers.values()) - sent[stamp]))
    return result


def measure(size: tuple[int, int], topics: Sequence[str], options: argparse.Namespace,
            variables: dict[str, str]) -> dict[str, Any]:
    """Compare the node and the floor at one size."""
    period = options.period_ms or PERIODS_MS.get(size[0], 100.0)
    helpers = {role: Helper(role, topics, variables) for role in (*SIDES, 'consumer')}
    camera = None
    rows: dict[str, Any] = {side: defaultdict(list) for side in SIDES}
    lost = dict.fromkeys(SIDES, 0)
    steps: dict[str, float] = defaultdict(float)
    try:
        for helper in helpers.values():
            helper.wait()
        camera = Camera(size, period)
        for side in SIDES:
            camera.wait_for(side)
        time.sleep(1.0)  # for the consumer's subscriptions to all of them
        for turn in range(options.turns + 1):
            for side in SIDES:
                helpers['steps'].ask()
                before, faults = helpers[side].cpu_ms(), helpers[side].page_faults()
                sent = camera.film(side, options.frames)
                cpu = (helpers[side].cpu_ms() - before) / len(sent)
                faults = (helpers[side].page_faults() - faults) / len(sent)
                found = latencies(sent, helpers['consumer'].ask(), topics,
                                  forward=side != 'floor')
                if turn == 0:
                    continue  # what is made once
                rows[side]['cpu'].append(cpu)
                rows[side]['faults'].append(faults)
                for name, values in found.items():
                    rows[side][name] += values
                # A flow node's first frame after a pause pairs with its last one: one too few.
                lost[side] += len(sent) - (side != 'floor') - len(found['all'])
                if side == 'steps':
                    for name, spent in helpers['steps'].ask().items():
                        steps[name] += spent / (options.frames * options.turns)
    finally:
        if camera is not None:
            camera.close()
        for helper in helpers.values():
            helper.end()
    return summary(size, topics, period, rows, lost, dict(steps))


def summary(size: tuple[int, int], topics: Sequence[str], period: float, rows: dict[str, Any],
            lost: dict[str, int], steps: dict[str, float]) -> dict[str, Any]:
    """Return what was measured, as numbers."""
    result: dict[str, Any] = {'size': f'{size[0]}x{size[1]}', 'topics': list(topics),
                              'period_ms': period, 'steps_ms': steps}
    for side in SIDES:
        result[side] = {'frames': len(rows[side]['all']), 'lost': lost[side]}
        for name in ('flow', 'all'):
            values = rows[side][name]
            result[side] |= {f'{name}_ms_p50': float(np.median(values)),
                             f'{name}_ms_p99': float(np.quantile(values, 0.99))}
        result[side] |= {'cpu_ms': float(np.median(rows[side]['cpu'])),
                         'cpu_ms_least': min(rows[side]['cpu']),
                         'cpu_ms_most': max(rows[side]['cpu']),
                         'page_faults': float(np.median(rows[side]['faults']))}
    floor, node = result['floor']['all_ms_p50'], result['node']['all_ms_p50']
    result['limit_ms'] = LIMIT_SHARE * floor + LIMIT_MS
    result['kept'] = node <= result['limit_ms']
    return result


def show(result: dict[str, Any]) -> None:
    """Print one size."""
    print(f'\n{result["size"]}, every {result["period_ms"]:.0f} ms, {", ".join(result["topics"])}')
    print('|  | flow p50 | p99 | all p50 | p99 | CPU ms a frame (of turns) '
          '| page faults | frames, lost |')
    print('|---|---|---|---|---|---|---|---|')
    for side in SIDES:
        row = result[side]
        print(f'| {side} | {row["flow_ms_p50"]:.2f} | {row["flow_ms_p99"]:.2f} '
              f'| {row["all_ms_p50"]:.2f} | {row["all_ms_p99"]:.2f} '
              f'| {row["cpu_ms"]:.2f} ({row["cpu_ms_least"]:.2f} to {row["cpu_ms_most"]:.2f}) '
              f'| {row["page_faults"]:.0f} | {row["frames"]}, {row["lost"]} |')
    node = result['node']['all_ms_p50']
    print(f'node {node:.2f} ms; {LIMIT_SHARE} times the floor plus {LIMIT_MS:g} ms is '
          f'{result["limit_ms"]:.2f}: {"kept" if result["kept"] else "NOT kept"}')
    print('steps, mean ms a frame: ' + ', '.join(
        f'{name} {spent:.3f}' for name, spent in
        sorted(result['steps_ms'].items(), key=lambda pair: -pair[1])))


def main() -> None:
    """Measure all sizes asked for."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', action='append', help='WIDTHxHEIGHT; default: three of them')
    parser.add_argument('--topics', default=','.join(TOPICS), help=(
        f'what the consumer is subscribed to, of {", ".join(LAYOUTS)} (default: %(default)s)'))
    parser.add_argument('--frames', type=int, default=30, help='in each turn of each side')
    parser.add_argument('--turns', type=int, default=6, help='of each side')
    parser.add_argument('--period-ms', type=float, default=0.0, help='between two frames')
    parser.add_argument('--default-transport', action='store_true',
                        help='without config/fastdds.xml')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--role', help=argparse.SUPPRESS)
    options = parser.parse_args()
    topics = options.topics.split(',')
    if unknown := sorted(set(topics) - set(LAYOUTS)):
        parser.error(f'unknown topics {", ".join(unknown)}; expected some of {", ".join(LAYOUTS)}')
    environment.complete()
    if options.role == 'consumer':
        return run_consumer(topics)
    if options.role:
        return run_node(options.role, topics)
    variables = {'ROS_DOMAIN_ID': str(1 + os.getpid() % 100),
                 'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST'}
    if not options.default_transport:
        variables[profile_variable()] = str(ROOT / 'config' / 'fastdds.xml')
    os.environ.update(variables)
    results = []
    for text in options.size or SIZES:
        results.append(measure(parse_size(text), topics, options, variables))
        show(results[-1])
    if options.json:
        options.json.write_text(json.dumps({
            'command': ' '.join(['python', 'bench/node_cost.py', *sys.argv[1:]]),
            'machine': {'processor': platform.machine(), 'cores': os.cpu_count()},
            'transport': 'default' if options.default_transport else 'config/fastdds.xml',
            'results': results}, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
