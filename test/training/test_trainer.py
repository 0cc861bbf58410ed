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

"""The trainer learns, stops when told, and resumes."""

from dataclasses import replace
import json
import os
from pathlib import Path
import socket
import subprocess
import sys

import pytest
import torch

from flow_ros.networks import create
from flow_ros.synthetic.world import WorldConfig
from flow_ros.training.recipe import read_recipe, Recipe, Stage
from flow_ros.training.trainer import (
    Crew,
    logistic_fit,
    own_device,
    Progress,
    schedule,
    Trainer,
)

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device('cpu')  # where sums are exact: not those of a GPU's gradients
TINY = Recipe(minutes=0.02, reuse=2, stages=(Stage(1.0, 2, (72, 88), (64, 80)),),
              world=WorldConfig(surfaces=3, bank_objects=4, largest_motion_px=8))


def test_a_run_ends_in_time_with_calibrated_weights(tmp_path: Path) -> None:
    progress = Trainer(recipe=TINY, folder=tmp_path).run()
    assert progress.step >= 1
    assert progress.pairs == 2 * progress.step
    network = create('dip_rt', tmp_path / 'weights.safetensors')
    assert not torch.equal(network.calibration, torch.tensor([1.0, 0.0]))


def test_the_loss_of_one_batch_falls(tmp_path: Path) -> None:
    trainer = Trainer(recipe=replace(TINY, reuse=10_000, warm=0, learning_rate=2e-3),
                      folder=tmp_path)
    losses = []
    for step in range(24):
        loss, _, _ = trainer.step(0.05)
        losses.append(loss)
        trainer.progress = Progress(step + 1)
    assert sum(losses[-6:]) < 0.93 * sum(losses[:6])


