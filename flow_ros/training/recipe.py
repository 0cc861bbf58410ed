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

"""What a training run is made of: a YAML file, read into frozen dataclasses."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from flow_ros.synthetic.world import WorldConfig


@dataclass(frozen=True)
class Stage:
    """A part of the run; sizes are (height, width) in px, crops multiples of 16."""

    until: float
    """Ends at this share of the run, in (0, 1]."""
    batch: int
    render: tuple[int, int]
    crop: tuple[int, int]
    largest_motion_px: float | None = None
    """In place of the world's: a first stage of small motions is learnt sooner."""


@dataclass(frozen=True)
class Recipe:
    """One training run of one network on the procedural world."""

    network: str = 'dip_rt'
    seed: int = 0
    minutes: float = 60.0
    """The schedule's length in wall-clock minutes; the run ends with it, complete."""
    learning_rate: float = 6e-4
    weight_decay: float = 1e-4
    warmup: float = 0.04
    """Share of the run in which the learning rate rises."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.998
    """Decay per step of the averaged weights, which are the ones saved."""
    gamma: float = 0.8
    """Weight ratio of successive predictions: DIP equation 9."""
    matching: float = 2.0
    """Weight of the matching loss."""
    warm: float = 0.25
    """Share of batches that start from a degraded true flow."""
    reuse: int = 4
    """How often a rendered scene is used: directions times augmentations."""
    world: WorldConfig = field(default_factory=WorldConfig)
    stages: tuple[Stage, ...] = (Stage(1.0, 8, (288, 384), (256, 320)),)


def read_recipe(path: Path) -> Recipe:
    """Read ``path``; raises ValueError naming a field that is unknown or out of range."""
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f'{path} is not YAML: {" ".join(str(error).split())}') from error
    if isinstance(values, dict):
        if 'world' in values:
            values['world'] = _make(WorldConfig, values['world'], f'{path}, world')
        if isinstance(values.get('stages'), list):
            values['stages'] = tuple(_make(Stage, stage, f'{path}, stage {number}')
                                     for number, stage in enumerate(values['stages'], start=1))
    recipe: Recipe = _make(Recipe, values, str(path))
    if not recipe.stages or recipe.stages[-1].until < 1:
        raise ValueError(f'{path}: the last stage must last until 1.0')
    for stage in recipe.stages:
        if stage.batch < 1:
            raise ValueError(f'{path}: a batch has at least 1 pair; seen {stage.batch}')
        if any(side % 16 for side in stage.crop):
            raise ValueError(f'{path}: crop sides must be multiples of 16; seen {stage.crop}')
        if any(part > whole for part, whole in zip(stage.crop, stage.render)):
            raise ValueError(f'{path}: crop {stage.crop} does not fit into {stage.render}')
    return recipe


def _make(kind: type[Any], values: Any, where: str) -> Any:
    """Make a dataclass from a mapping; raises ValueError naming what is wrong ``where``."""
    if not isinstance(values, dict):
        raise ValueError(f'{where} must hold a mapping of fields; seen {values!r}')
    known = {entry.name: entry for entry in fields(kind)}
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ValueError(f'{where}: unknown fields {", ".join(unknown)}; known are '
                         f'{", ".join(known)}')
    for key, value in values.items():
        if isinstance(value, str) and known[key].type is not str:
            raise ValueError(f'{where}: {key} must not be text; seen {value!r} (YAML reads 1e-4 '
                             f'as text: write 1.0e-4)')
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value
                       for key, value in values.items()})
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f'{where}: {error}') from error
