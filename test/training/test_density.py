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

"""HD3's loss against the authors' numbers, a slow reference, and values known by hand."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from flow_ros.ops.match_density import splat
from flow_ros.training.density import (
    density_loss,
    residual_divergence,
    residual_target,
    ResidualTarget,
)

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get('FLOW_ROS_SHARED', ROOT.parent / 'shared')) / 'parity'


def slow_density(residual: tuple[float, float], radius: int) -> np.ndarray:
    """Bilinear weights by visiting the four neighbours."""
    side = 2 * radius + 1
    density = np.zeros(side * side)
    x, y = (min(max(value, -radius), radius) for value in residual)
    for cell_x in {math.floor(x), math.ceil(x)}:
        for cell_y in {math.floor(y), math.ceil(y)}:
            weight = (1 - abs(x - cell_x)) * (1 - abs(y - cell_y))
            density[side * (cell_y + radius) + cell_x + radius] += weight
    return density


def density_of(target: ResidualTarget, radius: int = 4) -> torch.Tensor:
    """Return the density (B, planes, h, w) that the target stands for."""
    return splat(target.residual, radius) * target.valid


def plain_divergence(logits: torch.Tensor, target: ResidualTarget) -> torch.Tensor:
    """Return KL(target || softmax(logits)), term by term over all bins."""
    density, log = density_of(target), torch.log_softmax(logits, dim=1)
    terms = torch.where(density > 0, density * (density.clamp(min=1e-30).log() - log), 0.0)
    return terms.sum(dim=1, keepdim=True)


@pytest.mark.parametrize('residual', [(0.0, 0.0), (1.25, -2.5), (3.9, 4.0), (7.0, -9.0)])
def test_target_is_bilinear_and_clamped(residual: tuple[float, float]) -> None:
    truth = torch.tensor([8 * residual[0], 8 * residual[1]]).view(1, 2, 1, 1).expand(1, 2, 16, 24)
    target = residual_target(truth, None, (2, 3))
    expected = slow_density(residual, 4)
    assert np.abs(density_of(target)[0, :, 1, 2].numpy() - expected).max() < 1e-6
    assert bool(target.reached.all()) == (max(map(abs, residual)) <= 4)


def test_the_previous_level_is_subtracted_in_full_resolution_px() -> None:
    truth = torch.full((1, 2, 16, 16), 12.0)
    target = residual_target(truth, torch.full((1, 2, 2, 2), 8.0), (4, 4))
    assert np.allclose(density_of(target)[0, :, 0, 0].numpy(), slow_density((1.0, 1.0), 4))


def test_sparse_truth_is_averaged_over_what_is_known() -> None:
    truth = torch.full((1, 2, 4, 4), math.nan)
    truth[..., 0, 0], truth[..., 1, 1] = 2.0, 4.0
    sparse = residual_target(truth, None, (2, 2), sparse=True)
    assert sparse.valid.flatten().tolist() == [True, False, False, False]
    assert np.allclose(density_of(sparse)[0, :, 0, 0].numpy(), slow_density((1.5, 1.5), 4))
    assert float(density_of(sparse)[..., 1].abs().max()) == 0
    assert not bool(residual_target(truth, None, (2, 2)).valid[..., 1, 1])


def test_the_divergence_over_four_bins_is_that_over_all() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 81, 8, 12, generator=generator)
    truth = torch.randn(2, 2, 64, 96, generator=generator) * 30
    truth[0, :, :20, :30] = math.nan
    truth[1, 0] = 8 * 4 + truth[1, 0] * 0.1  # at the border of the search range
    target = residual_target(truth, None, (8, 12))
    assert 0 < float(target.reached[1].float().mean()) < 1
    found = residual_divergence(logits, target)
    assert torch.allclose(found, plain_divergence(logits, target), atol=1e-5)
    assert float(found[0, 0, 0, 0]) == 0 and float(found[1].min()) > 0


def test_divergence_is_zero_for_the_target_itself_and_counts_nothing_where_unknown() -> None:
    truth = torch.full((1, 2, 8, 8), 4.3)
    truth[..., 4:] = math.nan
    target = residual_target(truth, None, (2, 2), sparse=True)
    logits = torch.log(density_of(target) + 1e-12).requires_grad_()
    assert float(residual_divergence(logits, target)[..., 0].abs().max()) < 1e-5
    flat = torch.zeros(1, 81, 2, 2, requires_grad=True)
    loss = density_loss([flat], [torch.zeros(1, 2, 2, 2)], truth, sparse=True)
    density = slow_density((4.3 / 4, 4.3 / 4), 4)
    entropy = sum(p * (math.log(p) + math.log(81)) for p in density if p)
    assert float(loss.detach()) == pytest.approx(entropy / 2, rel=1e-5)  # half is unknown
    loss.backward()
    assert bool(torch.isfinite(flat.grad).all())
    assert float(flat.grad[..., 1].abs().max()) == 0


def test_max_pooling_leaves_out_what_is_out_of_the_search_range() -> None:
    truth = torch.zeros(1, 2, 8, 8)
    truth[:, 0, :4, :4], truth[:, 0, 4:, 4:] = 40.0, 8.0  # 10 and 2 level px: 10 is too far
    target = residual_target(truth, None, (2, 2), sparse=True)
    logits = torch.zeros(1, 81, 2, 2)
    logits[:, 40] = 5.0  # sure that nothing moves
    worst = float(residual_divergence(logits, target)[0, 0, 1, 1])
    pooled = density_loss([logits], [torch.zeros(1, 2, 2, 2)], truth, sparse=True, keep=0.25)
    assert float(pooled) == pytest.approx(worst, rel=1e-5)


@pytest.mark.parametrize('name', ['hd3f', 'hd3fc', 'hd3f_vgg'])
def test_the_authors_losses_are_met(name: str) -> None:
    if not (SHARED / f'{name}_output.npz').is_file():
        pytest.skip(f'no parity data of the published network in {SHARED}')
    output = np.load(SHARED / f'{name}_output.npz')
    truth = torch.from_numpy(np.load(SHARED / 'hd3_input.npz')['flow'])[None]
    logits = [torch.from_numpy(output[f'logits{level}']) for level in range(5)]
    vectors = [torch.from_numpy(output[f'vect{level}']) for level in range(5)]
    assert float(density_loss(logits, vectors, truth)) == pytest.approx(
        float(output['loss_total']), rel=1e-5)
    for level in range(5):
        before = vectors[level - 1] if level else None
        target = residual_target(truth, before, tuple(logits[level].shape[-2:]))
        assert float(residual_divergence(logits[level], target).mean()) == pytest.approx(
            float(output['loss_levels'][level]), rel=1e-5)


def test_the_authors_losses_are_met_by_the_data_kept_here() -> None:
    """The four coarse levels of hd3f, cut from the same data (test/data/README.md)."""
    data = np.load(ROOT / 'test' / 'data' / 'hd3_loss.npz')
    before = None
    for level, expected in enumerate(data['loss_levels']):
        logits = torch.from_numpy(data[f'logits{level}'])
        target = residual_target(torch.from_numpy(data['flow'])[None], before,
                                tuple(logits.shape[-2:]))
        assert float(residual_divergence(logits, target).mean()) == pytest.approx(
            float(expected), rel=1e-5)
        before = torch.from_numpy(data[f'vect{level}'])
