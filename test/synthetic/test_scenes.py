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

"""The procedural world: exact flow, exact occlusion, the same for the same seed."""

import numpy as np
import pytest
import torch
from torch import Tensor

from flow_ros.ops.sampling import warp
from flow_ros.synthetic.scenes import flow_between, occlusion_between, render, Scene, Waves
from flow_ros.synthetic.world import Clip, World, WorldConfig

torch.set_num_threads(1)
SMALL = WorldConfig(surfaces=6, bank_objects=8, largest_motion_px=20)


@pytest.fixture(scope='module')
def world() -> World:
    return World(seed=5, config=SMALL)


def scene(poses: list[Tensor], waves: Waves | None = None,
          readout: Tensor | None = None) -> Scene:
    """One smooth surface and, for every further pose, one opaque object."""
    y, x = torch.meshgrid(torch.linspace(0, 6, 64), torch.linspace(0, 6, 64), indexing='ij')
    smooth = torch.stack([x.sin(), y.cos(), (x + y).sin()]) * 100 + 128
    count = len(poses) - 1
    solid = torch.cat([torch.full((3, 16, 16), 60.0), torch.full((1, 16, 16), 255.0)])
    texture = torch.zeros(1, count + 1, 2, 3)
    texture[:, :, 0, 0] = texture[:, :, 1, 1] = 1 / 200
    texture[:, 1:, 0, 0] = texture[:, 1:, 1, 1] = 1 / 10
    return Scene(surfaces=smooth[None, None], objects=solid.expand(1, count, 4, 16, 16),
                 poses=torch.stack(poses)[None], texture=texture,
                 fade=torch.full((1, count + 1), 1e9), waves=waves, readout=readout)


def moved(x: float, y: float) -> Tensor:
    """Return poses at frames 0 and 1 of a plane that moves by (x, y) px."""
    poses = torch.eye(3).repeat(2, 1, 1)
    poses[1, 0, 2], poses[1, 1, 2] = x, y
    return poses


def test_a_translation_is_its_flow() -> None:
    made = scene([moved(3, -2)])
    first = render(made, 0, (32, 48))
    flow = flow_between(made, first.layer, 0, 1)
    assert torch.allclose(flow[:, 0], torch.tensor(3.0), atol=1e-4)
    assert torch.allclose(flow[:, 1], torch.tensor(-2.0), atol=1e-4)


def test_a_covered_pixel_is_occluded_and_an_uncovered_one_is_not() -> None:
    made = scene([moved(0, 0), moved(8, 0)])  # a 20 px square moves right over a still ground
    first, second = render(made, 0, (64, 96)), render(made, 1, (64, 96))
    flow = flow_between(made, first.layer, 0, 1)
    occluded = occlusion_between(flow, first.layer, second.layer)[0, 0]
    row = occluded[32]
    square = first.layer[0, 32] == 1
    left, right = int(square.nonzero()[0]), int(square.nonzero()[-1])
    assert right - left == 19
    assert not bool(row[:right + 1].any())  # the square itself, and what it uncovers
    assert bool(row[right + 2:right + 8].all())  # what it covers
    assert not bool(row[right + 10:].any())


@pytest.mark.parametrize('kind', ['rigid', 'waves', 'rolling', 'rolling waves', 'rolling up'])
def test_warping_the_second_frame_gives_the_first(kind: str) -> None:
    """Smooth texture, so that what is left is the flow's error and not the sampling's."""
    random = np.random.default_rng(0)
    poses = moved(4, 3)
    poses[1, :2, :2] += torch.from_numpy(random.normal(0, 0.03, (2, 2))).float()
    poses[1, 2, 0] = 3e-4
    waves = None
    if 'waves' in kind:
        waves = Waves(amplitude=torch.tensor([[[[1.5, 1.0], [0.5, -1.0]]]]),
                      frequency=torch.tensor([[[[0.08, 0.02], [-0.03, 0.09]]]]),
                      phase=torch.tensor([[[0.3, 1.2]]]))
    readout = torch.tensor([-0.8 if 'up' in kind else 0.8]) if 'rolling' in kind else None
    made = scene([poses], waves, readout)
    first, second = render(made, 0, (96, 128)), render(made, 1, (96, 128))
    for one, other, start, end in ((first, second, 0, 1), (second, first, 1, 0)):
        flow = flow_between(made, one.layer, start, end)
        seen = ~occlusion_between(flow, one.layer, other.layer)
        error = (warp(other.image, flow) - one.image).abs().amax(dim=1, keepdim=True)
        assert float(error[seen].max()) < 0.6  # of 255: a wrong flow of 0.1 px shows 1 and more
        wrong = (warp(other.image, flow + 0.5) - one.image).abs().amax(dim=1, keepdim=True)
        assert float(wrong[seen].mean()) > 3 * float(error[seen].mean())


