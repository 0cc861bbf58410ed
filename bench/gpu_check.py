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

"""All that waits for a GPU, in one command: `make gpu-check`.

    python bench/gpu_check.py [--minutes 30] [--part NAME ...] [--json FILE] [--markdown FILE]

Parts: the tests that are skipped without CUDA; the self-test of torch on CUDA; TensorRT or
TensorRT-RTX engines built and tested, where one is installed; forward splatting, beside the
CPU's result; the trainer's throughput; and the engines' bench. Each is a process of its own,
and what fails, or is not done in its time, does not stop the others. Neither rclpy nor OpenVINO
is needed, nor an installed flow_ros: a plain Python with torch, NumPy, OpenCV, safetensors,
rich, tqdm, filelock, PyYAML and pytest will do; a part that lacks a package says so.

With --minutes, each part has a share of what is left, and the engines' bench, the last, has the
rest: networks and sizes that do not fit are left out. The markdown is for bench/GPU.md. Ends
with 1 where a part failed. --device cpu runs the parts on the CPU: a rehearsal, no result.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PARTS = ('tests', 'torch', 'tensorrt', 'splatting', 'training', 'engines')
SHARES = {'tests': 0.25, 'torch': 0.1, 'tensorrt': 0.35, 'splatting': 0.1, 'training': 0.2,
          'engines': 1.0}
"""Of the time that is left when the part begins."""
NEEDS = {'tests': ('pytest',), 'torch': ('rich', 'safetensors'), 'tensorrt': ('rich', 'onnx',
         'onnxscript'), 'splatting': (), 'training': ('tqdm', 'yaml'), 'engines': ('tqdm',)}
SIZES = ('640x480', '1024x448')
SPLATS = 50


@dataclass(frozen=True)
class Settings:
    """What the parts are run with."""

    device: str
    sizes: tuple[str, ...]
    networks: tuple[str, ...]
    seconds: float
    steps: int


@dataclass(frozen=True)
class Outcome:
    """How a part went: ``status`` is 'done', 'failed', 'not done' (in its time) or 'skipped'."""

    part: str
    status: str
    seconds: float = 0.0
    reason: str = ''
    result: dict[str, Any] = field(default_factory=dict)
    output: str = ''


def tensorrt_missing() -> str:
    """Return why there is no TensorRT to check, '' where there is."""
    from flow_ros.runtimes.tensorrt import find_tensorrt, missing_tensorrt
    return '' if find_tensorrt() is not None else missing_tensorrt()


def command_of(part: str, settings: Settings, folder: Path, minutes: float) -> list[str]:
    """Return the command of a part; what it writes as JSON goes to ``folder``."""
    file = str(folder / f'{part}.json')
    networks = [word for name in settings.networks for word in ('--network', name)]
    self_test = ['-m', 'flow_ros.cli.main', 'self-test', '--json', file, '--precision', 'f32',
                 '--precision', 'fast', '--device', settings.device, '--size', settings.sizes[0],
                 *networks]
    commands = {
        'tests': ['-m', 'pytest', '-q', '-rs', '--skip-missing', '--cuda-only', '-p',
                  'no:cacheprovider', 'test'],
        'torch': [*self_test, '--runtime', 'torch'],
        'tensorrt': [*self_test, '--runtime', 'tensorrt'],
        'splatting': [__file__, '--splatting', file, '--device', settings.device,
                      *(word for size in settings.sizes for word in ('--size', size))],
        'training': ['bench/training_speed.py', '--device', settings.device, '--steps',
                     str(settings.steps), '--out', str(folder / 'training.md')],
        'engines': ['bench/engines.py', '--device', settings.device, '--rounds', '1',
                    '--seconds', str(settings.seconds), '--minutes', f'{minutes:.2f}', '--json',
                    file, *networks,
                    *(word for size in settings.sizes for word in ('--size', size))]}
    return [sys.executable, *commands[part]]


def run(part: str, settings: Settings, folder: Path, seconds: float) -> Outcome:
    """Do a part, whatever becomes of it."""
    missing = [name for name in NEEDS[part] if find_spec(name) is None]
    if missing:
        return Outcome(part, 'skipped', reason=f'{", ".join(missing)} is not installed')
    if part == 'tensorrt' and (why := tensorrt_missing()):
        return Outcome(part, 'skipped', reason=why)
    if seconds < 1:
        return Outcome(part, 'skipped', reason='no time is left')
    # The bench ends by itself a little before it would be ended.
    command = command_of(part, settings, folder, minutes=max(seconds - 10, 1) / 60)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    environment = {**os.environ, 'PYTHONPATH': path,
                   'FLOW_ROS_CACHE': os.environ.get('FLOW_ROS_CACHE') or str(folder / 'cache')}
    start = time.monotonic()
    log = folder / f'{part}.log'
    with log.open('w') as stream:
        try:
            done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT,
                                  env=environment, timeout=seconds, check=False)
            status = 'done' if done.returncode == 0 else 'failed'
            reason = '' if done.returncode == 0 else f'ended with {done.returncode}'
        except subprocess.TimeoutExpired:
            status, reason = 'not done', f'after {seconds:.0f} s'
        except OSError as error:
            status, reason = 'failed', str(error)
    output = log.read_text(errors='replace')[-4000:]
    result: dict[str, Any] = {}
    try:
        result = json.loads((folder / f'{part}.json').read_text())
    except (OSError, ValueError):
        pass
    return Outcome(part, status, time.monotonic() - start, reason, result, output)


def splatting(file: Path, device_name: str, sizes: Sequence[str]) -> None:
    """Time the warm start's forward splatting and compare it with the CPU's, to the bit."""
    import torch

    from flow_ros.runtimes.reference import reference_pair
    from flow_ros.sources import parse_size
    from flow_ros.streaming.warm_start import carry, sample_flow

    device = torch.device(device_name)
    rows = []
    for size in sizes:
        prior = reference_pair(*parse_size(size))[2]

        def once(flow: torch.Tensor) -> torch.Tensor:
            return carry(sample_flow(flow, cell=8), direction='forward').flow

        on_device = prior.to(device)
        same = torch.equal(once(on_device).cpu(), once(prior))
        times = []
        for index in range(5 + SPLATS):
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            once(on_device)
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            if index >= 5:
                times.append(1e3 * (time.perf_counter() - start))
        tenths = statistics.quantiles(times, n=10)
        rows.append({'size': size, 'ms_p50': statistics.median(times), 'ms_p10': tenths[0],
                     'ms_p90': tenths[-1], 'as_on_cpu': same})
    file.write_text(json.dumps({'rows': rows}))
    if not all(row['as_on_cpu'] for row in rows):
        sys.exit('splatting: the device computes other values than the CPU')


def tests_text(outcome: Outcome) -> str:
    """Return pytest's last line, and which tests failed."""
    lines = outcome.output.strip().splitlines()
    failed = [line for line in lines if line.startswith(('FAILED', 'ERROR'))]
    return '; '.join([*lines[-1:], *failed[:10]])


