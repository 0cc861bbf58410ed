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

"""DIP, deep inverse patchmatch (Zheng et al., CVPR 2022), as its released weights need it.

Two facts of the released network that its paper does not tell are reproduced here, because
the published weights work with nothing else: the propagation correlation pairs channels and
seeds in an interleaved order (``ops.patchmatch``), and a warm start runs over one to three
levels depending on how far the prior moves.

Where this project chooses: the warm start's noise is off by default (``DIPConfig``), the start
pattern is one per shape and the same for every sample of a batch, and a prior is replicated
into the pad before it is resized. DIP knows neither confidence nor occlusion.

Cost, counted as 2 x MAC at 448x1024: 183 GFLOP to encode both images, 260 per iteration over
both levels of the cold schedule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
import math

import torch
from torch import nn, Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from flow_ros.networks.base import (
    Call,
    CellFlow,
    check_images,
    check_pair,
    check_prior,
    Features,
    FlowNetwork,
    FlowOutput,
    PriorFlow,
    State,
    Step,
)
from flow_ros.ops import winograd
from flow_ros.ops.blocks import by_blocks
from flow_ros.ops.exporting import is_eager
from flow_ros.ops.patchmatch import propagation_correlation_released, search_released
from flow_ros.ops.upsampling import convex_upsample

FEATURES = 256
HIDDEN = 128
FACTOR = 4
PAD_MULTIPLE = 16
COLD_LEVELS = (16, 4)
WARM_LEVELS = (16, 8, 4)
COLD_CHOICES = (COLD_LEVELS, WARM_LEVELS)
WARM_LEVEL_PX = 32  # a warm start uses one level per 32 px of the largest prior component
WARM_SMALLEST_SIDE = 40  # and no coarser level than a map with both sides under this
START_AMPLITUDE = 16.0
REFINE_AMPLITUDE = 4.0
PATTERN_SEED = 20
SHARES = ('share_z', 'share_r', 'share_q',
          'share_z_across', 'share_r_across', 'share_q_across',
          'share_z_down', 'share_r_down', 'share_q_down')
"""What the context adds to the GRUs of an iteration, one after the other in a state's memory."""

START_FLOWS = ('zeros', 'fixed')
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DIPConfig:
    """Options of DIP that are not weights.

    ``start_flow`` of a cold start: 'fixed' is the released pattern, uniform within +-16 px of
    the 1/16 map and the same for every call; 'zeros' starts at rest. ``warm_noise`` scales
    the uniform noise that the released warm start adds to the prior: 1.0 is as released
    (+-16 px of the first level, +-4 of each finer one), which forgets much of what the prior
    knows; 0.0, the default, keeps the prior. ``cold_levels`` are those of a cold start:
    (16, 4) as released, or (16, 8, 4), the choice that section 3.4 leaves open: each iteration
    at 1/8 costs a quarter of one at 1/4.
    """

    start_flow: str = 'fixed'
    warm_noise: float = 0.0
    cold_levels: tuple[int, ...] = COLD_LEVELS

    def __post_init__(self) -> None:
        """Refuse values outside the documented ones."""
        if self.cold_levels not in COLD_CHOICES:
            raise ValueError(f'cold_levels must be one of {COLD_CHOICES}; seen '
                             f'{self.cold_levels!r}')
        if self.start_flow not in START_FLOWS:
            raise ValueError(f'start_flow must be one of {START_FLOWS}; seen '
                             f'{self.start_flow!r}')
        if not (math.isfinite(self.warm_noise) and self.warm_noise >= 0):
            raise ValueError(f'warm_noise must be a finite number of at least 0 (1.0 = as '
                             f'released); seen {self.warm_noise!r}')


class Convolution(nn.Conv2d):
    """A convolution of stride 1 that keeps the size of its map."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int]) -> None:
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        super().__init__(inputs, outputs, sides, padding=(sides[0] // 2, sides[1] // 2))

    def forward(self, values: Tensor) -> Tensor:
        """Return (B, outputs, H, W)."""
        return self.made()(values)

    def made(self) -> Layer:
        """Return the convolution as a function, to be used for many blocks of a map."""
        return _convolution(self.weight, self.bias)


def _convolution(weight: Tensor, bias: Tensor | None = None) -> Layer:
    """Return the convolution; what it works out of ``weight`` alone is so once."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)

    @cache
    def at_points() -> Tensor:
        return winograd.transformed(weight)

    def convolve(values: Tensor) -> Tensor:
        if winograd.pays(values, weight):
            return winograd.convolve(values, weight, bias, at_points())
        return functional.conv2d(values, weight, bias, padding=padding)

    return convolve


