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

"""``flow_ros build``: build engines before they are needed, for images, CI and robots."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
import shutil
import time
from typing import Any, TYPE_CHECKING

from flow_ros.cli import CommandError
from flow_ros.cli.arguments import frame_size, named_network, positive, PRECISIONS
from flow_ros.cli.waiting import Waiting

if TYPE_CHECKING:  # nothing heavy is imported before it is known that it is needed
    from rich.console import Console

    from flow_ros.networks import FlowNetwork
    from flow_ros.runtimes.build_progress import EngineProgress, Progress
    from flow_ros.runtimes.building import BuildRequest, BuiltEngines
    from flow_ros.runtimes.cache import EngineCache

RUNTIMES = ('tensorrt', 'openvino')
EXIT_INTERRUPTED = 130
DESCRIPTION = """Build the engines of a network before they are needed, and keep them in the cache.

A node builds what it lacks by itself and serves with another runtime meanwhile; what was built
here it finds ready. Engines are kept in $FLOW_ROS_CACHE (else $XDG_CACHE_HOME/flow_ros, else
~/.cache/flow_ros): set it to a folder of the image, and to the same one when the node runs.

TensorRT builds for the very GPU that is there, so run this on the robot. TensorRT-RTX needs no
GPU: it builds for every one of compute capability 8.0 and later. --runtime openvino compiles
for the CPU that is there.

