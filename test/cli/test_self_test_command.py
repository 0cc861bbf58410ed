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

import importlib.util
import json
import shutil

import pytest
import torch
from torch.nn import functional

from flow_ros.cli.main import main
from flow_ros.networks import create, default_weights_path
from flow_ros.networks.registry import save
from flow_ros.ops import matching, sampling
from flow_ros.runtimes.tensorrt import PlanError

torch.set_num_threads(1)
TORCH = ['--runtime', 'torch', '--device', 'cpu', '--size', '128x96']


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def self_test(*arguments):
    return main(['self-test', '--threads', '1', *arguments])


def test_torch_passes_and_the_numbers_are_written(tmp_path, cache, capsys):
    file = tmp_path / 'numbers.json'
    assert self_test('--network', 'mscsl', *TORCH, '--json', str(file)) == 0
    out = capsys.readouterr().out
    assert 'self-test: all 2 passed' in out
    for words in ('shipped', 'torch on the CPU', 'cold, budget 4', '256x192', '128x96', 'cpu: ',
                  f'torch {torch.__version__.split("+")[0]}'):
        assert words in out
    assert 'REFUSED' not in out
    numbers = json.loads(file.read_text())
    assert numbers['passed'] is True
    assert [verdict['against'] for verdict in numbers['verdicts']] == ['shipped',
                                                                       'torch on the CPU']
    for verdict in numbers['verdicts']:
        assert verdict['network'] == 'mscsl'
        assert verdict['limits_px'] == [0.001, 0.005, 0.01]
        assert [case['budget'] for case in verdict['cases']] == [1, 2, 4]
        assert all(case['passed'] and max(case['errors_px']) < 1e-3 for case in verdict['cases'])
    assert numbers['machine']['gpu']
    assert len(list((cache / 'references').iterdir())) == 1


def test_a_torch_that_computes_wrongly_is_found_by_the_shipped_reference(
        tmp_path, capsys, monkeypatch):
    sample = functional.grid_sample
    monkeypatch.setattr(functional, 'grid_sample', lambda image, grid, **given: sample(
        image, grid, **{**given, 'mode': 'nearest'}))
    for module in (matching, sampling):  # on CPUs whole pixels are read, without grid_sample
        monkeypatch.setattr(module, 'runs_on_cpu', lambda *tensors: False)
    file = tmp_path / 'numbers.json'
    assert self_test('--network', 'dip_rt', *TORCH, '--json', str(file)) == 1
    out, said = capsys.readouterr()
    assert 'self-test: 1 of 2 REFUSED; please report the lines above' in out
    assert 'check of dip_rt on torch (f32, cpu, 256x192;' in said
    assert 'REFUSED; endpoint error in px' in said
    numbers = json.loads(file.read_text())
    assert numbers['passed'] is False
    # Torch agrees with itself, whatever it computes: that is why there is a shipped reference.
    assert [verdict['passed'] for verdict in numbers['verdicts']] == [False, True]


def test_weights_of_ones_own_are_tested_without_a_shipped_reference(tmp_path, capsys):
    torch.manual_seed(0)
    save(create('mscsl'), tmp_path / 'mine.safetensors')
    assert self_test('--network', 'mscsl', '--weights', str(tmp_path / 'mine.safetensors'),
                     *TORCH) == 0
    out = capsys.readouterr().out
    assert 'mscsl: no shipped reference for these weights' in out
    assert 'self-test: all 1 passed' in out


@pytest.mark.skipif(importlib.util.find_spec('openvino') is None,
                    reason='OpenVINO is not installed')
def test_openvino_in_both_precisions(capsys):
    assert self_test('--network', 'mscsl', '--runtime', 'openvino', '--size', '128x96',
                     '--precision', 'f32', '--precision', 'fast') == 0
    out = capsys.readouterr().out
    assert 'self-test: all 3 passed' in out
    assert 'openvino f32, cpu' in out


@pytest.mark.skipif(torch.cuda.is_available(), reason='a CUDA device is there')
def test_tensorrt_without_a_gpu_is_one_message(capsys):
    assert self_test('--network', 'mscsl', '--runtime', 'tensorrt', '--size', '128x96') == 2
    said = capsys.readouterr().err
    assert 'flow_ros self-test: error: --runtime tensorrt: ' in said


def test_engines_that_cannot_be_had_are_a_verdict_and_the_others_go_on(
        tmp_path, monkeypatch, capsys):
    def none(network, *arguments, **keywords):
        raise PlanError('the plan of encode is for another TensorRT')

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr('flow_ros.runtimes.tensorrt.find_tensorrt', lambda: True)
    monkeypatch.setattr('flow_ros.runtimes.building.make_runtime', none)
    monkeypatch.setattr('flow_ros.cli.self_test.machine_facts', dict)
    file = tmp_path / 'numbers.json'
    assert self_test('--network', 'mscsl', '--runtime', 'tensorrt', '--runtime', 'torch',
                     '--device', 'cpu', '--size', '128x128', '--json', str(file)) == 1
    out = capsys.readouterr().out
    assert ('mscsl, tensorrt f32: its engines cannot be had: the plan of encode is for another '
            'TensorRT') in out
    assert 'self-test: 1 of 3 REFUSED' in out
    content = json.loads(file.read_text())
    assert not content['passed'] and len(content['failures']) == 1
    assert [verdict['passed'] for verdict in content['verdicts']] == [True, True]


def test_mistakes_are_named(tmp_path, capsys):
    assert self_test('--network', 'dip', *TORCH) == 2
    assert "no weights for 'dip'" in capsys.readouterr().err
    assert self_test('--network', 'nothing', *TORCH) == 2
    assert '--network: ' in capsys.readouterr().err
    assert self_test('--weights', 'a.pth', *TORCH) == 2
    assert '--weights is for one network' in capsys.readouterr().err
    assert self_test('--network', 'mscsl', *TORCH, '--json', str(tmp_path / 'no' / 'a')) == 2
    assert 'its folder does not exist' in capsys.readouterr().err
    assert self_test('--network', 'mscsl', *TORCH, '--json', str(tmp_path)) == 2
    assert 'is a folder; expected a file' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        self_test('--size', '640')
    assert 'expected WIDTHxHEIGHT in px, 16 to 8192 each' in capsys.readouterr().err


def test_a_damaged_shipped_reference_is_an_error(tmp_path, capsys):
    for suffix in ('.safetensors', '.reference.npz'):
        shutil.copy(default_weights_path('mscsl').with_name(f'mscsl{suffix}'), tmp_path)
    (tmp_path / 'mscsl.reference.npz').write_bytes(b'PK\x03\x04')
    assert self_test('--network', 'mscsl', '--weights', str(tmp_path / 'mscsl.safetensors'),
                     *TORCH) == 2
    assert 'is damaged' in capsys.readouterr().err
