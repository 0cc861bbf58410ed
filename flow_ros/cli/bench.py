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

"""``flow_ros bench``: how fast, how exact, how large; one network, or a whole report."""

import argparse
from collections.abc import Mapping
from pathlib import Path
import sys
from typing import Any, TYPE_CHECKING

from flow_ros.cli import CommandError
from flow_ros.cli.arguments import check_json, frame_size, positive, PRECISIONS, write_json

if TYPE_CHECKING:  # nothing heavy is imported before it is known that it is needed
    from flow_ros.evaluation.benchmarks.suite import PartResult, Plan

RUNTIMES = ('auto', 'torch', 'openvino', 'tensorrt')
PARTS = ('accuracy', 'time', 'memory', 'budget')
DESCRIPTION = """Measure one network on a stream, or, without --network, everything.

One network:   flow_ros bench --network dip_rt --runtime openvino --size 640x480 --iterations 2
The report:    flow_ros bench [--data DIR] [--out bench/results]

A single run goes through a synthetic scene, a video or a folder of images, every frame fresh,
and prints a line. Its JSON holds machine, versions and results, a list of one with network,
runtime, size, iterations, warm, fps (1000 / ms_p50), ms_p50, ms_p99 and peak_mb (the highest
resident memory above the process that has loaded packages, network and frames, the making of
engines included; stream_mb is that of the frames alone; MB are 2^20 bytes). The early stop is
off, so that every step is done.

The report is accuracy against time beside OpenCV DIS, time and memory by resolution, and budget
asked against budget kept: report.md, and for each part a plot and a JSON file. Every measurement
is a process of its own. Ctrl-C leaves what is done. Run it on a machine that does nothing else.
"""
SINGLE = ('network', 'weights', 'runtime', 'device', 'size', 'iterations', 'source', 'json',
          'latency_ms', 'cold', 'early_stop', 'frames', 'warm_up')
REPORT = ('networks', 'runtimes', 'sizes', 'only', 'data', 'out', 'minutes', 'quick', 'redraw',
          'readme')


