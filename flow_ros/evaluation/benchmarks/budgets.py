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

"""Time asked against time kept, with the machine to ourselves and with one core taken away.

Every measurement is one stream through the estimator, as the node runs it: a procedural scene
that moves, or one that stands still under camera noise. What is loaded is one core, by a process
that computes without end and is pinned to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import os
import subprocess
import sys
import time

import numpy as np
from numpy.typing import NDArray

from flow_ros.evaluation.benchmarks.timing import load_network
from flow_ros.runtimes import create_runtime, Runtime
from flow_ros.runtimes.handover import best_runtime
from flow_ros.streaming import Budget, FlowEstimator, FlowResult
from flow_ros.synthetic import SyntheticSequence

FRAME_S = 1 / 30
NOISE = 2.0
"""Grey levels, standard deviation, of the camera noise of a still scene."""
OBJECT_PX = 12
_WARM_UP = 12
"""Frames before those that count: the cold start, and the first costs."""
_DIFFERENT = 10
"""Frames that are drawn; they are played forwards and backwards."""

_LOAD = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""  # ends with its parent, however that ends

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class KeptBudget:
    """A time that was asked for, and what came of it.

    ``steps`` are iterations (levels or scales where a network visits each level once), all
    levels together. ``two_ms`` is the median time of exactly two iterations under the same
    load, and ``two_iterations_fit`` says that it is below ``asked_ms``. ``predicted_error_ms``
    is the median of |predicted - spent|. ``without_flow`` counts frames that should have given
    flow and did not.
    """

    network: str
    runtime: str
    precision: str
    size: str
    asked_ms: float
    loaded: bool
    frames: int
    ms_p50: float
    ms_p99: float
    ms_most: float
    steps_p50: float
    steps_p10: float
    overruns: int
    without_flow: int
    two_ms: float
    two_iterations_fit: bool
    predicted_error_ms: float
    spent_ms: tuple[float, ...]

    @property
    def kept(self) -> float:
        """The 99 % quantile over what was asked."""
        return self.ms_p99 / self.asked_ms


@dataclass(frozen=True)
class KeptRate:
    """A camera's rate, and how many of its frames got a flow.

    Frames that come while one is worked on wait; of those that wait the newest is next, and the
    others are dropped, as in the node. ``iterations`` are those of a fixed budget, None where
    the budget was the rate. ``ms_p50`` and ``ms_p99`` are from a frame's coming to its flow.
    """

    network: str
    runtime: str
    precision: str
    size: str
    frames_per_s: float
    loaded: bool
    iterations: int | None
    frames: int
    with_flow: int
    steps_p50: float
    ms_p50: float
    ms_p99: float


@dataclass(frozen=True)
class StillScene:
    """The median time and steps of a frame at ``iterations``: moving, and still with noise."""

    network: str
    runtime: str
    size: str
    iterations: int
    early_stop_px: float
    moving_ms: float
    moving_steps: float
    still_ms: float
    still_steps: float
    still_steps_most: int


@dataclass(frozen=True)
class SmallObject:
    """A square that starts to move in a still scene, on its first frame.

    ``seen_px`` is the median flow along its way, with early stop, and ``full_px`` with all
    ``iterations``.
    """

    network: str
    moved_px: int
    iterations: int
    steps: int
    seen_px: float
    full_px: float


@contextmanager
def loaded_core(load: bool = True) -> Iterator[None]:
    """Keep one core (the first that this process may use) busy meanwhile, if ``load``."""
    if not load:
        yield
        return
    child = subprocess.Popen([sys.executable, '-c', _LOAD])
    try:
        os.sched_setaffinity(child.pid, {min(os.sched_getaffinity(0))})
        yield
    finally:
        child.kill()
        child.wait()


def moving_frames(width: int, height: int, *, seed: int = 0) -> list[Pixels]:
    """Return frames of a moving scene that may be repeated: there and back."""
    scene = SyntheticSequence(width, height, seed=seed)
    there = [scene.frame(k).image for k in range(_DIFFERENT)]
    return there + there[-2:0:-1]


def still_frames(image: Pixels, count: int, *, noise: float = NOISE,
                 seed: int = 0) -> list[Pixels]:
    """Return ``count`` images of one scene, each with noise of its own."""
    random = np.random.default_rng(seed)
    return [np.clip(image + random.normal(0.0, noise, image.shape), 0, 255).astype(np.uint8)
            for _ in range(count)]


def make_runtime(network: str, runtime: str, precision: str, width: int, height: int,
                 threads: int | None) -> Runtime:
    """Return the runtime that serves a size, with the network's weights where it has some."""
    made = create_runtime(runtime, load_network(network)[0], threads=threads,
                          precision=precision)
    return best_runtime(made, height, width)


