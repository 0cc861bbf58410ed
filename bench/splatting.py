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

"""Time of the warm start's parts: sampling, splatting, filling, checking, by size and cell.

    python bench/splatting.py [--sizes 640x480 ...] [--cells 1 4 8] [--json FILE]

A scene of a moving background and five objects, with confidence and occlusion, is carried as the
estimator does between two frames. ``carry`` is the forward splatting with visibility and the
filling of holes; ``motion``, ``splat``, ``gather`` and ``fill`` are parts of it; ``sample`` and
``explains`` (the scene-cut check of the carried flow, of a scene too fast for the check that
comes first) happen beside it, ``level`` is what the network does to take it. The whole is
``sample + carry + explains + level``. Times are ms: median, and the 10 % and 90 % quantiles.
``--loaded`` starts a process that keeps one core busy. Memory is kept as the node keeps it
(``tune_malloc``); with ``--plain-malloc`` as Python does, where a good part is page faults.
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import platform
import subprocess
import sys
import time

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.malloc import tune_malloc
from flow_ros.networks.base import check_prior, Features
from flow_ros.sources import parse_size
from flow_ros.streaming import warm_start
from flow_ros.streaming.scene_cut import explains
from flow_ros.streaming.thumbnails import SMALL

OBJECTS = 5


def scene(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return flow (1, 2, H, W), confidence and occlusion (1, 1, H, W) of a made-up pair."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 2, 4, 5, generator=random) * width / 160
    flow = functional.interpolate(coarse, size=(height, width), mode='bicubic')
    occlusion = torch.zeros(1, 1, height, width)
    for _ in range(OBJECTS):
        top, left = (int(torch.randint(0, side * 3 // 4, (), generator=random))
                     for side in (height, width))
        box = (..., slice(top, top + height // 5), slice(left, left + width // 6))
        flow[box] = (torch.randn(2, 1, 1, generator=random) * width / 30)
        occlusion[..., top:top + height // 5, left:left + width // 40] = 1
    confidence = torch.rand(1, 1, height, width, generator=random)
    return flow.to(device), confidence.to(device), occlusion.to(device)


def parts_of(size: tuple[int, int], cell: int,
             device: torch.device) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    height, width = size
    flow, confidence, occlusion = scene(height, width, device)
    samples = warm_start.sample_flow(flow, cell=cell, confidence=confidence, occlusion=occlusion)
    against = warm_start._motion_against_background(samples.flow)
    rank = warm_start._rank(against, samples.reliability)
    winner = warm_start._splat(samples.flow, 1 / cell, rank)
    values, sums = warm_start._gather(winner, samples.flow, against)
    prior = warm_start.carry(samples, direction='forward')
    random = torch.Generator().manual_seed(1)
    small_a, small_b = (255 * torch.rand(SMALL, generator=random).numpy() for _ in range(2))
    features = Features((torch.zeros(1, 1, 1, 1, device=device),), size)
    level = max(cell, 4)
    shape = (-(-height // 16) * 16 // level, -(-width // 16) * 16 // level)
    return {
        'sample': lambda: warm_start.sample_flow(flow, cell=cell, confidence=confidence,
                                                 occlusion=occlusion),
        'motion': lambda: warm_start._rank(
            warm_start._motion_against_background(samples.flow), samples.reliability),
        'splat': lambda: warm_start._splat(samples.flow, 1 / cell, rank),
        'gather': lambda: warm_start._gather(winner, samples.flow, against),
        'fill': lambda: warm_start._fill(values, sums),
        'carry': lambda: warm_start.carry(samples, direction='forward'),
        'explains': lambda: explains(prior, small_a, small_b),
        'level': lambda: check_prior(prior, features).at_level(level, shape),
    }


def spread(work: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Return the quantiles of its time, ms."""
    times = []
    for index in range(repeats + 5):
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        if index >= 5:
            times.append(1e3 * (time.perf_counter() - start))
    low, median, high = np.quantile(times, (0.1, 0.5, 0.9))
    return {'ms_p10': round(low, 4), 'ms_p50': round(median, 4), 'ms_p90': round(high, 4)}


def measure(size: tuple[int, int], cell: int, options: argparse.Namespace) -> dict[str, object]:
    """Time all parts of one size and cell."""
    device = torch.device(options.device)
    height, width = size
    repeats = max(12, min(options.repeats, options.repeats * 76800 * cell ** 2
                          // (4 * height * width)))
    with torch.inference_mode():
        parts = {name: spread(work, device, repeats)
                 for name, work in parts_of(size, cell, device).items()}
    whole = sum(parts[name]['ms_p50'] for name in ('sample', 'carry', 'explains', 'level'))
    print(f'| {width}x{height} | {cell} | '
          + ' | '.join(f'{part["ms_p50"]:.2f}' for part in parts.values())
          + f' | {whole:.2f} | {parts["carry"]["ms_p10"]:.2f} to {parts["carry"]["ms_p90"]:.2f} |',
          flush=True)
    return {'size': f'{width}x{height}', 'cell': cell, 'repeats': repeats, 'parts': parts,
            'whole_ms': round(whole, 4)}


def main() -> None:
    """Time every size with every cell."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', default=['640x480', '1280x720', '1920x1080'],
                        help='WIDTHxHEIGHT')
    parser.add_argument('--cells', nargs='+', type=int, default=[8, 4, 1], help='px')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--repeats', type=int, default=100)
    parser.add_argument('--loaded', action='store_true')
    parser.add_argument('--plain-malloc', action='store_true')
    parser.add_argument('--json', type=Path)
    options = parser.parse_args()
    tuned = not options.plain_malloc and tune_malloc()
    torch.set_num_threads(options.threads)
    print(f'{options.device}, {options.threads} threads, torch {torch.__version__}'
          f'{", a second process loads one core" if options.loaded else ""}')
    print('| size | cell, px | sample | motion | splat | gather | fill | carry | explains | level '
          '| whole, ms | carry, 10 % to 90 % |\n|---|---|---|---|---|---|---|---|---|---|---|---|')
    busy = (subprocess.Popen([sys.executable, '-c', 'while True: pass']) if options.loaded
            else None)
    try:
        rows = [measure((height, width), cell, options)
                for width, height in map(parse_size, options.sizes) for cell in options.cells]
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()
    if options.json:
        options.json.write_text(json.dumps({
            'machine': {'system': platform.system(), 'machine': platform.machine()},
            'device': options.device, 'threads': options.threads, 'loaded': options.loaded,
            'tuned_malloc': tuned,
            'torch': torch.__version__, 'results': rows}, indent=2) + '\n')


if __name__ == '__main__':
    main()
