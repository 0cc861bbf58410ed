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

"""Recipes are read strictly, and what a run was made of can be read back."""

from dataclasses import replace
import json
from pathlib import Path

import pytest
import torch

from flow_ros.evaluation.data_sets import data_set_names, KINDS
from flow_ros.networks import create
from flow_ros.networks.hd3 import MULTIPLE
from flow_ros.synthetic.world import WorldConfig
from flow_ros.training.objectives import make_objective, OBJECTIVES
from flow_ros.training.recipe import read_recipe, Recipe, recipe_text, Stage, Validation
from flow_ros.training.sample_augment import AugmentConfig
from flow_ros.training.sample_loading import DataSetShare, PROCEDURAL

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / 'config' / 'train').glob('*.yaml'))


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_recipes_are_readable(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.network in OBJECTIVES
    assert recipe.stages[-1].until == 1.0


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_recipes_can_be_begun(path: Path) -> None:
    recipe = read_recipe(path)
    known = {PROCEDURAL, *data_set_names()}
    assert {share.name for share in (*recipe.data, *recipe.validation.data)} <= known
    for share in (*recipe.data, *recipe.validation.data):
        if share.split is not None:
            assert share.split in KINDS[share.name].splits
    with torch.device('meta'):  # its options, without the work of its weights
        assert create(recipe.network, **recipe.options).name == recipe.network
    # Its teacher comes out of an earlier training.
    options = {key: value for key, value in recipe.objective.items() if key != 'teacher'}
    make_objective(replace(recipe, objective=options))
    if recipe.network == 'hd3':
        assert not any(side % MULTIPLE for stage in recipe.stages for side in stage.crop)


def test_what_a_run_was_made_of_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / 'recipe.yaml'
    recipe = Recipe(
        network='dip', steps=7, betas=(0.8, 0.99), options={'start_flow': 'zeros'},
        world=WorldConfig(objects=(1, 2)),
        data=(DataSetShare('procedural', ratio=2), DataSetShare(
            'sintel', 'Sintel', 'clean', augment=AugmentConfig(scale=(-0.1, 0.2)))),
        stages=(Stage(0.5, 8, (64, 64), (64, 64), 30), Stage(1.0, 4, (80, 96), (64, 80))),
        validation=Validation(every_minutes=None, iterations=(3,), data=(
            DataSetShare('kitti2015', 'KITTI'),)))
    stepped = replace(recipe, anneal='steps', milestones=(0.25, 0.5), warmup_rate=0.01)
    for changed in (recipe, replace(recipe, steps=None, minutes=3.5), stepped, Recipe()):
        path.write_text(recipe_text(changed))
        assert read_recipe(path) == changed


STAGE = {'until': 1.0, 'batch': 2, 'render': [64, 64], 'crop': [64, 64]}


@pytest.mark.parametrize(('change', 'words'), [
    ({'minuets': 3}, 'unknown fields minuets; known are'),
    ({'world': {'trees': 3}}, 'world: unknown fields trees; known are'),
    ({'world': {'camera': {'lens': 3}}}, 'world, camera: unknown fields lens; known are'),
    ({'world': 3}, 'world must hold a mapping of fields; seen 3'),
    ({'stages': [{'until': 1.0, 'bach': 1}]}, 'stage 1: unknown fields bach'),
    ({'stages': [{'until': 1.0}]}, "stage 1: .*missing.*'batch'"),
    ({'stages': 3}, 'stages must be a list; seen 3'),
    ({'stages': []}, 'until 1.0'),
    ({'stages': [{**STAGE, 'crop': [64]}]}, r'stage 1: crop must have 2 entries; seen \[64\]'),
    ({'stages': [{**STAGE, 'batch': 0}]}, 'stage 1, batch must be at least 1; seen 0'),
    ({'stages': [{**STAGE, 'exponent': 0}]}, 'exponent must be above 0 and at most 1; seen 0'),
    ({'stages': [{**STAGE, 'crop': [0, 64]}]}, r'crop must be at least 1 each; seen \(0, 64\)'),
    ({'stages': [{**STAGE, 'until': 0.5}, {**STAGE, 'until': 0.5}, STAGE]},
     r'each stage must end after the one before it; seen \[0\.5, 0\.5, 1\.0\]'),
    ({'stages': [{**STAGE, 'batch': 2.5}]}, 'batch must be a whole number; seen 2.5'),
    ({'learning_rate': '1e-4'}, "learning_rate must not be text; seen '1e-4'"),
    ({'learning_rate': True}, 'learning_rate must be a number; seen True'),
    ({'network': 3}, 'network must be text; seen 3'),
    ({'checkpointed': 3}, 'checkpointed must be true or false; seen 3'),
    ({'options': 3}, 'options must be a mapping; seen 3'),
    ({'stages': [{**STAGE, 'crop': [50, 64]}]}, 'multiples of 16'),
    ({'stages': [{**STAGE, 'crop': [64, 80]}]}, 'does not fit'),
    ({'stages': [{**STAGE, 'until': 0.5}]}, 'until 1.0'),
    ({'accumulate': 3}, 'a batch of 8 cannot be worked off in 3 equal parts'),
    ({'accumulate': 0}, 'accumulate must be at least 1'),
    ({'steps': 3, 'minutes': 3}, 'give one of them'),
    ({'steps': 0}, 'steps must be at least 1'),
    ({'minutes': 0}, 'minutes must be positive'),
    ({'precision': '16-mixed'}, "one of bf16-mixed, 32-true; seen '16-mixed'"),
    ({'anneal': 'step'}, "one of cosine, linear, steps; seen 'step'"),
    ({'anneal': 'steps', 'milestones': [0.5, 0.2]}, 'above 0 and below 1, ascending; seen'),
    ({'anneal': 'steps', 'milestones': [0.5, 1.0]}, 'above 0 and below 1, ascending; seen'),
    ({'milestones': [0.5]}, "milestones belong to anneal: steps; seen anneal 'cosine'"),
    ({'warmup_rate': 0}, 'warmup_rate must be above 0 and at most 1; seen 0'),
    ({'data': []}, 'data must name at least one data set'),
    ({'data': [{'name': 'sintel'}]}, 'data 1: .*sintel: root must name its folder'),
    ({'data': [{'name': 'sintel', 'root': 'a', 'ratio': 0}]}, 'ratio must be more than 0'),
    ({'augment': {'erase': 3}}, 'augment: .*erase is a chance'),
    ({'log_every': 0}, 'log_every must be at least 1'),
    ({'validation': {'crop': [60, 64]}}, 'multiples of 16'),
    ({'validation': {'iterations': [2, 0]}}, 'validation, iterations must be at least 1 each'),
    ({'validation': {'every_steps': 0}}, 'validation, every_steps must be at least 1; seen 0'),
    ({'validation': {'data': [{'name': 'sintel', 'root': root} for root in 'ab']}},
     'each set can be measured once; seen sintel, sintel'),
    ({'world': {'driving': 1.5}}, 'world, driving must be a share from 0 to 1; seen 1.5'),
    ({'world': {'driving': 0.7, 'flying': 0.4}}, 'at most 1 together'),
    ({'world': {'objects': [3, 2]}}, r'objects must be \(fewest, most\)'),
    ({'world': {'camera': {'rain': -0.1}}}, 'world, camera, rain must be a share'),
    ({'learning_rate': 0}, 'learning_rate must be positive; seen 0'),
    ({'warmup': 1}, 'warmup must be from 0 to below 1; seen 1'),
    ({'betas': [0.9, 1]}, 'betas must be from 0 to below 1'),
    ({'warm': 2}, 'warm must be a share from 0 to 1; seen 2'),
    ({'iterations': 0}, 'iterations must be at least 1; seen 0'),
    ({'workers': -1}, 'workers must be at least 0; seen -1'),
])
def test_a_wrong_recipe_is_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / 'recipe.yaml'
    path.write_text(json.dumps({'network': 'dip_rt', **change}))
    with pytest.raises(ValueError, match=rf'(?s)recipe\.yaml.*{words}'):
        read_recipe(path)


def test_what_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / 'recipe.yaml'
    for text, words in (('stages: [', 'is not YAML'), ('- 1', 'must hold a mapping'),
                        ('', 'must hold a mapping')):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_recipe(path)
    path.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='is not YAML'):
        read_recipe(path)
