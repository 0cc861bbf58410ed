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

"""What all tests share: an environment in which ROS nodes find each other, and nobody else.

Two options serve machines that are not a developer's: ``--skip-missing`` leaves out what needs
a package that is not installed, and says so; ``--cuda-only`` runs what else is skipped without
a CUDA device.
"""

import ast
from collections.abc import Iterator
import importlib
import os
from pathlib import Path

import numpy as np
import pytest

from flow_ros.environment import complete

complete()  # AMENT_PREFIX_PATH, where ROS comes from pip wheels
os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))

OWN = 'flow_ros'
LEFT_OUT = pytest.StashKey[dict[str, list[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two options."""
    group = parser.getgroup(OWN)
    group.addoption('--skip-missing', action='store_true',
                    help='leave out tests that need a package that is not installed')
    group.addoption('--cuda-only', action='store_true',
                    help='run only tests that are skipped without a CUDA device')


def pytest_configure(config: pytest.Config) -> None:
    """Begin the list of what is left out."""
    config.stash[LEFT_OUT] = {}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files that import what is not installed."""
    if not config.getoption('--skip-missing'):
        return None
    if collection_path.is_dir():  # all tests in it stand on its conftest
        collection_path = collection_path / 'conftest.py'
    if collection_path.suffix != '.py' or not collection_path.is_file():
        return None
    package = missing_package(collection_path)
    if package is None:
        return None
    config.stash[LEFT_OUT].setdefault(package, []).append(
        f'{collection_path.parent.name}/{collection_path.name}')
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that need CUDA, where only these are asked for."""
    if not config.getoption('--cuda-only'):
        return
    kept = [item for item in items if any('no CUDA' in str(mark.kwargs.get('reason', ''))
                                          for mark in item.iter_markers('skipif'))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip a test that finds out late that a package is not installed."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        if package == OWN or not item.config.getoption('--skip-missing'):
            raise
        pytest.skip(f'{package} is not installed')


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter,
                            config: pytest.Config) -> None:
    """Say what was left out and why."""
    for package, files in sorted(config.stash[LEFT_OUT].items()):
        terminalreporter.write_line(f'left out, as {package} is not installed: '
                                    f'{len(files)} files: {", ".join(sorted(files))}')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder of five images, 120x96, that move by 2 px."""
    from flow_ros.flow_io import write_image  # here: it needs OpenCV, not all tests do

    noise = np.random.default_rng(5).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    texture = noise.repeat(8, axis=0).repeat(8, axis=1)
    place = tmp_path / 'drive'
    place.mkdir()
    for index in range(5):
        write_image(place / f'{index}.png', texture[:, 2 * index:2 * index + 120])
    return place


def missing_package(path: Path) -> str | None:
    """Return a package that ``path`` imports first thing and that is not installed, or None."""
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                 else [node.module] if isinstance(node, ast.ImportFrom) and node.module else [])
        for name in names:
            beside = path.parent / f'{name}.py'
            if beside.is_file():
                package = missing_package(beside)
            else:
                try:
                    importlib.import_module(name)
                    continue
                except ModuleNotFoundError as error:
                    package = (error.name or '').partition('.')[0]
            if package not in (None, OWN):
                return package
    return None
