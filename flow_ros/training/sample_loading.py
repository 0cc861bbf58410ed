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

"""Draws, reads and augments samples; imports no torch, so that loader processes start fast."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
import os
import signal
import threading

import cv2
import numpy as np

from flow_ros.evaluation.data_sets import DataSet, DataSetError, Sample
from flow_ros.flow_io import FlowFileError
from flow_ros.training.sample_augment import augment_sample, AugmentConfig

PROCEDURAL = 'procedural'
"""The name of the share that is no data set, but the procedural world."""
ATTEMPTS = 20
"""Draws for one place in a batch until its data count as lost."""
_ENDINGS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class DataSetShare:
    """One data set in a mixture: where it is and how often it is drawn."""

    name: str
    """One of ``data_set_names()``, or 'procedural': the procedural world, which has no root."""
    root: str | None = None
    split: str | None = None
    """None: the set's own default."""
    ratio: float = 1.0
    """Samples are drawn from the sets with probabilities in these ratios, whatever their sizes
    (DIP's 1:10). Papers that repeat a set k times have the ratio k x its size."""
    augment: AugmentConfig | None = None
    """In place of the mixture's."""

    def __post_init__(self) -> None:
        """Raise DataSetError for a value that makes no sense."""
        if not self.ratio > 0:
            raise DataSetError(f'data, {self.name}: the ratio must be more than 0; '
                               f'seen {self.ratio}')
        if self.name == PROCEDURAL and self.root:
            raise DataSetError(f'data, {self.name}: the procedural world has no root; '
                               f'seen {self.root!r}')
        if self.name != PROCEDURAL and not self.root:
            raise DataSetError(f'data, {self.name}: root must name its folder')


@dataclass(frozen=True)
class Drawn:
    """A sample of a batch, and what could not be read on the way to it."""

    sample: Sample
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A data set, its probability and its augmentation."""

    data: DataSet
    probability: float
    augment: AugmentConfig


class Loader:
    """Samples of several sets by number: the same numbers give the same sample."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Take the sets to draw from."""
        self.sources = tuple(sources)
        total = sum(source.probability for source in sources)
        self._until = np.cumsum([source.probability / total for source in sources])

    def draw(self, seed: int, place: int, crop: tuple[int, int]) -> Drawn:
        """Return the sample of ``place`` in the batch of ``seed``, cropped to (H, W).

        Where a file is damaged the next draw of the same sequence takes its place.
        """
        damaged: list[str] = []
        for attempt in range(ATTEMPTS):
            random = np.random.default_rng([seed, place, attempt])
            number = int(np.searchsorted(self._until, random.random(), side='right'))
            source = self.sources[min(number, len(self.sources) - 1)]
            index = int(random.integers(len(source.data)))
            try:
                sample = source.data.load(index)
            except FlowFileError as error:
                damaged.append(f'{source.data.name}, {source.data.files[index].name}: {error}')
                continue
            return Drawn(augment_sample(sample, crop, source.augment, random), tuple(damaged))
        raise DataSetError(f'{ATTEMPTS} samples one after the other could not be read; the last: '
                           f'{damaged[-1]}')


class _Process:
    """What a loader process keeps; set once, when it starts."""

    loader: Loader


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back what ends a process: one that is started meanwhile holds it back as well.

    So a signal to the whole group does not end a process that cannot ignore it yet.
    """
    resource_tracker.ensure_running()  # which would let signals through when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_process(sources: Sequence[Source], parent: Connection) -> None:
    """Make the loader of this process, which is to use one core and to end with its parent.

    The parent holds the other end of the pipe ``parent``. Signals are its to answer: they reach
    the whole group (Ctrl-C, ``timeout``, torchrun, systemd), and its last step needs data.
    """
    for number in _ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDINGS)
    cv2.setNumThreads(1)

    def follow() -> None:
        parent.poll(None)  # until the other end is closed, or its process was killed
        os._exit(1)  # nobody waits for what is left to do

    threading.Thread(target=follow, daemon=True).start()
    _Process.loader = Loader(sources)


def draw_in_process(seed: int, place: int, crop: tuple[int, int]) -> Drawn:
    """Draw in a process that ``start_process`` prepared."""
    return _Process.loader.draw(seed, place, crop)
