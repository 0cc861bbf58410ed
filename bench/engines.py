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

r"""Engines beside torch eager: error, time per frame, memory and time to prepare.

    python bench/engines.py [--network dip_rt ...] [--size 640x480 ...] [--rounds 3] [--threads 2]
                            [--json bench/engines.json] [--markdown bench/ENGINES.md]

Every measurement is a process of its own: a stream of synthetic frames goes through the
estimator, as on a robot, with half and with all of the network's own budget; what the process
holds at its highest is its memory. Only then the flow of the shipped pair is compared with
torch f32 on the CPU. The ways of a network are gone through in turn, several rounds of all, so
that a ratio is one of neighbours in time. The first round compiles and builds, in an empty
cache; the others read that cache.

On the CPU: torch eager, OpenVINO f32 and fast. On CUDA: torch eager, CUDA graphs and
torch.compile, in f32 and in half precision, and TensorRT or TensorRT-RTX where it is installed.
What fails is a row that says why. Networks without weights have seeded random ones: the same
time, but errors that mean little.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
import json
import os
from pathlib import Path
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch

from flow_ros.cli.self_test import machine_facts
from flow_ros.networks import create, WeightsError
from flow_ros.networks.base import FlowNetwork, State
from flow_ros.runtimes import Runtime
from flow_ros.runtimes.base import run_loop
from flow_ros.runtimes.reference import compare, default_cases, reference_for
from flow_ros.runtimes.torch import TorchRuntime
from flow_ros.sources import parse_size
from flow_ros.streaming import Budget, FlowEstimator
from flow_ros.synthetic import SyntheticSequence

FRAME_S = 1 / 30
WARM_UP = 2
FEWEST, MOST = 3, 60
"""Frames that are timed."""
NETWORKS = ('dip_rt', 'hd3_compact', 'mscsl', 'dip', 'hd3')
SIZES = ('640x480', '1024x448')
CPU_WAYS = ('torch f32', 'openvino f32', 'openvino fast')
CUDA_WAYS = ('torch f32', 'graphs f32', 'compile f32', 'torch half', 'graphs half',
             'compile half', 'tensorrt f32', 'tensorrt fast')
BASE = 'torch f32'
TEXT = """# Engines beside torch eager

Error, time, memory and time to prepare of every way to run a network:

    {command}

on {machine}.
A frame is upload, encoder, warm start where the network takes a prior flow, steps, finish and
the arrays; its time is the median over the frames, then over {rounds} rounds (in brackets the
least and the greatest round). The ratio is that to torch eager in f32 in the same round. Memory is
the highest resident set of the process, in brackets what it was before the network was made; on
CUDA what the device holds more than before. "Prepare" is the first time, with an empty cache,
then with the cache that it left. The error is the endpoint error to torch f32 on the CPU, the
worst of the budgets and starts of `flow_ros self-test`, px: 50, 99 and 99.9 % of the pixels are
below it.
"""


@dataclass(frozen=True)
class Job:
    """One measurement, as it is handed to its process."""

    network: str
    size: str
    way: str
    device: str
    threads: int
    seconds: float
    errors: bool


class Compiled(TorchRuntime):
    """Torch with its engine functions compiled by torch.compile, one by one."""

    def __init__(self, network: FlowNetwork, *, device: torch.device) -> None:
        super().__init__(network, device=device, graphs=False)
        self._compiled: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {}

    def call(self, engine: str, /, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run one engine, compiling it first where its shapes are new."""
        if engine not in self._compiled:
            self._compiled[engine] = torch.compile(getattr(self.network, f'{engine}_engine'),
                                                   dynamic=False)
        return self._compiled[engine](*tensors)

    def loop(self, state: State, lap: Any = None, control: Any = None) -> Any:
        """Do the steps of ``state`` and finish."""
        return run_loop(self.network, state, self.call, lap, control)


def network_for(name: str) -> tuple[FlowNetwork, bool]:
    """Return the network and whether its weights are trained."""
    try:
        return create(name, 'default'), True
    except WeightsError:
        torch.manual_seed(0)
        return create(name), False


def make_runtime(job: Job, network: FlowNetwork) -> Runtime:
    """Return the runtime of a way."""
    kind, precision = job.way.split()
    device = torch.device(job.device)
    size = parse_size(job.size)
    if kind == 'openvino':
        from flow_ros.runtimes.openvino import OpenVinoRuntime
        return OpenVinoRuntime(network, threads=job.threads, precision=precision)
    if kind == 'tensorrt':
        from flow_ros.runtimes.building import BuildRequest
        from flow_ros.runtimes.building import make_runtime as build
        return build(network, BuildRequest(size, precision=precision), device=device)
    if precision == 'half':
        from flow_ros.runtimes.export import prepared
        network = prepared(network, 'fast')
    if kind == 'compile':
        return Compiled(network, device=device)
    return TorchRuntime(network, device=device, threads=job.threads, graphs=kind == 'graphs')


