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

"""Layered scenes of moving planes: rendered, with exact flow and occlusion, in torch.

Every layer is a textured plane. ``poses[b, l, t]`` is the 3x3 matrix that takes a point
(a, b, 1) of layer l to the image at frame t, up to its depth:
depth * (x, y, 1) = P (a, b, 1). Image px, origin at the image's centre, x right, y down. A
plane seen by a camera that drives and turns, and a flat shape that moves by an affine map, are
both of this form, so the flow between two frames is the homography P(t1) P(t0)^-1 of the layer
that is visible: exact, both ways, with nothing to search. A smooth non-rigid motion may be
added in plane coordinates; it is inverted by fixed-point iteration to 0.01 px.

A pixel shows the last layer whose alpha there is above one half; in scenes with depth a layer
must also be nearer than those before it, so that ground and walls cut each other rightly.

About a frame's time a pose moves linearly in its nine numbers, at the mean of the speeds before
and after. So a rolling shutter is exact too: every row is rendered at its own time, and the flow
is that between the moments at which the two rows see the point.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.sampling import pixel_grid
from flow_ros.synthetic.textures import TextureBank


@dataclass(frozen=True)
class Waves:
    """Smooth non-rigid motion in plane units: two sine waves per layer.

    At the frame t a point y of the rigid plane shows the material point
    y + t * amplitude * sin(frequency . y + phase). ``amplitude`` (B, L, 2, 2: wave, xy),
    ``frequency`` (B, L, 2, 2: wave, xy; rad per unit), ``phase`` (B, L, 2).
    """

    amplitude: Tensor
    frequency: Tensor
    phase: Tensor


@dataclass(frozen=True)
class EgoMotion:
    """The camera of a scene with depth; what does not move by itself is at rest in the world.

    A point X of the world, m, is at rotation X + translation in the camera's axes (x right,
    y down, z ahead). ``rotation`` (B, T, 3, 3), ``translation`` (B, T, 3), ``intrinsics``
    (B, 3, 3) in px about the image's centre; ``at_rest`` (B, L) bool: layers without a motion
    of their own.
    """

    intrinsics: Tensor
    rotation: Tensor
    translation: Tensor
    at_rest: Tensor


@dataclass(frozen=True)
class Scene:
    """A batch of layered scenes on one device.

    ``surfaces`` (B, L0, 3, S, S) for the first L0 layers, which are unbounded (reflected), and
    ``objects`` (B, L - L0, 4, s, s) for the rest, 0..255 with alpha; ``poses``
    (B, L, T, 3, 3); ``texture`` (B, L, 2, 3) takes plane coordinates to [-1, 1] of the
    texture; ``fade`` (B, L): the depth at which the contrast has fallen to a half (haze, and
    no aliasing towards the horizon). ``readout`` (B,), where the shutter rolls: the time from
    the first row to the last, in frames; the middle row is at the frame's own time.
    """

    surfaces: Tensor
    objects: Tensor
    poses: Tensor
    texture: Tensor
    fade: Tensor
    waves: Waves | None = None
    depth_tested: bool = False
    readout: Tensor | None = None
    ego: EgoMotion | None = None

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.poses.shape[1]


@dataclass(frozen=True)
class Rendered:
    """``image`` (B, 3, H, W), RGB 0..255, and ``layer`` (B, H, W), the visible one.

    ``depth`` (B, 1, H, W), m, along the optical axis, in scenes with depth.
    """

    image: Tensor
    layer: Tensor
    depth: Tensor | None = None


@dataclass(frozen=True)
class Textures:
    """A bank on the device that renders: surfaces (N, 3, S, S), objects (M, 4, s, s), uint8."""

    surfaces: Tensor
    objects: Tensor

    @staticmethod
    def of(bank: TextureBank, device: torch.device) -> 'Textures':
        """Bring ``bank`` to ``device``, once."""
        big, small = (torch.from_numpy(values).permute(0, 3, 1, 2).contiguous().to(device)
                      for values in (bank.surfaces, bank.objects))
        return Textures(surfaces=big, objects=small)

    def pick(self, surfaces: NDArray[np.int64],
             objects: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the textures of the indices (B, L0) and (B, L1), as floats."""
        device = self.surfaces.device
        return (self.surfaces[torch.from_numpy(surfaces).to(device)].float(),
                self.objects[torch.from_numpy(objects).to(device)].float())


