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

"""``flow_ros evaluate``: measure a network against ground truth."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TYPE_CHECKING

from flow_ros import __version__
from flow_ros.cli import CommandError
from flow_ros.cli.arguments import check_json, positive, write_json

if TYPE_CHECKING:  # nothing heavy is imported before it is known that it is needed
    from flow_ros.evaluation import PairSource, Skipped

RUNTIMES = ('torch', 'auto', 'openvino', 'tensorrt')
DESCRIPTION = """Measure a network against ground truth, beside OpenCV DIS (medium) and zero flow.

DIR is searched recursively for folders that hold frame1.png, frame2.png and the truth,
flow.flo (dense; 1e9 and more means unknown) or flow.png (KITTI, 16-bit, sparse). Where a
folder also holds occlusion.png (not black: occluded in frame 2) or boundary.png (not black:
on a motion boundary), errors are split by them. Folders without truth are listed and skipped.

In place of --data, --data-set names a public set and where it lies, in the layout it is
published in: kitti2015:/data/kitti. A third part is the split: chairs:/data/chairs:val.

--network may be given several times: all are measured on the same pairs and stand in one table.
Where a network knows its confidence, AUSC is the area under its sparsification curve (the mean
error of what is left as the least confident pixels are removed, over that of all: 1 for a
confidence that knows nothing) and AUSE the area between it and the best order there is.
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of this verb."""
    parser = subparsers.add_parser(
        'evaluate', help='measure a network against ground truth', description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument('--data', type=Path, metavar='DIR', help='folder of pairs')
    data.add_argument('--data-set', metavar='NAME:DIR[:SPLIT]',
                      help='public data set; a wrong NAME lists those known')
    parser.add_argument('--samples', type=positive, metavar='N',
                        help='measure N samples, evenly spread over the data (default: all)')
    parser.add_argument('--network', action='append', metavar='NAME', dest='networks',
                        help='network or model to measure, or all: every model with weights '
                             'here; may be given several times (default: dip_rt)')
    parser.add_argument('--weights', metavar='FILE', default='default',
                        help='weights of the network, .safetensors or a published .pth '
                             '(default: those shipped)')
    parser.add_argument('--iterations', type=positive, metavar='N',
                        help="iterations per level; levels of hd3, scales of mscsl (default: the "
                             "network's own)")
    parser.add_argument('--runtime', choices=RUNTIMES, default='torch',
                        help='where the network runs (default: %(default)s)')
    parser.add_argument('--device', metavar='NAME',
                        help='torch device for --runtime torch (default: cuda if there, else cpu)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all numbers here')
    parser.add_argument('--pictures', type=Path, metavar='DIR',
                        help='write a strip per pair here: frame, truth, estimate, error; and '
                             'sparsification.png, how well confidence ranks errors')


def run(options: argparse.Namespace) -> int:
    """Evaluate; 0 if every pair with truth was measured, 1 if a file was damaged."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    from flow_ros.evaluation import baselines, Estimate, evaluate, LoadedPair, PairSource
    from flow_ros.evaluation.pictures import pair_strip, sparsification_picture
    from flow_ros.evaluation.tables import report_tables
    from flow_ros.flow_io import write_image

    pairs, without_truth = _pairs(options)
    _check_writable(options)
    names = _names(options)
    made = {name: _network(options, name) for name in names}
    messages = Console(stderr=True, highlight=False, soft_wrap=True)
    for row in without_truth:
        messages.print(f'skipped {row.name}: {row.reason}', markup=False)

    with Progress(TextColumn('evaluating'), MofNCompleteColumn(),
                  TextColumn('{task.description}'), console=messages, transient=True,
                  disable=not messages.is_terminal) as progress:
        task = progress.add_task('', total=len(pairs))

        def on_pair(pair: PairSource, loaded: LoadedPair,
                    estimates: Mapping[str, Estimate]) -> None:
            progress.update(task, advance=1, description=pair.name)
            for name in names if options.pictures is not None else ():
                folder = options.pictures / name if len(names) > 1 else options.pictures
                draw(folder / f'{pair.name}.png', pair_strip(loaded, estimates[name]))

        def draw(path: Path, picture: Any) -> None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_image(path, picture)
            except OSError as error:  # the numbers are worth more than the pictures
                messages.print(f'{path} cannot be written: {error.strerror}', markup=False)

        estimators = {name: estimator for name, (estimator, _) in made.items()}
        report = evaluate({**estimators, **baselines()}, pairs, warm_up=True, on_pair=on_pair,
                          under_test=names)
        if options.pictures is not None and any(
                ranking.pairs for ranking in report.sparsifications.values()):
            draw(options.pictures / 'sparsification.png',
                 sparsification_picture(report.sparsifications))
    for row in report.skipped:
        messages.print(f'skipped {row.name}: {row.reason}', markup=False)
    if not report.rows[names[0]]:
        raise CommandError('not one pair could be read')
    console = Console(width=240)  # tables take what they need; a terminal wraps the rest
    for table in report_tables(report):
        console.print(table)
    if options.json is not None:
        content = {'flow_ros': __version__, 'data': options.data_set or str(options.data),
                   **made[names[0]][1], **report.as_dict()}
        for name, numbers in content.get('networks', {}).items():
            content['networks'][name] = {**made[name][1], **numbers}
        content['skipped'] = [{'name': row.name, 'reason': row.reason}
                              for row in (*without_truth, *report.skipped)]
        write_json(options.json, content)
    if options.pictures is not None:
        print(f'pictures: {options.pictures}')
    return 1 if report.skipped else 0


