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

"""DIP against what the published network computes, and its promises as a FlowNetwork."""

from collections.abc import Iterator
import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from seeded_weights import seeded_tensor, true_flow
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.networks.base import count_parameters
from flow_ros.networks.dip import DIP, DIPConfig, fixed_pattern, warm_levels
from flow_ros.ops.matching import inverse_propagation
from flow_ros.ops.patchmatch import local_search_released, propagation_correlation_released
from flow_ros.ops.sampling import warp

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get('FLOW_ROS_SHARED', REPOSITORY.parent / 'shared')) / 'parity'
SMALL = REPOSITORY / 'test' / 'data' / 'dip_parity.npz'
GATE_PX = 1e-3

needs_shared = pytest.mark.skipif(
    not (SHARED / 'dip_output.npz').is_file(),
    reason=f'the whole parity outputs are not at {SHARED}: set FLOW_ROS_SHARED; the thinned '
           f'ones in test/data were checked')

OUTPUTS = (
    'fmap1', 'fmap2',
    'unit_corr_propagation', 'unit_corr_search',
    'unit_propagation_net', 'unit_propagation_mask', 'unit_propagation_delta',
    'unit_propagation_up', 'unit_search_net', 'unit_search_mask', 'unit_search_delta',
    'unit_search_up',
    'cold_seed20_flow', 'cold_zero_first', 'cold_zero_after_1_16', 'cold_zero_last',
    'cold_zero_iters1',
    'warm_zero_noise_flow', 'warm_seed20_flow', 'warm3_zero_noise_flow', 'warm3_seed20_flow',
)


