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

"""The entry point of ``flow_ros VERB``."""

import argparse
from collections.abc import Mapping, Sequence
import importlib
import importlib.util
import sys
from types import ModuleType

from flow_ros import __version__
from flow_ros.cli import CommandError

# What each verb does, in one line, so that --help needs none of their modules.
VERBS: Mapping[str, str] = {
    'run': 'the whole path on this machine: source, flow node, consumer, preview',
    'evaluate': 'measure a network against ground truth, beside DIS and zero flow',
    'bench': 'measure speed, memory, budgets and accuracy on this machine, into a report',
    'train': 'train or fine-tune a network',
    'finetune': "adapt a network to one's own robot, from a recording without labels",
    'import-weights': 'make a model of a published checkpoint of DIP or HD3',
    'export': 'the acts of a network as ONNX files, for engines of your own',
    'build': 'build engines before they are needed, for images and robots',
    'self-test': 'compare what this machine computes with reference outputs',
    'show-data': 'look at the training data: pictures of pairs with flow and occlusion',
}
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def module_name(verb: str) -> str:
    """Return the name of the module of ``verb``."""
    return f'flow_ros.cli.{verb.replace("-", "_")}'


def available_verbs() -> dict[str, str]:
    """Return the verbs of this installation with what they do; imports none of them."""
    return {verb: text for verb, text in VERBS.items()
            if importlib.util.find_spec(module_name(verb)) is not None}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``flow_ros`` with ``argv`` (default: the process's) and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbs = available_verbs()
    asked = next((word for word in arguments if not word.startswith('-')), None)
    parser = argparse.ArgumentParser(
        prog='flow_ros', description='Dense optical flow for ROS 2 robots, in real time.',
        epilog='flow_ros VERB --help explains a verb.')
    parser.add_argument('--version', action='version', version=f'flow_ros {__version__}')
    subparsers = parser.add_subparsers(dest='verb', metavar='VERB', title='verbs')
    module: ModuleType | None = None
    for verb, text in verbs.items():
        if verb != asked:
            subparsers.add_parser(verb, help=text)
            continue
        try:
            module = importlib.import_module(module_name(verb))
        except ModuleNotFoundError as error:
            return _fail(verb, _missing_package(verb, error))
        module.add_parser(subparsers)
    if asked is None and not arguments:
        parser.print_help()
        return EXIT_USAGE
    options = parser.parse_args(arguments)
    if module is None:
        parser.error('expected a verb: ' + ', '.join(verbs))
    try:
        return int(module.run(options))
    except CommandError as error:
        return _fail(options.verb, str(error))
    except ModuleNotFoundError as error:
        return _fail(options.verb, _missing_package(options.verb, error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _missing_package(verb: str, error: ModuleNotFoundError) -> str:
    package = (error.name or str(error)).split('.')[0]
    if package == 'flow_ros':
        raise error  # a defect of ours, not a missing package: show the traceback
    return (f'the Python package {package!r} is missing, which {verb!r} needs; '
            f'`make setup` installs everything, or: pip install {package}')


def _fail(verb: str, message: str) -> int:
    print(f'flow_ros {verb}: error: {message}', file=sys.stderr)
    return EXIT_USAGE


if __name__ == '__main__':
    sys.exit(main())
