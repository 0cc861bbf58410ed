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

"""Random scenes of the procedural world: what moves, how, and in front of what.

Two kinds: *drifting*, flat shapes over a background, each with an affine or perspective and
sometimes non-rigid motion of its own on top of a common one; and *driving*, a camera that
moves and turns among ground, walls, a far backdrop and boxes, some moving by themselves. The
same seed gives the same scenes on the same kind of device.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor

from flow_ros.synthetic.scenes import (
    flow_between,
    occlusion_between,
    render,
    Scene,
    Textures,
    Waves,
)
from flow_ros.synthetic.textures import make_bank

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class WorldConfig:
    """What the world is made of; lengths in px of the rendered size."""

    objects: tuple[int, int] = (2, 6)
    """Fewest and most foreground layers."""
    largest_motion_px: float = 110.0
    driving: float = 0.4
    """Share of driving scenes."""
    non_rigid: float = 0.35
    """Share of batches with non-rigid motion."""
    surfaces: int = 96
    bank_objects: int = 192


@dataclass(frozen=True)
class Pairs:
    """A batch: images RGB 0..255 (B, 3, H, W), flow px (B, 2, H, W), occlusion bool (B, 1, ...).

    ``forward`` goes from ``image1`` to ``image2`` on the grid of ``image1``; ``backward`` the
    other way, on the grid of ``image2``.
    """

    image1: Tensor
    image2: Tensor
    forward: Tensor
    backward: Tensor
    occluded_forward: Tensor
    occluded_backward: Tensor


class World:
    """Draws batches of scenes on ``device``; see the module's docstring."""

    def __init__(self, *, seed: int, device: torch.device | None = None,
                 config: WorldConfig = WorldConfig()) -> None:
        """Draw the textures."""
        self.seed, self.device, self.config = seed, device or torch.device('cpu'), config
        bank = make_bank(seed, surfaces=config.surfaces, objects=config.bank_objects)
        self._textures = Textures.of(bank, self.device)

    def scene(self, index: int, *, batch: int, size: tuple[int, int], frames: int = 2,
              largest_motion_px: float | None = None) -> Scene:
        """Return batch ``index`` of scenes for images of ``size`` (H, W) px."""
        random = np.random.default_rng([self.seed, index])
        config = self.config
        if largest_motion_px is not None:
            config = replace(config, largest_motion_px=largest_motion_px)
        count = int(random.integers(config.objects[0], config.objects[1] + 1))
        driving = random.random() < config.driving
        unbounded = 4 if driving else 1
        build = _driving if driving else _drifting
        layers = [build(random, count, size, frames, config) for _ in range(batch)]
        surfaces, objects = self._textures.pick(
            random.integers(0, len(self._textures.surfaces), (batch, unbounded)),
            random.integers(0, len(self._textures.objects), (batch, count)))
        waves = None
        if not driving and random.random() < config.non_rigid:
            waves = self._waves(random, batch, unbounded + count, size)
        return Scene(surfaces=surfaces, objects=objects,
                     poses=self._tensor(np.stack([layer[0] for layer in layers])),
                     texture=self._tensor(np.stack([layer[1] for layer in layers])),
                     fade=self._tensor(np.stack([layer[2] for layer in layers])), waves=waves,
                     depth_tested=driving)

    def pairs(self, index: int, *, batch: int, size: tuple[int, int],
              largest_motion_px: float | None = None) -> Pairs:
        """Render batch ``index`` of two-frame scenes with both flows and occlusions."""
        scene = self.scene(index, batch=batch, size=size, largest_motion_px=largest_motion_px)
        first, second = render(scene, 0, size), render(scene, 1, size)
        forward = flow_between(scene, first.layer, 0, 1)
        backward = flow_between(scene, second.layer, 1, 0)
        return Pairs(image1=first.image, image2=second.image, forward=forward, backward=backward,
                     occluded_forward=occlusion_between(forward, first.layer, second.layer),
                     occluded_backward=occlusion_between(backward, second.layer, first.layer))

    def _waves(self, random: np.random.Generator, batch: int, layers: int,
               size: tuple[int, int]) -> Waves:
        period = random.uniform(0.25, 1.0, (batch, layers, 2, 1)) * max(size)
        angle = random.uniform(0, 2 * np.pi, (batch, layers, 2, 1))
        frequency = 2 * np.pi / period * np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
        # The gradient stays under 0.3 for both waves together, so that the plane never folds.
        steep = random.uniform(0, 0.15, (batch, layers, 2, 1)) * period / (2 * np.pi)
        turn = random.uniform(0, 2 * np.pi, (batch, layers, 2, 1))
        amplitude = steep * np.concatenate([np.cos(turn), np.sin(turn)], axis=-1)
        amplitude *= random.random((batch, layers, 1, 1)) < 0.6
        return Waves(amplitude=self._tensor(amplitude), frequency=self._tensor(frequency),
                     phase=self._tensor(random.uniform(0, 2 * np.pi, (batch, layers, 2))))

    def _tensor(self, values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values).float().to(self.device)


