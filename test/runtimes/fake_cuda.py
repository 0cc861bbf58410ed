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

"""CUDA graphs on the CPU, for tests: what is captured is computed only when it is replayed.

As CUDA does, a capture bakes in addresses and all that Python decides, leaves garbage in what
it returns, and refuses to hand a value to Python, or Python's values to a tensor.
"""

from collections.abc import Callable
from contextlib import contextmanager
import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
         torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default,
         torch.ops.aten.equal.default,
         torch.ops.aten.lift_fresh.default}  # torch.tensor and new_tensor: copied from the host


class Tape(TorchDispatchMode):
    """Records operations and can do them again, in the same memory."""

    def __init__(self):
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.kept: list[object] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        mask = function is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype is torch.bool for index in args[1])
        if function in WAITS or mask:  # how many a mask has is for Python to know
            raise RuntimeError('operation not permitted when stream is capturing')
        results = function(*args, **(kwargs or {}))
        tensors = _flat(results)
        memory = {tensor.untyped_storage().data_ptr() for tensor in _flat([args, kwargs])}
        new = [index for index, tensor in enumerate(tensors)
               if tensor.untyped_storage().data_ptr() not in memory]
        self.kept += [tensors, args, kwargs]

        def again():
            for index, result in enumerate(_flat(function(*args, **(kwargs or {})))):
                if index in new and result.numel():
                    tensors[index].copy_(result)

        self.steps.append(again)
        for index in new:
            _spoil(tensors[index])
        return results


class FakeGraphDevice:
    """The ``GraphDevice`` of a machine without CUDA."""

    def __init__(self):
        self.captures = 0
        self.replays = 0
        self.fails = ''
        self._recording = threading.local()

    @property
    def tape(self):
        """The tape that records now, in this thread, or None."""
        return getattr(self._recording, 'tape', None)

    def buffers(self, tensors):
        return [tensor.clone() for tensor in tensors]

    def capture(self, rehearse, work):
        rehearse()
        if self.fails:
            raise RuntimeError(self.fails)
        self.captures += 1
        tape = self._recording.tape = Tape()
        try:
            with tape:
                outputs = work()
        finally:
            self._recording.tape = None
        return tape, outputs

    def replay(self, graph, buffers, inputs, outputs):
        if self.fails:
            raise RuntimeError(self.fails)
        self.replays += 1
        for buffer, tensor in zip(buffers, inputs):
            buffer.copy_(tensor)
        for step in graph.steps:
            step()
        return [tensor.clone() for tensor in outputs]


class FakeStreams:
    """Streams with made-up handles: 7, or what the thread has set."""

    def __init__(self):
        self.here = threading.local()
        self.stepping = None

    @contextmanager
    def turn(self):
        yield getattr(self.here, 'handle', 7)

    @contextmanager
    def in_step(self, stream):
        self.stepping = stream
        try:
            yield
        finally:
            self.stepping = None


def _flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return _flat(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _flat(item)]
    return []


def _spoil(tensor):
    with torch.utils._python_dispatch._disable_current_modes():
        tensor.fill_(float('nan') if tensor.is_floating_point() else 0)
