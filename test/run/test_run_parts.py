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

"""The parts of `flow_ros run` alone: matching, recording, status, environment, processes."""

import argparse
from pathlib import Path
import sys
import time

import cv2
import numpy as np
import pytest

from flow_ros.cli import CommandError
from flow_ros.cli import run as command
from flow_ros.environment import complete
from flow_ros.nodes.live_window import open_window
from flow_ros.nodes.preview_node import Matcher, Recorder
from flow_ros.nodes.status import Status


def row(level: int) -> np.ndarray:
    return np.full((48, 256, 3), level, dtype=np.uint8)


def test_matcher_gathers_by_stamp_and_forgets_the_oldest() -> None:
    matcher = Matcher(keep=3)
    matcher.add((1, 0), 'image', 'a')
    assert matcher.add((1, 0), 'info', 'b') == {'image': 'a', 'info': 'b'}
    for second in (2, 3, 4):
        matcher.add((second, 0), 'image', second)
    assert matcher.after((2, 0), 'image') == (3, 0)
    assert matcher.after((4, 0), 'image') is None
    assert matcher.add((1, 0), 'info', 'c') == {'info': 'c'}  # its image was forgotten


def test_matcher_hands_out_in_order_what_is_older() -> None:
    matcher = Matcher()
    for second in (3, 1, 2):
        matcher.add((second, 5), 'info', second)
    matcher.add((0, 5), 'image', 0)
    assert matcher.take_before((3, 5), 'info') == [{'info': 1}, {'info': 2}]
    assert matcher.take_before((3, 5), 'info') == []


@pytest.mark.parametrize('count', [1, 5, 40])
def test_recorder_leaves_a_video_and_a_picture(tmp_path: Path, count: int) -> None:
    recorder = Recorder(tmp_path / 'out')
    for index in range(count):
        recorder.add(row(10 + 5 * index), seconds=0.1)
    picture, video = recorder.close()
    assert (picture.name, video.name) == ('preview.png', 'preview.mp4')
    capture = cv2.VideoCapture(str(video))
    frames = [frame for good, frame in iter(capture.read, (False, None)) if good]
    assert len(frames) == count
    assert frames[0].shape == (48, 256, 3)
    assert abs(float(frames[-1].mean()) - (10 + 5 * (count - 1))) < 4
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10.0)
    image = cv2.imread(str(picture))
    assert image.shape[1] == 256
    assert image.shape[0] == 48 * min(3, max(1, count - 1))
    levels = image[::48, 0, 0].astype(int)
    assert (np.diff(levels) > 0).all()  # moments in their order


def test_recorder_without_a_row_leaves_nothing(tmp_path: Path) -> None:
    assert Recorder(tmp_path).close() == ()
    assert not list(tmp_path.iterdir())


