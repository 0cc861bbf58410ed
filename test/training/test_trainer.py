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

"""The trainer learns, stops when told, and resumes as if it had never stopped."""

from collections.abc import Mapping
from dataclasses import replace
import json
import math
import os
from pathlib import Path
import resource
import signal
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
import torch

from flow_ros.evaluation.data_sets import DataSetError
from flow_ros.flow_io import write_flow, write_image
from flow_ros.networks import create
from flow_ros.synthetic.world import WorldConfig
from flow_ros.training.augment import Batch
from flow_ros.training.checkpoints import SaveError
from flow_ros.training.crew import own_device
from flow_ros.training.journal import Journal
from flow_ros.training.recipe import read_recipe, Recipe, recipe_text, Stage, Validation
from flow_ros.training.sample_augment import AugmentConfig
from flow_ros.training.sample_loading import DataSetShare
import flow_ros.training.trainer as trainer_module
from flow_ros.training.trainer import Progress, schedule, StepResult, Trainer

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device('cpu')  # where sums are exact: not those of a GPU's gradients
TINY = Recipe(steps=6, reuse=2, log_every=1, stages=(Stage(1.0, 2, (72, 88), (64, 80)),),
              world=WorldConfig(surfaces=3, bank_objects=4, largest_motion_px=8),
              validation=Validation(pairs=0))
SMALL = Validation(pairs=2, render=(72, 88), crop=(64, 80), iterations=(1, 2), warm_iterations=1,
                   every_steps=2)
NO_CHANGE = AugmentConfig(spatial=0, erase=0)


@pytest.fixture(autouse=True)
def quick_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run ends with a calibration; a few scenes are as good for what is tested here."""
    monkeypatch.setattr(trainer_module, 'CALIBRATION_BATCHES', 1)


def log_of(folder: Path, *, validation: bool = False) -> list[dict[str, Any]]:
    """Return the lines of a log, without what a clock has a say in."""
    lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ('minutes', 'pairs_per_s')}
            for line in lines if ('validation' in line) == validation]


def start(script: str, **environment: str) -> 'subprocess.Popen[str]':
    """Start a Python process with the names of this file at hand."""
    begin = (f'import os, sys, time, torch\nfrom pathlib import Path\n'
             f'sys.path.insert(0, {str(Path(__file__).parent)!r})\n'
             f'from test_trainer import *\ntrainer_module.CALIBRATION_BATCHES = 1\n')
    return subprocess.Popen(
        [sys.executable, '-c', begin + script], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT),
                                  **environment})


def crew_of_two(script: str) -> list[tuple[str, str]]:
    """Run ``script`` in two processes that train together; return what each has told."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    crew = [start(script, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2',
                  LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            for rank in range(2)]
    told = [process.communicate(timeout=120) for process in crew]
    assert [process.returncode for process in crew] == [0, 0], told
    return told


def test_a_run_ends_in_time_with_calibrated_weights_that_know_their_recipe(
        tmp_path: Path) -> None:
    recipe = replace(TINY, steps=None, minutes=0.02, validation=SMALL)
    trainer = Trainer(recipe=recipe, folder=tmp_path, device=CPU)
    progress = trainer.run()
    assert progress.step >= 1
    assert progress.pairs == 2 * progress.step
    assert progress.minutes >= 0.02
    weights = tmp_path / 'weights.safetensors'
    network = create('dip_rt', weights)
    assert not torch.equal(network.calibration, torch.tensor([1.0, 0.0]))
    with safe_open(weights, 'pt') as file:
        metadata = file.metadata()
    (tmp_path / 'recipe.yaml').write_text(metadata['recipe'])
    assert read_recipe(tmp_path / 'recipe.yaml') == recipe
    metrics = json.loads(metadata['metrics'])
    assert metrics == pytest.approx(trainer.measured)
    assert {'cold_1/epe', 'cold_2/fl_all', 'warm_1/outliers_1px'} <= metrics.keys()
    assert log_of(tmp_path, validation=True)[-1]['validation'] == pytest.approx(metrics, rel=1e-4)
    assert list((tmp_path / 'tensorboard').iterdir())


