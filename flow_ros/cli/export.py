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

"""``flow_ros export``: the acts of a network as ONNX files, for engines of one's own."""

import argparse
from collections.abc import Sequence
import hashlib
import json
from pathlib import Path
import time
from typing import Any, TYPE_CHECKING

from flow_ros.cli import CommandError
from flow_ros.cli.arguments import PRECISIONS
from flow_ros.cli.waiting import Waiting

if TYPE_CHECKING:  # nothing heavy is imported before it is known that it is needed
    from rich.table import Table

    from flow_ros.networks import FlowNetwork
    from flow_ros.runtimes.acts import Act, TensorSpec
    from flow_ros.runtimes.export import Profile

MANIFEST = 'acts.json'
DESCRIPTION = """Write the acts of a network as ONNX (opset 18), one file each, and acts.json.

encode is run once for each frame; the steps of the schedule follow; then finish (of dip:
upsample). Python owns the loop, so that a budget is free at run time. acts.json says for each
file its inputs and outputs, with names, types, shapes and how many px a cell stands for; --list
shows the same as a table and writes nothing. Frames are padded to multiples of what acts.json
calls multiple (of hd3: resized), as the network's own code does.

Static files are of one size. With --dynamic there is one file for each engine, of any size;
its shapes hold names such as 16*h. --precision fast has the convolutions in half precision;
flow, coordinates and sampling stay in single.
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of this verb."""
    parser = subparsers.add_parser(
        'export', help='the acts of a network as ONNX files', description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('network', metavar='NETWORK', help='network or model, such as dip_rt')
    parser.add_argument('--size', metavar='WIDTHxHEIGHT', default='640x480',
                        help='frame size, px; with --dynamic the one it is tuned for '
                             '(default: %(default)s)')
    parser.add_argument('--out', type=Path, metavar='DIR',
                        help='write here (default: out/onnx/NETWORK)')
    parser.add_argument('--dynamic', nargs='*', metavar='MIN MAX',
                        help='files for any frame size; with two sizes, WIDTHxHEIGHT, acts.json '
                             'has the shapes for a TensorRT profile')
    parser.add_argument('--precision', choices=PRECISIONS, default='f32',
                        help='f32, or fast: convolutions in half precision (default: f32)')
    parser.add_argument('--weights', metavar='FILE', default='default',
                        help='weights of the network (default: those shipped)')
    parser.add_argument('--list', action='store_true', dest='only_list',
                        help='show the acts with their names, types and shapes; write nothing')


def run(options: argparse.Namespace) -> int:
    """Export; 0 where all acts are written and checked."""
    from rich.console import Console

    width, height = _size(options.size)
    ranges = _range(options.dynamic, (width, height))
    network = _network(options.network, None if options.only_list else options.weights,
                       options.precision)
    from flow_ros.runtimes.acts import record_acts
    from flow_ros.runtimes.export import ExportError, multiple_of, profile

    dynamic = options.dynamic is not None
    acts = record_acts(network, width=width, height=height, dynamic=dynamic)
    multiple = multiple_of(acts)
    try:
        profiles = {act.name: profile(act, ranges, multiple) for act in acts} if ranges else {}
    except ValueError as error:
        raise CommandError(str(error)) from error
    console = Console(highlight=False)
    if options.only_list:
        console.print(_table(network, acts, options))
        return 0
    manifest = {
        'network': options.network, 'family': network.name, 'options': network.options(),
        'precision': options.precision, 'size': [width, height], 'dynamic': dynamic,
        'multiple': multiple, 'opset': 18}
    out = options.out or Path('out/onnx') / options.network
    try:
        _write_all(network, acts, out, manifest, profiles, dynamic=dynamic, console=console)
    except ExportError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f'{out} cannot be written: {error.strerror or error}; choose another '
                           f'folder with --out') from error
    return 0


def _write_all(network: 'FlowNetwork', acts: 'Sequence[Act]', out: Path,
               manifest: dict[str, Any], profiles: 'dict[str, Profile]', *, dynamic: bool,
               console: Any) -> None:
    """Write one file for each act, then the manifest; say so, line by line."""
    from flow_ros.runtimes.export import check_onnx, export_act, ExportError

    out.mkdir(parents=True, exist_ok=True)
    _replace(out / '.writable', b'')  # found out now, not after a minute of work
    (out / '.writable').unlink()
    old = _files_of(out / MANIFEST)
    entries = []
    for index, act in enumerate(acts, start=1):
        begin = time.monotonic()
        with Waiting(console, f'exporting {act.name} ({index} of {len(acts)})'):
            model = export_act(network, act, dynamic=dynamic)
            path = out / f'{act.name}.onnx'
            _replace(path, model)
            written = path.read_bytes()
            check_onnx(written, name=str(path))
        digest = hashlib.sha256(model).hexdigest()
        if hashlib.sha256(written).hexdigest() != digest:
            raise ExportError(f'{path} does not hold what was written: check the disk')
        entries.append(_entry(act, path.name, digest, profiles.get(act.name), dynamic=dynamic))
        console.print(f'{index} of {len(acts)}  {path}  {len(model) / 2 ** 20:.1f} MiB, '
                      f'checked, {time.monotonic() - begin:.1f} s', soft_wrap=True)
    text = json.dumps({**manifest, 'acts': entries}, indent=2) + '\n'
    _replace(out / MANIFEST, text.encode())
    for name in old - {entry['file'] for entry in entries}:
        (out / name).unlink(missing_ok=True)  # of an export that this one replaces
    console.print(f'names, types and shapes: {out / MANIFEST}', soft_wrap=True)


