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

"""What a running stream is doing, as one line for people and one for programs."""

from dataclasses import asdict, dataclass, fields
import json


@dataclass(frozen=True)
class Status:
    """Counts since the start; rates and times of the last seconds.

    ``endpoint_error_px`` is the mean over the last flows whose truth is known, else None;
    ``budget_ms`` the time that a flow may take, None for any, and ``overruns`` how many took
    longer.
    """

    frames_in: int = 0
    flow_out: int = 0
    frames_per_s: float = 0.0
    latency_ms: float = 0.0
    budget_ms: float | None = None
    overruns: int = 0
    dropped: int = 0
    iterations: int = 0
    warm: bool = False
    network: str = ''
    runtime: str = ''
    endpoint_error_px: float | None = None
    saved: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return one line for programs."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> 'Status | None':
        """Return the status of a line made by ``to_json``; None of any other line."""
        try:
            values = json.loads(line)
        except ValueError:
            return None
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
            return None
        return cls(**{**values, 'saved': tuple(values['saved'])})

    def __str__(self) -> str:
        """Return one line for people."""
        budget = ('' if self.budget_ms is None
                  else f' of {self.budget_ms:.0f}, {self.overruns} over')
        parts = [f'in {self.frames_in}', f'flow {self.flow_out}',
                 f'{self.frames_per_s:.1f} frames/s', f'latency {self.latency_ms:.0f} ms{budget}',
                 f'dropped {self.dropped}',
                 f'{self.iterations} iterations {"warm" if self.warm else "cold"}']
        if self.endpoint_error_px is not None:
            parts.append(f'error {self.endpoint_error_px:.2f} px')
        return ' | '.join(parts)
