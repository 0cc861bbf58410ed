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

import math
import os
from pathlib import Path
import threading
import time

from block_matching import BlockMatching
import cv2
import numpy as np
import pytest
import torch

from flow_ros.networks import create
from flow_ros.runtimes import EngineFault
from flow_ros.streaming import Budget, FlowEstimator

torch.set_num_threads(1)

DT = 1 / 16  # sums of it are exact


def texture(seed, height=160, width=400):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3))
    return cv2.resize(noise.astype(np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def pan(k, *, speed=8, seed=0, width=240):
    """Return frame k of a camera that pans right: the picture moves by -speed."""
    return np.ascontiguousarray(texture(seed)[:, k * speed:k * speed + width])


def estimator(**options):
    options = {'network': BlockMatching(), 'runtime': 'torch', 'device': 'cpu',
               'outputs': {'flow'}, 'early_stop_px': 0.0, **options}
    return FlowEstimator(**options)


def middle(flow):
    return np.median(flow[32:-32, 48:-48].reshape(-1, 2), axis=0).tolist()


def test_a_stream_cold_then_warm():
    flow = estimator()
    assert flow(pan(0), 0.0) is None
    assert flow.none_reason == 'first'
    first, second, third = (flow(pan(k), k * DT) for k in (1, 2, 3))
    assert flow.none_reason == ''
    assert (first.warm, first.cold_reason) == (False, 'first')
    assert [step.level for step in first.steps] == [16, 16, 8, 8]
    assert first.iterations == 4
    for result in (second, third):
        assert (result.warm, result.cold_reason) == (True, '')
        assert [step.level for step in result.steps] == [8, 8]
    for k, result in enumerate((first, second, third)):
        assert result.flow.shape == (160, 240, 2)
        assert result.flow.dtype == np.float32
        assert result.flow.flags.c_contiguous
        assert middle(result.flow) == pytest.approx([-8, 0], abs=1)
        assert (result.stamp_previous, result.stamp, result.dt_s) == (k * DT, (k + 1) * DT, DT)
        assert result.direction == 'forward'
        assert result.confidence is result.occlusion is result.backward is None
    assert flow.network.encoded == 4  # each frame once


def test_timings_name_each_act_and_add_up():
    flow = estimator()
    results = [flow(pan(k), k * DT) for k in range(3)]
    timings = results[2].timings_ms
    assert set(timings) == {'encode', 'warm_start', 'steps', 'finish', 'output', 'total'}
    assert all(value > 0 for value in timings.values())
    parts = sum(value for name, value in timings.items() if name != 'total')
    assert parts == pytest.approx(timings['total'], rel=0.05)


def test_the_prior_is_the_flow_carried():
    flow = estimator()
    for k in range(3):
        flow(pan(k), k * DT)
    prior = flow.network.priors[-1]
    assert middle(prior[0].permute(1, 2, 0).numpy()) == pytest.approx([-8, 0], abs=1)


def test_a_dropped_frame_scales_the_prior_by_time():
    flow = estimator()
    for k in (0, 1, 3):
        result = flow(pan(k), k * DT)
    prior = flow.network.priors[-1]
    assert middle(prior[0].permute(1, 2, 0).numpy()) == pytest.approx([-16, 0], abs=2)
    assert result.warm
    assert middle(result.flow) == pytest.approx([-16, 0], abs=1)
    assert result.dt_s == 2 * DT


def test_backward_flow_is_on_the_new_grid_and_points_back():
    flow = estimator(direction='backward')
    results = [flow(pan(k), k * DT) for k in range(3)]
    assert results[2].warm
    assert results[2].direction == 'backward'
    assert (results[2].stamp_previous, results[2].stamp) == (DT, 2 * DT)
    assert middle(results[2].flow) == pytest.approx([8, 0], abs=1)


def test_both_directions_share_the_features():
    flow = estimator(direction='both')
    results = [flow(pan(k), k * DT) for k in range(3)]
    assert flow.network.encoded == 3
    for result in results[1:]:
        assert (result.direction, result.backward.direction) == ('forward', 'backward')
        assert middle(result.flow) == pytest.approx([-8, 0], abs=1)
        assert middle(result.backward.flow) == pytest.approx([8, 0], abs=1)
        assert result.backward.backward is None
    assert results[2].warm and results[2].backward.warm


def test_each_direction_equals_the_one_asked_for_alone():
    both, forward, backward = (estimator(direction=way) for way in
                               ('both', 'forward', 'backward'))
    for k in range(4):
        results = [flow(pan(k), k * DT) for flow in (both, forward, backward)]
    assert np.array_equal(results[0].flow, results[1].flow)
    assert np.array_equal(results[0].backward.flow, results[2].flow)


def crossing(k):
    """Return a frame with a square that moves right by 32 px before a still background."""
    frame = texture(1, height=320, width=480)
    frame[96:224, 96 + 32 * k:224 + 32 * k] = texture(2)[:128, :128]
    return frame


def test_without_heads_both_directions_give_occlusion_and_confidence():
    flow = estimator(outputs={'flow', 'occlusion', 'confidence'})
    results = [flow(crossing(k), k * DT) for k in range(3)]
    result = results[2]
    assert result.direction == 'forward'
    assert result.backward is None
    assert 'check' in result.timings_ms
    assert result.warm
    assert len(flow.network.priors) == 4  # two directions for each of two pairs
    assert flow.network.priors[3] is not None  # the check is warm too
    assert result.occlusion.dtype == np.uint8
    assert set(np.unique(result.occlusion)) == {0, 255}
    assert result.occlusion_probability is None
    # The square goes from 128..255 to 160..287 and covers 256..287.
    covered, square, still = (result.occlusion[112:208, slice(*columns)].mean() / 255
                              for columns in ((260, 284), (180, 236), (340, 460)))
    assert covered > 0.6
    assert square < 0.1
    assert still < 0.1
    assert result.confidence.dtype == np.float32
    assert result.confidence[112:208, 180:236].mean() > 0.8
    assert result.confidence[112:208, 260:284].mean() < 0.3


def test_only_what_is_asked_for_is_computed():
    flow = estimator(outputs={'flow', 'occlusion'})
    flow(pan(0), 0.0)
    result = flow(pan(1), DT)
    assert result.confidence is None
    assert result.occlusion is not None
    flow.outputs = {'flow'}
    result = flow(pan(2), 2 * DT)
    assert result.occlusion is None
    assert 'check' not in result.timings_ms
    assert len(flow.network.priors) == 3


def test_heads_are_used_where_the_network_has_them():
    flow = estimator(network=BlockMatching(heads=True), outputs={'confidence', 'occlusion'})
    flow(pan(0), 0.0)
    result = flow(pan(1), DT)
    assert 'check' not in result.timings_ms
    assert (result.confidence == 0.75).all()
    assert (result.occlusion == 0).all()
    assert (result.occlusion_probability == 0.25).all()


def test_what_starts_the_stream_again():
    flow = estimator()
    flow(pan(0), 1.0)
    flow(pan(1), 1.0 + DT)
    for k, (stamp, frame, reason) in enumerate([
            (0.5, pan(2), 'stamp went back'),
            (1.25, pan(4), 'gap'),
            (1.25 + DT, pan(6, width=224), 'size changed')]):
        assert flow(frame, stamp) is None, k
        assert flow.none_reason == reason
        width = frame.shape[1]
        result = flow(pan(2 * k + 3, width=width), stamp + DT)
        assert (result.warm, result.cold_reason) == (False, reason)
        assert result.stamp_previous == stamp
        stamp += DT
    assert flow(pan(8, width=224), stamp + DT).warm
    flow.reset()
    assert flow(pan(9, width=224), stamp + 2 * DT) is None
    assert flow.none_reason == 'first'


def test_the_longest_gap_is_still_a_pair():
    flow = estimator(max_gap_s=0.25)
    flow(pan(0), 0.0)
    assert flow(pan(1), 0.25) is not None
    assert flow(pan(2), 0.501) is None


def test_a_duplicate_is_left_out_and_changes_nothing():
    flow, plain = estimator(), estimator()
    for k in range(3):
        expected = plain(pan(k), k * DT)
        result = flow(pan(k), k * DT)
        assert flow(pan(20), k * DT) is None
        assert flow.none_reason == 'duplicate stamp'
    assert np.array_equal(result.flow, expected.flow)
    assert result.warm
    assert flow.network.encoded == 3


def test_warm_start_off_and_on_again():
    flow = estimator()
    flow(pan(0), 0.0)
    flow(pan(1), DT)
    flow.warm_start = False
    result = flow(pan(2), 2 * DT)
    assert (result.warm, result.cold_reason) == (False, 'warm start off')
    assert 'warm_start' not in result.timings_ms
    flow.warm_start = True
    assert flow(pan(3), 3 * DT).warm


def test_a_new_direction_starts_cold():
    flow = estimator()
    flow(pan(0), 0.0)
    flow(pan(1), DT)
    flow.direction = 'backward'
    result = flow(pan(2), 2 * DT)
    assert (result.direction, result.warm) == ('backward', False)
    assert result.cold_reason == 'direction changed'
    assert flow(pan(3), 3 * DT).warm


def test_the_budget_counts():
    flow = estimator(budget=Budget(iterations=1))
    flow(pan(0), 0.0)
    assert flow(pan(1), DT).iterations == 2  # one at each of two levels
    flow.budget = Budget(iterations=5)
    assert flow(pan(2), 2 * DT).iterations == 5  # warm: one level


def test_a_cut_gives_two_cold_flows_then_warm_ones():
    flow = estimator()
    scenes = [pan(k, seed=0) for k in range(3)] + [pan(k, seed=7) for k in range(4)]
    results = [flow(frame, k * DT) for k, frame in enumerate(scenes)]
    assert [result.cold_reason for result in results[1:]] == [
        'first', '', 'scene cut', 'scene cut', '', '']


def test_a_steady_fast_pan_is_no_cut():
    """44 px a frame, which a cold start does not reach in one iteration but in two."""
    flow = estimator()
    wide = texture(3, width=640)
    results = [flow(np.ascontiguousarray(wide[:, 44 * k:44 * k + 400]), k * DT)
               for k in range(5)]
    assert middle(results[1].flow) == pytest.approx([-44, 0], abs=2)
    assert [result.cold_reason for result in results[1:]] == ['first', '', '', '']


BAD_FRAMES = [
    (np.zeros((48, 64), np.uint8), r'RGB \(H, W, 3\); seen shape \(48, 64\)'),
    (np.zeros((48, 64, 4), np.uint8), r'seen shape \(48, 64, 4\)'),
    (np.zeros((48, 64, 3), np.float32), 'uint8, 0..255; seen float32'),
    (np.zeros((0, 64, 3), np.uint8), 'must have pixels; seen 64x0'),
    (np.zeros((48, 0, 3), np.uint8), 'must have pixels; seen 0x48'),
    ([[1, 2, 3]], 'numpy array.*seen list'),
]


@pytest.mark.parametrize(('bad', 'message'), BAD_FRAMES)
def test_bad_frames_are_named_and_change_nothing(bad, message):
    flow, plain = estimator(), estimator()
    for k in range(3):
        with pytest.raises(ValueError, match=message):
            flow(bad, k * DT)
        result, expected = flow(pan(k), k * DT), plain(pan(k), k * DT)
    assert np.array_equal(result.flow, expected.flow)
    assert result.warm


@pytest.mark.parametrize('stamp', [math.nan, math.inf])
def test_stamps_must_be_finite(stamp):
    with pytest.raises(ValueError, match='stamp must be finite'):
        estimator()(pan(0), stamp)


@pytest.mark.parametrize(('options', 'message'), [
    ({'direction': 'up'}, "direction must be one of forward, backward, both; seen 'up'"),
    ({'outputs': {'depth'}}, 'outputs must be of confidence, flow, occlusion; seen depth'),
    ({'budget': 4}, 'budget must be a Budget; seen 4'),
    ({'max_gap_s': 0}, 'max_gap_s must be positive; seen 0'),
    ({'max_gap_s': math.nan}, 'max_gap_s must be positive; seen nan'),
    ({'runtime': 'tvm'}, "runtime must be one of auto, .*; seen 'tvm'"),
    ({'network': 'raft'}, "unknown network 'raft'"),
])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        estimator(**options)


def test_a_bad_setting_leaves_the_old_one():
    flow = estimator()
    for name, bad in (('direction', 'up'), ('budget', None), ('outputs', ['flows'])):
        before = getattr(flow, name)
        with pytest.raises(ValueError, match=name):
            setattr(flow, name, bad)
        assert getattr(flow, name) == before


def test_a_frame_may_be_read_only_flipped_or_cut_out():
    flow, plain = estimator(), estimator()
    for k in range(2):
        frame = pan(k)
        expected = plain(frame, k * DT)
        canvas = np.zeros((200, 300, 3), np.uint8)
        canvas[20:180, 30:270] = frame
        frozen = np.frombuffer(frame.tobytes(), np.uint8).reshape(frame.shape)
        result = flow([frozen, canvas[20:180, 30:270]][k], k * DT)
    assert np.array_equal(result.flow, expected.flow)
    bgr = np.ascontiguousarray(pan(2)[:, :, ::-1])
    assert np.array_equal(flow(bgr[:, :, ::-1], 2 * DT).flow, plain(pan(2), 2 * DT).flow)


def test_frames_and_results_are_not_shared_with_the_caller():
    """The caller may write into both: the stream goes on undisturbed."""
    flow, plain = (estimator(outputs={'occlusion', 'confidence'}) for _ in range(2))
    for k in range(4):
        frame = pan(k)
        result, expected = flow(frame, k * DT), plain(frame, k * DT)
        frame[:] = 0
        if k:
            assert np.array_equal(result.flow, expected.flow)
            result.flow[:] = np.nan
            result.confidence[:] = 7
            result.occlusion[:] = 9


@pytest.mark.parametrize('size', [(1, 1), (7, 9), (33, 50)])
def test_small_and_odd_sizes(size):
    flow = estimator(outputs={'flow', 'occlusion', 'confidence'})
    frame = np.full((*size, 3), 90, np.uint8)
    for k in range(3):
        result = flow(frame, k * DT)
    assert result.flow.shape == (*size, 2)
    assert result.occlusion.shape == result.confidence.shape == size
    assert np.isfinite(result.flow).all()
    assert result.warm  # a still, flat picture is no cut


class Failing(BlockMatching):
    """Fails, or gives NaN, when told to."""

    fault = ''

    def step_engine(self, a, b, flow):
        if self.fault == 'raise':
            raise RuntimeError('out of memory')
        flow, = super().step_engine(a, b, flow)
        return (flow * math.nan if self.fault == 'nan' else flow,)


def test_a_failed_frame_is_skipped_as_a_dropped_one():
    flow = estimator(network=Failing())
    flow(pan(0), 0.0)
    flow(pan(1), DT)
    flow.network.fault = 'raise'
    with pytest.raises(RuntimeError, match='out of memory'):
        flow(pan(2), 2 * DT)
    flow.network.fault = ''
    result = flow(pan(3), 3 * DT)
    assert result.warm
    assert result.stamp_previous == DT
    assert middle(result.flow) == pytest.approx([-16, 0], abs=1)


def test_nan_does_not_stay_in_the_stream():
    flow = estimator(network=Failing())
    flow(pan(0), 0.0)
    flow.network.fault = 'nan'
    with pytest.raises(EngineFault, match='torch on cpu: what block_matching gave is not '
                                          'finite: 76800 of 76800 values of its flow'):
        flow(pan(1), DT)
    flow.network.fault = ''
    for k, dx in ((2, -16), (3, -8)):  # the bad frame is as one that was dropped
        assert middle(flow(pan(k), k * DT).flow) == pytest.approx([dx, 0], abs=1)


def test_settings_change_from_another_thread_while_frames_are_worked_on():
    flow = estimator(network=BlockMatching(radius=1), outputs={'flow'})
    stop = threading.Event()
    errors = []

    def turn_knobs():
        k = 0
        while not stop.is_set():
            try:
                k += 1
                flow.direction = ('forward', 'backward', 'both')[k % 3]
                flow.outputs = ({'flow'}, {'occlusion'})[k % 2]
                flow.budget = Budget(iterations=1 + k % 3)
                flow.warm_start = k % 5 > 0
                if k % 200 == 100:  # not so often that no pair is left
                    flow.reset()
                time.sleep(0.001)
            except Exception as error:
                errors.append(error)

    worker = threading.Thread(target=turn_knobs)
    worker.start()
    try:
        results = [flow(pan(k % 20, speed=2), k * DT) for k in range(40)]
    finally:
        stop.set()
        worker.join()
    assert not errors
    assert any(result is not None for result in results)
    for result in results:
        if result is not None:
            directions = (result.direction, result.backward and result.backward.direction)
            assert directions in {('forward', None), ('backward', None),
                                  ('forward', 'backward')}


def test_prepare_leaves_the_stream_alone():
    flow, plain = estimator(), estimator()
    for k in range(3):
        flow.prepare(64, 96)
        result, expected = flow(pan(k), k * DT), plain(pan(k), k * DT)
    assert np.array_equal(result.flow, expected.flow)


def test_two_streams_may_share_a_runtime():
    one = estimator()
    other = FlowEstimator(runtime=one.runtime, outputs={'flow'})
    alone = estimator()
    for k in range(4):
        result = one(pan(k), k * DT)
        other(pan(k, seed=5, speed=4), k * DT)
        expected = alone(pan(k), k * DT)
    assert np.array_equal(result.flow, expected.flow)


@pytest.mark.parametrize('runtime', ['torch', 'openvino'])
def test_dip_rt_streams(runtime, tmp_path, monkeypatch):
    if runtime == 'openvino':
        pytest.importorskip('openvino', reason='OpenVINO is not installed')
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path))
    torch.manual_seed(0)
    network = create('dip_rt')
    flow = estimator(network=network, runtime=runtime, direction='both',
                     outputs={'confidence', 'occlusion'}, budget=Budget(iterations=1))
    frames = [pan(k, speed=4) for k in range(3)]
    with torch.inference_mode():
        images = [torch.from_numpy(frame).permute(2, 0, 1)[None].float() for frame in frames]
        expected = network(images[0], images[1], iterations=1)
    results = [flow(frame, k * DT) for k, frame in enumerate(frames)]
    first = results[1]
    assert np.abs(first.flow - expected.flow[0].permute(1, 2, 0).numpy()).max() < 1e-3
    assert np.abs(first.confidence - expected.confidence[0, 0].numpy()).max() < 1e-3
    assert np.abs(first.occlusion_probability
                  - expected.occlusion[0, 0].numpy()).max() < 1e-3
    assert results[2].backward.flow.shape == (160, 240, 2)


