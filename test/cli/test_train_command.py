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

"""``flow_ros train`` and ``flow_ros show-data``, as they are typed."""

import json
from pathlib import Path
import sys

import numpy as np
import pytest
import torch

from flow_ros.cli.main import main
from flow_ros.flow_io import read_image, write_flow, write_image
from flow_ros.networks import create

torch.set_num_threads(1)
RECIPE = """
network: dip_rt
minutes: 60
validation: {pairs: 0}
world: {surfaces: 3, bank_objects: 4, largest_motion_px: 8, objects: [1, 2]}
stages:
  - {until: 1.0, batch: 2, render: [72, 88], crop: [64, 80]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / 'recipe.yaml'
    path.write_text(RECIPE)
    return path


def test_train_ends_in_its_minutes_and_goes_on_from_there(
        tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ['train', '--recipe', str(recipe), '--out', str(tmp_path / 'run'),
                 '--device', 'cpu']
    assert main([*arguments, '--minutes', '0.001', '--threads', '1']) == 0
    first = capsys.readouterr().out
    assert str(tmp_path / 'run' / 'weights.safetensors') in first
    assert create('dip_rt', tmp_path / 'run' / 'weights.safetensors').name == 'dip_rt'
    steps = int(first.split()[0]) + 1  # over both sessions
    assert main([*arguments, '--steps', str(steps)]) == 0
    told = capsys.readouterr()
    assert int(told.out.split()[0]) == steps
    assert 'the recipe has changed since (minutes, steps)' in told.err


def test_training_on_data_sets_beside_the_world(tmp_path: Path, recipe: Path) -> None:
    """Dense pairs like FlyingChairs, sparse ones like KITTI, and the world, in two parts."""
    random = np.random.default_rng(0)

    def put_pair(frame1: Path, frame2: Path, truth: Path, share: float) -> None:
        image = random.integers(0, 256, (72, 88, 3), dtype=np.uint8)
        for path, shift in ((frame1, 0), (frame2, 2), (truth, 0)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path is not truth:
                write_image(path, np.roll(image, shift, axis=1))
        known = random.random((72, 88)) < share
        flow = np.full((72, 88, 2), (2, 0), np.float32)
        flow[~known] = np.nan
        write_flow(truth, flow)

    for number in ('00001', '00002', '00003'):
        stem = str(tmp_path / 'Chairs' / 'data' / number)
        put_pair(Path(f'{stem}_img1.ppm'), Path(f'{stem}_img2.ppm'), Path(f'{stem}_flow.flo'), 1)
    (tmp_path / 'Chairs' / 'FlyingChairs_train_val.txt').write_text('1\n1\n2\n')
    for number in ('000000', '000001'):
        folder = tmp_path / 'KITTI' / 'training'
        put_pair(folder / 'image_2' / f'{number}_10.png', folder / 'image_2' / f'{number}_11.png',
                 folder / 'flow_occ' / f'{number}_10.png', 0.2)
    recipe.write_text(RECIPE.replace('minutes: 60', 'steps: 8').replace('{pairs: 0}', """
  pairs: 0
  data: [{name: chairs, root: Chairs, split: val}, {name: kitti2015, root: KITTI}]
""") + """
workers: 0
log_every: 1
warm: 0.5
data:
  - {name: procedural}
  - {name: chairs, root: Chairs, augment: {erase_px: [5, 10]}}
  - {name: kitti2015, root: KITTI, ratio: 2, augment: {spatial: 0.0, erase: 0.0}}
