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

"""The bindings themselves build engines, also where torch is missing (Python 3.10 in CI).

$FLOW_ROS_ONNX may name a folder of exported acts; without it a small graph is built.
"""

import importlib.util
import os
from pathlib import Path
import subprocess
import sys

import pytest

onnx = pytest.importorskip('onnx', reason='onnx is not installed')
if importlib.util.find_spec('tensorrt_rtx') is None:
    pytest.skip('TensorRT-RTX is not installed', allow_module_level=True)

# In a process of its own: only one logger per process is taken.
BUILD = r"""
import sys
from pathlib import Path
import tensorrt_rtx as api
logger = api.Logger(api.Logger.ERROR)
builder = api.Builder(logger)
for name in sys.argv[1:]:
    flags = 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = api.OnnxParser(network, logger)
    if not parser.parse(Path(name).read_bytes()):
        sys.exit('; '.join(str(parser.get_error(k)) for k in range(parser.num_errors)))
    modes = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == api.LayerType.GRID_SAMPLE:
            layer.__class__ = api.IGridSampleLayer
            modes.append(layer.interpolation_mode == api.InterpolationMode.LINEAR)
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        sys.exit(f'{name} cannot be built')
    print(Path(name).stem, memoryview(plan).nbytes, all(modes))
"""


def small_graph(path):
    """Write a bilinear GridSample at opset 18, of which 1.4 and 1.5 made a nearest one at 20."""
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node('GridSample', ['image', 'grid'], ['sampled'], mode='bilinear',
                            padding_mode='border', align_corners=1)
    graph = helper.make_graph(
        [node], 'small',
        [helper.make_tensor_value_info('image', float32, (1, 4, 16, 24)),
         helper.make_tensor_value_info('grid', float32, (1, 16, 24, 2))],
        [helper.make_tensor_value_info('sampled', float32, (1, 4, 16, 24))])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)])
    model.ir_version = 9
    onnx.save(model, str(path))


def test_the_builder_of_this_python_takes_the_acts(tmp_path):
    folder = os.environ.get('FLOW_ROS_ONNX')
    models = sorted(Path(folder).rglob('*.onnx')) if folder else []
    if not models:
        small_graph(tmp_path / 'small.onnx')
        models = [tmp_path / 'small.onnx']
    done = subprocess.run([sys.executable, '-c', BUILD, *map(str, models)], capture_output=True,
                          text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    built = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _, _ in built] == [path.stem for path in models]
    for _, size, linear in built:
        assert int(size) > 1000
        assert linear == 'True'