def test_a_resumed_run_continues_as_the_unbroken_one(tmp_path: Path) -> None:
    """The same weights and losses, bit for bit: scenes and augmentation follow the step."""
    def steps(trainer: Trainer, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            losses.append(trainer.step(0.5)[0])
            trainer.progress = Progress(trainer.progress.step + 1)
        return losses

    unbroken = steps(Trainer(recipe=TINY, folder=tmp_path / 'one', device=CPU), 5)
    first = Trainer(recipe=TINY, folder=tmp_path / 'two', device=CPU)
    begun = steps(first, 3)
    first.save()
    resumed = Trainer(recipe=TINY, folder=tmp_path / 'two', device=CPU)
    assert resumed.progress.step == 3
    assert begun + steps(resumed, 2) == unbroken


def test_a_run_killed_between_its_two_files_goes_on(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(recipe=TINY, folder=tmp_path, device=torch.device('cpu'))
    trainer.step(0.5)
    trainer.save()
    old = (tmp_path / 'state.pt').read_bytes()
    trainer.progress = Progress(1, 2, 0.0)
    trainer.save()
    (tmp_path / 'state.pt').write_bytes(old)  # its renaming never came
    resumed = Trainer(recipe=TINY, folder=tmp_path, device=torch.device('cpu'))
    assert resumed.progress.step == 0
    assert 'begins afresh' in capsys.readouterr().out
    assert all(path.stat().st_size < 16 << 20 for path in tmp_path.iterdir())


def test_two_processes_train_one_network(tmp_path: Path) -> None:
    """Real gloo over loopback: both see the mean gradient, so both keep the same weights."""
    script = f"""
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_trainer import CPU, TINY
from flow_ros.training.trainer import Progress, Trainer
trainer = Trainer(recipe=TINY, folder=Path({str(tmp_path)!r}) / os.environ['RANK'],
                  device=CPU)
for step in range(2):
    assert trainer.step(0.5)[2] == 2  # pairs, of both
    trainer.progress = Progress(step + 1)
print(float(sum(value.double().sum() for value in trainer.network.parameters())))
"""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    crew = [subprocess.Popen(
        [sys.executable, '-c', script], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, 'RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1',
             'MASTER_PORT': str(port), 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
        for rank in range(2)]
    sums = [process.communicate(timeout=120)[0].strip() for process in crew]
    assert [process.returncode for process in crew] == [0, 0]
    assert sums[0] == sums[1] != ''


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert own_device(None) == torch.device('cuda', 0)
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert own_device(None) == own_device(torch.device('cuda')) == torch.device('cuda', 1)
    assert own_device(CPU) == CPU
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(ValueError, match='process 2 of this machine has no GPU: torch sees 2'):
        own_device(None)


def test_pairs_are_those_really_trained_on() -> None:
    assert [Crew(size=3).share(batch) for batch in (8, 6, 2)] == [2, 2, 1]


@pytest.mark.parametrize('content', ['nothing', 'other'])
def test_a_state_that_does_not_fit_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / 'state.pt').write_bytes(b'')
    if content == 'other':
        torch.save({'network': {}}, tmp_path / 'state.pt')
    with pytest.raises(ValueError, match=r'state\.pt cannot be resumed.*another folder'):
        Trainer(recipe=TINY, folder=tmp_path, device=CPU)


@pytest.mark.parametrize(('centre', 'spread', 'a', 'b'), [
    (2.5, 1.5, 0.5, -2.0), (-6, 2, 0.3, 2.0), (9, 0.5, 0.4, -3.0), (1, 1, 1.0, 0.0)])
def test_the_calibration_is_found_however_wrong_the_confidence_was(
        centre: float, spread: float, a: float, b: float) -> None:
    """From (1, 0) undamped Newton steps end at -16 million in the first of these."""
    random = torch.Generator().manual_seed(0)
    x = centre + spread * torch.randn(20_000, generator=random, dtype=torch.double)
    truth = torch.sigmoid(a * x + b)
    y = (torch.rand(20_000, generator=random, dtype=torch.double) < truth).double()
    fit = logistic_fit(x, y)
    assert float((torch.sigmoid(fit[0] * x + fit[1]) - truth).abs().mean()) < 0.015


def test_a_calibration_without_a_single_error_stays_finite() -> None:
    x = torch.linspace(-1, 3, 1000, dtype=torch.double)
    fit = logistic_fit(x, torch.ones_like(x))
    assert bool((torch.sigmoid(fit[0] * x + fit[1]) > 0.95).all())
    assert float(fit.abs().max()) < 100


def test_the_schedule_rises_and_ends_near_zero() -> None:
    factors = [schedule(share / 100, 0.04) for share in range(101)]
    assert factors[0] == pytest.approx(0.05)
    assert max(factors) == pytest.approx(1)
    assert factors.index(max(factors)) == 4
    assert factors[-1] < 0.01


@pytest.mark.parametrize('name', ['dip_rt', 'dip_rt_gpu'])
def test_the_shipped_recipes_are_readable(name: str) -> None:
    recipe = read_recipe(ROOT / 'config' / 'train' / f'{name}.yaml')
    assert recipe.network == 'dip_rt'
    assert recipe.stages[-1].until == 1.0


@pytest.mark.parametrize(('change', 'words'), [
    ({'minuets': 3}, 'unknown fields minuets; known are'),
    ({'world': {'trees': 3}}, 'world: unknown fields trees; known are'),
    ({'stages': [{'until': 1.0, 'bach': 1}]}, 'stage 1: unknown fields bach'),
    ({'stages': [{'until': 1.0}]}, "stage 1: .*missing.*'batch'"),
    ({'stages': [{'until': 1.0, 'batch': 0, 'render': [64, 64], 'crop': [64, 64]}]},
     'at least 1 pair; seen 0'),
    ({'learning_rate': '1e-4'}, "learning_rate must not be text; seen '1e-4'"),
    ({'stages': [{'until': 1.0, 'batch': 1, 'render': [64, 64], 'crop': [50, 64]}]},
     'multiples of 16'),
    ({'stages': [{'until': 1.0, 'batch': 1, 'render': [64, 64], 'crop': [64, 80]}]},
     'does not fit'),
    ({'stages': [{'until': 0.5, 'batch': 1, 'render': [64, 64], 'crop': [64, 64]}]},
     'until 1.0'),
])
def test_a_wrong_recipe_is_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / 'recipe.yaml'
    path.write_text(json.dumps({'network': 'dip_rt', **change}))
    with pytest.raises(ValueError, match=words):
        read_recipe(path)


def test_what_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / 'recipe.yaml'
    for text, words in (('stages: [', 'is not YAML'), ('- 1', 'must hold a mapping')):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_recipe(path)
