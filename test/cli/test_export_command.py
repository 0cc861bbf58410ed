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

"""``flow_ros export``: the files, their manifest, and what ends it with one line.

What is in the files is tested in test/runtimes/test_export.py: here exporting is a copy of the
act's name, but for one act of a real network.
"""

import hashlib
import json
from pathlib import Path

import onnx
import pytest
import torch

from flow_ros.cli.main import main
from flow_ros.runtimes import export
from flow_ros.runtimes.export import ExportError

torch.set_num_threads(1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an act export as its own name."""
    monkeypatch.setattr(export, 'export_act',
                        lambda network, act, *, dynamic: f'{act.name} {dynamic}'.encode())
    monkeypatch.setattr(export, 'check_onnx', lambda model, *, name: None)


def run(out: Path, *arguments: str) -> int:
    return main(['export', *arguments, '--out', str(out)])


def manifest(out: Path) -> dict[str, object]:
    text = (out / 'acts.json').read_text(encoding='utf-8')
    assert str(out) not in text
    return dict(json.loads(text))


@pytest.mark.usefixtures('quick')
def test_a_file_for_each_act_and_a_manifest(tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, 'dip_rt', '--size', '180x100') == 0
    said = capsys.readouterr().out
    names = ['encode', 'step_16', 'step_8', 'finish']
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ['acts.json', *(f'{name}.onnx' for name in names)])
    for index, name in enumerate(names, start=1):
        assert f'{index} of 4' in said and f'{name}.onnx' in said
    seen = manifest(tmp_path)
    assert (seen['network'], seen['precision'], seen['size'], seen['multiple'],
            seen['dynamic']) == ('dip_rt', 'f32', [180, 100], 16, False)
    acts = seen['acts']
    assert isinstance(acts, list) and [act['name'] for act in acts] == names
    step = acts[1]
    assert step['sha256'] == hashlib.sha256((tmp_path / 'step_16.onnx').read_bytes()).hexdigest()
    assert step['inputs'][4] == {'name': 'flow', 'shape': [1, 2, 7, 12], 'type': 'float32',
                                 'px_per_cell': [16]}
    assert [each['name'] for each in step['outputs']] == ['next_hidden', 'next_flow']


@pytest.mark.usefixtures('quick')
def test_dynamic_files_of_a_range_in_half_precision(tmp_path: Path) -> None:
    assert run(tmp_path, 'mscsl', '--precision', 'fast', '--dynamic', '320x240',
               '1280x720') == 0
    seen = manifest(tmp_path)
    assert seen['dynamic'] is True and seen['precision'] == 'fast'
    acts = seen['acts']
    assert isinstance(acts, list) and acts[0]['name'] == 'encode'
    image, = acts[0]['inputs']
    assert (image['shape'], image['type']) == ([1, 3, '64*h', '64*w'], 'float32')
    assert acts[0]['outputs'][0]['type'] == 'float16'
    assert acts[0]['profile'] == {'image': [[1, 3, 192, 320], [1, 3, 512, 640],
                                            [1, 3, 768, 1280]]}
    assert run(tmp_path, 'mscsl', '--dynamic') == 0
    acts = manifest(tmp_path)['acts']
    assert isinstance(acts, list) and 'profile' not in acts[0]


@pytest.mark.usefixtures('quick')
def test_an_export_replaces_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / 'mine.onnx').write_text('mine')
    assert run(tmp_path, 'dip_rt', '--size', '64x64') == 0
    before = (tmp_path / 'encode.onnx').stat().st_ino
    assert run(tmp_path, 'dip_rt', '--size', '64x64', '--dynamic') == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'acts.json', 'encode.onnx', 'finish.onnx', 'mine.onnx', 'step.onnx']
    assert (tmp_path / 'encode.onnx').stat().st_ino != before  # another file, not written over
    assert (tmp_path / 'encode.onnx').read_text() == 'encode True'
    assert (tmp_path / 'mine.onnx').read_text() == 'mine'


def test_a_list_is_a_table_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv('COLUMNS', '120')
    assert run(tmp_path / 'none', 'dip', '--list') == 0  # of untrained weights: there are none
    said = capsys.readouterr().out
    for word in ('step_16', 'step_4', 'upsample_8', 'features_a', '1 x 256 x 120 x 160',
                 'fine_flow', 'float32'):
        assert word in said
    assert run(tmp_path / 'none', 'hd3_compact', '--list', '--dynamic') == 0
    said = capsys.readouterr().out
    assert 'cues' in said and '1 x 3 x 64*h x 64*w' in said
    assert not (tmp_path / 'none').exists()


def test_a_real_act_is_written_and_checked(tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """With all but the last act left out, which is the quickest."""
    from flow_ros.runtimes import acts
    real = acts.record_acts
    monkeypatch.setattr(acts, 'record_acts', lambda *args, **more: real(*args, **more)[-1:])
    assert run(tmp_path, 'dip_rt', '--size', '64x64') == 0
    model = onnx.load(tmp_path / 'finish.onnx')
    assert [value.name for value in model.graph.output] == ['full_flow', 'confidence',
                                                            'occlusion']


@pytest.mark.usefixtures('quick')
@pytest.mark.parametrize(('arguments', 'message'), [
    (['raft'], "unknown network 'raft'; known are dip_rt, dip, hd3, mscsl"),
    (['dip'], "no weights for 'dip'"),
    (['dip_rt', '--weights', 'no.safetensors'], 'no.safetensors does not exist'),
    (['dip_rt', '--size', '640'], "size '640': expected WIDTHxHEIGHT"),
    (['dip_rt', '--size', '640x-480'], "size '640x-480': expected WIDTHxHEIGHT"),
    (['dip_rt', '--dynamic', '320x240'], '--dynamic takes no sizes, or two: MIN MAX'),
    (['dip_rt', '--dynamic', '320x240', 'big'], "size 'big': expected WIDTHxHEIGHT"),
    (['dip_rt', '--dynamic', '800x600', '900x700'], 'minimum <= optimum <= maximum on both'),
    (['mscsl', '--size', '64x64', '--dynamic', '64x64', '100x100'], 'at least 128x128'),
])
def test_what_cannot_be_done_is_one_line(arguments: list[str], message: str, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / 'out', *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith('flow_ros export: error: ') and message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.usefixtures('quick')
def test_a_folder_that_cannot_be_written(tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'file').write_text('a file')
    assert run(tmp_path / 'file' / 'out', 'dip_rt') == 2
    error = capsys.readouterr().err
    assert 'file/out cannot be written: Not a directory; choose another folder' in error


@pytest.mark.usefixtures('quick')
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, 'dip_rt', '--size', '64x64') == 0
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if b'step' in data:
            write(self, data[:3])
            raise OSError(28, 'No space left on device')
        return write(self, data)

    monkeypatch.setattr(Path, 'write_bytes', full)
    assert run(tmp_path, 'dip_rt', '--size', '64x64') == 2
    assert 'cannot be written: No space left on device; choose' in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_a_fault_of_the_export_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    def refused(network: object, act: object, *, dynamic: bool) -> bytes:
        raise ExportError('encode: opset 20 instead of 18')

    monkeypatch.setattr(export, 'export_act', refused)
    assert run(tmp_path, 'dip_rt', '--size', '64x64') == 2
    assert capsys.readouterr().err == (
        'flow_ros export: error: encode: opset 20 instead of 18\n')


@pytest.mark.usefixtures('quick')
def test_a_file_that_reads_back_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Path, 'read_bytes', lambda self: b'other')
    assert run(tmp_path, 'dip_rt', '--size', '64x64') == 2
    assert 'does not hold what was written: check the disk' in capsys.readouterr().err