def keep_budget(*, network: str, runtime: str, precision: str, width: int, height: int,
                latency_ms: float, loaded: bool, frames: int = 60, threads: int | None = None,
                iterations: int | None = None) -> KeptBudget:
    """Ask for ``latency_ms`` for each of ``frames`` frames of a moving stream."""
    made = make_runtime(network, runtime, precision, width, height, threads)
    return keep(made, name=network, precision=precision, images=moving_frames(width, height),
                latency_ms=latency_ms, loaded=loaded, frames=frames, iterations=iterations)


def keep(runtime: Runtime, *, name: str, precision: str, images: list[Pixels],
         latency_ms: float, loaded: bool, frames: int,
         iterations: int | None = None) -> KeptBudget:
    """Do as ``keep_budget`` does, with a runtime that is there."""
    height, width = images[0].shape[:2]
    with loaded_core(loaded):
        two = FlowEstimator(runtime=runtime, budget=Budget(iterations=2), early_stop_px=0.0)
        two.prepare(height, width)
        two_ms = float(np.median([result.spent_ms for result in
                                  _flows(_stream(two, images, 8))[2:]]))
        estimator = FlowEstimator(runtime=runtime, early_stop_px=0.0,
                                  budget=Budget(latency_ms=latency_ms, iterations=iterations))
        estimator.prepare(height, width)
        results = _stream(estimator, images, _WARM_UP + frames)[_WARM_UP:]
    flows = _flows(results)
    spent = [result.spent_ms for result in flows]
    steps = [result.iterations for result in flows]
    wrong = [abs(result.predicted_ms - result.spent_ms) for result in flows
             if result.predicted_ms is not None]
    return KeptBudget(
        network=name, runtime=runtime.name, precision=precision, size=f'{width}x{height}',
        asked_ms=latency_ms, loaded=loaded, frames=len(results),
        ms_p50=float(np.median(spent)), ms_p99=float(np.quantile(spent, 0.99)),
        ms_most=max(spent), steps_p50=float(np.median(steps)),
        steps_p10=float(np.quantile(steps, 0.1)),
        overruns=sum(result.overrun for result in flows),
        without_flow=len(results) - len(flows), two_ms=two_ms,
        two_iterations_fit=two_ms <= latency_ms,
        predicted_error_ms=float(np.median(wrong)), spent_ms=tuple(spent))


