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

"""MSCSL: multi-scale correspondence structure learning (Zhao et al., IJCAI 2017).

There is no public code and there are no public weights: what follows is the paper as far as it
goes, and this project's definition where it is silent.

The paper's: a siamese encoder of a 7x7 and two 5x5 convolutions (equation 1) and of poolings and
3x3 convolutions to four scales (equation 2); correlations with maximum displacements 5, 5, 10
and 10, coarse to fine (equations 3 and 4, here with k = 0); three convolutions on each
(equation 5: Q); the spatial Conv-GRU from coarse to fine, one set of weights for all scales
(equations 6 to 9), its state brought to the next scale by a 4x4 transposed convolution
(equation 10); all states H brought to one size and concatenated with the second convolution's
map of the first image (equations 11 and 12); convolutions that read the flow off them
(equation 13); the losses (equations 14 to 16) are in ``flow_ros.training.objectives.mscsl``.

This project's: the channels (``MSCSLConfig``); the scales 1/64 to 1/8, from Y at 1/8 by
max-pooling with windows of 8, 4, 2 and 1 and one convolution each, without an activation, so
that features may point away from each other; correlations as means over the channels, times
sqrt(C), so that independent features of unit variance give a correlation of unit variance (and
with ``normalise`` they are made so, pixel by pixel, which is not the paper's);
leaky ReLU of 0.1; no normalisation layers, and therefore He's initialisation, the transposed
convolutions starting as bilinear interpolation and the last convolution near zero; biases in W
but not in U; H_0 = 0; the states (equation 11) are brought to 1/4 bilinearly, the head has two
convolutions, its flow at 1/4 is in units of 20 px and goes to full resolution bilinearly; the
input is RGB in [-1, 1], replicated to multiples of 64.

Variants: 'full' and 'wor' are one network (they differ in training: with and without the
reconstruction loss); 'wosr' has neither the Conv-GRU nor that loss, but FlowNet's refinement
(Dosovitskiy et al., ICCV 2015, section 3): at each scale deconvolve the features, put Q of the
next scale and the upsampled flow beside them.

A budget is the number of scales: 1/64 alone up to all four. Scales left out are zeros in
equation 12 (this project's; it is trained for, by leaving scales out at random).
"""

from dataclasses import dataclass

import torch
from torch import nn, Tensor
from torch.nn import functional

from flow_ros.networks.base import (
    Call,
    check_pair,
    Features,
    FlowNetwork,
    FlowOutput,
    PriorFlow,
    State,
    Step,
)
from flow_ros.ops.matching import local_search
from flow_ros.ops.sampling import pad_to_multiple

VARIANTS = ('full', 'wor', 'wosr')
SCALES = (64, 32, 16, 8)
"""1/64 to 1/8, coarse to fine."""


@dataclass(frozen=True)
class MSCSLConfig:
    """Variant and channels of MSCSL."""

    variant: str = 'full'
    """'full' or 'wor' (the same network), or 'wosr' (FlowNet's refinement, no Conv-GRU)."""
    widths: tuple[int, int, int] = (64, 128, 256)
    """Channels of the first three convolutions, at 1/2, 1/4 and 1/8."""
    features: int = 256
    """Channels that are correlated, at each scale."""
    state: int = 128
    """Channels of Q and of H."""
    head: int = 64
    """Channels between the two last convolutions; in 'wosr', of the deconvolutions."""
    radii: tuple[int, int, int, int] = (5, 5, 10, 10)
    """Maximum displacements, level px, coarse to fine."""
    flow_scale: float = 20.0
    """What one unit of the head's output is, px."""
    normalise: bool = False
    """Correlate features of zero mean and unit variance over the channels; this project's."""

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        if self.variant not in VARIANTS:
            raise ValueError(f'variant must be one of {VARIANTS}; seen {self.variant!r}')
        for name, count in (('widths', 3), ('radii', len(SCALES))):
            values = tuple(getattr(self, name))  # a list, where it comes from JSON or YAML
            object.__setattr__(self, name, values)
            if len(values) != count or not all(isinstance(value, int) and value >= 1
                                               for value in values):
                raise ValueError(f'{name} must be {count} whole numbers of at least 1; seen '
                                 f'{values!r}')
        for name in ('features', 'state', 'head'):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(f'{name} must be a whole number of at least 1; seen '
                                 f'{getattr(self, name)!r}')
        if not isinstance(self.normalise, bool):
            raise ValueError(f'normalise must be true or false; seen {self.normalise!r}')
        if not self.flow_scale > 0:
            raise ValueError(f'flow_scale must be positive; seen {self.flow_scale!r}')


