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

"""One table of parameters: the node, config/flow.yaml and the README agree with it."""

import inspect
import os
from pathlib import Path
import re

import pytest
import yaml

pytest.importorskip('rclpy', reason='rclpy is not installed: pip install ros-rclpy[fastrtps]')

os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')

import rclpy
from rclpy.node import Node
from rclpy.parameter import Parameter

from flow_ros import networks
from flow_ros.nodes import parameters as table
from flow_ros.runtimes.base import PRECISIONS
from flow_ros.runtimes.factory import RUNTIMES
from flow_ros.streaming import FlowEstimator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def make_node():
    """Return a maker of nodes with all parameters declared, in a context of their own."""
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=60 + os.getpid() % 40)
    nodes = []

    def make(**given):
        node = Node('table', context=context, start_parameter_services=False,
                    parameter_overrides=[Parameter(name, value=value)
                                         for name, value in given.items()])
        nodes.append(node)
        node.teller = table.declare(node)
        return node
    yield make
    for node in nodes:
        node.destroy_node()
    rclpy.shutdown(context=context)


def test_the_choices_of_the_table_are_those_of_the_parts_that_take_them():
    assert all(f'`{name}`' in table.find('network').description for name in networks.names())
    assert not table.find('network').choices  # any model found is a network too
    assert set(table.find('runtime').choices) == set(RUNTIMES)
    assert set(table.find('precision').choices) == set(PRECISIONS)


def test_names_are_unique_and_everything_is_described():
    names = [parameter.name for parameter in table.PARAMETERS]
    assert len(set(names)) == len(names)
    for parameter in table.PARAMETERS:
        assert parameter.description.endswith('.')
        assert not parameter.choices or parameter.default in parameter.choices
        if parameter.minimum is not None:
            assert parameter.minimum <= parameter.default <= parameter.maximum


def test_the_node_declares_the_table(make_node):
    node = make_node()
    assert table.values_of(node) == {parameter.name: parameter.default
                                     for parameter in table.PARAMETERS}
    for parameter in table.PARAMETERS:
        described = node.describe_parameter(parameter.name)
        assert described.description == parameter.description
        assert described.read_only == parameter.read_only
        ranges = [*described.integer_range, *described.floating_point_range]
        limits = [(limit.from_value, limit.to_value) for limit in ranges]
        assert limits == ([] if parameter.minimum is None
                          else [(parameter.minimum, parameter.maximum)])


def test_the_shipped_yaml_is_the_tables():
    shipped = (ROOT / 'config' / 'flow.yaml').read_text(encoding='utf-8')
    assert shipped == table.to_yaml(), 'run python -m flow_ros.nodes.parameters --write'
    values = yaml.safe_load(shipped)['/**']['ros__parameters']
    given = [parameter for parameter in table.PARAMETERS if not parameter.told]
    assert values == {parameter.name: parameter.default for parameter in given}
    for parameter in given:
        assert type(values[parameter.name]) is type(parameter.default)


def test_the_readmes_table_is_the_tables():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert table.readme_section(readme) == table.to_markdown(), (
        'run python -m flow_ros.nodes.parameters --write')


def test_write_makes_both_files_and_nothing_else_of_the_readme(tmp_path):
    (tmp_path / 'config').mkdir()
    readme = tmp_path / 'README.md'
    readme.write_text(f'before\n{table.BEGIN}\nstale\n{table.END}\nafter\n')
    assert table.main(['--write', '--root', str(tmp_path)]) == 0
    assert (tmp_path / 'config' / 'flow.yaml').read_text() == table.to_yaml()
    text = readme.read_text()
    assert table.readme_section(text) == table.to_markdown()
    assert text.startswith('before\n') and text.endswith('\nafter\n') and 'stale' not in text


def test_write_names_missing_markers(tmp_path, capsys):
    (tmp_path / 'config').mkdir()
    (tmp_path / 'README.md').write_text('nothing\n')
    assert table.main(['--write', '--root', str(tmp_path)]) == 1
    assert table.BEGIN in capsys.readouterr().err
    assert (tmp_path / 'README.md').read_text() == 'nothing\n'