def test_the_confidence_of_hd3_is_fitted_and_saved_with_its_options(tmp_path: Path) -> None:
    small = {'encoder': 'vgg', 'decoder': 'resnet', 'context': False, 'decoder_width': 8}
    recipe = replace(TINY, network='hd3', options=small, steps=1,
                     stages=(Stage(1.0, 2, (72, 88), (64, 64)),), validation=SMALL)
    Trainer(recipe=recipe, folder=tmp_path, device=CPU).run()
    network = create('hd3', tmp_path / 'weights.safetensors')
    calibration = network.options().pop('calibration')
    assert calibration != (1.0, 0.0) and all(map(math.isfinite, calibration))
    assert network.options() == {**small, 'calibration': calibration}


def test_the_loss_of_one_batch_falls(tmp_path: Path) -> None:
    trainer = Trainer(recipe=replace(TINY, reuse=10_000, warm=0, learning_rate=2e-3),
                      folder=tmp_path)
    losses = []
    for step in range(24):
        losses.append(trainer.step(0.05).loss)
        trainer.progress = Progress(step + 1)
    assert sum(losses[-6:]) < 0.93 * sum(losses[:6])


def test_an_interrupted_run_goes_on_as_the_unbroken_one(tmp_path: Path) -> None:
    """Ctrl-C, kill -9, and the same curve to the last bit, and the same weights."""
    recipe = replace(TINY, warm=0.6, log_every=3)
    Trainer(recipe=recipe, folder=tmp_path / 'one', device=CPU).run()
    (tmp_path / 'recipe.yaml').write_text(recipe_text(recipe))
    killed = start(f"""
class Stuck(Trainer):
    def step(self, share):
        if self.progress.step == 2:
            self.save()
        if self.progress.step == 4:  # two steps past what was saved
            print('ready', flush=True)
            time.sleep(600)
        return super().step(share)
Stuck(recipe=read_recipe(Path({str(tmp_path / 'recipe.yaml')!r})),
      folder=Path({str(tmp_path / 'two')!r}), device=CPU).run()
""")
    assert killed.stdout is not None
    ready = killed.stdout.readline()
    killed.kill()
    assert ready == 'ready\n', killed.communicate()
    killed.communicate()

    class Stopped(Trainer):
        def step(self, share: float) -> StepResult:
            if self.progress.step == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return super().step(share)

    stopped = Stopped(recipe=recipe, folder=tmp_path / 'two', device=CPU)
    assert stopped.progress.step == 2
    assert stopped.run().step == 5
    assert stopped.interrupted
    Trainer(recipe=recipe, folder=tmp_path / 'two', device=CPU).run()
    assert log_of(tmp_path / 'two') == log_of(tmp_path / 'one')
    one, two = (create('dip_rt', tmp_path / name / 'weights.safetensors').state_dict()
                for name in ('one', 'two'))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_validation_changes_nothing_but_the_log(tmp_path: Path) -> None:
    recipe = replace(TINY, steps=4)
    Trainer(recipe=recipe, folder=tmp_path / 'without', device=CPU).run()
    Trainer(recipe=replace(recipe, validation=SMALL), folder=tmp_path / 'with', device=CPU).run()
    assert log_of(tmp_path / 'with') == log_of(tmp_path / 'without')
    measured = log_of(tmp_path / 'with', validation=True)
    assert [line['step'] for line in measured] == [2, 4]
    assert measured[0]['validation'] != measured[1]['validation']


