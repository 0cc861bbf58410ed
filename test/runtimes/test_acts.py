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

"""Which acts a network has at a frame size, without computing anything."""

import pytest
import torch
from torch import nn

from flow_ros.networks import create
from flow_ros.networks.base import FlowNetwork
from flow_ros.runtimes.acts import Act, record_acts, signature_of

torch.set_num_threads(1)

NETWORKS = [('dip_rt', {}), ('dip', {}), ('hd3_compact', {}), ('hd3', {'cues': True}),
            ('mscsl', {}), ('mscsl', {'variant': 'wosr'})]


def recorded(network: FlowNetwork, width: int, height: int) -> dict[str, Act]:
    return {act.name: act for act in record_acts(network, width=width, height=height)}


def test_dip_rt_has_two_steps_and_one_of_each_other_act() -> None:
    acts = recorded(create('dip_rt'), 180, 100)  # padded to 192x112
    assert list(acts) == ['encode', 'step_16', 'step_8', 'finish']
    image, = acts['encode'].inputs
    assert (image.name, image.shape, image.px_per_cell) == ('image', (1, 3, 112, 192), 1)
    step = acts['step_16']
    assert [spec.name for spec in step.inputs] == ['match_a', 'match_b', 'context', 'hidden',
                                                   'flow']
    assert [spec.name for spec in step.outputs] == ['next_hidden', 'next_flow']
    assert step.inputs[4].shape == (1, 2, 7, 12)
    assert {spec.px_per_cell for spec in step.inputs} == {16}
    assert acts['step_8'].inputs[4].shape == (1, 2, 14, 24)
    assert acts['finish'].outputs[0].shape == (1, 2, 112, 192)
    assert acts['finish'].outputs[0].px_per_cell == 1


def test_dynamic_acts_are_one_for_each_engine_with_all_its_shapes() -> None:
    static = recorded(create('dip'), 320, 160)
    acts = {act.name: act for act in record_acts(create('dip'), width=320, height=160,
                                                 dynamic=True)}
    assert list(acts) == ['encode', 'context', 'step', 'upsample']
    step = acts['step']
    assert {act.name for act in step.variants} == {'step_16', 'step_8', 'step_4'}
    assert step.inputs == static['step_4'].inputs
    assert all(act == static[act.name] for act in step.variants)
    assert [act.name for act in acts['encode'].variants] == ['encode']


@pytest.mark.parametrize(('name', 'options'), NETWORKS)
def test_every_call_of_a_run_is_one_of_the_acts(name: str, options: dict[str, object]) -> None:
    """What is really called, cold and warm, with what it returns; and all acts are called."""
    torch.manual_seed(0)
    network = create(name, None, **options)
    width, height = 180, 100
    acts = {(act.engine, act.signature): act
            for act in record_acts(network, width=width, height=height)}
    assert len({act.name for act in acts.values()}) == len(acts)
    called = set()

    def call(engine: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        act = acts[engine, signature_of(tensors)]
        results = network.engine(engine, *tensors)
        assert signature_of(results) == tuple((spec.shape, spec.dtype) for spec in act.outputs)
        called.add(act.name)
        return results

    images = torch.rand(2, 3, height, width) * 255
    priors = [None] + ([torch.full((1, 2, height, width), 40.0)] if network.accepts_prior else [])
    with torch.no_grad():
        a, b = (network.encode(image[None], call=call) for image in images)
        for prior in priors:
            state = network.start(a, b, prior_flow=prior, iterations=None, call=call)
            while state.schedule:
                state = network.step(state, call=call)
            network.finish(state, call=call)
    missing = {act.name for act in acts.values()} - called
    assert all(name.startswith('upsample') for name in missing), missing  # a smaller budget's


@pytest.mark.parametrize(('name', 'options'), NETWORKS)
def test_tensors_have_names_of_their_own(name: str, options: dict[str, object]) -> None:
    for act in record_acts(create(name, None, **options), width=128, height=128):
        names = [spec.name for spec in (*act.inputs, *act.outputs)]
        assert len(set(names)) == len(names)
        assert not any(word.startswith(('input_', 'output_')) for word in names), act
        assert all(spec.px_per_cell for spec in (*act.inputs, *act.outputs))


def test_nothing_is_computed_and_the_network_is_left_alone() -> None:
    network = create('dip_rt')
    network.train()
    before = {key: (value.data_ptr(), value.device) for key, value in
              network.state_dict().items()}
    record_acts(network, width=1920, height=1080)
    assert network.training
    assert before == {key: (value.data_ptr(), value.device) for key, value in
                      network.state_dict().items()}


class Plain(FlowNetwork):
    """Says no names; one of its tensors does not follow the frame."""

    name = 'plain'
    engines = ('encode',)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def encode_engine(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.conv(image)
        return features, features.mean(dim=(2, 3)), features[..., :7]


def test_what_has_no_name_is_numbered_and_what_is_no_map_has_no_cell() -> None:
    from flow_ros.runtimes.acts import _Recorder
    recorder = _Recorder(Plain())
    results = recorder.call('encode', torch.zeros(1, 3, 16, 24))
    assert [result.shape for result in results] == [(1, 4, 16, 24), (1, 4), (1, 4, 16, 7)]
    act, = recorder.acts.values()
    assert [spec.name for spec in (*act.inputs, *act.outputs)] == [
        'input_0', 'output_0', 'output_1', 'output_2']
    assert [spec.px_per_cell for spec in act.outputs] == [1, None, None]


def test_types_are_those_the_network_computes_in() -> None:
    class Half(Plain):
        def encode_engine(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (self.conv(image.to(self.conv.weight.dtype)),)

    from flow_ros.runtimes.acts import _Recorder
    recorder = _Recorder(Half().half())
    recorder.call('encode', torch.zeros(1, 3, 16, 24))
    act, = recorder.acts.values()
    assert (act.inputs[0].dtype, act.outputs[0].dtype) == (torch.float32, torch.float16)


def test_no_frame_is_an_error() -> None:
    with pytest.raises(ValueError, match='seen 0x480'):
        record_acts(create('dip_rt'), width=0, height=480)