def verdicts_text(outcome: Outcome) -> str:
    """Return the worst errors of a self-test, one phrase per network and precision."""
    parts = []
    for verdict in outcome.result.get('verdicts', []):
        if verdict['against'] == 'shipped':
            continue
        cases = [case['errors_px'] for case in verdict['cases']]
        worst = 'NaN'
        if verdict['fault']:
            worst = verdict['fault'][:120]
        elif cases and all(None not in errors for errors in cases):
            worst = ' / '.join(f'{max(column):.2g}' for column in zip(*cases))
        said = 'passed' if verdict['passed'] else 'REFUSED'
        parts.append(f'{verdict["network"]} {verdict["arithmetic"]} {said}: {worst} px')
    return '; '.join(parts) or last_line(outcome)


def splatting_text(outcome: Outcome) -> str:
    """Return time per size."""
    return '; '.join(
        f'{row["size"]}: {row["ms_p50"]:.2f} ms ({row["ms_p10"]:.2f} to {row["ms_p90"]:.2f})'
        + ('' if row['as_on_cpu'] else ', DIFFERS from the CPU')
        for row in outcome.result.get('rows', [])) or last_line(outcome)


def training_text(outcome: Outcome) -> str:
    """Return the lines of the table as sentences."""
    rows = [line.strip('| ').replace(' | ', ', ') for line in outcome.output.splitlines()
            if line.startswith('|') and not line.startswith(('|---', '| Device'))]
    return '; '.join(rows) or last_line(outcome)


def engines_text(outcome: Outcome) -> str:
    """Return how much was measured; the numbers have a table of their own."""
    rows = outcome.result.get('rows', [])
    good = sum('error' not in row for row in rows)
    return f'{good} rows measured, {len(rows) - good} failed: below' if rows else \
        last_line(outcome)


