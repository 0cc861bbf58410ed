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

"""Reading and writing flow files and images.

Flow formats: ``.flo`` (Middlebury: float32, dense, unknown pixels 1e9 or more) and 16-bit
``.png`` (KITTI: 1/64 px steps, a channel that says which pixels are valid) are read and
written; ``.pfm`` (FlyingThings3D: float32, rows from below, a third channel of zeros) is, too.
Everywhere in this package flow is (H, W, 2) float32, u (right) then v (down), invalid pixels NaN.

A file that is damaged, cut off or of another kind raises ``FlowFileError`` rather than giving
half a picture, which is what image libraries do.
"""

from pathlib import Path
import re
import struct
from typing import Any
import zlib

import cv2
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
ByteArray = NDArray[np.uint8]

FLO_TAG = b'PIEH'  # the bytes of the float32 202021.25, little-endian
FLO_HEADER_BYTES = 12
FLO_UNKNOWN = 1e9  # from here on a value means "unknown"
FLO_UNKNOWN_WRITTEN = 1e10
FLO_MAX_SIDE = 99999

PFM_TAG = b'PF'

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
KITTI_SCALE = 64.0
KITTI_OFFSET = 32768.0
KITTI_MIN = -KITTI_OFFSET / KITTI_SCALE
KITTI_MAX = (65535.0 - KITTI_OFFSET) / KITTI_SCALE


class FlowFileError(ValueError):
    """A file that is not what it should be: names the file, what was seen and expected."""


def read_flow(path: str | Path) -> tuple[FloatArray, BoolArray]:
    """Return the flow (H, W, 2), invalid pixels NaN, and the valid mask (H, W) of a file.

    The kind of file is known by its first bytes, not by its name.
    """
    path = Path(path)
    data = _read_bytes(path)
    if data.startswith(FLO_TAG):
        flow = _decode_flo(data, path)
    elif data.startswith(PNG_SIGNATURE):
        flow = _decode_kitti(data, path)
    elif data.startswith((PFM_TAG + b'\n', PFM_TAG + b'\r')):
        flow = _decode_pfm(data, path)
    else:
        raise FlowFileError(
            f'{path} is not a flow file: it starts with {data[:8]!r}; expected a .flo file '
            f'(starts with {FLO_TAG!r}), a KITTI 16-bit .png or a .pfm of three channels '
            f'(starts with {PFM_TAG!r}). Look whether it is the right file, and whether a '
            'download left an error page or a pointer in its place')
    return flow, np.isfinite(flow[..., 0])


def write_flow(path: str | Path, flow: NDArray[Any], valid: BoolArray | None = None) -> None:
    """Write ``flow`` (H, W, 2) as ``.flo``, KITTI ``.png`` or ``.pfm``, by the path's suffix.

    Pixels that are NaN or not ``valid`` are written as unknown. A ``.png`` holds steps of
    1/64 px between -512 and 511.98 px; flow outside of that raises ValueError.
    """
    path = Path(path)
    flow = np.array(flow, dtype=np.float32)
    if flow.ndim != 3 or flow.shape[2] != 2 or 0 in flow.shape:
        raise ValueError(f'flow must be (H, W, 2); seen {flow.shape}')
    known = np.isfinite(flow).all(axis=2)
    if valid is not None:
        if np.shape(valid) != flow.shape[:2]:
            raise ValueError(f'valid must be {flow.shape[:2]}, as the flow is; '
                             f'seen {np.shape(valid)}')
        known &= np.asarray(valid, dtype=bool)
    suffix = path.suffix.lower()
    if suffix == '.flo':
        path.write_bytes(_encode_flo(flow, known))
    elif suffix == '.png':
        path.write_bytes(_encode_kitti(flow, known))
    elif suffix == '.pfm':
        path.write_bytes(_encode_pfm(flow, known))
    else:
        raise ValueError(f'{path}: flow is written as .flo, .png or .pfm; '
                         f'seen suffix {suffix!r}')


def read_image(path: str | Path) -> ByteArray:
    """Return an image file as RGB uint8 (H, W, 3); grey becomes RGB, 16 bits become 8."""
    path = Path(path)
    data = _read_bytes(path)
    if data.startswith(PNG_SIGNATURE):
        _check_png(data, path)
    elif data.startswith(b'\xff\xd8'):
        _check_jpeg(data, path)
    elif data.startswith((b'P5', b'P6')):
        _check_pnm(data, path)
    elif data.startswith(b'RIFF') and data[8:12] == b'WEBP':
        _check_webp(data, path)
    image = _decode(data, cv2.IMREAD_COLOR)
    if image is None:
        raise FlowFileError(f'{path} is not an image that can be read: {len(data)} bytes that '
                            f'start with {data[:8]!r}; expected PNG, JPEG, PPM, WebP, BMP or TIFF')
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def read_mask(path: str | Path) -> BoolArray:
    """Return a mask file (any image; not black is True) as (H, W) bool."""
    return np.asarray(read_image(path).any(axis=2), dtype=np.bool_)


