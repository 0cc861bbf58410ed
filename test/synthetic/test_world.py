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

"""Clips of the procedural world: sequences, depth, ego-motion, and what the shutter does."""

from dataclasses import replace

import pytest
import torch

from flow_ros.ops.sampling import pixel_grid, warp
from flow_ros.synthetic.camera import CameraConfig, CLEAN
from flow_ros.synthetic.world import World, WorldConfig

torch.set_num_threads(1)
SMALL = WorldConfig(surfaces=6, bank_objects=8, largest_motion_px=20, camera=CLEAN)
KINDS = {'drifting': replace(SMALL, driving=0), 'driving': replace(SMALL, driving=1),
         'flying': replace(SMALL, driving=0, flying=1)}
SHUTTERS = {'global': CLEAN, 'rolling': replace(CLEAN, rolling_shutter=1)}


@pytest.fixture(scope='module', params=KINDS)
def world(request: pytest.FixtureRequest) -> World:
    return World(seed=5, config=KINDS[request.param])


def test_the_flows_of_a_clip_join(world: World) -> None:
    """From frame 0 to 1 and on to 2 lands where 2 to 1 and 1 to 0 come back from."""
    for index in range(3):
        clip = world.clip(index, batch=2, size=(96, 128))
        assert len(clip.images) == 3
        assert len(clip.forward) == len(clip.backward) == 2
        for step in range(2):
            back = warp(clip.backward[step], clip.forward[step])
            length = torch.hypot(*(clip.forward[step] + back).unbind(dim=1))[:, None]
            seen = ~clip.occluded_forward[step]
            assert float(length[seen].median()) < 0.05
            error = warp(clip.images[step + 1], clip.forward[step]) - clip.images[step]
            still = clip.images[step + 1] - clip.images[step]
            moves = torch.hypot(*clip.forward[step].unbind(dim=1))[:, None] > 0.5
            if int((seen & moves).sum()) > 500:
                both = [float(each.abs().mean(dim=1, keepdim=True)[seen & moves].mean())
                        for each in (error, still)]
                assert both[0] < both[1]


def test_motion_changes_from_frame_to_frame_but_not_much(world: World) -> None:
    """A warm start is neither told the truth nor misled: that is what it is trained for."""
    changes, lengths = [], []
    for index in range(6):
        clip = world.clip(index, batch=2, size=(96, 128))
        there = warp(clip.forward[1], clip.forward[0])  # the next flow of the same point
        seen = (~clip.occluded_forward[0]).expand_as(there)
        changes.append((there - clip.forward[0]).abs()[seen].mean())
        lengths.append(clip.forward[0].abs()[seen].mean())
    share = float(torch.stack(changes).mean() / torch.stack(lengths).mean())
    assert 0.03 < share < 0.6


@pytest.mark.parametrize('kind', ['driving', 'flying'])
def test_depth_and_ego_motion_explain_the_flow_of_what_is_at_rest(kind: str) -> None:
    """Back-project by the depth, move by the camera, project: the flow, to a few hundredths."""
    world = World(seed=5, config=replace(KINDS[kind], objects=(1, 1)))
    compared = 0
    for index in range(4):
        clip = world.clip(index, batch=2, size=(96, 128))
        ego = clip.ego
        assert ego is not None
        assert clip.depth is not None
        grid = pixel_grid(96, 128, clip.forward[0])
        centre = torch.tensor([63.5, 47.5]).view(1, 2, 1, 1)
        ray = torch.cat([grid - centre, torch.ones_like(grid[:, :1])], dim=1).flatten(2)
        point = torch.linalg.inv(ego.intrinsics) @ ray * clip.depth[0].flatten(2)
        turn = ego.rotation[:, 1] @ ego.rotation[:, 0].transpose(1, 2)
        shift = ego.translation[:, 1] - (turn @ ego.translation[:, 0][..., None])[..., 0]
        later = ego.intrinsics @ (turn @ point + shift[..., None])
        flow = (later[:, :2] / later[:, 2:]).view(-1, 2, 96, 128) + centre - grid
        error = torch.hypot(*(flow - clip.forward[0]).unbind(dim=1))
        for item in range(2):
            if bool(ego.at_rest[item].all()):
                near = clip.depth[0][item, 0] < 100
                assert float(error[item][near].quantile(0.99)) < 0.05
                compared += 1
    assert compared >= 3


def test_drifting_scenes_have_no_depth() -> None:
    clip = World(seed=5, config=KINDS['drifting']).clip(0, batch=1, size=(64, 64), frames=2)
    assert clip.depth is None
    assert clip.ego is None


@pytest.mark.parametrize('kind', KINDS)
def test_rolling_shutters_have_their_true_flow(kind: str) -> None:
    world = World(seed=5, config=replace(KINDS[kind], camera=SHUTTERS['rolling']))
    plain = World(seed=5, config=KINDS[kind])
    differ = 0.0
    for index in range(3):
        clip, other = (each.clip(index, batch=2, size=(96, 128)) for each in (world, plain))
        back = warp(clip.backward[0], clip.forward[0])
        length = torch.hypot(*(clip.forward[0] + back).unbind(dim=1))[:, None]
        assert float(length[~clip.occluded_forward[0]].median()) < 0.05
        differ = max(differ, float((clip.forward[0] - other.forward[0]).abs().mean()))
    assert differ > 0.05  # it is another flow than that of a global shutter


def test_motion_blur_smears_along_the_motion_and_leaves_the_truth() -> None:
    config = KINDS['drifting']
    blurred = World(seed=5, config=replace(config, camera=replace(CLEAN, motion_blur=1)))
    sharp = World(seed=5, config=config)
    smoother = 0
    for index in range(4):
        one, two = (each.clip(index, batch=2, size=(96, 128)) for each in (blurred, sharp))
        assert torch.equal(one.forward[0], two.forward[0])
        assert torch.equal(one.occluded_forward[0], two.occluded_forward[0])
        detail = [float(each.images[0].diff(dim=-1).abs().mean()) for each in (one, two)]
        smoother += detail[0] < 0.97 * detail[1]
    assert smoother >= 3


def test_a_clip_is_a_function_of_seed_and_index(world: World) -> None:
    again = World(seed=5, config=world.config)
    one, two, three = (each.clip(index, batch=2, size=(64, 64)) for each, index in
                       ((world, 3), (again, 3), (again, 4)))
    assert all(torch.equal(a, b) for a, b in zip(one.images, two.images))
    assert torch.equal(one.forward[1], two.forward[1])
    assert not torch.equal(one.images[0], three.images[0])


def test_a_clip_needs_two_frames(world: World) -> None:
    with pytest.raises(ValueError, match='at least 2 frames; seen 1'):
        world.clip(0, batch=1, size=(64, 64), frames=1)


def test_large_motion_reaches_200_px_at_full_size() -> None:
    config = replace(KINDS['drifting'], largest_motion_px=200)
    world = World(seed=5, config=config)
    scenes = [world.scene(index, batch=4, size=(436, 1024)) for index in range(12)]
    centres = torch.cat([(scene.poses[..., :2, 2] / scene.poses[..., 2:, 2]).flatten(0, 1)
                         for scene in scenes])  # (N, 2 frames, xy)
    length = torch.hypot(*(centres[:, 1] - centres[:, 0]).unbind(dim=1))
    assert 150 < float(length.quantile(0.99)) < 300


def test_every_effect_is_a_share() -> None:
    for name, share in vars(CameraConfig()).items():
        assert name == 'longest_blur_px' or 0 < share < 1, name
