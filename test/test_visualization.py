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

"""Pictures of flow, confidence and error: their meaning, to a grey level."""

import numpy as np
import pytest

from flow_ros import visualization
from flow_ros.visualization import (
    confidence_to_color,
    confidence_to_mono,
    error_to_color,
    flow_to_color,
    robust_max_px,
    strip,
    WHEEL_DIRECTIONS,
    WHEEL_HUES,
)


def uniform(u: float, v: float) -> np.ndarray:
    return np.tile(np.array([u, v], dtype=np.float32), (5, 6, 1))


def test_still_is_white_and_invalid_black() -> None:
    flow = uniform(0, 0)
    flow[1, 2] = np.nan
    flow[3, 4, 1] = np.inf
    picture = flow_to_color(flow)
    assert picture.dtype == np.uint8 and picture.shape == (5, 6, 3)
    invalid = (picture == 0).all(axis=2)
    assert np.argwhere(invalid).tolist() == [[1, 2], [3, 4]]
    assert (picture[~invalid] == 255).all()
    assert (flow_to_color(np.full((5, 6, 2), np.nan)) == 0).all()


@pytest.mark.parametrize(('direction', 'color'), [
    ((1, 0), (255, 0, 0)), ((0, 1), (191, 255, 0)), ((-1, 0), (0, 234, 255)),
    ((0, -1), (106, 0, 255))])
def test_directions_have_their_hues(direction: tuple[int, int],
                                    color: tuple[int, int, int]) -> None:
    flow = uniform(*direction) * 10
    np.testing.assert_allclose(flow_to_color(flow, 10.0)[2, 2], color, atol=3)
    # Half the speed is half way to white; beyond full colour only the hue counts.
    half = (np.array(color) + 255) / 2
    np.testing.assert_allclose(flow_to_color(flow / 2, 10.0)[2, 2], half, atol=3)
    np.testing.assert_allclose(flow_to_color(flow * 100, 10.0)[2, 2], color, atol=3)


def test_colors_are_smooth_around_the_wheel() -> None:
    angle = np.linspace(0, 2 * np.pi, 721, dtype=np.float32)
    ring = flow_to_color(np.stack([np.cos(angle), np.sin(angle)], axis=-1)[None], 1.0)
    steps = np.abs(np.diff(ring[0].astype(int), axis=0)).max(axis=1)
    assert steps.max() <= 8
    assert len(np.unique(ring[0], axis=0)) > 300  # opposite directions never look the same
    np.testing.assert_allclose(ring[0, 0], ring[0, -1], atol=2)


def test_own_scale_is_robust() -> None:
    flow = np.zeros((100, 100, 2), dtype=np.float32)
    flow[..., 0] = 5.0
    flow[0, 0] = 1e6
    assert robust_max_px(flow) == pytest.approx(5.0)
    np.testing.assert_array_equal(flow_to_color(flow)[50, 50], (255, 0, 0))
    assert robust_max_px(flow / 1e4) == 1.0  # noise of a still scene stays pale
    with pytest.raises(ValueError, match='max_px must be more than 0; seen -1'):
        flow_to_color(flow, -1)
    with pytest.raises(ValueError, match=r'seen \(2, 5, 6\)'):
        flow_to_color(np.zeros((2, 5, 6)))


def test_memory_order_does_not_matter() -> None:
    flow = np.random.default_rng(0).normal(0, 3, (2, 20, 30)).astype(np.float32)
    view = flow.transpose(1, 2, 0)
    before = view.copy()
    np.testing.assert_array_equal(flow_to_color(view, 5), flow_to_color(before.copy(), 5))
    np.testing.assert_array_equal(view, before)


def test_confidence() -> None:
    values = np.array([[0.0, 0.5, 1.0, np.nan, 2.0]], dtype=np.float32)
    assert confidence_to_mono(values).tolist() == [[0, 128, 255, 0, 255]]
    picture = confidence_to_color(values)
    assert picture.shape == (1, 5, 3)
    assert picture[0, 3].tolist() == [0, 0, 0]
    brightness = picture[0, :3].astype(int).sum(axis=1)
    assert brightness[0] < brightness[1] < brightness[2]
    np.testing.assert_array_equal(picture[0, 2], picture[0, 4])


