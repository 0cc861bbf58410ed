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

from pathlib import Path

import pytest
import torch

from flow_ros.cli.main import main
from flow_ros.flow_io import read_image
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
                 '--device', 'cpu', '--minutes']
    assert main([*arguments, '0.001']) == 0
    first = capsys.readouterr().out
    assert str(tmp_path / 'run' / 'weights.safetensors') in first
    assert create('dip_rt', tmp_path / 'run' / 'weights.safetensors').name == 'dip_rt'
    assert main([*arguments, '0.1']) == 0
    second = capsys.readouterr().out
    assert int(second.split()[0]) > int(first.split()[0])  # steps, over both sessions


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
    assert 'none.yaml' in capsys.readouterr().err
    (tmp_path / 'bad.yaml').write_text('minuets: 3')
    assert main(['train', '--recipe', str(tmp_path / 'bad.yaml')]) == 2
    assert 'unknown fields minuets' in capsys.readouterr().err


def test_what_cannot_be_trained_is_one_clear_error(
        tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ['train', '--recipe', str(recipe), '--out', str(tmp_path / 'run')]
    assert main([*arguments, '--device', 'gpu']) == 2
    assert '--device gpu' in capsys.readouterr().err
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
