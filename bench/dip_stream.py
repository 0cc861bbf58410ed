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

"""DIP on a stream against the same network written plainly (``bench/plain_dip.py``).

    python bench/dip_stream.py [--size 1024x448] [--frames 5] [--json FILE]

Each frame is computed by all ways one after the other, so that ratios are those of one run: a
machine that is slower for a while is so for all. The frames move by a few px, each is a fresh
one, and each has the iterations asked for at 1/4 from a prior (a warm start). The plain network
runs in torch and encodes both images each time; the exact one, through each runtime, reuses
the features of the frame before. Beside them the two matches alone, and, each in a process of
its own, the highest resident memory above that before the first frame (of OpenVINO once with
its engines compiled before, once with all they need).

Weights are seeded random ones, of the size of the parity data's: they do not change the time.
Rows are the median and the 10 % and 90 % quantiles over the frames. For a machine that does
nothing else.
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import platform
import subprocess
import sys
import time
from typing import Any

import numpy as np
from plain_dip import PlainDIP, propagation, search, shifted_stack
import torch
from torch import Tensor

from flow_ros.evaluation.benchmarks.peak import PeakMemory
from flow_ros.networks.dip import DIP
from flow_ros.ops.patchmatch import propagation_correlation_released, search_released
from flow_ros.runtimes import create_runtime, RuntimeUnavailable
from flow_ros.runtimes.base import Runtime
from flow_ros.runtimes.threads import torch_beside
from flow_ros.sources import parse_size
from flow_ros.synthetic import SyntheticSequence

LEVEL = 4
PRIOR_PX = 2.0
WAYS = ('plain', 'torch', 'openvino')
Way = Callable[[Tensor, Tensor], Tensor]


def weights(network: torch.nn.Module) -> None:
    """Fill ``network`` with seeded random weights under which the flow moves."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.ndim == 4:
                gain = 0.3 if 'flow_head.conv2' in name else 1.3
                deviation = gain / value[0].numel() ** 0.5
            else:
                deviation = 0.05
            value.copy_(torch.randn(value.shape, generator=generator) * deviation)


def image(sequence: SyntheticSequence, index: int) -> Tensor:
    """Return a frame as the networks take it."""
    return torch.from_numpy(sequence.frame(index).image).permute(2, 0, 1)[None].float()


def exact(runtime: Runtime, iterations: int) -> Way:
    """Return the exact network on a stream, run as the estimator runs it: a call a frame."""
    network, call = runtime.network, runtime.call
    features: dict[int, Any] = {}

    def way(before: Tensor, now: Tensor) -> Tensor:
        first = features.pop(id(before), None) or network.encode(before, call=call)
        features.clear()
        second = network.encode(now, call=call)
        features[id(now)] = second
        prior = now.new_full((1, 2, *now.shape[-2:]), PRIOR_PX)
        state = network.start(first, second, prior_flow=prior, iterations=iterations, call=call)
        return runtime.loop(state)[1].flow

    def beside(before: Tensor, now: Tensor) -> Tensor:
        with torch_beside(runtime):
            return way(before, now)

    return beside