@pytest.mark.parametrize(('name', 'value', 'word'), [
    ('direction', 'sideways', 'forward, backward, both'),
    ('reliability', 'maybe', 'best_effort'),
    ('iterations', -1, 'range'),
    ('max_gap_s', 0.0, 'range'),
    ('budget', 'soon', 'iterations, latency, rate'),
    ('latency_ms', -1.0, 'range'),
    ('scale', 1.5, 'range'),
    ('roi', '640x240', 'WIDTHxHEIGHT'),
    ('network', 'dip', 'read-only'),
    ('active_runtime', 'torch', 'set by the node alone.*parameter runtime, at start'),
    ('runtime_status', 'fine', 'set by the node alone'),
])
def test_setting_what_is_not_allowed_gives_the_reason(make_node, name, value, word):
    node = make_node()
    before = table.values_of(node)
    result = node.set_parameters([Parameter(name, value=value)])[0]
    assert not result.successful
    assert re.search(word, result.reason)
    assert table.values_of(node) == before


@pytest.mark.parametrize(('name', 'text', 'value'), [
    ('iterations', '3', 3), ('latency_ms', '50', 50.0), ('scale', '0.5', 0.5),
    ('warm_start', 'false', False), ('roi', '640x240+0+240', '640x240+0+240'),
    ('budget', 'rate', 'rate')])
def test_a_text_becomes_the_type_of_its_parameter(name, text, value):
    made = table.value_of(name, text)
    assert made == value and type(made) is type(value)


@pytest.mark.parametrize(('name', 'text', 'words'), [
    ('iterations', 'many', "iterations is 'many'; expected 0 to 100"),
    ('scale', '2', r'scale is 2\.0; expected 0\.05 to 1'),
    ('scale', 'half', "scale is 'half'; expected 0.05 to 1"),
    ('warm_start', 'yes', "warm_start is 'yes'; expected true, false"),
    ('budget', '3', "budget is '3'; expected one of iterations, latency, rate"),
    ('roi', 'left', 'WIDTHxHEIGHT')])
def test_a_text_that_is_no_value_is_named(name, text, words):
    with pytest.raises(ValueError, match=words):
        table.value_of(name, text)


def test_live_values_follow_every_way_of_setting(make_node):
    node = make_node()
    values = table.LiveValues(node)
    assert values.now() == table.values_of(node)
    node.set_parameters([Parameter('iterations', value=7)])
    node.set_parameters_atomically([Parameter('budget', value='rate'),
                                    Parameter('scale', value=0.25)])
    node.teller.tell(active_runtime='torch')
    node.set_parameters([Parameter('direction', value='up')])
    assert values.now() == table.values_of(node)
    assert (values.now()['budget'], values.now()['iterations']) == ('rate', 7)
    assert values.now() is values.now(), 'read again only when one was set'


def test_the_default_of_early_stop_is_the_estimators():
    default = inspect.signature(FlowEstimator).parameters['early_stop_px'].default
    assert table.find('early_stop_px').default == default


def test_live_parameters_are_set(make_node):
    node = make_node(iterations=3)
    assert table.values_of(node)['iterations'] == 3
    assert node.set_parameters([Parameter('direction', value='both')])[0].successful
    assert table.values_of(node)['direction'] == 'both'


def test_a_start_value_that_is_not_allowed_is_refused(make_node):
    with pytest.raises(ValueError, match="direction is 'up'; expected one of forward"):
        make_node(direction='up')


def test_what_the_node_tells_changes_by_its_word_alone(make_node):
    node = make_node()
    heard = []
    node.add_post_set_parameters_callback(
        lambda changed: heard.append([parameter.value for parameter in changed]))
    node.teller.tell(active_runtime='torch', runtime_status='torch on cuda:0 serves meanwhile')
    node.teller.tell(active_runtime='torch', runtime_status='torch on cuda:0 serves meanwhile')
    node.teller.tell(active_runtime='tensorrt', runtime_status='torch on cuda:0 serves meanwhile')
    assert heard == [['torch', 'torch on cuda:0 serves meanwhile'], ['tensorrt']]
    refused, = node.set_parameters([Parameter('active_runtime', value='openvino')])
    assert not refused.successful
    # All or none: what comes with it is not set either.
    refused = node.set_parameters_atomically([Parameter('iterations', value=7),
                                              Parameter('runtime_status', value='fine')])
    assert not refused.successful
    values = table.values_of(node)
    assert (values['active_runtime'], values['iterations']) == ('tensorrt', 0)


def test_what_the_node_tells_cannot_be_given_at_start(make_node):
    with pytest.raises(ValueError, match="active_runtime is set by the node alone.*'openvino'"):
        make_node(active_runtime='openvino')
