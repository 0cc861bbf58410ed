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

"""Convex upsampling against its definition."""

import pytest
import torch

from flow_ros.ops.upsampling import convex_upsample


def test_an_even_mask_is_the_mean_of_nine_neighbours() -> None:
    values = torch.arange(9.0).view(1, 1, 3, 3)
    fine = convex_upsample(values, torch.zeros(1, 9 * 4, 3, 3), 2)
    assert fine.shape == (1, 1, 6, 6)
    assert float(fine[0, 0, 2, 2]) == pytest.approx(4.0)  # the middle: the mean of all
    assert float(fine[0, 0, 0, 0]) == pytest.approx((0 + 1 + 3 + 4) / 9)  # zeros outside


@pytest.mark.parametrize('factor', [2, 4, 8])
def test_each_fine_pixel_reads_its_own_mask_channel(factor: int) -> None:
    torch.manual_seed(0)
    values, mask = torch.randn(2, 3, 4, 5), torch.randn(2, 9 * factor ** 2, 4, 5)
    fine = convex_upsample(values, mask, factor)
    padded = torch.nn.functional.pad(values, (1, 1, 1, 1))
    for y, x, sy, sx in [(0, 0, 0, 0), (1, 2, factor - 1, 0), (3, 4, 1, factor - 1)]:
        channels = [k * factor ** 2 + sy * factor + sx for k in range(9)]
        weights = torch.softmax(mask[:, channels, y, x], dim=1)  # (B, 9)
        patch = padded[:, :, y:y + 3, x:x + 3].flatten(2)  # (B, C, 9)
        expected = (patch * weights[:, None]).sum(dim=2)
        seen = fine[:, :, y * factor + sy, x * factor + sx]
        assert torch.allclose(seen, expected, atol=1e-5)
