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

"""Makes networks by name and loads their weights strictly."""

from collections.abc import Callable, Mapping
import json
import os
from pathlib import Path
import pickle
import sys
from typing import Any

from safetensors import safe_open, SafetensorError
from safetensors.torch import load_file, save_file
import torch
from torch import Tensor

from flow_ros.networks.base import FlowNetwork


class WeightsError(ValueError):
    """A weights file is missing, damaged, or made for another network."""


def _dip_rt(**options: Any) -> FlowNetwork:
    from flow_ros.networks.dip_rt import DipRt, DipRtConfig
    return DipRt(DipRtConfig(**options))


def _dip(**options: Any) -> FlowNetwork:
    from flow_ros.networks.dip import DIP, DIPConfig
    return DIP(DIPConfig(**options))


def _hd3(**options: Any) -> FlowNetwork:
    from flow_ros.networks.hd3 import HD3, HD3Config
    return HD3(HD3Config(**options))


def _mscsl(**options: Any) -> FlowNetwork:
    from flow_ros.networks.mscsl import MSCSL, MSCSLConfig
    return MSCSL(MSCSLConfig(**options))


_MAKERS: Mapping[str, Callable[..., FlowNetwork]] = {
    'dip_rt': _dip_rt, 'dip': _dip, 'hd3': _hd3, 'mscsl': _mscsl}


def names() -> tuple[str, ...]:
    """Return the names of all networks, the default first."""
    return tuple(_MAKERS)


def create(name: str, weights: str | Path | None = None, **options: Any) -> FlowNetwork:
    """Make the network ``name``, in eval mode.

    ``weights``: None for untrained ones, 'default' for the shipped ones, or a path to
    safetensors or to a published checkpoint (``.pth``). ``options`` are the fields of the
    network's configuration. Raises ValueError for an unknown name or option and WeightsError
    for weights that cannot be used.
    """
    if name not in _MAKERS:
        raise ValueError(f'unknown network {name!r}; known are {", ".join(_MAKERS)}')
    try:
        network = _MAKERS[name](**options)
    except TypeError as error:
        raise ValueError(f'network {name!r} does not take these options: {error}') from error
    if weights is not None:
        path = default_weights_path(name) if weights == 'default' else Path(weights)
        load_weights(network, path)
    return network.eval()


def default_weights_path(name: str) -> Path:
    """Return where the shipped weights of ``name`` are.

    Looked for in $FLOW_ROS_MODELS, beside the package (a source tree), and under
    share/flow_ros/models of every prefix in $AMENT_PREFIX_PATH and of Python itself. Raises
    WeightsError naming these folders where there are none.
    """
    folders = [Path(__file__).resolve().parents[2] / 'models']
    if os.environ.get('FLOW_ROS_MODELS'):
        folders.insert(0, Path(os.environ['FLOW_ROS_MODELS']))
    prefixes = [p for p in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if p]
    folders += [Path(prefix) / 'share/flow_ros/models' for prefix in [*prefixes, sys.prefix]]
    for folder in folders:
        path = folder / f'{name}.safetensors'
        if path.is_file():
            return path
    looked = ', '.join(str(folder) for folder in folders)
    raise WeightsError(f'no shipped weights for {name!r}: looked for {name}.safetensors in '
                       f'{looked}. Give a file of your own as weights, choose another network, '
                       f'or set FLOW_ROS_MODELS to the folder that holds it')


def load_weights(network: FlowNetwork, path: Path) -> None:
    """Load ``path`` into ``network``, strictly: every key and shape must fit.

    Raises WeightsError that names what was found and what was expected.
    """
    if not path.is_file():
        raise WeightsError(f'weights file {path} does not exist: check the path, or use '
                           f"'default' for the shipped weights of {network.name}")
    tensors = _read(path)
    expected = network.state_dict()
    missing = [key for key in expected if key not in tensors]
    foreign = [key for key in tensors if key not in expected]
    misshapen = [f'{key} {tuple(tensors[key].shape)} instead of {tuple(value.shape)}'
                 for key, value in expected.items()
                 if key in tensors and tensors[key].shape != value.shape]
    if missing or foreign or misshapen:
        raise WeightsError(
            f'weights file {path} is not for {network.name}{_made_for(path)}: it holds '
            f'{len(tensors)} tensors, {len(expected)} were expected; '
            f'missing {_some(missing)}; not known {_some(foreign)}; other shapes '
            f'{_some(misshapen)}. Choose the network the file was made for, or another file')
    network.load_state_dict({key: value.to(expected[key].dtype)
                             for key, value in tensors.items()})


def save(network: FlowNetwork, path: Path, *, metadata: Mapping[str, str] | None = None,
         half: bool = False) -> None:
    """Write the weights of ``network`` as safetensors, with its name and options in the metadata.

    Raises OSError where they cannot be written; a file that was there is then still whole.
    """
    tensors = {key: value.detach().cpu().contiguous()
               for key, value in network.state_dict().items()}
    if half:
        tensors = {key: value.half() if value.is_floating_point() else value
                   for key, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + '.part')
    try:
        save_file(tensors, temporary, metadata={
            **(metadata or {}), 'network': network.name,
            'options': json.dumps(network.options(), sort_keys=True)})
    except SafetensorError as error:  # a full disk, for one
        temporary.unlink(missing_ok=True)
        raise OSError(str(error)) from error
    temporary.chmod(0o644)  # safetensors writes for the owner alone
    temporary.replace(path)


def _read(path: Path) -> dict[str, Tensor]:
    """Read safetensors, or a checkpoint of torch.save without running any code in it."""
    try:
        if path.suffix == '.safetensors':
            return load_file(path)
        loaded = torch.load(path, map_location='cpu', weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        # What torch says there advises to run the file's code.
        why = ('it is no checkpoint, or holds more than tensors'
               if isinstance(error, pickle.UnpicklingError) else error)
        raise WeightsError(f'weights file {path} cannot be read: {why}. Expected safetensors '
                           f'or a torch checkpoint of plain tensors; fetch it again') from error
    if isinstance(loaded, dict) and isinstance(loaded.get('state_dict'), dict):
        loaded = loaded['state_dict']
    if not (isinstance(loaded, dict) and loaded
            and all(isinstance(value, Tensor) for value in loaded.values())):
        raise WeightsError(f'weights file {path} holds {type(loaded).__name__}, not a '
                           f'state_dict of tensors: choose another file')
    return {str(key).removeprefix('module.'): value for key, value in loaded.items()}


def _made_for(path: Path) -> str:
    if path.suffix != '.safetensors':
        return ''
    with safe_open(path, 'pt') as file:
        made_for = (file.metadata() or {}).get('network')
    return f' (it says it is for {made_for})' if made_for else ''


def _some(values: list[str]) -> str:
    if not values:
        return 'none'
    return ', '.join(values[:3]) + (f' and {len(values) - 3} more' if len(values) > 3 else '')