def _relu(values: Tensor) -> Tensor:
    """Return the rectified ``values``, which nobody else reads: over them, where that saves."""
    return values.relu_() if is_eager(values) else functional.relu(values)


class InstanceNorm(nn.Module):
    """Zero mean and unit variance of each channel of each map; in float32 at least."""

    epsilon = 1e-5
    lines = 16
    """Rows whose squares are summed at a time."""

    def forward(self, values: Tensor) -> Tensor:
        """Return the normed map, in the type of ``values``, which may be written over."""
        # Half precision cannot sum the squares of a map of 300,000 cells.
        single = values.float()
        if not is_eager(single) or single.is_contiguous():
            return functional.instance_norm(single, eps=self.epsilon).to(values.dtype)
        # Torch's own norm would first copy the map to have its channels first.
        centred = single.sub_(single.mean(dim=(2, 3), keepdim=True))
        squares = torch.stack([rows.square().sum(dim=(2, 3), keepdim=True)
                               for rows in centred.split(self.lines, dim=2)])
        variance = squares.sum(dim=0) / (values.shape[2] * values.shape[3])
        return centred.mul_(torch.rsqrt(variance + self.epsilon)).to(values.dtype)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut is always a strided 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.conv2 = Convolution(outputs, outputs, 3)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride),
                                        InstanceNorm())
        self.norm = InstanceNorm()

    def forward(self, values: Tensor) -> Tensor:
        """Return the block's map."""
        inner = _relu(self.norm(self.conv1(values)))
        inner = _relu(self.norm(self.conv2(inner)))
        outer = self.downsample(values)
        return _relu(outer.add_(inner) if is_eager(outer) else outer + inner)


class Encoder(nn.Module):
    """Normalised BGR to 256 features at 1/4; serves as feature and as context network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        self.norm = InstanceNorm()
        self.layer1 = self._layer(64, 64, stride=1)
        self.layer2 = self._layer(64, 96, stride=2)
        self.layer3 = self._layer(96, 128, stride=1)
        self.conv2 = nn.Conv2d(128, FEATURES, 1)

    @staticmethod
    def _layer(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
        return nn.Sequential(ResidualBlock(inputs, outputs, stride=stride),
                             ResidualBlock(outputs, outputs, stride=1))

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, 256, H/4, W/4)."""
        values = _relu(self.norm(self.conv1(image)))
        values = self.layer3(self.layer2(self.layer1(values)))
        return self.conv2(values)


class SmallMotionEncoder(nn.Module):
    """Ten correlation planes and the flow to 96 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(10, 96, 1)
        self.convf1 = Convolution(2, 64, 5)
        self.convf2 = Convolution(64, 32, 3)
        self.conv = Convolution(128, 94, 3)

    def forward(self, correlation: Tensor, flow: Tensor) -> Tensor:
        """Return the motion features, the raw flow as their last two channels."""
        convf1, convf2, conv = (each.made() for each in (self.convf1, self.convf2, self.conv))

        def encoded(correlation: Tensor, flow: Tensor) -> Tensor:
            match = _relu(self.convc1(correlation))
            motion = _relu(convf2(_relu(convf1(flow))))
            mixed = _relu(conv(torch.cat([match, motion], dim=1)))
            return torch.cat([mixed, flow], dim=1)

        return by_blocks(encoded, correlation, flow, halo=4)


class MotionEncoder(nn.Module):
    """Twenty-five correlation planes and the flow to 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(25, 64, 1)
        self.convc2 = Convolution(64, 128, 3)
        self.convf1 = Convolution(2, 64, 5)
        self.convf2 = Convolution(64, 64, 3)
        self.conv = Convolution(192, 126, 3)

    def forward(self, correlation: Tensor, flow: Tensor) -> Tensor:
        """Return the motion features, the raw flow as their last two channels."""
        convc2, convf1, convf2, conv = (each.made() for each in (
            self.convc2, self.convf1, self.convf2, self.conv))

        def encoded(correlation: Tensor, flow: Tensor) -> Tensor:
            match = _relu(convc2(_relu(self.convc1(correlation))))
            motion = _relu(convf2(_relu(convf1(flow))))
            mixed = _relu(conv(torch.cat([match, motion], dim=1)))
            return torch.cat([mixed, flow], dim=1)

        return by_blocks(encoded, correlation, flow, halo=4)


