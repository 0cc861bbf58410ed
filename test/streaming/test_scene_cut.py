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

import math

import pytest
import torch
from torch.nn import functional

from flow_ros.networks.base import CellFlow
from flow_ros.ops.sampling import warp
from flow_ros.streaming import scene_cut
from flow_ros.streaming.scene_cut import explains, SMALL, small_grey

torch.set_num_threads(1)


def scene(seed, height=120, width=160, pixels=20):
    """Return a picture (1, 3, height, width) of soft spots."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // pixels, width // pixels, generator=generator) * 255
    return functional.interpolate(coarse, size=(height, width), mode='bicubic').clamp(0, 255)


def moved(image, flow):
    """Return the next frame: what it shows of ``image`` lies ``flow`` px further."""
    return warp(image, torch.tensor([-flow[0], -flow[1]]).view(1, 2, 1, 1).expand(
        1, 2, *image.shape[-2:]))


def test_a_small_image_is_the_mean_of_its_areas():
    image = torch.rand(2, 3, 120, 160) * 255
    expected = functional.avg_pool2d(image.mean(dim=1, keepdim=True), 4)
    assert torch.allclose(small_grey(image), expected, atol=1e-3)


@pytest.mark.parametrize('size', [(1, 1), (20, 30), (31, 41), (97, 133), (480, 640), (720, 1280)])
def test_every_size_has_a_small_image(size):
    image = scene(0, 480, 640, 40)
    image = functional.interpolate(image, size=size, mode='area')
    small = small_grey(image)
    assert small.shape == (1, 1, *SMALL)
    assert torch.isfinite(small).all()
    if min(size) > 90:  # the same picture, whatever its size
        whole = functional.adaptive_avg_pool2d(image.mean(dim=1, keepdim=True), SMALL)
        assert (small - whole).abs().mean() < 4


def test_the_areas_are_the_same_without_opencv():
    """On a GPU torch does the means: where areas are whole px, no other ones."""
    values = torch.rand(1, 2, 120, 160)
    expected = functional.adaptive_avg_pool2d(values, SMALL)
    assert torch.allclose(scene_cut._small(values), expected, atol=1e-5)


def test_a_still_scene_is_explained_without_a_flow():
    image = scene(1)
    small = small_grey(image)
    assert explains(None, small, small)
    assert explains(None, small, small_grey(image * 0.7 + 20))  # another exposure
    assert not explains(None, small, small_grey(scene(2)))


@pytest.mark.parametrize('motion', [(30.0, 0.0), (-24.0, 18.0)])
@pytest.mark.parametrize('cell', [1, 4, 8])
def test_motion_is_explained_by_its_flow_alone(motion, cell):
    image = scene(3)
    a, b = small_grey(image), small_grey(moved(image, motion))
    flow = torch.tensor(motion).view(1, 2, 1, 1).expand(1, 2, 120, 160)
    prior = flow if cell == 1 else CellFlow(flow[..., ::cell, ::cell], cell, (120, 160))
    assert not explains(None, a, b)
    assert explains(prior, a, b)
    assert not explains(-flow, a, b)


def test_a_cut_is_explained_by_no_flow():
    a, b = small_grey(scene(4)), small_grey(scene(5))
    for px in (-40.0, 0.0, 40.0):
        assert not explains(torch.full((1, 2, 120, 160), px), a, b)


def test_nan_in_a_flow_is_no_motion():
    image = scene(6)
    a, b = small_grey(image), small_grey(moved(image, (30.0, 0.0)))
    flow = torch.full((1, 2, 120, 160), math.nan)
    assert not explains(flow, a, b)


def test_two_flat_pictures_are_one_scene():
    flat = torch.full((1, 1, *SMALL), 100.0)
    assert explains(None, flat, flat + 30)
    assert not explains(None, flat, small_grey(scene(7)))
