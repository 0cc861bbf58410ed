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

"""Where frames come from: a synthetic scene, a webcam, a video, a folder of images, a rosbag2.

No ROS here. ``open_source`` checks what it is given at once and returns an iterable of frames
whose stamps always increase; it goes round for ever unless told otherwise. What an optional
package is needed for (rosbags, torch for the synthetic scene) is imported when it is asked for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
import math
from pathlib import Path
import re
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Decode = Callable[[Any], Pixels]
Warn = Callable[[str], object]

DEFAULT_FPS = 10.0
DEFAULT_SIZE = (640, 480)
IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
BAG_SUFFIXES = ('.db3', '.mcap')
SYNTHETIC_FRAMES = 40
IMAGE_TYPES = ('sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage')
KINDS = ('synthetic[:SEED], webcam:INDEX, a video file, a folder of images or a rosbag2 '
         '(its folder, or its .db3 or .mcap file)')


class SourceError(ValueError):
    """A source that cannot be read; the text names what was seen, expected, and what to do."""


@dataclass(frozen=True)
class Frame:
    """One frame: RGB uint8 (H, W, 3), its stamp in seconds, and where known its true flow.

    ``stamp_s`` counts from the source's first frame. ``flow`` (H, W, 2) is the forward flow
    to the next frame, in px on this frame's grid.
    """

    image: Pixels
    stamp_s: float
    flow: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Source:
    """An iterable of frames.

    ``read`` starts one pass. ``live`` sources set the pace themselves (a webcam), others are
    played as their stamps say. ``fps`` overrides the stamps, ``size`` (width, height) scales.
    """

    description: str
    read: Callable[[], Iterator[Frame]]
    live: bool = False
    fps: float | None = None
    size: tuple[int, int] | None = None
    loop: bool = True

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames with increasing stamps; raises SourceError if a pass has none."""
        index = 0
        start = stamp = period = 0.0
        while True:
            first = index
            for frame in self.read():
                now = index / self.fps if self.fps and not self.live else start + frame.stamp_s
                if index > first:
                    period = now - stamp
                stamp = now
                index += 1
                yield self._scaled(replace(frame, stamp_s=stamp))
            if index == first:
                raise SourceError(f'{self.description}: no frame in it could be read')
            if not self.loop:
                return
            start = stamp + (period or 1.0 / DEFAULT_FPS)

    def _scaled(self, frame: Frame) -> Frame:
        height, width = frame.image.shape[:2]
        if self.size is None or self.size == (width, height):
            return frame
        smaller = self.size[0] * self.size[1] < width * height
        image = cv2.resize(frame.image, self.size,
                           interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
        return Frame(np.asarray(image, dtype=np.uint8), frame.stamp_s)


def parse_size(text: str) -> tuple[int, int]:
    """Return (width, height) of WIDTHxHEIGHT; raises SourceError."""
    width, cross, height = text.strip().lower().partition('x')
    if not cross or not width.isdecimal() or not height.isdecimal() \
            or not 16 <= int(width) <= 8192 or not 16 <= int(height) <= 8192:
        raise SourceError(f'size {text!r}: expected WIDTHxHEIGHT in px, 16 to 8192 each, '
                          f'for example 640x480')
    return int(width), int(height)


def open_source(text: str, *, fps: float | None = None, size: tuple[int, int] | None = None,
                topic: str = '', loop: bool = True, decode: Decode | None = None,
                warn: Warn = print) -> Source:
    """Return the source that ``text`` names; raises SourceError at once if it has no frames.

    ``decode`` turns a sensor_msgs/Image of a bag (or what looks like one) into RGB; ``topic``
    chooses among its image topics. ``warn`` is told of each frame that cannot be read.
    """
    if fps is not None and not 0.0 < fps <= 1000.0:
        raise SourceError(f'fps {fps:g}: expected more than 0 and at most 1000 frames/s')
    kind, _, rest = text.partition(':')
    if kind == 'synthetic':
        return _synthetic(rest, fps=fps, size=size, loop=loop)
    if kind == 'webcam':
        return _webcam(rest or '0', fps=fps, size=size)
    path = Path(text).expanduser()
    if not path.exists():
        raise SourceError(f'{text}: no such file or folder; expected {KINDS}')
    if path.is_char_device():
        return _webcam(str(path), fps=fps, size=size)
    if (path / 'metadata.yaml').is_file():
        return _bag(path, topic, decode, warn, fps=fps, size=size, loop=loop)
    if path.suffix.lower() in BAG_SUFFIXES:
        if path.is_file() and (path.parent / 'metadata.yaml').is_file():
            return _bag(path.parent, topic, decode, warn, fps=fps, size=size, loop=loop)
        raise SourceError(f'{path}: a rosbag2 is a folder with metadata.yaml, which is missing '
                          f'here; make it with: ros2 bag reindex FOLDER')
    if path.is_dir():
        return _folder(path, warn, fps=fps, size=size, loop=loop)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise SourceError(f'{path}: a single image has no flow; give the folder it is in')
    return _video(path, fps=fps, size=size, loop=loop)


def _synthetic(seed: str, *, fps: float | None, size: tuple[int, int] | None,
               loop: bool) -> Source:
    if seed and not seed.isdecimal():
        raise SourceError(f'synthetic:{seed}: the seed must be a number, for example synthetic:7')
    from flow_ros.synthetic.sequence import SyntheticSequence

    width, height = size or DEFAULT_SIZE
    sequence = SyntheticSequence(width, height, int(seed or 0))
    # Rendered once, because it takes longer than the network, and played to and fro: the flow
    # to the next frame is then in turn the one forward and the one backward.
    scene = [sequence.frame(index) for index in range(SYNTHETIC_FRAMES)]
    to_and_fro = [*((frame.image, frame.flow_forward) for frame in scene[:-1]),
                  *((frame.image, frame.flow_backward) for frame in scene[:0:-1])]

    def read() -> Iterator[Frame]:
        for index, (image, flow) in enumerate(to_and_fro):
            yield Frame(image, index / DEFAULT_FPS, flow)

    return Source(f'synthetic scene, {width}x{height}', read, fps=fps, loop=loop)


def _webcam(device: str, *, fps: float | None, size: tuple[int, int] | None) -> Source:
    capture = cv2.VideoCapture(int(device) if device.isdecimal() else device)
    if size is not None:
        capture.set(cv2.CAP_PROP_FRAME_WIDTH, size[0])
        capture.set(cv2.CAP_PROP_FRAME_HEIGHT, size[1])
    if fps is not None:
        capture.set(cv2.CAP_PROP_FPS, fps)
    if not capture.isOpened() or not capture.read()[0]:
        found = ', '.join(sorted(path.name for path in Path('/dev').glob('video*'))) or 'none'
        raise SourceError(f'webcam {device}: it gives no frames (in /dev: {found}); expected a '
                          f'camera that no other program uses; is this user in the group video?')

    def read() -> Iterator[Frame]:
        start, failed = None, 0
        while failed < 30:
            ticks = cv2.getTickCount() / cv2.getTickFrequency()
            good, image = capture.read()
            failed = 0 if good else failed + 1
            if good:
                start = ticks if start is None else start
                yield Frame(_rgb(image), ticks - start)
        raise SourceError(f'webcam {device}: 30 reads in a row failed; was it unplugged?')

    return Source(f'webcam {device}', read, live=True, size=size, loop=False)


def _folder(path: Path, warn: Warn, *, fps: float | None, size: tuple[int, int] | None,
            loop: bool) -> Source:
    files = sorted((file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES),
                   key=_by_number)
    if not files:
        inside = ', '.join(sorted(file.name for file in path.iterdir())[:5]) or 'nothing'
        raise SourceError(f'{path}: no images in it (seen: {inside}); expected files '
                          f'{" ".join(IMAGE_SUFFIXES)}, or metadata.yaml of a rosbag2')

    def read() -> Iterator[Frame]:
        for index, file in enumerate(files):
            image = cv2.imread(str(file), cv2.IMREAD_COLOR)
            if image is None:
                warn(f'{file}: damaged or no image ({file.stat().st_size} bytes): skipped')
            else:
                yield Frame(_rgb(image), index / (fps or DEFAULT_FPS))

    return Source(f'{len(files)} images of {path}', read, size=size, loop=loop)


def _by_number(file: Path) -> list[tuple[int, str]]:
    """Return a key that sorts 2.png before 10.png."""
    return [(int(part), '') if part.isdecimal() else (-1, part)
            for part in re.split(r'(\d+)', file.name)]


def _video(path: Path, *, fps: float | None, size: tuple[int, int] | None,
           loop: bool) -> Source:
    capture = cv2.VideoCapture(str(path))
    try:
        rate = capture.get(cv2.CAP_PROP_FPS) if capture.isOpened() else 0.0
        if not capture.isOpened() or not capture.read()[0]:
            raise SourceError(f'{path}: no video that OpenCV can read ({path.stat().st_size} '
                              f'bytes); expected a whole file, mp4, avi, mkv or webm: does '
                              f'another player show it? If so: ffmpeg -i {path.name} new.mp4')
    finally:
        capture.release()
    if not (math.isfinite(rate) and 0.5 <= rate <= 1000.0):
        rate = 30.0  # what a file says that knows no rate: 0, or a time base

    def read() -> Iterator[Frame]:
        capture = cv2.VideoCapture(str(path))
        try:
            for index in count():
                good, image = capture.read()
                if not good:
                    return
                yield Frame(_rgb(image), index / rate)
        finally:
            capture.release()

    return Source(f'video {path}, {rate:.4g} frames/s', read, fps=fps, size=size, loop=loop)


def _bag(path: Path, topic: str, decode: Decode | None, warn: Warn, *, fps: float | None,
         size: tuple[int, int] | None, loop: bool) -> Source:
    try:
        from rosbags.highlevel import AnyReader, AnyReaderError
        from rosbags.typesys import get_typestore, Stores
    except ImportError as error:
        raise SourceError(f'{path}: reading a rosbag2 needs rosbags ({error}): pip install '
                          f'rosbags') from error

    def reader() -> Any:
        return AnyReader([path], default_typestore=get_typestore(Stores.ROS2_HUMBLE))

    try:
        with reader() as bag:
            topics = {connection.topic: connection.msgtype for connection in bag.connections
                      if connection.msgcount}
            images = [name for name, kind in topics.items() if kind in IMAGE_TYPES]
    except (AnyReaderError, OSError, KeyError, ValueError) as error:
        raise SourceError(f'{path}: no rosbag2 that can be read: {error}; expected the folder '
                          f'with metadata.yaml and its .db3 or .mcap files') from error
    listed = ', '.join(f'{name} ({kind})' for name, kind in sorted(topics.items())) or 'none'
    if not images or (topic and topic not in images):
        raise SourceError(f'{path}: no images on {topic or "any topic"}; topics with messages: '
                          f'{listed}; expected {" or ".join(IMAGE_TYPES)}'
                          + (': choose one of those with topic' if images else ''))
    # Raw before compressed: the same camera is often recorded as both.
    chosen = topic or min(images, key=lambda name: (IMAGE_TYPES.index(topics[name]), name))
    if len(images) > 1 and not topic:
        warn(f'{path}: images on {", ".join(sorted(images))}; playing {chosen}, choose another '
             f'with topic')

    def read() -> Iterator[Frame]:
        begin = last = -math.inf
        with reader() as bag:
            connections = [item for item in bag.connections if item.topic == chosen]
            for connection, recorded_ns, data in bag.messages(connections=connections):
                try:
                    message = bag.deserialize(data, connection.msgtype)
                    image = _decode(message, connection.msgtype, decode)
                except (ValueError, AnyReaderError, cv2.error) as error:
                    warn(f'{path}, {chosen}: {error}: skipped')
                    continue
                stamp = message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec
                stamp = stamp or 1e-9 * recorded_ns
                if begin == -math.inf:
                    begin = stamp
                if stamp - begin <= last:
                    warn(f'{path}, {chosen}: stamp {stamp:.6f} s is not later than the one '
                         f'before: skipped')
                    continue
                last = stamp - begin
                yield Frame(image, last)

    return Source(f'{chosen} of the rosbag2 {path}', read, fps=fps, size=size, loop=loop)


def _decode(message: Any, kind: str, decode: Decode | None) -> Pixels:
    if kind.endswith('CompressedImage'):
        image = cv2.imdecode(np.frombuffer(message.data, dtype=np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise SourceError(f'a CompressedImage of format {message.format!r} that OpenCV '
                              f'cannot decode; expected jpeg or png')
        return _rgb(image)
    if decode is None:
        raise SourceError('raw images of a bag need a decoder: pass decode=')
    return decode(message)


def _rgb(image: NDArray[Any]) -> Pixels:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)
