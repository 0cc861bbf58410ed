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

"""``flow_ros import-weights``: make a model of a checkpoint one owns."""

import argparse
from pathlib import Path
from typing import Any

from flow_ros.cli import CommandError

DESCRIPTION = """Import published weights of DIP or HD3, so that --network NAME works everywhere.

FILE is a checkpoint as its authors publish it (.pth, .pth.tar; bare or under state_dict, with
the prefixes module. or module.hd3net.), or safetensors of one's own training. Which network it
is for is told by its keys. It is loaded strictly, without running any code in it, and written as
NAME.safetensors, with a card NAME.md that names the file it is from, to the folder of your models.
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of this verb."""
    parser = subparsers.add_parser(
        'import-weights', help='make a model of a published checkpoint', description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', type=Path, metavar='FILE', help='checkpoint to import')
    parser.add_argument('--name', help="what to call the model (default: the network's name, so "
                        'that --network dip or --network hd3 finds it)')
    parser.add_argument('--folder', type=Path, metavar='DIR',
                        help='write here instead of $XDG_DATA_HOME/flow_ros/models '
                             '(~/.local/share/flow_ros/models); models are found there if '
                             'FLOW_ROS_MODELS names it')
    parser.add_argument('--replace', action='store_true',
                        help='replace a model of this name that was imported before')


def run(options: argparse.Namespace) -> int:
    """Import; 0 where it went well."""
    from flow_ros.networks.importing import import_weights
    from flow_ros.networks.models import find_path

    try:
        model = import_weights(options.file, name=options.name, folder=options.folder,
                               replace=options.replace)
    except ValueError as error:  # WeightsError among them
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f'the model cannot be written: {error}') from error
    made = ', '.join(f'{key}={value}' for key, value in model.options.items())
    print(f'{options.file} is {model.family}{f" with {made}" if made else ""}')
    print(f'weights: {model.path}')
    print(f'card: {model.card}')
    found = find_path(model.name)
    if found is not None and found.samefile(model.path):
        print(f'use it: --network {model.name}')
    else:
        print(f'use it: FLOW_ROS_MODELS={model.path.parent.resolve()} and --network {model.name}')
    return 0
