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

"""Image messages to RGB and back: truth tables, padding, byte order, and what is refused."""

from array import array
import importlib.util
import sys

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed: pip install ros-rclpy[fastrtps]')

from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from flow_ros.nodes.messages import (
    image_to_rgb,
    image_view,
    MessageError,
    scaled_camera_info,
    to_image,
    viewed_camera_info,
)
from flow_ros.streaming.view import View


def make(encoding, rows, *, width, height, step=None, big=False):
    """Return an Image whose rows are the given bytes, each padded with 0xAA to ``step``."""
    step = len(rows[0]) if step is None else step
    data = array('B')
    for row in rows:
        data.frombytes(bytes(row) + b'\xaa' * (step - len(row)))
    return Image(width=width, height=height, step=step, encoding=encoding, data=data,
                 is_bigendian=int(big))


# Two pixels: pure red-ish and blue-ish, bytes as the encodings' names say, and the RGB expected.
PIXELS = [
    ('rgb8', [200, 10, 20, 30, 40, 250], [[200, 10, 20], [30, 40, 250]]),
    ('bgr8', [20, 10, 200, 250, 40, 30], [[200, 10, 20], [30, 40, 250]]),
    ('8UC3', [20, 10, 200, 250, 40, 30], [[200, 10, 20], [30, 40, 250]]),
    ('8uc3', [20, 10, 200, 250, 40, 30], [[200, 10, 20], [30, 40, 250]]),
    ('rgba8', [200, 10, 20, 1, 30, 40, 250, 2], [[200, 10, 20], [30, 40, 250]]),
    ('bgra8', [20, 10, 200, 1, 250, 40, 30, 2], [[200, 10, 20], [30, 40, 250]]),
    ('8UC4', [20, 10, 200, 1, 250, 40, 30, 2], [[200, 10, 20], [30, 40, 250]]),
    ('mono8', [7, 200], [[7] * 3, [200] * 3]),
    ('8UC1', [7, 200], [[7] * 3, [200] * 3]),
    ('mono16', [0, 0x80, 0xff, 0xff], [[128] * 3, [255] * 3]),
    ('16UC1', [0xff, 0, 0, 0x40], [[1] * 3, [64] * 3]),
    ('rgb16', [0, 0x80, 0, 0, 0xff, 0xff, 0, 0x40, 0, 0, 0, 0],
     [[128, 0, 255], [64, 0, 0]]),
    ('bgr16', [0xff, 0xff, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0x40],
     [[128, 0, 255], [64, 0, 0]]),
]


@pytest.mark.parametrize('padding', [0, 5, 6])
@pytest.mark.parametrize(('encoding', 'row', 'expected'), PIXELS)
def test_pixels(encoding, row, expected, padding):
    message = make(encoding, [row, row, row], width=2, height=3, step=len(row) + padding)
    rgb = image_to_rgb(message)
    assert rgb.dtype == np.uint8 and rgb.flags.c_contiguous
    np.testing.assert_array_equal(rgb, [expected] * 3)


# (Y, U, V) of video range BT.601: black, white, and saturated red.
YUV = [((16, 128, 128), (0, 0, 0)), ((235, 128, 128), (255, 255, 255)),
       ((81, 90, 240), (254, 0, 0))]


@pytest.mark.parametrize(('yuv', 'rgb'), YUV)
@pytest.mark.parametrize(('encoding', 'order'), [
    ('yuv422', 'uyvy'), ('uyvy', 'uyvy'), ('UYVY', 'uyvy'), ('yuv422_yuy2', 'yuyv'),
    ('yuyv', 'yuyv'), ('YUYV', 'yuyv')])
def test_yuv422(encoding, order, yuv, rgb):
    parts = dict(zip('yuv', yuv, strict=True))
    row = [parts[part] for part in order] * 2
    message = make(encoding, [row, row], width=4, height=2, step=11)
    np.testing.assert_allclose(image_to_rgb(message).astype(int),
                               np.broadcast_to(rgb, (2, 4, 3)), atol=2)


