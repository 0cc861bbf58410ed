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

"""Peak memory by resolution: how high a stream rises above the process that is ready for it.

Ready is a process that has imported the packages of its runtime and loaded the network, but
made no engine and seen no frame. From there counts everything: making the engines (compiling
them, where the runtime does, with an empty cache), features of two frames, steps, outputs. The
budget is a stated one: every network is measured as it is run. MB are 2^20 bytes; what the
machine's resident memory says, so with what its allocator keeps for later.

Call ``peak_memory`` in a process that has done nothing else (``children.run_child``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
import tempfile
from typing import Any, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flow_ros.evaluation.benchmarks.children import Refused
from flow_ros.evaluation.benchmarks.peak import MB, PeakMemory
from flow_ros.evaluation.benchmarks.timing import load_network, load_packages

if TYPE_CHECKING:
    from flow_ros.runtimes import Runtime

MEGAPIXEL = 1e6
FRAME_S = 1 / 30
_TEXTURE_PX = 16


@dataclass(frozen=True)
class Line:
    """Peak memory by size: ``offset_mb`` + ``mb_per_megapixel`` x megapixels.

    ``worst`` is the largest deviation of a measured peak from the line, as a share of the peak:
    near 0 where memory is linear in the pixels.
    """

    offset_mb: float
    mb_per_megapixel: float
    worst: float

    def at(self, megapixels: float) -> float:
        """Return the peak (MB) that the line says."""
        return self.offset_mb + self.mb_per_megapixel * megapixels


BOUNDS: Mapping[tuple[str, str], Line] = {
    ('dip_rt', 'torch'): Line(60, 220, 0),
    ('dip_rt', 'openvino'): Line(170, 320, 0),
    ('dip', 'torch'): Line(140, 900, 0),
    ('hd3_compact', 'torch'): Line(60, 650, 0),
    ('mscsl', 'torch'): Line(50, 380, 0),
}
"""Of network and runtime (f32, on the CPU): what the peak stays under, at every size.

So dip_rt at 3840x2160 takes at most 1.9 GB in torch and 2.8 GB through OpenVINO, and dip at
1920x1080 2.0 GB in torch. Of one direction: where both are asked for, dip keeps the first's
state while it does the second.
"""


def fit_line(megapixels: Sequence[float], peaks_mb: Sequence[float]) -> Line:
    """Return the line through the measured peaks, least squares of the relative error.

    Raises ValueError for fewer than two different sizes.
    """
    if len(set(megapixels)) < 2 or len(megapixels) != len(peaks_mb):
        raise ValueError(f'a line takes the peaks of two sizes at least; seen sizes '
                         f'{list(megapixels)}, peaks {list(peaks_mb)}')
    sizes, peaks = np.asarray(megapixels, float), np.asarray(peaks_mb, float)
    scaled = np.stack([1 / peaks, sizes / peaks], axis=1)
    (offset, slope), *_ = np.linalg.lstsq(scaled, np.ones(len(peaks)), rcond=None)
    worst = np.abs((offset + slope * sizes) / peaks - 1).max()
    return Line(float(offset), float(slope), float(worst))


def peak_memory(*, network: str, runtime: str, precision: str = 'f32', width: int, height: int,
                threads: int | None = None, iterations: int | None = None,
                frames: int = 4, device: str | None = None) -> dict[str, Any]:
    """Return the peak memory of a stream of ``frames`` frames, the second cold, the others warm.

    A dict of network, runtime, precision, size, megapixels, iterations, frames, ``loaded_mb``
    (resident before), and above that: ``peak_mb`` (the highest), ``prepare_mb`` (the highest
    while the engines were made), ``stream_mb`` (the highest while frames went through) and
    ``steady_mb`` (the highest of the last frame). ``cuda_mb`` is the most that torch had of the
    GPU, with the network, None on the CPU; ``bound_mb`` what ``BOUNDS`` states for the peak, if
    anything. Raises Refused where it cannot be measured.
    """
    import torch

    from flow_ros.streaming import Budget, FlowEstimator

    if frames < 3:
        raise Refused(f'a warm frame takes 3 frames at least; seen {frames}')
    if threads is not None:
        torch.set_num_threads(threads)
    loaded, trained = load_network(network)
    load_packages(runtime)
    torch.zeros(1) + 1  # what torch keeps for itself is not the network's
    pictures = _pictures(width, height, frames)
    with tempfile.TemporaryDirectory() as cache, PeakMemory() as making:
        made = _runtime(runtime, loaded, precision, device, threads, Path(cache), width, height)
        if made.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(made.device)
        estimator = FlowEstimator(runtime=made, budget=Budget(iterations=iterations),
                                  max_gap_s=3600.0)
        estimator.early_stop_px = 0.0
        estimator.prepare(height, width)
        start_mb = making.start_mb
    with PeakMemory(above_mb=start_mb) as streaming:
        for index, picture in enumerate(pictures[:-1]):
            estimator(picture, index * FRAME_S)
    with PeakMemory(above_mb=start_mb) as last:
        result = estimator(pictures[-1], (frames - 1) * FRAME_S)
    cuda_mb = None
    if made.device.type == 'cuda':
        cuda_mb = round(torch.cuda.max_memory_allocated(made.device) / MB, 1)
    bound = BOUNDS.get((network, made.name)) if precision == 'f32' and cuda_mb is None else None
    megapixels = width * height / MEGAPIXEL
    highest = max(making.peak_mb, streaming.peak_mb, last.peak_mb)
    return {'network': network, 'runtime': made.name, 'precision': precision,
            'size': f'{width}x{height}', 'megapixels': megapixels,
            'iterations': iterations or made.network.default_iterations, 'frames': frames,
            'warm': result is not None and result.warm, 'trained': trained,
            'threads': threads or torch.get_num_threads(), 'loaded_mb': round(start_mb, 1),
            'peak_mb': round(highest, 1), 'prepare_mb': round(making.peak_mb, 1),
            'stream_mb': round(max(streaming.peak_mb, last.peak_mb), 1),
            'steady_mb': round(last.peak_mb, 1), 'cuda_mb': cuda_mb,
            'bound_mb': None if bound is None else round(bound.at(megapixels), 1)}


def _runtime(name: str, network: Any, precision: str, device: str | None, threads: int | None,
             cache: Path, width: int, height: int) -> 'Runtime':
    from flow_ros.runtimes import create_runtime, RuntimeUnavailable
    from flow_ros.runtimes.handover import best_runtime

    try:
        return best_runtime(create_runtime(name, network, device=device, threads=threads,
                                           precision=precision, cache=cache), height, width)
    except (RuntimeUnavailable, ValueError) as error:
        raise Refused(f'{name}: {error}') from error


def _pictures(width: int, height: int, count: int) -> list[NDArray[np.uint8]]:
    """Return frames of one texture that moves by 3 px a frame."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (height // _TEXTURE_PX + 1, width // _TEXTURE_PX + 2, 3),
                             dtype=np.uint8)
    texture = blocks.repeat(_TEXTURE_PX, axis=0)[:height].repeat(_TEXTURE_PX, axis=1)
    return [np.ascontiguousarray(np.roll(texture, 3 * index, axis=1)[:, :width])
            for index in range(count)]
