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

"""``flow_ros self-test``: whether this machine computes the flow it should."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
import importlib.metadata
import importlib.util
from pathlib import Path
import platform
import time
from typing import Any, TYPE_CHECKING

from flow_ros import __version__
from flow_ros.cli import CommandError
from flow_ros.cli.arguments import (
    check_json,
    frame_size,
    named_network,
    positive,
    PRECISIONS,
    write_json,
)
from flow_ros.cli.waiting import Waiting

if TYPE_CHECKING:  # nothing heavy is imported before it is known that it is needed
    from rich.console import Console

    from flow_ros.networks import FlowNetwork
    from flow_ros.runtimes import Runtime
    from flow_ros.runtimes.reference import Verdict

RUNTIMES = ('auto', 'torch', 'openvino', 'tensorrt')
SHIPPED = 'shipped'
_PACKAGES = ('torch', 'numpy', 'openvino', 'tensorrt', 'tensorrt-rtx', 'onnx')
DESCRIPTION = """Compare the flow that runtimes compute on this machine with reference outputs.

For each network, first torch on the CPU against the reference that is shipped with the weights,
if there is one. Then each runtime against torch on the CPU, at the frame size: quantiles of the
endpoint error (px) at several budgets, from cold and, where the network takes a prior flow, warm
starts. Engines are built first where they are not in the cache, which may take minutes.

Ends with 1 where a runtime is refused. The last lines are what a bug report needs.
"""


class _NoEngines(Exception):  # noqa: N818 -- a verdict on one network, the others go on
    """TensorRT's engines of a network cannot be had on this machine."""


@dataclass(frozen=True)
class _Row:
    """The verdict on one runtime of the network ``name``, and what it was compared with."""

    name: str
    against: str
    verdict: 'Verdict'


def add_parser(subparsers: Any) -> None:
    """Add the parser of this verb."""
    parser = subparsers.add_parser(
        'self-test', help='compare what this machine computes with reference outputs',
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', action='append', metavar='NAME', dest='networks',
                        help='network or model; may be given several times (default: every '
                             'model with weights here)')
    parser.add_argument('--weights', metavar='FILE', default='default',
                        help='weights of the one network given (default: those shipped)')
    parser.add_argument('--runtime', action='append', choices=RUNTIMES, dest='runtimes',
                        help='may be given several times; auto: those that serve on this '
                             'machine where nothing is said (default: auto)')
    parser.add_argument('--device', metavar='NAME',
                        help='torch device for torch and tensorrt (default: cuda if there)')
    parser.add_argument('--size', type=frame_size, metavar='WIDTHxHEIGHT', default=(640, 480),
                        help='frame size, px (default: 640x480)')
    parser.add_argument('--precision', action='append', choices=PRECISIONS, dest='precisions',
                        help='may be given twice (default: f32)')
    parser.add_argument('--threads', type=positive, metavar='N', help='of the CPU runtimes')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all numbers here')


def run(options: argparse.Namespace) -> int:
    """Test; 0 where everything passed, 1 where something was refused."""
    from rich.console import Console

    messages = Console(stderr=True, highlight=False, soft_wrap=True)
    check_json(options.json)
    rows: list[_Row] = []
    notes: list[str] = []
    failures: list[str] = []
    for name in _names(options):
        for row in _test(name, options, messages, notes, failures):
            rows.append(row)
            if not row.verdict.passed:
                messages.print(row.verdict.text, markup=False)
    _show(rows)
    for note in (*notes, *failures):
        print(note)
    machine = machine_facts()
    for label, value in machine.items():
        print(f'{label}: {value}')
    refused = [row for row in rows if not row.verdict.passed]
    if options.json is not None:
        content = {'flow_ros': __version__, 'machine': machine, 'notes': notes,
                   'failures': failures, 'passed': not refused and not failures,
                   'verdicts': [_as_dict(row) for row in rows]}
        write_json(options.json, content)
    if refused or failures:
        print(f'self-test: {len(refused) + len(failures)} of {len(rows) + len(failures)} '
              f'REFUSED; please report the lines above')
        return 1
    print(f'self-test: all {len(rows)} passed')
    return 0


