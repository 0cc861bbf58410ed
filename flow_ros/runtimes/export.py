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

"""The acts of a network as ONNX, for every runtime that compiles.

Opset 18, whatever is newer: TensorRT read GridSample of opset 20 as nearest, in silence, for
years. Precision is in the graph: with 'fast' the convolutions are in half precision, flow,
coordinates and sampling grids in single. What else engines have been wrong about is checked in
each file (``check_onnx``). The same network gives the same bytes, so that caches can hash them:
no names of files, no times, no stack traces.

Needs the packages onnx and onnxscript; they are imported where they are used.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
import copy
from dataclasses import dataclass
import logging
import math
from typing import Any
import warnings

import torch
from torch import nn, Tensor

from flow_ros.networks.base import FlowNetwork
from flow_ros.networks.half import halve
from flow_ros.runtimes.acts import Act, TensorSpec
from flow_ros.runtimes.base import check_precision

OPSET = 18
FEWEST_CELLS = 2
"""Of the coarsest map of a dynamic act, on each axis: sizes of 1 are special to torch."""

_FLOAT, _HALF = 1, 10  # of onnx.TensorProto
_REDUCTIONS = frozenset({'ReduceMean', 'ReduceSum', 'ReduceSumSquare', 'ReduceL2'})
_SPATIAL_AXES = (2, 3)

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


class ExportError(RuntimeError):
    """An act cannot be exported, or its file is not what engines need."""


@dataclass(frozen=True)
class SizeRange:
    """Frames (width, height) in px that a dynamic engine serves; it is tuned for ``optimum``."""

    minimum: tuple[int, int]
    optimum: tuple[int, int]
    maximum: tuple[int, int]

    def __post_init__(self) -> None:
        """Refuse a range that is none."""
        for least, best, most in zip(self.minimum, self.optimum, self.maximum):
            if not 1 <= least <= best <= most:
                raise ValueError(f'sizes must be minimum <= optimum <= maximum on both axes; seen '
                                 f'{", ".join(_size(size) for size in self.sizes)}')

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return minimum, optimum and maximum."""
        return self.minimum, self.optimum, self.maximum


def prepared(network: FlowNetwork, precision: str) -> FlowNetwork:
    """Return a copy of ``network`` in eval mode that computes in ``precision``.

    'f32' is the network as it is; 'fast' has its convolutions in half precision (see
    ``networks.half``). It is what engines of that precision compute, and runs in torch as well;
    it is on the device of ``network``. Raises ValueError for any other precision.
    """
    check_precision(precision)
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    if precision == 'fast':
        halve(copied)
    return copied


def export_act(network: FlowNetwork, act: Act, *, dynamic: bool = False) -> bytes:
    """Return ``act`` of ``network`` as ONNX with its weights, checked.

    ``network`` is a ``prepared`` one and ``act`` one of ``record_acts`` of it. With ``dynamic``
    (and a dynamic act) height and width are open: names like ``16*h`` stand for them, with
    ``h`` and ``w`` the cells of the act's coarsest map, at least FEWEST_CELLS. Inputs and outputs
    have the names of the act. Takes seconds. Raises ExportError where it cannot be done.
    """
    _need_packages()
    device = next(network.parameters()).device
    inputs = tuple(torch.zeros(spec.shape, dtype=spec.dtype, device=device)
                   for spec in act.inputs)
    try:
        with _quietly(), torch.inference_mode(False), torch.no_grad():
            # In two parts: given the module, the exporter would try three ways, the last of
            # which makes constants of what it does not understand.
            recorded = torch.export.export(
                _EngineModule(network, act.engine).eval(), inputs, strict=False,
                dynamic_shapes=(_open_dims(act),) if dynamic else None)
            program = torch.onnx.export(
                recorded, dynamo=True, opset_version=OPSET, verbose=False,
                input_names=[spec.name for spec in act.inputs],
                output_names=[spec.name for spec in act.outputs])
    except Exception as error:  # any: the exporter raises its own, torch's and sympy's
        raise ExportError(f'{network.name}: {act.name} cannot be exported by torch '
                          f'{torch.__version__}: {_why(error)}') from error
    assert program is not None
    model = program.model_proto
    _tidy(model, act, dynamic=dynamic)
    text: bytes = model.SerializeToString(deterministic=True)
    check_onnx(text, name=act.name)
    return text


