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

"""The package as a package: versions, metadata, headers, imports that run one way."""

import ast
from collections.abc import Iterator
import configparser
import importlib
from pathlib import Path
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from zipfile import ZipFile

import pytest

import flow_ros

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / 'flow_ros'
HEADER = (PACKAGE / '__init__.py').read_text(encoding='utf-8').split('"""')[0].strip()

# What each part may import of flow_ros beside itself; parts not named here are single modules.
LEAVES = {'flow_io', 'visualization', 'environment', 'malloc', 'sources'}
NODE_PATH = {'ops', 'networks', 'runtimes', 'streaming'}
ALLOWED = {
    'ops': set(),
    'networks': {'ops'},
    'runtimes': {'ops', 'networks', 'apart', 'malloc'},
    'streaming': {'ops', 'networks', 'runtimes'},
    'synthetic': {'ops'},
    'training': NODE_PATH | {'synthetic', 'evaluation', 'flow_io', 'visualization'},
    'evaluation': NODE_PATH | {'synthetic', 'flow_io', 'visualization', 'sources', 'apart',
                               'malloc'},
    'nodes': NODE_PATH | LEAVES,
    'cli': NODE_PATH | LEAVES | {'nodes', 'synthetic', 'training', 'evaluation'},
    'flow_io': set(),
    'visualization': set(),
    'environment': set(),
    'malloc': set(),
    'apart': set(),
    'sources': {'synthetic'},
}
ROS = {'rclpy', 'sensor_msgs', 'std_msgs', 'diagnostic_msgs', 'rcl_interfaces',
       'builtin_interfaces', 'geometry_msgs', 'cv_bridge', 'launch', 'launch_ros'}


def python_files() -> list[Path]:
    """Return the Python files of the repository, without what is made or installed."""
    folders = ('flow_ros', 'test', 'launch', 'bench')
    return [ROOT / 'setup.py', *(path for folder in folders
                                 for path in sorted((ROOT / folder).rglob('*.py')))]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield (absolute module name, at module level?) of each import, lazy ones included."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    top = {id(node) for node in tree.body}
    package = path.relative_to(ROOT).with_suffix('').parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[:len(package) - node.level + 1]) if node.level else []
            name = '.'.join([*base, *([node.module] if node.module else [])])
            yield name, id(node) in top
            yield from ((f'{name}.{alias.name}', id(node) in top) for alias in node.names)


def part_of(path: Path) -> str:
    """Return which part of the package a file belongs to."""
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    return parts[0]


def package_files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob('*.py')) if path != PACKAGE / '__init__.py']


def test_the_walk_sees_imports() -> None:
    # Should the walk go blind, the tests below would pass for nothing.
    seen = set(imports(PACKAGE / 'nodes' / 'flow_node.py'))
    assert ('rclpy', True) in seen
    assert any(name.startswith('flow_ros.streaming') for name, _ in seen)
    assert ('rosbags.highlevel', False) in set(imports(PACKAGE / 'sources.py'))


def test_imports_run_one_way() -> None:
    wrong = []
    for path in package_files():
        part = part_of(path)
        assert part in ALLOWED, f'{path}: a new part; say in ALLOWED what it may import'
        for name, _ in imports(path):
            words = name.split('.')
            if words[0] == 'flow_ros' and len(words) > 1 and words[1] in ALLOWED \
                    and words[1] != part and words[1] not in ALLOWED[part]:
                wrong.append(f'{path.relative_to(ROOT)} imports {name}')
    assert not wrong, '\n'.join(wrong)


def test_only_nodes_import_ros() -> None:
    wrong = [f'{path.relative_to(ROOT)} imports {name}' for path in package_files()
             for name, _ in imports(path)
             if part_of(path) != 'nodes' and name.split('.')[0] in ROS]
    assert not wrong, '\n'.join(wrong)


def test_only_its_runtime_imports_tensorrt() -> None:
    wrong = [path for path in package_files() for name, _ in imports(path)
             if name.split('.')[0] in {'tensorrt', 'tensorrt_rtx'}
             and path != PACKAGE / 'runtimes' / 'tensorrt' / 'finding.py']
    assert not wrong


def test_optional_packages_are_imported_when_asked_for() -> None:
    optional = {'openvino', 'tensorrt', 'tensorrt_rtx', 'onnx', 'onnxruntime', 'onnxscript',
                'rosbags', 'tkinter', 'cv_bridge', 'ament_index_python', 'lightning_fabric',
                'tensorboard', 'h5py'}
    # Imported lazily: the one by the factory, the other by the one alone.
    own = {'openvino': ('openvino.py', 'openvino_convolutions.py')}
    wrong = [f'{path.relative_to(ROOT)} imports {name} at its start' for path in package_files()
             for name, at_start in imports(path)
             if at_start and name.split('.')[0] in optional
             and path.name not in own.get(name.split('.')[0], ())]
    wrong += [f'{path.relative_to(ROOT)} imports {name} at its start' for path in package_files()
              for name, at_start in imports(path)
              if at_start and name.endswith('.openvino_convolutions')
              and path.name != 'openvino.py']
    assert not wrong, '\n'.join(wrong)


def test_the_leaves_stand_on_numpy_and_opencv_alone() -> None:
    for leaf in ('flow_io', 'visualization'):
        foreign = {name.split('.')[0] for name, _ in imports(PACKAGE / f'{leaf}.py')
                   } - set(sys.stdlib_module_names) - {'numpy', 'cv2', 'flow_ros'}
        assert not foreign, f'{leaf} imports {foreign}'