def machine_facts() -> dict[str, str]:
    """Return what the machine and its packages are, as a bug report needs it."""
    import torch

    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts = {'flow_ros': __version__, 'python': platform.python_version(),
             'packages': ', '.join(f'{name} {version}' for name, version in found.items()),
             'machine': platform.platform(), 'cpu': _cpu()}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        facts['gpu'] = (f'{torch.cuda.get_device_name()}, compute capability {major}.{minor}, '
                        f'CUDA {torch.version.cuda}')
    else:
        facts['gpu'] = 'none that torch sees'
    jetson = Path('/etc/nv_tegra_release')
    if jetson.is_file():
        facts['jetson'] = jetson.read_text(encoding='utf-8', errors='replace').splitlines()[0]
    return facts


def _test(name: str, options: argparse.Namespace, messages: 'Console',
          notes: list[str], failures: list[str]) -> Iterator['_Row']:
    """Yield the verdicts on one network; add to ``failures`` what cannot even be run."""
    import torch

    from flow_ros.runtimes.reference import compare, reference_for, shipped_reference
    from flow_ros.runtimes.torch import TorchRuntime

    def say(text: str) -> None:
        messages.print(text, markup=False)

    network, weights = _network(name, options)
    try:
        shipped = shipped_reference(network, weights)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if shipped is None:
        notes.append(f'{name}: no shipped reference for these weights; torch on the CPU itself '
                     f'was not checked')
    else:
        plain = TorchRuntime(_network(name, options)[0], device=torch.device('cpu'),
                             threads=options.threads)
        with Waiting(messages, f'{name}, torch on the CPU against the shipped reference'):
            verdict = compare(plain, shipped)
        yield _Row(name, SHIPPED, verdict)
    width, height = options.size
    with Waiting(messages, f'{name}, the reference at {width}x{height}'):
        reference = reference_for(network, width=width, height=height, say=say)
    for runtime_name in _runtimes(options):
        for precision in dict.fromkeys(options.precisions or ['f32']):
            start = time.monotonic()
            what = f'{name}, {runtime_name} {precision}'
            try:
                with Waiting(messages, what) as waiting:
                    runtime = _runtime(runtime_name, _network(name, options)[0], precision,
                                       options, waiting)
                    waiting.text = what
                    verdict = compare(runtime, reference, precision=precision)
            except _NoEngines as error:
                failures.append(f'{what}: its engines cannot be had: {error}')
                say(failures[-1])
                continue
            yield _Row(name, 'torch on the CPU', verdict)
            say(f'{what}: '
                f'{"passed" if verdict.passed else "REFUSED"} after '
                f'{time.monotonic() - start:.1f} s')


def _runtimes(options: argparse.Namespace) -> list[str]:
    """Return the runtimes asked for, each once, with ``auto`` spelt out."""
    import torch

    from flow_ros.runtimes.tensorrt import find_tensorrt

    on_cuda = torch.cuda.is_available() and not str(options.device or '').startswith('cpu')
    usual = ['torch'] if on_cuda else ['openvino'] if _installed('openvino') else ['torch']
    if on_cuda and find_tensorrt() is not None:
        usual.insert(0, 'tensorrt')
    return list(dict.fromkeys(
        name for word in options.runtimes or ['auto']
        for name in (usual if word == 'auto' else [word])))


def _runtime(name: str, network: 'FlowNetwork', precision: str, options: argparse.Namespace,
             waiting: Waiting) -> 'Runtime':
    """Return the runtime itself, not one that serves while it is made."""
    from flow_ros.runtimes import create_runtime, RuntimeUnavailable

    try:
        if name == 'tensorrt':
            return _tensorrt(network, precision, options, waiting)
        device = None if name == 'openvino' else options.device
        return create_runtime(name, network, device=device, threads=options.threads,
                              precision=precision)
    except (RuntimeUnavailable, ValueError) as error:
        raise CommandError(f'--runtime {name}: {error}') from error


