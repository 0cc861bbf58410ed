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

"""What every flow network offers: encode, start, step, finish, and the words around them.

A network writes its tensor-only work as *engine functions* (``encode_engine``,
``step_engine``, ``finish_engine`` ...: plain tensors in, a tuple of plain tensors out, no
Python state). The four acts below call them through ``call(name, *tensors)``. By default that
is the network's own torch code; a runtime passes its own ``call``, which runs a compiled
engine of the same name. So the loop, the schedule and the budget stay in Python and are
written once, whatever executes the tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, MISSING, replace
import math
from typing import Any

import torch
from torch import nn, Tensor
from torch.nn import functional

Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Step:
    """One unit of work: an operator on the level 1/``level`` (4, 8, 16, ...)."""

    level: int
    operator: str = 'iteration'


@dataclass(frozen=True)
class Features:
    """The features of one frame.

    ``tensors`` are what the network's ``encode_engine`` returned (padded grid);
    ``size`` is (height, width) of the frame in px, before padding.
    """

    tensors: tuple[Tensor, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class CellFlow:
    """A flow with one vector per cell of ``cell`` x ``cell`` px: a prior as warm starts carry it.

    ``flow`` (B, 2, ceil(H / cell), ceil(W / cell)) is in full-resolution px. The first cell
    begins at the upper left pixel; those at the right and lower border may be cut by the frame,
    whose ``size`` is (height, width). Networks read a prior at the resolution of their levels:
    nothing is gained by a vector for every pixel. ``trust``, where known, is a tensor of one
    number in [0, 1]: how far the flow it was made of could be trusted, in the mean.
    """

    flow: Tensor
    cell: int
    size: tuple[int, int]
    trust: Tensor | None = None

    @property
    def full(self) -> Tensor:
        """The flow (B, 2, H, W), interpolated between the centres of the cells."""
        if self.cell == 1:
            return self.flow
        flow = functional.interpolate(self.flow, scale_factor=self.cell, mode='bilinear',
                                      align_corners=False)
        return flow[..., :self.size[0], :self.size[1]].contiguous()

    def at_level(self, level: int, size: tuple[int, int]) -> Tensor:
        """Return the flow (B, 2, h, w), level px, on the map of level 1/``level``.

        The map, of ``size`` (h, w), is that of the frame padded at the right and below; there
        the border's flow goes on.
        """
        height, width = size
        rows, columns = self.flow.shape[-2:]
        if self.cell == level and height >= rows and width >= columns:
            flow = self.flow
            if (rows, columns) != size:
                flow = functional.pad(flow, (0, width - columns, 0, height - rows),
                                      mode='replicate')
            return flow / level
        x, y = (torch.arange(count, dtype=torch.float32, device=self.flow.device) * level
                + (level - 1) / 2 for count in (width, height))
        return self.at(x, y) / level

    def at(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the flow (B, 2, h, w), full-resolution px, on a grid of points of the frame.

        ``x`` (w,) and ``y`` (h,) are in px, the centre of the first pixel is 0; float32, on
        the device of the flow. Between the centres of four cells the flow is interpolated,
        outside of them it goes on.
        """
        flow = self.flow
        for axis, points in ((-2, y[:, None]), (-1, x)):
            last = flow.shape[axis] - 1
            place = ((points + 0.5) / self.cell - 0.5).clamp(0, last)
            first = place.floor()
            index = first.flatten().long()
            flow = torch.lerp(flow.index_select(axis, index),
                              flow.index_select(axis, (index + 1).clamp(max=last)),
                              (place - first).to(flow.dtype))
        return flow

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> 'CellFlow':
        """Return the same on another device."""
        trust = None if self.trust is None else self.trust.to(device)
        return replace(self, flow=self.flow.to(device, dtype), trust=trust)


PriorFlow = Tensor | CellFlow
"""What a warm start begins with, full-resolution px: (B, 2, H, W), or one vector per cell."""


