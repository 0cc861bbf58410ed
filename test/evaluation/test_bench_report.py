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

"""Tables, plots and the README's section, from files as `flow_ros bench` writes them; no torch."""

import json
from pathlib import Path
import sys
import time

import pytest

from flow_ros.evaluation.benchmarks import report
from flow_ros.evaluation.benchmarks.children import NotDone, NotMeasured, Refused
from flow_ros.evaluation.benchmarks.machine import (
    describe,
    isa_flags,
    machine_facts,
    versions,
    without_folders,
)
from flow_ros.evaluation.benchmarks.peak import MB, PeakMemory
from flow_ros.evaluation.benchmarks.suite import (
    Measurement,
    measurements,
    PartResult,
    PARTS,
    Plan,
    run_part,
    run_plan,
    Way,
    write_part,
)
from flow_ros.flow_io import read_image

ROOT = Path(__file__).resolve().parents[2]
WAYS = (Way('openvino', 'f32'), Way('torch', 'f32'))


def accuracy_rows():
    rows = [{'network': f'dis_{preset}', 'runtime': 'opencv', 'precision': '', 'pairs': 7,
             'iterations': None, 'iterations_are': '', 'epe': 4.0, 'fl_all': 15.0,
             'outliers_1px': 24.0, 's0_10': 2.0, 's10_40': 5.0, 's40_plus': None, 'ms': ms}
            for preset, ms in (('ultrafast', 2.0), ('fast', 5.0), ('medium', 20.0))]
    for way in WAYS:
        rows += [{'network': 'dip_rt', 'runtime': way.runtime, 'precision': way.precision,
                  'pairs': 7, 'iterations': budget, 'iterations_are': 'iterations per level',
                  'epe': 4.0 / budget, 'fl_all': 16.0 / budget, 'outliers_1px': 30.0,
                  's0_10': 2.0, 's10_40': 5.0, 's40_plus': 9.0, 'ms': 30.0 * budget}
                 for budget in (1, 2, 4)]
    return rows


def time_rows():
    return [{'network': name, 'runtime': way.runtime, 'precision': way.precision, 'size': size,
             'iterations': 2, 'warm': True, 'fps': 1e3 / ms, 'ms_p50': ms, 'ms_p99': 1.2 * ms,
             'stream_mb': 50.0 + ms, 'peak_mb': 60.0 + ms,
             'frames': 40, 'trained': name != 'dip'}
            for way in WAYS for name, slow in (('dip_rt', 1.0), ('dip', 30.0))
            for size, ms in (('640x480', 48.0 * slow), ('1280x720', 144.0 * slow))]


def budget_rows():
    return [{'network': 'dip_rt', 'runtime': 'openvino', 'precision': 'f32', 'size': '640x480',
             'asked_ms': asked, 'loaded': loaded, 'frames': 80, 'ms_p50': 0.9 * asked,
             'ms_p99': 1.1 * asked, 'steps_p50': 6.0, 'overruns': 3}
            for loaded in (False, True) for asked in (100.0, 300.0)]


@pytest.fixture
def results(tmp_path):
    """Give a folder with the JSON files of all parts."""
    folder = tmp_path / 'bench' / 'results'
    folder.mkdir(parents=True)
    about = {'machine': machine_facts(), 'versions': versions(), 'command': 'flow_ros bench',
             'data': 'eval'}
    for part, rows in (('accuracy', accuracy_rows()), ('time', time_rows()),
                       ('memory', time_rows()), ('budget', budget_rows())):
        left_out = [{'what': 'dip, torch f32', 'why': 'no trained weights here'}]
        write_part(folder / f'{part}.json',
                   PartResult(part, results=rows, left_out=left_out, seconds=12.0), about)
    return folder


def test_tables_hold_the_numbers(results):
    found = report.load(results)
    assert tuple(found) == PARTS
    text = report.markdown(found, plots=['time.png'])
    assert '| OpenCV DIS medium |  |  | 4.00 | 15.00 | 24.00 | 2.00 | 5.00 | - | 20.0 |' in text
    assert ('| dip_rt | torch f32 | 4 iterations per level | 1.00 | 4.00 | 30.00 | 2.00 | 5.00 | '
            '9.00 | 120.0 |') in text
    assert '| network | runtime | 640x480 | 1280x720 |' in text
    assert '| dip_rt | openvino f32 | 48.0 (57.6) | 144.0 (172.8) |' in text
    assert '| dip* | torch f32 | 1440.0 (1728.0) |' in text
    assert '| dip_rt | openvino f32 | 98, 108 | 194, 204 |' in text
    assert ('| dip_rt | openvino f32 | 100 | 90 / 110 | 6 | 3 of 80 | 90 / 110 | 6 | 3 of 80 |'
            ) in text
    assert text.count('- dip, torch f32: no trained weights here') == 4
    assert '![time by resolution](time.png)' in text and 'memory.png' not in text
    assert text.count(describe(machine_facts(), versions()).partition('; load')[0]) == 4