@pytest.mark.parametrize(('yuv', 'rgb'), YUV)
@pytest.mark.parametrize('encoding', ['nv12', 'nv21'])
def test_nv12_and_nv21(encoding, yuv, rgb):
    y, u, v = yuv
    chroma = [u, v] * 2 if encoding == 'nv12' else [v, u] * 2
    message = make(encoding, [[y] * 4, [y] * 4, chroma], width=4, height=2)
    np.testing.assert_allclose(image_to_rgb(message).astype(int),
                               np.broadcast_to(rgb, (2, 4, 3)), atol=2)


@pytest.mark.parametrize('pattern', ['rggb', 'bggr', 'gbrg', 'grbg'])
def test_bayer_keeps_red_red(pattern):
    values = {'r': 220, 'g': 60, 'b': 10}
    even = [values[pattern[0]], values[pattern[1]]] * 4
    odd = [values[pattern[2]], values[pattern[3]]] * 4
    rgb = image_to_rgb(make(f'bayer_{pattern}8', [even, odd] * 4, width=8, height=8))
    np.testing.assert_allclose(rgb[2:-2, 2:-2].astype(int),
                               np.broadcast_to((220, 60, 10), (4, 4, 3)), atol=1)


def test_rgb8_without_padding_is_the_messages_own_memory():
    message = make('rgb8', [[1, 2, 3, 4, 5, 6]], width=2, height=1)
    rgb = image_to_rgb(message)
    message.data[0] = 99
    assert rgb[0, 0, 0] == 99


def test_view_is_the_messages_own_memory_for_padded_bgr8():
    message = make('bgr8', [[1, 2, 3], [4, 5, 6]], width=1, height=2, step=8)
    view = image_view(message)
    assert view.shape == (2, 1, 3)
    message.data[8] = 77
    assert view[1, 0, 0] == 77


def test_big_endian_mono16():
    row = [0x80, 0, 0xff, 0xff]
    message = make('mono16', [row], width=2, height=1, big=True)
    np.testing.assert_array_equal(image_to_rgb(message)[0, :, 0], [128, 255])


def test_mono16_white_scales_and_saturates():
    row = np.array([4095, 2048, 65535], '<u2').tobytes()
    message = make('mono16', [row], width=3, height=1)
    np.testing.assert_array_equal(image_to_rgb(message, mono16_white=4095)[0, :, 0],
                                  [255, 128, 255])


def test_data_longer_than_needed_is_taken():
    message = make('mono8', [[1], [2], [3]], width=1, height=2)
    np.testing.assert_array_equal(image_to_rgb(message)[:, 0, 0], [1, 2])


def test_data_of_another_buffer_type():
    """No conversion may rely on data being an array.array."""
    class Other:
        encoding, width, height, step, is_bigendian = 'rgb8', 1, 1, 3, 0
        data = np.array([1, 2, 3], np.uint8)
    np.testing.assert_array_equal(image_to_rgb(Other()), [[[1, 2, 3]]])


