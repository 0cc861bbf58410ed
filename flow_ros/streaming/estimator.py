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

"""The estimator: frames of one stream in, flow out."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
import math
from pathlib import Path
import threading

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor

from flow_ros.networks import create
from flow_ros.networks.base import Features, FlowNetwork, PriorFlow
from flow_ros.runtimes import create_runtime, Runtime
from flow_ros.runtimes.acts import PRIOR_PX, run_acts
from flow_ros.runtimes.cache import Say
from flow_ros.runtimes.threads import torch_alone, torch_beside
from flow_ros.streaming.budget import Budget, StampPeriod
from flow_ros.streaming.costs import CostBook
from flow_ros.streaming.early_stop import DEFAULT_PX, differing
from flow_ros.streaming.estimate import complete, Estimate, lacks, result_of, REVERSE
from flow_ros.streaming.pace import Pace, Paces
from flow_ros.streaming.past import PairFlow, Past
from flow_ros.streaming.result import FlowResult
from flow_ros.streaming.serving import Serving
from flow_ros.streaming.settings import Order, OUTPUTS, Settings
from flow_ros.streaming.stopwatch import Stopwatch
from flow_ros.streaming.thumbnails import Thumbnails, thumbnails
from flow_ros.streaming.transfer import upload

_SETTLE = 'settle'
_MANY = 16384


@dataclass(frozen=True)
class _Frame:
    """What is kept of a frame for the next pair."""

    stamp: float
    features: Features
    thumbnails: Thumbnails
    runtime: Runtime  # whose features these are
    pixels: NDArray[np.uint8] | None  # kept where another runtime may have to encode them


class FlowEstimator(Settings):
    """Optical flow of one stream of frames, one object per stream.

    Call it with each frame, RGB uint8 (H, W, 3), and its stamp in seconds. It returns None
    where there is no pair: for the first frame; when the stamp goes back, after more than
    ``max_gap_s`` and when the size changes, where it starts again from this frame; and for a
    frame with the stamp of the one before, a duplicate, which is left out and changes nothing.
    ``none_reason`` then says which ('first', 'stamp went back', 'gap', 'size changed',
    'duplicate stamp'). Bad input raises ValueError and changes nothing either.

    ``network`` is a name, with ``weights`` as ``networks.create`` takes them, or a network;
    ``runtime`` a name as ``create_runtime`` takes it, with ``device``, ``threads``,
    ``precision``, ``engine_cache`` and ``workspace_mib``, or a runtime, whose network is then
    the one used. A runtime that is built in the background takes over between two frames, and
    one that fails is replaced by the next best, if there is one (``runtimes.handover``). No flow
    is lost by either, and ``say`` is told. Flow that is not finite is a failure (EngineFault).

    ``budget``, ``early_stop_px``, ``direction``, ``warm_start``, ``max_gap_s`` and ``outputs``
    may be changed at any time from any thread; the frame being worked on is not affected.
    ``outputs`` of 'flow', 'confidence' and 'occlusion' are those computed: networks that know no
    confidence or occlusion need the flow of the other direction for them, which doubles the
    steps; of a budget of time each direction has its half.

    A level of the network gets no more steps once one has changed the flow by less than
    ``early_stop_px`` (full-resolution px, counted where the frames differ; 0: never; see
    ``early_stop``). On CUDA, where looking after each step would cost more than it saves, each
    level gets one step where the frames do not differ, and else all.

    Each frame is encoded once. The flow is carried to the next pair (``warm_start``), but for
    one that does not explain the frames it leads between: after a scene cut the start is cold.
    It always is for networks that take no prior flow. ``settle``, called between two frames,
    takes what can be done of that ahead out of the next frame's time.
    """

    def __init__(self, *, network: str | FlowNetwork = 'dip_rt',
                 weights: str | Path | None = 'default', runtime: str | Runtime = 'auto',
                 budget: Budget = Budget(), early_stop_px: float = DEFAULT_PX,
                 direction: str = 'forward',
                 device: str | torch.device | None = None, warm_start: bool = True,
                 max_gap_s: float = 0.5, outputs: Iterable[str] = OUTPUTS,
                 threads: int | None = None, precision: str = 'f32',
                 engine_cache: Path | None = None, workspace_mib: int | None = None,
                 say: Say | None = None) -> None:
        super().__init__(budget=budget, early_stop_px=early_stop_px, direction=direction,
                         warm_start=warm_start, max_gap_s=max_gap_s, outputs=outputs)
        self._own_runtime = isinstance(runtime, str)
        if isinstance(runtime, str):
            if isinstance(network, str):
                network = create(network, weights)
            runtime = create_runtime(runtime, network, device=device, threads=threads,
                                     precision=precision, cache=engine_cache,
                                     workspace_mib=workspace_mib, say=say)
        self.runtime = runtime
        self._serving = Serving(runtime)
        self._paces = Paces()
        self._settling = CostBook()
        self._needs_check = True  # as far as is known
        self.none_reason = ''
        self._lock = threading.Lock()
        self._restart('first')

    @property
    def network(self) -> FlowNetwork:
        """The network that is run."""
        return self.runtime.network

    @property
    def status(self) -> str:
        """One line: the runtime that serves and why, and what is being made for a better one."""
        return self._serving.status

    def close(self) -> bool:
        """End what is being built in the background, if this estimator made its runtime.

        False where a builder does not listen: its thread goes on, and ends with the process.
        """
        return not self._own_runtime or self._serving.close()

    def reset(self) -> None:
        """Forget the stream; the next frame is its first."""
        with self._lock:
            self._restart('first')

    def prepare(self, height: int, width: int) -> None:
        """Run each engine once at this size, so that no frame waits for a compilation.

        The stream is not touched. Takes seconds where engines are compiled; but a runtime that
        is built in the background is only begun, and the one that serves meanwhile prepared.
        For a budget of time the acts are done once more, to know what they cost.
        """
        with self._lock, torch.inference_mode():
            while True:
                runtime = self._serving.at(height, width)
                try:
                    image = upload(np.zeros((height, width, 3), np.uint8), runtime.device)
                    run_acts(runtime.network, image, runtime.call)
                    if self._budget.timed:
                        self._rehearse(runtime, image)
                    return
                except Exception as error:
                    if not self._serving.replace(runtime, error):
                        raise

    def __call__(self, frame: NDArray[np.uint8], stamp: float, *, came: float | None = None,
                 after_ms: float = 0.0, period_s: float | None = None,
                 flow_out: NDArray[np.float32] | None = None) -> FlowResult | None:
        """Return the flow between the last frame and this one, or None; see the class.

        The flow is written into ``flow_out``, contiguous float32 (H, W, 2), where that is given,
        and is then the result's own array: memory that is used again saves the receiver a copy.
        With both directions it is the forward flow that goes there.

        For the budgets of time: ``came`` is the ``time.perf_counter()`` at which the frame's
        time began (None: now), ``after_ms`` what the caller needs from its return on, and
        ``period_s`` that of the camera (None: learnt from the stamps).
        """
        came = self._paces.clock() if came is None else came
        check_frame(frame)
        if flow_out is not None:
            check_flow_out(flow_out, frame)
        if not math.isfinite(came):
            raise ValueError(f'came must be finite, a time of time.perf_counter() in seconds; '
                             f'seen {came}')
        if not math.isfinite(stamp):
            raise ValueError(f'stamp must be finite, in seconds; seen {stamp}')
        if not (math.isfinite(after_ms) and after_ms >= 0):
            raise ValueError(f'after_ms must be at least 0 and finite; seen {after_ms}')
        if period_s is not None and not (math.isfinite(period_s) and period_s > 0):
            raise ValueError(f'period_s must be positive and finite, in seconds; seen '
                             f'{period_s}')
        with self._lock, torch.inference_mode():
            return self._next(frame, float(stamp), came, after_ms, period_s, flow_out)

    def settle(self) -> None:
        """Do now, while no frame waits, what the next frame will need of the last flow.

        Call it when the result is handed on. What was not settled is done at the beginning of
        the next frame; the results are the same.
        """
        with self._lock, torch.inference_mode():
            if self._previous is None or self._past.settled or not self.warm_start:
                return
            began = self._paces.clock()
            try:
                # Threads save nothing here, and then spin for milliseconds. To keep torch from
                # waking them costs one, too: of few values it wakes none.
                many = self._past.to_settle > _MANY
                with torch_alone() if many else nullcontext():
                    self._past.settle()
            except RuntimeError:
                return  # the next frame meets it again: there another runtime can take over
            self._settling.learn(_SETTLE, 1e3 * (self._paces.clock() - began))

    def _restart(self, reason: str) -> None:
        self._previous: _Frame | None = None
        self._past = Past(cold_reason=reason)
        self._period = StampPeriod()
        self._cold_reason = reason

    def _rehearse(self, runtime: Runtime, image: Tensor) -> None:
        """Learn what each act costs, cold and warm."""
        network = runtime.network
        height, width = image.shape[-2:]
        priors = [None, image.new_full((1, 2, height, width), PRIOR_PX)]
        for prior in priors if network.accepts_prior else priors[:1]:
            pace = self._paces.begin(runtime, (height, width), came=self._paces.clock())
            features = network.encode(image, call=runtime.call)
            pace.encoded()
            state = network.start(features, features, prior_flow=prior, call=runtime.call)
            state = replace(state, schedule=tuple(dict.fromkeys(state.schedule)))
            pace.run(state)

    def _next(self, frame: NDArray[np.uint8], stamp: float, came: float, after_ms: float,
              period_s: float | None,
              flow_out: NDArray[np.float32] | None) -> FlowResult | None:
        self.none_reason = self._why_none(frame.shape[:2], stamp)
        if self.none_reason == 'duplicate stamp':
            return None
        if self.none_reason:
            self._restart(self.none_reason)
        elif self._previous is not None:
            self._period.add(stamp - self._previous.stamp)
        order = self.order(came=came, after_ms=after_ms,
                           settle_ms=self._settling.typical(_SETTLE) or 0.0,
                           period_s=period_s or self._period.seconds, flow_out=flow_out)
        while True:
            runtime = self._serving.at(*frame.shape[:2])
            try:
                with torch_beside(runtime):
                    return self._done_by(runtime, frame, stamp, order)
            except Exception as error:  # the next best runtime does the same frame again
                if not self._serving.replace(runtime, error):
                    raise

    def _done_by(self, runtime: Runtime, frame: NDArray[np.uint8], stamp: float,
                 order: Order) -> FlowResult | None:
        watch = Stopwatch(runtime.device)
        if self._previous is not None and self._previous.runtime is not runtime:
            self._hand_over(self._previous, runtime)
        pace = self._paces.begin(
            runtime, (frame.shape[0], frame.shape[1]), came=order.came, limit_ms=order.limit_ms,
            after_ms=order.after_ms, early_stop_px=order.early_stop_px,
            output=(order.outputs, order.direction))
        new = self._encoded(frame, stamp, runtime)
        pace.encoded()
        watch.lap('encode')
        if self._previous is None:
            self._previous = new
            return None
        # The stream moves on only after all has gone well.
        result, past = self._pair(self._previous, new, order, watch, pace)
        self._previous, self._past = new, past
        return result

    def _encoded(self, pixels: NDArray[np.uint8], stamp: float, runtime: Runtime) -> _Frame:
        image = upload(pixels, runtime.device)
        kept = self._serving.may_change(*pixels.shape[:2])
        return _Frame(stamp=stamp, thumbnails=thumbnails(pixels), runtime=runtime,
                      features=runtime.network.encode(image, call=runtime.call),
                      pixels=pixels.copy() if kept else None)

    def _hand_over(self, previous: _Frame, runtime: Runtime) -> None:
        """Make the last frame and flow those of ``runtime``, so that no flow is lost.

        Features of one runtime mean nothing to another: the frame is encoded again.
        """
        if previous.pixels is None:  # nobody expected a change
            self.none_reason = 'runtime changed'
            self._restart('runtime changed')
            return
        try:
            self._past = self._past.to(runtime.device)
        except RuntimeError:  # of a device that died nothing can be read
            self._past = Past(cold_reason='runtime changed')
        self._previous = self._encoded(previous.pixels, previous.stamp, runtime)

    def _why_none(self, size: tuple[int, ...], stamp: float) -> str:
        """Return why this frame makes no pair with the last one, '' where it does."""
        previous = self._previous
        if previous is None:
            # After a restart that raised, its reason still stands.
            return self._cold_reason
        if tuple(size) != previous.features.size:
            return 'size changed'
        if stamp == previous.stamp:
            return 'duplicate stamp'
        if stamp < previous.stamp:
            return 'stamp went back'
        return 'gap' if stamp - previous.stamp > self._max_gap_s else ''

    def _pair(self, old: _Frame, new: _Frame, order: Order, watch: Stopwatch,
              pace: Pace) -> tuple[FlowResult, Past]:
        """Return the result of a pair, and what the next pair starts from."""
        outputs, ways = order.outputs, order.ways
        estimates: dict[str, Estimate] = {}
        for way in ways:
            other = estimates.get(REVERSE[way])
            last = other is not None or (len(ways) == 1 and not self._expects_check(outputs))
            estimates[way] = self._estimate(way, old, new, order, watch, pace, other=other,
                                            last=last)
        self._needs_check = lacks(estimates[ways[0]].output, outputs)
        if len(ways) == 1 and self._needs_check:
            way = REVERSE[order.direction]
            estimates[way] = self._estimate(way, old, new, order, None, pace, last=True)
            watch.lap('check')
        completed = complete(estimates, outputs)
        flows = {}
        if new.runtime.network.accepts_prior:  # else nothing of it would be used
            for way, estimate in completed.items():
                a, b = _ends(way, old, new)
                flows[way] = PairFlow.of(
                    estimate.output, cell=min(step.level for step in estimate.state.done),
                    small_from=a.thumbnails.small, small_to=b.thumbnails.small,
                    dt_s=new.stamp - old.stamp)
        results = [result_of(completed[way], direction=way, raw=estimates[way].output,
                             outputs=outputs, stamp_previous=old.stamp, stamp=new.stamp,
                             flow_out=order.flow_out if way == ways[0] else None)
                   for way in ways]
        watch.lap('output')
        timings, kept = watch.milliseconds(), pace.end()
        results = [replace(result, timings_ms=dict(timings), predicted_ms=kept.predicted_ms,
                           spent_ms=kept.spent_ms, budget_ms=kept.budget_ms,
                           overrun=kept.overrun) for result in results]
        result = replace(results[0], backward=results[1] if results[1:] else None)
        return result, Past(flows, cold_reason=self._cold_reason)

    def _expects_check(self, outputs: frozenset[str]) -> bool:
        """Tell whether the other direction will be needed, as the last pair did."""
        return self._needs_check and outputs > {'flow'}

    def _estimate(self, direction: str, old: _Frame, new: _Frame, order: Order,
                  watch: Stopwatch | None, pace: Pace, *, last: bool,
                  other: Estimate | None = None) -> Estimate:
        """Return one direction; ``last``: no other one comes after it."""
        runtime, network = new.runtime, new.runtime.network
        state, cold_reason, ended = None, 'warm start off', ''
        if other is not None:
            state, cold_reason = network.reversed(other.state), other.cold_reason
            ended = '' if state is None else other.ended
        if state is None:
            a, b = _ends(direction, old, new)
            prior: PriorFlow | None = None
            if order.warm_start and not network.accepts_prior:
                cold_reason = f'{network.name} takes no prior flow'
            elif order.warm_start:
                prior, cold_reason = self._past.prior(
                    direction, small_from=a.thumbnails.small, small_to=b.thumbnails.small,
                    dt_s=new.stamp - old.stamp)
                if watch is not None:
                    watch.lap('warm_start')
            count = order.iterations
            if count is None and order.limit_ms is not None:
                count = network.most_iterations
            state = network.start(a.features, b.features, prior_flow=prior, iterations=count,
                                  call=runtime.call)
        state, output, why = pace.run(state, watch.lap if watch is not None else None,
                                      differing=differing(old.thumbnails.blocks,
                                                          new.thumbnails.blocks),
                                      both=not last)
        if last or len(order.ways) == 1:  # nobody asks for its reversed
            state = replace(state, memory=())
        return Estimate(output, state, '' if state.warm else cold_reason, ended or why)


def check_frame(frame: NDArray[np.uint8]) -> None:
    """Raise ValueError unless ``frame`` is RGB uint8 (H, W, 3) with pixels in it."""
    if not isinstance(frame, np.ndarray):
        raise ValueError(f'frame must be a numpy array, RGB uint8 (H, W, 3); seen '
                         f'{type(frame).__name__}')
    if frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f'frame must be RGB (H, W, 3); seen shape {frame.shape}: convert grey '
                         f'or alpha images first')
    if 0 in frame.shape:
        raise ValueError(f'frame must have pixels; seen {frame.shape[1]}x{frame.shape[0]}')
    if frame.dtype != np.uint8:
        raise ValueError(f'frame must be uint8, 0..255; seen {frame.dtype}: scale and convert '
                         f'it first')


def check_flow_out(flow_out: NDArray[np.float32], frame: NDArray[np.uint8]) -> None:
    """Raise ValueError unless the flow of ``frame`` can be written into ``flow_out``."""
    shape = (*frame.shape[:2], 2)
    if not (isinstance(flow_out, np.ndarray) and flow_out.shape == shape
            and flow_out.dtype == np.float32 and flow_out.flags.carray):
        seen = (f'{flow_out.dtype} {flow_out.shape}' if isinstance(flow_out, np.ndarray)
                else type(flow_out).__name__)
        raise ValueError(f'flow_out must be float32 {shape}, in C order, aligned and writeable; '
                         f'seen {seen}')


def _ends(direction: str, old: _Frame, new: _Frame) -> tuple[_Frame, _Frame]:
    """Return the frame on whose grid the flow is, and the frame it leads to."""
    return (old, new) if direction == 'forward' else (new, old)
