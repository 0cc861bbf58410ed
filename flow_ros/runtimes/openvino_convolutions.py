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

OpenVINO computes 3x3, 1x5 and 5x1 convolutions directly, at the peak of the CPU. Wide ones on
large maps are faster as matrix products at the points, tile rows by tile rows so that a block
stays in the cache: on two cores with AVX-512, on a map of 112x256, 224 to 256 channels of 3x3
in 66 ms instead of 132, 128 to 128 in 29 instead of 39, 256 to 256 of 1x5 in 50 instead of 86.
Rounding at the points needs float32: for bf16 this is nothing.
"""

from typing import Any

import numpy as np
import openvino
from openvino import opset14 as ops
from openvino.passes import ConstantFolding, Manager
import torch

from flow_ros.ops.winograd import Bags, bags, BLOCK_BYTES, RESULTS, transformed, worth

TO_ROWS, TO_MAPS = [0, 2, 3, 1], [0, 3, 1, 2]

UNARY = {'Relu': ops.relu, 'Sigmoid': ops.sigmoid, 'Tanh': ops.tanh}
BINARY = {'Add': ops.add, 'Subtract': ops.subtract, 'Multiply': ops.multiply}


def save_products(model: Any) -> int:
    """Change the convolutions of ``model`` that are faster at the points; return how many.

    What lies between such convolutions, inputs and outputs with their channels last is moved to
    rows too. Shapes must be fixed and the arithmetic float32.
    """
    folder = Manager()
    folder.register_pass(ConstantFolding())
    folder.run_passes(model)  # weights that are cut and joined become numbers
    chosen = [node for node in model.get_ordered_ops()
              if node.get_type_name() == 'Convolution' and _gains(node)]
    if not chosen:
        return 0
    known: Tables = {}
    names = {node.get_friendly_name() for node in chosen}
    for node in model.get_ordered_ops():
        if node.get_friendly_name() in names:
            _replace(node, [_at_the_points(node, known)])
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
    """Return ``output``, (B, C, H, W), as (B, H, W, C)."""
    node = output.get_node()
    if _order(node) == TO_MAPS:
        return node.input(0).get_source_output()
    if node.get_type_name() == 'Constant':
        return ops.constant(np.transpose(node.data, TO_ROWS)).output(0)
    for reader in output.get_target_inputs():
        if _order(reader.get_node()) == TO_ROWS and reader.get_index() == 0:
            return reader.get_node().output(0)
    return ops.transpose(output, _whole(TO_ROWS)).output(0)


def _replace(node: Any, rows: list[Any]) -> None:
    """Let the readers of ``node`` have ``rows``, its results as (B, H, W, C)."""
    for output, each in zip(node.outputs(), rows, strict=True):
        output.replace(ops.transpose(each, _whole(TO_MAPS)).output(0))


def _move_to_rows(node: Any) -> None:
    """Let ``node`` compute in rows where it is of a kind that can."""
    kind = node.get_type_name()
    sources = [port.get_source_output() for port in node.inputs()]
    if any(len(output.get_partial_shape()) != 4 for output in node.outputs()):
        return
    if kind in UNARY:
        _replace(node, [UNARY[kind](_rows(sources[0])).output(0)])
    elif kind in BINARY:
        if all(len(source.get_partial_shape()) in (0, 4) for source in sources):
            given = [_rows(source) if len(source.get_partial_shape()) == 4 else source
                     for source in sources]
            _replace(node, [BINARY[kind](*given).output(0)])
    elif kind == 'Concat' and node.get_attributes()['axis'] in (1, -3):
        _replace(node, [ops.concat([_rows(source) for source in sources], 3).output(0)])
    elif kind in ('Split', 'VariadicSplit'):
        axis = sources[1].get_node()
        if axis.get_type_name() == 'Constant' and int(axis.data) in (1, -3):
            whole = _rows(sources[0])
            parts = (ops.split(whole, _whole(3), node.get_attributes()['num_splits'])
                     if kind == 'Split' else
                     ops.variadic_split(whole, _whole(3), sources[2]))
            _replace(node, parts.outputs())


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
            and worth(size[2] * size[3], (outputs, inputs, *kernel)))


def _at_the_points(node: Any, known: 'Tables') -> Any:
    """Return what computes the same as the convolution ``node``, (1, H, W, K)."""
    source = _rows(node.input(0).get_source_output())
    weight = torch.from_numpy(node.input(1).get_source_output().get_node().data.copy())
    outputs, inputs = weight.shape[:2]
    kernel = (weight.shape[2], weight.shape[3])
    height, width = list(node.get_output_shape(0))[2:]
    # (points, K, C), as OpenVINO wants them: what it would have to turn, it would keep once for
    # each block.
    filters = ops.constant(transformed(weight).numpy())
    points = filters.get_output_shape(0)[0]
    rows = ops.reshape(source, _whole([height * width, inputs]), False)
    step = RESULTS if kernel[0] > 1 else 1
    across = -(-width // (RESULTS if kernel[1] > 1 else 1))
    down = -(-height // step)
    at_once = max(1, BLOCK_BYTES // (4 * points * across * max(inputs, outputs)))
    found = []
    for first in range(0, down, at_once):
        last = min(first + at_once, down)
        key = ((height, width), kernel, first, last)
        if key not in known:
            known[key] = tuple(_constants(each) for each in bags(*key))
        there, back = known[key]
        tiles = (last - first) * across
        values = ops.reshape(_summed(rows, there), _whole([points, tiles, inputs]), False)
        products = ops.matmul(values, filters, False, True)
        found.append(_summed(ops.reshape(products, _whole([points * tiles, outputs]), False),
                             back))
    cells = ops.concat(found, 0) if len(found) > 1 else found[0]
    whole = ops.reshape(cells, _whole([1, down * step, width, outputs]), False)
    if down * step > height:
        whole = ops.slice(whole, _whole([0]), _whole([height]), _whole([1]), _whole([1]))
    return whole.output(0)


def _constants(each: Bags) -> tuple[Any, ...]:
    return tuple(ops.constant(values.numpy())
                 for values in (each.index, each.offset, each.weight))


def _summed(rows: Any, constants: tuple[Any, ...]) -> Any:
    index, offset, weight = constants
    nothing = ops.constant(np.int32(-1))  # the row of empty bags, of which there are none
    return ops.embedding_bag_offsets_sum(rows, index, offset, nothing, weight)


def _whole(values: Any) -> Any:
    return ops.constant(np.array(values, np.int64))


Tables = dict[tuple[tuple[int, int], tuple[int, int], int, int], tuple[tuple[Any, ...], ...]]
"""The constants of each block, which convolutions of one kernel and size share."""
