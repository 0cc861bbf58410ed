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

"""The frame sources, with real files."""

from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import get_typestore, Stores

from flow_ros.nodes.messages import image_to_rgb
from flow_ros.sources import open_source, parse_size, SourceError

SIZE = (64, 48)
COUNT = 5


def picture(index: int) -> np.ndarray:
    """Return an RGB picture whose red tells ``index``."""
    image = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
    image[..., 0] = 40 * index + 20
    image[:, :8, 2] = 200
    return image


def index_of(image: np.ndarray) -> int:
    return round((float(image[:, 16:, 0].mean()) - 20.0) / 40.0)


def write_images(folder: Path) -> Path:
    folder.mkdir()
    for index in range(COUNT):
        cv2.imwrite(str(folder / f'{index:03d}.png'), picture(index)[..., ::-1])
    return folder


def write_video(path: Path) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'MJPG'), 25.0, SIZE)
    assert writer.isOpened()
    for index in range(COUNT):
        writer.write(np.ascontiguousarray(picture(index)[..., ::-1]))
    writer.release()
    return path


def write_bag(path: Path, plugin: StoragePlugin, *, compressed: bool = False,
              damaged: int = -1, topics: tuple[str, ...] = ('/camera/image_raw',)) -> Path:
    """Write frames at 20 Hz from stamp 1000 s, and a topic that has no images."""
    store = get_typestore(Stores.ROS2_HUMBLE)
    header, time = store.types['std_msgs/msg/Header'], store.types['builtin_interfaces/msg/Time']
    with Writer(path, version=9, storage_plugin=plugin) as bag:
        text = bag.add_connection('/chatter', 'std_msgs/msg/String', typestore=store)
        bag.write(text, 0, store.serialize_cdr(store.types['std_msgs/msg/String'](data='x'),
                                               text.msgtype))
        for topic in topics:
            kind = 'sensor_msgs/msg/' + ('CompressedImage' if compressed else 'Image')
            connection = bag.add_connection(topic, kind, typestore=store)
            for index in range(COUNT):
                head = header(stamp=time(sec=1000, nanosec=index * 50_000_000), frame_id='cam')
                image = picture(index)
                if compressed:
                    data = cv2.imencode('.png', image[..., ::-1])[1].ravel()
                    message = store.types[kind](header=head, format='png', data=data)
                else:
                    message = store.types[kind](
                        header=head, height=SIZE[1], width=SIZE[0], encoding='rgb8',
                        is_bigendian=0, step=3 * SIZE[0],
                        data=image.ravel()[:100 if index == damaged else None])
                bag.write(connection, 5_000_000_000 + index, store.serialize_cdr(message, kind))
    return path


def check(source: object, *, period: float, tolerance: int = 0) -> None:
    """Take two passes and check order, stamps and size."""
    frames = list(islice(source, 2 * COUNT))
    assert [index_of(frame.image) for frame in frames] == 2 * list(range(COUNT))
    assert np.allclose(np.diff([frame.stamp_s for frame in frames]), period)
    assert frames[0].image.shape == (SIZE[1], SIZE[0], 3)
    assert frames[0].image.dtype == np.uint8
    blue = frames[0].image[:, :4, 2].mean()  # would be 20 were the colours the wrong way round
    assert abs(blue - 200.0) <= tolerance


def test_folder_loops_with_increasing_stamps(tmp_path: Path) -> None:
    check(open_source(str(write_images(tmp_path / 'images'))), period=0.1)


def test_folder_takes_fps_and_size(tmp_path: Path) -> None:
    source = open_source(str(write_images(tmp_path / 'images')), fps=4.0, size=(32, 24),
                         loop=False)
    frames = list(source)
    assert [frame.stamp_s for frame in frames] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert frames[2].image.shape == (24, 32, 3)
    assert index_of(cv2.resize(frames[2].image, SIZE)) == 2


def test_folder_goes_by_number(tmp_path: Path) -> None:
    for index, name in enumerate(('7.png', '8.png', '9.png', '10.png', '11.png')):
        cv2.imwrite(str(tmp_path / name), picture(index)[..., ::-1])
    frames = list(open_source(str(tmp_path), loop=False))
    assert [index_of(frame.image) for frame in frames] == [0, 1, 2, 3, 4]


def test_folder_skips_a_damaged_image_and_says_so(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'images')
    (folder / '002.png').write_bytes(b'no image')
    warnings: list[str] = []
    frames = list(open_source(str(folder), loop=False, warn=warnings.append))
    assert [index_of(frame.image) for frame in frames] == [0, 1, 3, 4]
    assert np.isclose(frames[2].stamp_s - frames[1].stamp_s, 0.2)  # the gap is real
    assert len(warnings) == 1
    assert '002.png' in warnings[0]


def test_folder_of_damaged_images_ends_with_an_error(tmp_path: Path) -> None:
    (tmp_path / '000.png').write_bytes(b'no image')
    with pytest.raises(SourceError, match='no frame in it could be read'):
        list(open_source(str(tmp_path), warn=lambda text: None))


