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

"""Conversion between sensor_msgs/Image and NumPy.

A conversion starts with a view of the message's own memory (no copy), which honours ``step`` and
``is_bigendian``. An unpadded ``rgb8`` image is that view; the other encodings take one
vectorised pass in OpenCV, which is several times faster than NumPy's reversed copies.
"""

from collections.abc import Callable
from dataclasses import dataclass
import sys
from typing import Any, TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

if TYPE_CHECKING:  # what only reads images needs no torch
    from flow_ros.streaming.view import View

MONO16_WHITE = 65535


class MessageError(ValueError):
    """A message that cannot be used; the text names what was seen, expected, and what to do.

    ``kind`` is the same for all errors of one sort, whatever numbers the text holds.
    """

    def __init__(self, text: str, *, kind: str = 'message') -> None:
        """Hold the text and the sort of error."""
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Encoding:
    """How an encoding lies in memory, and how it becomes RGB.

    ``code`` is OpenCV's conversion to RGB, None where the pixels are RGB already. ``rows`` is
    the number of rows in memory for two rows of the image, ``even`` the (width, height) divisors.
    """

    channels: int
    dtype: str = 'u1'
    code: int | None = None
    rows: int = 2
    even: tuple[int, int] = (1, 1)


_BGR = cv2.COLOR_BGR2RGB
_BGRA = cv2.COLOR_BGRA2RGB
_RGBA = cv2.COLOR_RGBA2RGB
_MONO = cv2.COLOR_GRAY2RGB
_UYVY = Encoding(2, code=cv2.COLOR_YUV2RGB_UYVY, even=(2, 1))
_YUYV = Encoding(2, code=cv2.COLOR_YUV2RGB_YUY2, even=(2, 1))

# What is shown as colour or grey. OpenCV names a Bayer pattern by its second row's second pixel
# on, ROS by the first row's first: ROS's rggb is OpenCV's BG.
COLOR_ENCODINGS: dict[str, Encoding] = {
    'rgb8': Encoding(3),
    'bgr8': Encoding(3, code=_BGR),
    '8UC3': Encoding(3, code=_BGR),
    'rgba8': Encoding(4, code=_RGBA),
    'bgra8': Encoding(4, code=_BGRA),
    '8UC4': Encoding(4, code=_BGRA),
    'mono8': Encoding(1, code=_MONO),
    '8UC1': Encoding(1, code=_MONO),
    'rgb16': Encoding(3, 'u2'),
    'bgr16': Encoding(3, 'u2', _BGR),
    'rgba16': Encoding(4, 'u2', _RGBA),
    'bgra16': Encoding(4, 'u2', _BGRA),
    'mono16': Encoding(1, 'u2', _MONO),
    '16UC1': Encoding(1, 'u2', _MONO),
    'yuv422': _UYVY,
    'uyvy': _UYVY,
    'yuv422_yuy2': _YUYV,
    'yuyv': _YUYV,
    'yuy2': _YUYV,
    'nv12': Encoding(1, code=cv2.COLOR_YUV2RGB_NV12, rows=3, even=(2, 2)),
    'nv21': Encoding(1, code=cv2.COLOR_YUV2RGB_NV21, rows=3, even=(2, 2)),
    'bayer_rggb8': Encoding(1, code=cv2.COLOR_BayerBG2RGB, even=(2, 2)),
    'bayer_bggr8': Encoding(1, code=cv2.COLOR_BayerRG2RGB, even=(2, 2)),
    'bayer_gbrg8': Encoding(1, code=cv2.COLOR_BayerGR2RGB, even=(2, 2)),
    'bayer_grbg8': Encoding(1, code=cv2.COLOR_BayerGB2RGB, even=(2, 2)),
}
# What can be viewed but is no picture.
FLOAT_ENCODINGS: dict[str, Encoding] = {
    '32FC1': Encoding(1, 'f4'),
    '32FC2': Encoding(2, 'f4'),
    '32FC3': Encoding(3, 'f4'),
}


def find_encoding(name: str) -> Encoding | None:
    """Return the encoding of that name, in any case (drivers write 'YUYV', '8uc3'), or None."""
    known = COLOR_ENCODINGS | FLOAT_ENCODINGS
    if name in known:
        return known[name]
    return {key.lower(): value for key, value in known.items()}.get(name.strip().lower())


