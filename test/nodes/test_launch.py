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

"""The launch file, described by ROS's own launch; and the files it points to."""

import importlib.util
from pathlib import Path
import xml.etree.ElementTree as ElementTree

import pytest
import yaml

from flow_ros.nodes.parameters import parameter_files
from flow_ros.nodes.process import profile_variable

ROOT = Path(__file__).resolve().parents[2]


def launch_description(monkeypatch):
    """Return the description that flow.launch.py makes; skip where launch is not installed."""
    if importlib.util.find_spec('launch_ros') is None:
        pytest.skip('launch_ros is not installed: it is not on PyPI, it comes with a ROS '
                    'installation')
    from ament_index_python import packages
    monkeypatch.setattr(packages, 'get_package_share_directory', lambda name: str(ROOT))
    path = ROOT / 'launch' / 'flow.launch.py'
    spec = importlib.util.spec_from_file_location('flow_launch', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.generate_launch_description()


def test_every_argument_has_a_description_and_a_choice_where_there_is_one(monkeypatch):
    arguments = {argument.name: argument
                 for argument in launch_description(monkeypatch).get_launch_arguments()}
    assert {'namespace', 'image', 'camera_info', 'preset', 'params_file', 'network', 'runtime',
            'budget', 'latency_ms', 'iterations', 'scale', 'roi', 'direction', 'rviz',
            'log_level', 'use_sim_time'} <= set(arguments)
    for argument in arguments.values():
        assert argument.description, argument.name
    for name in ('preset', 'runtime', 'direction', 'budget', 'rviz', 'log_level', 'use_sim_time'):
        assert arguments[name].choices, name


def test_the_launch_file_starts_the_node_with_what_it_is_given(monkeypatch):
    description = launch_description(monkeypatch)
    from launch import LaunchContext
    context = LaunchContext()
    given = {'namespace': 'front', 'image': '/camera/image_raw', 'iterations': '3', 'rviz': 'true',
             'direction': 'both', 'preset': 'jetson_orin', 'budget': 'latency',
             'latency_ms': '50', 'scale': '0.5', 'roi': '640x240+0+240'}
    context.launch_configurations.update(given)
    for entity in description.entities[:-1]:
        entity.execute(context)
    flow, rviz = description.entities[-1].execute(context)
    assert (flow.node_package, flow.node_executable) == ('flow_ros', 'flow_node')
    assert (rviz.node_package, rviz.node_executable) == ('rviz2', 'rviz2')
    for node in (flow, rviz):
        node._perform_substitutions(context)
        assert dict(node.expanded_remapping_rules) == {
            'image': '/camera/image_raw', 'camera_info': '/camera/camera_info'}
    assert flow.node_name == '/front/flow'
    parameters = {}
    for file, _ in flow._Node__expanded_parameter_arguments:
        for of_node in yaml.safe_load(Path(file).read_text(encoding='utf-8')).values():
            parameters |= of_node['ros__parameters']
    assert (parameters['iterations'], parameters['direction']) == (3, 'both')
    assert (parameters['budget'], parameters['latency_ms']) == ('latency', 50.0)
    assert (parameters['scale'], parameters['roi']) == (0.5, '640x240+0+240')
    assert parameters['use_sim_time'] is False
    assert parameters['precision'] == 'fast', 'the preset, where nothing else is said'
    context.launch_configurations['iterations'] = 'many'
    with pytest.raises(ValueError, match="iterations is 'many'; expected 0 to 100"):
        description.entities[-1].execute(context)


@pytest.mark.parametrize(('given', 'expected'), [
    ({}, ['flow.yaml']),
    ({'preset': 'cpu'}, ['cpu.yaml']),
    ({'params_file': '/mine.yaml'}, ['/mine.yaml']),
    ({'preset': 'desktop', 'params_file': '/mine.yaml'}, ['desktop.yaml', '/mine.yaml'])])
def test_a_file_of_ones_own_goes_over_a_preset(given, expected):
    config = ROOT / 'config'
    assert parameter_files(config, **given) == [config / name for name in expected]


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="'orin'; expected one of jetson_orin, jetson_thor, "
                                         'desktop, cpu'):
        parameter_files(ROOT / 'config', preset='orin')


def test_rviz_shows_the_topics_of_the_node_relative_to_its_namespace():
    displays = yaml.safe_load((ROOT / 'config' / 'flow.rviz').read_text(encoding='utf-8'))[
        'Visualization Manager']['Displays']
    assert [display['Topic']['Value'] for display in displays] == [
        'image', 'flow/flow_color', 'flow/confidence_mono', 'flow/occlusion']


@pytest.mark.parametrize(('distro', 'name'), [
    ('humble', 'FASTRTPS_DEFAULT_PROFILES_FILE'), ('jazzy', 'FASTRTPS_DEFAULT_PROFILES_FILE'),
    ('kilted', 'FASTDDS_DEFAULT_PROFILES_FILE'), ('lyrical', 'FASTDDS_DEFAULT_PROFILES_FILE'),
    ('', 'FASTDDS_DEFAULT_PROFILES_FILE')])
def test_the_variable_for_the_profile_is_that_of_the_distribution(distro, name):
    assert profile_variable({'ROS_DISTRO': distro}) == name


def test_the_profiles_messages_fit_its_segment():
    """Fast DDS refuses shared memory in silence where maxMessageSize is above segment_size."""
    root = ElementTree.parse(ROOT / 'config' / 'fastdds.xml').getroot()
    space = {'dds': root.tag.partition('}')[0].lstrip('{')}
    segment = int(root.findtext('.//dds:segment_size', namespaces=space))
    message = int(root.findtext('.//dds:maxMessageSize', namespaces=space))
    assert segment >= 64_000_000
    assert message <= segment
