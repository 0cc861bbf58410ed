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

"""The engine cache on real disks: also full ones, and with builders that are killed."""

from dataclasses import replace
import errno
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from flow_ros.runtimes.cache import EngineCache, PlanKey, WaitCancelled, write_atomically

KEY = PlanKey(onnx_sha256='ab' * 32, tensorrt='tensorrt 10.16.1', gpu='NVIDIA Test',
              compute_capability='8.7', shapes={'flow': (1, 2, 30, 40)}, precision='fast',
              flags={'workspace_mib': None})
TITLE = 'dip_rt step_8 640x480 fast'
PLAN = bytes(range(256)) * 40


class Said(list):
    """The messages of a cache, as (level, text)."""

    def __call__(self, level: str, text: str) -> None:
        self.append((level, text))

    @property
    def one(self) -> tuple[str, str]:
        message, = self
        return message


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def cache(tmp_path: Path, said: Said) -> EngineCache:
    return EngineCache(tmp_path / 'cache', said)


def kept(cache: EngineCache) -> Path:
    assert cache.put(KEY, PLAN, {'network': 'dip_rt', 'seconds': 12.5}, title=TITLE)
    return cache.folder(KEY)


def test_a_plan_comes_back(cache: EngineCache, said: Said) -> None:
    assert cache.get(KEY, title=TITLE) is None
    folder = kept(cache)
    assert cache.get(KEY, title=TITLE) == PLAN
    assert EngineCache(cache.directory).get(KEY) == PLAN
    assert said == []
    assert sorted(path.name for path in folder.iterdir()) == ['metadata.json', 'plan']
    metadata = json.loads((folder / 'metadata.json').read_text())
    assert metadata['title'] == TITLE and metadata['seconds'] == 12.5
    assert metadata['key']['gpu'] == 'NVIDIA Test' and metadata['plan_bytes'] == len(PLAN)


def test_whatever_differs_is_another_plan() -> None:
    others = [replace(KEY, **change) for change in (
        {'onnx_sha256': 'cd' * 32}, {'tensorrt': 'tensorrt 10.3.0'}, {'gpu': 'Other'},
        {'compute_capability': '8.9'}, {'shapes': {'flow': (1, 2, 30, 48)}},
        {'precision': 'f32'}, {'flags': {'workspace_mib': 512}})]
    assert len({KEY.digest, *(key.digest for key in others)}) == 8
    assert replace(KEY, shapes={'flow': [1, 2, 30, 40]}).digest == KEY.digest


def damage_plan(folder: Path) -> None:
    (folder / 'plan').write_bytes(b'x' + PLAN[1:])


def truncate_plan(folder: Path) -> None:
    (folder / 'plan').write_bytes(PLAN[:100])


def remove_plan(folder: Path) -> None:
    (folder / 'plan').unlink()


def remove_metadata(folder: Path) -> None:
    (folder / 'metadata.json').unlink()


def damage_metadata(folder: Path) -> None:
    (folder / 'metadata.json').write_text('{"title": ')


def make_foreign(folder: Path) -> None:
    rewrite(folder, 'tensorrt', 'tensorrt 10.3.0')


def other_gpu(folder: Path) -> None:
    rewrite(folder, 'gpu', 'Tegra')


def rewrite(folder: Path, name: str, value: str) -> None:
    metadata = json.loads((folder / 'metadata.json').read_text())
    metadata['key'][name] = value
    (folder / 'metadata.json').write_text(json.dumps(metadata))


def make_old(folder: Path) -> None:
    metadata = json.loads((folder / 'metadata.json').read_text())
    (folder / 'metadata.json').write_text(json.dumps({**metadata, 'format': 0}))


