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

"""Weights and images of the parity data, rebuilt from names and sizes instead of shipped."""

import zlib

import numpy as np


def seeded_tensor(key: str, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
    """Return the tensor that the parity runs had under the state_dict key ``key``."""
    generator = np.random.default_rng(zlib.crc32(key.encode()))
    leaf = key.rpartition('.')[2]
    if leaf == 'num_batches_tracked':
        return np.zeros(shape, np.int64)
    if leaf == 'running_var':
        return generator.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 4:
        deviation, mean = gain * np.sqrt(1.0 / np.prod(shape[1:])), 0.0
    elif leaf == 'running_mean':
        deviation, mean = 0.1, 0.0
    elif leaf == 'weight':
        deviation, mean = 0.1, 1.0
    else:
        deviation, mean = 0.05, 0.0
    return (mean + deviation * generator.standard_normal(shape)).astype(np.float32)


def true_flow(height: int, width: int) -> np.ndarray:
    """Return the smooth flow (2, H, W) by which the second parity image was moved."""
    across = 4.0 + 2.0 * np.sin(2 * np.pi * np.arange(height) / height)
    down = -2.0 + 1.5 * np.cos(2 * np.pi * np.arange(width) / width)
    flow = np.stack([np.broadcast_to(across[:, None], (height, width)),
                     np.broadcast_to(down[None, :], (height, width))])
    return flow.astype(np.float32)
