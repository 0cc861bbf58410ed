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

"""The one table of the flow node's parameters, and what is made from it.

Declaration, ``config/flow.yaml`` and the README's table all come from ``PARAMETERS``;
``python -m flow_ros.nodes.parameters --write`` rewrites the two files.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
import sys
import textwrap
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:  # the table is read without ROS too: launch arguments, files
    from rclpy.node import Node
    from rclpy.parameter import Parameter as RosParameter

Value = bool | int | float | str

EARLY_STOP_PX = 0.5
"""The estimator's default."""

BEGIN = '<!-- parameters -->'
END = '<!-- /parameters -->'


@dataclass(frozen=True)
class Parameter:
    """One parameter: what it is called, does, may be, and whether it may change while running.

    The type of ``default`` is the type of the parameter. ``step`` 0 means any value of the range.
    ``told`` parameters are set by the node alone, for others to read. ``refuses`` says why a
    value is not allowed where neither a range nor choices can, '' where it is, and ``words``
    what is.
    """

    name: str
    default: Value
    description: str
    minimum: float | None = None
    maximum: float | None = None
    step: float = 0
    choices: tuple[str, ...] = ()
    read_only: bool = False
    told: bool = False
    refuses: Callable[[Any], str] | None = None
    words: str = ''

    @property
    def allowed(self) -> str:
        """The values allowed, in words: a range, choices, or nothing."""
        if self.choices:
            return ', '.join(self.choices)
        if isinstance(self.default, bool):
            return 'true, false'
        if self.minimum is None or self.maximum is None:
            return self.words
        return f'{self.minimum:.10g} to {self.maximum:.10g}'

    def refusal(self, value: Value) -> str:
        """Return why ``value`` is not allowed, or an empty text."""
        if self.told:
            return (f'{self.name} is set by the node alone, for others to read; seen {value!r}: '
                    f'choose the runtime with the parameter runtime, at start')
        if self.choices and value not in self.choices:
            return f'{self.name} is {value!r}; expected one of {self.allowed}'
        if self.minimum is not None and self.maximum is not None and not (
                isinstance(value, (int, float)) and self.minimum <= value <= self.maximum):
            return f'{self.name} is {value!r}; expected {self.allowed}'
        return self.refuses(value) if self.refuses is not None else ''


def refuse_roi(value: str) -> str:
    """Return why ``value`` is no region of interest, or an empty text."""
    from flow_ros.streaming.view import View  # here: launch files read the table without torch
    try:
        View.parse_roi(value)
    except ValueError as error:
        return f'roi: {error}'
    return ''


