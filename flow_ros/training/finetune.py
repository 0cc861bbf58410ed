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

"""Fine-tunes a network on a recording of the user's own robot, without labels, and measures it.

First the teacher (the network as it was) prepares lessons for a fifth of the time, then the
student learns from them; at the end both are measured on the held-out end of the recording.
BatchNorm keeps its statistics, the learning rate is low and falls to zero, and what is kept is
the moving average of the weights: the aim is to adapt, not to train anew.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import copy
from dataclasses import dataclass, field
import math
import signal
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Generator, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from flow_ros.networks.base import FlowNetwork
from flow_ros.ops.sampling import inside, warp
from flow_ros.streaming.occlusion import check_consistency
from flow_ros.training.recording import Recording, RecordingError, Split
from flow_ros.training.self_supervision import (
    both_directions,
    Direction,
    Lesson,
    LossWeights,
    make_batch,
    student_loss,
    teach,
    to_tensor,
)
from flow_ros.training.unsupervised import census, census_distance, whole_patches

TEACHING_SHARE = 0.2
"""Share of the time in which the teacher prepares lessons."""

LEAST_GAIN = 0.003
"""By which share the photometric error must change to be called a change."""

STILL_PX = 0.2
"""Mean speed below which the robot is said to stand still."""

LEAST_CONSISTENCY = 0.01
"""Which change of the share of consistent pixels is called one."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How long and how to fine-tune."""

    minutes: float = 10.0
    """Wall-clock length of teaching and learning together."""
    steps: int | None = None
    """Length in steps in place of the minutes: the same on every machine."""
    learning_rate: float = 3e-4
    weight_decay: float = 1e-5
    warmup: float = 0.05
    clip: float = 1.0
    ema: float = 0.98
    batch: int = 4
    crop: tuple[int, int] = (192, 256)
    """(height, width) px, made smaller where the frames are; multiples of 16."""
    teacher_iterations: int = 8
    least_confidence: float = 0.5
    most_lessons: int = 400
    lessons_mb: float = 512.0
    """Memory for the lessons."""
    held_out_pairs: int = 24
    """Most pairs to measure with."""
    seed: int = 0
    weights: LossWeights = field(default_factory=LossWeights)


@dataclass(frozen=True)
class Measures:
    """What can be measured of one pair without labels, forward."""

    census: float
    """Mean census distance, 0 to 1, of the pixels seen in both frames."""
    consistent: float
    """Share of pixels whose forward and backward flow cancel."""
    disagreement_px: float
    """Median length of the sum of forward and backward flow."""
    confidence: float | None
    speed_px: float


@dataclass(frozen=True)
class Comparison:
    """One held-out pair by the index of its first frame, before and after."""

    index: int
    before: Measures
    after: Measures


@dataclass(frozen=True)
class Result:
    """What a fine-tuning did; ``verdict`` is 'helped', 'made no difference' or 'made it worse'."""

    verdict: str
    reason: str
    comparisons: tuple[Comparison, ...]
    steps: int
    lessons: int
    trusted: float
    """Share of the lessons' pixels that were taken for true."""
    minutes: float
    interrupted: bool
    losses: dict[str, tuple[float, float]]
    """Mean of each part of the loss over the first and the last tenth of the steps."""