Layers = tuple[Matrix, Matrix, Matrix]
"""Poses (L, T, 3, 3), texture maps (L, 2, 3) and fades (L,) of one scene."""


def _drifting(random: np.random.Generator, count: int, size: tuple[int, int], frames: int,
              config: WorldConfig) -> Layers:
    """Flat layers: plane coordinates are the px of frame 0 about the layer's centre."""
    height, width = size
    common = _motion(random, size, config.largest_motion_px, gentle=random.random() < 0.6)
    poses, texture = [_powers(common, frames)], [_surface_map(random, size)]
    # Many small, few large; later layers lie in front.
    radius = np.exp(random.uniform(np.log(0.06), np.log(0.55), count)) * max(size)
    for r in np.sort(radius)[::-1]:
        centre = random.uniform(-0.55, 0.55, 2) * [width, height]
        place = np.eye(3)
        place[:2, 2] = centre
        motion = _motion(random, size, config.largest_motion_px, gentle=random.random() < 0.4)
        share = random.choice([0.0, 1.0], p=[0.3, 0.7])
        motion = motion @ (common if share else np.eye(3))
        # About the layer's own centre, then placed: so turning does not throw it far.
        poses.append(_powers(place @ motion @ np.linalg.inv(place), frames) @ place)
        texture.append(_object_map(random, r))
    return np.stack(poses), np.stack(texture), np.full(count + 1, 1e6)


