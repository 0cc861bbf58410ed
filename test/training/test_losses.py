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
    matching_loss,
    mixture_of_laplace,
    occlusion_loss,
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