def _tensorrt(network: 'FlowNetwork', precision: str, options: argparse.Namespace,
              waiting: Waiting) -> 'Runtime':
    import torch

    from flow_ros.runtimes.base import EngineFault, RuntimeUnavailable
    from flow_ros.runtimes.tensorrt import BuildError, find_tensorrt, missing_tensorrt, PlanError

    if find_tensorrt() is None:
        raise RuntimeUnavailable(missing_tensorrt())
    if not torch.cuda.is_available():
        raise RuntimeUnavailable(f'its engines run on a CUDA device, and torch '
                                 f'{torch.__version__} sees none')
    from flow_ros.runtimes.build_progress import EngineProgress
    from flow_ros.runtimes.building import BuildRequest, make_runtime
    from flow_ros.runtimes.export import ExportError

    def progress(seen: EngineProgress) -> bool:
        waiting.text = f'{network.name}: {seen.text}'
        return True

    try:
        return make_runtime(network, BuildRequest(options.size, precision=precision),
                            device=torch.device(options.device or 'cuda'), progress=progress)
    except (BuildError, ExportError, EngineFault, PlanError) as error:
        raise _NoEngines(str(error)) from error


def _show(rows: list['_Row']) -> None:
    from rich.console import Console
    from rich.table import Table

    from flow_ros.runtimes.reference import QUANTILES

    table = Table(box=None)
    for heading in ('network', 'runtime', 'size', 'against', 'case'):
        table.add_column(heading)
    for quantile in QUANTILES:
        table.add_column(f'{100 * quantile:g} % px (limit)', justify='right')
    table.add_column('')
    for row in rows:
        verdict = row.verdict
        width, height = verdict.size
        runtime = f'{verdict.runtime} {verdict.arithmetic}, {verdict.device}'
        head = (row.name, runtime, f'{width}x{height}', row.against)
        for result in verdict.cases:
            numbers = (f'{error:.2g} ({limit:g})'
                       for error, limit in zip(result.quantiles, verdict.limits))
            table.add_row(*head, result.case.text, *numbers,
                          'passed' if result.passed else 'REFUSED')
        if verdict.fault:
            table.add_row(*head, 'failed', '', '', '', 'REFUSED')
    Console(width=240).print(table)


def _as_dict(row: '_Row') -> dict[str, Any]:
    verdict = row.verdict
    return {'network': row.name, 'family': verdict.network, 'runtime': verdict.runtime,
            'precision': verdict.precision, 'arithmetic': verdict.arithmetic,
            'device': verdict.device, 'size': f'{verdict.size[0]}x{verdict.size[1]}',
            'versions': verdict.versions, 'against': row.against, 'passed': verdict.passed,
            'fault': verdict.fault, 'limits_px': list(verdict.limits),
            'cases': [{'budget': result.case.budget, 'warm': result.case.warm,
                       # JSON knows no NaN.
                       'errors_px': [error if error == error else None
                                     for error in result.quantiles],
                       'passed': result.passed} for result in verdict.cases]}


def _names(options: argparse.Namespace) -> list[str]:
    from flow_ros.networks import list_models

    names = list(dict.fromkeys(options.networks or [model.name for model in list_models()]))
    if options.weights != 'default' and len(options.networks or []) != 1:
        raise CommandError('--weights is for one network: give it as --network NAME')
    if not names:
        raise CommandError('no model has weights here; see `flow_ros import-weights --help`')
    return names


def _network(name: str, options: argparse.Namespace) -> tuple['FlowNetwork', Path]:
    """Return the network, new each time: a runtime takes it over."""
    from flow_ros.networks import default_weights_path

    network = named_network(name, options.weights)
    return network, Path(default_weights_path(name) if options.weights == 'default'
                         else options.weights)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _cpu() -> str:
    """Return the processor's name as Linux tells it, else as Python does."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        lines = []
    named = (line.partition(':')[2].strip() for line in lines
             if line.startswith(('model name', 'Model')))
    return next(named, '') or platform.processor() or platform.machine()
