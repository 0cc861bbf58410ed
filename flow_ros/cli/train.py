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

"""``flow_ros train``: train a network by a recipe, resuming where it stopped."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from flow_ros.cli import CommandError

EXIT_INTERRUPTED = 130


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser('train', help='train a network by a recipe')
    parser.add_argument('--recipe', type=Path, default=Path('config/train/dip_rt.yaml'),
                        help='YAML recipe (default: %(default)s)')
    parser.add_argument('--out', type=Path, help='folder of checkpoints, weights and log; a '
                        'checkpoint found there is resumed (default: out/train/RECIPE)')
    length = parser.add_mutually_exclusive_group()
    length.add_argument('--minutes', type=float, help='wall-clock length, in place of the '
                        "recipe's; the schedule is fitted to it and ends complete")
    length.add_argument('--steps', type=int, help='length in optimizer steps, in place of the '
                        "recipe's; the run can then be repeated exactly")
    parser.add_argument('--weights', type=Path, help='weights to begin with')
    parser.add_argument('--data-root', type=Path, help="folder that the recipe's data sets are in")
    parser.add_argument('--device', help='torch device (default: cuda where there is one)')
    parser.add_argument('--precision', help="bf16-mixed or 32-true, in place of the recipe's")
    parser.add_argument('--accumulate', type=int, help='parts in which a batch is worked off: '
                        'less memory, the same steps')
    parser.add_argument('--threads', type=int, help='CPU threads')


def run(options: argparse.Namespace) -> int:
    """Train; returns the exit status."""
    import torch

    from flow_ros.training.checkpoints import SaveError
    from flow_ros.training.recipe import check_recipe, read_recipe
    from flow_ros.training.trainer import Trainer

    if options.threads is not None:
        if options.threads < 1:
            raise CommandError(f'--threads must be at least 1; seen {options.threads}')
        torch.set_num_threads(options.threads)
    changes: dict[str, Any] = {name: getattr(options, name) for name in
                               ('minutes', 'steps', 'precision', 'accumulate')
                               if getattr(options, name) is not None}
    if options.minutes is not None:
        changes['steps'] = None
    try:
        recipe = replace(read_recipe(options.recipe), **changes)
        check_recipe(recipe, str(options.recipe))
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    device = None
    if options.device:
        try:
            device = torch.device(options.device)
            torch.empty(0, device=device)  # the way to learn that a device is there
        except (RuntimeError, AssertionError) as error:
            raise CommandError(f'--device {options.device}: {str(error).splitlines()[0]}') \
                from error
    out = options.out or Path('out/train') / options.recipe.stem
    try:
        trainer = Trainer(recipe=recipe, folder=out, device=device, initial=options.weights,
                          data_root=options.data_root)
        progress = trainer.run()
    except (ValueError, SaveError) as error:  # weights, state, data or disk
        raise CommandError(str(error)) from error
    if not trainer.crew.first:
        return EXIT_INTERRUPTED if trainer.interrupted else 0
    told = f'{progress.step} steps, {progress.pairs} pairs, {progress.minutes:.1f} min'
    if trainer.interrupted:
        print(f'{told}: stopped at {100 * trainer.share:.0f} % of the schedule; the same command '
              f'goes on from {trainer.checkpoints.latest()}')
        return EXIT_INTERRUPTED
    print(f'{told}: {out / "weights.safetensors"}')
    return 0
