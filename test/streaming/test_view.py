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

from flow_ros.streaming.view import View


def picture(width, height):
    """Return a picture in which every pixel is its own place."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, (x + y) % 2], axis=-1).astype(np.uint8)


def test_the_whole_image_is_not_touched():
    pixels = picture(30, 20)
    assert View().whole
    assert np.shares_memory(View().apply(pixels), pixels)
    assert View().size_of(30, 20) == (30, 20)
    assert np.array_equal(View().matrix(30, 20), np.eye(3))


def test_a_region_is_cut_out_without_a_copy():
    pixels = picture(30, 20)
    seen = View(roi=(3, 5, 10, 4)).apply(pixels)
    assert seen.shape == (4, 10, 3)
    assert seen[0, 0].tolist()[:2] == [3, 5]
    assert seen[-1, -1].tolist()[:2] == [12, 8]
    assert np.shares_memory(seen, pixels)


@pytest.mark.parametrize('scale, size', [(0.5, (16, 12)), (0.25, (8, 6)), (0.33, (11, 8)),
                                         (0.001, (1, 1)), (1.0, (32, 24))])
def test_sizes_are_rounded_to_whole_px(scale, size):
    view = View(scale=scale)
    assert view.size_of(32, 24) == size
    assert view.apply(picture(32, 24)).shape == (size[1], size[0], 3)


def test_a_pixel_of_the_view_is_the_mean_of_those_it_stands_for():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    seen = View(scale=0.5, roi=(2, 4, 8, 6)).apply(pixels)
    means = pixels[4:10, 2:10].reshape(3, 2, 4, 2, 3).mean(axis=(1, 3))
    assert seen.shape == means.shape
    assert np.abs(seen - means).max() <= 0.5


@pytest.mark.parametrize('mirrored', [np.s_[::-1], np.s_[:, ::-1]])
def test_mirrored_images_are_scaled_as_well(mirrored):
    pixels = picture(16, 12)
    seen = View(scale=0.5).apply(pixels[mirrored])
    assert np.array_equal(seen, View(scale=0.5).apply(pixels[mirrored].copy()))


@pytest.mark.parametrize('scale', [1.0, 0.5, 0.25, 0.4])
def test_points_lie_where_their_light_lands(scale):
    """The centre of light of a soft blob is at the same place by formula and by picture."""
    width, height = 120, 80
    x, y = np.array([61.3, 37.8])
    rows, columns = np.mgrid[:height, :width]
    blob = 250 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 6.0 ** 2))
    view = View(scale=scale, roi=(20, 10, 80, 60))
    seen = view.apply(np.repeat(blob[..., None], 3, axis=2).round().astype(np.uint8))
    light = seen[..., 0].astype(float)
    rows, columns = np.mgrid[:light.shape[0], :light.shape[1]]
    centre = np.array([(light * columns).sum(), (light * rows).sum()]) / light.sum()
    assert view.to_view(np.array([x, y]), width, height) == pytest.approx(centre, abs=0.05)


@pytest.mark.parametrize('view', [View(), View(scale=0.37), View(roi=(5, 7, 33, 21)),
                                  View(scale=0.5, roi=(5, 7, 33, 21))])
def test_points_go_there_and_back(view):
    points = np.random.default_rng(1).uniform(-10, 60, (4, 5, 2))
    there = view.to_view(points, 64, 48)
    assert there.shape == points.shape
    assert view.to_camera(there, 64, 48) == pytest.approx(points)
    # The borders of region and view are one line.
    x, y, width, height = view.region(64, 48)
    across, down = view.size_of(64, 48)
    corners = np.array([[x - 0.5, y - 0.5], [x + width - 0.5, y + height - 0.5]])
    assert view.to_view(corners, 64, 48) == pytest.approx(
        np.array([[-0.5, -0.5], [across - 0.5, down - 0.5]]))


def test_flow_is_in_px_of_the_view():
    view = View(scale=0.5, roi=(10, 0, 40, 30))
    start, end = np.array([20.0, 10.0]), np.array([26.0, 8.0])
    moved = view.to_view(end, 64, 48) - view.to_view(start, 64, 48)
    assert moved == pytest.approx((end - start) * 0.5)


def test_the_matrix_makes_camera_and_projection_matrix():
    width, height = 640, 480
    view = View(scale=0.5, roi=(100, 60, 400, 301))  # 150.5 px are 151: the axes differ
    intrinsics = np.array([[500.0, 0, 319.5], [0, 510, 239.5], [0, 0, 1]])
    projection = np.hstack([intrinsics, [[-60.0], [0], [0]]])
    point = np.array([0.4, -0.3, 2.0, 1.0])
    seen = projection @ point
    mine = view.matrix(width, height) @ projection @ point
    expected = view.to_view(seen[:2] / seen[2], width, height)
    assert mine[:2] / mine[2] == pytest.approx(expected)
    matrix = view.matrix(width, height) @ intrinsics
    assert matrix[0, 0] == pytest.approx(250)
    assert matrix[1, 1] == pytest.approx(510 * 151 / 301)
    assert matrix[0, 2] == pytest.approx((319.5 - 100 + 0.5) * 0.5 - 0.5)
    assert matrix[2].tolist() == [0, 0, 1]


def test_regions_are_read():
    assert View.parse_roi('640x240+0+240') == (0, 240, 640, 240)
    assert View.parse_roi(' 1x2+3+4 ') == (3, 4, 1, 2)
    assert View.parse_roi('') is None
    assert View.parse_roi('  ') is None


@pytest.mark.parametrize('text', ['640x240', '640x240+0', '0x240+0+0', '640x0+1+1', 'all',
                                  '-640x240+0+0', '640x240-1+0', '640.5x240+0+0'])
def test_regions_that_cannot_be_read_are_named(text):
    with pytest.raises(ValueError, match='WIDTHxHEIGHT') as error:
        View.parse_roi(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize('scale', [0, -1, 1.01, math.nan, math.inf])
def test_scales_out_of_range_are_named(scale):
    with pytest.raises(ValueError, match='scale must be over 0 and at most 1'):
        View(scale=scale)


@pytest.mark.parametrize('roi', [(0, 0, 0, 5), (-1, 0, 5, 5), (0, 0, 5), (0, 0, 5.0, 5),
                                 (0, True, 5, 5)])
def test_regions_that_are_none_are_named(roi):
    with pytest.raises(ValueError, match='roi must be x, y'):
        View(roi=roi)


@pytest.mark.parametrize('roi', [(0, 0, 65, 48), (1, 0, 64, 48), (0, 1, 64, 48), (70, 0, 1, 1)])
def test_a_region_that_leaves_the_image_is_named(roi):
    view = View(roi=roi)
    for use in (lambda: view.size_of(64, 48), lambda: view.apply(picture(64, 48)),
                lambda: view.matrix(64, 48)):
        with pytest.raises(ValueError, match='leaves the image, which is 64x48'):
            use()
