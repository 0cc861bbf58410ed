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

"""``flow_ros run``: an image source, the flow node, a consumer and a preview, over real DDS.

Each is a process of its own, as on a robot. They find each other on this machine only, in a ROS
domain of their own (ROS_DOMAIN_ID, if set, is respected), and all end with this command.
"""

import argparse
from collections import deque
from collections.abc import Callable, Mapping
import ctypes
from dataclasses import replace
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
from threading import Thread
import time
from typing import Any

from flow_ros.cli import CommandError
from flow_ros.environment import complete
from flow_ros.nodes.parameters import check
from flow_ros.nodes.process import profile_variable
from flow_ros.nodes.status import Status

START_LIMIT_S = 180.0
QUIET_PERIOD_S = 2.0
PATIENT_GAP_S = 5.0
NODES = {'flow': 'flow_ros.nodes.flow_node', 'consumer': 'flow_ros.nodes.consumer_node',
         'preview': 'flow_ros.nodes.preview_node', 'source': 'flow_ros.nodes.source_node'}
# The source first, so that nothing new comes; the preview has files to finish.
ENDING = ('source', 'preview', 'consumer', 'flow')


def add_parser(subparsers: Any) -> None:
    """Add the verb ``run``."""
    parser = subparsers.add_parser('run', help='the whole path on this machine', description=(
        'Start an image source, the flow node, a consumer and a preview as separate ROS 2 nodes, '
        'and show what they do. Ends with Ctrl-C, or after --duration; leaves preview.png and '
        'preview.mp4.'))
    parser.add_argument('--source', default='synthetic', help=(
        'synthetic[:SEED] (known flow), webcam:INDEX, a video, a folder of images, or a rosbag2 '
        'in sqlite3 or mcap (default: %(default)s)'))
    parser.add_argument('--topic', default='', help='image topic of a rosbag2 (default: first)')
    parser.add_argument('--fps', type=float, default=0.0, help=(
        'frames per second (default: 10 for a synthetic scene or a folder, else as recorded)'))
    parser.add_argument('--size', default='', help=(
        'WIDTHxHEIGHT to scale frames to (default: as they come; 640x480 synthetic)'))
    parser.add_argument('--duration', type=float, default=0.0, help=(
        'end by itself so many seconds after the first flow (default: never)'))
    parser.add_argument('--network', default='', help='network or model (default: dip_rt)')
    parser.add_argument('--weights', default='', help='weights file (default: those shipped)')
    parser.add_argument('--runtime', default='', help='auto, torch, openvino or tensorrt')
    parser.add_argument('--budget', default='', help=(
        'iterations (just so many), latency (what is done in --latency-ms) or rate (keep up with '
        'the source) (default: iterations)'))
    parser.add_argument('--latency-ms', type=float, default=0.0, help=(
        'from the arrival of a frame to its flow; makes the budget latency (default: 100)'))
    parser.add_argument('--iterations', type=int, default=0, help=(
        'per level, or levels (hd3), scales (mscsl); the most of a latency or rate (default: '
        "network's)"))
    parser.add_argument('--scale', type=float, default=0.0, help=(
        'make the images so much smaller before the flow (default: 1)'))
    parser.add_argument('--roi', default='', help=(
        'WIDTHxHEIGHT+X+Y, the part of the images to work on (default: all)'))
    parser.add_argument('--direction', default='', help='forward, backward or both')
    parser.add_argument('--params-file', type=Path, help='more parameters of the flow node')
    parser.add_argument('--out', type=Path, default=Path('out/run'), help=(
        'folder for the preview and the logs (default: %(default)s)'))
    parser.add_argument('--no-window', action='store_true', help='no live view')


