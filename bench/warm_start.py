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

"""What a warm start is worth: errors on streams, warm and cold, frame by frame as on a robot.

    python bench/warm_start.py [--network dip_rt] [--weights default] [--size 512x384]
    python bench/warm_start.py --source DIR --size 640x480

Without ``--source`` the streams are sequences of the procedural world (drifting, driving and
flying scenes of a seed that nobody trained on, with all that a camera does). Every row is the
mean over the same frames: endpoint error (px) of all pixels and of those that are not occluded,
Fl-all (%), and the median time per frame. What leaves the image counts among all pixels, however
far it goes: a scene that rushes past the camera moves by thousands of px, and makes that mean.

With ``--source`` (a folder of images, a video, a bag) there is no truth. What is measured is the
photometric error: the census distance (0 to 1, UnFlow's) of each frame and the next one moved
back by the flow, over the pixels of which no setting says that they leave the image, and of
which the last one (eight cold iterations) says that they are not covered.
"""

import argparse
from collections.abc import Iterator
import json
from pathlib import Path
import platform
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor
from tqdm import tqdm

from flow_ros.evaluation.metrics import correct, endpoint_error
from flow_ros.networks import create
from flow_ros.ops.sampling import inside, warp
from flow_ros.runtimes import create_runtime, Runtime
from flow_ros.runtimes.handover import best_runtime
from flow_ros.sources import open_source, parse_size
from flow_ros.streaming import Budget, FlowEstimator, FlowResult
from flow_ros.synthetic.camera import develop
from flow_ros.synthetic.world import World, WorldConfig
from flow_ros.training.unsupervised import census, census_distance, whole_patches

Setting = tuple[bool, int]
"""Warm or not, and the iterations per level."""

Pixels = NDArray[np.uint8]

SETTINGS: tuple[Setting, ...] = ((True, 1), (True, 2), (True, 4), (False, 1), (False, 2),
                                 (False, 4), (False, 6), (False, 8))
ISSUE: tuple[Setting, ...] = ((True, 2), (False, 2), (False, 8))
FIRST = 2  # frames of a sequence before the ones that count
FRAME_S = 0.1


def make_estimators(runtime: Runtime,
                    settings: tuple[Setting, ...]) -> dict[Setting, FlowEstimator]:
    """Return one stream per setting; every step of the budget is done."""
    estimators = {}
    for warm, iterations in settings:
        estimator = FlowEstimator(runtime=runtime, warm_start=warm,
                                  budget=Budget(iterations=iterations))
        estimator.early_stop_px = 0.0
        estimators[warm, iterations] = estimator
    return estimators


def timed(estimator: FlowEstimator, image: Pixels,
          stamp: float) -> tuple[FlowResult | None, float]:
    """Return the result of one frame, and its time in ms."""
    start = time.perf_counter()
    result = estimator(image, stamp)
    return result, 1e3 * (time.perf_counter() - start)


