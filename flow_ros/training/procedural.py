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

from flow_ros.synthetic.world import Clip, World
from flow_ros.training.augment import augment, Batch
from flow_ros.training.recipe import Stage


class Procedural:
    """Batches of scenes by index; each rendered scene is kept while it may be used again.

    ``rank`` of ``processes`` takes its share of every batch, with scenes of its own. A scene
    has ``frames`` frames; from 3 on, every other batch knows the frame before its first.
    """

    def __init__(self, world: World, *, rank: int = 0, processes: int = 1, reuse: int = 4,
                 keep: int = 12, frames: int = 3) -> None:
        self.world, self.rank, self.processes = world, rank, processes
        self.reuse, self.keep, self.frames = reuse, keep, frames
        self._kept: OrderedDict[tuple[int, Stage], Clip] = OrderedDict()

    def batch(self, step: int, stage: Stage, random: Generator) -> Batch:
        """Return the augmented crops of ``step``: two frames of a recent scene, either way.

        A function of ``step``, ``stage`` and the state of ``random``, whatever came before.
        """
        newest = step // self.reuse
        age = int(torch.randint(0, min(self.keep, newest + 1), (1,), generator=random))
        clip = self._clip(newest - age, stage)
        first = int(torch.randint(0, self.frames - 1, (1,), generator=random))
        if bool(torch.rand(1, generator=random) < 0.5):
            batch = Batch(clip.images[first], clip.images[first + 1], clip.forward[first],
                          clip.occluded_forward[first],
                          previous=clip.images[first - 1] if first > 0 else None,
                          flow_back=clip.backward[first])
        else:  # as a film that runs backwards
            after = first + 2
            batch = Batch(clip.images[first + 1], clip.images[first], clip.backward[first],
                          clip.occluded_backward[first],
                          previous=clip.images[after] if after < self.frames else None,
                          flow_back=clip.forward[first])
        return augment(batch, stage.crop, random, self.world.config.camera)

    def _clip(self, index: int, stage: Stage) -> Clip:
        key = (index, stage)
        if key not in self._kept:
            with torch.no_grad():
                self._kept[key] = self.world.clip(
                    index * self.processes + self.rank, size=stage.render,
                    batch=max(1, stage.batch // self.processes), frames=self.frames,
                    largest_motion_px=stage.largest_motion_px)
            while len(self._kept) > self.keep:
                self._kept.popitem(last=False)
        return self._kept[key]
