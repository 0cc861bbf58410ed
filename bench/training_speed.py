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

"""How fast training is: pairs/s of the world alone, the step alone, and both together.

    python bench/training_speed.py [--recipe config/train/dip_rt.yaml] [--device cpu]

The world renders new scenes, each of which training uses ``reuse`` times, so it delivers
``reuse`` x that many pairs; cropping and the camera are part of "batches". The step is what an
optimizer step costs on a batch that is there already. Writes a table (Markdown) to stdout and,
with --out, to a file. On the CPU one process of --threads threads, on every GPU alike one
process; bf16 as in training.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
import os
from pathlib import Path
import platform
import statistics
import tempfile
import time

import torch
from tqdm import tqdm

from flow_ros.training.procedural import Procedural
from flow_ros.training.recipe import read_recipe, Recipe, Stage, Validation
from flow_ros.training.sample_loading import PROCEDURAL
from flow_ros.training.trainer import Progress, Trainer

ROOT = Path(__file__).resolve().parents[1]
WARMUP = 2


def main() -> None:
    """Measure the stages of a recipe on each device there is."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--recipe', type=Path, help='default: dip_rt, and dip_rt_gpu on a GPU')
    parser.add_argument('--device', help='default: the CPU, and CUDA where there is one')
    parser.add_argument('--steps', type=int, default=12, help='measured, of each kind')
    parser.add_argument('--threads', type=int, help='of the CPU')
    parser.add_argument('--out', type=Path, help='file to write the table to')
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    devices = [options.device] if options.device else [
        'cpu', *(['cuda'] if torch.cuda.is_available() else [])]
    lines = ['| Device | Recipe, stage | World | Batches | Step | Together |',
             '|---|---|---|---|---|---|']
    for name in devices:
        device = torch.device(name)
        default = 'dip_rt_gpu' if device.type == 'cuda' else 'dip_rt'
        path = options.recipe or ROOT / 'config' / 'train' / f'{default}.yaml'
        recipe = replace(read_recipe(path), validation=Validation(pairs=0))
        if any(share.name != PROCEDURAL for share in recipe.data):
            parser.error(f'{path} trains on data sets; expected a recipe of the world alone')
        if options.steps < recipe.reuse:
            parser.error(f'--steps must be at least {recipe.reuse}, in which one new scene is '
                         f'rendered; seen {options.steps}')
        for stage in recipe.stages:
            if stage.until == recipe.stages[-1].until or stage.largest_motion_px is None:
                lines.append(row(recipe, stage, device, options.steps, path.stem))
    table = '\n'.join(lines) + '\n\nPairs/s: median (10 to 90 % of the steps).\n'
    print(table)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table)


def row(recipe: Recipe, stage: Stage, device: torch.device, steps: int, name: str) -> str:
    """Return one line of the table."""
    where = f'{name}, {stage.batch} x {stage.crop[1]}x{stage.crop[0]}'
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe=replace(recipe, stages=(replace(stage, until=1.0),)),
                          folder=Path(folder), device=device)
        world = trainer.data
        assert isinstance(world, Procedural)

        def timed(title: str, act: Callable[[int], object]) -> str:
            seconds = []
            for number in tqdm(range(WARMUP + steps), desc=f'{where}: {title}', leave=False):
                synchronize(device)
                began = time.perf_counter()
                act(number)
                synchronize(device)
                seconds.append(time.perf_counter() - began)
            # Of new scenes only every so many steps render one: rates of groups, not of steps.
            group = recipe.reuse if title in ('batches', 'together') else 1
            kept = seconds[WARMUP:]
            sums = [sum(kept[at:at + group]) / group
                    for at in range(0, len(kept) - group + 1, group)]
            rates = sorted(stage.batch / value for value in sums)
            tenth = len(rates) // 10
            return (f'{statistics.median(rates):.3g} '
                    f'({rates[tenth]:.3g} to {rates[-1 - tenth]:.3g})')

        def together(number: int) -> None:
            trainer.step(0.5)
            trainer.progress = Progress(number + 1)

        def step_alone(number: int) -> None:
            trainer.progress = Progress(number)
            trainer.step(0.5)

        def batch(number: int) -> object:
            return world.batch(number, stage, trainer._random(number))

        cells = [timed('world', lambda number: world.world.clip(
                     10_000 + number, size=stage.render, batch=stage.batch,
                     frames=world.frames, largest_motion_px=stage.largest_motion_px)),
                 timed('batches', batch)]
        fixed = batch(0)
        trainer.data = _Fixed(fixed)
        cells.append(timed('step', step_alone))
        trainer.data = Procedural(world.world, reuse=recipe.reuse)
        trainer.progress = Progress()
        cells.append(timed('together', together))
    return f'| {described(device)} | {where} | ' + ' | '.join(cells) + ' |'


class _Fixed:
    """The same batch for every step."""

    def __init__(self, batch: object) -> None:
        self.fixed = batch

    def batch(self, step: int, stage: Stage, random: torch.Generator) -> object:
        """Return it."""
        return self.fixed


def described(device: torch.device) -> str:
    """Return the name of a device."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f'CPU ({platform.machine()}, {os.cpu_count()} cores), {threads} threads'


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


if __name__ == '__main__':
    main()
