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

"""Augmented truth is true: frame 2 warped by the flow is frame 1; sparse vectors stay exact."""

from dataclasses import replace
from itertools import product

import cv2
import numpy as np
import pytest

from flow_ros.evaluation.data_sets import Sample
from flow_ros.training.sample_augment import (
    augment_sample,
    AugmentConfig,
    change_colours,
    draw_maps,
    erase,
    NO_AUGMENT,
    transform,
)

SIZE = (150, 200)
CROP = (96, 128)
# Frame 2 is frame 1 under this affine map, so that the true flow is known everywhere.
MOTION = np.array([[1.03, -0.05, 4.3], [0.04, 0.98, -3.7]])
EVERYTHING = replace(
    NO_AUGMENT, spatial=1, scale=(-0.3, 0.7), stretch=0.3, stretch_chance=1, rotation_deg=15,
    relative_rotation_deg=4, relative_shift_px=5, flip_horizontal=0.5, flip_vertical=0.5,
    reverse=0.5)
CASES = {
    'crop': NO_AUGMENT,
    'horizontal flip': replace(NO_AUGMENT, flip_horizontal=1),
    'vertical flip': replace(NO_AUGMENT, flip_vertical=1),
    'scale': replace(NO_AUGMENT, spatial=1, scale=(-0.3, 0.7), stretch_chance=0),
    'stretch': replace(NO_AUGMENT, spatial=1, scale=(0.3, 0.3), stretch=0.4, stretch_chance=1),
    'rotation': replace(NO_AUGMENT, spatial=1, scale=(0.5, 0.5), rotation_deg=20),
    'relative': replace(NO_AUGMENT, relative_rotation_deg=6, relative_shift_px=8),
    'reverse': replace(NO_AUGMENT, reverse=1),
    'everything': EVERYTHING,
}


def flow_of(motion: np.ndarray, size: tuple[int, int] = SIZE) -> np.ndarray:
    x, y = np.meshgrid(np.arange(size[1]), np.arange(size[0]))
    there = np.stack([x, y], axis=2) @ motion[:, :2].T + motion[:, 2]
    return (there - np.stack([x, y], axis=2)).astype(np.float32)


def outside(flow: np.ndarray) -> np.ndarray:
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    u, v = x + flow[..., 0], y + flow[..., 1]
    return np.asarray((u < 0) | (v < 0) | (u > width - 1) | (v > height - 1))