def procedural(estimators: dict[Setting, FlowEstimator], size: tuple[int, int],
               options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per frame that counts and setting, with errors against the truth."""
    width, height = size
    world = World(seed=options.seed, config=WorldConfig(
        objects=(2, 9), largest_motion_px=options.motion_px, driving=0.35, flying=0.15))
    for index in tqdm(range(options.sequences), unit='sequence'):
        clip = world.clip(index, batch=1, size=(height, width),
                          frames=FIRST + options.frames + 1)
        random = torch.Generator().manual_seed(index)
        images = [image[0].permute(1, 2, 0).round().byte().numpy()
                  for image in develop(clip.images, world.config.camera, random)]
        for setting, estimator in estimators.items():
            estimator.reset()
            for k, image in enumerate(images):
                result, spent_ms = timed(estimator, image, k * FRAME_S)
                if result is None or k <= FIRST:
                    continue
                truth = clip.forward[k - 1][0].permute(1, 2, 0).numpy()
                error = endpoint_error(result.flow, truth)
                seen = ~clip.occluded_forward[k - 1][0, 0].numpy()
                yield {'setting': setting, 'sequence': index, 'epe': float(error.mean()),
                       'epe_seen': float(error[seen].mean()),
                       'fl_all': 100 * float((~correct(result.flow, truth)).mean()),
                       'ms': spent_ms, 'steps': result.iterations, 'was_warm': result.warm}


def real(estimators: dict[Setting, FlowEstimator], size: tuple[int, int],
         options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per frame that counts and setting, with the photometric error."""
    for estimator in estimators.values():
        estimator.reset()
    before: Tensor | None = None
    frames = open_source(options.source, size=size, loop=False)
    for index, frame in enumerate(tqdm(frames, unit='frame')):
        results = {setting: timed(estimator, frame.image, frame.stamp_s)
                   for setting, estimator in estimators.items()}
        image = torch.from_numpy(frame.image).permute(2, 0, 1)[None].float()
        done = {setting: (result, ms) for setting, (result, ms) in results.items()
                if result is not None}
        if before is not None and index > FIRST and len(done) == len(estimators):
            yield from _photometric(before, image, index, done)
        before = image


def _photometric(before: Tensor, image: Tensor, index: int,
                 done: dict[Setting, tuple[FlowResult, float]]) -> Iterator[dict[str, Any]]:
    flows = {setting: torch.from_numpy(result.flow).permute(2, 0, 1)[None]
             for setting, (result, _) in done.items()}
    counts = whole_patches(before)
    for flow in flows.values():
        counts = counts & inside(flow)
    reference = list(done.values())[-1][0]
    if reference.occlusion is not None:
        counts = counts & (torch.from_numpy(reference.occlusion) == 0)
    first = census(before)
    for setting, (result, spent_ms) in done.items():
        distance = census_distance(first, census(warp(image, flows[setting])))
        yield {'setting': setting, 'frame': index, 'census': float(distance[counts].mean()),
               'ms': spent_ms, 'steps': result.iterations, 'was_warm': result.warm}


COLUMNS = {'epe': ('EPE, px', '{:.2f}'), 'epe_seen': ('EPE not occluded, px', '{:.2f}'),
           'fl_all': ('Fl-all, %', '{:.1f}'), 'census': ('photometric (census) error', '{:.4f}')}


def tabled(rows: list[dict[str, Any]], settings: tuple[Setting, ...]) -> list[dict[str, Any]]:
    """Print the means of every setting as a table, and return them."""
    shown = [name for name in COLUMNS if name in rows[0]]
    print('| start | iterations per level | '
          + ' | '.join(COLUMNS[name][0] for name in shown) + ' | steps | ms per frame |')
    print('|---' * (4 + len(shown)) + '|')
    table = []
    for setting in settings:
        mine = [row for row in rows if row['setting'] == setting]
        means = {name: float(np.mean([row[name] for row in mine])) for name in shown}
        steps = float(np.mean([row['steps'] for row in mine]))
        spent_ms = float(np.median([row['ms'] for row in mine]))
        print(f'| {"warm" if setting[0] else "cold"} | {setting[1]} | '
              + ' | '.join(COLUMNS[name][1].format(means[name]) for name in shown)
              + f' | {steps:.1f} | {spent_ms:.0f} |')
        table.append({'warm': setting[0], 'iterations': setting[1], **means, 'steps': steps,
                      'ms_p50': spent_ms, 'frames': len(mine),
                      'refused': sum(setting[0] and not row['was_warm'] for row in mine)})
    return table


def main() -> None:
    """Measure all settings on the same frames."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', default='dip_rt')
    parser.add_argument('--weights', default='default')
    parser.add_argument('--size', default='512x384', help='WIDTHxHEIGHT')
    parser.add_argument('--source', help='a real stream instead of procedural ones')
    parser.add_argument('--settings', choices=('all', 'few'), default='all',
                        help='few: two warm, two cold and eight cold iterations')
    parser.add_argument('--sequences', type=int, default=60)
    parser.add_argument('--frames', type=int, default=4, help='that count, of each sequence')
    parser.add_argument('--motion-px', type=float, default=110.0,
                        help='of the fastest layer per frame; lengths are log-uniform from 0.3')
    parser.add_argument('--seed', type=int, default=90210)
    parser.add_argument('--runtime', default='auto')
    parser.add_argument('--threads', type=int)
    parser.add_argument('--json', type=Path)
    options = parser.parse_args()
    size = width, height = parse_size(options.size)
    settings = ISSUE if options.settings == 'few' or options.source else SETTINGS
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    runtime = best_runtime(create_runtime(options.runtime, create(options.network,
                                                                  options.weights),
                                          threads=options.threads), height, width)
    estimators = make_estimators(runtime, settings)
    next(iter(estimators.values())).prepare(height, width)
    measure = real if options.source else procedural
    with torch.inference_mode():
        rows = list(measure(estimators, size, options))
    if not rows:
        parser.error(f'{options.source}: no frame counts; expected at least {FIRST + 2} of them')
    what = (Path(options.source).name if options.source else
            f'{options.sequences} sequences of {options.frames} frames that count, motion to '
            f'{options.motion_px:g} px a frame')
    print(f'{options.network} on {runtime.name}, {width}x{height}, {what}')
    table = tabled(rows, settings)
    if options.json:
        options.json.write_text(json.dumps({
            'machine': {'system': platform.system(), 'machine': platform.machine()},
            # Without the folders of whoever runs it.
            'command': ' '.join(['python bench/warm_start.py',
                                 *(word.rpartition('/')[2] or word for word in sys.argv[1:])]),
            'network': options.network, 'runtime': runtime.name, 'size': options.size,
            'stream': what, 'results': table}, indent=2) + '\n')


if __name__ == '__main__':
    main()
