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

"""Losses against numbers worked out by hand."""

import math

import pytest
import torch

from flow_ros.training.losses import (
    endpoint_error,
    matching_loss,
    max_pooled,
    mixture_of_laplace,
    multi_scale_epe,
    occlusion_loss,
    pool_truth,
    sequence_loss,
    SHARPNESS,
)


def test_sequence_loss_weighs_later_predictions_more() -> None:
    truth = torch.full((1, 2, 16, 16), 16.0)
    final = truth + 1
    levels = [(16, torch.zeros(1, 2, 1, 1)), (8, torch.full((1, 2, 2, 2), 2.5))]
    # |0 - 16| = 16 with 0.8^2, |20 - 16| = 4 with 0.8, 1 with 1: the last first.
    loss = sequence_loss(levels, final, truth, 0.8)
    assert float(loss) == pytest.approx(16 * 0.64 + 4 * 0.8 + 1)


def test_very_long_and_unknown_truth_is_left_out() -> None:
    truth = torch.zeros(1, 2, 1, 3)
    truth[0, 0, 0, 1], truth[0, 0, 0, 2] = 1000, float('nan')
    final = torch.full((1, 2, 1, 3), 2.0)
    assert float(sequence_loss([], final, truth, 0.8)) == pytest.approx(2)


def test_a_small_exponent_listens_to_small_errors() -> None:
    """PWC-Net's robust loss: the slope is that of the plain loss at 1 px, and falls with it."""
    truth = torch.zeros(1, 2, 4, 4)
    slopes = []
    for error in (0.09, 0.99, 24.99):
        flow = torch.full((1, 2, 4, 4), error, requires_grad=True)
        loss = sequence_loss([], flow, truth, 0.8, exponent=0.5)
        assert float(loss.detach()) == pytest.approx((error + 0.01) ** 0.5 / 0.5)
        loss.backward()
        slopes.append(float(flow.grad.sum()))
    assert slopes == pytest.approx([1 / 0.1 ** 0.5, 1, 1 / 5], rel=1e-3)
    unknown = torch.full_like(truth, float('nan'))
    flow = torch.ones(1, 2, 4, 4, requires_grad=True)
    sequence_loss([], flow, unknown, 0.8, exponent=0.5).backward()
    assert not bool(flow.grad.any())



def test_mixture_is_the_likelihood_of_its_two_laplace_distributions() -> None:
    truth, flow = torch.zeros(1, 2, 1, 1), torch.full((1, 2, 1, 1), 1.5)
    error = torch.tensor([0.4, 1.1]).view(1, 2, 1, 1)
    share, scale = 1 / (1 + math.exp(-0.4)), math.exp(1.1)
    density = share * math.exp(-1.5) / 2 + (1 - share) * math.exp(-1.5 / scale) / (2 * scale)
    assert float(mixture_of_laplace(flow, error, truth)) == pytest.approx(-math.log(density))


def test_the_mixture_does_not_push_the_flow() -> None:
    flow = torch.ones(1, 2, 2, 2, requires_grad=True)
    error = torch.zeros(1, 2, 2, 2, requires_grad=True)
    mixture_of_laplace(flow, error, torch.zeros(1, 2, 2, 2)).backward()
    assert flow.grad is None
    assert error.grad is not None


def test_matching_loss_asks_for_the_plane_of_the_true_displacement() -> None:
    truth = torch.zeros(1, 2, 8, 8)
    truth[:, 0], truth[:, 1] = 8.0, -16.0  # (1, -2) at 1/8
    costs = torch.zeros(1, 25, 1, 1)
    flow, seen = torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    even = matching_loss([(8, costs, flow)], truth, seen, 2)
    assert float(even) == pytest.approx(math.log(25))
    costs[0, 5 * (-2 + 2) + (1 + 2)] = 20 / SHARPNESS
    assert float(matching_loss([(8, costs, flow)], truth, seen, 2)) == pytest.approx(0, abs=1e-6)
    assert float(matching_loss([(8, costs, flow)], truth, ~seen, 2)) == 0  # occluded
    assert float(matching_loss([(8, costs, flow)], 3 * truth, seen, 2)) == 0  # out of reach
    nearer = flow + torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    assert float(matching_loss([(8, costs, nearer)], truth, seen, 2)) > 5


def test_occlusion_loss_is_the_cross_entropy() -> None:
    logit = torch.tensor([2.0, -1.0]).view(1, 1, 1, 2)
    truth = torch.tensor([True, True]).view(1, 1, 1, 2)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert float(occlusion_loss(logit, truth)) == pytest.approx(expected)


def test_occlusion_may_be_unknown() -> None:
    logit = torch.tensor([2.0, -1.0]).view(1, 1, 1, 2)
    assert float(occlusion_loss(logit, None)) == 0
    known = torch.tensor([True, False]).view(1, 1, 1, 2)
    truth = torch.tensor([1.0, float('nan')]).view(1, 1, 1, 2)
    expected = math.log(1 + math.exp(-2))
    assert float(occlusion_loss(logit, truth, known=known)) == pytest.approx(expected)