def test_video_has_its_own_rate(tmp_path: Path) -> None:
    source = open_source(str(write_video(tmp_path / 'video.avi')))
    check(source, period=1 / 25, tolerance=12)
    check(open_source(str(tmp_path / 'video.avi'), fps=5.0), period=0.2, tolerance=12)


@pytest.mark.parametrize('plugin', [StoragePlugin.SQLITE3, StoragePlugin.MCAP])
def test_bag_keeps_its_stamps(tmp_path: Path, plugin: StoragePlugin) -> None:
    path = write_bag(tmp_path / 'bag', plugin)
    check(open_source(str(path), decode=image_to_rgb), period=0.05)
    # Its data file stands for the bag.
    data = next(file for file in path.iterdir() if file.suffix in ('.db3', '.mcap'))
    check(open_source(str(data), decode=image_to_rgb), period=0.05)


def test_bag_with_compressed_images(tmp_path: Path) -> None:
    path = write_bag(tmp_path / 'bag', StoragePlugin.MCAP, compressed=True)
    check(open_source(str(path)), period=0.05)


def test_bag_skips_a_damaged_image_and_says_so(tmp_path: Path) -> None:
    path = write_bag(tmp_path / 'bag', StoragePlugin.SQLITE3, damaged=1)
    warnings: list[str] = []
    frames = list(open_source(str(path), decode=image_to_rgb, loop=False, warn=warnings.append))
    assert [index_of(frame.image) for frame in frames] == [0, 2, 3, 4]
    assert len(warnings) == 1
    assert 'data has 100 bytes' in warnings[0]


def test_bag_topic_is_chosen_and_checked(tmp_path: Path) -> None:
    path = str(write_bag(tmp_path / 'bag', StoragePlugin.MCAP, topics=('/left', '/right')))
    warnings: list[str] = []
    assert '/left' in open_source(path, decode=image_to_rgb, warn=warnings.append).description
    assert '/left, /right' in warnings[0]
    assert '/right' in open_source(path, topic='/right', decode=image_to_rgb).description
    with pytest.raises(SourceError, match=r'no images on /up.*/left.*choose one'):
        open_source(path, topic='/up')


def test_bag_without_images_lists_its_topics(tmp_path: Path) -> None:
    path = write_bag(tmp_path / 'bag', StoragePlugin.SQLITE3, topics=())
    with pytest.raises(SourceError, match=r'no images.*/chatter'):
        open_source(str(path))


def test_synthetic_truth_leads_to_the_next_frame() -> None:
    width, height = 96, 64
    source = open_source('synthetic:3', size=(width, height))
    frames = list(islice(source, 60))  # beyond the first turn
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    ratios = []
    for frame, following in zip(frames[:-1], frames[1:]):
        assert frame.flow.shape == (height, width, 2)
        u, v = frame.flow[..., 0], frame.flow[..., 1]
        moved = cv2.remap(following.image, x + u, y + v, cv2.INTER_LINEAR)
        inside = (x + u >= 0) & (x + u < width - 1) & (y + v >= 0) & (y + v < height - 1)
        before = np.abs(frame.image.astype(float) - following.image)[inside].mean()
        after = np.abs(frame.image.astype(float) - moved)[inside].mean()
        ratios.append(after / before)
    assert max(ratios) < 0.9  # where everything turns around, little moves
    assert np.median(ratios) < 0.6


@pytest.mark.parametrize(('make', 'message'), [
    (lambda path: path / 'nowhere', r'no such file or folder; expected synthetic'),
    (lambda path: path, r'no images in it \(seen: notes.txt\)'),
    (lambda path: path / 'broken.mp4', r'no video that OpenCV can read \(7 bytes\)'),
    (lambda path: path / 'one.png', r'a single image has no flow'),
    (lambda path: path / 'alone.mcap', r'metadata.yaml, which is missing'),
    (lambda path: 'webcam:99', r'webcam 99: it gives no frames'),
    (lambda path: 'synthetic:seven', r'the seed must be a number'),
])
def test_errors_name_what_was_seen(tmp_path: Path, make: object, message: str) -> None:
    (tmp_path / 'notes.txt').write_text('no image')
    source = make(tmp_path)
    if Path(source).suffix:
        Path(source).write_bytes(b'nothing')
    with pytest.raises(SourceError, match=message):
        open_source(str(source))


def test_a_broken_bag_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / 'metadata.yaml').write_text('no: bag')
    with pytest.raises(SourceError, match='no rosbag2 that can be read'):
        open_source(str(tmp_path))


@pytest.mark.parametrize('text', ['640', '640x', 'x480', '640x480x3', '-1x5', '8x8', '640 480'])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(SourceError, match='expected WIDTHxHEIGHT'):
        parse_size(text)


def test_sizes_and_rates() -> None:
    assert parse_size('640x480') == (640, 480)
    with pytest.raises(SourceError, match='fps -1'):
        open_source('synthetic', fps=-1.0)
