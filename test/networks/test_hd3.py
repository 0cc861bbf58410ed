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

"""HD3 against what the published networks compute, and its promises as a FlowNetwork."""

from collections.abc import Iterator
from functools import cache
import os
from pathlib import Path

import numpy as np
import pytest
from seeded_weights import seeded_tensor, true_flow
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.networks.base import count_parameters
from flow_ros.networks.hd3 import HD3, HD3Config, HD3Predictions, LEVELS, working_size
from flow_ros.ops.cost_volume import correlation, masked_warp
from flow_ros.ops.match_density import probability_to_vector, splat
from flow_ros.training.density import density_loss

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get('FLOW_ROS_SHARED', REPOSITORY.parent / 'shared')) / 'parity'
SMALL = REPOSITORY / 'test' / 'data' / 'hd3_parity.npz'
GATE = 1e-3

needs_shared = pytest.mark.skipif(
    not (SHARED / 'hd3fc_output.npz').is_file(),
    reason=f'the whole parity outputs are not at {SHARED}: set FLOW_ROS_SHARED; the thinned '
           f'ones in test/data were checked')

PUBLISHED = {
    'hd3f': HD3Config(context=False),
    'hd3fc': HD3Config(),
    'hd3f_vgg': HD3Config(encoder='vgg', decoder='resnet', context=False)}

SMALLEST = {'encoder': 'vgg', 'decoder': 'resnet', 'context': False, 'decoder_width': 8}