Ctrl-C leaves nothing broken: engines that were finished are kept, the next build goes on there.
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of this verb."""
    parser = subparsers.add_parser(
        'build', help='build engines before they are needed', description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', metavar='NAME', default='dip_rt',
                        help='network or model (default: %(default)s)')
    parser.add_argument('--weights', metavar='FILE', default='default',
                        help='weights of the network (default: those shipped)')
    parser.add_argument('--size', type=frame_size, metavar='WIDTHxHEIGHT', default=(640, 480),
                        help='frame size, px (default: 640x480)')
    parser.add_argument('--dynamic', type=frame_size, nargs=2, metavar=('MIN', 'MAX'),
                        help='TensorRT: engines for all frame sizes from MIN to MAX, fastest at '
                             '--size')
    parser.add_argument('--precision', choices=PRECISIONS, default='f32',
                        help='f32, or fast: whatever the machine does fastest (default: f32)')
    parser.add_argument('--runtime', choices=RUNTIMES, default='tensorrt',
                        help='what to build for (default: %(default)s)')
    parser.add_argument('--workspace', type=positive, metavar='MIB',
                        help='TensorRT: most memory a layer may use, MiB (default: all there is)')
    parser.add_argument('--optimisation-level', type=int, choices=range(6), metavar='0..5',
                        help="TensorRT: 0 builds quickly, 5 runs fastest (default: TensorRT's)")
    parser.add_argument('--threads', type=positive, metavar='N',
                        help='OpenVINO: threads (default: its own)')
    parser.add_argument('--list', action='store_true', help='show what the cache holds, and end')
    parser.add_argument('--clear', action='store_true', help='empty the cache, and end')


def run(options: argparse.Namespace) -> int:
    """Build; 1 where nothing could be kept, 130 where Ctrl-C ended it."""
    from rich.console import Console

    from flow_ros.runtimes.cache import EngineCache

    messages = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(level: str, text: str) -> None:
        messages.print(text if level == 'info' else f'{level}: {text}', markup=False)

    cache = EngineCache(say=say)
    if options.list:
        return _list(cache)
    if options.clear:
        return _clear(cache)
    if options.dynamic and options.runtime != 'tensorrt':
        raise CommandError('--dynamic is for --runtime tensorrt; OpenVINO compiles for one '
                           'size: give it as --size')
    network = named_network(options.network, options.weights)
    try:
        if options.runtime == 'openvino':
            return _build_openvino(network, options, messages)
        return _build_tensorrt(network, options, cache, messages)
    except KeyboardInterrupt:
        say('info', 'interrupted: nothing is left broken, and what was finished is kept')
        return EXIT_INTERRUPTED


def _build_tensorrt(network: 'FlowNetwork', options: argparse.Namespace, cache: 'EngineCache',
                    messages: 'Console') -> int:
    """Build plans, and check them where a GPU can run them."""
    import torch

    from flow_ros.runtimes.base import RuntimeUnavailable
    from flow_ros.runtimes.building import build_engines, build_target, gpu_of
    from flow_ros.runtimes.export import ExportError
    from flow_ros.runtimes.tensorrt import (
        BuildError,
        find_tensorrt,
        missing_tensorrt,
        refuses_gpu,
    )

    request = _request(options)
    try:
        installation = find_tensorrt()
        if installation is None:
            raise CommandError(f'{missing_tensorrt()}. Without it: --runtime openvino')
        device = torch.device('cuda') if torch.cuda.is_available() else None
        gpu = None if device is None else gpu_of(device)
        target = build_target(installation, gpu)
        if not cache.writable():  # found out now, not after minutes of work
            raise CommandError(f'{cache.directory} cannot be written, and what is built shall '
                               f'be kept: make it writable, free some space, or set '
                               f'FLOW_ROS_CACHE to another folder')
        messages.print(f'{network.name} {request.text} with {installation.text}, for '
                       f'{target.text}', markup=False)
        with _shown(messages) as progress:
            engines = build_engines(network, request, installation=installation, gpu=gpu,
                                    cache=cache, progress=progress)
    except ValueError as error:
        raise CommandError(str(error)) from error
    except (RuntimeUnavailable, BuildError, ExportError) as error:
        raise CommandError(str(error)) from error
    _summarise(engines)
    kept = all(record.folder is not None for record in engines.records)
    print(f'kept in {cache.directory / "engines"}' if kept else
          f'NOT kept: {cache.directory} cannot be written')
    why_not = ('no CUDA device here' if device is None else
               refuses_gpu(torch.cuda.get_device_capability(device)))
    if device is None or why_not:
        print(f'not checked: {why_not}; a node checks engines before it uses them')
        return 0 if kept else 1
    return 0 if _check(network, request, device, cache, messages) and kept else 1


def _check(network: 'FlowNetwork', request: 'BuildRequest', device: Any, cache: 'EngineCache',
           messages: 'Console') -> bool:
    """Run the engines against their reference; True where they pass."""
    from flow_ros.runtimes.base import EngineFault
    from flow_ros.runtimes.building import checked_runtime
    from flow_ros.runtimes.handover import EngineRefused
    from flow_ros.runtimes.tensorrt import BuildError, PlanError

    try:
        with Waiting(messages, 'checking the engines'):
            checked_runtime(network, request, device=device, cache=cache,
                            say=lambda level, text: messages.print(text, markup=False))
    except (BuildError, PlanError, EngineFault, EngineRefused) as error:
        print(f'check: {error}')
        return False
    return True


def _request(options: argparse.Namespace) -> 'BuildRequest':
    from flow_ros.runtimes.building import BuildRequest
    from flow_ros.runtimes.export import SizeRange

    size: Any = options.size
    if options.dynamic:
        smallest, largest = options.dynamic
        if not all(low <= usual <= high for low, usual, high
                   in zip(smallest, options.size, largest)):
            raise CommandError(f'--size {_words(options.size)} must lie between --dynamic '
                               f'{_words(smallest)} and {_words(largest)}')
        size = SizeRange(minimum=smallest, optimum=options.size, maximum=largest)
    return BuildRequest(size=size, precision=options.precision, workspace_mib=options.workspace,
                        optimisation_level=options.optimisation_level)


@contextmanager
def _shown(messages: 'Console') -> Iterator['Progress']:
    """Yield what shows the progress: a bar on a terminal, else a line now and then."""
    if not messages.is_terminal:
        act = ''
        with Waiting(messages, 'starting to build') as waiting:

            def lines(seen: 'EngineProgress') -> bool:
                nonlocal act
                waiting.text = seen.text
                if seen.act != act:
                    act = seen.act
                    messages.print(seen.text, markup=False)
                return True

            yield lines
        return

    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(SpinnerColumn(), BarColumn(), TextColumn('{task.description}', markup=False),
                  TimeElapsedColumn(), console=messages, transient=True) as bar:
        task = bar.add_task('starting to build', total=1.0)

        def progress(seen: 'EngineProgress') -> bool:
            bar.update(task, completed=seen.fraction, description=seen.text)
            return True

        yield progress


def _summarise(engines: 'BuiltEngines') -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for name in ('engine', 'size', 'time', ''):
        table.add_column(name, justify='right' if name in {'size', 'time'} else 'left')
    for record in engines.records:
        table.add_row(record.act, f'{record.size / 1e6:.2f} MB',
                      '' if record.cached else f'{record.seconds:.1f} s',
                      'was in the cache' if record.cached else 'built')
    Console(width=240).print(table)
    print(engines.text)


def _build_openvino(network: 'FlowNetwork', options: argparse.Namespace,
                    messages: 'Console') -> int:
    """Compile as a node does when it prepares for a frame size; OpenVINO keeps what it made."""
    from flow_ros.runtimes import create_runtime, RuntimeUnavailable
    from flow_ros.runtimes.cache import cache_directory
    from flow_ros.streaming import FlowEstimator

    folder = cache_directory() / 'openvino'
    before = _files(folder)
    start = time.monotonic()
    width, height = options.size
    try:
        runtime = create_runtime('openvino', network, threads=options.threads,
                                 precision=options.precision)
    except RuntimeUnavailable as error:
        raise CommandError(str(error)) from error
    what = f'{network.name} {width}x{height} {options.precision}'
    messages.print(f'{what} with OpenVINO, for the CPU that is here', markup=False)
    with Waiting(messages, f'compiling {what}'):
        FlowEstimator(runtime=runtime).prepare(height, width)
    after = _files(folder)
    new = [path for path in after if path not in before]
    seconds = time.monotonic() - start
    if not after:
        print(f'compiled {network.name} for {width}x{height} in {seconds:.1f} s, but NOT kept: '
              f'{folder} cannot be written; set FLOW_ROS_CACHE to a folder that can')
        return 1
    made = (f'{len(new)} compiled models, {sum(after[path] for path in new) / 1e6:.1f} MB, are '
            f'new' if new else 'all compiled models were in the cache')
    print(f'compiled {network.name} for {width}x{height} ({options.precision}) in {seconds:.1f} '
          f's: {made}\nkept in {folder}')
    return 0


def _list(cache: 'EngineCache') -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for name in ('engine', 'size', 'built', 'with', 'for'):
        table.add_column(name, justify='right' if name == 'size' else 'left')
    entries = cache.entries()
    for entry in entries:
        key = entry.metadata.get('key')
        key = key if isinstance(key, dict) else {}
        table.add_row(entry.title, f'{entry.size / 1e6:.2f} MB', entry.built,
                      str(key.get('tensorrt', '')),
                      f'{key.get("gpu", "")} {key.get("compute_capability", "")}'.strip())
    if entries:
        Console(width=240).print(table)
    models = _files(cache.directory / 'openvino')
    print(f'{len(entries)} TensorRT engines, {sum(entry.size for entry in entries) / 1e6:.1f} '
          f'MB; {len(models)} compiled models of OpenVINO, {sum(models.values()) / 1e6:.1f} MB; '
          f'in {cache.directory}')
    return 0


def _clear(cache: 'EngineCache') -> int:
    freed = cache.clear()
    for name in ('openvino', 'references'):
        freed += sum(_files(cache.directory / name).values())
        shutil.rmtree(cache.directory / name, ignore_errors=True)
    print(f'{freed / 1e6:.1f} MB removed from {cache.directory}')
    return 0


def _files(folder: Path) -> dict[Path, int]:
    """Return the files below ``folder`` with their sizes, bytes."""
    return {path: path.stat().st_size for path in folder.rglob('*') if path.is_file()}


def _words(size: tuple[int, int]) -> str:
    return f'{size[0]}x{size[1]}'
