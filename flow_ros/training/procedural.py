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

"""Training batches from the procedural world."""

from collections import OrderedDict

import torch
from torch import Generator

from flow_ros.synthetic.world import Pairs, World
from flow_ros.training.augment import augment, Batch
from flow_ros.training.recipe import Stage


class Procedural:
    """Batches of scenes by index; each rendered scene is kept while it may be used again.

    ``rank`` of ``processes`` takes its share of every batch, with scenes of its own.
    """

    def __init__(self, world: World, *, rank: int = 0, processes: int = 1, reuse: int = 4,
                 keep: int = 12) -> None:
        self.world, self.rank, self.processes = world, rank, processes
        self.reuse, self.keep = reuse, keep
        self._kept: OrderedDict[tuple[int, Stage], Pairs] = OrderedDict()

    def batch(self, step: int, stage: Stage, random: Generator) -> Batch:
        """Return the augmented crops of ``step``: a recent scene in one direction.

        A function of ``step``, ``stage`` and the state of ``random``, whatever came before.
        """
        newest = step // self.reuse
        age = int(torch.randint(0, min(self.keep, newest + 1), (1,), generator=random))
        pairs = self._pairs(newest - age, stage)
        if bool(torch.rand(1, generator=random) < 0.5):
            batch = Batch(pairs.image1, pairs.image2, pairs.forward, pairs.occluded_forward)
        else:
            batch = Batch(pairs.image2, pairs.image1, pairs.backward, pairs.occluded_backward)
        return augment(batch, stage.crop, random)

    def _pairs(self, index: int, stage: Stage) -> Pairs:
        key = (index, stage)
        if key not in self._kept:
            with torch.no_grad():
                self._kept[key] = self.world.pairs(
                    index * self.processes + self.rank, size=stage.render,
                    batch=max(1, stage.batch // self.processes),
                    largest_motion_px=stage.largest_motion_px)
            while len(self._kept) > self.keep:
                self._kept.popitem(last=False)
        return self._kept[key]