@pytest.fixture(scope='module', autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def parity() -> dict[str, np.ndarray]:
    with np.load(SMALL) as data:
        return {key: data[key] for key in data.files}


def pair(crop: int = 128) -> tuple[Tensor, Tensor]:
    """Return the parity images (1, 3, 128, 192), or their left upper part."""
    first, second = (torch.from_numpy(parity()[key]).permute(2, 0, 1)[None].float()
                     for key in ('image1', 'image2'))
    return first[..., :crop, :crop * 3 // 2], second[..., :crop, :crop * 3 // 2]


@cache
def seeded(config: HD3Config) -> HD3:
    """Return the network with the weights of the parity runs, in eval mode."""
    network = HD3(config)
    network.load_state_dict({key: torch.from_numpy(seeded_tensor(
        key, tuple(value.shape), 6.0 if key.endswith(('cls.2.weight', 'cls.weight')) else 1.0))
        for key, value in network.state_dict().items()})
    return network.eval()


def small(**options: object) -> HD3:
    """Return a small network with weights that make it move things."""
    return seeded(HD3Config(**{**SMALLEST, **options}))


@cache
@torch.no_grad()
def outputs(name: str) -> dict[str, Tensor]:
    """Return what one of the published networks computes, under the names of the parity data."""
    network, (image1, image2) = seeded(PUBLISHED[name]), pair()
    first, second = (network.encode(image).tensors for image in (image1, image2))
    seen = network.predictions(image1, image2)
    truth = torch.from_numpy(true_flow(128, 192))[None]
    flow, vector, density = (torch.from_numpy(parity()[f'{name}_unit_{key}'])
                             for key in ('warp_flow', 'density_vec', 'density'))
    computed = {'feat_quarter_1': first[-1],
                'unit_corr_coarsest': correlation(first[0], second[0], 4),
                'unit_warp': masked_warp(second[3][:, :16], flow),
                'unit_density': splat(vector, 4),
                'unit_density_back': probability_to_vector(density)[0],
                'flow_full': network(image1, image2).flow,
                'loss_total': density_loss(seen.logits, seen.vectors, truth)}
    for level in range(5):
        computed |= {f'logits{level}': seen.logits[level], f'vect{level}': seen.vectors[level],
                     f'confidence{level}': seen.confidences[level]}
    return computed


def thin(key: str, values: Tensor) -> Tensor:
    """Do what test/data/cut_hd3_parity.py did."""
    many = key.startswith(('logits', 'feat_'))
    if many:
        values = values[:, ::4]
    if key == 'flow_full' or many and values.shape[-1] * values.shape[-2] > 16 * 16:
        values = values[..., ::3, ::3]
    return values


# Parity.


@pytest.mark.parametrize('name', PUBLISHED)
def test_equals_the_published_network(name: str) -> None:
    for key, computed in outputs(name).items():
        expected = torch.from_numpy(parity()[f'{name}_{key}'])
        got = thin(key, computed)
        assert got.shape == expected.shape, key
        assert float((got - expected).abs().max()) < GATE, key


@needs_shared
@pytest.mark.parametrize('name', PUBLISHED)
def test_equals_the_published_network_at_every_pixel(name: str) -> None:
    with np.load(SHARED / f'{name}_output.npz') as whole:
        for key, computed in outputs(name).items():
            expected = torch.from_numpy(whole[key])
            assert float((computed - expected).abs().max()) < GATE, key
            if f'{name}_{key}' in parity():
                kept = torch.from_numpy(parity()[f'{name}_{key}'])
                assert torch.equal(thin(key, expected), kept), key


@pytest.mark.parametrize(('config', 'tensors', 'parameters'), [
    (PUBLISHED['hd3f'], 687, 39_561_975),
    (PUBLISHED['hd3fc'], 698, 39_942_647),
    (PUBLISHED['hd3f_vgg'], 312, 5_955_599),
    (HD3Config(encoder='vgg', context=False), 342, 6_121_999)])
def test_state_dict_is_the_published_one(config: HD3Config, tensors: int,
                                         parameters: int) -> None:
    network = HD3(config)
    assert len(network.state_dict()) == tensors
    assert count_parameters(network) == parameters
    encoder = {'dlaup': 34_288_176, 'vgg': 1_667_400}[config.encoder]
    assert count_parameters(network.encoder) == encoder


def test_options_leave_the_keys_and_change_only_shapes_they_must() -> None:
    def shapes(**options: object) -> dict[str, torch.Size]:
        state = HD3(HD3Config(**{**SMALLEST, **options})).state_dict()
        return {key: value.shape for key, value in state.items()}

    plain = shapes()
    for options in ({'cost': 'sample'}, {'measure': 'sad'}, {'stop_gradients': True},
                    {'calibration': (2.0, 1.0)}):
        assert shapes(**options) == plain
    for options in ({'cues': True}, {'radius': 8}):
        changed = shapes(**options)
        assert changed.keys() == plain.keys()
        assert not any(key.startswith('encoder') for key in plain if plain[key] != changed[key])
    cues = shapes(cues=True)
    first = 'Decoder_{}.mapping.block1.conv1.weight'
    assert [cues[first.format(level)][1] - plain[first.format(level)][1]
            for level in range(5)] == [8] * 5
    assert shapes(radius=8)['Decoder_4.cls.2.weight'][0] == 289


def test_a_fresh_network_starts_as_published() -> None:
    network = HD3()
    up = network.state_dict()['encoder.dla_up.ida_2.up_1.weight']
    rows = torch.tensor([0.25, 0.75, 0.75, 0.25])
    assert torch.equal(up, (rows[:, None] * rows).expand_as(up))
    weight = network.state_dict()['Decoder_1.mapping.block1.conv1.weight']
    assert float(weight.std()) == pytest.approx(0.02, rel=0.02)


# The acts.


@pytest.mark.parametrize('options', [
    {}, {'decoder': 'hda'}, {'context': True}, {'cost': 'sample'}, {'radius': 8},
    {'measure': 'sad'}, {'stop_gradients': True}, {'cues': True},
    {'cost': 'sample', 'radius': 8, 'measure': 'sad', 'stop_gradients': True, 'cues': True}],
    ids=lambda options: '+'.join(map(str, options)) or 'plain')
def test_every_option_runs_alone_and_all_together(options: dict[str, object]) -> None:
    image1, image2 = pair(64)
    network = small(**options)
    with torch.no_grad():
        output = network(image1, image2)
        plain = small()(image1, image2)
    assert output.flow.shape == (1, 2, 64, 96) and output.confidence.shape == (1, 1, 64, 96)
    assert bool(torch.isfinite(output.flow).all())
    assert 0 < float(output.confidence.min()) and float(output.confidence.max()) <= 1
    assert (output.occlusion is not None) == bool(options.get('cues'))
    same = torch.equal(output.flow, plain.flow)
    assert same == (options in ({}, {'stop_gradients': True}))  # the rest does change something


@pytest.mark.parametrize('cues', [False, True])
@torch.no_grad()
def test_a_budget_stops_at_a_coarser_level(cues: bool) -> None:
    network, (image1, image2) = small(cues=cues), pair(128)
    a, b = network.encode(image1), network.encode(image2)
    state, flows = network.start(a, b), []
    while state.schedule:
        state = network.step(state)
        output = network.finish(state)
        assert output.flow.shape == image1[:, :2].shape
        assert output.confidence is not None and output.confidence.shape[-2:] == (128, 192)
        flows.append(output.flow)
    assert [step.level for step in state.done] == list(LEVELS)
    for count, flow in enumerate(flows, start=1):
        assert torch.equal(network(image1, image2, iterations=count).flow, flow)
    assert torch.equal(network(image1, image2, iterations=12).flow, flows[-1])
    assert all(not torch.equal(one, other) for one, other in zip(flows, flows[1:]))
    with pytest.raises(ValueError, match='all 5 levels of this state are done'):
        network.step(state)


def test_working_sizes() -> None:
    assert working_size((448, 1024)) == (448, 1024)
    assert working_size((436, 1024)) == (448, 1024)  # Sintel
    assert working_size((375, 1242)) == (384, 1280)  # KITTI
    assert working_size((480, 640)) == (448, 640)  # as far off as 512, and smaller
    assert working_size((40, 70)) == (64, 128)
    assert working_size((65, 65)) == (64, 64)


@pytest.mark.parametrize('size', [(100, 150), (40, 70), (128, 200)])
@torch.no_grad()
def test_any_size_is_worked_on_in_multiples_of_64(size: tuple[int, int]) -> None:
    network = small(cues=True)
    image1, image2 = (functional.interpolate(image, size=size, mode='bilinear')
                      for image in pair())
    output = network(image1, image2)
    working = working_size(size)
    assert output.flow.shape[-2:] == size and output.occlusion.shape[-2:] == size
    resized = network(*(functional.interpolate(image, size=working, mode='bilinear',
                                               align_corners=True) for image in (image1, image2)))
    expected = functional.interpolate(resized.flow, size=size, mode='bilinear',
                                      align_corners=True)
    scale = torch.tensor([size[1] / working[1], size[0] / working[0]])[None, :, None, None]
    assert torch.allclose(output.flow, expected * scale, atol=1e-3)


@pytest.mark.parametrize('cues', [False, True])
@torch.no_grad()
def test_a_prior_is_where_the_coarsest_level_starts(cues: bool) -> None:
    network, (image1, image2) = small(cues=cues), pair()
    a, b = network.encode(image1), network.encode(image2)
    cold = network(image1, image2)
    zero = network(image1, image2, prior_flow=torch.zeros(1, 2, 128, 192))
    assert torch.equal(cold.flow, zero.flow)
    prior = torch.tensor([64.0, -32.0])[None, :, None, None].expand(1, 2, 128, 192)
    state = network.start(a, b, prior_flow=prior)
    assert state.warm and state.level == 64
    assert torch.allclose(state.flow[0, :, 0, 0], torch.tensor([1.0, -0.5]))
    assert torch.allclose(network.finish(state).flow, prior)  # before the first level
    stepped = network.step(state)
    assert float((stepped.flow - state.flow).abs().max()) <= 4  # a residual to the prior


@torch.no_grad()
def test_a_prior_finds_what_lies_beyond_the_coarsest_reach() -> None:
    # A shift by 6 cells of 1/64: a radius of 4 does not reach it, a prior makes it the centre.
    network = small(cost='sample')
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 196, 8, 16, generator=generator)
    moved = maps.roll(6, 3)
    offset = torch.tensor([6.0, 0.0])[None, :, None, None].expand(1, 2, 8, 16)
    seen: list[Tensor] = []
    handle = network.cost_bn_0.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    network.step0_engine(maps, moved, torch.zeros(1, 2, 8, 16))
    network.step0_engine(maps, moved, offset)
    handle.remove()
    centre = [float(cost[0, 40, :, :8].mean()) for cost in seen]
    assert centre[1] > 0.9 and abs(centre[0]) < 0.1


@torch.no_grad()
def test_the_density_is_there_on_request() -> None:
    network, (image1, image2) = small(cues=True), pair()
    found = network.densities(image1, image2)
    assert [each.level for each in found] == list(LEVELS)
    seen = network.predictions(image1, image2)
    for index, each in enumerate(found):
        rows, columns = 128 // each.level, 192 // each.level
        assert each.density.shape == (1, 81, rows, columns)
        assert torch.allclose(each.density.sum(dim=1), torch.ones(1, rows, columns), atol=1e-5)
        assert torch.allclose(each.flow, seen.vectors[index][:1], atol=1e-3)
        assert torch.allclose(each.confidence, seen.confidences[index][:1], atol=1e-4)
        # The window of the greatest mass lies about the flow: no farther than the search.
        offset = (each.flow - each.centre) / each.level
        assert float(offset.abs().max()) <= 4
        assert each.cell == (each.level, each.level)
    coarser = functional.interpolate(found[0].flow, size=(4, 6), mode='bilinear',
                                     align_corners=True)
    assert torch.allclose(found[1].centre, coarser, atol=1e-3)
    with pytest.raises(ValueError, match='no level of this state is done'):
        network.density(network.start(network.encode(image1), network.encode(image2)))


@torch.no_grad()
def test_the_confidence_is_calibrated_by_the_options() -> None:
    image1, image2 = pair(64)
    plain = small()(image1, image2).confidence
    steeper = small(calibration=(2.0, -1.0))
    p = small().predictions(image1[..., :64], image2[..., :64]).confidences[-1]
    expected = torch.sigmoid(2 * torch.log(p / (1 - p)) - 1)
    assert torch.allclose(steeper.calibrated(p), expected, atol=1e-5)
    assert not torch.allclose(steeper(image1, image2).confidence, plain)


@torch.no_grad()
def test_with_cues_the_backward_flow_is_the_forward_flow_of_the_exchanged_pair() -> None:
    network, (image1, image2) = small(cues=True), pair()
    one, other = network.predictions(image1, image2), network.predictions(image2, image1)
    for level in range(5):
        assert torch.allclose(one.vectors[level][1:], other.vectors[level][:1], atol=1e-3)
    assert torch.allclose(one.flow[:1], network(image1, image2).flow, atol=1e-3)


@torch.no_grad()
def test_a_batch_is_its_samples() -> None:
    network, (image1, image2) = small(cues=True), pair()
    both = network(torch.cat([image1, image2]), torch.cat([image2, image1]))
    assert torch.allclose(both.flow[:1], network(image1, image2).flow, atol=1e-3)
    assert torch.allclose(both.flow[1:], network(image2, image1).flow, atol=1e-3)


@torch.no_grad()
def test_occlusion_is_where_the_directions_contradict_each_other() -> None:
    network = small(cues=True)
    image = pair(64)[0]
    state = network.start(network.encode(image), network.encode(image))
    state = network.step(state)
    flow = torch.zeros(2, 2, 1, 1)  # both at rest: nothing speaks against them
    assert float(network.finish(_with(state, flow)).occlusion.max()) == 0
    flow[1, 0] = 0.5  # half a cell is 32 px
    assert float(network.finish(_with(state, flow)).occlusion.min()) > 0.7
    flow[0, 0] = 3.0  # out of the image
    assert float(network.finish(_with(state, flow)).occlusion.min()) == 1


def _with(state: object, flow: Tensor) -> object:
    """Return ``state`` after level 0 of a 64x96 frame with both flows given for each cell."""
    cells = flow.expand(2, 2, *state.flow.shape[-2:])
    return state.advanced(flow=cells[:1], memory=(cells, *state.memory[1:]))


# Training.


def predictions(network: HD3, **options: object) -> HD3Predictions:
    image1, image2 = pair()
    return network.predictions(image1[..., :128], image2[..., :128], **options)


def test_gradients_go_through_the_flow_unless_stopped() -> None:
    for stopped in (False, True):
        network = HD3(HD3Config(**SMALLEST, stop_gradients=stopped))
        seen = predictions(network)
        # The finest flow is the sum of all residuals; those of the coarsest level's decoder
        # reach it as summands, or not at all.
        seen.vectors[-1].square().sum().backward()
        bias = network.get_parameter('Decoder_0.cls.2.bias').grad
        assert (bias is None or float(bias.abs().max()) == 0) == stopped
        # The features' gradients stay, as the paper has it.
        assert float(network.get_parameter('encoder.block_5.conv1.weight').grad.abs().max()) > 0


def test_both_directions_are_there_without_cues_as_well() -> None:
    network = small()
    with torch.no_grad():
        both, forward = predictions(network, both=True), predictions(network)
    assert both.flow.shape[0] == 2 and forward.flow.shape[0] == 1
    assert torch.allclose(both.flow[:1], forward.flow, atol=1e-3)


@torch.no_grad()
def test_training_under_autocast_keeps_flow_in_float32() -> None:
    with torch.autocast('cpu', torch.bfloat16):
        seen = predictions(small(cost='sample', cues=True))
    assert seen.logits[-1].dtype == torch.bfloat16
    assert {values.dtype for values in (*seen.vectors, *seen.confidences, seen.flow)} == {
        torch.float32}


def test_training_tells_where_the_first_level_started() -> None:
    network = small()
    prior = torch.full((1, 2, 128, 128), 64.0)
    with torch.no_grad():
        seen = predictions(network, prior_flow=prior)
    assert seen.prior is not None and torch.allclose(seen.prior, torch.full((1, 2, 2, 2), 64.0))
    assert predictions(network).prior is None


def test_training_wants_multiples_of_64() -> None:
    with pytest.raises(ValueError, match='multiples of 64; seen 100x128'):
        small().predictions(torch.zeros(1, 3, 100, 128), torch.zeros(1, 3, 100, 128))


# Runtimes.


@pytest.mark.parametrize(('options', 'engine'), [
    ({}, 'encode'), ({'cost': 'sample', 'cues': True, 'decoder': 'hda'}, 'step1'),
    ({'context': True}, 'step4')], ids=['encode', 'sample+cues+hda', 'context'])
@torch.no_grad()
def test_openvino_computes_the_same(options: dict[str, object], engine: str, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('openvino')
    from flow_ros.runtimes import create_runtime
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path))
    network, (image1, image2) = small(**options), pair(64)
    inputs: list[tuple[Tensor, ...]] = []

    def call(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        if name == engine:
            inputs.append(tensors)
        return network.engine(name, *tensors)

    state = network.start(network.encode(image1, call=call), network.encode(image2, call=call))
    while state.schedule:
        state = network.step(state, call=call)
    expected = network.engine(engine, *inputs[0])
    runtime = create_runtime('openvino', network, threads=1)
    for got, wanted in zip(runtime.call(engine, *inputs[0]), expected, strict=True):
        assert torch.allclose(got, wanted, atol=2e-3)


# Bad input.


@pytest.mark.parametrize(('options', 'words'), [
    ({'encoder': 'resnet'}, "encoder must be one of .*seen 'resnet'"),
    ({'radius': 5}, 'radius must be one of'),
    ({'cost': 'none'}, 'cost must be one of'),
    ({'decoder_width': 0}, 'decoder_width must be at least 1'),
    ({'calibration': (1.0, float('nan'))}, 'calibration must be two finite numbers'),
    ({'calibration': (1.0,)}, 'calibration must be two finite numbers')])
def test_options_are_checked(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HD3Config(**options)


@torch.no_grad()
def test_bad_input_is_named() -> None:
    network, (image1, image2) = small(), pair(64)
    a, b = network.encode(image1), network.encode(image2[..., :64])
    with pytest.raises(ValueError, match=r'one size and batch; seen \(64, 96\) and \(64, 64\)'):
        network.start(a, b)
    for iterations in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match='iterations of HD3 are levels'):
            network.start(a, a, iterations=iterations)
    with pytest.raises(ValueError, match=r'prior_flow must be \(B, 2, 64, 96\)'):
        network.start(a, a, prior_flow=torch.zeros(1, 2, 64, 64))
    with pytest.raises(ValueError, match='the batch of the features, 1; seen 2'):
        network.start(a, a, prior_flow=torch.zeros(2, 2, 64, 96))
    with pytest.raises(ValueError, match='NaN or infinite'):
        network.start(a, a, prior_flow=torch.full((1, 2, 64, 96), torch.nan))
