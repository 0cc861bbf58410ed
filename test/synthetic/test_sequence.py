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

"""The endless synthetic stream."""

import numpy as np
import pytest
import torch

from flow_ros.ops.sampling import warp
from flow_ros.synthetic import SyntheticSequence

torch.set_num_threads(1)


def test_frames_come_with_their_truth() -> None:
    stream = SyntheticSequence(160, 120, seed=3)
    frame, following = stream.frame(10), stream.frame(11)
    assert frame.image.shape == (120, 160, 3)
    assert frame.image.dtype == np.uint8
    assert frame.flow_forward.shape == (120, 160, 2)
    assert frame.occlusion_forward.dtype == np.bool_
    flow = torch.from_numpy(frame.flow_forward).permute(2, 0, 1)[None]
    after = torch.from_numpy(following.image).permute(2, 0, 1)[None].float()
    seen = ~frame.occlusion_forward
    error = np.abs(warp(after, flow)[0].permute(1, 2, 0).numpy() - frame.image).mean(axis=2)
    still = np.abs(following.image.astype(float) - frame.image).mean(axis=2)
    assert np.median(error[seen]) < 0.6 * np.median(still[seen])


def test_backward_flow_goes_to_the_frame_before() -> None:
    stream = SyntheticSequence(96, 64, seed=3)
    forward, backward = stream.frame(4).flow_forward, stream.frame(5).flow_backward
    there = torch.from_numpy(forward).permute(2, 0, 1)[None]
    back = warp(torch.from_numpy(backward).permute(2, 0, 1)[None], there)
    length = torch.hypot(*(there + back)[0]).numpy()
    assert np.median(length[~stream.frame(4).occlusion_forward]) < 0.05


def test_the_stream_is_a_function_of_seed_and_frame() -> None:
    one, two = SyntheticSequence(64, 48, seed=1), SyntheticSequence(64, 48, seed=1)
    two.frame(3)  # the order of asking does not matter
    assert np.array_equal(one.frame(7).image, two.frame(7).image)
    assert not np.array_equal(one.frame(7).image, one.frame(8).image)
    other = SyntheticSequence(64, 48, seed=2)
    assert not np.array_equal(one.frame(7).image, other.frame(7).image)


def test_the_speed_limit_is_kept() -> None:
    stream = SyntheticSequence(160, 120, seed=4, motion_px=6)
    # Translation of at most 6 px a frame; turning and zooming add a little far from the centre.
    fastest = max(np.hypot(*np.moveaxis(stream.frame(k).flow_forward, 2, 0)).max()
                  for k in range(0, 60, 12))
    assert 0.5 < fastest < 11


def test_a_stream_of_no_size_is_refused() -> None:
    with pytest.raises(ValueError, match='at least 16x16 px; seen 8x480'):
        SyntheticSequence(8, 480)
