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

"""Plans built by the real TensorRT (the pinned TensorRT-RTX needs no GPU for it)."""

from contextlib import contextmanager
from dataclasses import replace
import json
import logging
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading

from fake_cuda import FakeStreams
import onnx
from onnx import helper, TensorProto
import pytest
import torch

from flow_ros.runtimes.base import RuntimeUnavailable
from flow_ros.runtimes.tensorrt import (
    build_plan,
    BuildCancelled,
    BuildError,
    BuildOptions,
    find_tensorrt,
    finding,
    Installation,
    Meter,
    missing_tensorrt,
    PlanError,
    plans,
    refuses_gpu,
    TensorRtRuntime,
)
from flow_ros.runtimes.tensorrt.plans import read_grid_samples

torch.set_num_threads(1)

needs_tensorrt = pytest.mark.skipif(find_tensorrt() is None, reason=missing_tensorrt() or 'none')
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


def graph(nodes, outputs=('y',), shape=(1, 2, 8, 8), opset=18, kind=TensorProto.FLOAT):
    """Return a small ONNX graph of the input x, and a grid for those that sample."""
    inputs = [helper.make_tensor_value_info('x', kind, shape)]
    if any('grid' in node.input for node in nodes):
        inputs.append(helper.make_tensor_value_info('grid', TensorProto.FLOAT, (1, 8, 8, 2)))
    return helper.make_model(
        helper.make_graph(nodes, 'graph', inputs,
                          [helper.make_tensor_value_info(name, kind, None) for name in outputs]),
        opset_imports=[helper.make_opsetid('', opset)], ir_version=8).SerializeToString()


def sampling(mode='bilinear', align_corners=1, padding='border', opset=18):
    return graph([helper.make_node('GridSample', ['x', 'grid'], ['y'], name='warp', mode=mode,
                                   align_corners=align_corners, padding_mode=padding)],
                 opset=opset)


def doubling(shape=(1, 2, 8, 8), kind=TensorProto.FLOAT):
    nodes = [helper.make_node('Add', ['x', 'x'], ['y0'])]
    nodes += [helper.make_node('Exp', [f'y{index}'], [f'y{index + 1}']) for index in range(8)]
    return graph(nodes, outputs=['y8'], shape=shape, kind=kind)


def build(model, **options):
    return build_plan(model, **({'name': 'act', 'options': BuildOptions()} | options))


# The builder, on each network.

# An export takes 2 to 12 s, so by default not every act in every form: the default network's,
# and those of the others that test_export.py needs too. None is all acts.
SOME = {
    ('dip_rt', 'f32', False): None, ('dip_rt', 'f32', True): None,
    ('dip_rt', 'fast', False): {'step_16', 'step_8'}, ('dip_rt', 'fast', True): {'step'},
    ('dip', 'f32', False): {'step_4'}, ('dip', 'f32', True): {'encode', 'upsample'},
    ('hd3', 'f32', False): {'step4'}, ('hd3_iofpl', 'f32', False): {'step0'},
    ('hd3_iofpl', 'f32', True): {'step1'}, ('mscsl', 'f32', False): {'step1'},
    ('mscsl', 'f32', True): {'finish'}, ('mscsl', 'fast', False): {'step0'},
}
NAMES = ('dip_rt', 'dip', 'hd3', 'hd3_compact', 'mscsl')
EVERYTHING = SOME | {(name, precision, dynamic): None for name in NAMES
                     for precision in ('f32', 'fast') for dynamic in (False, True)}
# Every act of every network, with every way of exporting it met: what 'fast' adds to a graph are
# casts, what a free size adds is the arithmetic of shapes, and each of the two is read once per
# network, in the form in which it is used most. Both together come from the operators that all
# networks share: the default network has them. Its other forms are in SOME.
EVERY_ACT = {(name, *form): None for name in NAMES for form in (('fast', False), ('f32', True))
             if (name, *form) not in SOME or SOME[(name, *form)] is not None}
