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

"""The parameter files per machine: the node takes each, and each says why."""

import os
from pathlib import Path

import pytest
import yaml

pytest.importorskip('rclpy', reason='rclpy is not installed: pip install ros-rclpy[fastrtps]')

import rclpy
from rclpy.parameter import Parameter
import torch

from flow_ros import networks
from flow_ros.nodes import flow_node, parameters
from flow_ros.runtimes import factory

CONFIG = Path(__file__).resolve().parents[2] / 'config'


def values_in(preset):
    text = (CONFIG / f'{preset}.yaml').read_text(encoding='utf-8')
    return yaml.safe_load(text)['/**']['ros__parameters']


def test_every_preset_is_there_and_nothing_else():
    found = {path.stem for path in CONFIG.glob('*.yaml')} - {'flow'}
    assert found == set(parameters.PRESETS)


@pytest.mark.parametrize('preset', parameters.PRESETS)
def test_its_values_are_of_the_table(preset):
    values = values_in(preset)
    assert values
    for name, value in values.items():
        parameter = parameters.find(name)
        assert type(value) is type(parameter.default), name
        assert not parameter.refusal(value)
        if parameter.minimum is not None:
            assert parameter.minimum <= value <= parameter.maximum, name


@pytest.mark.parametrize('preset', parameters.PRESETS)
def test_each_value_has_its_reason_and_no_speed_is_claimed(preset):
    text = (CONFIG / f'{preset}.yaml').read_text(encoding='utf-8')
    lines = [line.strip() for line in text.splitlines()]
    for name in values_in(preset):
        at, = [index for index, line in enumerate(lines) if line.startswith(f'{name}: ')]
        while not lines[at].startswith('#'):
            at -= 1
            assert not lines[at].endswith('ros__parameters:'), f'{name} has no comment'
    for word in ('fps', 'frames/s', ' ms', ' Hz'):
        assert word not in text


@pytest.mark.parametrize('preset', parameters.PRESETS)
def test_the_node_starts_with_it(preset, tmp_path, monkeypatch):
    """On this machine: what there is of runtimes serves, and its values have arrived."""
    if values_in(preset).get('runtime') == 'openvino':
        pytest.importorskip('openvino', reason='OpenVINO is not installed')
    options = {}
    create_runtime = factory.create_runtime

    def spy(name, network, **given):
        options.update(given, name=name)
        return create_runtime(name, network, **given)
    monkeypatch.setattr('flow_ros.streaming.estimator.create_runtime', spy)
    torch.manual_seed(0)
    weights = tmp_path / 'dip_rt.safetensors'
    networks.save(networks.create('dip_rt'), weights)
    threads = torch.get_num_threads()
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=60 + os.getpid() % 40)
    node = None
    try:
        node = flow_node.FlowNode(
            context=context,
            cli_args=['--ros-args', '--params-file', str(CONFIG / f'{preset}.yaml')],
            parameter_overrides=[Parameter('weights', value=str(weights)),
                                 Parameter('engine_cache', value=str(tmp_path / 'cache'))])
        values = parameters.values_of(node)
        wanted = values_in(preset)
        assert {name: values[name] for name in wanted} == wanted
        assert values['active_runtime'] in ('torch', 'openvino', 'tensorrt')
        assert f'{values["active_runtime"]} on ' in values['runtime_status']
        assert options['name'] == wanted['runtime']
        assert options['precision'] == wanted['precision']
        assert options['cache'] == tmp_path / 'cache'
        assert options['workspace_mib'] == (wanted.get('workspace_mib') or None)
        assert options['threads'] == (wanted.get('threads') or None)
    finally:
        if node is not None:
            assert node.close()
        rclpy.try_shutdown(context=context)
        torch.set_num_threads(threads)
