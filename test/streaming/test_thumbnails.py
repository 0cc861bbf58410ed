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

"""The small grey pictures: means of areas, for every size."""

import cv2
import numpy as np
import pytest

from flow_ros.streaming.early_stop import differing
from flow_ros.streaming.thumbnails import BLOCK, SMALL, thumbnails

WEIGHTS = (0.299, 0.587, 0.114)


def picture(height=480, width=640, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def test_both_pictures_are_means_of_areas():
    frame = np.random.default_rng(1).integers(0, 256, (480, 640, 3)).astype(np.uint8)
    grey = frame @ np.array(WEIGHTS)
    for found, side in ((thumbnails(frame).blocks, BLOCK), (thumbnails(frame).small, 16)):
        assert found.dtype == np.float32
        means = grey.reshape(480 // side, side, 640 // side, side).mean(axis=(1, 3))
        assert np.abs(found - means).max() < 1.0  # grey and blocks are rounded


@pytest.mark.parametrize('size', [(1, 1), (7, 30), (9, 8), (20, 30), (31, 41), (97, 133),
                                  (240, 320), (241, 313), (720, 1280)])
def test_every_size_has_both(size):
    frame = cv2.resize(picture(), size[::-1], interpolation=cv2.INTER_AREA)
    found = thumbnails(frame[::-1, ::-1])
    assert found.blocks.shape == tuple(max(side // BLOCK, 1) for side in size)
    assert found.small.shape == SMALL
    assert not differing(found.blocks, found.blocks).any()
    if min(size) > 90:  # the same picture, whatever its size
        whole = thumbnails(picture()[::-1, ::-1]).small
        assert np.abs(found.small - whole).mean() < 4


def test_a_frame_is_left_as_it_is_and_may_be_read_only():
    frame = picture(48, 64)
    before = frame.copy()
    frame.setflags(write=False)
    thumbnails(frame)
    assert np.array_equal(frame, before)
