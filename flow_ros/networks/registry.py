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

"""Makes networks by name and loads their weights strictly.

A name is a family of networks (``names()``) or a model (``list_models()``): a weights file with
a name, which knows its family and its options.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flow_ros.networks.base import FlowNetwork
from flow_ros.networks.models import (
    find_model,
    find_path,
    is_name,
    list_models,
    model_folders,
    read_weights,
    some,
    SUFFIX,
    WeightsError,
    WeightsFile,
)

_BATCH_COUNTER = '.num_batches_tracked'


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
    """Return the names of all families of networks, the default first."""
    return tuple(_MAKERS)


def known_names() -> tuple[str, ...]:
    """Return every name that ``create`` takes: families, then models."""
    return tuple(dict.fromkeys([*_MAKERS, *(model.name for model in list_models())]))


def family_of(name: str) -> str:
    """Return the family of ``name``, a family itself or a model; ValueError if it is neither."""
    return _named(name)[0]


def create(name: str, weights: str | Path | None = None, **options: Any) -> FlowNetwork:
    """Make the network ``name``, a family or a model, in eval mode.

    ``weights``: None for untrained ones, 'default' for those of the model (of a family: the
    model of the same name), or a path to safetensors or to a published checkpoint (``.pth``).
    ``options`` are the fields of the network's configuration. Those that a weights file was
    made with are taken from it, and those of a model from the model; to ask for others with
    these weights is an error, but for the network's ``free_options``. Raises ValueError for an
    unknown name or option and WeightsError for weights that cannot be used.
    """
    family, named = _named(name)
    given = {key: _tuples(value) for key, value in {**named, **options}.items()}
    if weights is None:
        return _make(name, family, given).eval()
    path = default_weights_path(name) if weights == 'default' else Path(weights)
    file = _read(path, name)
    recorded = None
    if file.family == family and file.options is not None:
        recorded = {key: _tuples(value) for key, value in file.options.items()}
    network = _make(name, family, {**(recorded or {}), **given}, file)
    if recorded is not None:
        _check_agreement(network, file, recorded, given)
    network.load_state_dict(_fitting(network, file))
    return network.eval()


def default_weights_path(name: str) -> Path:
    """Return where the weights of the model or family ``name`` are.

    Looked for in ``models.model_folders()``. Raises WeightsError naming these folders where
    there are none.
    """
    path = find_path(name)
    if path is not None:
        return path
    others = [model.name for model in list_models() if model.family == name]
    instead = f'use {" or ".join(others)}, which {"is" if len(others) == 1 else "are"} of this ' \
              f'family, ' if others else 'choose another network, '
    raise WeightsError(f'no weights for {name!r}: {_looked(name)}. Give a file of your own as '
                       f'weights, import published ones with `flow_ros import-weights FILE`, '
                       f'{instead}or set FLOW_ROS_MODELS to the folder that holds it')


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


def _named(name: str) -> tuple[str, Mapping[str, Any]]:
    """Return the family of ``name`` and the options of the model it names, {} of a family."""
    if name in _MAKERS:
        return name, {}
    model = find_model(name)
    if model is None:
        hint = (_looked(name) if is_name(name) else
                'a file is given as weights, or made a model by `flow_ros import-weights FILE`')
        raise ValueError(f'unknown network {name!r}; known are {", ".join(known_names())}; {hint}')
    if model.family not in _MAKERS:
        raise WeightsError(f'model file {model.path} says it is for {model.family!r}, which is '
                           f'none of the networks known: {", ".join(_MAKERS)}')
    return model.family, model.options


def _looked(name: str) -> str:
    folders = ', '.join(f'{folder}{"" if folder.is_dir() else " (not there)"}'
                        for folder in model_folders())
    return f'looked for {name}{SUFFIX} in {folders}'


def _make(name: str, family: str, options: Mapping[str, Any],
          file: WeightsFile | None = None) -> FlowNetwork:
    try:
        return _MAKERS[family](**options)
    except (TypeError, ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        if file is not None and file.options:
            raise WeightsError(f'network {name!r} does not take these options, with those that '
                               f'weights file {file.path} says it was made with: {why}. Choose '
                               f'another file, or the flow_ros that wrote it') from error
        raise ValueError(f'network {name!r} does not take these options: {why}') from error


def _read(path: Path, name: str) -> WeightsFile:
    if not path.is_file():
        raise WeightsError(f'weights file {path} does not exist: check the path, or use '
                           f"'default' for the shipped weights of {name}")
    return read_weights(path)


def _check_agreement(network: FlowNetwork, file: WeightsFile, recorded: Mapping[str, Any],
                     given: Mapping[str, Any]) -> None:
    """Refuse options that are not those the weights were made with."""
    config: Any = network.config
    defaults = {field.name: field.default for field in fields(config)}
    for key, value in given.items():
        made_with = recorded.get(key, defaults.get(key))
        if value != made_with and key not in network.free_options:
            raise WeightsError(f'weights file {file.path} was made with {key}={made_with!r}, but '
                               f'{key}={value!r} was asked for: leave the option out, or choose '
                               f'another file')


def _fitting(network: FlowNetwork, file: WeightsFile) -> dict[str, Tensor]:
    """Return the tensors of ``file`` as ``network`` takes them: every key and shape must fit.

    Only the counters of batch norms may be missing from a published checkpoint: PyTorch before
    0.4.1 had none, and nothing that is computed here reads them. Raises WeightsError that
    names what was found and what was expected.
    """
    expected = network.state_dict()
    tensors = dict(file.tensors)
    if file.published:
        for key, value in expected.items():
            if key.endswith(_BATCH_COUNTER):
                tensors.setdefault(key, value)
    missing = [key for key in expected if key not in tensors]
    foreign = [key for key in tensors if key not in expected]
    misshapen = [f'{key} {tuple(tensors[key].shape)} instead of {tuple(value.shape)}'
                 for key, value in expected.items()
                 if key in tensors and tensors[key].shape != value.shape]
    other = file.family not in (None, network.name)
    if missing or foreign or misshapen or other:
        says = 'its keys are those of' if file.published else 'it says it is for'
        made_for = f' ({says} {file.family})' if other else ''
        raise WeightsError(
            f'weights file {file.path} is not for {network.name}{made_for}: it holds '
            f'{len(file.tensors)} tensors, {len(expected)} were expected; '
            f'missing {some(missing)}; not known {some(foreign)}; other shapes '
            f'{some(misshapen)}. Choose the network the file was made for, or another file')
    return {key: value.to(expected[key].dtype) for key, value in tensors.items()}


def _tuples(value: Any) -> Any:
    """Return ``value`` with the lists of JSON and YAML as the tuples they are in a config."""
    return tuple(_tuples(part) for part in value) if isinstance(value, (list, tuple)) else value