def image_view(message: Image) -> NDArray[Any]:
    """Return the pixels as they lie in the message: (H, W) or (H, W, channels), a view, no copy.

    Raises MessageError on an unknown encoding and on sizes that do not fit together.
    """
    encoding = find_encoding(message.encoding)
    if encoding is None:
        raise _unknown(message.encoding)
    width, height, step = message.width, message.height, message.step
    if width == 0 or height == 0:
        raise MessageError(f'the image is {width}x{height} px: expected at least 1x1; '
                           f'the publisher sends empty frames, look at its log', kind='zero size')
    if width % encoding.even[0] or height % encoding.even[1]:
        raise MessageError(f'the image is {width}x{height} px; {message.encoding} needs a width '
                           f'divisible by {encoding.even[0]} and a height by {encoding.even[1]}: '
                           f'crop it or choose another encoding in the driver', kind='odd size')
    item = np.dtype(('>' if message.is_bigendian else '<') + encoding.dtype)
    least = width * encoding.channels * item.itemsize
    if step < least:
        raise MessageError(f'step is {step} bytes; {width} px of {message.encoding} need at least '
                           f'{least}: the driver must set step to the bytes per row',
                           kind='step too small')
    rows = height * encoding.rows // 2
    data = memoryview(message.data)
    if data.nbytes < step * rows:
        raise MessageError(f'data has {data.nbytes} bytes; {width}x{height} px of '
                           f'{message.encoding} with step {step} need {step * rows}: '
                           f'the publisher cuts its frames short', kind='short data')
    shape: tuple[int, ...] = (rows, width)
    strides: tuple[int, ...] = (step, encoding.channels * item.itemsize)
    if encoding.channels > 1:
        shape, strides = (*shape, encoding.channels), (*strides, item.itemsize)
    return np.ndarray(shape, item, buffer=data, strides=strides)


def image_to_rgb(message: Image, *, mono16_white: int = MONO16_WHITE) -> NDArray[np.uint8]:
    """Return the image as RGB uint8 (H, W, 3), contiguous.

    An unpadded ``rgb8`` image is a view of the message's memory, anything else a new array.
    16-bit values are scaled so that ``mono16_white`` becomes 255: one scale for all frames,
    because a scale of each frame's own would look like a change of light.
    """
    encoding = find_encoding(message.encoding)
    if encoding is None:
        return _through_cv_bridge(message)
    view = image_view(message)
    if encoding.dtype == 'f4':
        raise MessageError(f'encoding {message.encoding} is no picture; expected one of '
                           f'{", ".join(COLOR_ENCODINGS)}: remap `image` to a camera topic',
                           kind='encoding')
    if encoding.dtype == 'u2':
        native = np.ascontiguousarray(view, dtype=np.uint16)  # OpenCV knows native order only
        view = cv2.convertScaleAbs(native, alpha=255.0 / mono16_white)
    if encoding.code is None:
        return np.ascontiguousarray(view)
    return np.asarray(cv2.cvtColor(_for_opencv(view), encoding.code), dtype=np.uint8)


def to_image(pixels: NDArray[Any], header: Header, *, encoding: str = '') -> Image:
    """Return ``pixels`` as an Image with ``header``; padding none, byte order this machine's.

    Without ``encoding``: float32 (H, W) is 32FC1 and (H, W, 2) 32FC2; uint8 (H, W) is mono8
    and (H, W, 3) rgb8.
    """
    by_shape = {('f4', 1): '32FC1', ('f4', 2): '32FC2', ('u1', 1): 'mono8', ('u1', 3): 'rgb8'}
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    name = encoding or by_shape.get((pixels.dtype.str[1:], channels), '')
    layout = find_encoding(name)
    if (pixels.ndim not in (2, 3) or layout is None or layout.channels != channels
            or layout.dtype != pixels.dtype.str[1:]):
        raise MessageError(f'pixels of shape {pixels.shape}, {pixels.dtype}, encoding '
                           f'{encoding or "unstated"}: expected float32 (H, W[, 2]) or uint8 '
                           f'(H, W[, 3]), or the encoding that fits', kind='encoding')
    native = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder('='))
    message = Image()
    message.header = header
    message.height, message.width = native.shape[:2]
    message.encoding = name
    message.is_bigendian = int(sys.byteorder == 'big')
    message.step = native.nbytes // native.shape[0] if native.size else 0
    # Into the empty array that the message has: assigning one would copy it once more, and
    # assigning bytes is checked byte by byte where checks are on: 100 ms.
    message.data.frombytes(native.reshape(-1).view(np.uint8).data)
    return message


