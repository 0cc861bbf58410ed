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

"""How much a step still changed: what the early stop goes by."""

from torch import Tensor
from torch.nn import functional

from flow_ros.networks.base import State
from flow_ros.ops.sampling import resize_flow


def largest_update(before: State, after: State) -> float:
    """Return the largest update that means something between two states, full-resolution px."""
    return float(update_size(before, after).amax())


def update_size(before: State, after: State) -> Tensor:
    """Return (B, 1, h, w): the size of the mean update of the 2x2 cells about each corner."""
    flow, start = after.flow, before.flow
    if start.shape != flow.shape:
        start = resize_flow(start, (flow.shape[-2], flow.shape[-1]))
    change = functional.avg_pool2d(flow - start, 2, 1, 1, count_include_pad=False)
    return change.square().sum(dim=1, keepdim=True).sqrt() * after.level
