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

"""Fits the confidence to held-out scenes, so that it keeps its promise."""

from collections.abc import Iterable

import torch
from torch import Generator, Tensor
from torch.nn import functional

from flow_ros.networks.base import FlowNetwork
from flow_ros.training.augment import Batch, degraded_prior


@torch.no_grad()
def calibrate(network: FlowNetwork, batches: Iterable[Batch]) -> Tensor:
    """Return (a, b) such that sigmoid(a logit(p) + b) is the share of small errors at p.

    A logistic regression of (error under max(3 px, 5 %)) on the logit of the confidence p that
    ``network`` computes without a calibration, over scenes that were not trained on: every third
    batch warm, where the network takes a prior, and after 2 to 4 iterations, where it
    iterates. The network is left in eval mode and without a calibration.
    """
    network.eval()
    network.set_calibration(1.0, 0.0)
    iterates = network.budget_unit == FlowNetwork.budget_unit
    logits, small = [], []
    for index, batch in enumerate(batches):
        warm = index % 3 == 2 and network.accepts_prior
        prior = degraded_prior(batch.flow, Generator().manual_seed(index)) if warm else None
        output = network(batch.image1, batch.image2, 2 + index % 3 if iterates else None, prior)
        if output.confidence is None:
            raise ValueError(f'{network.name} computes no confidence: there is nothing to fit')
        p = output.confidence.float().clamp(1e-4, 1 - 1e-4)
        difference = output.flow.float() - batch.flow
        length, error = (torch.hypot(vectors[:, :1], vectors[:, 1:])
                         for vectors in (batch.flow, difference))
        known = torch.isfinite(error).flatten()[::17]
        logits.append(torch.logit(p).flatten()[::17][known])
        small.append((error < (0.05 * length).clamp(min=3)).flatten()[::17][known].double())
    return logistic_fit(torch.cat(logits).double(), torch.cat(small)).float()


def logistic_fit(x: Tensor, y: Tensor) -> Tensor:
    """Return (a, b) for which sigmoid(a x + b) is the most likely for ``y``, double (N,).

    Newton's method on a convex cost, each step halved until the cost falls: undamped it runs
    away to millions where the start is too sure of itself. A weak prior at (1, 0) keeps it
    finite where all of ``y`` is one.
    """
    design = torch.stack([x, torch.ones_like(x)], dim=1)
    unchanged, fit = x.new_tensor([1.0, 0.0]), x.new_zeros(2)

    def cost(fit: Tensor) -> Tensor:
        likely = functional.binary_cross_entropy_with_logits(design @ fit, y, reduction='sum')
        return likely + (fit - unchanged).square().sum()

    for _ in range(50):
        p = torch.sigmoid(design @ fit)
        gradient = design.T @ (p - y) + 2 * (fit - unchanged)
        hessian = (design * (p * (1 - p))[:, None]).T @ design
        move = torch.linalg.solve(hessian + 2 * torch.diag(torch.ones_like(fit)), gradient)
        now = float(cost(fit))
        while float(cost(fit - move)) > now and float(move.abs().max()) > 1e-9:
            move = move / 2
        fit = fit - move
        if float(move.abs().max()) < 1e-7:
            break
    return fit
