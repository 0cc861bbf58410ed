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

"""The exported acts against torch in onnxruntime, and what the check of a file refuses."""

from dataclasses import replace
import hashlib
import os
import subprocess
import sys

from exported import Exports, HEIGHT, NETWORKS, WIDTH
import numpy as np
import onnx
from onnx import helper, numpy_helper, TensorProto
import pytest
import torch
from torch import nn, Tensor
from torch.nn import functional

from flow_ros.networks import create
from flow_ros.networks.base import FlowNetwork
from flow_ros.networks.half import Affine, fold_norms
from flow_ros.ops.cost_volume import sampled_cost_volume
from flow_ros.ops.matching import inverse_propagation, local_search
from flow_ros.ops.patchmatch import local_search_released
from flow_ros.runtimes.acts import Act, record_acts, signature_of, TensorSpec
from flow_ros.runtimes.export import (
    check_onnx,
    export_act,
    ExportError,
    multiple_of,
    prepared,
    profile,
    SizeRange,
)

torch.set_num_threads(1)

Calls = dict[tuple[str, tuple[object, ...]], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]

OTHER = (256, 192)
"""The other size (width, height) at which dynamic acts are tried."""

# Export takes 2 s for an act of one size and up to 10 s for one of any size, so by default not
# every act in every form: each engine once, the forms that differ with the size in both. These
# are the acts that test_tensorrt_build.py builds too. None is all acts.
SOME: dict[tuple[str, str, bool], set[str] | None] = {
    ('dip_rt', 'f32', False): {'step_8'}, ('dip_rt', 'f32', True): None,
    ('dip_rt', 'fast', False): {'step_16'}, ('dip', 'f32', False): {'step_4'},
    ('dip', 'f32', True): {'encode', 'upsample'}, ('hd3', 'f32', False): {'step4'},
    ('hd3_iofpl', 'f32', False): {'step0'}, ('hd3_iofpl', 'f32', True): {'step1'},
    ('mscsl', 'f32', False): {'step1'}, ('mscsl', 'f32', True): {'finish'},
    ('mscsl', 'fast', False): {'step0'}}
EVERYTHING: dict[tuple[str, str, bool], set[str] | None] = {
    (name, precision, dynamic): None for name in NETWORKS
    for precision in ('f32', 'fast') for dynamic in (False, True)}
WHICH = EVERYTHING if os.environ.get('FLOW_ROS_TEST_ALL') else SOME
"""FLOW_ROS_TEST_ALL=1: every act of every network in every form, which takes half an hour."""


def images(width: int, height: int) -> tuple[Tensor, Tensor]:
    """Return a smooth picture and the same moved by (4, 2) px."""
    coarse = torch.rand(1, 3, 14, 22, generator=torch.Generator().manual_seed(1)) * 255
    whole = functional.interpolate(coarse, size=(height + 2, width + 4), mode='bicubic')
    whole = whole.clamp(0, 255)
    return whole[:, :, 2:, 4:], whole[:, :, :-2, :-4]