def test_plots_are_pictures_of_moderate_size(results):
    pytest.importorskip('matplotlib')
    from flow_ros.evaluation.benchmarks import plots

    names = plots.draw_all(report.load(results), results)
    assert names == [f'{part}.png' for part in PARTS]
    for name in names:
        data = (results / name).read_bytes()
        assert data.startswith(b'\x89PNG\r\n\x1a\n')
        assert len(data) < 150_000
        picture = read_image(results / name)
        assert min(picture.shape[:2]) >= 400
        assert picture.std() > 10  # something is drawn


def test_a_network_has_one_colour_in_all_plots(results):
    pytest.importorskip('matplotlib')
    from flow_ros.evaluation.benchmarks import plots

    def colours(figure):
        return {line.get_label().partition(',')[0]: line.get_color()
                for line in figure.axes[0].get_lines()}

    found = report.load(results)
    drawn = [colours(plots.times(found['time']['results'])),
             colours(plots.memory(found['memory']['results'])),
             colours(plots.accuracy(found['accuracy']['results'])),
             colours(plots.budgets(found['budget']['results']))]
    assert len({each['dip_rt'] for each in drawn}) == 1
    assert drawn[0]['dip'] == drawn[1]['dip'] != drawn[0]['dip_rt']
    axes = plots.accuracy(found['accuracy']['results']).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ('log', 'log')
    assert 'ms' in axes.get_xlabel() and 'px' in axes.get_ylabel()


def test_parts_that_are_not_there_or_damaged_are_no_end(results):
    (results / 'memory.json').unlink()
    (results / 'accuracy.json').write_text('{"part": "accura')
    (results / 'budget.json').write_text('[]')
    assert tuple(report.load(results)) == ('time',)
    assert report.markdown(report.load(results)).count('## ') == 1
    assert report.load(results / 'nowhere') == {}


def test_the_section_of_the_readme(results, tmp_path):
    readme = tmp_path / 'README.md'
    readme.write_text(f'before\n{report.BEGIN}\nstale\n{report.END}\nafter\n')
    report.write_readme(readme, report.load(results), results)
    text = readme.read_text()
    assert text.startswith(f'before\n{report.BEGIN}\n') and text.endswith(f'{report.END}\nafter\n')
    assert 'stale' not in text
    assert '| dip_rt | openvino f32 | 48.0 (57.6) | 20.8 | 98 |' in text
    assert '144.0' not in text  # of another size
    assert '(bench/results/report.md)' in text and '(bench/results/accuracy.png)' in text
    assert '| dip_rt | openvino f32 | 300 | 270 / 330 |' in text
    report.write_readme(readme, report.load(results), results)
    assert readme.read_text() == text
    (results / 'time.json').unlink()
    with pytest.raises(ValueError, match='no times at 640x480 there; measure them: flow_ros '):
        report.write_readme(readme, report.load(results), results)
    assert readme.read_text() == text
    readme.write_text('no markers')
    with pytest.raises(ValueError, match='has no section between <!-- speed --> and '):
        report.write_readme(readme, report.load(results), results)


def test_the_readme_agrees_with_the_results_beside_it():
    folder = ROOT / 'bench' / 'results'
    if not (folder / 'time.json').is_file():
        pytest.skip('no report has been committed')
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    section = readme.partition(report.BEGIN)[2].partition(report.END)[0]
    wanted = report.readme_section(report.load(folder), folder.relative_to(ROOT))
    assert section.strip() == wanted.strip(), 'write it with: flow_ros bench --readme'


# Which measurements, and what becomes of them.

def plan(**given):
    return Plan(**({'networks': {'dip_rt': 2, 'mscsl': None}, 'ways': WAYS} | given))


