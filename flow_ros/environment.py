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

"""The environment that ROS nodes need when ROS comes from pip wheels. No ROS is imported."""

from collections.abc import MutableMapping
import os
from pathlib import Path
import sys


def complete(environment: MutableMapping[str, str] | None = None) -> bool:
    """Set AMENT_PREFIX_PATH where the wheels left it unset; True if it was set here.

    Without it rclpy from wheels finds neither its middleware nor its messages. A sourced ROS
    installation, or an AMENT_PREFIX_PATH given by hand, is left as it is.
    """
    environment = os.environ if environment is None else environment
    prefix = Path(sys.prefix)
    if environment.get('AMENT_PREFIX_PATH') or not (prefix / 'share' / 'ament_index').is_dir():
        return False
    environment['AMENT_PREFIX_PATH'] = str(prefix)
    return True
