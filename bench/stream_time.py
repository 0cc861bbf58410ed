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

"""Time per frame of a network on a stream: encode once, two warm iterations, one upsampling.

    python bench/stream_time.py [--network dip_rt] [--size 640x480] [--json FILE]
    python bench/stream_time.py --source FOLDER_OR_VIDEO --runtime openvino

The frames are a synthetic stream or those of a source, scaled to the size; every one is fresh,
and every step of the budget is done (no early stop). Weights do not change the time: where a
network has none, seeded random ones are used, and said. Run it on a machine that does nothing
else: the rows are the median and the 10 % and 90 % quantiles over the frames.
"""

import argparse
from itertools import islice
import json
from pathlib import Path
import platform
import time

import numpy as np
import torch

from flow_ros.networks import create, WeightsError
from flow_ros.networks.base import FlowNetwork
from flow_ros.runtimes import create_runtime, RuntimeUnavailable
from flow_ros.runtimes.handover import best_runtime
from flow_ros.sources import open_source, parse_size
from flow_ros.streaming import Budget, FlowEstimator
from flow_ros.synthetic import SyntheticSequence

FRAME_S = 1 / 30


def network_for_timing(name: str) -> FlowNetwork:
    """Return the network with its shipped weights, or seeded random ones."""
    try:
        return create(name, 'default')
    except WeightsError:
        print(f'{name}: no weights, seeded random ones')
        torch.manual_seed(0)
        return create(name)


def load_frames(source: str, size: tuple[int, int], count: int) -> list[np.ndarray]:
    """Return up to ``count`` frames of ``size`` (width, height): of a source, or synthetic."""
    if source == 'synthetic':
        stream = SyntheticSequence(*size, seed=0)
        return [stream.frame(k).image for k in range(count)]
    return [frame.image for frame in islice(open_source(source, size=size, loop=False), count)]


def measure(runtime: str, precision: str, options: argparse.Namespace,
            frames: list[np.ndarray]) -> dict[str, object]:
    """Time one runtime over the frames."""
    height, width = frames[0].shape[:2]
    made = best_runtime(create_runtime(runtime, network_for_timing(options.network),
                                       threads=options.threads, precision=precision),
                        height, width)
    estimator = FlowEstimator(runtime=made, budget=Budget(iterations=options.iterations))
    estimator.early_stop_px = 0.0
    estimator.prepare(height, width)
    total, acts, cold = [], [], 0
    for index, frame in enumerate(frames):
        start = time.perf_counter()
        result = estimator(frame, index * FRAME_S)
        if result is None or index < 4:
            continue
        cold += not result.warm
        total.append(1e3 * (time.perf_counter() - start))
        acts.append(result.timings_ms)
    low, median, high = np.quantile(total, (0.1, 0.5, 0.9))
    print(f'{runtime:9s} {precision:5s} {median:7.1f} ms ({low:.1f} to {high:.1f}), '
          f'{1e3 / median:5.1f} frames/s, cold {cold} of {len(total)}; '
          + ', '.join(f'{act} {np.median([a[act] for a in acts]):.1f}' for act in acts[0]))
    return {'network': options.network, 'runtime': runtime, 'precision': precision,
            'device': str(made.device),
            'size': f'{width}x{height}', 'iterations': options.iterations, 'warm': cold == 0,
            'source': Path(options.source).name,
            'ms_p10': low, 'ms_p50': median, 'ms_p90': high, 'fps': 1e3 / median}


def main() -> None:
    """Time every runtime of this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--network', default='dip_rt')
    parser.add_argument('--runtime', choices=('torch', 'openvino'), help='only this one')
    parser.add_argument('--source', default='synthetic', help='a folder of images or a video')
    parser.add_argument('--size', default='640x480', help='WIDTHxHEIGHT')
    parser.add_argument('--iterations', type=int, default=2, help='per level')
    parser.add_argument('--frames', type=int, default=40)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--json', type=Path)
    options = parser.parse_args()
    width, height = parse_size(options.size)
    frames = load_frames(options.source, (width, height), options.frames)
    print(f'{options.network}, {width}x{height}, warm, {options.iterations} iterations per '
          f'level, {options.threads} threads, {platform.machine()}, torch {torch.__version__}')
    ways = [('torch', 'f32'), ('openvino', 'f32'), ('openvino', 'fast')]
    if torch.cuda.is_available():
        print(f'torch on {torch.cuda.get_device_name()}')
        ways.insert(1, ('torch', 'fast'))
    rows = []
    ways = [way for way in ways if options.runtime in (None, way[0])]
    for runtime, precision in ways:
        try:
            rows.append(measure(runtime, precision, options, frames))
        except RuntimeUnavailable as reason:
            print(f'{runtime}: {reason}')
    if options.json:
        options.json.write_text(json.dumps({'results': rows}, indent=2) + '\n')


if __name__ == '__main__':
    main()
