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

"""Trains DIP-RT on the procedural world, on a CPU or a GPU, alone or by torchrun, and resumes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
import json
import math
import os
from pathlib import Path
import pickle
import time

import torch
from torch import distributed, Generator, nn, Tensor
from torch.nn import functional
from tqdm import tqdm

from flow_ros.networks import create, save
from flow_ros.networks.dip_rt import DipRt, error_probability
from flow_ros.synthetic.world import World
from flow_ros.training.augment import augment, Batch, degraded_prior
from flow_ros.training.losses import (
    matching_loss,
    mixture_of_laplace,
    occlusion_loss,
    sequence_loss,
)
from flow_ros.training.procedural import Procedural
from flow_ros.training.recipe import Recipe, Stage

WARM_LIMIT_PX = 64.0


@dataclass(frozen=True)
class Crew:
    """The processes that train together: each takes its share of the batch.

    Two processes of one thread each are also the fastest way to use two CPU cores: nothing
    waits at the end of every small operation, only once a step for the gradients.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def from_environment(device: torch.device) -> 'Crew':
        """Join the processes that torchrun has started; alone where it has not."""
        size = int(os.environ.get('WORLD_SIZE', '1'))
        if size > 1 and not distributed.is_initialized():
            distributed.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        return Crew(rank=int(os.environ.get('RANK', '0')), size=size)

    def share(self, batch: int) -> int:
        """Return how many pairs of a batch one process takes; at least one."""
        return max(1, batch // self.size)

    def mean_gradients(self, network: nn.Module) -> None:
        """Replace every gradient by its mean over the crew."""
        if self.size == 1:
            return
        for value in network.parameters():
            if value.grad is None:  # this process's schedule did not use it
                value.grad = torch.zeros_like(value)
        gradients = [value.grad for value in network.parameters() if value.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / self.size).split(
                [gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))

    def agree(self, value: float, device: torch.device) -> float:
        """Return the first process's ``value`` on all."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        distributed.broadcast(shared, src=0)
        return float(shared)


class Average:
    """Exponential moving average of weights and buffers."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {key: value.detach().clone()
                        for key, value in network.state_dict().items()}

    def update(self, network: nn.Module, step: int) -> None:
        """Move towards ``network``; early steps are forgotten faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        state = network.state_dict()
        smooth = [key for key, value in state.items() if value.is_floating_point()]
        # All in one launch: there are two hundred of them.
        torch._foreach_lerp_([self.tensors[key] for key in smooth],
                             [state[key].detach() for key in smooth], 1 - decay)
        for key in state.keys() - set(smooth):
            self.tensors[key].copy_(state[key])


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps, pairs and minutes, over all sessions."""

    step: int = 0
    pairs: int = 0
    minutes: float = 0.0