@pytest.mark.parametrize(('message', 'kind', 'words'), [
    (make('jpeg', [[0] * 6], width=2, height=1), 'encoding', ['jpeg', 'bgr8', 'cv_bridge']),
    (make('', [[0] * 6], width=2, height=1), 'encoding', ["''", 'bgr8']),
    (make('32FC1', [[0] * 8], width=2, height=1), 'encoding', ['32FC1', 'remap']),
    (make('bgr8', [[0] * 6], width=2, height=2), 'short data', ['6 bytes', '2x2', '12']),
    (make('nv12', [[0] * 2] * 2, width=2, height=2), 'short data', ['4 bytes', '6']),
    (make('bgr8', [[0] * 6], width=0, height=2), 'zero size', ['0x2', '1x1']),
    (make('bgr8', [[0] * 6], width=2, height=0), 'zero size', ['2x0']),
    (make('bgr8', [[0] * 5], width=2, height=1), 'step too small', ['5 bytes', 'at least 6']),
    (make('mono16', [[0] * 3], width=2, height=1), 'step too small', ['3 bytes', 'at least 4']),
    (make('yuyv', [[0] * 6], width=3, height=1), 'odd size', ['3x1', 'divisible by 2']),
])
def test_what_is_refused(message, kind, words):
    if message.encoding == 'jpeg' and importlib.util.find_spec('cv_bridge'):
        pytest.skip('cv_bridge is installed here and answers in its own words')
    with pytest.raises(MessageError) as caught:
        image_to_rgb(message)
    assert caught.value.kind == kind
    for word in words:
        assert word in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec('cv_bridge') is None,
                    reason='cv_bridge is not installed (it is not on PyPI)')
def test_cv_bridge_takes_what_this_does_not_know():
    row = np.array([0x8000, 0xffff], '<u2').tobytes()
    message = make('bayer_rggb16', [row, row], width=2, height=2)
    assert image_to_rgb(message).shape == (2, 2, 3)


@pytest.mark.parametrize(('pixels', 'encoding'), [
    (np.arange(12, dtype=np.float32).reshape(2, 3, 2), '32FC2'),
    (np.arange(6, dtype=np.float32).reshape(2, 3), '32FC1'),
    (np.arange(6, dtype=np.uint8).reshape(2, 3), 'mono8'),
    (np.arange(18, dtype=np.uint8).reshape(2, 3, 3), 'rgb8'),
])
def test_to_image_and_back(pixels, encoding):
    header = Header(frame_id='camera')
    message = to_image(pixels, header)
    assert message.header is header
    assert (message.encoding, message.height, message.width) == (encoding, 2, 3)
    assert message.step == 3 * pixels[0, 0].size * pixels.itemsize
    assert message.is_bigendian == (sys.byteorder == 'big')
    assert len(message.data) == 2 * message.step
    np.testing.assert_array_equal(image_view(message), pixels)


def test_to_image_of_a_single_row_cut_from_a_larger_image():
    # NumPy calls it contiguous whatever the stride of its one row is.
    message = to_image(np.zeros((4, 5, 3), np.uint8)[::2][:1], Header())
    assert (message.step, len(message.data)) == (15, 15)


def test_to_image_of_a_reversed_view_with_a_stated_encoding():
    rgb = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    message = to_image(rgb[..., ::-1], Header(), encoding='bgr8')
    assert message.encoding == 'bgr8'
    np.testing.assert_array_equal(image_to_rgb(message), rgb)


@pytest.mark.parametrize(('pixels', 'encoding'), [
    (np.zeros((2, 3, 2), np.uint8), ''),
    (np.zeros((2, 3), np.float64), ''),
    (np.zeros((2, 3), np.uint8), '32FC1'),
    (np.zeros(3, np.uint8), 'mono8'),
])
def test_to_image_refuses(pixels, encoding):
    with pytest.raises(MessageError, match='expected float32'):
        to_image(pixels, Header(), encoding=encoding)


def camera(**changes):
    info = CameraInfo(width=640, height=480, distortion_model='plumb_bob', d=[0.1] * 5,
                      k=[500.0, 0, 320, 0, 510, 240, 0, 0, 1],
                      p=[500.0, 0, 320, -50, 0, 510, 240, 0, 0, 0, 1, 0])
    for name, value in changes.items():
        setattr(info, name, value)
    return info


def test_camera_info_of_the_same_size_changes_its_header_only():
    header = Header(frame_id='camera')
    info = camera()
    out = scaled_camera_info(info, header, 640, 480)
    assert out.header is header
    out.header = info.header
    assert out == info


