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

"""Builds that a real SIGINT reaches, in a process of their own, which says how they end.

A process of tests has rclpy, TensorRT and much else loaded, and one of them once died of a
segmentation fault after these: here there is nothing but the builder, as in what users run.

    python interrupted_builds.py MODEL     prints one line of JSON per build
"""

import json
import os
from pathlib import Path
import signal
import sys

from flow_ros.runtimes.tensorrt import build_plan, BuildOptions

WHEN = (0.0, 0.5, 1.0)


def build(model, progress=None):
    return build_plan(model, name='act', options=BuildOptions(), progress=progress)


def interrupted(model, when):
    """Return how a build ends that is interrupted when it is so far."""
    before = signal.getsignal(signal.SIGINT)
    sent = []

    def progress(progress):
        if progress.fraction >= when and not sent:
            sent.append(progress.fraction)
            os.kill(os.getpid(), signal.SIGINT)
        return True

    try:
        build(model, progress)
        raised = ''
    except KeyboardInterrupt:
        raised = 'KeyboardInterrupt'
    return {'when': when, 'sent': len(sent), 'raised': raised,
            'handler_is_back': signal.getsignal(signal.SIGINT) is before,
            'builds_again': bool(build(model).plan)}


def with_a_handler_of_its_own(model):
    """Return how often the handler of a caller was called by an interrupt, and the plan's end."""
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(int(number)))
    try:
        built = build(model, lambda progress: progress.phase != 'done' or (
            os.kill(os.getpid(), signal.SIGINT) is None))
    finally:
        signal.signal(signal.SIGINT, before)
    return {'when': 'own', 'seen': seen, 'built': bool(built.plan)}


def main():
    # What is started in the background ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = Path(sys.argv[1]).read_bytes()
    for when in WHEN:
        print(json.dumps(interrupted(model, when)), flush=True)
    print(json.dumps(with_a_handler_of_its_own(model)), flush=True)


if __name__ == '__main__':
    main()
