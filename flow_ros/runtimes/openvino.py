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

"""The OpenVINO runtime: each engine function compiled for the CPU, once per input shape."""

from collections import OrderedDict
import ctypes
from dataclasses import dataclass
import logging
from pathlib import Path
import tempfile
import threading
from typing import Any
import warnings
import weakref

import numpy as np
from numpy.typing import NDArray
import openvino
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from openvino.preprocess import PrePostProcessor
import torch
from torch import nn, Tensor

from flow_ros.malloc import trim_malloc
from flow_ros.networks.base import FlowNetwork, FlowOutput, State
from flow_ros.runtimes.base import Control, EngineFault, Lap, run_loop
from flow_ros.runtimes.cache import cache_directory
from flow_ros.runtimes.openvino_convolutions import save_products

_MOST_ENGINES = 32
"""Of a stream that changes its size again and again, the oldest engines are given up."""

_MOST_PIECES = 4
"""Of memory for one output that wait to be used again: a stream holds two or three at a time."""

_MADV_DONTNEED = 4

_LEAST_CHANNELS = 8
"""Of results that are handed on channels last."""

_log = logging.getLogger(__name__)

Signature = tuple[tuple[tuple[int, ...], torch.dtype, bool], ...]
"""Shape, type, and whether a tensor lies in memory pixel by pixel (channels last)."""