def test_every_network_and_way_is_in_every_part(tmp_path):
    """Accuracy of all in all ways; else of the first in all, and of the others in the first."""
    every = {(name, way.runtime) for name in ('dip_rt', 'mscsl') for way in WAYS}
    for part, kind in (('accuracy', 'accuracy'), ('time', 'timing'), ('memory', 'memory')):
        todo = list(measurements(part, plan(), tmp_path))
        assert len({each.name for each in todo}) == len(todo)
        seen = {(each.arguments['network'], each.arguments['runtime'])
                for each in todo if each.kind == kind}
        assert seen == every - (set() if part == 'accuracy' else {('mscsl', 'torch')})
    asked = {(each.arguments['network'], each.arguments['latency_ms'], each.arguments['loaded'])
             for each in measurements('budget', plan(), tmp_path)}
    assert {(name, ms, loaded) for name in ('dip_rt', 'mscsl') for ms in (100.0, 300.0)
            for loaded in (False, True)} <= asked
    assert next(measurements('accuracy', plan(), tmp_path)).kind == 'pairs'
    given = list(measurements('accuracy', plan(data=tmp_path / 'eval'), tmp_path))
    assert given[0].kind == 'dis' and given[0].arguments['data'] == str(tmp_path / 'eval')
    large = [each.name for each in measurements('memory', plan(), tmp_path)
             if '3840x2160' in each.name]
    assert large == ['dip_rt, openvino f32, 3840x2160']


def test_without_weights_there_is_time_and_memory_alone(tmp_path):
    untrained = plan(untrained=['mscsl'])
    for part in PARTS:
        names = {each.arguments.get('network') for each in measurements(part, untrained, tmp_path)}
        assert ('mscsl' in names) is (part in ('time', 'memory'))
    result = run_part('budget', untrained, tmp_path, limit_s=100.0, run=Runs(),
                      save=lambda each: None, on_progress=lambda *each: None)
    assert result.left_out == [{'what': 'mscsl', 'why': 'no trained weights here'}]


def test_the_most_important_comes_first(tmp_path):
    names = [each.name for each in measurements('time', plan(), tmp_path)]
    assert names[:2] == ['OpenCV DIS', 'dip_rt, openvino f32, 640x480']


class Runs:
    """Stands for the processes: what each kind and network gives."""

    def __init__(self, **given):
        self.given = given
        self.asked = []

    def __call__(self, kind, arguments, *, limit_s, on_progress):
        self.asked.append((kind, dict(arguments)))
        on_progress('working')
        answer = self.given.get(arguments.get('network', kind), {'rows': [], 'pairs': 3})
        if isinstance(answer, BaseException):
            raise answer
        return {**answer, **{name: arguments[name] for name in ('network', 'size')
                             if name in arguments}}


def test_what_fails_is_a_line_and_no_end(tmp_path):
    saved, told = [], []
    result = run_part('time', plan(), tmp_path, limit_s=100.0, run=Runs(
        dip_rt=NotMeasured('it was ended by SIGSEGV'), mscsl={'ms_p50': 20.0}),
        save=lambda each: saved.append(len(each.results) + len(each.left_out)),
        on_progress=lambda *each: told.append(each))
    assert result.failed == 8
    assert {row['network'] for row in result.results} == {'mscsl'} and len(result.results) == 4
    assert result.left_out[0] == {'what': 'dip_rt, openvino f32, 640x480',
                                  'why': 'failed: it was ended by SIGSEGV'}
    assert saved == [*range(0, 13), 12]  # after each, and at the end; DIS gave no rows here
    assert told[0] == (0, 13, 'OpenCV DIS') and told[1] == (0, 13, 'OpenCV DIS: working')
    refused = run_part('time', plan(), tmp_path, limit_s=100.0, save=lambda each: None,
                       on_progress=lambda *each: None,
                       run=Runs(dip_rt=Refused('no such runtime'), mscsl={'ms_p50': 1.0}))
    assert refused.failed == 0
    assert refused.left_out[0]['why'] == 'no such runtime'


def test_what_does_not_fit_is_left_out_and_named(tmp_path):
    slow = Runs(dip_rt={'ms_p50': 8000.0}, mscsl={'ms_p50': 1.0})
    result = run_part('time', plan(), tmp_path, limit_s=100.0, run=slow,
                      save=lambda each: None, on_progress=lambda *each: None)
    left_out = {each['what']: each['why'] for each in result.left_out}
    # Six frames of 8 s, three times as large: 144 s.
    assert left_out['dip_rt, openvino f32, 1280x720'] == (
        'it would take about 144 s: more with --minutes')
    assert not any(name.startswith('mscsl') for name in left_out)
    saved = []
    none = run_part('time', plan(), tmp_path, limit_s=0.0, run=Runs(), on_progress=lambda *_: None,
                    save=lambda each: saved.append(len(each.left_out)))
    assert saved == [13]  # what is left out is in the file too
    assert not none.results and len(none.left_out) == 13
    late = run_part('time', plan(), tmp_path, limit_s=100.0, save=lambda each: None,
                    on_progress=lambda *each: None,
                    run=Runs(dip_rt=NotDone('not done after 9 s'), mscsl={'ms_p50': 1.0}))
    assert late.failed == 0
    assert late.left_out[0]['why'] == 'not done after 9 s: more with --minutes'
    assert {each['why'] for each in none.left_out} == {'no time was left: more with --minutes'}