@dataclass(frozen=True)
class State:
    """Where a pair stands between two steps.

    ``flow`` is (B, 2, H/level, W/level) in level px on the padded grid. ``schedule`` are the
    steps still to do, ``done`` those really done. ``memory`` is the network's own (hidden
    state, context, ...), never read by others.
    """

    features_a: Features
    features_b: Features
    level: int
    flow: Tensor
    schedule: tuple[Step, ...]
    done: tuple[Step, ...] = ()
    warm: bool = False
    memory: tuple[Tensor, ...] = ()

    def advanced(self, **changes: Any) -> 'State':
        """Return the state after its next step, which moves from ``schedule`` to ``done``."""
        return replace(self, schedule=self.schedule[1:], done=self.done + self.schedule[:1],
                       **changes)


@dataclass(frozen=True)
class FlowOutput:
    """Full-resolution output.

    ``flow`` (B, 2, H, W) px per frame; ``confidence`` (B, 1, H, W) in [0, 1], the calibrated
    probability of an endpoint error under max(3 px, 5 %), and ``occlusion`` (B, 1, H, W), the
    probability in [0, 1] of having no counterpart, or None where the network knows neither.
    """

    flow: Tensor
    confidence: Tensor | None = None
    occlusion: Tensor | None = None


class FlowNetwork(nn.Module):
    """Base of all flow networks; see the module's docstring.

    Sub-classes set ``name``, ``default_iterations`` (per level; of networks that visit each
    level once, the number of levels), ``most_iterations`` (the most that a budget of time
    spends), ``engines`` (the names that ``call`` may be given) and
    ``accepts_prior`` (False: there is no warm start), and implement the four acts.
    ``budget_unit`` is what a budget counts, in words; ``free_options`` are the fields of the
    configuration that may differ from those the weights were made with. Where
    ``takes_calibration``, ``set_calibration`` moves the confidence. ``tensor_names`` says what
    the tensors of an engine are called in its exported form, (inputs, outputs); an engine that
    takes or returns fewer has the first of them. ``spares_memory`` says that acts compute for so
    long that a runtime had better give back what one needed while it computed before the next
    begins; to have it again takes 0.25 ms per MB.
    """

    name: str = ''
    default_iterations: int = 1
    most_iterations: int = 12
    engines: tuple[str, ...] = ('encode', 'step', 'finish')
    accepts_prior: bool = True
    budget_unit: str = 'iterations per level'
    free_options: frozenset[str] = frozenset()
    takes_calibration: bool = False
    spares_memory: bool = False
    tensor_names: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}

    def options(self) -> dict[str, Any]:
        """Return the fields of ``config`` (a dataclass) that differ from their defaults.

        JSON knows all of them but tuples, which come back as lists: ``networks.create`` takes
        both.
        """
        config: Any = getattr(self, 'config', None)
        if config is None:
            return {}
        defaults = {field.name: (field.default if field.default_factory is MISSING
                                 else field.default_factory()) for field in fields(config)}
        return {name: getattr(config, name) for name, default in defaults.items()
                if getattr(config, name) != default}

    def set_calibration(self, scale: float, shift: float) -> None:
        """Make the confidence sigmoid(scale logit(p) + shift) of the p computed; (1, 0) is p."""
        raise NotImplementedError(f'{self.name} has no confidence that could be calibrated')

    def engine(self, name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the engine function ``name`` in torch; the default of every ``call``."""
        if name not in self.engines:
            raise ValueError(f'{self.name} has no engine {name!r}; it has {self.engines}')
        function: Call = getattr(self, f'{name}_engine')
        return function(*tensors)

    def encode(self, image: Tensor, *, call: Call | None = None) -> Features:
        """Return the features of ``image``: float RGB 0..255, (B, 3, H, W), any size."""
        raise NotImplementedError  # abstract

    def start(self, features_a: Features, features_b: Features, *,
              prior_flow: PriorFlow | None = None, iterations: int | None = None,
              call: Call | None = None) -> State:
        """Return the state before the first step, with the schedule this pair deserves.

        ``prior_flow`` makes a warm start, None a cold one: (B, 2, H, W) in full-resolution px,
        or a CellFlow (``check_prior`` makes that of either).
        ``iterations`` counts per level; of networks that visit each level once, the levels.
        """
        raise NotImplementedError  # abstract

    def step(self, state: State, *, call: Call | None = None) -> State:
        """Do the first step of ``state.schedule``; there is a valid flow after every step."""
        raise NotImplementedError  # abstract

    def finish(self, state: State, *, call: Call | None = None) -> FlowOutput:
        """Return the full-resolution output of ``state``; legal after any step."""
        raise NotImplementedError  # abstract

    def reversed(self, state: State) -> State | None:
        """Return the state of the other direction where the steps so far made it too, or None.

        Then one run is enough for both directions.
        """
        return None

    def forward(self, image1: Tensor, image2: Tensor, iterations: int | None = None,
                prior_flow: Tensor | None = None) -> FlowOutput:
        """Estimate the flow from ``image1`` to ``image2``, float RGB 0..255, (B, 3, H, W)."""
        check_images(image1, image2)
        state = self.start(self.encode(image1), self.encode(image2), prior_flow=prior_flow,
                           iterations=iterations)
        while state.schedule:
            state = self.step(state)
        return self.finish(state)


def check_images(image1: Tensor, image2: Tensor) -> None:
    """Raise ValueError unless both are (B, 3, H, W) of one shape."""
    for image in (image1, image2):
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise ValueError(f'images must be (B, 3, H, W), float RGB 0..255; '
                             f'seen {tuple(image.shape)}')
    if image1.shape != image2.shape:
        raise ValueError(f'both images must have one shape; seen {tuple(image1.shape)} and '
                         f'{tuple(image2.shape)}: resize one of them')


def count_parameters(network: nn.Module) -> int:
    """Return the number of parameters, buffers left out."""
    return sum(parameter.numel() for parameter in network.parameters())


def check_pair(features_a: Features, features_b: Features) -> None:
    """Raise ValueError unless the features are of two frames of one size and batch."""
    shapes = [tuple(features.tensors[0].shape) for features in (features_a, features_b)]
    if features_a.size != features_b.size or shapes[0] != shapes[1]:
        raise ValueError(f'both frames must have one size and batch; seen {features_a.size} and '
                         f'{features_b.size}, features {shapes[0]} and {shapes[1]}')


def check_prior(prior_flow: PriorFlow, features: Features) -> CellFlow:
    """Return ``prior_flow`` as a CellFlow.

    Raises ValueError unless it is (B, 2, H, W) of ``features``, or a CellFlow of that size, and
    finite.
    """
    height, width = features.size
    batch = features.tensors[0].shape[0]
    cells = (prior_flow if isinstance(prior_flow, CellFlow)
             else CellFlow(prior_flow, 1, (height, width)))
    flow, cell = cells.flow, cells.cell
    shape = (-(-height // cell), -(-width // cell))
    if (flow.ndim != 4 or flow.shape[1] != 2 or tuple(flow.shape[-2:]) != shape
            or cells.size != (height, width)):
        raise ValueError(f'prior_flow must be (B, 2, {height}, {width}), full-resolution px, or '
                         f'a CellFlow of that size; seen {tuple(flow.shape)}'
                         + (f' of cells of {cell} px, size {cells.size}' if cell != 1 else ''))
    # One sum, into which all goes that is not finite: on a CPU a tenth of asking each.
    if not math.isfinite(float(flow.sum())) and not bool(torch.isfinite(flow).all()):
        raise ValueError('prior_flow has NaN or infinite values: fill its holes first')
    if flow.shape[0] != batch:
        raise ValueError(f'prior_flow must have the batch of the features, {batch}; seen '
                         f'{flow.shape[0]}')
    return cells