class FineTuner:
    """One fine-tuning of ``network``, which is left as it is; ``student`` is the new one."""

    def __init__(self, network: FlowNetwork, recording: Recording, *,
                 config: FinetuneConfig = FinetuneConfig(), progress: bool = True) -> None:
        """Split the recording; raises RecordingError where there is too little of it."""
        self.config, self.recording, self.progress = config, recording, progress
        self.split: Split = recording.split()
        self.teacher = network.eval()
        self.device = next(network.parameters()).device
        self.network = copy.deepcopy(network).eval()  # BatchNorm keeps its statistics
        self.average = AveragedModel(self.network,
                                     multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.crop = tuple(min(wanted, side // 16 * 16)
                          for wanted, side in zip(config.crop, recording.size))
        self._stop = False

    @property
    def student(self) -> FlowNetwork:
        """The network that has learnt: the average of the weights."""
        network = self.average.module
        assert isinstance(network, FlowNetwork)  # what AveragedModel copied
        return network.eval()

    def run(self) -> Result:
        """Teach, learn, measure; Ctrl-C ends the learning early and measures what there is."""
        began = time.monotonic()
        with self._interruptible():
            lessons = self._teach()
            losses, steps = self._learn(lessons, began)
            minutes, interrupted = (time.monotonic() - began) / 60, self._stop
            comparisons = self._compare()  # here too a single Ctrl-C must not lose the weights
        verdict, reason = judge(comparisons)
        return Result(
            verdict=verdict, reason=reason, comparisons=comparisons, steps=steps,
            lessons=len(lessons), minutes=minutes, interrupted=interrupted, losses=losses,
            trusted=float(np.mean([float(lesson.trusted.float().mean()) for lesson in lessons])))

    def _teach(self) -> list[Lesson]:
        """Prepare lessons from pairs in random order until their share of the time is over."""
        config = self.config
        order = np.random.default_rng(config.seed).permutation(self.split.train)
        limit_s = TEACHING_SHARE * config.minutes * 60
        if config.steps is not None:  # as many as the steps will use about eight times
            limit_s = math.inf
            order = order[:max(4, config.steps * config.batch // 16)]
        order = order[:config.most_lessons // 2]
        lessons: list[Lesson] = []
        began, used = time.monotonic(), 0
        for index in tqdm(order, desc='lessons', unit='pair', disable=not self.progress,
                          leave=False):
            lessons += teach(self.teacher, self.recording.frame(index),
                             self.recording.frame(index + 1),
                             iterations=config.teacher_iterations,
                             least_confidence=config.least_confidence)
            used += lessons[-1].nbytes + lessons[-2].nbytes
            if self._stop or time.monotonic() - began > limit_s \
                    or used > config.lessons_mb * 2 ** 20:
                break
        trusted = sum(float(lesson.trusted.float().mean()) for lesson in lessons) / len(lessons)
        if trusted < 0.02:
            raise RecordingError(
                f'of the flow on this recording only {100 * trusted:.1f} % is confirmed by the '
                f'other direction: nothing to learn from. Are its frames in order and near '
                f'enough in time, and are the weights those of a trained network?')
        return lessons

    def _learn(self, lessons: list[Lesson],
               began: float) -> tuple[dict[str, tuple[float, float]], int]:
        config = self.config
        random = Generator().manual_seed(config.seed)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=config.learning_rate,
                                      weight_decay=config.weight_decay)
        kept: dict[str, list[float]] = {}
        step, share = 0, 0.0
        with self._bar() as bar:
            while share < 1 and not self._stop:
                for group in optimizer.param_groups:
                    group['lr'] = config.learning_rate * _schedule(share, config.warmup)
                chosen = torch.randint(0, len(lessons), (config.batch,), generator=random)
                batch = make_batch([lessons[index] for index in chosen.tolist()],
                                   (self.crop[0], self.crop[1]), random, self.device)
                parts = student_loss(self.network, batch, random, config.weights,
                                     most_iterations=self.network.default_iterations)
                loss = torch.stack(list(parts.values())).sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
                if bool(torch.isfinite(norm)):  # a step that would spoil the weights is left out
                    optimizer.step()
                    self.average.update_parameters(self.network)
                step += 1
                for name, value in parts.items():
                    kept.setdefault(name, []).append(float(value.detach()))
                minutes = (time.monotonic() - began) / 60
                share = (minutes / config.minutes if config.steps is None
                         else step / config.steps)
                bar.set_postfix_str(f'step {step} loss {float(loss.detach()):.3f}',
                                    refresh=False)
                bar.update((step if config.steps is not None
                            else round(min(minutes, config.minutes), 2)) - bar.n)
        tenth = max(1, step // 10)
        return {name: (float(np.mean(values[:tenth])), float(np.mean(values[-tenth:])))
                for name, values in kept.items()}, step

    def _compare(self) -> tuple[Comparison, ...]:
        pairs = self.split.held_out
        chosen = np.linspace(0, len(pairs) - 1, min(len(pairs), self.config.held_out_pairs))
        comparisons = []
        for position in tqdm(np.unique(chosen.round().astype(int)), desc='measuring',
                             unit='pair', disable=not self.progress, leave=False):
            index = pairs[position]
            frames = self.recording.frame(index), self.recording.frame(index + 1)
            before, after = compare(self.teacher, self.student, *frames)
            comparisons.append(Comparison(index, before, after))
        return tuple(comparisons)

    def _bar(self) -> 'tqdm[Any]':
        if self.config.steps is not None:
            return tqdm(total=self.config.steps, desc='learning', unit='step',
                        disable=not self.progress)
        return tqdm(total=self.config.minutes, desc='learning', unit='min',
                    disable=not self.progress, mininterval=1.0,
                    bar_format='{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:g} min '
                               '[{remaining} left] {postfix}')

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM ask for the end; a second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _frame: object) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            tqdm.write('ending early: measuring what has been learnt (again to end at once)')

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT,
                                                                    signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@torch.no_grad()
def compare(before: FlowNetwork, after: FlowNetwork, frame1: NDArray[np.uint8],
            frame2: NDArray[np.uint8]) -> tuple[Measures, Measures]:
    """Measure two networks on one pair, by the same pixels where they are compared.

    The census distance is taken over the pixels that at least one of them can explain (its two
    directions agree): neither gains by calling what it cannot match occluded.
    """
    device = next(before.parameters()).device
    inputs = [to_tensor(frame)[None].to(device, torch.float32) for frame in (frame1, frame2)]
    first = census(inputs[0])
    ways: list[tuple[Direction, Direction]] = [both_directions(network, inputs[0], inputs[1])
                                               for network in (before, after)]
    checks = [check_consistency(forward.flow, backward.flow) for forward, backward in ways]
    counted = (~(checks[0].occluded & checks[1].occluded)) & whole_patches(ways[0][0].flow)
    results = []
    for (forward, backward), check in zip(ways, checks):
        flow = forward.flow
        distance = census_distance(first, census(warp(inputs[1], flow)))
        sums = flow + warp(backward.flow, flow)
        length = torch.hypot(sums[:, :1], sums[:, 1:])[inside(flow)]
        results.append(Measures(
            census=float((distance * counted).sum() / counted.sum().clamp(min=1)),
            consistent=float((~check.occluded).float().mean()),
            disagreement_px=float(length.median()) if length.numel() else math.nan,
            confidence=(None if forward.confidence is None
                        else float(forward.confidence.float().mean())),
            speed_px=float(torch.hypot(flow[:, 0], flow[:, 1]).mean())))
    return results[0], results[1]


def judge(comparisons: tuple[Comparison, ...]) -> tuple[str, str]:
    """Return the verdict and why: by the photometric error and by consistency.

    A change counts if it is larger than its 95 % confidence interval over the held-out pairs
    (Student's: two pairs say next to nothing) and than what matters: 0.3 % of the photometric
    error, which is mostly noise that no flow explains, or 1 % of the pixels. It helped if one
    of them fell or rose so, the other does not speak against it (flow that is zero everywhere
    agrees with itself), and the robot moved: frames of a still one say nothing of motion.
    """
    def change(value: Callable[[Measures], float]) -> tuple[float, float]:
        """Return the mean change, and half its 95 % confidence interval."""
        changes = np.array([value(row.after) - value(row.before) for row in comparisons])
        if len(changes) < 2:
            return float(changes.mean()), math.inf
        return float(changes.mean()), (_student(len(changes) - 1) * float(changes.std(ddof=1))
                                       / len(changes) ** 0.5)

    before = float(np.mean([row.before.census for row in comparisons]))
    error, error_noise = change(lambda measures: measures.census)
    agreement, agreement_noise = change(lambda measures: measures.consistent)
    matters = max(LEAST_GAIN * before, error_noise)
    counts = max(LEAST_CONSISTENCY, agreement_noise)
    told = (f'photometric error {100 * error / max(before, 1e-9):+.1f} % '
            f'(changes under {100 * matters / max(before, 1e-9):.1f} % are noise), '
            f'consistent pixels {100 * agreement:+.1f} points (under {100 * counts:.1f}: noise)')
    speed = float(np.mean([row.before.speed_px for row in comparisons]))
    still = speed < STILL_PX
    if still:
        told += (f'; mean speed {speed:.2f} px per frame, so hardly anything moves: record it '
                 f'moving, to the end, which is what is measured on')
    if not (error <= matters and agreement >= -counts):  # NaN is worse, too
        return 'made it worse', told
    better = ((error < -matters and agreement >= -LEAST_CONSISTENCY)
              or (agreement > counts and error <= LEAST_GAIN * before))
    return 'helped' if better and not still else 'made no difference', told


def _student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's distribution, within 1 %."""
    few = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
    return few[freedom - 1] if freedom <= len(few) else 1.96 + 2.7 / freedom


def _schedule(share: float, warmup: float) -> float:
    """Return the learning rate's factor: a linear rise, then half a cosine to zero."""
    if share < warmup:
        return 0.1 + 0.9 * share / warmup
    return max(0.002, 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup))))
