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

"""flow_ros build: what it says, what it keeps, and how it ends."""

import errno
from importlib.util import find_spec
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from flow_ros.cli.main import main
from flow_ros.networks import create, FlowNetwork, save
from flow_ros.runtimes import building
from flow_ros.runtimes.cache import EngineCache
from flow_ros.runtimes.tensorrt import BuildError, BuiltPlan, Installation

needs_openvino = pytest.mark.skipif(find_spec('openvino') is None,
                                    reason='OpenVINO is not installed')
needs_tensorrt = pytest.mark.skipif(
    find_spec('tensorrt_rtx') is None or find_spec('onnxscript') is None,
    reason='TensorRT-RTX or onnxscript is not installed')
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.set_num_threads(1)
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of an untrained network."""
    torch.manual_seed(0)
    save(create('dip_rt'), tmp_path / 'some.safetensors')
    return tmp_path / 'some.safetensors'


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX with a quick builder and exporter."""
    monkeypatch.setattr('flow_ros.runtimes.tensorrt.find_tensorrt',
                        lambda: Installation('tensorrt_rtx', '1.7.1'))
    real = building.build_engines

    def export(network: FlowNetwork, act: Any, *, dynamic: bool = False) -> bytes:
        return f'{act.name} {dynamic}'.encode()

    def build(model: bytes, **keywords: Any) -> BuiltPlan:
        return BuiltPlan(plan=b'plan of ' + model, timing_cache=None, seconds=0.0, layers=1)

    monkeypatch.setattr(building, 'build_engines', lambda *arguments, **keywords: real(
        *arguments, **keywords, builder=build, exporter=export))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(['build', *map(str, arguments)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_what_is_built_is_listed_found_again_and_cleared(tensorrt, weights, cache, capsys) -> None:
    arguments = ('--weights', weights, '--size', '128x96')
    status, out, err = run(capsys, *arguments)
    assert status == 0
    assert 'dip_rt 128x96 f32 with TensorRT-RTX 1.7.1, for any GPU of compute' in err
    assert 'exporting encode (1 of 4)' in err and 'exporting finish (4 of 4)' in err
    assert 'built encode, step_16, step_8, finish in' in out
    assert f'kept in {cache / "engines"}' in out
    assert 'not checked: no CUDA device here' in out
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and out.count('was in the cache') == 4
    assert 'all engines were in the cache' in out

    _, out, _ = run(capsys, '--list')
    assert 'dip_rt step_8 128x96 f32' in out and 'tensorrt_rtx 1.7.1' in out
    assert '4 TensorRT engines' in out and str(cache) in out
    status, out, _ = run(capsys, '--clear')
    assert status == 0 and f'removed from {cache}' in out
    assert '0 TensorRT engines' in run(capsys, '--list')[1]


def test_a_range_of_sizes(tensorrt, weights, capsys) -> None:
    status, out, err = run(capsys, '--weights', weights, '--size', '128x96', '--dynamic',
                           '64x64', '256x192')
    assert status == 0 and 'built encode, step, finish in' in out
    assert 'dip_rt 64x64..256x192 f32' in err
    status, _, err = run(capsys, '--weights', weights, '--size', '640x480', '--dynamic',
                         '64x64', '256x192')
    assert status == 2 and '--size 640x480 must lie between --dynamic 64x64 and 256x192' in err
    status, _, err = run(capsys, '--runtime', 'openvino', '--dynamic', '64x64', '256x192')
    assert status == 2 and '--dynamic is for --runtime tensorrt' in err


def test_a_cache_that_cannot_be_written_is_a_failure(
        tensorrt, weights, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / 'file').write_text('in the way')
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path / 'file'))
    status, out, err = run(capsys, '--weights', weights, '--size', '128x96')
    assert status == 2 and not out and 'exporting' not in err
    assert f'{tmp_path / "file"} cannot be written' in err and 'set FLOW_ROS_CACHE to' in err


