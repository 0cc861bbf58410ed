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

"""The report of an evaluation as tables for a terminal."""

from collections.abc import Mapping
import math

from rich import box
from rich.table import Table

from flow_ros.evaluation.evaluate import Report
from flow_ros.evaluation.metrics import Calibration, TITLES

BASELINE_MEASURES = ('epe', 'fl_all')
ALWAYS = ('epe', 'fl_all', 'outliers_1px', 's0_10', 's10_40', 's40_plus')


def report_tables(report: Report) -> list[Table]:
    """Return the table of pairs, the table of means and, where known, those of confidence."""
    several = len(report.subjects) > 1
    tables = [comparison_table(report) if several else pairs_table(report), means_table(report)]
    for name in report.subjects:
        calibration = report.calibrations.get(name)
        if calibration is not None and calibration.pixels.any():
            tables.append(calibration_table(calibration, f'confidence of {name}' if several
                                            else 'confidence'))
    return tables


def pairs_table(report: Report) -> Table:
    """Return one row per pair: the estimator's measures, then the baselines' EPE and Fl."""
    subject, others = report.names[0], report.names[1:]
    columns = _columns([row.metrics for row in report.rows[subject]])
    table = _table(f'{subject}, per pair (px, %, ms)')
    table.add_column('pair', no_wrap=True)
    for name in (*columns, 'ms'):
        table.add_column(TITLES.get(name, name), justify='right')
    for other in others:
        for name in BASELINE_MEASURES:
            table.add_column(f'{other}\n{TITLES[name]}', justify='right')
    for number, row in enumerate(report.rows[subject]):
        table.add_row(
            row.name, *(_cell(row.metrics.get(name)) for name in columns), f'{row.ms:.1f}',
            *(_cell(report.rows[other][number].metrics.get(name))
              for other in others for name in BASELINE_MEASURES))
    table.add_section()
    means = report.means()
    table.add_row('mean', *(_cell(means.get(name)) for name in (*columns, 'ms')),
                  *(_cell(report.means(other).get(name))
                    for other in others for name in BASELINE_MEASURES))
    return table


def comparison_table(report: Report) -> Table:
    """Return one row per pair: EPE and Fl of every estimator."""
    table = _table('per pair (px, %)')
    table.add_column('pair', no_wrap=True)
    for name in report.names:
        for measure in BASELINE_MEASURES:
            table.add_column(f'{name}\n{TITLES[measure]}', justify='right')
    for number, row in enumerate(report.rows[report.names[0]]):
        table.add_row(row.name, *(_cell(report.rows[name][number].metrics.get(measure))
                                  for name in report.names for measure in BASELINE_MEASURES))
    table.add_section()
    table.add_row('mean', *(_cell(report.means(name).get(measure))
                            for name in report.names for measure in BASELINE_MEASURES))
    return table


def means_table(report: Report) -> Table:
    """Return one row per estimator: the means over pairs, in Markdown, to be copied."""
    means = {name: report.means(name) for name in report.names}
    columns = _columns(list(means.values()))
    table = _table(f'means over {len(report.rows[report.names[0]])} pairs')
    table.box, table.pad_edge = box.MARKDOWN, True
    table.add_column('estimator', no_wrap=True)
    for name in (*columns, 'ms'):
        table.add_column(TITLES.get(name, name), justify='right')
    for estimator, values in means.items():
        table.add_row(estimator, *(_cell(values.get(name)) for name in (*columns, 'ms')))
    return table


def calibration_table(calibration: Calibration, title: str = 'confidence') -> Table:
    """Return the reliability table of confidence."""
    table = _table(f'{title}: calibration error {calibration.error:.3f}')
    for title in ('confidence', 'pixels %', 'mean confidence', 'share correct'):
        table.add_column(title, justify='right')
    total = int(calibration.pixels.sum())
    for row in calibration.bins_filled:
        table.add_row(f'{row.low:.1f}-{row.high:.1f}', f'{100 * row.pixels / total:.1f}',
                      f'{row.confidence:.3f}', f'{row.share_correct:.3f}')
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify='left', box=box.SIMPLE_HEAD, pad_edge=False)


def _columns(rows: list[Mapping[str, float]]) -> list[str]:
    """Return the measures to show: those everyone expects, and the others that say much."""
    return [name for name in TITLES if name in ALWAYS or any(
        math.isfinite(row.get(name, math.nan)) and (name != 'missing' or row[name] > 0)
        for row in rows)]


def _cell(value: float | None) -> str:
    return '-' if value is None or not math.isfinite(value) else f'{value:.2f}'
