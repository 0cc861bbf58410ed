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

"""``flow_ros finetune``: adapt a network to one's own robot, from a recording without labels."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
import os
from pathlib import Path
from typing import Any

from flow_ros.cli import CommandError

DESCRIPTION = """\
Adapt a network to the look of your own robot's camera, from a recording without labels.

The recording is a rosbag2 (--bag), or a video or a folder of images (--source). Its end is held
out; on it the network is measured before and after, and report.md says in plain words whether it
helped. A minute of driving about is a good recording. With labelled data, give --data NAME:ROOT
or a --recipe: that is `flow_ros train`, gently, from the given weights.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb's options."""
    parser = subparsers.add_parser(
        'finetune', help="adapt a network to one's own robot, without labels",
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--bag', metavar='BAG', help='rosbag2: its folder, .db3 or .mcap file')
    what.add_argument('--source', metavar='PATH', help='a video or a folder of images')
    what.add_argument('--data', metavar='NAME:ROOT', action='append',
                      help='labelled data set, for example kitti2015:/data/kitti; may be repeated')
    what.add_argument('--recipe', type=Path, metavar='FILE',
                      help='recipe of a labelled training, for `flow_ros train`')
    parser.add_argument('--topic', default='', help='image topic of the bag')
    parser.add_argument('--network', default='dip_rt', metavar='NAME',
                        help='network to adapt (default: %(default)s)')
    parser.add_argument('--weights', default='default', metavar='FILE',
                        help='weights to begin with (default: those shipped)')
    parser.add_argument('--out', type=Path, default=Path('out/finetune'), metavar='DIR',
                        help='folder of the weights and the report (default: %(default)s)')
    parser.add_argument('--minutes', type=float, default=10.0,
                        help='wall-clock length of the learning (default: %(default)g)')
    parser.add_argument('--steps', type=int, help='length in steps, in place of the minutes')
    parser.add_argument('--size', metavar='WxH', help='bring frames to this size, WIDTHxHEIGHT '
                        '(default: their own, halved while wider than 960 px)')
    parser.add_argument('--memory-mb', type=float, default=512.0, metavar='MB',
                        help='most memory for the frames, and as much for what is learnt from '
                             'them (default: %(default)g)')
    parser.add_argument('--device', help='torch device (default: cuda where there is one)')
    parser.add_argument('--threads', type=int, help='CPU threads')
    parser.add_argument('--seed', type=int, default=0, help='(default: %(default)s)')


def run(options: argparse.Namespace) -> int:
    """Fine-tune; returns the exit status, 0 also where it did not help."""
    _check(options)
    if options.data or options.recipe:
        return _labelled(options)

    import torch

    from flow_ros.networks import save
    from flow_ros.training.finetune import FinetuneConfig, FineTuner
    from flow_ros.training.finetune_report import write_report
    from flow_ros.training.recording import Recording, RecordingError
    from flow_ros.training.self_supervision import check_learner

    if options.threads:
        torch.set_num_threads(options.threads)
    network, started_from = _network(options)
    try:
        check_learner(network)
    except ValueError as error:
        raise CommandError(f'--network {options.network}: {error}') from error
    source = _source(options)
    config = replace(FinetuneConfig(), minutes=options.minutes, steps=options.steps,
                     seed=options.seed, lessons_mb=options.memory_mb)
    print(f'reading {source.description}', flush=True)
    try:
        recording = Recording(limit_mb=options.memory_mb).gather(_frames(source))
        tuner = FineTuner(network, recording, config=config)
        print(f'{len(recording)} frames of {recording.size[1]}x{recording.size[0]} px '
              f'({recording.kept_mb:.0f} MB): {len(tuner.split.train)} pairs to train on, '
              f'{len(tuner.split.held_out)} held out at the end', flush=True)
        result = tuner.run()
    except RecordingError as error:
        raise CommandError(str(error)) from error
    try:
        save(tuner.student, options.out / 'weights.safetensors', metadata={
            'finetuned_from': started_from, 'steps': str(result.steps),
            'verdict': result.verdict})
        page = write_report(tuner, result, options.out, source=source.description,
                            started_from=started_from)
    except OSError as error:
        raise CommandError(f'{options.out} cannot be written: {error}; make room, and run it '
                           f'again with another --out') from error
    print(f'fine-tuning {result.verdict}: {result.reason}')
    if result.verdict != 'helped':
        print(f'keep the old weights ({started_from})')
    print(f'report: {page}')
    return 0


def _check(options: argparse.Namespace) -> None:
    """Find out before the work, not after it, what cannot go well."""
    if not options.minutes > 0:
        raise CommandError(f'--minutes must be more than 0; seen {options.minutes:g}')
    if options.steps is not None and options.steps < 1:
        raise CommandError(f'--steps must be at least 1; seen {options.steps}')
    if not options.memory_mb > 0:
        raise CommandError(f'--memory-mb must be more than 0; seen {options.memory_mb:g}')
    if options.topic and not options.bag:
        raise CommandError('--topic is for --bag')
    new = options.out / 'weights.safetensors'
    if new.exists() and options.weights != 'default' and Path(options.weights).exists() \
            and new.samefile(options.weights):
        raise CommandError(f'--out {options.out} holds the weights to begin with: they would be '
                           f'overwritten; give another --out')
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        writable = os.access(options.out, os.W_OK)
    except OSError as error:
        raise CommandError(f'--out {options.out}: {error.strerror or error}') from error
    if not writable:
        raise CommandError(f'--out {options.out} cannot be written to')


def _network(options: argparse.Namespace) -> tuple[Any, str]:
    """Return the network to begin with, on its device, and where its weights are from."""
    import torch

    from flow_ros.networks import create, default_weights_path

    try:
        network = create(options.network, weights=options.weights)
        started_from = (str(default_weights_path(options.network))
                        if options.weights == 'default' else options.weights)
    except ValueError as error:  # unknown network, or weights that do not fit
        raise CommandError(str(error)) from error
    device = options.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        network.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f'--device {device}: {str(error).splitlines()[0]}') from error
    return network, started_from


