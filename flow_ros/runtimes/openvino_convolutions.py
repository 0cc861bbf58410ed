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

"""Convolutions of an OpenVINO model with fewer products (``ops.winograd``), exact in float32.

OpenVINO computes 3x3, 1x5 and 5x1 convolutions directly, at the peak of the CPU. Most are faster
as matrix products at the points, and so are the ways to the points and back: each is one product
with a small constant matrix, between two lists of rows. On two cores with AVX-512, 3x3, per
convolution: 64 to 64 channels on a map of 60x80 in 1.04 ms instead of 1.60, 80 to 80 in 1.42
instead of 2.54, 128 to 128 on 30x40 in 0.87 instead of 1.57, on 112x256 in 18 instead of 37 (28
where embedding bags led to the points and back).
Rounding at the points needs float32: for bf16 this is nothing.
"""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
import openvino
from openvino import opset14 as ops
from openvino.passes import ConstantFolding, Manager
import torch

from flow_ros.ops.winograd import matrices, RESULTS, TAPS, transformed

LEAST_CELLS = 1000
"""Of a map: on smaller ones the products are too small to be fast."""

LARGEST_SHARE = 0.6
"""Of the multiplications of a direct convolution, those that may be left: what is passed through
memory on the way takes its time too."""

BLOCK_BYTES = 2 ** 22
"""What a block holds at the points, at most: it shall stay in the cache."""

TO_ROWS, TO_MAPS = [0, 2, 3, 1], [0, 3, 1, 2]

UNARY = {'Relu': ops.relu, 'Sigmoid': ops.sigmoid, 'Tanh': ops.tanh}
BINARY = {'Add': ops.add, 'Subtract': ops.subtract, 'Multiply': ops.multiply}


def save_products(model: Any) -> int:
    """Change the convolutions of ``model`` that are faster at the points; return how many.

    What lies between such convolutions, inputs and outputs with their channels last is moved to
    rows too: to (H * W, C), for of a tensor of four dimensions OpenVINO may choose another order,
    which has cost a copy of each map on both sides of a concatenation. Shapes must be fixed and
    the arithmetic float32.
    """
    folder = Manager()
    folder.register_pass(ConstantFolding())
    folder.run_passes(model)  # weights that are cut and joined become numbers
    chosen = [node for node in model.get_ordered_ops()
              if node.get_type_name() == 'Convolution' and _gains(node)]
    if not chosen:
        return 0
    shared: Shared = {}
    names = {node.get_friendly_name() for node in chosen}
    for node in model.get_ordered_ops():
        if node.get_friendly_name() in names:
            _replace(*_at_the_points(node, shared))
        elif _order(node) == TO_ROWS:
            source = node.input(0).get_source_output()
            if _order(source.get_node()) == TO_MAPS:
                node.output(0).replace(source.get_node().input(0).get_source_output())
        elif any(_order(port.get_source_output().get_node()) == TO_MAPS
                 for port in node.inputs()):
            _move_to_rows(node)
    return len(chosen)


def _order(node: Any) -> list[int] | None:
    """Return the order of a Transpose; None of any other node."""
    if node.get_type_name() != 'Transpose':
        return None
    order = node.input(1).get_source_output().get_node()
    return list(order.data) if order.get_type_name() == 'Constant' else None


def _rows(output: Any) -> Any:
    """Return ``output``, (1, C, H, W), as (H * W, C)."""
    node = output.get_node()
    shape = output.get_shape()
    if node.get_type_name() == 'Constant':
        return ops.constant(np.transpose(node.data, TO_ROWS).reshape(-1, shape[1])).output(0)
    last = None
    if _order(node) == TO_MAPS:
        last = node.input(0).get_source_output()
        source = last.get_node()
        if source.get_type_name() == 'Reshape' and len(source.get_input_shape(0)) == 2:
            return source.input(0).get_source_output()
    for reader in output.get_target_inputs():
        if _order(reader.get_node()) == TO_ROWS and reader.get_index() == 0:
            last = last or reader.get_node().output(0)
    last = last or ops.transpose(output, _whole(TO_ROWS)).output(0)
    return ops.reshape(last, _whole([shape[2] * shape[3], shape[1]]), False).output(0)