def test_ctrl_c_leaves_what_is_done(tmp_path):
    def save(result):
        write_part(tmp_path / f'{result.part}.json', result, {'command': 'flow_ros bench'})

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan(parts=('time',), ways=WAYS[:1]), save=save, on_progress=lambda *each: None,
                 run=Runs(dip_rt={'ms_p50': 5.0}, mscsl=KeyboardInterrupt()))
    content = json.loads((tmp_path / 'time.json').read_text())
    assert [row['network'] for row in content['results']] == ['dip_rt']
    assert content['command'] == 'flow_ros bench'
    assert [path.name for path in tmp_path.iterdir()] == ['time.json']


def test_the_parts_asked_for_are_done_in_order(tmp_path):
    runs = Runs(dip_rt={'ms_p50': 5.0, 'rows': []}, mscsl={'ms_p50': 5.0, 'rows': []})
    done = run_plan(plan(parts=('memory', 'accuracy')), save=lambda each: None, run=runs,
                    on_progress=lambda *each: None)
    assert [each.part for each in done] == ['accuracy', 'memory']
    assert runs.asked[0][0] == 'pairs' and runs.asked[-1][0] == 'memory'
    assert not Path(runs.asked[0][1]['folder']).exists()  # it was for the time of the run


def test_a_measurement_knows_no_heavier_one_before_it():
    each = Measurement('a', 'timing', {})
    assert each.heavier_than is None and not each.rows


# The machine.

def test_the_machine_without_its_name_or_its_users_folders():
    facts = machine_facts()
    assert facts['cpu'] and facts['cores'] >= 1 and facts['governor']
    text = json.dumps([facts, versions()])
    import platform
    node = platform.node()
    assert not node or len(node) < 4 or node not in text
    assert str(Path.home()) not in text or str(Path.home()) == '/'
    assert versions()['python'] == platform.python_version()
    assert versions()['numpy']
    assert facts['cpu'] in describe(facts, versions())


def test_the_isa_flags_are_those_that_matter():
    assert isa_flags('fpu vme sse2 avx2 fma avx512f amx_bf16 avx') == [
        'avx', 'avx2', 'fma', 'avx512f', 'amx_bf16']
    assert isa_flags('fp asimd evtstrm aes asimdhp') == ['asimd', 'asimdhp']


def test_a_peak_is_seen_after_it_is_over():
    with PeakMemory() as peak:
        data = bytearray(64 * MB)
        data[::4096] = b'x' * len(data[::4096])  # touched, so resident
        del data
    assert 55 < peak.peak_mb < 90
    with PeakMemory() as none:
        pass
    assert none.peak_mb < 8
    with PeakMemory(above_mb=none.start_mb - 100) as above:
        pass
    assert above.peak_mb == pytest.approx(100, abs=12)


@pytest.mark.skipif(sys.platform != 'linux', reason='the kernel counts only on Linux')
def test_where_the_kernel_does_not_count_the_peak_is_sampled(monkeypatch):
    from flow_ros.evaluation.benchmarks import peak as module
    monkeypatch.setattr(module, '_reset_highest', lambda: False)
    with PeakMemory() as peak:
        data = bytearray(64 * MB)
        data[::4096] = b'x' * len(data[::4096])
        deadline = time.monotonic() + 20  # until the thread that samples has had its turn
        while peak._highest - peak.start_mb < 55 and time.monotonic() < deadline:
            time.sleep(0.01)
        del data
    assert 55 < peak.peak_mb < 90


@pytest.mark.parametrize(('text', 'left'), [
    ("OSError: /home/me/runs/a.bin: not there, see '/opt/x/y'",
     "OSError: a.bin: not there, see 'y'"),
    ('2.5 MB/s of 3/4 at https://example.org/a/b', '2.5 MB/s of 3/4 at https://example.org/a/b'),
    ('File "/usr/lib/python3/site-packages/torch/nn.py"', 'File "nn.py"')])
def test_no_folder_of_this_machine_is_in_a_report(text, left):
    assert without_folders(text) == left