PARAMETERS: tuple[Parameter, ...] = (
    Parameter('network', 'dip_rt', 'The network: `dip_rt`, `dip`, `hd3`, `mscsl`, or the name of '
              'a model, such as `hd3_compact` or one imported with `flow_ros import-weights`.',
              read_only=True),
    Parameter('weights', 'default', 'Its weights: `default` (those of the model) or the '
              'path of a file (safetensors, or a published checkpoint).', read_only=True),
    Parameter('runtime', 'auto', 'Where the network runs; `auto` takes the first there is of '
              'TensorRT, torch on CUDA, OpenVINO, torch on the CPU. Torch serves until '
              "TensorRT's engines are built and checked; `active_runtime` tells.",
              choices=('auto', 'torch', 'openvino', 'tensorrt'), read_only=True),
    Parameter('precision', 'f32', '`f32`: results that agree between runtimes; `fast`: whatever '
              'this machine does fastest.', choices=('f32', 'fast'), read_only=True),
    Parameter('device', '', "Device, in the runtime's own words (`cpu`, `cuda:0`); empty: the "
              "runtime's choice.", read_only=True),
    Parameter('threads', 0, "CPU threads; 0: the runtime's choice.", 0, 1024, 1, read_only=True),
    Parameter('engine_cache', '', 'Folder of the compiled engines, which are built once; empty: '
              '`$FLOW_ROS_CACHE`, else `~/.cache/flow_ros`.', read_only=True),
    Parameter('workspace_mib', 0, 'Memory (MiB of the GPU) that TensorRT may use to try kernels '
              "while it builds; 0: TensorRT's own limit.", 0, 1048576, 1, read_only=True),
    Parameter('budget', 'iterations', 'What decides how much work a flow is: `iterations`, just '
              'so many; `latency`, as many as are done `latency_ms` after the frame came; `rate`, '
              'as many as keep up with the camera, so that no frame is dropped.',
              choices=('iterations', 'latency', 'rate')),
    Parameter('latency_ms', 100.0, 'With budget `latency`: from the arrival of a frame to its '
              'flow published (ms). One step is done at least, which may take longer: `overruns` '
              'in `~/info` counts those.', 1.0, 60000.0),
    Parameter('iterations', 0, 'Iterations per level of dip_rt and dip, levels of hd3 (5), '
              "scales of mscsl (4); 0: the network's default. Fewer are faster, more are more "
              'exact. With budget `latency` and `rate` it is the most; 0: as many as the network '
              'ever needs.', 0, 100, 1),
    Parameter('early_stop_px', EARLY_STOP_PX, 'A level is done when the largest meaningful '
              'update of a step is below this (px of the published size), so that a still scene '
              'costs little; 0: never before the budget ends.',
              0.0, 100.0),
    Parameter('scale', 1.0, 'The images are made this much smaller first. Flow, confidence and '
              'occlusion have that size, and flow is in its px.', 0.05, 1.0),
    Parameter('roi', '', "The part of the camera's image that is worked on, `WIDTHxHEIGHT+X+Y` in "
              'its px, such as `640x240+0+240`; empty: all. `scale` comes after it.',
              refuses=refuse_roi, words='WIDTHxHEIGHT+X+Y'),
    Parameter('direction', 'forward', '`forward`: from the previous frame to this one, on the '
              "previous frame's grid and with its header; `backward`: from this frame to the "
              'previous one, on this frame; `both`: forward, and backward under `~/backward/`.',
              choices=('forward', 'backward', 'both')),
    Parameter('warm_start', True, 'Start each flow from the previous one, carried along.'),
    Parameter('max_gap_s', 0.5, 'Frames further apart than this (s) are no pair: the stream '
              'starts again.', 0.001, 3600.0),
    Parameter('reliability', 'auto', 'What to ask of the publisher of images; `auto`: reliable '
              'unless one of them offers best effort only.',
              choices=('auto', 'reliable', 'best_effort')),
    Parameter('mono16_white', 65535, 'The 16-bit value shown as white: 65535, or 4095 for a '
              '12-bit camera.', 1, 65535, 1),
    Parameter('color_max_px', 0.0, 'Flow of full colour in `~/flow_color` (px); 0: follows the '
              'scene (`color_max_px` in `~/info` tells it).', 0.0, 10000.0),
    Parameter('no_image_timeout_s', 5.0, 'After so long without a frame (s) the log tells the '
              'publishers found, their QoS and whether they match; 0: never.', 0.0, 3600.0),
    Parameter('status_period_s', 10.0, 'Every so often (s) the log has a line of status; 0: '
              'never.', 0.0, 3600.0),
    Parameter('tune_malloc', True, 'Let glibc keep the memory of images between messages, which '
              'receives them several times faster.', read_only=True),
    Parameter('active_runtime', '', 'The runtime that computes the flow now: `torch`, `openvino` '
              'or `tensorrt`.', told=True),
    Parameter('runtime_status', '', 'Why this runtime; what is being built for a better one, how '
              'far it is and how long it still takes; or why that one was refused.', told=True),
)


PRESETS: tuple[str, ...] = ('jetson_orin', 'jetson_thor', 'desktop', 'cpu')
"""Parameter files per kind of machine, config/NAME.yaml."""


def find(name: str) -> Parameter:
    """Return the parameter of that name."""
    return {parameter.name: parameter for parameter in PARAMETERS}[name]


