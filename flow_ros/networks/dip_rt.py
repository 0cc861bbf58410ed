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

"""DIP-RT: the compact real-time member of the DIP family, and the project's default.

From DIP (Zheng et al., CVPR 2022) it keeps the inverse patchmatch: in each iteration an
inverse propagation (equations 5 and 6, in the paper's clean form, which the released DIP does
not compute), then a local search (equation 7), with one set of update weights for all levels
and the source features themselves as context (section 3.4). What is our own, for speed:

- the levels are 1/16 and 1/8, each with features of its own from one encoder pass;
- the search radius is 4: a cold start reaches 64 px per iteration at 1/16;
- the gated update has no reset gate, the propagation updates the flow only, and the context
  enters as a constant summand that the encoder has already computed;
- convex upsampling by 8 (RAFT, section 3.3) of the flow, and with the same mask of the
  parameters of a mixture of two Laplace distributions of the error (SEA-RAFT, section 3.2)
  and of the occlusion logit.

The features of a frame serve it as source and as target: on a stream each is encoded once.

``DipRtConfig`` also makes the variants of DIP's ablations (Tables 1 to 3), which
``bench/ablations.py`` compares. The shipped weights fit its defaults.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn, Tensor
from torch.nn import functional

from flow_ros.networks.base import (
    Call,
    check_prior,
    Features,
    FlowNetwork,
    FlowOutput,
    PriorFlow,
    State,
    Step,
)
from flow_ros.ops.exporting import runs_on_cpu
from flow_ros.ops.matching import (
    clean_propagation,
    EIGHT_SEEDS,
    inverse_propagation,
    local_search,
    SEEDS,
    Seeds,
)
from flow_ros.ops.sampling import inside, pad_to_multiple, resize_flow, warp
from flow_ros.ops.upsampling import convex_cells, convex_upsample, spread

PROPAGATIONS = ('inverse', 'clean', 'none')
NEIGHBOURS: dict[int, Seeds] = {4: SEEDS, 8: EIGHT_SEEDS}


@dataclass(frozen=True)
class DipRtConfig:
    """Widths (channels) of DIP-RT, and how its iteration matches."""

    widths: tuple[int, int, int, int] = (24, 32, 80, 128)
    """Channels of the encoder at 1/2, 1/4, 1/8 and 1/16."""
    match: int = 64
    hidden: int = 64
    motion: int = 40
    radius: int = 4
    """Of the local search, level px."""
    propagation: str = 'inverse'
    """'inverse' (equations 5 and 6), 'clean' (equation 3: the neighbours' flows), 'none'."""
    seeds: int = 4
    """Neighbours that propagate: 4 (the diagonal ones) or 8."""
    search: bool = True
    """False: no local search; the gated update reads the propagation's costs instead."""
    warm_level_px: float = 64.0
    """A prior with motion above this (full-resolution px) is refined at 1/16 first."""
    warm_level_trust: float = 0.75
    """And so is one of a flow that could be trusted less than this, in the mean. What went wrong
    there is out of the reach of 1/8 by now: on procedural sequences that is a tenth more frames,
    and all but a tenth of what 1/16 gains on every frame."""

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        if self.propagation not in PROPAGATIONS:
            raise ValueError(f'propagation must be one of {PROPAGATIONS}; seen '
                             f'{self.propagation!r}')
        if self.seeds not in NEIGHBOURS:
            raise ValueError(f'seeds must be one of {tuple(NEIGHBOURS)}; seen {self.seeds!r}')
        if isinstance(self.radius, bool) or self.radius not in range(1, 9):
            raise ValueError(f'radius must be a whole number of level px, 1 to 8; seen '
                             f'{self.radius!r}')
        if self.propagation == 'none' and not self.search:
            raise ValueError('propagation none without search leaves nothing to match by: '
                             'choose a propagation, or search=True')

    @property
    def seed_steps(self) -> Seeds:
        """Return the steps (x, y) to the seeds: the pixel itself first."""
        return NEIGHBOURS[self.seeds]

    @property
    def planes(self) -> int:
        """Return how many costs the gated update reads."""
        return (2 * self.radius + 1) ** 2 if self.search else len(self.seed_steps)


@dataclass(frozen=True)
class Predictions:
    """What training sees of one pass.

    ``levels``: after every propagation and search (level, flow (B, 2, H/l, W/l) in level px).
    ``matches``: for every search (level, costs (B, (2r+1)^2, H/l, W/l), the flow before it);
    of a network without search, for every propagation, its costs (B, 1 + seeds, H/l, W/l).
    ``flow`` (B, 2, H, W) px; ``error`` (B, 2, H, W): the logit of the sharp component and the
    log scale of the wide one; ``occlusion`` (B, 1, H, W): logit. Padded grid.
    """

    levels: list[tuple[int, Tensor]]
    matches: list[tuple[int, Tensor, Tensor]]
    flow: Tensor
    error: Tensor
    occlusion: Tensor


class ConvNorm(nn.Sequential):
    """Convolution and batch norm, which a runtime folds into the convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
                         nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/stride, W/stride)."""
        conv, norm = self
        if (self.training or not isinstance(norm, nn.BatchNorm2d)  # folded by an export
                or not runs_on_cpu(x, norm.weight)):
            return super().forward(x)
        assert isinstance(conv, nn.Conv2d)
        assert norm.running_mean is not None and norm.running_var is not None
        # The norm of the weights instead of the map: a pass over it less, a tenth of the encoder
        # in torch. Compilers do that themselves. Nothing is kept: weights may change.
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return functional.conv2d(x, conv.weight * scale[:, None, None, None],
                                 norm.bias - norm.running_mean * scale, conv.stride,
                                 conv.padding)


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs, 3, stride)
        self.conv2 = ConvNorm(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/stride, W/stride)."""
        y = self.conv2(functional.relu(self.conv1(x)))
        return functional.relu(y + self.shortcut(x))


class Encoder(nn.Module):
    """Image -> (match, hidden, context) at 1/16 and at 1/8; the finer map sees the coarser."""

    def __init__(self, config: DipRtConfig) -> None:
        super().__init__()
        half, quarter, eighth, sixteenth = config.widths
        self.stem = ConvNorm(3, half, 5, 2)
        self.down4 = ConvNorm(half, quarter, 3, 2)
        self.layer4 = Residual(quarter, quarter)
        self.layer8 = nn.Sequential(Residual(quarter, eighth, 2), Residual(eighth, eighth))
        self.layer16 = nn.Sequential(Residual(eighth, sixteenth, 2),
                                     Residual(sixteenth, sixteenth))
        self.lateral = ConvNorm(sixteenth, eighth, 1)
        self.splits = (config.match, config.hidden, config.hidden)
        self.head8 = nn.Conv2d(eighth, sum(self.splits), 1)
        self.head16 = nn.Conv2d(sixteenth, sum(self.splits), 1)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W), RGB 0..255 -> match, hidden, context at 1/16, then at 1/8."""
        x = (image * (2 / 255) - 1).to(self.head8.weight.dtype)
        x = functional.relu(self.stem(x))  # (B, 24, H/2, W/2)
        x = functional.relu(self.down4(x))  # (B, 32, H/4, W/4)
        x8 = self.layer8(self.layer4(x))  # (B, 80, H/8, W/8)
        x16 = self.layer16(x8)  # (B, 128, H/16, W/16)
        coarse = functional.interpolate(self.lateral(x16), scale_factor=2, mode='bilinear',
                                        align_corners=False)
        x8 = functional.relu(x8 + coarse)
        outputs: list[Tensor] = []
        for x, head in ((x16, self.head16), (x8, self.head8)):
            match, hidden, context = self._heads(head, x)
            outputs += [match, torch.tanh(hidden), context]
        return tuple(outputs)

    def _heads(self, head: nn.Conv2d, x: Tensor) -> tuple[Tensor, ...]:
        """Return match, hidden, context before their activations."""
        if not runs_on_cpu(x, head.weight):
            return head(x).split(self.splits, dim=1)
        # Each by a convolution of its own: cutting one result up is a copy of all of it.
        assert head.bias is not None
        return tuple(functional.conv2d(x, weight, bias) for weight, bias in
                     zip(head.weight.split(self.splits), head.bias.split(self.splits)))