def run(options: argparse.Namespace) -> int:
    """Run until told to end; 1 where something went wrong."""
    if options.duration < 0.0:
        raise CommandError(f'duration {options.duration:g} s: expected more than 0')
    if options.params_file is not None and not options.params_file.is_file():
        raise CommandError(f'{options.params_file}: no such parameters file')
    parameters = node_parameters(options, options.out.resolve())
    if refusal := check(parameters['flow']):
        raise CommandError(refusal)
    out = options.out.resolve()
    for name in ('preview.png', 'preview.mp4'):
        (out / name).unlink(missing_ok=True)  # what is there at the end is of this run
    (out / 'log').mkdir(parents=True, exist_ok=True)
    environment = make_environment(os.environ)
    screen = Screen()
    screen.say(f'{options.source} -> flow node -> consumer and preview; '
               f'ROS_DOMAIN_ID={environment["ROS_DOMAIN_ID"]}, logs in {shown(out / "log")}')
    stage = Stage(out=out, environment=environment, screen=screen)
    handlers = {number: signal.signal(number, lambda *_: stage.ask_to_end())
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for name, given in parameters.items():
            files = [options.params_file] if name == 'flow' and options.params_file else []
            stage.start(name, given, files)
        trouble = stage.watch(duration_s=options.duration)
    finally:
        stage.end()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return report(stage, trouble, screen)


def node_parameters(options: argparse.Namespace, out: Path) -> dict[str, dict[str, Any]]:
    """Return the parameters of each node, in the order of their start."""
    given = {name: getattr(options, name)
             for name in ('network', 'weights', 'runtime', 'budget', 'latency_ms', 'iterations',
                          'scale', 'roi', 'direction')}
    if given['latency_ms'] and not given['budget']:
        given['budget'] = 'latency'
    # On a slow machine the frames that are not dropped are far apart: still show their flow.
    patient = {} if options.params_file else {'max_gap_s': PATIENT_GAP_S}
    return {
        'flow': {**patient, **{name: value for name, value in given.items() if value}},
        'consumer': {},
        'preview': {'out': str(out), 'window': not options.no_window,
                    'truth': options.source.partition(':')[0] == 'synthetic'},
        # Two listen: flow node and preview. The source waits until both are there.
        'source': {'source': options.source, 'topic': options.topic, 'size': options.size,
                   'fps': float(options.fps), 'wait_for': 2},
    }


def make_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the nodes; what the user has set is kept."""
    environment = dict(base)
    complete(environment)
    environment.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    environment.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    profile = find_share() / 'config' / 'fastdds.xml'
    if profile.is_file():
        environment.setdefault(profile_variable(environment), str(profile))
    if environment.get('ROS_DISTRO') == 'humble':  # which knows no discovery range
        environment.setdefault('ROS_LOCALHOST_ONLY', '1')
    environment['PYTHONUNBUFFERED'] = '1'
    # Warnings are found in the nodes' output by how a line begins.
    environment['RCUTILS_COLORIZED_OUTPUT'] = '0'
    environment['RCUTILS_CONSOLE_OUTPUT_FORMAT'] = '[{severity}] [{time}] [{name}]: {message}'
    return environment


def find_share() -> Path:
    """Return the folder with ``config``: the repository, or share/flow_ros where installed."""
    here = Path(__file__).resolve()
    installed = [parent / 'share' / 'flow_ros' for parent in (*here.parents, Path(sys.prefix))]
    return next((folder for folder in (here.parents[2], *installed)
                 if (folder / 'config' / 'fastdds.xml').is_file()), here.parents[2])


def shown(path: Path) -> str:
    """Return ``path`` as it is shortest to type from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


class Screen:
    """Standard output: lines that stay, and one status line below them that is rewritten.

    Where it is no terminal, the status is a new line every few seconds.
    """

    def __init__(self) -> None:
        """Look whether it is a terminal."""
        self._terminal = sys.stdout.isatty()
        self._status = ''
        self._said = 0.0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._wipe()
        print(text, flush=True)
        if self._terminal and self._status:
            print(self._status, end='', flush=True)

    def status(self, text: str) -> None:
        """Replace the status line."""
        if self._terminal:
            self._wipe()
            self._status = text[:shutil.get_terminal_size().columns - 1]
            print(self._status, end='', flush=True)
        elif time.monotonic() - self._said >= QUIET_PERIOD_S:
            self._said = time.monotonic()
            print(text, flush=True)

    def leave(self) -> None:
        """Let the status line stand and go on below it."""
        if self._terminal and self._status:
            print(flush=True)
        self._status = ''

    def _wipe(self) -> None:
        if self._terminal:
            print('\r\x1b[2K', end='')


class Child:
    """A node's process; its output goes line by line to a log file and to ``on_line``."""

    def __init__(self, *, name: str, command: list[str], log: Path, on_line: Callable[[str], None],
                 environment: Mapping[str, str]) -> None:
        """Start it, in a session of its own: Ctrl-C reaches this command only."""
        self.name = name
        self.last_lines: deque[str] = deque(maxlen=12)
        self._log = log
        self._on_line = on_line
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
            errors='replace', env=dict(environment), start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == 'linux' else None)
        self._reader = Thread(target=self._read, name=f'{name}_output', daemon=True)
        self._reader.start()

    def exit_code(self) -> int | None:
        """Return its exit code, None while it runs."""
        return self._process.poll()

    def ask_to_end(self) -> None:
        """Send SIGINT, as ROS does."""
        if self.exit_code() is None:
            self._process.send_signal(signal.SIGINT)

    def end(self, *, patience_s: float) -> None:
        """Wait; then insist."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._process.wait(timeout=patience_s)
                break
            except subprocess.TimeoutExpired:
                self._process.send_signal(number)
                patience_s = 3.0
        self._process.wait()
        self._reader.join(timeout=3.0)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._log.open('w', encoding='utf-8') as log:
            for line in self._process.stdout:
                log.write(line)
                log.flush()
                self.last_lines.append(line.rstrip())
                self._on_line(line.rstrip())


class Stage:
    """The processes of a run, and what is known of it."""

    def __init__(self, *, out: Path, environment: Mapping[str, str], screen: Screen) -> None:
        """Start nothing yet."""
        self.status = Status()
        self.dropped_at_start = 0
        self._out = out
        self._environment = environment
        self._screen = screen
        self._children: dict[str, Child] = {}
        self._ahead = ''
        self._asked = False

    def start(self, name: str, parameters: Mapping[str, Any], files: list[Path]) -> None:
        """Start a node with ``parameters``, which win over those of ``files``."""
        own = self._out / 'log' / f'{name}.yaml'
        # JSON is YAML, and its quotes keep a folder called 2026 from becoming a number.
        own.write_text(json.dumps({'/**': {'ros__parameters': dict(parameters)}}, indent=2),
                       encoding='utf-8')
        arguments = [word for file in (*files, *([own] if parameters else []))
                     for word in ('--params-file', str(file))]
        self._children[name] = Child(
            name=name, log=self._out / 'log' / f'{name}.log', environment={
                # The cores are the flow node's.
                **self._environment, **({} if name == 'flow' else {'OMP_NUM_THREADS': '1'})},
            command=[sys.executable, '-m', NODES[name], '--ros-args', *arguments],
            on_line=lambda line: self._hear(name, line))

    def running_status(self) -> Status:
        """Return the status without the frames that were dropped before the first flow."""
        return replace(self.status, dropped=self.status.dropped - self.dropped_at_start,
                       frames_in=self.status.frames_in - self.dropped_at_start)

    def ask_to_end(self) -> None:
        """End the run as soon as may be; for signal handlers."""
        self._asked = True

    def watch(self, *, duration_s: float) -> str:
        """Show the status until the run shall end; return what went wrong, or an empty text."""
        begin = time.monotonic()
        first_flow = 0.0
        while not self._asked:
            time.sleep(0.1)
            for child in self._children.values():
                code = child.exit_code()
                if code == 0 and child.name == 'source':
                    return ''
                if code is not None:
                    child.end(patience_s=1.0)
                    return (f'the {child.name} node ended by itself with exit code {code}; its '
                            f'last lines:\n  ' + '\n  '.join(child.last_lines))
            now = time.monotonic()
            if self.status.flow_out and not first_flow:
                first_flow = now
                self.dropped_at_start = self.status.dropped
                if self.dropped_at_start:
                    self._screen.say(f'{self.dropped_at_start} frames came while the engines '
                                     f'were made ready for their size, and are not counted below')
            if first_flow and duration_s and now - first_flow >= duration_s:
                return ''
            if not first_flow and now - begin > START_LIMIT_S:
                return (f'no flow in the first {START_LIMIT_S:.0f} s, {self.status.frames_in} '
                        f'frames in; see the logs in {shown(self._out / "log")}')
            if first_flow:
                ahead = f' | {self._ahead}' if self._ahead else ''
                self._screen.status(f'{now - first_flow:.0f} s | {self.running_status()}{ahead}')
            else:
                self._screen.status(f'starting, {now - begin:.0f} s, '
                                    f'{self.status.frames_in} frames in')
        return ''

    def end(self) -> None:
        """End all processes."""
        for name in ENDING:
            if name in self._children:
                self._children[name].ask_to_end()
                # The video is written while it runs, so that only its end is left to write.
                self._children[name].end(patience_s=20.0 if name == 'preview' else 8.0)

    def _hear(self, name: str, line: str) -> None:
        if name == 'preview':
            self.status = Status.from_json(line) or self.status
        if name == 'consumer' and line.startswith('lower centre'):
            self._ahead = line
        if line.startswith(('[WARN]', '[ERROR]', '[FATAL]')):
            self._screen.say(f'{name}: {line}')


def report(stage: Stage, trouble: str, screen: Screen) -> int:
    """Say how it went; return the exit status."""
    screen.leave()
    status = stage.running_status()
    if status.flow_out:
        network = f' ({status.network} on {status.runtime})' if status.network else ''
        screen.say(f'{status}{network}')
    for path in status.saved:
        screen.say(f'preview: {shown(Path(path))}')
    if trouble:
        print(f'flow_ros run: error: {trouble}', file=sys.stderr)
        return 1
    return 0


def _die_with_parent() -> None:
    """Ask Linux to end this process with its parent, however that ends (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
