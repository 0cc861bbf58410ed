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

"""The process that builds engines for a node, which serves meanwhile: see ``building``."""

from dataclasses import asdict
import os
from pathlib import Path
from typing import Any

import torch

from flow_ros.apart import Message, serve_job, Tell
from flow_ros.networks import create
from flow_ros.runtimes.build_progress import EngineProgress
from flow_ros.runtimes.building import (
    build_engines,
    BuildRequest,
    FAILURES,
    Gpu,
    pass_on,
)
from flow_ros.runtimes.cache import EngineCache
from flow_ros.runtimes.export import SizeRange
from flow_ros.runtimes.tensorrt import Installation

_NICE = 5
"""The frames that are served meanwhile go first."""


def work(job: Message, tell: Tell) -> None:
    """Build what ``job`` asks for into the cache; errors that have a name are told."""
    if hasattr(os, 'nice'):  # not on Windows
        os.nice(_NICE)
    network = create(job['network'], weights=Path(job['weights']))
    if job['device'] is not None and torch.device(job['device']).index is not None:
        torch.cuda.set_device(job['device'])  # TensorRT builds for the current one

    def say(level: str, text: str) -> None:
        tell({'say': [level, text]})

    def progress(seen: EngineProgress) -> bool:
        tell({'progress': asdict(seen)})
        return True

    request = request_of(job['request'])
    try:
        engines = build_engines(network, request,
                                installation=Installation(**job['installation']),
                                gpu=None if job['gpu'] is None else Gpu(**job['gpu']),
                                cache=EngineCache(Path(job['cache']), say), progress=progress,
                                say=say)
        pass_on(engines, network, request, Path(job['unkept']))
    except FAILURES as error:
        tell({'error': [type(error).__name__, str(error)]})


def request_of(facts: dict[str, Any]) -> BuildRequest:
    """Return the request that ``asdict`` and JSON have made ``facts`` of."""
    size = facts['size']
    if isinstance(size, dict):
        size = SizeRange(**{name: tuple(value) for name, value in size.items()})
    else:
        size = tuple(size)
    return BuildRequest(**{**facts, 'size': size})


def main() -> None:
    """Do the one job of this process."""
    serve_job(work)
