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

"""A small real flow network without weights: block matching at 1/16, then at 1/8."""

from dataclasses import replace

import torch
from torch.nn import functional

from flow_ros.networks.base import (
    check_prior,
    Features,
    FlowNetwork,
    FlowOutput,
    State,
    Step,
)
from flow_ros.ops.sampling import pad_to_multiple, resize_flow, warp


class BlockMatching(FlowNetwork):
    """Finds shifts of whole cells around the flow it has; with or without heads."""

    name = 'block_matching'
    default_iterations = 2

    def __init__(self, *, radius=3, heads=False):
        super().__init__()
        self.radius = radius
        self.heads = heads
        self.encoded = 0
        self.priors = []

    def encode(self, image, *, call=None):
        self.encoded += 1
        tensors = (call or self.engine)('encode', pad_to_multiple(image, 16))
        return Features(tensors=tensors, size=(image.shape[-2], image.shape[-1]))

    def start(self, features_a, features_b, *, prior_flow=None, iterations=None, call=None):
        count = self.default_iterations if iterations is None else iterations
        if prior_flow is not None:
            prior_flow = check_prior(prior_flow, features_a).full
        self.priors.append(prior_flow)
        levels = (16, 8) if prior_flow is None else (8,)
        coarse = features_a.tensors[0 if prior_flow is None else 1]
        flow = coarse.new_zeros((1, 2, *coarse.shape[-2:]))
        if prior_flow is not None:
            flow = resize_flow(pad_to_multiple(prior_flow, 16), tuple(coarse.shape[-2:]))
        return State(features_a, features_b, level=levels[0], flow=flow,
                     schedule=tuple(Step(level) for level in levels for _ in range(count)),
                     warm=prior_flow is not None)

    def step(self, state, *, call=None):
        level = state.schedule[0].level
        if level != state.level:
            size = tuple(state.features_a.tensors[1].shape[-2:])
            state = replace(state, level=level, flow=resize_flow(state.flow, size))
        index = 0 if level == 16 else 1
        flow, = (call or self.engine)('step', state.features_a.tensors[index],
                                      state.features_b.tensors[index], state.flow)
        return state.advanced(flow=flow)

    def finish(self, state, *, call=None):
        height, width = state.features_a.size
        flow, = (call or self.engine)('finish', state.flow)
        scale = (-(-height // 16) * 16) // flow.shape[-2]
        if scale > 1:
            flow = resize_flow(flow, (flow.shape[-2] * scale, flow.shape[-1] * scale))
        flow = flow[..., :height, :width]
        known = torch.full_like(flow[:, :1], 0.75) if self.heads else None
        return FlowOutput(flow=flow, confidence=known,
                          occlusion=None if known is None else 1 - known)

    def encode_engine(self, image):
        eighth = functional.avg_pool2d(image.mean(dim=1, keepdim=True) / 255, 8)
        return functional.avg_pool2d(eighth, 2), eighth

    def step_engine(self, a, b, flow):
        span = range(-self.radius, self.radius + 1)
        shifts = [(x, y) for y in span for x in span]
        offsets = flow.new_tensor(shifts).view(-1, 2, 1, 1)
        costs = torch.cat([(warp(b, flow + offset) - a).abs() for offset in offsets], dim=1)
        costs = functional.avg_pool2d(costs, 5, 1, 2)
        costs = costs + 1e-5 * offsets.square().sum(dim=1).view(1, -1, 1, 1)  # prefer to stay
        return (flow + offsets[costs.argmin(dim=1)[0]][..., 0, 0].permute(2, 0, 1)[None],)

    def finish_engine(self, flow):
        size = (flow.shape[-2] * 8, flow.shape[-1] * 8)
        return (resize_flow(flow, size),)
