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

import pytest
import torch

from flow_ros.training.calibration import logistic_fit

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
