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

"""Measure what fine-tuning without labels does to the true error on a robot of a strange look.

``python bench/finetune_robot.py --steps 100`` renders two procedural robots, whose look differs
from the training world (other textures by a tone curve that folds, a long exposure, dark corners,
little contrast, noise), writes their frames into folders, runs ``flow_ros finetune`` on each,
which sees the frames alone, and measures the true error on the pairs that were held out. The
table goes to bench/FINETUNE.md by hand, with the machine.
"""

import argparse
from dataclasses import dataclass
import json
from pathlib import Path
import tempfile
import time

import cv2
import numpy as np
from numpy.typing import NDArray
import torch
from tqdm import tqdm

from flow_ros.cli.main import main as flow_ros
from flow_ros.evaluation import (
    Calibration,
    DisFlow,
    Estimate,
    Estimator,
    flow_metrics,
    mean_metrics,
    network_estimator,
)
from flow_ros.flow_io import write_image
from flow_ros.networks import create
from flow_ros.synthetic.sequence import SyntheticFrame, SyntheticSequence


@dataclass(frozen=True)
class Robot:
    """A look; light in 0..255."""

    name: str
    seed: int
    folds: float
    """Of the tone curve: how often it rises and falls from black to white."""
    colour: float
    vignetting: float
    low: float
    contrast: float
    noise: float
    exposure: float = 0.5
    """Share of a frame's time for which the shutter is open."""
    motion_px: float = 20.0


ROBOTS = (Robot('cellar', seed=101, folds=2.5, colour=0.5, vignetting=1.2, low=40, contrast=60,
                noise=5),
          Robot('greenhouse', seed=202, folds=1.5, colour=1.0, vignetting=0.7, low=20,
                contrast=90, noise=4))


def look(frame: SyntheticFrame, robot: Robot, random: np.random.Generator) -> NDArray[np.uint8]:
    """Return the frame as the robot's camera sees it; nothing moves, so the truth stays."""
    height, width = frame.image.shape[:2]
    light = frame.image.astype(np.float32) / 255
    tone = 2 * np.pi * robot.folds * light.mean(axis=2, keepdims=True)
    light = 0.5 + 0.4 * np.sin(tone + np.float32([0, 0.6, 1.2])) + 0.2 * (light - 0.5)
    light = robot.colour * light + (1 - robot.colour) * light.mean(axis=2, keepdims=True)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    instants = np.linspace(-robot.exposure / 2, robot.exposure / 2, 7, dtype=np.float32)
    light = np.mean([cv2.remap(light, x + t * frame.flow_forward[..., 0],
                               y + t * frame.flow_forward[..., 1], cv2.INTER_LINEAR,
                               borderMode=cv2.BORDER_REPLICATE) for t in instants], axis=0)
    radius = np.hypot(x - width / 2, y - height / 2) / np.hypot(width / 2, height / 2)
    light = light / (1 + robot.vignetting * radius[..., None] ** 2) ** 2
    seen = robot.low + robot.contrast * light + random.normal(0, robot.noise, light.shape)
    return np.clip(np.rint(seen), 0, 255).astype(np.uint8)


def main() -> None:
    """Run all robots and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--frames', type=int, default=80)
    parser.add_argument('--size', type=int, nargs=2, default=(320, 240))
    parser.add_argument('--steps', type=int, default=100)
    parser.add_argument('--robot', choices=[robot.name for robot in ROBOTS], help='this one only')
    parser.add_argument('--weights', default='default')
    parser.add_argument('--seed', type=int, default=0, help='of the fine-tuning')
    parser.add_argument('--out', type=Path, help='keep frames, weights and reports here')
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        print('| robot | | EPE, px | EPE not occluded | Fl-all, % | over 1 px, % | '
              'calibration error | verdict | CPU s |\n|---|---|---|---|---|---|---|---|---|')
        for robot in ROBOTS:
            if options.robot in (None, robot.name):
                run(robot, folder / robot.name, options)


def run(robot: Robot, folder: Path, options: argparse.Namespace) -> None:
    """Render one robot, fine-tune on its frames, and print its rows."""
    sequence = SyntheticSequence(*options.size, robot.seed, motion_px=robot.motion_px)
    random = np.random.default_rng(robot.seed)
    (folder / 'frames').mkdir(parents=True, exist_ok=True)
    truth, images = [], []
    for index in tqdm(range(options.frames), desc=robot.name, leave=False):
        frame = sequence.frame(index)
        truth.append((frame.flow_forward, frame.occlusion_forward))
        images.append(look(frame, robot, random))
        write_image(folder / 'frames' / f'{index:04d}.png', images[-1])
    began = time.process_time()
    status = flow_ros(['finetune', '--source', str(folder / 'frames'), '--out', str(folder),
                       '--steps', str(options.steps), '--threads', '1', '--device', 'cpu',
                       '--weights', options.weights, '--seed', str(options.seed)])
    seconds = time.process_time() - began
    if status:
        raise SystemExit(status)
    report = json.loads((folder / 'report.json').read_text())
    pairs = [row['index'] for row in report['comparisons']]
    estimators: dict[str, Estimator] = {
        'before': network_estimator(create('dip_rt', options.weights)),
        'after': network_estimator(create('dip_rt', folder / 'weights.safetensors')),
        'DIS medium': DisFlow()}
    for name, estimator in estimators.items():
        calibration, rows = Calibration(), []
        for index in pairs:
            made = estimator(images[index], images[index + 1])
            estimate = made if isinstance(made, Estimate) else Estimate(made)
            flow, occlusion = truth[index]
            rows.append(flow_metrics(estimate.flow, flow, occlusion=occlusion))
            if estimate.confidence is not None:
                calibration.add(estimate.confidence, estimate.flow, flow)
        mean = mean_metrics(rows)
        end = f'{report["verdict"]} | {seconds:.0f}' if name == 'after' else ' | '
        sure = '' if np.isnan(calibration.error) else f'{calibration.error:.3f}'  # DIS is not
        print(f'| {robot.name} | {name} | {mean["epe"]:.3f} | {mean["epe_noc"]:.3f} | '
              f'{mean["fl_all"]:.2f} | {mean["outliers_1px"]:.2f} | {sure} | '
              f'{end} |', flush=True)


if __name__ == '__main__':
    main()
