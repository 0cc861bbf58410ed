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

"""flow_ros bench: single runs and the report, with real networks at tiny sizes."""

import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import cv2
import pytest
import torch

from flow_ros.cli.main import main

RESULT = {'network', 'runtime', 'size', 'iterations', 'warm', 'fps', 'ms_p50', 'ms_p99', 'peak_mb'}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')


def bench(*words):
    return main(['bench', *map(str, words)])


def test_a_single_run(tmp_path, capsys):
    path = tmp_path / 'numbers.json'
    assert bench('--network', 'dip_rt', '--runtime', 'torch', '--size', '96x64', '--iterations',
                 '2', '--frames', '4', '--threads', '1', '--source', 'synthetic', '--json',
                 path) == 0
    shown = capsys.readouterr().out
    assert 'dip_rt, torch f32 on ' in shown and '96x64, 2 iterations per level, warm: ' in shown
    assert ' ms (10 to 90 %: ' in shown and 'median ms per act over 4 frames, ' in shown
    content = json.loads(path.read_text())
    assert set(content) == {'machine', 'versions', 'command', 'results'}
    row, = content['results']
    assert RESULT <= set(row)
    assert (row['network'], row['runtime'], row['size'], row['iterations'], row['warm']) == (
        'dip_rt', 'torch', '96x64', 2, True)
    assert row['ms_p50'] <= row['ms_p99'] and row['fps'] > 0 and row['peak_mb'] > 0
    assert content['machine']['cores'] >= 1 and content['versions']['torch']
    assert content['command'] == (
        'flow_ros bench --network dip_rt --runtime torch --size 96x64 --iterations 2 --source '
        'synthetic --json numbers.json --frames 4 --threads 1')
    assert str(tmp_path) not in path.read_text()


def test_a_folder_and_a_video_are_sources(folder, tmp_path, capsys, monkeypatch):
    video = tmp_path / 'drive.avi'
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*'MJPG'), 10.0, (120, 96))
    for path in sorted(folder.iterdir()):
        writer.write(cv2.imread(str(path)))
    writer.release()
    monkeypatch.chdir(tmp_path)  # relative to where the command is given
    for source, more, size in (('drive', [], '120x96'), ('drive.avi', ['--size', '96x64'],
                                                         '96x64')):
        assert bench('--source', source, *more, '--runtime', 'torch', '--frames', '3',
                     '--threads', '1', '--cold', '--json', 'numbers.json') == 0
        row, = json.loads(Path('numbers.json').read_text())['results']
        assert (row['source'], row['size'], row['network']) == (source, size, 'dip_rt')
        assert (row['warm'], row['cold'], row['frames']) == (False, 3, 3)


def test_a_budget_of_time(tmp_path, capsys):
    path = tmp_path / 'numbers.json'
    assert bench('--network', 'dip_rt', '--runtime', 'torch', '--size', '96x64', '--latency-ms',
                 '500', '--frames', '3', '--threads', '1', '--json', path) == 0
    assert '96x64, 500 ms asked' in capsys.readouterr().out
    row, = json.loads(path.read_text())['results']
    assert row['latency_ms'] == 500.0 and row['iterations'] is None and row['steps'] >= 1


