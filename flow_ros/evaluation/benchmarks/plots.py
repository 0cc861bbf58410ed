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

"""The plots of the report, drawn with matplotlib from the JSON files alone.

matplotlib is imported when something is drawn. Colour is the network, marker and line the
runtime, the same in all plots.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TYPE_CHECKING

from flow_ros.sources import parse_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Content = Mapping[str, Any]

DPI = 100
_FIRST = ('dip_rt', 'hd3_compact', 'mscsl', 'dip')
_COLOURS = ('#1f6fb4', '#d1495b', '#2a9d5c', '#8d5fb0', '#b07a1a', '#4a4e57', '#1aa0a8')
_DIS = '#222222'
_STYLES: Mapping[tuple[str, str], tuple[str, str]] = {
    ('openvino', 'f32'): ('o', '-'), ('openvino', 'fast'): ('s', '--'),
    ('torch', 'f32'): ('^', ':'), ('torch', 'fast'): ('v', '-.'),
    ('tensorrt', 'f32'): ('D', '-'), ('tensorrt', 'fast'): ('P', '--'),
    ('opencv', ''): ('*', '-')}


def draw_all(found: Mapping[str, Content], folder: Path) -> list[str]:
    """Draw the plot of each part in ``found`` that has results; returns the files' names.

    Raises ModuleNotFoundError where matplotlib is not installed.
    """
    drawers: Mapping[str, Callable[[Sequence[Row]], 'Figure | None']] = {
        'accuracy': accuracy, 'time': times, 'memory': memory, 'budget': budgets}
    drawn = []
    for part, draw in drawers.items():
        figure = draw(found[part]['results']) if part in found else None
        if figure is not None:
            figure.savefig(folder / f'{part}.png', dpi=DPI, format='png',
                           pil_kwargs={'optimize': True})
            drawn.append(f'{part}.png')
    return drawn


def accuracy(rows: Sequence[Row]) -> 'Figure | None':
    """Return the error against the time of a pair: a line per network and way over budgets."""
    if not rows:
        return None
    figure = _figure(10.0, 4.9)
    colours = _colours(rows)
    plots = figure.subplots(1, 2)
    named: set[tuple[str, str]] = set()
    for plot, measure, title in zip(plots, ('epe', 'fl_all'), (
            'end-point error, px', 'Fl-all: pixels off by 3 px and 5 %, %')):
        for name, group in _groups(rows, ('network', 'runtime', 'precision')):
            known = [row for row in group if row[measure] is not None]
            if not known or name[0].startswith('dis_'):
                continue
            _line(plot, [row['ms'] for row in known], [row[measure] for row in known],
                  name, colours)
            if (name[0], measure) not in named:  # once is enough to read them by
                named.add((name[0], measure))
                for row in (known[0], known[-1]):
                    plot.annotate(str(row['iterations']), (row['ms'], row[measure]),
                                  xytext=(4, 5), textcoords='offset points', fontsize=8,
                                  color=colours[name[0]])
        dis = [row for row in rows if row['network'].startswith('dis_')]
        if dis:
            plot.plot([row['ms'] for row in dis], [row[measure] for row in dis], marker='*',
                      markersize=9, color=_DIS, linewidth=1, label='OpenCV DIS')
            for row in dis:
                plot.annotate(row['network'].removeprefix('dis_'), (row['ms'], row[measure]),
                              xytext=(4, 5), textcoords='offset points', fontsize=8, color=_DIS)
        _log_axis(plot, 'x', [row['ms'] for row in rows])
        errors = [row[measure] for row in rows if row[measure] is not None]
        if min(errors) > 0:
            _log_axis(plot, 'y', errors)
        _label(plot, 'time per pair from a cold start, ms', title)
    _legend(figure, plots[0], 'Accuracy against time; numbers are budgets')
    return figure


def times(rows: Sequence[Row]) -> 'Figure | None':
    """Return the median time of a frame against the resolution."""
    if not rows:
        return None
    figure = _figure(9.5, 5.2)
    plot = figure.subplots()
    _by_resolution(plot, rows, 'ms_p50', logarithmic=True)
    for rate in (10, 30):
        plot.axhline(1e3 / rate, color='#999999', linewidth=0.8, zorder=0)
        plot.annotate(f'{rate} frames/s', (1.005, 1e3 / rate), va='center', ha='left',
                      xycoords=('axes fraction', 'data'), fontsize=8, color='#666666')
    _label(plot, 'resolution, px', 'time per frame, ms (median)')
    _legend(figure, plot, 'Time by resolution, on a stream')
    return figure


def memory(rows: Sequence[Row]) -> 'Figure | None':
    """Return the peak memory against the pixels: what is linear in them is a straight line."""
    known = [row for row in rows if row.get('peak_mb') is not None]
    if not known:
        return None
    figure = _figure(9.5, 5.6)
    plot = figure.subplots()
    _by_resolution(plot, known, 'peak_mb', logarithmic=False)
    plot.set_ylim(bottom=0)
    plot.set_xlim(left=0)
    _label(plot, 'resolution, px (the axis is linear in pixels)',
           'peak memory above the loaded process, MB')
    _legend(figure, plot, 'Memory by resolution')
    return figure


def budgets(rows: Sequence[Row]) -> 'Figure | None':
    """Return time kept against time asked: median to 99th percentile, alone and loaded."""
    if not rows:
        return None
    figure = _figure(10.0, 4.9)
    colours = _colours(rows)
    plots = figure.subplots(1, 2, sharex=True, sharey=True)
    for plot, loaded, title in zip(plots, (False, True), ('alone', 'one core loaded')):
        asked = sorted({row['asked_ms'] for row in rows})
        plot.plot(asked, asked, color='#999999', linewidth=1.0, label='asked')
        plot.plot(asked, [1.15 * ms for ms in asked], color='#bbbbbb', linewidth=0.8,
                  linestyle='--', label='asked + 15 %')
        names = list(dict.fromkeys(row['network'] for row in rows))
        for number, name in enumerate(names):
            group = sorted((row for row in rows if row['network'] == name
                            and bool(row['loaded']) == loaded), key=lambda row: row['asked_ms'])
            if not group:
                continue
            # Beside each other, where all have the same number on the axis.
            place = [row['asked_ms'] * 1.03 ** (number - (len(names) - 1) / 2) for row in group]
            plot.vlines(place, [row['ms_p50'] for row in group],
                        [row['ms_p99'] for row in group], color=colours[name], linewidth=1.4)
            plot.plot(place, [row['ms_p50'] for row in group], 'o', color=colours[name],
                      markersize=5, label=name)
            plot.plot(place, [row['ms_p99'] for row in group], '_', color=colours[name],
                      markersize=10, markeredgewidth=2)
        plot.set_xscale('log')
        _ticks(plot.xaxis, asked, [f'{ms:g}' for ms in asked])
        _log_axis(plot, 'y', [*asked, *(row[name] for row in rows
                                        for name in ('ms_p50', 'ms_p99'))])
        plot.set_title(title, fontsize=10)
        _label(plot, 'time asked for, ms', 'time taken, ms')
    _legend(figure, plots[0], 'Budget asked, budget kept: median (dot) and 99th percentile (bar)')
    return figure


def _by_resolution(plot: 'Axes', rows: Sequence[Row], measure: str, *,
                   logarithmic: bool) -> None:
    colours = _colours(rows)
    for name, group in _groups(rows, ('network', 'runtime', 'precision')):
        known = sorted((row for row in group if row.get(measure) is not None),
                       key=lambda row: _pixels(row['size']))
        if known:
            _line(plot, [_pixels(row['size']) for row in known],
                  [row[measure] for row in known], name, colours)
    sizes = sorted({row['size'] for row in rows}, key=_pixels)
    if logarithmic:
        plot.set_xscale('log')
        _log_axis(plot, 'y', [row[measure] for row in rows if row.get(measure) is not None])
    _ticks(plot.xaxis, [_pixels(size) for size in sizes], sizes)
    if not logarithmic:
        plot.tick_params(axis='x', rotation=40)


def _line(plot: 'Axes', x: Sequence[float], y: Sequence[float], name: tuple[str, ...],
          colours: Mapping[str, str]) -> None:
    network, runtime, precision = name
    marker, style = _STYLES.get((runtime, precision), ('x', '-'))
    label = (f'DIS, {network.removeprefix("dis_")}' if runtime == 'opencv'
             else f'{network}, {runtime} {precision}')
    plot.plot(x, y, marker=marker, linestyle=style, color=colours[network], linewidth=1.5,
              markersize=5, label=label)


def _figure(width: float, height: float) -> 'Figure':
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def _label(plot: 'Axes', x: str, y: str) -> None:
    plot.set_xlabel(x)
    plot.set_ylabel(y)
    plot.grid(True, which='major', color='#dddddd', linewidth=0.7)
    plot.set_axisbelow(True)
    for side in ('top', 'right'):
        plot.spines[side].set_visible(False)


def _legend(figure: 'Figure', plot: 'Axes', title: str) -> None:
    """Put the legend below all plots, where it covers nothing; a column is a network."""
    handles, labels = plot.get_legend_handles_labels()
    networks = list(dict.fromkeys(label.partition(',')[0] for label in labels))
    order = sorted(range(len(labels)),
                   key=lambda index: (networks.index(labels[index].partition(',')[0]), index))
    figure.suptitle(title, fontsize=12)
    figure.legend([handles[index] for index in order], [labels[index] for index in order],
                  loc='outside lower center', ncols=min(len(networks), 5), fontsize=8,
                  frameon=False)


def _log_axis(plot: 'Axes', axis: str, values: Sequence[float]) -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2 and 5 of each power of ten.

    Where that are too many, at the powers alone.
    """
    low, high = min(values), max(values)
    steps = (1, 2, 5) if high < 500 * low else (1,)
    places = [step * 10.0 ** power for power in range(-4, 9) for step in steps]
    below = max([place for place in places if place <= low], default=low)
    above = min([place for place in places if place >= high], default=high)
    inside = [place for place in places if below <= place <= above]
    if axis == 'x':
        plot.set_xscale('log')
    else:
        plot.set_yscale('log')
    _ticks(plot.xaxis if axis == 'x' else plot.yaxis, inside, [f'{place:g}' for place in inside])


def _ticks(axis: Any, places: Iterable[float], labels: Sequence[str]) -> None:
    """Label these places and no others."""
    from matplotlib.ticker import NullLocator

    axis.set_minor_locator(NullLocator())
    axis.set_ticks(list(places), list(labels))


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """Return a colour per network: the same in every plot for those that are shipped."""
    names = sorted({row['network'] for row in rows})
    networks = [*_FIRST, *(name for name in names
                           if name not in _FIRST and not name.startswith('dis_'))]
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(networks)}
    greys = {'dis_ultrafast': '#aaaaaa', 'dis_fast': '#777777', 'dis_medium': _DIS}
    return colours | {name: greys.get(name, _DIS) for name in names if name not in colours}


def _groups(rows: Sequence[Row],
            keys: Sequence[str]) -> list[tuple[tuple[str, ...], list[Row]]]:
    """Return the rows by their values of ``keys``, in the order they come."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row)
    return list(groups.items())


def _pixels(size: str) -> int:
    width, height = parse_size(size)
    return width * height