def test_compiled_engines_are_kept_in_the_folder_asked_for(tmp_path, monkeypatch):
    pytest.importorskip('openvino', reason='OpenVINO is not installed')
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path / 'usual'))
    flow = estimator(network=create('dip_rt', hidden=8), runtime='openvino',
                     engine_cache=tmp_path / 'mine')
    flow.prepare(48, 64)
    assert list((tmp_path / 'mine').rglob('*.blob'))
    assert not (tmp_path / 'usual').exists()


def decided_hd3(**options):
    """Return a small untrained HD3 whose match densities have one clear maximum."""
    torch.manual_seed(0)
    network = create('hd3', encoder='vgg', decoder='resnet', context=False, decoder_width=16,
                     **options)
    for key, value in network.state_dict().items():
        if value.ndim == 4:
            value.normal_(0.0, (6.0 if 'cls' in key else 1.0) * value[0].numel() ** -0.5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():  # the norms learn what comes, else the coarse maps are nearly 0
        network.train()(255 * torch.rand(1, 3, 128, 192), 255 * torch.rand(1, 3, 128, 192))
    return network.eval()


@pytest.mark.parametrize('runtime', ['torch', 'openvino'])
@pytest.mark.parametrize('options', [{}, {'cost': 'sample', 'cues': True}], ids=['plain', 'iofpl'])
def test_hd3_streams_and_its_budget_counts_levels(runtime, options, tmp_path, monkeypatch):
    if runtime == 'openvino':
        pytest.importorskip('openvino', reason='OpenVINO is not installed')
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path))
    network = decided_hd3(**options)
    frames = [pan(k, speed=4)[:128, :192] for k in range(3)]
    with torch.inference_mode():
        images = [torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float()
                  for frame in frames]
        expected = {levels: network(*images[:2], iterations=levels) for levels in (2, 5)}
    flow = estimator(network=network, runtime=runtime, outputs={'confidence'}, threads=1)
    flow.prepare(128, 192)
    prepared = dict(getattr(flow.runtime, '_engines', {}))
    for levels in (2, 9):
        flow.budget = Budget(iterations=levels)
        flow.reset()
        flow(frames[0], 0.0)
        first = flow(frames[1], DT)
        second = flow(frames[2], 2 * DT)
        assert [step.level for step in first.steps] == [64, 32, 16, 8, 4][:levels]
        assert (first.warm, first.cold_reason) == (False, 'first')
        assert second.warm or second.cold_reason == 'scene cut'
        wanted = expected[min(levels, 5)]
        wanted_flow = wanted.flow[0].permute(1, 2, 0).numpy()
        # Where two windows of a density are nearly one as good as the other, rounding decides.
        assert np.quantile(np.abs(first.flow - wanted_flow), 0.98) < 1e-3
        assert np.quantile(np.abs(first.confidence - wanted.confidence[0, 0].numpy()),
                           0.98) < 1e-3
    # Every engine of every budget was made ready, so that no frame waits for it.
    assert dict(getattr(flow.runtime, '_engines', {})).keys() == prepared.keys()


