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

"""Learning from frames without labels: a teacher's checked flow, and the frames themselves.

A *lesson* is one pair in one direction with what the teacher (the weights before) says of it:
run with many iterations, on the whole clean frames, in both directions. Its flow is polished
by OpenCV's inverse search begun from it, which is finer where motion is slow; a pixel takes the
polished flow only where the two frames then agree better. What both directions confirm and the
teacher is confident of becomes pseudo truth.

The student sees crops with other light, colour and noise, takes fewer iterations, and learns
 - the pseudo truth (DIP's sequence loss: distillation, IOFPL section 3.4),
 - to make the frames agree where they can: census loss on the clean frames, visible pixels
   only, the whole second frame in reach of the crop (as in SMURF), and edge-aware smoothness,
 - the teacher's confidence, so far as its own flow is the teacher's, and occlusion: so that the
   calibration is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
import torch
from torch import Generator, Tensor
from torch.nn import functional

from flow_ros.networks.base import FlowNetwork
from flow_ros.networks.dip import DIP
from flow_ros.networks.dip_rt import DipRt, error_probability
from flow_ros.ops.sampling import inside, warp
from flow_ros.synthetic.camera import CameraConfig, develop
from flow_ros.training.augment import Batch, degraded_prior
from flow_ros.training.distillation import pseudo_truth
from flow_ros.training.losses import occlusion_loss, sequence_loss
from flow_ros.training.unsupervised import (
    census,
    census_distance,
    census_loss,
    smoothness_loss,
    visible_by_consistency,
)

STUDENT_CAMERA = CameraConfig(motion_blur=0, rolling_shutter=0, light=0.8, defocus=0.2,
                              vignetting=0.15, dirt=0.03, rain=0.02, bayer=0, noise=0.4,
                              grey=0.1, jpeg=0.15)
"""What is done to the crops that the student sees; they are a camera's pictures already."""


@dataclass(frozen=True)
class LossWeights:
    """What counts how much in the student's loss."""

    distillation: float = 0.3
    """Of the sequence loss against the pseudo truth, px."""
    census: float = 1.0
    smoothness: float = 0.05
    confidence: float = 0.1
    occlusion: float = 0.1
    gamma: float = 0.8
    warm: float = 0.25
    """Share of steps that start from a degraded flow, as a stream's warm starts do."""


@dataclass(frozen=True)
class Lesson:
    """One pair in one direction, on the CPU: images uint8 (3, H, W), flow float16 (2, H, W) px.

    ``trusted``, ``visible`` bool (1, H, W); ``confidence`` and ``occlusion`` float16 (1, H, W)
    in [0, 1], those of the teacher, or None where the network does not know them.
    """

    image1: Tensor
    image2: Tensor
    flow: Tensor
    trusted: Tensor
    visible: Tensor
    confidence: Tensor | None
    occlusion: Tensor | None

    @property
    def nbytes(self) -> int:
        """How much memory it takes, the images (shared by two lessons) half."""
        own = (self.flow, self.trusted, self.visible, self.confidence, self.occlusion)
        return self.image1.nbytes + sum(value.nbytes for value in own if value is not None)


@dataclass(frozen=True)
class Direction:
    """What a network says of a pair in one direction: (1, C, H, W), px and [0, 1]."""

    flow: Tensor
    confidence: Tensor | None
    occlusion: Tensor | None


@torch.no_grad()
def both_directions(network: FlowNetwork, image1: Tensor, image2: Tensor,
                    iterations: int | None = None) -> tuple[Direction, Direction]:
    """Run ``network`` cold from 1 to 2 and from 2 to 1, each frame encoded once."""
    features = [network.encode(image) for image in (image1, image2)]
    results = []
    for a, b in ((0, 1), (1, 0)):
        state = network.start(features[a], features[b], iterations=iterations)
        while state.schedule:
            state = network.step(state)
        output = network.finish(state)
        results.append(Direction(output.flow.float(), output.confidence, output.occlusion))
    return results[0], results[1]


def to_tensor(image: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) -> (3, H, W), uint8."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


