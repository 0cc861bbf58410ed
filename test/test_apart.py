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

"""Work in a process of its own: what it tells, and the ways it can end."""

import os
from pathlib import Path
import signal
import sys
import textwrap
import time

import pytest

from flow_ros.apart import ChildDied, run_apart

WORKERS = """
    import ctypes, multiprocessing, os, signal, subprocess, sys, time
    from flow_ros.apart import serve_job

    def work(job, tell):
        print('a library prints')
        os.write(1, b'so does C++\\n')
        tell({'pid': os.getpid(), 'job': job})
        if job['way'] == 'dies':
            print('out of luck', file=sys.stderr)
            os.kill(os.getpid(), signal.SIGSEGV)
        if job['way'] == 'raises':
            raise RuntimeError('out of luck')
        if job['way'] == 'hangs':
            time.sleep(60)
        if job['way'] == 'deaf':  # in a library that keeps Python's lock
            ctypes.PyDLL(None).sleep(60)
        if job['way'] == 'forks':  # as libraries do; a fork closes its standard input
            forked = multiprocessing.get_context('fork').Process(target=print, args=('forked',))
            forked.start()
            forked.join(20)
            tell({'exit': forked.exitcode})
        if job['way'] == 'starts':  # something that does not end by itself
            tell({'started': subprocess.Popen([sys.executable, '-c', 'while True: pass']).pid})
            time.sleep(60)
        if job['way'] == 'cut':
            os.write(3, b'{"text": "half a mess')
            os.kill(os.getpid(), signal.SIGKILL)

    def main():
        serve_job(work)
"""


@pytest.fixture
def workers(tmp_path, monkeypatch) -> str:
    (tmp_path / 'some_workers.py').write_text(textwrap.dedent(WORKERS))
    monkeypatch.syspath_prepend(tmp_path)
    return 'some_workers'


def run(module: str, way: str, go_on=lambda: True) -> list[dict]:
    told: list[dict] = []
    run_apart(module, {'way': way, 'text': 'ä\n'}, go_on=go_on,
              on_message=lambda message: not told.append(message))
    return told


def test_messages_come_through_whatever_is_printed(workers) -> None:
    message, = run(workers, 'works')
    assert message['job'] == {'way': 'works', 'text': 'ä\n'}
    assert message['pid'] != os.getpid()


@pytest.mark.parametrize(('way', 'how'), [
    ('dies', 'ended by SIGSEGV: out of luck'),
    ('raises', 'status 1: RuntimeError: out of luck'),
    ('cut', 'ended by SIGKILL')])
def test_the_end_of_a_process_is_told(workers, monkeypatch, way, how) -> None:
    monkeypatch.delenv('PYTHONFAULTHANDLER', raising=False)  # its report would come last
    with pytest.raises(ChildDied, match=how):
        run(workers, way)


def test_a_module_that_is_not_there(workers) -> None:
    with pytest.raises(ChildDied, match="status 1: ModuleNotFoundError: No module named 'none'"):
        run('none', 'works')


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_is_ended_when_it_is_not_wanted_any_more(workers) -> None:
    pids: list[int] = []

    def first(message: dict) -> bool:
        pids.append(message['pid'])
        return True

    run_apart(workers, {'way': 'hangs'}, on_message=first, go_on=lambda: not pids)
    assert pids and not alive(pids[0])


@pytest.mark.parametrize('way', [
    'hangs',
    pytest.param('deaf', marks=pytest.mark.skipif(
        sys.platform != 'linux', reason='only Linux ends a process that cannot hear of it'))])
def test_it_ends_with_the_one_that_started_it(workers, tmp_path, way) -> None:
    """Also if that one is killed, and cannot say so."""
    child = os.fork()
    if child == 0:
        def killed(message: dict) -> None:
            (tmp_path / 'pid').write_text(str(message['pid']))
            os.kill(os.getpid(), 9)

        run_apart(workers, {'way': way}, on_message=killed, go_on=lambda: True)
    os.waitpid(child, 0)
    pid = int((tmp_path / 'pid').read_text())
    for _ in range(200):
        if not alive(pid):
            return
        time.sleep(0.05)
    pytest.fail(f'process {pid} is still there')


def test_what_forks_in_the_other_process_does_not_hang(workers):
    """The thread that waits for the end of this process holds no lock that a fork would need."""
    assert run(workers, 'forks')[-1] == {'exit': 0}


def test_what_the_other_process_has_started_ends_with_it(workers) -> None:
    told: list[dict] = []
    run_apart(workers, {'way': 'starts'}, go_on=lambda: True,
              on_message=lambda message: not told.append(message) and 'started' not in message)
    pid = told[-1]['started']
    for _ in range(100):
        if not runs(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError('it goes on')


def runs(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
    except OSError:
        return False
