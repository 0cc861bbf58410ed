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

"""The ablations of DIP (its Tables 1 to 3) at small scale, for dip_rt on the procedural world.

    python bench/ablations.py --steps 500 --seeds 2 --json ablations.json

Trains every variant of ``DipRtConfig`` from nothing on the same batches in the same order,
with the losses of the trainer, and evaluates it on scenes of another seed. Prints the tables.
The JSON file is written after every variant, and what it holds is not trained again.
"""

from dataclasses import dataclass, field
import time
from typing import Any

from small_training import (
    arguments,
    cells,
    compare,
    evaluate,
    images,
    keep_fastest,
    runs_of,
    train,
    wait,
)
import torch
from torch import Generator, Tensor
from torch.nn import functional
from tqdm import tqdm

from flow_ros.networks import count_parameters, create
from flow_ros.networks.dip_rt import DipRt
from flow_ros.ops.matching import shifted_flows
from flow_ros.training.augment import Batch
from flow_ros.training.losses import (
    matching_loss,
    mixture_of_laplace,
    occlusion_loss,
    sequence_loss,
    SHARPNESS,
)
from flow_ros.training.recipe import Stage

MOTION_PX = 24.0
TRAIN = Stage(1.0, batch=4, render=(160, 192), crop=(128, 160), largest_motion_px=MOTION_PX)
HELD_OUT = Stage(1.0, batch=4, render=(224, 288), crop=(192, 256), largest_motion_px=MOTION_PX)
ITERATIONS = 4
TIMED = (480, 640)


@dataclass(frozen=True)
class Variant:
    """One network of the tables; ``random_start``: from uniform noise, as DIP, not from zero."""

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    random_start: bool = False


VARIANTS = {
    'both, N=4, r=4': Variant('propagation and search, N = 4, r = 4 (as shipped)'),
    'search, r=4': Variant('search alone, r = 4', {'propagation': 'none'}),
    'both, N=4, r=1': Variant('propagation and search, N = 4, r = 1', {'radius': 1}),
    'search, r=1': Variant('search alone, r = 1', {'propagation': 'none', 'radius': 1}),
    'inverse alone': Variant('propagation alone, N = 4, inverse', {'search': False}),
    'clean alone': Variant('propagation alone, N = 4, clean, random start',
                           {'search': False, 'propagation': 'clean'}, random_start=True),
    'both, N=4, r=2': Variant('N = 4, r = 2', {'radius': 2}),
    'clean, N=4, r=2': Variant('clean, N = 4, r = 2', {'propagation': 'clean', 'radius': 2}),
    'both, N=8, r=2': Variant('N = 8, r = 2', {'seeds': 8, 'radius': 2}),
    'both, N=4, r=3': Variant('N = 4, r = 3', {'radius': 3}),
    'clean, N=4, r=4': Variant('clean, N = 4, r = 4', {'propagation': 'clean'}),
}
TABLES = {
    'What an iteration does (DIP, Table 1)': (
        'inverse alone', 'clean alone', 'search, r=1', 'both, N=4, r=1', 'search, r=4',
        'both, N=4, r=4'),
    'Seeds and radius (DIP, Table 2), inverse propagation and search': (
        'both, N=4, r=1', 'both, N=4, r=2', 'both, N=4, r=3', 'both, N=4, r=4',
        'both, N=8, r=2'),
    'Clean and inverse propagation (DIP, Table 3), with search': (
        'clean, N=4, r=2', 'both, N=4, r=2', 'clean, N=4, r=4', 'both, N=4, r=4'),
}


def main() -> None:
    """Train what is missing and print the tables."""
    options = arguments(__doc__, VARIANTS, steps=500, json_file='ablations.json').parse_args()

    def run_one(name: str, seen: list[Batch], held_out: list[Batch],
                seed: int) -> dict[str, Any]:
        return run(VARIANTS[name], seen, held_out, seed, options.learning_rate, name)

    results = compare(options, TRAIN, HELD_OUT, run_one, {'iterations': ITERATIONS})
    keep_fastest(results, milliseconds(options.variants, torch.device(options.device)),
                 options.json)
    print(tables(results))


def run(variant: Variant, batches: list[Batch], held_out: list[Batch], seed: int,
        learning_rate: float, name: str) -> dict[str, Any]:
    """Train ``variant`` on ``batches``, once each, and measure it."""
    torch.manual_seed(seed)  # the initial weights
    network = create('dip_rt', **variant.options)
    assert isinstance(network, DipRt)
    network.to(batches[0].flow.device)
    loss = train(network, batches,
                 lambda batch, random: training_loss(network, batch, variant, random),
                 seed=seed, learning_rate=learning_rate, name=name)
    random = Generator().manual_seed(20)
    measured = evaluate(network, lambda batch: estimate(network, batch, variant, random),
                        held_out)
    return {**measured, 'loss': loss, 'parameters': count_parameters(network)}