def scaled_camera_info(info: CameraInfo, header: Header, width: int, height: int) -> CameraInfo:
    """Return ``info`` with ``header``, K and P scaled where it describes another size.

    The size it describes is that of its region of interest after binning, where it has those.
    """
    described = ((info.roi.width or info.width) // max(1, info.binning_x),
                 (info.roi.height or info.height) // max(1, info.binning_y))
    if 0 in described or described == (width, height):
        return _copied(info, header)
    return _of_the_image(info, header, width, height)


def viewed_camera_info(info: CameraInfo, header: Header, view: 'View', width: int,
                       height: int) -> CameraInfo:
    """Return the info of the ``view`` of a camera's image of ``width`` x ``height`` px.

    K and P are then of the view itself: so, as sensor_msgs has it, width and height are the
    view's, and binning and region of interest are none. Distortion and rectification are not
    changed by a view. Without a view it is ``scaled_camera_info``.
    """
    if view.whole:
        return scaled_camera_info(info, header, width, height)
    viewed = _of_the_image(info, header, width, height)
    matrix = view.matrix(width, height)
    viewed.k = (matrix @ np.reshape(viewed.k, (3, 3))).ravel()
    viewed.p = (matrix @ np.reshape(viewed.p, (3, 4))).ravel()
    viewed.width, viewed.height = view.size_of(width, height)
    return viewed


def _copied(info: CameraInfo, header: Header) -> CameraInfo:
    return CameraInfo(header=header, width=info.width, height=info.height, d=info.d, r=info.r,
                      distortion_model=info.distortion_model, k=info.k, p=info.p,
                      binning_x=info.binning_x, binning_y=info.binning_y, roi=info.roi)


def _of_the_image(info: CameraInfo, header: Header, width: int, height: int) -> CameraInfo:
    """Return ``info`` with K and P for the image itself, not for the full, unbinned sensor."""
    x = width / (info.roi.width or info.width or width)
    y = height / (info.roi.height or info.height or height)
    shift = np.array([[info.roi.x_offset], [info.roi.y_offset], [0.0]])
    scale = np.array([[x], [y], [1.0]])
    result = _copied(info, header)
    for name, columns in (('k', 3), ('p', 4)):
        matrix = np.array(getattr(info, name), dtype=np.float64).reshape(3, columns)
        matrix[:, 2:3] -= shift * (matrix[2, 2] != 0)
        setattr(result, name, (matrix * scale).ravel())
    result.width, result.height = width, height
    result.binning_x = result.binning_y = 0
    result.roi = type(info.roi)()
    return result


def _for_opencv(view: NDArray[Any]) -> NDArray[Any]:
    """Return ``view``, copied only if OpenCV cannot take its strides."""
    return view if view.strides[0] % view.itemsize == 0 else np.ascontiguousarray(view)


def _unknown(name: str) -> MessageError:
    return MessageError(f'unknown encoding {name!r}; expected one of '
                        f'{", ".join(COLOR_ENCODINGS)}: choose one in the camera driver, or '
                        f'install cv_bridge (apt install ros-$ROS_DISTRO-cv-bridge) for more',
                        kind='encoding')


def _load_cv_bridge() -> Callable[[Image, str], Any] | None:
    """Return cv_bridge's conversion, or None where it is absent or built for another NumPy."""
    try:
        from cv_bridge import CvBridge
    except (ImportError, AttributeError):
        return None
    convert: Callable[[Image, str], Any] = CvBridge().imgmsg_to_cv2
    return convert


def _through_cv_bridge(message: Image) -> NDArray[np.uint8]:
    convert = _load_cv_bridge()
    if convert is None or not message.encoding:
        raise _unknown(message.encoding)
    try:
        return np.ascontiguousarray(convert(message, 'rgb8'), dtype=np.uint8)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise MessageError(f'cv_bridge cannot turn encoding {message.encoding!r} into rgb8: '
                           f'{error}', kind='encoding') from error
