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

"""What the comparisons of variants at small scale share: batches, the training, the measures.

All variants of a comparison see the same batches of the procedural world, rendered once, with
the same draws, and are measured on the same held-out pairs. Results go to a JSON file after
each run, so a comparison that is started again goes on where it was.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import json
from pathlib import Path
import platform
import time
from typing import Any

import numpy as np
import torch
from torch import Generator, nn, Tensor
from tqdm import tqdm

from flow_ros.evaluation.metrics import flow_metrics
from flow_ros.networks import create
from flow_ros.synthetic.camera import CLEAN
from flow_ros.synthetic.world import World, WorldConfig
from flow_ros.training.augment import Batch
from flow_ros.training.procedural import Procedural
from flow_ros.training.recipe import Stage
from flow_ros.training.trainer import schedule

HELD_OUT_SEED = 1_000_003
MEASURES = ('epe', 'fl_all', 'outliers_1px')


Run = Callable[[str, list[Batch], list[Batch], int], dict[str, Any]]
"""(variant, batches to train on, held-out batches, seed) -> what the JSON keeps of it."""


def arguments(description: str | None, variants: Iterable[str], *, steps: int,
              json_file: str) -> argparse.ArgumentParser:
    """Return the parser of what every comparison can be told."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=steps, help='of training, per variant')
    parser.add_argument('--seeds', type=int, default=1, help='runs of each variant')
    parser.add_argument('--learning-rate', type=float, default=1e-3)
    parser.add_argument('--held-out', type=int, default=48, help='pairs to evaluate on')
    parser.add_argument('--variants', nargs='*', choices=list(variants), default=list(variants))
    parser.add_argument('--json', type=Path, default=Path(json_file))
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=1)
    return parser