def resident_mib() -> float:
    """Return the highest resident set of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def device_mib(device: torch.device) -> float:
    """Return what the device's memory holds now, of all processes, MiB; 0 on the CPU."""
    if device.type != 'cuda':
        return 0.0
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2 ** 20


def times_of(estimator: FlowEstimator, frames: Sequence[Any], seconds: float) -> dict[str, Any]:
    """Return the times of frames over about ``seconds``, ms."""
    total: list[float] = []
    cold = 0
    began = time.perf_counter()
    estimator.reset()
    for index in range(WARM_UP + MOST):
        start = time.perf_counter()
        result = estimator(frames[index % len(frames)], index * FRAME_S)
        if result is None or index < WARM_UP:
            continue
        total.append(1e3 * (time.perf_counter() - start))
        cold += not result.warm
        if len(total) >= FEWEST and time.perf_counter() - began > seconds:
            break
    low, median, high = np.quantile(total, (0.1, 0.5, 0.9))
    return {'ms_p10': low, 'ms_p50': median, 'ms_p90': high, 'frames': len(total), 'cold': cold}


def measure(job: Job) -> dict[str, Any]:
    """Do one measurement in this process."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    width, height = parse_size(job.size)
    stream = SyntheticSequence(width, height, seed=0)
    # There and back, so that every pair has the motion of neighbours.
    there = [stream.frame(index).image for index in range(8)]
    frames = there + there[-2:0:-1]
    network, trained = network_for(job.network)
    device_before = device_mib(device)
    before = resident_mib()
    start = time.perf_counter()
    runtime = make_runtime(job, network)
    estimator = FlowEstimator(runtime=runtime)
    estimator.prepare(height, width)
    result: dict[str, Any] = {**asdict(job), 'trained': trained,
                              'prepare_s': time.perf_counter() - start, 'budgets': {}}
    budgets = sorted({case.budget for case in default_cases(network)})[1:]
    for budget in budgets:
        estimator.budget = Budget(iterations=budget)
        result['budgets'][budget] = times_of(estimator, frames, job.seconds)
    result |= {'resident_mib': resident_mib(), 'resident_before_mib': before,
               'device_mib': device_mib(device) - device_before}
    if job.errors:
        reference = reference_for(network_for(job.network)[0], width=width, height=height)
        precision = 'f32' if job.way.endswith('f32') else 'fast'
        verdict = compare(runtime, reference, precision=precision)
        worst = verdict.worst
        result |= {'passed': verdict.passed, 'arithmetic': verdict.arithmetic,
                   'fault': verdict.fault,
                   'errors_px': list(worst.quantiles) if worst is not None else []}
    return result


def run(job: Job, folder: Path, limit_s: float) -> dict[str, Any]:
    """Do one measurement in a process of its own; an error is a result too."""
    command = [sys.executable, __file__, '--job', json.dumps(asdict(job))]
    environment = {**os.environ, 'FLOW_ROS_CACHE': str(folder)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s,
                              env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {**asdict(job), 'error': f'not done after {limit_s:.0f} s'}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    lines = done.stderr.strip().splitlines() or [f'ended with {done.returncode}']
    return {**asdict(job), 'error': lines[-1][:160]}


def sweep(options: argparse.Namespace, ways: Sequence[str], device: str,
          save: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Go through networks, sizes, rounds and ways, as far as --minutes allow."""
    end = time.monotonic() + 60 * options.minutes
    results: list[dict[str, Any]] = []
    failed: set[tuple[str, str, str]] = set()
    with tempfile.TemporaryDirectory() as folder:
        for number, name, size, way in product(range(options.rounds),
                                               options.network or NETWORKS,
                                               options.size or SIZES, ways):
            left = end - time.monotonic()
            if (name, size, way) in failed or left <= 0:
                continue
            job = Job(name, size, way, device, options.threads, options.seconds,
                      errors=number == 0)
            result = {**run(job, Path(folder), left), 'round': number}
            if 'error' in result:
                failed.add((name, size, way))
            results.append(result)
            print(line(result), flush=True)
            save(results)
    return results


def line(result: dict[str, Any]) -> str:
    """Return one measurement in a line."""
    head = f'{result["network"]} {result["size"]} {result["way"]} round {result["round"]}'
    if 'error' in result:
        return f'{head}: {result["error"]}'
    times = ', '.join(f'budget {budget}: {row["ms_p50"]:.1f} ms'
                      for budget, row in result['budgets'].items())
    return f'{head}: {times}; prepared in {result["prepare_s"]:.1f} s'