def training_loss(network: DipRt, batch: Batch, variant: Variant, random: Generator) -> Tensor:
    """Return the trainer's loss for dip_rt; the same draws of ``random`` for every variant."""
    steps16, steps8 = (int(count) for count in torch.randint(2, 5, (2,), generator=random))
    start = start_flow(batch.flow, random)
    with torch.autocast(batch.flow.device.type, torch.bfloat16):
        seen = network.predictions(*images(batch), steps16=steps16, steps8=steps8,
                                   prior_flow=start if variant.random_start else None)
    flow = seen.flow.float()
    occlusion = batch.occlusion
    assert occlusion is not None  # the world knows it
    matching = (matching_loss(seen.matches, batch.flow, occlusion, network.config.radius)
                if network.config.search
                else seeds_loss(network, seen.matches, batch.flow, occlusion))
    levels = [(level, value.float()) for level, value in seen.levels]
    return (sequence_loss(levels, flow, batch.flow, 0.8) + 2.0 * matching
            + 0.2 * mixture_of_laplace(flow, seen.error.float(), batch.flow)
            + 0.5 * occlusion_loss(seen.occlusion.float(), occlusion))


def seeds_loss(network: DipRt, matches: list[tuple[int, Tensor, Tensor]], truth: Tensor,
               occlusion: Tensor) -> Tensor:
    """Return the matching loss where only seeds are tried: the nearest one should be best.

    Pixels that are occluded, or of which no seed comes within 1 level px, are left out.
    """
    seeds = network.config.seed_steps
    loss = truth.new_zeros(())
    for level, costs, flow in matches:
        centre = (..., slice(level // 2, None, level), slice(level // 2, None, level))
        if network.config.propagation == 'clean':
            tried = torch.stack(shifted_flows(flow, seeds), dim=1)  # (B, S, 2, h, w)
        else:
            tried = flow[:, None] + flow.new_tensor(seeds)[None, :, :, None, None]
        away = tried - truth[centre][:, None] / level
        nearest, target = torch.hypot(away[:, :, 0], away[:, :, 1]).min(dim=1)  # (B, h, w)
        reached = (nearest < 1) & ~occlusion[centre][:, 0]
        entropy = functional.cross_entropy(SHARPNESS * costs.float(), target, reduction='none')
        loss = loss + (entropy * reached).sum() / reached.sum().clamp(min=1)
    return loss / len(matches)


def start_flow(like: Tensor, random: Generator) -> Tensor:
    """Return uniform noise of the world's motion, one value per cell at 1/16, as full px."""
    batch, _, height, width = like.shape
    cells = torch.rand(batch, 2, height // 16, width // 16, generator=random)
    noise = MOTION_PX * (2 * cells - 1)
    return noise.repeat_interleave(16, 2).repeat_interleave(16, 3).to(like.device)


def estimate(network: DipRt, batch: Batch, variant: Variant, random: Generator) -> Tensor:
    """Return the flow of ``batch`` (B, 2, H, W)."""
    start = start_flow(batch.flow, random)
    flow: Tensor = network.predictions(batch.image1.float(), batch.image2.float(),
                                       steps16=ITERATIONS, steps8=ITERATIONS,
                                       prior_flow=start if variant.random_start else None).flow
    return flow


@torch.no_grad()
def milliseconds(names: list[str], device: torch.device, rounds: int = 20) -> dict[str, float]:
    """Return the time of one iteration at both levels of one 640x480 pair, of each variant.

    The fastest of many rounds, the variants in turn: other work of the machine only ever adds.
    """
    networks = {name: create('dip_rt', **VARIANTS[name].options).to(device) for name in names}
    best = dict.fromkeys(names, float('inf'))
    image = 255 * torch.rand(1, 3, *TIMED, device=device)
    for _ in tqdm(range(rounds + 1), unit='round', desc='times'):
        for name, network in networks.items():
            features = network.encode(image)
            state = network.start(features, features, iterations=1)
            wait(device)
            began = time.perf_counter()
            while state.schedule:
                state = network.step(state)
            wait(device)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
    return best


def tables(results: dict[str, Any]) -> str:
    """Return the markdown tables; with several seeds each measure has its spread."""
    zero, settings = results['zero_flow'], results['settings']
    lines = [f'{settings["steps"]} steps of {settings["batch"]} pairs of '
             f'{settings["crop"][1]}x{settings["crop"][0]} px, motion to '
             f'{settings["motion_px"]:g} px; {settings["held_out"]} held-out pairs, '
             f'{settings["iterations"]} iterations per level. {results["machine"]}.',
             f'Zero flow has EPE {zero["epe"]:.2f} px, Fl-all {zero["fl_all"]:.1f} %, 1px '
             f'{zero["outliers_1px"]:.1f} %.']
    for title, names in TABLES.items():
        lines += ['', f'### {title}', '',
                  '| Variant | EPE, px | Fl-all, % | 1px outliers, % | parameters | '
                  'ms per iteration | runs |', '|---|---|---|---|---|---|---|']
        for name in names:
            runs = runs_of(results, name)
            if not runs or name not in results['ms']:
                continue
            lines.append(f'| {VARIANTS[name].label} | {cells(runs)} | '
                         f'{runs[0]["parameters"]:,} | {results["ms"][name]:.0f} | '
                         f'{len(runs)} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
