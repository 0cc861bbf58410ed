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

"""Match densities against HD3's rule as a loop over the windows, and the published outputs."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.ops.match_density import (
    density_to_vector,
    probability_to_vector,
    radius_of,
    splat,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get('FLOW_ROS_SHARED', REPOSITORY.parent / 'shared')) / 'parity'
OUTPUTS = ('hd3f_output.npz', 'hd3fc_output.npz', 'hd3f_vgg_output.npz')

needs_shared = pytest.mark.skipif(
    not all((SHARED / name).is_file() for name in OUTPUTS),
    reason=f'the parity outputs are not at {SHARED}: set FLOW_ROS_SHARED')


def plain_vector(density: np.ndarray) -> tuple[float, float, float]:
    """Return x, y and the confidence of one pixel's density (side, side)."""
    radius = (len(density) - 1) // 2
    best, found = -1.0, (0.0, 0.0)
    for y in range(2 * radius):
        for x in range(2 * radius):
            window = density[y:y + 2, x:x + 2]
            if window.sum() > best:
                best = window.sum()
                ys, xs = np.mgrid[y - radius:y + 2 - radius, x - radius:x + 2 - radius]
                found = (xs * window).sum() / best, (ys * window).sum() / best
    return *found, best


@pytest.mark.parametrize('radius', [1, 4, 8, 10])
def test_is_the_loop_over_the_windows(radius: int) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, (2 * radius + 1) ** 2, 3, 4, dtype=torch.float64)
    vector, confidence = density_to_vector(logits)
    assert vector.shape == (2, 2, 3, 4) and confidence.shape == (2, 1, 3, 4)
    density = torch.softmax(logits, dim=1).numpy()
    for image, y, x in np.ndindex(2, 3, 4):
        square = density[image, :, y, x].reshape(2 * radius + 1, 2 * radius + 1)
        expected = plain_vector(square)
        found = *vector[image, :, y, x].tolist(), confidence[image, 0, y, x].item()
        assert found == pytest.approx(expected, abs=1e-9)


def test_of_equal_windows_the_first() -> None:
    vector, confidence = density_to_vector(torch.zeros(1, 81, 1, 1))
    assert vector.flatten().tolist() == pytest.approx([-3.5, -3.5])
    assert confidence.item() == pytest.approx(4 / 81)


@pytest.mark.parametrize('radius', [1, 4, 8])
def test_splat_and_back(radius: int) -> None:
    generator = torch.Generator().manual_seed(0)
    residual = (2 * torch.rand(2, 2, 5, 6, generator=generator, dtype=torch.float64) - 1) * radius
    residual[0, :, 0, 0], residual[0, :, 0, 1], residual[0, :, 0, 2] = radius, -radius, 0
    density = splat(residual, radius)
    assert torch.allclose(density.sum(dim=1), torch.ones((), dtype=density.dtype))
    vector, confidence = probability_to_vector(density)
    assert torch.allclose(vector, residual, atol=1e-9)
    assert torch.allclose(confidence, torch.ones((), dtype=density.dtype))


def test_splat_clamps_what_is_out_of_reach() -> None:
    far = torch.tensor([7.0, -9.0]).view(1, 2, 1, 1)
    assert torch.equal(splat(far, 4), splat(far.clamp(-4, 4), 4))
    assert splat(far, 4)[0, 8, 0, 0] == 1  # dx = 4, dy = -4


def test_gradients_through_the_window() -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(1, 25, 2, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(density_to_vector, (logits,))


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(1, 81, 3, 4)).to(kind)
    vector, confidence = density_to_vector(logits)
    expected, _ = density_to_vector(logits.float())
    assert vector.dtype == confidence.dtype == torch.float32
    assert torch.equal(vector, expected)


@pytest.mark.parametrize('planes', [1, 16, 80, 82])
def test_other_counts_of_planes_are_named(planes: int) -> None:
    with pytest.raises(ValueError, match=f'seen {planes}'):
        radius_of(planes)


# The published networks' outputs.


def published(name: str) -> dict[str, Tensor]:
    with np.load(SHARED / name) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


@needs_shared
@pytest.mark.parametrize('name', OUTPUTS)
def test_published_units(name: str) -> None:
    data = published(name)
    assert torch.allclose(splat(data['unit_density_vec'], 4), data['unit_density'], atol=1e-6)
    vector, _ = probability_to_vector(data['unit_density'])
    assert torch.allclose(vector, data['unit_density_back'], atol=1e-6)


@needs_shared
@pytest.mark.parametrize('name', OUTPUTS)
def test_published_vectors_and_confidences_follow_from_the_logits(name: str) -> None:
    data = published(name)
    flow = torch.zeros(1, 2, 2, 3)
    for level in range(5):
        residual, confidence = density_to_vector(data[f'logits{level}'])
        assert torch.allclose(confidence, data[f'confidence{level}'], atol=1e-6)
        flow = flow + residual
        expected = data[f'vect{level}'] / 2 ** (6 - level)
        assert (flow - expected).abs().max() < 1e-4
        flow = 2 * functional.interpolate(flow, scale_factor=2, mode='bilinear',
                                          align_corners=True)
