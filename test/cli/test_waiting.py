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

"""What a command shows while it works for long."""

import io
import time

import pytest
from rich.console import Console

from flow_ros.cli.waiting import Waiting


def wait_for(text: io.StringIO, word: str) -> None:
    end = time.monotonic() + 20.0
    while word not in text.getvalue():
        assert time.monotonic() < end, text.getvalue()
        time.sleep(0.01)


def test_without_a_terminal_there_is_a_line_now_and_then() -> None:
    text = io.StringIO()
    with Waiting(Console(file=text, width=80), 'compiling [a]', every_s=0.05) as waiting:
        wait_for(text, 'compiling [a]; 0 s so far\n')
        waiting.text = 'checking'
        wait_for(text, 'checking; 0 s so far\n')
    said = text.getvalue()
    time.sleep(0.2)
    assert text.getvalue() == said


def test_what_is_quick_says_nothing_and_errors_pass() -> None:
    text = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Waiting(Console(file=text), 'compiling'):
        raise KeyboardInterrupt
    assert text.getvalue() == ''


def test_on_a_terminal_it_is_one_line_that_goes_again() -> None:
    text = io.StringIO()
    with Waiting(Console(file=text, force_terminal=True, width=80), 'compiling') as waiting:
        wait_for(text, 'compiling')
        waiting.text = 'checking'
        wait_for(text, 'checking')
    assert 'so far' not in text.getvalue()
