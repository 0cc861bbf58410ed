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

"""What a node is given by the process that starts it."""

from collections.abc import Mapping
import os


def profile_variable(environment: Mapping[str, str] = os.environ) -> str:
    """Return the environment variable that gives Fast DDS a profile, in this ROS distribution.

    Only one of the two may be set: newer ones read both, and refuse the same profile twice.
    """
    old = environment.get('ROS_DISTRO', '') in ('humble', 'iron', 'jazzy')  # Fast DDS 2
    return 'FASTRTPS_DEFAULT_PROFILES_FILE' if old else 'FASTDDS_DEFAULT_PROFILES_FILE'
