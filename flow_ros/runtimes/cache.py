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

"""The cache on disk: engines and what belongs to them, each under the digest of what made it.

    DIRECTORY/engines/DIGEST/plan             a serialised TensorRT engine
    DIRECTORY/engines/DIGEST/metadata.json    what it is, for what, from what, in plain words
    DIRECTORY/records/KIND/NAME               small things: timing caches, references, ...
    DIRECTORY/locks/NAME                      held (flock) while somebody builds; may stay behind

An engine only runs with the TensorRT and on the kind of GPU it was built with, so both are in
its key. Nothing in the cache is believed: a plan is handed out only if its metadata say it is
what was asked for and its sha256 is theirs. Whatever goes wrong with the disk is a warning: the
cache then keeps what it was given in memory, as long as it lives.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
import errno
import hashlib
import json
import logging
import os
from pathlib import Path
import shutil
import time
from types import ModuleType
from typing import Any
import uuid

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: everything works there, but two processes may build twice
    fcntl = None

FORMAT = 1
"""Of metadata.json; another one is rebuilt."""
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What some network file systems answer."""
_POLL_S = 0.2
_SAY_AFTER_S = 1.0
"""A lock that is held this long is held for a build, not for a look."""
_SAY_EVERY_S = 60.0
"""Who waits tells meanwhile how far it is."""

Say = Callable[[str, str], None]
"""Takes a level ('info' or 'warning') and one line."""
Waiting = Callable[[float], bool]
"""Takes the seconds waited so far; False gives up."""

_log = logging.getLogger(__name__)


class WaitCancelled(RuntimeError):  # noqa: N818 -- what happened, as it reads
    """The wait for another process's build was given up."""


def cache_directory() -> Path:
    """Return $FLOW_ROS_CACHE, else $XDG_CACHE_HOME/flow_ros, else ~/.cache/flow_ros."""
    if os.environ.get('FLOW_ROS_CACHE'):
        return Path(os.environ['FLOW_ROS_CACHE']).expanduser()
    if os.environ.get('XDG_CACHE_HOME'):
        return Path(os.environ['XDG_CACHE_HOME']).expanduser() / 'flow_ros'
    return Path.home() / '.cache' / 'flow_ros'


