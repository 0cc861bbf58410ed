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

"""The published checkpoints: told apart by their keys, without the prefixes of their wrappers.

Their authors saved a network inside ``DataParallel`` (``module.``), HD3 inside a model that also
knows its loss (``module.hd3net.``); bare, or beside the epoch under ``state_dict``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar('T')

PREFIXES = ('module.hd3net.', 'hd3net.', 'module.')

EXPECTED: Mapping[str, str] = {
    'dip': '92 tensors such as fnet.conv1.weight, update_block_s.encoder.convc1.weight and '
           'update_block.mask.2.bias',
    'hd3': 'cost_bn_0 to cost_bn_4, Decoder_0 to Decoder_4 and encoder: 687 tensors (hd3f), 698 '
           '(hd3fc), 312 (VGG encoder, resnet decoder) or 342 (VGG encoder, hda decoder)',
}
"""What the published checkpoints of each family hold, in words, without prefixes."""


@dataclass(frozen=True)
class Published:
    """What a set of keys was recognised as: the family and the fields of its configuration."""

    family: str
    options: Mapping[str, Any] = field(default_factory=dict)


def without_prefix(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return ``tensors`` with the prefixes of published checkpoints taken off their keys."""
    def bare(key: str) -> str:
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), '')
        return key[len(prefix):]

    result = {bare(key): value for key, value in tensors.items()}
    # Never of two tensors one.
    return result if len(result) == len(tensors) else dict(tensors)


def recognise(keys: Iterable[str]) -> Published | None:
    """Return what ``keys``, without prefixes, are the weights of; None where nothing known.

    A few keys decide, so that a file that lacks others is still told by its family's name.
    """
    keys = set(keys)
    parts = {key.split('.')[0] for key in keys}
    if {'fnet', 'update_block_s'} <= parts:
        return Published('dip')
    if 'encoder' in parts and {'cost_bn_0', 'Decoder_0'} & parts:
        return Published('hd3', {
            'encoder': 'dlaup' if any(key.startswith('encoder.base.') for key in keys) else 'vgg',
            'decoder': 'hda' if any('.mapping.root.' in key for key in keys) else 'resnet',
            'context': any('.dc_conv_' in key for key in keys)})
    return None