class _EngineModule(nn.Module):
    """One engine function as the module that the exporter wants."""

    def __init__(self, network: FlowNetwork, engine: str) -> None:
        super().__init__()
        self.network = network
        self.name = engine

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the engine function."""
        return self.network.engine(self.name, *tensors)


def multiple_of(acts: Sequence[Act]) -> int:
    """Return the px that the sides of a padded frame are multiples of: the coarsest cell."""
    return max(spec.px_per_cell or 1 for act in acts for spec in (*act.inputs, *act.outputs))


def profile(act: Act, ranges: SizeRange, multiple: int) -> Profile:
    """Return the shapes (minimum, optimum, maximum) of each input of a dynamic ``act``.

    ``multiple`` is ``multiple_of`` all acts of the network. All levels of the act are covered;
    it is tuned for the largest. Raises ValueError where ``ranges`` ends below the smallest
    frame of a dynamic engine.
    """
    smallest = FEWEST_CELLS * multiple
    if min(ranges.maximum) < smallest:
        raise ValueError(f'dynamic engines of this network are for frames of at least '
                         f'{smallest}x{smallest}; seen a maximum of {_size(ranges.maximum)}: '
                         f'choose a larger one, or one size')
    # Networks pad a frame up to the multiple, or resize it to the next, above or below.
    least, best, most = ([max(smallest, step(side / multiple) * multiple) for side in size]
                         for size, step in zip(ranges.sizes, (math.floor, math.ceil, math.ceil)))
    variants = act.variants or (act,)
    result: Profile = {}
    for index, spec in enumerate(act.inputs):
        cells = [variant.inputs[index].px_per_cell for variant in variants]
        known = [cell for cell in cells if cell is not None]
        if not known:
            result[spec.name] = (spec.shape,) * 3
            continue
        result[spec.name] = (_shape(spec, least, max(known)), _shape(spec, best, min(known)),
                             _shape(spec, most, min(known)))
    return result


def _shape(spec: TensorSpec, frame: Sequence[int], cell: int) -> tuple[int, ...]:
    width, height = frame
    return (*spec.shape[:-2], height // cell, width // cell)


def _size(size: tuple[int, int]) -> str:
    return f'{size[0]}x{size[1]}'


def dims_of(act: Act, spec: TensorSpec, *, dynamic: bool) -> tuple[int | str, ...]:
    """Return the dims of a tensor as its file has them: names such as ``16*h`` where open."""
    if not dynamic or spec.px_per_cell is None:
        return spec.shape
    times = multiple_of((act,)) // spec.px_per_cell
    return (*spec.shape[:-2], *(f'{times}*{letter}' if times > 1 else letter for letter in 'hw'))


def _open_dims(act: Act) -> tuple[dict[int, Any], ...]:
    """Return which dims of the inputs are open, as torch.export takes them."""
    coarsest = multiple_of((act,))
    rows = torch.export.Dim('h', min=FEWEST_CELLS)
    columns = torch.export.Dim('w', min=FEWEST_CELLS)
    dims: list[dict[int, Any]] = []
    for spec in act.inputs:
        if spec.px_per_cell is None:
            dims.append({})
            continue
        times = coarsest // spec.px_per_cell
        dims.append({len(spec.shape) - 2: times * rows if times > 1 else rows,
                     len(spec.shape) - 1: times * columns if times > 1 else columns})
    return tuple(dims)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's talk off the screen; what matters of it is raised."""
    talker = logging.getLogger('torch.onnx')
    before = talker.level
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        talker.setLevel(logging.ERROR)
        try:
            yield
        finally:
            talker.setLevel(before)


