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

"""What is kept of a recording, and what of it is trained on and held out."""

import numpy as np
import pytest

from flow_ros.training.recording import FEWEST_PAIRS, Recording, RecordingError


def frame(index: int, size: tuple[int, int] = (64, 80)) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)


def recording(stamps: list[float], **options: float) -> Recording:
    return Recording(**options).gather((frame(index), stamp)
                                       for index, stamp in enumerate(stamps))


def test_frames_come_back_as_they_were() -> None:
    kept = recording([0.1 * index for index in range(5)])
    assert len(kept) == 5
    assert kept.size == (64, 80)
    assert all(np.array_equal(kept.frame(index), frame(index)) for index in range(5))


def test_pairs_are_neighbours_in_time() -> None:
    # A frame was dropped after the 4th, and the stamps jump after the 7th.
    kept = recording([0.0, 0.1, 0.21, 0.3, 0.5, 0.6, 0.7, 9.0, 9.1])
    assert kept.period_s == pytest.approx(0.1)
    assert kept.pairs() == (0, 1, 2, 4, 5, 7)


def test_a_late_frame_is_no_gap() -> None:
    assert recording([0.0, 0.1, 0.26, 0.3, 0.4]).pairs() == (0, 1, 2, 3)


def test_the_end_is_held_out_behind_a_gap() -> None:
    split = recording([0.05 * index for index in range(101)]).split(share=0.2)
    assert (len(split.train), split.gap, len(split.held_out)) == (75, 5, 20)
    assert split.held_out[-1] == 99
    assert split.held_out[0] - split.train[-1] == split.gap + 1
    # No frame of a pair held out is one that was trained on.
    trained = {index + step for index in split.train for step in (0, 1)}
    assert not trained & {index + step for index in split.held_out for step in (0, 1)}


def test_memory_is_bounded_and_what_is_kept_spans_the_recording() -> None:
    one = recording([0.0]).kept_mb
    kept = recording([0.1 * index for index in range(150)], limit_mb=50 * one)
    assert kept.kept_mb <= 50 * one
    pairs = kept.pairs()
    assert kept.stride > 1
    assert all(index % kept.stride == 0 for index in pairs)
    assert len(pairs) >= FEWEST_PAIRS
    assert pairs[0] == 0
    assert pairs[-1] >= 150 - kept.stride - 1
    assert np.array_equal(kept.frame(pairs[-1] + 1), frame(pairs[-1] + 1))


@pytest.mark.parametrize(('count', 'message'), [
    (0, '0 frames over 0.0 s hold 0 pairs'), (1, '1 frames over 0.0 s hold 0 pairs'),
    (FEWEST_PAIRS, 'at least 8 are needed')])
def test_too_short_a_recording_says_what_is_needed(count: int, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        recording([0.1 * index for index in range(count)]).split()


def test_frames_of_several_sizes_are_an_error() -> None:
    kept = recording([0.0, 0.1])
    with pytest.raises(RecordingError, match='frame 2 is 96x64 px, those before are 80x64'):
        kept.add(frame(2, (64, 96)), 0.2)
    with pytest.raises(RecordingError, match='32x64 px are too small'):
        Recording().add(frame(0, (64, 32)), 0.0)
