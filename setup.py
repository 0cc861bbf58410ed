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

"""Install flow_ros, from pip or from colcon (ament_python)."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = 'flow_ros'
ROOT = Path(__file__).parent


def share(folder: str) -> list[tuple[str, list[str]]]:
    """Return the data_files entries that install ``folder`` under share/flow_ros."""
    entries: dict[str, list[str]] = {}
    for path in sorted((ROOT / folder).rglob('*')):
        if path.is_file() and '__pycache__' not in path.parts:
            relative = path.relative_to(ROOT)
            entries.setdefault(f'share/{PACKAGE}/{relative.parent.as_posix()}', []).append(
                relative.as_posix())
    return list(entries.items())


setup(
    name=PACKAGE,
    version='0.1.0',
    packages=find_packages(include=[PACKAGE, f'{PACKAGE}.*']),
    package_data={PACKAGE: ['py.typed', 'runtimes/reference_pair.npz']},
    data_files=[
        ('share/ament_index/resource_index/packages', [f'resource/{PACKAGE}']),
        (f'share/{PACKAGE}', ['package.xml']),
        *share('launch'),
        *share('config'),
        *share('models'),
    ],
    python_requires='>=3.10',
    # The versions are pinned in requirements.txt; a ROS installation brings its own NumPy.
    install_requires=['setuptools'],
    zip_safe=False,
    maintainer='flow_ros maintainers',
    maintainer_email='flow_ros@example.org',
    description='Dense optical flow with confidence and occlusion from a camera topic, in real '
                'time, within a stated budget.',
    license='Apache-2.0',
    entry_points={
        'console_scripts': [
            'flow_ros = flow_ros.cli.main:main',
            'flow_node = flow_ros.nodes.flow_node:main',
            'source = flow_ros.nodes.source_node:main',
            'consumer = flow_ros.nodes.consumer_node:main',
            'preview = flow_ros.nodes.preview_node:main',
        ],
    },
)
