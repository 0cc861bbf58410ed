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

"""Convolutions of an OpenVINO model at the points, against torch's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, Tensor
from torch.nn import functional

openvino = pytest.importorskip('openvino')

from openvino import opset14 as ops  # noqa: E402, I100

from flow_ros.runtimes import openvino_convolutions  # noqa: E402
from flow_ros.runtimes.openvino_convolutions import save_products  # noqa: E402

Build = Callable[[Any], Any]


def run(shape: tuple[int, ...], build: Build, *, save: bool) -> tuple[np.ndarray, int]:
    """Return what a model of one input makes of seeded numbers, and how many were changed."""
    given = ops.parameter(list(shape), np.float32)
    model = openvino.Model([build(given)], [given], 'test')
    changed = save_products(model) if save else 0
    compiled = openvino.Core().compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return compiled(values)[0].copy(), changed


def convolution(source: Any, weight: Tensor) -> Any:
    """Return the node of a convolution that keeps the map's size."""
    pads = [side // 2 for side in weight.shape[2:]]
    return ops.convolution(source, ops.constant(weight.numpy()), [1, 1], pads, pads, [1, 1])


def weights(outputs: int, inputs: int, kernel: tuple[int, int], seed: int = 0) -> Tensor:
    """Return seeded filters whose results have about the size of their inputs."""
    torch.manual_seed(seed)
    return nn.init.kaiming_normal_(torch.empty(outputs, inputs, *kernel))


@pytest.mark.parametrize('block_bytes', [1, 30000, 2 ** 22])
@pytest.mark.parametrize('kernel', [(3, 3), (1, 5), (5, 1)])
def test_it_is_the_convolution(kernel: tuple[int, int], block_bytes: int,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_convolutions, 'BLOCK_BYTES', block_bytes)
    monkeypatch.setattr(openvino_convolutions, 'LEAST_CELLS', 1)
    weight = weights(48, 64, kernel)
    shape = (1, 64, 13, 18)  # no whole number of tiles
    found, changed = run(shape, lambda source: convolution(source, weight), save=True)
    assert changed == 1
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(shape))
    expected = functional.conv2d(values, weight.double(),
                                 padding=(kernel[0] // 2, kernel[1] // 2))
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-4)


def test_convolutions_of_one_map_share_what_leads_to_the_points(
        monkeypatch: pytest.MonkeyPatch) -> None:
    def build(source: Any) -> Any:
        first = ops.relu(convolution(source, weights(64, 64, (3, 3))))
        second = convolution(source, weights(32, 64, (3, 3), seed=1))
        return ops.concat([first, second], 1)

    shape = (1, 64, 25, 40)
    plain, _ = run(shape, build, save=False)
    found, changed = run(shape, build, save=True)
    assert changed == 2
    np.testing.assert_allclose(found, plain, atol=1e-4)
    ways = []
    real = openvino_convolutions._to_the_points
    monkeypatch.setattr(openvino_convolutions, '_to_the_points',
                        lambda *given: ways.append(given) or real(*given))
    run(shape, build, save=True)
    assert len(ways) == 1


@pytest.mark.parametrize(('shape', 'channels'), [((1, 64, 20, 40), 64), ((1, 8, 60, 80), 8)])
def test_small_maps_and_few_channels_stay_as_they_are(shape: tuple[int, ...],
                                                      channels: int) -> None:
    weight = weights(channels, channels, (3, 3))
    assert run(shape, lambda source: convolution(source, weight), save=True)[1] == 0
