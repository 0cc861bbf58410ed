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

"""``flow_ros train``: train a network on the procedural world, resuming where it stopped."""

import argparse
from dataclasses import replace
from pathlib import Path

from flow_ros.cli import CommandError


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser('train', help='train a network on the procedural world')
    parser.add_argument('--recipe', type=Path, default=Path('config/train/dip_rt.yaml'),
                        help='YAML recipe (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('out/train/dip_rt'),
                        help='folder of state, weights and log; a state found there is resumed')
    parser.add_argument('--minutes', type=float, help='wall-clock length, in place of the '
                        "recipe's; the schedule is fitted to it and ends complete")
    parser.add_argument('--weights', type=Path, help='weights to begin with')
    parser.add_argument('--device', help='torch device (default: cuda where there is one)')
    parser.add_argument('--threads', type=int, help='CPU threads')


def run(options: argparse.Namespace) -> int:
    """Train; returns the exit status."""
    import torch

    from flow_ros.training.recipe import read_recipe
    from flow_ros.training.trainer import Trainer

    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        recipe = read_recipe(options.recipe)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    if options.minutes is not None:
        recipe = replace(recipe, minutes=options.minutes)
    device = None
    if options.device:
        try:
            device = torch.device(options.device)
            torch.empty(0, device=device)  # the way to learn that a device is there
        except (RuntimeError, AssertionError) as error:
            raise CommandError(f'--device {options.device}: {str(error).splitlines()[0]}') \
                from error
    try:
        trainer = Trainer(recipe=recipe, folder=options.out, device=device,
                          initial=options.weights)
    except ValueError as error:  # weights, state or network that do not fit
        raise CommandError(str(error)) from error
    progress = trainer.run()
    print(f'{progress.step} steps, {progress.pairs} pairs, {progress.minutes:.1f} min: '
          f'{options.out / "weights.safetensors"}')
    return 0