def test_a_rolling_shutter_sees_every_row_at_its_own_time() -> None:
    """A plane that moves sideways at 10 px a frame is slanted; one that falls is stretched."""
    global_ = scene([moved(10, 0)])
    rolling = scene([moved(10, 0)], readout=torch.tensor([0.5]))
    straight, slanted = (render(each, 0, (65, 96)).image for each in (global_, rolling))
    for row, shift in ((0, -2.5), (32, 0.0), (64, 2.5)):
        there = warp(straight, torch.tensor([-shift, 0.0]).view(1, 2, 1, 1).expand(1, 2, 65, 96))
        inner = slice(8, -8)
        assert torch.allclose(slanted[..., row, inner], there[..., row, inner], atol=0.5)
    falling = scene([moved(0, 6)], readout=torch.tensor([0.5]))
    flow = flow_between(falling, render(falling, 0, (65, 96)).layer, 0, 1)
    # The point is 6 px lower a frame later, and is read later still by what it has fallen:
    # d = 6 (1 + 0.5 d / 64).
    assert torch.allclose(flow[:, 1, 20:40], torch.tensor(6 / (1 - 6 * 0.5 / 64)), atol=0.02)


def visible_error(clip: Clip) -> tuple[float, float]:
    image1, image2 = clip.images
    error = (warp(image2, clip.forward[0]) - image1).abs().mean(dim=1, keepdim=True)
    still = (image2 - image1).abs().mean(dim=1, keepdim=True)
    seen = ~clip.occluded_forward[0]
    return float(error[seen].median()), float(still[seen].median())


def test_random_scenes_agree_with_their_flow(world: World) -> None:
    for index in range(4):
        error, still = visible_error(world.clip(index, batch=2, size=(192, 256), frames=2))
        assert error < 0.5 * still  # what is left is resampling, most on ground seen aslant


def test_forward_and_backward_are_inverse_where_visible(world: World) -> None:
    for index in range(3):
        clip = world.clip(index, batch=2, size=(96, 128), frames=2)
        back = warp(clip.backward[0], clip.forward[0])
        length = torch.hypot(*(clip.forward[0] + back).unbind(dim=1))[:, None]
        assert float(length[~clip.occluded_forward[0]].median()) < 0.05


def test_the_same_seed_gives_the_same_pairs(world: World) -> None:
    again = World(seed=5, config=SMALL)
    other = World(seed=6, config=SMALL)
    one, two, three = (each.clip(3, batch=2, size=(64, 64), frames=2)
                       for each in (world, again, other))
    assert torch.equal(one.images[0], two.images[0])
    assert torch.equal(one.forward[0], two.forward[0])
    assert not torch.equal(one.images[0], three.images[0])


def test_motion_reaches_far_and_is_often_small() -> None:
    far = World(seed=5, config=WorldConfig(surfaces=6, bank_objects=8))
    lengths = torch.cat([torch.hypot(*far.clip(index, batch=4, size=(96, 128), frames=2)
                                     .forward[0].unbind(dim=1)).flatten() for index in range(12)])
    assert float(lengths.quantile(0.1)) < 3
    assert float(lengths.quantile(0.98)) > 40
