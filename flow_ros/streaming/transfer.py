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

"""Frames to tensors and results to arrays: what a stream moves beside the network's work.

On the CPU this is OpenCV and NumPy, in few passes: several times faster than torch's strided
copies (`bench/node_cost.py`). And torch would wake its OpenMP threads for every map, which then
spin for milliseconds on the cores that another runtime's threads need. Nothing here is used
twice: a tensor may be kept by the network, an array by whoever takes the result.
"""

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor

OCCLUDED = 0.5
"""The probability of having no counterpart from which on a pixel counts as occluded."""


def upload(frame: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Return ``frame`` (H, W, 3) uint8 as (1, 3, H, W) float32 0..255 on ``device``.

    The frame may have any strides and be read-only. On the CPU the result is channels last, as
    the frame is and convolutions like it; on others it is contiguous, and travels as bytes.
    """
    if device.type == 'cpu':
        return torch.from_numpy(frame.astype(np.float32, order='C')).permute(2, 0, 1)[None]
    frame = np.ascontiguousarray(frame)
    if not frame.flags.writeable:
        frame = frame.copy()  # torch warns of memory that it could change
    image = torch.from_numpy(frame).to(device).permute(2, 0, 1)[None]
    return image.to(torch.float32, memory_format=torch.contiguous_format)


def all_finite(values: Tensor) -> bool:
    """Tell whether ``values``, of any shape, have neither NaN nor infinity.

    One sum, into which every such value goes; on a GPU one wait for it.
    """
    if values.device.type != 'cpu' or values.dtype != torch.float32:
        return math.isfinite(float(values.sum(dtype=torch.float32)))
    rows = values.contiguous().numpy().reshape(-1, values.shape[-1] if values.ndim else 1)
    return math.isfinite(cv2.sumElems(rows)[0])  # summed in float64: nothing overflows


def flow_array(flow: Tensor, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Return ``flow`` (2, H, W) as float32 (H, W, 2): always a copy, the receiver's own.

    It is written into ``out``, contiguous, where that is given.
    """
    flow = flow.float()
    if flow.device.type != 'cpu':
        interleaved = flow.permute(1, 2, 0).contiguous()
        if out is None:
            return np.asarray(interleaved.cpu().numpy(), dtype=np.float32)
        torch.from_numpy(out).copy_(interleaved)
        return out
    out = np.empty((*flow.shape[1:], 2), dtype=np.float32) if out is None else out
    cv2.merge(list(flow.contiguous().numpy()), dst=out)
    return out


def map_array(values: Tensor) -> NDArray[np.float32]:
    """Return ``values`` (H, W) as float32; on the CPU the tensor's own memory where it can be."""
    result: NDArray[np.float32] = values.float().contiguous().cpu().numpy()
    return result


def mask_array(probability: Tensor) -> NDArray[np.uint8]:
    """Return uint8 (H, W): 255 where ``probability`` (H, W) is at least 1/2, else 0 (NaN too)."""
    if probability.device.type != 'cpu':  # a byte a pixel to carry, not four
        mask: NDArray[np.uint8] = ((probability >= OCCLUDED).to(torch.uint8) * 255).cpu().numpy()
        return mask
    above: Any = map_array(probability) >= np.float32(OCCLUDED)
    return np.multiply(above, np.uint8(255), dtype=np.uint8)