def rows(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per network, size, way and budget, over the rounds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result['network'], result['size'], result['way']), []).append(result)
    table: list[dict[str, Any]] = []
    for (name, size, way), rounds in groups.items():
        good = [each for each in rounds if 'error' not in each]
        if not good:
            table.append({'network': name, 'size': size, 'way': way,
                          'error': rounds[0]['error']})
            continue
        base = {each['round']: each for each in groups.get((name, size, BASE), [])
                if 'error' not in each}
        first = good[0]
        for budget in first['budgets']:
            ms = [each['budgets'][budget]['ms_p50'] for each in good]
            ratios = [base[each['round']]['budgets'][budget]['ms_p50']
                      / each['budgets'][budget]['ms_p50'] for each in good
                      if each['round'] in base]
            table.append({
                'network': name, 'size': size, 'way': way, 'budget': int(budget),
                'trained': first['trained'], 'ms': ms, 'ratios': ratios,
                'cold': first['budgets'][budget]['cold'],
                'resident_mib': max(each['resident_mib'] for each in good),
                'resident_before_mib': first['resident_before_mib'],
                'device_mib': max(each['device_mib'] for each in good),
                'prepare_first_s': first['prepare_s'],
                'prepare_again_s': [each['prepare_s'] for each in good[1:]],
                'errors_px': first.get('errors_px', []), 'passed': first.get('passed')})
    return table


def spread(values: Sequence[float], digits: str) -> str:
    """Return the median with the least and the greatest."""
    if not values:
        return ''
    middle = format(float(np.median(values)), digits)
    if len(values) == 1:
        return middle
    return f'{middle} ({format(min(values), digits)} to {format(max(values), digits)})'


def markdown(table: Sequence[dict[str, Any]], *, cuda: bool) -> str:
    """Return the tables, one for each size."""
    parts = []
    for size in dict.fromkeys(row['size'] for row in table):
        lines = [f'## {size}', '',
                 '| network, budget | way | ms per frame | faster than torch eager | '
                 + ('device MiB' if cuda else 'resident MiB')
                 + ' | prepare, s | error px, 50 / 99 / 99.9 % |',
                 '|---|---|---|---|---|---|---|']
        for row in (each for each in table if each['size'] == size):
            if 'error' in row:
                lines.append(f'| {row["network"]} | {row["way"]} | {row["error"]} | | | | |')
                continue
            memory = (f'{row["device_mib"]:.0f}' if cuda else
                      f'{row["resident_mib"]:.0f} ({row["resident_before_mib"]:.0f})')
            again = row['prepare_again_s']
            prepare = f'{row["prepare_first_s"]:.1f}' + (
                f', then {np.median(again):.1f}' if again else '')
            errors = ' / '.join(f'{error:.2g}' for error in row['errors_px'])
            marks = ('' if row['trained'] else '*') + ('' if row['passed'] in (True, None)
                                                       else ', refused')
            lines.append(f'| {row["network"]}, {row["budget"]} | {row["way"]} | '
                         f'{spread(row["ms"], ".1f")} | {spread(row["ratios"], ".2f")} | '
                         f'{memory} | {prepare} | {errors}{marks} |')
        parts.append('\n'.join(lines))
    if any(not row.get('trained', True) for row in table):
        parts.append('\\* Seeded random weights: the time is that of trained ones, the error '
                     'says little.')
    return '\n\n'.join(parts) + '\n'


def main() -> None:
    """Measure everything, or be one measurement."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', action='append', help='default: ' + ', '.join(NETWORKS))
    parser.add_argument('--size', action='append', help='default: ' + ', '.join(SIZES))
    parser.add_argument('--way', action='append', help='default: all; on the CPU '
                        + ', '.join(CPU_WAYS) + '; on CUDA ' + ', '.join(CUDA_WAYS))
    parser.add_argument('--device', help='cpu or cuda (default: cuda where it is)')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--seconds', type=float, default=5.0, help='of each budget')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU')
    parser.add_argument('--minutes', type=float, default=24 * 60.0,
                        help='of all; the rest is left out')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--markdown', type=Path)
    parser.add_argument('--job', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(Job(**json.loads(options.job)))))
        return
    device = options.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    ways = options.way or (CUDA_WAYS if device.startswith('cuda') else CPU_WAYS)
    machine = {**machine_facts(), 'cores': os.cpu_count(), 'threads': options.threads,
               'load_at_start': os.getloadavg()[0]}

    def save(results: list[dict[str, Any]]) -> None:
        if options.json is not None:
            content = {'machine': machine, 'rows': rows(results), 'results': results}
            options.json.write_text(json.dumps(content, indent=1) + '\n')

    table = rows(sweep(options, ways, device, save))
    text = markdown(table, cuda=device.startswith('cuda'))
    print(text)
    if options.markdown is not None:
        words = ' '.join(['python bench/engines.py', *sys.argv[1:]])
        facts = (f'{machine["cpu"]} ({machine["cores"]} cores, {options.threads} threads), '
                 f'{machine["gpu"]}; Python {machine["python"]}, {machine["packages"]}; load '
                 f'at the start {machine["load_at_start"]:.1f}')
        options.markdown.write_text(TEXT.format(command=words, machine=facts,
                                                rounds=options.rounds) + '\n' + text)


if __name__ == '__main__':
    main()
