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

"""What a consumer must know beside the images: one DiagnosticArray per flow."""

from collections.abc import Mapping

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from std_msgs.msg import Header


def _text(value: object) -> str:
    if isinstance(value, bool):
        return 'true' if value else 'false'
    if value is None:
        return ''
    return f'{value:.6g}' if isinstance(value, float) else str(value)


def make_info(header: Header, *, name: str, message: str, hardware_id: str,
              values: Mapping[str, object]) -> DiagnosticArray:
    """Return one OK status with ``values`` in their order.

    Floats have six digits, bools are true and false, None is an empty text.
    """
    status = DiagnosticStatus(
        level=DiagnosticStatus.OK, name=name, message=message, hardware_id=hardware_id,
        values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()])
    return DiagnosticArray(header=header, status=[status])


def info_values(info: DiagnosticArray) -> dict[str, str]:
    """Return the values of an info message as a dictionary of texts: for consumers."""
    return {pair.key: pair.value for status in info.status for pair in status.values}