def test_what_cannot_be_kept_is_a_failure(tensorrt, weights, cache, monkeypatch, capsys) -> None:
    def full(path: Path, data: bytes, **keywords: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr('flow_ros.runtimes.cache.write_atomically', full)
    monkeypatch.setattr(EngineCache, 'writable', lambda self: True)
    status, out, err = run(capsys, '--weights', weights, '--size', '128x96')
    assert status == 1 and f'NOT kept: {cache} cannot be written' in out
    assert err.count('warning: cannot write to') == 1 and 'FLOW_ROS_CACHE' in err


def test_without_tensorrt_it_says_what_to_do(weights, monkeypatch, capsys) -> None:
    monkeypatch.setenv('FLOW_ROS_TENSORRT', 'none')
    status, _, err = run(capsys, '--weights', weights)
    assert status == 2
    assert 'TensorRT is switched off (FLOW_ROS_TENSORRT=none). Without it: --runtime openvino' \
        in err
    monkeypatch.setenv('FLOW_ROS_TENSORRT', 'yes')
    status, _, err = run(capsys, '--weights', weights)
    assert status == 2 and "seen 'yes'" in err


def test_tensorrt_proper_needs_the_gpu(weights, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr('flow_ros.runtimes.tensorrt.find_tensorrt',
                        lambda: Installation('tensorrt', '10.16.1'))
    status, _, err = run(capsys, '--weights', weights)
    assert status == 2 and 'TensorRT 10.16.1 can only build on the GPU' in err


def test_an_error_of_the_builder_is_one_message(weights, tensorrt, monkeypatch, capsys) -> None:
    def fails(*arguments: Any, **keywords: Any) -> Any:
        raise BuildError('dip_rt step_8: node 3 the_node (NoSuchOperator)')

    monkeypatch.setattr(building, 'build_engines', fails)
    status, _, err = run(capsys, '--weights', weights)
    assert status == 2 and 'error: dip_rt step_8: node 3 the_node (NoSuchOperator)' in err


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--size', '640'], "size '640': expected WIDTHxHEIGHT in px, 16 to 8192 each"),
    (['--size', '8x480'], "size '8x480': expected WIDTHxHEIGHT"),
    (['--workspace', '0'], 'expected a whole number from 1 on'),
    (['--precision', 'int8'], 'invalid choice'),
    (['--optimisation-level', '9'], 'invalid choice')])
def test_bad_arguments_are_named(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        main(['build', *arguments])
    assert message in capsys.readouterr().err


def test_unknown_networks_and_weights_are_named(tmp_path, capsys) -> None:
    status, _, err = run(capsys, '--network', 'raft')
    assert status == 2 and "unknown network 'raft'" in err
    status, _, err = run(capsys, '--weights', tmp_path / 'none.safetensors')
    assert status == 2 and 'does not exist' in err


@needs_openvino
def test_openvino_fills_its_cache(weights, cache, capsys) -> None:
    arguments = ('--runtime', 'openvino', '--weights', weights, '--size', '64x48', '--threads', 1)
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and f'kept in {cache / "openvino"}' in out and 'are new' in out
    assert list((cache / 'openvino').rglob('*.blob'))
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and 'all compiled models were in the cache' in out


@needs_tensorrt
def test_ctrl_c_leaves_nothing_broken(cache, weights, tmp_path) -> None:
    """The real thing, interrupted in its second engine."""
    command = [sys.executable, '-m', 'flow_ros.cli.main', 'build', '--size', '64x64', '--weights',
               str(weights)]
    messages = tmp_path / 'messages'
    with messages.open('w') as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT,
                                   env={**os.environ, 'OMP_NUM_THREADS': '1'})
    try:
        while 'exporting step_16' not in messages.read_text():
            assert process.poll() is None, messages.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130, messages.read_text()
    finally:
        process.kill()
        process.wait()
    text = messages.read_text()
    assert 'interrupted: nothing is left broken' in text and 'Traceback' not in text
    assert 'step_16; encode kept in' in text
    assert not list(cache.rglob('*.part'))
    entry, = EngineCache(cache).entries()
    assert entry.title == 'dip_rt encode 64x64 f32'
