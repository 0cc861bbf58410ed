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

"""Building engines, with an exporter and a builder of the test's own; see also the real ones."""

from contextlib import nullcontext
from dataclasses import replace
import os
from pathlib import Path
import signal
import subprocess
import sys
import textwrap
from typing import Any

from building_tools import (
    ACTS,
    build,
    network,
    ORIN,
    remembered_acts,
    REQUEST,
    TENSORRT,
    Tools,
)
import pytest
import torch

from flow_ros.networks.base import FlowNetwork
from flow_ros.runtimes import building
from flow_ros.runtimes.base import RuntimeUnavailable
from flow_ros.runtimes.build_progress import EngineProgress
from flow_ros.runtimes.building import (
    build_engines,
    build_target,
    BuildRequest,
    BuiltEngines,
    checked_runtime,
    Gpu,
    make_runtime,
    PORTABLE,
)
from flow_ros.runtimes.cache import EngineCache
from flow_ros.runtimes.export import SizeRange
from flow_ros.runtimes.handover import EngineRefused
from flow_ros.runtimes.tensorrt import BuildCancelled, Installation, PlanError
from flow_ros.runtimes.torch import TorchRuntime

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quickly(monkeypatch) -> None:
    """What is written here need not survive a power cut."""
    monkeypatch.setattr('flow_ros.runtimes.cache.os.fsync', lambda handle: None)
    monkeypatch.setattr(building, 'record_acts', remembered_acts)


def test_what_is_built_is_not_built_again_nor_exported(tools, cache, said) -> None:
    first = build(tools, cache)
    assert [act.name for act in first.acts] == ACTS == list(first.plans) == tools.built
    assert tools.exported == ACTS
    assert not any(record.cached for record in first.records)
    assert all(record.folder is not None for record in first.records)
    assert tools.timing == [None, b'1', b'2', b'3']
    asked: list[EngineProgress] = []
    second = build(tools, EngineCache(cache.directory, said),
                   progress=lambda seen: not asked.append(seen))
    assert second.plans == first.plans
    assert tools.exported == ACTS == tools.built
    assert asked == [] and said == []
    assert all(record.cached for record in second.records)
    assert 'all engines were in the cache' in second.text
    assert 'built encode, step_16, step_8, finish in' in first.text
    assert 'TensorRT 10.16.1, Orin (compute capability 8.7)' in first.text


@pytest.mark.parametrize('change', [
    {'seed': 1}, {'request': BuildRequest(size=(128, 112))},
    {'request': BuildRequest(size=(128, 96), precision='fast')},
    {'request': BuildRequest(size=SizeRange(minimum=(64, 64), optimum=(128, 96),
                                            maximum=(256, 256)))}])
def test_another_export_is_another_engine(tools, cache, change) -> None:
    first = build(tools, cache)
    exported = len(tools.exported)
    other = build(tools, cache, **change)
    assert len(tools.exported) > exported
    assert not set(other.plans.values()) & set(first.plans.values())
    assert not any(record.cached for record in other.records)


@pytest.mark.parametrize('change', [
    {'installation': Installation('tensorrt', '11.4.1')}, {'gpu': Gpu('Thor', '11.0')},
    {'gpu': Gpu('Orin', '8.9')},
    {'request': BuildRequest(size=(128, 96), workspace_mib=512)},
    {'request': BuildRequest(size=(128, 96), optimisation_level=5)}])
def test_another_machine_builds_its_own_and_says_why(tools, cache, said, change) -> None:
    build(tools, cache)
    build(tools, cache, **change)
    assert tools.built == 2 * ACTS
    assert len(said) == 4 and not said.warnings
    assert all('built anew: the one kept since' in text for _, text in said)
    build(tools, cache)  # the first ones are still there
    assert tools.built == 2 * ACTS


