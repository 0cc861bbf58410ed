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

"""How the C library keeps memory, for processes in which images come and go."""

import ctypes
import platform

_PIECE = 64 << 20
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3


def tune_malloc(*, mmap_threshold: int = 32 << 20, trim_threshold: int = 512 << 20) -> bool:
    """Keep the memory of images between messages; False where this is not glibc.

    By default glibc maps each block of more than 128 kB afresh and returns it when freed, so each
    image costs a page fault per 4 kB: taking a 640x480 message is five times slower. And the
    memory of each thread but the first is in pieces of 64 MB, which are returned when they are
    empty, unless so much padding is asked for that none may go.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_TOP_PAD, _PIECE) and mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
                and mallopt(_M_TRIM_THRESHOLD, trim_threshold))


def trim_malloc() -> None:
    """Have glibc give to the system what was freed; other C libraries do as they like."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass
