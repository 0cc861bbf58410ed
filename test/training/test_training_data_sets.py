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

"""Mixtures of data sets: pure batches, right shares, damage, and processes that read ahead."""

from collections.abc import Iterator
import logging
import multiprocessing
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import Generator

from flow_ros.evaluation.data_sets import DataSetError
from flow_ros.flow_io import write_flow, write_image
from flow_ros.training.augment import Batch
from flow_ros.training.data_sets import DataSets, DataSetShare
from flow_ros.training.recipe import Stage
from flow_ros.training.sample_augment import AugmentConfig, NO_AUGMENT
from flow_ros.training.sample_loading import ATTEMPTS

torch.set_num_threads(1)
REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = (72, 96)
STAGE = Stage(1.0, 4, (72, 96), (48, 64))


def random_of(step: int) -> Generator:
    return Generator().manual_seed(1000 + step)


def make_pairs(root: Path, u: float, *, count: int = 4, occlusion: bool = False,
               size: tuple[int, int] = SIZE) -> DataSetShare:
    """Write folders whose flow is u everywhere, so that a sample says where it is from."""
    random = np.random.default_rng(int(u))
    for number in range(count):
        folder = root / f'{number}'
        folder.mkdir(parents=True)
        for frame in ('frame1.png', 'frame2.png'):
            write_image(folder / frame, random.integers(0, 256, (*size, 3), dtype=np.uint8))
        flow = np.zeros((*size, 2), np.float32)
        flow[..., 0] = u
        flow[::2, 1::2] = np.nan
        write_flow(folder / 'flow.flo', flow)
        if occlusion:
            write_image(folder / 'occlusion.png', np.zeros(size, np.uint8))
    return DataSetShare('folders', str(root))


@pytest.fixture
def mixture(tmp_path: Path) -> tuple[DataSetShare, DataSetShare]:
    return (make_pairs(tmp_path / 'few', 5, count=2),
            make_pairs(tmp_path / 'many', 9, count=6, occlusion=True))


def assert_same(one: Batch, two: Batch) -> None:
    for name in ('image1', 'image2', 'flow', 'occlusion', 'occlusion_known'):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a.float().nan_to_num(1e6), b.float().nan_to_num(1e6)), name


def test_what_a_batch_is(mixture: tuple[DataSetShare, DataSetShare]) -> None:
    data = DataSets(mixture, augment=NO_AUGMENT)
    assert len(data) == 8
    batch = data.batch(0, STAGE, random_of(0))
    assert batch.image1.shape == batch.image2.shape == (4, 3, 48, 64)
    assert batch.image1.dtype == batch.flow.dtype == torch.float32
    assert batch.image1.max() > 200 and batch.image1.is_contiguous()
    assert batch.flow.shape == (4, 2, 48, 64)
    assert torch.isnan(batch.flow).float().mean() == pytest.approx(0.25)
    for each in batch.flow:
        assert float(each[0].nanmean()) in (5, 9) and float(each[1].nanmean()) == 0


def test_a_batch_is_a_function_of_its_arguments(mixture: tuple[DataSetShare, ...]) -> None:
    one, two = DataSets(mixture), DataSets(mixture)
    for step in (3, 0, 7):
        two.batch(step, STAGE, random_of(step))
    for step in (7, 3):
        assert_same(one.batch(step, STAGE, random_of(step)),
                    two.batch(step, STAGE, random_of(step)))
    first, second = (one.batch(step, STAGE, random_of(step)) for step in (0, 1))
    assert not torch.equal(first.image1, second.image1)


def test_sets_are_drawn_in_their_ratio_whatever_their_size(
        mixture: tuple[DataSetShare, DataSetShare]) -> None:
    few = DataSetShare(mixture[0].name, mixture[0].root, ratio=3.0)
    data = DataSets([few, mixture[1]], augment=NO_AUGMENT)
    stage = Stage(1.0, 40, SIZE, (16, 16))
    seen = torch.cat([data.batch(step, stage, random_of(step)).flow[:, 0].nanmean(dim=(1, 2))
                      for step in range(10)])
    assert set(seen.tolist()) == {5.0, 9.0}
    assert float((seen == 5).float().mean()) == pytest.approx(0.75, abs=0.06)