class OpenVinoRuntime:
    """Runs engines compiled by OpenVINO on the CPU.

    An engine is compiled when it is first called with a shape (seconds); the compiled model
    goes to the folder ``cache`` (default: ``cache_directory()``). Tensors are handed over
    without a copy where they are contiguous or channels last, as features are that it returns;
    and no call writes into memory of results that anybody still holds, so no act copies what
    the one before it computed. Memory that nobody holds any more is used again. The network's
    parameters take no gradients afterwards. Threads may share a runtime: they take turns at
    each engine.

    ``arithmetic`` is what convolutions and products are computed in: 'f32', or, with precision
    'fast', what OpenVINO finds fastest here ('bf16' where the CPU has it, 'f16' on some ARM,
    else 'f32'). Coordinates stay float32 beside 'bf16'.
    """

    name = 'openvino'

    def __init__(self, network: FlowNetwork, *, threads: int | None = None,
                 precision: str = 'f32', cache: Path | None = None, reason: str = '') -> None:
        self.device = torch.device('cpu')
        self.reason = reason
        self.precision = precision
        # What is traced holds the parameters as constants, which have no gradients.
        self.network = network.eval().to(self.device).requires_grad_(False)
        self._core = openvino.Core()
        self.arithmetic = 'f32' if precision == 'f32' else _fastest(self._core)
        self._config: dict[str, Any] = {'PERFORMANCE_HINT': 'LATENCY',
                                        'INFERENCE_PRECISION_HINT': self.arithmetic,
                                        # A thread pinned to a core that another process loads
                                        # holds up all: 370 ms a frame instead of 119.
                                        'ENABLE_CPU_PINNING': False}
        if threads is not None:
            self._config['INFERENCE_NUM_THREADS'] = threads
        directory = _writable((cache or cache_directory()) / 'openvino')
        if directory is not None:
            self._config['CACHE_DIR'] = str(directory)
        self._engines: OrderedDict[tuple[str, Signature], _Engine] = OrderedDict()
        self._before: _Engine | None = None  # the one that ran last
        self._lock = threading.Lock()  # of the engines above
        self._one_compile = threading.Lock()

    def call(self, engine: str, /, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one engine, compiling it first where this shape is new."""
        key = (engine, tuple((tuple(tensor.shape), tensor.dtype, _lies_by_pixel(tensor))
                             for tensor in tensors))
        compiled = self._known(key)
        if self.network.spares_memory:
            with self._lock:
                before, self._before = self._before, compiled
            if before is not None and before is not compiled:
                before.give_back()
        if compiled is None:
            with self._one_compile:  # others' engines go on meanwhile
                compiled = self._known(key)
                if compiled is None:
                    compiled = self._compile(engine, tensors)
                    trim_malloc()  # what it took to compile, which is several times the engine
                with self._lock:
                    self._engines[key] = self._before = compiled
                    if len(self._engines) > _MOST_ENGINES:
                        self._engines.popitem(last=False)
        return compiled.run(tensors)

    def _known(self, key: tuple[str, Signature]) -> '_Engine | None':
        with self._lock:
            compiled = self._engines.get(key)
            if compiled is not None:
                self._engines.move_to_end(key)
            return compiled

    def loop(self, state: State, lap: Lap | None = None,
             control: Control | None = None) -> tuple[State, FlowOutput]:
        """Do the steps of ``state`` and finish."""
        return run_loop(self.network, state, self.call, lap, control)

    def _compile(self, engine: str, tensors: tuple[Tensor, ...]) -> '_Engine':
        # Not in inference mode, which the caller may be in: the tracer needs plain tensors.
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            # Shapes become constants of the trace, of which there is one per shape.
            warnings.simplefilter('ignore', torch.jit.TracerWarning)
            warnings.simplefilter('ignore', DeprecationWarning)
            # Of these only shapes and types count: one number each, and no memory of a map.
            example = tuple(torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                            for tensor in tensors)
            traced = torch.jit.trace(_EngineModule(self.network, engine), example,
                                     check_trace=False)
            # Not openvino.convert_model: it sends usage statistics over the network, and takes
            # four times as long.
            frontend = FrontEndManager().load_by_framework('pytorch')
            decoder = TorchScriptPythonDecoder(traced, example_input=example)
            model = frontend.convert(frontend.load(decoder))
        model.reshape({port: list(tensor.shape)
                       for port, tensor in zip(model.inputs, tensors)})
        if any(_source(port) == 'Parameter' for port in model.outputs):
            # OpenVINO lets such an output overwrite the input.
            raise RuntimeError(f'{self.network.name} {engine!r} returns one of its inputs: leave '
                               f'it out, the caller has it')
        count = len(model.outputs)
        by_pixel = [_is_features(port) for port in model.outputs]
        model = _laid_out(model, [_lies_by_pixel(tensor) for tensor in tensors], by_pixel)
        if self.arithmetic == 'f32':
            save_products(model)
        else:
            _keep_coordinates(model)
        _name_in_order(model)
        return _Engine(self._core.compile_model(model, 'CPU', self._config), count, by_pixel)


class _EngineModule(nn.Module):
    """One engine function as the module that the converter wants."""

    def __init__(self, network: FlowNetwork, engine: str) -> None:
        super().__init__()
        # Not the network, which would become a part: the tracer copies all parts of a module,
        # those of the other engines too, a third of a second for each engine of HD3.
        self._run = network.engine
        self._name = engine

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the engine function."""
        return self._run(self._name, *tensors)


class _Engine:
    """A compiled engine, its one request, and its first ``count`` outputs."""

    def __init__(self, compiled: Any, count: int, by_pixel: list[bool]) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()  # what is bound is the request's
        self._settled = False
        self._by_pixel = by_pixel  # the outputs that are channels last
        self._outputs = [_Memory(tuple(port.shape), _torch_type(port.element_type.to_dtype()))
                         for port in compiled.outputs[:count]]

    def run(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = [_as_it_lies(tensor.detach()) for tensor in tensors]  # alive until infer ends
        with self._lock:
            self._request = self._request or self._compiled.create_infer_request()
            for index, tensor in enumerate(inputs):
                self._request.set_input_tensor(index, _shared(tensor))
            outputs = []
            for index, memory in enumerate(self._outputs):
                tensor, port = memory.take()
                self._request.set_output_tensor(index, port)
                outputs.append(tensor)
            try:
                # Shared, or Python copies each output once more for the result of this call.
                self._request.infer(share_outputs=True)
            except RuntimeError as error:
                raise EngineFault(f'OpenVINO failed: {str(error).strip()}') from error
        return tuple(tensor.permute(0, 3, 1, 2) if by_pixel else tensor
                     for tensor, by_pixel in zip(outputs, self._by_pixel))

    def give_back(self) -> None:
        """Hold nothing until the next run but what was compiled, and memory of results."""
        with self._lock:
            self._request = None  # which holds its inputs
            self._compiled.release_memory()
            if not self._settled:
                # All was read once; most of it was for OpenVINO to make its own weights from.
                _let_go_of_files('.blob')
                self._settled = True


@dataclass
class _Piece:
    """Memory for one result: as an array, as OpenVINO sees it, and who holds it."""

    array: NDArray[Any]
    port: Any
    holder: 'weakref.ref[NDArray[Any]]'


class _Memory:
    """The memory of one output of an engine; whoever calls holds the engine's lock.

    New memory for each result would be megabytes a frame that the system hands out page by page,
    each filled with zeros first. Each result holds an array of its own on its piece; torch gives
    that up with the last tensor, view or array of the result. A piece whose array is gone is
    free.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape = shape
        self._dtype = dtype
        self._pieces: list[_Piece] = []

    def take(self) -> tuple[Tensor, Any]:
        """Return a tensor on memory that nobody else holds, and the same for OpenVINO."""
        piece = next((piece for piece in self._pieces if piece.holder() is None), None)
        if piece is None:
            # Torch's memory, for its alignment.
            array = torch.empty(self._shape, dtype=self._dtype).numpy()
            piece = _Piece(array, openvino.Tensor(array, shared_memory=True),
                           weakref.ref(array))
            self._pieces.append(piece)
            # Of what a caller keeps for long, the memory becomes the caller's.
            del self._pieces[:-_MOST_PIECES]
        held = piece.array.view()
        piece.holder = weakref.ref(held)
        return torch.from_numpy(held), piece.port


def _writable(directory: Path) -> Path | None:
    """Return ``directory``, made if needed, or None with a warning."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError as error:
        _log.warning('compiled engines are not kept: cannot write to %s (%s); set '
                     'FLOW_ROS_CACHE to a folder that can be written', directory, error)
        return None


def _let_go_of_files(ending: str) -> None:
    """Hold no pages of files that are mapped for reading; what is read again comes again.

    The system counts them as memory of this process until somebody else needs memory. Elsewhere
    than on Linux nothing is done.
    """
    try:
        lines = Path('/proc/self/maps').read_text(errors='replace').splitlines()
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1].startswith('r--') and fields[5].endswith(ending):
            first, last = (int(end, 16) for end in fields[0].split('-'))
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


def _fastest(core: Any) -> str:
    """Return what OpenVINO computes in where it may choose: 'bf16', 'f16' or 'f32'."""
    chosen = str(core.get_property('CPU', 'INFERENCE_PRECISION_HINT').to_string())
    return chosen if chosen in ('bf16', 'f16') else 'f32'


def _keep_coordinates(model: Any) -> None:
    """Keep what says where ``model`` samples, and with what shares, in float32.

    OpenVINO computes nothing in bf16 between the last convolution or product and an output, so
    every such value is made one; nobody reads it. In bf16, with 8 bits, a grid is wrong by up to
    a px at a width of 80: that was eight tenths of DIP-RT's errors in the fast precision, and of
    HD3's median error, whose sampled costs round coordinates down and interpolate by the rest.
    """
    found = {}
    for node in model.get_ops():
        if node.get_type_name() == 'GridSample':
            sources = [node.input(1).get_source_output()]
        elif node.get_type_name() == 'EmbeddingBagOffsets':
            sources = [node.input(4).get_source_output()]  # the shares of the cells
        elif node.get_type_name() == 'Floor':
            whole = node.input(0).get_source_output()
            readers = [port.get_node() for port in whole.get_target_inputs()]
            sources = [whole, *(reader.output(0) for reader in readers
                                if reader.get_type_name() == 'Subtract')]
        else:
            continue
        for source in sources:
            if source.get_node().get_type_name() not in ('Constant', 'Parameter'):
                found[source.get_node().get_friendly_name(), source.get_index()] = source
    if found:
        model.add_outputs(list(found.values()))


def _name_in_order(model: Any) -> None:
    """Name each operation by its type and place, and its results not at all.

    The cache knows a model by its names too, and some of them are counted through the whole
    process, or through a trace: what was done before decided whether a model was found.
    """
    for index, node in enumerate(model.get_ordered_ops()):
        node.set_friendly_name(f'{node.get_type_name()}_{index}')
        for port in node.outputs():
            port.get_tensor().set_names(set())


def _is_features(port: Any) -> bool:
    """Return True for what is handed on channels last, as OpenVINO's convolutions leave it."""
    shape = port.get_partial_shape()
    return (len(shape) == 4 and shape.is_static
            and shape[1].get_length() >= _LEAST_CHANNELS)


def _lies_by_pixel(tensor: Tensor) -> bool:
    return (tensor.ndim == 4 and not tensor.is_contiguous()
            and tensor.is_contiguous(memory_format=torch.channels_last))


def _as_it_lies(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with its dimensions in the order of its memory, contiguous."""
    if _lies_by_pixel(tensor):
        return tensor.permute(0, 2, 3, 1)
    return tensor.contiguous()


def _laid_out(model: Any, inputs: list[bool], outputs: list[bool]) -> Any:
    """Return ``model`` with those inputs and outputs (B, H, W, C) in memory that are True."""
    builder = PrePostProcessor(model)
    for index, by_pixel in enumerate(inputs):
        if by_pixel:
            builder.input(index).tensor().set_layout(openvino.Layout('NHWC'))
            builder.input(index).model().set_layout(openvino.Layout('NCHW'))
    for index, by_pixel in enumerate(outputs):
        if by_pixel:
            builder.output(index).model().set_layout(openvino.Layout('NCHW'))
            builder.output(index).tensor().set_layout(openvino.Layout('NHWC'))
    return builder.build() if any(inputs) or any(outputs) else model


def _source(output: Any) -> str:
    """Return the type of the node that computes a model's output."""
    return output.get_node().input(0).get_source_output().get_node().get_type_name()


def _shared(tensor: Tensor) -> Any:
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


def _torch_type(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype
