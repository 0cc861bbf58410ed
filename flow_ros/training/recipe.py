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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
import math
from pathlib import Path
import types
from typing import Any, get_args, get_origin, get_type_hints, Union

import yaml

from flow_ros.synthetic.camera import CameraConfig
from flow_ros.synthetic.world import WorldConfig
from flow_ros.training.sample_augment import AugmentConfig
from flow_ros.training.sample_loading import DataSetShare, PROCEDURAL

PRECISIONS: tuple[str, ...] = ('bf16-mixed', '32-true')
ANNEALS: tuple[str, ...] = ('cosine', 'linear', 'steps')


@dataclass(frozen=True)
class Stage:
    """A part of the run; sizes are (height, width) in px, crops multiples of 16."""

    until: float
    """Ends at this share of the run, in (0, 1]."""
    batch: int
    """Pairs per optimizer step, of all processes together."""
    render: tuple[int, int]
    crop: tuple[int, int]
    largest_motion_px: float | None = None
    """In place of the world's: a first stage of small motions is learnt sooner."""
    exponent: float = 1.0
    """Of the flow's errors in the sequence loss: below 1, small errors count more."""


@dataclass(frozen=True)
class Validation:
    """What is measured on the way, with the averaged weights.

    Always on the same held-out procedural scenes, so that curves and runs can be compared; its
    time is part of the run's minutes, since these are minutes of wall clock.
    """

    every_minutes: float | None = 10.0
    """None: only ``every_steps``, and at the end."""
    every_steps: int | None = None
    pairs: int = 16
    """0 leaves the procedural scenes out."""
    seed: int = 1_000_003
    """Of the held-out world."""
    render: tuple[int, int] = (288, 384)
    crop: tuple[int, int] = (256, 352)
    iterations: tuple[int, ...] = (2, 4, 8)
    """Cold starts, per level."""
    warm_iterations: int | None = 2
    pictures: int = 3
    """Example pairs drawn into TensorBoard."""
    data: tuple[DataSetShare, ...] = ()
    """Data sets to measure as well, at full size; their ratio has no meaning here."""
    samples: int = 16
    """Of each data set, evenly spread over it."""


@dataclass(frozen=True)
class Recipe:
    """One training run of one network."""

    network: str = 'dip_rt'
    options: dict[str, Any] = field(default_factory=dict)
    """The network's own, as ``flow_ros.networks.create`` takes them."""
    objective: dict[str, Any] = field(default_factory=dict)
    """What the network's objective alone knows: the fields of its configuration."""
    seed: int = 0
    minutes: float = 60.0
    """The schedule's length in wall-clock minutes; the run ends with it, complete."""
    steps: int | None = None
    """The schedule's length in steps, in place of minutes: the same machine repeats the run."""
    precision: str = 'bf16-mixed'
    """Or 32-true."""
    accumulate: int = 1
    """In how many parts a process works off its share of a batch: less memory, same step."""
    learning_rate: float = 6e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    warmup: float = 0.04
    """Share of the run in which the learning rate rises."""
    warmup_rate: float | None = None
    """None: it rises from a twentieth; else it is this share of the full rate all the time."""
    anneal: str = 'cosine'
    """How it falls afterwards: cosine or linear (RAFT's and DIP's OneCycle), or in steps."""
    milestones: tuple[float, ...] = ()
    """Shares of the run at which ``anneal: steps`` halves the learning rate."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.998
    """Decay per step of the averaged weights, which are the ones saved."""
    gamma: float = 0.8
    """Weight ratio of successive predictions: DIP equation 9."""
    iterations: int | None = None
    """Per level, where the network trains with a fixed number; None is its default."""
    checkpointed: bool = False
    """Compute each iteration again in the backward pass: a third more time, less memory."""
    matching: float = 2.0
    """Weight of the matching loss."""
    warm: float = 0.25
    """Share of batches with a warm start."""
    warm_real: float = 0.5
    """Of these: from the network's own flow of the frame before, carried as on a stream, where
    the data know that frame. The rest starts from a degraded true flow."""
    reuse: int = 4
    """How often a rendered scene is used: directions times augmentations."""
    world: WorldConfig = field(default_factory=WorldConfig)
    data: tuple[DataSetShare, ...] = (DataSetShare(PROCEDURAL),)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Of the data sets; the world has its camera."""
    workers: int = 4
    """Processes that read and augment data sets; the world needs none."""
    stages: tuple[Stage, ...] = (Stage(1.0, 8, (288, 384), (256, 320)),)
    validation: Validation = field(default_factory=Validation)
    log_every: int = 50
    """Steps between two lines of the log."""


def read_recipe(path: Path) -> Recipe:
    """Read ``path``; raises ValueError naming a field that is unknown or out of range."""
    if not path.is_file():
        raise ValueError(f'{path} is no file: expected a recipe; those of flow_ros are in '
                         f'config/train of its source and in share/flow_ros/config/train of an '
                         f'installation')
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not YAML: {" ".join(str(error).split())}') from error
    if isinstance(values, dict) and values.get('steps') and values.get('minutes'):
        raise ValueError(f'{path}: the schedule goes by minutes or by steps; give one of them')
    recipe: Recipe = make_config(Recipe, values, str(path))
    check_recipe(recipe, str(path))
    return recipe


def recipe_text(recipe: Recipe) -> str:
    """Return ``recipe`` as YAML that ``read_recipe`` reads back, all fields told."""
    values = _plain(asdict(recipe))
    del values['minutes' if recipe.steps else 'steps']
    text: str = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=99)
    return text


def changed_fields(text: str, recipe: Recipe) -> list[str]:
    """Return in which fields ``recipe`` is not that of ``recipe_text``'s ``text``."""
    try:
        before, now = (make_config(Recipe, yaml.safe_load(each), 'recipe')
                       for each in (text, recipe_text(recipe)))
    except ValueError:  # of another version
        return ['some fields']
    return [entry.name for entry in fields(Recipe)
            if getattr(before, entry.name) != getattr(now, entry.name)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def check_recipe(recipe: Recipe, where: str) -> None:
    """Raise ValueError naming what is out of range."""
    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f'{where}: {message}')

    stages = [(stage, f'stage {number}, ') for number, stage in enumerate(recipe.stages, start=1)]
    for part, things in ((recipe, ''), *stages,
                         (recipe.validation, 'validation, '), (recipe.world, 'world, '),
                         (recipe.world.camera, 'world, camera, ')):
        for name, holds, words in _RANGES[type(part)]:
            value = getattr(part, name)
            require(value is None or holds(value), f'{things}{name} must be {words}; seen {value}')
    require(recipe.precision in PRECISIONS,
            f'precision must be one of {", ".join(PRECISIONS)}; seen {recipe.precision!r}')
    require(recipe.anneal in ANNEALS,
            f'anneal must be one of {", ".join(ANNEALS)}; seen {recipe.anneal!r}')
    milestones = recipe.milestones
    require(all(0 < share < 1 for share in milestones)
            and list(milestones) == sorted(set(milestones)),
            f'milestones must be shares of the run above 0 and below 1, ascending; seen '
            f'{list(milestones)}')
    require(bool(milestones) <= (recipe.anneal == 'steps'), f'milestones belong to anneal: '
            f'steps; seen anneal {recipe.anneal!r}')
    require(bool(recipe.data), 'data must name at least one data set, or be left out for the '
            'procedural world')
    require(bool(recipe.stages) and recipe.stages[-1].until >= 1,
            'the last stage must last until 1.0')
    require(recipe.world.driving + recipe.world.flying <= 1, 'world: driving and flying are '
            'shares of one whole, at most 1 together')
    ends = [stage.until for stage in recipe.stages]
    require(ends == sorted(set(ends)), f'each stage must end after the one before it; seen {ends}')
    measured = [share.name for share in recipe.validation.data]
    require(len(measured) == len(set(measured)), f'validation, data: each set can be measured '
            f'once; seen {", ".join(measured)}')
    for stage in recipe.stages:
        require(stage.batch % recipe.accumulate == 0, f'a batch of {stage.batch} cannot be '
                f'worked off in {recipe.accumulate} equal parts (accumulate)')
    areas = [(stage.render, stage.crop) for stage in recipe.stages]
    for render, crop in (*areas, (recipe.validation.render, recipe.validation.crop)):
        require(not any(side % 16 for side in crop),
                f'crop sides must be multiples of 16; seen {crop}')
        require(all(part <= whole for part, whole in zip(crop, render)),
                f'crop {crop} does not fit into {render}')


