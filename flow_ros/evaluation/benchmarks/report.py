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

"""Tables of the report, and the speed section of the README, from the JSON files alone."""

from collections.abc import Callable, Mapping, Sequence
import json
from pathlib import Path
from typing import Any

from flow_ros.evaluation.benchmarks.machine import describe
from flow_ros.evaluation.benchmarks.suite import PARTS, TITLES
from flow_ros.sources import parse_size

Row = Mapping[str, Any]
Content = Mapping[str, Any]

BEGIN = '<!-- speed -->'
END = '<!-- /speed -->'
README_SIZE = '640x480'
WHAT: Mapping[str, str] = {
    'accuracy': 'Means over {pairs} pairs ({data}), each from a cold start: both frames encoded, '
                'the steps of the budget, the flow as an array. DIS: `calc` alone, on frames '
                'that are grey already.',
    'time': 'A synthetic stream, every frame fresh, from a frame in memory to the flow in '
            'arrays, early stop off: median ms (99th percentile). Networks that iterate start '
            'warm with two iterations per level, the others at their default. DIS: `calc` '
            'alone, presets of OpenCV. * Seeded random weights: the time is that of trained '
            'ones.',
    'memory': 'Highest resident memory above the process that has loaded the packages, the '
              'network and the frames, MB (2^20 bytes): while frames went through, and with the '
              'making of the engines, from an empty cache, before them (drawn).',
    'budget': 'Every frame fresh, at {size}: from the frame to the flow, median and 99th '
              'percentile, ms, and the median number of steps; alone, and beside a process that '
              'loads one core. Late: frames that took longer than asked.'}


def load(folder: Path) -> dict[str, Content]:
    """Return what the JSON files in ``folder`` hold, by part; a damaged one is left out."""
    found: dict[str, Content] = {}
    for part in PARTS:
        try:
            content = json.loads((folder / f'{part}.json').read_text(encoding='utf-8'))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.get('part') == part:
            found[part] = content
    return found


def markdown(found: Mapping[str, Content], *, plots: Sequence[str] = ()) -> str:
    """Return the report; ``plots`` are the names of the pictures beside it."""
    text = ['# What `flow_ros bench` measured', '']
    for part, content in found.items():
        text += [f'## {TITLES[part]}', '', _what(part, content), '']
        if content['results']:
            text += [*_table(part, content['results']), '']
        if f'{part}.png' in plots:
            text += [f'![{TITLES[part].lower()}]({part}.png)', '']
        if content['left_out']:
            text += ['Left out:', '', *(f'- {each["what"]}: {each["why"]}'
                                        for each in content['left_out']), '']
        text += [f'`{content["command"]}`, {content["seconds"]:.0f} s, on '
                 f'{describe(content["machine"], content["versions"])}', '']
    return '\n'.join(text)


def readme_section(found: Mapping[str, Content], folder: Path) -> str:
    """Return the text between the README's markers; ``folder`` is named in its links.

    Raises ValueError where there is no time by resolution to tell of.
    """
    rows = [row for row in found.get('time', {}).get('results', ())
            if row['size'] == README_SIZE]
    if not rows:
        raise ValueError(f'{folder}: no times at {README_SIZE} there; measure them: flow_ros '
                         f'bench --only time')
    content = found['time']
    link = folder.as_posix()
    text = [f'A stream at {README_SIZE}, every frame fresh, early stop off; networks that iterate '
            f'start warm with two iterations per level. Medians (99th percentile) of up to '
            f'{max(row["frames"] for row in rows)} frames, and the most memory meanwhile above '
            f'the loaded process; `make bench`, whose whole report, plots and JSON are in '
            f'[`{link}`]({link}/report.md):',
            '', '| network | runtime | ms per frame | frames/s | MB |',
            '|---|---|---|---|---|']
    for row in rows:
        memory = '' if row.get('stream_mb') is None else f'{row["stream_mb"]:.0f}'
        text.append(f'| {_network(row)} | {_way(row)} | {row["ms_p50"]:.1f} '
                    f'({row["ms_p99"]:.1f}) | {row["fps"]:.1f} | {memory} |')
    if not all(row.get('trained', True) for row in rows):
        text += ['', '\\* Seeded random weights: the time is that of trained ones.']
    text += ['', describe(content['machine'], content['versions'])]
    if found.get('accuracy', {}).get('results'):
        text += ['', f'![accuracy against time]({link}/accuracy.png)']
    budget = found.get('budget', {})
    if budget.get('results'):
        text += ['', f'A time asked for, and kept (`latency_ms`, {budget["results"][0]["size"]}; '
                     f'late: frames that took longer):', '',
                 *_budget_table(budget['results'])]
    return '\n'.join(text) + '\n'


