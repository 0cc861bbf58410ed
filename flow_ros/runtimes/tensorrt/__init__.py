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

"""TensorRT 10.3 and later, and TensorRT-RTX: building plans and running them.

One adapter for both: their Python interfaces have what is used here in common, and flags that
only some versions know are read with ``getattr``. ``finding`` imports TensorRT when it is first
needed, and nothing else does; ``progress`` and ``plans`` build; ``execution`` runs.
"""

from flow_ros.runtimes.tensorrt.execution import PlanError, TensorRtRuntime, UnknownShape
from flow_ros.runtimes.tensorrt.finding import (
    find_tensorrt,
    Installation,
    make_library,
    missing_tensorrt,
    PACKAGES,
    refuses_gpu,
    VARIABLE,
)
from flow_ros.runtimes.tensorrt.plans import build_plan, BuildError, BuildOptions, BuiltPlan
from flow_ros.runtimes.tensorrt.progress import BuildCancelled, BuildProgress, Meter, Progress

__all__ = [
    'BuildCancelled', 'BuildError', 'BuildOptions', 'BuildProgress', 'BuiltPlan', 'Installation',
    'Meter', 'PACKAGES', 'PlanError', 'Progress', 'TensorRtRuntime', 'UnknownShape', 'VARIABLE',
    'build_plan', 'find_tensorrt', 'make_library', 'missing_tensorrt', 'refuses_gpu',
]
