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

"""DIP-RT: its limits, its acts, and that they are the same computation in every guise."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flow_ros.networks import count_parameters, create, save, WeightsError
from flow_ros.networks.dip_rt import ConvNorm, DipRt, error_probability
from flow_ros.ops.sampling import pixel_grid

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def network() -> DipRt:
    torch.manual_seed(0)
    made = create('dip_rt')
    assert isinstance(made, DipRt)
    return made


def images(height: int, width: int, count: int = 2, batch: int = 1) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [255 * torch.rand(batch, 3, height, width, generator=random) for _ in range(count)]


def test_at_most_two_and_a_half_million_parameters(network: DipRt) -> None:
    assert count_parameters(network) == 1_073_463


@torch.no_grad()
def test_at_most_15_gflop_per_frame_on_a_stream(network: DipRt) -> None:
    """One encoder pass, two warm iterations at both levels, one upsampling; 2 x MAC."""
    previous, image = images(448, 1024)
    features = network.encode(previous)
    prior = torch.full((1, 2, 448, 1024), 70.0)  # large enough to ask for both levels
    with FlopCounterMode(display=False) as counter:
        state = network.start(features, network.encode(image), prior_flow=prior, iterations=2)
        while state.schedule:
            state = network.step(state)
        network.finish(state)
    assert [step.level for step in state.done] == [16, 16, 8, 8]
    assert 10e9 < counter.get_total_flops() <= 15e9


def test_a_norm_in_the_weights_follows_what_becomes_of_them() -> None:
    """Nothing of it is kept: loaded, trained and copied it is the norm of the map."""
    torch.manual_seed(0)
    part = ConvNorm(5, 7, 3, 2).eval()
    assert set(part.state_dict()) == {'0.weight', '1.weight', '1.bias', '1.running_mean',
                                      '1.running_var', '1.num_batches_tracked'}
    x = torch.randn(2, 5, 9, 11)
    for _ in range(3):
        with torch.no_grad():
            folded = part(x)
        plain = part(x)  # with gradients
        assert plain.requires_grad and not folded.requires_grad
        torch.testing.assert_close(folded, plain.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(folded, part[1](part[0](x)).detach(), rtol=0, atol=1e-5)
        part.train()
        optimiser = torch.optim.SGD(part.parameters(), lr=1e-3)
        optimiser.zero_grad()
        part(3 * x + 1).square().sum().backward()
        optimiser.step()
        part = copy.deepcopy(part).eval()


@torch.no_grad()
@pytest.mark.parametrize('size', [(64, 96), (50, 70), (33, 47)])
def test_any_size_gives_full_resolution(network: DipRt, size: tuple[int, int]) -> None:
    output = network(*images(*size, batch=2), iterations=1)
    assert output.flow.shape == (2, 2, *size)
    for share in (output.confidence, output.occlusion):
        assert share.shape == (2, 1, *size)
        assert bool(((share >= 0) & (share <= 1)).all())


@torch.no_grad()
@pytest.mark.parametrize('size', [(48, 64), (40, 58)])
def test_what_leaves_the_image_is_occluded(network: DipRt, size: tuple[int, int]) -> None:
    """Also where the padded image goes on."""
    one, two = (network.encode(image) for image in images(*size))
    state = network.start(one, two, prior_flow=torch.full((1, 2, *size), 5.0), iterations=1)
    output = network.finish(state)
    target = output.flow[0] + pixel_grid(*size, output.flow)[0]
    leaves = (target[0] > size[1] - 0.5) | (target[1] > size[0] - 0.5)
    assert bool(leaves.any())
    assert bool((output.occlusion[0, 0][leaves] == 1).all())
    assert bool((output.occlusion[0, 0][5:25, 5:25] < 1).all())


@torch.no_grad()
def test_there_is_a_flow_after_every_step(network: DipRt) -> None:
    one, two = (network.encode(image) for image in images(48, 64))
    state = network.start(one, two, iterations=2)
    seen = []
    while state.schedule:
        state = network.step(state)
        seen.append(network.finish(state).flow)
    assert [step.level for step in state.done] == [16, 16, 8, 8]
    assert all(flow.shape == (1, 2, 48, 64) and bool(flow.isfinite().all()) for flow in seen)
    whole = network(*images(48, 64), iterations=2).flow
    assert torch.equal(seen[-1], whole)
    assert not torch.equal(seen[0], seen[1])


@torch.no_grad()
@pytest.mark.parametrize(('motion_px', 'levels'), [(0.0, [8, 8]), (60.0, [8, 8]),
                                                   (-65.0, [16, 16, 8, 8])])
def test_a_warm_start_does_the_levels_its_motion_asks_for(
        network: DipRt, motion_px: float, levels: list[int]) -> None:
    one, two = (network.encode(image) for image in images(48, 64))
    prior = torch.zeros(1, 2, 48, 64)
    prior[:, 1] = motion_px
    state = network.start(one, two, prior_flow=prior, iterations=2)
    assert state.warm
    assert [step.level for step in state.schedule] == levels
    assert float(state.flow[:, 1].mean()) == pytest.approx(motion_px / levels[0], rel=1e-4)


@torch.no_grad()
def test_training_sees_what_inference_computes(network: DipRt) -> None:
    """Beside the matching features' detachment, which changes gradients only."""
    one, two = images(64, 96)
    seen = network.predictions(one, two, steps16=2, steps8=2)
    assert torch.allclose(seen.flow, network(one, two, iterations=2).flow, atol=1e-3)
    assert [level for level, _ in seen.levels] == [16] * 4 + [8] * 4


