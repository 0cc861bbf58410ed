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

"""How much a step still changed: what the early stop goes by.

Where a picture is smooth, a network's update is mostly what it makes of the camera's noise, and
can be larger than that of a small object that begins to move. So an update means something
only

- where the two frames differ by more than noise, in the means of blocks of 8x8 px, or next to
  it: there something moved, or its light changed;
- where the flow was not small already (half a cell of the level): a prior that goes on although
  the scene has stopped must be taken back, however alike the frames are.
"""

import cv2
import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.networks.base import State
from flow_ros.ops.sampling import resize_flow

DEFAULT_PX = 0.5

LEAST_DIFFERENCE = 2.5
MOST_DIFFERENCE = 6.0
"""Grey levels between which the difference lies that is more than noise."""
_NOISES = 5.0
"""Mean absolute differences that make it: four standard deviations."""
_NOISE_AT_MOST = 3.0  # so that what moves does not count as noise
_MOVING_CELLS = 0.5


def differing(blocks_a: NDArray[np.float32], blocks_b: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return (h, w): where two frames differ by more than noise, and the blocks around it.

    Both are the ``blocks`` of their ``Thumbnails``.
    """
    difference = np.abs(blocks_a - blocks_b)
    noise = float(np.minimum(difference, _NOISE_AT_MOST).mean())
    bound = min(max(_NOISES * noise, LEAST_DIFFERENCE), MOST_DIFFERENCE)
    found = (difference > bound).astype(np.uint8)
    return np.asarray(cv2.dilate(found, np.ones((3, 3), np.uint8)), dtype=np.bool_)


def largest_update(before: State, after: State, differing: NDArray[np.bool_]) -> float:
    """Return the largest update that means something between two states, full-resolution px.

    ``differing`` is that of the two frames.
    """
    flow = after.flow
    start = resize_flow(before.flow, (flow.shape[-2], flow.shape[-1]))
    update = (flow - start).square().sum(dim=1, keepdim=True).sqrt() * after.level
    return float((update * _meaningful(start, differing)).amax())


def has_meaning(state: State, differing: NDArray[np.bool_]) -> bool:
    """Tell whether any update of ``state`` could mean something."""
    return bool(differing.any()) or bool(_moving(state.flow).any())


def _meaningful(flow: Tensor, differing: NDArray[np.bool_]) -> Tensor:
    mask = torch.from_numpy(differing.astype(np.float32))[None, None].to(flow.device)
    size = (flow.shape[-2], flow.shape[-1])
    if size[0] < mask.shape[-2] or size[1] < mask.shape[-1]:
        mask = functional.adaptive_max_pool2d(mask, size)
    elif size != tuple(mask.shape[-2:]):
        mask = functional.interpolate(mask, size=size, mode='nearest')
    return torch.maximum(mask, _moving(flow).float())


def _moving(flow: Tensor) -> Tensor:
    return flow.abs().amax(dim=1, keepdim=True) > _MOVING_CELLS
