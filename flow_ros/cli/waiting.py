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

"""No wait in silence: work that says nothing itself for long is told of every few seconds."""

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # nothing heavy is imported before it is known that it is needed
    from rich.console import Console

EVERY_S = 5.0


class Waiting:
    """Shows what is being done while it lasts: ``with Waiting(console, 'compiling') as waiting``.

    On a terminal that is a line with something that turns. Elsewhere, in the log of an image's
    build say, it is a new line every ``every_s`` with the time so far. ``text`` may be changed
    at any time.
    """

    def __init__(self, console: 'Console', text: str, *, every_s: float = EVERY_S) -> None:
        self._console = console
        self._text = text
        self._every_s = every_s
        self._status = console.status(text) if console.is_terminal else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name='waiting', daemon=True)

    @property
    def text(self) -> str:
        """What is being done."""
        return self._text

    @text.setter
    def text(self, text: str) -> None:
        self._text = text
        if self._status is not None:
            self._status.update(text)

    def __enter__(self) -> 'Waiting':
        """Begin."""
        if self._status is not None:
            self._status.start()
        else:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End, whatever became of the work."""
        self._over.set()
        if self._status is not None:
            self._status.stop()
        else:
            self._thread.join()

    def _tell(self) -> None:
        start = time.monotonic()
        while not self._over.wait(self._every_s):
            self._console.print(f'{self._text}; {time.monotonic() - start:.0f} s so far',
                                markup=False)
