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

"""Runs work in a process of its own, which tells by lines of JSON how it goes.

For what may crash, take all memory, or hold Python's lock for seconds while this process has
frames to serve. The other process ends with this one, however this one ends; what it has started
itself ends with it, where it is ended from here.
"""

from collections.abc import Callable, Mapping
import ctypes
import json
import os
from pathlib import Path
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any, IO

import flow_ros

_POLL_S = 0.2
_END_S = 5.0
_PR_SET_PDEATHSIG = 1

Message = dict[str, Any]
Tell = Callable[[Message], None]


class ChildDied(RuntimeError):  # noqa: N818 -- what happened, as it reads
    """The other process ended before its work did; the text says how."""


def run_apart(module: str, job: Mapping[str, Any], *, on_message: Callable[[Message], bool],
              go_on: Callable[[], bool]) -> None:
    """Run ``module`` (its ``work`` with ``serve_job``) in a new process, and wait for its end.

    ``on_message`` is given what it tells, in this thread; ``go_on`` is asked several times a
    second. Where one says False, or anything is raised here, the process is ended at once.
    Raises ChildDied where it ends in any other way than by the end of its work.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, '-c', f'from {module} import main; main()'], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors, text=True, encoding='utf-8',
            # What is in the caller's working directory is nothing to import from. And Ctrl-C is
            # for the caller, which then ends the process.
            cwd=Path(flow_ros.__file__).parents[1], start_new_session=True,
            env={**os.environ, 'PYTHONPATH': os.pathsep.join(path for path in sys.path if path)})
        try:
            assert process.stdin is not None and process.stdout is not None
            told: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_read, args=(process.stdout, told), daemon=True).start()
            try:
                process.stdin.write(json.dumps(job) + '\n')
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it has died already: said below
            if _listen(told, on_message, go_on):
                return
            try:
                raise ChildDied(_how(process.wait(_END_S), errors))
            except subprocess.TimeoutExpired as error:
                raise ChildDied('it has closed its output') from error
        finally:
            _end_group(process)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)


def serve_job(work: Callable[[Message, Tell], None]) -> None:
    """Do the one job of this process, for the ``run_apart`` that started it."""
    _be_ended_with_parent()
    # Whatever libraries print must not come between the messages.
    channel = os.fdopen(os.dup(1), 'w', encoding='utf-8')
    os.dup2(2, 1)
    lock = threading.Lock()

    def tell(message: Message) -> None:
        with lock:
            channel.write(json.dumps(message) + '\n')
            channel.flush()

    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(job, tell)
    tell({'done': True})


def _be_ended_with_parent() -> None:
    """Have Linux end this process with the thread that started it, and so with its process.

    A library that keeps Python's lock for minutes keeps ``_end_with_parent`` from doing it.
    """
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError, TypeError):
        pass  # not Linux


def _end_with_parent() -> None:
    """Wait for the end of the other side of the pipe; nothing here needs an orderly end.

    Not with ``sys.stdin``, whose lock this thread would hold all the time: a process that a
    library forks off here (as the telemetry of OpenVINO does) closes its copy of it first, and
    would wait for that lock for ever.
    """
    while os.read(0, 4096):
        pass
    os._exit(1)


def _read(pipe: IO[str], told: 'queue.Queue[str | None]') -> None:
    try:
        for line in pipe:
            told.put(line)
    except ValueError:
        pass  # closed by the other thread
    told.put(None)


def _listen(told: 'queue.Queue[str | None]', on_message: Callable[[Message], bool],
            go_on: Callable[[], bool]) -> bool:
    """Pass messages on until the end that was wanted (True), or nothing more comes (False)."""
    while True:
        try:
            line = told.get(timeout=_POLL_S)
        except queue.Empty:
            if not go_on():
                return True
            continue
        if line is None:
            return False
        if not line.endswith('\n'):
            return False  # it was ended in the middle of a message
        message = json.loads(line)
        if message.get('done') or not on_message(message):
            return True


def _how(status: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors='replace').strip().splitlines()
    last = f': {lines[-1]}' if lines else ''
    if status >= 0:
        return f'it ended with status {status}{last}'
    name = signal.Signals(-status).name
    memory = ' (the system ends processes so when memory is short)' if name == 'SIGKILL' else ''
    return f'it was ended by {name}{memory}{last}'


def _end_group(process: 'subprocess.Popen[str]') -> None:
    """End the process and what it has started itself, which is in the session made for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all have ended
    except PermissionError:
        process.kill()  # macOS says so of a group that has ended in part


def _close(pipe: IO[str]) -> None:
    try:
        pipe.close()
    except OSError:
        pass  # what was left to write has no reader