def digest_of(facts: Mapping[str, Any]) -> str:
    """Return 32 hexadecimal digits that tell ``facts`` (what JSON can hold) from all others."""
    text = json.dumps(facts, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class PlanKey:
    """All that decides what a plan is.

    ``tensorrt`` is package and version ('tensorrt 10.16.1'), ``gpu`` the device's name and
    ``compute_capability`` its '8.7'. ``shapes`` give for each input of the ONNX file its name
    and its shape, or the smallest, best and largest shape where it is dynamic. ``flags`` are
    all further settings of the builder; JSON must know their values.
    """

    onnx_sha256: str
    tensorrt: str
    gpu: str
    compute_capability: str
    shapes: Mapping[str, Any] = field(default_factory=dict)
    precision: str = 'f32'
    flags: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the key as JSON gives it back."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @property
    def digest(self) -> str:
        """The name of the plan's folder."""
        return digest_of(self.as_dict())


@dataclass(frozen=True)
class CacheEntry:
    """A plan as it lies on the disk: ``size`` in bytes, ``built`` as its metadata say it."""

    digest: str
    title: str
    size: int
    built: str
    metadata: Mapping[str, Any]


class EngineCache:
    """Plans and small records under ``directory`` (default: ``cache_directory()``).

    ``say`` gets every message; the default is the log. No method but ``lock`` raises for what
    the disk does, and threads and processes may use one directory at once.
    """

    def __init__(self, directory: Path | None = None, say: Say | None = None) -> None:
        self.directory = cache_directory() if directory is None else directory
        self.say: Say = log_it if say is None else say
        self._plans: dict[str, bytes] = {}
        self._records: dict[tuple[str, str], bytes] = {}
        self._warned: set[int | None] = set()

    def folder(self, key: PlanKey) -> Path:
        """Return where the plan of ``key`` is or would be."""
        return self.directory / 'engines' / key.digest

    def writable(self) -> bool:
        """Tell whether a file can be written here now."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self.directory / 'writable', b'\n', durable=False)
            (self.directory / 'writable').unlink()
        except OSError:
            return False
        return True

    def get(self, key: PlanKey, *, title: str = 'engine', quiet: bool = False) -> bytes | None:
        """Return the plan of ``key``, or None where there is none that can be trusted.

        A line says why where there is one that cannot, or where one with the same ``title``
        (see ``put``) was made for another TensorRT, GPU or network; not if ``quiet``.
        """
        if key.digest in self._plans:
            return self._plans[key.digest]
        folder = self.folder(key)
        try:
            plan, why = _read_plan(folder, key)
        except FileNotFoundError:
            if not quiet:
                self._explain_miss(key, title)
            return None
        except OSError as error:
            plan, why = None, f'it cannot be read ({_reason(error)})'
        if plan is None and not quiet:
            self.say('warning', f'{title}: the engine in {folder} is built anew: {why}')
        return plan

    def put(self, key: PlanKey, plan: bytes, metadata: Mapping[str, Any], *,
            title: str = 'engine') -> bool:
        """Keep ``plan``; True if it is on the disk now, False (with a warning) if it is not.

        ``title`` says in a few words what it is ('dip_rt step_8 640x480 f32'); ``metadata``
        are further facts for those who read metadata.json. A plan that cannot be written is
        kept in memory.
        """
        content = {'title': title, **metadata, 'built': _now(), 'plan_bytes': len(plan),
                   'plan_sha256': hashlib.sha256(plan).hexdigest(), 'format': FORMAT,
                   'key': key.as_dict()}
        text = json.dumps(content, indent=1, ensure_ascii=False) + '\n'
        folder = self.folder(key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob('*.part'):  # of a build that was killed while it wrote
                left.unlink(missing_ok=True)
            # A plan without metadata is none: whatever ends this here leaves no wrong pair.
            (folder / 'metadata.json').unlink(missing_ok=True)
            write_atomically(folder / 'plan', plan)
            write_atomically(folder / 'metadata.json', text.encode())
        except OSError as error:
            self._plans[key.digest] = plan
            _remove(folder)
            self._warn(error, f'{title} ({_size(len(plan))}) is')
            return False
        except BaseException:  # Ctrl-C: the next one shall find a clean place
            _remove(folder)
            raise
        self._plans.pop(key.digest, None)
        return True

    def remember(self, key: PlanKey, plan: bytes, kind: str, name: str, record: bytes) -> None:
        """Keep ``plan`` and the record that leads to it in memory only: the disk has no room."""
        self._plans[key.digest] = plan
        self._records[kind, name] = record

    def drop(self, key: PlanKey) -> None:
        """Forget the plan of ``key``: whoever it was for did not take it."""
        self._plans.pop(key.digest, None)
        _remove(self.folder(key))

    def get_record(self, kind: str, name: str) -> bytes | None:
        """Return what ``put_record`` was given, or None; a damaged one is as good as none."""
        if (kind, name) in self._records:
            return self._records[kind, name]
        try:
            content = (self.directory / 'records' / kind / name).read_bytes()
        except OSError:
            return None
        sha256, _, data = content.partition(b'\n')
        return data if sha256 == hashlib.sha256(data).hexdigest().encode() else None

    def put_record(self, kind: str, name: str, data: bytes) -> bool:
        """Keep ``data``, in place of what was there; True if it is on the disk now."""
        path = self.directory / 'records' / kind / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A power cut may damage it: then its sha256 tells.
            write_atomically(path, hashlib.sha256(data).hexdigest().encode() + b'\n' + data,
                             durable=False)
        except OSError as error:
            self._records[kind, name] = data
            self._warn(error, f'{kind} {name} is')
            return False
        self._records.pop((kind, name), None)
        return True

    @contextmanager
    def lock(self, name: str, *, title: str = 'engine',
             waiting: Waiting | None = None) -> Iterator[bool]:
        """Hold the lock ``name``, of which there is one for all processes.

        While another one holds it a line says so, with its process id, soon and then every
        minute; ``waiting`` is asked several times a second whether to go on, and WaitCancelled
        is raised where it says False. A killed process holds nothing. Yields False, without a
        lock, where the file system has none: then the worst is that two build the same engine.
        """
        handle = self._locked(name, title, waiting)
        try:
            yield handle is not None
        finally:
            if handle is not None:
                os.close(handle)  # which also unlocks

    def entries(self) -> list[CacheEntry]:
        """Return all plans on the disk, the newest first."""
        found = []
        for folder in _folders(self.directory / 'engines'):
            metadata = _metadata(folder) or {}
            found.append(CacheEntry(
                digest=folder.name, title=str(metadata.get('title', 'unfinished or damaged')),
                size=_bytes_below(folder), built=str(metadata.get('built', '')),
                metadata=metadata))
        return sorted(found, key=lambda entry: entry.built, reverse=True)

    def clear(self) -> int:
        """Remove all plans, records and free locks; return the bytes that were freed.

        Builds that are running go on: what they write afterwards stays.
        """
        freed = 0
        for part in ('engines', 'records'):
            freed += _bytes_below(self.directory / part)
            shutil.rmtree(self.directory / part, ignore_errors=True)
        self._plans.clear()
        self._records.clear()
        for path in _files(self.directory / 'locks'):
            handle = _try_lock(path)
            if handle is not None:
                path.unlink(missing_ok=True)
                os.close(handle)
        return freed

    def _locked(self, name: str, title: str, waiting: Waiting | None) -> int | None:
        path = self.directory / 'locks' / name
        start = time.monotonic()
        said = 0
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = _try_lock(path)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    self._warn_once(error.errno, f'{self.directory} has no locks '
                                    f'({_reason(error)}): two processes may build the same '
                                    f'engine at once; set FLOW_ROS_CACHE to a local folder')
                else:
                    self._warn(error, 'engines are')
                return None
            if handle is not None or fcntl is None:
                return handle
            seconds = time.monotonic() - start
            if seconds >= _SAY_AFTER_S + said * _SAY_EVERY_S:
                said += 1
                self.say('info', f'{title}: waiting for {_holder(path)}, which is building it '
                                  f'({seconds:.0f} s so far)')
            if waiting is not None and not waiting(seconds):
                raise WaitCancelled(f'{title}: gave up waiting for {_holder(path)} after '
                                    f'{seconds:.0f} s')
            time.sleep(_POLL_S)

    def _explain_miss(self, key: PlanKey, title: str) -> None:
        """Say what else is kept under this title, if anything: the user may wonder."""
        wanted = key.as_dict()
        for entry in self.entries():
            kept = entry.metadata.get('key')
            if entry.title == title and isinstance(kept, dict) and kept != wanted:
                self.say('info', f'{title}: built anew: the one kept since {entry.built} is for '
                                  f'{_differences(kept, wanted)}')
                return

    def _warn(self, error: OSError, what: str) -> None:
        """Say that the cache cannot be written: once per reason, or a node would say it often."""
        room = ''
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            room = f' ({_free(self.directory)})'
        self._warn_once(error.errno, f'cannot write to {self.directory}: {_reason(error)}{room}; '
                        f'{what} kept in memory only, and built again at the next start. Free '
                        f'some space or make the folder writable, or set FLOW_ROS_CACHE to '
                        f'another folder')

    def _warn_once(self, reason: int | None, text: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            self.say('warning', text)


def log_it(level: str, text: str) -> None:
    """Log one line: where messages go if nobody asked for them."""
    _log.log(logging.WARNING if level == 'warning' else logging.INFO, '%s', text)


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write ``data`` so that ``path`` is the old file or the new one, whatever happens.

    If ``durable``, also after a power cut: the content is on the disk before the name is.
    Raises OSError, and then leaves nothing behind.
    """
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}.part')
    try:
        with temporary.open('xb') as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # Ctrl-C too
        _remove(temporary)
        raise
    if not durable:
        return
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError:
        pass  # not every system can do this with a folder; the file itself is written


