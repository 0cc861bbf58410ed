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

"""Fine-tuning as a whole at a tiny size, and how its verdict is found."""

import json
import os
from pathlib import Path
import signal
import threading
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from flow_ros.networks import create
from flow_ros.training import finetune
from flow_ros.training.finetune import (
    Comparison,
    FinetuneConfig,
    FineTuner,
    judge,
    Measures,
)
from flow_ros.training.finetune_report import write_report
from flow_ros.training.recording import Recording, RecordingError


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def moving_recording(count: int = 14) -> Recording:
    picture = cv2.resize(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8),
                         (240, 200), interpolation=cv2.INTER_CUBIC)
    return Recording().gather((picture[40:104, 60 + 2 * index:140 + 2 * index], 0.1 * index)
                              for index in range(count))


def test_a_run_leaves_the_teacher_and_the_statistics_alone_and_reports(tmp_path: Path) -> None:
    network = create('dip_rt', 'default')
    before = {key: value.clone() for key, value in network.state_dict().items()}
    tuner = FineTuner(network, moving_recording(), progress=False,
                      config=FinetuneConfig(steps=2, batch=2, teacher_iterations=2))
    assert tuner.crop == (64, 80)
    result = tuner.run()
    assert result.steps == 2
    assert not result.interrupted
    assert result.trusted > 0.5
    assert set(result.losses) == {'distillation', 'census', 'smoothness', 'confidence',
                                  'occlusion'}
    after = tuner.student.state_dict()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed
    assert not {key for key in changed if 'running' in key or key == 'calibration'}
    path = write_report(tuner, result, tmp_path, source='14 frames', started_from='shipped')
    content = json.loads((tmp_path / 'report.json').read_text())
    assert content['verdict'] == result.verdict
    assert len(content['comparisons']) == 3
    assert 0 < content['before']['census'] < 1
    assert 0 < content['after']['consistent'] <= 1
    page = path.read_text()
    assert result.verdict in page
    assert '| mean confidence | 0.' in page
    pictures = sorted(tmp_path.glob('pair_*.png'))
    assert len(pictures) == 3
    assert all(f'({picture.name})' in page for picture in pictures)


def test_the_same_steps_give_the_same_weights() -> None:
    def run() -> dict[str, torch.Tensor]:
        tuner = FineTuner(create('dip_rt', 'default'), moving_recording(10), progress=False,
                          config=FinetuneConfig(steps=1, batch=1, teacher_iterations=1, seed=3))
        tuner.run()
        return tuner.student.state_dict()

    first, second = run(), run()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_ctrl_c_ends_early_with_a_result() -> None:
    tuner = FineTuner(create('dip_rt', 'default'), moving_recording(10), progress=False,
                      config=FinetuneConfig(minutes=30.0, batch=1, teacher_iterations=1))
    handler = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    result = tuner.run()
    assert result.interrupted
    assert result.minutes < 5
    assert len(result.comparisons) == 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_teacher_that_is_sure_of_nothing_has_nothing_to_teach() -> None:
    random = np.random.default_rng(0)
    unrelated = Recording().gather((random.integers(0, 256, (64, 80, 3), dtype=np.uint8),
                                    0.1 * index) for index in range(10))
    network = create('dip_rt', 'default')
    with torch.no_grad():
        # Sure of nothing: the wide component alone, 400 px wide.
        network.quality.bias.copy_(torch.tensor([-50.0, 50.0, 0.0]))
    tuner = FineTuner(network, unrelated, progress=False, config=FinetuneConfig(steps=1))
    with pytest.raises(RecordingError, match='nothing to learn from'):
        tuner.run()


def rows(census: list[float], consistent: list[float]) -> tuple[Comparison, ...]:
    """Return comparisons from 0.4 and 0.9 to these values."""
    return tuple(Comparison(index, Measures(0.4, 0.9, 0.2, 0.9, 3.0),
                            Measures(error, agreement, 0.2, 0.9, 3.0))
                 for index, (error, agreement) in enumerate(zip(census, consistent)))


@pytest.mark.parametrize(('census', 'consistent', 'verdict'), [
    ([0.38, 0.37, 0.38, 0.39], [0.9, 0.9, 0.9, 0.91], 'helped'),
    ([0.4, 0.4, 0.4, 0.4], [0.95, 0.94, 0.95, 0.95], 'helped'),
    ([0.38, 0.37], [0.9, 0.9], 'made no difference'),  # two pairs: may well be chance
    ([0.38], [0.95], 'made no difference'),
    # What agrees with itself alone, as flow of zero does, or what fits alone, is no help.
    ([0.4, 0.45, 0.38, 0.42], [0.95, 0.94, 0.95, 0.95], 'made no difference'),
    ([0.38, 0.37, 0.38, 0.39], [0.8, 0.98, 0.75, 0.9], 'made no difference'),
    ([float('nan'), 0.3, 0.3, 0.3], [0.9, 0.9, 0.9, 0.9], 'made it worse'),
    ([0.3999, 0.4001, 0.4], [0.9, 0.9, 0.9], 'made no difference'),
    ([0.3, 0.4, 0.48], [0.9, 0.9, 0.9], 'made no difference'),  # better and worse: noise
    ([0.42, 0.43, 0.42, 0.42], [0.9, 0.9, 0.9, 0.9], 'made it worse'),
    ([0.38, 0.37, 0.39], [0.8, 0.82, 0.81], 'made it worse'),  # fits, but inconsistently
])
def test_verdict(census: list[float], consistent: list[float], verdict: str) -> None:
    seen, reason = judge(rows(census, consistent))
    assert seen == verdict
    assert 'photometric error' in reason


def test_a_robot_that_stands_still_is_told_to_move() -> None:
    still = Measures(0.4, 1.0, 0.0, 0.9, 0.05)
    verdict, reason = judge((Comparison(0, still, still), Comparison(1, still, still)))
    assert verdict == 'made no difference'
    assert 'record it moving' in reason
    assert 'moving' not in judge(rows([0.4, 0.4], [0.9, 0.9]))[1]
    # Even where the numbers rise: what was measured says nothing of motion.
    better = Measures(0.38, 1.0, 0.0, 0.9, 0.05)
    verdict, reason = judge(tuple(Comparison(index, still, better) for index in range(9)))
    assert verdict == 'made no difference'
    assert '-5.0 %' in reason


def test_ctrl_c_while_measuring_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = finetune.compare

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(finetune, 'compare', measure)  # once
        return measure(*arguments)

    monkeypatch.setattr(finetune, 'compare', interrupted)
    tuner = FineTuner(create('dip_rt', 'default'), moving_recording(10), progress=False,
                      config=FinetuneConfig(steps=1, batch=1, teacher_iterations=1))
    result = tuner.run()
    assert len(result.comparisons) == 2
    assert not result.interrupted  # the learning was complete
