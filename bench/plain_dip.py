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

"""DIP written plainly: what the exact network must equal, and be faster than.

Nothing is reused or left out: both images are encoded for each pair, the propagation builds
the stack of five shifted maps and warps all its 1280 channels, the search is a loop over 25
shifts, every GRU convolution takes its whole input, and the upsampling mask is computed after
each update though only the last of a level is used. It loads the state_dict of
``flow_ros.networks.dip.DIP``. For ``bench/dip_stream.py`` and for tests; inference alone.
"""

from collections.abc import Sequence

import torch
from torch import nn, Tensor
from torch.nn import functional

HIDDEN = 128
SEEDS = ((0, 0), (-1, -1), (1, -1), (-1, 1), (1, 1))


def warp(values: Tensor, flow: Tensor) -> Tensor:
    """Return ``values`` (B, C, H, W) seen at x + flow(x), px, its border replicated."""
    height, width = flow.shape[-2:]
    x = torch.arange(width, dtype=flow.dtype)[None, None, :] + flow[:, 0]
    y = torch.arange(height, dtype=flow.dtype)[None, :, None] + flow[:, 1]
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], dim=-1)
    return functional.grid_sample(values, grid, mode='bilinear', padding_mode='border',
                                  align_corners=True)


def shifted_stack(values: Tensor) -> Tensor:
    """Return the five shifted maps (B, 1280, H, W), seed after seed."""
    height, width = values.shape[-2:]
    padded = functional.pad(values, (1, 1, 1, 1), mode='replicate')
    return torch.cat([padded[:, :, 1 + dy:1 + dy + height, 1 + dx:1 + dx + width]
                      for dx, dy in SEEDS], dim=1)


def propagation(features_a: Tensor, stack: Tensor, flow: Tensor) -> Tensor:
    """Return ten planes: 5g + s is the mean over k of F1[2k + g] * warped stack[10k + 5g + s]."""
    batch, channels, height, width = features_a.shape
    warped = warp(stack, flow).view(batch, channels // 2, 2, len(SEEDS), height, width)
    pairs = features_a.view(batch, channels // 2, 2, 1, height, width)
    return (pairs * warped).mean(dim=1).flatten(1, 2)


def search(features_a: Tensor, features_b: Tensor, flow: Tensor) -> Tensor:
    """Return 25 planes: 5(dx + 2) + (dy + 2) is the mean of F1(x) * warped F2(x + (dx, dy))."""
    height, width = features_a.shape[-2:]
    padded = functional.pad(warp(features_b, flow), (2, 2, 2, 2), mode='replicate')
    return torch.cat([(features_a * padded[:, :, y:y + height, x:x + width]).mean(
        dim=1, keepdim=True) for x in range(5) for y in range(5)], dim=1)


def upsample(flow: Tensor, mask: Tensor) -> Tensor:
    """Return the flow at four times its size, each px a mean of nine by ``mask``."""
    batch, _, height, width = flow.shape
    weights = torch.softmax(mask.view(batch, 1, 9, 4, 4, height, width), dim=2)
    nine = functional.unfold(4 * flow, 3, padding=1).view(batch, 2, 9, 1, 1, height, width)
    fine = (weights * nine).sum(dim=2).permute(0, 1, 4, 2, 5, 3)
    return fine.reshape(batch, 2, 4 * height, 4 * width)


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride),
                                        nn.InstanceNorm2d(outputs))
        self.norm = nn.InstanceNorm2d(outputs)

    def forward(self, values: Tensor) -> Tensor:
        inner = torch.relu(self.norm(self.conv1(values)))
        inner = torch.relu(self.norm(self.conv2(inner)))
        return torch.relu(self.downsample(values) + inner)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3)
        self.norm = nn.InstanceNorm2d(64)
        self.layer1 = nn.Sequential(_Residual(64, 64, 1), _Residual(64, 64, 1))
        self.layer2 = nn.Sequential(_Residual(64, 96, 2), _Residual(96, 96, 1))
        self.layer3 = nn.Sequential(_Residual(96, 128, 1), _Residual(128, 128, 1))
        self.conv2 = nn.Conv2d(128, 2 * HIDDEN, 1)

    def forward(self, image: Tensor) -> Tensor:
        values = torch.relu(self.norm(self.conv1(image)))
        return self.conv2(self.layer3(self.layer2(self.layer1(values))))


