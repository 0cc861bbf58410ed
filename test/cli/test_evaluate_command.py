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

"""flow_ros evaluate, with a real network on real files."""

from collections.abc import Iterator
from importlib.util import find_spec
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from flow_ros.cli.main import main
from flow_ros.flow_io import read_image, write_flow, write_image
from flow_ros.networks import create, default_weights_path, names, save, WeightsError

SIZE = (96, 128)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return two pairs, one without truth."""
    noise = np.random.default_rng(5).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    texture = noise.repeat(8, axis=0).repeat(8, axis=1)
    for name in ('set/one', 'two'):
        folder = tmp_path / 'data' / name
        folder.mkdir(parents=True)
        write_image(folder / 'frame1.png', texture[:, 4:132])
        write_image(folder / 'frame2.png', texture[:, :128])
    flow = np.zeros((*SIZE, 2), np.float32)
    flow[..., 0] = 4.0
    write_flow(tmp_path / 'data' / 'set' / 'one' / 'flow.png', flow)
    return tmp_path / 'data'


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Return a file with weights, if not with sense: the network is untrained."""
    torch.manual_seed(0)
    save(create('dip_rt'), tmp_path / 'some.safetensors')
    return tmp_path / 'some.safetensors'


def test_everything_it_writes(data: Path, weights: Path, tmp_path: Path,
                              capsys: pytest.CaptureFixture[str]) -> None:
    numbers, pictures = tmp_path / 'numbers.json', tmp_path / 'pictures'
    assert main(['evaluate', '--data', str(data), '--network', 'dip_rt', '--weights',
                 str(weights), '--iterations', '1', '--json', str(numbers), '--pictures',
                 str(pictures)]) == 0
    shown = capsys.readouterr()
    assert 'skipped two: no truth' in shown.err
    assert 'set/one' in shown.out and 'dis_medium' in shown.out and 'Fl-all %' in shown.out

    content = json.loads(numbers.read_text())
    assert content['network'] == 'dip_rt' and content['weights'] == str(weights)
    assert content['iterations'] == 1 and content['runtime'] == 'torch'
    assert [row['name'] for row in content['skipped']] == ['two']
    row, = content['pairs']
    assert row['name'] == 'set/one' and row['ms'] > 0
    assert all(math.isfinite(row[name]) for name in ('epe', 'fl_all', 'outliers_1px', 's0_10'))
    assert content['means']['epe'] == row['epe']
    assert content['baselines']['zero']['means']['epe'] == pytest.approx(4.0)
    assert sum(b['pixels'] for b in content['calibration']['bins']) == SIZE[0] * SIZE[1]
    assert 0 <= content['calibration']['ece'] <= 1
    assert read_image(pictures / 'set' / 'one.png').shape == (96, 5 * 128, 3)
    assert 'networks' not in content  # it is but one
    assert content['sparsification']['ausc'] == pytest.approx(row['ausc'], abs=1e-5)