def add_parser(subparsers: Any) -> None:
    """Add the parser of this verb."""
    parser = subparsers.add_parser(
        'bench', help='measure speed, memory, budgets and accuracy', description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    single = parser.add_argument_group('one network')
    single.add_argument('--network', metavar='NAME', help='network or model (default: dip_rt)')
    single.add_argument('--weights', metavar='FILE',
                        help='its weights (default: those shipped; seeded random ones where '
                             'there are none: the time is the same)')
    single.add_argument('--runtime', choices=RUNTIMES, help='where it runs (default: auto)')
    single.add_argument('--device', metavar='NAME', help="device, in the runtime's own words")
    single.add_argument('--size', type=frame_size, metavar='WIDTHxHEIGHT',
                        help='scale frames to this (default: as they come; 640x480 synthetic)')
    single.add_argument('--iterations', type=positive, metavar='K',
                        help="iterations per level; levels of hd3, scales of mscsl (default: "
                             "the network's own)")
    single.add_argument('--latency-ms', type=positive_ms, metavar='MS',
                        help='a budget of time instead; --iterations is then the most')
    single.add_argument('--source', metavar='DIR|VIDEO|synthetic',
                        help='folder of images, video, rosbag2 or synthetic[:SEED] (default: '
                             'synthetic)')
    single.add_argument('--frames', type=positive, metavar='N', help='to measure (default: 60)')
    single.add_argument('--warm-up', type=positive, metavar='N',
                        help='frames before those that count (default: 4)')
    single.add_argument('--cold', action='store_true', default=None,
                        help='every flow from a cold start')
    single.add_argument('--early-stop', action='store_true', default=None,
                        help='let the loop end when updates are small, as the node does')
    single.add_argument('--json', type=Path, metavar='FILE', help='write the numbers here')
    both = parser.add_argument_group('both')
    both.add_argument('--precision', choices=PRECISIONS,
                      help='f32 or fast (default: f32; in the report both)')
    both.add_argument('--threads', type=positive, metavar='N',
                      help="CPU threads (default: the runtime's choice)")
    report = parser.add_argument_group('the report')
    report.add_argument('--out', type=Path, metavar='DIR',
                        help='folder for it (default: bench/results)')
    report.add_argument('--networks', type=words, metavar='A,B',
                        help='(default: every model with weights here, and the families '
                             'without)')
    report.add_argument('--runtimes', type=words, metavar='A,B',
                        help='(default: those this machine has)')
    report.add_argument('--sizes', type=sizes, metavar='A,B',
                        help='sizes for time and memory (default: 640x480,320x240,1280x720,'
                             '1920x1080; memory of the first network also 3840x2160)')
    report.add_argument('--only', type=parts, metavar='A,B',
                        help=f'parts: {", ".join(PARTS)} (default: all)')
    report.add_argument('--data', type=Path, metavar='DIR',
                        help='folder of pairs with truth for the accuracy, as evaluate takes it '
                             '(default: procedural pairs of a held-out seed)')
    report.add_argument('--minutes', type=positive_ms, metavar='M',
                        help='of all; what does not fit is left out and named (default: 20)')
    report.add_argument('--quick', action='store_true', default=None,
                        help='a few minutes: fewer pairs, frames, sizes and budgets')
    report.add_argument('--redraw', action='store_true', default=None,
                        help='measure nothing: tables and plots anew from the JSON files')
    report.add_argument('--readme', nargs='?', type=Path, const=Path('README.md'),
                        metavar='FILE',
                        help='measure nothing: write the speed section of FILE (default: '
                             'README.md) from the JSON files')


def positive_ms(text: str) -> float:
    """Return a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1e6:
        raise argparse.ArgumentTypeError(f'expected a number above 0; seen {text!r}')
    return value


def words(text: str) -> tuple[str, ...]:
    """Return the parts of a list with commas, each once."""
    found = tuple(dict.fromkeys(word.strip() for word in text.split(',') if word.strip()))
    if not found:
        raise argparse.ArgumentTypeError(f'expected names with commas between; seen {text!r}')
    return found


def sizes(text: str) -> tuple[str, ...]:
    """Return sizes of a list with commas, as WIDTHxHEIGHT."""
    return tuple('x'.join(map(str, frame_size(word))) for word in words(text))


def parts(text: str) -> tuple[str, ...]:
    """Return parts of the report of a list with commas."""
    found = words(text)
    unknown = [word for word in found if word not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f'unknown part {unknown[0]!r}; expected some of '
                                         f'{", ".join(PARTS)}')
    return found


def run(options: argparse.Namespace) -> int:
    """Measure; 0 where all went well, 1 where a measurement of the report failed."""
    single = [name for name in SINGLE if getattr(options, name) is not None]
    report = [name for name in REPORT if getattr(options, name) is not None]
    if single and report:
        raise CommandError(f'{_option(single[0])} is for one network and {_option(report[0])} '
                           f'for the report: give one of them')
    if single:
        return _run_single(options)
    out = options.out or Path('bench/results')
    if options.redraw or options.readme:
        return _draw_again(options, out)
    return _run_report(options, out)


def _option(name: str) -> str:
    return f'--{name.replace("_", "-")}'


def _run_single(options: argparse.Namespace) -> int:
    from rich.console import Console

    from flow_ros.cli.waiting import Waiting
    from flow_ros.evaluation.benchmarks.children import NotMeasured, Refused, run_child
    from flow_ros.evaluation.benchmarks.machine import machine_facts, versions

    check_json(options.json)
    given = {name: getattr(options, name) for name in SINGLE
             if name not in ('json', 'size') and getattr(options, name) is not None}
    if options.size is not None:
        given['size'] = 'x'.join(map(str, options.size))
    for name in ('precision', 'threads'):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    if 'source' in given and Path(given['source']).exists():
        given['source'] = str(Path(given['source']).resolve())  # the child runs elsewhere
    if 'weights' in given and Path(given['weights']).exists():
        given['weights'] = str(Path(given['weights']).resolve())
    machine = machine_facts()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    name = given.get('network', 'dip_rt')
    with Waiting(console, f'{name}: starting') as waiting:
        def on_progress(text: str) -> None:
            waiting.text = f'{name}: {text}'

        try:
            found = run_child('timing', given, on_progress=on_progress)
        except Refused as error:
            raise CommandError(str(error)) from error
        except NotMeasured as error:
            print(f'flow_ros bench: {name} could not be measured: {error}', file=sys.stderr)
            return 1
    print(_line(found))
    if options.json is not None:
        write_json(options.json, {'machine': machine, 'versions': versions(),
                                  'command': command(options), 'results': [found]})
    return 0


def _line(row: Mapping[str, Any]) -> str:
    """Return one measurement in a line or two."""
    budget = (f'{row["latency_ms"]:g} ms asked' if row['latency_ms'] is not None else
              f'{row["iterations"]} {row["iterations_are"]}')
    start = 'warm' if row['warm'] else f'{row["cold"]} of {row["frames"]} cold'
    acts = ', '.join(f'{name} {ms:.1f}' for name, ms in row['acts_ms'].items()
                     if name != 'total')
    untrained = '' if row['trained'] else ' (seeded random weights)'
    cuda = '' if row['cuda_mb'] is None else f', {row["cuda_mb"]:.0f} MB of the GPU'
    return (f'{row["network"]}{untrained}, {row["runtime"]} {row["precision"]} on '
            f'{row["device"]}, {row["size"]}, {budget}, {start}: {row["ms_p50"]:.1f} ms '
            f'(10 to 90 %: {row["ms_p10"]:.1f} to {row["ms_p90"]:.1f}; p99 {row["ms_p99"]:.1f}), '
            f'{row["fps"]:.1f} frames/s, {row["stream_mb"]:.0f} MB above the loaded process '
            f'(peak {row["peak_mb"]:.0f} MB, with the making of engines){cuda}\n'
            f'median ms per act over {row["frames"]} frames, {row["steps"]} steps: {acts}')


def command(options: argparse.Namespace) -> str:
    """Return the command for a file of results: without the folders of its user."""
    words = ['flow_ros bench']
    for name in (*SINGLE, *REPORT, 'precision', 'threads'):
        value = getattr(options, name)
        if value is None:
            continue
        words.append(_option(name))
        if isinstance(value, tuple):
            words.append(('x' if name == 'size' else ',').join(map(str, value)))
        elif value is not True:
            text = f'{value:g}' if isinstance(value, float) else str(value)
            words.append(text.rstrip('/').rpartition('/')[2] if text.startswith('/') else text)
    return ' '.join(words)


def _plan(options: argparse.Namespace) -> 'Plan':
    """Return what the report is to measure; raises CommandError for names nobody knows."""
    from flow_ros.evaluation.benchmarks.children import Refused
    from flow_ros.evaluation.benchmarks.suite import (
        available_ways,
        default_networks,
        Plan,
        warm_iterations,
    )

    unknown = [name for name in options.runtimes or () if name not in RUNTIMES[1:]]
    if unknown:
        raise CommandError(f'--runtimes: unknown runtime {unknown[0]!r}; expected some of '
                           f'{", ".join(RUNTIMES[1:])}')
    if options.data is not None and not options.data.is_dir():
        raise CommandError(f'--data {options.data}: expected a folder of pairs; seen '
                           f'{"a file" if options.data.exists() else "nothing"} there')
    try:
        facts = {name: warm_iterations(name)
                 for name in options.networks or default_networks()}
    except Refused as error:
        raise CommandError(str(error).replace('--network:', '--networks:')) from error
    given: dict[str, Any] = {'threads': options.threads}
    if options.sizes is not None:
        given |= {'sizes': options.sizes, 'memory_sizes': options.sizes, 'largest': ''}
    if options.minutes is not None:
        given['minutes'] = options.minutes
    if options.only is not None:
        given['parts'] = options.only
    if options.data is not None:
        given['data'] = options.data.resolve()
    if options.quick:
        given = {'pairs': 3, 'pairs_size': '320x240', 'budgets': (1, 2),
                 'sizes': ('320x240', '640x480'), 'memory_sizes': ('320x240', '640x480'),
                 'largest': '', 'latencies_ms': (100.0, 300.0),
                 'other_latencies_ms': (300.0,), 'budget_size': '320x240', 'frames': 8,
                 'budget_frames': 12, 'seconds': 1.5, 'minutes': 5.0} | given
    precisions = () if options.precision is None else (options.precision,)
    return Plan(networks={name: iterations for name, (iterations, _) in facts.items()},
                untrained=[name for name, (_, trained) in facts.items() if not trained],
                ways=available_ways(options.runtimes or (), precisions), **given)


def _run_report(options: argparse.Namespace, out: Path) -> int:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from flow_ros.evaluation.benchmarks.machine import describe, machine_facts, versions
    from flow_ros.evaluation.benchmarks.suite import run_plan, TITLES, write_part

    plan = _plan(options)
    _make_folder(out)
    machine, numbers = machine_facts(), versions()
    about = {'machine': machine, 'versions': numbers, 'command': command(options),
             'threads': options.threads,
             'data': 'procedural pairs' if plan.data is None else plan.data.name}
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(describe(machine, numbers), markup=False)
    if machine['load_1min'] > 0.5:
        console.print(f'this machine is not idle (load {machine["load_1min"]:g}): the numbers '
                      f'will be of a busy one', markup=False)
    said: set[tuple[str, str]] = set()
    failed = 0
    with Progress(TextColumn('{task.description}'), MofNCompleteColumn(), TimeElapsedColumn(),
                  console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task('')

        def on_progress(part: str, done: int, total: int, text: str) -> None:
            progress.update(task, description=f'{TITLES[part]}: {text}', completed=done,
                            total=total)
            entry = text.partition(':')[0]
            if not console.is_terminal and (part, entry) not in said:
                said.add((part, entry))
                console.print(f'{part} {done + 1 if done < total else done}/{total}: {entry}',
                              markup=False)

        def save(result: 'PartResult') -> None:
            try:
                write_part(out / f'{result.part}.json', result, about)
            except OSError as error:
                raise CommandError(f'{out} cannot be written: {error.strerror}') from error

        try:
            for result in run_plan(plan, save=save, on_progress=on_progress):
                failed += result.failed
        except KeyboardInterrupt:
            progress.stop()
            console.print('ended by Ctrl-C: the report is of what was done', markup=False)
            _write_report(out, console)
            raise
    _write_report(out, console)
    return 1 if failed else 0


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f'--out {out} cannot be made: {error.strerror}') from error


def _write_report(out: Path, console: Any) -> None:
    """Write plots and report.md of the JSON files in ``out``, and print the tables."""
    from flow_ros.evaluation.benchmarks import plots, report

    found = report.load(out)
    drawn: list[str] = []
    try:
        drawn = plots.draw_all(found, out)
    except ModuleNotFoundError as error:
        console.print(f'no plots: the Python package {error.name!r} is missing (pip install '
                      f'matplotlib, or `make setup`)', markup=False)
    text = report.markdown(found, plots=drawn)
    try:
        (out / 'report.md').write_text(text, encoding='utf-8')
    except OSError as error:
        raise CommandError(f'{out} cannot be written: {error.strerror}') from error
    print(text)
    print(f'report: {out / "report.md"}')


def _draw_again(options: argparse.Namespace, out: Path) -> int:
    from rich.console import Console

    from flow_ros.evaluation.benchmarks import report

    others = [name for name in ('networks', 'runtimes', 'sizes', 'only', 'data', 'minutes',
                                'quick') if getattr(options, name) is not None]
    if others:
        raise CommandError(f'--redraw and --readme measure nothing: leave {_option(others[0])} '
                           f'away')
    if not report.load(out):
        raise CommandError(f'{out}: no results there; measure first: flow_ros bench --out {out}')
    if options.redraw:
        _write_report(out, Console(stderr=True, highlight=False, soft_wrap=True))
    if options.readme is not None:
        try:
            report.write_readme(options.readme, report.load(out), out)
        except (OSError, ValueError) as error:
            raise CommandError(f'--readme: {error}') from error
        print(f'written: the speed section of {options.readme}')
    return 0