def value_of(name: str, text: str) -> Value:
    """Return ``text``, as a launch argument or a command gives it, as the parameter's type.

    ValueError where it is none.
    """
    parameter = find(name)
    kind = type(parameter.default)
    expected = parameter.allowed or 'a text'
    try:
        if kind is bool:
            return {'true': True, 'false': False}[text]
        value: Value = kind(text)
    except (KeyError, ValueError):
        raise ValueError(f'{name} is {text!r}; expected {expected}') from None
    if reason := parameter.refusal(value):
        raise ValueError(reason)
    return value


def check(values: Mapping[str, Value]) -> str:
    """Return why ``values`` cannot be set, or an empty text; names not of the table pass."""
    table = {parameter.name: parameter for parameter in PARAMETERS}
    return '; '.join(filter(None, (table[name].refusal(value) for name, value in values.items()
                                   if name in table)))


class Teller:
    """Sets the parameters that the node alone sets, and keeps others from it.

    ``tell`` belongs to the thread that spins the node: others are served by that one too.
    """

    def __init__(self, node: 'Node') -> None:
        self._node = node
        self.telling = False

    def tell(self, **values: Value) -> None:
        """Set parameters of the table that are ``told``, where they have changed."""
        from rclpy.parameter import Parameter as RosParameter
        changed = [RosParameter(name, value=value) for name, value in values.items()
                   if self._node.get_parameter(name).value != value]
        if not changed:
            return
        self.telling = True
        try:
            self._node.set_parameters_atomically(changed)
        finally:
            self.telling = False


def declare(node: 'Node') -> Teller:
    """Declare all parameters on ``node``, with ranges, and refuse what the table does not allow.

    Return what tells the parameters that the node alone sets. Raises ValueError if the values
    given at start are not allowed.
    """
    from rcl_interfaces.msg import (
        FloatingPointRange,
        IntegerRange,
        ParameterDescriptor,
        SetParametersResult,
    )

    def descriptor(parameter: Parameter) -> ParameterDescriptor:
        described = ParameterDescriptor(description=parameter.description,
                                        additional_constraints=parameter.allowed,
                                        read_only=parameter.read_only)
        if parameter.minimum is None or parameter.maximum is None:
            return described
        if isinstance(parameter.default, int):
            described.integer_range = [IntegerRange(
                from_value=int(parameter.minimum), to_value=int(parameter.maximum),
                step=int(parameter.step))]
        else:
            described.floating_point_range = [FloatingPointRange(
                from_value=float(parameter.minimum), to_value=float(parameter.maximum),
                step=float(parameter.step))]
        return described

    teller = Teller(node)

    def on_set(changed: 'Sequence[RosParameter]') -> SetParametersResult:
        reason = '' if teller.telling else check({parameter.name: parameter.value
                                                  for parameter in changed})
        return SetParametersResult(successful=not reason, reason=reason)

    for parameter in PARAMETERS:
        node.declare_parameter(parameter.name, parameter.default, descriptor(parameter))
    refusal = check({name: value for name, value in values_of(node).items()
                     if value or not find(name).told})
    if refusal:
        raise ValueError(f'parameter {refusal}: correct it on the command line, in the '
                         f'parameters file or the launch file')
    node.add_on_set_parameters_callback(on_set)
    return teller


def parameter_files(config: Path, *, preset: str = '', params_file: str = '') -> list[Path]:
    """Return the parameter files to start a node with, later ones over earlier ones.

    ``config`` is the folder of flow.yaml and the presets. A file of one's own goes over the
    preset, and without either it is flow.yaml, all defaults.
    """
    if preset and preset not in PRESETS:
        raise ValueError(f'preset is {preset!r}; expected one of {", ".join(PRESETS)}')
    files = [config / f'{preset}.yaml'] if preset else []
    files += [Path(params_file)] if params_file else []
    return files or [config / 'flow.yaml']