def test_what_computes_both_directions_anyway_runs_once_for_both(monkeypatch):
    network = decided_hd3(cues=True)
    frames = [pan(k, speed=4)[:128, :192] for k in range(2)]
    alone = {}
    for direction in ('forward', 'backward'):
        flow = estimator(network=network, direction=direction, outputs={'occlusion'})
        flow(frames[0], 0.0)
        alone[direction] = flow(frames[1], DT)
    steps = []
    step0 = network.step0_engine
    monkeypatch.setattr(network, 'step0_engine', lambda *maps: steps.append(0) or step0(*maps))
    both = estimator(network=network, direction='both', outputs={'confidence', 'occlusion'})
    both(frames[0], 0.0)
    result = both(frames[1], DT)
    assert len(steps) == 1
    for found, expected in ((result, alone['forward']), (result.backward, alone['backward'])):
        assert found.direction == expected.direction
        assert found.steps == expected.steps and found.cold_reason == 'first'
        assert found.confidence is not None
        assert np.quantile(np.abs(found.flow - expected.flow), 0.98) < 1e-3
        assert np.mean(found.occlusion != expected.occlusion) < 0.02
    assert np.abs(result.flow - result.backward.flow).max() > 1.0


@pytest.mark.parametrize('runtime', ['torch', 'openvino'])
def test_mscsl_streams_cold_and_its_budget_counts_scales(runtime, tmp_path, monkeypatch):
    if runtime == 'openvino':
        pytest.importorskip('openvino', reason='OpenVINO is not installed')
    monkeypatch.setenv('FLOW_ROS_CACHE', str(tmp_path))
    torch.manual_seed(0)
    network = create('mscsl', widths=(8, 16, 24), features=16, state=16, head=16,
                     radii=(2, 2, 3, 3))
    frames = [pan(k, speed=4)[:128, :192] for k in range(3)]
    with torch.inference_mode():
        images = [torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float()
                  for frame in frames]
        expected = {scales: network(*images[:2], iterations=scales).flow for scales in (1, 4)}
    flow = estimator(network=network, runtime=runtime, threads=1)
    flow.prepare(128, 192)
    prepared = dict(getattr(flow.runtime, '_engines', {}))
    for scales in (1, 9):
        flow.budget = Budget(iterations=scales)
        flow.reset()
        results = [flow(frame, k * DT) for k, frame in enumerate(frames)]
        assert [step.level for step in results[1].steps] == [64, 32, 16, 8][:scales]
        for result in results[1:]:
            assert (result.warm, result.cold_reason) == (False, 'mscsl takes no prior flow')
        wanted = expected[min(scales, 4)][0].permute(1, 2, 0).numpy()
        assert np.abs(results[1].flow - wanted).max() < 1e-3
    assert dict(getattr(flow.runtime, '_engines', {})).keys() == prepared.keys()