@dataclass(frozen=True)
class Predictions:
    """What training sees of one pass.

    ``flow`` (B, 2, H, W) px; ``matches``: (level, correlation (B, (2r+1)^2, H/l, W/l), radius)
    of each scale used; ``maps``: conv2's of both images, (B, C, H/4, W/4); ``coarser``: what
    FlowNet's refinement predicts on the way, (level, flow in level px).
    """

    flow: Tensor
    matches: list[tuple[int, Tensor, int]]
    maps: tuple[Tensor, Tensor]
    coarser: list[tuple[int, Tensor]]


def activate(x: Tensor) -> Tensor:
    """Return leaky ReLU of 0.1, of any shape."""
    return functional.leaky_relu(x, 0.1)


def standardise(features: Tensor) -> Tensor:
    """Return ``features`` (B, C, h, w) less their mean over the channels, over their deviation."""
    centred = features.float() - features.float().mean(dim=1, keepdim=True)
    variance = (centred * centred).mean(dim=1, keepdim=True)
    return (centred * torch.rsqrt(variance + 1e-2)).to(features.dtype)


class Encoder(nn.Module):
    """Equations 1 and 2: image -> the second convolution's map, F at four scales."""

    def __init__(self, config: MSCSLConfig) -> None:
        super().__init__()
        half, quarter, eighth = config.widths
        self.conv1 = nn.Conv2d(3, half, 7, 2, 3)
        self.conv2 = nn.Conv2d(half, quarter, 5, 2, 2)
        self.conv3 = nn.Conv2d(quarter, eighth, 5, 2, 2)
        self.scales = nn.ModuleList(nn.Conv2d(eighth, config.features, 3, padding=1)
                                    for _ in SCALES)

    def forward(self, image: Tensor, count: int = len(SCALES)) -> tuple[Tensor, ...]:
        """(B, 3, H, W), RGB 0..255 -> conv2 at 1/4, then F of the ``count`` coarsest scales."""
        x = (image * (2 / 255) - 1).to(self.conv1.weight.dtype)
        x = activate(self.conv1(x))  # (B, 64, H/2, W/2)
        second = activate(self.conv2(x))  # (B, 128, H/4, W/4)
        pooled = [activate(self.conv3(second))]  # Y: (B, 256, H/8, W/8)
        while len(pooled) < len(SCALES):
            pooled.insert(0, functional.max_pool2d(pooled[0], 2))
        return (second, *(conv(x) for conv, x in zip(self.scales, pooled[:count])))