def test_a_change_of_the_code_exports_again_but_builds_only_what_it_changed(
        tools, cache, monkeypatch) -> None:
    build(tools, cache)
    monkeypatch.setattr(building, '_code_sha256', lambda network: 'other')
    engines = build(tools, cache)
    assert tools.exported == 2 * ACTS
    assert tools.built == ACTS
    assert all(record.cached for record in engines.records)


def test_the_code_of_networks_from_elsewhere_counts(tmp_path, monkeypatch) -> None:
    source = tmp_path / 'elsewhere.py'
    monkeypatch.syspath_prepend(tmp_path)
    source.write_text('from flow_ros.networks.dip_rt import DipRt\n\n\n'
                      'class Mine(DipRt):\n    pass\n')
    import elsewhere
    mine = elsewhere.Mine()
    before = building._code_sha256(mine)
    assert before != building._code_sha256(network())
    source.write_text(source.read_text() + '\n')
    assert building._code_sha256(mine) != before


def test_progress_is_told_for_the_whole(tools, cache) -> None:
    seen: list[EngineProgress] = []
    build(tools, cache, progress=lambda each: not seen.append(each))
    fractions = [each.fraction for each in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert fractions[0] == 0.0 and max(fractions[:-1]) < 1.0
    assert {(each.act, each.index) for each in seen} == set(zip(ACTS, range(4)))
    assert [each.phase for each in seen if each.act == 'encode'] == ['export'] + 6 * ['build']
    assert seen[0].left_s is None
    assert seen[-1].phase == 'done' and seen[-1].text.startswith('built 4 engines in ')
    # Three builds of 5 s each, as the first one's builder says, are still to come.
    first = next(each for each in seen if each.phase == 'build' and each.left_s is not None)
    assert first.left_s == pytest.approx(20, abs=2)
    assert first.text.startswith('building encode (1 of 4): 0 %, about 20 s left')


def test_texts_of_progress() -> None:
    seen = EngineProgress(act='step_8', index=2, count=4, phase='build', fraction=0.45,
                          elapsed_s=30.0, left_s=40.0)
    assert seen.text == 'building step_8 (3 of 4): 45 %, about 40 s left'
    assert replace(seen, phase='export', left_s=None).text == 'exporting step_8 (3 of 4): 45 %'
    assert 'about 10 min left' in replace(seen, left_s=601.0).text
    assert 'another process' in replace(seen, phase='wait').text
    assert replace(seen, phase='check').text == 'checking the engines'


def test_cancel_keeps_what_is_done_and_the_next_build_goes_on(tools, cache, said) -> None:
    with pytest.raises(BuildCancelled, match=r'while building step_8; encode, step_16 kept in .*'
                                             r'next build goes on'):
        build(tools, cache,
              progress=lambda seen: not (seen.act == 'step_8' and seen.phase == 'build'))
    assert tools.built == ['encode', 'step_16']
    assert not list(cache.directory.rglob('*.part'))
    engines = build(tools, cache)
    assert tools.built == ACTS
    assert [record.cached for record in engines.records] == [True, True, False, False]
    assert said == []


def test_ctrl_c_in_an_export_keeps_what_is_done(tools, cache, said) -> None:
    def interrupted(network: FlowNetwork, act: Any, *, dynamic: bool = False) -> bytes:
        if act.name == 'finish':
            raise KeyboardInterrupt
        return Tools.export(tools, network, act, dynamic=dynamic)

    tools.export = interrupted
    with pytest.raises(KeyboardInterrupt):
        build(tools, cache)
    (level, text), = said
    assert 'cancelled while exporting finish; encode, step_16, step_8 kept' in text
    with cache.lock('anything', waiting=lambda seconds: False):
        pass
    del tools.export
    build(tools, cache)
    assert tools.built == ACTS


def test_only_the_truncated_plan_is_built_again(tools, cache, said) -> None:
    first = build(tools, cache)
    folder = first.records[2].folder
    (folder / 'plan').write_bytes(first.plans['step_8'][:10])
    assert build(tools, cache).plans == first.plans
    assert tools.built == [*ACTS, 'step_8']
    warning, = said.warnings
    assert 'dip_rt step_8 128x96 f32' in warning and 'truncated' in warning


def test_without_a_cache_everything_works_from_memory(tools, tmp_path, said) -> None:
    (tmp_path / 'file').write_text('in the way')
    cache = EngineCache(tmp_path / 'file', said)
    engines = build(tools, cache)
    assert list(engines.plans) == ACTS
    assert all(record.folder is None for record in engines.records)
    warning, = said.warnings
    assert 'FLOW_ROS_CACHE' in warning and str(tmp_path / 'file') in warning
    assert build(tools, cache).plans == engines.plans
    assert tools.built == ACTS == tools.exported


def test_a_full_disk_is_a_warning(tools, tiny_disk, said) -> None:
    cache = EngineCache(tiny_disk / 'cache', said)
    engines = build(tools, cache)
    assert list(engines.plans) == ACTS
    warning, = said.warnings
    assert 'No space left' in warning
    assert not list(tiny_disk.rglob('*.part'))
    for folder in (tiny_disk / 'cache' / 'engines').iterdir():
        assert sorted(path.name for path in folder.iterdir()) == ['metadata.json', 'plan']
    assert build(tools, cache).plans == engines.plans
    assert tools.built == ACTS


CHILD = """
    import os, signal, sys, time
    from pathlib import Path
    from flow_ros.runtimes.cache import EngineCache
    from building_tools import build, Tools

    directory, mode = Path(sys.argv[1]), sys.argv[2]
    tools = Tools()
    real = tools.build

    def slowly(model, *, name, **keywords):
        with (directory / 'builds').open('a') as file:
            file.write(f'{name.split()[1]} ')
        if mode == 'killed' and 'step_8' in name:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        return real(model, name=name, **keywords)

    tools.build = slowly
    engines = build(tools, EngineCache(directory / 'cache', lambda level, text: print(text)))
    print('done', len(engines.plans))
"""


def child(directory: Path, mode: str) -> subprocess.Popen[str]:
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(
        [str(Path(__file__).parent), str(Path(building.__file__).parents[2])])}
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(CHILD), str(directory), mode],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=environment)