def test_starting_the_node_imports_no_training() -> None:
    code = ('import sys, flow_ros.nodes.flow_node; '
            'print([name for name in sys.modules if name.startswith(("flow_ros.training", '
            '"flow_ros.evaluation", "flow_ros.synthetic", "rosbags", "onnx", "lightning"))])')
    seen = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          cwd=ROOT, timeout=120, check=True)
    assert seen.stdout.strip() == '[]'


def test_versions_agree() -> None:
    version = ElementTree.parse(ROOT / 'package.xml').findtext('version')
    setup = re.search(r"^    version='(.+)',$", (ROOT / 'setup.py').read_text(), re.MULTILINE)
    changelog = re.search(r'^(\d+\.\d+\.\d+) \(\d{4}-\d{2}-\d{2}\)\n-{18}',
                          (ROOT / 'CHANGELOG.rst').read_text(), re.MULTILINE)
    assert setup is not None
    assert changelog is not None
    assert version == setup[1] == changelog[1] == flow_ros.__version__


def test_package_xml_is_what_ament_python_needs() -> None:
    package = ElementTree.parse(ROOT / 'package.xml').getroot()
    assert package.get('format') == '3'
    assert package.findtext('name') == 'flow_ros'
    assert package.findtext('export/build_type') == 'ament_python'
    assert package.findtext('license') == 'Apache-2.0'
    maintainer = package.find('maintainer')
    assert maintainer is not None
    assert maintainer.text == 'flow_ros maintainers'
    # colcon silently drops the ament hooks if this is no address
    assert re.fullmatch(r'[\w.+-]+@[\w-]+(\.[\w-]+)+', str(maintainer.get('email')))
    assert not package.findall('depend')
    needed = {dependency.text for dependency in package.findall('exec_depend')}
    used = {name.split('.')[0] for path in package_files() for name, _ in imports(path)} & ROS
    assert used - {'cv_bridge'} <= needed  # cv_bridge: used where it is installed


def test_scripts_go_where_ros_looks() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    assert config['install']['install_scripts'] == '$base/lib/flow_ros'
    assert config['develop']['script_dir'] == '$base/lib/flow_ros'


def console_scripts() -> list[tuple[str, str, str]]:
    found = re.findall(r"'(\w+) = ([\w.]+):(\w+)'", (ROOT / 'setup.py').read_text())
    assert found
    return found


@pytest.mark.parametrize(('script', 'module', 'function'), console_scripts())
def test_console_scripts_exist(script: str, module: str, function: str) -> None:
    assert callable(getattr(importlib.import_module(module), function)), script


def test_a_wheel_holds_what_ros_looks_for(tmp_path: Path) -> None:
    source = tmp_path / 'source'
    names = ['flow_ros', 'launch', 'config', 'models', 'resource', 'setup.py', 'setup.cfg',
             'package.xml', 'pyproject.toml', 'README.md', 'LICENSE']
    source.mkdir()
    for name in names:  # a copy, because building leaves folders behind
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns('__pycache__'))
        elif path.is_file():
            shutil.copy(path, source / name)
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps',
                    '--no-build-isolation', '--wheel-dir', str(tmp_path), str(source)],
                   check=True, timeout=120, capture_output=True)
    inside = set(ZipFile(next(tmp_path.glob('flow_ros-*.whl'))).namelist())
    data = {name.partition('/data/')[2] for name in inside if '.data/data/' in name}
    assert {'share/ament_index/resource_index/packages/flow_ros',
            'share/flow_ros/package.xml', 'share/flow_ros/config/flow.yaml',
            'share/flow_ros/config/fastdds.xml',
            'share/flow_ros/launch/flow.launch.py'} <= data
    for folder in ('launch', 'config', 'models'):
        here = {path.relative_to(source).as_posix() for path in (source / folder).rglob('*')
                if path.is_file()}
        assert {f'share/flow_ros/{name}' for name in here} <= data
    assert 'flow_ros/nodes/flow_node.py' in inside
    assert 'flow_ros/py.typed' in inside


def test_every_python_file_has_the_header() -> None:
    assert 'Apache License, Version 2.0' in HEADER
    without = [str(path.relative_to(ROOT)) for path in python_files()
               if not path.read_text(encoding='utf-8').startswith(HEADER)]
    assert not without, f'these lack the header of flow_ros/__init__.py: {without}'


def test_test_files_have_unique_names() -> None:
    # pytest imports them by their base name
    names = [path.name for path in (ROOT / 'test').rglob('*.py') if path.name != 'conftest.py']
    assert len(names) == len(set(names)), sorted(
        name for name in set(names) if names.count(name) > 1)


def test_requirements_are_pinned_exactly() -> None:
    files = [*sorted(ROOT.glob('requirements*.txt')), ROOT / 'constraints.txt']
    lines = [line.split('#')[0].split(';')[0].strip()
             for file in files for line in file.read_text(encoding='utf-8').splitlines()]
    pins = [line for line in lines if line and not line.startswith('-c ')]
    assert len(pins) > 50
    assert not [pin for pin in pins if not re.fullmatch(r'[\w.\[\]-]+==[\w.]+', pin)]
    assert 'torch==2.13.0' in pins
