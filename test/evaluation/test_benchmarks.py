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

"""What `flow_ros bench` measures, on real networks at tiny sizes."""

from importlib.util import find_spec
import math

import cv2
import numpy as np
import pytest
import torch

from flow_ros.evaluation.benchmarks import accuracy, timing
from flow_ros.evaluation.benchmarks.children import NotMeasured, Refused, run_child
from flow_ros.evaluation.benchmarks.suite import (
    available_ways,
    default_networks,
    warm_iterations,
    Way,
)
from flow_ros.evaluation.benchmarks.timing import load_frames, measure, TimingJob
from flow_ros.flow_io import write_image

SIZE = '96x64'


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


def silent(text):
    pass


def job(**given):
    return TimingJob(**({'runtime': 'torch', 'device': 'cpu', 'size': SIZE, 'frames': 4,
                         'iterations': 2, 'threads': 1} | given))


def test_a_stream_is_timed():
    row = measure(job(), silent)
    assert list(row)[:9] == ['network', 'runtime', 'precision', 'size', 'iterations', 'warm',
                             'fps', 'ms_p50', 'ms_p99']
    assert (row['network'], row['runtime'], row['size'], row['iterations']) == (
        'dip_rt', 'torch', SIZE, 2)
    assert (row['frames'], row['warm'], row['cold'], row['trained']) == (4, True, 0, True)
    assert 0 < row['ms_p10'] <= row['ms_p50'] <= row['ms_p90'] <= row['ms_p99']
    assert row['fps'] == pytest.approx(1e3 / row['ms_p50'], rel=1e-3)
    assert row['fps_mean'] == pytest.approx(1e3 / row['ms_mean'], rel=1e-3)
    assert row['peak_mb'] == max(row['prepare_mb'], row['stream_mb']) > 0
    assert row['cuda_mb'] is None
    assert {'encode', 'steps', 'output', 'total'} <= set(row['acts_ms'])
    assert row['acts_ms']['total'] <= row['ms_p99']
    assert row['steps'] in (2, 4)  # on one level or two, as the flow before was


def test_more_frames_than_a_source_has_are_all_fresh_and_warm(folder):
    calls = []
    frames = load_frames(str(folder), '', 20, silent)
    assert len(frames) == 5 and frames[0].shape == (96, 120, 3)

    class Estimator:
        def reset(self):
            calls.append('reset')

        def __call__(self, frame, stamp):
            calls.append(round(stamp / timing.FRAME_S))
            if calls[-2] == 'reset':
                return None

            class Result:
                warm = calls[-3] != 'reset'
                iterations = 4
                timings_ms = {'total': 1.0}
            return Result

    times = list(timing.stream(Estimator(), frames, job(frames=5, warm_up=3)))
    assert len(times) == 5 and all(each.warm for each in times)
    # The first pass warms up with three frames; later ones leave out the first and the cold one.
    assert calls == ['reset', 0, 1, 2, 3, 4, 'reset', 0, 1, 2, 3, 4]
    assert timing.numbers_of(times)['warm'] is True
    cold = list(timing.stream(Estimator(), frames, job(frames=5, warm_up=1, cold=True)))
    assert timing.numbers_of(cold)['cold'] == 2 and not timing.numbers_of(cold)['warm']


def test_a_cold_run_is_cold_and_says_so():
    row = measure(job(cold=True, frames=3, warm_up=1), silent)
    assert (row['warm'], row['cold'], row['frames']) == (False, 3, 3)


def test_the_early_stop_is_off_unless_asked_for():
    network, _ = timing.load_network('dip_rt')
    runtime = timing.make_runtime(job(), network, 64, 96)
    assert timing.make_estimator(job(), runtime).early_stop_px == 0.0
    assert timing.make_estimator(job(early_stop=True), runtime).early_stop_px > 0.0
    budget = timing.make_estimator(job(latency_ms=80.0, iterations=None), runtime).budget
    assert (budget.latency_ms, budget.iterations) == (80.0, None)


