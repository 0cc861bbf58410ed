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

"""MSCSL's three variants at small scale, on the procedural world, with 1 to 4 scales.

    python bench/mscsl_variants.py --steps 600 --encoder models/mscsl.safetensors

Trains 'wosr' (FlowNet's refinement), 'wor' (the spatial Conv-GRU) and 'full' (the last sixth of
it with the reconstruction loss), with and without scale dropout, on the same batches in the same
order, and evaluates each with 1, 2, 3 and 4 scales on scenes of another seed. What comes after
the encoder is always trained from nothing; without a trained encoder a few hundred steps teach
none of them to match, and there is nothing to compare. Prints the tables. The JSON file is
written after every variant, and what it holds is not trained again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_training import (
    arguments,
    cells,
    compare,
    encoder_of,
    evaluate,
    images,
    MEASURES,
    runs_of,
    train,
)
import torch
from torch import Generator, Tensor

from flow_ros.networks import count_parameters, create
from flow_ros.networks.mscsl import MSCSL, SCALES
from flow_ros.training.augment import Batch
from flow_ros.training.objectives import make_objective
from flow_ros.training.recipe import Recipe, Stage

MOTION_PX = 24.0
TRAIN = Stage(1.0, batch=4, render=(160, 224), crop=(128, 192), largest_motion_px=MOTION_PX)
HELD_OUT = Stage(1.0, batch=4, render=(224, 288), crop=(192, 256), largest_motion_px=MOTION_PX)
WIDTHS = {'widths': [32, 64, 128], 'features': 128, 'state': 64, 'head': 48}
RECONSTRUCTION = 0.005
RECONSTRUCTED_SHARE = 1 / 6
"""Of the training of 'full': the paper's 100k of 600k steps."""


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    label: str
    variant: str
    scale_dropout: float


VARIANTS = {
    f'{variant}, dropout {dropout:g}': Variant(f'{words}, scale dropout {dropout:g}', variant,
                                               dropout)
    for dropout in (0.0, 0.25) for variant, words in (
        ('wosr', 'MSCSL/wosr: refinement'), ('wor', 'MSCSL/wor: Conv-GRU'),
        ('full', 'MSCSL: Conv-GRU, reconstruction'))}


def main() -> None:
    """Train what is missing and print the tables."""
    parser = arguments(__doc__, VARIANTS, steps=600, json_file='mscsl_variants.json')
    parser.add_argument('--matching', type=float, default=2.0, help='weight of its loss')
    parser.add_argument('--encoder', type=Path, help='weights whose encoder all begin with')
    options = parser.parse_args()
    encoder = encoder_of('mscsl', options.encoder)

    def run_one(name: str, seen: list[Batch], held_out: list[Batch],
                seed: int) -> dict[str, Any]:
        return run(VARIANTS[name], seen, held_out, seed, options.learning_rate,
                   options.matching, name, encoder)

    settings = {'matching': options.matching, 'options': WIDTHS,
                'encoder': options.encoder.name if options.encoder else None}
    print(tables(compare(options, TRAIN, HELD_OUT, run_one, settings)))


def run(variant: Variant, batches: list[Batch], held_out: list[Batch], seed: int,
        learning_rate: float, matching: float, name: str,
        encoder: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Train ``variant`` on ``batches``, once each, and measure it at every number of scales."""
    device = batches[0].flow.device
    torch.manual_seed(seed)  # the initial weights
    network = create('mscsl', variant=variant.variant, **WIDTHS)
    assert isinstance(network, MSCSL)
    if encoder is not None:
        network.encoder.load_state_dict(encoder)
    network.to(device)

    def objective(reconstruction: float) -> Any:
        return make_objective(
            Recipe(network='mscsl', matching=matching, objective={
                'scale_dropout': variant.scale_dropout, 'reconstruction': reconstruction,
                'refinement': 0.1 if variant.variant == 'wosr' else 0.0}),
            lambda: torch.autocast(device.type, torch.bfloat16))

    supervised, reconstructed = objective(0.0), objective(RECONSTRUCTION)
    steps = iter(range(len(batches)))

    def loss_of(batch: Batch, random: Generator) -> Tensor:
        late = next(steps) >= (1 - RECONSTRUCTED_SHARE) * len(batches)
        chosen = reconstructed if late and variant.variant == 'full' else supervised
        first, second = images(batch)
        total: Tensor = chosen(network, Batch(first, second, batch.flow, batch.occlusion),
                               random).total
        return total

    loss = train(network, batches, loss_of, seed=seed, learning_rate=learning_rate, name=name)
    scales = {}
    for count in range(1, len(SCALES) + 1):
        def flow_of(batch: Batch, count: int = count) -> Tensor:
            return network(*images(batch), iterations=count).flow

        scales[str(count)] = evaluate(network, flow_of, held_out)
    return {**scales[str(len(SCALES))], 'scales': scales, 'loss': loss,
            'parameters': count_parameters(network)}


def tables(results: dict[str, Any]) -> str:
    """Return the markdown tables; with several seeds each measure has its spread."""
    zero, settings = results['zero_flow'], results['settings']
    began = (f' The encoder begins with that of {settings["encoder"]}.' if settings['encoder']
             else '')
    lines = [f'{settings["steps"]} steps of {settings["batch"]} pairs of '
             f'{settings["crop"][1]}x{settings["crop"][0]} px, motion to '
             f'{settings["motion_px"]:g} px; {settings["held_out"]} held-out pairs. '
             f'{results["machine"]}.{began}',
             f'Zero flow has EPE {zero["epe"]:.2f} px, Fl-all {zero["fl_all"]:.1f} %, 1px '
             f'{zero["outliers_1px"]:.1f} %.', '',
             '| Variant | EPE, px | Fl-all, % | 1px outliers, % | parameters | runs |',
             '|---|---|---|---|---|---|']
    known = {name: runs for name in VARIANTS if (runs := runs_of(results, name))}
    for name, runs in known.items():
        lines.append(f'| {VARIANTS[name].label} | {cells(runs)} | {runs[0]["parameters"]:,} | '
                     f'{len(runs)} |')
    for measure in MEASURES:
        lines += ['', f'{measure} at 1, 2, 3 and 4 scales:', '',
                  '| Variant | 1 | 2 | 3 | 4 |', '|---|---|---|---|---|']
        for name, runs in known.items():
            means = [sum(run['scales'][str(count)][measure] for run in runs) / len(runs)
                     for count in range(1, len(SCALES) + 1)]
            lines.append(f'| {VARIANTS[name].label} | '
                         f'{" | ".join(f"{mean:.2f}" for mean in means)} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