@torch.no_grad()
def teach(teacher: FlowNetwork, frame1: NDArray[np.uint8], frame2: NDArray[np.uint8], *,
          iterations: int, least_confidence: float = 0.5, polished: bool = True
          ) -> tuple[Lesson, Lesson]:
    """Return the lessons of a pair, forward and backward."""
    device = next(teacher.parameters()).device
    images = [to_tensor(frame) for frame in (frame1, frame2)]
    inputs = [image[None].to(device, torch.float32) for image in images]
    ways = both_directions(teacher, inputs[0], inputs[1], iterations)
    flows = [way.flow for way in ways]
    if polished:
        greys = [np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
                 for frame in (frame1, frame2)]
        flows = [polish(inputs[a], inputs[b], greys[a], greys[b], flow)
                 for a, b, flow in ((0, 1, flows[0]), (1, 0, flows[1]))]
    lessons = []
    for a, b, way in ((0, 1, ways[0]), (1, 0, ways[1])):
        truth = pseudo_truth(flows[a], flows[b], way.confidence,
                             least_confidence=least_confidence)
        lessons.append(Lesson(
            image1=images[a], image2=images[b], flow=flows[a][0].half().cpu(),
            trusted=torch.isfinite(truth[0, :1]).cpu(),
            visible=visible_by_consistency(flows[a], flows[b])[0].cpu(),
            confidence=None if way.confidence is None else way.confidence[0].half().cpu(),
            occlusion=None if way.occlusion is None else way.occlusion[0].half().cpu()))
    return lessons[0], lessons[1]


def polish(image1: Tensor, image2: Tensor, grey1: NDArray[np.uint8], grey2: NDArray[np.uint8],
           flow: Tensor) -> Tensor:
    """Return ``flow`` (1, 2, H, W), finer where OpenCV's inverse search from it fits better.

    Inverse search knows no learned features, so it strays where a network does not; a pixel
    is taken from it only if the census distance, averaged over 5x5 pixels, falls.
    """
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    start = np.ascontiguousarray(flow[0].permute(1, 2, 0).float().cpu().numpy())
    found = search.calc(grey1, grey2, start.copy())
    finer = torch.from_numpy(np.ascontiguousarray(found.transpose(2, 0, 1)))[None].to(flow)
    first = census(image1)

    def misfit(candidate: Tensor) -> Tensor:
        cost = census_distance(first, census(warp(image2, candidate)))
        return functional.avg_pool2d(functional.pad(cost, (2,) * 4, mode='replicate'), 5, 1)

    return torch.where(misfit(finer) < misfit(flow), finer, flow)


@dataclass(frozen=True)
class LessonBatch:
    """Crops for the student: ``seen`` as it sees them, ``clean`` as they are.

    ``seen.flow`` is the pseudo truth, NaN where not trusted. ``clean1`` (B, 3, h, w) is a crop,
    ``clean2`` (B, 3, H, W) whole; sample i's crop begins at ``offsets[i]`` (x, y) of it.
    ``occlusion`` is 1 where the point leaves the crop, for the student sees no more of it.
    """

    seen: Batch
    flow: Tensor
    clean1: Tensor
    clean2: Tensor
    offsets: Tensor
    visible: Tensor
    confidence: Tensor | None
    occlusion: Tensor | None


def make_batch(lessons: Sequence[Lesson], crop: tuple[int, int], random: Generator,
               device: torch.device) -> LessonBatch:
    """Cut a random crop out of each lesson, some mirrored, and change light and colour."""
    parts: dict[str, list[Tensor]] = {}
    offsets = []
    for lesson in lessons:
        maps = {'image1': lesson.image1, 'image2': lesson.image2, 'flow': lesson.flow.float(),
                'trusted': lesson.trusted, 'visible': lesson.visible}
        for name, known in (('confidence', lesson.confidence), ('occlusion', lesson.occlusion)):
            if known is not None:
                maps[name] = known.float()
        for dim, component, chance in ((-1, 0, 0.5), (-2, 1, 0.15)):
            if float(torch.rand(1, generator=random)) < chance:
                maps = {name: values.flip(dim) for name, values in maps.items()}
                maps['flow'][component] *= -1
        height, width = lesson.image1.shape[-2:]
        top = int(torch.randint(0, height - crop[0] + 1, (1,), generator=random))
        left = int(torch.randint(0, width - crop[1] + 1, (1,), generator=random))
        offsets.append([left, top])
        window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
        parts.setdefault('whole', []).append(maps['image2'])
        for name, values in maps.items():
            parts.setdefault(name, []).append(values[window])
    stacked = {name: torch.stack(values).to(device) for name, values in parts.items()}
    clean1, clean2 = stacked['image1'].float(), stacked['whole'].float()
    flow = stacked['flow']
    truth = torch.where(stacked['trusted'], flow, torch.nan)
    image1, image2 = develop([clean1, stacked['image2'].float()], STUDENT_CAMERA, random)
    gone = ~inside(flow)
    seen = Batch(image1, image2, truth, ~stacked['visible'] | gone)
    occlusion = stacked.get('occlusion')
    return LessonBatch(seen=seen, flow=flow, clean1=clean1, clean2=clean2,
                       offsets=torch.tensor(offsets, dtype=torch.float32, device=device),
                       visible=stacked['visible'], confidence=stacked.get('confidence'),
                       occlusion=(None if occlusion is None
                                  else torch.where(gone, 1.0, occlusion)))


