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

"""Training batches from data sets, mixed by ratio, read ahead by processes."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
import logging
import multiprocessing
from multiprocessing.connection import Connection
from typing import Protocol, TYPE_CHECKING

import numpy as np
import torch
from torch import Generator, Tensor

from flow_ros.evaluation.data_sets import DataSetError, open_data_set
from flow_ros.training.augment import Batch
from flow_ros.training.sample_augment import AugmentConfig
from flow_ros.training.sample_loading import (
    DataSetShare,
    draw_in_process,
    Drawn,
    Loader,
    PROCEDURAL,
    signals_held,
    Source,
    start_process,
)

if TYPE_CHECKING:
    from flow_ros.training.recipe import Stage

__all__ = ['BatchSource', 'DataSets', 'DataSetShare', 'PROCEDURAL']

LARGEST_SEED = 2 ** 62
FEW = 50
"""Draws before the share of damaged samples is judged."""

_log = logging.getLogger(__name__)


class BatchSource(Protocol):
    """What makes batches: ``Procedural``, for one."""

    def batch(self, step: int, stage: 'Stage', random: Generator) -> Batch:
        """Return the batch of ``step``."""


@dataclass(frozen=True)
class _Key:
    """What a batch of samples is a function of."""

    seed: int
    crop: tuple[int, int]
    count: int


class DataSets:
    """Batches of samples drawn from data sets, with repetition, by number.

    A batch is a function of the stage and of the state of ``random``, whatever came before. A
    share named 'procedural' gives whole batches, with its probability: its scenes are rendered
    a batch at a time. ``rank`` of ``processes`` takes its share of every batch.

    ``workers`` processes read and augment; 0 does so in the caller. They work ``ahead`` steps
    in front of the trainer if it says, by ``random_of``, which generator it will give to
    ``batch`` at a coming step; a guess that turns out wrong costs time only. A sample that
    cannot be read is warned of once and another one is drawn; DataSetError is raised if more
    than ``tolerated`` of all draws fail.
    """

    def __init__(self, shares: Sequence[DataSetShare], *,
                 augment: AugmentConfig = AugmentConfig(), procedural: BatchSource | None = None,
                 rank: int = 0, processes: int = 1, workers: int = 0,
                 device: torch.device | None = None,
                 random_of: Callable[[int], Generator] | None = None, ahead: int = 2,
                 tolerated: float = 0.05) -> None:
        """Open the data sets; raises DataSetError where one is not what it should be."""
        if not shares:
            raise DataSetError('data: expected at least one data set; seen none')
        sets = [share for share in shares if share.name != PROCEDURAL]
        if len(sets) < len(shares) and procedural is None:
            raise DataSetError("data: a share is named 'procedural', and there is no world")
        self.rank, self.processes, self.tolerated = rank, processes, tolerated
        self.device = device or torch.device('cpu')
        self._procedural = procedural
        self._sources = [
            Source(open_data_set(share.name, share.root or '', share.split), share.ratio,
                   share.augment or augment) for share in sets]
        total = sum(share.ratio for share in shares)
        self._procedural_share = 1 - sum(share.ratio for share in sets) / total
        self._loader = Loader(self._sources) if sets else None
        self._random_of, self._ahead = random_of, ahead if random_of is not None else 0
        self._pool: ProcessPoolExecutor | None = None
        self._lifeline: Connection | None = None
        if workers > 0 and sets:
            context = multiprocessing.get_context('spawn')
            self._theirs, self._lifeline = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(workers, context, start_process,
                                             (self._sources, self._theirs))
        self._coming: OrderedDict[_Key, list[Future[Drawn]]] = OrderedDict()
        self._drawn = self._failed = 0
        self._warned: set[str] = set()

    def __len__(self) -> int:
        """Return the number of samples of all sets."""
        return sum(len(source.data) for source in self._sources)

    def batch(self, step: int, stage: 'Stage', random: Generator) -> Batch:
        """Return the batch of ``step``, cropped to ``stage.crop``, this process's share."""
        key = self._key(stage, random)
        try:
            if key is None:
                assert self._procedural is not None
                batch = self._procedural.batch(step, stage, random)
            else:
                batch = self._stack(self._samples(key))
            self._look_ahead(step, stage)
        except BrokenProcessPool as error:
            self._cut_lifeline()  # the other processes do not heed the pool's SIGTERM
            raise DataSetError('a process that reads the data ended by force, perhaps for want '
                               'of memory: train with fewer workers') from error
        return batch

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
            self._cut_lifeline()

    def _cut_lifeline(self) -> None:
        if self._lifeline is not None:
            self._lifeline.close()
            self._theirs.close()
            self._lifeline = None

    def _key(self, stage: 'Stage', random: Generator) -> _Key | None:
        """Return what the batch will be made of; None if the procedural world makes it."""
        procedural = float(torch.rand(1, generator=random)) < self._procedural_share
        seed = int(torch.randint(LARGEST_SEED, (1,), generator=random))
        count = max(1, stage.batch // self.processes)
        return None if procedural else _Key(seed, stage.crop, count)

    def _samples(self, key: _Key) -> list[Drawn]:
        if self._pool is None:
            assert self._loader is not None
            return [self._loader.draw(key.seed, place, key.crop) for place in range(key.count)]
        futures = self._coming.pop(key, None) or self._submit(self._pool, key)
        return [future.result() for future in futures]

    def _look_ahead(self, step: int, stage: 'Stage') -> None:
        """Let the processes begin with the batches of the steps to come."""
        if self._pool is None or self._random_of is None:
            return
        wanted = [key for later in range(step + 1, step + 1 + self._ahead)
                  if (key := self._key(stage, self._random_of(later))) is not None]
        for key in [key for key in self._coming if key not in wanted]:
            for future in self._coming.pop(key):  # a guess that was wrong
                future.cancel()
        for key in wanted:
            if key not in self._coming:
                self._coming[key] = self._submit(self._pool, key)

    @staticmethod
    def _submit(pool: ProcessPoolExecutor, key: _Key) -> list['Future[Drawn]']:
        with signals_held():  # to submit starts processes
            return [pool.submit(draw_in_process, key.seed, place, key.crop)
                    for place in range(key.count)]

    def _stack(self, drawn: list[Drawn]) -> Batch:
        for each in drawn:
            self._count(each)
        samples = [each.sample for each in drawn]
        size = samples[0].flow.shape[:2]
        unknown = np.zeros(size, dtype=bool)
        occlusion = known = None
        if any(sample.occlusion is not None for sample in samples):
            occlusion = self._tensor([unknown if sample.occlusion is None else sample.occlusion
                                      for sample in samples])[:, None]
            known = self._tensor([
                unknown if sample.occlusion is None
                else ~unknown if sample.occlusion_known is None else sample.occlusion_known
                for sample in samples])[:, None]
        image1, image2 = (self._tensor(images).permute(0, 3, 1, 2).float().contiguous()
                          for images in ([sample.image1 for sample in samples],
                                         [sample.image2 for sample in samples]))
        flow = self._tensor([sample.flow for sample in samples]).permute(0, 3, 1, 2).contiguous()
        return Batch(image1, image2, flow, occlusion, occlusion_known=known)

    def _tensor(self, arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(self.device)

    def _count(self, drawn: Drawn) -> None:
        self._drawn += 1 + len(drawn.damaged)
        self._failed += len(drawn.damaged)
        for message in drawn.damaged:
            if message not in self._warned:
                self._warned.add(message)
                _log.warning('a sample is left out: %s', message)
        if self._drawn >= FEW and self._failed > self.tolerated * self._drawn:
            raise DataSetError(
                f'{self._failed} of {self._drawn} samples drawn could not be read (at most '
                f'{self.tolerated:.0%} are tolerated); the last: {sorted(self._warned)[-1]}')