def _driving(random: np.random.Generator, count: int, size: tuple[int, int], frames: int,
             config: WorldConfig) -> Layers:
    """Place a camera, in metres (x right, y down, z ahead), four surfaces, then boxes."""
    height, width = size
    focal = random.uniform(0.6, 1.4) * width
    camera = np.diag([focal, focal, 1.0])
    level, far = random.uniform(0.8, 2.5), random.uniform(40, 150)
    left, right = -random.uniform(2.5, 12), random.uniform(2.5, 12)
    # Planes as (first axis, second axis, origin); scale is the px per metre of the texture.
    planes = [(np.array([1.0, 0, 0]), np.array([0, 1.0, 0]), np.array([0, 0, far]), 8.0),
              (np.array([1.0, 0, 0]), np.array([0, 0, 1.0]), np.array([0, level, 0]), 60.0),
              (np.array([0, 1.0, 0]), np.array([0, 0, 1.0]), np.array([left, 0, 0]), 50.0),
              (np.array([0, 1.0, 0]), np.array([0, 0, 1.0]), np.array([right, 0, 0]), 50.0)]
    ahead = random.choice([0.0, 1.0, -1.0], p=[0.15, 0.7, 0.15])
    velocity = np.array([random.normal(0, 0.12), random.normal(0, 0.05),
                         -ahead * np.exp(random.uniform(np.log(0.05), np.log(1.6)))])
    turning = random.normal(0, 1, 3) * np.array([0.008, 0.02, 0.008]) * random.choice(
        [0.3, 1.0, 2.5])
    pitch = _rotation(np.array([random.normal(0, 0.05), 0, random.normal(0, 0.02)]))
    rotation, own = _rotation(turning), np.zeros(3)
    poses, texture, fade = [], [], []

    def place(first: Matrix, second: Matrix, origin: Matrix, drift: Matrix) -> Matrix:
        steps = []
        turn = np.eye(3)
        for time in range(frames):
            moved = origin + time * (velocity + drift)
            steps.append(camera @ pitch @ turn @ np.stack([first, second, moved], axis=1))
            turn = rotation @ turn
        return np.stack(steps)

    walls = random.random(2) < 0.45
    for index, (first, second, origin, scale) in enumerate(planes):
        if index >= 2 and not walls[index - 2]:
            origin = origin * 40  # far out; the batch keeps one number of layers
        poses.append(place(first, second, origin, own))
        texture.append(_scaled(random, scale * random.uniform(0.5, 2) / 256))
        fade.append(1e6 if index == 0 else random.uniform(15, 60))
    depth = np.sort(np.exp(random.uniform(np.log(3), np.log(35), count)))[::-1]
    for z in depth:
        half = random.uniform(0.3, 1.6) * (0.6 + z / 12)
        foot = level - half if random.random() < 0.7 else random.uniform(-2.5, level)
        origin = np.array([random.uniform(-0.5, 0.5) * z * width / focal, foot, z])
        drift = own
        if random.random() < 0.5:
            drift = random.normal(0, 1, 3) * np.array([0.25, 0.05, 0.6])
            drift[2] = max(drift[2], -velocity[2] - 0.4 * z / frames)
        yaw = random.normal(0, 0.5)
        poses.append(place(np.array([np.cos(yaw), 0, np.sin(yaw)]), np.array([0, 1.0, 0]),
                           origin, drift))
        texture.append(_object_map(random, half, turn=False))
        fade.append(1e6)
    return np.stack(poses), np.stack(texture), np.array(fade)


def _motion(random: np.random.Generator, size: tuple[int, int], largest_px: float,
            gentle: bool) -> Matrix:
    """Return one frame's affine or perspective motion, log-uniform in its length."""
    length = np.exp(random.uniform(np.log(0.3), np.log(largest_px / (4 if gentle else 1))))
    angle = random.uniform(0, 2 * np.pi)
    motion = np.eye(3)
    strength = random.choice([0.0, 0.4, 1.0], p=[0.2, 0.4, 0.4])
    turn = strength * random.normal(0, 0.07)
    zoom = np.exp(strength * random.normal(0, 0.07))
    motion[:2, :2] = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    motion[:2, :2] += strength * random.normal(0, 0.025, (2, 2))
    motion[:2, 2] = length * np.cos(angle), length * np.sin(angle) * 0.7
    if random.random() < 0.3:
        motion[2, :2] = random.normal(0, 0.08, 2) / max(size)
    return motion


def _powers(motion: Matrix, frames: int) -> Matrix:
    """Return motion^0, motion^1, ...: (T, 3, 3)."""
    return np.stack([np.linalg.matrix_power(motion, time) for time in range(frames)])


def _surface_map(random: np.random.Generator, size: tuple[int, int]) -> Matrix:
    return _scaled(random, np.exp(random.uniform(np.log(0.5), np.log(1.8))) / 256)


def _scaled(random: np.random.Generator, scale: float) -> Matrix:
    """Return a map to texture coordinates with ``scale`` per plane unit, turned at random."""
    angle = random.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.diag(np.exp(random.normal(0, 0.15, 2)))
    return np.concatenate([scale * turn @ stretch, random.uniform(-3, 3, (2, 1))], axis=1)


def _object_map(random: np.random.Generator, radius: float, turn: bool = True) -> Matrix:
    """Return the map of a shape of ``radius`` plane units to the whole object texture."""
    angle = random.uniform(0, 2 * np.pi) if turn else 0.0
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.diag(np.exp(random.normal(0, 0.3, 2)))
    return np.concatenate([stretch @ rotation / radius, np.zeros((2, 1))], axis=1)


def _rotation(vector: Matrix) -> Matrix:
    """Return the rotation matrix of a small rotation vector, rad (Rodrigues)."""
    angle = float(np.linalg.norm(vector)) + 1e-12
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)
