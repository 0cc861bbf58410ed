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

"""Networks by name, and weights files good and bad."""

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
import torch

from flow_ros.networks import (
    create,
    default_weights_path,
    family_of,
    find_model,
    known_names,
    list_models,
    names,
    save,
    WeightsError,
)

torch.set_num_threads(1)


def test_the_default_comes_first() -> None:
    assert names()[0] == 'dip_rt'
    assert 'dip' in names()


def test_saved_weights_come_back_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = create('dip_rt')
    path = tmp_path / 'mine.safetensors'
    save(network, path, metadata={'pairs': '7'})
    loaded = create('dip_rt', path)
    assert not loaded.training
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    with safe_open(path, 'pt') as file:
        assert file.metadata() == {'network': 'dip_rt', 'options': '{}', 'pairs': '7'}


def test_half_precision_files_load_as_single_precision(tmp_path: Path) -> None:
    network = create('dip_rt')
    save(network, tmp_path / 'half.safetensors', half=True)
    save(network, tmp_path / 'full.safetensors')
    loaded = create('dip_rt', tmp_path / 'half.safetensors')
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    halves, full = ((tmp_path / f'{name}.safetensors').stat().st_size for name in ('half', 'full'))
    assert halves < 0.55 * full


@pytest.mark.parametrize('wrapped', [False, True])
def test_a_published_checkpoint_loads(tmp_path: Path, wrapped: bool) -> None:
    network = create('dip')
    tensors = {f'module.{key}': value for key, value in network.state_dict().items()}
    torch.save({'state_dict': tensors} if wrapped else tensors, tmp_path / 'dip.pth')
    loaded = create('dip', tmp_path / 'dip.pth')
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_a_file_of_another_network_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / 'dip.safetensors'
    save(create('dip'), path)
    with pytest.raises(WeightsError, match=r'not for dip_rt \(it says it is for dip\).*92 '):
        create('dip_rt', path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = create('dip').state_dict()
    del tensors['fnet.conv1.bias']
    torch.save(tensors, tmp_path / 'cut.pth')
    with pytest.raises(WeightsError, match=r'missing fnet\.conv1\.bias'):
        create('dip', tmp_path / 'cut.pth')


class Evil:
    """Would write a file if it were unpickled by code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize('kind', ['missing', 'cut', 'text', 'list', 'code', 'empty', 'zip'])
def test_unusable_files_are_clear_errors(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ('w.safetensors' if kind in ('missing', 'cut') else 'w.pth')
    if kind == 'cut':
        save(create('dip_rt'), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == 'text':
        path.write_text('not weights')
    elif kind == 'list':
        torch.save([1, 2], path)
    elif kind == 'empty':
        path.touch()
    elif kind == 'zip':
        torch.save(create('dip').state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == 'code':
        torch.save({'a': Evil(tmp_path / 'touched')}, path)
    with pytest.raises(WeightsError, match=str(path)) as caught:
        create('dip_rt', path)
    assert 'weights_only' not in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'touched').exists()


@pytest.mark.parametrize(('options', 'words'), [
    ('{"colour": 1}', "does not take these options.*w.safetensors says.*'colour'"),
    ('{"hidden": "wide"}', 'does not take these options.*w.safetensors says'),
    ('{"hidden": 50000}', 'hidden": 50000.*whole numbers up to 1024'),
    ('{"hidden": ' + 5000 * '9' + '}', 'whole numbers up to 1024'),
    (5000 * '[', 'expected a JSON object')])
def test_options_of_a_file_that_make_no_network_are_one_clear_error(
        tmp_path: Path, options: str, words: str) -> None:
    path = tmp_path / 'w.safetensors'
    save_file({'a': torch.zeros(1)}, path, {'network': 'dip_rt', 'options': options})
    with pytest.raises(WeightsError, match=words) as caught:
        create('dip_rt', path)
    assert len(str(caught.value)) < 500 and '\n' not in str(caught.value)


def test_shipped_weights_are_found_or_the_folders_named(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(create('dip'), tmp_path / 'dip.safetensors')
    monkeypatch.setenv('FLOW_ROS_MODELS', str(tmp_path))
    assert default_weights_path('dip') == tmp_path / 'dip.safetensors'
    assert create('dip', 'default').name == 'dip'
    monkeypatch.setenv('FLOW_ROS_MODELS', str(tmp_path / 'none'))
    monkeypatch.setenv('AMENT_PREFIX_PATH', '/elsewhere')
    with pytest.raises(ValueError, match=r"unknown network 'mine'.*/none \(not there\)"):
        create('mine')
    with pytest.raises(WeightsError, match='/elsewhere/share/flow_ros/models'):
        default_weights_path('no_such_network')


def test_unknown_names_and_options_are_named() -> None:
    with pytest.raises(ValueError, match="unknown network 'raft'; known are dip_rt, dip.*looked "
                                         r'for raft\.safetensors in /.*/models'):
        create('raft')
    with pytest.raises(ValueError, match='known are dip_rt.*a file is given as weights, or made'):
        create('/home/me/DIP_sintel.pth')
    with pytest.raises(ValueError, match='does not take these options.*colour'):
        create('dip_rt', colour='blue')


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of models, the first that is looked in."""
    monkeypatch.setenv('FLOW_ROS_MODELS', str(tmp_path / 'models'))
    monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path / 'data'))
    torch.manual_seed(4)
    save(create('dip_rt', radius=2, hidden=32), tmp_path / 'models' / 'tiny.safetensors')
    (tmp_path / 'models' / 'tiny.md').write_text('# tiny')
    return tmp_path / 'models'