def test_camera_info_of_another_size_is_scaled():
    out = scaled_camera_info(camera(), Header(), 320, 120)
    np.testing.assert_allclose(out.k, [250, 0, 160, 0, 127.5, 60, 0, 0, 1])
    np.testing.assert_allclose(out.p, [250, 0, 160, -25, 0, 127.5, 60, 0, 0, 0, 1, 0])
    assert (out.width, out.height) == (320, 120)
    np.testing.assert_allclose(out.d, [0.1] * 5)


def test_camera_info_that_bins_describes_the_binned_image():
    out = scaled_camera_info(camera(binning_x=2, binning_y=2), Header(), 320, 240)
    np.testing.assert_allclose(out.k, camera().k)
    assert out.binning_x == 2


def test_camera_info_with_a_region_is_scaled_from_the_region():
    info = camera()
    info.roi.x_offset, info.roi.y_offset, info.roi.width, info.roi.height = 120, 40, 400, 400
    out = scaled_camera_info(info, Header(), 200, 200)
    np.testing.assert_allclose(out.k, [250, 0, 100, 0, 255, 100, 0, 0, 1])
    assert (out.width, out.roi.width) == (200, 0)


VIEW = View(scale=0.5, roi=(100, 60, 400, 200))


def test_camera_info_without_a_view_is_the_cameras():
    info = camera(binning_x=2, binning_y=2)
    assert (viewed_camera_info(info, info.header, View(), 320, 240)
            == scaled_camera_info(info, info.header, 320, 240))


def test_camera_info_of_a_view_is_shifted_and_scaled():
    header = Header(frame_id='camera')
    out = viewed_camera_info(camera(), header, VIEW, 640, 480)
    assert out.header is header
    assert (out.width, out.height) == (200, 100)
    cx, cy = (320.5 - 100) / 2 - 0.5, (240.5 - 60) / 2 - 0.5
    np.testing.assert_allclose(out.k, [250, 0, cx, 0, 255, cy, 0, 0, 1])
    np.testing.assert_allclose(out.p, [250, 0, cx, -25, 0, 255, cy, 0, 0, 0, 1, 0])
    np.testing.assert_allclose(out.d, camera().d)


def test_a_point_is_where_the_views_camera_info_says():
    """What projects to a pixel of the camera's image projects to the same place of the view."""
    ray = np.array([0.1, -0.05, 1.0])
    full = np.reshape(camera().k, (3, 3)) @ ray
    viewed = viewed_camera_info(camera(), Header(), VIEW, 640, 480)
    np.testing.assert_allclose((np.reshape(viewed.k, (3, 3)) @ ray)[:2],
                               VIEW.to_view(full[:2], 640, 480))


def test_camera_info_of_a_view_of_a_binned_region_is_for_the_view_alone():
    info = camera(binning_x=2, binning_y=2)
    info.roi.x_offset, info.roi.y_offset, info.roi.width, info.roi.height = 120, 40, 400, 400
    out = viewed_camera_info(info, Header(), View(roi=(50, 60, 100, 80)), 200, 200)
    np.testing.assert_allclose(out.k, [250, 0, 50, 0, 255, 40, 0, 0, 1])
    assert (out.width, out.height, out.binning_x, out.roi.width) == (100, 80, 0, 0)


def test_camera_info_of_a_view_without_a_size_is_taken_for_the_image():
    out = viewed_camera_info(camera(width=0, height=0), Header(), View(roi=(20, 40, 64, 48)),
                             640, 480)
    np.testing.assert_allclose(out.k, [500, 0, 300, 0, 510, 200, 0, 0, 1])
    assert (out.width, out.height) == (64, 48)


def test_uncalibrated_camera_info_stays_uncalibrated():
    for out in (scaled_camera_info(CameraInfo(width=640, height=480), Header(), 320, 240),
                viewed_camera_info(CameraInfo(width=640, height=480), Header(), VIEW, 640, 480)):
        assert not np.any(out.k) and not np.any(out.p)
