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

"""Checkpoints people own become models with a name, and what is none is said to be none."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from seeded_weights import seeded_tensor
import torch
from torch import Tensor

from flow_ros.cli.main import main
from flow_ros.networks import create, default_weights_path, find_model, list_models, WeightsError
from flow_ros.networks.importing import import_weights
from flow_ros.networks.models import user_folder
from flow_ros.networks.published import recognise

torch.set_num_threads(1)

HD3_SMALL = {'encoder': 'vgg', 'decoder': 'resnet', 'context': False}
# (options, tensors, parameters) as published.
HD3 = [({'context': False}, 687, 39_561_975), ({}, 698, 39_942_647),
       (HD3_SMALL, 312, 5_955_599),
       ({'encoder': 'vgg', 'context': False}, 342, 6_121_999)]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the models of whoever runs this out of it."""
    monkeypatch.setenv('XDG_DATA_HOME', str(tmp_path / 'data'))
    monkeypatch.delenv('FLOW_ROS_MODELS', raising=False)
    assert user_folder() == tmp_path / 'data' / 'flow_ros' / 'models'
    return user_folder()


def seeded(family: str, **options: object) -> dict[str, Tensor]:
    """Return weights by key, as the parity data have them."""
    shapes = {key: tuple(value.shape)
              for key, value in create(family, **options).state_dict().items()}
    return {key: torch.from_numpy(np.asarray(seeded_tensor(key, shape)))
            for key, shape in shapes.items()}


def published(path: Path, tensors: dict[str, Tensor], *, prefix: str = '',
              wrapped: bool = False) -> Path:
    """Write a checkpoint as its authors do."""
    held: dict[str, object] = {prefix + key: value for key, value in tensors.items()}
    torch.save({'epoch': 7, 'best_epe': np.float64(2.5), 'state_dict': held} if wrapped else held,
               path)
    return path


@pytest.mark.parametrize(('options', 'tensors', 'parameters'), HD3)
def test_every_published_hd3_is_recognised_by_its_keys(
        options: dict[str, object], tensors: int, parameters: int) -> None:
    network = create('hd3', **options)
    assert len(network.state_dict()) == tensors
    assert sum(value.numel() for value in network.parameters()) == parameters
    known = recognise(network.state_dict())
    assert known is not None and known.family == 'hd3'
    assert create('hd3', **known.options).options() == network.options()


@pytest.mark.parametrize(('prefix', 'wrapped'), [
    ('', False), ('module.', True), ('hd3net.', True), ('module.hd3net.', True)])
def test_hd3_is_imported_and_found_by_the_name_of_its_family(
        tmp_path: Path, own_folder: Path, prefix: str, wrapped: bool) -> None:
    tensors = seeded('hd3', **HD3_SMALL)
    path = published(tmp_path / 'hd3f_chairs-04bf114d.pth', tensors, prefix=prefix,
                     wrapped=wrapped)
    model = import_weights(path)
    assert (model.name, model.family, dict(model.options)) == ('hd3', 'hd3', HD3_SMALL)
    assert model.path == default_weights_path('hd3') == own_folder / 'hd3.safetensors'
    network = create('hd3', 'default')  # with the options of the file
    assert network.options() == HD3_SMALL
    for key, value in network.state_dict().items():
        assert torch.equal(value, tensors[key]), key
    assert model.card is not None
    card = model.card.read_text()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for word in (path.name, digest, f'{path.stat().st_size:,} bytes', "`encoder='vgg'`",
                 '5,955,599 parameters', '--network hd3'):
        assert word in card
    with safe_open(model.path, 'pt') as file:
        assert file.metadata()['source_sha256'] == digest
    assert not list(own_folder.glob('*.part'))


def test_dip_is_imported_under_a_name_of_ones_own(tmp_path: Path) -> None:
    tensors = seeded('dip')
    path = published(tmp_path / 'DIP_sintel.pth', tensors, prefix='module.')
    model = import_weights(path, name='dip_sintel')
    assert (model.family, dict(model.options)) == ('dip', {})
    assert find_model('dip_sintel') == model
    assert 'dip_sintel' in [each.name for each in list_models()]
    network = create('dip_sintel', 'default')
    assert network.name == 'dip'
    assert all(torch.equal(value, tensors[key]) for key, value in network.state_dict().items())
    with pytest.raises(WeightsError, match="no weights for 'dip'.*use dip_sintel, which is of"):
        default_weights_path('dip')


def test_a_checkpoint_of_old_pytorch_has_no_counters_of_batch_norms(tmp_path: Path) -> None:
    whole = seeded('hd3', **HD3_SMALL)
    tensors = {key: value for key, value in whole.items()
               if not key.endswith('num_batches_tracked')}
    absent = len(whole) - len(tensors)
    assert absent > 40
    path = published(tmp_path / 'old.pth', tensors, prefix='module.hd3net.', wrapped=True)
    model = import_weights(path)
    assert model.card is not None and f'but for {absent} counters' in model.card.read_text()
    state = create('hd3', 'default').state_dict()
    assert all(torch.equal(state[key], value) for key, value in tensors.items())
    assert state.keys() == whole.keys()


