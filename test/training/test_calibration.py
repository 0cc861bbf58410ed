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

"""The confidence is fitted to what it promises, however wrong it was."""

from pathlib import Path

import pytest
import torch

from flow_ros.networks import create, save
from flow_ros.networks.base import FlowOutput
from flow_ros.training.augment import Batch
from flow_ros.training.calibration import calibrate, logistic_fit

torch.set_num_threads(1)


@pytest.mark.parametrize(('centre', 'spread', 'a', 'b'), [
    (2.5, 1.5, 0.5, -2.0), (-6, 2, 0.3, 2.0), (9, 0.5, 0.4, -3.0), (1, 1, 1.0, 0.0)])
def test_the_calibration_is_found_however_wrong_the_confidence_was(
        centre: float, spread: float, a: float, b: float) -> None:
    """From (1, 0) undamped Newton steps end at -16 million in the first of these."""
    random = torch.Generator().manual_seed(0)
    x = centre + spread * torch.randn(20_000, generator=random, dtype=torch.double)
    truth = torch.sigmoid(a * x + b)
    y = (torch.rand(20_000, generator=random, dtype=torch.double) < truth).double()
    fit = logistic_fit(x, y)
    assert float((torch.sigmoid(fit[0] * x + fit[1]) - truth).abs().mean()) < 0.015


def test_a_calibration_without_a_single_error_stays_finite() -> None:
    x = torch.linspace(-1, 3, 1000, dtype=torch.double)
    fit = logistic_fit(x, torch.ones_like(x))
    assert bool((torch.sigmoid(fit[0] * x + fit[1]) > 0.95).all())
    assert float(fit.abs().max()) < 100


class Unsure(torch.nn.Module):
    """Right in half of all pixels, and says 0.9; remembers how it was started."""

    name, budget_unit, accepts_prior = 'unsure', 'levels', False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, object]] = []

    def set_calibration(self, scale: float, shift: float) -> None:
        self.given = (scale, shift)

    def forward(self, image1: torch.Tensor, image2: torch.Tensor, iterations: object,
                prior: object) -> FlowOutput:
        self.calls.append((iterations, prior))
        flow = torch.zeros(1, 2, 64, 64)
        flow[:, 0, :, ::2] = 10.0
        return FlowOutput(flow, torch.full((1, 1, 64, 64), 0.9))


def test_any_network_with_a_confidence_is_fitted() -> None:
    image, truth = torch.zeros(1, 3, 64, 64), torch.zeros(1, 2, 64, 64)
    truth[..., :10, :] = torch.nan  # counts for nothing
    network = Unsure()
    a, b = calibrate(network, [Batch(image, image, truth, None)] * 3).tolist()
    assert network.given == (1.0, 0.0)
    assert network.calls == [(None, None)] * 3  # all its levels, and cold
    said = torch.logit(torch.tensor(0.9))
    assert float(torch.sigmoid(a * said + b)) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(('name', 'options'), [
    ('dip_rt', {}), ('hd3', {'encoder': 'vgg', 'context': False, 'decoder_width': 16})])
def test_a_calibration_is_saved_with_the_weights(
        name: str, options: dict[str, object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = create(name, **options)
    images = 255 * torch.rand(2, 1, 3, 64, 64)
    with torch.no_grad():
        plain = network(*images).confidence
        network.set_calibration(0.5, -1.0)
        moved = network(*images).confidence
        save(network, tmp_path / 'weights.safetensors')
        again = create(name, tmp_path / 'weights.safetensors')
        assert torch.equal(again(*images).confidence, moved)
        wanted = torch.sigmoid(0.5 * torch.logit(plain) - 1.0)
    # HD3's is calibrated on the level, then enlarged.
    assert float((moved - wanted).abs().max()) < (1e-5 if name == 'dip_rt' else 0.05)