def write_image(path: str | Path, image: ByteArray) -> None:
    """Write RGB (H, W, 3) or grey (H, W) uint8 as the kind of file the suffix names."""
    path = Path(path)
    if image.ndim == 3:
        image = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), dtype=np.uint8)
    try:
        done, data = cv2.imencode(path.suffix, image)
    except cv2.error as error:
        raise ValueError(f'{path}: no image format has the suffix {path.suffix!r}; '
                         'write .png or .jpg') from error
    if not done:
        raise ValueError(f'{path}: an image of shape {image.shape} cannot be written so')
    path.write_bytes(data.tobytes())


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise FlowFileError(f'{path} is a folder; expected a file')
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FlowFileError(f'{path} does not exist') from error
    except OSError as error:
        raise FlowFileError(f'{path} cannot be read: {error.strerror}') from error
    if not data:
        raise FlowFileError(f'{path} is empty (0 bytes): write or download it again')
    return data


def _decode(data: bytes, flags: int) -> NDArray[Any] | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # too large, or damaged in a way the decoder throws on
        return None


def _decode_flo(data: bytes, path: Path) -> FloatArray:
    if len(data) < FLO_HEADER_BYTES:
        raise FlowFileError(f'{path} is cut off: {len(data)} bytes, its header alone has '
                            f'{FLO_HEADER_BYTES}: write or download it again')
    width, height = struct.unpack_from('<ii', data, 4)
    if not (0 < width <= FLO_MAX_SIDE and 0 < height <= FLO_MAX_SIDE):
        raise FlowFileError(f'{path} is damaged: its header says {width}x{height} pixels; '
                            f'expected 1 to {FLO_MAX_SIDE} each way')
    expected = FLO_HEADER_BYTES + 8 * width * height
    if len(data) != expected:
        raise FlowFileError(f'{path} is {"cut off" if len(data) < expected else "damaged"}: '
                            f'{len(data)} bytes; expected {expected} for {width}x{height} '
                            'pixels: write or download it again')
    flow = np.frombuffer(data, '<f4', offset=FLO_HEADER_BYTES).reshape(height, width, 2)
    flow = flow.astype(np.float32)
    with np.errstate(invalid='ignore'):
        unknown = ~(np.abs(flow) < FLO_UNKNOWN).all(axis=2)  # NaN is unknown, too
    flow[unknown] = np.nan
    return flow


def _encode_flo(flow: FloatArray, known: BoolArray) -> bytes:
    if bool((np.abs(flow[known]) >= FLO_UNKNOWN).any()):
        raise ValueError(f'flow of {FLO_UNKNOWN:g} px and more means "unknown" in a .flo file')
    flow[~known] = FLO_UNKNOWN_WRITTEN
    height, width = known.shape
    return FLO_TAG + struct.pack('<ii', width, height) + flow.astype('<f4').tobytes()


def _decode_kitti(data: bytes, path: Path) -> FloatArray:
    _check_png(data, path)
    image = _decode(data, cv2.IMREAD_UNCHANGED)
    if image is None:
        raise FlowFileError(f'{path} is damaged: its PNG data cannot be decoded')
    if image.dtype != np.uint16 or image.ndim != 3 or image.shape[2] != 3:
        channels = 1 if image.ndim == 2 else image.shape[2]
        raise FlowFileError(
            f'{path} is a PNG of {8 * image.dtype.itemsize} bits and {channels} channel(s); '
            'a KITTI flow file has 16 bits and 3 channels. Is it a frame or a colour picture?')
    # OpenCV gives blue first: valid, v, u.
    flow = (image[..., 2:0:-1].astype(np.float32) - KITTI_OFFSET) / KITTI_SCALE
    flow[image[..., 0] == 0] = np.nan
    return np.ascontiguousarray(flow, dtype=np.float32)


def _encode_kitti(flow: FloatArray, known: BoolArray) -> bytes:
    values = flow[known]
    if values.size and (values.min() < KITTI_MIN or values.max() > KITTI_MAX):
        raise ValueError(f'a KITTI .png holds flow from {KITTI_MIN:g} to {KITTI_MAX:.2f} px; '
                         f'seen {values.min():g} to {values.max():g} px: write a .flo file')
    image = np.zeros((*known.shape, 3), dtype=np.uint16)
    image[known, 0] = 1
    image[known, 1:] = np.rint(values[:, ::-1] * KITTI_SCALE + KITTI_OFFSET)
    return bytes(cv2.imencode('.png', image)[1].tobytes())


