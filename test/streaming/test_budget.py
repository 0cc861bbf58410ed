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

from dataclasses import FrozenInstanceError

import pytest

from flow_ros.streaming.budget import Budget


@pytest.mark.parametrize('iterations', [None, 1, 8, 100])
def test_budgets_that_work(iterations):
    assert Budget(iterations=iterations).iterations == iterations


@pytest.mark.parametrize('iterations', [0, -3, 2.0, '4', True, float('nan')])
def test_what_is_no_number_of_iterations_is_refused(iterations):
    with pytest.raises(ValueError, match=r'iterations must be .*None .*; seen '):
        Budget(iterations=iterations)


def test_a_budget_does_not_change():
    budget = Budget()
    with pytest.raises(FrozenInstanceError):
        budget.iterations = 3
