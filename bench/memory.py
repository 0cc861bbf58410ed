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

"""Peak memory by resolution, above the process that has loaded packages and network.

    python bench/memory.py [--network dip_rt ...] [--runtime torch openvino] [--json FILE]

Each measurement is a process of its own that makes the engines (with an empty cache) and runs a
stream of four frames, cold and warm; see ``flow_ros.evaluation.benchmarks.memory``. The line is
what the peaks have in common: so many MB, and so many for each megapixel; the deviation says
how far from linear it is. Other work on the machine does not change the numbers, it only makes
them take longer. ``--as-node`` sets glibc's malloc as the flow node does (it keeps up to 512 MB
instead of giving them back).
"""

import argparse
from collections import defaultdict
import json
import os
from pathlib import Path
import platform
import sys
from typing import Any

from flow_ros.evaluation.benchmarks.children import NotMeasured, Refused, run_child
from flow_ros.evaluation.benchmarks.memory import fit_line
from flow_ros.sources import parse_size

SIZES = ('640x480', '1280x720', '1920x1080', '3840x2160')
WARM_ITERATIONS = 2  # of networks that iterate; the others' default
ONE_PASS = ('hd3', 'mscsl')
AS_NODE = {'MALLOC_MMAP_THRESHOLD_': str(32 << 20), 'MALLOC_TRIM_THRESHOLD_': str(512 << 20)}


def measure(network: str, runtime: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one stream in a new process."""
    width, height = parse_size(size)
    iterations = options.iterations
    if iterations is None and not network.startswith(ONE_PASS):
        iterations = WARM_ITERATIONS
    return run_child('memory', {
        'network': network, 'runtime': runtime, 'precision': options.precision, 'width': width,
        'height': height, 'threads': options.threads, 'iterations': iterations},
        limit_s=options.limit_s)


def main() -> None:
    """Measure and print a table for each network and runtime."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', nargs='+', default=['dip_rt'])
    parser.add_argument('--runtime', nargs='+', default=['torch', 'openvino'])
    parser.add_argument('--precision', default='f32')
    parser.add_argument('--sizes', nargs='+', default=list(SIZES), help='WIDTHxHEIGHT')
    parser.add_argument('--iterations', type=int, help='per level (default: 2; of HD3 and MSCSL '
                                                       'all levels)')
    parser.add_argument('--threads', type=int)
    parser.add_argument('--limit-s', type=float, default=3600.0, help='for one measurement')
    parser.add_argument('--as-node', action='store_true')
    parser.add_argument('--json', type=Path)
    options = parser.parse_args()
    if options.as_node:
        os.environ.update(AS_NODE)
    rows: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for network in options.network:
        for runtime in options.runtime:
            found = _table(network, runtime, options)
            rows += found
            groups = defaultdict(list)
            for row in found:
                groups[row['network'], row['runtime']].append(row)
            for (name, ran), group in groups.items():
                if len({row['megapixels'] for row in group}) > 1:
                    lines.append({'network': name, 'runtime': ran, **_line(group)})
            if options.json:
                options.json.write_text(json.dumps({
                    'machine': {'system': platform.system(), 'machine': platform.machine()},
                    'command': ' '.join(['python bench/memory.py', *sys.argv[1:]]),
                    'as_node': options.as_node, 'results': rows, 'lines': lines},
                    indent=2) + '\n')


def _table(network: str, runtime: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    print(f'\n{network}, {runtime} {options.precision}\n\n'
          f'| size | peak, MB | while engines are made, MB | on the stream, MB | a warm frame, MB '
          f'| MB per megapixel |\n|---|---|---|---|---|---|', flush=True)
    rows = []
    for size in options.sizes:
        try:
            row = measure(network, runtime, size, options)
        except (Refused, NotMeasured) as error:
            print(f'| {size} | {error} | | | | |', flush=True)
            continue
        rows.append(row)
        print(f'| {size} | {row["peak_mb"]:.0f} | {row["prepare_mb"]:.0f} | '
              f'{row["stream_mb"]:.0f} | {row["steady_mb"]:.0f} | '
              f'{row["peak_mb"] / row["megapixels"]:.0f} |', flush=True)
    return rows


def _line(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Print and return the line through the peaks."""
    line = fit_line([row['megapixels'] for row in rows], [row['peak_mb'] for row in rows])
    print(f'\npeak = {line.offset_mb:.0f} MB + {line.mb_per_megapixel:.0f} MB per megapixel, '
          f'within {100 * line.worst:.0f} %', flush=True)
    return {'offset_mb': line.offset_mb, 'mb_per_megapixel': line.mb_per_megapixel,
            'worst': line.worst}


if __name__ == '__main__':
    main()