def test_two_processes_build_each_engine_once(tmp_path, tools) -> None:
    children = [child(tmp_path, 'whole') for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in children]
    assert all('done 4' in output for output in outputs), outputs
    assert sorted((tmp_path / 'builds').read_text().split()) == sorted(ACTS)
    build(tools, EngineCache(tmp_path / 'cache'))
    assert tools.built == []


def test_a_killed_build_is_no_obstacle(tmp_path, tools, said) -> None:
    process = child(tmp_path, 'killed')
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    engines = build(tools, EngineCache(tmp_path / 'cache', said))
    assert tools.built == ['step_8', 'finish']
    assert [record.cached for record in engines.records] == [True, True, False, False]
    assert said == []  # nobody was waited for


def test_for_which_gpu_is_built() -> None:
    rtx = Installation('tensorrt_rtx', '1.7.1')
    assert build_target(TENSORRT, ORIN) == ORIN
    assert build_target(rtx, None) == build_target(rtx, Gpu('RTX 4090', '8.9')) == PORTABLE
    assert 'any GPU' in PORTABLE.text
    with pytest.raises(RuntimeUnavailable, match='can only build on the GPU.*no CUDA device'):
        build_target(TENSORRT, None)
    with pytest.raises(RuntimeUnavailable, match=r'8.0 and later; seen RTX 2080 \(.*7.5\)'):
        build_target(rtx, Gpu('RTX 2080', '7.5'))


