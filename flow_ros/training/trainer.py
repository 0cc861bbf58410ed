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

"""Trains a network by a recipe, on a CPU or GPUs, alone or by torchrun, and resumes exactly."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
import json
import math
from pathlib import Path
import signal
from tempfile import TemporaryFile
import threading
import time
from typing import Any, Protocol

from safetensors import SafetensorError
import torch
from torch import Generator, nn, Tensor
from tqdm import tqdm

from flow_ros.networks import create, save
from flow_ros.synthetic.world import World
from flow_ros.training.augment import Batch
from flow_ros.training.calibration import calibrate
from flow_ros.training.checkpoints import Checkpoints, SaveError
from flow_ros.training.crew import Crew
from flow_ros.training.journal import Journal, say
from flow_ros.training.objectives import make_objective
from flow_ros.training.procedural import Procedural
from flow_ros.training.recipe import changed_fields, Recipe, recipe_text, Stage
from flow_ros.training.sample_loading import PROCEDURAL
from flow_ros.training.validation import held_out, Measured, rooted, Validation

CALIBRATION_BATCHES = 12


class Data(Protocol):
    """Where batches come from."""

    def batch(self, step: int, stage: Stage, random: Generator) -> Batch:
        """Return the batch of ``step``: a function of these arguments alone."""


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
    """How far a run is, over all sessions; ``skipped`` steps had gradients of NaN or infinity."""

    step: int = 0
    pairs: int = 0
    minutes: float = 0.0
    skipped: int = 0


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: what the log tells of it, and how many pairs it took."""

    values: Mapping[str, float]
    pairs: int
    done: bool
    """False: its gradient was not finite, and it was left out."""

    @property
    def loss(self) -> float:
        """The total loss."""
        return self.values['loss']


