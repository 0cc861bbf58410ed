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

"""A mailbox with one slot: the newest item waits, an older one is dropped and counted."""

from threading import Condition
from typing import Generic, TypeVar

Item = TypeVar('Item')


class Mailbox(Generic[Item]):
    """Between a callback that must return at once and a worker that may be slow.

    A queue would give the worker old frames; here it always gets the newest one.
    """

    def __init__(self) -> None:
        """Start empty and open."""
        self._changed = Condition()
        self._item: Item | None = None
        self._dropped = 0
        self._closed = False
        self._awaited = False

    @property
    def dropped(self) -> int:
        """The number of items replaced before anybody took them."""
        with self._changed:
            return self._dropped

    @property
    def waiting(self) -> bool:
        """Whether an item waits."""
        with self._changed:
            return self._item is not None

    def put(self, item: Item) -> bool:
        """Leave ``item`` for the worker; never waits. True where the worker waited for it."""
        with self._changed:
            if self._item is not None:
                self._dropped += 1
            self._item = item
            self._changed.notify()
            return self._awaited

    def take(self) -> Item | None:
        """Wait for an item and return it; None once the mailbox is closed."""
        with self._changed:
            self._awaited = True
            self._changed.wait_for(lambda: self._closed or self._item is not None)
            self._awaited = False
            item, self._item = self._item, None
            return None if self._closed else item

    def close(self) -> None:
        """Let ``take`` return None from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