def test_all_models_in_one_table(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / 'models'
    monkeypatch.setattr('flow_ros.networks.models.shipped_folders', lambda: [folder])
    monkeypatch.setattr('flow_ros.networks.models.user_folder', lambda: tmp_path / 'own')
    torch.manual_seed(0)
    save(create('dip_rt', hidden=32), folder / 'slim.safetensors')
    save(create('hd3', encoder='vgg', context=False, decoder_width=16),
         tmp_path / 'own' / 'hd3.safetensors')
    numbers, pictures = tmp_path / 'numbers.json', tmp_path / 'pictures'
    assert main(['evaluate', '--data', str(data), '--network', 'all', '--network', 'slim',
                 '--json', str(numbers), '--pictures', str(pictures)]) == 0
    shown = capsys.readouterr().out
    assert 'means over 1 pairs' in shown and 'AUSE' in shown
    content = json.loads(numbers.read_text())
    assert list(content['networks']) == ['slim', 'hd3']
    hd3 = content['networks']['hd3']
    assert (hd3['family'], hd3['iterations'], hd3['iterations_are']) == ('hd3', 5, 'levels')
    assert hd3['options'] == {'encoder': 'vgg', 'context': False, 'decoder_width': 16}
    assert hd3['weights'] == str(tmp_path / 'own' / 'hd3.safetensors')
    assert hd3['sparsification']['pairs'] == 1 and math.isfinite(hd3['means']['ausc'])
    assert content['network'] == 'slim'
    assert content['parameters'] == sum(value.numel() for value in create('slim').parameters())
    assert set(content['baselines']) == {'dis_medium', 'zero'}
    for name in ('slim', 'hd3'):
        assert (pictures / name / 'set' / 'one.png').is_file()
    assert read_image(pictures / 'sparsification.png').shape[1:] == (620, 3)
    assert main(['evaluate', '--data', str(data), '--network', 'all', '--weights', 'a.pth']) == 2
    assert '--weights is for one network; seen slim, hd3' in capsys.readouterr().err


def test_what_cannot_be_written_costs_no_numbers(
        data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'pictures').mkdir()
    (tmp_path / 'pictures' / 'set').write_text('in the way')
    assert main(['evaluate', '--data', str(data), '--weights', str(weights), '--iterations', '1',
                 '--json', '/dev/full', '--pictures', str(tmp_path / 'pictures')]) == 2
    shown = capsys.readouterr()
    assert 'set/one.png cannot be written: ' in shown.err
    assert '--json /dev/full cannot be written: No space left on device' in shown.err
    assert 'dis_medium' in shown.out


def test_the_numbers_are_those_of_the_network(data: Path, weights: Path,
                                              tmp_path: Path) -> None:
    assert main(['evaluate', '--data', str(data), '--weights', str(weights), '--iterations',
                 '2', '--json', str(tmp_path / 'numbers.json')]) == 0
    frames = [torch.from_numpy(read_image(data / 'set' / 'one' / f'frame{k}.png')).permute(
        2, 0, 1)[None].float() for k in (1, 2)]
    with torch.inference_mode():
        flow = create('dip_rt', weights)(*frames, iterations=2).flow[0]
    epe = torch.hypot(flow[0] - 4.0, flow[1]).mean()
    row, = json.loads((tmp_path / 'numbers.json').read_text())['pairs']
    assert row['epe'] == pytest.approx(float(epe), rel=1e-4)


def test_a_public_data_set(tmp_path: Path, weights: Path,
                           capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / 'kitti'
    for folder in ('image_2', 'flow_occ'):
        (root / 'training' / folder).mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(4):
        for time in (10, 11):
            write_image(root / 'training' / 'image_2' / f'{number:06d}_{time}.png',
                        random.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
        flow = np.full((*SIZE, 2), np.nan, np.float32)
        flow[::3, ::3] = (3, 4)
        write_flow(root / 'training' / 'flow_occ' / f'{number:06d}_10.png', flow)
    numbers = tmp_path / 'numbers.json'
    command = ['evaluate', '--weights', str(weights), '--iterations', '1', '--json', str(numbers)]
    assert main([*command, '--data-set', f'kitti2015:{root}', '--samples', '2']) == 0
    content = json.loads(numbers.read_text())
    assert content['data'] == f'kitti2015:{root}'
    assert [row['name'] for row in content['pairs']] == ['000001', '000003']
    assert content['baselines']['zero']['means']['epe'] == pytest.approx(5.0)
    capsys.readouterr()
    for wrong, expected in ((f'hd1k:{root}', 'is not HD1K: expected hd1k_input/image_2'),
                            ('kitti2015', 'expected NAME:DIR'),
                            (f'kitti:{root}', 'known are chairs'),
                            (f'chairs:{root}:test', 'splits train, val, all')):
        assert main([*command, '--data-set', wrong]) == 2
        assert expected in ' '.join(capsys.readouterr().err.split())


def test_openvino_gives_the_numbers_of_torch(data: Path, weights: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('openvino')
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path / 'cache'))
    measured = {}
    for runtime in ('torch', 'openvino'):
        path = tmp_path / f'{runtime}.json'
        assert main(['evaluate', '--data', str(data), '--weights', str(weights), '--runtime',
                     runtime, '--json', str(path)]) == 0
        content = json.loads(path.read_text())
        assert content['runtime'] == runtime
        measured[runtime] = content['means']
    assert measured['openvino']['epe'] == pytest.approx(measured['torch']['epe'], abs=1e-2)


def test_a_damaged_pair_is_said_and_counts_in_the_status(
        data: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_flow(data / 'two' / 'flow.flo', np.zeros((*SIZE, 2)))
    path = data / 'two' / 'flow.flo'
    path.write_bytes(path.read_bytes()[:1000])
    assert main(['evaluate', '--data', str(data), '--weights', str(weights)]) == 1
    assert 'skipped two: ' in (shown := capsys.readouterr()).err
    assert 'cut off: 1000 bytes' in shown.err and 'set/one' in shown.out


@pytest.mark.parametrize(('extra', 'said'), [
    (['--weights', 'none.safetensors'], r'needs trained weights.*none\.safetensors'),
    (['--network', 'fast'], r"--network: unknown network 'fast'; known are dip_rt"),
    (['--json', 'no/such/folder/a.json'], r'its folder does not exist'),
    (['--json', '.'], r'--json \. is a folder; expected a file'),
    (['--data', 'nowhere'], r'expected a folder of pairs; seen nothing'),
    (['--runtime', 'openvino', '--device', 'cpu'], r'--device is for --runtime torch'),
    (['--device', 'warp'], r'--device warp: '),
    pytest.param(['--runtime', 'tensorrt'], r'--runtime tensorrt: ', marks=pytest.mark.skipif(
        find_spec('tensorrt') is not None, reason='TensorRT is installed')),
])
def test_refusals(data: Path, weights: Path, capsys: pytest.CaptureFixture[str],
                  extra: list[str], said: str) -> None:
    import re
    assert main(['evaluate', '--data', str(data), '--weights', str(weights), *extra]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_refuses_a_network_without_shipped_weights(
        data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in names():
        try:
            default_weights_path(name)
        except WeightsError:
            break
    else:
        pytest.skip('every network has shipped weights')
    assert main(['evaluate', '--data', str(data), '--network', name]) == 2
    error = capsys.readouterr().err
    assert 'evaluation needs trained weights (--weights FILE)' in error and name in error


def test_no_pairs_at_all(tmp_path: Path, weights: Path,
                         capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['evaluate', '--data', str(tmp_path), '--weights', str(weights)]) == 2
    assert 'A pair is a folder with frame1.png, frame2.png' in capsys.readouterr().err


@pytest.mark.parametrize('iterations', ['0', '-1', 'two', '1.5'])
def test_iterations_are_whole(iterations: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(['evaluate', '--data', '.', f'--iterations={iterations}'])
    assert f'expected a whole number from 1 on; seen {iterations!r}' in capsys.readouterr().err