def _replace(path: Path, data: bytes) -> None:
    """Write ``path`` whole or not at all."""
    temporary = path.with_name(f'.{path.name}.part')
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _files_of(manifest: Path) -> set[str]:
    """Return the files that an earlier export wrote beside ``manifest``."""
    try:
        acts = json.loads(manifest.read_text(encoding='utf-8'))['acts']
        files = {str(act['file']) for act in acts}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in files if name.endswith('.onnx') and Path(name).name == name}


def _entry(act: 'Act', file: str, digest: str, shapes: 'Profile | None', *,
           dynamic: bool) -> dict[str, Any]:
    """Return what the manifest says of an act."""
    from flow_ros.runtimes.export import dims_of

    entry: dict[str, Any] = {'name': act.name, 'engine': act.engine, 'file': file,
                             'sha256': digest}
    for key, specs in (('inputs', act.inputs), ('outputs', act.outputs)):
        entry[key] = [{'name': spec.name, 'shape': list(dims_of(act, spec, dynamic=dynamic)),
                       'type': _type(spec), 'px_per_cell': _cells(act, key, index)}
                      for index, spec in enumerate(specs)]
    if shapes is not None:
        entry['profile'] = {name: [list(shape) for shape in three]
                            for name, three in shapes.items()}
    return entry


def _table(network: 'FlowNetwork', acts: 'Sequence[Act]', options: argparse.Namespace) -> 'Table':
    """Return the acts as a table to read."""
    from rich.table import Table

    from flow_ros.runtimes.export import dims_of

    dynamic = options.dynamic is not None
    table = Table(title=f'{options.network} ({network.name}), {options.precision}, frames of '
                        f'{"any size" if dynamic else options.size}')
    for title in ('act', '', 'name', 'type', 'shape', 'px per cell'):
        table.add_column(title)
    for act in acts:
        for key, specs in (('in', act.inputs), ('out', act.outputs)):
            for index, spec in enumerate(specs):
                first = index == 0
                cells = _cells(act, 'inputs' if key == 'in' else 'outputs', index)
                table.add_row(act.name if first and key == 'in' else '', key if first else '',
                              spec.name, _type(spec),
                              ' x '.join(map(str, dims_of(act, spec, dynamic=dynamic))),
                              ', '.join(map(str, cells)), end_section=False)
        table.add_section()
    return table


def _cells(act: 'Act', key: str, index: int) -> list[int]:
    """Return the px per cell of a tensor, on each level the act serves; [] where not a map."""
    found = [getattr(variant, key)[index].px_per_cell for variant in act.variants or (act,)]
    return sorted({cell for cell in found if cell is not None}, reverse=True)


def _type(spec: 'TensorSpec') -> str:
    return str(spec.dtype).removeprefix('torch.')


def _network(name: str, weights: str | None, precision: str) -> 'FlowNetwork':
    """Return the network, prepared for ``precision``."""
    from flow_ros.networks import create
    from flow_ros.runtimes.export import prepared

    try:
        return prepared(create(name, weights), precision)
    except ValueError as error:  # WeightsError among them
        raise CommandError(str(error)) from error


def _range(dynamic: list[str] | None, size: tuple[int, int]) -> Any:
    """Return the SizeRange of --dynamic MIN MAX, or None where there are no limits."""
    if not dynamic:
        return None
    if len(dynamic) != 2:
        raise CommandError(f'--dynamic takes no sizes, or two: MIN MAX, as in --dynamic 320x240 '
                           f'1280x960; seen {" ".join(dynamic)}')
    from flow_ros.runtimes.export import SizeRange

    least, most = (_size(text) for text in dynamic)
    try:
        return SizeRange(least, size, most)
    except ValueError as error:
        raise CommandError(f'--dynamic and --size: {error}') from error


def _size(text: str) -> tuple[int, int]:
    from flow_ros.sources import parse_size, SourceError

    try:
        return parse_size(text)
    except SourceError as error:
        raise CommandError(str(error)) from error