def render(scene: Scene, time: int, size: tuple[int, int]) -> Rendered:
    """Render frame ``time`` at ``size`` (H, W) px."""
    height, width = size
    batch, unbounded = scene.poses.shape[0], scene.surfaces.shape[1]
    rays = _rays(height, width, scene.poses)  # (3, HW)
    times = _row_times(scene, time, height)  # (B, H), or (B, 1) without a rolling shutter
    inverse = _inverse(_poses_at(scene, time, times))  # (B, L, H or 1, 3, 3)
    lines = rays.view(3, times.shape[1], -1).transpose(0, 1)  # (H, 3, W), or (1, 3, HW)
    clock = times[:, None, :, None].expand(-1, -1, -1, lines.shape[2]).reshape(batch, 1, -1)
    image = torch.zeros(batch, 3, height, width, device=rays.device)
    layer = torch.zeros(batch, height, width, dtype=torch.long, device=rays.device)
    nearest = rays.new_zeros(batch, height, width)  # 1 / depth of what is seen so far
    for index in range(scene.layers):
        plane = inverse[:, index] @ lines  # (B, H, 3, W) = (a, b, 1) / depth
        plane = plane.transpose(1, 2).reshape(batch, 3, -1)  # (B, 3, HW)
        nearness = plane[:, 2]
        front = nearness > 1e-4
        point = plane[:, :2] / nearness.clamp(min=1e-4)[:, None]
        if scene.waves is not None:
            point = point + clock * _waves(scene.waves, index, point)
        turn = scene.texture[:, index]
        where = turn[:, :, :2] @ point + turn[:, :, 2:]  # (B, 2, HW)
        grid = where.transpose(1, 2).reshape(batch, height, width, 2)
        if index < unbounded:
            colour = functional.grid_sample(scene.surfaces[:, index], grid, mode='bilinear',
                                            padding_mode='reflection', align_corners=False)
            alpha = front.float().view(batch, 1, height, width)
            mean = scene.surfaces[:, index, :, ::8, ::8].mean(dim=(-1, -2))[..., None, None]
            depth = 1 / nearness.clamp(min=1e-4).view(batch, 1, height, width)
            clear = 1 / (1 + (depth / scene.fade[:, index, None, None, None]) ** 2)
            colour = mean + (colour - mean) * clear
        else:
            rgba = functional.grid_sample(scene.objects[:, index - unbounded], grid,
                                          mode='bilinear', padding_mode='zeros',
                                          align_corners=False)
            colour = rgba[:, :3]
            alpha = rgba[:, 3:] * (front.view(batch, 1, height, width) / 255)
        if scene.depth_tested:
            here = nearness.view(batch, height, width)
            alpha = alpha * (here > nearest)[:, None]
        shown = alpha[:, 0] > 0.5
        if scene.depth_tested:
            nearest = torch.where(shown, here, nearest)
        image.lerp_(colour, alpha)  # in place: new memory for each layer took a third of the time
        layer.masked_fill_(shown, index)
    seen = 1 / nearest.clamp(min=1e-4)[:, None] if scene.depth_tested else None
    return Rendered(image=image, layer=layer, depth=seen)


def flow_between(scene: Scene, layer: Tensor, start: int, end: int) -> Tensor:
    """Return the exact flow (B, 2, H, W), px, of the visible ``layer`` from start to end."""
    batch, height, width = layer.shape
    rays = _rays(height, width, scene.poses)
    chosen = layer.view(batch, -1)  # (B, HW)
    if scene.readout is not None:
        moved = _moved_rolling(scene, chosen, rays, start, end, height)
    elif scene.waves is None:
        matrix = _per_pixel(scene.poses[:, :, end] @ _inverse(scene.poses[:, :, start]), chosen)
        moved = (matrix * rays[None, None]).sum(dim=2)  # (B, 3, HW)
    else:
        source = _per_pixel(_inverse(scene.poses[:, :, start]), chosen)
        plane = (source * rays[None, None]).sum(dim=2)
        rigid = plane[:, :2] / plane[:, 2:]
        waves = _waves_chosen(scene.waves, chosen)
        material = rigid + start * _waves_per_pixel(waves, rigid)
        point = material
        for _ in range(8 if end else 0):
            point = material - end * _waves_per_pixel(waves, point)
        moved = _applied(_per_pixel(scene.poses[:, :, end], chosen), point)
    flow = moved[:, :2] / moved[:, 2:].clamp(min=1e-4) - rays[None, :2]
    return flow.view(batch, 2, height, width).clamp(-2000, 2000)


def _moved_rolling(scene: Scene, chosen: Tensor, rays: Tensor, start: int, end: int,
                   height: int) -> Tensor:
    """Return where each pixel's point is when the row it then lies in is read, (B, 3, HW).

    Which row that is depends on where the point is: a fixed point, found by iteration, since
    a point passes far fewer rows in the time of a readout than the readout does.
    """
    width = rays.shape[1] // height
    times = _row_times(scene, start, height)  # (B, H)
    poses = _poses_at(scene, start, times)  # (B, L, H, 3, 3)
    row = torch.arange(height, device=rays.device).repeat_interleave(width)  # (HW,)
    source = _per_pixel(_inverse(poses).flatten(1, 2), chosen * height + row)
    plane = (source * rays[None, None]).sum(dim=2)
    rigid = plane[:, :2] / plane[:, 2:]
    waves = None if scene.waves is None else _waves_chosen(scene.waves, chosen)
    material = rigid
    if waves is not None:
        material = rigid + times[:, row][:, None] * _waves_per_pixel(waves, rigid)
    now = _per_pixel(scene.poses[:, :, end], chosen)
    speed = _per_pixel(_speed(scene, end), chosen)
    moved, point = rays[None].expand(len(chosen), -1, -1), material
    for _ in range(10):
        y = moved[:, 1] / moved[:, 2].clamp(min=1e-4)  # about the middle row
        lead = scene.readout[:, None] * (y / (height - 1)).clamp(-1, 1)  # type: ignore[index]
        if waves is not None:
            point = material - (end + lead)[:, None] * _waves_per_pixel(waves, point)
        moved = _applied(now, point) + lead[:, None] * _applied(speed, point)
    return moved