def test_matching_loss_without_occlusion_and_with_unknown_truth() -> None:
    truth = torch.zeros(1, 2, 8, 16)
    truth[..., 8:] = float('nan')
    costs = torch.zeros(1, 25, 1, 2, requires_grad=True)
    loss = matching_loss([(8, costs, torch.zeros(1, 2, 1, 2))], truth, None, 2)
    assert float(loss.detach()) == pytest.approx(math.log(25))
    loss.backward()
    assert bool(torch.isfinite(costs.grad).all())
    assert float(costs.grad[..., 1].abs().max()) == 0
    assert float(costs.grad[..., 0].abs().max()) > 0


def test_epe_is_taken_at_every_scale_with_its_weight() -> None:
    truth = torch.zeros(1, 2, 4, 4)
    truth[:, 0], truth[:, 1] = 3.0, 4.0
    levels = [(4, torch.zeros(1, 2, 1, 1)), (2, torch.full((1, 2, 2, 2), 1.5))]
    # |(3, 4)| = 5 at 1/4; (3, 3) against (3, 4) is 1 at 1/2.
    loss = multi_scale_epe(levels, truth, [0.5, 2.0])
    assert float(loss) == pytest.approx(0.5 * 5 + 2 * 1)
    with pytest.raises(ValueError, match='1 weights for 2 levels'):
        multi_scale_epe(levels, truth, [1.0])


def test_sparse_truth_is_the_mean_of_what_is_known() -> None:
    truth = torch.full((1, 2, 2, 4), float('nan'))
    truth[..., 0, 0], truth[..., 1, 1] = 2.0, 5.0
    pooled = pool_truth(truth, 2)
    assert pooled[0, 0, 0, 0] == 3.5
    assert bool(torch.isnan(pooled[..., 1]).all())


def test_no_loss_leaves_nan_in_a_gradient() -> None:
    truth = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    truth[0, :, :9], truth[1, 0, 3, 3], truth[1, :, 0] = math.nan, math.nan, 1e9
    for unknown in (truth, torch.full_like(truth, math.nan)):
        flow = torch.zeros(2, 2, 16, 16, requires_grad=True)  # exact where the truth is 0
        coarse = torch.zeros(2, 2, 2, 2, requires_grad=True)
        error = torch.zeros(2, 2, 16, 16, requires_grad=True)
        loss = (sequence_loss([(8, coarse)], flow, unknown, 0.8)
                + multi_scale_epe([(8, coarse), (1, flow)], unknown)
                + mixture_of_laplace(flow, error, unknown))
        loss.backward()
        assert math.isfinite(float(loss))
        for leaf in (flow, coarse, error):
            assert bool(torch.isfinite(leaf.grad).all())
            assert bool(leaf.grad.abs().max() > 0) == (unknown is truth)
    assert float(endpoint_error(flow, torch.full_like(truth, math.nan)).max()) == 0


def slow_max_pooled(losses: torch.Tensor, valid: torch.Tensor, keep: float) -> float:
    """Equation 4 greedily: the highest first, each gets all it may, until nothing is left."""
    results = []
    for image, mask in zip(losses, valid):
        values = sorted((float(v) for v in image[mask]), reverse=True)
        if not values:
            continue
        cap, left, total = 1 / (keep * len(values)), 1.0, 0.0
        for value in values:
            total += min(cap, left) * value
            left -= min(cap, left)
        results.append(total)
    return sum(results) / len(results)


@pytest.mark.parametrize('keep', [0.1, 0.33, 1.0])
def test_max_pooling_is_the_largest_weighted_sum(keep: float) -> None:
    random = torch.Generator().manual_seed(3)
    losses = torch.rand(3, 1, 5, 7, generator=random)
    valid = torch.rand(3, 1, 5, 7, generator=random) < 0.6
    valid[2] = False
    losses[0, 0, 0, 0], valid[0, 0, 0, 0] = math.nan, False
    assert float(max_pooled(losses, valid, keep)) == pytest.approx(
        slow_max_pooled(losses, valid, keep), abs=1e-6)
    if keep == 1.0:
        means = [float(losses[i][valid[i]].mean()) for i in range(2)]
        assert float(max_pooled(losses, valid, keep)) == pytest.approx(sum(means) / 2)


def test_max_pooling_drops_what_is_out_of_reach_and_has_gradients_for_the_worst_only() -> None:
    losses = torch.tensor([1.0, 9.0, 3.0, 2.0]).view(1, 1, 2, 2).requires_grad_()
    valid = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    reached = torch.tensor([True, False, True, True]).view(1, 1, 2, 2)
    loss = max_pooled(losses, valid, 0.5, reached=reached)
    assert float(loss) == pytest.approx((3 + 2) / 2)
    loss.backward()
    assert losses.grad.flatten().tolist() == [0.0, 0.0, 0.5, 0.5]
    with pytest.raises(ValueError, match='share of pixels'):
        max_pooled(losses, valid, 0.0)