def test_the_old_format_of_torch_is_read(tmp_path: Path) -> None:
    path = tmp_path / 'legacy.pth'
    torch.save({'state_dict': seeded('hd3', **HD3_SMALL)}, path,
               _use_new_zipfile_serialization=False)
    assert import_weights(path).family == 'hd3'


def test_own_weights_become_a_model_too(tmp_path: Path) -> None:
    from flow_ros.networks import save
    network = create('dip_rt', radius=2, widths=(16, 24, 40, 48))
    save(network, tmp_path / 'weights.safetensors')
    model = import_weights(tmp_path / 'weights.safetensors', name='small')
    assert create('small').options() == {'radius': 2, 'widths': (16, 24, 40, 48)}
    assert model.options == create('small').options()
    with pytest.raises(ValueError, match="'dip_rt' is that of a model that is shipped.*--name"):
        import_weights(tmp_path / 'weights.safetensors')


def test_a_damaged_file_is_told_from_one_of_another_network(tmp_path: Path) -> None:
    tensors = seeded('hd3', **HD3_SMALL)
    short = {key: value for key, value in tensors.items() if key != 'Decoder_3.cls.2.weight'}
    with pytest.raises(WeightsError, match=r'holds 311 tensors, 312 were expected; missing '
                                           r'Decoder_3\.cls\.2\.weight'):
        import_weights(published(tmp_path / 'short.pth', short, wrapped=True))
    wide = {**tensors, 'cost_bn_0.weight': torch.ones(49)}
    with pytest.raises(WeightsError, match=r'cost_bn_0\.weight \(49,\) instead of \(81,\)'):
        import_weights(published(tmp_path / 'wide.pth', wide))
    spoilt = {**tensors, 'cost_bn_0.weight': torch.full((81,), float('nan'))}
    with pytest.raises(WeightsError, match=r'is damaged: NaN.*cost_bn_0\.weight'):
        import_weights(published(tmp_path / 'spoilt.pth', spoilt))
    whole = published(tmp_path / 'cut.pth', tensors)
    whole.write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(WeightsError, match=r'cut\.pth cannot be read'):
        import_weights(whole)
    other = {'flownet.conv1.0.weight': torch.zeros(64, 6, 7, 7), 'b': torch.zeros(2)}
    with pytest.raises(WeightsError, match=(
            r'found 2 tensors, flownet\.conv1\.0\.weight \(64, 6, 7, 7\), b \(2,\)\. Expected '
            r'dip: 92 tensors.*hd3: .*687 tensors')):
        import_weights(published(tmp_path / 'other.pth', other))
    assert list_models() == tuple(m for m in list_models() if m.path.parent != user_folder())


class Evil:
    """Would write a file if it were unpickled by code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_no_code_of_the_file_is_run(tmp_path: Path) -> None:
    torch.save({'state_dict': seeded('dip'), 'more': Evil(tmp_path / 'touched')},
               tmp_path / 'evil.pth')
    with pytest.raises(WeightsError, match='holds more than tensors'):
        import_weights(tmp_path / 'evil.pth')
    assert not (tmp_path / 'touched').exists()


@pytest.mark.parametrize(('name', 'words'), [
    ('all', 'none of all'), ('zero', 'none of all'), ('dip.safetensors', 'no .safetensors'),
    ('../hd3', 'no folder'), ('a/b', 'no folder'), ('.hidden', 'no folder'), ('', 'no folder'),
    ('mscsl', 'that of another family'), ('dip_rt', 'that of another family')])
def test_names_that_cannot_be_taken(tmp_path: Path, name: str, words: str) -> None:
    path = published(tmp_path / 'dip.pth', seeded('dip'))
    with pytest.raises(ValueError, match=words):
        import_weights(path, name=name)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = published(tmp_path / 'mine.pth', seeded('hd3', **HD3_SMALL), prefix='module.hd3net.',
                     wrapped=True)
    assert main(['import-weights', str(path), '--name', 'mine']) == 0
    shown = capsys.readouterr().out
    assert 'is hd3 with' in shown and 'encoder=vgg' in shown and '--network mine' in shown
    assert main(['import-weights', str(path), '--name', 'mine']) == 2
    assert '--replace' in capsys.readouterr().err
    assert main(['import-weights', str(path), '--name', 'mine', '--replace']) == 0
    assert main(['import-weights', str(path), '--folder', str(tmp_path / 'other')]) == 0
    assert f'FLOW_ROS_MODELS={tmp_path / "other"}' in capsys.readouterr().out
    assert main(['import-weights', str(tmp_path / 'none.pth')]) == 2
    assert 'expected a weights file; seen nothing there' in capsys.readouterr().err
    (tmp_path / 'taken').write_text('')
    assert main(['import-weights', str(path), '--folder', str(tmp_path / 'taken')]) == 2
    assert 'the model cannot be written' in capsys.readouterr().err