def write_readme(path: Path, found: Mapping[str, Content], folder: Path) -> None:
    """Write the section of the README at ``path``; ValueError where its markers are missing."""
    readme = path.read_text(encoding='utf-8')
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f'{path} has no section between {BEGIN} and {END}: add both lines where '
                         f'the numbers shall be')
    try:
        shown = folder.resolve().relative_to(path.resolve().parent)
    except ValueError:
        shown = folder
    section = readme_section(found, shown)
    path.write_text(f'{before}{BEGIN}\n{section}{END}{after}', encoding='utf-8')


def _what(part: str, content: Content) -> str:
    rows = content['results']
    return WHAT[part].format(pairs=rows[0].get('pairs', '') if rows else 'no',
                             data=content.get('data', ''),
                             size=rows[0].get('size', '') if rows else 'no size')


def _table(part: str, rows: Sequence[Row]) -> list[str]:
    if part == 'accuracy':
        return _accuracy_table(rows)
    if part == 'budget':
        return _budget_table(rows)
    if part == 'time':
        return _size_table(rows, lambda row: f'{row["ms_p50"]:.1f} ({row["ms_p99"]:.1f})')
    return _size_table(rows, lambda row: f'{row["stream_mb"]:.0f}, {row["peak_mb"]:.0f}')


def _accuracy_table(rows: Sequence[Row]) -> list[str]:
    lines = ['| network | runtime | budget | EPE, px | Fl-all, % | over 1 px, % | s0-10 | '
             's10-40 | s40+ | ms per pair |', '|---|---|---|---|---|---|---|---|---|---|']
    for row in rows:
        budget = '' if row['iterations'] is None else (f'{row["iterations"]} '
                                                       f'{row["iterations_are"]}')
        numbers = ' | '.join('-' if row[name] is None else f'{row[name]:.2f}' for name in (
            'epe', 'fl_all', 'outliers_1px', 's0_10', 's10_40', 's40_plus'))
        lines.append(f'| {_network(row)} | {_way(row)} | {budget} | {numbers} | '
                     f'{row["ms"]:.1f} |')
    return lines


def _size_table(rows: Sequence[Row], cell: Callable[[Row], str]) -> list[str]:
    """Return one line per network and runtime, a column per size."""
    sizes = sorted({row['size'] for row in rows}, key=lambda size: (
        parse_size(size)[0] * parse_size(size)[1], size))
    lines = [f'| network | runtime | {" | ".join(sizes)} |', '|---|---|' + '---|' * len(sizes)]
    entries: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        entries.setdefault((_network(row), _way(row)), {})[row['size']] = cell(row)
    order = list(dict.fromkeys(network for network, _ in entries))
    for (network, way), cells in sorted(entries.items(), key=lambda each: order.index(each[0][0])):
        lines.append(f'| {network} | {way} | '
                     + ' | '.join(cells.get(size, '') for size in sizes) + ' |')
    return lines


def _budget_table(rows: Sequence[Row]) -> list[str]:
    lines = ['| network | runtime | asked, ms | alone: p50 / p99, ms | steps | late | one core '
             'loaded: p50 / p99, ms | steps | late |', '|---|---|---|---|---|---|---|---|---|']
    asked: dict[tuple[str, str, float], dict[bool, Row]] = {}
    for row in rows:
        asked.setdefault((_network(row), _way(row), row['asked_ms']), {})[
            bool(row['loaded'])] = row
    for (network, way, ms), both in asked.items():
        cells = []
        for loaded in (False, True):
            kept = both.get(loaded)
            cells.append(' | | ' if kept is None else
                         f'{kept["ms_p50"]:.0f} / {kept["ms_p99"]:.0f} | '
                         f'{kept["steps_p50"]:.0f} | {kept["overruns"]} of {kept["frames"]}')
        lines.append(f'| {network} | {way} | {ms:g} | {" | ".join(cells)} |')
    return lines


def _network(row: Row) -> str:
    if row['network'].startswith('dis_'):
        return f'OpenCV DIS {row["network"].removeprefix("dis_")}'
    return row['network'] + ('' if row.get('trained', True) else '*')


def _way(row: Row) -> str:
    return '' if row['runtime'] == 'opencv' else f'{row["runtime"]} {row["precision"]}'