def compare(options: argparse.Namespace, stage: Stage, held_out_stage: Stage, run: Run,
            settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run every variant and seed that the JSON file does not hold yet; return all results.

    ``settings``: what else, beside the common options, results must share to be comparable.
    """
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    results = read(options.json, {
        'steps': options.steps, 'batch': stage.batch, 'crop': list(stage.crop),
        'learning_rate': options.learning_rate, 'motion_px': stage.largest_motion_px,
        'held_out': options.held_out, **settings})
    held_out = held_out_batches(held_out_stage, options.held_out, device)
    results['zero_flow'] = zero_flow(held_out)
    for seed in range(options.seeds):
        todo = [name for name in options.variants if f'{name} #{seed}' not in results['runs']]
        if not todo:
            continue
        seen = training_batches(stage, seed, options.steps, device)
        for name in todo:
            began = time.monotonic()
            kept = run(name, seen, held_out, seed)
            results['runs'][f'{name} #{seed}'] = {
                **kept, 'train_s': round(time.monotonic() - began)}
            write(options.json, results)
    write(options.json, results)
    return results


def keep_fastest(results: dict[str, Any], times: Mapping[str, float], path: Path) -> None:
    """Keep the least ``times`` (ms) of each variant, of this and of earlier calls."""
    for name, fastest in times.items():
        results['ms'][name] = min(fastest, results['ms'].get(name, float('inf')))
    write(path, results)


def encoder_of(family: str, path: Path | None) -> dict[str, Tensor] | None:
    """Return the weights of the encoder in the weights file ``path``, None without one."""
    if path is None:
        return None
    encoder = create(family, path).get_submodule('encoder')
    return dict(encoder.state_dict())


def batches(stage: Stage, seed: int, count: int, device: torch.device,
            reuse: int = 2) -> Iterator[Batch]:
    """Yield the batches of a world of its own; images as bytes, to keep them all."""
    world = World(seed=seed, device=device, config=WorldConfig(surfaces=96, bank_objects=192,
                                                               camera=CLEAN))
    data = Procedural(world, reuse=reuse, keep=4 if reuse > 1 else 1, frames=2)
    for step in range(count):
        batch = data.batch(step, stage, Generator().manual_seed(seed * 1_000_003 + step))
        yield Batch(batch.image1.byte(), batch.image2.byte(), batch.flow, batch.occlusion,
                    flow_back=batch.flow_back)


def training_batches(stage: Stage, seed: int, count: int, device: torch.device) -> list[Batch]:
    """Return the batches that every variant is trained on."""
    return list(tqdm(batches(stage, seed, count, device), unit='batch', total=count,
                     desc=f'world, seed {seed}'))


def held_out_batches(stage: Stage, pairs: int, device: torch.device) -> list[Batch]:
    """Return at least ``pairs`` pairs of a world that no training has seen."""
    return list(batches(stage, HELD_OUT_SEED, -(-pairs // stage.batch), device, reuse=1))


def images(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return both images as training takes them: float, channels last."""
    first, second = (image.float().contiguous(memory_format=torch.channels_last)
                     for image in (batch.image1, batch.image2))
    return first, second


def train(network: nn.Module, seen: Sequence[Batch],
          loss_of: Callable[[Batch, Generator], Tensor], *, seed: int, learning_rate: float,
          name: str) -> float:
    """Train ``network`` on ``seen``, once each; return the mean loss of the last tenth.

    ``loss_of`` (batch, a generator: the same draws for every variant) is asked for the loss.
    """
    network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-4)
    random = Generator().manual_seed(seed)
    losses = []
    for step, batch in enumerate(tqdm(seen, unit='step', desc=name, mininterval=5)):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate * schedule(step / len(seen), 0.04)
        loss = loss_of(batch, random)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        if bool(torch.isfinite(norm)):
            optimizer.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses[-max(1, len(losses) // 10):]))


@torch.no_grad()
def evaluate(network: nn.Module, flow_of: Callable[[Batch], Tensor],
             held_out: Sequence[Batch]) -> dict[str, float]:
    """Return the mean measures over all pairs; ``flow_of`` (batch) estimates (B, 2, H, W)."""
    network.eval()
    rows = []
    for batch in held_out:
        for estimate, truth in zip(flow_of(batch), batch.flow):
            rows.append(flow_metrics(estimate.permute(1, 2, 0).cpu().numpy(),
                                     truth.permute(1, 2, 0).cpu().numpy()))
    return {key: float(np.mean([row[key] for row in rows])) for key in MEASURES}


def zero_flow(held_out: Sequence[Batch]) -> dict[str, float]:
    """Return the mean measures of a flow of zero: what has learnt nothing comes to."""
    return evaluate(nn.Identity(), lambda batch: torch.zeros_like(batch.flow), held_out)


def read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the results in ``path``, if they were made with the same settings."""
    if path.exists():
        results: dict[str, Any] = json.loads(path.read_text())
        if results['settings'] != settings:
            raise SystemExit(f'{path} was made with {results["settings"]}, not {settings}: '
                             f'give another --json file')
        return results
    threads = torch.get_num_threads()
    machine = (f'{platform.machine()}, {threads} thread{"s" if threads > 1 else ""}, torch '
               f'{torch.__version__.partition("+")[0]}, bfloat16 autocast')
    return {'settings': settings, 'machine': machine, 'ms': {}, 'runs': {}}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write ``results`` as JSON."""
    path.write_text(json.dumps(results, indent=1) + '\n')


def runs_of(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the runs of the variant ``name``, one per seed; their keys are 'NAME #SEED'."""
    return [run for key, run in results['runs'].items() if key.rpartition(' #')[0] == name]


def cells(runs: Sequence[dict[str, Any]]) -> str:
    """Return the cells of a markdown table for the three measures of ``runs``."""
    return ' | '.join(spread([run[key] for run in runs], digits)
                      for key, digits in zip(MEASURES, (2, 1, 1)))


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean of ``values``, and where there are several, their range."""
    mean = f'{np.mean(values):.{digits}f}'
    if len(values) == 1:
        return mean
    return f'{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})'


def wait(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
