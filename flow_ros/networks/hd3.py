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

"""HD3, hierarchical discrete distribution decomposition, with the improvements of IOFPL.

HD3 (Yin et al., CVPR 2019) estimates, on five levels from 1/64 to 1/4, a density over the
integer residuals to the flow of the level before (its section 3); flow and confidence are read
out of the density. IOFPL (Hofinger et al., ECCV 2020) keeps the network and improves it:
sampling cost volume (section 3.2), gradient stopping (3.3), flow cues (3.4). With the default
configuration this is ``hd3fc`` as published, and its checkpoints fit key for key; every
improvement is an option of its own, and only those that change a width change a shape.

Where the papers are silent:

- IOFPL's four flow cues are those of ``ops.flow_cues``. At the coarsest level of a cold start
  both flows are zero, and so are the cues but for the count of hits;
- a prior flow is resized to 1/64 and used there as the flow of a level before would be: as the
  offset of the cost volume and as summand. HD3 has no other place for one, since each decoder
  wants the up-feature of the level before;
- a resized image keeps at least 64 px a side;
- occlusion, with flow cues only, is the disagreement of the two directions on the finest level
  that was done. HD3 itself knows none.

Cost at 448x1024 as published: 313 GFLOP (dlaup) or 68 (vgg), counted as 2 x MAC. Flow cues
need both directions: twice the cost of everything but the encoder.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
import math
from typing import cast

import torch
from torch import nn, Tensor
from torch.nn import functional

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
from flow_ros.ops.cost_volume import Measure, sampled_cost_volume, warped_cost_volume
from flow_ros.ops.flow_cues import flow_cues, reverse_flow
from flow_ros.ops.flow_cues import PLANES as CUE_PLANES
from flow_ros.ops.match_density import density_to_vector
from flow_ros.ops.sampling import inside, warp

ENCODERS = ('dlaup', 'vgg')
DECODERS = ('hda', 'resnet')
COSTS = ('warp', 'sample')
MEASURES = ('dot', 'sad')
RADII = (4, 8)

LEVELS = (64, 32, 16, 8, 4)
"""Cell of each level, px of the resized image."""

MULTIPLE = 64
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
"""Of ImageNet, for RGB in 0..1."""

DLA_WIDTHS = (16, 32, 64, 128, 256, 512, 512)
VGG_WIDTHS = (16, 32, 64, 96, 128, 196)
DILATIONS = (1, 1, 2, 4, 8, 16, 1)
_STEP_OUTPUTS = ('next_flow', 'probability', 'logits', 'next_up')


@dataclass(frozen=True)
class HD3Config:
    """Options of HD3; the defaults are ``hd3fc`` as published.

    The published networks: ``hd3f`` has ``context=False``; the small one ``encoder='vgg'``.
    IOFPL's improvements: ``cost='sample'``, ``radius=8``, ``measure='sad'``,
    ``stop_gradients=True``, ``cues=True``.
    """

    encoder: str = 'dlaup'
    """'dlaup' (34.3 M parameters) or 'vgg' (1.7 M)."""
    decoder: str = 'hda'
    """'hda' (both blocks aggregated) or 'resnet'."""
    context: bool = True
    """Dilated convolutions in place of the decoder of the finest level."""
    decoder_width: int = 128
    """Channels inside the decoders; 128 as published."""
    cost: str = 'warp'
    """Cost volume: 'warp' (as published) or 'sample' (IOFPL equation 2)."""
    radius: int = 4
    """Search range of every level, level px: 4 as published, or 8 (IOFPL's CVr8)."""
    measure: Measure = 'dot'
    """Of a match: 'dot' (product, as published) or 'sad' (IOFPL equation 3)."""
    stop_gradients: bool = False
    """No gradient through the flow that goes from level to level (IOFPL 3.3)."""
    cues: bool = False
    """Flow cues (IOFPL 3.4): both directions are computed, each sees the other's flow."""
    calibration: tuple[float, float] = (1.0, 0.0)
    """(a, b): confidence = sigmoid(a logit(p) + b) of the window's probability p.

    Fitted to the flow of all five levels. p is about the residual of one level, in cells of
    that level: after fewer levels the same (a, b) is used, and the confidence is no calibrated
    probability.
    """

    def __post_init__(self) -> None:
        """Refuse values outside the documented ones."""
        for name, known in (('encoder', ENCODERS), ('decoder', DECODERS), ('cost', COSTS),
                            ('measure', MEASURES), ('radius', RADII)):
            if getattr(self, name) not in known:
                raise ValueError(f'{name} must be one of {known}; seen {getattr(self, name)!r}')
        if self.decoder_width < 1:
            raise ValueError(f'decoder_width must be at least 1; seen {self.decoder_width}')
        # A list where it comes from a file.
        object.__setattr__(self, 'calibration', tuple(self.calibration))
        if len(self.calibration) != 2 or not all(map(math.isfinite, self.calibration)):
            raise ValueError(f'calibration must be two finite numbers (a, b); seen '
                             f'{self.calibration}')


@dataclass(frozen=True)
class LevelDensity:
    """The match density of one level, (B, ..., h, w) on its grid.

    ``density`` (B, (2r+1)^2, h, w) sums to 1 over its planes; plane (2r+1)(dy+r) + (dx+r) is
    the probability that the flow is ``centre`` plus (dx, dy) cells. ``centre`` and ``flow``
    (B, 2, h, w) are in px of the frame; ``cell`` is (x, y), the size of a cell in these px.
    ``confidence`` (B, 1, h, w) as in ``FlowOutput``.
    """

    level: int
    density: Tensor
    centre: Tensor
    flow: Tensor
    confidence: Tensor
    cell: tuple[float, float]


@dataclass(frozen=True)
class HD3Predictions:
    """What training needs, coarse to fine; N is B, or 2 B with the backward flows behind.

    ``logits`` (N, (2r+1)^2, h, w), ``vectors`` (N, 2, h, w) in full-resolution px and
    ``confidences`` (N, 1, h, w; the window's probability) of each level; ``flow``
    (N, 2, H, W); ``prior``: the first level's offset (N, 2, h, w), full-resolution px, or None.
    """

    logits: list[Tensor]
    vectors: list[Tensor]
    confidences: list[Tensor]
    flow: Tensor
    prior: Tensor | None


def _conv(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1,
          dilation: int = 1) -> nn.Conv2d:
    """Return a convolution without bias that keeps the size but for its stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, dilation=dilation, bias=False,
                     padding=dilation * (kernel // 2))


def _conv_norm(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1,
               dilation: int = 1) -> nn.Sequential:
    """Return convolution, batch norm and ReLU."""
    return nn.Sequential(_conv(inputs, outputs, kernel, stride=stride, dilation=dilation),
                         nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


# Encoders: normalised RGB to maps at 1/64, 1/32, 1/16, 1/8 and 1/4.


class VGGBlock(nn.Module):
    """Three 3x3 convolutions, the first halves the size."""

    folds = (('conv1', 'bn1'), ('conv2', 'bn2'), ('conv3', 'bn3'))

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride=2)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv3 = _conv(outputs, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, values: Tensor) -> Tensor:
        """Return the block's map."""
        values = functional.relu(self.bn1(self.conv1(values)))
        values = functional.relu(self.bn2(self.conv2(values)))
        return functional.relu(self.bn3(self.conv3(values)))


class VGGEncoder(nn.Module):
    """Six blocks; 1,667,400 parameters."""

    widths = VGG_WIDTHS[:0:-1]

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        for index, width in enumerate(VGG_WIDTHS):
            self.add_module(f'block_{index}', VGGBlock(inputs, width))
            inputs = width

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return five maps, coarse to fine."""
        maps = [image]
        for index in range(len(VGG_WIDTHS)):
            maps.append(self.get_submodule(f'block_{index}')(maps[-1]))
        return tuple(maps[:1:-1])


class BasicBlock(nn.Module):
    """DLA's block: two 3x3 convolutions and a residual that the tree gives."""

    folds = (('conv1', 'bn1'), ('conv2', 'bn2'))

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, values: Tensor, residual: Tensor) -> Tensor:
        """Return the block's map."""
        inner = functional.relu(self.bn1(self.conv1(values)))
        return functional.relu(self.bn2(self.conv2(inner)) + residual)