def plain(network: PlainDIP, iterations: int) -> Way:
    """Return the plain network on the same stream."""

    def way(before: Tensor, now: Tensor) -> Tensor:
        height, width = now.shape[-2:]
        start = now.new_full((1, 2, height // LEVEL, width // LEVEL), PRIOR_PX / LEVEL)
        return network(before, now, start=start, levels=(LEVEL,), iterations=iterations,
                       warm=True)

    return way


def made(name: str, options: argparse.Namespace) -> Way:
    """Return one of WAYS."""
    network = DIP().eval()
    weights(network)
    if name != 'plain':
        return exact(create_runtime(name, network, threads=options.threads),
                     options.iterations)
    other = PlainDIP().eval()
    other.load_state_dict(network.state_dict())
    return plain(other, options.iterations)


def row(name: str, seconds: list[float], base: list[float]) -> dict[str, Any]:
    """Return the row of a way, with its ratio to ``base`` frame by frame; print it."""
    low, median, high = 1e3 * np.quantile(seconds, (0.1, 0.5, 0.9))
    ratios = np.quantile(np.divide(base, seconds), (0.1, 0.5, 0.9))
    print(f'{name:20s} {median:8.1f} ms ({low:.1f} to {high:.1f}), '
          f'{ratios[1]:5.2f} times as fast ({ratios[0]:.2f} to {ratios[2]:.2f})')
    return {'way': name, 'ms_p10': low, 'ms_p50': median, 'ms_p90': high,
            'faster_p10': ratios[0], 'faster_p50': ratios[1], 'faster_p90': ratios[2]}


def timed(run: Callable[..., Any], *given: Tensor) -> tuple[float, Any]:
    """Return how long ``run`` took, in seconds, and what it returned."""
    start = time.perf_counter()
    result = run(*given)
    return time.perf_counter() - start, result


def streams(options: argparse.Namespace, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Time all ways over the frames, one after the other for each."""
    torch.set_num_threads(options.threads)
    sequence = SyntheticSequence(*size, seed=0)
    ways: dict[str, Way] = {}
    for name in options.ways:
        try:
            ways[name] = made(name, options)
        except RuntimeUnavailable as reason:
            print(f'{name}: {reason}')
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    errors = dict.fromkeys(ways, 0.0)
    before = image(sequence, 0)
    for index in range(1, options.frames + 2):
        now = image(sequence, index)
        flows = {}
        for name, way in ways.items():
            took, flows[name] = timed(way, before, now)
            if index > 1:  # the first makes the engines
                seconds[name].append(took)
        for name, flow in flows.items():
            errors[name] = max(errors[name], float((flow - flows['plain']).abs().max()))
        before = now
    rows = []
    for name in ways:
        rows.append({**row(name, seconds[name], seconds['plain']),
                     'largest_difference_px': errors[name]})
        print(f'{"":20s} largest difference of the flow {errors[name]:.1e} px')
    return rows


def matches(options: argparse.Namespace, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Time the two matches alone, in torch, as one frame has them."""
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(1)
    width, height = (side // LEVEL for side in size)
    maps = [torch.randn(1, 256, height, width, generator=generator) for _ in range(2)]
    last = [each.contiguous(memory_format=torch.channels_last) for each in maps]
    flow = torch.nn.functional.interpolate(
        4 * torch.randn(1, 2, height // 8, width // 8, generator=generator),
        size=(height, width), mode='bilinear')

    def plainly() -> Tensor:
        stack = shifted_stack(maps[1])
        for _ in range(options.iterations):
            found = propagation(maps[0], stack, flow), search(*maps, flow)
        return torch.cat(found, dim=1)

    def exactly() -> Tensor:
        for _ in range(options.iterations):
            found = (propagation_correlation_released(*last, flow),
                     search_released(*last, flow))
        return torch.cat(found, dim=1)

    seconds: dict[str, list[float]] = {'plain': [], 'exact': []}
    for index in range(options.frames + 1):
        one, expected = timed(plainly)
        other, found = timed(exactly)
        if index:
            seconds['plain'].append(one)
            seconds['exact'].append(other)
    rows = [row(f'matching, {name}', seconds[name], seconds['plain']) for name in seconds]
    print(f'{"":20s} largest difference {float((found - expected).abs().max()):.1e}')
    return rows


def peak_here(name: str, options: argparse.Namespace, size: tuple[int, int]) -> dict[str, float]:
    """Return how high the memory of this process rises while it serves two frames."""
    torch.set_num_threads(options.threads)
    sequence = SyntheticSequence(*size, seed=0)
    frames = [image(sequence, index) for index in range(4)]
    way = made(name, options)
    with PeakMemory() as first:
        way(frames[0], frames[1])
    with PeakMemory(above_mb=first.start_mb) as then:
        way(frames[1], frames[2])
        way(frames[2], frames[3])
    with PeakMemory() as warm:
        way(frames[2], frames[3])
    return {'first_mb': first.peak_mb, 'then_mb': then.peak_mb, 'again_mb': warm.peak_mb}


def peaks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the peak of each way in a process of its own."""
    rows: list[dict[str, Any]] = []
    for name in options.ways:
        command = [sys.executable, __file__, '--peak', name, '--size', options.size,
                   '--iterations', str(options.iterations), '--threads', str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f'{name}: no peak: {done.stderr.strip().splitlines()[-1:]}')
            continue
        rows.append({'way': name, **json.loads(done.stdout.splitlines()[-1])})
        print(f'{name:20s} ' + ', '.join(f'{key} {rows[-1][key]:.0f}' for key in
                                         ('first_mb', 'then_mb', 'again_mb')))
    return rows


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--size', default='1024x448', help='WIDTHxHEIGHT, multiples of 16')
    parser.add_argument('--iterations', type=int, default=3, help='warm ones at 1/4')
    parser.add_argument('--frames', type=int, default=5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--ways', nargs='+', default=list(WAYS), choices=WAYS)
    parser.add_argument('--only', choices=('stream', 'matching', 'memory'))
    parser.add_argument('--peak', choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument('--json', type=Path)
    options = parser.parse_args()
    size = parse_size(options.size)
    with torch.inference_mode():
        if options.peak:
            print(json.dumps(peak_here(options.peak, options, size)))
            return
        print(f'dip, {options.size}, warm, {options.iterations} iterations at 1/{LEVEL}, '
              f'{options.threads} threads, {platform.machine()}, torch {torch.__version__}')
        result: dict[str, Any] = {'size': options.size, 'iterations': options.iterations,
                                  'threads': options.threads, 'torch': torch.__version__}
        if options.only in (None, 'stream'):
            result['stream'] = streams(options, size)
        if options.only in (None, 'matching'):
            result['matching'] = matches(options, size)
        if options.only in (None, 'memory'):
            result['memory'] = peaks(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
