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

"""What one pair of frames gave."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flow_ros.networks.base import Step


@dataclass(frozen=True)
class FlowResult:
    """The flow between two frames of a stream, and how it came about.

    ``flow`` (H, W, 2) float32, px per frame pair: 'forward' from ``stamp_previous`` to
    ``stamp`` on the previous frame's grid, 'backward' from ``stamp`` to ``stamp_previous`` on
    the newer frame's grid. ``confidence`` (H, W) float32 in [0, 1] and ``occlusion`` (H, W)
    uint8, 255 where the pixel has no counterpart, are None when they were not asked for;
    ``occlusion_probability`` (H, W) float32 also where the network does not predict it.
    ``steps`` are those really done and ``iterations`` their number. ``cold_reason`` says why
    the start was not warm, '' when it was. ``timings_ms`` holds encode, warm_start, steps,
    finish (in steps where the runtime does both as one, after a capture where it had to be made
    ready for that), output, total, and check where the other direction was computed as a check
    only.
    ``backward`` is set when both directions were asked for. Arrays are the receiver's own.

    ``predicted_ms`` is what the pair was to take when its steps were planned, from the arrival
    of its frame until the result is there: None before that is known, and without foresight of
    an early stop. ``spent_ms`` is what it did take; ``budget_ms`` is the time that was asked,
    None where none was, and ``overrun`` says that it was not kept, the time that the caller
    still needs counted in. ``ended`` is why no more steps were done: 'schedule' (all that was
    asked), 'deadline' (no time was left for more) or 'early stop' (the last one changed next to
    nothing).
    """

    flow: NDArray[np.float32]
    confidence: NDArray[np.float32] | None
    occlusion: NDArray[np.uint8] | None
    occlusion_probability: NDArray[np.float32] | None
    steps: tuple[Step, ...]
    iterations: int
    warm: bool
    cold_reason: str
    direction: str
    stamp_previous: float
    stamp: float
    dt_s: float
    timings_ms: dict[str, float]
    backward: 'FlowResult | None' = None
    predicted_ms: float | None = None
    spent_ms: float = 0.0
    budget_ms: float | None = None
    overrun: bool = False
    ended: str = 'schedule'