def last_line(outcome: Outcome) -> str:
    """Return the last thing a part said."""
    return (outcome.output.strip().splitlines() or [''])[-1][:200]


TEXTS: dict[str, tuple[str, Callable[[Outcome], str]]] = {
    'tests': ('Tests that are skipped without CUDA', tests_text),
    'torch': ('torch on CUDA beside torch f32 on the CPU, worst of all cases (50 / 99 / 99.9 %)',
              verdicts_text),
    'tensorrt': ('TensorRT engines built and beside torch f32 on the CPU, likewise',
                 verdicts_text),
    'splatting': ('Forward splatting, median (10 to 90 %)', splatting_text),
    'training': ('Pairs/s: world, batches, step, together', training_text),
    'engines': ('Engines beside torch eager', engines_text)}


def markdown(machine: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    """Return what bench/GPU.md takes."""
    lines = [f'## {machine.get("gpu", "")}', '',
             f'`make gpu-check` on {machine.get("gpu", "")}, {machine.get("cpu", "")}; Python '
             f'{machine.get("python", "")}, {machine.get("packages", "")}.', '',
             '| Part | | Seconds | Result |', '|---|---|---|---|']
    for outcome in outcomes:
        title, describe = TEXTS[outcome.part]
        said = outcome.reason if outcome.status == 'skipped' else '. '.join(
            filter(None, [outcome.reason, describe(outcome)]))
        lines.append(f'| {title} | {outcome.status} | {outcome.seconds:.0f} | '
                     f'{said.replace("|", "/")} |')
    engines = next((each for each in outcomes if each.part == 'engines'), None)
    if engines is not None and engines.result.get('rows'):
        sys.path.insert(0, str(ROOT / 'bench'))
        from engines import markdown as tables
        cuda = engines.result['rows'][0].get('way') is not None and 'none' not in machine.get(
            'gpu', 'none')
        lines += ['', tables(engines.result['rows'], cuda=cuda).replace('## ', '### ').rstrip()]
    return '\n'.join(lines) + '\n'


def main() -> None:
    """Do all parts."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=60.0, help='of all (default: 60)')
    parser.add_argument('--part', action='append', choices=PARTS, help='default: all')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--network', action='append', default=[],
                        help='of self-tests and bench (default: their own)')
    parser.add_argument('--size', action='append', help='default: ' + ', '.join(SIZES))
    parser.add_argument('--seconds', type=float, default=1.5, help='per timing of the bench')
    parser.add_argument('--steps', type=int, default=12, help='of training')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--markdown', type=Path)
    parser.add_argument('--splatting', type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = tuple(options.size or SIZES)
    if options.splatting is not None:
        splatting(options.splatting, options.device, sizes)
        return
    try:
        import torch
    except ModuleNotFoundError:
        sys.exit('gpu-check: torch is not installed')
    if options.device != 'cpu' and not torch.cuda.is_available():
        print(f'gpu-check: torch {torch.__version__} sees no CUDA device: nothing was checked')
        return
    end = time.monotonic() + 60 * options.minutes
    settings = Settings(device=options.device, sizes=sizes, networks=tuple(options.network),
                        seconds=options.seconds, steps=options.steps)
    try:
        from flow_ros.cli.self_test import machine_facts
        machine: dict[str, Any] = machine_facts()
    except Exception as error:  # whatever it is, the parts go on
        machine = {'gpu': str(error)}
    for label, value in machine.items():
        print(f'{label}: {value}')
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name:
        for part in options.part or PARTS:
            left = end - time.monotonic()
            outcome = run(part, settings, Path(name), SHARES[part] * left)
            outcomes.append(outcome)
            print(f'{part}: {outcome.status} in {outcome.seconds:.0f} s {outcome.reason}',
                  flush=True)
            if outcome.status == 'failed':
                print(outcome.output[-2000:], flush=True)
            text = markdown(machine, outcomes)
            # After each part, so that nothing is lost where this is ended from outside.
            if options.json is not None:
                content = {'machine': machine, 'parts': [asdict(each) for each in outcomes]}
                options.json.write_text(json.dumps(content, indent=1) + '\n')
            if options.markdown is not None:
                options.markdown.write_text(text)
    print(text)
    if any(outcome.status == 'failed' for outcome in outcomes):
        sys.exit(1)


if __name__ == '__main__':
    main()
