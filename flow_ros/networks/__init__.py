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

"""The networks: one paper, one file, and a registry that makes and loads them."""

from flow_ros.networks.base import (
                                    Call,
                                    count_parameters,
                                    Features,
                                    FlowNetwork,
                                    FlowOutput,
                                    State,
                                    Step,
)
from flow_ros.networks.models import find_model, list_models, Model, WeightsError
from flow_ros.networks.registry import (
                                    create,
                                    default_weights_path,
                                    family_of,
                                    known_names,
                                    names,
                                    save,
)

__all__ = ['Call', 'count_parameters', 'create', 'default_weights_path', 'family_of',
           'Features', 'find_model', 'FlowNetwork', 'FlowOutput', 'known_names', 'list_models',
           'Model', 'names', 'save', 'State', 'Step',
           'WeightsError']