class LiveValues:
    """The values of all parameters, read again only when one was set."""

    def __init__(self, node: 'Node') -> None:
        """Read them; ``declare`` must have been called."""
        self._node = node
        self._values = values_of(node)
        # Humble has no such callback: there they are read every time.
        watch = getattr(node, 'add_post_set_parameters_callback', None)
        self._watched = watch is not None
        if watch is not None:
            watch(self._read)

    def now(self) -> Mapping[str, Any]:
        """Return the values as they are now; safe from any thread."""
        if not self._watched:
            self._values = values_of(self._node)
        return self._values

    def _read(self, changed: 'Sequence[RosParameter]') -> None:
        self._values = values_of(self._node)


def values_of(node: 'Node') -> dict[str, Any]:
    """Return the values of the table's parameters on ``node`` as they are now."""
    return {parameter.name: node.get_parameter(parameter.name).value
            for parameter in PARAMETERS}


def to_yaml() -> str:
    """Return the parameters file with all defaults, but for what the node alone sets."""
    lines = ['# Parameters of the flow node, with their defaults. Made from',
             '# flow_ros/nodes/parameters.py by `python -m flow_ros.nodes.parameters --write`:',
             '# change defaults there, and copy this file to set your own.',
             '/**:  # any node name, in any namespace',
             '  ros__parameters:']
    for parameter in (each for each in PARAMETERS if not each.told):
        lines += [f'    # {line}' for line in _wrapped(parameter)]
        lines.append(f'    {parameter.name}: {_yaml_value(parameter.default)}')
    return '\n'.join(lines) + '\n'


def to_markdown() -> str:
    """Return the table for the README."""
    lines = ['| Parameter | Default | Allowed | Live | What it does |', '|---|---|---|---|---|']
    for parameter in PARAMETERS:
        live = 'no' if parameter.read_only else 'yes'
        allowed = parameter.allowed or 'any'
        if parameter.told:
            live, allowed = 'told', 'the node sets it'
        lines.append(f'| `{parameter.name}` | `{_yaml_value(parameter.default)}` | {allowed} | '
                     f'{live} | {parameter.description} |')
    return '\n'.join(lines) + '\n'


def readme_section(readme: str) -> str:
    """Return what is between the markers of ``readme``; ValueError where they are missing."""
    _, begin, rest = readme.partition(BEGIN)
    section, end, _ = rest.partition(END)
    if not begin or not end:
        raise ValueError(f'the README has no section between {BEGIN} and {END}: add both lines '
                         f'where the table of parameters shall be')
    return section.strip() + '\n'


def write(root: Path) -> None:
    """Rewrite ``config/flow.yaml`` and the section of ``README.md`` under ``root``."""
    (root / 'config' / 'flow.yaml').write_text(to_yaml(), encoding='utf-8')
    path = root / 'README.md'
    readme = path.read_text(encoding='utf-8')
    readme_section(readme)  # refuses a README without markers
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f'{before}{BEGIN}\n\n{to_markdown()}\n{END}{after}', encoding='utf-8')


def _yaml_value(value: Value) -> str:
    if isinstance(value, bool):
        return 'true' if value else 'false'
    return f"'{value}'" if isinstance(value, str) else str(value)


def _wrapped(parameter: Parameter) -> list[str]:
    text = parameter.description.replace('`', '')
    notes = [parameter.allowed] if parameter.allowed else []
    if parameter.read_only:
        notes.append('read at start only')
    return textwrap.wrap(f'{text} ({"; ".join(notes)})' if notes else text, 90)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or rewrite the files made from it."""
    parser = argparse.ArgumentParser(prog='python -m flow_ros.nodes.parameters',
                                     description=__doc__)
    parser.add_argument('--write', action='store_true',
                        help='rewrite config/flow.yaml and the table in README.md')
    parser.add_argument('--root', type=Path, default=Path(__file__).resolve().parents[2],
                        help='the repository (default: the one this module is in)')
    options = parser.parse_args(arguments)
    if not options.write:
        print(to_markdown(), end='')
        return 0
    try:
        write(options.root)
    except (OSError, ValueError) as error:
        print(f'flow_ros: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
