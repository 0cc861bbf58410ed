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

"""The report of a fine-tuning: report.md to read, report.json to compare, pictures to look at."""

from dataclasses import asdict
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
import torch

from flow_ros.flow_io import write_image
from flow_ros.networks.base import FlowNetwork
from flow_ros.ops.sampling import warp
from flow_ros.training.finetune import FineTuner, Measures, Result
from flow_ros.training.self_supervision import both_directions, to_tensor
from flow_ros.training.unsupervised import census, census_distance
from flow_ros.visualization import confidence_to_color, flow_to_color, robust_max_px, strip

PICTURES = 3
ADVICE = {
    'helped': 'Use the new weights: run the node or `flow_ros evaluate` with '
              '`--weights {weights}`.',
    'made no difference': 'Keep the old weights: the new ones are no better on the part of the '
                          'recording that was held out. A longer or livelier recording, or more '
                          'minutes, may change that.',
    'made it worse': 'Keep the old weights; the new ones are saved for comparison only. Is the '
                     'end of the recording (held out) like its beginning? More frames and fewer '
                     'minutes make harm less likely.',
}
ROWS = (('census', 'photometric (census) error, 0 to 1', '{:.4f}'),
        ('consistent', 'pixels whose two directions agree', '{:.1%}'),
        ('disagreement_px', 'median disagreement of the directions, px', '{:.3f}'),
        ('confidence', 'mean confidence', '{:.3f}'),
        ('speed_px', 'mean speed, px per frame', '{:.2f}'))


def mean(result: Result, name: str, *, after: bool) -> float | None:
    """Return the mean of a measure over the held-out pairs; None if it is not known."""
    values = [getattr(row.after if after else row.before, name) for row in result.comparisons]
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else None


def write_report(tuner: FineTuner, result: Result, folder: Path, *, source: str,
                 started_from: str) -> Path:
    """Write report.md, report.json and pictures into ``folder``; returns the page's path."""
    recording = tuner.recording
    weights = folder / 'weights.safetensors'
    rows = [row for row in ROWS if mean(result, row[0], after=False) is not None]
    table = '\n'.join(
        f'| {title} | {form.format(mean(result, name, after=False))} | '
        f'{form.format(mean(result, name, after=True))} |' for name, title, form in rows)
    pictures = _pictures(tuner, result, folder)
    early = ', ended early by hand' if result.interrupted else ''
    learnt = ', '.join(f'{name} {first:.3f} to {last:.3f}'
                       for name, (first, last) in result.losses.items())
    lines = [
        f'# Fine-tuning {result.verdict}', '', f'{result.reason[0].upper()}{result.reason[1:]}.',
        ADVICE[result.verdict].format(weights=weights), '',
        f'Measured without labels on {len(result.comparisons)} pairs of the end of the '
        f'recording, which was held out:', '',
        '| | before | after |', '|---|---|---|', table, '',
        'The photometric error is taken over the pixels that the network can explain before or',
        'after. It and the agreement of the directions go with the true error, but are not it: '
        'look at the pictures.', '',
        '| | |', '|---|---|',
        f'| recording | {source}: {len(recording)} frames of {recording.size[1]}x'
        f'{recording.size[0]} px, {recording.stamps[-1] - recording.stamps[0]:.1f} s, '
        f'{recording.kept_mb:.0f} MB kept |',
        f'| pairs | {len(tuner.split.train)} to train on, {tuner.split.gap} left out, '
        f'{len(tuner.split.held_out)} held out |',
        f'| network | {tuner.teacher.name}, from {started_from} |',
        f'| learnt | {result.steps} steps on {result.lessons} lessons in {result.minutes:.1f} min '
        f'on {tuner.device}{early}; {result.trusted:.0%} of their pixels taken for true |',
        f'| losses | {learnt} |', '',
        *(f'![{path.stem}: before above after]({path.name})\n' for path in pictures)]
    content = {'verdict': result.verdict, 'reason': result.reason, 'source': source,
               'started_from': started_from, 'network': tuner.teacher.name,
               'weights': str(weights),
               'before': {row[0]: mean(result, row[0], after=False) for row in ROWS},
               'after': {row[0]: mean(result, row[0], after=True) for row in ROWS},
               'frames': len(recording), 'size': list(recording.size),
               'pairs': {'train': len(tuner.split.train), 'gap': tuner.split.gap,
                         'held_out': len(tuner.split.held_out)},
               'config': asdict(tuner.config), **asdict(result)}
    (folder / 'report.json').write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    path = folder / 'report.md'
    path.write_text('\n'.join(lines), encoding='utf-8')
    return path


def _pictures(tuner: FineTuner, result: Result, folder: Path) -> list[Path]:
    """Write a strip for the pairs with the best, the median and the worst change."""
    ordered = sorted(result.comparisons, key=lambda row: row.after.census - row.before.census)
    positions = np.linspace(0, len(ordered) - 1, min(PICTURES, len(ordered)))
    paths = []
    for row in (ordered[round(position)] for position in positions):
        frames = tuner.recording.frame(row.index), tuner.recording.frame(row.index + 1)
        path = folder / f'pair_{row.index:06d}.png'
        write_image(path, pair_picture(tuner.teacher, tuner.student, *frames,
                                       (row.before, row.after)))
        paths.append(path)
    return paths


@torch.no_grad()
def pair_picture(before: FlowNetwork, after: FlowNetwork, frame1: NDArray[np.uint8],
                 frame2: NDArray[np.uint8],
                 measures: tuple[Measures, Measures]) -> NDArray[np.uint8]:
    """Return the frame, then flow, photometric error and confidence, before above after."""
    device = next(before.parameters()).device
    inputs = [to_tensor(frame)[None].to(device, torch.float32) for frame in (frame1, frame2)]
    first = census(inputs[0])
    rows, max_px = [], None
    for name, network, row in (('before', before, measures[0]), ('after', after, measures[1])):
        way = both_directions(network, inputs[0], inputs[1])[0]
        flow = way.flow[0].permute(1, 2, 0).cpu().numpy()
        max_px = robust_max_px(flow) if max_px is None else max_px
        cost = census_distance(first, census(warp(inputs[1], way.flow)))[0, 0].cpu().numpy()
        pictures = [frame1, flow_to_color(flow, max_px),
                    (255 * np.clip(cost, 0, 1)).astype(np.uint8)]
        labels = ['frame', f'{name}, full colour {max_px:.1f} px',
                  f'census error {row.census:.4f}']
        if way.confidence is not None:
            pictures.append(confidence_to_color(way.confidence[0, 0].float().cpu().numpy()))
            labels.append(f'confidence {row.confidence:.3f}')
        rows.append(strip(pictures, labels))
    return np.vstack(rows)