@pytest.mark.parametrize(('harm', 'why'), [
    (damage_plan, 'its plan is damaged: the sha256'),
    (truncate_plan, 'truncated or not its own: 100 bytes, 10240 were written'),
    (remove_plan, 'its plan is gone'),
    (remove_metadata, 'left unfinished'),
    (damage_metadata, 'metadata.json is damaged'),
    (make_foreign, 'for TensorRT tensorrt 10.3.0, not tensorrt 10.16.1'),
    (other_gpu, 'for GPU Tegra, not NVIDIA Test'),
    (make_old, 'format 0'),
])
def test_what_cannot_be_trusted_is_rebuilt_and_says_why(cache, said, harm, why) -> None:
    folder = kept(cache)
    harm(folder)
    assert cache.get(KEY, title=TITLE) is None
    level, text = said.one
    assert level == 'warning' and why in text and TITLE in text and str(folder) in text
    assert '\n' not in text
    kept(cache)
    assert cache.get(KEY) == PLAN
    assert len(said) == 1


def test_a_plan_that_was_not_taken_is_dropped(cache, said) -> None:
    folder = kept(cache)
    cache.drop(KEY)
    assert not folder.exists() and cache.get(KEY, quiet=True) is None
    folder = kept(cache)
    truncate_plan(folder)
    assert cache.get(KEY, quiet=True) is None
    assert said == []


def test_a_new_version_says_what_the_old_plan_was_for(cache, said) -> None:
    kept(cache)
    assert cache.get(replace(KEY, tensorrt='tensorrt 11.4.1'), title=TITLE) is None
    level, text = said.one
    assert level == 'info'
    assert 'for TensorRT tensorrt 10.16.1, not tensorrt 11.4.1' in text
    assert cache.get(replace(KEY, onnx_sha256='0'), title='another') is None
    assert len(said) == 1


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path: Path, said: Said) -> None:
    blocked = tmp_path / 'file'  # permission bits would not stop root
    blocked.write_text('not a folder')
    cache = EngineCache(blocked / 'cache', said)
    with cache.lock('one', title=TITLE) as held:
        assert not held
        assert not cache.put(KEY, PLAN, {}, title=TITLE)
    assert not cache.put_record('timing', 'a', b'1')
    level, text = said.one
    assert level == 'warning' and str(blocked) in text and 'set FLOW_ROS_CACHE' in text
    assert cache.get(KEY) == PLAN and cache.get_record('timing', 'a') == b'1'
    assert cache.entries() == [] and cache.clear() == 0


def test_a_full_disk_leaves_nothing_broken(tiny_disk: Path, said: Said) -> None:
    cache = EngineCache(tiny_disk / 'cache', said)
    large = os.urandom(200_000)
    with cache.lock('one'):
        assert not cache.put(KEY, large, {}, title=TITLE)
    level, text = said.one
    assert level == 'warning' and 'No space left' in text and '200 kB' in text
    assert 'are free' in text
    assert cache.get(KEY) == large  # used from memory
    assert not cache.put(replace(KEY, gpu='Other'), large, {}, title=TITLE)
    assert len(said) == 1
    assert [path for path in tiny_disk.rglob('*') if path.name not in
            ('cache', 'engines', 'locks', 'one')] == []
    assert EngineCache(tiny_disk / 'cache', said).get(KEY) is None
    assert cache.put(KEY, PLAN, {}, title=TITLE)  # a small one has room
    assert EngineCache(tiny_disk / 'cache', said).get(KEY) == PLAN
    assert len(said) == 1


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(code), *arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


HOLDER = """
    import sys, time
    from pathlib import Path
    from flow_ros.runtimes.cache import EngineCache
    with EngineCache(Path(sys.argv[1])).lock('one') as held:
        print(held, flush=True)
        time.sleep(60)
"""

# Killed while it writes: half of the plan is in the temporary file, the lock is held.
KILLED = """
    import os, signal, sys
    from pathlib import Path
    from flow_ros.runtimes import cache as module
    from test_cache import KEY, PLAN, TITLE

    def half(handle):
        kept = list((Path(sys.argv[1]) / 'engines').rglob('*.part'))
        os.truncate(kept[0], len(PLAN) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    cache = module.EngineCache(Path(sys.argv[1]))
    module.os.fsync = half
    with cache.lock('one'):
        cache.put(KEY, PLAN, {}, title=TITLE)
"""


