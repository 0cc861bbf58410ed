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

"""Runs estimators over pairs with ground truth and gathers what they measure.

An estimator is any callable ``(image1, image2) -> Estimate`` (or a bare (H, W, 2) flow) on
RGB uint8 frames; ``network_estimator`` makes one from a network. ``baselines()`` are the two
that every table shows beside it: OpenCV's DIS (medium) and zero flow.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
import math
import time
from typing import Any, TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from flow_ros.evaluation.metrics import (
    Calibration,
    flow_metrics,
    mean_metrics,
    REMOVED,
    Sparsification,
)
from flow_ros.evaluation.pairs import LoadedPair, PairSource, Skipped
from flow_ros.flow_io import FlowFileError

if TYPE_CHECKING:  # torch takes seconds to import, and reading a table needs none of it
    from torch import Tensor

    from flow_ros.networks.base import Call, FlowNetwork, FlowOutput
    from flow_ros.runtimes import Runtime

ByteArray = NDArray[np.uint8]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Estimate:
    """What an estimator returns: flow (H, W, 2) px and, where known, (H, W) maps in [0, 1]."""

    flow: FloatArray
    confidence: FloatArray | None = None
    occlusion: FloatArray | None = None


Estimator = Callable[[ByteArray, ByteArray], Estimate | FloatArray]


DIS_PRESETS: Mapping[str, int] = {'ultrafast': cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
                                  'fast': cv2.DISOPTICAL_FLOW_PRESET_FAST,
                                  'medium': cv2.DISOPTICAL_FLOW_PRESET_MEDIUM}


class DisFlow:
    """OpenCV's dense inverse search as an estimator; ``preset`` is one of ``DIS_PRESETS``."""

    def __init__(self, preset: str = 'medium') -> None:
        """Make the algorithm, which keeps its buffers between calls."""
        self._dis: Any = cv2.DISOpticalFlow.create(DIS_PRESETS[preset])

    def __call__(self, image1: ByteArray, image2: ByteArray) -> Estimate:
        """Return the flow from ``image1`` to ``image2``, RGB uint8."""
        return Estimate(self.calc(to_grey(image1), to_grey(image2)))

    def calc(self, grey1: ByteArray, grey2: ByteArray) -> FloatArray:
        """Return the flow (H, W, 2) between two frames, uint8 (H, W), that are grey already."""
        return np.asarray(self._dis.calc(grey1, grey2, None), dtype=np.float32)


def to_grey(image: ByteArray) -> ByteArray:
    """Return RGB uint8 as grey uint8, to the bit as ``cv2.imread(file, 0)`` reads a PNG.

    DIS feels the last bit: with the rounded grey of ``cvtColor`` one Sintel pair goes from
    17.7 to 23.2 px. So the grey is the one that published numbers were made with (the PNG
    library's weights of 1/32768, cut off), whatever kind of file the frame came from.
    """
    # All sums are whole numbers below 2^24, so float32 is exact.
    weights = np.array([[9797.0, 19234.0, 3737.0]], dtype=np.float32) / np.float32(32768)
    return cv2.transform(image.astype(np.float32), weights).astype(np.uint8)


def zero_flow(image1: ByteArray, image2: ByteArray) -> Estimate:
    """Return no motion at all: what every estimator has to beat."""
    return Estimate(np.zeros((*image1.shape[:2], 2), dtype=np.float32))


def baselines() -> dict[str, Estimator]:
    """Return the estimators every table shows beside a network's, by name."""
    return {'dis_medium': DisFlow(), 'zero': zero_flow}


def estimate_pair(network: 'FlowNetwork', image1: 'Tensor', image2: 'Tensor', *,
                  iterations: int | None = None, call: 'Call | None' = None) -> 'FlowOutput':
    """Run the four acts cold on one pair, (B, 3, H, W) float RGB 0..255."""
    state = network.start(network.encode(image1, call=call), network.encode(image2, call=call),
                          iterations=iterations, call=call)
    while state.schedule:
        state = network.step(state, call=call)
    return network.finish(state, call=call)


