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

"""``flow_ros finetune`` on real folders, videos and bags."""

import argparse
from dataclasses import replace
from pathlib import Path
import resource

import cv2
import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import get_typestore, Stores
import torch

from flow_ros.cli import finetune
from flow_ros.cli.main import main
from flow_ros.flow_io import write_flow, write_image
from flow_ros.networks import create, save
from flow_ros.training.recipe import read_recipe, recipe_text, Stage

COUNT = 11


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def frame(index: int) -> np.ndarray:
    """Return an RGB frame of a picture that moves by (-2, 0) px."""
    picture = cv2.resize(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8),
                         (240, 200), interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(picture[40:104, 60 + 2 * index:140 + 2 * index])


def write_folder(folder: Path, count: int = COUNT) -> Path:
    folder.mkdir()
    for index in range(count):
        cv2.imwrite(str(folder / f'{index:03d}.png'), frame(index)[..., ::-1])
    return folder


def write_bag(path: Path) -> Path:
    store = get_typestore(Stores.ROS2_HUMBLE)
    header, time = store.types['std_msgs/msg/Header'], store.types['builtin_interfaces/msg/Time']
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as bag:
        kind = 'sensor_msgs/msg/Image'
        connection = bag.add_connection('/camera/image_raw', kind, typestore=store)
        for index in range(COUNT):
            message = store.types[kind](
                header=header(stamp=time(sec=1000, nanosec=index * 50_000_000), frame_id='cam'),
                height=64, width=80, encoding='rgb8', is_bigendian=0, step=240,
                data=frame(index).ravel())
            bag.write(connection, index, store.serialize_cdr(message, kind))
    return path


def test_a_bag_gives_weights_and_a_report(tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    bag = write_bag(tmp_path / 'my_bag')
    out = tmp_path / 'tuned'
    assert main(['finetune', '--bag', str(bag), '--topic', '/camera/image_raw', '--out', str(out),
                 '--steps', '1', '--device', 'cpu']) == 0
    told = capsys.readouterr().out
    assert f'{COUNT} frames of 80x64 px' in told
    assert 'fine-tuning ' in told
    assert str(out / 'report.md') in told
    assert '/camera/image_raw' in (out / 'report.md').read_text()
    create('dip_rt', out / 'weights.safetensors')  # raises if they are not its weights
    # The same weights cannot be the beginning and the end.
    assert main(['finetune', '--bag', str(bag), '--out', str(out), '--weights',
                 str(out / 'weights.safetensors')]) == 2
    assert 'would be overwritten' in capsys.readouterr().err


def test_a_video_with_minutes_and_a_size(tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'video.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'MJPG'), 20.0, (80, 64))
    for index in range(COUNT):
        writer.write(np.ascontiguousarray(frame(index)[..., ::-1]))
    writer.release()
    assert main(['finetune', '--source', str(path), '--size', '96x64', '--minutes', '0.01',
                 '--out', str(tmp_path / 'out'), '--device', 'cpu']) == 0
    assert f'{COUNT} frames of 96x64 px' in capsys.readouterr().out
    assert (tmp_path / 'out' / 'report.json').is_file()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(['finetune', *arguments]) == 2
    return capsys.readouterr().err


def test_recordings_that_cannot_be_used(tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    out = ['--out', str(tmp_path / 'out'), '--steps', '1', '--device', 'cpu']
    (tmp_path / 'empty').mkdir()
    assert 'no images in it' in refused(['--source', str(tmp_path / 'empty'), *out], capsys)
    assert 'no such file' in refused(['--bag', str(tmp_path / 'nowhere'), *out], capsys)
    one = write_folder(tmp_path / 'one', 1)
    assert '1 frames over 0.0 s hold 0 pairs' in refused(['--source', str(one), *out], capsys)
    bag = write_bag(tmp_path / 'bag')
    assert '/camera/image_raw' in refused(['--bag', str(bag), '--topic', '/up', *out], capsys)
    mixed = write_folder(tmp_path / 'mixed')
    cv2.imwrite(str(mixed / '003.png'), np.zeros((100, 120, 3), dtype=np.uint8))
    assert '--size 80x64' in refused(['--source', str(mixed), *out], capsys)
    assert not (tmp_path / 'out' / 'weights.safetensors').exists()


def test_truncated_images_are_left_out_with_the_pairs_about_them(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / 'frames', 13)
    for index in (4, 5, 6, 7):
        path = folder / f'{index:03d}.png'
        path.write_bytes(path.read_bytes()[:40])
    assert '9 frames over 1.2 s hold 7 pairs' in refused(
        ['--source', str(folder), '--out', str(tmp_path / 'out'), '--steps', '1'], capsys)


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--source', 'x', '--minutes', '0'], '--minutes must be more than 0'),
    (['--source', 'x', '--steps', '0'], '--steps must be at least 1'),
    (['--source', 'x', '--topic', '/a'], '--topic is for --bag'),
    (['--source', 'webcam:0'], 'record a webcam first'),
    (['--source', 'x', '--network', 'raft'], 'unknown network'),
    (['--source', 'x', '--weights', 'none.safetensors'], 'does not exist'),
    (['--data', 'kitti2015'], 'expected NAME:ROOT'),
    (['--data', 'kitti2015:/nowhere'], 'is no folder'),
    (['--recipe', 'none.yaml'], 'none.yaml'),
])
def test_options_that_make_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                    arguments: list[str], message: str) -> None:
    assert message in refused([*arguments, '--out', str(tmp_path / 'out')], capsys)