def test_a_killed_build_leaves_nothing_in_the_way(cache, said, monkeypatch) -> None:
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parent), prepend=os.pathsep)
    process = child(KILLED, str(cache.directory))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, output
    left, = cache.folder(KEY).iterdir()
    assert left.suffix == '.part' and left.stat().st_size == len(PLAN) // 2
    with cache.lock('one', waiting=lambda seconds: False) as held:  # would raise if it waited
        assert held
        assert cache.get(KEY, title=TITLE) is None
        level, text = said.one
        assert 'left unfinished' in text
        kept(cache)
    assert sorted(path.name for path in cache.folder(KEY).iterdir()) == ['metadata.json', 'plan']
    assert cache.get(KEY) == PLAN


def test_one_waits_for_the_other_and_says_for_whom(cache, said, monkeypatch) -> None:
    process = child(HOLDER, str(cache.directory))
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == 'True'
        asked = []
        monkeypatch.setattr('flow_ros.runtimes.cache._SAY_AFTER_S', 0.0)
        monkeypatch.setattr('flow_ros.runtimes.cache._SAY_EVERY_S', 0.3)

        def waiting(seconds: float) -> bool:
            asked.append(seconds)
            if len(asked) == 4:
                process.kill()  # its lock goes with it
                process.wait()
            return True

        with cache.lock('one', title=TITLE, waiting=waiting) as held:
            assert held
        assert len(asked) >= 4
        assert len(said) >= 2
        assert all(f'waiting for process {process.pid}' in text and TITLE in text
                   for _, text in said)
    finally:
        process.kill()
        process.wait()


def test_waiting_can_be_given_up(cache, said) -> None:
    with cache.lock('one'), pytest.raises(WaitCancelled, match=f'process {os.getpid()}'):
        with cache.lock('one', waiting=lambda seconds: False):
            pytest.fail('two hold one lock')
    with cache.lock('one') as held:
        assert held
        with cache.lock('two') as other:
            assert other


def test_threads_exclude_each_other_too(cache) -> None:
    inside, most = [], []

    def work() -> None:
        with cache.lock('one'):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_a_file_system_without_locks_is_one_warning(cache, said, monkeypatch) -> None:
    def refuses(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr('flow_ros.runtimes.cache.fcntl.flock', refuses)
    for name in ('one', 'two'):
        with cache.lock(name) as held:
            assert not held
            kept(cache)
    level, text = said.one
    assert level == 'warning' and 'has no locks (No locks available)' in text
    assert cache.get(KEY) == PLAN


def test_records_come_back_whole_or_not_at_all(cache) -> None:
    assert cache.get_record('timing', 'a') is None
    assert cache.put_record('timing', 'a', b'\n1\n')
    assert cache.get_record('timing', 'a') == b'\n1\n'
    path = cache.directory / 'records' / 'timing' / 'a'
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.get_record('timing', 'a') is None
    assert cache.put_record('timing', 'a', b'2')
    assert EngineCache(cache.directory).get_record('timing', 'a') == b'2'


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / 'file'
    write_atomically(path, b'old')

    def broken(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr('flow_ros.runtimes.cache.os.fsync', broken)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b'new')
    assert path.read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_while_writing_leaves_a_clean_place(cache, said, monkeypatch) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr('flow_ros.runtimes.cache.os.fsync', interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.put(KEY, PLAN, {}, title=TITLE)
    assert not cache.folder(KEY).exists()
    assert cache.get(KEY, title=TITLE) is None and said == []


def test_what_is_kept_can_be_listed_and_cleared(cache, said) -> None:
    kept(cache)
    (cache.directory / 'engines' / 'broken').mkdir()
    with cache.lock('held'):
        with cache.lock('free'):
            pass
        entry, broken = cache.entries()
        assert entry.title == TITLE and entry.size > len(PLAN) and entry.digest == KEY.digest
        assert entry.built[:2] == '20' and broken.title == 'unfinished or damaged'
        assert cache.clear() == entry.size
        assert [path.name for path in (cache.directory / 'locks').iterdir()] == ['held']
    assert cache.entries() == [] and cache.get(KEY, title=TITLE) is None
    assert said == []