class Correspondence(nn.Module):
    """Equations 4 and 5 at one scale: (F of A, F of B) -> Q."""

    def __init__(self, config: MSCSLConfig, radius: int) -> None:
        super().__init__()
        self.radius = radius
        self.scale = config.features ** 0.5
        self.normalise = config.normalise
        state = config.state
        self.conv1 = nn.Conv2d((2 * radius + 1) ** 2, state, 3, padding=1)
        self.conv2 = nn.Conv2d(state, state, 3, padding=1)
        self.conv3 = nn.Conv2d(state, state, 3, padding=1)

    def correlate(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """Return M (B, (2r+1)^2, h, w), dx fastest, zero outside the image."""
        if self.normalise:
            features_a, features_b = standardise(features_a), standardise(features_b)
        return local_search(features_a, features_b, self.radius) * self.scale

    def forward(self, correlation: Tensor) -> Tensor:
        """M -> Q (B, C, h, w)."""
        x = activate(self.conv2(activate(self.conv1(correlation))))
        return activate(self.conv3(x))


class SpatialConvGru(nn.Module):
    """Equations 6 to 10, the same weights at all scales."""

    def __init__(self, state: int) -> None:
        super().__init__()
        self.input = nn.Conv2d(state, 3 * state, 3, padding=1)  # Wz, Wr, W
        self.gates = nn.Conv2d(state, 2 * state, 3, padding=1, bias=False)  # Uz, Ur
        self.candidate = nn.Conv2d(state, state, 3, padding=1, bias=False)  # U
        self.up = nn.ConvTranspose2d(state, state, 4, 2, 1)  # W up

    def first(self, q: Tensor) -> Tensor:
        """Return H of the coarsest scale: what ``forward`` returns for a state of zeros."""
        z, _, candidate = self.input(q).chunk(3, dim=1)
        return torch.sigmoid(z) * torch.tanh(candidate)

    def forward(self, q: Tensor, coarser: Tensor) -> Tensor:
        """(Q_l (B, C, h, w), H_{l-1} (B, C, h/2, w/2)) -> H_l (B, C, h, w)."""
        previous = self.up(coarser)  # (B, C, h, w)
        z, r, candidate = self.input(q).chunk(3, dim=1)
        gate_z, gate_r = self.gates(previous).chunk(2, dim=1)
        z, r = torch.sigmoid(z + gate_z), torch.sigmoid(r + gate_r)
        candidate = torch.tanh(candidate + self.candidate(r * previous))
        return (1 - z) * previous + z * candidate


class Head(nn.Module):
    """Equations 11 to 13: conv2's map and the four H -> flow at 1/4."""

    def __init__(self, config: MSCSLConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config.widths[1] + len(SCALES) * config.state, config.head, 3,
                               padding=1)
        self.flow = nn.Conv2d(config.head, 2, 3, padding=1)

    def forward(self, second: Tensor, states: list[Tensor]) -> list[tuple[int, Tensor]]:
        """Return [(4, flow (B, 2, H/4, W/4) in the head's units)]."""
        size = (second.shape[-2], second.shape[-1])
        maps = [functional.interpolate(state, size=size, mode='bilinear', align_corners=False)
                for state in states]
        x = activate(self.conv1(torch.cat([second, *maps], dim=1)))  # (B, 64, H/4, W/4)
        return [(4, self.flow(x))]


class Refinement(nn.Module):
    """FlowNet's refinement, in place of the Conv-GRU: conv2's map and the four Q -> flow."""

    def __init__(self, config: MSCSLConfig) -> None:
        super().__init__()
        skips = (config.state,) * len(SCALES) + (config.widths[1],)
        inputs = [config.state] + [config.head + skip + 2 for skip in skips[1:]]
        self.flows = nn.ModuleList(nn.Conv2d(count, 2, 3, padding=1) for count in inputs)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(count, config.head, 4, 2, 1)
                                 for count in inputs[:-1])
        self.flow_ups = nn.ModuleList(nn.ConvTranspose2d(2, 2, 4, 2, 1) for _ in inputs[:-1])

    def forward(self, second: Tensor, states: list[Tensor]) -> list[tuple[int, Tensor]]:
        """Return (level, flow in the head's units) for 1/64 to 1/4."""
        x = states[0]
        flows: list[tuple[int, Tensor]] = [(SCALES[0], self.flows[0](x))]
        for index, skip in enumerate([*states[1:], second]):
            finer = self.flow_ups[index](flows[-1][1])
            x = torch.cat([skip, activate(self.ups[index](x)), finer], dim=1)
            flows.append((flows[-1][0] // 2, self.flows[index + 1](x)))
        return flows


class MSCSL(FlowNetwork):
    """Multi-scale correspondence structure learning; see the module's docstring.

    Engines: ``encode`` (image, sides multiples of 64) -> conv2's map at 1/4, F at 1/64, 1/32,
    1/16 and 1/8; ``step0`` (F of a, F of b) -> H at 1/64; ``step1`` to ``step3`` (F of a, F of
    b, the coarser H) -> H of their scale; ``finish`` (conv2's map, the four H) -> flow (px).
    In 'wosr' H is Q, and ``step1`` to ``step3`` need no coarser one.

    ``State.flow`` stays zero: the scales are matched about zero flow, and it is ``finish`` that
    reads one flow off all of them. ``State.memory`` are the H so far.
    """

    name = 'mscsl'
    default_iterations = len(SCALES)
    most_iterations = len(SCALES)
    engines = ('encode', 'step0', 'step1', 'step2', 'step3', 'finish')
    accepts_prior = False
    budget_unit = 'scales'
    free_options = frozenset({'variant'})  # 'full' is trained from 'wor'; 'wosr' has other keys
    tensor_names = {
        'encode': (('image',), ('second', *(f'features_{level}' for level in SCALES))),
        'step0': (('features_a', 'features_b'), ('state',)),
        **{f'step{index}': (('features_a', 'features_b', 'coarser'), ('state',))
           for index in range(1, len(SCALES))},
        'finish': (('second', *(f'state_{level}' for level in SCALES)), ('full_flow',))}

    def __init__(self, config: MSCSLConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MSCSLConfig()
        self.encoder = Encoder(config)
        self.correspondences = nn.ModuleList(Correspondence(config, radius)
                                             for radius in config.radii)
        refined = config.variant == 'wosr'
        self.gru = None if refined else SpatialConvGru(config.state)
        self.head: nn.Module = Refinement(config) if refined else Head(config)
        _initialise(self)

    def encode(self, image: Tensor, *, call: Call | None = None) -> Features:
        """Return the features of ``image`` (B, 3, H, W), float RGB 0..255."""
        size = (image.shape[-2], image.shape[-1])
        tensors = (call or self.engine)('encode', pad_to_multiple(image, SCALES[0]))
        return Features(tensors=tensors, size=size)

    def start(self, features_a: Features, features_b: Features, *,
              prior_flow: PriorFlow | None = None, iterations: int | None = None,
              call: Call | None = None) -> State:
        """Start cold; ``iterations`` is the number of scales, more than 4 count as 4.

        Raises ValueError for a prior: there is nothing in MSCSL that could use it.
        """
        if prior_flow is not None:
            raise ValueError('mscsl takes no prior flow: its correlations are about zero flow; '
                             'start cold, or choose a network that accepts a prior')
        count = len(SCALES) if iterations is None else iterations
        if count < 1:
            raise ValueError(f'iterations (here the number of scales) must be at least 1; seen '
                             f'{count}')
        coarsest = features_a.tensors[1]
        check_pair(features_a, features_b)
        return State(features_a, features_b, level=SCALES[0], flow=_still(coarsest),
                     schedule=tuple(Step(level, 'scale') for level in SCALES[:count]))

    def step(self, state: State, *, call: Call | None = None) -> State:
        """Match at the next scale and take it into the GRU."""
        if not state.schedule:
            raise ValueError(f'all {len(state.done)} scales of this state are done: call '
                             f'finish, or start again with more iterations')
        index = len(state.done)
        features = [frame.tensors[1 + index] for frame in (state.features_a, state.features_b)]
        coarser = state.memory[-1:] if self.gru is not None else ()
        encoded, = (call or self.engine)(f'step{index}', *features, *coarser)
        return state.advanced(level=SCALES[index], flow=_still(features[0]),
                              memory=(*state.memory, encoded))

    def finish(self, state: State, *, call: Call | None = None) -> FlowOutput:
        """Return full-resolution flow, cropped to the frame; scales not done are zeros."""
        second, *features = state.features_a.tensors
        states = list(state.memory)
        for left_out in features[len(states):]:
            shape = (left_out.shape[0], self.config.state, *left_out.shape[-2:])
            states.append(left_out.new_zeros(shape))
        flow, = (call or self.engine)('finish', second, *states)
        height, width = state.features_a.size
        return FlowOutput(flow=flow[..., :height, :width])

    def encode_engine(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> conv2's map at 1/4, then F at 1/64 to 1/8."""
        return self.encoder(image)

    def step0_engine(self, features_a: Tensor, features_b: Tensor) -> tuple[Tensor]:
        """F of both frames at 1/64 -> H."""
        return (self._encoded(0, features_a, features_b)[0],)

    def step1_engine(self, *tensors: Tensor) -> tuple[Tensor]:
        """F of both frames at 1/32, H at 1/64 -> H."""
        return (self._encoded(1, *tensors)[0],)

    def step2_engine(self, *tensors: Tensor) -> tuple[Tensor]:
        """F of both frames at 1/16, H at 1/32 -> H."""
        return (self._encoded(2, *tensors)[0],)

    def step3_engine(self, *tensors: Tensor) -> tuple[Tensor]:
        """F of both frames at 1/8, H at 1/16 -> H."""
        return (self._encoded(3, *tensors)[0],)

    def finish_engine(self, second: Tensor, *states: Tensor) -> tuple[Tensor]:
        """(conv2's map at 1/4, H at 1/64 to 1/8) -> flow (B, 2, H, W), px."""
        return (self._full_size(self.head(second, list(states))[-1][1]),)

    def predictions(self, image1: Tensor, image2: Tensor, *,
                    scales: int = len(SCALES)) -> Predictions:
        """Run with what training needs kept; sides multiples of 64.

        Both images pass the encoder stacked on the batch. ``scales`` of them are used.
        """
        batch = image1.shape[0]
        height, width = image1.shape[-2:]
        if height % SCALES[0] or width % SCALES[0]:
            raise ValueError(f'sides must be multiples of {SCALES[0]} px to train on; seen '
                             f'{height}x{width}: choose another crop')
        second, *features = self.encoder(torch.cat([image1, image2]), scales)
        matches: list[tuple[int, Tensor, int]] = []
        states: list[Tensor] = []
        for index, both in enumerate(features):
            encoded, correlation = self._encoded(index, both[:batch], both[batch:], *states[-1:])
            states.append(encoded)
            matches.append((SCALES[index], correlation, self.config.radii[index]))
        for level in SCALES[scales:]:
            states.append(states[0].new_zeros(
                (batch, self.config.state, height // level, width // level)))
        flows = self.head(second[:batch], states)
        coarser = [(level, flow * (self.config.flow_scale / level)) for level, flow in flows[:-1]]
        return Predictions(flow=self._full_size(flows[-1][1]), matches=matches, coarser=coarser,
                           maps=(second[:batch], second[batch:]))

    def _encoded(self, index: int, features_a: Tensor, features_b: Tensor,
                 *coarser: Tensor) -> tuple[Tensor, Tensor]:
        """Return H (in 'wosr' Q) and the correlation of scale ``index``."""
        correspondence = self.correspondences[index]
        assert isinstance(correspondence, Correspondence)
        correlation = correspondence.correlate(features_a, features_b)
        q = correspondence(correlation)
        if self.gru is None:
            return q, correlation
        if index == 0:
            return self.gru.first(q), correlation
        return self.gru(q, *coarser), correlation

    def _full_size(self, flow: Tensor) -> Tensor:
        """Flow at 1/4 in the head's units -> (B, 2, H, W), px."""
        # In single precision: half a px of bfloat16 is lost at 100 px.
        return functional.interpolate(flow.float() * self.config.flow_scale, scale_factor=4.0,
                                      mode='bilinear', align_corners=False)


def _still(like: Tensor) -> Tensor:
    """Return zero flow (B, 2, h, w) on the grid of ``like``."""
    return like.new_zeros((like.shape[0], 2, *like.shape[-2:]), dtype=torch.float32)


@torch.no_grad()
def _initialise(network: MSCSL) -> None:
    """Set the initial weights; the module's docstring says why these."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.1, nonlinearity='leaky_relu')
        elif isinstance(module, nn.ConvTranspose2d):
            # Bilinear interpolation, each output channel from its own input channel.
            tap = torch.tensor([0.25, 0.75, 0.75, 0.25])
            module.weight.zero_()
            for channel in range(min(module.weight.shape[:2])):
                module.weight[channel, channel] = tap[:, None] * tap[None]
        else:
            continue
        if module.bias is not None:
            module.bias.zero_()
    for conv in network.encoder.scales:
        assert isinstance(conv, nn.Conv2d)
        nn.init.kaiming_normal_(conv.weight, nonlinearity='linear')
    if network.gru is not None:
        for conv in (network.gru.input, network.gru.gates, network.gru.candidate):
            nn.init.kaiming_normal_(conv.weight, nonlinearity='linear')
    last = network.head.flow if isinstance(network.head, Head) else None
    flows = [last] if last is not None else list(network.head.flows)  # type: ignore[arg-type]
    for conv in flows:
        conv.weight.mul_(0.1)