def smooth_texture(seed: int, size: tuple[int, int]) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(*size, 3))
    texture = cv2.GaussianBlur(noise, (0, 0), 4)
    return np.clip(128 + 60 * texture / texture.std(), 0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def sample() -> Sample:
    """Return two views of one large texture, with truth in both directions."""
    margin = 60
    texture = smooth_texture(3, (SIZE[0] + 2 * margin, SIZE[1] + 2 * margin))
    place = np.array([[1.0, 0, -margin], [0, 1.0, -margin]])
    moved = np.concatenate([MOTION[:, :2], MOTION[:, :2] @ place[:, 2:] + MOTION[:, 2:]], axis=1)
    frames = [np.asarray(cv2.warpAffine(texture, matrix, SIZE[::-1], flags=cv2.INTER_CUBIC),
                         dtype=np.uint8) for matrix in (place, moved)]
    flow, backward = flow_of(MOTION), flow_of(cv2.invertAffineTransform(MOTION))
    return Sample(frames[0], frames[1], flow, outside(flow), None, backward, outside(backward))


def warped(changed: Sample) -> np.ndarray:
    """Return frame 2 sampled where every pixel's flow says."""
    height, width = changed.flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    flow = np.nan_to_num(changed.flow)
    return np.asarray(cv2.remap(changed.image2, x + flow[..., 0], y + flow[..., 1],
                                cv2.INTER_LINEAR), dtype=np.float64)


@pytest.mark.parametrize(('case', 'seed'), list(product(CASES, range(8))))
def test_frame_2_warped_by_the_flow_is_frame_1(sample: Sample, case: str, seed: int) -> None:
    changed = augment_sample(sample, CROP, CASES[case], np.random.default_rng(seed))
    assert changed.flow.shape == (*CROP, 2) and changed.flow.dtype == np.float32
    assert changed.image1.shape == changed.image2.shape == (*CROP, 3)
    assert changed.occlusion is not None and changed.occlusion_known is not None
    assert changed.occlusion_known.all() and np.isfinite(changed.flow).all()
    visible = ~changed.occlusion
    assert visible.mean() > 0.5  # there is something to look at
    error = np.abs(warped(changed) - changed.image1).mean(axis=2)[visible]
    assert error.mean() < 1.0 and np.percentile(error, 99.5) < 4
    # And it is not the case that any flow would do.
    shifted = replace(changed, flow=changed.flow + 1)
    assert np.abs(warped(shifted) - changed.image1).mean(axis=2)[visible].mean() > 4


@pytest.mark.parametrize('seed', range(5))
def test_the_flow_of_affine_motion_is_exact(sample: Sample, seed: int) -> None:
    config = replace(EVERYTHING, reverse=0)
    changed = augment_sample(sample, CROP, config, np.random.default_rng(seed))
    random = np.random.default_rng(seed)
    random.random()  # whether it is reversed
    first, second = (np.concatenate([matrix, [[0, 0, 1]]]) for matrix in
                     draw_maps(SIZE, CROP, config, random))
    motion = second @ np.concatenate([MOTION, [[0, 0, 1]]]) @ np.linalg.inv(first)
    np.testing.assert_allclose(changed.flow, flow_of(motion[:2], CROP), atol=2e-4)
    np.testing.assert_array_equal(changed.occlusion | outside(changed.flow), changed.occlusion)


@pytest.mark.parametrize('seed', range(6))
def test_sparse_vectors_stay_what_they_are(seed: int) -> None:
    """Unknown pixels around it, and of other motions, take nothing from a known vector."""
    random = np.random.default_rng(seed)
    flow = np.full((*SIZE, 2), np.nan, np.float32)
    points = [(y, x) for y in range(4, SIZE[0], 9) for x in range(4, SIZE[1], 9)]
    for y, x in points:
        flow[y, x] = random.uniform(-40, 40, 2)  # no two neighbours alike
    flow[100:, 100:] = 0  # an area that is dense
    blank = np.zeros((*SIZE, 3), np.uint8)
    first, second = draw_maps(SIZE, CROP, EVERYTHING, random)
    changed = transform(Sample(blank, blank, flow), first, second, CROP)
    known = np.isfinite(changed.flow).all(axis=2)
    assert np.isnan(changed.flow).all(axis=2).tolist() == (~known).tolist()
    back = cv2.invertAffineTransform(first)
    goal_back = cv2.invertAffineTransform(second)
    seen = set()
    for row, column in np.argwhere(known):
        source = back @ (column, row, 1)
        x, y = np.rint(source).astype(int)
        assert np.abs(source - (x, y)).max() <= 0.5 + 1e-9 and np.isfinite(flow[y, x, 0])
        goal = goal_back @ (column + changed.flow[row, column, 0],
                            row + changed.flow[row, column, 1], 1)
        np.testing.assert_allclose(goal - source, flow[y, x], atol=2e-3)
        seen.add((y, x))
    # None is lost where the frame was not made smaller.
    linear = np.linalg.svd(first[:, :2])[1]
    if linear.min() > 1.5:
        inside = [point for point in points
                  if (1 < (first @ (point[1], point[0], 1))).all()
                  and (first @ (point[1], point[0], 1) < (CROP[1] - 2, CROP[0] - 2)).all()]
        assert inside and set(inside) <= seen


def test_edges_of_motion_stay_sharp() -> None:
    flow = np.zeros((*SIZE, 2), np.float32)
    flow[:, 100:] = (10, 0)
    blank = np.zeros((*SIZE, 3), np.uint8)
    first = np.array([[1.7, 0, -80.3], [0, 1.7, -60.9]])
    changed = transform(Sample(blank, blank, flow), first, first, CROP)
    u = np.unique(changed.flow[..., 0].round(3))
    np.testing.assert_allclose(u, [0, 17])
    assert changed.flow[0, 0, 0] == pytest.approx(0) and changed.occlusion is None


def test_occlusion_is_known_only_where_it_was() -> None:
    flow = np.full((*SIZE, 2), np.nan, np.float32)
    flow[::2] = (0, 0)
    known = np.isfinite(flow[..., 0])
    occlusion = np.zeros(SIZE, bool)
    occlusion[::4] = True
    blank = np.zeros((*SIZE, 3), np.uint8)
    changed = augment_sample(Sample(blank, blank, flow, occlusion, known), CROP,
                             replace(NO_AUGMENT, flip_vertical=1), np.random.default_rng(0))
    assert changed.occlusion is not None and changed.occlusion_known is not None
    np.testing.assert_array_equal(changed.occlusion_known, np.isfinite(changed.flow[..., 0]))
    assert changed.occlusion[changed.occlusion_known].mean() == pytest.approx(0.5, abs=0.02)


def test_occlusion_stays_unknown_where_it_was_and_becomes_so_with_unknown_flow() -> None:
    flow = np.zeros((*SIZE, 2), np.float32)
    flow[::3] = np.nan
    known = np.zeros(SIZE, bool)
    known[:, ::2] = True
    occlusion = np.zeros(SIZE, bool)
    occlusion[::2] = True
    blank = np.zeros((*SIZE, 3), np.uint8)
    same = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    changed = transform(Sample(blank, blank, flow, occlusion, known), same, same, SIZE)
    np.testing.assert_array_equal(changed.occlusion, occlusion)
    # A pixel that was visible may have left the crop; one that was covered stays covered.
    np.testing.assert_array_equal(changed.occlusion_known,
                                  known & (occlusion | np.isfinite(flow[..., 0])))


def test_nothing_is_known_outside_of_the_frame() -> None:
    flow = np.zeros((*SIZE, 2), np.float32)
    image = np.full((*SIZE, 3), 255, np.uint8)
    moved = np.array([[1.0, 0, 20], [0, 1.0, 0]])
    changed = transform(Sample(image, image, flow, np.ones(SIZE, bool)), moved, moved, CROP)
    inside = np.zeros(CROP, bool)
    inside[:, 20:] = True
    np.testing.assert_array_equal(np.isfinite(changed.flow[..., 0]), inside)
    np.testing.assert_array_equal(changed.occlusion, inside)
    np.testing.assert_array_equal(changed.occlusion_known, inside)
    np.testing.assert_array_equal(changed.image1[..., 0] == 255, inside)


def test_frames_change_places(sample: Sample) -> None:
    config = replace(NO_AUGMENT, reverse=1)
    changed = augment_sample(sample, CROP, config, np.random.default_rng(3))
    random = np.random.default_rng(3)
    random.random()
    expected = augment_sample(replace(sample.reversed(), backward=None), CROP, config, random)
    np.testing.assert_array_equal(changed.flow, expected.flow)
    np.testing.assert_array_equal(changed.image1, expected.image1)
    assert abs(changed.flow - flow_of(MOTION)[:CROP[0], :CROP[1]]).mean() > 3


def test_fine_texture_does_not_alias_when_made_smaller() -> None:
    lines = np.zeros((200, 300, 3), np.uint8)
    lines[:, ::2] = 255
    half = np.array([[0.5, 0, 0], [0, 0.5, 0]])
    flow = np.zeros((200, 300, 2), np.float32)
    changed = transform(Sample(lines, lines, flow), half, half, (100, 150))
    assert changed.image1[10:-10, 10:-10].mean() == pytest.approx(127, abs=70)
    assert changed.image1[10:-10, 10:-10].max() < 240


def test_axes_are_stretched_each_on_its_own() -> None:
    config = replace(NO_AUGMENT, spatial=1, scale=(0.5, 0.5), stretch=0.2, stretch_chance=1)
    maps = [draw_maps(SIZE, CROP, config, np.random.default_rng(seed))[0] for seed in range(200)]
    stretch = np.log2([(each[0, 0], each[1, 1]) for each in maps]) - 0.5
    assert np.abs(stretch).max() <= 0.2 + 1e-9 and (stretch.max(axis=0) > 0.15).all()
    assert (stretch.min(axis=0) < -0.15).all() and abs(np.corrcoef(stretch.T)[0, 1]) < 0.2


def test_what_leaves_the_crop_is_occluded_and_a_plain_crop_is_exact() -> None:
    flow = np.zeros((*SIZE, 2), np.float32)
    flow[..., 0] = 30
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    changed = augment_sample(Sample(image, image, flow, np.zeros(SIZE, bool)), CROP, NO_AUGMENT,
                             np.random.default_rng(2))
    expected = np.zeros(CROP, bool)
    expected[:, -30:] = True
    np.testing.assert_array_equal(changed.occlusion, expected)
    views = np.lib.stride_tricks.sliding_window_view(image, (*CROP, 3))[:, :, 0]
    assert any(np.array_equal(views[row, column], changed.image1) for row, column in np.argwhere(
        (views[:, :, 0, 0] == changed.image1[0, 0]).all(axis=2)))


def test_a_frame_smaller_than_the_crop_is_enlarged(sample: Sample) -> None:
    changed = augment_sample(sample, (192, 256), NO_AUGMENT, np.random.default_rng(0))
    assert changed.flow.shape == (192, 256, 2) and np.isfinite(changed.flow).all()
    # By 192/150 = 1.28, and 1.28 times as far.
    assert changed.flow[..., 0].mean() == pytest.approx(
        1.28 * sample.flow[..., 0].mean(), rel=0.3)


def test_erased_rectangles_cover(sample: Sample) -> None:
    config = replace(NO_AUGMENT, erase=1, erase_px=(20, 30), erase_count=1)
    covered = erase(sample, config, np.random.default_rng(4))
    np.testing.assert_array_equal(covered.image1, sample.image1)
    np.testing.assert_array_equal(covered.flow, sample.flow)
    mean = np.rint(sample.image2.reshape(-1, 3).mean(axis=0)).astype(np.uint8)
    changed = (covered.image2 != sample.image2).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert 20 <= np.ptp(rows) + 1 <= 30 and 20 <= np.ptp(columns) + 1 <= 30
    assert (covered.image2[changed] == mean).all()
    assert covered.occlusion is not None and sample.occlusion is not None
    new = covered.occlusion & ~sample.occlusion
    x, y = np.meshgrid(np.arange(SIZE[1]), np.arange(SIZE[0]))
    goal = np.stack([x, y], axis=2) + sample.flow
    tie = (np.abs(goal % 1 - 0.5) < 1e-3).any(axis=2)
    goal_x, goal_y = (np.rint(goal[..., axis]).astype(int).clip(0, SIZE[1 - axis] - 1)
                      for axis in (0, 1))
    hit = np.zeros(SIZE, bool)
    hit[rows.min():rows.max() + 1, columns.min():columns.max() + 1] = True
    expected = hit[goal_y, goal_x] & ~sample.occlusion
    assert expected.any()
    np.testing.assert_array_equal(new[~tie], expected[~tie])


def test_colours_change_alike_or_not(sample: Sample) -> None:
    image = sample.image1
    config = AugmentConfig(asymmetric=0)
    one, two = change_colours(image, image, config, np.random.default_rng(0))
    np.testing.assert_array_equal(one, two)
    assert np.abs(one.astype(int) - image).mean() > 3
    one, two = change_colours(image, image, replace(config, asymmetric=1),
                              np.random.default_rng(0))
    assert np.abs(one.astype(int) - two).mean() > 3
    for same in change_colours(image, sample.image2, NO_AUGMENT, np.random.default_rng(0)):
        assert np.array_equal(same, image) or np.array_equal(same, sample.image2)
    noisy, _ = change_colours(image, image, replace(NO_AUGMENT, noise=20),
                              np.random.default_rng(1))
    assert 1 < (noisy.astype(float) - image).std() < 20


def test_hue_turns_the_colours_and_keeps_the_light() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[..., 0] = 200
    config = replace(NO_AUGMENT, hue=0.5)
    hues = set()
    for seed in range(20):
        turned, _ = change_colours(image, image, config, np.random.default_rng(seed))
        assert turned.max() == 200 and turned.min() == 0
        hues.add(tuple(int(value) for value in turned[0, 0]))
    assert len(hues) > 10


def test_the_same_numbers_give_the_same_sample(sample: Sample) -> None:
    results = [augment_sample(sample, CROP, AugmentConfig(), np.random.default_rng(seed))
               for seed in (5, 5, 6)]
    for name in ('image1', 'image2', 'flow', 'occlusion'):
        np.testing.assert_array_equal(getattr(results[0], name), getattr(results[1], name))
    assert not np.array_equal(results[0].image1, results[2].image1)


def test_the_crop_never_leaves_the_frame() -> None:
    config = replace(EVERYTHING, scale=(-2, 0.2))
    for seed in range(200):
        first, _ = draw_maps(SIZE, CROP, config, np.random.default_rng(seed))
        back = cv2.invertAffineTransform(first)
        for corner in product((0, CROP[1] - 1), (0, CROP[0] - 1)):
            x, y = back @ (*corner, 1)
            assert -1e-6 <= x <= SIZE[1] - 1 + 1e-6 and -1e-6 <= y <= SIZE[0] - 1 + 1e-6


def test_scales_are_those_asked_for() -> None:
    config = replace(NO_AUGMENT, spatial=1, scale=(0.2, 0.5), stretch_chance=0)
    scales = np.log2([draw_maps(SIZE, CROP, config, np.random.default_rng(seed))[0][0, 0]
                      for seed in range(200)])
    assert scales.min() >= 0.2 and scales.max() <= 0.5 and np.ptp(scales) > 0.25


@pytest.mark.parametrize(('values', 'message'), [
    ({'flip_horizontal': 1.5}, 'flip_horizontal is a chance, from 0 to 1; seen 1.5'),
    ({'hue': -0.1}, 'hue is a distance, from 0 on; seen -0.1'),
    ({'scale': (0.5, -0.5)}, r'scale is \(lowest, highest\); seen \(0.5, -0.5\)'),
])
def test_senseless_values_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**values)