EVERY_ACT['dip_rt', 'fast', True] = None
WHICH = {'': SOME, 'all': EVERYTHING}.get(os.environ.get('FLOW_ROS_TEST_PLANS', ''), EVERY_ACT)
"""FLOW_ROS_TEST_PLANS=1, as in CI: every act of every network, three minutes more; =all: in
every form, seven."""


@needs_tensorrt
@pytest.mark.slow
@pytest.mark.parametrize(('name', 'precision', 'dynamic'), WHICH)
def test_every_act_of_every_network_becomes_a_plan(exports, spied, name, precision, dynamic):
    """Strongly typed, every GridSample linear and as in the graph, with progress."""
    chosen = WHICH[name, precision, dynamic]
    acts = [act for act in exports.acts(name, precision, dynamic)
            if chosen is None or act.name in chosen]
    assert {act.name for act in acts} >= (chosen or {'encode'})
    for act in acts:
        model = exports.model(name, act.name, precision, dynamic)
        seen = []
        built = build(model, name=act.name, options=BuildOptions(precision=precision),
                      profile=exports.profile(name, act, precision) if dynamic else None,
                      progress=lambda progress, seen=seen: seen.append(progress) or True)
        assert len(built.plan) > 1000
        fractions = [progress.fraction for progress in seen]
        assert fractions == sorted(fractions)
        assert (fractions[0], fractions[-1]) == (0.0, 1.0)
        assert len({progress.phase for progress in seen}) > 5
        assert all(progress.act == act.name for progress in seen)
        network, flags = spied.api.networks.pop()
        assert flags & 1 << int(spied.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert built.layers == network.num_layers > 1
        assert grid_samples(spied.api, network) == [('LINEAR', True)] * len(
            read_grid_samples(model))
        if dynamic:
            assert any(-1 in tuple(network.get_input(index).shape)
                       for index in range(network.num_inputs))
        spied.api.configs.clear()


def grid_samples(trt, network):
    """Return the interpolation and the alignment of all GridSample layers."""
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.GRID_SAMPLE:
            layer.__class__ = trt.IGridSampleLayer
            found.append((layer.interpolation_mode.name, layer.align_corners))
    return found


@needs_tensorrt
def test_halves_are_in_the_graph_and_coordinates_are_not(exports, spied):
    act = {each.name: each for each in exports.acts('dip_rt', 'fast')}['step_8']
    build(exports.model('dip_rt', 'step_8', 'fast'), name='step_8',
          options=BuildOptions(precision='fast'))
    (network, _), = spied.api.networks
    trt = spied.api
    types = {torch.float32: trt.DataType.FLOAT, torch.float16: trt.DataType.HALF}
    seen = {network.get_input(index).name: network.get_input(index).dtype
            for index in range(network.num_inputs)}
    assert seen == {spec.name: types[spec.dtype] for spec in act.inputs}
    assert {trt.DataType.FLOAT, trt.DataType.HALF} == set(seen.values())
    convolutions = grids = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.CONVOLUTION:
            convolutions += layer.get_output(0).dtype == trt.DataType.HALF
        if layer.type == trt.LayerType.GRID_SAMPLE:
            grids += 1
            assert layer.get_input(1).dtype == trt.DataType.FLOAT
    assert convolutions > 5
    assert grids >= 1


# What is asked of the builder.

class Spy:
    """The package, with what it made kept."""

    def __init__(self, api):
        self._api = api
        self.networks = []
        self.configs = []
        self.hidden = {}

    def __getattr__(self, name):
        if name in self.hidden:
            if self.hidden[name] is None:
                raise AttributeError(name)
            return self.hidden[name]
        return getattr(self._api, name)

    def Builder(self, logger):
        return SpiedBuilder(self, self._api.Builder(logger))


class SpiedBuilder:
    def __init__(self, spy, builder):
        self._spy = spy
        self._builder = builder

    def __getattr__(self, name):
        return getattr(self._builder, name)

    def create_network(self, flags):
        network = self._builder.create_network(flags)
        self._spy.networks.append((network, flags))
        return network

    def create_builder_config(self):
        config = self._builder.create_builder_config()
        self._spy.configs.append(config)
        return config


@pytest.fixture
def spied(monkeypatch):
    """Give the library of this process; its ``api`` keeps the networks and configurations."""
    library, _ = finding.search()
    library = replace(library, api=Spy(library.api))
    monkeypatch.setattr(finding, 'search', lambda: (library, ''))
    return library


@needs_tensorrt
def test_the_options_reach_the_builder(spied):
    build(doubling())
    build(doubling(), options=BuildOptions(precision='fast', workspace_mib=48,
                                           optimisation_level=1))
    trt = spied.api
    plain, set_up = trt.configs
    assert not plain.get_flag(trt.BuilderFlag.TF32)
    assert set_up.get_flag(trt.BuilderFlag.TF32)
    assert set_up.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 48 << 20
    assert set_up.builder_optimization_level == 1
    for config in (plain, set_up):
        assert not config.get_flag(trt.BuilderFlag.GPU_FALLBACK)
        assert config.default_device_type == trt.DeviceType.GPU


@needs_tensorrt
def test_flags_that_a_version_lacks_are_left_out(spied):
    """TensorRT 11 has dropped flags, and what is always on may go the same way."""
    class Nothing:
        pass

    spied.api.hidden = {'NetworkDefinitionCreationFlag': Nothing, 'BuilderFlag': Nothing,
                        'OnnxParserFlag': Nothing, 'DeviceType': None}
    assert build(doubling()).plan


@needs_tensorrt
@pytest.mark.parametrize(('what', 'message'), [
    ('Builder', 'cannot start its builder'), ('OnnxParser', 'cannot start its parser')])
def test_what_the_library_does_not_make_is_a_build_error(spied, monkeypatch, what, message):
    """The bindings raise TypeError then: without a driver, TensorRT makes no builder."""
    def nothing(*arguments):
        raise TypeError('pybind11::init(): factory function returned nullptr')

    monkeypatch.setattr(spied.api, what, nothing, raising=False)
    with pytest.raises(BuildError, match=message):
        build(doubling())


@needs_tensorrt
@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # it is none in TensorRT
def test_the_timing_cache_goes_round(spied, monkeypatch, caplog):
    assert build(doubling()).timing_cache is None  # TensorRT-RTX has none
    monkeypatch.setattr(finding, 'search', lambda: (
        replace(spied, installation=Installation('tensorrt', '10.3.0')), ''))
    first = build(doubling()).timing_cache
    assert first
    assert build(doubling(), timing_cache=first).timing_cache
    assert build(doubling(), timing_cache=b'damaged').plan


@pytest.mark.parametrize(('options', 'message'), [
    ({'precision': 'fp16'}, "precision must be one of f32, fast; seen 'fp16'"),
    ({'workspace_mib': 0}, 'workspace_mib must be at least 1 MiB.*; seen 0'),
    ({'optimisation_level': 6}, 'optimisation_level must be 0 to 5.*; seen 6'),
])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BuildOptions(**options)


def test_all_that_shapes_a_plan_is_in_the_flags():
    plain = BuildOptions()
    for other in (BuildOptions(precision='fast'), BuildOptions(workspace_mib=64),
                  BuildOptions(optimisation_level=5)):
        assert other.flags() != plain.flags()
    assert plain.flags() == BuildOptions().flags()


# Dynamic shapes.

def open_sizes():
    return doubling(shape=(1, 2, 'h', 'w'))


@needs_tensorrt
def test_a_profile_opens_the_sizes():
    profile = {'x': ((1, 2, 4, 4), (1, 2, 8, 8), (1, 2, 64, 64))}
    assert build(open_sizes(), profile=profile).plan
    with pytest.raises(BuildError, match=r"for the inputs \['x'\]; it lacks \['x'\]"):
        build(open_sizes())
    with pytest.raises(BuildError, match=r"and has \['flow'\], which the graph does not"):
        build(open_sizes(), profile=profile | {'flow': profile['x']})
    with pytest.raises(BuildError, match=r'(?s)act: .*refuses the .*\(1, 2, 64, 64\)'):
        build(open_sizes(), profile={'x': tuple(reversed(profile['x']))})


# Errors.

@needs_tensorrt
def test_operators_that_are_not_known_are_named_by_node():
    model = graph([helper.make_node('Foo', ['x'], ['a'], name='node_foo'),
                   helper.make_node('Relu', ['a'], ['b'], name='node_relu'),
                   helper.make_node('Det', ['b'], ['y'], name='node_det')])
    with pytest.raises(BuildError) as caught:
        build(model, name='step_8')
    lines = str(caught.value).splitlines()
    assert lines[0] == f'step_8: {find_tensorrt().text} cannot read this graph:'
    assert lines[1].startswith('  node 0 node_foo (Foo): neither an operator nor a plugin is '
                               'called Foo [')
    assert lines[2].startswith('  node 2 node_det (Det): this version does not know Det in this '
                               'use [UNSUPPORTED_NODE')
    assert "use runtime 'torch'" in lines[3]
    assert len(lines) == 4


@needs_tensorrt
@pytest.mark.parametrize('model', [b'', b'no model', doubling()[:-40]])
def test_what_is_no_model(model):
    with pytest.raises(BuildError, match='act: TensorRT'):
        build(model)


@needs_tensorrt
def test_types_are_not_mixed():
    """Strongly typed: nothing is cast in silence."""
    half = helper.make_tensor('half', TensorProto.FLOAT16, (1,), [2.0])
    node = helper.make_node('Add', ['x', 'half'], ['y'], name='node_add')
    model = onnx.ModelProto.FromString(graph([node]))
    model.graph.initializer.append(half)
    with pytest.raises(BuildError, match='(?s)act: TensorRT.*(node_add|type|Half)'):
        build(model.SerializeToString())


@needs_tensorrt
def test_the_error_of_one_build_is_not_in_the_next():
    with pytest.raises(BuildError, match='node_foo'):
        build(graph([helper.make_node('Foo', ['x'], ['y'], name='node_foo')]))
    with pytest.raises(BuildError) as caught:
        build(b'no model')
    assert 'node_foo' not in str(caught.value)


@needs_tensorrt
def test_builds_in_two_threads():
    """One at a time, each with its own messages and progress."""
    seen = {'good': [], 'bad': []}
    results = {}

    def work(name, model):
        try:
            results[name] = build(model, name=name,
                                  progress=lambda each: seen[name].append(each.act) or True)
        except BuildError as error:
            results[name] = error

    threads = [threading.Thread(target=work, args=arguments) for arguments in (
        ('good', doubling()),
        ('bad', graph([helper.make_node('Foo', ['x'], ['y'], name='node_foo')])))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results['good'].plan
    assert 'node_foo' in str(results['bad'])
    assert set(seen['good']) == {'good'}
    assert set(seen['bad']) == {'bad'}


# GridSample, which versions have misread.

@needs_tensorrt
@pytest.mark.parametrize(('align_corners', 'padding'), [(1, 'border'), (0, 'zeros'),
                                                        (1, 'reflection')])
def test_a_linear_grid_sample_is_taken(align_corners, padding):
    model = sampling(align_corners=align_corners, padding=padding)
    assert build(model).plan
    assert list(read_grid_samples(model)) == ['warp']


@needs_tensorrt
def test_a_grid_sample_that_reads_back_as_nearest_is_refused():
    with pytest.raises(BuildError) as caught:
        build(sampling('nearest'), name='step_16')
    text = str(caught.value)
    assert text.startswith(f"step_16: {find_tensorrt().text} reads the GridSample 'warp' as ")
    assert 'NEAREST, expected LINEAR' in text
    assert 'opset 18' in text


@needs_tensorrt
@pytest.mark.parametrize('said', [{'align_corners': 0}, {'padding': 'zeros'}])
def test_a_grid_sample_that_reads_back_otherwise_is_refused(said, monkeypatch):
    """As if TensorRT had read the graph wrongly: the graph says one thing, the layer another."""
    asked = read_grid_samples(sampling(**said))
    monkeypatch.setattr(plans, 'read_grid_samples', lambda model: asked)
    with pytest.raises(BuildError, match="reads the GridSample 'warp' with .*True, 'CLAMP'.*, "
                                         'expected '):
        build(sampling())


@needs_tensorrt
def test_a_grid_sample_that_is_not_there_is_missed(monkeypatch):
    asked = read_grid_samples(sampling())
    monkeypatch.setattr(plans, 'read_grid_samples',
                        lambda model: asked | {'other': asked['warp']})
    with pytest.raises(BuildError, match='made 1 layers of 2 GridSample nodes'):
        build(sampling())
    monkeypatch.setattr(plans, 'read_grid_samples', lambda model: None)  # onnx is not there
    assert build(sampling()).plan


# Progress, cancel, Ctrl-C.

@needs_tensorrt
def test_progress_is_told_and_never_falls():
    seen = []
    built = build(doubling(), progress=lambda progress: seen.append(progress) or True)
    assert seen[0].phase == 'Reading the graph'
    assert seen[-1].phase == 'done'
    assert (seen[0].left_s, seen[-1].left_s) == (None, 0.0)
    for before, after in zip(seen, seen[1:]):
        assert before.fraction <= after.fraction <= 1
        assert before.elapsed_s <= after.elapsed_s <= built.seconds
    assert len(seen) > 20


@needs_tensorrt
@pytest.mark.parametrize('stop', [0.0, 0.3, 1.0])
def test_a_build_can_be_cancelled(stop):
    seen = []

    def progress(progress):
        seen.append(progress.fraction)
        return progress.fraction < stop

    with pytest.raises(BuildCancelled, match='the build of act was cancelled after .* s, at '):
        build(doubling(), progress=progress)
    assert sum(fraction >= stop for fraction in seen) == 1  # nobody is asked again
    assert build(doubling()).plan


@needs_tensorrt
def test_what_progress_raises_comes_out(capfd):
    class Odd(Exception):
        pass

    def progress(progress):
        if progress.fraction > 0.2:
            raise Odd('the disk is full')
        return True

    with pytest.raises(Odd, match='the disk is full'):
        build(doubling(), progress=progress)
    assert 'Exception caught' not in capfd.readouterr().err  # TensorRT has not seen it


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    """Give how interrupted builds ended in a process of their own, by when, and its stderr."""
    model = tmp_path_factory.mktemp('interrupted') / 'model.onnx'
    model.write_bytes(doubling())
    done = subprocess.run([sys.executable, str(Path(__file__).with_name('interrupted_builds.py')),
                           str(model)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    return {said['when']: said for said in map(json.loads, done.stdout.splitlines())}, done.stderr


@needs_tensorrt
@pytest.mark.parametrize('when', [0.0, 0.5, 1.0])
def test_ctrl_c_ends_the_build_and_is_not_lost(interrupted, when):
    """It comes while TensorRT runs, which would swallow it."""
    ended, errors = interrupted
    assert ended[when] == {'when': when, 'sent': 1, 'raised': 'KeyboardInterrupt',
                           'handler_is_back': True, 'builds_again': True}
    assert 'Exception caught' not in errors


@needs_tensorrt
def test_a_handler_of_the_callers_own_is_called(interrupted):
    assert interrupted[0]['own'] == {'when': 'own', 'seen': [signal.SIGINT], 'built': True}


class Told(list):
    """The progress of a ``Meter``."""

    def __init__(self, go_on=True):
        super().__init__()
        self.go_on = go_on

    def __call__(self, progress):
        self.append(progress)
        return self.go_on

    @property
    def fractions(self):
        return [round(progress.fraction, 4) for progress in self]


def test_nested_phases_make_one_fraction():
    told = Told()
    meter = Meter('step', told)
    meter.phase_start('all', None, 4)
    meter.step_complete('all', 0)
    meter.phase_start('part', 'all', 2)
    meter.phase_start('detail', 'part', 5)
    meter.step_complete('detail', 0)
    meter.step_complete('detail', 4)
    meter.phase_finish('detail')
    meter.step_complete('part', 0)
    meter.phase_finish('part')  # before its last step
    meter.step_complete('all', 1)
    meter.phase_start('detail', 'all', 2)  # names come again
    meter.step_complete('detail', 0)
    meter.phase_finish('detail')
    meter.step_complete('all', 3)
    assert told.fractions == [0.25, 0.275, 0.375, 0.375, 0.5, 0.625, 1.0]
    assert [progress.phase for progress in told][:3] == ['all', 'detail', 'detail']


def test_odd_phases_do_no_harm():
    """Of an unknown parent, unknown themselves, with too many steps, or after the end."""
    told = Told()
    meter = Meter('step', told)
    meter.step_complete('nobody', 3)
    meter.phase_finish('nobody')
    meter.phase_start('all', None, 2)
    meter.phase_start('stray', 'gone', 3)
    meter.step_complete('stray', 2)
    meter.phase_finish('stray')
    meter.step_complete('all', 0)
    meter.step_complete('all', 7)
    meter.phase_start('late', 'all', 0)
    meter.step_complete('late', 0)
    meter.phase_finish('all')
    meter.phase_start('another', None, 2)
    meter.step_complete('another', 0)
    assert told.fractions == [0, 0, 0.5, 1, 1, 1]


def test_a_meter_stops_and_stays_stopped():
    told = Told(go_on=False)
    meter = Meter('step', told)
    meter.phase_start('all', None, 10)
    assert not meter.step_complete('all', 0)
    assert not meter.step_complete('all', 1)
    meter.phase_finish('all')  # as TensorRT does on its way out
    assert told.fractions == [0.1]
    with pytest.raises(BuildCancelled, match=r'the build of step was cancelled .* at 20 %'):
        meter.check()


# Which TensorRT.

@contextmanager
def packages(monkeypatch, loads):
    """Let only these packages be found; each is a library, or the error of its import."""
    def load(package):
        if isinstance(loads[package], Exception):
            raise loads[package]
        return loads[package]

    with monkeypatch.context() as patch:
        patch.setattr(finding, 'find_spec', lambda name: name in loads or None)
        patch.setattr(finding, '_load', load)
        yield


class Stub:
    def __init__(self, package):
        self.installation = Installation(package, '10.3.0')
        self.api = object()


def test_tensorrt_comes_before_tensorrt_rtx(monkeypatch):
    monkeypatch.delenv('FLOW_ROS_TENSORRT', raising=False)
    both = {name: Stub(name) for name in finding.PACKAGES}
    with packages(monkeypatch, both):
        assert find_tensorrt() == Installation('tensorrt', '10.3.0')
        assert missing_tensorrt() == ''
        monkeypatch.setenv('FLOW_ROS_TENSORRT', 'tensorrt_rtx')
        assert find_tensorrt().text == 'TensorRT-RTX 10.3.0'
        monkeypatch.setenv('FLOW_ROS_TENSORRT', 'none')
        assert find_tensorrt() is None
        assert missing_tensorrt() == 'TensorRT is switched off (FLOW_ROS_TENSORRT=none)'
        monkeypatch.setenv('FLOW_ROS_TENSORRT', 'yes')
        with pytest.raises(ValueError, match="must be one of tensorrt, .*; seen 'yes'"):
            find_tensorrt()


def test_a_package_without_its_libraries_is_passed_over(monkeypatch):
    monkeypatch.delenv('FLOW_ROS_TENSORRT', raising=False)
    broken = ImportError('libnvinfer.so.10: cannot open shared object file')
    with packages(monkeypatch, {'tensorrt': broken, 'tensorrt_rtx': Stub('tensorrt_rtx')}):
        assert find_tensorrt().package == 'tensorrt_rtx'
    with packages(monkeypatch, {'tensorrt': broken}):
        assert find_tensorrt() is None
        assert missing_tensorrt() == ('TensorRT is installed but cannot be used (libnvinfer.so'
                                      '.10: cannot open shared object file)')
    with packages(monkeypatch, {}):
        assert missing_tensorrt().startswith('TensorRT is not installed: on a Jetson')
        with pytest.raises(RuntimeUnavailable, match='pip install tensorrt'):
            build(b'')


def test_gpus_that_are_refused(monkeypatch):
    """By TensorRT-RTX, which lists what it knows; TensorRT promises nothing."""
    class Capability:
        __members__ = dict.fromkeys(['NONE', 'CURRENT', 'SM75', 'SM86', 'SM89', 'SM120'])

    rtx = Stub('tensorrt_rtx')
    rtx.api = type('Api', (), {'ComputeCapability': Capability})
    with packages(monkeypatch, {'tensorrt_rtx': rtx}):
        assert refuses_gpu((9, 0)) == ('TensorRT-RTX 10.3.0 does not run on GPUs of compute '
                                       'capability 9.0, only on 7.5, 8.6, 8.9, 12.0')
        assert [refuses_gpu(known) for known in ((7, 5), (8, 9), (12, 0), (12, 1))] == [''] * 4
    with packages(monkeypatch, {'tensorrt': Stub('tensorrt')}):
        assert refuses_gpu((9, 0)) == ''
    with packages(monkeypatch, {}):
        assert 'not installed' in refuses_gpu((8, 9))


# Plans read back; a GPU is needed only for the good ones.

@needs_tensorrt
def test_damaged_plans_are_told_apart(exports, caplog):
    act = exports.acts('dip_rt')[-1]
    plan = build(doubling()).plan
    for damaged, meaning in ((plan[:-100], 'truncated or damaged'), (b'', 'truncated or damaged'),
                             (b'no plan ' * 100, 'another version, or is no plan')):
        with caplog.at_level(logging.WARNING), pytest.raises(PlanError) as caught:
            TensorRtRuntime(exports.network('dip_rt'), plans={act.name: damaged}, acts=[act],
                            device=torch.device('cpu'), streams=FakeStreams())
        text = str(caught.value)
        assert text.startswith(f'{act.name}: this plan of {len(damaged)} bytes cannot be used (')
        assert meaning in text
        assert find_tensorrt().text in text
    assert not caplog.records
    if not torch.cuda.is_available():
        with pytest.raises(PlanError, match='there is no GPU, or its driver is too old'):
            TensorRtRuntime(exports.network('dip_rt'), plans={act.name: plan}, acts=[act],
                            device=torch.device('cpu'), streams=FakeStreams())


@needs_tensorrt
@needs_cuda
@pytest.mark.parametrize(('precision', 'limit_px'), [('f32', 0.01), ('fast', 1.0)])
def test_the_engines_agree_with_torch_on_the_gpu(exports, precision, limit_px):
    refused = refuses_gpu(torch.cuda.get_device_capability())
    if refused:
        pytest.skip(refused)
    network, acts = exports.network('dip_rt', precision), exports.acts('dip_rt', precision)
    plans = {act.name: build(exports.model('dip_rt', act.name, precision), name=act.name,
                             options=BuildOptions(precision=precision)).plan for act in acts}
    runtime = TensorRtRuntime(network, plans=plans, acts=acts, device=torch.device('cuda'))
    network = exports.network('dip_rt')
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 128, 192, generator=generator) * 255
    with torch.inference_mode():
        expected = network(images[:1], images[1:])
        for _ in range(4):  # plain, captured, replayed
            features = [runtime.network.encode(image[None].cuda(), call=runtime.call)
                        for image in images]
            state = runtime.network.start(*features, call=runtime.call)
            _, output = runtime.loop(state)
            errors = (output.flow.cpu() - expected.flow).norm(dim=1).flatten()
            assert errors.quantile(0.999) < limit_px
    assert runtime._graphed.failure == ''
    assert runtime._graphed.kept == 1
