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

Three kinds: *drifting*, flat shapes over a background, each with an affine or perspective and
sometimes non-rigid motion of its own on top of a common one; *driving*, a camera that moves
and turns among ground, walls, a far backdrop, cards and boxes, some moving by themselves; and
*flying*, a camera that looks down on ground and boxes from some metres up. The same seed gives
the same scenes on the same kind of device.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor

from flow_ros.synthetic.camera import CameraConfig, motion_blur
from flow_ros.synthetic.scenes import (
    EgoMotion,
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
    flying: float = 0.0
    """Share of flying scenes; the rest drifts."""
    non_rigid: float = 0.35
    """Share of batches of drifting scenes with non-rigid motion."""
    unsteady: float = 0.15
    """How much a motion changes from frame to frame: a deviation, as a share of the motion."""
    surfaces: int = 96
    bank_objects: int = 192
    camera: CameraConfig = field(default_factory=CameraConfig)


@dataclass(frozen=True)
class Clip:
    """A batch of short sequences: T images RGB 0..255 (B, 3, H, W) with all that is known.

    ``forward[t]``, px (B, 2, H, W), goes from frame t to t + 1 on the grid of t, ``backward[t]``
    from t + 1 to t on the grid of t + 1; ``occluded_*`` bool (B, 1, H, W). ``depth`` and
    ``ego`` in driving and flying scenes only.
    """

    images: tuple[Tensor, ...]
    forward: tuple[Tensor, ...]
    backward: tuple[Tensor, ...]
    occluded_forward: tuple[Tensor, ...]
    occluded_backward: tuple[Tensor, ...]
    depth: tuple[Tensor, ...] | None = None
    ego: EgoMotion | None = None


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
        kind = random.random()
        flying = kind >= config.driving and kind < config.driving + config.flying
        solid_world = flying or kind < config.driving
        unbounded = 4 if solid_world else 1
        build = _flying if flying else _driving if solid_world else _drifting
        layers = [build(random, count, size, frames, config) for _ in range(batch)]
        surfaces, objects = self._textures.pick(
            random.integers(0, len(self._textures.surfaces), (batch, unbounded)),
            random.integers(0, len(self._textures.objects), (batch, count)))
        # The faces of boxes have no shape of their own: the whole texture is opaque.
        solid = torch.from_numpy(np.stack([layer.solid for layer in layers])).to(self.device)
        objects[:, :, 3] = torch.where(solid[..., None, None], 255.0, objects[:, :, 3])
        waves = None
        if not solid_world and random.random() < config.non_rigid:
            waves = self._waves(random, batch, unbounded + count, size)
        readout = None
        if frames > 1 and random.random() < config.camera.rolling_shutter:
            readout = self._tensor(random.choice([-1, 1], batch) * random.uniform(0.2, 0.9, batch))
        views = [layer.view for layer in layers if layer.view is not None]
        ego = None
        if len(views) == batch:
            at_rest = torch.from_numpy(np.stack([view.at_rest for view in views]))
            ego = EgoMotion(intrinsics=self._tensor(np.stack([view.intrinsics for view in views])),
                            rotation=self._tensor(np.stack([view.rotation for view in views])),
                            translation=self._tensor(np.stack([view.translation
                                                               for view in views])),
                            at_rest=at_rest.to(self.device))
        return Scene(surfaces=surfaces, objects=objects,
                     poses=self._tensor(np.stack([layer.poses for layer in layers])),
                     texture=self._tensor(np.stack([layer.texture for layer in layers])),
                     fade=self._tensor(np.stack([layer.fade for layer in layers])), waves=waves,
                     depth_tested=solid_world, readout=readout, ego=ego)

    def clip(self, index: int, *, batch: int, size: tuple[int, int], frames: int = 3,
             largest_motion_px: float | None = None) -> Clip:
        """Render batch ``index`` of scenes of ``frames`` frames with everything exact.

        Only the blur of motion is in the images; what else a camera does to them comes after
        cropping (``camera.develop``).
        """
        if frames < 2:
            raise ValueError(f'a clip has at least 2 frames; seen {frames}')
        scene = self.scene(index, batch=batch, size=size, frames=frames,
                           largest_motion_px=largest_motion_px)
        seen = [render(scene, time, size) for time in range(frames)]
        steps = range(frames - 1)
        forward = [flow_between(scene, seen[t].layer, t, t + 1) for t in steps]
        backward = [flow_between(scene, seen[t + 1].layer, t + 1, t) for t in steps]
        images = [frame.image for frame in seen]
        random = np.random.default_rng([self.seed, index, 1])
        if random.random() < self.config.camera.motion_blur:
            exposure = random.uniform(0.1, 0.8, batch)
            for time, image in enumerate(images):
                motion = forward[time] if time + 1 < frames else -backward[time - 1]
                images[time] = motion_blur(image, motion, self._tensor(exposure),
                                           self.config.camera.longest_blur_px)
                if random.random() < 0.3:  # exposed otherwise from here on
                    exposure = exposure * random.uniform(0.3, 1.3, batch)
        depth = tuple(frame.depth for frame in seen if frame.depth is not None)
        return Clip(images=tuple(images), forward=tuple(forward), backward=tuple(backward),
                    occluded_forward=tuple(
                        occlusion_between(forward[t], seen[t].layer, seen[t + 1].layer)
                        for t in steps),
                    occluded_backward=tuple(
                        occlusion_between(backward[t], seen[t + 1].layer, seen[t].layer)
                        for t in steps),
                    depth=depth or None, ego=scene.ego)

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


@dataclass(frozen=True)
class View:
    """The camera of one scene: as EgoMotion, without the batch."""

    intrinsics: Matrix
    rotation: Matrix
    translation: Matrix
    at_rest: NDArray[np.bool_]


@dataclass(frozen=True)
class Layers:
    """Poses (L, T, 3, 3), texture maps (L, 2, 3), fades (L,), and which objects are opaque."""

    poses: Matrix
    texture: Matrix
    fade: Matrix
    solid: NDArray[np.bool_]
    view: View | None = None


def _drifting(random: np.random.Generator, count: int, size: tuple[int, int], frames: int,
              config: WorldConfig) -> Layers:
    """Flat layers: plane coordinates are the px of frame 0 about the layer's centre."""
    height, width = size
    largest, unsteady = config.largest_motion_px, config.unsteady
    common = _path(random, _motion(random, size, largest, gentle=random.random() < 0.6), frames,
                   unsteady)
    still = np.tile(np.eye(3), (frames, 1, 1))
    if random.random() < 0.1:  # a camera at rest
        common = still
    poses, texture = [common], [_surface_map(random, size)]
    # Many small, few large; later layers lie in front.
    radius = np.exp(random.uniform(np.log(0.05), np.log(0.55), count)) * max(size)
    for r in np.sort(radius)[::-1]:
        centre = random.uniform(-0.55, 0.55, 2) * [width, height]
        place = np.eye(3)
        place[:2, 2] = centre
        motion = _motion(random, size, largest, gentle=random.random() < 0.4)
        shared = common if random.random() < 0.7 else still
        # About the layer's own centre, then placed: so turning does not throw it far.
        own = place @ _path(random, motion, frames, unsteady) @ np.linalg.inv(place)
        poses.append(own @ shared @ place)
        texture.append(_object_map(random, r))
    return Layers(poses=np.stack(poses), texture=np.stack(texture),
                  fade=np.full(count + 1, 1e6), solid=np.zeros(count, bool))


def _driving(random: np.random.Generator, count: int, size: tuple[int, int], frames: int,
             config: WorldConfig) -> Layers:
    """Place a camera, in metres (x right, y down, z ahead), four surfaces, then objects."""
    level, far = random.uniform(0.8, 2.5), random.uniform(40, 150)
    sides = np.array([-random.uniform(2.5, 12), random.uniform(2.5, 12)])
    sides[random.random(2) < 0.55] *= 40  # far out; the batch keeps one number of layers
    ahead = random.choice([0.0, 1.0, -1.0], p=[0.15, 0.7, 0.15])
    velocity = np.array([random.normal(0, 0.12), random.normal(0, 0.05),
                         -ahead * np.exp(random.uniform(np.log(0.05), np.log(1.6)))])
    turning = random.normal(0, 1, 3) * np.array([0.008, 0.02, 0.008]) * random.choice(
        [0.3, 1.0, 2.5])
    tilt = _rotation(np.array([random.normal(0, 0.05), 0, random.normal(0, 0.02)]))
    stage = _Stage(random, size, frames, velocity, turning, tilt, config.unsteady)
    stage.surround(level, far, sides, (8.0, 60.0, 50.0, 50.0))
    things = _things(random, count)
    depth = np.sort(np.exp(random.uniform(np.log(3), np.log(35), len(things))))[::-1]
    for z, faces in zip(depth, things):
        half = random.uniform(0.3, 1.6, 3) * (0.6 + z / 12) * (1.0 if faces == 1 else 0.8)
        foot = level - half[1] if random.random() < 0.7 else random.uniform(-2.5, level)
        centre = np.array([random.uniform(-0.5, 0.5) * z * size[1] / stage.focal, foot, z])
        drift = np.zeros(3)
        if random.random() < 0.5:
            drift = random.normal(0, 1, 3) * np.array([0.25, 0.05, 0.6])
            drift[2] = max(drift[2], -velocity[2] - 0.4 * z / frames)
        stage.thing(centre, half, random.normal(0, 0.5), drift, faces, above=False)
    return stage.layers()


def _flying(random: np.random.Generator, count: int, size: tuple[int, int], frames: int,
            config: WorldConfig) -> Layers:
    """Look down from some metres up on ground and what stands on it."""
    up = np.exp(random.uniform(np.log(3), np.log(40)))
    down = random.uniform(0.35, 1.5)  # rad
    heading = random.uniform(0, 2 * np.pi)
    speed = up * np.exp(random.uniform(np.log(0.003), np.log(0.2)))
    velocity = speed * np.array([np.cos(heading), random.normal(0, 0.25), np.sin(heading)])
    turning = random.normal(0, 1, 3) * np.array([0.01, 0.03, 0.01]) * random.choice(
        [0.3, 1.0, 2.0])
    tilt = _rotation(np.array([down, 0.0, 0.0])) @ _rotation(
        np.array([0.0, random.uniform(-0.4, 0.4), random.normal(0, 0.1)]))
    stage = _Stage(random, size, frames, velocity, turning, tilt, config.unsteady)
    scale = 1.8 / up
    stage.surround(up, 60 * up, np.array([-60.0, 60.0]) * up,
                   (2 * scale, 60 * scale * 2, 2 * scale, 2 * scale))
    things = _things(random, count)
    centres = []
    for _ in things:
        ray = tilt.T @ np.array([random.uniform(-0.5, 0.5) * size[1] / stage.focal,
                                 random.uniform(-0.5, 0.5) * size[0] / stage.focal, 1.0])
        centres.append(ray * min(up / max(ray[1], 0.05), 12 * up))
    for centre, faces in zip(sorted(centres, key=lambda c: -float(np.linalg.norm(c))), things):
        half = up * np.exp(random.uniform(np.log(0.04), np.log(0.25), 3))
        drift = np.zeros(3)
        if random.random() < 0.4:
            drift = random.normal(0, 1, 3) * np.array([0.02, 0.002, 0.02]) * up
        stage.thing(np.array([centre[0], up - half[1] - 0.01 * up, centre[2]]), half,
                    random.uniform(-np.pi, np.pi), drift, faces, above=True)
    return stage.layers()


def _things(random: np.random.Generator, count: int) -> list[int]:
    """Share ``count`` layers out to cards (1 face) and boxes (2 faces)."""
    things: list[int] = []
    while count > 0:
        faces = 2 if count > 1 and random.random() < 0.4 else 1
        things.append(faces)
        count -= faces
    return things


class _Stage:
    """Collects the planes of a scene as one moving camera sees them."""

    def __init__(self, random: np.random.Generator, size: tuple[int, int], frames: int,
                 velocity: Matrix, turning: Matrix, tilt: Matrix, unsteady: float) -> None:
        self.random, self.frames = random, frames
        self.focal = random.uniform(0.6, 1.4) * size[1]
        self.intrinsics = np.diag([self.focal, self.focal, 1.0])
        rotation, moved = tilt, np.zeros(3)
        turns, shifts = [], []
        for _ in range(frames):
            turns.append(rotation)
            shifts.append(moved)
            step = turning * (1 + unsteady * random.normal(0, 1, 3))
            rotation = rotation @ _rotation(step + unsteady * random.normal(0, 0.01, 3))
            moved = moved + velocity * (1 + unsteady * random.normal(0, 1, 3))
        self.rotation, self.moved = np.stack(turns), np.stack(shifts)
        self.poses: list[Matrix] = []
        self.texture: list[Matrix] = []
        self.fade: list[float] = []
        self.solid: list[bool] = []
        self.at_rest: list[bool] = []

    def surround(self, level: float, far: float, sides: Matrix,
                 scales: tuple[float, float, float, float]) -> None:
        """Add backdrop, ground and two walls; ``scales`` in texture px per metre."""
        x, y, z = np.eye(3)
        planes = ((x, y, far * z), (x, z, level * y), (y, z, sides[0] * x), (y, z, sides[1] * x))
        for index, ((first, second, origin), scale) in enumerate(zip(planes, scales)):
            self._add(first, second, origin, np.zeros(3),
                      _scaled(self.random, scale * self.random.uniform(0.5, 2) / 256),
                      1e6 if index == 0 else float(self.random.uniform(15, 60)) * level)

    def thing(self, centre: Matrix, half: Matrix, yaw: float, drift: Matrix, faces: int,
              above: bool) -> None:
        """Add a card, or the two faces of a box that are seen; ``half`` are half its sides, m.

        From ``above`` a card lies flat, and a box shows its top.
        """
        right = np.array([np.cos(yaw), 0, np.sin(yaw)])
        back = np.array([-np.sin(yaw), 0, np.cos(yaw)])
        down = np.array([0, 1.0, 0])
        if back @ centre < 0:  # it points away from the camera
            right, back = -right, -back
        if faces == 1:
            second = back if above else down
            self._add(right, second, centre, drift, _object_map(self.random, half[0], turn=above),
                      1e6)
            self.solid.append(False)
            return
        side = -np.sign(right @ centre) or 1.0
        shown = ((right, down, centre - half[2] * back, half[0], half[1]),
                 (right, back, centre - half[1] * down, half[0], half[2]) if above else
                 (back, down, centre + side * half[0] * right, half[2], half[1]))
        for first, second, middle, one, two in shown:
            self._add(first, second, middle, drift,
                      np.array([[1 / one, 0, 0], [0, 1 / two, 0]]), 1e6)
            self.solid.append(True)

    def layers(self) -> Layers:
        """Return what was added."""
        translation = np.einsum('tij,tj->ti', self.rotation, self.moved)
        view = View(intrinsics=self.intrinsics, rotation=self.rotation, translation=translation,
                    at_rest=np.array(self.at_rest))
        return Layers(poses=np.stack(self.poses), texture=np.stack(self.texture),
                      fade=np.array(self.fade), solid=np.array(self.solid, bool), view=view)

    def _add(self, first: Matrix, second: Matrix, origin: Matrix, drift: Matrix, texture: Matrix,
             fade: float) -> None:
        steps = [self.intrinsics @ self.rotation[time] @ np.stack(
            [first, second, origin + self.moved[time] + time * drift], axis=1)
            for time in range(self.frames)]
        self.poses.append(np.stack(steps))
        self.texture.append(texture)
        self.fade.append(fade)
        self.at_rest.append(not drift.any())


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


def _path(random: np.random.Generator, motion: Matrix, frames: int, unsteady: float) -> Matrix:
    """Return the motion from frame 0 to every frame, (T, 3, 3): steady but for a share of it."""
    steps, moved = [], np.eye(3)
    for _ in range(frames):
        steps.append(moved)
        change = 1 + unsteady * random.normal(0, 1)
        moved = (np.eye(3) + change * (motion - np.eye(3))) @ moved
    return np.stack(steps)


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
