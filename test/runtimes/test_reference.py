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

from dataclasses import replace

from fake_cuda import FakeGraphDevice
import numpy as np
import pytest
import torch
from torch.nn import functional

from flow_ros.networks import create, default_weights_path, list_models
from flow_ros.networks.base import FlowOutput
from flow_ros.ops import matching, sampling
from flow_ros.runtimes.base import EngineFault
from flow_ros.runtimes.cuda_graphs import GraphedLoop
from flow_ros.runtimes.reference import (
    compare,
    default_cases,
    LIMITS,
    Limits,
    make_reference,
    PAIR,
    reference_for,
    reference_pair,
    ReferenceCase,
    shipped_reference,
    write_reference,
)
from flow_ros.runtimes.torch import TorchRuntime

torch.set_num_threads(1)
CPU = torch.device('cpu')
SMALL = (128, 96)
SHIPPED = [model.name for model in list_models() if (
    model.path.parent / f'{model.name}.reference.npz').is_file()]


@pytest.fixture(scope='module')
def network():
    return create('dip_rt', 'default')


@pytest.fixture(scope='module')
def reference(network):
    return make_reference(network, *reference_pair(*SMALL))


def runtime(network=None):
    return TorchRuntime(network or create('dip_rt', 'default'), device=CPU)


class Changed:
    """A runtime whose output is changed on its way out."""

    name = 'tensorrt'
    reason = ''
    device = CPU

    def __init__(self, network, change, precision='f32'):
        self.network = network
        self.precision = precision
        self.change = change

    def call(self, engine, /, *tensors):
        return self.network.engine(engine, *tensors)

    def loop(self, state, lap=None):
        while state.schedule:
            state = self.network.step(state, call=self.call)
        return state, self.change(self.network.finish(state, call=self.call))


def test_the_pair_is_small_and_looks_like_two_frames_of_a_camera():
    assert PAIR.stat().st_size <= 300_000
    image1, image2, prior = reference_pair()
    assert image1.shape == image2.shape == (1, 3, 192, 256)
    assert prior.shape == (1, 2, 192, 256)
    assert 20 < image1.std() < 100
    assert 2 < prior.norm(dim=1).median() < 8
    # The prior leads from one to the other: without it they differ far more.
    from flow_ros.ops.sampling import warp
    still, moved = ((image1 - other).abs().median() for other in (image2, warp(image2, prior)))
    assert moved < 0.5 * still


def test_the_pair_is_resized_to_whole_grey_values_and_its_flow_with_it():
    image1, image2, prior = reference_pair(400, 96)
    assert image1.shape == image2.shape == (1, 3, 96, 400)
    assert torch.equal(image1, image1.round())
    assert 0 <= image1.min() <= image1.max() <= 255
    own = reference_pair()[2]
    ratio = prior[0].abs().mean(dim=(1, 2)) / own[0].abs().mean(dim=(1, 2))
    torch.testing.assert_close(ratio, torch.tensor([400 / 256, 0.5]), rtol=0.02, atol=0)


def test_a_reference_is_what_the_network_computes_one_budget_at_a_time(network, reference):
    """The cases share their first steps; that must not change them."""
    assert set(reference.flows) == {ReferenceCase(budget, warm) for budget in (1, 2, 4)
                                    for warm in (False, True)}
    image1, image2, prior = reference_pair(*SMALL)
    with torch.inference_mode():
        for case, flow in reference.flows.items():
            wanted = network(image1, image2, iterations=case.budget,
                             prior_flow=prior if case.warm else None).flow[0, :, ::3, ::3]
            np.testing.assert_array_equal(flow, wanted.numpy())
    assert reference.size == SMALL
    assert not np.array_equal(*list(reference.flows.values())[:2])


def test_networks_without_prior_have_cold_cases_only():
    assert {case.warm for case in default_cases(create('mscsl'))} == {False}
    assert [case.budget for case in default_cases(create('mscsl'))] == [1, 2, 4]


def test_a_half_network_or_one_in_training_is_not_changed(network):
    half = create('dip_rt', 'default').double().train()
    made = make_reference(half, *reference_pair(*SMALL), cases=[ReferenceCase(1, False)])
    assert half.training
    assert next(half.parameters()).dtype == torch.float64
    wanted = make_reference(network, *reference_pair(*SMALL), cases=[ReferenceCase(1, False)])
    np.testing.assert_array_equal(*(next(iter(each.flows.values())) for each in (made, wanted)))


def test_references_are_kept_and_read_again(network, reference, tmp_path, monkeypatch):
    said = []
    made = reference_for(network, width=128, height=96, directory=tmp_path / 'a', say=said.append)
    assert 'computing the reference of dip_rt at 128x96' in said.pop()
    assert [path.suffix for path in (tmp_path / 'a').iterdir()] == ['.npz']
    monkeypatch.setattr('flow_ros.runtimes.reference.make_reference', None)
    again = reference_for(network, width=128, height=96, directory=tmp_path / 'a', say=said.append)
    assert not said
    for case, flow in reference.flows.items():
        np.testing.assert_array_equal(made.flows[case], flow)
        np.testing.assert_array_equal(again.flows[case], flow)