def keep_up(runtime: Runtime, *, name: str, precision: str, images: list[Pixels],
            frames_per_s: float, loaded: bool, frames: int,
            iterations: int | None = None) -> KeptRate:
    """Let ``frames`` frames come at a camera's rate, which is the budget unless ``iterations``."""
    height, width = images[0].shape[:2]
    budget = Budget(rate=True) if iterations is None else Budget(iterations=iterations)
    results: list[FlowResult] = []
    with loaded_core(loaded):
        estimator = FlowEstimator(runtime=runtime, budget=budget, early_stop_px=0.0,
                                  max_gap_s=(_WARM_UP + frames) / frames_per_s)
        estimator.prepare(height, width)
        _stream(estimator, images, _WARM_UP // 2)
        estimator.reset()
        began, index = time.perf_counter(), 0
        last = _WARM_UP + frames - 1
        while index <= last:
            comes = began + index / frames_per_s
            time.sleep(max(0.0, comes - time.perf_counter()))
            result = estimator(images[index % len(images)], index / frames_per_s, came=comes,
                               period_s=1 / frames_per_s)
            estimator.settle()
            if index >= _WARM_UP and result is not None:
                results.append(result)
            newest = int((time.perf_counter() - began) * frames_per_s)
            index = max(index + 1, min(newest, last))
    spent = [result.spent_ms for result in results]
    return KeptRate(
        network=name, runtime=runtime.name, precision=precision, size=f'{width}x{height}',
        frames_per_s=frames_per_s, loaded=loaded, iterations=iterations, frames=frames,
        with_flow=len(results),
        steps_p50=float(np.median([result.iterations for result in results])),
        ms_p50=float(np.median(spent)), ms_p99=float(np.quantile(spent, 0.99)))


def still_scene(runtime: Runtime, *, name: str, images: list[Pixels], iterations: int = 8,
                frames: int = 20, early_stop_px: float | None = None) -> StillScene:
    """Compare a moving stream with a still one, by turns, at the same budget."""
    height, width = images[0].shape[:2]
    estimators = [_estimator(runtime, iterations, early_stop_px) for _ in range(2)]
    estimators[0].prepare(height, width)
    still = still_frames(images[0], 6)
    moving_results, still_results = [], []
    for k in range(frames + 2):  # by turns: the machine's speed drifts
        moving_results.append(estimators[0](images[k % len(images)], k * FRAME_S))
        still_results.append(estimators[1](still[k % len(still)], k * FRAME_S))
    one, other = (_flows(results)[1:] for results in (moving_results, still_results))
    return StillScene(
        network=name, runtime=runtime.name, size=f'{width}x{height}', iterations=iterations,
        early_stop_px=estimators[0].early_stop_px,
        moving_ms=float(np.median([result.spent_ms for result in one])),
        moving_steps=float(np.median([result.iterations for result in one])),
        still_ms=float(np.median([result.spent_ms for result in other])),
        still_steps=float(np.median([result.iterations for result in other])),
        still_steps_most=max(result.iterations for result in other))


def small_object(runtime: Runtime, *, name: str, image: Pixels, moved_px: int,
                 iterations: int = 8, early_stop_px: float | None = None) -> SmallObject:
    """Let a bright square in the middle of a still scene start to move to the right."""
    height, width = image.shape[:2]
    place = (height // 2, width // 2)
    square = np.full((OBJECT_PX, OBJECT_PX, 3), 250, np.uint8)
    scenes = [_with(image, square, place)] * 3 + [_with(image, square,
                                                        (place[0], place[1] + moved_px))]
    frames = [still_frames(scene, 1, seed=k)[0] for k, scene in enumerate(scenes)]
    found = []
    for px in (early_stop_px, 0.0):
        results = _stream(_estimator(runtime, iterations, px), frames, len(frames) - 1)
        result = _flows(results)[-1]
        inner = result.flow[place[0]:place[0] + OBJECT_PX, place[1]:place[1] + OBJECT_PX, 0]
        found.append((result.iterations, float(np.median(inner))))
    return SmallObject(network=name, moved_px=moved_px, iterations=iterations,
                       steps=found[0][0], seen_px=found[0][1], full_px=found[1][1])


def _estimator(runtime: Runtime, iterations: int, early_stop_px: float | None) -> FlowEstimator:
    estimator = FlowEstimator(runtime=runtime, budget=Budget(iterations=iterations))
    if early_stop_px is not None:
        estimator.early_stop_px = early_stop_px
    return estimator


def _stream(estimator: FlowEstimator, images: list[Pixels],
            count: int) -> list[FlowResult | None]:
    """Return what each frame but the first gives."""
    results = [estimator(images[k % len(images)], k * FRAME_S, came=time.perf_counter())
               for k in range(count + 1)]
    return results[1:]


def _flows(results: list[FlowResult | None]) -> list[FlowResult]:
    return [result for result in results if result is not None]


def _with(image: Pixels, square: Pixels, place: tuple[int, int]) -> Pixels:
    changed = image.copy()
    changed[place[0]:place[0] + square.shape[0], place[1]:place[1] + square.shape[1]] = square
    return changed