def convolve_both(conv: nn.Conv2d, first: Tensor, second: Tensor) -> Tensor:
    """Return what ``conv`` makes of the channels of ``first``, then those of ``second``.

    ``conv`` has stride 1 and one group. On a CPU each has its share of the convolution, whose sum
    costs less than joining the two: OpenVINO adds the one while it computes the other.
    """
    if not runs_on_cpu(first, second, conv.weight):
        return conv(torch.cat([first, second], dim=1))
    channels = first.shape[1]
    return (functional.conv2d(first, conv.weight[:, :channels], conv.bias, padding=conv.padding)
            + functional.conv2d(second, conv.weight[:, channels:], padding=conv.padding))


class Propagation(nn.Module):
    """From the seeds' costs to a small correction of the flow."""

    def __init__(self, config: DipRtConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.hidden + len(config.seed_steps) + 2, 32, 3, padding=1)
        self.flow = nn.Conv2d(32, 2, 3, padding=1)

    def forward(self, hidden: Tensor, costs: Tensor, flow: Tensor) -> Tensor:
        """Return the change of the flow (B, 2, H, W), level px."""
        found = torch.cat([costs.to(hidden.dtype), flow.to(hidden.dtype)], dim=1)
        return self.flow(functional.relu(convolve_both(self.conv, hidden, found)))


