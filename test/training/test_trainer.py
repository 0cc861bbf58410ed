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
from flow_ros.training.trainer import Progress, schedule, Trainer

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
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

    unbroken = steps(Trainer(recipe=TINY, folder=tmp_path / 'one'), 5)
    first = Trainer(recipe=TINY, folder=tmp_path / 'two')
    begun = steps(first, 3)
    first.save()
    resumed = Trainer(recipe=TINY, folder=tmp_path / 'two')
    assert resumed.progress.step == 3
    assert begun + steps(resumed, 2) == unbroken


def test_two_processes_train_one_network(tmp_path: Path) -> None:
    """Real gloo over loopback: both see the mean gradient, so both keep the same weights."""
    script = f"""
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_trainer import TINY
from flow_ros.training.trainer import Progress, Trainer
trainer = Trainer(recipe=TINY, folder=Path({str(tmp_path)!r}) / os.environ['RANK'])
for step in range(2):
    trainer.step(0.5)
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