def make_config(kind: type[Any], values: Any, where: str) -> Any:
    """Make a dataclass from a mapping; raises ValueError naming what is wrong ``where``."""
    if not isinstance(values, dict):
        raise ValueError(f'{where} must hold a mapping of fields; seen {values!r}')
    known = [entry.name for entry in fields(kind)]
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ValueError(f'{where}: unknown fields {", ".join(unknown)}; known are '
                         f'{", ".join(known)}')
    hints = get_type_hints(kind)
    made = {key: _value(value, hints[key], key, where) for key, value in values.items()}
    try:
        return kind(**made)
    except (TypeError, ValueError) as error:  # a field is missing, or out of range
        raise ValueError(f'{where}: {error}') from error


def _value(value: Any, kind: Any, key: str, where: str) -> Any:
    """Return ``value`` as a field of type ``kind`` holds it."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return None
    kind = next(one for one in kinds if one is not type(None))
    if is_dataclass(kind):
        return make_config(kind, value, f'{where}, {key}')  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f'{where}: {key} must be a list; seen {value!r}')
        inner = get_args(kind)
        if inner[-1] is not Ellipsis and len(inner) != len(value):
            raise ValueError(f'{where}: {key} must have {len(inner)} entries; seen {value!r}')
        one = key[:-1] if key.endswith('s') else key
        return tuple(_value(entry, inner[0], f'{one} {number}', where)
                     for number, entry in enumerate(value, start=1))
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError(f'{where}: {key} must be a mapping; seen {value!r}')
        return dict(value)
    if isinstance(value, str) and kind is not str:
        raise ValueError(f'{where}: {key} must not be text; seen {value!r} (YAML reads 1e-4 '
                         f'as text: write 1.0e-4)')
    fits = {int: isinstance(value, int) and not isinstance(value, bool),
            float: isinstance(value, (int, float)) and not isinstance(value, bool),
            bool: isinstance(value, bool), str: isinstance(value, str)}
    if not fits.get(kind, True):
        raise ValueError(f'{where}: {key} must be {_NAMES[kind]}; seen {value!r}')
    return value


def _at_least(least: float) -> tuple[Callable[[float], bool], str]:
    return lambda value: least <= value < math.inf, f'at least {least}'


_COUNT, _NOT_NEGATIVE = _at_least(1), _at_least(0)
_POSITIVE = (lambda value: 0 < value < math.inf, 'positive')
_SHARE = (lambda value: 0 <= value <= 1, 'a share from 0 to 1')
_BELOW_1 = (lambda value: 0 <= value < 1, 'from 0 to below 1')
_ABOVE_0 = (lambda value: 0 < value <= 1, 'above 0 and at most 1')
_COUNTS = (lambda values: all(value >= 1 for value in values), 'at least 1 each')

_RANGES: Mapping[type[Any], Sequence[tuple[str, Callable[[Any], bool], str]]] = {
    kind: [(name, *rule) for rule, names in rules.items() for name in names.split()]
    for kind, rules in {
        Recipe: {_COUNT: 'steps accumulate iterations reuse log_every',
                 _POSITIVE: 'minutes learning_rate epsilon clip',
                 _NOT_NEGATIVE: 'seed weight_decay matching workers',
                 _BELOW_1: 'warmup ema', _ABOVE_0: 'gamma warmup_rate',
                 _SHARE: 'warm warm_real',
                 (lambda values: all(0 <= value < 1 for value in values),
                  'from 0 to below 1'): 'betas'},
        Stage: {_ABOVE_0: 'until exponent', _COUNT: 'batch', _COUNTS: 'render crop',
                _POSITIVE: 'largest_motion_px'},
        Validation: {_POSITIVE: 'every_minutes', _COUNT: 'every_steps warm_iterations samples',
                     _NOT_NEGATIVE: 'pairs seed pictures', _COUNTS: 'render crop iterations'},
        WorldConfig: {_POSITIVE: 'largest_motion_px', _SHARE: 'driving flying non_rigid',
                      _NOT_NEGATIVE: 'unsteady', _COUNT: 'surfaces bank_objects',
                      (lambda values: 0 <= values[0] <= values[1],
                       '(fewest, most), from 0 on'): 'objects'},
        CameraConfig: {
            _NOT_NEGATIVE: 'longest_blur_px',
            _SHARE: 'motion_blur rolling_shutter light defocus vignetting dirt rain bayer noise '
                    'grey jpeg'}}.items()}
"""Of the fields: name, whether a value is in range, and the range in words."""

_NAMES = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'text'}
