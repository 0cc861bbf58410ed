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

"""How many threads torch takes beside a runtime that has threads of its own."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
import threading

import torch

from flow_ros.runtimes.base import Runtime


def torch_beside(runtime: Runtime) -> AbstractContextManager[None]:
    """Let torch work in one thread of this caller while ``runtime`` is OpenVINO.

    Torch's other threads wait for their next work with their cores at full load, for
    milliseconds: cores that OpenVINO's threads have to share with them. On two cores that is 6
    to 8 % of DIP-RT's frame at 640x480, more than torch's threads save in the little it does
    between the engines.
    """
    return torch_alone() if runtime.name == 'openvino' else nullcontext()


@contextmanager
def torch_alone() -> Iterator[None]:
    """Let torch work in one thread of this caller.

    Other threads of the process keep torch as they have it, or begin with it as they would have.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        # Torch counts for each thread, but a thread that begins to use it takes the number that
        # any thread has set last, and keeps that: another estimator would stay at one.
        _set_elsewhere(before)
        yield
    finally:
        torch.set_num_threads(before)


def _set_elsewhere(count: int) -> None:
    """Set torch's number of threads for threads to come, and leave it alone for this one."""
    thread = threading.Thread(target=torch.set_num_threads, args=(count,))
    thread.start()
    thread.join()
