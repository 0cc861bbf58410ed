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

"""Runs each measurement in a process of its own, so that none finds another's memory or threads.

``KINDS`` are the measurements: a module and a function of it, which takes the arguments as
keywords, and ``tell``, which it gives a line about what it does.
"""

from collections.abc import Callable, Mapping
import importlib
import time
from typing import Any

from flow_ros.apart import ChildDied, run_apart, serve_job
from flow_ros.malloc import tune_malloc

_HERE = 'flow_ros.evaluation.benchmarks'
KINDS: Mapping[str, tuple[str, str]] = {
    'timing': (f'{_HERE}.timing', 'measure_apart'),
    'accuracy': (f'{_HERE}.accuracy', 'measure_network'),
    'dis': (f'{_HERE}.accuracy', 'measure_dis'),
    'dis_times': (f'{_HERE}.accuracy', 'time_dis'),
    'pairs': (f'{_HERE}.accuracy', 'make_pairs'),
    'memory': (f'{_HERE}.suite', 'measure_memory'),
    'budget': (f'{_HERE}.suite', 'measure_budget'),
}


class Refused(Exception):  # noqa: N818 -- a verdict, as it reads
    """What was asked for cannot be measured here; the text says why and what to do."""


class NotMeasured(Exception):  # noqa: N818 -- a verdict, as it reads
    """A measurement failed."""


class NotDone(NotMeasured):
    """A measurement was not done in its time."""


def run_child(kind: str, arguments: Mapping[str, Any], *, limit_s: float | None = None,
              on_progress: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
    """Do one measurement in a new process and return what it found.

    Raises Refused, NotMeasured where it fails, NotDone where it takes longer than ``limit_s``;
    whatever is raised here (Ctrl-C) ends the process.
    """
    begin = time.monotonic()
    answers: list[dict[str, Any]] = []
    late = False

    def on_message(message: dict[str, Any]) -> bool:
        if 'told' in message:
            on_progress(message['told'])
            return True
        answers.append(message)
        return False

    def go_on() -> bool:
        nonlocal late
        late = limit_s is not None and time.monotonic() - begin > limit_s
        return not late

    try:
        run_apart(__name__, {'kind': kind, 'arguments': dict(arguments)}, on_message=on_message,
                  go_on=go_on)
    except ChildDied as error:
        raise NotMeasured(str(error)) from error
    if late:
        raise NotDone(f'not done after {limit_s:.0f} s')
    if not answers:
        raise NotMeasured('it ended and said nothing')
    answer = answers[0]
    if 'refused' in answer:
        raise Refused(answer['refused'])
    if 'failed' in answer:
        raise NotMeasured(answer['failed'])
    return dict(answer['result'])


def main() -> None:
    """Do the one measurement of this process."""
    serve_job(_work)


def _work(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    module, function = KINDS[job['kind']]
    if job['kind'] != 'memory':  # as in the node: a good part of torch's time is page faults
        tune_malloc()
    try:
        measure = getattr(importlib.import_module(module), function)
        tell({'result': measure(**job['arguments'], tell=lambda text: tell({'told': str(text)}))})
    except Refused as error:
        tell({'refused': str(error)})
    except Exception as error:  # whatever it is, it is a line of the report
        lines = str(error).strip().splitlines() or ['']
        tell({'failed': f'{type(error).__name__}: {lines[0]}'[:300]})