@pytest.fixture(scope='module', autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def parity() -> dict[str, np.ndarray]:
    with np.load(SMALL) as data:
        return {key: data[key] for key in data.files}


def seeded_dip(config: DIPConfig) -> DIP:
    network = DIP(config)
    weights = {key: torch.from_numpy(seeded_tensor(
        key, tuple(value.shape), 0.3 if 'flow_head.conv2' in key else 1.3))
        for key, value in network.state_dict().items()}
    network.load_state_dict(weights)
    return network.eval()


@pytest.fixture(scope='module')
def network() -> DIP:
    """Return DIP at the parity weights, starting at zeros."""
    return seeded_dip(DIPConfig(start_flow='zeros'))


def rgb(bgr: np.ndarray) -> Tensor:
    return torch.from_numpy(bgr[..., ::-1].copy()).permute(2, 0, 1)[None].float()


def whole(parity: dict[str, np.ndarray], key: str) -> Tensor:
    """Return a flow kept as one column (u) and one row (v)."""
    column, row = parity[f'{key}_column'], parity[f'{key}_row']
    size = (len(column), len(row))
    return torch.from_numpy(np.stack([np.broadcast_to(column[:, None], size),
                                      np.broadcast_to(row[None, :], size)])[None].copy())


def run(network: DIP, image1: Tensor, image2: Tensor, iterations: int,
        prior_flow: Tensor | None = None, noise: tuple[Tensor, ...] | None = None) -> Tensor:
    state = network.start(network.encode(image1), network.encode(image2),
                          prior_flow=prior_flow, iterations=iterations, noise=noise)
    while state.schedule:
        state = network.step(state)
    return network.finish(state).flow


@pytest.fixture(scope='module')
def outputs(network: DIP, parity: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Return what this implementation computes for every parity output."""
    image1, image2 = rgb(parity['image1']), rgb(parity['image2'])
    wide1, wide2 = rgb(parity['image1_320']), rgb(parity['image2_320'])
    given = {key: torch.from_numpy(parity[key]) for key in parity
             if key.endswith('init') or key[:-1].endswith('noise')}
    found: dict[str, Tensor] = {}
    with torch.inference_mode():
        features_a, features_b = network.encode(image1), network.encode(image2)
        found['fmap1'], found['fmap2'] = map1, map2 = features_a.tensors[0], features_b.tensors[0]
        flow = whole(parity, 'unit_flow')
        hidden, context = torch.tanh(map1[:, :128]), torch.relu(map1[:, 128:])
        for label, block, correlation in (
                ('propagation', network.update_block_s,
                 propagation_correlation_released(map1, map2, flow)),
                ('search', network.update_block,
                 local_search_released(map1, warp(map2, flow)))):
            net, delta = block(hidden, block.gru.shares(context), correlation, flow)
            found[f'unit_corr_{label}'] = correlation
            found[f'unit_{label}_net'] = net
            found[f'unit_{label}_delta'] = delta
            found[f'unit_{label}_mask'] = 0.25 * block.mask(net)
            found[f'unit_{label}_up'] = block.upsample(net, flow + delta)
        found['cold_seed20_flow'] = run(network, image1, image2, 6,
                                        noise=(given['cold_seed20_init'],))
        predictions = network.predictions(image1, image2, iterations=6)
        assert len(predictions) == 24
        found['cold_zero_first'] = predictions[0]
        found['cold_zero_after_1_16'] = predictions[11]
        found['cold_zero_last'] = predictions[-1]
        found['cold_zero_iters1'] = run(network, image1, image2, 1)
        init = whole(parity, 'warm_init')
        found['warm_zero_noise_flow'] = run(network, image1, image2, 3, init)
        found['warm_seed20_flow'] = run(network, image1, image2, 3, init,
                                        (given['warm_seed20_noise0'],))
        init = whole(parity, 'warm3_init')
        found['warm3_zero_noise_flow'] = run(network, wide1, wide2, 2, init)
        found['warm3_seed20_flow'] = run(
            network, wide1, wide2, 2, init,
            tuple(given[f'warm3_seed20_noise{level}'] for level in range(3)))
    return found


# The published network.


@pytest.mark.parametrize('key', OUTPUTS)
def test_equals_the_published_network(key: str, outputs: dict[str, Tensor],
                                      parity: dict[str, np.ndarray]) -> None:
    found = outputs[key].numpy()
    if found.shape[1] > 100:
        found = found[:, ::4]
    found = found[..., ::3, ::3]
    assert found.shape == parity[key].shape
    assert np.abs(found - parity[key]).max() < GATE_PX


@needs_shared
def test_equals_the_published_network_at_every_pixel(outputs: dict[str, Tensor]) -> None:
    with np.load(SHARED / 'dip_output.npz') as data:
        errors = {key: float(np.abs(outputs[key].numpy() - data[key]).max()) for key in OUTPUTS}
    assert max(errors.values()) < GATE_PX, errors


@needs_shared
def test_the_copied_parity_data_are_the_whole_ones(parity: dict[str, np.ndarray]) -> None:
    with np.load(SHARED / 'dip_input.npz') as data:
        for key in ('image1', 'image2', 'image1_320', 'image2_320'):
            assert np.array_equal(parity[key], data[key])
    with np.load(SHARED / 'dip_output.npz') as data:
        for key in ('unit_flow', 'warm_init', 'warm3_init'):
            assert np.array_equal(whole(parity, key).numpy(), data[key])
        assert set(OUTPUTS) <= set(data.files)


def test_the_warm_prior_of_the_parity_data_is_the_true_flow(
        parity: dict[str, np.ndarray]) -> None:
    assert np.abs(whole(parity, 'warm_init')[0].numpy() - true_flow(128, 192)).max() < 1e-5


def test_the_start_pattern_and_the_noise_are_the_released_ones(
        parity: dict[str, np.ndarray]) -> None:
    for key, amplitude in (('cold_seed20_init', 16), ('warm_seed20_noise0', 16),
                           ('warm3_seed20_noise0', 16), ('warm3_seed20_noise1', 4),
                           ('warm3_seed20_noise2', 4)):
        expected = torch.from_numpy(parity[key])
        size = (expected.shape[-2], expected.shape[-1])
        assert torch.equal(fixed_pattern(size) * amplitude, expected)


def test_options_choose_the_start_pattern_and_the_noise(
        parity: dict[str, np.ndarray]) -> None:
    wide = rgb(parity['image1_320'])
    fixed = seeded_dip(DIPConfig(warm_noise=1.0))
    silent = seeded_dip(DIPConfig(start_flow='zeros'))
    assert DIPConfig() == DIPConfig(start_flow='fixed', warm_noise=0.0)
    features = fixed.encode(wide)
    prior = whole(parity, 'warm3_init')
    pattern = torch.from_numpy(parity['warm3_seed20_noise0'])
    assert torch.equal(fixed.start(features, features).flow, pattern)
    assert not silent.start(features, features).flow.any()
    quiet = silent.start(features, features, prior_flow=prior).flow
    noisy = fixed.start(features, features, prior_flow=prior).flow
    assert torch.equal(noisy, quiet + pattern)


def test_noise_of_the_options_is_the_noise_given(outputs: dict[str, Tensor],
                                                 parity: dict[str, np.ndarray]) -> None:
    released = seeded_dip(DIPConfig(warm_noise=1.0))
    with torch.inference_mode():
        flow = released(rgb(parity['image1_320']), rgb(parity['image2_320']), iterations=2,
                        prior_flow=whole(parity, 'warm3_init')).flow
    assert torch.equal(flow, outputs['warm3_seed20_flow'])


def test_state_dict_has_exactly_the_published_keys() -> None:
    layers = ['fnet.conv1', 'fnet.conv2']
    layers += [f'fnet.layer{layer}.{block}.{part}' for layer in (1, 2, 3) for block in (0, 1)
               for part in ('conv1', 'conv2', 'downsample.0')]
    heads = ['flow_head.conv1', 'flow_head.conv2', 'mask.0', 'mask.2']
    small = [f'encoder.{part}' for part in ('convc1', 'convf1', 'convf2', 'conv')]
    small += ['gru.convz', 'gru.convr', 'gru.convq', *heads]
    basic = [f'encoder.{part}' for part in ('convc1', 'convc2', 'convf1', 'convf2', 'conv')]
    basic += [f'gru.conv{gate}{index}' for index in (1, 2) for gate in 'zrq'] + heads
    layers += [f'update_block_s.{part}' for part in small]
    layers += [f'update_block.{part}' for part in basic]
    expected = {f'{layer}.{leaf}' for layer in layers for leaf in ('weight', 'bias')}
    network = DIP()
    assert set(network.state_dict()) == expected
    assert len(expected) == 92
    assert count_parameters(network) == 5_371_968
    assert count_parameters(network.fnet) == 1_100_992
    assert count_parameters(network.update_block_s) == 1_830_128
    assert count_parameters(network.update_block) == 2_440_848


# The same network written plainly.


@pytest.fixture(scope='module')
def plain(network: DIP) -> Any:
    """Return the network of bench/plain_dip.py: no reuse, all masks, the shifted stack."""
    spec = importlib.util.spec_from_file_location('plain_dip', REPOSITORY / 'bench/plain_dip.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.PlainDIP().eval()
    made.load_state_dict(network.state_dict())
    return made


@pytest.mark.parametrize('cold_levels', [(16, 4), (16, 8, 4)])
def test_cold_it_equals_the_plain_network(plain: Any, cold_levels: tuple[int, ...],
                                          parity: dict[str, np.ndarray]) -> None:
    image1, image2 = rgb(parity['image1']), rgb(parity['image2'])
    height, width = image1.shape[-2:]
    ours = seeded_dip(DIPConfig(start_flow='zeros', cold_levels=cold_levels))
    with torch.inference_mode():
        expected = plain(image1, image2, start=torch.zeros(1, 2, height // 16, width // 16),
                         levels=cold_levels, iterations=2, warm=False)
        assert (ours(image1, image2, 2).flow - expected).abs().max() < GATE_PX
    assert expected.abs().max() > 1


@pytest.mark.parametrize(('prior_px', 'levels'), [(20.0, (4,)), (50.0, (8, 4)),
                                                  (90.0, (16, 8, 4))])
@pytest.mark.parametrize('direct', [True, False])
def test_warm_it_equals_the_plain_network(
        network: DIP, plain: Any, prior_px: float, levels: tuple[int, ...], direct: bool,
        parity: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """On all levels, with convolutions of both forms whatever the size of the map."""
    monkeypatch.setattr('flow_ros.ops.winograd.LEAST_CELLS', 10 ** 9 if direct else 1)
    image1, image2 = rgb(parity['image1_320']), rgb(parity['image2_320'])
    height, width = image1.shape[-2:]
    prior = torch.full((1, 2, height, width), prior_px)
    start = torch.full((1, 2, height // levels[0], width // levels[0]), prior_px / levels[0])
    with torch.inference_mode():
        assert network.start(network.encode(image1), network.encode(image2),
                             prior_flow=prior).level == levels[0]
        expected = plain(image1, image2, start=start, levels=levels, iterations=2, warm=True)
        found = network(image1, image2, 2, prior).flow
        assert (found - expected).abs().max() < GATE_PX
    assert (expected - prior).abs().max() > 1


def test_the_plain_network_equals_the_published_one(plain: Any,
                                                    parity: dict[str, np.ndarray]) -> None:
    image1, image2 = rgb(parity['image1']), rgb(parity['image2'])
    height, width = image1.shape[-2:]
    with torch.inference_mode():
        found = plain(image1, image2, start=torch.zeros(1, 2, height // 16, width // 16),
                      levels=(16, 4), iterations=1, warm=False)
    assert np.abs(found.numpy()[..., ::3, ::3] - parity['cold_zero_iters1']).max() < GATE_PX


# The matching, against the plainest possible formulation.


def naive_propagation(map1: Tensor, map2: Tensor, flow: Tensor) -> Tensor:
    """Build the stack of 1280 channels and pair it as the released network does."""
    seeds = ((0, 0), (-1, -1), (1, -1), (-1, 1), (1, 1))
    height, width = map2.shape[-2:]
    padded = functional.pad(map2, (1, 1, 1, 1), mode='replicate')
    stack = torch.cat([padded[:, :, 1 + dy:1 + dy + height, 1 + dx:1 + dx + width]
                       for dx, dy in seeds], dim=1)
    warped = warp(stack, flow)
    half = map1.shape[1] // 2
    planes = [sum(map1[:, 2 * k + group] * warped[:, 10 * k + 5 * group + seed]
                  for k in range(half)) / half
              for group in (0, 1) for seed in range(5)]
    return torch.stack(planes, dim=1)


@pytest.mark.parametrize('size', [(9, 14), (4, 4), (1, 2), (1, 1)])
def test_fused_propagation_is_the_stack_also_beyond_the_border(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    map1, map2 = torch.randn(2, 2, 256, *size, generator=generator)
    flow = 8 * torch.randn(2, 2, *size, generator=generator)  # most targets are outside
    fused = propagation_correlation_released(map1, map2, flow)
    assert torch.allclose(fused, naive_propagation(map1, map2, flow), atol=1e-5)


def test_the_pairing_of_the_paper_would_not_pass(outputs: dict[str, Tensor],
                                                 parity: dict[str, np.ndarray]) -> None:
    map1, map2 = outputs['fmap1'], outputs['fmap2']
    flow = whole(parity, 'unit_flow')
    clean = torch.cat([inverse_propagation(map1[:, group::2], map2[:, group::2], flow)
                       for group in (0, 1)], dim=1)
    found = clean.numpy()[..., ::3, ::3]
    assert np.abs(found - parity['unit_corr_propagation']).max() > 1


def test_local_search_is_the_plain_loop() -> None:
    generator = torch.Generator().manual_seed(4)
    map1, map2 = torch.randn(2, 1, 6, 5, 7, generator=generator)
    found = local_search_released(map1, map2)
    for plane, y, x in ((0, 0, 0), (1, 4, 6), (7, 2, 3), (12, 1, 1), (24, 4, 6), (20, 0, 6)):
        dx, dy = plane // 5 - 2, plane % 5 - 2
        other = map2[0, :, min(max(y + dy, 0), 4), min(max(x + dx, 0), 6)]
        assert found[0, plane, y, x] == pytest.approx(float((map1[0, :, y, x] * other).mean()),
                                                      abs=1e-6)


def test_propagation_refuses_an_odd_number_of_channels() -> None:
    with pytest.raises(ValueError, match='same even number of channels; seen 3 and 3'):
        propagation_correlation_released(torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4),
                                         torch.zeros(1, 2, 4, 4))


# The four acts.


def crops(parity: dict[str, np.ndarray], height: int, width: int) -> tuple[Tensor, Tensor]:
    return (rgb(parity['image1'][:height, :width]), rgb(parity['image2'][:height, :width]))


def test_any_size_is_padded_with_black_centred_and_cropped(
        network: DIP, parity: dict[str, np.ndarray]) -> None:
    image1, image2 = crops(parity, 51, 70)  # pad: 6 and 7 rows, 5 and 5 columns
    pad = (5, 5, 6, 7)
    with torch.inference_mode():
        flow = network(image1, image2, 2).flow
        padded = network(functional.pad(image1, pad), functional.pad(image2, pad), 2).flow
    assert flow.shape == (1, 2, 51, 70)
    assert padded.shape == (1, 2, 64, 80)
    assert torch.allclose(flow, padded[:, :, 6:57, 5:75], atol=1e-5)


def test_a_warm_start_of_any_size(network: DIP, parity: dict[str, np.ndarray]) -> None:
    image1, image2 = crops(parity, 51, 70)
    prior = torch.full((1, 2, 51, 70), 20.0)
    state = network.start(network.encode(image1), network.encode(image2), prior_flow=prior)
    assert state.warm and state.level == 4
    assert torch.allclose(state.flow, torch.full((1, 2, 16, 20), 5.0))
    assert network.finish(state).flow.shape == (1, 2, 51, 70)


def test_a_batch_is_its_samples(parity: dict[str, np.ndarray]) -> None:
    network = seeded_dip(DIPConfig())
    image1, image2 = crops(parity, 48, 64)
    with torch.inference_mode():
        both = network(torch.cat([image1, image2]), torch.cat([image2, image1]), 2).flow
        first = network(image1, image2, 2).flow
        second = network(image2, image1, 2).flow
    assert torch.allclose(both, torch.cat([first, second]), atol=GATE_PX)
    assert (first - second).abs().max() > 1


def test_every_step_leaves_a_flow_that_finish_brings_to_the_frame(
        network: DIP, parity: dict[str, np.ndarray]) -> None:
    image1, image2 = crops(parity, 48, 60)
    with torch.inference_mode():
        predictions = network.predictions(image1, image2, iterations=2)
        state = network.start(network.encode(image1), network.encode(image2), iterations=2)
        assert bool(torch.isfinite(network.finish(state).flow).all())
        assert [step.level for step in state.schedule] == [16, 16, 4, 4]
        for index in range(4):
            state = network.step(state)
            assert len(state.done) == index + 1 and len(state.schedule) == 3 - index
            assert state.level == state.done[-1].level
            found = network.finish(state)
            assert found.confidence is None and found.occlusion is None
            assert torch.allclose(found.flow, predictions[2 * index + 1], atol=1e-4)
    with pytest.raises(ValueError, match='all 4 steps of this state are done'):
        network.step(state)


def test_the_schedule_has_six_iterations_per_level_by_default(network: DIP) -> None:
    features = network.encode(torch.zeros(1, 3, 16, 16))
    levels = [step.level for step in network.start(features, features).schedule]
    assert levels == [16] * 6 + [4] * 6


def test_a_cold_start_may_visit_the_middle_level(parity: dict[str, np.ndarray]) -> None:
    network = seeded_dip(DIPConfig(cold_levels=(16, 8, 4)))
    image1, image2 = crops(parity, 64, 96)
    with torch.inference_mode():
        state = network.start(network.encode(image1), network.encode(image2), iterations=2)
        assert [step.level for step in state.schedule] == [16, 16, 8, 8, 4, 4]
        while state.schedule:
            state = network.step(state)
            height, width = 64 // state.level, 96 // state.level
            assert tuple(state.flow.shape) == (1, 2, height, width)
        flow = network.finish(state).flow
        assert flow.shape == (1, 2, 64, 96) and bool(flow.isfinite().all())
        assert (flow - seeded_dip(DIPConfig())(image1, image2, 2).flow).abs().max() > 0.1


def test_results_do_not_depend_on_nor_move_the_global_generator(
        parity: dict[str, np.ndarray]) -> None:
    network = seeded_dip(DIPConfig(warm_noise=1.0))
    image1, image2 = crops(parity, 32, 48)
    flows = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with torch.inference_mode():
            cold = network(image1, image2, 1).flow
            flows.append((cold, network(image1, image2, 1, torch.ones(1, 2, 32, 48)).flow))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(flows[0][0], flows[1][0])
    assert torch.equal(flows[0][1], flows[1][1])


def test_all_tensor_work_goes_through_call_and_masks_only_where_needed(
        network: DIP, parity: dict[str, np.ndarray]) -> None:
    image1, image2 = crops(parity, 32, 48)
    names: list[str] = []

    def call(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        names.append(name)
        return network.engine(name, *tensors)

    masks: list[str] = []
    hooks = [block.mask.register_forward_hook(lambda *_, label=label: masks.append(label))
             for label, block in (('small', network.update_block_s),
                                  ('basic', network.update_block))]
    with torch.inference_mode():
        state = network.start(network.encode(image1, call=call),
                              network.encode(image2, call=call), iterations=2, call=call)
        while state.schedule:
            state = network.step(state, call=call)
        flow = network.finish(state, call=call).flow
        for hook in hooks:
            hook.remove()
        assert torch.equal(flow, network(image1, image2, 2).flow)
    assert names == ['encode', 'encode', 'context', 'step', 'step', 'upsample', 'context', 'step',
                     'step', 'upsample']
    assert masks == ['basic', 'basic']


def test_engine_functions_export_with_free_sizes(network: DIP) -> None:
    class Engine(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.network = network
            self.name = name

        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return self.network.engine(self.name, *tensors)

    def inputs(height: int, width: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(5)
        return tuple(torch.randn(1, channels, height, width, generator=generator)
                     for channels in (256, 256, *9 * (128,), 128, 2))

    first = inputs(8, 12)
    free = ({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},) * len(first)
    exported = torch.export.export(Engine('step'), first, dynamic_shapes=(free,)).module()
    with torch.inference_mode():
        for tensors in (first, inputs(5, 20)):
            for found, expected in zip(exported(*tensors), network.engine('step', *tensors),
                                       strict=True):
                assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(('largest', 'quarter', 'levels'), [
    (0.0, (64, 64), (4,)), (32.0, (64, 64), (4,)), (32.5, (64, 64), (8, 4)),
    (64.5, (64, 100), (16, 8, 4)), (500.0, (112, 256), (16, 8, 4)),
    (500.0, (39, 39), (4,)), (500.0, (8, 40), (8, 4)), (500.0, (8, 80), (16, 8, 4))])
def test_levels_of_a_warm_start(largest: float, quarter: tuple[int, int],
                                levels: tuple[int, ...]) -> None:
    prior = torch.zeros(1, 2, 4 * quarter[0], 4 * quarter[1])
    prior[0, 1, -1, -1] = -largest
    assert warm_levels(prior, quarter) == levels


@torch.no_grad()
@pytest.mark.parametrize(('prior_px', 'levels'), [(None, 2), (10.0, 1), (80.0, 2)])
def test_training_sees_what_inference_computes(parity: dict[str, np.ndarray],
                                               prior_px: float | None, levels: int) -> None:
    network = seeded_dip(DIPConfig(warm_noise=1.0))
    image1, image2 = crops(parity, 51, 170)  # wide enough for two warm levels, padded
    prior = None if prior_px is None else torch.full((1, 2, 51, 170), prior_px)
    flows = network.predictions(image1, image2, iterations=1, prior_flow=prior)
    assert [tuple(flow.shape) for flow in flows] == [(1, 2, 51, 170)] * (2 * levels)
    whole = network(image1, image2, 1, prior).flow
    assert torch.allclose(flows[-1], whole, atol=GATE_PX)
    assert not torch.allclose(flows[-2], whole, atol=0.1)


def gradients(network: DIP, images: tuple[Tensor, Tensor], *,
              checkpointed: bool) -> dict[str, Tensor]:
    network.zero_grad(set_to_none=True)
    flows = network.predictions(*images, iterations=1, checkpointed=checkpointed)
    assert [tuple(flow.shape) for flow in flows] == [(1, 2, 32, 48)] * 4
    assert all(flow.requires_grad for flow in flows)
    torch.stack([flow.abs().mean() for flow in flows]).sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()
            if parameter.grad is not None}


def test_predictions_train_every_parameter_checkpointed_or_not(
        parity: dict[str, np.ndarray]) -> None:
    network = seeded_dip(DIPConfig()).train()
    images = crops(parity, 32, 48)
    plain = gradients(network, images, checkpointed=False)
    lean = gradients(network, images, checkpointed=True)
    assert set(plain) == set(dict(network.named_parameters()))
    for name, gradient in plain.items():
        assert bool(gradient.isfinite().all() and gradient.any()), name
        assert torch.allclose(lean[name], gradient, rtol=1e-3, atol=1e-4), name


def test_the_flow_is_detached_before_each_match(parity: dict[str, np.ndarray]) -> None:
    """A late prediction knows earlier updates by the hidden state only."""
    network = seeded_dip(DIPConfig()).train()
    flows = network.predictions(*crops(parity, 32, 32), iterations=1)
    for block, own in ((network.update_block_s, [True, False] * 2),
                       (network.update_block, [False, True] * 2)):
        head = block.flow_head.conv2.bias
        seen = [torch.autograd.grad(flow.sum(), head, retain_graph=True, allow_unused=True)[0]
                for flow in flows]
        assert [gradient is not None for gradient in seen] == own


def test_predictions_train_under_bfloat16_autocast(parity: dict[str, np.ndarray]) -> None:
    network = seeded_dip(DIPConfig()).train()
    images = crops(parity, 32, 48)
    with torch.no_grad():
        reference = network.predictions(*images, iterations=1)
    for checkpointed in (False, True):
        network.zero_grad(set_to_none=True)
        with torch.autocast('cpu', torch.bfloat16):
            flows = network.predictions(*images, iterations=1, checkpointed=checkpointed)
        torch.stack([flow.abs().mean() for flow in flows]).sum().backward()
        assert all(flow.dtype == torch.float32 for flow in flows)
        assert (flows[-1] - reference[-1]).abs().median() < 0.2
        assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all())
                   for parameter in network.parameters())


def test_predictions_start_from_the_noise_given(parity: dict[str, np.ndarray]) -> None:
    network = seeded_dip(DIPConfig())
    image1, image2 = crops(parity, 32, 48)
    start = fixed_pattern((2, 3)) * 16
    with torch.no_grad():
        configured, given, silent = (
            network.predictions(image1, image2, iterations=1, noise=noise)[-1]
            for noise in (None, (start,), (torch.zeros_like(start),)))
    assert torch.equal(configured, given)
    assert not torch.allclose(configured, silent, atol=0.1)


def test_half_features_leave_the_flow_in_float32(network: DIP,
                                                 parity: dict[str, np.ndarray]) -> None:
    image1, image2 = crops(parity, 48, 64)
    half = copy.deepcopy(network).bfloat16()
    with torch.inference_mode():
        features = half.encode(image1)
        assert features.tensors[0].dtype == torch.bfloat16
        flow = half(image1, image2, 1).flow
        reference = network(image1, image2, 1).flow
    assert flow.dtype == torch.float32
    assert (flow - reference).abs().median() < 0.1


# Bad input.


@pytest.mark.parametrize('iterations', [0, -1, True, 2.5])
def test_iterations_must_be_a_whole_number_of_at_least_one(network: DIP,
                                                           iterations: object) -> None:
    image = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match='iterations must be a whole number of at least 1 .*'
                                         f'seen {iterations!r}'):
        network(image, image, iterations)


def test_bad_input_is_named(network: DIP) -> None:
    features = network.encode(torch.zeros(1, 3, 32, 32))
    larger = network.encode(torch.zeros(1, 3, 32, 48))
    with pytest.raises(ValueError, match=r'images must be \(B, 3, H, W\).*seen \(1, 1, 32, 32\)'):
        network.encode(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r'one size and batch; seen \(32, 32\) and \(32, 48\)'):
        network.start(features, larger)
    with pytest.raises(ValueError, match='prior_flow must be'):
        network.start(features, features, prior_flow=torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match='NaN or infinite'):
        network.start(features, features, prior_flow=torch.full((1, 2, 32, 32), np.nan))
    with pytest.raises(ValueError, match='batch of the features, 1; seen 2'):
        network.start(features, features, prior_flow=torch.zeros(2, 2, 32, 32))
    for noise in ((), (torch.zeros(1, 2, 3, 3),), (torch.zeros(1, 2, 2, 2),) * 2):
        with pytest.raises(ValueError, match='noise must be one tensor for each level'):
            network.start(features, features, noise=noise)


@pytest.mark.parametrize('options', [{'start_flow': 'random'}, {'warm_noise': -1.0},
                                     {'warm_noise': float('nan')}, {'cold_levels': (8, 4)}])
def test_options_are_checked(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DIPConfig(**options)
