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

"""Whether an operation is being exported (``torch.export``, and ONNX through it).

Some operations have two forms that compute the same: one for what runs them eagerly, and one
for a graph, whose size must not grow with the map's and which must hold for maps of any size.
"""

import torch
from torch import Tensor


def is_exporting() -> bool:
    """Return True while ``torch.export`` records; not for a trace, nor for torch.compile.

    Before torch 2.7, which some Jetsons have, nothing can be exported: False.
    """
    asked = getattr(torch.compiler, 'is_exporting', None)
    return asked is not None and bool(asked())


def are_open(*sizes: object) -> bool:
    """Return True where one of ``sizes`` is left open in the graph that is being recorded."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def is_eager(*tensors: Tensor) -> bool:
    """Return True where a CPU computes at once what is asked, and nothing is recorded of it.

    Neither for a gradient nor in a graph: there what is done in parts or in place is no loss.
    """
    return (all(tensor.device.type == 'cpu' for tensor in tensors)
            and not torch.is_grad_enabled() and not torch.jit.is_tracing()
            and not is_exporting() and not torch.compiler.is_compiling())


def runs_on_cpu(*tensors: Tensor) -> bool:
    """Return True where a CPU computes without gradients: eagerly, or through OpenVINO's trace.

    There the fewest passes over memory count. On GPUs the number of kernels does, and what is
    trained wants the form whose gradient is the cheapest.
    """
    if is_exporting() or any(tensor.device.type != 'cpu' for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