class Root(nn.Module):
    """Aggregates the maps of a tree by a 1x1 convolution."""

    folds = (('conv', 'bn'),)

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = _conv(inputs, outputs, 1)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return one map."""
        return functional.relu(self.bn(self.conv(torch.cat(maps, dim=1))))


def _projection(inputs: int, outputs: int) -> nn.Sequential | None:
    """Return what makes a residual as wide as the output, where it is not."""
    if inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1), nn.BatchNorm2d(outputs))


class Tree(nn.Module):
    """DLA's tree of depth 1: two blocks and their root, which also takes older maps."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, older: int = 0) -> None:
        super().__init__()
        self.stride = stride
        self.tree1 = BasicBlock(inputs, outputs, stride=stride)
        self.tree2 = BasicBlock(outputs, outputs)
        self.root = Root(2 * outputs + older, outputs)
        self.project = _projection(inputs, outputs)

    def forward(self, values: Tensor, older: tuple[Tensor, ...] = ()) -> Tensor:
        """Return the root's map."""
        residual = values
        if self.stride > 1:
            residual = functional.max_pool2d(residual, self.stride)
        if self.project is not None:
            residual = self.project(residual)
        first = self.tree1(values, residual)
        second = self.tree2(first, first)
        return cast(Tensor, self.root([second, first, *older]))