def _decode_pfm(data: bytes, path: Path) -> FloatArray:
    # PF, width height, a scale whose sign says the byte order, then rows from the lowest up.
    match = re.match(rb'PF\s+(\d+)\s+(\d+)\s+([-+.\deE]+)(?:\r\n|\s)', data[:128])
    if match is None:
        raise FlowFileError(f'{path} is damaged: its header {data[:32]!r} is not that of a .pfm')
    width, height = int(match[1]), int(match[2])
    expected = match.end() + 12 * width * height
    if len(data) != expected or 0 in (width, height):
        raise FlowFileError(f'{path} is {"cut off" if len(data) < expected else "damaged"}: '
                            f'{len(data)} bytes; expected {expected} for {width}x{height} '
                            'pixels: write or download it again')
    kind = '<f4' if match[3].startswith(b'-') else '>f4'
    rows = np.frombuffer(data, kind, offset=match.end()).reshape(height, width, 3)
    flow = rows[::-1, :, :2].astype(np.float32)
    flow[~_both_finite(flow)] = np.nan
    return flow


def _encode_pfm(flow: FloatArray, known: BoolArray) -> bytes:
    height, width = known.shape
    rows = np.zeros((height, width, 3), dtype='<f4')
    rows[..., :2] = np.where(known[..., None], flow, np.nan)
    return f'PF\n{width} {height}\n-1.0\n'.encode() + rows[::-1].tobytes()


def _both_finite(flow: FloatArray) -> BoolArray:
    # Not all(axis=2), which takes ten times as long over an axis of two.
    return np.asarray(np.isfinite(flow[..., 0]) & np.isfinite(flow[..., 1]))


def _check_png(data: bytes, path: Path) -> None:
    """Raise unless every chunk up to the end chunk is whole: decoders forgive, we must not."""
    position = len(PNG_SIGNATURE)
    while True:
        if position + 12 > len(data):
            raise FlowFileError(f'{path} is cut off: the PNG has no end chunk in its '
                                f'{len(data)} bytes: write or download it again')
        length, kind = struct.unpack_from('>I4s', data, position)
        end = position + 12 + length
        if end > len(data):
            raise FlowFileError(f'{path} is cut off: {len(data)} bytes; its chunk {kind!r} '
                                f'ends at {end}: write or download it again')
        checksum, = struct.unpack_from('>I', data, end - 4)
        if zlib.crc32(memoryview(data)[position + 4:end - 4]) != checksum:
            raise FlowFileError(f'{path} is damaged: the checksum of its PNG chunk {kind!r} at '
                                f'byte {position} is wrong: write or download it again')
        if kind == b'IEND':
            return
        position = end


def _check_jpeg(data: bytes, path: Path) -> None:
    # Inside a scan 0xff is always followed by 0x00 or a restart marker, so the last start of
    # a scan must be followed by an end of image; a thumbnail's lies before it.
    scan = data.rfind(b'\xff\xda')
    if scan < 0 or data.find(b'\xff\xd9', scan) < 0:
        raise FlowFileError(f'{path} is cut off: the JPEG has no end in its {len(data)} bytes: '
                            'write or download it again')


def _check_pnm(data: bytes, path: Path) -> None:
    header = re.match(rb'P([56])(?:\s+|#[^\n]*\n)+(\d+)(?:\s+|#[^\n]*\n)+(\d+)'
                      rb'(?:\s+|#[^\n]*\n)+(\d+)\s', data[:512])
    if header is None:
        raise FlowFileError(f'{path} is damaged: {data[:16]!r} is no header of a PPM or PGM')
    channels = 3 if header[1] == b'6' else 1
    sample_bytes = 2 if int(header[4]) > 255 else 1
    width, height = int(header[2]), int(header[3])
    expected = header.end() + channels * sample_bytes * width * height
    if len(data) < expected:
        raise FlowFileError(f'{path} is cut off: {len(data)} bytes; expected {expected} for '
                            f'{width}x{height} pixels: write or download it again')


def _check_webp(data: bytes, path: Path) -> None:
    length, = struct.unpack_from('<I', data, 4)
    if len(data) < length + 8:
        raise FlowFileError(f'{path} is cut off: {len(data)} bytes; its header says '
                            f'{length + 8}: write or download it again')