class Trainer:
    """One run of one recipe in one folder.

    ``folder`` receives ``state.pt`` (to resume), ``weights.safetensors`` (the average) and
    ``log.jsonl``. ``initial`` are weights to begin with (fine-tuning, or improving shipped
    ones); a state in the folder goes before them.
    """

    def __init__(self, *, recipe: Recipe, folder: Path, device: torch.device | None = None,
                 initial: Path | None = None, save_every_s: float = 120.0) -> None:
        self.recipe, self.folder, self.save_every_s = recipe, folder, save_every_s
        self.device = own_device(device)
        self.crew = Crew.from_environment(self.device)
        torch.manual_seed(recipe.seed)  # the initial weights
        network = create(recipe.network, initial)
        if not isinstance(network, DipRt):
            raise ValueError(f'this trainer knows dip_rt; seen {recipe.network!r}')
        self.network = network.to(self.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.world = World(seed=recipe.seed, device=self.device, config=recipe.world)
        self.data = Procedural(self.world, rank=self.crew.rank, processes=self.crew.size,
                               reuse=recipe.reuse)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=recipe.learning_rate,
                                           weight_decay=recipe.weight_decay)
        self.average = Average(self.network, recipe.ema)
        self.progress = Progress()
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / 'state.pt').exists():
            self._resume()

    def run(self) -> Progress:
        """Train until the recipe's minutes are over; save on the way and at the end."""
        recipe = self.recipe
        began, before = time.monotonic(), self.progress.minutes
        saved = began
        bar = tqdm(total=round(recipe.minutes, 1), unit='min', initial=round(before, 1),
                   bar_format='{l_bar}{bar}| {n:.1f}/{total} min {postfix}', mininterval=5,
                   disable=self.crew.rank > 0)
        average_loss = float('nan')
        while self.progress.minutes < recipe.minutes:
            share = self.progress.minutes / recipe.minutes
            loss, error, pairs = self.step(share)
            if math.isfinite(loss):
                average_loss = (loss if math.isnan(average_loss)
                                else 0.98 * average_loss + 0.02 * loss)
            now = time.monotonic()
            minutes = self.crew.agree(before + (now - began) / 60, self.device)
            bar.update(minutes - self.progress.minutes)
            self.progress = Progress(self.progress.step + 1, self.progress.pairs + pairs, minutes)
            bar.set_postfix_str(f'step {self.progress.step} pairs {self.progress.pairs} '
                                f'loss {average_loss:.2f} epe {error:.2f}', refresh=False)
            if self.progress.step % 50 == 0 and self.crew.rank == 0:
                self._log(average_loss, error)
            if now - saved > self.save_every_s and self.crew.rank == 0:
                self.save()
                saved = now
        bar.close()
        if self.crew.rank == 0:
            self._calibrate()
            self.save()
        return self.progress

    def step(self, share: float) -> tuple[float, float, int]:
        """Do one optimizer step at ``share`` of the run: (loss, last EPE in px, pairs)."""
        recipe, step = self.recipe, self.progress.step
        stage = next(stage for stage in recipe.stages if share < stage.until or stage.until >= 1)
        stream = (recipe.seed * 1_000_003 + step) * self.crew.size + self.crew.rank
        random = Generator().manual_seed(stream)
        batch = self.data.batch(step, stage, random)
        for group in self.optimizer.param_groups:
            group['lr'] = recipe.learning_rate * schedule(share, recipe.warmup)
        self.network.train()
        loss, error = self.loss(batch, random)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.crew.mean_gradients(self.network)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip)
        if bool(torch.isfinite(norm)):  # a step that would spoil the weights is left out
            self.optimizer.step()
            self.average.update(self.network, step)
        return float(loss.detach()), float(error), self.crew.share(stage.batch) * self.crew.size

    def loss(self, batch: Batch, random: Generator) -> tuple[Tensor, Tensor]:
        """Return the training loss and the final EPE (px) of one batch."""
        prior, steps16, steps8 = None, _between(2, 4, random), _between(2, 4, random)
        if float(torch.rand(1, generator=random)) < self.recipe.warm:
            prior = degraded_prior(batch.flow, random)
            if float(prior.abs().amax(dim=(1, 2, 3)).median()) < WARM_LIMIT_PX:
                steps16 = 0
            steps8 = _between(1, 3, random)
        elif float(torch.rand(1, generator=random)) < 0.04:
            steps8 = 0  # so that the finest level's first mask serves a cut schedule
        images = [image.contiguous(memory_format=torch.channels_last)
                  for image in (batch.image1, batch.image2)]
        with torch.autocast(self.device.type, torch.bfloat16):
            seen = self.network.predictions(*images, steps16=steps16, steps8=steps8,
                                            prior_flow=prior)
        flow, error = seen.flow.float(), seen.error.float()
        loss = sequence_loss([(level, value.float()) for level, value in seen.levels], flow,
                             batch.flow, self.recipe.gamma)
        loss = loss + self.recipe.matching * matching_loss(
            seen.matches, batch.flow, batch.occlusion, self.network.config.radius)
        loss = loss + 0.2 * mixture_of_laplace(flow, error, batch.flow)
        loss = loss + 0.5 * occlusion_loss(seen.occlusion.float(), batch.occlusion)
        difference = flow.detach() - batch.flow
        epe = torch.hypot(difference[:, 0], difference[:, 1]).mean()
        return loss, epe

    def save(self) -> None:
        """Write the averaged weights, and the state to resume from."""
        self._averaged(lambda: save(self.network, self.folder / 'weights.safetensors', metadata={
            'step': str(self.progress.step), 'pairs': str(self.progress.pairs),
            'minutes': f'{self.progress.minutes:.1f}'}))
        state = {'network': self.network.state_dict(), 'average': self.average.tensors,
                 'progress': vars(self.progress)}
        # Two files, each small enough for what carries at most 16 MiB a file.
        moments = {'optimizer': self.optimizer.state_dict(), 'step': self.progress.step}
        for name, content in (('optimizer', moments), ('state', state)):
            torch.save(content, self.folder / f'{name}.part')
        for name in ('optimizer', 'state'):
            (self.folder / f'{name}.part').replace(self.folder / f'{name}.pt')

    def _resume(self) -> None:
        path = self.folder / 'state.pt'
        try:
            # To the CPU, and from there each to its place: Adam's counters stay on the CPU,
            # where reading them does not wait for the GPU.
            state = torch.load(path, map_location='cpu', weights_only=True)
            self.network.load_state_dict(state['network'])
            self._resume_optimizer(state['progress']['step'])
            self.average.tensors = {key: value.to(self.device)
                                    for key, value in state['average'].items()}
            self.progress = Progress(**state['progress'])
        except (RuntimeError, ValueError, TypeError, KeyError, EOFError, OSError,
                pickle.UnpicklingError) as error:
            raise ValueError(f'{path} cannot be resumed by this version or network '
                             f'({" ".join(str(error).split())[:150]}): train into another '
                             f'folder, or remove it to begin again') from error

    def _resume_optimizer(self, step: int) -> None:
        path = self.folder / 'optimizer.pt'
        moments = torch.load(path, map_location='cpu', weights_only=True)
        if moments['step'] == step:
            self.optimizer.load_state_dict(moments['optimizer'])
        else:  # ended between two renamings: a pity, but no reason to lose the run
            tqdm.write(f'{path} is of step {moments["step"]}, the state of step {step}: '
                       f'the optimizer begins afresh')

    def _averaged(self, act: Callable[[], None]) -> None:
        """Run ``act`` with the averaged weights in the network."""
        own = {key: value.clone() for key, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.average.tensors)
        try:
            act()
        finally:
            self.network.load_state_dict(own)

    def _calibrate(self) -> None:
        """Fit the confidence to held-out scenes, and keep it in the averaged weights."""
        def fit() -> None:
            config = self.recipe.world
            config = replace(config, surfaces=min(64, config.surfaces),  # for a few scenes
                             bank_objects=min(128, config.bank_objects))
            held_out = World(seed=self.recipe.seed + 1, device=self.device, config=config)
            self.average.tensors['calibration'] = calibrate(self.network, held_out,
                                                            self.recipe.stages[-1])
        self._averaged(fit)

    def _log(self, loss: float, error: float) -> None:
        line = {**vars(self.progress), 'loss': round(loss, 4), 'epe': round(error, 3),
                'lr': self.optimizer.param_groups[0]['lr']}
        with (self.folder / 'log.jsonl').open('a') as file:
            file.write(json.dumps(line) + '\n')