class LeafTree(Tree):
    """A level of one tree that takes its own pooled input into its root (``level_root``)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, stride=2, older=inputs)

    def forward(self, values: Tensor, older: tuple[Tensor, ...] = ()) -> Tensor:
        """Return the root's map, at half the size."""
        return super().forward(values, (functional.max_pool2d(values, 2), *older))


class DoubleTree(nn.Module):
    """A level of two trees; the second's root takes the pooled input and the first's map.

    ``project`` has a place in the published weights, but none in their arithmetic: the inner
    trees project for themselves.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.tree1 = Tree(inputs, outputs, stride=2)
        self.tree2 = Tree(outputs, outputs, older=inputs + outputs)
        self.project = _projection(inputs, outputs)

    def forward(self, values: Tensor) -> Tensor:
        """Return the second root's map, at half the size."""
        pooled = functional.max_pool2d(values, 2)
        first = self.tree1(values)
        return cast(Tensor, self.tree2(first, (pooled, first)))


class DLA(nn.Module):
    """DLA-34 with a seventh level and no classifier."""

    def __init__(self) -> None:
        super().__init__()
        widths = DLA_WIDTHS
        self.base_layer = _conv_norm(3, widths[0], 7)
        self.level0 = _conv_norm(widths[0], widths[0])
        self.level1 = _conv_norm(widths[0], widths[1], stride=2)
        self.level2 = Tree(widths[1], widths[2], stride=2)
        self.level3 = DoubleTree(widths[2], widths[3])
        self.level4 = DoubleTree(widths[3], widths[4])
        self.level5 = LeafTree(widths[4], widths[5])
        self.level6 = LeafTree(widths[5], widths[6])

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the maps at 1/2 to 1/64."""
        values = self.level0(self.base_layer(image))
        maps = []
        for level in (self.level1, self.level2, self.level3, self.level4, self.level5,
                      self.level6):
            values = level(values)
            maps.append(values)
        return maps


class Aggregation(nn.Module):
    """One iterative aggregation: coarser maps, twice enlarged, one by one into a finer one."""

    def __init__(self, outputs: int, coarser: int, count: int) -> None:
        super().__init__()
        self.count = count
        for index in range(1, count + 1):
            if coarser != outputs:
                self.add_module(f'proj_{index}', _conv_norm(coarser, outputs, 1))
            # Each channel for itself: a learnt interpolation.
            self.add_module(f'up_{index}', nn.ConvTranspose2d(
                outputs, outputs, 4, stride=2, padding=1, groups=outputs, bias=False))
            self.add_module(f'node_{index}', _conv_norm(2 * outputs, outputs))
        self.projects = coarser != outputs

    def forward(self, fine: Tensor, coarser: list[Tensor]) -> list[Tensor]:
        """Return as many maps as there are coarser ones; the last has seen them all."""
        maps = []
        for index, values in enumerate(coarser, start=1):
            if self.projects:
                values = self.get_submodule(f'proj_{index}')(values)
            values = self.get_submodule(f'up_{index}')(values)
            fine = self.get_submodule(f'node_{index}')(torch.cat([fine, values], dim=1))
            maps.append(fine)
        return maps


class DLAUp(nn.Module):
    """Iterative aggregations ``ida_0`` (at 1/32) to ``ida_4`` (at 1/2)."""

    def __init__(self) -> None:
        super().__init__()
        widths = DLA_WIDTHS[:0:-1]  # 1/64 to 1/2
        for index, (coarser, outputs) in enumerate(zip(widths, widths[1:])):
            self.add_module(f'ida_{index}', Aggregation(outputs, coarser, index + 1))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the maps at 1/64 to 1/4 from those at 1/2 to 1/64.

        The published network computes the one at 1/2 as well (``ida_4``) and uses it nowhere.
        """
        aggregated: list[Tensor] = []
        results = maps[-1:]
        for index in range(len(LEVELS) - 1):
            aggregated = self.get_submodule(f'ida_{index}')(
                maps[-2 - index], [maps[-1 - index], *aggregated])
            results.append(aggregated[-1])
        return tuple(results)