@dataclass(frozen=True)
class Seen:
    """What the student predicts: see ``dip_rt.Predictions``; None what it does not know."""

    levels: list[tuple[int, Tensor]]
    flow: Tensor
    confidence: Tensor | None = None
    occlusion_logit: Tensor | None = None


def predict(network: FlowNetwork, image1: Tensor, image2: Tensor, *, iterations: int,
            prior: Tensor | None) -> Seen:
    """Run ``network`` with gradients, from ``prior`` (B, 2, H, W) px where there is one."""
    if isinstance(network, DipRt):
        slow = prior is not None and (float(prior.abs().amax(dim=(1, 2, 3)).median())
                                      < network.config.warm_level_px)
        raw = network.predictions(image1, image2, steps16=0 if slow else iterations,
                                  steps8=iterations, prior_flow=prior)
        flow = raw.flow.float()
        likely = error_probability(flow.detach(), raw.error.float()).clamp(1e-4, 1 - 1e-4)
        scale, shift = network.calibration.unbind()
        return Seen(levels=[(level, values.float()) for level, values in raw.levels], flow=flow,
                    confidence=torch.sigmoid(scale * torch.logit(likely) + shift),
                    occlusion_logit=raw.occlusion.float())
    if isinstance(network, DIP):
        flows = network.predictions(image1, image2, iterations=iterations, prior_flow=prior)
        return Seen(levels=[(1, values.float()) for values in flows[:-1]],
                    flow=flows[-1].float())
    raise ValueError(_unknown_learner(network))


def check_learner(network: FlowNetwork) -> None:
    """Raise ValueError unless ``network`` can learn without labels."""
    if not isinstance(network, (DipRt, DIP)):
        raise ValueError(_unknown_learner(network))


def _unknown_learner(network: FlowNetwork) -> str:
    return (f'{network.name} cannot learn without labels yet; dip_rt and dip can. With labels '
            f'it can: flow_ros finetune --data NAME:ROOT, or flow_ros train')


def confidence_loss(confidence: Tensor, flow: Tensor, taught_confidence: Tensor,
                    taught_flow: Tensor) -> Tensor:
    """Return the cross entropy of the student's confidence, of the points that stay in the crop.

    Where the student's flow is the teacher's, by max(3 px, 5 %), it is right as often as the
    teacher, with the probability c; where it is another, no more often than the teacher is
    wrong: min(c, 1 - c). The teacher saw the whole clean frames and took more iterations: to
    be as sure as it is would spoil the calibration.
    """
    def length(vectors: Tensor) -> Tensor:
        return torch.hypot(vectors[:, :1], vectors[:, 1:])

    sure = taught_confidence.clamp(0, 1)
    same = length(flow.detach() - taught_flow) < (0.05 * length(taught_flow)).clamp(min=3.0)
    target = torch.where(same, sure, torch.minimum(sure, 1 - sure))
    stays = inside(taught_flow)
    entropy = functional.binary_cross_entropy(confidence.clamp(1e-4, 1 - 1e-4), target,
                                              reduction='none')
    return (entropy * stays).sum() / stays.sum().clamp(min=1)


def student_loss(network: FlowNetwork, batch: LessonBatch, random: Generator,
                 weights: LossWeights, *, most_iterations: int) -> dict[str, Tensor]:
    """Return the parts of the student's loss, each with its weight in it."""
    fewest = max(1, most_iterations // 2)
    iterations = int(torch.randint(fewest, most_iterations + 1, (1,), generator=random))
    prior = None
    if float(torch.rand(1, generator=random)) < weights.warm:
        prior = degraded_prior(batch.flow, random)
        iterations = fewest
    device = batch.flow.device
    with torch.autocast(device.type, torch.bfloat16):
        seen = predict(network, batch.seen.image1, batch.seen.image2, iterations=iterations,
                       prior=prior)
    parts = {
        'distillation': weights.distillation * sequence_loss(seen.levels, seen.flow,
                                                             batch.seen.flow, weights.gamma),
        'census': weights.census * census_loss(batch.clean1, batch.clean2, seen.flow,
                                               batch.visible, offset=batch.offsets),
        'smoothness': weights.smoothness * smoothness_loss(seen.flow, batch.clean1, order=2)}
    if seen.confidence is not None and batch.confidence is not None:
        parts['confidence'] = weights.confidence * confidence_loss(
            seen.confidence, seen.flow, batch.confidence, batch.flow)
    if seen.occlusion_logit is not None and batch.occlusion is not None:
        parts['occlusion'] = weights.occlusion * occlusion_loss(seen.occlusion_logit,
                                                                batch.occlusion.clamp(0, 1))
    return parts