def _replace(node: Any, rows: list[Any]) -> None:
    """Let the readers of ``node`` have ``rows``, its results as (H * W, C)."""
    for output, each in zip(node.outputs(), rows, strict=True):
        _, channels, height, width = output.get_shape()
        last = ops.reshape(each, _whole([1, height, width, channels]), False)
        output.replace(ops.transpose(last, _whole(TO_MAPS)).output(0))


def _move_to_rows(node: Any) -> None:
    """Let ``node`` compute in rows where it is of a kind that can."""
    kind = node.get_type_name()
    sources = [port.get_source_output() for port in node.inputs()]
    if any(output.get_partial_shape().is_dynamic or len(output.get_shape()) != 4
           or output.get_shape()[0] != 1 for output in node.outputs()):
        return
    size = list(node.get_output_shape(0))[2:]
    if kind in UNARY:
        _replace(node, [UNARY[kind](_rows(sources[0])).output(0)])
    elif kind in BINARY:
        if all(_spreads(source, size) for source in sources):
            given = [_rows(source) if len(source.get_shape()) == 4 else source
                     for source in sources]
            _replace(node, [BINARY[kind](*given).output(0)])
    elif kind == 'Concat' and node.get_attributes()['axis'] in (1, -3):
        _replace(node, [ops.concat([_rows(source) for source in sources], 1).output(0)])
    elif kind in ('Split', 'VariadicSplit'):
        axis = sources[1].get_node()
        if axis.get_type_name() == 'Constant' and int(axis.data) in (1, -3):
            whole = _rows(sources[0])
            parts = (ops.split(whole, _whole(1), node.get_attributes()['num_splits'])
                     if kind == 'Split' else
                     ops.variadic_split(whole, _whole(1), sources[2]))
            _replace(node, parts.outputs())


def _spreads(source: Any, size: list[int]) -> bool:
    """Return whether ``source`` as rows meets rows of maps of ``size`` (H, W) as it did maps."""
    if source.get_partial_shape().is_dynamic:
        return False
    shape = list(source.get_shape())
    return shape == [] or (len(shape) == 4 and shape[0] == 1 and shape[2:] in (size, [1, 1]))