class DLAEncoder(nn.Module):
    """DLA-34-up; 34,288,176 parameters."""

    widths = DLA_WIDTHS[:1:-1]

    def __init__(self) -> None:
        super().__init__()
        self.base = DLA()
        self.dla_up = DLAUp()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return five maps, coarse to fine."""
        return cast(tuple[Tensor, ...], self.dla_up(self.base(image)))


# Decoders: cost, features, up-feature and flow to logits and the next up-feature.


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions behind their norms, and a shortcut of the raw input.

    The first block of a decoder does not norm its input, and its shortcut is a convolution.
    """

    folds = (('conv1', 'bn2'),)

    def __init__(self, inputs: int, outputs: int, *, first: bool) -> None:
        super().__init__()
        self.bn1 = None if first else nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.shortcut = nn.Sequential(_conv(inputs, outputs, 1)) if first else None

    def forward(self, values: Tensor) -> Tensor:
        """Return the block's map."""
        inner = values if self.bn1 is None else functional.relu(self.bn1(values))
        inner = self.conv2(functional.relu(self.bn2(self.conv1(inner))))
        return inner + (values if self.shortcut is None else self.shortcut(values))


class Mapping(nn.Module):
    """Two blocks; with ``aggregate`` ('hda') a root takes the maps of both."""

    def __init__(self, inputs: int, outputs: int, *, aggregate: bool) -> None:
        super().__init__()
        self.block1 = PreActivationBlock(inputs, outputs, first=True)
        self.block2 = PreActivationBlock(outputs, outputs, first=False)
        self.root = nn.Sequential(nn.BatchNorm2d(2 * outputs), nn.ReLU(inplace=True),
                                  _conv(2 * outputs, outputs, 1)) if aggregate else None

    def forward(self, values: Tensor) -> Tensor:
        """Return the mapped values."""
        first = self.block1(values)
        second = self.block2(first)
        if self.root is None:
            return cast(Tensor, second)
        return cast(Tensor, self.root(torch.cat([first, second], dim=1)))


