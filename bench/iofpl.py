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

"""IOFPL's ablation (its Table 1) at small scale: HD3's improvements, one upon the other.

    python bench/iofpl.py --encoder models/hd3_compact.safetensors --json bench/iofpl.json

Trains the compact HD3 (VGG encoder, decoders of 64 channels) on the same batches of the
procedural world in the same order, on both directions of every pair as the paper does, with the
losses of ``flow_ros train``, and evaluates the forward flow on scenes of another seed. The
decoders are trained from nothing; without a trained encoder a thousand steps leave every variant
at zero flow, and there is nothing to compare. Prints the table. The JSON file is written after
every run, and what it holds is not trained again.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
import time
from typing import Any

from small_training import (
    arguments,
    cells,
    compare,
    encoder_of,
    evaluate,
    images,
    keep_fastest,
    runs_of,
    train,
    wait,
)
import torch
from torch import Generator, Tensor
from tqdm import tqdm

from flow_ros.networks import count_parameters, create, FlowNetwork
from flow_ros.networks.hd3 import HD3
from flow_ros.training.augment import Batch
from flow_ros.training.objectives import make_objective
from flow_ros.training.recipe import Recipe, Stage

MOTION_PX = 24.0
TRAIN = Stage(1.0, batch=4, render=(160, 160), crop=(128, 128), largest_motion_px=MOTION_PX)
HELD_OUT = Stage(1.0, batch=4, render=(224, 288), crop=(192, 256), largest_motion_px=MOTION_PX)
TIMED = (448, 1024)
COMPACT: dict[str, Any] = {'encoder': 'vgg', 'context': False, 'decoder_width': 64}


@dataclass(frozen=True)
class Variant:
    """One row of the table: options of the network, and of its objective."""

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)


_STOPPED = {'stop_gradients': True}
_SAMPLED = {**_STOPPED, 'cost': 'sample'}
_SAD = {**_SAMPLED, 'measure': 'sad'}
_CUED = {**_SAD, 'cues': True}
VARIANTS = {
    'baseline': Variant('HD3 baseline'),
    'stop': Variant('+ gradient stopping', _STOPPED),
    'sample': Variant('+ sampling', _SAMPLED),
    'sad': Variant('+ SAD', _SAD),
    'cues': Variant('+ flow cues', _CUED),
    'max-pooling': Variant('+ loss max-pooling', _CUED, {'keep': 0.5}),
    'no sad': Variant('all but SAD (as in `config/train/hd3_compact.yaml`)',
                      {**_SAMPLED, 'cues': True}, {'keep': 0.5}),
}


def main() -> None:
    """Train what is missing and print the table."""
    parser = arguments(__doc__, VARIANTS, steps=600, json_file='iofpl.json')
    parser.add_argument('--encoder', type=Path, help='weights whose encoder all begin with')
    options = parser.parse_args()
    device = torch.device(options.device)
    encoder = encoder_of('hd3', options.encoder)

    def run(name: str, seen: list[Batch], held_out: list[Batch], seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)  # the initial weights
        network = make(name).to(device)
        if encoder is not None:
            network.encoder.load_state_dict(encoder)
        loss = train(network, seen, _loss(network, VARIANTS[name], device), seed=seed,
                     learning_rate=options.learning_rate, name=name)
        return {**evaluate(network, lambda batch: network(*images(batch)).flow, held_out),
                'loss': loss, 'parameters': count_parameters(network)}

    results = compare(options, TRAIN, HELD_OUT, run,
                      {'encoder': options.encoder.name if options.encoder else None})
    keep_fastest(results, milliseconds(options.variants, device), options.json)
    print(table(results))


def make(name: str) -> HD3:
    """Return the untrained network of a variant."""
    network = create('hd3', **COMPACT, **VARIANTS[name].options)
    assert isinstance(network, HD3)
    return network


def _loss(network: FlowNetwork, variant: Variant, device: torch.device
          ) -> Callable[[Batch, Generator], Tensor]:
    """Return what gives the loss of a batch: the objective of ``flow_ros train``."""
    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16)

    objective = make_objective(Recipe(network='hd3', warm=0.0, objective=variant.objective),
                               autocast)

    def loss(batch: Batch, random: Generator) -> Tensor:
        first, second = images(batch)
        return objective(network, replace(batch, image1=first, image2=second), random).total

    return loss


@torch.no_grad()
def milliseconds(names: list[str], device: torch.device, rounds: int = 5) -> dict[str, float]:
    """Return the time of all five levels of one 1024x448 pair, the encoder left out.

    The fastest of many rounds, the variants in turn: other work of the machine only ever adds.
    """
    networks = {name: make(name).to(device) for name in names}
    best = dict.fromkeys(names, float('inf'))
    image = 255 * torch.rand(1, 3, *TIMED, device=device)
    for _ in tqdm(range(rounds), unit='round', desc='times'):
        for name, network in networks.items():
            features = network.encode(image)
            wait(device)
            began = time.perf_counter()
            state = network.start(features, features)
            while state.schedule:
                state = network.step(state)
            wait(device)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
    return best


def table(results: dict[str, Any]) -> str:
    """Return the markdown table; with several seeds each measure has its spread."""
    zero, settings = results['zero_flow'], results['settings']
    began = (f' The encoder begins with that of {settings["encoder"]}.' if settings['encoder']
             else '')
    lines = [f'{settings["steps"]} steps of {settings["batch"]} pairs, both directions, of '
             f'{settings["crop"][1]}x{settings["crop"][0]} px, motion to '
             f'{settings["motion_px"]:g} px; {settings["held_out"]} held-out pairs. '
             f'{results["machine"]}.{began}',
             f'Zero flow has EPE {zero["epe"]:.2f} px, Fl-all {zero["fl_all"]:.1f} %, 1px '
             f'{zero["outliers_1px"]:.1f} %.', '',
             '| Variant | EPE, px | Fl-all, % | 1px outliers, % | parameters | ms, levels of '
             '1024x448 | runs |', '|---|---|---|---|---|---|---|']
    for name, variant in VARIANTS.items():
        runs = runs_of(results, name)
        if runs and name in results['ms']:
            lines.append(f'| {variant.label} | {cells(runs)} | {runs[0]["parameters"]:,} | '
                         f'{results["ms"][name]:.0f} | {len(runs)} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
