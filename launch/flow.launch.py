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

"""Start the flow node, and RViz where it is asked for."""

from pathlib import Path, PurePosixPath

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.action import Action
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from flow_ros.nodes.parameters import find, parameter_files, PRESETS, value_of
from flow_ros.nodes.process import profile_variable

SHARE = Path(get_package_share_directory('flow_ros'))

FROM_FILE = '; empty: as in the parameters file or preset'


def choice(name: str) -> DeclareLaunchArgument:
    """Return the argument for the parameter ``name``, with its own choices, if it has any."""
    parameter = find(name)
    text = parameter.description.rstrip('.').replace('`', '')
    choices = ['', *parameter.choices] if parameter.choices else None
    return DeclareLaunchArgument(name, default_value='', choices=choices,
                                 description=text + FROM_FILE)


def switch(name: str, description: str) -> DeclareLaunchArgument:
    """Return an argument that is true or false, false by default."""
    return DeclareLaunchArgument(name, default_value='false', choices=['true', 'false'],
                                 description=description)


def arguments() -> list[DeclareLaunchArgument]:
    """Return the arguments of this launch file."""
    return [
        DeclareLaunchArgument('namespace', default_value='',
                              description='Namespace of the node and its topics'),
        DeclareLaunchArgument('image', default_value='image',
                              description='Topic of the images (sensor_msgs/Image)'),
        DeclareLaunchArgument('camera_info', default_value='',
                              description='Topic of the camera info; empty: camera_info beside '
                                          'the images, as camera drivers have it'),
        DeclareLaunchArgument('preset', default_value='', choices=['', *PRESETS],
                              description='Parameters for a kind of machine: config/NAME.yaml'),
        DeclareLaunchArgument('params_file', default_value='',
                              description='Parameters file, over the preset; empty: without a '
                                          'preset config/flow.yaml'),
        choice('network'),
        choice('runtime'),
        choice('direction'),
        choice('budget'),
        choice('latency_ms'),
        choice('iterations'),
        choice('scale'),
        choice('roi'),
        DeclareLaunchArgument('weights', default_value='',
                              description='Path of a file of weights' + FROM_FILE),
        switch('rviz', 'Start RViz with config/flow.rviz too'),
        switch('fastdds_profile', 'Give the node config/fastdds.xml, shared memory of 64 MB; '
                                  'give it to the camera driver too'),
        switch('use_sim_time', 'Take the time from /clock'),
        DeclareLaunchArgument('log_level', default_value='info',
                              choices=['debug', 'info', 'warn', 'error', 'fatal'],
                              description='Log level of the node'),
    ]


def nodes(context: LaunchContext) -> list[Action]:
    """Return the nodes to start, with the arguments as given."""
    given = {name: str(LaunchConfiguration(name).perform(context))
             for name in (argument.name for argument in arguments())}
    files = parameter_files(SHARE / 'config', preset=given['preset'],
                            params_file=given['params_file'])
    overrides: dict[str, bool | int | float | str] = {
        'use_sim_time': given['use_sim_time'] == 'true'}
    overrides |= {name: value_of(name, given[name])
                  for name in ('network', 'runtime', 'direction', 'weights', 'budget',
                               'latency_ms', 'iterations', 'scale', 'roi') if given[name]}
    camera_info = (given['camera_info']
                   or str(PurePosixPath(given['image']).with_name('camera_info')))
    remappings = [('image', given['image']), ('camera_info', camera_info)]
    environment = ({profile_variable(): str(SHARE / 'config' / 'fastdds.xml')}
                   if given['fastdds_profile'] == 'true' else {})
    started: list[Action] = [
        Node(package='flow_ros', executable='flow_node', name='flow',
             namespace=given['namespace'], parameters=[*map(str, files), overrides],
             remappings=remappings, additional_env=environment, output='screen',
             emulate_tty=True,
             ros_arguments=['--log-level', given['log_level']])]
    if given['rviz'] == 'true':
        started.append(
            Node(package='rviz2', executable='rviz2', name='flow_rviz',
                 namespace=given['namespace'], remappings=remappings,
                 parameters=[{'use_sim_time': overrides['use_sim_time']}],
                 arguments=['--display-config', str(SHARE / 'config' / 'flow.rviz')]))
    return started


def generate_launch_description() -> LaunchDescription:
    """Return the arguments and what they start."""
    return LaunchDescription([*arguments(), OpaqueFunction(function=nodes)])