def _row_times(scene: Scene, time: int, height: int) -> Tensor:
    """Return when each row is read, in frames: (B, H), or (B, 1) where all are at once."""
    if scene.readout is None:
        return scene.poses.new_full((scene.poses.shape[0], 1), time)
    middle = torch.linspace(-0.5, 0.5, height, device=scene.poses.device)
    return time + scene.readout[:, None] * middle


def _speed(scene: Scene, time: int) -> Tensor:
    """Return the change of the poses per frame about ``time``, (B, L, 3, 3)."""
    first, last = max(time - 1, 0), min(time + 1, scene.poses.shape[2] - 1)
    return (scene.poses[:, :, last] - scene.poses[:, :, first]) / (last - first)


def _poses_at(scene: Scene, time: int, times: Tensor) -> Tensor:
    """Return the poses (B, L, N, 3, 3) at the ``times`` (B, N), within half a frame of ``time``.

    Without a rolling shutter N is 1.
    """
    now = scene.poses[:, :, time, None]
    if scene.readout is None:
        return now
    return now + (times - time)[:, None, :, None, None] * _speed(scene, time)[:, :, None]


def _inverse(matrix: Tensor) -> Tensor:
    """Return the inverses of (..., 3, 3) by cross products: there are thousands of them."""
    one, two, three = matrix.unbind(dim=-1)  # columns
    rows = torch.stack([torch.linalg.cross(two, three), torch.linalg.cross(three, one),
                        torch.linalg.cross(one, two)], dim=-2)
    return rows / (rows[..., 0, :] * one).sum(dim=-1)[..., None, None]


def _applied(matrix: Tensor, point: Tensor) -> Tensor:
    """Apply (B, 3, 3, N) to the plane points (B, 2, N): (B, 3, N)."""
    return (matrix[:, :, :2] * point[:, None]).sum(dim=2) + matrix[:, :, 2]


def occlusion_between(flow: Tensor, layer: Tensor, layer_end: Tensor) -> Tensor:
    """Return (B, 1, H, W) bool: no counterpart, covered by another layer or out of the image.

    A pixel counts as visible where any of the four pixels around its target shows its layer.
    """
    height, width = layer.shape[-2:]
    target = pixel_grid(height, width, flow) + flow
    x, y = target[:, 0], target[:, 1]
    outside = (x < 0) | (x > width - 1) | (y < 0) | (y > height - 1)
    seen = torch.zeros_like(outside)
    flat = layer_end.flatten(1)
    for dx in (0, 1):
        for dy in (0, 1):
            column = (x.floor() + dx).clamp(0, width - 1).long()
            row = (y.floor() + dy).clamp(0, height - 1).long()
            found = flat.gather(1, (row * width + column).flatten(1)).view_as(layer)
            seen |= found == layer
    return (outside | ~seen)[:, None]


def _rays(height: int, width: int, like: Tensor) -> Tensor:
    """Return (x, y, 1) of every pixel, (3, HW), origin at the image's centre."""
    points = pixel_grid(height, width, like)[0].flatten(1)
    centre = points.new_tensor([[(width - 1) / 2], [(height - 1) / 2]])
    return torch.cat([points - centre, torch.ones_like(points[:1])])


def _per_pixel(values: Tensor, chosen: Tensor) -> Tensor:
    """Pick ``values`` (B, L, ...) by ``chosen`` (B, N): (B, ..., N)."""
    batch, layers = values.shape[:2]
    flat = values.reshape(batch, layers, -1).transpose(1, 2)  # (B, K, L)
    picked = flat.gather(2, chosen[:, None].expand(-1, flat.shape[1], -1))
    return picked.view(batch, *values.shape[2:], -1)


def _waves(waves: Waves, index: int, point: Tensor) -> Tensor:
    """Return the displacement (B, 2, N) of layer ``index`` at the points (B, 2, N)."""
    angle = waves.frequency[:, index] @ point + waves.phase[:, index, :, None]  # (B, 2, N)
    return waves.amplitude[:, index].transpose(1, 2) @ torch.sin(angle)


def _waves_chosen(waves: Waves, chosen: Tensor) -> Waves:
    """Return the waves of the layer that each pixel shows, (B, ..., N)."""
    return Waves(amplitude=_per_pixel(waves.amplitude, chosen),
                 frequency=_per_pixel(waves.frequency, chosen),
                 phase=_per_pixel(waves.phase, chosen))


def _waves_per_pixel(waves: Waves, point: Tensor) -> Tensor:
    """Return the displacement (B, 2, N) with parameters per pixel (B, ..., N)."""
    angle = (waves.frequency * point[:, None]).sum(dim=2) + waves.phase  # (B, 2: wave, N)
    return (waves.amplitude * torch.sin(angle)[:, :, None]).sum(dim=1)
