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

"""`flow_ros run` as users run it: separate processes over real DDS, an untrained network."""

from collections.abc import Iterator
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch

from flow_ros.networks import create, save

SIZE = '128x96'
TOKEN = f'FLOW_ROS_TEST_TOKEN={os.getpid()}'


@pytest.fixture(name='weights', scope='module')
def make_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('weights') / 'untrained.safetensors'
    torch.manual_seed(0)
    save(create('dip_rt'), path)
    return path


@pytest.fixture(name='out')
def make_out(tmp_path: Path) -> Iterator[Path]:
    """Give a folder for the run, and see that no process outlives it."""
    yield tmp_path / 'out'
    deadline = time.monotonic() + 5.0
    while (left := survivors()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f'these processes outlived the run: {left}'


def survivors() -> list[str]:
    """Return the command lines of running processes that a run of this test has started."""
    found = []
    for process in Path('/proc').glob('[0-9]*'):
        try:
            if TOKEN.encode() in (process / 'environ').read_bytes().split(b'\0'):
                found.append((process / 'cmdline').read_bytes().replace(b'\0', b' ').decode())
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


def start(out: Path, *arguments: object) -> subprocess.Popen[str]:
    name, _, value = TOKEN.partition('=')
    environment = {**os.environ, name: value, 'ROS_DOMAIN_ID': str(1 + (os.getpid() + 25) % 100)}
    return subprocess.Popen(
        [sys.executable, '-m', 'flow_ros.cli.main', 'run', '--out', str(out), '--no-window',
         '--runtime', 'torch', *map(str, arguments)],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def previews(output: str) -> list[Path]:
    return [Path(path) for path in re.findall(r'^preview: (.+)$', output, re.MULTILINE)]


def test_synthetic_for_some_seconds(out: Path, weights: Path) -> None:
    # The consumer may be found some seconds after the others.
    run = start(out, '--weights', weights, '--duration', 8, '--size', SIZE)
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 0, output + errors
    assert 'Traceback' not in output + errors
    # the status line while it runs, with the consumer's answer and, the flow known, the error
    assert re.search(r'\d+ s \| in \d+ \| flow \d+ \| \d+\.\d frames/s \| latency \d+ ms \| '
                     r'dropped \d+ \| [1-9]\d* iterations (warm|cold) \| error \d+\.\d\d px \| '
                     r'lower centre: [+-]\d+ px/s right', output), output
    # and at the end
    last = re.search(r'^in (\d+) \| flow (\d+) .*\(dip_rt on torch\)$', output, re.MULTILINE)
    assert last is not None, output
    assert 5 <= int(last[2]) < int(last[1])
    picture, video = previews(output)
    assert cv2.imread(str(picture)).shape == (3 * 240, 4 * 320, 3)
    capture = cv2.VideoCapture(str(video))
    good, frame = capture.read()
    assert good
    assert frame.shape == (240, 4 * 320, 3)


def test_ctrl_c_ends_it_cleanly_and_leaves_a_preview(out: Path, weights: Path,
                                                     tmp_path: Path) -> None:
    folder = tmp_path / 'images'
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    for index in range(8):
        cv2.imwrite(str(folder / f'{index}.png'), noise[:, 2 * index:2 * index + 128])
    run = start(out, '--weights', weights, '--source', folder)
    assert run.stdout is not None
    seen = ''
    while ' s | in ' not in seen:
        line = run.stdout.readline()
        assert line, seen
        seen += line
    time.sleep(1.0)
    run.send_signal(signal.SIGINT)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 0, output + errors
    assert 'Traceback' not in output + errors
    assert 'error' not in seen  # no truth is known of a folder
    assert len(previews(output)) == 2
    for log in (out / 'log').glob('*.log'):
        assert 'Traceback' not in log.read_text(), log.read_text()


def test_an_unreadable_video_is_one_clear_error(out: Path, weights: Path,
                                                tmp_path: Path) -> None:
    video = tmp_path / 'broken.mp4'
    video.write_bytes(b'no video at all')
    run = start(out, '--weights', weights, '--source', video)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert 'the source node ended by itself' in errors
    assert 'no video that OpenCV can read (15 bytes)' in errors
    assert not previews(output)


def test_missing_weights_are_one_clear_error(out: Path, tmp_path: Path) -> None:
    run = start(out, '--weights', tmp_path / 'none.safetensors', '--size', SIZE)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert 'the flow node ended by itself' in errors
    assert 'none.safetensors' in errors