def _source(options: argparse.Namespace) -> Any:
    from flow_ros.sources import open_source, parse_size, SourceError

    text = options.bag or options.source
    if options.bag and not Path(text).expanduser().exists():
        raise CommandError(f'--bag {text}: no such file or folder')
    if not options.bag and text.startswith(('webcam', 'synthetic')):
        raise CommandError(f'--source {text}: expected a video or a folder of images; record a '
                           f'webcam first')
    try:
        return open_source(text, topic=options.topic, loop=False, decode=_decode, warn=_warn,
                           size=parse_size(options.size) if options.size else None)
    except SourceError as error:
        raise CommandError(str(error)) from error


def _frames(source: Any) -> Iterator[tuple[Any, float]]:
    """Yield (image, stamp), halved while wider than 960 px unless a size was asked for."""
    import cv2
    from tqdm import tqdm

    from flow_ros.sources import SourceError

    try:
        for frame in tqdm(source, desc='reading', unit='frame', leave=False):
            image = frame.image
            while source.size is None and image.shape[1] > 960:
                image = cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2),
                                   interpolation=cv2.INTER_AREA)
            yield image, frame.stamp_s
    except SourceError as error:
        raise CommandError(str(error)) from error


def _decode(message: Any) -> Any:
    """Return a raw image message as RGB; what it needs of ROS is imported when one comes."""
    from flow_ros.nodes.messages import image_to_rgb

    return image_to_rgb(message)


def _labelled(options: argparse.Namespace) -> int:
    """Train on labelled data from the given weights: ``flow_ros train`` with a gentle recipe."""
    from flow_ros.cli import train
    from flow_ros.networks import default_weights_path, WeightsError

    recipe = options.recipe
    try:
        weights = (default_weights_path(options.network) if options.weights == 'default'
                   else Path(options.weights))
        if recipe is None:
            recipe = options.out / 'recipe.yaml'
            recipe.write_text(_gentle_recipe(options), encoding='utf-8')
    except (WeightsError, OSError) as error:
        raise CommandError(str(error)) from error
    return train.run(argparse.Namespace(
        recipe=recipe, out=options.out, minutes=None if options.steps else options.minutes,
        steps=options.steps, weights=weights, data_root=None, device=options.device,
        precision=None, accumulate=None, threads=options.threads))


def _gentle_recipe(options: argparse.Namespace) -> str:
    """Return the text of a recipe with a tenth of procedural scenes, against forgetting."""
    from flow_ros.training.data_sets import DataSetShare, PROCEDURAL
    from flow_ros.training.recipe import Recipe, recipe_text

    shares = []
    for text in options.data:
        name, colon, root = text.partition(':')
        if not colon or not root:
            raise CommandError(f'--data {text}: expected NAME:ROOT, for example '
                               f'kitti2015:/data/kitti')
        if not Path(root).is_dir():
            raise CommandError(f'--data {text}: {root} is no folder')
        try:
            shares.append(DataSetShare(name, str(Path(root).resolve()), ratio=1.0))
        except ValueError as error:
            raise CommandError(f'--data {text}: {error}') from error
    world = DataSetShare(PROCEDURAL, ratio=len(shares) / 9)
    return recipe_text(Recipe(network=options.network, seed=options.seed, learning_rate=1e-4,
                              ema=0.99, data=(*shares, world)))


def _warn(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text)