def test_occlusion_counts_where_a_set_knows_it(
        mixture: tuple[DataSetShare, DataSetShare]) -> None:
    data = DataSets(mixture, augment=NO_AUGMENT)
    batches = [data.batch(step, STAGE, random_of(step)) for step in range(4)]
    unknown, knowing = 0, 0
    for batch in batches:
        if batch.occlusion is None:
            continue
        assert batch.occlusion.shape == batch.occlusion_known.shape == (4, 1, 48, 64)
        assert batch.occlusion.dtype == batch.occlusion_known.dtype == torch.bool
        for flow, occlusion, known in zip(batch.flow, batch.occlusion, batch.occlusion_known):
            if float(flow[0].nanmean()) == 5:
                assert not known.any()
                unknown += 1
            else:  # what leaves the crop is known where the flow is
                assert torch.equal(known[0], torch.isfinite(flow[0]))
                assert torch.equal(occlusion[0, :, -9:], torch.isfinite(flow[0, :, -9:]))
                assert not occlusion[0, :, :-9].any()
                knowing += 1
    assert unknown > 0 and knowing > 0
    alone = DataSets(mixture[:1]).batch(0, STAGE, random_of(0))
    assert alone.occlusion is None and alone.occlusion_known is None


def test_a_share_has_its_own_augmentation(mixture: tuple[DataSetShare, DataSetShare]) -> None:
    mirror = AugmentConfig(spatial=0, flip_horizontal=1, flip_vertical=0)
    share = DataSetShare('folders', mixture[0].root, augment=mirror)
    batch = DataSets([share, mixture[1]], augment=NO_AUGMENT).batch(0, STAGE, random_of(0))
    assert set(batch.flow[:, 0].nanmean(dim=(1, 2)).tolist()) == {-5.0, 9.0}


def test_processes_share_a_batch(mixture: tuple[DataSetShare, ...]) -> None:
    halves = [DataSets(mixture, rank=rank, processes=2).batch(0, STAGE, random_of(rank))
              for rank in range(2)]
    assert [len(half.flow) for half in halves] == [2, 2]
    assert not torch.equal(halves[0].image1, halves[1].image1)


class Marked:
    """Batches that say which step they are of."""

    def batch(self, step: int, stage: Stage, random: Generator) -> Batch:
        value = float(torch.rand(1, generator=random))
        full = torch.full((stage.batch, 3, *stage.crop), value)
        return Batch(full, full, full[:, :2] * 0 + step, full[:, :1] > 2)


def test_the_procedural_world_gives_whole_batches(mixture: tuple[DataSetShare, ...]) -> None:
    shares = [mixture[0], DataSetShare('procedural', ratio=3.0)]
    data = DataSets(shares, procedural=Marked())
    batches = [data.batch(step, STAGE, random_of(step)) for step in range(200)]
    procedural = [batch.occlusion_known is None and batch.occlusion is not None
                  for batch in batches]
    assert np.mean(procedural) == pytest.approx(0.75, abs=0.09)
    for step, (batch, is_procedural) in enumerate(zip(batches, procedural)):
        if is_procedural:
            assert (batch.flow == step).all()
            assert_same(batch, data.batch(step, STAGE, random_of(step)))
    alone = DataSets([DataSetShare('procedural')], procedural=Marked())
    assert (alone.batch(3, STAGE, random_of(3)).flow == 3).all()
    with pytest.raises(DataSetError, match='there is no world'):
        DataSets(shares)


@pytest.fixture
def with_processes(mixture: tuple[DataSetShare, ...]) -> Iterator[DataSets]:
    shares = [*mixture, DataSetShare('procedural', ratio=0.7)]
    data = DataSets(shares, procedural=Marked(), workers=2, random_of=random_of, ahead=3)
    yield data
    data.close()
    data.close()  # harmless


def test_processes_that_read_ahead_change_nothing(with_processes: DataSets,
                                                  mixture: tuple[DataSetShare, ...]) -> None:
    plain = DataSets([*mixture, DataSetShare('procedural', ratio=0.7)], procedural=Marked())
    smaller = Stage(1.0, 2, SIZE, (32, 48))
    for step, stage in ((0, STAGE), (1, STAGE), (2, STAGE), (3, smaller), (4, smaller),
                        (2, STAGE), (90, STAGE), (91, STAGE)):  # a resumed run jumps
        assert_same(with_processes.batch(step, stage, random_of(step)),
                    plain.batch(step, stage, random_of(step)))
        assert len(with_processes._coming) <= 3
    # A generator in another state than was said: the guess is not used.
    other = Generator().manual_seed(5)
    expected = plain.batch(92, STAGE, Generator().manual_seed(5))
    assert_same(with_processes.batch(92, STAGE, other), expected)


