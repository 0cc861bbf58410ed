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

"""Augmentation of pairs on the device: crops, flips, the camera's doings, degraded priors."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn import functional

from flow_ros.ops.sampling import inside, warp
from flow_ros.synthetic.camera import CameraConfig, develop


@dataclass(frozen=True)
class Batch:
    """Images RGB 0..255 (B, 3, H, W) and the truth from ``image1`` to ``image2``.

    ``flow`` (B, 2, H, W) px, NaN where it is not known; ``occlusion`` (B, 1, H, W) bool, or
    None where the data do not know it. ``previous`` is the frame before ``image1``, as far
    from it in time as ``image2``, where there is one: a warm start comes from there.
    ``occlusion_known`` (B, 1, H, W) bool says where ``occlusion`` counts; None: everywhere.
    ``flow_back`` (B, 2, H, W) px is the truth from ``image2`` to ``image1``, where it is known.
    """

    image1: Tensor
    image2: Tensor
    flow: Tensor
    occlusion: Tensor | None
    previous: Tensor | None = None
    occlusion_known: Tensor | None = None
    flow_back: Tensor | None = None


def augment(batch: Batch, crop: tuple[int, int], random: Generator,
            camera: CameraConfig = CameraConfig()) -> Batch:
    """Return a random crop, flipped, as a camera would deliver it; the truth stays exact."""
    batch = flip(random_crop(batch, crop, random), random)
    frames = [batch.image1, batch.image2]
    if batch.previous is not None:
        frames.append(batch.previous)
    frames = develop(frames, camera, random)
    return replace(batch, image1=frames[0], image2=frames[1],
                   previous=frames[2] if len(frames) > 2 else None)


def random_crop(batch: Batch, crop: tuple[int, int], random: Generator) -> Batch:
    """Cut the same window out of everything; what leaves the window becomes occluded."""
    height, width = batch.flow.shape[-2:]
    top = int(torch.randint(0, height - crop[0] + 1, (1,), generator=random))
    left = int(torch.randint(0, width - crop[1] + 1, (1,), generator=random))

    def cut(values: Tensor) -> Tensor:
        return values[..., top:top + crop[0], left:left + crop[1]]

    flow = cut(batch.flow)
    # Where the flow is not known, neither is whether it leaves.
    gone = ~inside(flow) & torch.isfinite(flow).all(dim=1, keepdim=True)
    cropped = _each(batch, cut, cut,
                    None if batch.occlusion is None else cut(batch.occlusion) | gone)
    if cropped.occlusion_known is None:
        return cropped
    return replace(cropped, occlusion_known=cropped.occlusion_known | gone)


def flip(batch: Batch, random: Generator) -> Batch:
    """Mirror the whole batch left-right or upside down."""
    for dim, component, chance in ((-1, 0, 0.5), (-2, 1, 0.15)):
        if float(torch.rand(1, generator=random)) < chance:
            sign = torch.ones(2, device=batch.flow.device)
            sign[component] = -1

            def mirror(values: Tensor, dim: int = dim) -> Tensor:
                return values.flip(dim)

            def mirror_flow(flow: Tensor, dim: int = dim, sign: Tensor = sign) -> Tensor:
                return flow.flip(dim) * sign[None, :, None, None]

            batch = _each(batch, mirror, mirror_flow,
                          None if batch.occlusion is None else mirror(batch.occlusion))
    return batch


def _each(batch: Batch, change: Callable[[Tensor], Tensor],
          change_flow: Callable[[Tensor], Tensor], occlusion: Tensor | None) -> Batch:
    """Return the batch with ``change`` done to every image, and the occlusion given."""
    previous, known, back = batch.previous, batch.occlusion_known, batch.flow_back
    return Batch(image1=change(batch.image1), image2=change(batch.image2),
                 flow=change_flow(batch.flow), occlusion=occlusion,
                 previous=None if previous is None else change(previous),
                 occlusion_known=None if known is None else change(known),
                 flow_back=None if back is None else change_flow(back))


def degraded_prior(flow: Tensor, random: Generator) -> Tensor:
    """Return a prior like the one a warm start gives: the true flow with a stream's errors.

    Coarse (1/8 grid), misplaced by up to some pixels along the motion, scaled as after a
    change of speed, with smooth errors, and zero in some blocks that were never filled.
    """
    batch, _, height, width = flow.shape
    device = flow.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=random).to(device)

    coarse = functional.avg_pool2d(flow, 8)
    small = (coarse.shape[-2], coarse.shape[-1])
    misplaced = warp(coarse, coarse / 8 * (0.5 * normal(1, 1, 1)).clamp(-1, 1))
    scaled = misplaced * (1 + 0.12 * normal(1, 1, 1))
    smooth = functional.interpolate(normal(2, 4, 5), size=small, mode='bilinear')
    fine = functional.interpolate(normal(2, small[0] // 2, small[1] // 2), size=small)
    strength = torch.rand(batch, 1, 1, 1, generator=random).to(device)
    noisy = scaled + strength * (3.0 * smooth + 1.5 * fine)
    holes = functional.interpolate(torch.rand(batch, 1, 6, 8, generator=random).to(device),
                                   size=small) < 0.04
    prior = torch.where(holes, torch.zeros_like(noisy), noisy)
    return functional.interpolate(prior, size=(height, width), mode='bilinear')
