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

"""The two matches of DIP as its released network computes them.

``ops.matching`` holds the paper's equations; the released weights were trained with something
else, which is kept here. All maps are (B, C, H, W), flow is in px of the map.
"""

import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.exporting import is_exporting
from flow_ros.ops.matching import local_search, SEEDS
from flow_ros.ops.sampling import pixel_grid, sample

GROUPS = 2


def propagation_correlation_released(features_a: Tensor, features_b: Tensor,
                                     flow: Tensor) -> Tensor:
    """Correlate with the propagated candidates, in the pairing of DIP's released network.

    The released network stacks F2 shifted by each of the five seeds (1280 channels, seed
    after seed), warps the stack, and then splits its channels in the wrong order: plane
    5g + s is the mean over k of F1[2k + g] * stack[10k + 5g + s]. So each plane mixes all
    seeds and pairs unrelated channels. This is not the paper's equation, but the published
    weights work with nothing else.

    Here each seed is sampled on its own and its 256 channels are summed into the planes they
    belong to, so the stack never exists. Stack channel j meets F1 channel j // 5 and counts
    for plane j % 10; a few zero channels in front of a seed's first make j a multiple of 10.

    The warped stack is F2 at the *clamped* target plus the seed, clamped again: the seed moves
    a point that left the map back into it, so the order of the clamps matters.
    Returns (B, 10, H, W).
    """
    batch, channels, height, width = features_a.shape
    per_group = len(SEEDS)
    planes = GROUPS * per_group
    if channels % GROUPS or features_b.shape[1] != channels:
        raise ValueError(f'both maps must have the same even number of channels; seen '
                         f'{channels} and {features_b.shape[1]}')
    points = pixel_grid(height, width, flow) + flow
    points = torch.stack([points[:, 0].clamp(0, width - 1),
                          points[:, 1].clamp(0, height - 1)], dim=1)
    # dividing first keeps half precision from overflowing in the sum
    pairs = (features_a / (channels // GROUPS)).reshape(
        batch, channels // GROUPS, GROUPS, 1, height, width)
    total = pairs.new_zeros((batch, GROUPS, per_group, height, width))
    for index, (dx, dy) in enumerate(SEEDS):
        moved = torch.stack([points[:, 0] + dx, points[:, 1] + dy], dim=1)
        front = (index * channels) % planes
        back = -(front + channels) % planes
        first = (index * channels) // planes
        count = (front + channels + back) // planes
        sampled = functional.pad(sample(features_b, moved), (0, 0, 0, 0, front, back))
        sampled = sampled.reshape(batch, count, GROUPS, per_group, height, width)
        total = total + (pairs[:, first:first + count] * sampled).sum(dim=1)
    return total.reshape(batch, planes, height, width)


def local_search_released(features_a: Tensor, warped_b: Tensor, radius: int = 2) -> Tensor:
    """Correlate with the (2r + 1)**2 neighbours in the warped F2, replicated at its border.

    Plane (2r + 1)(dx + r) + (dy + r) is the mean over the channels of F1(x) * F2'(x + (dx, dy)):
    dx is the outer index, unlike in ``ops.matching``. Returns (B, (2r + 1)**2, H, W).
    """
    channels, height, width = features_a.shape[1:]
    side = 2 * radius + 1
    if is_exporting():
        # Twenty-five shifts are hundreds of layers, each as large as the features.
        planes = local_search(features_a, warped_b, radius, padding='border')
        return planes.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
    scaled = features_a / channels
    padded = functional.pad(warped_b, (radius,) * 4, mode='replicate')
    return torch.stack([(scaled * padded[:, :, y:y + height, x:x + width]).sum(dim=1)
                        for x in range(side) for y in range(side)], dim=1)