class Trainer:
    """One run of one recipe in one folder.

    ``folder`` receives ``checkpoints/`` (to resume), ``weights.safetensors`` (the average, with
    the recipe and the last validation in its metadata), ``log.jsonl`` and ``tensorboard/``.
    ``initial`` are weights to begin with (fine-tuning, or improving shipped ones); a checkpoint
    in the folder goes before them. ``data`` are batches in place of those the recipe names.

    Minutes are those of the wall clock: rendering, validation and saving are part of them; only
    the calibration, the last validation and the last save come on top.
    """

    def __init__(self, *, recipe: Recipe, folder: Path, device: torch.device | None = None,
                 initial: Path | None = None, save_every_s: float = 120.0,
                 data_root: Path | None = None, data: Data | None = None) -> None:
        self.recipe, self.folder, self.save_every_s = recipe, folder, save_every_s
        torch.manual_seed(recipe.seed)  # the initial weights
        self.network = create(recipe.network, initial, **recipe.options)
        self.crew = Crew(device, precision=recipe.precision)
        self.device = self.crew.device
        self.network.to(self.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.objective = make_objective(recipe, self.crew.autocast)
        self.validation = Validation(recipe, self.crew, data_root=data_root)
        self.data = data if data is not None else self._data(data_root)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=recipe.learning_rate, betas=recipe.betas,
            eps=recipe.epsilon, weight_decay=recipe.weight_decay)
        self.average = Average(self.network, recipe.ema)
        self.progress = Progress()
        self.interrupted = False
        self.measured: Mapping[str, float] = {}
        self._validated = self.progress
        self._window = Window()
        self._stop = ''
        self.checkpoints = Checkpoints(folder / 'checkpoints')
        if self.crew.first:
            _make_writable(self.checkpoints.folder)
            self._say_shares()
        self._resume(initial)
        self.journal = Journal(folder, step=self.progress.step) if self.crew.first else None

    def run(self) -> Progress:
        """Train to the end of the schedule, or until told to stop; save on the way and after.

        SIGINT (Ctrl-C) and SIGTERM end the run after the step at hand, with a checkpoint;
        ``interrupted`` then tells. A second SIGINT ends it at once.
        """
        try:
            with self._signals():
                self._train()
                if not self.interrupted:
                    self.save(weights=False)  # an interruption from here on costs nothing
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f'{self.device} has too little memory for this step ({str(error).split(".")[0]}):'
                f' work batches off in more parts (--accumulate {2 * self.recipe.accumulate}), '
                f'or set checkpointed: true, or make batch or crop of the recipe smaller; '
                f'{self._kept()}') from error
        except ValueError:  # data that are of no use any more
            self.save()
            raise
        except RuntimeError as error:
            if self.crew.size == 1 or not _is_of_the_network(error):
                raise
            raise ValueError(f'process {self.crew.rank} of {self.crew.size} has lost another one '
                             f'({" ".join(str(error).split())[-120:]}): see what that one has '
                             f'said; {self._kept()}') from error
        finally:
            if (close := getattr(self.data, 'close', None)) is not None:
                close()
        if self.interrupted and self.crew.first:
            say(f'{self._stop or "another process"} ends the run: saving step '
                f'{self.progress.step}')
        if not self.interrupted:
            self._finish()
        if not self.save():
            raise SaveError(f'the last state of the run could not be saved: make room and start '
                            f'again, it goes on from {self.checkpoints.latest()}')
        if self.journal is not None:
            self.journal.close()
        self.crew.barrier()
        return self.progress

    @property
    def share(self) -> float:
        """The share of the schedule that is done, from 0 to 1."""
        recipe = self.recipe
        done = (self.progress.step / recipe.steps if recipe.steps
                else self.progress.minutes / recipe.minutes)
        return min(1.0, done)

    def step(self, share: float) -> StepResult:
        """Do one optimizer step at ``share`` of the run."""
        recipe, began = self.recipe, time.monotonic()
        stage = next(stage for stage in recipe.stages if share < stage.until or stage.until >= 1)
        part = replace(stage, batch=stage.batch // recipe.accumulate)
        rate = recipe.learning_rate * schedule(
            share, recipe.warmup, recipe.anneal, warmup_rate=recipe.warmup_rate,
            milestones=recipe.milestones)
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        told: dict[str, list[Tensor]] = {}
        for number in range(recipe.accumulate):
            index = self.progress.step * recipe.accumulate + number
            random = self._random(index)
            losses = self.objective(self.network, self.data.batch(index, part, random), random,
                                    exponent=stage.exponent)
            self._backward(losses.total / recipe.accumulate)
            for name, value in {'loss': losses.total.detach(), 'epe': losses.epe,
                                **{f'loss_{key}': value for key, value in losses.parts.items()}
                                }.items():
                told.setdefault(name, []).append(value.double())
        self.crew.mean_gradients(self.network)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip)
        told['gradient_norm'] = [norm.double()]
        # Means over the parts that know it; one wait for the device in each step.
        means = [torch.stack(values).nanmean() for values in told.values()]
        values = dict(zip(told, torch.stack(means).tolist()))
        done = math.isfinite(values['gradient_norm'])
        if done:
            self.optimizer.step()
            self.average.update(self.network, self.progress.step)
        else:  # a step that would spoil the weights is left out
            self._mend_buffers()
        values |= {'lr': rate, 'seconds': time.monotonic() - began}
        pairs = self.crew.share(part.batch) * self.crew.size * recipe.accumulate
        return StepResult(values=values, pairs=pairs, done=done)

    def validate(self) -> Mapping[str, float]:
        """Measure the averaged weights; into the log, and into what is saved from here on."""
        measured: list[Measured] = []
        self._averaged(lambda: measured.append(self.validation.measure(self.network)))
        self.measured, self._validated = measured[0].metrics, self.progress
        if self.journal is not None and self.measured:
            self.journal.line(asdict(self.progress), self.measured, kind='validation')
            for number, picture in enumerate(measured[0].pictures):
                self.journal.picture(f'validation/{number}', picture, self.progress.step)
            self.journal.flush()
        return self.measured

    def save(self, *, weights: bool = True, otherwise: str = '') -> bool:
        """Write a checkpoint and the averaged weights; False, and one line, where it failed."""
        if not self.crew.first:
            return True
        state = {'network': self.network.state_dict(), 'average': self.average.tensors,
                 'progress': asdict(self.progress), 'window': self._window.state(),
                 'validated': asdict(self._validated), 'measured': dict(self.measured),
                 'recipe': recipe_text(self.recipe), 'processes': self.crew.size}
        try:
            self.checkpoints.save(self.progress.step, {
                'state': state, 'optimizer': {'optimizer': self.optimizer.state_dict(),
                                              'step': self.progress.step}})
            if weights:
                self._averaged(self._save_weights)
        except SaveError as error:
            say(f'{error}{otherwise}')
            return False
        return True

    def _save_weights(self) -> None:
        path = self.folder / 'weights.safetensors'
        metadata = {'step': str(self.progress.step), 'pairs': str(self.progress.pairs),
                    'minutes': f'{self.progress.minutes:.1f}', 'recipe': recipe_text(self.recipe),
                    'metrics': json.dumps(dict(self.measured))}
        try:
            save(self.network, path, metadata=metadata)
        except (OSError, SafetensorError) as error:
            path.with_name(path.name + '.part').unlink(missing_ok=True)
            raise SaveError(f'{path} could not be written ({" ".join(str(error).split())}); '
                            f'the one before is kept') from error

    def _train(self) -> None:
        """Do steps until the schedule is complete, or somebody wants to stop."""
        began = saved = time.monotonic()
        before, bar = self.progress.minutes, self._bar()
        while self.share < 1 and not self.interrupted:
            result = self.step(self.share)
            now = time.monotonic()
            minutes, self.interrupted = self.crew.agree(before + (now - began) / 60,
                                                        bool(self._stop))
            shown = self.progress.step if self.recipe.steps else self.progress.minutes
            self._advance(result, minutes)
            bar.update((self.progress.step if self.recipe.steps
                        else min(minutes, self.recipe.minutes)) - shown)
            bar.set_postfix_str(self._window.text(self.progress), refresh=False)
            if self.progress.step % self.recipe.log_every == 0:
                self._log()
            if self._validation_is_due():
                self.validate()
            if now - saved > self.save_every_s:
                done = self.save(otherwise='; training goes on, and tries again later')
                saved = time.monotonic() if done else now
        bar.close()

    def _advance(self, result: StepResult, minutes: float) -> None:
        if result.done:
            self._window.add(result)
        now = self.progress
        self.progress = Progress(now.step + 1, now.pairs + result.pairs, minutes,
                                 now.skipped + (not result.done))

    def _log(self) -> None:
        values = self._window.means()
        self._window = Window()
        if self.journal is not None and values:
            self.journal.line(asdict(self.progress), values)

    def _validation_is_due(self) -> bool:
        config, last, now = self.recipe.validation, self._validated, self.progress
        if config.every_steps and now.step % config.every_steps == 0:
            return True
        return (config.every_minutes is not None and self.share < 1
                and now.minutes - last.minutes >= config.every_minutes)

    def _finish(self) -> None:
        """Fit the confidence, where there is one, and measure what the run has come to."""
        if self.network.takes_calibration:
            self._averaged(self._calibrate)
        if not (self.measured and self._validated.step == self.progress.step):
            self.validate()

    def _calibrate(self) -> None:
        """Fit the confidence to held-out scenes, and keep it in the averaged weights."""
        fit = torch.tensor([1.0, 0.0])
        if self.crew.first:
            # Not those that are measured.
            validation = replace(self.recipe.validation, seed=self.recipe.validation.seed + 1,
                                 render=self.recipe.stages[-1].render,
                                 crop=self.recipe.stages[-1].crop)
            batches = held_out(replace(self.recipe, validation=validation), self.device,
                               CALIBRATION_BATCHES)
            fit = calibrate(self.network, batches)
        fit = self.crew.told(fit.cpu())  # the validation starts warm with its confidence
        scale, shift = fit.tolist()
        self.network.set_calibration(scale, shift)
        if 'calibration' in self.average.tensors:  # part of the weights, else of the options
            self.average.tensors['calibration'] = fit.to(self.device)

    def _data(self, data_root: Path | None) -> Data:
        """Return the source of batches that the recipe names."""
        recipe, crew = self.recipe, self.crew
        procedural = None
        if any(share.name == PROCEDURAL for share in recipe.data):
            world = World(seed=recipe.seed, device=self.device, config=recipe.world)
            procedural = Procedural(world, rank=crew.rank, processes=crew.size,
                                    reuse=recipe.reuse)
            if len(recipe.data) == 1:
                return procedural
        from flow_ros.training.data_sets import DataSets
        return DataSets([rooted(share, data_root) for share in recipe.data],
                        augment=recipe.augment, procedural=procedural, rank=crew.rank,
                        processes=crew.size, workers=recipe.workers, device=self.device,
                        random_of=self._random)

    def _random(self, index: int) -> Generator:
        """Return the generator of part ``index`` of the run: the same after every resumption."""
        seed = (self.recipe.seed * 1_000_003 + index) * self.crew.size + self.crew.rank
        return Generator().manual_seed(seed)

    def _say_shares(self) -> None:
        parts = self.recipe.accumulate * self.crew.size
        for stage in self.recipe.stages:
            done = self.crew.share(stage.batch // self.recipe.accumulate) * parts
            if done != stage.batch:
                say(f'a batch of {stage.batch} does not divide into {parts} equal parts '
                    f'({self.crew.size} processes, accumulate {self.recipe.accumulate}): '
                    f'{done} pairs make a step')

    def _kept(self) -> str:
        latest = self.checkpoints.latest()
        return f'the same command goes on from {latest}' if latest else 'nothing is saved yet'

    def _resume(self, initial: Path | None) -> None:
        # Read once and sent around: not all machines need to see the folder.
        path = self.checkpoints.latest() if self.crew.first else None
        path, parts = self.crew.told((path, self.checkpoints.load(path) if path else {}))
        if path is None:
            return
        try:
            # From the CPU each to its place: Adam's counters stay there, where reading them
            # does not wait for the GPU.
            state = parts['state']
            self.network.load_state_dict(state['network'])
            wanted = [{name: group[name] for name in ('betas', 'eps', 'weight_decay')}
                      for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(parts['optimizer']['optimizer'])
            for group, own in zip(self.optimizer.param_groups, wanted):
                group.update(own)  # the recipe's, which may have changed
            self.average.tensors = {key: value.to(self.device)
                                    for key, value in state['average'].items()}
            self.progress = Progress(**state['progress'])
            self._validated = Progress(**state['validated'])
            self.measured = state['measured']
            self._window = Window(**state['window'])
            processes, changed = state['processes'], changed_fields(state['recipe'], self.recipe)
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f'{path} cannot be resumed by this version or network '
                             f'({" ".join(str(error).split())[:150]}). '
                             f'{self.checkpoints.advice(path)}') from error
        if self.crew.first:
            say(f'goes on from {path}')
            if initial is not None:
                say(f'the weights of {initial} are not used: train into another folder to begin '
                    f'with them')
            if changed:
                say(f'the recipe has changed since ({", ".join(changed)}): training goes on by '
                    f'the new one')
            if processes != self.crew.size:
                say(f'it was made by {processes} processes, and now there are '
                    f'{self.crew.size}: the batches will be others')

    def _averaged(self, act: Callable[[], object]) -> None:
        """Run ``act`` with the averaged weights in the network."""
        own = {key: value.clone() for key, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.average.tensors)
        try:
            act()
        finally:
            self.network.load_state_dict(own)

    def _backward(self, loss: Tensor) -> None:
        if self.device.type == 'cpu' and not bool(torch.isfinite(loss)):
            # The backward pass of grid_sample for a CPU follows such numbers out of its memory.
            # NaN in one gradient tells the whole crew to leave this step out.
            weight = next(self.network.parameters())
            weight.grad = torch.full_like(weight, math.nan)
        else:
            self.crew.backward(loss)

    def _mend_buffers(self) -> None:
        """Take back what a batch that was not finite has left in the running statistics."""
        for key, value in self.network.named_buffers():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                value.copy_(self.average.tensors[key])

    def _bar(self) -> 'tqdm[Any]':
        recipe = self.recipe
        if recipe.steps:
            return tqdm(total=recipe.steps, initial=self.progress.step, unit='step',
                        mininterval=5, disable=not self.crew.first)
        return tqdm(total=recipe.minutes, initial=self.progress.minutes, mininterval=5,
                    bar_format='{l_bar}{bar}| {n:.1f}/{total:.1f} min, {remaining} left{postfix}',
                    disable=not self.crew.first)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into the wish to stop after the step at hand."""
        asked = math.inf
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, _frame: object) -> None:
            nonlocal asked
            # One Ctrl-C may come twice: from the terminal, and passed on by torchrun.
            if self._stop and number == signal.SIGINT and time.monotonic() - asked > 1:
                raise KeyboardInterrupt
            asked = min(asked, time.monotonic())
            self._stop = self._stop or signal.Signals(number).name

        for number in kept:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


def _make_writable(folder: Path) -> None:
    """Make ``folder``; raises ValueError, before hours are spent, where it cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f'{folder} cannot be made or written to ({error.strerror}): choose '
                         f'another folder to train into') from error