def test_error_changes_from_blue_to_red_at_3_px() -> None:
    picture = error_to_color(np.array([[0.0, 1.0, 2.7, 3.3, 10.0, 1e6, np.nan]])).astype(int)
    red_minus_blue = picture[0, :, 0] - picture[0, :, 2]
    assert (red_minus_blue[:3] < 0).all()
    assert (red_minus_blue[3:6] > 0).all()
    assert picture[0, 6].tolist() == [0, 0, 0]


def test_strip() -> None:
    color = np.full((40, 60, 3), 9, np.uint8)
    grey = np.full((80, 100), 200, np.uint8)
    mask = np.ones((40, 20), bool)
    picture = strip([color, grey, mask], ['a', '', 'c'])
    assert picture.shape == (40, 60 + 50 + 20, 3)
    assert (picture[:, 60:110] == 200).all()
    assert (picture[:, :60] != 9).any()
    assert (picture[30:, 110:] == 255).all()
    assert (color == 9).all()  # labels are drawn on a copy
    assert strip([color], height=20).shape == (20, 30, 3)
    with pytest.raises(ValueError, match='2 pictures need as many labels; seen 1'):
        strip([color, grey], ['a'])
    with pytest.raises(ValueError, match='seen float64'):
        strip([np.zeros((4, 4))])
    with pytest.raises(ValueError, match='at least one'):
        strip([])


def exact_color(flow: np.ndarray, max_px: float) -> np.ndarray:
    """Return the colours as their definition says, in float64, pixel by pixel."""
    u, v = flow[..., 0].astype(float), flow[..., 1].astype(float)
    hue = np.interp(np.degrees(np.arctan2(v, u)) % 360.0, WHEEL_DIRECTIONS, WHEEL_HUES) / 60.0
    strength = np.minimum(np.hypot(u, v) / max_px, 1.0)
    ramps = [np.clip(np.abs((hue - shift) % 6 - 3) - 1, 0, 1) for shift in (0, 2, 4)]
    return np.stack([255.0 * (1 - strength * (1 - ramp)) for ramp in ramps], axis=-1)


@pytest.mark.parametrize('fast', [0.0, 0.01, 0.5])
@pytest.mark.parametrize('max_px', [0.5, 7.0, 1000.0])
def test_flow_color_is_exact_to_one_grey_level(max_px: float, fast: float) -> None:
    random = np.random.default_rng(0)
    # Slow and on the rim, and a share far beyond it, in all directions.
    flow = (random.uniform(-1, 1, (200, 300, 2)) * max_px
            * random.choice([0.01, 0.3, 1.0, 1.45], (200, 300, 1))).astype(np.float32)
    flow[random.random((200, 300)) < fast] *= 50.0
    before = flow.copy()
    picture = flow_to_color(flow, max_px)
    np.testing.assert_array_equal(flow, before)
    # 0.5 of the rounding, 0.5 of the nearest cell of the wheel.
    assert np.abs(picture - exact_color(flow, max_px)).max() <= 1.0 + 1e-3


@pytest.mark.parametrize('share', [0.01, 0.9])
def test_few_and_many_invalid_pixels_are_black_and_no_others(share: float) -> None:
    random = np.random.default_rng(0)
    flow = random.normal(0, 9, (60, 80, 2)).astype(np.float32)
    invalid = random.random((60, 80)) < share
    flow[invalid, 1] = random.choice([np.nan, np.inf, -np.inf], invalid.sum())
    picture = flow_to_color(flow, 10.0)
    np.testing.assert_array_equal((picture == 0).all(axis=2), invalid)


def test_bands_make_one_picture_in_memory_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    flow = random.normal(0, 9, (60, 80, 2)).astype(np.float32)
    flow[7, 9] = 1e4
    flow[30, :5, 0] = np.nan
    whole = flow_to_color(flow, 10.0)
    monkeypatch.setattr(visualization, 'BAND', 700)
    given = np.full((60, 80, 3), 99, np.uint8)
    assert flow_to_color(flow, 10.0, out=given) is given
    np.testing.assert_array_equal(given, whole)