def test_a_network_without_weights_is_timed_and_said(monkeypatch):
    network, trained = timing.load_network('dip')
    again, _ = timing.load_network('dip')
    if trained:
        pytest.skip('dip has weights here')
    assert all(torch.equal(one, other) for one, other in
               zip(network.parameters(), again.parameters()))


def test_a_video_is_a_source(tmp_path):
    path = tmp_path / 'drive.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 10.0, (128, 96))
    noise = np.random.default_rng(5).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    texture = noise.repeat(8, axis=0).repeat(8, axis=1)
    for index in range(6):
        writer.write(np.ascontiguousarray(texture[:, index:index + 128]))
    writer.release()
    frames = load_frames(str(path), SIZE, 4, silent)
    assert [frame.shape for frame in frames] == [(64, 96, 3)] * 4
    assert timing.shown_source(str(path)) == 'drive.avi'


@pytest.mark.parametrize(('given', 'said'), [
    ({'network': 'fast'}, "--network: unknown network 'fast'; known are dip_rt"),
    ({'weights': 'none.safetensors'}, 'none.safetensors'),
    ({'source': '/no/such'}, '--source: /no/such: no such file or folder; expected synthetic'),
    ({'source': 'synthetic:x'}, 'the seed must be a number'),
    ({'device': 'cuda:7'}, '--runtime torch: device .cuda:7. is not there'),
    pytest.param({'runtime': 'tensorrt', 'device': None}, '--runtime tensorrt: .*needs an NVIDIA',
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is there')),
])
def test_what_cannot_be_measured_is_refused(given, said):
    with pytest.raises(Refused, match=said):
        measure(job(**given), silent)


def test_a_source_of_one_image_or_of_several_sizes_is_refused(folder):
    for path in sorted(folder.iterdir())[2:]:
        path.unlink()
    with pytest.raises(Refused, match='2 frames; expected at least 3 for a warm flow'):
        measure(job(source=str(folder)), silent)
    write_image(folder / 'z.png', np.zeros((32, 48, 3), np.uint8))
    with pytest.raises(Refused, match='frames of several sizes; give --size WIDTHxHEIGHT'):
        measure(job(source=str(folder), size=''), silent)


# Accuracy.

@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pairs')
    accuracy.make_pairs(folder=str(folder), count=2, width=128, height=96, tell=silent)
    return folder


def test_accuracy_at_every_budget_beside_dis(pairs):
    rows = accuracy.measure_network(
        network='dip_rt', runtime='torch', precision='f32', budgets=[1, 4], data=str(pairs),
        threads=1, seconds=100.0, tell=silent)['rows']
    rows += accuracy.measure_dis(data=str(pairs), threads=1, tell=silent)['rows']
    assert [row['network'] for row in rows] == ['dip_rt', 'dip_rt', 'dis_ultrafast', 'dis_fast',
                                                'dis_medium']
    for row in rows:
        assert row['pairs'] == 2 and row['ms'] > 0
        assert 0 < row['epe'] < 30 and 0 <= row['fl_all'] <= 100
    assert [row['iterations'] for row in rows[:2]] == [1, 4]
    assert rows[0]['epe'] != rows[1]['epe']


def test_the_numbers_are_those_of_evaluate(pairs):
    from flow_ros.evaluation import baselines, evaluate, find_pairs

    wanted = evaluate(baselines(), find_pairs(pairs)[0]).means('dis_medium')
    row = accuracy.measure_dis(data=str(pairs), threads=1, tell=silent)['rows'][-1]
    assert row['epe'] == pytest.approx(wanted['epe'], abs=1e-3)
    assert row['fl_all'] == pytest.approx(wanted['fl_all'], abs=1e-3)


def test_the_pairs_are_the_same_for_everybody(pairs, tmp_path):
    accuracy.make_pairs(folder=str(tmp_path), count=2, width=128, height=96, tell=silent)
    files = sorted(path.relative_to(pairs) for path in pairs.rglob('*') if path.is_file())
    assert len(files) == 8
    for file in files:
        assert (tmp_path / file).read_bytes() == (pairs / file).read_bytes(), file


def test_budgets_are_the_networks_own_where_none_are_given():
    assert accuracy.budgets_of(timing.load_network('dip_rt')[0]) == [1, 2, 4, 8]
    assert accuracy.budgets_of(timing.load_network('mscsl')[0]) == [1, 2, 3, 4]


def test_without_weights_or_pairs_there_is_no_accuracy(pairs, tmp_path):
    common = {'runtime': 'torch', 'precision': 'f32', 'budgets': [1], 'threads': 1,
              'seconds': 1.0, 'tell': silent}
    if not timing.load_network('dip')[1]:
        with pytest.raises(Refused, match='dip: no trained weights here, so no accuracy'):
            accuracy.measure_network(network='dip', data=str(pairs), **common)
    with pytest.raises(Refused, match='no pair with truth below it'):
        accuracy.measure_network(network='dip_rt', data=str(tmp_path), **common)


def test_dis_by_resolution():
    rows = accuracy.time_dis(sizes=[SIZE, '128x96'], threads=1, frames=3, tell=silent)['rows']
    assert [(row['network'], row['size']) for row in rows] == [
        (f'dis_{preset}', size) for size in (SIZE, '128x96')
        for preset in ('ultrafast', 'fast', 'medium')]
    assert all(math.isfinite(row['ms_p50']) and row['frames'] == 3 for row in rows)


# In processes of their own.

def test_a_child_measures_refuses_and_fails():
    told = []
    row = run_child('budget', {
        'network': 'dip_rt', 'runtime': 'torch', 'precision': 'f32', 'width': 96, 'height': 64,
        'latency_ms': 500.0, 'loaded': False, 'frames': 3, 'threads': 1}, on_progress=told.append)
    assert row['asked_ms'] == 500.0 and row['without_flow'] == 0 and row['frames'] == 3
    assert {'network', 'runtime', 'size', 'loaded', 'ms_p50', 'ms_p99', 'steps_p50',
            'overruns'} <= set(row)
    with pytest.raises(Refused, match="unknown network 'fast'"):
        run_child('timing', {'network': 'fast'})
    with pytest.raises(NotMeasured, match='TypeError: .*no_such'):
        run_child('timing', {'no_such': 1})
    with pytest.raises(NotMeasured, match='not done after 0 s'):
        run_child('timing', {'network': 'dip'}, limit_s=0.1)


def test_memory_is_of_a_process_of_its_own():
    row = run_child('memory', {'network': 'dip_rt', 'runtime': 'torch', 'precision': 'f32',
                               'width': 96, 'height': 64, 'iterations': 2, 'threads': 1})
    assert (row['network'], row['runtime'], row['size']) == ('dip_rt', 'torch', SIZE)
    assert 0 < row['peak_mb'] < 2000


# What the report is of.

def test_all_families_are_in_the_report():
    names = default_networks()
    assert names[0] == 'dip_rt'
    assert {'dip', 'mscsl'} <= set(names) and {'hd3', 'hd3_compact'} & set(names)
    assert warm_iterations('dip_rt') == (2, True) and warm_iterations('mscsl')[0] is None
    with pytest.raises(Refused, match='unknown network'):
        warm_iterations('fast')


def test_ways_are_those_of_this_machine():
    ways = available_ways()
    assert Way('torch', 'f32') in ways
    assert (Way('openvino', 'fast') in ways) is (find_spec('openvino') is not None)
    assert (Way('torch', 'fast') in ways) is torch.cuda.is_available()
    assert available_ways(['tensorrt'], ['fast']) == [Way('tensorrt', 'fast')]
