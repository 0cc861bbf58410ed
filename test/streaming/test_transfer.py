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

"""Frames to tensors and results to arrays: exact, whatever the strides, and owned by one alone."""

import numpy as np
import pytest
import torch

from flow_ros.streaming.transfer import all_finite, flow_array, map_array, mask_array, upload

CPU = torch.device('cpu')


def frame(height=5, width=7):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def views():
    """Return frames as they come: plain, padded, cut out, mirrored, turned, read-only."""
    padded = np.random.default_rng(1).integers(0, 256, (5, 12, 3), dtype=np.uint8)
    frozen = frame()
    frozen.setflags(write=False)
    return {'plain': frame(), 'padded': padded[:, :7], 'cut': padded[1:4, 2:9],
            'bgr': frame()[..., ::-1], 'upside down': frame()[::-1], 'read-only': frozen,
            'turned': frame(7, 5).transpose(1, 0, 2), 'row': frame(1, 9), 'column': frame(9, 1),
            'pixel': frame(1, 1)}


@pytest.mark.parametrize('name', views())
def test_upload_is_exact_for_any_strides(name):
    pixels = views()[name]
    image = upload(pixels, CPU)
    assert image.dtype == torch.float32
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert image.shape == (1, 3, *pixels.shape[:2])
    np.testing.assert_array_equal(image[0].permute(1, 2, 0).numpy(), pixels)


def test_upload_keeps_nothing_of_the_frame_or_of_an_earlier_one():
    pixels = frame()
    first = upload(pixels, CPU)
    before = first.clone()
    pixels[:] = 0
    upload(pixels, CPU)
    assert torch.equal(first, before)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('size', [(4, 6), (1, 5), (5, 1), (1, 1)])
def test_flow_is_interleaved_and_the_receivers_own(size, dtype):
    flow = torch.randn(2, *size).to(dtype)
    array = flow_array(flow)
    assert array.dtype == np.float32 and array.flags.c_contiguous and array.shape == (*size, 2)
    np.testing.assert_array_equal(array, flow.float().permute(1, 2, 0).numpy())
    given = np.full((*size, 2), np.nan, np.float32)
    assert flow_array(flow, given) is given
    np.testing.assert_array_equal(given, array)
    array[:] = 99.0
    assert not (flow == 99.0).any()


def test_flow_with_strides_and_nan():
    flow = torch.randn(3, 6, 4)[1:].transpose(1, 2)
    flow[0, 0, 0] = float('nan')
    np.testing.assert_array_equal(flow_array(flow), flow.permute(1, 2, 0).numpy())


def test_map_of_any_strides_and_precision():
    values = torch.rand(6, 8, dtype=torch.float64)[::2, ::2]
    array = map_array(values)
    assert array.dtype == np.float32 and array.flags.c_contiguous
    np.testing.assert_array_equal(array, values.float().numpy())


def test_mask_begins_at_one_half_and_nan_is_seen():
    values = torch.tensor([[0.0, 0.4999, 0.5], [0.75, 1.0, float('nan')]])
    mask = mask_array(values)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, [[0, 0, 255], [255, 255, 0]])


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('shape', [(1, 2, 33, 47), (5,), ()])
def test_one_bad_value_is_found_wherever_it_is(shape, dtype, bad):
    values = torch.randn(shape).to(dtype)
    assert all_finite(values)
    for place in {0, values.numel() // 2, values.numel() - 1}:
        spoilt = values.clone().flatten()
        spoilt[place] = bad
        assert not all_finite(spoilt.view(shape))


def test_large_values_are_finite_and_opposite_infinities_are_not():
    assert all_finite(torch.full((64, 64), 3e38))
    assert not all_finite(torch.tensor([float('inf'), -float('inf')]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='torch sees no CUDA device')
def test_a_gpu_gives_the_same():
    device, pixels = torch.device('cuda'), views()['read-only']
    assert torch.equal(upload(pixels, device).cpu(), upload(pixels, CPU))
    flow, values = torch.randn(2, 4, 6), torch.rand(4, 6)
    np.testing.assert_array_equal(flow_array(flow.to(device)), flow_array(flow))
    np.testing.assert_array_equal(map_array(values.to(device)), map_array(values))
    np.testing.assert_array_equal(mask_array(values.to(device)), mask_array(values))
