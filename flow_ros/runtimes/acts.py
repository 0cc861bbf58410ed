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

"""The acts of a network: which engines run at a frame size, on tensors of which shapes.

Every runtime that compiles before it runs starts here. Nothing is computed to find the acts:
the four acts of the network run on frames of zeros with a ``call`` that works out shapes alone.
"""

from collections.abc import Sequence
import copy
from dataclasses import dataclass, replace
import math

import torch
from torch import nn, Tensor

from flow_ros.networks.base import Call, FlowNetwork

PRIOR_PX = 40.0
"""Of the warm start. Between it and a cold start, networks visit all of their levels."""

Signature = tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an act.

    ``px_per_cell``: px of the padded frame (what ``encode`` is given) for each cell of the last
    two dimensions; None where these do not follow the frame.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    px_per_cell: int | None


@dataclass(frozen=True)
class Act:
    """An engine function with the tensors it takes and returns.

    A static act is of one shape: ``name`` is that of the engine where a frame size has one such
    act, else ENGINE_LEVEL, with the px of the frame for each cell of its first input. A dynamic
    act is of all shapes of its engine: ``name`` is the engine's, ``variants`` are the static
    acts it stands for (none in a static act), and its own inputs and outputs are those of the
    largest of them.
    """

    name: str
    engine: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: tuple['Act', ...] = ()

    @property
    def signature(self) -> Signature:
        """The shapes and types of the inputs, as ``signature_of`` tells them of tensors."""
        return tuple((spec.shape, spec.dtype) for spec in self.inputs)


def signature_of(tensors: Sequence[Tensor]) -> Signature:
    """Return the shapes and types of ``tensors``."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def run_acts(network: FlowNetwork, image: Tensor, call: Call) -> None:
    """Give ``call`` each act that frames like ``image`` (1, 3, H, W) need, with its tensors.

    Cold and, if the network accepts a prior, warm: each different step of both schedules is done
    once, and the output taken after each, where a smaller budget would end.
    """
    priors: list[Tensor | None] = [None]
    if network.accepts_prior:
        priors.append(image.new_full((1, 2, *image.shape[-2:]), PRIOR_PX))
    features = network.encode(image, call=call)
    for prior in priors:
        state = network.start(features, features, prior_flow=prior, call=call)
        state = replace(state, schedule=tuple(dict.fromkeys(state.schedule)))
        while state.schedule:
            state = network.step(state, call=call)
            network.finish(state, call=call)


def record_acts(network: FlowNetwork, *, width: int, height: int,
                dynamic: bool = False) -> tuple[Act, ...]:
    """Return the acts that frames of ``width`` x ``height`` px need, in the order of their use.

    Shapes are those of a batch of one, types those that ``network`` (see ``export.prepared``)
    computes in. With ``dynamic`` there is one act for each engine, else one for each shape.
    Raises ValueError for a size below 1x1.
    """
    if min(width, height) < 1:
        raise ValueError(f'a frame has at least 1x1 px; seen {width}x{height}')
    recorder = _Recorder(network)
    with torch.inference_mode(False), torch.no_grad():
        run_acts(network, torch.zeros(1, 3, height, width), recorder.call)
    by_engine: dict[str, list[Act]] = {}
    for act in recorder.acts.values():
        by_engine.setdefault(act.engine, []).append(act)
    if dynamic:
        return tuple(_dynamic(engine, _named(engine, acts))
                     for engine, acts in by_engine.items())
    return tuple(act for engine, acts in by_engine.items() for act in _named(engine, acts))


class _Recorder:
    """A ``call`` that notes the acts and returns zeros of the right shapes."""

    def __init__(self, network: FlowNetwork) -> None:
        self.acts: dict[tuple[str, Signature], Act] = {}
        self._names = network.tensor_names
        self._network = _without_numbers(network)
        self._frame: tuple[int, ...] | None = None

    def call(self, engine: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Note the act; the results have the right shapes, and all zeros in them."""
        results = self._network.engine(engine, *(tensor.to('meta') for tensor in tensors))
        if self._frame is None:  # the first call is encode, which is given the padded frame
            self._frame = tuple(tensors[0].shape[-2:])
        inputs, outputs = self._names.get(engine, ((), ()))
        act = Act(name=engine, engine=engine,
                  inputs=tuple(self._spec(tensor, inputs, f'input_{index}', index)
                               for index, tensor in enumerate(tensors)),
                  outputs=tuple(self._spec(tensor, outputs, f'output_{index}', index)
                                for index, tensor in enumerate(results)))
        self.acts.setdefault((engine, act.signature), act)
        return tuple(torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in results)

    def _spec(self, tensor: Tensor, names: Sequence[str], otherwise: str,
              index: int) -> TensorSpec:
        return TensorSpec(name=names[index] if index < len(names) else otherwise,
                          shape=tuple(tensor.shape), dtype=tensor.dtype,
                          px_per_cell=self._px_per_cell(tensor))

    def _px_per_cell(self, tensor: Tensor) -> int | None:
        assert self._frame is not None
        if tensor.ndim < 4 or 0 in tensor.shape:
            return None
        ratios = {divmod(whole, part) for whole, part in zip(self._frame, tensor.shape[-2:])}
        (cell, rest), *others = ratios
        return None if others or rest or not cell else cell


def _without_numbers(network: FlowNetwork) -> FlowNetwork:
    """Return a copy of ``network`` whose tensors have shapes and types, but no memory."""
    memo: dict[int, Tensor] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to('meta'), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.to('meta')
    return copy.deepcopy(network, memo).eval()


def _named(engine: str, acts: list[Act]) -> list[Act]:
    """Give the acts of one engine names of their own."""
    if len(acts) == 1:
        return acts
    levels = [act.inputs[0].px_per_cell for act in acts]
    if None in levels or len(set(levels)) < len(levels):
        return [replace(act, name=f'{engine}_{index}') for index, act in enumerate(acts)]
    return [replace(act, name=f'{engine}_{level}') for act, level in zip(acts, levels)]


def _dynamic(engine: str, acts: list[Act]) -> Act:
    largest = max(acts, key=lambda act: sum(math.prod(spec.shape) for spec in act.inputs))
    return replace(largest, name=engine, variants=tuple(acts))
