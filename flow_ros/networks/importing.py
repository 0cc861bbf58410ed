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

"""Makes a model of a weights file: a published checkpoint, or weights of one's own training."""

from datetime import date
import hashlib
from pathlib import Path

import torch

from flow_ros.networks.base import count_parameters, FlowNetwork
from flow_ros.networks.models import (
    find_path,
    is_name,
    Model,
    read_weights,
    shipped_folders,
    SUFFIX,
    TAKEN,
    user_folder,
    WeightsError,
    WeightsFile,
)
from flow_ros.networks.published import EXPECTED
from flow_ros.networks.registry import create, names, save

_CHUNK = 1 << 20


def import_weights(path: Path, *, name: str | None = None, folder: Path | None = None,
                   replace: bool = False) -> Model:
    """Write the weights of ``path`` as the model ``name``, with a card beside it.

    ``path`` is a published checkpoint of DIP or HD3, recognised by its keys, or safetensors
    written by flow_ros. ``name`` is the family's where None, so that ``--network FAMILY``
    then works everywhere; ``folder`` is ``user_folder()`` where None. A model that was imported
    before is kept unless ``replace``; shipped ones are never replaced. No code in ``path`` is
    run. Raises WeightsError that names what was found and what was expected, ValueError for
    a name that cannot be taken and OSError where the model cannot be written.
    """
    if not path.is_file():
        seen = 'a folder' if path.is_dir() else 'nothing'
        raise WeightsError(f'{path}: expected a weights file; seen {seen} there')
    file = read_weights(path)
    if file.family is None:
        raise WeightsError(_unknown(file))
    if file.family not in names():
        raise WeightsError(f'{path} says it is for {file.family!r}; known are '
                           f'{", ".join(names())}')
    name = file.family if name is None else name
    folder = user_folder() if folder is None else folder
    _check_name(name, file.family, folder)
    target = folder / f'{name}{SUFFIX}'
    if target.exists() and not replace:
        raise ValueError(f'{target} is there already: give another name, or say that it shall be '
                         f'replaced (--replace)')
    network = create(file.family, path)
    spoilt = [key for key, value in network.state_dict().items()
              if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    if spoilt:
        raise WeightsError(f'{path} is damaged: NaN or infinite values in {len(spoilt)} of its '
                           f'tensors, {spoilt[0]} for one; fetch it again')
    model = Model(name, file.family, network.options(), target)
    digest = _sha256(path)
    folder.mkdir(parents=True, exist_ok=True)
    # The card first, under another name: where there is no room for it, there is no model.
    card, part = target.with_suffix('.md'), target.with_suffix('.md.part')
    try:
        part.write_text(_card(model, network, file, digest), encoding='utf-8')
        save(network, target, metadata={'source': path.name, 'source_sha256': digest,
                                        'imported': date.today().isoformat()})
        part.replace(card)
    finally:
        part.unlink(missing_ok=True)
    return model


def _check_name(name: str, family: str, folder: Path) -> None:
    if not is_name(name):
        raise ValueError(f'name {name!r} cannot be a model\'s: expected letters, digits, "_", "-" '
                         f'and ".", the first one a letter or digit, no folder, no {SUFFIX}, and '
                         f'none of {", ".join(sorted(TAKEN))}')
    if name in names() and name != family:
        raise ValueError(f'name {name!r} is that of another family of networks; the file is for '
                         f'{family}: give another name')
    shipped = find_path(name, [each for each in shipped_folders()
                               if each.resolve() != folder.resolve()])
    if shipped is not None:
        raise ValueError(f'name {name!r} is that of a model that is shipped, {shipped}: give '
                         f'another one (--name)')


def _unknown(file: WeightsFile) -> str:
    """Return what was found in a file of no known network, and what was expected."""
    keys = list(file.tensors)
    seen = ', '.join(f'{key} {tuple(file.tensors[key].shape)}' for key in keys[:5])
    more = f' and {len(keys) - 5} more' if len(keys) > 5 else ''
    expected = '; '.join(f'{family}: {what}' for family, what in EXPECTED.items())
    return (f'{file.path} holds no network that is known: found {len(keys)} tensors, {seen}{more}'
            f'. Expected {expected}; or safetensors written by flow_ros, whose metadata say what '
            f'they are for')


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _card(model: Model, network: FlowNetwork, file: WeightsFile, digest: str) -> str:
    options = ', '.join(f'`{key}={value!r}`' for key, value in model.options.items())
    size = file.path.stat().st_size
    absent = network.state_dict().keys() - set(file.tensors)
    counters = (f', but for {len(absent)} counters of batch norms, which PyTorch before 0.4.1 '
                f'did not write and nothing reads' if absent else '')
    how = ('a published checkpoint, recognised by its keys' if file.published
           else 'safetensors of flow_ros')
    return f"""# {model.path.name}

Weights of `{model.family}`, imported by `flow_ros import-weights`: {count_parameters(network):,} \
parameters, single precision.

| | |
|---|---|
| Network | `{model.family}` |
| Options | {options or 'the defaults'} |
| Source | `{file.path.name}`, {size:,} bytes, {how} |
| SHA-256 of the source | `{digest}` |
| Imported | {date.today().isoformat()} |
| Loaded | strictly: every tensor of the network was in the file, and no other{counters} |
| Licence | that of the source, which flow_ros does not know |

Use it by its name:

```
flow_ros evaluate --network {model.name} --data DIR
flow_ros run --network {model.name}
ros2 launch flow_ros flow.launch.py network:={model.name}
```

in Python `flow_ros.networks.create('{model.name}', 'default')`. How good it is has not been
measured here.
"""