class Forgetful(BlockMatching):
    """A network that takes no prior flow."""

    name = 'forgetful'
    accepts_prior = False

    def start(self, *features, prior_flow=None, **options):
        if prior_flow is not None:
            raise ValueError('forgetful takes no prior flow')
        return super().start(*features, **options)


@pytest.mark.parametrize('direction', ['forward', 'both'])
def test_a_network_that_takes_no_prior_starts_cold_and_says_so(direction, monkeypatch):
    def carried(*arguments, **options):
        raise AssertionError('time was spent on a prior that nobody takes')
    for name in ('carry', 'sample_flow', 'explains'):
        monkeypatch.setattr(f'flow_ros.streaming.past.{name}', carried)
    flow = estimator(network=Forgetful(), direction=direction)
    flow.prepare(64, 96)
    results = [flow(pan(k), k * DT) for k in range(4)]
    for result in results[1:]:
        assert (result.warm, result.cold_reason) == (False, 'forgetful takes no prior flow')
        assert middle(result.flow) == pytest.approx([-8, 0], abs=1)
        assert 'warm_start' not in result.timings_ms
    flow.warm_start = False
    assert flow(pan(4), 4 * DT).cold_reason == 'warm start off'


def shared():
    folder = Path(os.environ.get('FLOW_ROS_SHARED',
                                 Path(__file__).resolve().parents[3] / 'shared'))
    if not (folder / 'eval' / 'sequences' / 'highway').is_dir():
        pytest.skip(f'no evaluation pictures in {folder}: set FLOW_ROS_SHARED')
    return folder / 'eval'


