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

"""What runs once on a lent GPU must not stumble there: its guards, and how it adds up rounds."""

import importlib.util
import json
from pathlib import Path
import sys

import pytest

pytest.importorskip('torch', reason='torch is not installed')
BENCH = Path(__file__).resolve().parents[2] / 'bench'


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCH / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for theirs there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def check():
    return load('gpu_check')


@pytest.fixture(scope='module')
def engines():
    return load('engines')


@pytest.fixture
def settings(check):
    return check.Settings(device='cpu', sizes=('64x48',), networks=('mscsl',), seconds=0.1,
                          steps=8)


def python(code):
    return lambda *_, **__: [sys.executable, '-c', code]


def test_a_part_that_fails_or_hangs_is_an_outcome_and_no_end(check, settings, tmp_path,
                                                             monkeypatch):
    monkeypatch.setattr(check, 'command_of', python('import sys; print("why"); sys.exit(3)'))
    failed = check.run('splatting', settings, tmp_path, seconds=30)
    assert (failed.status, failed.reason) == ('failed', 'ended with 3')
    assert failed.output == 'why\n'
    monkeypatch.setattr(check, 'command_of', python(
        'import time; print("begun", flush=True); time.sleep(60)'))
    late = check.run('splatting', settings, tmp_path, seconds=1.5)
    assert late.status == 'not done'
    assert late.output == 'begun\n'
    assert late.seconds < 20
    monkeypatch.setattr(check, 'command_of', lambda *_, **__: [str(tmp_path / 'nothing')])
    assert check.run('splatting', settings, tmp_path, seconds=30).status == 'failed'
    assert check.run('splatting', settings, tmp_path, seconds=0).reason == 'no time is left'


def test_a_part_without_its_package_is_skipped_with_the_reason(check, settings, tmp_path,
                                                               monkeypatch):
    monkeypatch.setitem(check.NEEDS, 'tests', ('pytest', 'no_such_package'))
    outcome = check.run('tests', settings, tmp_path, seconds=30)
    assert (outcome.status, outcome.reason) == ('skipped', 'no_such_package is not installed')
    monkeypatch.setattr(check, 'tensorrt_missing', lambda: 'TensorRT is not installed')
    monkeypatch.setitem(check.NEEDS, 'tensorrt', ())
    outcome = check.run('tensorrt', settings, tmp_path, seconds=30)
    assert (outcome.status, outcome.reason) == ('skipped', 'TensorRT is not installed')


def test_splatting_is_run_and_lands_in_the_table(check, settings, tmp_path):
    outcome = check.run('splatting', settings, tmp_path, seconds=120)
    assert outcome.status == 'done', outcome.output
    row, = outcome.result['rows']
    assert row['as_on_cpu'] is True
    assert row['ms_p10'] <= row['ms_p50'] <= row['ms_p90']
    text = check.markdown({'gpu': 'a GPU', 'cpu': 'a CPU'}, [
        outcome, check.Outcome('tensorrt', 'skipped', reason='not here')])
    assert '| Forward splatting, median (10 to 90 %) | done |' in text
    assert '64x48: ' in text
    assert '| skipped | 0 | not here |' in text


def test_without_cuda_nothing_is_pretended(check, monkeypatch, capsys):
    torch = pytest.importorskip('torch')
    if torch.cuda.is_available():
        pytest.skip('a CUDA device is there')
    monkeypatch.setattr(sys, 'argv', ['gpu_check.py'])
    check.main()
    assert 'sees no CUDA device: nothing was checked' in capsys.readouterr().out


def result(way, number, ms, **more):
    budgets = {'2': {'ms_p50': ms, 'cold': 0}, '4': {'ms_p50': 2 * ms, 'cold': 0}}
    return {'network': 'dip_rt', 'size': '640x480', 'way': way, 'round': number,
            'budgets': budgets, 'trained': True, 'resident_mib': 400 + number,
            'resident_before_mib': 300, 'device_mib': 0, 'prepare_s': 9.0 - 4 * number,
            'errors_px': [0.1, 0.2, 0.3] if number == 0 else [], 'passed': number == 0 or None,
            **more}


def test_ratios_are_those_of_one_round(engines):
    """The machine was half as fast in the second round: that is no change of the ratio."""
    rows = engines.rows([result('torch f32', 0, 100.0), result('openvino f32', 0, 50.0),
                         result('torch f32', 1, 200.0), result('openvino f32', 1, 100.0),
                         {'network': 'dip_rt', 'size': '640x480', 'way': 'tensorrt f32',
                          'round': 0, 'error': 'no TensorRT'}])
    found = {(row['way'], row.get('budget')): row for row in rows}
    assert found['openvino f32', 2]['ratios'] == [2.0, 2.0]
    assert found['openvino f32', 4]['ms'] == [100.0, 200.0]
    assert found['openvino f32', 2]['resident_mib'] == 401
    assert found['openvino f32', 2]['prepare_again_s'] == [5.0]
    text = engines.markdown(rows, cuda=False)
    assert ('| dip_rt, 2 | openvino f32 | 75.0 (50.0 to 100.0) | 2.00 (2.00 to 2.00) | 401 (300)'
            ' | 9.0, then 5.0 | 0.1 / 0.2 / 0.3 |') in text
    assert '| dip_rt | tensorrt f32 | no TensorRT |' in text


def test_a_measurement_that_fails_is_a_row(engines, tmp_path):
    job = engines.Job(network='nothing', size='64x48', way='torch f32', device='cpu', threads=1,
                      seconds=0.1, errors=True)
    outcome = engines.run(job, tmp_path, limit_s=60)
    assert "unknown network 'nothing'" in outcome['error']
    assert json.dumps(outcome)
