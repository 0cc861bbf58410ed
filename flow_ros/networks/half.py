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

"""Half precision of a network: its convolutions in float16, all else as it was.

The networks do the rest themselves: what enters a convolution takes the type of its weights,
and flow, coordinates, sampling and the arithmetic of probabilities stay float32.
"""

from collections.abc import Iterator

import torch
from torch import nn, Tensor
from torch.nn.utils import fuse_conv_bn_eval

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


class Affine(nn.Module):
    """``scale`` * x + ``shift`` for each channel: a batch norm that no longer learns."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        # In float64, before anything is halved: half precision knows no small variance.
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer('scale', scale.float()[None, :, None, None])
        self.register_buffer('shift', shift.float()[None, :, None, None])

    def forward(self, values: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return values * self.scale + self.shift


def halve(network: nn.Module) -> None:
    """Bring the convolutions of ``network``, in eval mode, to float16, in place.

    A batch norm is first folded, in float32, into the convolution that it follows: in an
    ``nn.Sequential`` the one before it, elsewhere the one that the module's ``folds``,
    ((convolution, norm), ...), names. The others become a scale and a shift in float16.
    """
    fold_norms(network)
    for module in network.modules():
        if isinstance(module, (*CONVOLUTIONS, Affine)):
            module.half()


def fold_norms(network: nn.Module) -> None:
    """Fold the batch norms of ``network``, in eval mode, as ``halve`` does; in place."""
    for parent in list(network.modules()):
        for first, second in _pairs(parent):
            convolution, norm = getattr(parent, first), getattr(parent, second)
            transposed = isinstance(convolution, nn.ConvTranspose2d)
            setattr(parent, first, fuse_conv_bn_eval(convolution, norm, transposed))
            setattr(parent, second, nn.Identity())
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, Affine(child))


def _pairs(parent: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of a convolution and the batch norm that alone reads its result."""
    named: tuple[tuple[str, str], ...] = getattr(parent, 'folds', ())
    if isinstance(parent, nn.Sequential):
        names = [name for name, _ in parent.named_children()]
        named = tuple(zip(names, names[1:]))
    for first, second in named:
        if (isinstance(getattr(parent, first), CONVOLUTIONS)
                and isinstance(getattr(parent, second), nn.BatchNorm2d)):
            yield first, second