def _seen(conv: nn.Conv2d) -> Tensor:
    """Return the weight of a GRU's ``conv`` without the context's, the second HIDDEN channels."""
    return torch.cat([conv.weight[:, :HIDDEN], conv.weight[:, 2 * HIDDEN:]], dim=1)


def _shares(context: Tensor, *convs: nn.Conv2d) -> tuple[Tensor, ...]:
    """Return what the context adds to each of ``convs`` of a GRU, their biases in it."""
    weight = torch.cat([conv.weight[:, HIDDEN:2 * HIDDEN] for conv in convs])
    parts = _convolution(weight)(context).split(HIDDEN, dim=1)
    biases = [_bias(conv).to(parts[0].dtype)[None, :, None, None] for conv in convs]
    return tuple(part.add_(bias) if is_eager(part) else part + bias
                 for part, bias in zip(parts, biases))


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _gru(convz: nn.Conv2d, convr: nn.Conv2d, convq: nn.Conv2d) -> Callable[..., Tensor]:
    """Return a convolutional gated recurrent unit: hidden, motion and shares to the next hidden.

    ``shares`` are what the context adds to z, r and q (``_shares``): a convolution of a cat is
    the sum of those of its parts, and the context is the same in all iterations of a level.
    """
    to_gates = _convolution(torch.cat([_seen(convz), _seen(convr)]))
    to_candidate = _convolution(_seen(convq))

    def updated(hidden: Tensor, motion: Tensor, *shares: Tensor) -> Tensor:
        of_update, of_reset, of_candidate = shares
        seen = torch.cat([hidden, motion], dim=1)
        update, reset = to_gates(seen).split(HIDDEN, dim=1)
        update = (update + of_update).sigmoid_()
        reset = (reset + of_reset).sigmoid_()
        if is_eager(seen):
            seen[:, :HIDDEN].mul_(reset)
        else:
            seen = torch.cat([reset * hidden, motion], dim=1)
        candidate = to_candidate(seen).add_(of_candidate).tanh_()
        return torch.lerp(hidden, candidate, update)  # (1 - z) h + z q

    return updated


