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

"""The command flow_ros: its verbs are listed without being imported."""

import subprocess
import sys

import pytest

from flow_ros import __version__
from flow_ros.cli.main import available_verbs, main


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          timeout=60, check=False)


def test_help_lists_all_verbs_and_imports_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(['--help'])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert 'evaluate' in available_verbs()
    for verb, what in available_verbs().items():
        assert verb in text and what.split(':')[0].split(',')[0] in ' '.join(text.split())
    done = python('import sys\nfrom flow_ros.cli.main import main\n'
                  'try:\n    main(["--help"])\nexcept SystemExit:\n    pass\n'
                  'heavy = {"torch", "cv2", "numpy", "rclpy", "flow_ros.cli.evaluate"}\n'
                  'print("imported:", sorted(heavy & set(sys.modules)))')
    assert 'imported: []' in done.stdout, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(['--version'])
    assert capsys.readouterr().out.strip() == f'flow_ros {__version__}'


def test_no_verb_and_no_such_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert 'evaluate' in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(['fly'])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "'fly'" in error and 'evaluate' in error


def test_a_missing_package_is_a_message() -> None:
    done = python('import sys\nsys.modules["rich"] = None\n'
                  'from flow_ros.cli.main import main\n'
                  'sys.exit(main(["evaluate", "--data", "."]))')
    assert done.returncode == 2
    assert "error: the Python package 'rich' is missing" in done.stderr
    assert 'make setup' in done.stderr and 'Traceback' not in done.stderr