def _gains(node: Any) -> bool:
    weight = node.input(1).get_source_output().get_node()
    shape = node.output(0).get_partial_shape()
    if weight.get_type_name() != 'Constant' or shape.is_dynamic:
        return False
    attributes = node.get_attributes()
    outputs, inputs, *kernel = weight.get_output_shape(0)
    size = shape.to_shape()
    same = [side // 2 for side in kernel]
    return (weight.get_element_type() == openvino.Type.f32 and size[0] == 1
            and list(attributes['strides']) == [1, 1] == list(attributes['dilations'])
            and list(attributes['pads_begin']) == same == list(attributes['pads_end'])
            and list(size)[2:] == list(node.get_input_shape(0))[2:]
            and size[2] * size[3] >= LEAST_CELLS
            and all(taps in TAPS for taps in kernel)
            and _share(outputs, inputs, kernel) <= LARGEST_SHARE)


def _share(outputs: int, inputs: int, kernel: list[int]) -> float:
    """Return the multiplications at the points, as a share of those of a direct convolution."""
    results = prod(RESULTS if taps > 1 else 1 for taps in kernel)
    points = prod(RESULTS + taps - 1 if taps > 1 else 1 for taps in kernel)
    there, products, back = points * points * inputs, points * inputs * outputs, (
        results * points * outputs)
    return (there + products + back) / (results * prod(kernel) * inputs * outputs)


def _at_the_points(node: Any, shared: 'Shared') -> tuple[Any, list[Any]]:
    """Return the node whose results these are, and what computes them, each (H * W, K).

    That is the convolution ``node`` itself, or what alone reads it and cuts its channels into
    equal parts: then each part is gathered for itself and nothing is copied.
    """
    result = _cut(node)
    source = node.input(0).get_source_output()
    weight = torch.from_numpy(node.input(1).get_source_output().get_node().data.copy())
    outputs, inputs, *kernel = weight.shape
    height, width = list(node.get_output_shape(0))[2:]
    # (points, K, C), as OpenVINO wants them: what it would have to turn, it would keep once for
    # each block.
    filters = ops.constant(transformed(weight).numpy())
    points = filters.get_output_shape(0)[0]
    (back_y, _, _), (back_x, _, _) = (matrices(taps) for taps in kernel)
    back = ops.constant(np.kron(back_y, back_x).astype(np.float32))  # (results, points)
    across, down = -(-width // len(back_x)), -(-height // len(back_y))
    most = max(1, BLOCK_BYTES // (4 * points * across * max(inputs, outputs)))
    blocks = -(-down // most)
    at_once = -(-down // blocks)
    parts = [range(first, min(first + at_once, down)) for first in range(0, down, at_once)]
    key = (source.get_node().get_friendly_name(), source.get_index(), *kernel)
    values = shared.get(key) or _to_the_points(_rows(source), (height, width),
                                               (kernel[0], kernel[1]), parts, across)
    if blocks == 1:
        shared[key] = values
    count = len(result.outputs())
    found: list[list[Any]] = [[] for _ in range(count)]
    for part, each in zip(parts, values):
        tiles = len(part) * across
        products = ops.matmul(each, filters, False, True)  # (points, tiles, K)
        products = ops.reshape(products, _whole([points, tiles * outputs]), False)
        cells = ops.matmul(back, products, False, False)
        cells = ops.reshape(cells, _whole([-1, outputs // count]), False)
        place = count * _places(height, width, len(back_y), len(back_x), part)
        for index, blocks_found in enumerate(found):
            blocks_found.append(ops.gather(cells, ops.constant(place + np.int32(index)),
                                           _whole(0)))
    return result, [ops.concat(each, 0).output(0) if len(each) > 1 else each[0].output(0)
                    for each in found]


def _cut(node: Any) -> Any:
    """Return the node that alone reads ``node`` and cuts its channels into equal parts."""
    reader, *others = (port.get_node() for port in node.output(0).get_target_inputs())
    if others or reader.get_type_name() not in ('Split', 'VariadicSplit'):
        return node
    axis = reader.input(1).get_source_output().get_node()
    by_channel = axis.get_type_name() == 'Constant' and int(axis.data) in (1, -3)
    sizes = {output.get_shape()[1] for output in reader.outputs()}
    return reader if by_channel and len(sizes) == 1 else node


def _to_the_points(source: Any, size: tuple[int, int], kernel: tuple[int, int],
                   parts: list[range], across: int) -> list[Any]:
    """Return the values (points, tiles, C) of each of the ``parts``, which are tile rows.

    ``source`` are the rows (H * W, C) of a map of ``size``; outside of it is zero.
    """
    (back_y, _, in_y), (back_x, _, in_x) = (matrices(taps) for taps in kernel)
    there = ops.constant(np.kron(in_y, in_x).astype(np.float32))  # (points, inputs of a tile)
    height, width = size
    channels = source.get_shape()[1]
    found = []
    for part in parts:
        i, j, tile_y, tile_x = np.ix_(range(len(in_y)), range(len(in_x)), part, range(across))
        y = tile_y * len(back_y) + i - kernel[0] // 2
        x = tile_x * len(back_x) + j - kernel[1] // 2
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        # Of a row that is not there OpenVINO gathers zeros.
        number = np.where(inside, y * width + x, height * width).astype(np.int32)
        points, tiles = len(in_y) * len(in_x), len(part) * across
        taken = ops.gather(source, ops.constant(number.reshape(-1)), _whole(0))
        taken = ops.reshape(taken, _whole([points, tiles * channels]), False)
        values = ops.matmul(there, taken, False, False)
        found.append(ops.reshape(values, _whole([points, tiles, channels]), False).output(0))
    return found


def _places(height: int, width: int, step_y: int, step_x: int,
            part: range) -> NDArray[np.int32]:
    """Return where each cell of a part's rows is among its results, (results of a tile, tiles)."""
    across = -(-width // step_x)
    y, x = np.ix_(range(part.start * step_y, min(part.stop * step_y, height)), range(width))
    tile = (y // step_y - part.start) * across + x // step_x
    result = y % step_y * step_x + x % step_x
    return (result * len(part) * across + tile).reshape(-1).astype(np.int32)


def _whole(values: Any) -> Any:
    return ops.constant(np.array(values, np.int64))


Shared = dict[tuple[Any, ...], list[Any]]
"""The values at the points of a map and kernel, which convolutions of one map share."""