def _why(error: BaseException) -> str:
    """Return the line that says what is wrong: that of the error underneath all others."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {lines[0] if lines else "no message"}'


def _need_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ExportError(f'ONNX export needs the package {error.name}, which is not installed: '
                          f'pip install onnx onnxscript') from error


def _tidy(model: Any, act: Act, *, dynamic: bool) -> None:
    """Take out of ``model`` what depends on where and when it was made; name its dims."""
    graph = model.graph
    del graph.value_info[:]  # of no use to engines, and with the exporter's own names
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField('doc_string')
        part.ClearField('metadata_props')
    model.ClearField('model_version')
    model.domain, graph.name = '', act.name
    for values, specs in ((graph.input, act.inputs), (graph.output, act.outputs)):
        for value, spec in zip(values, specs, strict=True):
            shape = value.type.tensor_type.shape
            for dim, size in zip(shape.dim, dims_of(act, spec, dynamic=dynamic), strict=True):
                if isinstance(size, str):
                    dim.dim_param = size
                else:
                    dim.dim_value = size


def check_onnx(model: bytes, *, name: str) -> None:
    """Raise ExportError where ``model`` is not what engines compute rightly.

    It must be valid ONNX of opset 18 that needs no other file; its GridSamples bilinear with
    aligned corners and float32 coordinates; without scatters, without an instance norm taken
    to pieces (three times slower in TensorRT), and with a use for each of its inputs: one that
    has none was made a constant. ``name`` is what messages call it.
    """
    _need_packages()
    import onnx
    try:
        loaded = onnx.ModelProto.FromString(model)
        onnx.checker.check_model(loaded)
        loaded = onnx.shape_inference.infer_shapes(loaded, data_prop=True)
    except Exception as error:  # any: a damaged file is one of protobuf's or of onnx's errors
        raise ExportError(f'{name}: not valid ONNX: {_why(error)}') from error
    faults = list(_faults(_Graph(loaded)))
    if faults:
        raise ExportError(f'{name}: {"; ".join(faults)}')


class _Graph:
    """A model with what is asked of it again and again."""

    def __init__(self, model: Any) -> None:
        import onnx
        self.model = model
        self.nodes = list(model.graph.node)
        self.types: dict[str, int] = {}
        self.ranks: dict[str, int] = {}
        self.constants: dict[str, Any] = {}
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
            tensor = value.type.tensor_type
            self.types[value.name] = tensor.elem_type
            if tensor.HasField('shape'):
                self.ranks[value.name] = len(tensor.shape.dim)
        for tensor in model.graph.initializer:
            self.types[tensor.name] = tensor.data_type
            self.ranks[tensor.name] = len(tensor.dims)
            if math.prod(tensor.dims) <= 16:
                self.constants[tensor.name] = onnx.numpy_helper.to_array(tensor)
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for each in node.input:
                self.readers.setdefault(each, []).append(node)
            if node.op_type == 'Constant':
                for attribute in node.attribute:
                    if attribute.name == 'value':
                        self.constants[node.output[0]] = onnx.numpy_helper.to_array(attribute.t)

    @staticmethod
    def attribute(node: Any, name: str, default: Any) -> Any:
        """Return an attribute of ``node``; text as str."""
        import onnx
        for attribute in node.attribute:
            if attribute.name == name:
                value = onnx.helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def leads_to(self, name: str, operator: str) -> bool:
        """Return whether ``operator`` is computed from the value ``name``, in a few steps."""
        reached, seen = [name], {name}
        for _ in range(8):
            nodes = [node for value in reached for node in self.readers.get(value, [])]
            if any(node.op_type == operator for node in nodes):
                return True
            reached = [value for node in nodes if node.op_type not in ('Conv', 'MatMul')
                       for value in node.output if value not in seen]
            seen.update(reached)
        return False


def _faults(graph: _Graph) -> Iterator[str]:
    """Yield what is wrong, in words."""
    opsets: Mapping[str, int] = {entry.domain: entry.version
                                 for entry in graph.model.opset_import}
    if opsets.get('', 0) != OPSET:
        yield f'opset {opsets.get("", "none")} instead of {OPSET}'
    foreign = sorted({node.domain for node in graph.nodes if node.domain not in ('', 'ai.onnx')})
    if foreign or graph.model.functions:
        yield (f'operators of its own ({", ".join(foreign) or "functions"}), which no engine '
               f'knows')
    if any(tensor.data_location for tensor in graph.model.graph.initializer):
        yield 'its weights are in another file'
    for node in graph.nodes:
        label = f'{node.op_type} {node.name!r}'
        if node.op_type == 'GridSample':
            yield from (f'{label} {fault}' for fault in _sampling_faults(graph, node))
        elif node.op_type.startswith('Scatter'):
            yield f'{label}: TensorRT refuses scatters that add; keep them out of the engine'
        elif node.op_type == 'BatchNormalization' and graph.attribute(node, 'training_mode', 0):
            yield f'{label} in training mode: an instance norm taken to pieces'
        elif _norms_by_hand(graph, node):
            yield (f'{label} with Sqrt: an instance norm taken to pieces; expected '
                   f'InstanceNormalization')
    outputs = {value.name for value in graph.model.graph.output}
    for value in graph.model.graph.input:
        if value.name not in graph.readers and value.name not in outputs:
            yield f'the input {value.name!r} is not used: it was made a constant'


def _sampling_faults(graph: _Graph, node: Any) -> Iterator[str]:
    mode = graph.attribute(node, 'mode', 'bilinear')
    if mode not in ('bilinear', 'linear'):
        yield f'has the mode {mode!r} instead of bilinear'
    if not graph.attribute(node, 'align_corners', 0):
        yield 'does not align corners'
    kind = graph.types.get(node.input[1], 0)
    if kind != _FLOAT:
        seen = {0: 'unknown', _HALF: 'float16'}.get(kind, f'of type {kind}')
        yield f'has coordinates that are {seen} instead of float32'


def _norms_by_hand(graph: _Graph, node: Any) -> bool:
    """Return whether ``node`` is a reduction over the map that a root is taken of."""
    if node.op_type not in _REDUCTIONS:
        return False
    axes = graph.attribute(node, 'axes', None)
    if axes is None and len(node.input) > 1:
        axes = graph.constants.get(node.input[1])
    rank = graph.ranks.get(node.input[0], 4)
    over = {int(axis) % rank for axis in axes} if axes is not None else set(range(rank))
    # All of a map, or of what a map was made a line of; norms over the channels are others'.
    if rank - 1 not in over or (rank == 4 and not over >= set(_SPATIAL_AXES)):
        return False
    return graph.leads_to(node.output[0], 'Sqrt')