def network_estimator(network: 'FlowNetwork', *, iterations: int | None = None,
                      runtime: 'str | Runtime' = 'torch') -> Estimator:
    """Return an estimator that runs ``network`` cold, with a budget of ``iterations``.

    ``runtime`` 'torch' runs the network's own code where its parameters are and leaves its
    training mode as it was; other names make a runtime (see ``flow_ros.runtimes``). A runtime
    of ``network`` that is there already is used.
    """
    import torch

    made: Runtime | None = None
    if not isinstance(runtime, str):
        made = runtime
    elif runtime != 'torch':
        from flow_ros.runtimes import create_runtime
        made = create_runtime(runtime, network)

    def of_size(height: int, width: int) -> 'tuple[FlowNetwork, torch.device, Call | None]':
        """Return what runs a pair of this size: never what serves while engines are built."""
        if made is not None:
            from flow_ros.runtimes.handover import best_runtime
            best = best_runtime(made, height, width)
            return best.network, best.device, best.call
        parameter = next(network.parameters(), None)
        return network, torch.device('cpu') if parameter is None else parameter.device, None

    def to_tensor(image: ByteArray, device: torch.device) -> 'Tensor':
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return tensor[None].to(device, torch.float32)

    def to_map(tensor: 'Tensor | None') -> FloatArray | None:
        return None if tensor is None else tensor[0, 0].float().cpu().numpy()

    def estimator(image1: ByteArray, image2: ByteArray) -> Estimate:
        runs, device, call = of_size(*image1.shape[:2])
        was_training = network.training
        network.eval()
        try:
            # Not inference mode, in which runtimes cannot trace; without TF32, as they are, so
            # that the numbers are those of any machine.
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                output = estimate_pair(runs, to_tensor(image1, device),
                                       to_tensor(image2, device), iterations=iterations,
                                       call=call)
                flow = output.flow[0].float().permute(1, 2, 0).cpu().numpy()
                return Estimate(flow, to_map(output.confidence), to_map(output.occlusion))
        finally:
            network.train(was_training)

    return estimator


@dataclass(frozen=True)
class PairResult:
    """What one estimator measured on one pair: the measures by name, and its time."""

    name: str
    width: int
    height: int
    metrics: Mapping[str, float]
    ms: float

    def as_dict(self) -> dict[str, Any]:
        """Return the row of the JSON file."""
        return {'name': self.name, 'width': self.width, 'height': self.height,
                **_finite(self.metrics), 'ms': round(self.ms, 3)}