def test_a_batch_worked_off_in_parts_makes_one_step_of_all_its_pairs(tmp_path: Path) -> None:
    trainer = Trainer(recipe=replace(TINY, accumulate=2, precision='32-true'), folder=tmp_path,
                      device=CPU)
    data = trainer.data
    seen: list[Batch] = []

    class Recorded:
        def batch(self, step: int, stage: Stage, random: torch.Generator) -> Batch:
            batch = data.batch(step, stage, random)
            seen.append(replace(batch, occlusion=None) if step == 0 else batch)
            return seen[-1]

    trainer.data = Recorded()
    result = trainer.step(0.5)
    assert result.pairs == 2
    assert [batch.flow.shape[0] for batch in seen] == [1, 1]
    gradient = trainer.network.encoder.stem[0].weight.grad.clone()
    trainer.optimizer.zero_grad()
    fresh = Trainer(recipe=replace(TINY, precision='32-true'), folder=tmp_path / 'fresh',
                    device=CPU)
    fresh.network.train()
    for number, batch in enumerate(seen):  # the mean of the parts' gradients, then clipped
        random = fresh._random(number)
        data.batch(number, replace(TINY.stages[0], batch=1), random)
        losses = fresh.objective(fresh.network, batch, random)
        (losses.total / 2).backward()
    # The first part does not know the occlusion: that is no loss of 0.
    assert result.values['loss_occlusion'] == pytest.approx(float(losses.parts['occlusion']))
    torch.nn.utils.clip_grad_norm_(fresh.network.parameters(), TINY.clip)
    assert torch.allclose(gradient, fresh.network.encoder.stem[0].weight.grad, rtol=1e-4)


def test_a_step_that_is_not_finite_spoils_nothing(tmp_path: Path) -> None:
    trainer = Trainer(recipe=replace(TINY, steps=4), folder=tmp_path, device=CPU)
    data = trainer.data

    class Broken:
        def batch(self, step: int, stage: Stage, random: torch.Generator) -> Batch:
            batch = data.batch(step, stage, random)
            return replace(batch, image1=batch.image1 * float('inf')) if step == 1 else batch

    trainer.data = Broken()
    progress = trainer.run()
    assert (progress.step, progress.skipped) == (4, 1)
    assert [line['step'] for line in log_of(tmp_path)] == [1, 3, 4]
    saved = create('dip_rt', tmp_path / 'weights.safetensors')
    assert all(bool(torch.isfinite(value).all()) for value in saved.state_dict().values())
    assert all(bool(torch.isfinite(value).all()) for value in trainer.network.buffers())


