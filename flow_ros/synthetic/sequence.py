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

"""An endless image stream with known flow: the default source, demos and tests."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
import torch

from flow_ros.synthetic.scenes import (
    flow_between,
    occlusion_between,
    render,
    Rendered,
    Scene,
    Textures,
)
from flow_ros.synthetic.textures import make_bank


@dataclass(frozen=True)
class SyntheticFrame:
    """One frame of a stream with its truth, all on this frame's grid.

    ``image`` uint8 (H, W, 3) RGB; ``flow_forward`` to the next and ``flow_backward`` to the
    previous frame, float32 (H, W, 2), px per frame; ``occlusion_*`` bool (H, W): no counterpart
    in that frame.
    """

    image: NDArray[np.uint8]
    flow_forward: NDArray[np.float32]
    flow_backward: NDArray[np.float32]
    occlusion_forward: NDArray[np.bool_]
    occlusion_backward: NDArray[np.bool_]


class SyntheticSequence:
    """Shapes that sway over a swaying background, for ever; frame k is a function of k.

    ``motion_px`` is the largest translation per frame of the fastest layer, px.
    """

    def __init__(self, width: int, height: int, seed: int = 0, *, layers: int = 7,
                 motion_px: float = 12.0) -> None:
        if width < 16 or height < 16:
            raise ValueError(f'a synthetic sequence needs at least 16x16 px; seen '
                             f'{width}x{height}')
        random = np.random.default_rng([seed, 7])
        self.size = (height, width)
        bank = make_bank(seed, surfaces=2, objects=layers)
        self._textures = Textures.of(bank, torch.device('cpu')).pick(
            np.array([[0]]), np.arange(layers)[None])
        radius = np.sort(random.uniform(0.1, 0.3, layers))[::-1] * max(width, height)
        self._scale = np.concatenate([[256 / random.uniform(0.8, 1.2)], radius])
        self._centre = random.uniform(-0.38, 0.38, (layers + 1, 2)) * [width, height]
        self._period = random.uniform(40, 120, (layers + 1, 3))  # frames: x, y, turn
        self._phase = random.uniform(0, 2 * np.pi, (layers + 1, 3))
        speed = random.uniform(0.3, 1.0, (layers + 1, 2)) * motion_px / 2 ** 0.5
        speed[0] *= 0.4  # the background sways less than the shapes
        self._reach = speed * self._period[:, :2] / (2 * np.pi)  # px, so that speed is the peak
        self._turn = random.uniform(0.0, 0.25, layers + 1)  # rad
        self._zoom = random.uniform(0.0, 0.12, layers + 1)
        self._rendered = lru_cache(maxsize=4)(self._render)

    def frame(self, k: int) -> SyntheticFrame:
        """Return frame ``k`` (any integer) with its truth."""
        now, after, before = (self._rendered(k + step) for step in (0, 1, -1))
        forward = flow_between(self._scene(k, k + 1), now.layer, 0, 1)
        backward = flow_between(self._scene(k, k - 1), now.layer, 0, 1)
        image = now.image[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
        return SyntheticFrame(
            image=image.numpy().copy(),
            flow_forward=forward[0].permute(1, 2, 0).contiguous().numpy(),
            flow_backward=backward[0].permute(1, 2, 0).contiguous().numpy(),
            occlusion_forward=occlusion_between(forward, now.layer, after.layer)[0, 0].numpy(),
            occlusion_backward=occlusion_between(backward, now.layer, before.layer)[0, 0].numpy())

    def _render(self, k: int) -> Rendered:
        return render(self._scene(k), 0, self.size)

    def _scene(self, *times: int) -> Scene:
        poses = np.stack([self._poses(time) for time in times], axis=1)  # (L, T, 3, 3)
        texture = np.zeros((len(self._scale), 2, 3))
        texture[:, [0, 1], [0, 1]] = 1 / self._scale[:, None]
        return Scene(surfaces=self._textures[0], objects=self._textures[1],
                     poses=torch.from_numpy(poses).float()[None],
                     texture=torch.from_numpy(texture).float()[None],
                     fade=torch.full((1, len(self._scale)), 1e6))

    def _poses(self, k: int) -> NDArray[np.float64]:
        wave = np.sin(2 * np.pi * k / self._period + self._phase)  # (L, 3)
        place = self._centre + self._reach * wave[:, :2]
        angle, zoom = self._turn * wave[:, 2], np.exp(self._zoom * wave[:, 2])
        poses = np.tile(np.eye(3), (len(angle), 1, 1))
        poses[:, 0, 0] = poses[:, 1, 1] = zoom * np.cos(angle)
        poses[:, 1, 0] = zoom * np.sin(angle)
        poses[:, 0, 1] = -poses[:, 1, 0]
        poses[:, :2, 2] = place
        return poses