def picture(path):
    return cv2.resize(cv2.imread(str(path))[:, :, ::-1], (320, 192),
                      interpolation=cv2.INTER_AREA)


def test_real_scenes_are_told_from_real_motion():
    """A drive at full rate, then at a quarter, then other scenes: only those are cuts."""
    drive = sorted((shared() / 'sequences' / 'highway').glob('*.jpg'))
    assert len(drive) == 24
    flow = estimator(network=BlockMatching(radius=4))
    for k in [*range(8), *range(11, 24, 4)]:
        result = flow(picture(drive[k]), k * DT)
        if k > 1:
            assert result.cold_reason == '', k
    others = sorted(path for path in shared().glob('*/*/frame1.png'))
    assert len(others) >= 5
    for k, path in enumerate([*others, drive[0]], start=24):
        assert flow(picture(path), k * DT).cold_reason == 'scene cut', path


def test_a_large_motion_that_sets_in_suddenly_still_gets_flow():
    first = picture(shared() / 'sintel' / 'market_5_clean_0002' / 'frame1.png')
    flow = estimator(network=BlockMatching(radius=4))
    for k in range(3):
        flow(first, k * DT)
    moved = np.roll(first, 30, axis=1)
    result = flow(moved, 3 * DT)
    assert middle(result.flow)[0] == pytest.approx(30, abs=8)


@pytest.mark.parametrize('direction', ['forward', 'backward', 'both'])
def test_the_flow_goes_into_memory_that_is_given(direction):
    flow, plain = estimator(direction=direction), estimator(direction=direction)
    memory = np.full((160, 240, 2), np.nan, np.float32)
    for k in range(3):
        expected, result = plain(pan(k), k * DT), flow(pan(k), k * DT, flow_out=memory)
        if k == 0:
            assert result is None and np.isnan(memory).all()
            continue
        assert result.flow is memory
        np.testing.assert_array_equal(memory, expected.flow)
    if direction == 'both':
        np.testing.assert_array_equal(result.backward.flow, expected.backward.flow)


@pytest.mark.parametrize('memory', [
    np.zeros((160, 240, 3), np.float32), np.zeros((160, 240, 2)), [[0.0]],
    np.zeros((2, 160, 240), np.float32).transpose(1, 2, 0)])
def test_memory_that_does_not_fit_is_refused_and_changes_nothing(memory):
    flow = estimator()
    flow(pan(0), 0.0)
    with pytest.raises(ValueError, match=r'flow_out must be float32 \(160, 240, 2\)'):
        flow(pan(1), DT, flow_out=memory)
    assert flow(pan(1), DT) is not None
