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

"""Building engines in a process of its own, at last with the real exporter and TensorRT-RTX."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
import textwrap
from typing import Any

from building_tools import ACTS, network, ORIN, REQUEST, Said, TENSORRT
import pytest
import torch

from flow_ros.networks.base import FlowNetwork
from flow_ros.runtimes import building
from flow_ros.runtimes.build_progress import EngineProgress
from flow_ros.runtimes.building import (
    build_engines,
    build_engines_apart,
    BuiltEngines,
    Gpu,
)
from flow_ros.runtimes.cache import EngineCache
from flow_ros.runtimes.tensorrt import BuildCancelled, BuildError, find_tensorrt

torch.set_num_threads(1)

needs_tensorrt = pytest.mark.skipif(
    find_spec('tensorrt_rtx') is None or find_spec('onnxscript') is None,
    reason='TensorRT-RTX or onnxscript is not installed')


WORKER = """
    import os, signal, sys
    from building_tools import Tools
    from flow_ros.runtimes import build_worker, building
    from flow_ros.apart import serve_job

    MODE = {mode!r}
    tools = Tools()
    real = building.build_engines

    def build(model, *, name, progress=None, **keywords):
        if MODE == 'crash' and 'step_8' in name:
            print('no memory left', file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if MODE == 'error' and 'step_8' in name:
            raise building.BuildError('step_8 has NoSuchOperator')
        print('what libraries print')
        tools.padding = bytes(10_000 if MODE == 'large' else 0)
        return tools.build(model, name=name, progress=progress, **keywords)

    def build_engines(*arguments, **keywords):
        return real(*arguments, **keywords, builder=build, exporter=tools.export)

    def main():
        build_worker.build_engines = build_engines
        serve_job(build_worker.work)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch) -> Callable[[str], str]:
    """Make the module of a process that builds with the tools of the test."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)

    def make(mode: str) -> str:
        text = textwrap.dedent(WORKER).replace('{mode!r}', repr(mode))
        (tmp_path / f'worker_{mode}.py').write_text(text)
        return f'worker_{mode}'

    return make


def apart(cache: EngineCache, worker: str, said: Said, given: FlowNetwork | None = None,
          progress: Callable[[EngineProgress], bool] | None = None) -> BuiltEngines:
    return build_engines_apart(network() if given is None else given, REQUEST,
                               installation=TENSORRT, gpu=ORIN, cache=cache, progress=progress,
                               say=said, device=torch.device('cuda'), worker=worker)


def test_a_process_of_its_own_that_crashes_is_an_error_and_the_next_one_goes_on(
        cache, said, worker) -> None:
    seen: list[EngineProgress] = []
    with pytest.raises(BuildError, match=r'died while building step_8 \(3 of 4\).*SIGKILL '
                                         r'\(.*memory is short\): no memory left'):
        apart(cache, worker('crash'), said, progress=lambda each: not seen.append(each))
    assert seen[0].text == 'starting to build' and seen[-1].act == 'step_8'
    with pytest.raises(BuildError, match='step_8 has NoSuchOperator'):
        apart(cache, worker('error'), said)
    assert len(cache.entries()) == 2 and said == []


def test_a_process_of_its_own_can_be_cancelled(cache, said, worker) -> None:
    with pytest.raises(BuildCancelled, match=r'while building step_16 .*kept in .*goes on'):
        apart(cache, worker('well'), said,
              progress=lambda each: not (each.act == 'step_16' and each.phase == 'build'))
    with pytest.raises(BuildCancelled, match='while starting to build'):
        apart(cache, worker('well'), said, progress=lambda each: False)


def test_a_process_of_its_own_without_a_cache(tmp_path, said, worker) -> None:
    (tmp_path / 'file').write_text('in the way')
    cache = EngineCache(tmp_path / 'file', said)
    engines = apart(cache, worker('well'), said)
    assert list(engines.plans) == ACTS
    assert all(record.folder is None for record in engines.records)
    assert len(said) == 1 and 'FLOW_ROS_CACHE' in said.warnings[0]
    assert apart(cache, 'no_such_module', said).plans == engines.plans


def test_a_disk_that_fills_up_under_a_process_of_its_own(
        tiny_disk, said, worker, monkeypatch) -> None:
    def never(*arguments: Any, **keywords: Any) -> Any:
        pytest.fail('this was built in the other process')

    monkeypatch.setattr(building, 'export_act', never)
    engines = apart(EngineCache(tiny_disk / 'cache', said), worker('large'), said)
    assert list(engines.plans) == ACTS
    kept = [record.act for record in engines.records if record.folder is not None]
    assert 0 < len(kept) < len(ACTS)
    warning, = said.warnings
    assert 'No space left' in warning and 'kept in memory only' in warning


def test_networks_that_are_in_no_file_are_built_here(tools, cache, said, monkeypatch) -> None:
    monkeypatch.setattr(building, 'build_plan', tools.build)
    monkeypatch.setattr(building, 'export_act', tools.export)
    other = network()
    other.name = 'mine'
    assert list(apart(cache, 'no_such_module', said, other).plans) == ACTS == tools.built


@pytest.fixture(scope='module')
def real(tmp_path_factory) -> tuple[EngineCache, BuiltEngines, list[EngineProgress], Said]:
    """The real export and the real builder, which needs no GPU, in a process of its own."""
    said = Said()
    cache = EngineCache(tmp_path_factory.mktemp('real') / 'cache', said)
    installation = find_tensorrt()
    assert installation is not None
    seen: list[EngineProgress] = []
    engines = build_engines_apart(network(), REQUEST, installation=installation, gpu=None,
                                  cache=cache, progress=lambda each: not seen.append(each),
                                  say=said)
    return cache, engines, seen, said


@needs_tensorrt
def test_the_real_builder_builds_every_act(real) -> None:
    cache, engines, seen, said = real
    assert list(engines.plans) == ACTS
    assert all(len(plan) > 10_000 for plan in engines.plans.values())
    assert said == []
    fractions = [each.fraction for each in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert {each.phase for each in seen} == {'start', 'export', 'build', 'done'}
    titles = {entry.title for entry in cache.entries()}
    assert titles == {f'dip_rt {act} 128x96 f32' for act in ACTS}
    entry = cache.entries()[0]
    assert entry.metadata['key']['gpu'] == 'any'
    assert entry.metadata['seconds'] > 0


@needs_tensorrt
def test_what_the_real_builder_built_is_found_without_it(real, monkeypatch) -> None:
    cache, engines, _, _ = real

    def never(*arguments: Any, **keywords: Any) -> Any:
        pytest.fail('this was in the cache')

    again = build_engines(network(), REQUEST, installation=engines.installation,
                          gpu=Gpu('RTX 4090', '8.9'), cache=EngineCache(cache.directory),
                          builder=never, exporter=never)
    assert again.plans == engines.plans
    monkeypatch.setattr(building, 'run_apart', never)  # nor is a process started
    again = build_engines_apart(network(), REQUEST, installation=engines.installation, gpu=None,
                                cache=EngineCache(cache.directory))
    assert again.plans == engines.plans


@needs_tensorrt
def test_an_unknown_operator_is_named_and_the_others_are_kept(tools, cache, real) -> None:
    import onnx
    from onnx import helper, TensorProto

    def unknown(network: FlowNetwork, act: Any, *, dynamic: bool = False) -> bytes:
        kind = 'NoSuchOperator' if act.name == 'step_8' else 'Relu'
        graph = helper.make_graph(
            [helper.make_node(kind, ['x'], ['y'], name='the_node')], 'graph',
            [helper.make_tensor_value_info('x', TensorProto.FLOAT, [1, len(act.name)])],
            [helper.make_tensor_value_info('y', TensorProto.FLOAT, [1, len(act.name)])])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)])
        return model.SerializeToString()

    with pytest.raises(BuildError, match='(?s)dip_rt step_8 128x96.*NoSuchOperator'):
        build_engines(network(), REQUEST, installation=real[1].installation, gpu=None,
                      cache=cache, exporter=unknown)
    assert sorted(entry.title.split()[1] for entry in cache.entries()) == ['encode', 'step_16']
    assert onnx is not None
