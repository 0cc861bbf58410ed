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

from pathlib import Path

import pytest

from flow_ros.evaluation.benchmarks.children import Refused, run_child
from flow_ros.evaluation.benchmarks.memory import fit_line, peak_memory


def test_a_line_is_found_and_how_far_from_it_the_peaks_are():
    line = fit_line([0.3, 0.9, 2.0, 8.0], [20 + 150 * size for size in (0.3, 0.9, 2.0, 8.0)])
    assert line.offset_mb == pytest.approx(20)
    assert line.mb_per_megapixel == pytest.approx(150)
    assert line.worst == pytest.approx(0, abs=1e-9)
    assert line.at(4.0) == pytest.approx(620)


def test_peaks_that_grow_faster_than_the_pixels_deviate():
    line = fit_line([1.0, 2.0, 4.0, 8.0], [100.0, 400.0, 1600.0, 6400.0])
    assert line.worst > 0.3


@pytest.mark.parametrize('sizes, peaks', [([1.0], [5.0]), ([1.0, 1.0], [5.0, 6.0]),
                                          ([1.0, 2.0], [5.0])])
def test_a_line_takes_two_sizes(sizes, peaks):
    with pytest.raises(ValueError, match='two sizes at least'):
        fit_line(sizes, peaks)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(Refused, match='a warm frame takes 3 frames at least; seen 2'):
        peak_memory(network='dip_rt', runtime='torch', width=64, height=64, frames=2)
    with pytest.raises(Refused, match='no_such'):
        peak_memory(network='no_such', runtime='torch', width=64, height=64)
    with pytest.raises(Refused, match='no_such'):
        peak_memory(network='dip_rt', runtime='no_such', width=64, height=64)


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(),
                    reason='only Linux says how high the resident memory was')
@pytest.mark.parametrize('network, iterations, widths', [
    ('dip_rt', 1, (320, 640, 960)), ('dip', 1, (320, 480, 640)),
    ('hd3_compact', None, (320, 480, 640)), ('mscsl', None, (320, 480, 640))])
def test_the_peak_grows_no_faster_than_the_pixels(network, iterations, widths):
    """In processes of their own: what other tests have left in memory would hide the peak."""
    rows = [run_child('memory', {'network': network, 'runtime': 'torch', 'precision': 'f32',
                                 'width': width, 'height': width * 3 // 4, 'threads': 1,
                                 'iterations': iterations, 'frames': 3}, limit_s=120)
            for width in widths]
    assert [row['size'] for row in rows] == [f'{width}x{width * 3 // 4}' for width in widths]
    assert all(row['warm'] == (network != 'mscsl') for row in rows)  # which takes no prior
    small, middle, large = (row['peak_mb'] for row in rows)
    assert 10 < small < middle < large
    assert all(row['peak_mb'] < row['bound_mb'] for row in rows)
    pixels = [row['megapixels'] for row in rows]
    # Some MB do not depend on the size; beyond them each pixel costs the same, or less.
    first = (middle - small) / (pixels[1] - pixels[0])
    second = (large - middle) / (pixels[2] - pixels[1])
    assert second < 1.5 * first, f'{first:.0f}, then {second:.0f} MB per megapixel'
