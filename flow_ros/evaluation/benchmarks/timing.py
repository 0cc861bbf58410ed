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

"""Time and memory of a network on a stream, frame by frame, as the node runs it.

What is timed is one call of the estimator: a frame, RGB uint8, goes in, and flow (with the
confidence and occlusion that the network knows) is there as arrays. Reading the frames is not
in it. The frames are in memory before the first one is timed, and every one is fresh: where
more are to be timed than a source has, the stream starts again at its first frame, and the
frames without a flow (the first) and with a cold start (the second) of every pass are left out.

- ``ms_p50``, ``ms_p99`` and the others are over the measured frames, after ``warm_up``;
- ``fps`` is 1000 / ``ms_p50``: the rate of the usual frame. ``fps_mean`` is the number of
  frames by the time they took together; it is lower where some frames took long;
- ``peak_mb`` is the highest resident memory above the process that has loaded the packages, the
  network and the frames but made no engine yet: the higher of ``prepare_mb``, while engines were
  made (less where the cache has them already), and ``stream_mb``, while frames went through.
  MB are 2^20 bytes;
- ``warm`` says that every measured frame started from the flow before it; ``cold`` counts those
  that did not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
import importlib
from itertools import islice
import math
import time
from typing import Any, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flow_ros.evaluation.benchmarks.children import Refused
from flow_ros.evaluation.benchmarks.peak import MB, PeakMemory
from flow_ros.sources import DEFAULT_SIZE, open_source, parse_size, SourceError
from flow_ros.streaming.budget import Budget

if TYPE_CHECKING:  # torch takes seconds to import, and the table of a report needs none of it
    from flow_ros.networks.base import FlowNetwork
    from flow_ros.runtimes import Runtime
    from flow_ros.streaming import FlowEstimator, FlowResult

Pixels = NDArray[np.uint8]
Tell = Callable[[str], object]

FRAME_S = 1 / 30
FEWEST = 3
"""Frames that are measured, however long they take."""
_MOST_BYTES = 256 * MB
_FRESH_SYNTHETIC = 24
"""Frames of the synthetic scene, which takes longer to draw than most networks to look at."""


@dataclass(frozen=True, kw_only=True)
class TimingJob:
    """One measurement.

    ``size`` is WIDTHxHEIGHT, '' for frames as they come (640x480 where they are synthetic).
    ``iterations`` None is the network's own default. ``latency_ms`` asks for a time instead,
    of which ``iterations`` is then the most. ``early_stop`` leaves the estimator's early stop
    on; else every step of the budget is done. ``seconds`` ends a slow measurement after at
    least three frames. ``threads`` None is the runtime's default.
    """

    network: str = 'dip_rt'
    weights: str = 'default'
    runtime: str = 'auto'
    precision: str = 'f32'
    device: str | None = None
    size: str = ''
    source: str = 'synthetic'
    iterations: int | None = None
    latency_ms: float | None = None
    cold: bool = False
    early_stop: bool = False
    frames: int = 60
    warm_up: int = 4
    seconds: float = 60.0
    threads: int | None = None


@dataclass(frozen=True)
class FrameTime:
    """One measured frame: its time, whether it was warm, its steps, and the time per act."""

    ms: float
    warm: bool
    steps: int
    acts: dict[str, float]


def measure(job: TimingJob, tell: Tell = print) -> dict[str, Any]:
    """Do one measurement in this process, which should have done nothing else before.

    Returns the row of the JSON file; the module's docstring says what is in it. ``tell`` is
    given a line about what is being done. Raises Refused where the job cannot be: an unknown
    network, a runtime that this machine does not have, a source without frames.
    """
    import torch

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    tell('loading')
    network, trained = load_network(job.network, job.weights)
    frames = load_frames(job.source, job.size, job.frames + job.warm_up, tell)
    height, width = frames[0].shape[:2]
    first = 1 if job.cold else 2
    if len(frames) < first + 1:
        raise Refused(f'{job.source}: {len(frames)} frames; expected at least {first + 1} for a '
                      f'{"cold" if job.cold else "warm"} flow')
    load_packages(job.runtime)
    tell('making engines')
    start = time.perf_counter()
    with PeakMemory() as making:
        runtime = make_runtime(job, network, height, width)
        estimator = make_estimator(job, runtime)
        estimator.prepare(height, width)
    prepare_s = time.perf_counter() - start
    _reset_cuda(runtime)
    tell('measuring')
    with PeakMemory(above_mb=making.start_mb) as streaming:
        times = list(stream(estimator, frames, job))
    return {'network': job.network, 'runtime': runtime.name, 'precision': job.precision,
            'size': f'{width}x{height}', 'iterations': iterations_of(job, runtime.network),
            **numbers_of(times), 'peak_mb': round(max(making.peak_mb, streaming.peak_mb), 1),
            'prepare_mb': round(making.peak_mb, 1), 'stream_mb': round(streaming.peak_mb, 1),
            'cuda_mb': _cuda_mb(runtime),
            'prepare_s': round(prepare_s, 2), 'iterations_are': network.budget_unit,
            'latency_ms': job.latency_ms, 'early_stop': job.early_stop, 'trained': trained,
            'device': str(runtime.device), 'threads': job.threads or torch.get_num_threads(),
            'runtime_asked': job.runtime, 'source': shown_source(job.source),
            'warm_up': job.warm_up}


def measure_apart(*, tell: Tell, **arguments: Any) -> dict[str, Any]:
    """Do the measurement of a child process."""
    return measure(TimingJob(**arguments), tell)


def load_network(name: str, weights: str = 'default') -> 'tuple[FlowNetwork, bool]':
    """Return the network and whether its weights are trained: the time is the same if not.

    A network without weights here gets seeded random ones. Raises Refused where there is none
    of this name, or where a weights file that was named cannot be used.
    """
    import torch

    from flow_ros.networks import create, WeightsError

    try:
        return create(name, weights), True
    except WeightsError as error:
        if weights != 'default':
            raise Refused(str(error)) from error
        torch.manual_seed(0)
        return create(name), False
    except ValueError as error:
        raise Refused(f'--network: {error}') from error


def load_packages(runtime: str) -> None:
    """Import what ``runtime`` may need, so that its packages are in no measured memory."""
    wanted = {'openvino': ('openvino',), 'tensorrt': ('tensorrt', 'tensorrt_rtx'),
              'auto': ('openvino', 'tensorrt', 'tensorrt_rtx')}
    for package in wanted.get(runtime, ()):
        try:
            importlib.import_module(package)
        except (ImportError, OSError):
            continue  # what is missing is said by the runtime that needs it


def load_frames(source: str, size: str, most: int, tell: Tell = print) -> list[Pixels]:
    """Return up to ``most`` frames, fewer where the source or the memory for them ends."""
    try:
        wanted = parse_size(size) if size else None
        if source.partition(':')[0] == 'synthetic':
            width, height = wanted or DEFAULT_SIZE
            return _synthetic(source, width, height, min(most, _FRESH_SYNTHETIC), tell)
        opened = open_source(source, size=wanted, loop=False, warn=tell)
        frames: list[Pixels] = []
        for frame in islice(opened, most):
            frames.append(frame.image)
            if frames[0].nbytes * (len(frames) + 1) > _MOST_BYTES and len(frames) > FEWEST:
                break
    except SourceError as error:
        raise Refused(f'--source: {error}') from error
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1:
        raise Refused(f'--source {source}: frames of several sizes; give --size WIDTHxHEIGHT')
    return frames


def _synthetic(source: str, width: int, height: int, count: int, tell: Tell) -> list[Pixels]:
    seed = source.partition(':')[2]
    if seed and not seed.isdecimal():
        raise SourceError(f'{source}: the seed must be a number, for example synthetic:7')
    from flow_ros.synthetic import SyntheticSequence

    # Of large frames fewer: they take as long to draw as many small ones.
    fewer = max(_FRESH_SYNTHETIC * DEFAULT_SIZE[0] * DEFAULT_SIZE[1] // (width * height), 8)
    count = max(min(count, fewer, _MOST_BYTES // (3 * width * height)), FEWEST + 1)
    stream = SyntheticSequence(width, height, seed=int(seed or 0))
    frames = []
    for index in range(count):
        tell(f'drawing frame {index + 1} of {count}')
        frames.append(stream.frame(index).image)
    return frames


def make_runtime(job: TimingJob, network: 'FlowNetwork', height: int, width: int) -> 'Runtime':
    """Return the runtime of the job; where it is built in the background, once it is built."""
    from flow_ros.runtimes import create_runtime, RuntimeUnavailable
    from flow_ros.runtimes.handover import best_runtime

    try:
        return best_runtime(create_runtime(job.runtime, network, device=job.device,
                                           threads=job.threads, precision=job.precision),
                            height, width)
    except RuntimeUnavailable as error:
        raise Refused(f'--runtime {job.runtime}: {error}') from error
    except ValueError as error:
        raise Refused(str(error)) from error


def make_estimator(job: TimingJob, runtime: 'Runtime') -> 'FlowEstimator':
    """Return the estimator of the job."""
    from flow_ros.streaming import FlowEstimator

    try:
        budget = (Budget(iterations=job.iterations) if job.latency_ms is None else
                  Budget(iterations=job.iterations, latency_ms=job.latency_ms))
    except ValueError as error:
        raise Refused(str(error)) from error
    # No pair is given up for the time a slow network takes: it is what is measured.
    estimator = FlowEstimator(runtime=runtime, budget=budget, warm_start=not job.cold,
                              max_gap_s=3600.0)
    if not job.early_stop:
        estimator.early_stop_px = 0.0
    return estimator


def stream(estimator: 'FlowEstimator', frames: Sequence[Pixels],
           job: TimingJob) -> Iterator[FrameTime]:
    """Yield the measured frames of as many passes over ``frames`` as it takes."""
    first = 1 if job.cold else 2
    # A source shorter than the warm-up is warm after its first pass.
    skip = max(first, job.warm_up)
    count, began = 0, time.perf_counter()
    while True:
        estimator.reset()
        for index, frame in enumerate(frames):
            start = time.perf_counter()
            result = estimator(frame, index * FRAME_S)
            ms = 1e3 * (time.perf_counter() - start)
            # A slow network's warm-up ends with its cold start.
            slow = time.perf_counter() - began > job.seconds / 4
            if result is None or index < (first if slow else skip):
                continue
            yield _frame_time(ms, result)
            count += 1
            late = time.perf_counter() - began > job.seconds and count >= FEWEST
            if late or count >= job.frames:
                return
        skip = first


def _frame_time(ms: float, result: 'FlowResult') -> FrameTime:
    return FrameTime(ms=ms, warm=result.warm, steps=result.iterations,
                     acts=dict(result.timings_ms))


def numbers_of(times: Sequence[FrameTime]) -> dict[str, Any]:
    """Return what the measured frames took, as the module's docstring says it."""
    ms = [each.ms for each in times]
    p10, p50, p90, p99 = (float(value) for value in np.quantile(ms, (0.1, 0.5, 0.9, 0.99)))
    acts = {name: float(np.median([each.acts[name] for each in times if name in each.acts]))
            for name in times[0].acts}
    cold = sum(not each.warm for each in times)
    return {'warm': cold == 0, 'fps': round(1e3 / p50, 3), 'ms_p50': round(p50, 3),
            'ms_p99': round(p99, 3), 'ms_p10': round(p10, 3), 'ms_p90': round(p90, 3),
            'ms_mean': round(math.fsum(ms) / len(ms), 3),
            'fps_mean': round(1e3 * len(ms) / math.fsum(ms), 3), 'frames': len(times),
            'cold': cold, 'steps': int(np.median([each.steps for each in times])),
            'acts_ms': {name: round(value, 3) for name, value in acts.items()}}


def iterations_of(job: TimingJob, network: 'FlowNetwork') -> int | None:
    """Return the budget in iterations; None where only a time was asked for."""
    if job.iterations is not None:
        return job.iterations
    return None if job.latency_ms is not None else network.default_iterations


def shown_source(source: str) -> str:
    """Return a source as a file of results may name it: without the folders of its user."""
    return source.rstrip('/').rpartition('/')[2] or source


def _reset_cuda(runtime: 'Runtime') -> None:
    if runtime.device.type == 'cuda':
        import torch
        torch.cuda.reset_peak_memory_stats(runtime.device)


def _cuda_mb(runtime: 'Runtime') -> float | None:
    """Return the most that torch held of the GPU while frames went through; None on the CPU."""
    if runtime.device.type != 'cuda':
        return None
    import torch
    return round(torch.cuda.max_memory_reserved(runtime.device) / MB, 1)