def _read_plan(folder: Path, key: PlanKey) -> tuple[bytes | None, str]:
    """Return the plan, or None and why it is not taken; FileNotFoundError where none is."""
    if not folder.is_dir():
        raise FileNotFoundError(str(folder))
    if not (folder / 'metadata.json').exists():
        return None, 'it was left unfinished (no metadata.json)'
    metadata = _metadata(folder)
    if metadata is None:
        return None, 'its metadata.json is damaged'
    if metadata.get('format') != FORMAT:
        return None, (f'its metadata have format {metadata.get("format")!r}, this version of '
                      f'flow_ros writes {FORMAT}')
    kept = metadata.get('key')
    if kept != key.as_dict():
        seen = _differences(kept, key.as_dict()) if isinstance(kept, dict) else 'nothing known'
        return None, f'its metadata say it is for {seen}'
    if not (folder / 'plan').exists():
        return None, 'its plan is gone'
    plan = (folder / 'plan').read_bytes()
    if len(plan) != metadata.get('plan_bytes'):
        return None, (f'its plan is truncated or not its own: {len(plan)} bytes, '
                      f'{metadata.get("plan_bytes")} were written')
    if hashlib.sha256(plan).hexdigest() != metadata.get('plan_sha256'):
        return None, 'its plan is damaged: the sha256 is not the one it was written with'
    return plan, ''