@dataclass(frozen=True)
class Report:
    """What all estimators measured: rows by estimator, in the order of the pairs.

    ``subjects`` are the estimators under test, by default the first; the others are beside them.
    """

    rows: Mapping[str, Sequence[PairResult]]
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    skipped: Sequence[Skipped] = ()
    sparsifications: Mapping[str, Sparsification] = field(default_factory=dict)
    under_test: Sequence[str] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The estimators; those under test first, the others are beside them."""
        return tuple(self.rows)

    @property
    def subjects(self) -> tuple[str, ...]:
        """The estimators under test: the first, where no others were named."""
        return tuple(self.under_test) or self.names[:1]

    def means(self, name: str | None = None) -> dict[str, float]:
        """Return the means over pairs of an estimator (default: the first), ``ms`` too."""
        rows = self.rows[self.names[0] if name is None else name]
        return mean_metrics({**row.metrics, 'ms': row.ms} for row in rows)

    def as_dict(self) -> dict[str, Any]:
        """Return the whole report for a JSON file; a measure with no pixels is null.

        What is known of the first estimator under test stands at the top; where several are
        under test, each has the same under ``networks``.
        """
        content = {
            'estimator': self.subjects[0],
            **self._estimator(self.subjects[0]),
            'baselines': {name: {'pairs': [row.as_dict() for row in self.rows[name]],
                                 'means': _finite(self.means(name))}
                          for name in self.names if name not in self.subjects},
            'skipped': [{'name': row.name, 'reason': row.reason} for row in self.skipped],
        }
        if len(self.subjects) > 1:
            content['networks'] = {name: self._estimator(name) for name in self.subjects}
        return content

    def _estimator(self, name: str) -> dict[str, Any]:
        calibration = self.calibrations.get(name)
        ranking = self.sparsifications.get(name)
        return {
            'pairs': [row.as_dict() for row in self.rows[name]],
            'means': _finite(self.means(name)),
            'calibration': None if calibration is None else {
                'ece': _finite({'ece': calibration.error})['ece'],
                'bins': [{'low': row.low, 'high': row.high, 'pixels': row.pixels,
                          'confidence': round(row.confidence, 6),
                          'share_correct': round(row.share_correct, 6)}
                         for row in calibration.bins_filled]},
            'sparsification': None if ranking is None or not ranking.pairs else {
                'ausc': round(ranking.ausc, 6), 'ause': round(ranking.ause, 6),
                'pairs': ranking.pairs, 'removed': [round(float(x), 2) for x in REMOVED],
                'curve': [round(float(y), 6) for y in ranking.curve],
                'oracle': [round(float(y), 6) for y in ranking.oracle]},
        }


OnPair = Callable[[PairSource, LoadedPair, Mapping[str, Estimate]], None]


def evaluate(estimators: Mapping[str, Estimator], pairs: Iterable[PairSource], *,
             warm_up: bool = False, on_pair: OnPair | None = None,
             under_test: Sequence[str] = ()) -> Report:
    """Run ``estimators`` (by name) over ``pairs``.

    Those ``under_test`` come first; if none are named, the first one is it.
    ``warm_up`` runs each estimator once, untimed, on every new image size, so that ``ms``
    holds neither compilation nor first allocations. ``on_pair`` is called after every pair that
    could be read; the others are in ``skipped`` with the reason.
    """
    rows: dict[str, list[PairResult]] = {name: [] for name in estimators}
    calibrations: dict[str, Calibration] = {}
    sparsifications: dict[str, Sparsification] = {}
    skipped: list[Skipped] = []
    sizes: set[tuple[int, ...]] = set()
    for pair in pairs:
        try:
            loaded = pair.load()
        except FlowFileError as error:
            skipped.append(Skipped(pair.name, str(error)))
            continue
        height, width = loaded.truth.shape[:2]
        estimates: dict[str, Estimate] = {}
        for name, estimator in estimators.items():
            if warm_up and loaded.image1.shape not in sizes:
                estimator(loaded.image1, loaded.image2)
            begin = time.perf_counter()
            estimate = estimator(loaded.image1, loaded.image2)
            ms = 1e3 * (time.perf_counter() - begin)
            if not isinstance(estimate, Estimate):
                estimate = Estimate(estimate)
            estimates[name] = estimate
            measures = flow_metrics(estimate.flow, loaded.truth, occlusion=loaded.occlusion,
                                    boundary_distance=loaded.boundary_distance)
            if estimate.confidence is not None:
                calibration = calibrations.setdefault(name, Calibration())
                calibration.add(estimate.confidence, estimate.flow, loaded.truth)
                ranking = sparsifications.setdefault(name, Sparsification())
                measures |= ranking.add(estimate.confidence, estimate.flow, loaded.truth)
            rows[name].append(PairResult(pair.name, width, height, measures, ms))
        sizes.add(loaded.image1.shape)
        if on_pair is not None:
            on_pair(pair, loaded, estimates)
    return Report(rows, calibrations, skipped, sparsifications, tuple(under_test))


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: round(value, 6) if math.isfinite(value) else None
            for name, value in values.items()}
