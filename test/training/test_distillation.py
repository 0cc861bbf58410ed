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

"""What of a teacher's flow is taken for true, and how it is weighed."""

import pytest
import torch

from flow_ros.training.distillation import distilled, pseudo_truth
from flow_ros.training.losses import sequence_loss


def test_pseudo_truth_is_what_both_directions_and_the_teacher_agree_on() -> None:
    flow = torch.zeros(1, 2, 1, 4)
    flow[:, 0] = torch.tensor([1.0, 1.0, 1.0, 1.0])  # the last leaves the image
    backward = -flow.clone()
    backward[0, 0, 0, 2] = 5.0  # contradicts pixel 1
    confidence = torch.tensor([0.9, 0.9, 0.2, 0.9]).view(1, 1, 1, 4)
    trusted = pseudo_truth(flow, backward, confidence)
    assert (~torch.isnan(trusted[0, 0, 0])).tolist() == [True, False, False, False]
    assert (~torch.isnan(pseudo_truth(flow, backward)[0, 0, 0])).tolist() == [
        True, False, True, False]
    assert float(trusted[0, 0, 0, 0]) == 1.0


def test_distillation_has_a_tenth_of_the_weight() -> None:
    assert float(distilled(torch.tensor(2.0), torch.tensor(12.0))) == pytest.approx(3.0)
    flow = torch.ones(1, 2, 2, 2, requires_grad=True)
    nothing = torch.full((1, 2, 2, 2), float('nan'))
    distilled(flow.sum(), sequence_loss([], flow, nothing, 0.8)).backward()
    assert flow.grad.tolist() == torch.full((1, 2, 2, 2), 0.9).tolist()
