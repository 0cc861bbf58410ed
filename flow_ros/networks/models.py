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

"""Models: weights files with a name, the folders they are looked for in, and what they hold.

A model is ``NAME.safetensors`` in one of ``model_folders()``. Its metadata say for which
family of networks it is (``network``) and with which fields of the configuration (``options``,
JSON, those that differ from the defaults); a card, ``NAME.md``, may lie beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
import json
import os
from pathlib import Path
import re
import sys
from typing import Any
import warnings

import numpy as np
from safetensors import safe_open, SafetensorError
from safetensors.torch import load_file
import torch
from torch import Tensor

from flow_ros.networks.published import recognise, without_prefix

SUFFIX = '.safetensors'
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]*')
TAKEN = frozenset({'all', 'dis_medium', 'zero'})
"""Words of ``flow_ros evaluate``, which no model may hide behind."""
_LARGEST = 1024
"""No width or radius of any network is larger: a file cannot ask for all memory there is."""
_SHOWN = 80


class WeightsError(ValueError):
    """A weights file is missing, damaged, or made for another network."""


@dataclass(frozen=True)
class Model:
    """A weights file with a name: its family and the options it was made with."""

    name: str
    family: str
    options: Mapping[str, Any]
    path: Path

    @property
    def card(self) -> Path | None:
        """The model card beside the file, if there is one."""
        card = self.path.with_suffix('.md')
        return card if card.is_file() else None


@dataclass(frozen=True)
class WeightsFile:
    """What a weights file holds; ``family`` and ``options`` are None where it does not say."""

    path: Path
    tensors: Mapping[str, Tensor] = field(repr=False)
    family: str | None = None
    options: Mapping[str, Any] | None = None
    published: bool = False
    """Told by its keys alone: not written by flow_ros."""


def user_folder() -> Path:
    """Return where ``flow_ros import-weights`` writes: $XDG_DATA_HOME/flow_ros/models."""
    given = os.environ.get('XDG_DATA_HOME', '')
    base = Path(given) if Path(given).is_absolute() else Path.home() / '.local' / 'share'
    return base / 'flow_ros' / 'models'


def shipped_folders() -> list[Path]:
    """Return the folders of models that are not the user's own imports.

    $FLOW_ROS_MODELS, beside the package (a source tree), and share/flow_ros/models of every
    prefix in $AMENT_PREFIX_PATH and of Python itself.
    """
    folders = [Path(__file__).resolve().parents[2] / 'models']
    if os.environ.get('FLOW_ROS_MODELS'):
        folders.insert(0, Path(os.environ['FLOW_ROS_MODELS']))
    prefixes = [p for p in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if p]
    return folders + [Path(prefix) / 'share/flow_ros/models'
                      for prefix in [*prefixes, sys.prefix]]


def model_folders() -> list[Path]:
    """Return the folders models are looked for in, each once; the user's imports come last."""
    return list(dict.fromkeys([*shipped_folders(), user_folder()]))


def is_name(name: str) -> bool:
    """Return whether ``name`` can be a model's: a plain word, no path, no file's whole name."""
    return (_NAME.fullmatch(name) is not None and not name.endswith(SUFFIX)
            and name not in TAKEN)


def find_path(name: str, folders: list[Path] | None = None) -> Path | None:
    """Return the first file of the model ``name``, or None where there is none."""
    if not is_name(name):
        return None
    if folders is None:
        folders = model_folders()
    found = (folder / f'{name}{SUFFIX}' for folder in folders)
    return next((path for path in found if path.is_file()), None)


def find_model(name: str) -> Model | None:
    """Return the model ``name``, or None where there is none.

    Raises WeightsError where its file is damaged or does not say what it is for.
    """
    path = find_path(name)
    return None if path is None else read_model(path)


def read_model(path: Path) -> Model:
    """Return what the metadata of ``path`` say; raises WeightsError where they say nothing."""
    family, options = _metadata(path)
    if family is None:
        raise WeightsError(f'model file {path} does not say for which network it is (metadata '
                           f"'network'): bring it here with `flow_ros import-weights`")
    return Model(path.name.removesuffix(SUFFIX), family, options or {}, path)


