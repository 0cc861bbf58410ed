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

"""Augmentation keeps the truth true."""

from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor

from flow_ros.ops.sampling import warp
from flow_ros.synthetic.camera import CLEAN
from flow_ros.synthetic.world import World, WorldConfig
from flow_ros.training.augment import (
    augment,
    Batch,
    degraded_prior,
    flip,
    random_crop,
)
from flow_ros.training.procedural import Procedural
from flow_ros.training.recipe import Stage

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def batch() -> Batch:
    config = WorldConfig(surfaces=4, bank_objects=6, largest_motion_px=12, driving=0)
    clip = World(seed=2, config=config).clip(1, batch=2, size=(96, 128), frames=2)
    return Batch(*clip.images, clip.forward[0], clip.occluded_forward[0])


def visible_error(batch: Batch) -> Tensor:
    error = (warp(batch.image2, batch.flow) - batch.image1).abs().mean(dim=1, keepdim=True)
    return error[~batch.occlusion].median()


@pytest.mark.parametrize('seed', range(6))
def test_crops_and_flips_stay_exact(batch: Batch, seed: int) -> None:
    random = Generator().manual_seed(seed)
    changed = flip(random_crop(batch, (64, 80), random), random)
    assert changed.flow.shape == (2, 2, 64, 80)
    assert float(visible_error(changed)) < float(visible_error(batch)) + 1.5


def test_flips_mirror_the_flow(batch: Batch) -> None:
    mirrored = [flip(batch, Generator().manual_seed(seed)) for seed in range(30)]
    signs = {(float(torch.sign(each.flow[0, 0].flip(-1)[9, 9] * batch.flow[0, 0, 9, 9]))
              if torch.equal(each.image1, batch.image1.flip(-1)) else 0.0)
             for each in mirrored}
    assert -1.0 in signs  # left-right alone turned u around
    assert 1.0 not in signs


def test_what_leaves_the_crop_is_occluded(batch: Batch) -> None:
    cropped = random_crop(batch, (32, 32), Generator().manual_seed(1))
    x = torch.arange(32) + cropped.flow[:, :1]
    outside = (x < 0) | (x > 31)
    assert bool(outside.any())
    assert bool(cropped.occlusion[outside].all())


def test_where_the_occlusion_is_known_goes_with_the_pixels(batch: Batch) -> None:
    known = torch.zeros_like(batch.occlusion)
    known[..., ::2] = True
    random = Generator().manual_seed(1)
    changed = flip(random_crop(replace(batch, occlusion_known=known), (32, 32), random), random)
    plain = random_crop(batch, (32, 32), Generator().manual_seed(1))
    assert changed.occlusion_known is not None
    x, y = (torch.arange(32).view(1, -1) + plain.flow[:, 0],
            torch.arange(32).view(-1, 1) + plain.flow[:, 1])
    leaves = ((x < 0) | (x > 31) | (y < 0) | (y > 31))[:, None]
    assert bool(leaves.any())
    # Every second column, and what is known to leave.
    columns = int(changed.occlusion_known.sum())
    assert columns == int((leaves | (torch.arange(32) % 2 == 0)).sum()) or \
        columns == int((leaves | (torch.arange(32) % 2 == 1)).sum())


def test_the_camera_changes_colours_only(batch: Batch) -> None:
    random = Generator().manual_seed(0)
    changed = augment(batch, (96, 128), random, replace(CLEAN, light=1))
    still = augment(batch, (96, 128), Generator().manual_seed(0), CLEAN)
    assert torch.equal(changed.flow, still.flow)
    assert not torch.equal(changed.image1, still.image1)


def test_the_frame_before_goes_the_same_way(batch: Batch) -> None:
    """Whatever happens to image 1 happens to the frame before it, here the same image."""
    triple = replace(batch, previous=batch.image1)
    for seed in range(5):
        changed = augment(triple, (64, 80), Generator().manual_seed(seed), CLEAN)
        assert changed.previous is not None
        assert torch.equal(changed.previous, changed.image1)
    assert augment(batch, (64, 80), Generator().manual_seed(0)).previous is None


@pytest.mark.parametrize('seed', range(6))
def test_the_backward_flow_goes_the_same_way(batch: Batch, seed: int) -> None:
    config = WorldConfig(surfaces=4, bank_objects=6, largest_motion_px=12, driving=0)
    clip = World(seed=2, config=config).clip(1, batch=2, size=(96, 128), frames=2)
    forward = replace(batch, flow_back=clip.backward[0])
    backward = Batch(clip.images[1], clip.images[0], clip.backward[0], clip.occluded_backward[0])
    changed, exchanged = (augment(each, (64, 80), Generator().manual_seed(seed), CLEAN)
                          for each in (forward, backward))
    assert changed.flow_back is not None and changed.flow_back.shape == (2, 2, 64, 80)
    # It is what happens to it where it is the flow itself: cut, mirrored, turned around.
    assert torch.equal(changed.flow_back, exchanged.flow)
    assert torch.equal(changed.image2, exchanged.image1)
    assert augment(batch, (64, 80), Generator().manual_seed(seed), CLEAN).flow_back is None


def test_the_world_knows_both_directions() -> None:
    config = WorldConfig(surfaces=4, bank_objects=6, largest_motion_px=12, driving=0,
                         camera=CLEAN)
    data = Procedural(World(seed=2, config=config), reuse=1)
    stage = Stage(1.0, 2, (96, 128), (64, 80))
    for seed in range(4):  # forwards and backwards in time
        made = data.batch(0, stage, Generator().manual_seed(seed))
        assert made.flow_back is not None
        back = warp(made.flow_back, made.flow)
        error = torch.hypot(*(back + made.flow).unbind(dim=1))[:, None]
        assert float(error[~made.occlusion].median()) < 0.1
        assert float(torch.hypot(*made.flow.unbind(dim=1)).median()) > 0.5


def test_sparse_truth_stays_sparse(batch: Batch) -> None:
    flow = batch.flow.clone()
    flow[..., ::2] = float('nan')
    changed = flip(random_crop(replace(batch, flow=flow, occlusion=None), (64, 80),
                               Generator().manual_seed(3)), Generator().manual_seed(3))
    assert changed.occlusion is None
    assert 0.45 < float(torch.isfinite(changed.flow).float().mean()) < 0.55
    known = random_crop(replace(batch, flow=torch.full_like(flow, float('nan')),
                                occlusion=torch.zeros_like(batch.occlusion)), (64, 80),
                        Generator().manual_seed(3))
    assert known.occlusion is not None
    assert not bool(known.occlusion.any())  # unknown flow does not leave the image


def test_augmentation_is_a_function_of_its_generator(batch: Batch) -> None:
    one, two = (augment(batch, (48, 64), Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one.image1, two.image1)
    assert torch.equal(one.flow, two.flow)


def test_a_degraded_prior_is_near_the_truth_but_not_it(batch: Batch) -> None:
    prior = degraded_prior(batch.flow, Generator().manual_seed(0))
    assert prior.shape == batch.flow.shape
    error = torch.hypot(*(prior - batch.flow).unbind(dim=1)).mean()
    assert 0.2 < float(error) < 0.8 * float(torch.hypot(*batch.flow.unbind(dim=1)).mean())