def test_every_batch_is_read_once_and_ahead(with_processes: DataSets,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    submit = with_processes._submit
    monkeypatch.setattr(with_processes, '_submit',
                        lambda pool, key: read.append(key) or submit(pool, key))
    for step in range(6):
        with_processes.batch(step, STAGE, random_of(step))
        keys = [key for later in range(step + 4)
                if (key := with_processes._key(STAGE, random_of(later))) is not None]
        assert read == keys and len(set(keys)) == len(keys)


def test_a_damaged_sample_is_said_once_and_another_taken(
        mixture: tuple[DataSetShare, DataSetShare], tmp_path: Path,
        caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / 'many' / '3' / 'frame2.png'
    path.write_bytes(path.read_bytes()[:500])
    data = DataSets(mixture, augment=NO_AUGMENT, tolerated=0.5)
    with caplog.at_level(logging.WARNING):
        batches = [data.batch(step, STAGE, random_of(step)) for step in range(20)]
    assert all(len(batch.flow) == 4 for batch in batches)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 1 and str(path) in warned[0] and 'cut off' in warned[0]
    again = DataSets(mixture, augment=NO_AUGMENT, tolerated=0.5)
    assert_same(again.batch(7, STAGE, random_of(7)), batches[7])


def test_too_many_damaged_samples_end_it(mixture: tuple[DataSetShare, DataSetShare],
                                         tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / 'many' / f'{number}' / 'flow.flo').write_bytes(b'PIEH')
    data = DataSets(mixture)
    with pytest.raises(DataSetError, match=r'samples drawn could not be read \(at most 5%'):
        for step in range(40):
            data.batch(step, STAGE, random_of(step))
    for number in range(2):
        (tmp_path / 'few' / f'{number}' / 'flow.flo').write_bytes(b'PIEH')
    with pytest.raises(DataSetError, match=f'{ATTEMPTS} samples one after the other.*cut off'):
        DataSets(mixture[:1]).batch(0, STAGE, random_of(0))


def test_damage_is_seen_through_the_processes(
        mixture: tuple[DataSetShare, DataSetShare], tmp_path: Path,
        caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2):
        (tmp_path / 'few' / f'{number}' / 'flow.flo').write_bytes(b'PIEH')
    data = DataSets(mixture[:1], workers=1)
    try:
        with pytest.raises(DataSetError, match='one after the other'):
            data.batch(0, STAGE, random_of(0))
    finally:
        data.close()


def test_processes_leave_sigterm_to_their_parent_and_end_when_one_is_killed(
        mixture: tuple[DataSetShare, ...]) -> None:
    data = DataSets(mixture, workers=2)
    try:
        before = multiprocessing.active_children()
        expected = data.batch(0, STAGE, random_of(0))
        ours = [child for child in multiprocessing.active_children() if child not in before]
        assert ours
        for process in ours:
            process.terminate()
        assert torch.equal(data.batch(0, STAGE, random_of(0)).flow.nan_to_num(),
                           expected.flow.nan_to_num())
        ours[0].kill()
        with pytest.raises(DataSetError, match='ended by force.*fewer workers'):
            for step in range(1, 100):
                data.batch(step, STAGE, random_of(step))
    finally:
        data.close()
    assert not any(process.is_alive() for process in ours)


def test_processes_end_with_a_killed_parent(mixture: tuple[DataSetShare, ...],
                                            tmp_path: Path) -> None:
    script = tmp_path / 'train.py'
    script.write_text(f"""
import multiprocessing, os, signal
from torch import Generator
from flow_ros.training.data_sets import DataSets, DataSetShare
from flow_ros.training.recipe import Stage
if __name__ == '__main__':
    data = DataSets([DataSetShare('folders', {mixture[0].root!r})], workers=1)
    data.batch(0, Stage(1.0, 1, (72, 96), (48, 64)), Generator())
    print(multiprocessing.active_children()[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                           timeout=60, env={**os.environ, 'PYTHONPATH': str(REPOSITORY)})
    assert ended.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and is_running(int(ended.stdout)):
        time.sleep(0.05)
    assert not is_running(int(ended.stdout))


def is_running(process: int) -> bool:
    """Tell; one that ended and that nobody has asked after yet does not run."""
    try:
        return Path(f'/proc/{process}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False


def test_senseless_shares_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataSetError, match='ratio must be more than 0; seen 0'):
        DataSetShare('sintel', str(tmp_path), ratio=0)
    with pytest.raises(DataSetError, match='root must name its folder'):
        DataSetShare('sintel')
    with pytest.raises(DataSetError, match='the procedural world has no root'):
        DataSetShare('procedural', '/somewhere')
    with pytest.raises(DataSetError, match='seen none'):
        DataSets([])
    with pytest.raises(DataSetError, match='is not MPI-Sintel: expected training/clean'):
        DataSets([DataSetShare('sintel', str(tmp_path))])
