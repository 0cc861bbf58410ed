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

"""Make what the check of the runtimes compares with.

    python test/data/make_references.py pair      flow_ros/runtimes/reference_pair.npz
    python test/data/make_references.py models    models/NAME.reference.npz, of each or of NAME

The pair is two frames of the synthetic world with its true flow, coarse, as the prior of a warm
start. It was made once: another pair makes all references stale. A reference belongs to its
weights: make it again whenever they change.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from flow_ros.networks import create
from flow_ros.runtimes.reference import (
    make_reference,
    PAIR,
    reference_pair,
    SUFFIX,
    write_reference,
)
from flow_ros.synthetic import SyntheticSequence

MODELS = Path(__file__).resolve().parents[2] / 'models'
WIDTH, HEIGHT = 256, 192
SEED, FRAME, CELL = 3, 3, 8
STRIDE = 5


def make_pair() -> None:
    """Write two frames, uint8 (2, H, W, 3), and the flow between them at 1/8, float16."""
    stream = SyntheticSequence(WIDTH, HEIGHT, seed=SEED)
    first, second = stream.frame(FRAME), stream.frame(FRAME + 1)
    flow = first.flow_forward.reshape(HEIGHT // CELL, CELL, WIDTH // CELL, CELL, 2)
    np.savez_compressed(PAIR, images=np.stack([first.image, second.image]),
                        prior=flow.mean(axis=(1, 3)).astype(np.float16))
    print(f'{PAIR}: {PAIR.stat().st_size} bytes')


def make_models(names: list[str]) -> None:
    """Write the reference of each model."""
    torch.set_num_threads(1)
    found = sorted(path.name.removesuffix('.safetensors') for path in MODELS.glob('*.safetensors'))
    for name in names or found:
        reference = make_reference(create(name, 'default'), *reference_pair(), stride=STRIDE)
        path = MODELS / f'{name}{SUFFIX}'
        write_reference(reference, path)
        print(f'{path}: {path.stat().st_size} bytes, {len(reference.flows)} cases, '
              f'{reference.made_by}')


def main() -> None:
    """Make one of them."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('pair', 'models'))
    parser.add_argument('names', nargs='*', metavar='NAME', help='models (default: all)')
    options = parser.parse_args()
    if options.what == 'pair':
        make_pair()
    else:
        make_models(options.names)


if __name__ == '__main__':
    main()