def test_every_parameter_is_trained(network: DipRt) -> None:
    network.train()
    seen = network.predictions(*images(64, 96), steps16=1, steps8=2)
    (seen.flow.sum() + seen.error.sum() + seen.occlusion.sum()
     + sum(flow.square().mean() for _, flow in seen.levels)).backward()
    network.eval()
    without = [name for name, value in network.named_parameters() if value.grad is None]
    network.zero_grad(set_to_none=True)
    assert without == []


VARIANTS = (
    {'propagation': 'clean'}, {'propagation': 'clean', 'seeds': 8}, {'seeds': 8},
    {'propagation': 'none'}, {'search': False}, {'search': False, 'propagation': 'clean'},
    {'radius': 1}, {'radius': 2, 'propagation': 'none'}, {'radius': 3, 'seeds': 8},
)


@pytest.mark.parametrize('options', VARIANTS)
def test_the_variants_of_the_ablations_run_and_train(options: dict) -> None:
    torch.manual_seed(0)
    network = create('dip_rt', **options)
    assert isinstance(network, DipRt)
    pair = images(64, 96)
    seen = network.predictions(*pair, steps16=2, steps8=2)
    with torch.no_grad():
        output = network(*pair, iterations=2)
    assert torch.allclose(seen.flow, output.flow, atol=1e-3)
    per_step = 1 if network.propagation is None else 2
    assert [level for level, _ in seen.levels] == [16] * 2 * per_step + [8] * 2 * per_step
    planes = ((2 * options.get('radius', 4) + 1) ** 2 if options.get('search', True)
              else options.get('seeds', 4) + 1)
    assert [costs.shape[1] for _, costs, _ in seen.matches] == [planes] * 4
    (seen.flow.sum() + seen.error.sum() + seen.occlusion.sum()
     + sum(flow.square().mean() for _, flow in seen.levels)).backward()
    without = [name for name, value in network.named_parameters()
               if value.grad is None or not bool(value.grad.isfinite().all())]
    assert without == []
    assert bool(network.encoder.head16.weight.grad[:network.config.match].any())


