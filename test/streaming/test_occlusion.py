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

import math

import pytest
import torch

from flow_ros.streaming.occlusion import check_consistency

torch.set_num_threads(1)


def constant(u, v=0.0, height=20, width=40):
    return torch.tensor([u, v]).view(1, 2, 1, 1).expand(1, 2, height, width).clone()


# forward u, backward u, column looked at, occluded, confidence
TRUTH = [
    (5.0, -5.0, 10, False, 1.0),             # there and back
    (0.0, 0.0, 10, False, 1.0),
    (0.0, 0.5, 10, False, 1 / (1 + 0.25 / 9)),   # within beta
    (0.0, 1.0, 10, True, 1 / (1 + 1 / 9)),
    (0.0, 3.0, 10, True, 0.5),               # off by what confidence tolerates
    (20.0, -18.9, 10, False, 1 / (1 + 1.1 ** 2 / 9)),  # alpha lets large motions be less exact
    (20.0, -17.0, 10, True, 0.5),
    (5.0, 5.0, 10, True, 1 / (1 + 100 / 9)),     # goes on instead of back
    (5.0, -5.0, 36, True, 0.0),              # leaves by the right border
    (-5.0, 5.0, 3, True, 0.0),               # by the left one
    (0.4, -0.4, 39, False, 1.0),             # stays within the area of the last pixel
    (math.nan, 0.0, 10, True, 0.0),
    (math.inf, 0.0, 10, True, 0.0),
]


@pytest.mark.parametrize(('there', 'back', 'column', 'occluded', 'confidence'), TRUTH)
def test_truth_table(there, back, column, occluded, confidence):
    checked = check_consistency(constant(there), constant(back))
    assert checked.occluded.shape == checked.confidence.shape == (1, 1, 20, 40)
    assert bool(checked.occluded[0, 0, 10, column]) is occluded
    assert float(checked.confidence[0, 0, 10, column]) == pytest.approx(confidence, abs=1e-4)


@pytest.mark.parametrize(('v', 'row', 'occluded'), [
    (4.0, 16, True), (4.0, 15, False), (-4.0, 3, True), (-4.0, 4, False)])
def test_leaving_by_the_upper_and_lower_border(v, row, occluded):
    checked = check_consistency(constant(0.0, v), constant(0.0, -v))
    assert bool(checked.occluded[0, 0, row, 20]) is occluded


def test_what_an_object_covers_is_occluded_and_what_it_uncovers_is_occluded_backwards():
    forward, backward = torch.zeros(1, 2, 30, 60), torch.zeros(1, 2, 30, 60)
    forward[0, 0, 10:20, 10:20] = 6.0   # a block at 10..19 goes to 16..25
    backward[0, 0, 10:20, 16:26] = -6.0
    covered = torch.zeros(30, 60, dtype=torch.bool)
    covered[10:20, 20:26] = True
    uncovered = torch.zeros(30, 60, dtype=torch.bool)
    uncovered[10:20, 10:16] = True
    assert torch.equal(check_consistency(forward, backward).occluded[0, 0], covered)
    assert torch.equal(check_consistency(backward, forward).occluded[0, 0], uncovered)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r'seen \(1, 2, 4, 4\) and \(1, 2, 4, 5\)'):
        check_consistency(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 5))
