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

"""Augmentation of pairs on the device: crops, flips, colour, light, noise, degraded priors."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from flow_ros.ops.sampling import inside, warp


@dataclass(frozen=True)
class Batch:
    """Images RGB 0..255 (B, 3, H, W); flow (B, 2, H, W) px; occlusion (B, 1, H, W) bool."""

    image1: Tensor
    image2: Tensor
    flow: Tensor
    occlusion: Tensor


def augment(batch: Batch, crop: tuple[int, int], random: Generator) -> Batch:
    """Return a random crop, flipped and photometrically changed; the truth stays exact."""
    return photometric(flip(random_crop(batch, crop, random), random), random)


def random_crop(batch: Batch, crop: tuple[int, int], random: Generator) -> Batch:
    """Cut the same window out of everything; what leaves the window becomes occluded."""
    height, width = batch.flow.shape[-2:]
    top = int(torch.randint(0, height - crop[0] + 1, (1,), generator=random))
    left = int(torch.randint(0, width - crop[1] + 1, (1,), generator=random))
    cut = [values[..., top:top + crop[0], left:left + crop[1]]
           for values in (batch.image1, batch.image2, batch.flow, batch.occlusion)]
    flow = cut[2]
    return Batch(cut[0], cut[1], flow, cut[3] | ~inside(flow))


def flip(batch: Batch, random: Generator) -> Batch:
    """Mirror the whole batch left-right or upside down."""
    image1, image2, flow, occlusion = batch.image1, batch.image2, batch.flow, batch.occlusion
    for dim, component, chance in ((-1, 0, 0.5), (-2, 1, 0.15)):
        if float(torch.rand(1, generator=random)) < chance:
            image1, image2, flow, occlusion = (values.flip(dim) for values in
                                               (image1, image2, flow, occlusion))
            sign = torch.ones(2, device=flow.device)
            sign[component] = -1
            flow = flow * sign[None, :, None, None]
    return Batch(image1, image2, flow, occlusion)


def photometric(batch: Batch, random: Generator) -> Batch:
    """Change colour, contrast, gamma and light, mostly alike in both frames, and add noise."""
    count = batch.flow.shape[0]
    device = batch.flow.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        values = torch.rand(count, *shape, 1, 1, generator=random)
        return (low + (high - low) * values).to(device)

    gain, gamma, tint = uniform(0.6, 1.4, 1), uniform(0.75, 1.35, 1), uniform(0.85, 1.15, 3)
    shift = uniform(-0.15, 0.15, 1)
    grey = uniform(0, 1, 1) < 0.15
    images = []
    asymmetric = uniform(0, 1, 1) < 0.35
    for image in (batch.image1, batch.image2):
        own_gain = torch.where(asymmetric, uniform(0.8, 1.2, 1), torch.ones_like(gain))
        own_shift = torch.where(asymmetric, uniform(-0.08, 0.08, 1), torch.zeros_like(shift))
        own_tint = torch.where(asymmetric, uniform(0.95, 1.05, 3), torch.ones_like(tint))
        x = (image / 255).clamp(1e-3, 1) ** gamma
        x = (x - 0.5) * gain * own_gain + 0.5 + shift + own_shift
        x = x * tint * own_tint
        x = torch.where(grey, x.mean(dim=1, keepdim=True), x)
        images.append(x)
    if float(torch.rand(1, generator=random)) < 0.3:  # defocus of one frame or both
        which = int(torch.randint(0, 3, (1,), generator=random))
        images = [functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode='replicate'), 3, 1)
                  if which in (index, 2) else x for index, x in enumerate(images)]
    sigma = uniform(0, 0.03, 1) * (uniform(0, 1, 1) < 0.6)
    # Drawn where it is used: of all random numbers only these are many.
    noise = Generator(device).manual_seed(int(torch.randint(0, 2 ** 31, (1,), generator=random)))
    noisy = [x + sigma * torch.randn(x.shape, generator=noise, device=device) for x in images]
    one, two = (x.clamp(0, 1) * 255 for x in noisy)
    return Batch(one, two, batch.flow, batch.occlusion)


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
