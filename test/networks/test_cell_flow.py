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

from flow_ros.networks import create
from flow_ros.networks.base import CellFlow, check_prior, Features
from flow_ros.ops.sampling import pad_to_multiple, resize_flow

torch.set_num_threads(1)


def smooth(height, width, seed=0):
    """Return a flow (1, 2, height, width) of some px that changes little from px to px."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 2, 3, 4, generator=generator) * 4
    return functional.interpolate(coarse, size=(height, width), mode='bicubic')


def sheared(height, width, px):
    """Return a flow (1, 2, height, width) of up to ``px`` that is linear in x and y."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width,
                          indexing='ij')
    return torch.stack([x - 0.4 * y + 0.3, 0.2 - 0.3 * x + 0.5 * y])[None] / 1.3 * px


def in_cells(flow, cell):
    """Return the CellFlow of a flow (1, 2, H, W): the mean of each cell."""
    height, width = flow.shape[-2:]
    padded = functional.pad(flow, (0, -width % cell, 0, -height % cell), mode='replicate')
    return CellFlow(functional.avg_pool2d(padded, cell), cell, (height, width))


def features(height, width, batch=1):
    """Return what a frame's features say of its size."""
    return Features((torch.zeros(batch, 1, 1, 1),), (height, width))


@pytest.mark.parametrize('size', [(64, 96), (61, 83), (17, 5)])
@pytest.mark.parametrize('level', [8, 16])
def test_a_full_flow_on_a_level_is_it_padded_and_resized(size, level):
    flow = smooth(*size)
    rows, columns = (-(-side // 16) * 16 // level for side in size)
    expected = resize_flow(pad_to_multiple(flow, 16), (rows, columns))
    found = CellFlow(flow, 1, size).at_level(level, (rows, columns))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize('size', [(64, 96), (61, 83), (17, 5)])
@pytest.mark.parametrize('cell', [2, 4, 8, 16, 32])
def test_cells_on_their_own_level_are_untouched(size, cell):
    cells = in_cells(smooth(*size), cell)
    rows, columns = cells.flow.shape[-2:]
    found = cells.at_level(cell, (rows + 1, columns + 2))  # a frame padded by more
    assert torch.equal(found[..., :rows, :columns] * cell, cells.flow)
    assert torch.equal(found[..., -1, :columns] * cell, cells.flow[..., -1, :])
    assert torch.equal(found[..., :rows, -1] * cell, cells.flow[..., -1])


@pytest.mark.parametrize('cell', [4, 8, 16, 32])
@pytest.mark.parametrize('level', [8, 16])
def test_cells_come_near_the_full_flow(cell, level):
    size = 128, 192
    flow = sheared(*size, px=10.0)
    shape = size[0] // level, size[1] // level
    found = in_cells(flow, cell).at_level(level, shape)
    expected = CellFlow(flow, 1, size).at_level(level, shape)
    # A linear flow is its own interpolation, but for what goes on outside of the last centres.
    rim = max(1, cell // 2 // level)
    inner = (found - expected)[..., rim:-rim, rim:-rim]
    assert inner.abs().max() < 1e-4
    rim = cell // 2
    assert (in_cells(flow, cell).full - flow)[..., rim:-rim, rim:-rim].abs().max() < 1e-4


def test_points_between_cells_are_interpolated():
    size = 32, 40
    x, y = torch.meshgrid(torch.arange(5.), torch.arange(4.), indexing='xy')
    cells = CellFlow(torch.stack([x, y])[None], 8, size)
    found = cells.at(torch.tensor([-9.0, 3.5, 7.5, 13.5, 99.0]), torch.tensor([3.5, 12.5]))
    assert found[0, 0, 0].tolist() == [0, 0, 0.5, 1.25, 4]
    assert found[0, 1, :, 0].tolist() == [0, 1.125]


@pytest.mark.parametrize('name', ['dip_rt', 'dip', 'hd3'])
@pytest.mark.parametrize('size', [(96, 128), (90, 139)])
@pytest.mark.parametrize('px', [6.0, 60.0])
def test_every_network_starts_alike_from_cells_and_full_flow(name, size, px):
    torch.manual_seed(0)
    network = create(name, None).eval()
    image = torch.rand(1, 3, *size) * 255
    flow = sheared(*size, px)
    with torch.inference_mode():
        frame = network.encode(image)
        full = network.start(frame, frame, prior_flow=flow)
        for cell in (4, 8):
            state = network.start(frame, frame, prior_flow=in_cells(flow, cell))
            assert state.warm
            assert state.schedule == full.schedule
            # Outside of the last centres and in cells that the frame cuts they differ.
            rim = 1 + 12 // state.level
            error = (state.flow - full.flow)[..., rim:-rim, rim:-rim].abs() * state.level
            assert error.numel() == 0 or error.max() < 0.002 * px


@pytest.mark.parametrize('prior, words', [
    (torch.zeros(1, 2, 16, 16), 'seen .1, 2, 16, 16.'),
    (CellFlow(torch.zeros(1, 2, 8, 12), 8, (61, 90)), 'of cells of 8 px, size .61, 90.'),
    (CellFlow(torch.zeros(1, 2, 7, 12), 8, (61, 96)), 'seen .1, 2, 7, 12. of cells of 8 px'),
    (CellFlow(torch.full((1, 2, 8, 12), math.inf), 8, (61, 96)), 'NaN or infinite'),
    (CellFlow(torch.zeros(2, 2, 8, 12), 8, (61, 96)), 'batch of the features, 1; seen 2')])
def test_a_prior_that_does_not_fit_is_named(prior, words):
    with pytest.raises(ValueError, match=words):
        check_prior(prior, features(61, 96))


def test_a_prior_that_fits_is_cells():
    flow = torch.ones(1, 2, 61, 96)
    assert check_prior(flow, features(61, 96)).full is flow
    cells = CellFlow(torch.ones(1, 2, 8, 12), 8, (61, 96))
    assert check_prior(cells, features(61, 96)) is cells
    assert torch.equal(cells.full, flow)


@pytest.mark.parametrize('trust, levels', [(None, {8}), (0.9, {8}), (0.6, {16, 8}),
                                           (math.nan, {8})])
def test_dip_rt_takes_a_doubtful_prior_to_its_coarse_level(trust, levels):
    torch.manual_seed(0)
    network = create('dip_rt', None).eval()
    prior = CellFlow(torch.full((1, 2, 8, 12), 3.0), 8, (64, 96),
                     trust=None if trust is None else torch.tensor(trust))
    with torch.inference_mode():
        frame = network.encode(torch.zeros(1, 3, 64, 96))
        state = network.start(frame, frame, prior_flow=prior, iterations=2)
    assert state.warm
    assert {step.level for step in state.schedule} == levels
    assert len(state.schedule) == 2 * len(levels)
    assert torch.allclose(state.flow * state.level, torch.tensor(3.0))