def _pairs(options: argparse.Namespace) -> tuple[list['PairSource'], list['Skipped']]:
    """Return what is to be measured, and what was found without truth."""
    from flow_ros.evaluation import find_pairs
    from flow_ros.evaluation.data_sets import DataSetError, open_data_set
    from flow_ros.flow_io import FlowFileError

    pairs: list[PairSource] = []
    without_truth: list[Skipped] = []
    try:
        if options.data_set is not None:
            name, root, split = (*options.data_set.split(':', 2), '', '')[:3]
            if not root:
                raise DataSetError(f'--data-set: expected NAME:DIR; seen {options.data_set!r}')
            pairs.extend(open_data_set(name, root, split).pairs())
        else:
            found, without_truth = find_pairs(options.data)
            pairs.extend(found)
    except (DataSetError, FlowFileError) as error:
        raise CommandError(str(error)) from error
    if not pairs:
        found_none = ''.join(f'; {row.name}: {row.reason}' for row in without_truth)
        raise CommandError(f'no pair with truth below {options.data}{found_none}. A pair is a '
                           'folder with frame1.png, frame2.png and flow.flo or flow.png')
    if options.samples is not None and options.samples < len(pairs):
        step = len(pairs) / options.samples
        pairs = [pairs[int((number + 0.5) * step)] for number in range(options.samples)]
    return pairs, without_truth


def _names(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the networks to measure, each once, with ``all`` spelt out."""
    from flow_ros.networks import list_models

    asked = options.networks or ['dip_rt']
    names = tuple(dict.fromkeys(
        name for word in asked
        for name in ([model.name for model in list_models()] if word == 'all' else [word])))
    if len(names) > 1 and options.weights != 'default':
        raise CommandError(f'--weights is for one network; seen {", ".join(names)}: give several '
                           f'files names with `flow_ros import-weights`')
    if not names:
        raise CommandError('--network all: no model has weights here; see `flow_ros '
                           'import-weights --help`')
    return names


def _network(options: argparse.Namespace, name: str) -> tuple[Any, dict[str, Any]]:
    """Return the estimator and what the JSON file says about it; never without weights."""
    import torch

    from flow_ros.evaluation import network_estimator
    from flow_ros.networks import count_parameters, create, default_weights_path, WeightsError

    try:
        network = create(name, weights=options.weights)
        weights = default_weights_path(name) if options.weights == 'default' else options.weights
    except WeightsError as error:
        raise CommandError(f'evaluation needs trained weights (--weights FILE): {error}') \
            from error
    except ValueError as error:
        raise CommandError(f'--network: {error}') from error
    if options.runtime == 'torch':
        device = options.device or ('cuda' if torch.cuda.is_available() else 'cpu')
        try:
            network.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            raise CommandError(f'--device {device}: {str(error).splitlines()[0]}') from error
    elif options.device is not None:
        raise CommandError(f'--device is for --runtime torch; seen --runtime {options.runtime}')
    try:
        estimator = network_estimator(network, iterations=options.iterations,
                                      runtime=options.runtime)
    except RuntimeError as error:
        if type(error).__name__ != 'RuntimeUnavailable':
            raise
        raise CommandError(f'--runtime {options.runtime}: {error}') from error
    facts = {'network': name, 'family': network.name, 'options': network.options(),
             'parameters': count_parameters(network), 'weights': str(weights),
             'runtime': options.runtime,
             'iterations': options.iterations or network.default_iterations,
             'iterations_are': network.budget_unit}
    return estimator, facts


def _check_writable(options: argparse.Namespace) -> None:
    """Find out before the work, not after it, that its results cannot be written."""
    check_json(options.json)
    if options.pictures is not None and options.pictures.exists() \
            and not options.pictures.is_dir():
        raise CommandError(f'--pictures {options.pictures} is a file; expected a folder')
