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

"""The whole report: which measurements, in which order, and what is kept of them.

Four parts, each a list of measurements that run one after the other, every one in a process of
its own: ``accuracy`` (against time, beside DIS), ``time`` and ``memory`` (by resolution) and
``budget`` (asked against kept). What matters most comes first; each part has a share of the
minutes there are, and what does not fit is left out and named. After every measurement the
part's JSON file is written anew, so that Ctrl-C leaves what is done.

Accuracy is measured of every network in every way (runtime and precision). Time and memory by
resolution are of the first network in every way and of the others in the first way; budgets are
of all in the first way. The whole of everything would take hours.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib.util import find_spec
import json
from pathlib import Path
import tempfile
import time
from typing import Any

from flow_ros.evaluation.benchmarks.children import NotDone, NotMeasured, Refused, run_child
from flow_ros.evaluation.benchmarks.machine import without_folders
from flow_ros.sources import parse_size

PARTS = ('accuracy', 'time', 'memory', 'budget')
TITLES: Mapping[str, str] = {'accuracy': 'Accuracy against time', 'time': 'Time by resolution',
                             'memory': 'Memory by resolution',
                             'budget': 'Budget asked, budget kept'}
SHARES: Mapping[str, float] = {'accuracy': 0.4, 'time': 0.45, 'memory': 0.45, 'budget': 1.0}
"""Of the time that is left when the part begins."""
WARM_ITERATIONS = 2
"""Per level, of networks that iterate: what a warm start needs."""

SHORTEST_S = 60.0
"""What is begun may take so long, whatever is left."""
_FEWEST_FRAMES = 6
"""Of a measurement: warm-up and those that are measured however long they take."""

Run = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Way:
    """A runtime at a precision."""

    runtime: str
    precision: str

    def __str__(self) -> str:
        return f'{self.runtime} {self.precision}'


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the report measures.

    ``networks``, the most important first, have the budgets of the warm stream (None: the
    network's default); those of them in ``untrained`` have no weights here, and so neither
    accuracy nor a budget that was worth keeping. ``ways`` are the fastest first. ``data`` is a
    folder of pairs, None for ``pairs`` procedural ones of ``pairs_size``. ``largest`` is of the
    first network's memory only. ``latencies_ms`` are those of the first network,
    ``other_latencies_ms`` of the others. ``seconds`` bounds one measurement of time,
    ``minutes`` the whole.
    """

    networks: Mapping[str, int | None]
    ways: Sequence[Way]
    untrained: Collection[str] = ()
    parts: Sequence[str] = PARTS
    data: Path | None = None
    pairs: int = 24
    pairs_size: str = '640x480'
    budgets: Sequence[int] | None = None
    sizes: Sequence[str] = ('640x480', '320x240', '1280x720', '1920x1080')
    memory_sizes: Sequence[str] = ('640x480', '1280x720', '1920x1080')
    largest: str = '3840x2160'
    latencies_ms: Sequence[float] = (100.0, 300.0, 50.0, 150.0, 200.0)
    other_latencies_ms: Sequence[float] = (300.0, 100.0)
    budget_size: str = '640x480'
    frames: int = 40
    budget_frames: int = 60
    seconds: float = 4.0
    minutes: float = 20.0
    threads: int | None = None


@dataclass(frozen=True)
class Measurement:
    """One entry of a part: its name for people, its kind and arguments for ``run_child``.

    ``heavier_than`` names an earlier one and how many times more work a frame of this is: where
    that one's time says that this does not fit any more, it is left out. ``rows`` says that
    the answer holds several rows.
    """

    name: str
    kind: str
    arguments: Mapping[str, Any]
    heavier_than: tuple[str, float] | None = None
    rows: bool = False


@dataclass
class PartResult:
    """What came of a part: rows, what was left out with the reason, and how long it took."""

    part: str
    results: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    failed: int = 0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


def available_ways(runtimes: Sequence[str] = (), precisions: Sequence[str] = ()) -> list[Way]:
    """Return the ways this machine has, the fastest first; ``runtimes`` asks for some by name.

    One asked for by name is there whether it can be had or not: the report then says why not.
    """
    import torch

    from flow_ros.runtimes.tensorrt import find_tensorrt

    cuda = torch.cuda.is_available()
    there = {'tensorrt': cuda and find_tensorrt() is not None,
             'openvino': find_spec('openvino') is not None, 'torch': True}
    # In torch on a CPU 'fast' computes what 'f32' does.
    precise = {'tensorrt': ('f32', 'fast'), 'openvino': ('f32', 'fast'),
               'torch': ('f32', 'fast') if cuda else ('f32',)}
    ways = []
    for runtime in runtimes or [name for name, here in there.items() if here]:
        for precision in precisions or precise.get(runtime, ('f32',)):
            ways.append(Way(runtime, precision))
    return ways