class Decoder(nn.Module):
    """A mapping, from which logits and, but for the finest level, an up-feature are read."""

    def __init__(self, inputs: int, width: int, planes: int, *, aggregate: bool,
                 finest: bool) -> None:
        super().__init__()
        self.mapping = Mapping(inputs, width, aggregate=aggregate)
        self.cls = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                                 nn.Conv2d(width, planes, 1))
        self.up = None if finest else nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.ConvTranspose2d(width, planes, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(planes), nn.ReLU(inplace=True))

    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the logits and, if there is a finer level, the up-feature on its grid."""
        mapped = self.mapping(values)
        logits = self.cls(mapped)
        return (logits,) if self.up is None else (logits, self.up(mapped))


class Context(nn.Module):
    """Seven dilated convolutions: the finest level's decoder of ``hd3fc``."""

    def __init__(self, inputs: int, width: int, planes: int) -> None:
        super().__init__()
        for index, dilation in enumerate(DILATIONS):
            self.add_module(f'dc_conv_{index}',
                            _conv_norm(width if index else inputs, width, dilation=dilation))
        self.cls = nn.Conv2d(width, planes, 1)

    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the logits."""
        for index in range(len(DILATIONS)):
            values = self.get_submodule(f'dc_conv_{index}')(values)
        return (self.cls(values),)


class HD3(FlowNetwork):
    """The network; see the module's docstring.

    Steps are levels, 1/64 to 1/4. ``iterations`` is how many of them are done, 1 to 5: what is
    left out is the finest. More than 5 means all of them, so that a setting meant for another
    network is no error here.

    Engines: ``encode`` (image) -> five feature maps, coarse to fine; ``step0`` (features_a,
    features_b, offset) and ``step1`` ... ``step4`` (features_a, features_b, flow, up-feature)
    -> (flow in level px, window probability, logits, and up-feature but for the last). With
    flow cues these are one more input, and all but the features have both directions stacked on
    the batch, forward first.
    """

    name = 'hd3'
    default_iterations = len(LEVELS)
    most_iterations = len(LEVELS)
    budget_unit = 'levels'
    free_options = frozenset({'stop_gradients', 'calibration'})
    takes_calibration = True
    engines = ('encode', 'step0', 'step1', 'step2', 'step3', 'step4')
    tensor_names = {
        'encode': (('image',), tuple(f'features_{level}' for level in LEVELS)),
        'step0': (('features_a', 'features_b', 'offset', 'cues'), _STEP_OUTPUTS),
        **{f'step{index}': (('features_a', 'features_b', 'flow', 'up', 'cues'), _STEP_OUTPUTS)
           for index in range(1, len(LEVELS))}}

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: HD3Config = HD3Config()) -> None:
        super().__init__()
        self.config = config
        planes = (2 * config.radius + 1) ** 2
        self.encoder = DLAEncoder() if config.encoder == 'dlaup' else VGGEncoder()
        for level, features in enumerate(self.encoder.widths):
            self.add_module(f'cost_bn_{level}', nn.BatchNorm2d(planes))
            inputs = planes + (CUE_PLANES if config.cues else 0)
            if level > 0:
                inputs += features + planes + 2
            finest = level == len(LEVELS) - 1
            self.add_module(f'Decoder_{level}', Context(inputs, config.decoder_width, planes)
                            if finest and config.context else
                            Decoder(inputs, config.decoder_width, planes, finest=finest,
                                    aggregate=config.decoder == 'hda'))
        self.register_buffer('mean', _per_channel(MEAN), persistent=False)
        self.register_buffer('deviation', _per_channel(DEVIATION), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Start as published: small normal weights; the depthwise enlargements are bilinear."""
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d) and module.groups > 1:
                ramp = torch.tensor([0.25, 0.75, 0.75, 0.25])
                with torch.no_grad():
                    module.weight.copy_((ramp[:, None] * ramp).expand_as(module.weight))
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_calibration(self, scale: float, shift: float) -> None:
        """Keep the calibration in the configuration, which is saved with the weights."""
        self.config = replace(self.config, calibration=(scale, shift))

    # Engine functions: plain tensors in, a tuple of plain tensors out.

    def encode_engine(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the maps at 1/64 to 1/4 of an RGB image, 0..255, sides multiples of 64."""
        normalised = (image / 255 - self.mean) / self.deviation
        kind = next(self.encoder.parameters()).dtype
        return cast(tuple[Tensor, ...], self.encoder(normalised.to(kind)))

    def step0_engine(self, features_a: Tensor, features_b: Tensor, offset: Tensor,
                     *cues: Tensor) -> tuple[Tensor, ...]:
        """Do the level 1/64 from ``offset``, px of this level."""
        return self._level(0, *self._directions(features_a, features_b), offset, None, *cues)

    def step1_engine(self, features_a: Tensor, features_b: Tensor, flow: Tensor,
                     up: Tensor, *cues: Tensor) -> tuple[Tensor, ...]:
        """Do the level 1/32."""
        return self._level(1, *self._directions(features_a, features_b), flow, up, *cues)

    def step2_engine(self, features_a: Tensor, features_b: Tensor, flow: Tensor,
                     up: Tensor, *cues: Tensor) -> tuple[Tensor, ...]:
        """Do the level 1/16."""
        return self._level(2, *self._directions(features_a, features_b), flow, up, *cues)

    def step3_engine(self, features_a: Tensor, features_b: Tensor, flow: Tensor,
                     up: Tensor, *cues: Tensor) -> tuple[Tensor, ...]:
        """Do the level 1/8."""
        return self._level(3, *self._directions(features_a, features_b), flow, up, *cues)

    def step4_engine(self, features_a: Tensor, features_b: Tensor, flow: Tensor,
                     up: Tensor, *cues: Tensor) -> tuple[Tensor, ...]:
        """Do the level 1/4."""
        return self._level(4, *self._directions(features_a, features_b), flow, up, *cues)

    def _directions(self, features_a: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of both frames, of both directions where the cues need them."""
        if not self.config.cues:
            return features_a, features_b
        return (torch.cat([features_a, features_b]), torch.cat([features_b, features_a]))

    def _entering(self, level: int, flow: Tensor, features: Tensor) -> Tensor:
        """Return the flow that ``level`` starts from, on the grid of its ``features``.

        ``flow`` is that of the level before; at level 0 the offset, which has this grid.
        """
        if level > 0:
            height, width = features.shape[-2:]
            flow = 2 * functional.interpolate(flow, size=(height, width), mode='bilinear',
                                              align_corners=True)
        return flow.detach() if self.config.stop_gradients else flow

    def _cues(self, level: int, flow: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        """Return the cues of ``level``, an input of its engine; () of a network without.

        Not in the engine: they scatter, which compiled engines cannot or do wrongly.
        """
        if not self.config.cues:
            return ()
        flow = self._entering(level, flow, features)
        return (flow_cues(flow, torch.cat(flow.chunk(2)[::-1])),)

    def _level(self, level: int, features_a: Tensor, features_b: Tensor, flow: Tensor,
               up: Tensor | None = None, cues: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return flow (level px, float32), window probability, logits and up-feature.

        ``flow`` and ``cues`` are what ``_entering`` and ``_cues`` say.
        """
        config = self.config
        flow = self._entering(level, flow, features_a)
        volume = sampled_cost_volume if config.cost == 'sample' else warped_cost_volume
        cost = volume(features_a, features_b, flow, config.radius, measure=config.measure)
        kind = features_a.dtype  # of the decoder: the flow is float32 whatever that is
        inputs = [self.get_submodule(f'cost_bn_{level}')(cost.to(kind))]
        if up is not None:
            inputs += [features_a, up.to(kind), flow.to(kind)]
        if cues is not None:
            inputs.append(cues.to(kind))
        # (N, 81 + features + 81 + 2 + cues, h, w); at level 0 cost and cues alone
        logits, *rest = self.get_submodule(f'Decoder_{level}')(_joined(inputs))
        residual, probability = density_to_vector(logits.float())
        return (flow + residual, probability, logits, *rest)

    # The four acts.

    def encode(self, image: Tensor, *, call: Call | None = None) -> Features:
        """Return the features of ``image``: float RGB 0..255, (B, 3, H, W), any size.

        The image is first resized to multiples of 64 (see ``working_size``).
        """
        check_images(image, image)
        size = (image.shape[-2], image.shape[-1])
        resized = _resize(image.float(), working_size(size))
        return Features((call or self.engine)('encode', resized), size)

    def start(self, features_a: Features, features_b: Features, *,
              prior_flow: PriorFlow | None = None, iterations: int | None = None,
              call: Call | None = None) -> State:
        """Return the state before the first level.

        ``iterations`` is the number of levels, coarse to fine; above 5 it means all.
        ``prior_flow``, full-resolution px, is where the coarsest level starts.
        """
        count = self._levels(iterations)
        check_pair(features_a, features_b)
        coarsest = features_a.tensors[0]
        if prior_flow is None:
            flow = torch.zeros((coarsest.shape[0], 2, *coarsest.shape[-2:]),
                               device=coarsest.device)
        else:
            prior = check_prior(prior_flow, features_a).to(coarsest.device)
            flow = self._offset(prior, features_a)
        both = flow
        if self.config.cues:
            backward = flow if prior_flow is None else reverse_flow(flow)
            both = torch.cat([flow, backward])
        return State(features_a, features_b, level=LEVELS[0], flow=flow,
                     schedule=tuple(Step(level, 'level') for level in LEVELS[:count]),
                     warm=prior_flow is not None, memory=(both,))

    def step(self, state: State, *, call: Call | None = None) -> State:
        """Do the next level."""
        if not state.schedule:
            raise ValueError(f'all {len(state.done)} levels of this state are done: call '
                             f'finish, or start again with more iterations (5 at most)')
        level = state.schedule[0].level
        index = LEVELS.index(level)
        flow, *rest = state.memory
        features = state.features_a.tensors[index]
        # Of the level before, all but its up-feature has served.
        results = (call or self.engine)(
            f'step{index}', features, state.features_b.tensors[index], flow, *rest[2:],
            *self._cues(index, flow, features))
        return state.advanced(level=level, flow=results[0][:state.flow.shape[0]],
                              memory=tuple(results))

    def finish(self, state: State, *, call: Call | None = None) -> FlowOutput:
        """Return flow and confidence of the finest level that is done, at the frame's size.

        With flow cues also the occlusion. Legal after any step; before the first it is the
        start, without a confidence.
        """
        size = state.features_a.size
        working = _working_size_of(state.features_a)
        flow = _to_frame(state.flow * state.level, working, size)
        if not state.done:
            return FlowOutput(flow)
        batch = state.flow.shape[0]
        both, probability = state.memory[:2]
        confidence = _enlarge(self.calibrated(probability[:batch]), working, size)
        if not self.config.cues:
            return FlowOutput(flow, confidence)
        occlusion = _disagreement(state.flow, both[batch:], state.level)
        return FlowOutput(flow, confidence, _enlarge(occlusion, working, size))

    def reversed(self, state: State) -> State | None:
        """Return the state of the other direction, which flow cues compute anyway, else None."""
        if not self.config.cues:
            return None
        batch = state.flow.shape[0]
        memory = tuple(values.roll(batch, 0) for values in state.memory)
        return replace(state, features_a=state.features_b, features_b=state.features_a,
                       flow=memory[0][:batch], memory=memory)

    # The density, on request, and training.

    def density(self, state: State) -> LevelDensity:
        """Return the match density of the finest level of ``state`` that is done."""
        if not state.done:
            raise ValueError('no level of this state is done: do a step first')
        batch, (height, width) = state.flow.shape[0], state.features_a.size
        working = _working_size_of(state.features_a)
        _, probability, logits = (values[:batch].float() for values in state.memory[:3])
        cell = (state.level * width / working[1], state.level * height / working[0])
        scale = state.flow.new_tensor(cell)[None, :, None, None]
        residual, _ = density_to_vector(logits)
        return LevelDensity(state.level, torch.softmax(logits, dim=1),
                            centre=(state.flow - residual) * scale, flow=state.flow * scale,
                            confidence=self.calibrated(probability), cell=cell)

    def densities(self, image1: Tensor, image2: Tensor, *, iterations: int | None = None,
                  prior_flow: Tensor | None = None,
                  call: Call | None = None) -> list[LevelDensity]:
        """Return the match densities of all levels of one run, coarse to fine."""
        check_images(image1, image2)
        state = self.start(self.encode(image1, call=call), self.encode(image2, call=call),
                           prior_flow=prior_flow, iterations=iterations, call=call)
        found = []
        while state.schedule:
            state = self.step(state, call=call)
            found.append(self.density(state))
        return found

    def calibrated(self, probability: Tensor) -> Tensor:
        """Return the confidence of the window's ``probability``, in 0..1."""
        slope, shift = self.config.calibration
        if (slope, shift) == (1.0, 0.0):
            return probability
        bounded = probability.clamp(1e-6, 1 - 1e-6)
        return torch.sigmoid(slope * torch.log(bounded / (1 - bounded)) + shift)

    def predictions(self, image1: Tensor, image2: Tensor, *,
                    prior_flow: Tensor | None = None, both: bool = False) -> HD3Predictions:
        """Return logits and flow of every level, for training.

        The sides must be multiples of 64, so that the levels' grids lie on those of the truth.
        ``both`` computes the backward flow as well, as flow cues always do; the encoder is
        shared. Both images go through it as one batch: its norms see them together.
        """
        check_images(image1, image2)
        batch, _, height, width = image1.shape
        if height % MULTIPLE or width % MULTIPLE:
            raise ValueError(f'HD3 is trained on images with sides that are multiples of '
                             f'{MULTIPLE}; seen {height}x{width}: change the crop')
        stacked = self.encode(torch.cat([image1, image2]))
        features_a = Features(tuple(each[:batch] for each in stacked.tensors), stacked.size)
        features_b = Features(tuple(each[batch:] for each in stacked.tensors), stacked.size)
        state = self.start(features_a, features_b, prior_flow=prior_flow)
        flow, = state.memory
        both = both or self.config.cues
        if both and flow.shape[0] == batch:
            flow = torch.cat([flow, flow if prior_flow is None else reverse_flow(flow)])
        prior = None if prior_flow is None else flow * LEVELS[0]
        logits, vectors, confidences = [], [], []
        rest: list[Tensor] = []
        for index, (level, maps) in enumerate(zip(LEVELS, stacked.tensors)):
            # The stacked maps are those of frame a in the forward direction, then of frame a
            # in the backward one; exchanging the halves gives those of frame b.
            pair = ((maps, maps.roll(batch, 0)) if both else (maps[:batch], maps[batch:]))
            flow, probability, level_logits, *rest = self._level(
                index, *pair, flow, rest[0] if rest else None, *self._cues(index, flow, maps))
            logits.append(level_logits)
            vectors.append(flow * level)
            confidences.append(probability)
        return HD3Predictions(logits, vectors, confidences,
                              _resize(vectors[-1], (height, width)), prior)

    def _levels(self, iterations: int | None) -> int:
        if iterations is None:
            return self.default_iterations
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f'iterations of HD3 are levels: a whole number from 1 to '
                             f'{len(LEVELS)} (more means all); seen {iterations!r}')
        return min(iterations, len(LEVELS))

    @staticmethod
    def _offset(prior: CellFlow, features: Features) -> Tensor:
        """Return ``prior`` on the coarsest grid, in its px: the mean over each cell."""
        height, width = features.size
        rows, columns = features.tensors[0].shape[-2:]
        # Not bilinear: that would see four px of 4096, and the prior's worst ones as well.
        mean = functional.adaptive_avg_pool2d(prior.flow, (rows, columns))
        return torch.cat([mean[:, :1] * (columns / width), mean[:, 1:] * (rows / height)], dim=1)


def working_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) in which a frame of ``size`` is worked on.

    Multiples of 64, next below or above on each axis, such that height / width changes least;
    of equally good ones the smallest.
    """
    height, width = size
    choices = [(rows, columns) for rows in _multiples(height) for columns in _multiples(width)]
    return min(choices, key=lambda choice: abs(choice[0] / choice[1] - height / width))


def _multiples(side: int) -> Iterator[int]:
    """Yield the multiples of 64 next to ``side``, the smaller first; at least 64."""
    below = max(side // MULTIPLE, 1) * MULTIPLE
    yield below
    if below < side:
        yield below + MULTIPLE


def _working_size_of(features: Features) -> tuple[int, int]:
    """Return the size in px that the features were made at."""
    rows, columns = features.tensors[0].shape[-2:]
    return rows * LEVELS[0], columns * LEVELS[0]


def _joined(maps: list[Tensor]) -> Tensor:
    """Stack ``maps`` on their channels, in the memory layout that convolutions are fastest in.

    Otherwise each convolution that reads the result would change the layout again, and batch
    norm would get its gradient in the strides of the stack: both cost more than the work itself.
    """
    for values in maps:
        if values.requires_grad:
            values.register_hook(_channels_last)
    return torch.cat([_channels_last(values) for values in maps], dim=1)


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def _resize(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize bilinearly with aligned corners, as HD3 does everywhere."""
    if (values.shape[-2], values.shape[-1]) == size:
        return values
    return functional.interpolate(values, size=size, mode='bilinear', align_corners=True)


def _enlarge(values: Tensor, working: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Bring a level's map to the resized image, then to the frame, as published."""
    return _resize(_resize(values.float(), working), size)


def _to_frame(flow: Tensor, working: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Bring a level's flow, px of the resized image, to the frame's size and px."""
    flow = _enlarge(flow, working, size)
    if working == size:
        return flow
    return torch.cat([flow[:, :1] * (size[1] / working[1]),
                      flow[:, 1:] * (size[0] / working[0])], dim=1)


def _disagreement(flow: Tensor, backward: Tensor, cell: int) -> Tensor:
    """Return (B, 1, h, w) in 0..1: how far the two directions contradict each other.

    e^2 / (e^2 + t) with the error e of the round trip and t, the squared error that two right
    flows may show (Sundaram et al., ECCV 2010), in px of the resized image; 1 out of it.
    """
    back = warp(backward, flow)
    error = (flow + back).square().sum(dim=1, keepdim=True) * cell ** 2
    motion = (flow.square() + back.square()).sum(dim=1, keepdim=True) * cell ** 2
    # A quarter of a cell on top: what a grid this coarse cannot resolve.
    tolerated = 0.01 * motion + 0.5 + (0.25 * cell) ** 2
    return torch.where(inside(flow, 0.5), error / (error + tolerated), 1.0)


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[None, :, None, None]