def test_a_network_that_cannot_learn_without_labels_is_told_before_the_work(
        tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('FLOW_ROS_MODELS', str(tmp_path))
    save(create('hd3', encoder='vgg', context=False, decoder_width=8),
         tmp_path / 'small.safetensors')
    said = refused(['--source', 'x', '--network', 'small', '--out', str(tmp_path / 'out')], capsys)
    assert '--network small: hd3 cannot learn without labels' in said and '--data' in said


def test_a_file_is_no_folder_to_write_into(tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'file').write_text('')
    assert '--out' in refused(['--source', 'x', '--out', str(tmp_path / 'file')], capsys)


def test_a_full_disk_is_one_clear_error(tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / 'frames')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow larger
    try:
        told = refused(['--source', str(folder), '--out', str(tmp_path / 'out'), '--steps', '1',
                        '--device', 'cpu'], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f'{tmp_path / "out"} cannot be written' in told
    assert 'make room' in told
    assert not list((tmp_path / 'out').iterdir())


@pytest.fixture
def small_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command make its recipe for labelled data at a size for tests."""
    gentle = finetune._gentle_recipe

    def small(options: argparse.Namespace) -> str:
        (tmp_path / 'gentle.yaml').write_text(gentle(options))
        recipe = read_recipe(tmp_path / 'gentle.yaml')
        return recipe_text(replace(
            recipe, workers=0, stages=(Stage(1.0, 2, (72, 88), (64, 80)),),
            world=replace(recipe.world, surfaces=3, bank_objects=4, largest_motion_px=8.0),
            validation=replace(recipe.validation, pairs=0)))

    monkeypatch.setattr(finetune, '_gentle_recipe', small)


@pytest.mark.usefixtures('small_recipe')
def test_labelled_data_goes_to_the_trainer(tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    # A folder that is no KITTI: the trainer's reader says what it expected.
    (tmp_path / 'wrong').mkdir()
    told = refused(['--data', f'kitti2015:{tmp_path / "wrong"}', '--out', str(tmp_path / 'out'),
                    '--steps', '1', '--device', 'cpu'], capsys)
    assert 'kitti' in told.lower()
    recipe = (tmp_path / 'out' / 'recipe.yaml').read_text()
    assert 'kitti2015' in recipe
    assert 'procedural' in recipe


@pytest.mark.usefixtures('small_recipe')
def test_labelled_data_are_trained_on_from_the_given_weights(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = tmp_path / 'kitti' / 'training'
    for name in ('image_2', 'flow_occ', 'flow_noc'):
        (training / name).mkdir(parents=True)
    for time in (10, 11):
        write_image(training / 'image_2' / f'000000_{time}.png', frame(time))
    flow = np.tile(np.float32([-2, 0]), (64, 80, 1))
    for name in ('flow_occ', 'flow_noc'):
        write_flow(training / name / '000000_10.png', flow)
    out = tmp_path / 'out'
    assert main(['finetune', '--data', f'kitti2015:{training.parent}', '--out', str(out),
                 '--steps', '2', '--device', 'cpu', '--threads', '1']) == 0
    assert str(out / 'weights.safetensors') in capsys.readouterr().out
    before = create('dip_rt', 'default').state_dict()
    after = create('dip_rt', out / 'weights.safetensors').state_dict()
    steps = [float((after[key] - value).abs().max()) for key, value in before.items()
             if key.endswith('weight')]
    assert 0 < max(steps) < 0.01  # from those weights, and gently
