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

"""TensorRT's runtime on the CPU, for tests: the same interface, computed by torch.

As the real one does, it knows nothing but addresses: it reads its inputs and writes its outputs
where it was told, in the types and shapes of the plan, and refuses what TensorRT refuses. Its
tensors are not in the act's order. Within a captured graph (``fake_cuda``) it runs on replay.
"""

import ctypes
from dataclasses import dataclass, field
import enum
import threading

import torch

from flow_ros.runtimes.tensorrt import make_library


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1


class Allocation(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


TYPES = {torch.float32: DataType.FLOAT, torch.float16: DataType.HALF}


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4


class IProgressMonitor:
    pass


@dataclass
class FakeApi:
    """What stands in for the module ``tensorrt``: of 10.3, or with an attribute less."""

    engines: dict[bytes, 'FakeEngine']
    graph_device: object = None
    memory: int = 4096
    fails: str = ''
    log: list[str] = field(default_factory=list)
    __version__: str = '10.3.0'

    ILogger = ILogger
    IProgressMonitor = IProgressMonitor
    TensorIOMode = TensorIOMode
    DataType = DataType
    ExecutionContextAllocationStrategy = Allocation

    def Runtime(self, logger):
        return FakeRuntime(self, logger)

    def library(self, package='tensorrt'):
        return make_library(self, package)


class FakeRuntime:
    def __init__(self, api, logger):
        self._api = api
        self._logger = logger

    def deserialize_cuda_engine(self, plan):
        engine = self._api.engines.get(plan)
        if engine is None:
            severity = ILogger.Severity
            self._logger.log(severity.VERBOSE, 'reading')
            self._logger.log(severity.ERROR, self._api.fails or (
                'IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization '
                'assertion stdVersionRead == kSERIALIZATION_VERSION failed. Version tag does not '
                'match.)'))
            return None
        engine.api, engine.logger = self._api, self._logger
        return engine


class FakeEngine:
    """An act of a network as an engine; ``free`` makes its frame sizes free up to a factor."""

    def __init__(self, network, act, *, free=False, largest=4):
        self.network = network
        self.act = act
        self.free = free
        self.largest = largest
        self.contexts = 0
        # TensorRT's order is its own: outputs first, and backwards.
        self.specs = {spec.name: spec for spec in [*act.outputs, *act.inputs][::-1]}
        self._inputs = {spec.name for spec in act.inputs}

    @property
    def num_io_tensors(self):
        return len(self.specs)

    def get_tensor_name(self, index):
        return list(self.specs)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return TYPES[self.specs[name].dtype]

    def get_tensor_shape(self, name):
        spec = self.specs[name]
        return (*spec.shape[:2], -1, -1) if self.free else spec.shape

    def get_tensor_profile_shape(self, name, profile):
        assert profile == 0
        if not self.free or name not in self._inputs:
            raise AssertionError('only inputs with free dimensions have a profile')
        batch, channels, height, width = self.specs[name].shape
        return [(batch, channels, 1, 1), (batch, channels, height, width),
                (batch, channels, self.largest * height, self.largest * width)]

    @property
    def device_memory_size_v2(self):
        return self.api.memory

    def create_execution_context(self, strategy=Allocation.STATIC):
        self.contexts += 1
        return FakeContext(self, strategy)


class FakeContext:
    def __init__(self, engine, strategy):
        self._engine = engine
        self._managed = strategy is Allocation.USER_MANAGED
        self._memory = None
        self._addresses = {}
        self._shapes = {}
        self._busy = threading.Lock()
        self._captured = False
        self.streams = set()

    def set_device_memory(self, memory, size):
        self._change()
        assert self._managed
        assert size >= self._engine.device_memory_size_v2
        self._memory = memory

    def set_input_shape(self, name, shape):
        self._change()
        assert isinstance(shape, tuple)
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        if not all(a <= size <= b for a, size, b in zip(low, shape, high)):
            return False
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name):
        engine = self._engine
        if not engine.free:
            return engine.get_tensor_shape(name)
        if name in self._shapes:
            return self._shapes[name]
        if set(self._shapes) != {spec.name for spec in engine.act.inputs}:
            return (*engine.specs[name].shape[:2], -1, -1)
        # Sizes of outputs follow those of the first input, as they do in the act.
        first = engine.act.inputs[0]
        scale = [new / old for new, old in zip(self._shapes[first.name][2:], first.shape[2:])]
        shape = engine.specs[name].shape
        return (*shape[:2], *(round(size * factor) for size, factor in zip(shape[2:], scale)))

    def set_tensor_address(self, name, memory):
        self._change()
        if name not in self._engine.specs or not memory:
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        engine, api = self._engine, self._engine.api
        self.streams.add(stream_handle)
        assert stream_handle, 'the default stream: TensorRT would wait for it'
        assert self._busy.acquire(blocking=False), 'two threads in one context'
        try:
            if api.fails:
                engine.logger.log(ILogger.Severity.ERROR, api.fails)
                return False
            if set(self._addresses) != set(engine.specs) or (
                    self._managed and api.memory and self._memory is None):
                engine.logger.log(ILogger.Severity.ERROR, 'something is not bound')
                return False
            # By value: what is bound later is for the next run.
            bound = {name: (memory, tuple(self.get_tensor_shape(name)), engine.specs[name].dtype)
                     for name, memory in self._addresses.items()}
            tape = api.graph_device.tape if api.graph_device is not None else None
            if tape is None:
                self._compute(bound)
            else:
                self._captured = True
                tape.steps.append(lambda: self._compute(bound))
            return True
        finally:
            self._busy.release()

    def _change(self):
        assert not self._captured, 'a context that a graph was captured from was changed'

    def _compute(self, bound):
        act = self._engine.act
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            inputs = [_read(*bound[spec.name]) for spec in act.inputs]
            outputs = self._engine.network.engine(act.engine, *inputs)
            for spec, tensor in zip(act.outputs, outputs):
                memory, shape, dtype = bound[spec.name]
                assert tuple(tensor.shape) == shape, f'{spec.name}: {tensor.shape}, not {shape}'
                tensor = tensor.to(dtype).contiguous()
                ctypes.memmove(memory, tensor.data_ptr(), tensor.nbytes)


def _read(memory, shape, dtype):
    tensor = torch.empty(shape, dtype=dtype)
    ctypes.memmove(tensor.data_ptr(), memory, tensor.nbytes)
    return tensor
