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

"""The fast forms of the shipped networks beside plain slow ones, with the shipped weights.

The plain forms are the equations, operation by operation: every convolution on its whole input,
batch norms on maps, one shift, seed and neighbour at a time.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros.networks import create
from flow_ros.networks.base import FlowNetwork, FlowOutput
from flow_ros.networks.dip_rt import ConvNorm, DipRt, error_probability
from flow_ros.ops import cost_volume
from flow_ros.ops.matching import SEEDS
from flow_ros.ops.sampling import pixel_grid
from flow_ros.runtimes import create_runtime
from flow_ros.runtimes.reference import reference_pair

torch.set_num_threads(1)
CLOSE = 1e-3
"""Px of the flow, and of probabilities: what the fast forms may differ by."""


def plain_sample(image: Tensor, points: Tensor) -> Tensor:
    """Bilinear, border replicated, from four integer neighbours."""
    height, width = image.shape[-2:]
    x, y = points[0, 0].clamp(0, width - 1), points[0, 1].clamp(0, height - 1)
    left, upper = x.floor().long(), y.floor().long()
    right, lower = (left + 1).clamp(max=width - 1), (upper + 1).clamp(max=height - 1)
    u, v = x - left, y - upper
    return ((1 - u) * (1 - v) * image[..., upper, left] + u * (1 - v) * image[..., upper, right]
            + (1 - u) * v * image[..., lower, left] + u * v * image[..., lower, right])


def plain_search(a: Tensor, b: Tensor, radius: int) -> Tensor:
    height, width = a.shape[-2:]
    padded = functional.pad(b, (radius,) * 4)
    shifts = range(2 * radius + 1)
    return torch.stack([(a * padded[:, :, dy:dy + height, dx:dx + width]).mean(dim=1)
                        for dy in shifts for dx in shifts], dim=1)


def plain_upsample(values: Tensor, mask: Tensor, factor: int) -> Tensor:
    batch, channels, height, width = values.shape
    weights = mask.view(batch, 1, 9, factor, factor, height, width).softmax(dim=2)
    near = functional.unfold(values, 3, padding=1)
    near = near.view(batch, channels, 9, 1, 1, height, width)
    fine = (weights * near).sum(dim=2)  # (B, C, sy, sx, H, W)
    return fine.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels, factor * height,
                                                  factor * width)


def plain_norm(module: ConvNorm, x: Tensor) -> Tensor:
    return module[1](module[0](x))


class PlainDipRt(DipRt):
    """The same weights, plainly."""

    def encode_engine(self, image: Tensor) -> tuple[Tensor, ...]:
        encoder = self.encoder
        x = functional.relu(encoder.stem(image * (2 / 255) - 1))
        x8 = encoder.layer8(encoder.layer4(functional.relu(encoder.down4(x))))
        x16 = encoder.layer16(x8)
        x8 = functional.relu(x8 + functional.interpolate(
            encoder.lateral(x16), scale_factor=2, mode='bilinear', align_corners=False))
        outputs = []
        for x, head in ((x16, encoder.head16), (x8, encoder.head8)):
            match, hidden, context = head(x).split(encoder.splits, dim=1)
            outputs += [match, torch.tanh(hidden), context]
        return tuple(outputs)

    def step_engine(self, match_a: Tensor, match_b: Tensor, context: Tensor, hidden: Tensor,
                    flow: Tensor) -> tuple[Tensor, Tensor]:
        height, width = flow.shape[-2:]
        scale, grid = self.config.match ** 0.5, pixel_grid(height, width, flow)
        costs = torch.cat([(match_a * plain_sample(match_b, grid + flow + torch.tensor(
            [float(dx), float(dy)]).view(1, 2, 1, 1))).mean(dim=1, keepdim=True)
            for dx, dy in SEEDS], dim=1) * scale
        part = self.propagation
        assert part is not None
        flow = flow + part.flow(functional.relu(part.conv(torch.cat([hidden, costs, flow], 1))))
        costs = plain_search(match_a, plain_sample(match_b, grid + flow),
                             self.config.radius) * scale
        part = self.search
        costs = functional.relu(part.costs(costs))
        displacement = functional.relu(part.displacement(flow))
        motion = functional.relu(part.motion(torch.cat([costs, displacement], dim=1)))
        x = functional.relu(part.mix(torch.cat([hidden, motion], dim=1)) + context)
        gate = torch.sigmoid(part.gate(x))
        hidden = hidden + gate * (torch.tanh(part.candidate(x)) - hidden)
        return hidden, flow + part.flow(hidden)

    def finish_engine(self, hidden: Tensor, flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = functional.relu(self.fine(hidden))
        fine = plain_upsample(torch.cat([8 * flow, self.quality(x)], dim=1), self.mask(x), 8)
        raw = error_probability(fine[:, :2], fine[:, 2:4]).clamp(1e-4, 1 - 1e-4)
        scale, shift = self.calibration
        return (fine[:, :2], torch.sigmoid(scale * torch.logit(raw) + shift),
                torch.sigmoid(fine[:, 4:]))


def outputs(network: FlowNetwork, size: tuple[int, int], runtime: str = '') -> list[FlowOutput]:
    """Cold and, where there is a warm start, warm, of the shipped pair."""
    image1, image2, prior = reference_pair(*size)
    made = create_runtime(runtime, network, threads=1) if runtime else None
    call = made.call if made else None
    found = []
    with torch.no_grad():
        features = [network.encode(image, call=call) for image in (image1, image2)]
        for flow in ([None, prior] if network.accepts_prior else [None]):
            state = network.start(*features, prior_flow=flow, iterations=2, call=call)
            while state.schedule:
                state = network.step(state, call=call)
            found.append(network.finish(state, call=call))
    return found


def check_close(found: list[FlowOutput], wanted: list[FlowOutput]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert float(other.flow.std()) > 0.5
        assert float((one.flow - other.flow).abs().max()) < CLOSE
        for name in ('confidence', 'occlusion'):
            values, plain = getattr(one, name), getattr(other, name)
            assert (values is None) == (plain is None)
            if values is not None:
                assert float((values - plain).abs().max()) < CLOSE


@pytest.mark.parametrize('runtime', ['', 'torch', 'openvino'])
@pytest.mark.parametrize('size', [(160, 128), (150, 92)])
def test_dip_rt_is_what_it_is_plainly(runtime: str, size: tuple[int, int],
                                      monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    if runtime == 'openvino':
        pytest.importorskip('openvino', reason='OpenVINO is not installed')
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path))
    network = create('dip_rt', 'default')
    plain = PlainDipRt(network.config).eval()
    plain.load_state_dict(network.state_dict())
    with monkeypatch.context() as patched:
        patched.setattr(ConvNorm, 'forward', plain_norm)
        wanted = outputs(plain, size)
    check_close(outputs(network, size, runtime), wanted)


@pytest.mark.parametrize('runtime', ['torch', 'openvino'])
@pytest.mark.parametrize('name', ['hd3_compact', 'mscsl'])
def test_hd3_and_mscsl_are_what_they_are_plainly(name: str, runtime: str,
                                                 monkeypatch: pytest.MonkeyPatch,
                                                 tmp_path) -> None:
    if runtime == 'openvino':
        pytest.importorskip('openvino', reason='OpenVINO is not installed')
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path))
    size = (192, 128)
    with monkeypatch.context() as patched:
        patched.setattr('flow_ros.networks.mscsl.local_search', plain_search)
        patched.setattr(cost_volume, 'local_search', plain_search)
        wanted = outputs(create(name, 'default'), size)
    check_close(outputs(create(name, 'default'), size, runtime), wanted)
