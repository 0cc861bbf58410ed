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

"""How much work one flow may cost."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A limit on the steps of each pair.

    ``iterations`` counts per level; for networks that visit each level once (HD3's levels,
    MSCSL's scales) it is how many of them, coarse to fine, and more than there are means all.
    None is the network's own default.
    """

    iterations: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no schedule can be made from."""
        if self.iterations is None:
            return
        if not isinstance(self.iterations, int) or isinstance(self.iterations, bool):
            raise ValueError(f'iterations must be a whole number or None (the default of the '
                             f'network); seen {self.iterations!r}')
        if self.iterations < 1:
            raise ValueError(f'iterations must be at least 1, or None (the default '
                             f'of the network); seen {self.iterations}')