def _is_of_the_network(error: RuntimeError) -> bool:
    """Tell whether ``error`` is one of gloo or NCCL."""
    return isinstance(error, torch.distributed.DistError) or any(
        word in str(error).lower() for word in ('gloo', 'nccl', 'connection'))


class Window:
    """Means over the steps since the last line of the log; kept in checkpoints."""

    def __init__(self, sums: Mapping[str, float] | None = None,
                 counts: Mapping[str, int] | None = None, pairs: int = 0) -> None:
        self.sums, self.counts, self.pairs = dict(sums or {}), dict(counts or {}), pairs

    def add(self, result: StepResult) -> None:
        """Add one step; what is not known (an EPE without any truth) is left out."""
        self.pairs += result.pairs
        for key, value in result.values.items():
            if math.isfinite(value):
                self.sums[key] = self.sums.get(key, 0.0) + value
                self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the means, and pairs per second in place of the seconds of a step."""
        means = {key: value / self.counts[key] for key, value in self.sums.items()}
        if means.pop('seconds', 0):
            means['pairs_per_s'] = self.pairs / self.sums['seconds']
        return means

    def state(self) -> dict[str, Any]:
        """Return what the constructor takes."""
        return {'sums': dict(self.sums), 'counts': dict(self.counts), 'pairs': self.pairs}

    def text(self, progress: Progress) -> str:
        """Return a line for the progress bar."""
        means = self.means()
        shown = [f'{name} {means[name]:.2f}' for name in ('loss', 'epe') if name in means]
        if 'pairs_per_s' in means:
            shown.append(f'{means["pairs_per_s"]:.1f} pairs/s')
        return ', '.join([f'step {progress.step}', *shown])


def schedule(share: float, warmup: float, anneal: str = 'cosine', *,
             warmup_rate: float | None = None, milestones: Sequence[float] = ()) -> float:
    """Return the learning rate's factor at ``share`` of the run.

    A linear rise over the share ``warmup``, or ``warmup_rate`` all through it; then half a
    cosine or a line to zero, or, with anneal 'steps', 1, halved at each of ``milestones``.
    """
    if share < warmup:
        return 0.05 + 0.95 * share / warmup if warmup_rate is None else warmup_rate
    if anneal == 'steps':
        return 0.5 ** sum(share >= milestone for milestone in milestones)
    left = (1 - share) / max(1 - warmup, 1e-9)
    return max(0.002, left if anneal == 'linear' else 0.5 * (1 - math.cos(math.pi * left)))