@pytest.mark.parametrize(('words', 'said'), [
    (['--network', 'fast'], "--network: unknown network 'fast'; known are dip_rt"),
    (['--source', 'no/such/video.mp4'], '--source: no/such/video.mp4: no such file or folder'),
    (['--size', '96x64', '--only', 'time'],
     '--size is for one network and --only for the report: give one of them'),
    (['--json', 'no/such/folder/a.json'], 'its folder does not exist'),
    (['--runtimes', 'warp'], "--runtimes: unknown runtime 'warp'; expected some of torch"),
    (['--networks', 'fast,dip_rt'], "--networks: unknown network 'fast'; known are dip_rt"),
    (['--data', 'nowhere'], '--data nowhere: expected a folder of pairs; seen nothing'),
    (['--redraw', '--out', 'nowhere'], 'nowhere: no results there; measure first'),
    (['--readme', '--quick'], '--redraw and --readme measure nothing: leave --quick away'),
])
def test_refusals(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench(*words) == 2
    assert said in ' '.join(capsys.readouterr().err.split())


@pytest.mark.parametrize(('words', 'said'), [
    (['--runtime', 'warp'], "invalid choice: 'warp'"),
    (['--size', '640'], "size '640': expected WIDTHxHEIGHT in px"),
    (['--iterations', '0'], "expected a whole number from 1 on; seen '0'"),
    (['--latency-ms', 'soon'], "expected a number above 0; seen 'soon'"),
    (['--only', 'time,weather'], "unknown part 'weather'; expected some of accuracy, time"),
    (['--networks', ','], "expected names with commas between; seen ','"),
])
def test_usage(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        bench(*words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_runtime_that_is_not_here(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip('a GPU is there')
    assert bench('--runtime', 'tensorrt', '--size', '96x64') == 2
    error = capsys.readouterr().err
    assert 'flow_ros bench: error: --runtime tensorrt: ' in error and 'Traceback' not in error


def test_the_report(tmp_path, capsys):
    """All that is in it, from small numbers of real measurements; then tables and README anew."""
    pytest.importorskip('matplotlib')
    out = tmp_path / 'results'
    words = ['--quick', '--networks', 'dip_rt', '--runtimes', 'torch,tensorrt', '--sizes',
             '96x64', '--only', 'accuracy,time', '--threads', '1', '--precision', 'f32']
    assert bench(*words, '--out', out) == 0
    shown = capsys.readouterr()
    assert 'GPU: ' in shown.err and 'time 2/' in shown.err
    assert sorted(path.name for path in out.iterdir()) == [
        'accuracy.json', 'accuracy.png', 'report.md', 'time.json', 'time.png']
    for name in ('accuracy.png', 'time.png'):
        assert (out / name).read_bytes().startswith(b'\x89PNG\r\n\x1a\n')
    accuracy = json.loads((out / 'accuracy.json').read_text())
    assert accuracy['pairs'] == 3 and accuracy['data'] == 'procedural pairs'
    assert [(row['network'], row['iterations']) for row in accuracy['results']] == [
        ('dis_ultrafast', None), ('dis_fast', None), ('dis_medium', None), ('dip_rt', 1),
        ('dip_rt', 2)]
    times = json.loads((out / 'time.json').read_text())
    assert {row['size'] for row in times['results']} == {'96x64'}
    assert all(RESULT <= set(row) for row in times['results'])
    # What this machine does not have is a line, not the end.
    left_out = {each['what']: each['why'] for each in times['left_out']}
    if 'dip_rt, tensorrt f32, 96x64' in left_out:
        assert 'tensorrt' in left_out['dip_rt, tensorrt f32, 96x64']
    text = (out / 'report.md').read_text()
    assert '| dip_rt | torch f32 | 1 iterations per level |' in text
    assert text in shown.out

    (out / 'report.md').unlink()
    (out / 'time.png').unlink()
    readme = tmp_path / 'README.md'
    readme.write_text('# a\n<!-- speed -->\nold\n<!-- /speed -->\n')
    assert bench('--redraw', '--out', out) == 0
    assert (out / 'report.md').read_text() == text and (out / 'time.png').is_file()
    assert bench('--readme', readme, '--out', out) == 2
    assert 'no times at 640x480 there' in capsys.readouterr().err
    # As if it had been measured, which would take longer.
    (out / 'time.json').write_text(json.dumps(times).replace('96x64', '640x480'))
    assert bench('--readme', readme, '--out', out) == 0
    assert '| dip_rt | torch f32 | ' in readme.read_text() and 'old' not in readme.read_text()
    readme.write_text('nothing')
    assert bench('--readme', readme, '--out', out) == 2
    assert 'has no section between <!-- speed --> and' in capsys.readouterr().err


def test_without_matplotlib_there_are_tables_and_a_message(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    out = tmp_path / 'results'
    out.mkdir()
    row = {'network': 'dip_rt', 'runtime': 'torch', 'precision': 'f32', 'size': '640x480',
           'ms_p50': 50.0, 'ms_p99': 60.0, 'fps': 20.0, 'peak_mb': 80.0, 'stream_mb': 70.0,
           'frames': 40}
    machine = {'cpu': 'a CPU', 'cores': 2, 'governor': '', 'gpu': '', 'system': '',
               'load_1min': 0.0}
    (out / 'time.json').write_text(json.dumps({
        'part': 'time', 'results': [row], 'left_out': [], 'seconds': 1.0, 'machine': machine,
        'versions': {}, 'command': 'flow_ros bench'}))
    assert bench('--redraw', '--out', out) == 0
    shown = capsys.readouterr()
    assert 'no plots: the Python package' in shown.err and 'pip install' in shown.err
    assert '| dip_rt | torch f32 | 50.0 (60.0) |' in shown.out
    assert not list(out.glob('*.png'))


@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_ctrl_c_leaves_what_is_done(tmp_path):
    out = tmp_path / 'results'
    code = ('import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); '
            'from flow_ros.cli.main import main; sys.exit(main(sys.argv[1:]))')
    process = subprocess.Popen(
        [sys.executable, '-c', code, 'bench', '--networks', 'dip_rt', '--runtimes', 'torch',
         '--only', 'time', '--sizes', '96x64,128x96,160x120', '--threads', '1', '--out',
         str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (out / 'time.json').is_file() and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert 'ended by Ctrl-C: the report is of what was done' in errors
    assert '| OpenCV DIS medium |' in shown
    content = json.loads((out / 'time.json').read_text())
    assert content['results'] and (out / 'report.md').is_file()