def default_networks() -> list[str]:
    """Return every model with weights here, and every family that has none."""
    from flow_ros.networks import list_models, names

    models = list_models()
    families = {model.family for model in models}
    found = [model.name for model in models] + [name for name in names() if name not in families]
    return sorted(found, key=lambda name: (name != 'dip_rt', name == 'dip'))


def warm_iterations(network: str) -> tuple[int | None, bool]:
    """Return the budget of a warm stream, and whether the network has trained weights here.

    Two iterations where the network iterates, else None, its default. Raises Refused for a
    name that is not known.
    """
    from flow_ros.evaluation.benchmarks.timing import load_network
    from flow_ros.networks.base import FlowNetwork

    made, trained = load_network(network)
    iterates = made.budget_unit == FlowNetwork.budget_unit
    return WARM_ITERATIONS if iterates else None, trained


def measurements(part: str, plan: Plan, folder: Path) -> Iterator[Measurement]:
    """Yield the measurements of a part, the most important first."""
    makers = {'accuracy': _accuracy, 'time': _time, 'memory': _memory, 'budget': _budget}
    yield from makers[part](plan, folder)


def run_part(part: str, plan: Plan, folder: Path, *, limit_s: float,
             save: Callable[[PartResult], None], on_progress: Callable[[int, int, str], None],
             run: Run = run_child) -> PartResult:
    """Do the measurements of ``part`` that fit into ``limit_s``.

    ``folder`` is for files that are needed meanwhile. ``save`` is called after each one, and
    ``on_progress`` with the number done, their number, and what is being done.
    """
    result = PartResult(part)
    todo = list(measurements(part, plan, folder))
    if part in ('accuracy', 'budget'):
        result.left_out += [{'what': name, 'why': 'no trained weights here'}
                            for name in plan.networks if name in plan.untrained]
    took: dict[str, tuple[float, float | None]] = {}  # seconds in all, ms per frame
    begin = time.monotonic()
    for number, each in enumerate(todo):
        left = limit_s - (time.monotonic() - begin)
        on_progress(number, len(todo), each.name)
        why = _no_time(each, took, left)
        if why:
            result.left_out.append({'what': each.name, 'why': why})
            continue
        start = time.monotonic()
        try:
            answer = run(each.kind, each.arguments, limit_s=max(left, SHORTEST_S),
                         on_progress=lambda text, number=number, each=each: on_progress(
                             number, len(todo), f'{each.name}: {text}'))
        except Refused as error:
            result.left_out.append({'what': each.name, 'why': without_folders(str(error))})
        except NotDone as error:
            result.left_out.append({'what': each.name, 'why': f'{error}: more with --minutes'})
        except NotMeasured as error:
            result.failed += 1
            result.left_out.append({'what': each.name,
                                    'why': f'failed: {without_folders(str(error))}'})
        else:
            took[each.name] = time.monotonic() - start, answer.get('ms_p50')
            if each.rows:
                result.results += answer['rows']
            elif each.kind == 'pairs':
                result.facts['pairs'] = answer['pairs']
            else:
                result.results.append(answer)
        result.seconds = round(time.monotonic() - begin, 1)
        save(result)
    save(result)
    on_progress(len(todo), len(todo), part)
    return result


def run_plan(plan: Plan, *, save: Callable[[PartResult], None],
             on_progress: Callable[[str, int, int, str], None],
             run: Run = run_child) -> list[PartResult]:
    """Do all parts of ``plan``; returns what came of each."""
    end = time.monotonic() + 60 * plan.minutes
    done = []
    parts = [part for part in PARTS if part in plan.parts]
    with tempfile.TemporaryDirectory(prefix='flow_ros_bench_') as folder:
        for part in parts:
            left = max(end - time.monotonic(), 0.0)
            share = 1.0 if part == parts[-1] else SHARES[part]
            done.append(run_part(
                part, plan, Path(folder), limit_s=left * share, save=save, run=run,
                on_progress=lambda *told, part=part: on_progress(part, *told)))
    return done


def write_part(path: Path, result: PartResult, about: Mapping[str, Any]) -> None:
    """Write the JSON file of a part: ``about`` (machine, versions, command), then the results.

    The file is whole at any time: it is written beside and then put in its place.
    """
    content = {**about, 'part': result.part, 'seconds': result.seconds, **result.facts,
               'results': result.results, 'left_out': result.left_out}
    new = path.with_suffix('.json.new')
    new.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    new.replace(path)


def measure_memory(*, tell: Callable[[str], object] = print, **arguments: Any) -> dict[str, Any]:
    """Return the row of ``benchmarks.memory``."""
    from flow_ros.evaluation.benchmarks.memory import peak_memory

    return _plain(peak_memory(**arguments))