def test_other_weights_and_sizes_have_other_references(network, tmp_path):
    reference_for(network, width=128, height=96, directory=tmp_path)
    other = create('dip_rt', 'default')
    with torch.no_grad():
        other.search.flow[-1].bias += 0.5
    moved = reference_for(other, width=128, height=96, directory=tmp_path)
    reference_for(network, width=96, height=128, directory=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert not compare(runtime(create('dip_rt', 'default')), moved).passed


@pytest.mark.parametrize('damage', [
    lambda path: path.write_bytes(path.read_bytes()[:900]),
    lambda path: path.write_bytes(b''),
    lambda path: np.savez_compressed(path, about=np.array('{}'), flows=np.zeros(3)),
    lambda path: _with_flows(path, np.float32('nan')),
])
def test_a_damaged_reference_is_computed_again(network, reference, tmp_path, damage):
    said = []
    reference_for(network, width=128, height=96, directory=tmp_path)
    path, = tmp_path.iterdir()
    damage(path)
    again = reference_for(network, width=128, height=96, directory=tmp_path, say=said.append)
    assert f'reference {path} cannot be used' in said[0]
    np.testing.assert_array_equal(again.flows[ReferenceCase(2, True)],
                                  reference.flows[ReferenceCase(2, True)])
    reference_for(network, width=128, height=96, directory=tmp_path, say=said.append)
    assert len(said) == 2  # the second: that it is computed


def _with_flows(path, factor):
    with np.load(path) as stored:
        about, flows = stored['about'], stored['flows'] * factor
    np.savez_compressed(path, about=about, flows=flows)


def test_a_folder_that_cannot_be_written_is_said_and_no_more(network, tmp_path):
    blocked = tmp_path / 'file'
    blocked.write_text('no folder')
    said = []
    reference_for(network, width=128, height=96, directory=blocked, say=said.append)
    assert f'cannot write to {blocked}' in said[-1]
    assert 'FLOW_ROS_CACHE' in said[-1]


def test_a_full_disk_leaves_the_old_file(reference, tmp_path, monkeypatch):
    path = tmp_path / 'a.npz'
    write_reference(reference, path)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(np, 'savez_compressed', full)
    with pytest.raises(OSError, match='No space left'):
        write_reference(reference, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_torch_passes_its_own_reference(reference):
    verdict = compare(runtime(), reference)
    assert verdict.passed
    assert len(verdict.cases) == 6
    assert max(result.quantiles[-1] for result in verdict.cases) < 1e-3
    assert 'check of dip_rt on torch (f32, cpu, 128x96; flow_ros ' in verdict.text
    assert f'torch {torch.__version__}' in verdict.text
    assert ': passed;' in verdict.text


class Graphed(TorchRuntime):
    """Torch with CUDA graphs, as far as the CPU can pretend."""

    def __init__(self, network):
        super().__init__(network, device=CPU)
        self.graphs = FakeGraphDevice()
        self._graphed = GraphedLoop(network, self.call, device=self.graphs)


def test_graphs_are_judged_too(network, reference):
    checked = Graphed(network)
    verdict = compare(checked, reference)
    assert verdict.passed, verdict.text
    assert [result.replayed for result in verdict.cases] == [False, True] * 6
    assert checked.graphs.captures == 6


@pytest.mark.parametrize('fault', ['stale inputs', 'garbage'])
def test_a_graph_that_is_wrong_is_refused(network, reference, monkeypatch, fault):
    """Its engines are right, one by one."""
    replay = FakeGraphDevice.replay

    def wrong(self, graph, buffers, inputs, outputs):
        if fault == 'stale inputs':
            inputs = [buffer.clone() for buffer in buffers]
        results = replay(self, graph, buffers, inputs, outputs)
        return results if fault == 'stale inputs' else [values + 1 for values in results]

    monkeypatch.setattr(FakeGraphDevice, 'replay', wrong)
    verdict = compare(Graphed(network), reference)
    assert not verdict.passed
    assert 'as a CUDA graph)' in verdict.text
    assert all(result.passed is not result.replayed for result in verdict.cases)


def test_a_graph_that_cannot_be_captured_is_no_fault(network, reference):
    checked = Graphed(network)
    checked.graphs.fails = 'operation not permitted when stream is capturing'
    verdict = compare(checked, reference)
    assert verdict.passed
    assert len(verdict.cases) == 6


def test_a_wrong_flow_is_refused_with_numbers_and_what_happens_next(network, reference):
    def moved(output):
        return replace(output, flow=output.flow + 0.01)

    verdict = compare(Changed(network, moved), reference)
    assert not verdict.passed
    assert verdict.cases[0].quantiles == pytest.approx((0.01414,) * 3, rel=0.01)
    for words in ('REFUSED', '50 % at 0.014 (limit 0.001)', 'worst of 6 cases', 'TensorRT',
                  'the next runtime serves', 'flow_ros self-test --runtime tensorrt '
                  '--precision f32 --size 128x96'):
        assert words in verdict.text
    # The same is nothing for half precision.
    assert compare(Changed(network, moved, 'fast'), reference).passed
    assert not compare(Changed(network, moved, 'fast'), reference,
                       limits=Limits(0.01, 0.01, 0.01)).passed


def test_few_wrong_pixels_are_forgiven_many_are_not(network, reference):
    def some(share):
        def change(output):
            flow = output.flow.clone()
            count = int(share * flow[0, 0].numel())
            flow[0, 0].view(-1)[torch.randperm(flow[0, 0].numel())[:count]] += 50
            return replace(output, flow=flow)
        return change

    torch.manual_seed(0)
    assert compare(Changed(network, some(0.0002)), reference).passed
    verdict = compare(Changed(network, some(0.02)), reference)
    assert not verdict.passed
    assert verdict.cases[0].quantiles[0] < 1e-3 < verdict.cases[0].quantiles[1]


@pytest.mark.parametrize('part', ['flow', 'confidence', 'occlusion'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_nan_is_refused_wherever_it_is(network, reference, part, value):
    def spoilt(output):
        values = getattr(output, part).clone()
        values[0, 0, 1, 1] = value  # a pixel between those compared
        return replace(output, **{part: values})

    verdict = compare(Changed(network, spoilt, 'fast'), reference)
    assert not verdict.passed
    assert 'NaN or infinite values in its output (cold, budget 1)' in verdict.text


def test_a_runtime_that_fails_is_refused_with_what_it_said(network, reference):
    def fails(output):
        raise EngineFault('step_8: execution failed')

    verdict = compare(Changed(network, fails), reference)
    assert not verdict.passed
    assert 'REFUSED; it failed: step_8: execution failed' in verdict.text
    wrong = compare(Changed(network, lambda output: FlowOutput(output.flow[..., 8:])), reference)
    assert 'samples where the reference has' in wrong.fault


@pytest.mark.parametrize('arguments', [{'mode': 'nearest'}, {'align_corners': False}])
@pytest.mark.parametrize('precision', ['f32', 'fast'])
def test_the_known_fault_of_grid_sample_is_refused(reference, monkeypatch, arguments, precision):
    """Several TensorRT parse GridSample as nearest and say nothing."""
    sample = functional.grid_sample
    monkeypatch.setattr(functional, 'grid_sample', lambda image, grid, **given: sample(
        image, grid, **{**given, **arguments}))
    for module in (matching, sampling):  # on CPUs whole pixels are read, without grid_sample
        monkeypatch.setattr(module, 'runs_on_cpu', lambda *tensors: False)
    verdict = compare(runtime(), reference, precision=precision)
    assert not verdict.passed
    assert not any(result.passed for result in verdict.cases)


def test_a_reference_of_weights_that_compute_nan_is_an_error():
    broken = create('dip_rt')
    with torch.no_grad():
        broken.search.flow[-1].bias.fill_(float('nan'))
    with pytest.raises(ValueError, match='dip_rt computes NaN .* its weights cannot be used'):
        make_reference(broken, *reference_pair(*SMALL))


def test_limits_grow_with_what_is_lost():
    for f32, f16, bf16 in zip(*(LIMITS[name] for name in ('f32', 'f16', 'bf16'))):
        assert f32 < f16 < bf16


def test_every_shipped_model_has_a_reference():
    names = {model.name for model in list_models()
             if model.path.parent == default_weights_path('dip_rt').parent}
    assert names == set(SHIPPED)


@pytest.mark.parametrize('name', SHIPPED)
def test_torch_computes_what_is_shipped(name):
    """Fails where the weights changed: then `python test/data/make_references.py models`."""
    path = default_weights_path(name)
    assert path.with_name(f'{name}.reference.npz').stat().st_size <= 150_000
    shipped = shipped_reference(create(name, 'default'), path)
    assert shipped is not None
    assert shipped.size == (256, 192)
    verdict = compare(runtime(create(name, 'default')), shipped)
    assert verdict.passed, verdict.text
    other = create(name, 'default')
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 1e-2 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert not compare(runtime(other), shipped).passed


def test_a_shipped_reference_is_for_its_weights_alone(tmp_path, reference):
    path = default_weights_path('dip_rt')
    assert shipped_reference(create('dip_rt'), path) is None
    assert shipped_reference(create('dip_rt', 'default'), tmp_path / 'no.safetensors') is None
    damaged = tmp_path / 'dip_rt.reference.npz'
    damaged.write_bytes(b'PK')
    with pytest.raises(ValueError, match=f'{damaged} is damaged .*install flow_ros again'):
        shipped_reference(create('dip_rt', 'default'), tmp_path / 'dip_rt.safetensors')
