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

"""Accuracy against time: every pair with ground truth, cold, at each budget, beside DIS.

The pairs are those of a folder, as ``flow_ros evaluate --data DIR`` reads them, or procedural
ones of a seed that no network was trained on, which anybody can make (``make_pairs``).

The time of a network is that of a pair from a cold start: both frames encoded, the steps, the
flow as an array. On a stream the first frame's features are there already, and a warm start
needs fewer steps. The time of DIS is that of ``calc`` alone, on frames that are grey already.
Means are over the pairs.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
import time
from typing import Any, TYPE_CHECKING

import cv2
import numpy as np

from flow_ros.evaluation.benchmarks.children import Refused
from flow_ros.evaluation.benchmarks.timing import load_frames, load_network
from flow_ros.evaluation.evaluate import (
    ByteArray,
    DIS_PRESETS,
    DisFlow,
    Estimate,
    evaluate,
    network_estimator,
    Report,
    to_grey,
)
from flow_ros.evaluation.pairs import find_pairs, Pair
from flow_ros.flow_io import FlowFileError, write_flow, write_image

if TYPE_CHECKING:
    from flow_ros.networks.base import FlowNetwork

Tell = Callable[[str], object]

SEED = 90210
"""Of the procedural pairs; the recipes and the validation use others."""
MEASURES = ('epe', 'fl_all', 'outliers_1px', 's0_10', 's10_40', 's40_plus')


def make_pairs(*, folder: str, count: int, width: int, height: int, tell: Tell = print,
               seed: int = SEED) -> dict[str, Any]:
    """Write procedural pairs with their truth below ``folder``, as ``find_pairs`` reads them.

    Drifting, driving and flying scenes with motions of log-uniform length up to 80 px, seen
    by cameras with all their faults.
    """
    import torch

    from flow_ros.synthetic.camera import develop
    from flow_ros.synthetic.world import World, WorldConfig

    # Fewer textures than for training: drawing them would take longer than the pairs.
    world = World(seed=seed, config=WorldConfig(
        objects=(2, 9), largest_motion_px=80.0, driving=0.35, flying=0.15,
        surfaces=min(96, 4 * count), bank_objects=min(192, 8 * count)))
    for index in range(count):
        tell(f'drawing pair {index + 1} of {count}')
        clip = world.clip(index, batch=1, size=(height, width), frames=2)
        random = torch.Generator().manual_seed(index)
        images = [image[0].permute(1, 2, 0).round().byte().numpy()
                  for image in develop(clip.images, world.config.camera, random)]
        place = Path(folder) / 'procedural' / f'{index:03d}'
        place.mkdir(parents=True)
        for number, image in enumerate(images, start=1):
            write_image(place / f'frame{number}.png', np.ascontiguousarray(image))
        write_flow(place / 'flow.flo', clip.forward[0][0].permute(1, 2, 0).numpy())
        write_image(place / 'occlusion.png', np.repeat(
            clip.occluded_forward[0][0, 0].numpy()[..., None].astype(np.uint8) * 255, 3, axis=2))
    return {'pairs': count}


def budgets_of(network: 'FlowNetwork') -> list[int]:
    """Return the budgets to measure: up to twice the default of those that iterate, else all."""
    from flow_ros.networks.base import FlowNetwork

    if network.budget_unit != FlowNetwork.budget_unit:
        return list(range(1, network.default_iterations + 1))
    return [budget for budget in (1, 2, 4, 8, 16) if budget <= 2 * network.default_iterations]


def measure_network(*, network: str, runtime: str, precision: str,
                    budgets: Sequence[int] | None, data: str, threads: int | None, seconds: float,
                    tell: Tell = print) -> dict[str, Any]:
    """Measure one network in one runtime over all pairs, at each budget.

    Returns ``rows``, one per budget with the means over the pairs. Budgets that are not begun
    after ``seconds`` are left out; None are those of ``budgets_of``.
    """
    import torch

    from flow_ros.runtimes import create_runtime, RuntimeUnavailable

    if threads is not None:
        torch.set_num_threads(threads)
    loaded, trained = load_network(network)
    if not trained:
        raise Refused(f'{network}: no trained weights here, so no accuracy')
    pairs = _pairs(data)
    try:
        made = create_runtime(runtime, loaded, threads=threads, precision=precision)
    except RuntimeUnavailable as error:
        raise Refused(f'{runtime}: {error}') from error
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    for budget in budgets or budgets_of(loaded):
        if rows and time.monotonic() - begin > seconds:
            break
        report = evaluate({network: network_estimator(loaded, iterations=budget, runtime=made)},
                          pairs, warm_up=True, on_pair=_teller(tell, f'budget {budget}', pairs))
        rows.append({'network': network, 'runtime': made.name, 'precision': precision,
                     'iterations': budget, 'iterations_are': loaded.budget_unit,
                     **_means(report, network), 'ms': round(report.means()['ms'], 3)})
    return {'rows': rows}


def measure_dis(*, data: str, threads: int | None, tell: Tell = print) -> dict[str, Any]:
    """Measure OpenCV's DIS at its three presets over all pairs."""
    _set_threads(threads)
    pairs = _pairs(data)
    timed = {f'dis_{preset}': TimedDis(preset) for preset in DIS_PRESETS}
    report = evaluate(timed, pairs, warm_up=True, on_pair=_teller(tell, 'DIS', pairs))
    return {'rows': [{'network': name, 'runtime': 'opencv', 'precision': '', 'iterations': None,
                      'iterations_are': '', **_means(report, name),
                      'ms': round(estimator.mean_ms(warm_up_sizes=_sizes(report, name)), 3)}
                     for name, estimator in timed.items()]}