def list_models() -> tuple[Model, ...]:
    """Return all models found, shipped ones first; files that are none are left out."""
    found: dict[str, Model] = {}
    for folder in model_folders():
        for path in sorted(folder.glob(f'*{SUFFIX}')):
            name = path.name.removesuffix(SUFFIX)
            if not is_name(name) or name in found:
                continue
            try:
                found[name] = read_model(path)
            except WeightsError:
                continue  # said when it is asked for by name
    return tuple(found.values())


def read_weights(path: Path) -> WeightsFile:
    """Read safetensors, or a checkpoint of torch.save without running any code in it.

    The prefixes of published checkpoints are taken off. Raises WeightsError that names what
    was found and what was expected.
    """
    if path.suffix == SUFFIX:
        family, options = _metadata(path)
        if family is not None:
            return WeightsFile(path, _tensors(path), family, options)
    tensors = without_prefix(_tensors(path))
    known = recognise(tensors)
    if known is None:
        return WeightsFile(path, tensors, published=True)
    return WeightsFile(path, tensors, known.family, known.options, published=True)


def _metadata(path: Path) -> tuple[str | None, dict[str, Any] | None]:
    """Return (family, options) as the metadata of a safetensors file say them, or None."""
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, str(error)) from error
    text = metadata.get('options')
    options: Any = None
    if text is not None:
        try:
            options = json.loads(text, parse_int=_whole)
        except (ValueError, RecursionError):
            pass
        if not isinstance(options, dict):
            raise WeightsError(f'weights file {path}: its metadata say options '
                               f'{text[:_SHOWN]!r}; expected a JSON object, whole '
                               f'numbers up to {_LARGEST}. Choose another file')
    return metadata.get('network'), options


def _whole(digits: str) -> int:
    """Return a whole number of the options; ValueError where it is too large for one."""
    value = int(digits)
    if abs(value) > _LARGEST:
        raise ValueError(f'{value} is larger than {_LARGEST}')
    return value


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == SUFFIX:
            return load_file(path)
        # A published checkpoint may tell its best error beside the weights, as a NumPy number.
        with torch.serialization.safe_globals(_NUMPY_NUMBERS), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of protocols: the error, if there is one, says it
            loaded = torch.load(path, map_location='cpu', weights_only=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        # The first sentence: torch goes on with advice on how files are saved.
        raise _unreadable(path, str(error).splitlines()[0].split('. ')[0]) from error
    except Exception as error:  # any: a damaged pickle is a wrong program
        # Not what torch says: it advises to run the file's code.
        raise _unreadable(path, 'it is no checkpoint, or holds more than tensors') from error
    if isinstance(loaded, dict) and isinstance(loaded.get('state_dict'), dict):
        loaded = loaded['state_dict']
    if not (isinstance(loaded, dict) and loaded
            and all(isinstance(value, Tensor) for value in loaded.values())):
        held = f' with {some([str(key) for key in loaded])}' if isinstance(loaded, dict) else ''
        raise WeightsError(f'weights file {path} holds {type(loaded).__name__}{held}, not a '
                           f'state_dict of tensors, bare or under state_dict: choose another '
                           f'file')
    return {str(key): value for key, value in loaded.items()}


def _unreadable(path: Path, why: str) -> WeightsError:
    return WeightsError(f'weights file {path} cannot be read: {why}. Expected safetensors or a '
                        f'torch checkpoint of plain tensors; fetch it again')


def _numpy_numbers() -> list[Any]:
    """Return what a pickled NumPy number consists of: data, none of it runs code of the file."""
    scalar = np.float64(0).__reduce__()[0]
    types = [np.dtype, *{type(np.dtype(name)) for name in ('f4', 'f8', 'i4', 'i8')}]
    # Files written by NumPy 1 name the old place of the function.
    return [scalar, (scalar, 'numpy.core.multiarray.scalar'),
            (scalar, 'numpy._core.multiarray.scalar'), *types]


_NUMPY_NUMBERS = _numpy_numbers()


def some(values: list[str]) -> str:
    """Return the first of ``values`` in words, and how many more there are."""
    if not values:
        return 'none'
    return ', '.join(values[:3]) + (f' and {len(values) - 3} more' if len(values) > 3 else '')
