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

"""Peak memory of this process: how high it rises above where it began.

Linux counts the highest resident set of a process and lets it begin that count anew. Where it
does not (a container may forbid it), the resident set is looked at every few milliseconds, and
a peak shorter than that can be missed. MB are 2^20 bytes.
"""

from pathlib import Path
import resource
import sys
import threading

from flow_ros.malloc import trim_malloc

MB = 2 ** 20
_EVERY_S = 0.005
_PROCESS = Path('/proc/self')


class PeakMemory:
    """Looks at the resident memory between ``with`` and its end.

    ``start_mb`` is the resident set at the beginning, ``peak_mb`` how much higher the highest
    one was. With ``above_mb`` of an earlier one's ``start_mb`` the rise is counted from there.
    What was freed before the beginning is given back to the system first: memory that nobody
    uses would hide a part of the rise.
    """

    def __init__(self, *, above_mb: float | None = None) -> None:
        self.start_mb = 0.0
        self.peak_mb = 0.0
        self._above_mb = above_mb
        self._highest = 0.0
        self._counted = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name='peak_memory', daemon=True)

    def __enter__(self) -> 'PeakMemory':
        """Begin."""
        trim_malloc()
        self.start_mb = self._highest = resident_mb()
        self._counted = _reset_highest()
        if not self._counted:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End, whatever became of the work."""
        if self._counted:
            self._highest = max(self._highest, _status_mb('VmHWM') or 0.0)
        else:
            self._over.set()
            self._thread.join()
            self._highest = max(self._highest, resident_mb())
        base = self.start_mb if self._above_mb is None else self._above_mb
        self.peak_mb = max(self._highest - base, 0.0)

    def _sample(self) -> None:
        while not self._over.wait(_EVERY_S):
            self._highest = max(self._highest, resident_mb())


def resident_mb() -> float:
    """Return the resident set of this process now; elsewhere than on Linux its highest so far."""
    now = _status_mb('VmRSS')
    if now is not None:
        return now
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def _reset_highest() -> bool:
    """Begin the kernel's count of the highest resident set anew; False where it does not."""
    before = _status_mb('VmHWM')
    if before is None:
        return False
    try:
        (_PROCESS / 'clear_refs').write_text('5')
    except OSError:
        return False
    after, now = _status_mb('VmHWM'), _status_mb('VmRSS')
    # Some systems take the number and do nothing.
    return after is not None and now is not None and after <= now + 1.0


def _status_mb(field: str) -> float | None:
    try:
        lines = (_PROCESS / 'status').read_text(encoding='ascii', errors='replace').splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f'{field}:'):
            return int(line.split()[1]) / 1024
    return None
