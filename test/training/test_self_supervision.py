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

"""Lessons of a teacher and what a student is shown, on frames that move as is known."""

import cv2
import numpy as np
import pytest
import torch
from torch import Generator

from flow_ros.networks import create
from flow_ros.ops.sampling import pixel_grid, sample
from flow_ros.training.self_supervision import (
    check_learner,
    confidence_loss,
    Lesson,
    LossWeights,
    make_batch,
    polish,
    predict,
    student_loss,
    teach,
)

CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def moving(index: int, step: tuple[float, float] = (2.5, -1.5),
           size: tuple[int, int] = (80, 112)) -> np.ndarray:
    """Return frame ``index`` of a picture that moves by ``step`` px per frame."""
    random = np.random.default_rng(0)
    large = cv2.resize(random.integers(0, 256, (60, 60, 3), dtype=np.uint8), (240, 240),
                       interpolation=cv2.INTER_CUBIC)
    move = np.float32([[1, 0, index * step[0] - 50], [0, 1, index * step[1] - 50]])
    return cv2.warpAffine(large, move, size[::-1], flags=cv2.INTER_LINEAR)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float()


def lesson(flow: torch.Tensor) -> Lesson:
    """Return a lesson of frames 0 and 1 with this flow, all trusted."""
    everywhere = torch.ones(1, 80, 112, dtype=torch.bool)
    images = [torch.from_numpy(moving(index).transpose(2, 0, 1).copy()) for index in (0, 1)]
    return Lesson(images[0], images[1], flow.half(), everywhere, everywhere, None, None)


def constant(u: float, v: float) -> torch.Tensor:
    return torch.tensor([u, v]).view(2, 1, 1).expand(2, 80, 112)


def test_polish_makes_the_flow_finer() -> None:
    frames = [moving(0), moving(1)]
    greys = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in frames]
    truth = constant(2.5, -1.5)[None]
    rough = truth + 0.6
    finer = polish(tensor(frames[0]), tensor(frames[1]), greys[0], greys[1], rough)
    inside = (..., slice(8, -8), slice(8, -8))
    before, after = ((flow - truth).abs()[inside].mean() for flow in (rough, finer))
    assert float(after) < 0.3 * float(before)


def test_the_teacher_is_trusted_where_it_is_right_and_not_where_things_leave() -> None:
    teacher = create('dip_rt', 'default')
    forward, backward = teach(teacher, moving(0), moving(1), iterations=2)
    assert forward.flow.shape == (2, 80, 112)
    assert forward.flow.dtype == torch.float16
    error = (forward.flow.float() - constant(2.5, -1.5)).abs().sum(0)[forward.trusted[0]]
    assert float(error.mean()) < 0.5
    assert float(forward.trusted[0, 20:60, 20:90].float().mean()) > 0.9
    assert float(forward.trusted[0, :, -2:].float().mean()) < 0.2  # leaves to the right
    assert float((backward.flow.float() + constant(2.5, -1.5)).abs().median()) < 0.5
    assert torch.equal(backward.image1, forward.image2)


def test_crops_and_mirrors_keep_the_truth_right() -> None:
    random = Generator().manual_seed(1)
    batch = make_batch(8 * [lesson(constant(2.5, -1.5))], (48, 64), random, CPU)
    signs = {tuple(flow[:, 0, 0].sign().tolist()) for flow in batch.flow}
    assert len(signs) > 1  # some are mirrored
    points = pixel_grid(48, 64, batch.flow) + batch.flow + batch.offsets[:, :, None, None]
    x, y = points[:, :1], points[:, 1:]
    seen = (x >= 0) & (x <= 111) & (y >= 0) & (y <= 79)
    moved, still = (((sample(batch.clean2, where) - batch.clean1).abs() * seen).mean()
                    for where in (points, points - batch.flow))
    assert float(moved) < 0.25 * float(still)
    assert not torch.equal(batch.seen.image1, batch.clean1)  # the student sees it otherwise


