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

"""Which weights are better: all of them on the same held-out scenes of the procedural world.

    python bench/validation.py models/dip_rt.safetensors out/train/dip_rt/weights.safetensors

The measure by which shipped weights are chosen; real pairs are looked at afterwards, never used
to choose. Scenes and cameras are those of the recipe, with a seed nobody trains on. Every row
is a mean over pairs: endpoint error (px), Fl-all (%) and the pixels off by more than 1 px (%).
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from flow_ros.networks import create
from flow_ros.training.crew import Crew
from flow_ros.training.recipe import read_recipe
from flow_ros.training.validation import Validation

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure all weights that are named."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('weights', nargs='*', default=['default'], help='files, or "default"')
    parser.add_argument('--recipe', type=Path, default=ROOT / 'config/train/dip_rt.yaml')
    parser.add_argument('--pairs', type=int, default=96)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    options = parser.parse_args()
    recipe = read_recipe(options.recipe)
    recipe = replace(recipe, validation=replace(recipe.validation, pairs=options.pairs,
                                                iterations=(1, 2, 4, 6, 8), data=()))
    device = torch.device(options.device)
    validation = Validation(recipe, Crew(device, precision='32-true'))
    print(f'{recipe.network}, {options.pairs} held-out pairs of the world of '
          f'{options.recipe.name}, {device}')
    print('| weights | start | iterations per level | EPE, px | Fl-all, % | over 1 px, % |')
    print('|---|---|---|---|---|---|')
    for weights in tqdm(options.weights, unit='weights'):
        network = create(recipe.network, weights, **recipe.options).to(device)
        metrics = validation.measure(network).metrics
        for name in dict.fromkeys(key.split('/')[0] for key in metrics):
            start, iterations = name.split('_')
            epe, fl_all, off = (metrics[f'{name}/{measure}']
                                for measure in ('epe', 'fl_all', 'outliers_1px'))
            print(f'| {weights} | {start} | {iterations} | {epe:.2f} | {fl_all:.1f} | '
                  f'{off:.1f} |')


if __name__ == '__main__':
    main()
