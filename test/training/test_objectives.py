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

"""Each network's objective: finite whatever the truth lacks, and learnable; warm starts."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator

from flow_ros.networks import create, save
from flow_ros.streaming import Budget, FlowEstimator
from flow_ros.streaming.thumbnails import SMALL
from flow_ros.synthetic.world import World, WorldConfig
from flow_ros.training import objectives
from flow_ros.training.augment import Batch
from flow_ros.training.objectives import filled, make_objective, stream_prior, warm_prior
from flow_ros.training.objectives.mscsl import correlation_loss, reconstruction_loss
from flow_ros.training.procedural import Procedural
from flow_ros.training.recipe import read_recipe, Recipe, Stage, Validation
from flow_ros.training.trainer import Trainer

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
WORLD = WorldConfig(surfaces=3, bank_objects=4, largest_motion_px=8, objects=(1, 2))
STAGE = Stage(1.0, 2, (72, 88), (64, 80))


def seeded(value: int) -> Generator:
    return Generator().manual_seed(value)


@pytest.fixture(scope='module')
def batch() -> Batch:
    """Return a batch that knows the frame before."""
    data = Procedural(World(seed=3, config=WORLD), reuse=1)
    return next(found for seed in range(20)
                if (found := data.batch(0, STAGE, seeded(seed))).previous is not None)


def sparse(batch: Batch) -> Batch:
    known = torch.rand(batch.flow.shape[-2:], generator=seeded(1)) < 0.2
    return replace(batch, flow=torch.where(known, batch.flow, torch.nan), occlusion=None,
                   previous=None)


@pytest.mark.parametrize('name', ['dip_rt', 'dip'])
@pytest.mark.parametrize('warm', [0.0, 1.0])
@pytest.mark.parametrize('truth', ['dense', 'sparse', 'none'])
def test_losses_and_gradients_are_finite(batch: Batch, name: str, warm: float,
                                         truth: str) -> None:
    torch.manual_seed(0)
    network = create(name).train()
    objective = make_objective(Recipe(network=name, warm=warm, iterations=1))
    given = batch if truth == 'dense' else sparse(batch)
    if truth == 'none':
        given = replace(given, flow=torch.full_like(batch.flow, torch.nan))
    losses = objective(network, given, seeded(0))
    losses.total.backward()
    assert float(losses.total.detach()) == pytest.approx(
        sum(float(part) for part in losses.parts.values()), rel=1e-4)
    assert bool(torch.isfinite(losses.total))
    assert bool(torch.isfinite(losses.epe)) == (truth != 'none')
    assert ('occlusion' in losses.parts) == (name == 'dip_rt' and truth == 'dense')
    gradients = [value.grad for value in network.parameters() if value.grad is not None]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert (sum(float(gradient.abs().sum()) for gradient in gradients) > 0) == (truth != 'none')


def test_unknown_pixels_have_no_say(batch: Batch) -> None:
    objective = make_objective(Recipe(network='dip', warm=0, iterations=1))
    network = create('dip').train()
    given = sparse(batch)
    unknown = ~torch.isfinite(given.flow)
    wrong = replace(given, flow=torch.where(unknown, torch.nan, given.flow + 5))
    one, two, other = (objective(network, each, seeded(2)).total
                       for each in (given, sparse(batch), wrong))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_the_schedule_and_the_start_follow_the_generator(batch: Batch) -> None:
    network = create('dip_rt').train()
    objective = make_objective(Recipe(warm=0.5))
    totals = [float(objective(deepcopy(network), batch, seeded(seed)).total.detach())
              for seed in (4, 4, 5)]
    assert totals[0] == totals[1] != totals[2]


def test_a_stream_prior_is_what_the_estimator_starts_from(batch: Batch) -> None:
    """The node's way from frame to frame, and the trainer's: the same prior."""
    network = create('dip_rt', ROOT / 'models' / 'dip_rt.safetensors')
    frames = [image[:1].round().clamp(0, 255) for image in (batch.previous, batch.image1)
              if image is not None]
    estimator = FlowEstimator(network=network, runtime='torch', budget=Budget(iterations=2))
    for stamp, frame in enumerate(frames):
        estimator(frame[0].permute(1, 2, 0).byte().numpy(), 0.1 * stamp)
    small = np.zeros(SMALL, np.float32)  # without contrast: one scene
    carried, _ = estimator._past.prior('forward', small_from=small, small_to=small, dt_s=0.1)
    assert carried is not None
    expected = carried.full
    network.train()
    before = {key: value.clone() for key, value in network.named_buffers()}
    prior = stream_prior(network, *frames, iterations=2)
    assert torch.allclose(prior, expected, atol=1e-3)
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.named_buffers())
    assert not prior.requires_grad


def test_real_and_degraded_priors_are_mixed_as_told(batch: Batch) -> None:
    network = create('dip_rt').train()

    def priors(real: float, given: Batch) -> list[torch.Tensor]:
        return [warm_prior(network, given, seeded(seed), real=real) for seed in range(8)]

    alone = replace(batch, previous=None)
    assert all(torch.equal(one, other) for one, other in zip(priors(0, batch), priors(1, alone)))
    same = [torch.equal(one, other)
            for one, other in zip(priors(0.5, batch), priors(0, batch))]
    assert 0 < sum(same) < 8


def test_holes_are_filled_from_near_by() -> None:
    flow = torch.full((1, 2, 32, 48), torch.nan)
    assert bool((filled(flow) == 0).all())
    flow[:, :, 3, 3], flow[:, :, 30, 40] = 2.0, 6.0
    full = filled(flow)
    assert torch.equal(full[0, :, 3, 3], torch.full((2,), 2.0))
    assert torch.equal(full[0, :, 10, 10], torch.full((2,), 2.0))
    assert torch.equal(full[0, :, 25, 35], torch.full((2,), 6.0))
    assert torch.equal(full[0, :, 2, 40], torch.full((2,), 4.0))  # nothing near: the mean
    assert filled(full) is full


def test_an_unknown_network_and_one_without_an_objective_are_named(
        monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown network 'raft'; known are dip_rt, dip"):
        make_objective(Recipe(network='raft'))
    monkeypatch.setattr(objectives, 'OBJECTIVES', {'dip': objectives.DipObjective})
    with pytest.raises(ValueError, match="no training objective for network 'dip_rt'.*dip"):
        make_objective(Recipe(network='dip_rt'))


def test_a_model_is_trained_as_its_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('FLOW_ROS_MODELS', str(tmp_path))
    save(create('dip_rt', radius=2), tmp_path / 'small.safetensors')
    objective = make_objective(Recipe(network='small'))
    assert isinstance(objective, objectives.DipRtObjective)


def test_dip_trains_by_its_procedural_recipe(tmp_path: Path) -> None:
    """Two steps of the shipped recipe, cut down to what a CPU does in a test."""
    recipe = read_recipe(ROOT / 'config' / 'train' / 'dip_procedural.yaml')
    recipe = replace(recipe, steps=2, iterations=1, world=WORLD, stages=(STAGE,), log_every=1,
                     checkpointed=True, validation=Validation(
                         pairs=2, render=(72, 88), crop=(64, 80), iterations=(1,),
                         warm_iterations=1))
    trainer = Trainer(recipe=recipe, folder=tmp_path, device=torch.device('cpu'))
    assert trainer.run().step == 2
    assert {'cold_1/epe', 'warm_1/epe'} <= trainer.measured.keys()
    assert create('dip', tmp_path / 'weights.safetensors').name == 'dip'


NARROW_MSCSL = {'widths': [4, 6, 8], 'features': 8, 'state': 5, 'head': 4}


@pytest.mark.parametrize('variant', ['full', 'wosr'])
@pytest.mark.parametrize('truth', ['dense', 'sparse', 'none'])
def test_mscsl_learns_from_what_is_known(variant: str, truth: str) -> None:
    torch.manual_seed(0)
    network = create('mscsl', variant=variant, **NARROW_MSCSL).train()
    images = [255 * torch.rand(2, 3, 64, 128, generator=seeded(seed)) for seed in range(2)]
    flow = 6 * torch.randn(2, 2, 1, 1, generator=seeded(2)).expand(2, 2, 64, 128).contiguous()
    given = Batch(images[0], images[1], flow, torch.zeros(2, 1, 64, 128, dtype=torch.bool))
    if truth != 'dense':
        given = sparse(given)
    if truth == 'none':
        given = replace(given, flow=torch.full_like(flow, torch.nan))
    objective = make_objective(Recipe(network='mscsl', objective={
        'scale_dropout': 0.0, 'refinement': 0.1}))
    losses = objective(network, given, seeded(0))
    losses.total.backward()
    assert set(losses.parts) == ({'epe', 'matching', 'refinement'} if variant == 'wosr'
                                 else {'epe', 'matching'})
    assert bool(torch.isfinite(losses.total))
    assert float(losses.total.detach()) == pytest.approx(
        sum(float(part) for part in losses.parts.values()), rel=1e-4)
    gradients = [value.grad for value in network.parameters() if value.grad is not None]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert (sum(float(gradient.abs().sum()) for gradient in gradients) > 0) == (truth != 'none')


def test_mscsl_leaves_scales_out_at_random_and_reconstructs_where_told() -> None:
    network = create('mscsl', **NARROW_MSCSL).train()
    image = 255 * torch.rand(1, 3, 64, 64, generator=seeded(0))
    given = Batch(image, image, torch.zeros(1, 2, 64, 64), None)
    used: list[int] = []
    inner = network.predictions
    network.predictions = lambda *images, scales: (used.append(scales),
                                                   inner(*images, scales=scales))[1]
    for dropout, counts in ((0.0, {4}), (1.0, {1, 2, 3})):
        objective = make_objective(Recipe(network='mscsl', objective={
            'scale_dropout': dropout, 'reconstruction': 0.005}))
        used.clear()
        parts = [objective(network, given, seeded(seed)).parts for seed in range(12)]
        assert set(used) == counts
        assert all('reconstruction' in part for part in parts)
    with pytest.raises(ValueError, match='scale_dropout must be a share'):
        make_objective(Recipe(network='mscsl', objective={'scale_dropout': 2.0}))


def test_the_reconstruction_loss_is_least_at_the_true_flow() -> None:
    second = torch.rand(1, 3, 12, 16, generator=seeded(0))
    first = second.roll((-1, -2), (2, 3))  # first(x) = second(x + (2, 1))
    flow = torch.zeros(1, 2, 48, 64)
    flow[:, 0], flow[:, 1] = 8.0, 4.0  # full-resolution px
    right = reconstruction_loss(first, second, flow)
    assert float(right) < 0.01 < float(reconstruction_loss(first, second, 0 * flow))
    far = reconstruction_loss(first, second, torch.full_like(flow, 500.0))
    assert float(far) == 0  # nothing left in the image


def test_the_correlations_learn_the_true_displacement() -> None:
    truth = torch.zeros(1, 2, 32, 32)
    truth[:, 0], truth[:, 1] = 16.0, -8.0
    right, wrong = (torch.zeros(1, 49, 4, 4) for _ in range(2))
    right[:, 7 * (-1 + 3) + 2 + 3] = 9.0
    wrong[:, 0] = 9.0
    losses = [float(correlation_loss([(8, planes, 3)], truth, None)) for planes in (right, wrong)]
    assert losses[0] < 0.01 < 20 < losses[1]
    assert float(correlation_loss([(8, wrong, 3)], 4 * truth, None)) == 0  # out of reach
