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

"""What is measured during training: the averaged weights on scenes that are not trained on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Generator, Tensor

from flow_ros.evaluation.data_sets import DataSet, open_data_set
from flow_ros.evaluation.metrics import endpoint_error, flow_metrics, mean_metrics
from flow_ros.flow_io import FlowFileError
from flow_ros.networks.base import Features, FlowNetwork
from flow_ros.synthetic.world import World
from flow_ros.training.augment import Batch
from flow_ros.training.crew import Crew
from flow_ros.training.journal import say
from flow_ros.training.objectives import channels_last, stream_prior
from flow_ros.training.procedural import Procedural
from flow_ros.training.recipe import Recipe, Stage
from flow_ros.training.sample_loading import DataSetShare
from flow_ros.visualization import error_to_color, flow_to_color, robust_max_px, strip

BATCH = 2
MEASURES = ('epe', 'fl_all', 'outliers_1px')
_ATTEMPTS = 20


@dataclass(frozen=True)
class Measured:
    """Measures by name (``cold_4/epe``), and example pictures of the first process."""

    metrics: Mapping[str, float]
    pictures: tuple[NDArray[np.uint8], ...]


class Validation:
    """The held-out scenes and data sets of one run; scenes are rendered once and kept."""

    def __init__(self, recipe: Recipe, crew: Crew, *, data_root: Path | None = None) -> None:
        """Open the data sets; raises DataSetError where one is not what it should be."""
        self.recipe, self.crew = recipe, crew
        self._sets = [open_data_set(share.name, rooted(share, data_root).root or '', share.split)
                      for share in recipe.validation.data]
        self._batches: list[Batch] | None = None

    @torch.no_grad()
    def measure(self, network: FlowNetwork) -> Measured:
        """Measure ``network``, together with the rest of the crew."""
        network.eval()
        rows, pictures = self._procedural(network)
        metrics = self._means('', rows)
        for data in self._sets:
            metrics |= self._means(f'{data.name}/', self._rows_of(data, network))
        return Measured(metrics, tuple(pictures))

    def _procedural(self, network: FlowNetwork
                    ) -> tuple[dict[str, list[Mapping[str, float]]], list[NDArray[np.uint8]]]:
        config = self.recipe.validation
        rows: dict[str, list[Mapping[str, float]]] = {}
        pictures: list[NDArray[np.uint8]] = []
        if self._batches is None:
            count = -(-config.pairs // BATCH)
            self._batches = list(held_out(self.recipe, self.crew.device, count,
                                          rank=self.crew.rank, size=self.crew.size))
        for batch in self._batches:
            a, b = (network.encode(channels_last(image))
                    for image in (batch.image1, batch.image2))
            for iterations in config.iterations:
                flow = _flow(network, a, b, iterations)
                _measure(rows, f'cold_{iterations}', flow, batch.flow)
                if iterations == config.iterations[len(config.iterations) // 2]:
                    pictures += _pictures(batch, flow)
            if (config.warm_iterations and network.accepts_prior
                    and batch.previous is not None):
                prior = stream_prior(network, batch.previous, batch.image1)
                flow = _flow(network, a, b, config.warm_iterations, prior)
                _measure(rows, f'warm_{config.warm_iterations}', flow, batch.flow)
        return rows, pictures[:config.pictures]

    def _rows_of(self, data: DataSet, network: FlowNetwork
                 ) -> dict[str, list[Mapping[str, float]]]:
        """Measure samples spread over ``data``, at full size, from a cold start."""
        chosen = np.linspace(0, len(data) - 1, min(self.recipe.validation.samples, len(data)))
        rows: list[Mapping[str, float]] = []
        for place, index in enumerate(chosen.round().astype(int)):
            if place % self.crew.size != self.crew.rank:
                continue
            try:
                sample = data.load(int(index))
            except FlowFileError as error:
                say(f'validation leaves a sample out: {error}')
                continue
            image1, image2 = (torch.from_numpy(image).to(self.crew.device).permute(2, 0, 1)[None]
                              .float() for image in (sample.image1, sample.image2))
            flow = _flow(network, network.encode(image1), network.encode(image2), None)
            rows.append(flow_metrics(_array(flow[0]), sample.flow))
        return {'cold': rows}

    def _means(self, prefix: str,
               rows: Mapping[str, list[Mapping[str, float]]]) -> dict[str, float]:
        """Return the means over the pairs of all processes."""
        metrics: dict[str, float] = {}
        config = self.recipe.validation
        names = ['cold'] if prefix else [
            *(f'cold_{count}' for count in config.iterations), f'warm_{config.warm_iterations}']
        for name in names:
            own, count = mean_metrics(rows.get(name, [])), len(rows.get(name, []))
            sums = [own[measure] * count if count else 0.0 for measure in MEASURES]
            told = torch.tensor([*sums, float(count)], dtype=torch.float64)
            *sums, total = self.crew.sum(told.to(self.crew.device)).tolist()
            if total:
                metrics |= {f'{prefix}{name}/{measure}': value / total
                            for measure, value in zip(MEASURES, sums)}
        return metrics


def held_out(recipe: Recipe, device: torch.device, batches: int, *, rank: int = 0,
             size: int = 1) -> Iterator[Batch]:
    """Yield every ``size``-th batch of scenes of another seed, which nothing is trained on."""
    config = recipe.validation
    world = replace(recipe.world, surfaces=min(64, recipe.world.surfaces),  # for a few scenes
                    bank_objects=min(128, recipe.world.bank_objects))
    data = Procedural(World(seed=config.seed, device=device, config=world), reuse=1, keep=1)
    stage = Stage(1.0, BATCH, config.render, config.crop)
    for index in range(rank, batches, size):
        for attempt in range(_ATTEMPTS):  # until it has a frame before, for the warm start
            random = Generator().manual_seed(config.seed + index * _ATTEMPTS + attempt)
            batch = data.batch(index, stage, random)
            if batch.previous is not None:
                break
        yield batch


def rooted(share: DataSetShare, data_root: Path | None) -> DataSetShare:
    """Return ``share`` with its root found under ``data_root``."""
    if share.root is None or data_root is None:
        return share
    return replace(share, root=str(data_root / share.root))


def _flow(network: FlowNetwork, a: Features, b: Features, iterations: int | None,
          prior: Tensor | None = None) -> Tensor:
    state = network.start(a, b, prior_flow=prior, iterations=iterations)
    while state.schedule:
        state = network.step(state)
    return network.finish(state).flow.float()


def _measure(rows: dict[str, list[Mapping[str, float]]], name: str, flow: Tensor,
             truth: Tensor) -> None:
    rows.setdefault(name, []).extend(
        flow_metrics(_array(one), _array(other)) for one, other in zip(flow, truth))


def _pictures(batch: Batch, flow: Tensor) -> list[NDArray[np.uint8]]:
    """Return frame, truth, estimate and error of each pair, side by side."""
    pictures = []
    for image, truth, estimate in zip(batch.image1, map(_array, batch.flow), map(_array, flow)):
        frame = image.permute(1, 2, 0).clamp(0, 255).byte().cpu().numpy()
        error = endpoint_error(estimate, truth)
        longest = robust_max_px(truth)
        pictures.append(strip(
            [frame, flow_to_color(truth, longest), flow_to_color(estimate, longest),
             error_to_color(error)],
            ['frame 1', f'truth, full colour {longest:.1f} px', 'estimate',
             f'error: EPE {float(np.nanmean(error)):.2f} px']))
    return pictures


def _array(flow: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = flow.permute(1, 2, 0).cpu().numpy()
    return array