def test_what_each_variant_leaves_out() -> None:
    whole = create('dip_rt').state_dict()
    none = create('dip_rt', propagation='none').state_dict()
    assert {key for key in whole if not key.startswith('propagation.')} == set(none)
    clean = create('dip_rt', propagation='clean').state_dict()
    assert {key: value.shape for key, value in clean.items()} == {
        key: value.shape for key, value in whole.items()}
    alone = create('dip_rt', search=False).state_dict()
    assert set(alone) == set(none)
    assert alone['search.costs.weight'].shape == (64, 5, 1, 1)
    eight = create('dip_rt', seeds=8, radius=2).state_dict()
    assert {key for key in whole if whole[key].shape != eight[key].shape} == {
        'propagation.conv.weight', 'search.costs.weight'}


@torch.no_grad()
def test_clean_and_inverse_propagation_share_weights_but_not_results(network: DipRt) -> None:
    clean = create('dip_rt', propagation='clean')
    clean.load_state_dict(network.state_dict())
    pair = images(64, 96)
    smooth = torch.zeros(1, 2, 64, 96)
    features = [network.encode(image) for image in pair]
    flows = {}
    for made in (network, clean):
        # The pixel's own plane is the same; the seeds' are not, even where the flow is constant.
        costs = made.propagation_costs(features[0].tensors[3], features[1].tensors[3],
                                       smooth[..., ::8, ::8])
        flows[made] = made(*pair, iterations=1).flow
        equal = [torch.allclose(costs[:, index], costs[:, 0]) for index in range(5)]
        assert equal == [True] + [made is clean] * 4
    assert not torch.allclose(flows[network], flows[clean], atol=1e-4)


@pytest.mark.parametrize(('options', 'words'), [
    ({'propagation': 'both'}, "propagation must be one of .*seen 'both'"),
    ({'seeds': 5}, r'seeds must be one of \(4, 8\); seen 5'),
    ({'radius': 0}, 'radius must be .*seen 0'),
    ({'radius': True}, 'radius must be .*seen True'),
    ({'radius': 2.5}, r'radius must be .*seen 2\.5'),
    ({'propagation': 'none', 'search': False}, 'nothing to match by'),
])
def test_options_that_cannot_be_made_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create('dip_rt', **options)


def test_the_weights_of_another_variant_are_refused(network: DipRt, tmp_path: Path) -> None:
    path = tmp_path / 'weights.safetensors'
    save(network, path)
    with pytest.raises(WeightsError, match=r'made with radius=4, but radius=2 was asked'):
        create('dip_rt', path, radius=2)


def test_the_probability_of_a_small_error_follows_the_mixture() -> None:
    flow = torch.zeros(1, 2, 1, 3)
    flow[0, 0, 0, 2] = 200  # 5 % are 10 px
    error = torch.tensor([[20.0, -20, -20], [0, 3.0, 3.0]]).view(1, 2, 1, 3)
    seen = error_probability(flow, error).flatten().tolist()
    wide = 20.085537  # exp(3)
    expected = [1 - 2.718281828 ** -3, 1 - 2.718281828 ** (-3 / wide),
                1 - 2.718281828 ** (-10 / wide)]
    assert seen == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(('call', 'words'), [
    (lambda n: n(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 48)), 'one shape'),
    (lambda n: n(torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)), r'\(B, 3, H, W\)'),
    (lambda n: n(*images(32, 32), iterations=0), 'at least 1'),
    (lambda n: n(*images(32, 32), prior_flow=torch.zeros(1, 2, 16, 16)), 'full-resolution'),
    (lambda n: n(*images(32, 32), prior_flow=torch.full((1, 2, 32, 32), float('nan'))), 'NaN'),
    (lambda n: n(*images(32, 32, batch=2), prior_flow=torch.zeros(1, 2, 32, 32)), 'batch.*2'),
    (lambda n: n.step(replace(n.start(*[n.encode(i) for i in images(32, 32)]), schedule=())),
     'steps of this state are done'),
    (lambda n: n.engine('decode'), 'no engine'),
])
@torch.no_grad()
def test_bad_input_is_named(network: DipRt, call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(network)  # type: ignore[operator]