def test_what_is_not_trusted_teaches_nothing() -> None:
    whole = lesson(constant(2.5, -1.5))
    half = Lesson(whole.image1, whole.image2, whole.flow, torch.zeros_like(whole.trusted),
                  whole.visible, None, None)
    batch = make_batch([half], (64, 64), Generator().manual_seed(0), CPU)
    parts = student_loss(create('dip_rt', 'default'), batch, Generator().manual_seed(0),
                         LossWeights(warm=0), most_iterations=2)
    assert float(parts['distillation'].detach()) == 0
    assert float(parts['census'].detach()) > 0
    assert 'confidence' not in parts


def test_points_that_leave_the_crop_are_occluded() -> None:
    still = lesson(constant(-6.0, 0.0))
    seen = torch.zeros(1, 80, 112)
    knows = Lesson(still.image1, still.image2, still.flow, still.trusted, still.visible,
                   seen + 0.9, seen)
    batch = make_batch([knows], (64, 64), Generator().manual_seed(4), CPU)
    assert batch.occlusion is not None
    x = torch.arange(64) + batch.flow[:, :1]
    leaves = (x < 0) | (x > 63)
    assert int(leaves.sum()) == 64 * 6
    assert torch.equal(batch.occlusion == 1, leaves)
    assert batch.seen.occlusion is not None
    assert torch.equal(batch.seen.occlusion, leaves)


def test_the_student_is_as_sure_as_its_teacher_only_where_it_agrees() -> None:
    taught = constant(2.5, -1.5)[None]
    sure = torch.full((1, 1, 80, 112), 0.9)

    def loss(confidence: float, flow: torch.Tensor) -> float:
        return float(confidence_loss(torch.full_like(sure, confidence), flow, sure, taught))

    assert loss(0.9, taught + 1) < min(loss(0.85, taught + 1), loss(0.95, taught + 1))
    assert loss(0.1, taught + 9) < min(loss(0.05, taught + 9), loss(0.9, taught + 9))
    # What leaves the crop (2.5 px to the right, 1.5 px up) counts for nothing.
    at_border, within = sure.clone(), sure.clone()
    at_border[..., -2:], within[..., 40] = 0.01, 0.01
    assert float(confidence_loss(at_border, taught, sure, taught)) == pytest.approx(
        loss(0.9, taught))
    assert float(confidence_loss(within, taught, sure, taught)) > loss(0.9, taught) + 0.01


@pytest.mark.parametrize('warm', [0.0, 1.0])
def test_the_loss_is_lower_for_the_right_motion_and_has_gradients(warm: float) -> None:
    network = create('dip_rt', 'default')
    totals = []
    for flow in (constant(2.5, -1.5), constant(-6.0, 4.0)):
        batch = make_batch(2 * [lesson(flow)], (64, 96), Generator().manual_seed(2), CPU)
        parts = student_loss(network, batch, Generator().manual_seed(3), LossWeights(warm=warm),
                             most_iterations=2)
        totals.append(sum(parts.values()))
    assert float(totals[0].detach()) < 0.5 * float(totals[1].detach())
    totals[0].backward()
    gradients = [value.grad for value in network.parameters() if value.grad is not None]
    assert len(gradients) > 50
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def test_dip_can_be_a_student_too() -> None:
    network = create('dip')
    image = torch.rand(1, 3, 64, 80) * 255
    seen = predict(network, image, image, iterations=1, prior=None)
    assert seen.flow.shape == (1, 2, 64, 80)
    assert len(seen.levels) == 3  # 4 flows of one iteration at two levels, the last apart
    assert seen.confidence is None


def test_a_network_that_cannot_learn_without_labels_is_told_what_can() -> None:
    network = create('hd3', encoder='vgg', context=False, decoder_width=8)
    for refused in (lambda: check_learner(network), lambda: predict(
            network, torch.zeros(1), torch.zeros(1), iterations=1, prior=None)):
        with pytest.raises(ValueError, match='hd3 cannot learn without labels.*finetune --data'):
            refused()
    check_learner(create('dip_rt'))