def test_recorder_survives_a_change_of_size(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for index in range(20):
        recorder.add(row(99) if index < 10 else np.zeros((60, 256, 3), np.uint8), seconds=0.1)
    assert len(recorder.close()) == 2


def test_status_goes_through_a_line() -> None:
    status = Status(frames_in=9, flow_out=7, warm=True, endpoint_error_px=1.25, saved=('a.png',))
    assert Status.from_json(status.to_json()) == status
    assert 'error 1.25 px' in str(status)
    assert 'warm' in str(status)
    assert 'error' not in str(Status())
    assert 'latency 80 ms of 100, 3 over' in str(Status(latency_ms=80.0, budget_ms=100.0,
                                                        overruns=3))


@pytest.mark.parametrize('line', ['', '[INFO] [preview]: no live view', '{"frames_in": 1}', '7'])
def test_other_lines_are_no_status(line: str) -> None:
    assert Status.from_json(line) is None


def test_no_display_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('DISPLAY', raising=False)
    assert open_window('test') == (None, 'no display')
    monkeypatch.setenv('DISPLAY', ':9876')  # none there
    window, reason = open_window('test')
    assert window is None
    assert reason


def test_what_the_user_has_set_is_kept() -> None:
    made = command.make_environment({})
    assert 1 <= int(made['ROS_DOMAIN_ID']) <= 100
    assert made['ROS_AUTOMATIC_DISCOVERY_RANGE'] == 'LOCALHOST'
    assert Path(made['FASTDDS_DEFAULT_PROFILES_FILE']).name == 'fastdds.xml'
    mine = {'ROS_DOMAIN_ID': '42', 'ROS_AUTOMATIC_DISCOVERY_RANGE': 'SUBNET',
            'FASTDDS_DEFAULT_PROFILES_FILE': 'mine.xml', 'AMENT_PREFIX_PATH': '/opt/ros/jazzy'}
    assert mine.items() <= command.make_environment(mine).items()


def test_warnings_look_the_same_whatever_the_user_has_set() -> None:
    mine = {'RCUTILS_COLORIZED_OUTPUT': '1', 'RCUTILS_CONSOLE_OUTPUT_FORMAT': '{message}'}
    made = command.make_environment(mine)
    assert made['RCUTILS_COLORIZED_OUTPUT'] == '0'
    assert made['RCUTILS_CONSOLE_OUTPUT_FORMAT'].startswith('[{severity}] ')


def test_ament_prefix_is_that_of_the_wheels(tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'prefix', str(tmp_path))
    environment: dict[str, str] = {}
    assert not complete(environment)  # no wheels there
    (tmp_path / 'share' / 'ament_index').mkdir(parents=True)
    assert complete(environment)
    assert environment == {'AMENT_PREFIX_PATH': str(tmp_path)}


def make_stage(tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> command.Stage:
    """Return a stage whose source is a small program; it takes ROS arguments, and ignores them."""
    (tmp_path / 'log').mkdir()
    (tmp_path / 'small_program.py').write_text(code)
    monkeypatch.setitem(command.NODES, 'source', 'small_program')
    return command.Stage(out=tmp_path, screen=command.Screen(),
                         environment={'PYTHONPATH': str(tmp_path), 'PYTHONUNBUFFERED': '1'})


def test_a_node_that_dies_is_told_with_its_last_words(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make_stage(tmp_path, 'print("the lens fell off")\nraise SystemExit(3)\n', monkeypatch)
    stage.start('source', {'source': 'x'}, [])
    trouble = stage.watch(duration_s=0.0)
    stage.end()
    assert 'source node ended by itself with exit code 3' in trouble
    assert 'the lens fell off' in trouble
    assert (tmp_path / 'log' / 'source.log').read_text() == 'the lens fell off\n'


def test_a_node_that_will_not_end_is_ended(tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    code = ('import signal, time\nfor number in (signal.SIGINT, signal.SIGTERM):\n'
            '    signal.signal(number, signal.SIG_IGN)\nprint("deaf")\ntime.sleep(60)\n')
    stage = make_stage(tmp_path, code, monkeypatch)
    stage.start('source', {}, [])
    child = stage._children['source']
    while 'deaf' not in child.last_lines:
        time.sleep(0.05)
    begin = time.monotonic()
    child.ask_to_end()
    child.end(patience_s=0.3)
    assert child.exit_code() == -9
    assert time.monotonic() - begin < 10.0


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(['run', *arguments])


@pytest.mark.parametrize(('arguments', 'words'), [
    (['--duration', '-1'], 'duration'), (['--params-file', 'nowhere.yaml'], 'no such parameters'),
    (['--budget', 'soon'], "budget is 'soon'; expected one of iterations, latency, rate"),
    (['--latency-ms', '-3'], r'latency_ms is -3\.0; expected 1 to 60000'),
    (['--scale', '2'], r'scale is 2\.0; expected 0\.05 to 1'),
    (['--roi', 'left'], "roi: .*WIDTHxHEIGHT.*'left'")])
def test_wrong_options_are_refused_before_anything_starts(arguments: list[str],
                                                          words: str) -> None:
    with pytest.raises(CommandError, match=words):
        command.run(parsed(*arguments))


def test_budget_and_view_reach_the_flow_node(tmp_path: Path) -> None:
    flow = command.node_parameters(parsed(
        '--latency-ms', '50', '--iterations', '4', '--scale', '0.5', '--roi', '64x48+8+0'),
        tmp_path)['flow']
    assert flow == {'max_gap_s': command.PATIENT_GAP_S, 'budget': 'latency', 'latency_ms': 50.0,
                    'iterations': 4, 'scale': 0.5, 'roi': '64x48+8+0'}
    rate = command.node_parameters(parsed('--budget', 'rate'), tmp_path)['flow']
    assert rate['budget'] == 'rate' and 'latency_ms' not in rate