""")
    out = tmp_path / 'run'
    arguments = ['train', '--recipe', str(recipe), '--out', str(out), '--device', 'cpu',
                 '--data-root', str(tmp_path), '--accumulate', '2']
    assert main(arguments) == 0
    lines = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    steps, measured = lines[:-1], lines[-1]['validation']
    assert [line['step'] for line in steps] == list(range(1, 9))
    assert all(line['skipped'] == 0 and line['epe'] > 0 for line in steps)
    assert {'loss_occlusion' in line for line in steps} == {True, False}  # the world knows it
    assert measured.keys() == {f'{name}/cold/{measure}' for name in ('chairs', 'kitti2015')
                               for measure in ('epe', 'fl_all', 'outliers_1px')}
    assert create('dip_rt', out / 'weights.safetensors').name == 'dip_rt'


def test_training_needs_lightning_fabric_and_tensorboard_not(
        tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ['train', '--recipe', str(recipe), '--out', str(tmp_path / 'run'),
                 '--device', 'cpu', '--steps', '1']
    for name in ('tensorboard', 'torch.utils.tensorboard'):
        monkeypatch.setitem(sys.modules, name, None)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, 'lightning_fabric', None)
        assert main(arguments) == 2
    error, = capsys.readouterr().err.splitlines()
    assert 'pip install lightning_fabric' in error
    assert not (tmp_path / 'run').exists()
    assert main(arguments) == 0
    assert 'no TensorBoard curves and pictures (pip install tensorboard)' in \
        capsys.readouterr().err
    assert (tmp_path / 'run' / 'weights.safetensors').is_file()


def test_training_begins_with_given_weights(tmp_path: Path, recipe: Path) -> None:
    arguments = ['train', '--recipe', str(recipe), '--device', 'cpu', '--minutes', '0.001']
    assert main([*arguments, '--out', str(tmp_path / 'one')]) == 0
    weights = tmp_path / 'one' / 'weights.safetensors'
    assert main([*arguments, '--out', str(tmp_path / 'two'), '--weights', str(weights)]) == 0
    begun, fresh = (create('dip_rt', tmp_path / name / 'weights.safetensors').state_dict()
                    for name in ('two', 'one'))
    apart = max(float((begun[key] - fresh[key]).abs().max()) for key in fresh
                if key.endswith('conv1.0.weight'))
    assert 0 < apart < 0.02  # one step away, not another network


def test_an_unreadable_recipe_is_one_clear_error(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['train', '--recipe', str(tmp_path / 'none.yaml')]) == 2
    assert 'none.yaml is no file: expected a recipe' in capsys.readouterr().err
    (tmp_path / 'bad.yaml').write_text('minuets: 3')
    assert main(['train', '--recipe', str(tmp_path / 'bad.yaml')]) == 2
    assert 'unknown fields minuets' in capsys.readouterr().err


def test_what_cannot_be_trained_is_one_clear_error(
        tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ['train', '--recipe', str(recipe), '--out', str(tmp_path / 'run')]
    assert main([*arguments, '--device', 'gpu']) == 2
    assert '--device gpu' in capsys.readouterr().err
    assert main([*arguments, '--threads', '0']) == 2
    assert '--threads must be at least 1; seen 0' in capsys.readouterr().err
    recipe.write_text(RECIPE.replace('dip_rt', 'raft'))
    assert main([*arguments, '--device', 'cpu']) == 2
    assert "unknown network 'raft'" in capsys.readouterr().err
    recipe.write_text(RECIPE)
    assert main([*arguments, '--device', 'cpu', '--accumulate', '3']) == 2
    assert 'a batch of 2 cannot be worked off in 3 equal parts' in capsys.readouterr().err
    recipe.write_text(RECIPE + 'data: [{name: sintel, root: Sintel}]')
    assert main([*arguments, '--device', 'cpu', '--data-root', str(tmp_path)]) == 2
    assert str(tmp_path / 'Sintel') in capsys.readouterr().err


def test_show_data_writes_a_page(tmp_path: Path, recipe: Path) -> None:
    page = tmp_path / 'page.png'
    assert main(['show-data', '--recipe', str(recipe), '--rows', '2', '--out', str(page)]) == 0
    picture = read_image(page)
    assert picture.shape[0] == 2 * 192
    assert picture.std() > 10


def test_show_data_says_what_cannot_be(tmp_path: Path, recipe: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ['show-data', '--recipe', str(recipe), '--rows', '1']
    assert main([*arguments, '--first', '-1']) == 2
    assert '--first must be at least 0; seen -1' in capsys.readouterr().err
    (tmp_path / 'file').write_text('')
    for out in ('file/page.png', 'page.nothing'):
        assert main([*arguments, '--out', str(tmp_path / out)]) == 2
        assert '--out' in capsys.readouterr().err