class FakeTensorRt(TorchRuntime):
    """Stands where ``TensorRtRuntime`` does; this machine cannot run plans."""

    name = 'tensorrt'
    refuse: list[str] = []

    def __init__(self, network: FlowNetwork, *, plans: Any, acts: Any, device: torch.device,
                 precision: str, reason: str) -> None:
        if self.refuse:
            raise PlanError(self.refuse.pop())
        super().__init__(network, device=torch.device('cpu'), precision=precision, reason=reason)
        self.plans, self.acts = plans, acts


@pytest.fixture
def fake_device(tools, monkeypatch) -> torch.device:
    """A CUDA device as far as ``make_runtime`` looks at it."""
    monkeypatch.setattr(building, 'gpu_of', lambda device: ORIN)
    monkeypatch.setattr(torch.cuda, 'device', lambda device: nullcontext())
    monkeypatch.setattr(building, 'TensorRtRuntime', FakeTensorRt)
    real = build_engines

    def quick(network: FlowNetwork, request: BuildRequest, *, device: torch.device,
              **keywords: Any) -> BuiltEngines:
        return real(network, request, **keywords, builder=tools.build, exporter=tools.export)

    monkeypatch.setattr(building, 'build_engines_apart', quick)
    # Tensors stay on the CPU: nothing here looks at the kind.
    return torch.device('cpu')


def test_a_runtime_is_made_of_the_engines(tools, cache, fake_device) -> None:
    given = network()
    runtime = make_runtime(given, REQUEST, device=fake_device, installation=TENSORRT, cache=cache,
                           reason='auto')
    assert list(runtime.plans) == [act.name for act in runtime.acts] == ACTS
    assert runtime.network is not given and runtime.reason == 'auto'


def test_engines_of_the_cache_that_are_not_taken_are_built_once_more(
        tools, cache, said, fake_device, monkeypatch) -> None:
    def made() -> Any:
        return make_runtime(network(), REQUEST, device=fake_device, installation=TENSORRT,
                            cache=cache, say=said)

    made()
    monkeypatch.setattr(FakeTensorRt, 'refuse', ['cannot deserialise'])
    made()
    assert tools.built == 2 * ACTS
    assert said.warnings == ['the engines in the cache are built anew: cannot deserialise']
    monkeypatch.setattr(FakeTensorRt, 'refuse', ['b', 'a'])
    with pytest.raises(PlanError, match='b'):
        made()
    cache.clear()
    monkeypatch.setattr(FakeTensorRt, 'refuse', ['new ones too'])
    with pytest.raises(PlanError, match='new ones too'):
        made()


def test_without_tensorrt_there_is_no_runtime(cache, monkeypatch) -> None:
    monkeypatch.setenv('FLOW_ROS_TENSORRT', 'none')
    with pytest.raises(RuntimeUnavailable, match='switched off'):
        make_runtime(network(), REQUEST, device=torch.device('cuda'), cache=cache)


def test_a_runtime_is_checked_before_it_serves(
        tools, cache, said, fake_device, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path / 'references'))
    monkeypatch.setattr(building, 'find_tensorrt', lambda: TENSORRT)
    seen = []
    runtime = checked_runtime(network(), REQUEST, device=fake_device, cache=cache, say=said,
                              progress=lambda each: not seen.append(each.phase))
    assert runtime.name == 'tensorrt' and seen[-1] == 'check'
    assert not said.warnings and any('passed' in text for _, text in said)

    def wrong(self: Any, engine: str, /, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = TorchRuntime.call(self, engine, *tensors)
        return tuple(result + 5 for result in results) if engine == 'finish' else results

    monkeypatch.setattr(FakeTensorRt, 'call', wrong)
    with pytest.raises(EngineRefused, match='dip_rt on tensorrt .*REFUSED'):
        checked_runtime(network(), REQUEST, device=fake_device, cache=cache, say=said)
    with pytest.raises(BuildCancelled, match='before the engines were checked'):
        checked_runtime(network(), REQUEST, device=fake_device, cache=cache, say=said,
                        progress=lambda each: each.phase != 'check')