class Search(nn.Module):
    """From the local search's costs to a new hidden state and a change of the flow."""

    def __init__(self, config: DipRtConfig) -> None:
        super().__init__()
        hidden, motion = config.hidden, config.motion
        self.costs = nn.Conv2d(config.planes, 64, 1)
        self.displacement = nn.Conv2d(2, 16, 3, padding=1)
        self.motion = nn.Conv2d(64 + 16, motion, 3, padding=1)
        self.mix = nn.Conv2d(hidden + motion, hidden, 3, padding=1)
        self.gate = nn.Conv2d(hidden, hidden, 1)
        self.candidate = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.flow = nn.Sequential(nn.Conv2d(hidden, 32, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(32, 2, 3, padding=1))

    def forward(self, hidden: Tensor, context: Tensor, costs: Tensor,
                flow: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden state (B, C, H, W) and the change of the flow (B, 2, H, W)."""
        costs = functional.relu(self.costs(costs))
        displacement = functional.relu(self.displacement(flow.to(costs.dtype)))
        motion = functional.relu(self.motion(torch.cat([costs, displacement], dim=1)))
        x = functional.relu(convolve_both(self.mix, hidden, motion) + context)
        gate = torch.sigmoid(self.gate(x))
        hidden = hidden + gate * (torch.tanh(self.candidate(x)) - hidden)
        return hidden, self.flow(hidden)


class DipRt(FlowNetwork):
    """The compact real-time network; see the module's docstring.

    Engines: ``encode`` (image, sides multiples of 16) -> match, hidden, context at 1/16 and at
    1/8; ``step`` (match of a, match of b, context, hidden, flow) -> hidden, flow, one iteration
    at either level; ``finish`` (hidden, flow at 1/8) -> flow (px), confidence, occlusion.
    """

    name = 'dip_rt'
    default_iterations = 4
    free_options = frozenset({'warm_level_px', 'warm_level_trust'})
    takes_calibration = True
    tensor_names = {
        'encode': (('image',), ('match_16', 'hidden_16', 'context_16',
                                'match_8', 'hidden_8', 'context_8')),
        'step': (('match_a', 'match_b', 'context', 'hidden', 'flow'),
                 ('next_hidden', 'next_flow')),
        'finish': (('hidden', 'flow'), ('full_flow', 'confidence', 'occlusion'))}
    calibration: Tensor

    def __init__(self, config: DipRtConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DipRtConfig()
        self.encoder = Encoder(config)
        both = config.search and config.propagation != 'none'
        self.propagation = Propagation(config) if both else None
        self.search = Search(config)
        self.fine = nn.Conv2d(config.hidden, 64, 3, padding=1)
        self.mask = nn.Conv2d(64, 9 * 64, 1)
        self.quality = nn.Conv2d(64, 3, 1)
        # Fitted after training on held-out scenes: calibrated = sigmoid(a logit(p) + b).
        self.register_buffer('calibration', torch.tensor([1.0, 0.0]))

    def set_calibration(self, scale: float, shift: float) -> None:
        """Keep the calibration in the buffer, which is part of the weights."""
        self.calibration.copy_(self.calibration.new_tensor([scale, shift]))

    def encode(self, image: Tensor, *, call: Call | None = None) -> Features:
        """Return the features of ``image`` (B, 3, H, W), float RGB 0..255."""
        size = (image.shape[-2], image.shape[-1])
        tensors = (call or self.engine)('encode', pad_to_multiple(image, 16))
        return Features(tensors=tensors, size=size)

    def start(self, features_a: Features, features_b: Features, *,
              prior_flow: PriorFlow | None = None, iterations: int | None = None,
              call: Call | None = None) -> State:
        """Start at zero flow at 1/16, or from the prior at the level its motion asks for."""
        count = self.default_iterations if iterations is None else iterations
        if count < 1:
            raise ValueError(f'iterations must be at least 1; seen {count}')
        match16, match8 = features_a.tensors[0], features_a.tensors[3]
        if features_b.tensors[0].shape != match16.shape:
            raise ValueError(f'both frames must have one size; seen {features_a.size} and '
                             f'{features_b.size}')
        cold = tuple(Step(level) for level in (16, 8) for _ in range(count))
        if prior_flow is None:
            flow = match16.new_zeros((match16.shape[0], 2, *match16.shape[-2:]),
                                     dtype=torch.float32)
            return State(features_a, features_b, level=16, flow=flow, schedule=cold,
                         memory=(features_a.tensors[1],))
        prior = check_prior(prior_flow, features_a).to(match16.device)
        # A high quantile, so that one bad pixel of a prior does not double the work.
        sparse = max(1, 8 // prior.cell)
        motion = prior.flow.detach()[..., ::sparse, ::sparse].abs().amax(dim=1).flatten()
        # Not torch.quantile, which sorts: that took five times as long.
        rank = 1 + int(0.995 * (motion.numel() - 1))
        large = bool(motion.kthvalue(rank).values > self.config.warm_level_px)
        if not large and prior.trust is not None:
            large = bool(prior.trust < self.config.warm_level_trust)
        level = 16 if large else 8
        match = match16 if large else match8
        flow = prior.at_level(level, (match.shape[-2], match.shape[-1]))
        return State(features_a, features_b, level=level, flow=flow, warm=True,
                     schedule=cold if large else cold[count:],
                     memory=(features_a.tensors[1 if large else 4],))

    def step(self, state: State, *, call: Call | None = None) -> State:
        """Do one iteration (propagation, then search) at the next step's level."""
        if not state.schedule:
            raise ValueError(f'all {len(state.done)} steps of this state are done: call '
                             f'finish, or start again with more iterations')
        if state.schedule[0].level != state.level:
            state = self._finer(state)
        offset = 0 if state.level == 16 else 3
        hidden, flow = (call or self.engine)(
            'step', state.features_a.tensors[offset], state.features_b.tensors[offset],
            state.features_a.tensors[offset + 2], state.memory[0], state.flow)
        return state.advanced(flow=flow, memory=(hidden,))

    def finish(self, state: State, *, call: Call | None = None) -> FlowOutput:
        """Return full-resolution flow, confidence and occlusion, cropped to the frame."""
        if state.level == 16:
            state = self._finer(state)
        flow, confidence, occlusion = (call or self.engine)('finish', state.memory[0],
                                                             state.flow)
        height, width = state.features_a.size
        flow, confidence, occlusion = (values[..., :height, :width]
                                       for values in (flow, confidence, occlusion))
        # What leaves the image has no counterpart: the flow says so, and better than the head,
        # which sees the padded image only. Half a px is the rest of the outermost pixel.
        occlusion = torch.where(inside(flow, border=0.5), occlusion, 1.0)
        return FlowOutput(flow=flow, confidence=confidence, occlusion=occlusion)

    def _finer(self, state: State) -> State:
        """Move from 1/16 to 1/8: the flow resized, the hidden state fresh, as in DIP."""
        hidden = state.features_a.tensors[4]
        flow = resize_flow(state.flow, (hidden.shape[-2], hidden.shape[-1]))
        return replace(state, level=8, flow=flow, memory=(hidden,))

    def encode_engine(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> match, hidden, context at 1/16, then at 1/8."""
        return self.encoder(image)

    def propagation_costs(self, match_a: Tensor, match_b: Tensor, flow: Tensor) -> Tensor:
        """Return the costs (B, 1 + seeds, H, W) of the propagation."""
        correlate = (clean_propagation if self.config.propagation == 'clean'
                     else inverse_propagation)
        return (correlate(match_a, match_b, flow, self.config.seed_steps)
                * self.config.match ** 0.5)

    def propagate(self, match_a: Tensor, match_b: Tensor, hidden: Tensor,
                  flow: Tensor) -> Tensor:
        """Return the flow after the propagation; unchanged where the search does without."""
        if self.propagation is None:
            return flow
        costs = self.propagation_costs(match_a, match_b, flow)
        return flow + self.propagation(hidden, costs, flow)

    def search_costs(self, match_a: Tensor, match_b: Tensor, flow: Tensor) -> Tensor:
        """Return the costs (B, planes, H, W) that the gated update reads.

        The (2r+1)**2 of the local search about ``flow``; without it, the propagation's.
        """
        if not self.config.search:
            return self.propagation_costs(match_a, match_b, flow)
        warped = warp(match_b, flow)
        return local_search(match_a, warped, self.config.radius) * self.config.match ** 0.5

    def step_engine(self, match_a: Tensor, match_b: Tensor, context: Tensor, hidden: Tensor,
                    flow: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration: (hidden, flow) -> (hidden, flow), level px."""
        flow = self.propagate(match_a, match_b, hidden, flow)
        costs = self.search_costs(match_a, match_b, flow)
        hidden, change = self.search(hidden, context, costs, flow)
        return hidden, flow + change

    def upsample(self, hidden: Tensor, flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return flow (B, 2, 8H, 8W) px, error parameters (B, 2, ...), occlusion logit."""
        fine = convex_upsample(*self._coarse(hidden, flow), 8)
        return fine[:, :2], fine[:, 2:4], fine[:, 4:]

    def finish_engine(self, hidden: Tensor, flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden, flow at 1/8) -> flow (px), confidence, occlusion probability."""
        values, mask = self._coarse(hidden, flow)
        if not runs_on_cpu(values, mask):
            fine = convex_upsample(values, mask, 8)
            raw = error_probability(fine[:, :2], fine[:, 2:4])
            return fine[:, :2], self._calibrated(raw), torch.sigmoid(fine[:, 4:])
        # The error and the occlusion are worked out in the order in which the cells lie.
        u, v, sharp, wide, occlusion = convex_cells(values, mask, 8)  # (B, H, W, 64) each
        confidence = self._calibrated(mixture_probability((u * u + v * v).sqrt(), sharp, wide))
        fine = torch.cat([spread(u, 8), spread(v, 8)], dim=1)
        return fine, spread(confidence, 8), spread(torch.sigmoid(occlusion), 8)

    def _coarse(self, hidden: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is upsampled (B, 5, H, W) and the mask (B, 9 * 64, H, W)."""
        x = functional.relu(self.fine(hidden))
        values = torch.cat([8 * flow, self.quality(x).to(flow.dtype)], dim=1)
        return values, self.mask(x).to(flow.dtype)

    def _calibrated(self, probability: Tensor) -> Tensor:
        """Return the confidence of the ``probability`` computed."""
        raw = probability.clamp(1e-4, 1 - 1e-4)
        scale, shift = self.calibration.unbind()
        logit = torch.log(raw / (1 - raw))  # OpenVINO has no logit
        return torch.sigmoid(scale * logit + shift)

    def predictions(self, image1: Tensor, image2: Tensor, *, steps16: int, steps8: int,
                    prior_flow: Tensor | None = None) -> Predictions:
        """Run with every intermediate flow kept, for training; sides multiples of 16.

        Both images pass the encoder stacked on the batch. The flow is detached before each
        match, as in DIP. ``prior_flow`` starts at 1/16 when ``steps16`` > 0, else at 1/8.
        """
        batch = image1.shape[0]
        tensors = self.encoder(torch.cat([image1, image2]))
        levels: list[tuple[int, Tensor]] = []
        matches: list[tuple[int, Tensor, Tensor]] = []
        coarsest = 16 if steps16 else 8
        size = (image1.shape[-2] // coarsest, image1.shape[-1] // coarsest)
        if prior_flow is None:
            flow = image1.new_zeros((batch, 2, *size))
        else:
            flow = resize_flow(prior_flow, size)
        hidden = tensors[4][:batch]
        for level, offset, count in ((16, 0, steps16), (8, 3, steps8)):
            match_a, match_b = tensors[offset][:batch], tensors[offset][batch:]
            hidden, context = tensors[offset + 1][:batch], tensors[offset + 2][:batch]
            if level == 8:
                flow = resize_flow(flow, (match_a.shape[-2], match_a.shape[-1]))
            for _ in range(count):
                # The features learn from the search, whose planes hold the seeds' costs too:
                # a third of a step on a CPU went into the propagation's share of it.
                flow = self.propagate(match_a.detach(), match_b.detach(), hidden,
                                      flow.detach())
                if self.propagation is not None:
                    levels.append((level, flow))
                flow = flow.detach()
                costs = self.search_costs(match_a, match_b, flow)
                matches.append((level, costs, flow))
                hidden, change = self.search(hidden, context, costs, flow)
                flow = flow + change
                levels.append((level, flow))
        fine, error, occlusion = self.upsample(hidden, flow)
        return Predictions(levels=levels, matches=matches, flow=fine, error=error,
                           occlusion=occlusion)


def error_probability(flow: Tensor, error: Tensor) -> Tensor:
    """Return the probability (B, 1, H, W) of an endpoint error under max(3 px, 5 %).

    ``error`` holds the mixture of SEA-RAFT's section 3.2: a Laplace distribution of scale 1 px
    with weight sigmoid(error[:, 0]) and one of scale exp(error[:, 1]) px, per component. The
    error's length is taken as Laplace distributed with the same scale; what that gets wrong,
    the calibration mends.
    """
    # Not torch.hypot, which OpenVINO does not convert.
    length = (flow * flow).sum(1, keepdim=True).sqrt()
    return mixture_probability(length, error[:, :1], error[:, 1:2])


def mixture_probability(length: Tensor, sharp: Tensor, wide: Tensor) -> Tensor:
    """Return ``error_probability`` of a flow of ``length`` px; all three of one shape."""
    bound = (0.05 * length).clamp(min=3.0)
    weight = torch.sigmoid(sharp)
    scale = torch.exp(wide.clamp(0, 6))
    return 1 - weight * torch.exp(-bound) - (1 - weight) * torch.exp(-bound / scale)
