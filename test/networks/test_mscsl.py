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

"""MSCSL against its equations written out, its budgets, and its engines in other runtimes."""

import importlib.util

import pytest
import torch
from torch.nn import functional

from flow_ros.networks import create
from flow_ros.networks.mscsl import MSCSL, MSCSLConfig, SCALES
from flow_ros.runtimes import create_runtime

torch.set_num_threads(1)
NARROW = {'widths': (4, 6, 8), 'features': 8, 'state': 5, 'head': 4, 'radii': (1, 2, 3, 3)}
needs_openvino = pytest.mark.skipif(importlib.util.find_spec('openvino') is None,
                                    reason='OpenVINO is not installed')


def narrow(variant: str = 'full', seed: int = 0) -> MSCSL:
    torch.manual_seed(seed)
    return MSCSL(MSCSLConfig(variant=variant, **NARROW)).eval()


def images(height: int, width: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    first, second = (255 * torch.rand(batch, 3, height, width, generator=generator)
                     for _ in range(2))
    return first, second


@torch.no_grad()
def test_the_gru_is_that_of_the_equations() -> None:
    network = narrow()
    gru = network.gru
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 5, 6, 8, generator=generator)
    coarser = torch.randn(2, 5, 3, 4, generator=generator)
    gru.input.bias.uniform_(-1, 1)
    gru.up.weight.normal_()
    wz, wr, w = gru.input.weight.split(5)
    bz, br, b = gru.input.bias.split(5)
    uz, ur = gru.gates.weight.split(5)

    def conv(x: torch.Tensor, weight: torch.Tensor, bias=None) -> torch.Tensor:
        return functional.conv2d(x, weight, bias, padding=1)

    previous = functional.conv_transpose2d(coarser, gru.up.weight, gru.up.bias, 2, 1)  # (10)
    z = 1 / (1 + torch.exp(-(conv(q, wz, bz) + conv(previous, uz))))  # (6)
    r = 1 / (1 + torch.exp(-(conv(q, wr, br) + conv(previous, ur))))  # (7)
    candidate = torch.tanh(conv(q, w, b) + conv(r * previous, gru.candidate.weight))  # (8)
    expected = (1 - z) * previous + z * candidate  # (9)
    torch.testing.assert_close(gru(q, coarser), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_coarsest_scale_starts_from_a_state_of_zeros() -> None:
    gru = narrow().gru
    gru.input.bias.uniform_(-1, 1)
    gru.up.bias.zero_()
    q = torch.randn(1, 5, 2, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(gru.first(q), gru(q, torch.zeros(1, 5, 1, 2)))


@torch.no_grad()
def test_correlations_are_those_of_equation_4() -> None:
    network = narrow()
    a, b = (torch.randn(1, 8, 4, 5, generator=torch.Generator().manual_seed(seed))
            for seed in range(2))
    for correspondence, radius in zip(network.correspondences, (1, 2, 3, 3)):
        side = 2 * radius + 1
        found = correspondence.correlate(a, b)
        assert found.shape == (1, side ** 2, 4, 5)
        for y, x, dy, dx in ((1, 2, 0, 1), (3, 4, -1, -1), (0, 0, -1, 0), (2, 2, radius, 0)):
            inside = 0 <= y + dy < 4 and 0 <= x + dx < 5
            expected = (a[0, :, y, x] * b[0, :, y + dy, x + dx]).sum() / 8 ** 0.5 if inside else 0
            assert float(found[0, side * (dy + radius) + dx + radius, y, x]) == pytest.approx(
                float(expected), abs=1e-5)


@torch.no_grad()
def test_normalised_features_match_themselves_best() -> None:
    correspondence = MSCSL(MSCSLConfig(normalise=True, **NARROW)).correspondences[1]
    a = 5 + torch.rand(1, 8, 4, 5, generator=torch.Generator().manual_seed(0))
    found = correspondence.correlate(a, a)
    assert bool((found.argmax(dim=1) == 12).all())  # of 25, the centre
    centred = a - a.mean(dim=1, keepdim=True)
    squared = centred.square().mean(dim=1)
    torch.testing.assert_close(found[:, 12], 8 ** 0.5 * squared / (squared + 1e-2))


def test_the_gru_is_shared_and_the_published_sizes_are_the_default() -> None:
    network = create('mscsl')
    assert network.gru.input.weight.shape == (3 * 128, 128, 3, 3)
    assert network.gru.up.weight.shape == (128, 128, 4, 4)
    assert sum('gru' in key for key in network.state_dict()) == 6  # one set for all scales
    assert [conv.conv1.in_channels for conv in network.correspondences] == [121, 121, 441, 441]
    assert [network.encoder.conv1.kernel_size[0], network.encoder.conv2.kernel_size[0],
            network.encoder.conv3.kernel_size[0]] == [7, 5, 5]
    assert network.options() == {}
    assert not network.accepts_prior


def test_full_and_wor_are_one_network_and_wosr_is_another() -> None:
    keys = {variant: set(narrow(variant).state_dict()) for variant in ('full', 'wor', 'wosr')}
    assert keys['full'] == keys['wor'] != keys['wosr']
    assert not any('gru' in key for key in keys['wosr'])


@pytest.mark.parametrize('variant', ['full', 'wosr'])
@torch.no_grad()
def test_any_size_any_budget(variant: str) -> None:
    network = narrow(variant)
    first, second = images(70, 130)
    flows = [network(first, second, iterations=count).flow for count in range(1, 5)]
    assert all(flow.shape == (1, 2, 70, 130) and bool(torch.isfinite(flow).all())
               for flow in flows)
    assert all(not torch.equal(one, other) for one, other in zip(flows, flows[1:]))
    assert torch.equal(network(first, second).flow, flows[3])
    assert torch.equal(network(first, second, iterations=9).flow, flows[3])  # clamped
    output = network(first, second)
    assert output.confidence is None and output.occlusion is None


@pytest.mark.parametrize('variant', ['full', 'wosr'])
@torch.no_grad()
def test_a_cut_schedule_is_a_budget_of_fewer_scales(variant: str) -> None:
    network = narrow(variant)
    first, second = images(64, 128)
    state = network.start(network.encode(first), network.encode(second))
    assert [step.level for step in state.schedule] == list(SCALES)
    flows = [network.finish(state).flow]
    while state.schedule:
        state = network.step(state)
        assert state.level == state.done[-1].level
        assert state.flow.shape == (1, 2, 64 // state.level, 128 // state.level)
        flows.append(network.finish(state).flow)
    for count in range(1, 5):
        torch.testing.assert_close(flows[count], network(first, second, iterations=count).flow)
        seen = network.predictions(first, second, scales=count)
        torch.testing.assert_close(seen.flow, flows[count], atol=1e-4, rtol=1e-4)
        assert [level for level, _, _ in seen.matches] == list(SCALES[:count])
    with pytest.raises(ValueError, match='all 4 scales of this state are done'):
        network.step(state)


@torch.no_grad()
def test_scales_left_out_are_zeros_for_the_head() -> None:
    network = narrow()
    first, second = images(64, 64)
    state = network.step(network.start(network.encode(first), network.encode(second)))
    sizes = [64 // level for level in SCALES]
    zeros = [torch.zeros(1, 5, size, size) for size in sizes[1:]]
    maps = [functional.interpolate(values, size=(16, 16), mode='bilinear', align_corners=False)
            for values in (state.memory[0], *zeros)]
    joined = torch.cat([state.features_a.tensors[0], *maps], dim=1)
    x = functional.leaky_relu(network.head.conv1(joined), 0.1)
    expected = functional.interpolate(20 * network.head.flow(x), scale_factor=4, mode='bilinear',
                                      align_corners=False)
    torch.testing.assert_close(network.finish(state).flow, expected)


@torch.no_grad()
def test_the_states_are_brought_up_by_the_first_weights() -> None:
    """The transposed convolution starts as interpolation: a constant state stays one."""
    gru = narrow().gru
    raised = gru.up(torch.full((1, 5, 3, 4), 2.0))
    torch.testing.assert_close(raised[..., 1:-1, 1:-1], torch.full((1, 5, 4, 6), 2.0))


def test_what_cannot_be_done_is_refused() -> None:
    network = narrow()
    first, second = images(64, 64)
    features = network.encode(first), network.encode(second)
    with pytest.raises(ValueError, match='mscsl takes no prior flow'):
        network.start(*features, prior_flow=torch.zeros(1, 2, 64, 64))
    with pytest.raises(ValueError, match='at least 1; seen 0'):
        network.start(*features, iterations=0)
    with pytest.raises(ValueError, match='both frames must have one size'):
        network.start(features[0], network.encode(images(64, 128)[0]))
    with pytest.raises(ValueError, match='multiples of 64 px to train on; seen 64x80'):
        network.predictions(*images(64, 80))
    for wrong, words in (({'variant': 'wos'}, 'variant must be one of'),
                         ({'radii': (5, 5)}, 'radii must be 4 whole numbers'),
                         ({'state': 0}, 'state must be a whole number'),
                         ({'flow_scale': 0.0}, 'flow_scale must be positive')):
        with pytest.raises(ValueError, match=words):
            create('mscsl', **wrong)


def test_the_first_flow_is_small_and_every_weight_learns() -> None:
    for variant in ('full', 'wosr'):
        network = narrow(variant).train()
        seen = network.predictions(*images(64, 128, batch=2))
        assert float(seen.flow.detach().abs().mean()) < 10
        seen.flow.square().mean().backward()
        assert all(value.grad is not None and bool((value.grad != 0).any())
                   for value in network.parameters())


@needs_openvino
@pytest.mark.parametrize('variant', ['full', 'wosr'])
@torch.no_grad()
def test_openvino_agrees_with_torch(variant: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path))
    network = narrow(variant)
    runtime = create_runtime('openvino', network, device='cpu', threads=1)
    first, second = images(70, 90)
    for count in (2, 4):
        state = network.start(network.encode(first, call=runtime.call),
                              network.encode(second, call=runtime.call), iterations=count)
        while state.schedule:
            state = network.step(state, call=runtime.call)
        flow = network.finish(state, call=runtime.call).flow
        torch.testing.assert_close(flow, network(first, second, iterations=count).flow,
                                   atol=1e-3, rtol=1e-3)
