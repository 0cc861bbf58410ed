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

import numpy as np
import pytest
import torch
from torch.nn import functional

from flow_ros.networks.base import CellFlow
from flow_ros.ops.sampling import warp
from flow_ros.streaming import scene_cut
from flow_ros.streaming.scene_cut import explains
from flow_ros.streaming.thumbnails import SMALL, thumbnails

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


def small(image):
    """Return the small picture of a frame (1, 3, H, W)."""
    return thumbnails(image[0].permute(1, 2, 0).round().byte().numpy()).small


def everywhere(motion, cell=1, size=(120, 160)):
    """Return one motion as a flow with a vector per cell."""
    rows, columns = (-(-side // cell) for side in size)
    return CellFlow(torch.tensor(motion).view(1, 2, 1, 1).expand(1, 2, rows, columns), cell, size)


def test_the_areas_are_the_same_without_opencv():
    """On a GPU torch does the means: where areas are whole px, no other ones."""
    values = torch.rand(1, 2, 120, 160)
    expected = functional.adaptive_avg_pool2d(values, SMALL)
    assert torch.allclose(scene_cut._small(values), expected, atol=1e-5)


def test_a_still_scene_is_explained_without_a_flow():
    image = scene(1)
    assert explains(None, small(image), small(image))
    assert explains(None, small(image), small(image * 0.7 + 20))  # another exposure
    assert not explains(None, small(image), small(scene(2)))


@pytest.mark.parametrize('motion', [(30.0, 0.0), (-24.0, 18.0)])
@pytest.mark.parametrize('cell', [1, 4, 8])
@pytest.mark.parametrize('size', [(120, 160), (480, 640)])
def test_motion_is_explained_by_its_flow_alone(motion, cell, size):
    image = scene(3)
    times = size[0] // 120
    a, b = (small(functional.interpolate(frame, scale_factor=times, mode='bilinear'))
            for frame in (image, moved(image, motion)))
    flow = everywhere([times * px for px in motion], cell, size)
    assert not explains(None, a, b)
    assert explains(flow, a, b)
    assert not explains(CellFlow(-flow.flow, cell, size), a, b)


def test_a_cut_is_explained_by_no_flow():
    a, b = small(scene(4)), small(scene(5))
    for px in (-40.0, 0.0, 40.0):
        assert not explains(everywhere((px, px)), a, b)


def test_nan_in_a_flow_is_no_motion():
    image = scene(6)
    a, b = small(image), small(moved(image, (30.0, 0.0)))
    assert not explains(everywhere((math.nan, math.nan)), a, b)


def test_two_flat_pictures_are_one_scene():
    flat = np.full(SMALL, 100.0, np.float32)
    assert explains(None, flat, flat + 30)
    assert not explains(None, flat, small(scene(7)))
