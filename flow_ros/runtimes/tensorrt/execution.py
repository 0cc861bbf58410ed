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

"""Plans run on a GPU: their tensors, contexts, memory and streams.

What may synchronise the device holds ``cuda_graphs.ONE_CAPTURE``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
import logging
import threading
from typing import Any, Protocol

import torch
from torch import Tensor

from flow_ros.networks.base import FlowNetwork, FlowOutput, State
from flow_ros.runtimes.acts import Act
from flow_ros.runtimes.base import (
    check_precision,
    Control,
    EngineFault,
    Lap,
    run_loop,
    RuntimeUnavailable,
)
from flow_ros.runtimes.cuda_graphs import (
    CudaGraphDevice,
    GraphDevice,
    GraphedLoop,
    ONE_CAPTURE,
)
from flow_ros.runtimes.tensorrt import finding
from flow_ros.runtimes.tensorrt.finding import Installation, Library, make, quoted

Shape = tuple[int, ...]

_log = logging.getLogger(__name__)


class PlanError(RuntimeError):
    """A plan cannot be used: truncated, or of another version or GPU; build it again."""


class UnknownShape(RuntimeError):  # noqa: N818 -- what is wrong, as it reads
    """There is no plan for tensors of these shapes."""


class Streams(Protocol):
    """Where engines run."""

    def turn(self) -> AbstractContextManager[int]:
        """Give the handle of the CUDA stream for what the caller's current one is to run."""
        ...

    def in_step(self, stream: int) -> AbstractContextManager[None]:
        """Let ``stream`` wait for the caller's current one, and that, at the end, for it.

        What an engine reads and writes must be made before and kept until after.
        """
        ...


