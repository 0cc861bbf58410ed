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

"""What several verbs take from the command line."""

import argparse
from collections.abc import Mapping
import json
from pathlib import Path
from typing import TYPE_CHECKING

from flow_ros.cli import CommandError

if TYPE_CHECKING:  # nothing heavy is imported before it is known that it is needed
    from flow_ros.networks import FlowNetwork

PRECISIONS = ('f32', 'fast')
"""Those of the runtimes, which are not imported for --help."""


def frame_size(text: str) -> tuple[int, int]:
    """Return (width, height) in px of WIDTHxHEIGHT."""
    from flow_ros.sources import parse_size, SourceError

    try:
        return parse_size(text)
    except SourceError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    """Return a whole number from 1 on."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'expected a whole number from 1 on; seen {text!r}')
    return value


def check_json(path: Path | None) -> None:
    """Find out before the work, not after it, that --json cannot be written; CommandError."""
    if path is not None and not path.resolve().parent.is_dir():
        raise CommandError(f'--json {path}: its folder does not exist')
    if path is not None and path.is_dir():
        raise CommandError(f'--json {path} is a folder; expected a file')


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write the numbers that --json asks for and say where; CommandError where it fails."""
    try:
        path.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    except OSError as error:
        raise CommandError(f'--json {path} cannot be written: {error.strerror}') from error
    print(f'numbers: {path}')


def named_network(name: str, weights: str | Path | None) -> 'FlowNetwork':
    """Return the network ``name``; raises CommandError where there is none."""
    from flow_ros.networks import create, WeightsError

    try:
        return create(name, weights)
    except WeightsError as error:
        raise CommandError(str(error)) from error
    except ValueError as error:
        raise CommandError(f'--network: {error}') from error