def _metadata(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / 'metadata.json').read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _differences(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return in words what of ``kept`` is not as ``wanted``."""
    words = {'onnx_sha256': 'other weights or another export', 'tensorrt': 'TensorRT',
             'gpu': 'GPU', 'compute_capability': 'compute capability'}
    parts = []
    for name in dict.fromkeys([*wanted, *kept]):
        seen, asked = kept.get(name), wanted.get(name)
        if seen == asked:
            continue
        if name == 'onnx_sha256':
            parts.append(words[name])
        else:
            parts.append(f'{words.get(name, name)} {_plain(seen)}, not {_plain(asked)}')
    return '; '.join(parts) or 'the same'


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _try_lock(path: Path) -> int | None:
    """Return a handle that holds the lock ``path``, or None where another one has it."""
    if fcntl is None:
        return None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been removed in between: then this lock is on nothing.
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                os.ftruncate(handle, 0)
                os.pwrite(handle, f'{os.getpid()}\n'.encode(), 0)
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            pass  # removed in between: as above
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return handle  # held, only without the number in it
            os.close(handle)
            raise
        os.close(handle)


def _holder(path: Path) -> str:
    try:
        number = path.read_text(encoding='ascii').strip()
    except (OSError, ValueError):
        number = ''
    return f'process {number}' if number.isdigit() else 'another process'


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []


def _files(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_file())
    except OSError:
        return []


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob('*'):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # removed in between
    return total


def _remove(path: Path) -> None:
    """Remove a file or a folder as far as that can be done."""
    try:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        pass


def _reason(error: OSError) -> str:
    where = f': {error.filename}' if error.filename else ''
    return f'{error.strerror or type(error).__name__}{where}'


def _free(directory: Path) -> str:
    for folder in (directory, *directory.parents):
        try:
            return f'{_size(shutil.disk_usage(folder).free)} are free'
        except OSError:
            continue
    return 'how much is free is not known'


def _size(count: int) -> str:
    """Return ``count`` bytes in words."""
    if count < 10_000:
        return f'{count} bytes'
    return f'{count / 1e3:.0f} kB' if count < 1_000_000 else f'{count / 1e6:.1f} MB'


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(sep=' ', timespec='seconds')
