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

"""The frames of a stream as the node knows them, and the words for those that make no pair."""

from dataclasses import dataclass

from sensor_msgs.msg import Image
from std_msgs.msg import Header

from flow_ros.streaming.view import View


@dataclass(frozen=True)
class Arrival:
    """A message and when it came (``time.perf_counter``)."""

    message: Image
    came: float


@dataclass(frozen=True)
class Frame:
    """The header and size (width, height) of a frame given to the estimator.

    ``view`` of the camera's image, whose size is ``camera``, is what was given.
    """

    header: Header
    size: tuple[int, int]
    camera: tuple[int, int]
    view: View

    @property
    def stamp(self) -> float:
        """The stamp in seconds."""
        return float(self.header.stamp.sec + 1e-9 * self.header.stamp.nanosec)


def why_no_flow(reason: str, previous: Frame, frame: Frame, max_gap_s: float) -> str:
    """Return the estimator's ``none_reason`` in full: what was seen, expected, and what to do."""
    before, now = previous, frame
    return {
        'stamp went back':
            f'the stamp went from {before.stamp:.6f} back to {now.stamp:.6f} s; expected a later '
            f'one (a bag that loops, or two publishers?): the stream starts again',
        'duplicate stamp':
            f'two frames have the stamp {now.stamp:.6f} s; expected a later one (two publishers, '
            f'or a driver that does not stamp its frames?): the second is left out',
        'size changed':
            f'the size went from {before.camera[0]}x{before.camera[1]} to {now.camera[0]}x'
            f'{now.camera[1]} px: the stream starts again',
        'gap':
            f'the frames are {now.stamp - before.stamp:.3f} s apart, more than max_gap_s '
            f'({max_gap_s:g} s): the stream starts again; raise max_gap_s if the camera or this '
            f'machine is that slow',
    }.get(reason, f'the stream starts again: {reason}')
