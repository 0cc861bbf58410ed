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

"""What a camera does to the light: each effect is what it says, and repeatable."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from flow_ros.synthetic.camera import (
    bayer,
    CameraConfig,
    CLEAN,
    develop,
    gaussian_blur,
    jpeg,
    lens_dirt,
    motion_blur,
    noisy,
    rain,
    vignette,
)
from flow_ros.synthetic.textures import make_bank

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def image() -> Tensor:
    """Two textures, RGB 0..255, of sides that no block size divides."""
    surfaces = make_bank(3, surfaces=2, objects=1, surface_px=128).surfaces
    return torch.from_numpy(surfaces).permute(0, 3, 1, 2)[..., :90, :118].float()


def random(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def test_a_clean_camera_changes_nothing(image: Tensor) -> None:
    one, two = develop([image, image], CLEAN, random())
    assert torch.allclose(one, image, atol=1e-3)
    assert torch.allclose(two, image, atol=1e-3)


@pytest.mark.parametrize('seed', range(4))
def test_all_effects_together_stay_in_range_and_repeat(image: Tensor, seed: int) -> None:
    everything = CameraConfig(**dict.fromkeys(vars(CameraConfig()), 1.0))
    before = image.clone()
    runs = [develop([image, image, image], everything, random(seed)) for _ in range(2)]
    assert torch.equal(image, before)  # the rendering is kept for another use
    for one, two in zip(*runs):
        assert torch.equal(one, two)
        assert one.shape == image.shape
        assert 0 <= float(one.min()) < float(one.max()) <= 255
    assert not torch.equal(runs[0][0], runs[0][1])  # noise and rain are new in every frame


@pytest.mark.parametrize('effect', ['light', 'defocus', 'vignetting', 'dirt', 'rain', 'bayer',
                                    'noise', 'grey', 'jpeg'])
def test_each_effect_alone_changes_the_image(image: Tensor, effect: str) -> None:
    changes = []
    for seed in range(4):
        one, two = develop([image, image], replace(CLEAN, **{effect: 1.0}), random(seed))
        changes += [float((each - image).abs().mean()) for each in (one, two)]
    assert max(changes) > 0.3


@pytest.mark.parametrize('quality', [20, 50, 85])
def test_jpeg_does_what_a_real_encoder_does(image: Tensor, quality: int) -> None:
    ours = jpeg(image / 255, torch.full((2,), float(quality))) * 255
    for index in range(2):
        pixels = image[index].permute(1, 2, 0).round().byte().numpy()
        flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
                 cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
        _, data = cv2.imencode('.jpg', cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), flags)
        real = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        lost = np.abs(real.astype(np.float32) - pixels).mean()
        apart = np.abs(ours[index].permute(1, 2, 0).numpy() - real).mean()
        assert apart < 0.35 * lost + 0.6


def test_bayer_interpolates_each_colour_from_its_own_pixels() -> None:
    flat = torch.tensor([0.2, 0.5, 0.8]).view(1, 3, 1, 1).expand(1, 3, 8, 10)
    assert torch.allclose(bayer(flat)[..., 1:-1, 1:-1], flat[..., 1:-1, 1:-1], atol=1e-6)
    spot = torch.zeros(1, 3, 8, 8)
    spot[0, :, 4, 4] = 1  # a red site: green and blue never see it
    seen = bayer(spot)
    assert float(seen[0, 0, 4, 4]) == 1
    assert float(seen[0, 0, 4, 5]) == 0.5
    assert float(seen[0, 0, 5, 5]) == 0.25
    assert float(seen[0, 1:].abs().max()) == 0


def test_a_gaussian_keeps_the_mean_and_has_its_width() -> None:
    spot = torch.zeros(1, 1, 41, 41)
    spot[..., 20, 20] = 1
    blurred = gaussian_blur(spot, 1.5)
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
    x = torch.arange(41) - 20.0
    assert float((blurred.sum(dim=2) * x.square()).sum()) == pytest.approx(2.25, rel=0.08)


def test_motion_blur_is_centred_and_as_long_as_the_exposure() -> None:
    spot = torch.zeros(2, 3, 21, 61)
    spot[..., 10, 30] = 70
    motion = torch.zeros(2, 2, 21, 61)
    motion[:, 0] = 20
    blurred = motion_blur(spot, motion, torch.tensor([0.5, 0.0]), 30.0)
    line = blurred[0, 0, 10]
    x = torch.arange(61.0)
    assert float((line * x).sum() / line.sum()) == pytest.approx(30, abs=0.05)
    reached = (line > 0.5).nonzero()
    assert 7 <= int(reached.max() - reached.min()) <= 11  # half of 20 px
    assert float(blurred[0, 0, 8].abs().max()) < 1e-3
    assert torch.allclose(blurred[1], spot[1], atol=1e-3)
    short = motion_blur(spot, motion * 10, torch.tensor([0.5, 0.5]), 6.0)[0, 0, 10]
    assert int((short > 0.5).nonzero().max()) <= 34


def test_vignetting_darkens_the_corners_only() -> None:
    gain = vignette(torch.zeros(1, 3, 40, 60), torch.full((1, 1, 1, 1), 0.6),
                    torch.zeros(1, 2, 1, 1))[0, 0]
    assert float(gain[20, 30]) > 0.99
    assert float(gain[0, 0]) == pytest.approx(0.4, abs=0.02)


def test_rain_falls_anew_and_dirt_stays(image: Tensor) -> None:
    draw = random(1)
    dark = torch.zeros(2, 3, 90, 118)
    one, two = rain(dark, 0.2, draw), rain(dark, 0.2, draw)
    assert float(one.max()) > 0.1
    assert not torch.equal(one, two)
    shade, cover = lens_dirt(dark, draw)
    assert 0 <= float(cover.min()) <= float(cover.max()) < 0.81
    dirty = replace(CLEAN, dirt=1.0)
    first, second = develop([image, image], dirty, random(2))
    assert torch.equal(first, second)
    assert shade.shape == (2, 1, 1, 1)


def test_noise_grows_with_the_light() -> None:
    step = torch.zeros(1, 1, 64, 128)
    step[..., 64:] = 0.8
    read, shot = torch.full((1, 1, 1, 1), 0.01), torch.full((1, 1, 1, 1), 0.03)
    noise = noisy(step, read, shot, random()) - step
    assert float(noise[..., :64].std()) == pytest.approx(0.01, rel=0.1)
    assert float(noise[..., 64:].std()) == pytest.approx((0.01 ** 2 + 0.8 * 0.03 ** 2) ** 0.5,
                                                         rel=0.1)


def test_grey_cameras_are_grey_in_all_frames(image: Tensor) -> None:
    for frame in develop([image, image], replace(CLEAN, grey=1.0), random()):
        assert torch.allclose(frame[:, 0], frame[:, 1])
        assert torch.allclose(frame[:, 0], frame[:, 2])


def test_shares_are_of_the_pairs(image: Tensor) -> None:
    many = image[:1].expand(200, -1, -1, -1)[..., :8, :8]
    one, _ = develop([many, many], replace(CLEAN, bayer=0.25), random())
    changed = ((one - many).abs().amax(dim=(1, 2, 3)) > 0.5).float().mean()
    assert 0.15 < float(changed) < 0.35