def test_a_model_is_a_network_by_name(models: Path) -> None:
    made = create('tiny', 'default')
    assert (made.name, made.options()) == ('dip_rt', {'hidden': 32, 'radius': 2})
    assert family_of('tiny') == family_of('dip_rt') == 'dip_rt'
    untrained = create('tiny')
    assert untrained.options() == made.options()
    model = find_model('tiny')
    assert model is not None
    assert (model.family, model.card) == ('dip_rt', models / 'tiny.md')
    assert 'tiny' in known_names() and 'tiny' not in names()
    assert model in list_models()


def test_a_file_knows_the_options_it_was_made_with(models: Path) -> None:
    path = models / 'tiny.safetensors'
    assert create('dip_rt', path).options() == {'hidden': 32, 'radius': 2}
    assert create('dip_rt', path, radius=2, warm_level_px=9.0).options() == {
        'hidden': 32, 'radius': 2, 'warm_level_px': 9.0}
    with pytest.raises(WeightsError, match='made with radius=2, but radius=4 was asked for'):
        create('dip_rt', path, radius=4)
    with pytest.raises(WeightsError, match='made with seeds=4, but seeds=8 was asked for'):
        create('tiny', 'default', seeds=8)
    save(create('dip_rt'), models / 'whole.safetensors')
    with pytest.raises(WeightsError, match='made with .*, but .* was asked for'):
        create('tiny', models / 'whole.safetensors')


def test_options_come_back_from_json_as_they_were(tmp_path: Path) -> None:
    made = create('dip_rt', widths=[16, 24, 40, 48])
    save(made, tmp_path / 'w.safetensors')
    loaded = create('dip_rt', tmp_path / 'w.safetensors')
    assert loaded.config == made.config
    assert loaded.config.widths == (16, 24, 40, 48)


def test_files_that_are_no_models_are_left_out_of_the_list_and_named_when_asked_for(
        models: Path) -> None:
    (models / 'broken.safetensors').write_bytes(b'nothing')
    save_file({'a': torch.zeros(1)}, models / 'nameless.safetensors')
    save_file({'a': torch.zeros(1)}, models / 'strange.safetensors', {'network': 'raft'})
    save_file({'a': torch.zeros(1)}, models / 'odd.safetensors',
              {'network': 'dip_rt', 'options': '[1]'})
    listed = {model.name for model in list_models()}
    assert 'tiny' in listed and not listed & {'broken', 'nameless', 'odd'}
    for name, words in (('broken', 'cannot be read'), ('nameless', 'does not say for which'),
                        ('strange', "for 'raft', which is none of the networks known"),
                        ('odd', 'expected a JSON object')):
        with pytest.raises(WeightsError, match=words):
            create(name, 'default')


@pytest.mark.parametrize('name', ['../models/tiny', 'models/tiny', '/tiny', '.tiny', ''])
def test_a_name_is_no_path(models: Path, name: str) -> None:
    with pytest.raises(ValueError, match='unknown network'):
        create(name, 'default')


def test_a_family_without_weights_names_the_models_it_has(models: Path) -> None:
    save(create('hd3', encoder='vgg', context=False), models / 'hd3_small.safetensors')
    with pytest.raises(WeightsError, match=(
            r"no weights for 'hd3'.*flow_ros import-weights FILE.*use .*hd3_small.*of this fam")):
        create('hd3', 'default')


def test_what_does_not_change_the_meaning_of_the_weights_may_be_asked_for(tmp_path: Path) -> None:
    small = {'widths': (8, 8, 8), 'features': 8, 'state': 8, 'head': 8}
    save(create('mscsl', variant='wor', **small), tmp_path / 'wor.safetensors')
    assert create('mscsl', tmp_path / 'wor.safetensors').options() == {'variant': 'wor', **small}
    # The next stage of its training is the same network with another loss.
    assert create('mscsl', tmp_path / 'wor.safetensors', variant='full').options() == small
    with pytest.raises(WeightsError, match='missing|not known'):
        create('mscsl', tmp_path / 'wor.safetensors', variant='wosr')
    vgg = {'encoder': 'vgg', 'context': False, 'decoder_width': 8}
    save(create('hd3', calibration=(0.5, 0.1), **vgg), tmp_path / 'hd3.safetensors')
    taught = create('hd3', tmp_path / 'hd3.safetensors', stop_gradients=True)
    assert taught.options() == {**vgg, 'calibration': (0.5, 0.1), 'stop_gradients': True}
    with pytest.raises(WeightsError, match="made with cost='warp', but cost='sample' was asked"):
        create('hd3', tmp_path / 'hd3.safetensors', cost='sample')
