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

"""What the cost volumes cost: time, and memory beyond the inputs, forward and backward.

    python bench/cost_volume.py [--rounds 5] [--threads 1 2] [--json FILE]

At 1/4 of 1024x448: the warped volume, the sampled one, and the same by a grid_sample for every
residual. Rounds are interleaved, so that what else the machine does meets all alike; compare the
least times. Memory is what a process of its own grows by in one pass, at its highest.
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import platform
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.cost_volume import Measure, sampled_cost_volume, warped_cost_volume
from flow_ros.ops.sampling import pixel_grid, sample

HEIGHT, WIDTH = 112, 256
MEASURES: tuple[Measure, ...] = ('dot', 'sad')

Volume = Callable[[Tensor, Tensor, Tensor, int, Measure], Tensor]


def plain_cost_volume(a: Tensor, b: Tensor, flow: Tensor, radius: int,
                      measure: Measure) -> Tensor:
    """Return the sampled volume by one grid_sample per residual."""
    height, width = a.shape[-2:]
    points = pixel_grid(height, width, flow) + flow
    planes = []
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            moved = torch.stack([points[:, 0] + dx, points[:, 1] + dy], dim=1)
            sampled = sample(b, moved, 'zeros')
            planes.append((a * sampled if measure == 'dot' else (a - sampled).abs()).mean(dim=1))
    return torch.stack(planes, dim=1)


VOLUMES: dict[str, Volume] = {
    'warped': warped_cost_volume, 'sampled': sampled_cost_volume, 'plain': plain_cost_volume}


def inputs(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return two maps and a smooth flow with a deviation of 8 px."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, channels, HEIGHT, WIDTH, generator=generator)
    coarse = 8 * torch.randn(1, 2, HEIGHT // 16, WIDTH // 16, generator=generator)
    return a, b, functional.interpolate(coarse, size=(HEIGHT, WIDTH), mode='bilinear')


def once(name: str, channels: int, radius: int, measure: Measure, backward: bool) -> float:
    """Return the seconds of one pass, without the making of its inputs."""
    a, b, flow = inputs(channels)
    a.requires_grad_(backward)
    b.requires_grad_(backward)
    start = time.perf_counter()
    volume = VOLUMES[name](a, b, flow, radius, measure)
    if backward:
        volume.sum().backward()
    return time.perf_counter() - start


def extra_memory_mib(name: str, channels: int, radius: int, measure: Measure,
                     backward: bool) -> float:
    """Return by how much a fresh process grows in one pass, after a small one."""
    code = (f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n'
            f'import cost_volume\n'
            f'print(cost_volume.growth_mib({name!r}, {channels}, {radius}, {measure!r}, '
            f'{backward}))')
    done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def growth_mib(name: str, channels: int, radius: int, measure: Measure, backward: bool) -> float:
    """Return by how much this process grows at its highest in one pass."""
    torch.set_num_threads(1)
    a, b, flow = inputs(channels)
    a.requires_grad_(backward)
    b.requires_grad_(backward)
    result = VOLUMES[name](a[..., :16, :16], b[..., :16, :16], flow[..., :16, :16], 1, measure)
    if backward:  # so that what the libraries load at first use is there
        result.sum().backward()
    before = highest_mib()
    result = VOLUMES[name](a, b, flow, radius, measure)
    if backward:
        result.sum().backward()
    return highest_mib() - before


def highest_mib() -> float:
    """Return the most memory that this process ever held (Linux).

    Not getrusage's, which a new process inherits from the one that started it.
    """
    status = Path('/proc/self/status').read_text()
    return int(status.split('VmHWM:')[1].split()[0]) / 1024


def main() -> None:
    """Measure all, print a table after all rounds, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--channels', type=int, nargs='+', default=[32, 64])
    parser.add_argument('--radius', type=int, nargs='+', default=[4, 8])
    parser.add_argument('--json', type=Path)
    options = parser.parse_args()
    cases = [(name, channels, radius, measure, backward)
             for backward in (False, True) for measure in MEASURES
             for channels in options.channels for radius in options.radius for name in VOLUMES]
    times: dict[tuple[object, ...], list[float]] = {}
    for _ in range(options.rounds):
        for threads in options.threads:
            torch.set_num_threads(threads)
            for case in cases:
                times.setdefault((threads, *case), []).append(once(*case))
    rows = []
    for case in cases:
        name, channels, radius, measure, backward = case
        row: dict[str, object] = {'volume': name, 'channels': channels, 'radius': radius,
                                  'measure': measure, 'backward': backward,
                                  'extra_mib': round(extra_memory_mib(*case))}
        for threads in options.threads:
            found = times[(threads, *case)]
            row[f'ms_{threads}'] = round(1e3 * min(found), 1)
            row[f'median_ms_{threads}'] = round(1e3 * statistics.median(found), 1)
        rows.append(row)
    print(table(rows, options.threads))
    if options.json:
        machine = f'{platform.machine()}, torch {torch.__version__.split("+")[0]}'
        options.json.write_text(json.dumps({
            'cells': [WIDTH, HEIGHT], 'rounds': options.rounds, 'machine': machine,
            'rows': rows}, indent=1) + '\n')


def table(rows: list[dict[str, object]], threads: list[int]) -> str:
    """Return the rows as Markdown: least (median) ms per number of threads, MiB."""
    head = ['volume', 'C', 'r', 'measure', 'pass',
            *(f'{count} thread(s), ms' for count in threads), 'extra MiB']
    lines = [' | '.join(['', *head, '']).strip(), '|' + '---|' * len(head)]
    for row in rows:
        cells = [row['volume'], row['channels'], row['radius'], row['measure'],
                 'forward + backward' if row['backward'] else 'forward',
                 *(f'{row[f"ms_{count}"]} ({row[f"median_ms_{count}"]})' for count in threads),
                 row['extra_mib']]
        lines.append(' | '.join(['', *map(str, cells), '']).strip())
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