def time_dis(*, sizes: Sequence[str], threads: int | None, frames: int = 20,
             tell: Tell = print) -> dict[str, Any]:
    """Time DIS's presets by resolution on the synthetic scene: medians over ``frames`` pairs."""
    _set_threads(threads)
    rows = []
    for size in sizes:
        images = load_frames('synthetic', size, 8, tell)
        for preset in DIS_PRESETS:
            dis = TimedDis(preset)
            for index in range(frames + 1):
                dis(images[index % (len(images) - 1)], images[index % (len(images) - 1) + 1])
            ms = dis.ms[1:]
            p50, p99 = (float(value) for value in np.quantile(ms, (0.5, 0.99)))
            rows.append({'network': f'dis_{preset}', 'runtime': 'opencv', 'precision': '',
                         'size': size, 'iterations': None, 'warm': False,
                         'fps': round(1e3 / p50, 3), 'ms_p50': round(p50, 3),
                         'ms_p99': round(p99, 3), 'peak_mb': None, 'frames': len(ms)})
    return {'rows': rows}


class TimedDis:
    """DIS as an estimator that times its ``calc`` alone; ``ms`` holds every call's time."""

    def __init__(self, preset: str) -> None:
        self.ms: list[float] = []
        self.shapes: list[tuple[int, ...]] = []
        self._dis = DisFlow(preset)

    def __call__(self, image1: ByteArray, image2: ByteArray) -> Estimate:
        """Return the flow from ``image1`` to ``image2``, RGB uint8."""
        grey1, grey2 = to_grey(image1), to_grey(image2)
        start = time.perf_counter()
        flow = self._dis.calc(grey1, grey2)
        self.ms.append(1e3 * (time.perf_counter() - start))
        self.shapes.append(image1.shape)
        return Estimate(flow)

    def mean_ms(self, *, warm_up_sizes: Iterable[tuple[int, ...]]) -> float:
        """Return the mean without the first call of each of these shapes, its warm-up."""
        left = set(warm_up_sizes)
        counted = []
        for ms, shape in zip(self.ms, self.shapes):
            if shape in left:
                left.discard(shape)
            else:
                counted.append(ms)
        return float(np.mean(counted))


def _sizes(report: Report, name: str) -> set[tuple[int, ...]]:
    return {(row.height, row.width, 3) for row in report.rows[name]}


def _means(report: Report, name: str) -> dict[str, Any]:
    """Return the means over pairs of the measures shown; None where no pixel counts."""
    means = report.means(name)
    values = {measure: means.get(measure, float('nan')) for measure in MEASURES}
    return {'pairs': len(report.rows[name]),
            **{measure: round(value, 4) if np.isfinite(value) else None
               for measure, value in values.items()}}


def _pairs(data: str) -> list[Pair]:
    try:
        pairs, _ = find_pairs(data)
    except FlowFileError as error:
        raise Refused(f'--data: {error}') from error
    if not pairs:
        raise Refused(f'--data {Path(data).name}: no pair with truth below it. A pair is a folder '
                      'with frame1.png, frame2.png and flow.flo or flow.png')
    return pairs


def _teller(tell: Tell, what: str, pairs: Sequence[Pair]) -> Callable[..., None]:
    done = 0

    def on_pair(*_: object) -> None:
        nonlocal done
        done += 1
        tell(f'{what}, pair {done} of {len(pairs)}')

    return on_pair


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        cv2.setNumThreads(threads)
