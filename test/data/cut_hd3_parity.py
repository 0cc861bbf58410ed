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

"""Cut test/data/hd3_parity.npz out of the large parity files of the published HD3.

    python test/data/cut_hd3_parity.py ../shared/parity

The images are kept whole. Of the outputs of each network all unit operations, vectors,
confidences and losses are kept, logits and features at every fourth channel and, where a map
is larger than 16x16, every third pixel, the full-resolution flow at every third pixel: 3 and the
enlargement by 4 have no common divisor, so every position within an enlarged cell is there.
"""

from pathlib import Path
import sys

import numpy as np

NETWORKS = ('hd3f', 'hd3fc', 'hd3f_vgg')
CHANNEL_STRIDE = 4
PIXEL_STRIDE = 3
LARGE = 16 * 16


def thin(key: str, values: np.ndarray) -> np.ndarray:
    """Return the part of one output that is kept."""
    if key.startswith(('logits', 'feat_')):
        values = values[:, ::CHANNEL_STRIDE]
    if key == 'flow_full' or (key.startswith(('logits', 'feat_'))
                              and values.shape[-1] * values.shape[-2] > LARGE):
        values = values[..., ::PIXEL_STRIDE, ::PIXEL_STRIDE]
    return values


def main(folder: Path) -> None:
    """Write hd3_parity.npz beside this file."""
    kept = {}
    with np.load(folder / 'hd3_input.npz') as inputs:
        kept.update({key: inputs[key] for key in ('image1', 'image2')})
    for name in NETWORKS:
        with np.load(folder / f'{name}_output.npz') as outputs:
            for key in outputs.files:
                if key.startswith(('logits', 'vect', 'confidence', 'feat_quarter', 'flow_full',
                                   'loss', 'unit_')):
                    kept[f'{name}_{key}'] = thin(key, outputs[key])
    target = Path(__file__).with_name('hd3_parity.npz')
    np.savez_compressed(target, **kept)
    print(f'{target}: {target.stat().st_size / 1e6:.2f} MB, {len(kept)} arrays')


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit('usage: cut_hd3_parity.py FOLDER_WITH_hd3_input.npz')
    main(Path(sys.argv[1]))
