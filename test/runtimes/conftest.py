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

"""What the tests of runtimes share."""

from collections.abc import Iterator
from pathlib import Path
import subprocess

from building_tools import Said, Tools
from exported import Exports
import pytest

from flow_ros.runtimes.cache import EngineCache


@pytest.fixture(scope='session')
def exports():
    """Give the exports of all networks, made once."""
    return Exports()


@pytest.fixture
def tools() -> Tools:
    return Tools()


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def cache(tmp_path: Path, said: Said) -> EngineCache:
    return EngineCache(tmp_path / 'cache', said)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 kB."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=32k', 'tmpfs', str(folder)],
                           capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f'cannot mount a small disk here: {mount.stderr.strip()}')
    yield folder
    subprocess.run(['umount', str(folder)], check=True)
