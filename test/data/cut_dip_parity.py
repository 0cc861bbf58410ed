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

"""Cut test/data/dip_parity.npz out of the large parity files of the published DIP.

    python test/data/cut_dip_parity.py ../shared/parity

Images, start flows and noise are kept whole, since they go in; what comes out is kept at every
third pixel: 3 and the upsampling factor 4 have no common divisor, so every position within an
upsampled cell is still there. Maps of many channels are also kept at every fourth channel.
"""

from pathlib import Path
import sys

import numpy as np

WHOLE = ('unit_flow', 'warm_init', 'warm3_init')
"""Go in as well, but u depends on y alone and v on x alone: kept as one column and one row."""

CHANNEL_STRIDE = 4
MANY_CHANNELS = 100
PIXEL_STRIDE = 3


def thin(values: np.ndarray) -> np.ndarray:
    """Return the part of one output (B, C, H, W) that is kept."""
    if values.shape[1] > MANY_CHANNELS:
        values = values[:, ::CHANNEL_STRIDE]
    return values[..., ::PIXEL_STRIDE, ::PIXEL_STRIDE]


def main(folder: Path) -> None:
    """Write dip_parity.npz beside this file."""
    kept = {}
    with np.load(folder / 'dip_input.npz') as inputs:
        kept.update({key: inputs[key] for key in inputs.files if key.startswith('image')})
    with np.load(folder / 'dip_output.npz') as outputs:
        for key in outputs.files:
            values = outputs[key]
            if key in WHOLE:
                column, row = values[0, 0, :, :1], values[0, 1, :1]
                if (values[0, 0] != column).any() or (values[0, 1] != row).any():
                    sys.exit(f'{key} is not one column and one row')
                kept[f'{key}_column'], kept[f'{key}_row'] = column[:, 0], row[0]
            elif key.endswith('_init') or '_noise' in key and not key.endswith('_flow'):
                kept[key] = values
            else:
                kept[key] = thin(values)
    target = Path(__file__).with_name('dip_parity.npz')
    np.savez_compressed(target, **kept)
    print(f'{target}: {target.stat().st_size / 1e6:.2f} MB, {len(kept)} arrays')


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit('usage: cut_dip_parity.py FOLDER_WITH_dip_input.npz')
    main(Path(sys.argv[1]))