class _Motion(nn.Module):
    def __init__(self, *, small: bool) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(10, 96, 1) if small else nn.Conv2d(25, 64, 1)
        self.convc2 = None if small else nn.Conv2d(64, 128, 3, 1, 1)
        self.convf1 = nn.Conv2d(2, 64, 5, 1, 2)
        self.convf2 = nn.Conv2d(64, 32 if small else 64, 3, 1, 1)
        self.conv = nn.Conv2d(128 if small else 192, 94 if small else 126, 3, 1, 1)

    def forward(self, correlation: Tensor, flow: Tensor) -> Tensor:
        match = torch.relu(self.convc1(correlation))
        if self.convc2 is not None:
            match = torch.relu(self.convc2(match))
        motion = torch.relu(self.convf2(torch.relu(self.convf1(flow))))
        return torch.cat([torch.relu(self.conv(torch.cat([match, motion], 1))), flow], 1)


class _Gru(nn.Module):
    def __init__(self, inputs: int, *, small: bool) -> None:
        super().__init__()
        kernels = {'': (3, 3)} if small else {'1': (1, 5), '2': (5, 1)}
        for half, (height, width) in kernels.items():
            for gate in 'zrq':
                setattr(self, f'conv{gate}{half}', nn.Conv2d(
                    HIDDEN + inputs, HIDDEN, (height, width),
                    padding=(height // 2, width // 2)))
        self.halves = tuple(kernels)

    def forward(self, hidden: Tensor, values: Tensor) -> Tensor:
        for half in self.halves:
            convz, convr, convq = (getattr(self, f'conv{gate}{half}') for gate in 'zrq')
            joined = torch.cat([hidden, values], 1)
            z, r = torch.sigmoid(convz(joined)), torch.sigmoid(convr(joined))
            q = torch.tanh(convq(torch.cat([r * hidden, values], 1)))
            hidden = (1 - z) * hidden + z * q
        return hidden


class _FlowHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(HIDDEN, width, 3, 1, 1)
        self.conv2 = nn.Conv2d(width, 2, 3, 1, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.conv1(hidden)))


class _Update(nn.Module):
    def __init__(self, *, small: bool) -> None:
        super().__init__()
        self.encoder = _Motion(small=small)
        self.gru = _Gru(HIDDEN + (96 if small else 128), small=small)
        self.flow_head = _FlowHead(128 if small else 256)
        self.mask = nn.Sequential(nn.Conv2d(HIDDEN, 256, 3, 1, 1), nn.ReLU(),
                                  nn.Conv2d(256, 144, 1))

    def forward(self, hidden: Tensor, context: Tensor, correlation: Tensor,
                flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        motion = self.encoder(correlation, flow)
        hidden = self.gru(hidden, torch.cat([context, motion], 1))
        return hidden, 0.25 * self.mask(hidden), flow + self.flow_head(hidden)


class PlainDIP(nn.Module):
    """The network, written plainly; its state_dict is DIP's."""

    def __init__(self) -> None:
        super().__init__()
        self.fnet = _Encoder()
        self.update_block_s = _Update(small=True)
        self.update_block = _Update(small=False)

    def forward(self, image1: Tensor, image2: Tensor, *, start: Tensor, levels: Sequence[int],
                iterations: int, warm: bool) -> Tensor:
        """Return the flow (B, 2, H, W), px, of two float RGB images 0..255.

        H and W are multiples of 16. ``start`` is the flow, px of its level, with which the
        first of ``levels`` starts; ``iterations`` are those of each level. ``warm`` says
        which order of pooling and activation makes the hidden state of a level.
        """
        batch = image1.shape[0]
        images = torch.cat([image1, image2]).flip(1) * (2 / 255) - 1
        quarter = self.fnet(images).split(batch)
        flow = start
        for index, level in enumerate(levels):
            pool = level // 4
            features_a, features_b = (functional.avg_pool2d(values, pool) for values in quarter)
            source = features_a if warm else quarter[0]
            hidden, context = torch.tanh(source[:, :HIDDEN]), torch.relu(source[:, HIDDEN:])
            if not warm:
                hidden = functional.avg_pool2d(hidden, pool)
                context = functional.avg_pool2d(context, pool)
            if index:
                height, width = features_a.shape[-2:]
                ratio = height / flow.shape[-2]
                if ratio != 1:
                    flow = ratio * functional.interpolate(flow, size=(height, width),
                                                          mode='bilinear', align_corners=True)
            stack = shifted_stack(features_b)
            for _ in range(iterations):
                hidden, mask, flow = self.update_block_s(
                    hidden, context, propagation(features_a, stack, flow), flow)
                hidden, mask, flow = self.update_block(
                    hidden, context, search(features_a, features_b, flow), flow)
            flow = upsample(flow, mask)
        ratio = image1.shape[-2] / flow.shape[-2]
        if ratio == 1:
            return flow
        size = (image1.shape[-2], image1.shape[-1])
        return ratio * functional.interpolate(flow, size=size, mode='bilinear',
                                              align_corners=True)
