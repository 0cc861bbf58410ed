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

"""The steps and finish of a pair as one CUDA graph.

At small sizes a GPU waits for Python: an iteration is dozens of launches. A graph is one. It
holds for one schedule and one set of shapes and types, so a ``GraphedLoop`` keeps a few: a
stream needs one for its cold start and one for its warm ones.

What a graph bakes in, and how each is dealt with:

- the addresses it reads and writes: the state is copied into memory of the graph's own and its
  results out of it (a few small copies), the weights' addresses are watched;
- what Python decided on the way: the schedule and all else that is no tensor is in the key;
- what an engine keeps for itself between calls: each call in a graph has an execution context
  of its own (``GraphCalls``), which nothing else uses.

CUDA is behind ``GraphDevice``, so that the logic can be tested without a GPU. It was not run on
a GPU where it was written: see ``bench/GPU.md``.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
import logging
import threading
from typing import Any, Protocol

import torch
from torch import Tensor

from flow_ros.networks.base import Call, FlowNetwork, FlowOutput, State
from flow_ros.runtimes.base import EngineFault, Lap, run_loop

_MOST_GRAPHS = 8
"""Each holds GPU memory for its inputs and results: cold and warm at a fixed budget, or those
between which a budget of time goes up and down."""
_MOST_SEEN = 32

ONE_CAPTURE = threading.RLock()
"""Held during a capture, and by what may synchronise the whole device: that is an error, for both,
while any stream of the device is captured. Torch does it before a capture, TensorRT may where it
reads a plan or makes a context."""

_log = logging.getLogger(__name__)


class GraphCalls(Protocol):
    """The ``call`` of one graph: what it sets up for a call is that call's own, and stays."""

    def __call__(self, engine: str, /, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one engine."""
        ...

    def rewind(self) -> None:
        """Begin again: the calls that follow are those since the start, in the same order."""
        ...


class GraphDevice(Protocol):
    """The part of CUDA that a ``GraphedLoop`` needs. A graph is whatever ``capture`` returns."""

    def buffers(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of ``tensors`` in memory that stays where it is."""
        ...

    def capture(self, rehearse: Callable[[], object],
                work: Callable[[], list[Tensor]]) -> tuple[Any, list[Tensor]]:
        """Return the graph of ``work`` and the tensors, of no value yet, that it will fill.

        ``rehearse`` runs first, for real, on the stream of the capture: what is set up at the
        first use cannot be captured.
        """
        ...

    def replay(self, graph: Any, buffers: Sequence[Tensor], inputs: Sequence[Tensor],
               outputs: Sequence[Tensor]) -> list[Tensor]:
        """Copy ``inputs`` into ``buffers``, replay, and return copies of ``outputs``."""
        ...


class CudaGraphDevice:
    """CUDA graphs of torch. All graphs share a stream and, as they never run at once, memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def buffers(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of ``tensors`` in memory that stays where it is."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            # Memory of the stream that replays: whoever drops a graph, whatever its stream, what
            # is given this memory next comes after the last replay.
            with torch.cuda.stream(self._stream):
                copies = [tensor.clone() for tensor in tensors]
            current.wait_stream(self._stream)  # the tensors are its, to free
        return copies

    def capture(self, rehearse: Callable[[], object],
                work: Callable[[], list[Tensor]]) -> tuple[Any, list[Tensor]]:
        """Return the graph of ``work`` and the tensors that it will fill."""
        with ONE_CAPTURE, torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                rehearse()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads go on with their streams, and may allocate.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream,
                                      capture_error_mode='thread_local'):
                    outputs = work()
            finally:
                # Where the end of a capture fails, torch leaves its stream the current one: all
                # that the caller does from then on would be out of step.
                torch.cuda.set_stream(current)
        return graph, outputs

    def replay(self, graph: Any, buffers: Sequence[Tensor], inputs: Sequence[Tensor],
               outputs: Sequence[Tensor]) -> list[Tensor]:
        """Copy ``inputs`` into ``buffers``, replay, and return copies of ``outputs``."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            # Of the caller's stream, which frees them: both streams wait for each other, so
            # nothing needs to be recorded with the allocator.
            results = [torch.empty_like(tensor, memory_format=torch.contiguous_format)
                       for tensor in outputs]
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for buffer, tensor in zip(buffers, inputs):
                    buffer.copy_(tensor)
                graph.replay()
                for result, tensor in zip(results, outputs):
                    result.copy_(tensor)
            current.wait_stream(self._stream)
        return results


class PlainCalls:
    """The ``GraphCalls`` of a runtime whose calls keep nothing."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __call__(self, engine: str, /, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one engine."""
        return self._call(engine, *tensors)

    def rewind(self) -> None:
        """Nothing is kept."""


class GraphedLoop:
    """The ``loop`` of a runtime on CUDA; see the module's docstring.

    The first run of a kind is plain, the second is captured, those after it are replayed. A
    capture that fails is told once in the log, and then all stays plain: slower, not wrong.
    Threads may share a loop. ``graph_calls`` makes the ``call`` of a new graph; None where the
    runtime's own will do.
    """

    def __init__(self, network: FlowNetwork, call: Call, *, device: GraphDevice,
                 graph_calls: Callable[[], GraphCalls] | None = None) -> None:
        self._network = network
        self._modules = list(network.modules())  # walking them anew takes longer than a graph
        self._call = call
        self._device = device
        self._graph_calls = graph_calls or (lambda: PlainCalls(call))
        self._graphs: OrderedDict[_Key, _Graph] = OrderedDict()
        self._seen: OrderedDict[_Key, None] = OrderedDict()
        self._weights: tuple[int, ...] = ()
        self._lock = threading.Lock()
        self.failure = ''
        """Why nothing is captured any more, '' while all is well."""

    @property
    def kept(self) -> int:
        """How many graphs there are now."""
        return len(self._graphs)

    def __call__(self, state: State, lap: Lap | None = None) -> tuple[State, FlowOutput]:
        """Do the steps of ``state`` and finish; the results are the caller's own.

        ``lap`` is told 'steps' after a replay, 'capture' before it where it was captured first.
        """
        if not self.failure:
            inputs = _Inputs(state)
            with self._lock, torch.inference_mode():
                known = inputs.key in self._graphs
                graph = self._graph(inputs)
                if graph is not None:
                    if lap is not None and not known:
                        lap('capture')
                    result = self._replay(graph, inputs)
                    if lap is not None:
                        lap('steps')
                    return result
        return run_loop(self._network, state, self._call, lap)

    def _graph(self, inputs: '_Inputs') -> '_Graph | None':
        """Return the graph for these inputs, captured if this is their second time, or None."""
        weights = self._addresses()
        if weights != self._weights:  # moved, or exchanged: the graphs read what was freed
            self._graphs.clear()
            self._weights = weights
        graph = self._graphs.get(inputs.key)
        if graph is not None:
            self._graphs.move_to_end(inputs.key)
            return graph
        if inputs.key not in self._seen:
            self._seen[inputs.key] = None
            if len(self._seen) > _MOST_SEEN:
                self._seen.popitem(last=False)
            return None
        try:
            graph = self._graphs[inputs.key] = self._capture(inputs)
        except Exception as error:
            self.failure = f'{type(error).__name__}: {error}'
            self._graphs.clear()  # none is replayed any more
            _log.warning('%s runs without CUDA graphs, more slowly: capturing one failed (%s)',
                         self._network.name, self.failure)
        # After the capture, which has waited for all that still ran of the old one.
        if len(self._graphs) > _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return graph

    def _capture(self, inputs: '_Inputs') -> '_Graph':
        device, calls = self._device, self._graph_calls()
        buffers = device.buffers(inputs.distinct)
        state = inputs.state_of(buffers)
        results: list[tuple[State, FlowOutput]] = []

        def run() -> list[Tensor]:
            calls.rewind()
            results.append(run_loop(self._network, state, calls))
            return _distinct(_tensors_of(*results[-1]), but=buffers)

        graph, outputs = device.capture(run, run)
        after, output = results[-1]
        return _Graph(graph=graph, calls=calls, buffers=buffers, outputs=outputs, state=after,
                      output=output)

    def _replay(self, graph: '_Graph', inputs: '_Inputs') -> tuple[State, FlowOutput]:
        try:
            results = self._device.replay(graph.graph, graph.buffers, inputs.distinct,
                                          graph.outputs)
        except RuntimeError as error:
            raise EngineFault(f'{self._network.name}: replaying a CUDA graph failed '
                              f'({error})') from error
        # What the loop hands through is the caller's own tensor again.
        own = {id(tensor): result for tensor, result in
               [*zip(graph.buffers, inputs.distinct), *zip(graph.outputs, results)]}
        tensors = [own[id(tensor)] for tensor in _tensors_of(graph.state, graph.output)]
        return _with_tensors(graph.state, graph.output, tensors)

    def _addresses(self) -> tuple[int, ...]:
        return tuple(tensor.data_ptr() for module in self._modules
                     for tensors in (module._parameters, module._buffers)
                     for tensor in tensors.values() if tensor is not None)


_Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Graph:
    """A captured graph and all whose memory it uses."""

    graph: Any
    calls: GraphCalls
    buffers: list[Tensor]
    outputs: list[Tensor]
    state: State
    output: FlowOutput


class _Inputs:
    """A state taken apart: its different tensors, where they belong, and the rest, the key."""

    def __init__(self, state: State) -> None:
        self._state = state
        tensors = _state_tensors(state)
        self.distinct = _distinct(tensors)
        index = {id(tensor): number for number, tensor in enumerate(self.distinct)}
        self._places = tuple(index[id(tensor)] for tensor in tensors)
        a, b = state.features_a, state.features_b
        self.key: _Key = (
            state.schedule, state.done, state.level, state.warm, a.size, b.size,
            len(a.tensors), len(b.tensors), self._places,
            tuple((tuple(tensor.shape), tensor.dtype, tensor.device)
                  for tensor in self.distinct))

    def state_of(self, tensors: Sequence[Tensor]) -> State:
        """Return the state with ``tensors`` in place of the different ones."""
        return _with_state_tensors(self._state, [tensors[place] for place in self._places])


def _distinct(tensors: Sequence[Tensor], but: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return each tensor once, without those of ``but``."""
    left_out = {id(tensor) for tensor in but}
    return list({id(tensor): tensor for tensor in tensors
                 if id(tensor) not in left_out}.values())


def _state_tensors(state: State) -> list[Tensor]:
    return [*state.features_a.tensors, *state.features_b.tensors, state.flow, *state.memory]


def _with_state_tensors(state: State, tensors: Sequence[Tensor]) -> State:
    a, b = len(state.features_a.tensors), len(state.features_b.tensors)
    return replace(state, features_a=replace(state.features_a, tensors=tuple(tensors[:a])),
                   features_b=replace(state.features_b, tensors=tuple(tensors[a:a + b])),
                   flow=tensors[a + b], memory=tuple(tensors[a + b + 1:]))


def _tensors_of(state: State, output: FlowOutput) -> list[Tensor]:
    optional = (output.flow, output.confidence, output.occlusion)
    return _state_tensors(state) + [tensor for tensor in optional if tensor is not None]


def _with_tensors(state: State, output: FlowOutput,
                  tensors: Sequence[Tensor]) -> tuple[State, FlowOutput]:
    count = len(_state_tensors(state))
    rest = iter(tensors[count:])
    values = [next(rest) if tensor is not None else None
              for tensor in (output.flow, output.confidence, output.occlusion)]
    assert values[0] is not None
    return (_with_state_tensors(state, tensors[:count]),
            FlowOutput(flow=values[0], confidence=values[1], occlusion=values[2]))