def measure_budget(*, tell: Callable[[str], object] = print, **arguments: Any) -> dict[str, Any]:
    """Return the row of ``benchmarks.budgets``."""
    from flow_ros.evaluation.benchmarks.budgets import keep_budget

    return _plain(keep_budget(**arguments))


def _plain(row: Any) -> dict[str, Any]:
    return asdict(row) if is_dataclass(row) and not isinstance(row, type) else dict(row)


def _no_time(each: Measurement, took: Mapping[str, tuple[float, float | None]],
             left: float) -> str:
    """Return why a measurement is left out for want of time, '' where there is time."""
    if left <= 0:
        return 'no time was left: more with --minutes'
    if each.heavier_than is not None and each.heavier_than[0] in took:
        name, times = each.heavier_than
        seconds, frame_ms = took[name]
        # Most of a measurement is the start of its process and its engines.
        expected = (seconds * times if frame_ms is None
                    else seconds + _FEWEST_FRAMES * frame_ms * times / 1e3)
        if expected > max(left, SHORTEST_S):
            return f'it would take about {expected:.0f} s: more with --minutes'
    return ''


def _accuracy(plan: Plan, folder: Path) -> Iterator[Measurement]:
    data = plan.data
    if data is None:
        data = folder
        width, height = parse_size(plan.pairs_size)
        yield Measurement('procedural pairs', 'pairs', {
            'folder': str(folder), 'count': plan.pairs, 'width': width, 'height': height})
    common = {'data': str(data), 'threads': plan.threads}
    yield Measurement('OpenCV DIS', 'dis', common, rows=True)
    seconds = 60 * plan.minutes * SHARES['accuracy'] / 4
    for way in plan.ways:
        for network in plan.networks:
            if network not in plan.untrained:
                yield Measurement(f'{network}, {way}', 'accuracy', {
                    **common, 'network': network, 'runtime': way.runtime,
                    'precision': way.precision, 'seconds': seconds,
                    'budgets': None if plan.budgets is None else list(plan.budgets)}, rows=True)


def _time(plan: Plan, folder: Path) -> Iterator[Measurement]:
    yield Measurement('OpenCV DIS', 'dis_times', {
        'sizes': list(plan.sizes), 'threads': plan.threads}, rows=True)
    for size in plan.sizes:
        for network, way in _pairings(plan):
            yield Measurement(f'{network}, {way}, {size}', 'timing', {
                'network': network, 'runtime': way.runtime, 'precision': way.precision,
                'size': size, 'iterations': plan.networks[network], 'frames': plan.frames,
                'seconds': plan.seconds, 'threads': plan.threads},
                heavier_than=_smaller(size, plan.sizes, f'{network}, {way}'))


def _memory(plan: Plan, folder: Path) -> Iterator[Measurement]:
    first = _pairings(plan)[:1]
    sizes = [*plan.memory_sizes, plan.largest] if plan.largest else list(plan.memory_sizes)
    for size in sizes:
        for network, way in first if size == plan.largest else _pairings(plan):
            width, height = parse_size(size)
            yield Measurement(f'{network}, {way}, {size}', 'memory', {
                'network': network, 'runtime': way.runtime, 'precision': way.precision,
                'width': width, 'height': height, 'iterations': plan.networks[network],
                'threads': plan.threads},
                heavier_than=_smaller(size, sizes, f'{network}, {way}'))


def _budget(plan: Plan, folder: Path) -> Iterator[Measurement]:
    width, height = parse_size(plan.budget_size)
    way = plan.ways[0]
    for index, network in enumerate(plan.networks):
        for latency_ms in plan.other_latencies_ms if index else plan.latencies_ms:
            for loaded in (False, True):
                if network in plan.untrained:
                    continue
                beside = ', one core loaded' if loaded else ''
                yield Measurement(f'{network}, {way}, {latency_ms:g} ms{beside}', 'budget', {
                    'network': network, 'runtime': way.runtime, 'precision': way.precision,
                    'width': width, 'height': height, 'latency_ms': latency_ms,
                    'loaded': loaded, 'frames': plan.budget_frames, 'threads': plan.threads})


def _pairings(plan: Plan) -> list[tuple[str, Way]]:
    """Return the first network in every way, then the others in the first way."""
    first, *others = plan.networks
    return [*((first, way) for way in plan.ways), *((name, plan.ways[0]) for name in others)]


def _smaller(size: str, sizes: Sequence[str], name: str) -> tuple[str, float] | None:
    """Return the next smaller size measured before ``size``, and how many times it this is."""
    def pixels(text: str) -> int:
        width, height = parse_size(text)
        return width * height

    before = [each for each in sizes[:list(sizes).index(size)] if pixels(each) < pixels(size)]
    if not before:
        return None
    nearest = max(before, key=pixels)
    return f'{name}, {nearest}', pixels(size) / pixels(nearest)