def calls_of(network: FlowNetwork, width: int, height: int) -> Calls:
    """Return inputs and outputs in torch of every act, cold and warm, as they really come."""
    calls: Calls = {}

    def call(engine: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        calls[engine, signature_of(tensors)] = (tensors, network.engine(engine, *tensors))
        return calls[engine, signature_of(tensors)][1]

    first, second = images(width, height)
    priors = [None]
    if network.accepts_prior:
        priors.append(torch.full((1, 2, height, width), -40.0))
    with torch.no_grad():
        a, b = network.encode(first, call=call), network.encode(second, call=call)
        for prior in priors:
            state = network.start(a, b, prior_flow=prior, call=call)
            state = replace(state, schedule=tuple(dict.fromkeys(state.schedule)))
            while state.schedule:
                state = network.step(state, call=call)
            network.finish(state, call=call)
    return calls


_kept: dict[tuple[str, str, int, int], Calls] = {}


def kept_calls(exports: Exports, name: str, precision: str, width: int, height: int) -> Calls:
    key = (name, precision, width, height)
    if key not in _kept:
        _kept[key] = calls_of(exports.network(name, precision), width, height)
    return _kept[key]


def run_onnx(model: bytes, act: Act, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    ort = pytest.importorskip('onnxruntime')
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    fed = {spec.name: tensor.numpy() for spec, tensor in zip(act.inputs, tensors, strict=True)}
    return [torch.from_numpy(values) for values in
            session.run([spec.name for spec in act.outputs], fed)]


def agree(act: Act, results: list[Tensor], expected: tuple[Tensor, ...], *, quantile: float,
          flow_px: float, share: float) -> None:
    """Flows by the endpoint error, in px of their grid; all else by the tensor's scale."""
    for spec, result, wanted in zip(act.outputs, results, expected, strict=True):
        assert result.dtype == wanted.dtype and result.shape == wanted.shape, spec
        result, wanted = result.float(), wanted.float()
        assert bool(torch.isfinite(result).all())
        if spec.name.endswith('flow'):
            errors, limit = (result - wanted).norm(dim=1), flow_px
        else:
            errors, limit = (result - wanted).abs(), share * float(wanted.abs().max())
        # Not the worst one: an argmax that jumps takes flow and probabilities with it.
        worst = float(np.quantile(errors.numpy(), quantile))
        assert worst <= limit, (spec.name, worst, limit)


@pytest.mark.parametrize(('name', 'precision', 'dynamic'), WHICH)
def test_exported_acts_agree_with_torch(exports: Exports, name: str, precision: str,
                                        dynamic: bool) -> None:
    """On what each act is really given; dynamic ones at another size as well."""
    # Of untrained densities half precision finds another argmax here and there.
    limits = ({'quantile': 0.999, 'flow_px': 0.01, 'share': 1e-4} if precision == 'f32' else
              {'quantile': 0.5 if name.startswith('hd3') else 0.99, 'flow_px': 0.1,
               'share': 2e-2})
    chosen = WHICH[name, precision, dynamic]
    for act in exports.acts(name, precision, dynamic):
        if chosen is not None and act.name not in chosen:
            continue
        model = exports.model(name, act.name, precision, dynamic)
        for width, height in [(WIDTH, HEIGHT), *([OTHER] if dynamic else [])]:
            calls = kept_calls(exports, name, precision, width, height)
            given = [call for (engine, signature), call in calls.items()
                     if engine == act.engine and (dynamic or signature == act.signature)]
            assert len(given) >= len(act.variants) or width != WIDTH
            assert given
            for tensors, expected in given:
                agree(act, run_onnx(model, act, tensors), expected, **limits)


@pytest.mark.parametrize(('name', 'act'), [('dip_rt', 'step_8'), ('hd3_iofpl', 'step0')])
def test_names_and_shapes_are_those_of_the_act(exports: Exports, name: str, act: str) -> None:
    found, = (each for each in exports.acts(name) if each.name == act)
    graph = onnx.ModelProto.FromString(exports.model(name, act)).graph
    for values, specs in ((graph.input, found.inputs), (graph.output, found.outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        for value, spec in zip(values, specs):
            assert tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) == spec.shape
            assert value.type.tensor_type.elem_type == TensorProto.FLOAT


def test_dynamic_dims_have_names_and_halves_are_where_they_belong(exports: Exports) -> None:
    graph = onnx.ModelProto.FromString(exports.model('dip_rt', 'encode', dynamic=True)).graph
    dims = graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == [1, 3, '16*h', '16*w']
    fine = graph.output[3]
    assert [dim.dim_param or dim.dim_value for dim in fine.type.tensor_type.shape.dim] == [
        1, 64, '2*h', '2*w']
    model = onnx.ModelProto.FromString(exports.model('dip_rt', 'step_16', 'fast'))
    kinds = {value.name: value.type.tensor_type.elem_type
             for value in (*model.graph.input, *model.graph.output)}
    half = {'match_a', 'match_b', 'context', 'hidden', 'next_hidden'}
    assert kinds == {**dict.fromkeys(half, TensorProto.FLOAT16), 'flow': TensorProto.FLOAT,
                     'next_flow': TensorProto.FLOAT}


def test_nothing_of_this_machine_is_in_a_file(exports: Exports) -> None:
    for name, act in (('dip_rt', 'step_8'), ('hd3', 'step4')):
        text = exports.model(name, act)
        for word in (b'.py', b'/home', sys.prefix.encode(), b'stack_trace', b'File "'):
            assert word not in text
        model = onnx.ModelProto.FromString(text)
        assert not model.metadata_props and not model.doc_string
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


class Small(FlowNetwork):
    """As little as an export can be of; its engines are what the check is to find."""

    name = 'small'
    engines = ('encode', 'scatters', 'constant', 'fails')

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def encode_engine(self, image: Tensor) -> tuple[Tensor, ...]:
        return (self.conv(image),)

    def scatters_engine(self, values: Tensor) -> tuple[Tensor, ...]:
        return (values.index_add(3, torch.tensor([0, 0]), values[..., :2]),)

    def constant_engine(self, values: Tensor, flow: Tensor) -> tuple[Tensor, ...]:
        return (values + torch.zeros_like(flow),)

    def fails_engine(self, values: Tensor) -> tuple[Tensor, ...]:
        return (values + int(values.sum()),)


def spec(name: str, shape: tuple[int, ...] = (1, 3, 8, 8)) -> TensorSpec:
    return TensorSpec(name, shape, torch.float32, 1)


def small_act(engine: str, *inputs: str) -> Act:
    return Act(engine, engine, tuple(map(spec, inputs)),
               (spec('result', (1, 4, 8, 8) if engine == 'encode' else (1, 3, 8, 8)),))


def test_the_same_network_gives_the_same_bytes_in_another_process() -> None:
    code = ('import sys; sys.path[:0] = ["test/runtimes"]; import hashlib; '
            'from test_export import export_act, Small, small_act; '
            'print(hashlib.sha256(export_act(Small(), small_act("encode", "image"))).hexdigest())')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          timeout=300, check=False)
    here = export_act(Small(), small_act('encode', 'image'))
    assert done.stdout.strip() == hashlib.sha256(here).hexdigest(), done.stderr[-2000:]


@pytest.mark.parametrize(('engine', 'inputs', 'message'), [
    ('scatters', ('values',), r'^scatters: Scatter.*keep them out of the engine'),
    ('constant', ('values', 'flow'), "^constant: the input 'flow' is not used: it was made a"),
    ('fails', ('values',), 'small: fails cannot be exported by torch .*: '),
])
def test_an_engine_that_cannot_be_exported_is_refused(engine: str, inputs: tuple[str, ...],
                                                      message: str) -> None:
    with pytest.raises(ExportError, match=message) as raised:
        export_act(Small(), small_act(engine, *inputs))
    assert len(str(raised.value).splitlines()) == 1


# What the check of a file refuses: deliberately wrong models.


def model_of(nodes: list[onnx.NodeProto], *, opset: int = 18,
             more: tuple[str, ...] = ()) -> bytes:
    """Return a model of the input x, and a grid where one is read, with the output y."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 2, 8, 8))
              for name in ('x', *more)]
    if any('grid' in node.input for node in nodes):
        inputs.append(helper.make_tensor_value_info('grid', TensorProto.FLOAT, (1, 8, 8, 2)))
    graph = helper.make_graph(
        nodes, 'graph', inputs, [helper.make_tensor_value_info('y', TensorProto.FLOAT, [*'abcd'])],
        initializer=[numpy_helper.from_array(np.array([2, 3]), 'spatial'),
                     numpy_helper.from_array(np.array([1]), 'channels'),
                     numpy_helper.from_array(np.zeros((1, 4), np.int64), 'index'),
                     numpy_helper.from_array(np.ones(1, np.float32), 'one')])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', opset)],
                              ir_version=9)
    return bytes(model.SerializeToString())


def sampling(**attributes: object) -> onnx.NodeProto:
    return helper.make_node('GridSample', ['x', 'grid'], ['y'], name='warp',
                            **{'align_corners': 1, **attributes})


def norm_by_hand(axes: str) -> list[onnx.NodeProto]:
    """Return a norm made of the operators it consists of."""
    return [helper.make_node('ReduceMean', ['x', axes], ['mean'], name='mean'),
            helper.make_node('Sub', ['x', 'mean'], ['centred']),
            helper.make_node('Mul', ['centred', 'centred'], ['square']),
            helper.make_node('ReduceMean', ['square', axes], ['variance']),
            helper.make_node('Add', ['variance', 'one'], ['sum']),
            helper.make_node('Sqrt', ['sum'], ['deviation']),
            helper.make_node('Div', ['centred', 'deviation'], ['y'])]


def test_what_is_right_passes() -> None:
    check_onnx(model_of([sampling(mode='bilinear')]), name='right')
    check_onnx(model_of([sampling(mode='bilinear', padding_mode='border')]), name='right')
    check_onnx(model_of(norm_by_hand('channels')), name='a norm over the channels')


@pytest.mark.parametrize(('model', 'message'), [
    (model_of([sampling(mode='linear')], opset=20), 'opset 20 instead of 18'),
    (model_of([sampling(mode='nearest')]), "'warp' has the mode 'nearest' instead of bilinear"),
    (model_of([sampling(mode='bicubic')]), "has the mode 'bicubic'"),
    (model_of([sampling(align_corners=0)]), "GridSample 'warp' does not align corners"),
    (model_of([helper.make_node('ScatterND', ['x', 'index', 'one'], ['y'], name='add',
                                reduction='add')]), "ScatterND 'add': TensorRT refuses"),
    (model_of([helper.make_node('ScatterElements', ['x', 'x', 'x'], ['y'], name='add',
                                reduction='add')]), 'ScatterElements|not valid ONNX'),
    (model_of(norm_by_hand('spatial')), "'mean'|an instance norm taken to pieces; expected Inst"),
    (model_of([helper.make_node('Relu', ['x'], ['y'])], more=('flow',)),
     "the input 'flow' is not used: it was made a constant"),
    (model_of([helper.make_node('Own', ['x'], ['y'], domain='house')]), 'not valid|house'),
    (b'no model at all', 'model x: not valid ONNX: '),
    (b'', 'model x: '),
])
def test_a_wrong_model_is_refused(model: bytes, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        check_onnx(model, name='model x')


def test_half_coordinates_are_refused() -> None:
    cast = helper.make_node('Cast', ['grid'], ['half'], to=TensorProto.FLOAT16)
    node = helper.make_node('GridSample', ['x', 'half'], ['y'], name='warp', align_corners=1)
    with pytest.raises(ExportError, match='coordinates that are float16 instead of float32'):
        check_onnx(model_of([cast, node]), name='halved')


def test_a_batch_norm_that_trains_is_refused() -> None:
    stretched = helper.make_node('BatchNormalization', ['x', 'c', 'c', 'c', 'c'],
                                 ['y', 'mean', 'variance'], name='norm', training_mode=1)
    values = helper.make_tensor_value_info('x', TensorProto.FLOAT, (1, 2, 8, 8))
    graph = helper.make_graph(
        [stretched], 'graph', [values],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, (1, 2, 8, 8))],
        initializer=[numpy_helper.from_array(np.ones(2, np.float32), 'c')])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    with pytest.raises(ExportError, match="'norm' in training mode: an instance norm taken to p"):
        check_onnx(model.SerializeToString(), name='norm')


def test_weights_in_another_file_are_refused() -> None:
    model = onnx.ModelProto.FromString(model_of([helper.make_node('Relu', ['x'], ['y'])]))
    tensor = model.graph.initializer[0]
    tensor.ClearField('raw_data')
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = 'location', 'weights.bin'
    with pytest.raises(ExportError, match='another file|not valid ONNX'):
        check_onnx(model.SerializeToString(), name='split')


def test_the_exported_dip_has_its_norms_whole(exports: Exports) -> None:
    model = onnx.ModelProto.FromString(exports.model('dip', 'encode', dynamic=True))
    operators = [node.op_type for node in model.graph.node]
    assert operators.count('InstanceNormalization') == 19
    assert not {'ReduceMean', 'Sqrt', 'BatchNormalization'} & set(operators)


def test_no_graph_grows_with_the_map(exports: Exports) -> None:
    """Neither tile by tile, nor shift by shift."""
    counts = {(name, act): len(onnx.ModelProto.FromString(exports.model(name, act)).graph.node)
              for name, act in (('dip_rt', 'step_8'), ('dip', 'step_4'), ('hd3', 'step4'),
                                ('hd3_iofpl', 'step0'), ('mscsl', 'step1'))}
    assert max(counts.values()) < 400, counts  # 18 lines of a patch, of radius 8
    larger = next(act for act in record_acts(exports.network('dip_rt'), width=640, height=480)
                  if act.name == 'step_8')
    model = onnx.ModelProto.FromString(export_act(exports.network('dip_rt'), larger))
    assert abs(len(model.graph.node) - counts['dip_rt', 'step_8']) < 5


def test_the_forms_for_graphs_compute_what_the_eager_ones_do() -> None:
    """In torch.export, at a size that tiles do not divide; sizes fixed, and one left open."""
    class Forms(nn.Module):
        def forward(self, a: Tensor, b: Tensor, flow: Tensor) -> tuple[Tensor, ...]:
            return (local_search(a, b, 4), local_search(a, b, 10), local_search_released(a, b),
                    inverse_propagation(a, b, flow),
                    *(sampled_cost_volume(a, b, flow, 4, measure=measure)
                      for measure in ('dot', 'sad')))

    def inputs(height: int, width: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(3)
        return tuple(torch.randn(1, channels, height, width, generator=generator) * scale
                     for channels, scale in ((6, 1), (6, 1), (2, 9)))

    fixed = torch.export.export(Forms(), inputs(13, 18)).module()
    dims = {2: torch.export.Dim('h', min=2), 3: torch.export.Dim('w', min=2)}
    free = torch.export.export(Forms(), inputs(13, 18), dynamic_shapes=(dims,) * 3).module()
    for module, size in ((fixed, (13, 18)), (free, (13, 18)), (free, (8, 24)), (free, (3, 2))):
        for found, wanted in zip(module(*inputs(*size)), Forms()(*inputs(*size)), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# Half precision.


@pytest.mark.parametrize('name', ['dip_rt', 'hd3_iofpl', 'mscsl'])
def test_half_precision_runs_in_torch_and_leaves_flow_alone(exports: Exports, name: str) -> None:
    """Dip as well, but on a CPU its convolutions in half precision take minutes."""
    network = exports.network(name, 'fast')
    for (engine, _), (tensors, results) in kept_calls(exports, name, 'fast', WIDTH,
                                                      HEIGHT).items():
        inputs, outputs = network.tensor_names[engine]
        for label, tensor in (*zip(inputs, tensors), *zip(outputs, results)):
            single = label.endswith('flow') or label in ('image', 'offset', 'cues', 'probability',
                                                         'confidence', 'occlusion')
            assert tensor.dtype == (torch.float32 if single else torch.float16), (engine, label)


def test_dip_in_half_precision_has_the_same_types() -> None:
    acts = {act.name: act for act in record_acts(prepared(create('dip'), 'fast'), width=192,
                                                 height=128)}
    assert [str(each.dtype) for each in acts['step_4'].inputs] == ['torch.float16'] * 12 + [
        'torch.float32']
    assert acts['upsample_4'].outputs[0].dtype == torch.float32


@torch.no_grad()  # with gradients a network takes other forms, which round otherwise
def test_prepared_is_a_copy_and_f32_is_the_network_itself() -> None:
    network = create('dip_rt').train()
    image = images(64, 64)[0]
    exact, fast = prepared(network, 'f32'), prepared(network, 'fast')
    assert network.training and not exact.training and not fast.training
    assert all(value.dtype != torch.float16 for value in network.state_dict().values())
    assert torch.equal(exact.encode(image).tensors[0],
                       network.eval().encode(image).tensors[0].detach())
    assert fast.get_buffer('calibration').dtype == torch.float32
    with pytest.raises(ValueError, match='precision must be one of f32, fast; seen '):
        prepared(network, 'int8')


def test_norms_are_folded_before_anything_is_halved() -> None:
    for name, options in (('hd3', {'encoder': 'vgg', 'decoder_width': 16}),
                          ('hd3', {'decoder_width': 16}), ('dip_rt', {})):
        torch.manual_seed(0)
        network = create(name, None, **options)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        folded = prepared(network, 'f32')
        fold_norms(folded)
        left = [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
        assert not left
        values = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            for got, wanted in zip(folded.encoder(values), network.encoder(values)):
                torch.testing.assert_close(got, wanted, rtol=1e-3,
                                           atol=1e-4 * float(wanted.abs().max()))
    norm = nn.BatchNorm2d(3).eval()
    nn.init.constant_(norm.running_var, 1e-9)  # which half precision does not know
    nn.init.constant_(norm.running_mean, 1e-3)
    values = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(Affine(norm)(values), norm(values))


# Profiles.


def test_a_profile_covers_all_levels_and_sizes() -> None:
    acts = record_acts(create('dip_rt'), width=640, height=480, dynamic=True)
    shapes = {act.name: profile(act, SizeRange((320, 240), (640, 480), (1280, 720)), 16)
              for act in acts}
    assert multiple_of(acts) == 16
    assert shapes['encode']['image'] == ((1, 3, 240, 320), (1, 3, 480, 640), (1, 3, 720, 1280))
    # From the smallest frame at 1/16 to the largest at 1/8, tuned for the larger level.
    assert shapes['step']['flow'] == ((1, 2, 15, 20), (1, 2, 60, 80), (1, 2, 90, 160))
    assert shapes['finish']['hidden'][0] == (1, 64, 30, 40)


def test_a_profile_counts_the_padded_frame() -> None:
    acts = record_acts(create('mscsl'), width=640, height=480, dynamic=True)
    encode = acts[0]
    assert multiple_of(acts) == 64
    seen = profile(encode, SizeRange((100, 100), (640, 480), (650, 490)), 64)
    assert seen['image'] == ((1, 3, 128, 128), (1, 3, 512, 640), (1, 3, 512, 704))
    with pytest.raises(ValueError, match='at least 128x128; seen a maximum of 120x90'):
        profile(encode, SizeRange((64, 64), (100, 80), (120, 90)), 64)


def test_a_range_that_is_none() -> None:
    with pytest.raises(ValueError, match='seen 640x480, 320x480, 640x480'):
        SizeRange((640, 480), (320, 480), (640, 480))


def test_without_onnx_there_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ExportError, match='the package onnxscript, which is not installed: pip'):
        export_act(Small(), small_act('encode', 'image'))
