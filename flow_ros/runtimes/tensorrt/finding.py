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

"""Which TensorRT there is, loaded once for the process; nothing else imports it.

TensorRT is imported when it is first needed, so this can be imported without it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
import functools
from importlib.util import find_spec
import logging
import os
import threading
from typing import Any

from flow_ros.runtimes.tensorrt.progress import Meter

PACKAGES: tuple[str, ...] = ('tensorrt', 'tensorrt_rtx')
"""In the order in which they are looked for."""

VARIABLE = 'FLOW_ROS_TENSORRT'

_NAMES = {'tensorrt': 'TensorRT', 'tensorrt_rtx': 'TensorRT-RTX'}
_MOST_LINES = 12
"""Of TensorRT's own words in one error: the first ones name the cause."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Installation:
    """The TensorRT of this process: ``package`` as it is imported, and its version."""

    package: str
    version: str

    @property
    def text(self) -> str:
        """Name and version for messages, such as 'TensorRT 10.3.0'."""
        return f'{_NAMES.get(self.package, self.package)} {self.version}'


def find_tensorrt() -> Installation | None:
    """Return the TensorRT to use, or None; ``missing_tensorrt`` says why there is none.

    TensorRT comes before TensorRT-RTX. The environment variable FLOW_ROS_TENSORRT chooses:
    'tensorrt', 'tensorrt_rtx', or 'none' to do without. It is imported here, because a package
    may be found whose libraries are not there. Raises ValueError for other values of it.
    """
    library, _ = search()
    return None if library is None else library.installation


def missing_tensorrt() -> str:
    """Return why ``find_tensorrt`` finds none and what to do, '' where it finds one."""
    library, why = search()
    return '' if library is not None else why


def refuses_gpu(capability: tuple[int, int]) -> str:
    """Return why the TensorRT found does not run on a GPU of this compute capability, or ''.

    TensorRT-RTX lists what it can be built for. TensorRT has no list: '' is then no promise.
    """
    library, why = search()
    if library is None:
        return why
    known = getattr(library.api, 'ComputeCapability', None)
    if known is None or library.installation.package != 'tensorrt_rtx':
        return ''
    numbers = sorted(int(name[2:]) for name in known.__members__ if name[2:].isdigit())
    number = 10 * capability[0] + capability[1]
    if not numbers or number in numbers or number > numbers[-1]:
        return ''
    return (f'{library.installation.text} does not run on GPUs of compute capability '
            f'{capability[0]}.{capability[1]}, only on '
            f'{", ".join(f"{known // 10}.{known % 10}" for known in numbers)}')


class Messages:
    """What TensorRT's one logger of this process is told, kept for whoever asks.

    A build takes what its own thread says, and what threads say that nobody listens to: the
    builder has threads of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lists: dict[int, list[str]] = {}
        self._build: list[str] | None = None

    @contextmanager
    def collected(self, whole_build: bool = False) -> Iterator[list[str]]:
        """Yield the list that grows by each warning and error until the end."""
        lines: list[str] = []
        thread = threading.get_ident()
        with self._lock:
            before = self._lists.get(thread)
            self._lists[thread] = lines
            if whole_build:
                self._build = lines
        try:
            yield lines
        finally:
            with self._lock:
                if before is None:
                    del self._lists[thread]
                else:
                    self._lists[thread] = before
                if whole_build:
                    self._build = None

    def add(self, level: int, text: str) -> None:
        """Take a message of logging's ``level``."""
        if level >= logging.WARNING:
            with self._lock:
                lines = self._lists.get(threading.get_ident(), self._build)
                if lines is not None:
                    lines.append(text)
            if lines is None:
                _log.log(level, 'TensorRT: %s', text)
        _log.debug('TensorRT: %s', text)


@dataclass(frozen=True)
class Library:
    """The imported package and what this process has once of it."""

    api: Any
    installation: Installation
    logger: Any
    messages: Messages
    monitor: Callable[[Meter], Any]
    one_build: threading.Lock = field(default_factory=threading.Lock)


def make_library(api: Any, package: str) -> Library:
    """Return the adapter of ``api``, the module of the package."""
    messages = Messages()
    severity = api.ILogger.Severity
    levels = {severity.INTERNAL_ERROR: logging.ERROR, severity.ERROR: logging.ERROR,
              severity.WARNING: logging.WARNING, severity.INFO: logging.DEBUG}

    class Logger(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)  # not super(): pybind wants its own

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity)
            if level is not None:  # VERBOSE: thousands of lines
                messages.add(level, msg)

    class Monitor(api.IProgressMonitor):
        def __init__(self, meter: Meter) -> None:
            api.IProgressMonitor.__init__(self)
            self.meter = meter

        def phase_start(self, phase_name: str, parent_phase: str | None,
                        num_steps: int) -> None:
            self.meter.phase_start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self.meter.step_complete(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            self.meter.phase_finish(phase_name)

    return Library(api=api, logger=Logger(), messages=messages, monitor=Monitor,
                    installation=Installation(package, str(api.__version__)))


_ONE_LOAD = threading.Lock()


@functools.cache  # TensorRT takes one logger per process, so there is one of all this
def _load(package: str) -> Library:
    """Import ``package``; raises ImportError or OSError where its libraries are missing."""
    if package == 'tensorrt':
        import tensorrt as api
    else:
        import tensorrt_rtx as api
    return make_library(api, package)


def search() -> tuple[Library | None, str]:
    """Return the library to use, or None and why."""
    choice = os.environ.get(VARIABLE, '')
    if choice == 'none':
        return None, f'TensorRT is switched off ({VARIABLE}=none)'
    if choice and choice not in PACKAGES:
        raise ValueError(f'{VARIABLE} must be one of {", ".join(PACKAGES)}, none, or unset; '
                         f'seen {choice!r}')
    reasons = []
    for package in (choice,) if choice else PACKAGES:
        if find_spec(package) is None:
            continue
        try:
            with _ONE_LOAD:
                return _load(package), ''
        except (ImportError, OSError, AttributeError, RuntimeError, TypeError) as error:
            # A package without its libraries, for another numpy, or without what 10.3 has.
            reasons.append(f'{_NAMES[package]} is installed but cannot be used ({error})')
    if reasons:
        return None, '; '.join(reasons)
    wanted = _NAMES[choice] if choice else 'TensorRT'
    return None, (f'{wanted} is not installed: on a Jetson it comes with JetPack (make the '
                  f'virtual environment with --system-site-packages); on a desktop GPU: '
                  f'pip install tensorrt, or tensorrt-rtx')


def make(kind: Callable[..., Any], *arguments: Any) -> Any:
    """Return a new object of TensorRT's, or None where it could not make one.

    Its bindings raise TypeError then: without a driver, say; the logger was told why.
    """
    try:
        return kind(*arguments)
    except TypeError as error:
        _log.debug('%s was not made: %s', kind, error)
        return None


def quoted(messages: Sequence[str]) -> str:
    """Return TensorRT's own words as lines to put under an error."""
    lines = list(dict.fromkeys(messages))
    if not lines:
        return ' it gave no reason'
    more = len(lines) - _MOST_LINES
    return ''.join(f'\n  {line}' for line in lines[:_MOST_LINES]) + (
        f'\n  ... and {more} more lines' if more > 0 else '')
