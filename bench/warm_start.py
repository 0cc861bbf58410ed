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

"""What a warm start is worth: endpoint errors on synthetic streams, warm and cold.

    python bench/warm_start.py [--network dip_rt] [--weights default] [--size 320x240]

Every row is the mean endpoint error (px) over the same frames of several streams with known
flow, all pixels and those that are not occluded, and the median time per frame.
"""

import argparse
import time

import numpy as np
from tqdm import tqdm

from flow_ros.networks import create
from flow_ros.runtimes import create_runtime
from flow_ros.sources import parse_size
from flow_ros.streaming import Budget, FlowEstimator
from flow_ros.synthetic import SyntheticSequence

SETTINGS = ((True, 1), (True, 2), (True, 4), (False, 1), (False, 2), (False, 4), (False, 8))
FIRST = 3  # frames of a stream before the ones that count
FRAME_S = 0.1


def main() -> None:
    """Measure all settings on the same frames."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--network', default='dip_rt')
    parser.add_argument('--weights', default='default')
    parser.add_argument('--size', default='320x240', help='WIDTHxHEIGHT')
    parser.add_argument('--streams', type=int, default=6)
    parser.add_argument('--frames', type=int, default=10, help='that count, of each stream')
    parser.add_argument('--motion-px', type=float, default=16.0)
    parser.add_argument('--runtime', default='auto')
    options = parser.parse_args()
    width, height = parse_size(options.size)
    runtime = create_runtime(options.runtime, create(options.network, options.weights))
    errors: dict[tuple[bool, int], list[tuple[float, float, float]]] = {
        setting: [] for setting in SETTINGS}
    for seed in tqdm(range(100, 100 + options.streams), unit='stream'):
        stream = SyntheticSequence(width, height, seed=seed, motion_px=options.motion_px)
        frames = [stream.frame(k) for k in range(FIRST + options.frames + 1)]
        for warm, iterations in SETTINGS:
            estimator = FlowEstimator(runtime=runtime, warm_start=warm,
                                      budget=Budget(iterations=iterations))
            estimator.prepare(height, width)
            for k, frame in enumerate(frames):
                start = time.perf_counter()
                result = estimator(frame.image, k * FRAME_S)
                if result is None or k <= FIRST:
                    continue
                truth = frames[k - 1]
                error = np.hypot(*np.moveaxis(result.flow - truth.flow_forward, 2, 0))
                errors[warm, iterations].append((
                    float(error.mean()), float(error[~truth.occlusion_forward].mean()),
                    1e3 * (time.perf_counter() - start)))
    print(f'{options.network} on {runtime.name}, {width}x{height}, {options.streams} streams of '
          f'{options.frames} frames, motion to {options.motion_px:g} px a frame')
    print('| start | iterations per level | EPE, px | EPE not occluded, px | ms per frame |')
    print('|---|---|---|---|---|')
    for (warm, iterations), rows in errors.items():
        every, seen, _ = np.mean(rows, axis=0)
        print(f'| {"warm" if warm else "cold"} | {iterations} | {every:.2f} | {seen:.2f} | '
              f'{np.median([row[2] for row in rows]):.0f} |')


if __name__ == '__main__':
    main()
