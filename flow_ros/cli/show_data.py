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

"""``flow_ros show-data``: a page of training scenes with their flow and occlusion, to look at."""

import argparse
from pathlib import Path

from flow_ros.cli import CommandError


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser('show-data', help='write a page of training scenes')
    parser.add_argument('--recipe', type=Path, default=Path('config/train/dip_rt.yaml'),
                        help='YAML recipe (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('out/data.png'),
                        help='picture to write (default: %(default)s)')
    parser.add_argument('--rows', type=int, default=8, help='scenes (default: %(default)s)')
    parser.add_argument('--first', type=int, default=0, help='index of the first scene')
    parser.add_argument('--clean', action='store_true',
                        help='as rendered, without what a camera does after the shutter')


def run(options: argparse.Namespace) -> int:
    """Write the page; returns the exit status."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from flow_ros.flow_io import write_image
    from flow_ros.synthetic.camera import CLEAN, develop
    from flow_ros.synthetic.world import World
    from flow_ros.training.recipe import read_recipe
    from flow_ros.visualization import flow_to_color, strip

    if options.rows < 1:
        raise CommandError(f'--rows must be at least 1; seen {options.rows}')
    if options.first < 0:
        raise CommandError(f'--first must be at least 0; seen {options.first}')
    try:
        recipe = read_recipe(options.recipe)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    stage = recipe.stages[-1]
    world = World(seed=recipe.seed, config=recipe.world)
    rows = []
    for index in tqdm(range(options.first, options.first + options.rows), unit='scene'):
        clip = world.clip(index, batch=1, size=stage.render,
                          largest_motion_px=stage.largest_motion_px)
        frames = develop(clip.images, CLEAN if options.clean else recipe.world.camera,
                         torch.Generator().manual_seed(index))
        images = [frame[0].permute(1, 2, 0).round().byte().numpy() for frame in frames]
        flow = clip.forward[0][0].permute(1, 2, 0).numpy()
        occluded = clip.occluded_forward[0][0, 0].numpy().astype(np.uint8) * 255
        longest = float(np.hypot(flow[..., 0], flow[..., 1]).max())
        rows.append(strip([*images, flow_to_color(flow), occluded],
                          ['frame 1', 'frame 2', 'frame 3', f'flow 1 to 2, {longest:.0f} px',
                           'occluded'], height=192))
    width = min(row.shape[1] for row in rows)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_image(options.out, np.vstack([row[:, :width] for row in rows]))
    except (OSError, ValueError) as error:
        raise CommandError(f'--out {options.out}: {error}') from error
    print(options.out)
    return 0
