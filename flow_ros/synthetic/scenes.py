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
class Scene:
    """A batch of layered scenes on one device.

    ``surfaces`` (B, L0, 3, S, S) for the first L0 layers, which are unbounded (reflected), and
    ``objects`` (B, L - L0, 4, s, s) for the rest, 0..255 with alpha; ``poses``
    (B, L, T, 3, 3); ``texture`` (B, L, 2, 3) takes plane coordinates to [-1, 1] of the
    texture; ``fade`` (B, L): the depth at which the contrast has fallen to a half (haze, and
    no aliasing towards the horizon).
    """

    surfaces: Tensor
    objects: Tensor
    poses: Tensor
    texture: Tensor
    fade: Tensor
    waves: Waves | None = None
    depth_tested: bool = False

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.poses.shape[1]


@dataclass(frozen=True)
class Rendered:
    """``image`` (B, 3, H, W), RGB 0..255, and ``layer`` (B, H, W), the visible one."""

    image: Tensor
    layer: Tensor


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
    inverse = torch.linalg.inv(scene.poses[:, :, time])
    image = torch.zeros(batch, 3, height, width, device=rays.device)
    layer = torch.zeros(batch, height, width, dtype=torch.long, device=rays.device)
    nearest = rays.new_zeros(batch, height, width)  # 1 / depth of what is seen so far
    for index in range(scene.layers):
        plane = inverse[:, index] @ rays  # (B, 3, HW) = (a, b, 1) / depth
        nearness = plane[:, 2]
        front = nearness > 1e-4
        point = plane[:, :2] / nearness.clamp(min=1e-4)[:, None]
        if scene.waves is not None and time:
            point = point + time * _waves(scene.waves, index, point)
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
            nearest = torch.where(alpha[:, 0] > 0.5, here, nearest)
        image = image + alpha * (colour - image)
        layer = torch.where(alpha[:, 0] > 0.5, index, layer)
    return Rendered(image=image, layer=layer)


def flow_between(scene: Scene, layer: Tensor, start: int, end: int) -> Tensor:
    """Return the exact flow (B, 2, H, W), px, of the visible ``layer`` from start to end."""
    batch, height, width = layer.shape
    rays = _rays(height, width, scene.poses)
    chosen = layer.view(batch, -1)  # (B, HW)
    source = torch.linalg.inv(scene.poses[:, :, start])  # (B, L, 3, 3)
    target = scene.poses[:, :, end]
    if scene.waves is None:
        matrix = _per_pixel(target @ source, chosen)  # (B, 3, 3, HW)
        moved = (matrix * rays[None, None]).sum(dim=2)  # (B, 3, HW)
    else:
        plane = (_per_pixel(source, chosen) * rays[None, None]).sum(dim=2)
        rigid = plane[:, :2] / plane[:, 2:]
        waves = Waves(amplitude=_per_pixel(scene.waves.amplitude, chosen),
                      frequency=_per_pixel(scene.waves.frequency, chosen),
                      phase=_per_pixel(scene.waves.phase, chosen))
        material = rigid + start * _waves_per_pixel(waves, rigid)
        point = material
        for _ in range(8 if end else 0):
            point = material - end * _waves_per_pixel(waves, point)
        ones = torch.ones_like(point[:, :1])
        moved = (_per_pixel(target, chosen) * torch.cat([point, ones], dim=1)[:, None]).sum(dim=2)
    flow = moved[:, :2] / moved[:, 2:].clamp(min=1e-4) - rays[None, :2]
    return flow.view(batch, 2, height, width).clamp(-2000, 2000)


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


def _waves_per_pixel(waves: Waves, point: Tensor) -> Tensor:
    """Return the displacement (B, 2, N) with parameters per pixel (B, ..., N)."""
    angle = (waves.frequency * point[:, None]).sum(dim=2) + waves.phase  # (B, 2: wave, N)
    return (waves.amplitude * torch.sin(angle)[:, :, None]).sum(dim=1)