class ConvGRU(nn.Module):
    """A 3x3 convolutional GRU."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.convz = Convolution(HIDDEN + inputs, HIDDEN, 3)
        self.convr = Convolution(HIDDEN + inputs, HIDDEN, 3)
        self.convq = Convolution(HIDDEN + inputs, HIDDEN, 3)

    def shares(self, context: Tensor) -> tuple[Tensor, ...]:
        """Return what the context adds to z, r and q: three of (B, 128, H, W)."""
        return _shares(context, self.convz, self.convr, self.convq)

    def forward(self, hidden: Tensor, motion: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """Return the new hidden state."""
        return by_blocks(_gru(self.convz, self.convr, self.convq), hidden, motion, *shares,
                         halo=2)


class SeparableConvGRU(nn.Module):
    """A GRU of 1x5 convolutions (along x), then one of 5x1."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        width = HIDDEN + inputs
        self.convz1 = Convolution(width, HIDDEN, (1, 5))
        self.convr1 = Convolution(width, HIDDEN, (1, 5))
        self.convq1 = Convolution(width, HIDDEN, (1, 5))
        self.convz2 = Convolution(width, HIDDEN, (5, 1))
        self.convr2 = Convolution(width, HIDDEN, (5, 1))
        self.convq2 = Convolution(width, HIDDEN, (5, 1))

    def shares(self, context: Tensor) -> tuple[Tensor, ...]:
        """Return what the context adds to z, r and q, along x and along y: (B, 128, H, W)."""
        return (*_shares(context, self.convz1, self.convr1, self.convq1),
                *_shares(context, self.convz2, self.convr2, self.convq2))

    def forward(self, hidden: Tensor, motion: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """Return the new hidden state; the one given may be written over (``by_blocks``)."""
        # Rows do not see each other in the first, nor columns in the second.
        hidden = by_blocks(_gru(self.convz1, self.convr1, self.convq1), hidden, motion,
                           *shares[:3], axis=2, into=hidden)
        return by_blocks(_gru(self.convz2, self.convr2, self.convq2), hidden, motion,
                         *shares[3:], axis=3, into=hidden)


class FlowHead(nn.Module):
    """Hidden state to a change of flow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = Convolution(HIDDEN, width, 3)
        self.conv2 = Convolution(width, 2, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, 2, H, W), px of the level."""
        conv1, conv2 = self.conv1.made(), self.conv2.made()
        return by_blocks(lambda rows: conv2(_relu(conv1(rows))), hidden, halo=2)


class UpdateBlock(nn.Module):
    """Motion encoder, GRU, flow head and upsampling mask; ``small`` follows propagation."""

    def __init__(self, *, small: bool) -> None:
        super().__init__()
        self.encoder = SmallMotionEncoder() if small else MotionEncoder()
        self.gru = ConvGRU(HIDDEN + 96) if small else SeparableConvGRU(HIDDEN + 128)
        self.flow_head = FlowHead(128 if small else 256)
        self.mask = nn.Sequential(Convolution(HIDDEN, 256, 3), nn.ReLU(),
                                  nn.Conv2d(256, 9 * FACTOR ** 2, 1))

    def forward(self, hidden: Tensor, shares: Sequence[Tensor], correlation: Tensor,
                flow: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new hidden state and the change of flow.

        ``shares`` are what ``gru.shares`` makes of the level's context. The block that follows
        the search may write over ``hidden``, which propagation made for it alone.
        """
        motion = self.encoder(correlation, flow.to(correlation.dtype))
        hidden = self.gru(hidden, motion, shares)
        return hidden, self.flow_head(hidden).to(flow.dtype)

    def upsample(self, hidden: Tensor, flow: Tensor) -> Tensor:
        """Return ``flow`` at four times its size, in px of that size.

        The mask depends on the hidden state alone, so it is computed only where a flow is
        really upsampled: at a level's last update, not after each.
        """
        def upsampled(hidden: Tensor, flow: Tensor) -> Tensor:
            mask = 0.25 * self.mask(hidden)
            return convex_upsample(FACTOR * flow, mask.to(flow.dtype), FACTOR)

        return by_blocks(upsampled, hidden, flow, halo=1)


class DIP(FlowNetwork):
    """DIP, with the state_dict of its published checkpoints (without their ``module.``).

    Steps are iterations, propagation then search, on levels 16 and 4 (cold) or on up to three
    of 16, 8 and 4 (warm). Iterations count per level. The default of 6 is what the paper's
    ablations use; its benchmark entries use 12 for a slightly smaller error at twice the cost,
    and the authors' video demo 20 cold and 12 warm.

    Engines: ``encode`` (image) -> features at 1/4, 1/8, 1/16; ``context`` (context) -> what it
    adds to the three GRUs of an iteration, once for each level; ``step`` (features_a,
    features_b, the nine shares, hidden, flow) -> (hidden, flow), one for all levels;
    ``upsample`` (hidden, flow) -> (flow at 4x,), used between levels and by ``finish``.
    """

    name = 'dip'
    default_iterations = 6
    spares_memory = True
    free_options = frozenset({'start_flow', 'warm_noise', 'cold_levels'})
    engines = ('encode', 'context', 'step', 'upsample')
    tensor_names = {
        'encode': (('image',), ('features_4', 'features_8', 'features_16')),
        'context': (('context',), SHARES),
        'step': (('features_a', 'features_b', *SHARES, 'hidden', 'flow'),
                 ('next_hidden', 'next_flow')),
        'upsample': (('hidden', 'flow'), ('fine_flow',))}

    def __init__(self, config: DIPConfig = DIPConfig()) -> None:
        super().__init__()
        self.config = config
        self.fnet = Encoder()
        self.update_block_s = UpdateBlock(small=True)
        self.update_block = UpdateBlock(small=False)

    # Engine functions: plain tensors in, a tuple of plain tensors out.

    def encode_engine(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the features at 1/4, 1/8 and 1/16 of a padded RGB image, 0..255."""
        normalised = image.flip(1) * (2 / 255) - 1  # the weights know BGR
        quarter = self.fnet(normalised.to(self.fnet.conv1.weight.dtype))
        eighth = functional.avg_pool2d(quarter, 2)
        return quarter, eighth, functional.avg_pool2d(eighth, 2)

    def context_engine(self, context: Tensor) -> tuple[Tensor, ...]:
        """Return what ``context`` adds to the GRUs of a level: nine of (B, 128, h, w)."""
        return (*self.update_block_s.gru.shares(context), *self.update_block.gru.shares(context))

    def step_engine(self, features_a: Tensor, features_b: Tensor,
                    *others: Tensor) -> tuple[Tensor, ...]:
        """Do one iteration on one level; return the hidden state and the flow.

        ``others`` are what ``context_engine`` returns, the hidden state and the flow.
        """
        *shares, hidden, flow = others
        hidden, flow = self._propagate(features_a, features_b, shares[:3], hidden, flow)
        return self._search(features_a, features_b, shares[3:], hidden, flow)

    def upsample_engine(self, hidden: Tensor, flow: Tensor) -> tuple[Tensor, ...]:
        """Return the flow of a finished iteration at four times its size, in px of that."""
        return (self.update_block.upsample(hidden, flow),)

    def _propagate(self, features_a: Tensor, features_b: Tensor, shares: Sequence[Tensor],
                   hidden: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        flow = flow.detach()  # as trained: no gradient through the place of a match
        correlation = propagation_correlation_released(features_a, features_b, flow)
        hidden, delta = self.update_block_s(hidden, shares, correlation, flow)
        return hidden, flow + delta

    def _search(self, features_a: Tensor, features_b: Tensor, shares: Sequence[Tensor],
                hidden: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        flow = flow.detach()
        correlation = search_released(features_a, features_b, flow)
        hidden, delta = self.update_block(hidden, shares, correlation, flow)
        return hidden, flow + delta

    # The four acts.

    def encode(self, image: Tensor, *, call: Call | None = None) -> Features:
        """Return the features of ``image``: float RGB 0..255, (B, 3, H, W), any size."""
        check_images(image, image)
        height, width = image.shape[-2:]
        padded = functional.pad(image.float(), _padding(height, width))
        return Features((call or self.engine)('encode', padded), (height, width))

    def start(self, features_a: Features, features_b: Features, *,
              prior_flow: PriorFlow | None = None, iterations: int | None = None,
              call: Call | None = None, noise: Sequence[Tensor] | None = None) -> State:
        """Return the state before the first step, with its schedule.

        ``prior_flow``, full-resolution px, makes a warm start over one to three levels: one
        more for every 32 px of its largest component, in the whole batch.
        ``iterations`` counts per level. ``noise`` replaces what the configuration would add:
        one tensor per level, coarse to fine, (B or 1, 2, h, w) in px of that level, added to
        the flow with which the level starts. A cold start takes one, its start flow.
        """
        count = self._iterations(iterations)
        check_pair(features_a, features_b)
        quarter = features_a.tensors[0]
        levels = self.config.cold_levels
        if prior_flow is None:
            height, width = features_a.tensors[-1].shape[-2:]
            flow = quarter.new_zeros((quarter.shape[0], 2, height, width), dtype=torch.float32)
        else:
            prior = check_prior(prior_flow, features_a).to(quarter.device)
            levels = warm_levels(prior.flow, (quarter.shape[-2], quarter.shape[-1]))
            flow = _on_map(prior, _map(features_a, levels[0]))
        warm = prior_flow is not None
        if noise is None:
            noise = self._noise(features_a, levels, warm=warm)
        else:
            _check_noise(noise, [(quarter.shape[0], 2, *_map(features_a, level))
                                 for level in (levels if warm else levels[:1])])
        state = State(features_a, features_b, level=levels[0], flow=flow, warm=warm,
                      schedule=tuple(Step(level) for level in levels for _ in range(count)))
        return self._enter(state, levels[0], flow, tuple(noise), call or self.engine)

    def step(self, state: State, *, call: Call | None = None) -> State:
        """Do one iteration, moving to the next level first where the schedule says so."""
        if not state.schedule:
            raise ValueError(f'all {len(state.done)} steps of this state are done: call '
                             f'finish, or start again with more iterations')
        run = call or self.engine
        state = self._on_the_next_level(state, run)
        hidden, *kept = state.memory
        hidden, flow = run('step', _at(state.features_a, state.level),
                           _at(state.features_b, state.level), *kept[:len(SHARES)], hidden,
                           state.flow)
        return state.advanced(flow=flow, memory=(hidden, *kept))

    def finish(self, state: State, *, call: Call | None = None) -> FlowOutput:
        """Return the full-resolution flow of ``state``; legal after any step."""
        fine, = (call or self.engine)('upsample', state.memory[0], state.flow)
        return FlowOutput(_to_image(fine, state))

    def predictions(self, image1: Tensor, image2: Tensor, *, iterations: int | None = None,
                    prior_flow: Tensor | None = None, noise: Sequence[Tensor] | None = None,
                    checkpointed: bool = False) -> list[Tensor]:
        """Return every full-resolution flow (B, 2, H, W) of one run, in order, for training.

        One after each propagation and one after each search: 2 per iteration and level, so 4
        per iteration of a cold start, those of level 16 first. Section 4.1 weighs them
        0.8**(N - i - 1). The last one is the flow that ``forward`` returns.
        ``iterations``, ``prior_flow`` and ``noise`` are those of ``start``; the paper trains
        from a random start: ``noise`` = one tensor, uniform within +-16 px, at 1/16.
        ``checkpointed`` keeps nothing of an iteration but its results and computes the rest
        again in the backward pass: a third more time for a small part of the memory.
        """
        check_images(image1, image2)
        stacked = self.encode(torch.cat([image1, image2]))  # no norm mixes the samples
        batch = image1.shape[0]
        state = self.start(
            Features(tuple(values[:batch] for values in stacked.tensors), stacked.size),
            Features(tuple(values[batch:] for values in stacked.tensors), stacked.size),
            prior_flow=prior_flow, iterations=iterations, noise=noise)
        flows: list[Tensor] = []
        while state.schedule:
            state = self._on_the_next_level(state, self.engine)
            hidden, *kept = state.memory
            inputs = (_at(state.features_a, state.level), _at(state.features_b, state.level),
                      *kept[:len(SHARES)], hidden, state.flow)
            if checkpointed:
                hidden, flow, *fine = checkpoint(self._iteration, *inputs, use_reentrant=False,
                                                 preserve_rng_state=False)
            else:
                hidden, flow, *fine = self._iteration(*inputs)
            flows += [_to_image(values, state) for values in fine]
            state = state.advanced(flow=flow, memory=(hidden, *kept))
        return flows

    def _iteration(self, features_a: Tensor, features_b: Tensor,
                   *others: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what ``step_engine`` does, and both of its flows at four times their size."""
        *shares, hidden, flow = others
        hidden, flow = self._propagate(features_a, features_b, shares[:3], hidden, flow)
        propagated = self.update_block_s.upsample(hidden, flow)
        hidden, flow = self._search(features_a, features_b, shares[3:], hidden, flow)
        return hidden, flow, propagated, self.update_block.upsample(hidden, flow)

    def _on_the_next_level(self, state: State, run: Call) -> State:
        """Return ``state`` on the level of its next step."""
        level = state.schedule[0].level
        if level == state.level:
            return state
        fine, = run('upsample', state.memory[0], state.flow)
        flow = _resize(fine, _map(state.features_a, level))
        return self._enter(state, level, flow, state.memory[1 + len(SHARES):], run)

    def _iterations(self, iterations: int | None) -> int:
        if iterations is None:
            return self.default_iterations
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f'iterations must be a whole number of at least 1 per level (the '
                             f'default is {self.default_iterations}); seen {iterations!r}')
        return iterations

    def _noise(self, features: Features, levels: tuple[int, ...], *,
               warm: bool) -> tuple[Tensor, ...]:
        """Return what the configuration adds to the flow at the start of each level."""
        device = features.tensors[0].device
        if not warm:
            if self.config.start_flow == 'zeros':
                return ()
            return (fixed_pattern(_map(features, levels[0])).to(device) * START_AMPLITUDE,)
        if self.config.warm_noise == 0:
            return ()
        return tuple(fixed_pattern(_map(features, level)).to(device)
                     * (self.config.warm_noise * (REFINE_AMPLITUDE if index else START_AMPLITUDE))
                     for index, level in enumerate(levels))

    @staticmethod
    def _enter(state: State, level: int, flow: Tensor, noise: tuple[Tensor, ...],
               run: Call) -> State:
        """Return ``state`` at the start of ``level``: hidden state and context are fresh.

        Of the context, what it adds to the GRUs is kept: it is all that the steps need of it.
        The cold schedule pools hidden state and context after their activation, the warm one
        before; that is how the weights were trained and how they are used.
        """
        if noise:
            flow = flow + noise[0].to(flow)
        quarter = state.features_a.tensors[0]
        source = _at(state.features_a, level) if state.warm else quarter
        hidden, context = source.split([HIDDEN, FEATURES - HIDDEN], dim=1)
        hidden, context = torch.tanh(hidden), torch.relu(context)
        pool = level // 4
        if not state.warm and pool > 1:
            hidden = functional.avg_pool2d(hidden, pool)
            context = functional.avg_pool2d(context, pool)
        return State(state.features_a, state.features_b, level=level, flow=flow,
                     schedule=state.schedule, done=state.done, warm=state.warm,
                     memory=(hidden, *run('context', context), *noise[1:]))


def fixed_pattern(size: tuple[int, int]) -> Tensor:
    """Return the released start pattern of one map size: (1, 2, h, w), uniform in -1..1.

    Drawn from a generator of its own, so it neither reads nor moves the global one.
    """
    generator = torch.Generator().manual_seed(PATTERN_SEED)
    return torch.empty(1, 2, *size).uniform_(-1, 1, generator=generator)


def warm_levels(prior_flow: Tensor, quarter: tuple[int, int]) -> tuple[int, ...]:
    """Return the levels of a warm start, coarse to fine, for a 1/4 map of size ``quarter``."""
    largest = float(prior_flow.abs().max())
    wanted = min(len(WARM_LEVELS), max(1, math.ceil(largest / WARM_LEVEL_PX)))
    height, width = quarter
    count = 1
    while count < wanted and max(height, width) >= WARM_SMALLEST_SIDE:
        height, width, count = height // 2, width // 2, count + 1
    return WARM_LEVELS[-count:]


def _check_noise(noise: Sequence[Tensor], shapes: list[tuple[int, ...]]) -> None:
    seen = [tuple(tensor.shape) for tensor in noise]
    fits = [one[1:] == wanted[1:] and one[0] in (1, wanted[0])
            for one, wanted in zip(seen, shapes)]
    if len(seen) != len(shapes) or not all(fits):
        raise ValueError(f'noise must be one tensor for each level that starts with noise, '
                         f'coarse to fine: {shapes}, or a batch of 1; seen {seen}')


def _padding(height: int, width: int) -> tuple[int, int, int, int]:
    """Return the centred pad (left, right, top, bottom) to multiples of 16."""
    across, down = -width % PAD_MULTIPLE, -height % PAD_MULTIPLE
    return across // 2, across - across // 2, down // 2, down - down // 2


def _at(features: Features, level: int) -> Tensor:
    """Return the map of ``level`` (4, 8 or 16)."""
    return features.tensors[WARM_LEVELS[::-1].index(level)]


def _map(features: Features, level: int) -> tuple[int, int]:
    """Return (height, width) of the map of ``level``."""
    height, width = _at(features, level).shape[-2:]
    return height, width


def _resize(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``flow`` as the released network does: corners aligned, one ratio, of heights."""
    height, width = flow.shape[-2:]
    if (height, width) == size:
        return flow
    resized = functional.interpolate(flow, size=size, mode='bilinear', align_corners=True)
    return resized * (size[0] / height)


def _on_map(prior: CellFlow, size: tuple[int, int]) -> Tensor:
    """Return ``prior`` on a map of ``size`` of the padded frame, in px of the map."""
    padding = _padding(*prior.size)
    if prior.cell == 1:
        return _resize(functional.pad(prior.flow, padding, mode='replicate'), size)
    # What the above comes to, without the full resolution.
    height, width = prior.size[0] + sum(padding[2:]), prior.size[1] + sum(padding[:2])
    x, y = (torch.linspace(-before, side - before - 1, count, device=prior.flow.device)
            for before, side, count in ((padding[0], width, size[1]),
                                        (padding[2], height, size[0])))
    return prior.at(x, y) * (size[0] / height)


def _to_image(fine: Tensor, state: State) -> Tensor:
    """Bring ``fine``, four times the size of the state's map, to the frame without its pad."""
    height, width = state.features_a.size
    left, right, top, bottom = _padding(height, width)
    full = _resize(fine, (height + top + bottom, width + left + right))
    return full[:, :, top:top + height, left:left + width]