class CudaStreams:
    """The caller's current stream; for the default stream, on which TensorRT waits, another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = torch.cuda.Stream(device)

    @contextmanager
    def turn(self) -> Iterator[int]:
        """Give the handle of the stream to use."""
        with torch.cuda.device(self._device):
            yield torch.cuda.current_stream().cuda_stream or self._own.cuda_stream

    @contextmanager
    def in_step(self, stream: int) -> Iterator[None]:
        """Let both streams, where they are two, wait for each other.

        So all memory is used in the order of the caller's stream, of which it is, and the
        allocator needs to know of no other.
        """
        current = torch.cuda.current_stream(self._device)
        if current.cuda_stream == stream:
            yield
            return
        self._own.wait_stream(current)
        try:
            yield
        finally:
            current.wait_stream(self._own)


class TensorRtRuntime:
    """Runs plans of a network's engines on a GPU; the network's own weights are not used.

    ``plans`` are by the names of their ``acts``, as ``build_plan`` made them: one for each
    shape, or dynamic ones. Tensors stay on the GPU, results are new ones. The engines are
    shared by all threads and streams; each stream has execution contexts of its own. The steps
    and finish of a pair are one CUDA graph from their second time on, unless ``graphs`` is
    False.

    Raises PlanError where a plan cannot be used here and RuntimeUnavailable without TensorRT or
    a GPU. ``library``, ``streams`` and ``graph_device`` are for tests, which have no GPU.
    """

    name = 'tensorrt'

    def __init__(self, network: FlowNetwork, *, plans: Mapping[str, bytes], acts: Sequence[Act],
                 device: torch.device, precision: str = 'f32', reason: str = '',
                 graphs: bool = True, library: 'Library | None' = None,
                 streams: Streams | None = None,
                 graph_device: GraphDevice | None = None) -> None:
        check_precision(precision)
        if library is None:
            library, why = finding.search()
            if library is None:
                raise RuntimeUnavailable(why)
        if device.type != 'cuda' and streams is None:
            raise RuntimeUnavailable(f"runtime 'tensorrt' needs an NVIDIA GPU; seen device "
                                     f"'{device}'")
        missing = [act.name for act in acts if act.name not in plans]
        if missing:
            raise ValueError(f'there are no plans for {", ".join(missing)}; seen plans for '
                             f'{", ".join(plans) or "nothing"}')
        self.network = network.eval()
        self.device = device
        self.precision = precision
        self.reason = reason
        self.installation = library.installation
        self.versions = _versions(library.installation, device)
        self._library = library
        self._streams = streams or CudaStreams(device)
        self._lock = threading.Lock()
        self._lanes: dict[int, _Lane] = {}
        with self._streams.turn():
            self._runtime = make(library.api.Runtime, library.logger)
            self._plans: dict[str, list[_Plan]] = {}
            for act in acts:
                self._plans.setdefault(act.engine, []).append(self._load(act, plans[act.name]))
        self._graphed = None
        if graphs and (graph_device is not None or device.type == 'cuda'):
            self._graphed = GraphedLoop(network, self.call, graph_calls=self._graph_calls,
                                        device=graph_device or CudaGraphDevice(device))

    @property
    def graphed(self) -> bool:
        """True where a loop's runs after the first of their kind are a CUDA graph."""
        return self._graphed is not None and not self._graphed.failure

    def call(self, engine: str, /, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one engine on the current CUDA stream; it may still run on return.

        Raises UnknownShape where no plan fits and EngineFault where TensorRT fails.
        """
        plan = self._plan(engine, tensors)
        with self._streams.turn() as stream:
            lane = self._lane(stream)
            with lane.lock:
                return self._run(plan, lane.context, tensors, stream)

    def loop(self, state: State, lap: Lap | None = None,
             control: Control | None = None) -> tuple[State, FlowOutput]:
        """Do the steps of ``state`` and finish; a CUDA graph asks no ``control``."""
        if self._graphed is not None:
            return self._graphed(state, lap)
        return run_loop(self.network, state, self.call, lap, control)

    def _load(self, act: Act, plan: bytes) -> '_Plan':
        with ONE_CAPTURE, self._library.messages.collected() as messages:
            try:
                engine = (None if self._runtime is None
                          else self._runtime.deserialize_cuda_engine(plan))
            except (RuntimeError, TypeError) as error:
                messages.append(str(error))
                engine = None
            why = ('' if engine is not None
                   else _diagnosis(self._library.api, self._runtime, plan, messages))
        if engine is None:
            raise PlanError(f'{act.name}: this plan of {len(plan)} bytes cannot be used '
                            f'({why}); with {self.versions}:{quoted(messages)}\nBuild it again '
                            f'on this machine (flow_ros build)')
        return _Plan(self._library.api, act, engine, versions=self.versions)

    def _plan(self, engine: str, tensors: Sequence[Tensor]) -> '_Plan':
        plans = self._plans.get(engine)
        if plans is None:
            known = tuple(self._plans)
            raise ValueError(f'{self.network.name} has no engine {engine!r}; it has {known}')
        for plan in plans:
            if plan.takes(tensors):
                return plan
        seen = ', '.join('x'.join(map(str, tensor.shape)) for tensor in tensors)
        raise UnknownShape(f'{self.network.name} {engine!r}: no plan takes tensors of the shapes '
                           f'{seen}; there are plans for '
                           f'{"; ".join(plan.shapes_text for plan in plans)}. Build engines for '
                           f'this frame size (flow_ros build), or a dynamic one')

    def _lane(self, stream: int) -> '_Lane':
        with self._lock:
            lane = self._lanes.get(stream)
            if lane is None:
                lane = self._lanes[stream] = _Lane(self._library.api, self.device)
            return lane

    def _graph_calls(self) -> '_GraphCalls':
        return _GraphCalls(self)

    def _run(self, plan: '_Plan', context_of: Callable[['_Plan'], '_Context'],
             tensors: Sequence[Tensor], stream: int) -> tuple[Tensor, ...]:
        """Bind ``tensors`` and new outputs to a context, and run it."""
        with self._library.messages.collected() as messages:
            try:
                context = context_of(plan)
                inputs = [_bindable(tensor, binding, self.device)
                          for tensor, binding in zip(tensors, plan.inputs)]
                outputs = context.bind(inputs)
                with self._streams.in_step(stream):
                    context.execute(stream)
                return outputs
            except (_Refused, RuntimeError, TypeError, AttributeError) as error:
                # The last two: bindings of a version that nobody here has seen.
                raise EngineFault(f'{self.network.name} {plan.act.name}: the engine failed '
                                  f'({error}); with {self.versions}:{quoted(messages)}'
                                  ) from error


class _Refused(Exception):  # noqa: N818
    """TensorRT said no to a call."""


@dataclass(frozen=True)
class _Binding:
    """An input or output of an engine; -1 in ``shape`` is free within the bounds."""

    name: str
    dtype: torch.dtype
    shape: Shape
    smallest: Shape
    largest: Shape

    @property
    def free(self) -> bool:
        return any(size < 0 for size in self.shape)

    def takes(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.shape) and all(
            low <= size <= high for low, size, high in zip(self.smallest, shape, self.largest))

    @property
    def text(self) -> str:
        return 'x'.join(str(low) if low == high else f'{low}..{high}'
                        for low, high in zip(self.smallest, self.largest))


class _Plan:
    """An engine that was read back, with its tensors in the order of the act's."""

    def __init__(self, api: Any, act: Act, engine: Any, *, versions: str) -> None:
        self.act = act
        self.engine = engine
        self._api = api
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        of = {mode: [name for name in names if engine.get_tensor_mode(name) == mode]
              for mode in (api.TensorIOMode.INPUT, api.TensorIOMode.OUTPUT)}
        self.inputs = self._bindings([spec.name for spec in act.inputs],
                                     of[api.TensorIOMode.INPUT], 'inputs', versions)
        self.outputs = self._bindings([spec.name for spec in act.outputs],
                                      of[api.TensorIOMode.OUTPUT], 'outputs', versions)
        self._config = self._runtime_config()

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self.inputs) and all(
            binding.takes(tensor.shape) for binding, tensor in zip(self.inputs, tensors))

    @property
    def shapes_text(self) -> str:
        return ', '.join(binding.text for binding in self.inputs)

    @property
    def scratch_bytes(self) -> int:
        """How much memory a context needs while it runs."""
        for name in ('device_memory_size_v2', 'device_memory_size'):
            if hasattr(self.engine, name):
                return int(getattr(self.engine, name))
        return 0

    def new_context(self) -> tuple[Any, bool]:
        """Return a new execution context, and whether it must be given its memory."""
        strategy = getattr(self._api, 'ExecutionContextAllocationStrategy', None)
        managed = strategy is not None and hasattr(strategy, 'USER_MANAGED')
        with ONE_CAPTURE:
            if self._config is not None:
                context = self.engine.create_execution_context(self._config)
            elif managed:
                assert strategy is not None
                context = self.engine.create_execution_context(strategy.USER_MANAGED)
            else:
                context = self.engine.create_execution_context()
        if context is None:
            raise _Refused('no execution context could be made: is the GPU out of memory?')
        return context, managed

    def _bindings(self, wanted: Sequence[str], seen: Sequence[str], what: str,
                  versions: str) -> tuple[_Binding, ...]:
        if set(wanted) != set(seen):
            raise PlanError(f'{self.act.name}: this plan has the {what} {", ".join(seen)}, '
                            f'expected {", ".join(wanted)}; with {versions}: build it again')
        return tuple(self._binding(name, what == 'inputs') for name in wanted)

    def _binding(self, name: str, is_input: bool) -> _Binding:
        engine = self.engine
        shape = tuple(engine.get_tensor_shape(name))
        smallest = largest = shape
        if is_input and any(size < 0 for size in shape):
            bounds = engine.get_tensor_profile_shape(name, 0)
            smallest, largest = tuple(bounds[0]), tuple(bounds[2])
        return _Binding(name=name, dtype=_torch_type(self._api, engine.get_tensor_dtype(name)),
                        shape=shape, smallest=smallest, largest=largest)

    def _runtime_config(self) -> Any:
        """Return how TensorRT-RTX compiles kernels when a context first runs; else None.

        The contexts of an engine share what was compiled, and the first run waits for the
        kernels of its shapes: what runs first is what a CUDA graph captures.
        """
        if not hasattr(self.engine, 'create_runtime_config'):
            return None
        config = self.engine.create_runtime_config()
        if config is None or not hasattr(config, 'create_runtime_cache'):
            return None
        config.set_execution_context_allocation_strategy(
            self._api.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._kernels = config.create_runtime_cache()  # as long as the engine
        config.set_runtime_cache(self._kernels)
        strategies: Any = getattr(self._api, 'DynamicShapesKernelSpecializationStrategy', None)
        if hasattr(strategies, 'EAGER'):
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return config


class _Scratch:
    """Memory that the contexts of one stream share: there they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Tensor | None = None

    def at_least(self, size: int) -> Tensor:
        """Return the memory, which is grown if it is too small."""
        if self._memory is None or self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._memory


class _Context:
    """An execution context of a plan, used by one thread at a time and on one stream."""

    def __init__(self, plan: _Plan, device: torch.device) -> None:
        # Before the plan, so that it goes before: of its engine and configuration it only
        # knows the addresses.
        self._context, self._needs_memory = plan.new_context()
        self._plan = plan
        self._device = device
        self._memory: Tensor | None = None
        self._shapes: tuple[Shape, ...] = ()
        self._ran = False

    def give(self, scratch: _Scratch) -> None:
        """Let it run in this memory."""
        size = self._plan.scratch_bytes
        if not self._needs_memory or not size:
            return
        memory = scratch.at_least(size)
        if self._memory is memory:
            return
        if hasattr(self._context, 'set_device_memory'):
            self._context.set_device_memory(memory.data_ptr(), memory.numel())
        else:
            self._context.device_memory = memory.data_ptr()
        self._memory = memory

    def bind(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs, in new memory, that ``execute`` will fill from ``inputs``.

        The caller keeps both.
        """
        context, plan = self._context, self._plan
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        if shapes != self._shapes:
            self._shapes = ()  # until all are taken
            for binding, shape in zip(plan.inputs, shapes):
                if binding.free and not context.set_input_shape(binding.name, shape):
                    raise _Refused(f'shape {shape} of {binding.name} refused')
            self._shapes = shapes
        outputs = []
        for binding in plan.outputs:
            shape = (tuple(context.get_tensor_shape(binding.name)) if binding.free
                     else binding.shape)
            if any(size < 0 for size in shape):
                raise _Refused(f'the shape of {binding.name} is not known, but {shape}')
            outputs.append(torch.empty(shape, dtype=binding.dtype, device=self._device))
        for binding, tensor in [*zip(plan.inputs, inputs), *zip(plan.outputs, outputs)]:
            if not context.set_tensor_address(binding.name, tensor.data_ptr()):
                raise _Refused(f'address of {binding.name} refused')
        return tuple(outputs)

    def execute(self, stream: int) -> None:
        """Run on what is bound."""
        # The first time it loads kernels, or compiles them.
        with nullcontext() if self._ran else ONE_CAPTURE:
            if not self._context.execute_async_v3(stream):
                raise _Refused('execute_async_v3 returned False')
        self._ran = True


class _Lane:
    """The contexts of one stream, one for each plan."""

    def __init__(self, api: Any, device: torch.device) -> None:
        self.lock = threading.Lock()
        self._device = device
        self._scratch = _Scratch(device)
        self._contexts: dict[int, _Context] = {}

    def context(self, plan: _Plan) -> _Context:
        context = self._contexts.get(id(plan))
        if context is None:
            context = self._contexts[id(plan)] = _Context(plan, self._device)
        context.give(self._scratch)
        return context


class _GraphCalls:
    """The calls of one CUDA graph, each with a context of its own.

    A graph holds what a context had bound and set up when it was captured, so no other call
    may change it.
    """

    def __init__(self, runtime: TensorRtRuntime) -> None:
        self._runtime = runtime
        self._scratch = _Scratch(runtime.device)
        self._contexts: list[tuple[_Plan, _Context]] = []
        self._next = 0

    def rewind(self) -> None:
        """Begin again with the first call."""
        self._next = 0

    def __call__(self, engine: str, /, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one engine."""
        runtime = self._runtime
        plan = runtime._plan(engine, tensors)
        with runtime._streams.turn() as stream:
            return runtime._run(plan, self._context, tensors, stream)

    def _context(self, plan: _Plan) -> _Context:
        if self._next == len(self._contexts):
            self._contexts.append((plan, _Context(plan, self._runtime.device)))
        expected, context = self._contexts[self._next]
        if expected is not plan:
            raise RuntimeError(f'call {self._next} of this graph was {expected.act.name} and is '
                               f'now {plan.act.name}')
        self._next += 1
        context.give(self._scratch)
        return context


def _bindable(tensor: Tensor, binding: _Binding, device: torch.device) -> Tensor:
    """Return ``tensor`` as the engine reads it: its type, contiguous, aligned to 256 bytes."""
    if tensor.device.type != device.type or (
            None not in (device.index, tensor.device.index)
            and tensor.device.index != device.index):
        raise ValueError(f'{binding.name} must be on {device}; seen on {tensor.device}')
    tensor = tensor.detach().to(binding.dtype).contiguous()
    # Parts of a batch may begin anywhere; memory of one's own is aligned on CUDA.
    return tensor.clone() if tensor.data_ptr() % 256 else tensor


def _torch_type(api: Any, dtype: Any) -> torch.dtype:
    names = {'FLOAT': torch.float32, 'HALF': torch.float16, 'BF16': torch.bfloat16,
             'INT32': torch.int32, 'INT64': torch.int64, 'INT8': torch.int8,
             'UINT8': torch.uint8, 'BOOL': torch.bool}
    for name, torch_type in names.items():
        if dtype == getattr(api.DataType, name, None):
            return torch_type
    raise PlanError(f'this plan has a tensor of type {dtype}, which torch does not have')


def _versions(installation: Installation, device: torch.device) -> str:
    """Return the versions and the GPU for messages."""
    gpu = f"device '{device}'"
    if device.type == 'cuda':
        major, minor = torch.cuda.get_device_capability(device)
        gpu = (f'{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}), '
               f'CUDA {torch.version.cuda}')
    return f'{installation.text}, {gpu}, torch {torch.__version__}'


def _diagnosis(api: Any, runtime: Any, plan: bytes, messages: Sequence[str]) -> str:
    """Return in a few words why a plan could not be read."""
    text = ' '.join(messages).lower()
    for words, meaning in _PLAN_FAULTS:
        if any(word in text for word in words):
            return meaning
    if hasattr(runtime, 'get_engine_validity'):  # TensorRT-RTX
        try:
            found = int(runtime.get_engine_validity(plan)[1])
        except (RuntimeError, TypeError, ValueError) as error:
            _log.debug('no diagnosis of the plan: %s', error)
        else:
            names = [name.lower().replace('_', ' ') for name, bit
                     in api.EngineInvalidityDiagnostics.__members__.items() if int(bit) & found]
            if names:
                return ', '.join(names)
    return 'TensorRT gives no known reason'


_PLAN_FAULTS = (
    (('minbuffersize', 'blobsize', 'offset >= cursor', 'empty memory buffer', 'truncat',
      'archive', 'checksum'), 'it is truncated or damaged'),
    (('magic', 'version tag', 'serialization_version', 'serialization version'),
     'it was built by another version, or is no plan'),
    (('incompatible device', 'target gpu', 'different gpu', 'generated on a'),
     'it was built for another GPU'),
    (('driver version', 'no cuda-capable device'), 'there is no GPU, or its driver is too old'),
    (('out of memory', 'outofmemory'), 'the GPU is out of memory'),
)
"""What TensorRT says, in small letters, and what it means; the first that fits."""