def schedule(share: float, warmup: float) -> float:
    """Return the learning rate's factor: a linear rise, then half a cosine down to zero."""
    if share < warmup:
        return 0.05 + 0.95 * share / warmup
    return max(0.002, 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup))))


@torch.no_grad()
def calibrate(network: DipRt, world: World, stage: Stage, *, batches: int = 12) -> Tensor:
    """Return (a, b) such that sigmoid(a logit(p) + b) is the share of small errors at p.

    A logistic regression of (error under max(3 px, 5 %)) on the logit of the mixture's
    probability, over scenes that were not trained on.
    """
    network.eval()
    logits, small = [], []
    for index in range(batches):
        random = Generator().manual_seed(index)
        pairs = world.pairs(index, batch=2, size=stage.render)
        batch = augment(Batch(pairs.image1, pairs.image2, pairs.forward,
                              pairs.occluded_forward), stage.crop, random)
        count = 2 + index % 3
        prior = degraded_prior(batch.flow, random) if index % 3 == 2 else None
        seen = network.predictions(batch.image1, batch.image2, steps16=0 if index % 3 == 2 else
                                   count, steps8=count, prior_flow=prior)
        raw = error_probability(seen.flow, seen.error).clamp(1e-4, 1 - 1e-4)
        length = torch.hypot(batch.flow[:, :1], batch.flow[:, 1:])
        difference = seen.flow - batch.flow
        error = torch.hypot(difference[:, :1], difference[:, 1:])
        logits.append(torch.logit(raw).flatten()[::17])
        small.append((error < (0.05 * length).clamp(min=3)).flatten()[::17].double())
    return logistic_fit(torch.cat(logits).double(), torch.cat(small)).float()


def logistic_fit(x: Tensor, y: Tensor) -> Tensor:
    """Return (a, b) for which sigmoid(a x + b) is the most likely for ``y``, double (N,).

    Newton's method on a convex cost, each step halved until the cost falls: undamped it runs
    away to millions where the start is too sure of itself. A weak prior at (1, 0) keeps it
    finite where all of ``y`` is one.
    """
    design = torch.stack([x, torch.ones_like(x)], dim=1)
    unchanged, fit = x.new_tensor([1.0, 0.0]), x.new_zeros(2)

    def cost(fit: Tensor) -> Tensor:
        likely = functional.binary_cross_entropy_with_logits(design @ fit, y, reduction='sum')
        return likely + (fit - unchanged).square().sum()

    for _ in range(50):
        p = torch.sigmoid(design @ fit)
        gradient = design.T @ (p - y) + 2 * (fit - unchanged)
        hessian = (design * (p * (1 - p))[:, None]).T @ design
        move = torch.linalg.solve(hessian + 2 * torch.diag(torch.ones_like(fit)), gradient)
        now = float(cost(fit))
        while float(cost(fit - move)) > now and float(move.abs().max()) > 1e-9:
            move = move / 2
        fit = fit - move
        if float(move.abs().max()) < 1e-7:
            break
    return fit


def own_device(device: torch.device | None) -> torch.device:
    """Return the device of this process: of torchrun's processes each has a GPU of its own."""
    if device is None:
        device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if str(device) != 'cuda':  # one that is told by its number is taken
        return device
    rank, count = int(os.environ.get('LOCAL_RANK', '0')), torch.cuda.device_count()
    if rank >= count:
        raise ValueError(f'process {rank} of this machine has no GPU: torch sees {count}; start '
                         f'at most one process per GPU, or train on the CPU (--device cpu)')
    return torch.device('cuda', rank)


def _between(low: int, high: int, random: Generator) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=random))
