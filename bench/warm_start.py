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

"""What a warm start is worth: endpoint errors on procedural sequences, warm and cold.

    python bench/warm_start.py [--network dip_rt] [--weights default] [--size 512x384]

Sequences of the procedural world (drifting, driving and flying scenes of a seed that nobody
trained on, with all that a camera does) go through the estimator frame by frame, as on a
robot. Every row is the mean over the same frames: endpoint error (px) of all pixels and of
those that are not occluded, Fl-all (%), and the median time per frame.
"""

import argparse
import time

import numpy as np
import torch
from tqdm import tqdm

from flow_ros.evaluation.metrics import correct, endpoint_error
from flow_ros.networks import create
from flow_ros.runtimes import create_runtime
from flow_ros.runtimes.handover import best_runtime
from flow_ros.sources import parse_size
from flow_ros.streaming import Budget, FlowEstimator
from flow_ros.synthetic.camera import develop
from flow_ros.synthetic.world import World, WorldConfig

SETTINGS = ((True, 1), (True, 2), (True, 4), (False, 1), (False, 2), (False, 4), (False, 6),
            (False, 8))
FIRST = 2  # frames of a sequence before the ones that count
FRAME_S = 0.1


def main() -> None:
    """Measure all settings on the same frames."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', default='dip_rt')
    parser.add_argument('--weights', default='default')
    parser.add_argument('--size', default='512x384', help='WIDTHxHEIGHT')
    parser.add_argument('--sequences', type=int, default=60)
    parser.add_argument('--frames', type=int, default=4, help='that count, of each sequence')
    parser.add_argument('--motion-px', type=float, default=110.0,
                        help='of the fastest layer per frame; lengths are log-uniform from 0.3')
    parser.add_argument('--seed', type=int, default=90210)
    parser.add_argument('--runtime', default='auto')
    options = parser.parse_args()
    width, height = parse_size(options.size)
    runtime = best_runtime(create_runtime(options.runtime, create(options.network,
                                                                  options.weights)),
                           height, width)
    world = World(seed=options.seed, config=WorldConfig(
        objects=(2, 9), largest_motion_px=options.motion_px, driving=0.35, flying=0.15))
    rows: dict[tuple[bool, int], list[tuple[float, float, float, float]]] = {
        setting: [] for setting in SETTINGS}
    estimators = {(warm, iterations): FlowEstimator(runtime=runtime, warm_start=warm,
                                                    budget=Budget(iterations=iterations))
                  for warm, iterations in SETTINGS}
    next(iter(estimators.values())).prepare(height, width)
    for index in tqdm(range(options.sequences), unit='sequence'):
        clip = world.clip(index, batch=1, size=(height, width),
                          frames=FIRST + options.frames + 1)
        random = torch.Generator().manual_seed(index)
        images = [image[0].permute(1, 2, 0).round().byte().numpy()
                  for image in develop(clip.images, world.config.camera, random)]
        for setting, estimator in estimators.items():
            estimator.reset()
            for k, image in enumerate(images):
                start = time.perf_counter()
                result = estimator(image, k * FRAME_S)
                spent_ms = 1e3 * (time.perf_counter() - start)
                if result is None or k <= FIRST:
                    continue
                truth = clip.forward[k - 1][0].permute(1, 2, 0).numpy()
                error = endpoint_error(result.flow, truth)
                seen = ~clip.occluded_forward[k - 1][0, 0].numpy()
                rows[setting].append((float(error.mean()), float(error[seen].mean()),
                                      100 * float((~correct(result.flow, truth)).mean()),
                                      spent_ms))
    print(f'{options.network} on {runtime.name}, {width}x{height}, {options.sequences} sequences '
          f'of {options.frames} frames that count, motion to {options.motion_px:g} px a frame')
    print('| start | iterations per level | EPE, px | EPE not occluded, px | Fl-all, % | '
          'ms per frame |')
    print('|---|---|---|---|---|---|')
    for (warm, iterations), measured in rows.items():
        every, seen_only, outliers, _ = np.mean(measured, axis=0)
        print(f'| {"warm" if warm else "cold"} | {iterations} | {every:.2f} | {seen_only:.2f} | '
              f'{outliers:.1f} | {np.median([row[3] for row in measured]):.0f} |')


if __name__ == '__main__':
    main()