def test_a_full_disk_costs_one_line_and_the_run_saves_later(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that may not grow beyond 1 MB fail in the middle, as on a full disk."""
    trainer = Trainer(recipe=TINY, folder=tmp_path, device=CPU)
    trainer.step(0.5)
    assert trainer.save()
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    trainer.progress = Progress(1, 2, 0.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        assert not trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err
    assert 'step-00000001 could not be written (File too large); step-00000000 is kept' in told
    assert told.count('could not be written') == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before
    assert trainer.save()
    assert Trainer(recipe=TINY, folder=tmp_path, device=CPU).progress.step == 1


def test_a_run_on_a_full_disk_trains_to_its_end_and_then_says_so(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(recipe=replace(TINY, steps=2), folder=tmp_path, device=CPU,
                      save_every_s=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(SaveError, match='make room and start again'):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert trainer.progress.step == 2
    assert 'training goes on, and tries again later' in capsys.readouterr().err


def test_two_processes_train_one_network_and_resume_it_exactly(tmp_path: Path) -> None:
    """Real gloo over loopback: both see the mean gradient, so both keep the same weights."""
    script = f"""
recipe = replace(TINY, warm=0.6, steps=4, validation=SMALL,
                 stages=(replace(TINY.stages[0], batch=3),))
def run(folder, stop):
    trainer = Trainer(recipe=recipe, folder=Path({str(tmp_path)!r}) / folder, device=CPU)
    step = trainer.step
    def stopping(share):
        if trainer.progress.step == stop and trainer.crew.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(share)
    trainer.step = stopping
    trainer.run()
    return trainer
assert run('one', 9).progress.pairs == 8  # of both
first = run('two', 1)
assert first.interrupted and first.progress.step == 2, first.progress  # both, by one's signal
last = run('two', 9)
print(float(sum(value.double().sum() for value in last.network.state_dict().values())))
sys.stdout.flush()
alone = Trainer(recipe=recipe, folder=Path({str(tmp_path)!r}) / 'three', device=CPU)
if alone.crew.rank == 1:
    os._exit(0)
try:
    alone.run()
except ValueError as error:
    assert 'process 0 of 2 has lost another one' in str(error), error
    print(error, file=sys.stderr, flush=True)
    os._exit(0)
os._exit(3)
"""
    (first, told), (second, _) = crew_of_two(script)
    assert first.split()[-1] == second.split()[-1] != ''
    assert ('a batch of 3 does not divide into 2 equal parts (2 processes, accumulate 1): '
            '2 pairs make a step') in told
    assert log_of(tmp_path / 'two') == log_of(tmp_path / 'one')
    assert (log_of(tmp_path / 'two', validation=True)[-1]
            == log_of(tmp_path / 'one', validation=True)[-1])


def test_data_sets_are_mixed_in_and_measured(tmp_path: Path) -> None:
    """Sparse pairs beside the world; where all of them are damaged the run ends, and is saved."""
    random = np.random.default_rng(0)
    for number in range(3):
        folder = tmp_path / 'pairs' / str(number)
        folder.mkdir(parents=True)
        image = random.integers(0, 255, (80, 96, 3), dtype=np.uint8)
        for name, shift in (('frame1', 0), ('frame2', 2)):
            write_image(folder / f'{name}.png', np.roll(image, shift, axis=1))
        write_flow(folder / 'flow.png', np.full((80, 96, 2), (2, 0), np.float32),
                   random.random((80, 96)) < 0.3)
    recipe = replace(TINY, workers=1, steps=4, warm=0.5, data=(
        DataSetShare('procedural'), DataSetShare('folders', 'pairs', augment=NO_CHANGE)),
        validation=replace(SMALL, data=(DataSetShare('folders', 'pairs'),)))
    trainer = Trainer(recipe=recipe, folder=tmp_path / 'run', device=CPU, data_root=tmp_path)
    assert trainer.run().step == 4
    assert {'cold_1/epe', 'folders/cold/epe', 'folders/cold/fl_all'} <= trainer.measured.keys()
    told = log_of(tmp_path / 'run')
    assert [line['step'] for line in told] == [1, 2, 3, 4]
    # A sparse set knows no occlusion; the world does.
    assert {'loss_occlusion' in line for line in told} == {True, False}
    (tmp_path / 'pairs' / '0' / 'frame1.png').write_bytes(b'no picture')
    for number in (1, 2):
        (tmp_path / 'pairs' / str(number) / 'flow.png').write_bytes(b'')
    again = replace(recipe, workers=0, steps=30)
    trainer = Trainer(recipe=again, folder=tmp_path / 'run', device=CPU, data_root=tmp_path)
    with pytest.raises(DataSetError, match='could not be read'):
        trainer.run()
    assert trainer.checkpoints.latest() is not None
    assert trainer.checkpoints.latest().name == f'step-{trainer.progress.step:08}'


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


@pytest.mark.parametrize('content', ['nothing', 'cut off', 'other'])
def test_a_checkpoint_that_does_not_fit_is_one_clear_error(tmp_path: Path, content: str) -> None:
    trainer = Trainer(recipe=TINY, folder=tmp_path, device=CPU)
    trainer.save()
    trainer.progress = Progress(3)
    trainer.save()
    state = tmp_path / 'checkpoints' / 'step-00000003' / 'state.pt'
    whole: Mapping[str, Any] = torch.load(state, weights_only=True)
    if content == 'nothing':
        state.write_bytes(b'')
    elif content == 'cut off':
        state.write_bytes(state.read_bytes()[:100_000])
    else:
        torch.save({**whole, 'network': {}}, state)
    words = 'cannot be resumed' if content == 'other' else 'damaged, or cut off'
    with pytest.raises(ValueError, match=rf'{words}.*Remove the folder .*step-00000003 to go on '
                       r'from step-00000000, or train into another folder'):
        Trainer(recipe=TINY, folder=tmp_path, device=CPU)


def test_a_run_goes_on_by_a_changed_recipe_and_says_so(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(recipe=TINY, folder=tmp_path, device=CPU)
    trainer.step(0.5)
    assert trainer.save()
    weights = tmp_path / 'weights.safetensors'
    capsys.readouterr()
    Trainer(recipe=TINY, folder=tmp_path, device=CPU)
    assert 'changed' not in capsys.readouterr().err
    changed = replace(TINY, weight_decay=0.5, betas=(0.8, 0.9), steps=None, minutes=7.0)
    again = Trainer(recipe=changed, folder=tmp_path, device=CPU, initial=weights)
    told = capsys.readouterr().err
    assert 'the recipe has changed since (minutes, steps, weight_decay, betas)' in told
    assert f'the weights of {weights} are not used: train into another folder' in told
    assert again.optimizer.param_groups[0]['weight_decay'] == 0.5
    assert again.optimizer.param_groups[0]['betas'] == (0.8, 0.9)


def test_a_folder_that_cannot_be_written_to_is_said_before_the_training(tmp_path: Path) -> None:
    (tmp_path / 'checkpoints').write_text('in the way')
    with pytest.raises(ValueError, match='checkpoints cannot be made or written to .*another fol'):
        Trainer(recipe=TINY, folder=tmp_path, device=CPU)


def test_too_little_memory_is_said_with_what_helps(tmp_path: Path) -> None:
    class Large:
        def batch(self, step: int, stage: Stage, random: torch.Generator) -> Batch:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB.')

    trainer = Trainer(recipe=TINY, folder=tmp_path, device=CPU, data=Large())
    with pytest.raises(ValueError, match=r'too little memory .*CUDA out of memory\).*'
                       '--accumulate 2.*nothing is saved yet'):
        trainer.run()


def test_a_spoilt_log_loses_what_is_spoilt_alone(tmp_path: Path) -> None:
    (tmp_path / 'log.jsonl').write_bytes(b'{"step": 1}\n{"step": 3}\n\xff\xfe\x00')
    Journal(tmp_path, step=2).close()
    assert (tmp_path / 'log.jsonl').read_text() == '{"step": 1}\n'


def test_only_the_newest_checkpoints_are_kept_and_what_is_unfinished_is_none(
        tmp_path: Path) -> None:
    trainer = Trainer(recipe=TINY, folder=tmp_path, device=CPU)
    for step in range(4):
        trainer.progress = Progress(step)
        trainer.save()
    (tmp_path / 'checkpoints' / 'step-00000009.part').mkdir()
    assert [path.name for path in trainer.checkpoints.all()] == ['step-00000002', 'step-00000003']
    assert all(path.stat().st_size < 16 << 20 for path in tmp_path.rglob('*'))


def test_the_learning_rate_is_halved_at_the_milestones() -> None:
    factors = {share: schedule(share, 0.1, 'steps', warmup_rate=0.01, milestones=(0.5, 0.75))
               for share in (0.0, 0.09, 0.1, 0.49, 0.5, 0.74, 0.75, 1.0)}
    assert list(factors.values()) == [0.01, 0.01, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_a_step_uses_the_milestones_of_its_recipe(tmp_path: Path) -> None:
    trainer = Trainer(recipe=replace(TINY, anneal='steps', milestones=(0.5,)),
                      folder=tmp_path, device=CPU)
    rates = [trainer.step(share).values['lr'] for share in (0.4, 0.6)]
    assert rates == [TINY.learning_rate, TINY.learning_rate / 2]


@pytest.mark.parametrize('anneal', ['cosine', 'linear'])
def test_the_schedule_rises_and_ends_near_zero(anneal: str) -> None:
    factors = [schedule(share / 100, 0.04, anneal) for share in range(101)]
    assert factors[0] == pytest.approx(0.05)
    assert max(factors) == pytest.approx(1)
    assert factors.index(max(factors)) == 4
    assert factors[-1] < 0.01
    assert factors[52] == pytest.approx(0.5)
    assert factors[28] == pytest.approx(0.8536 if anneal == 'cosine' else 0.75, abs=1e-4)
