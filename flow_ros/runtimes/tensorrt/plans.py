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

"""Plans from ONNX graphs.

All precision is in the graph (TensorRT 11 knows no other way): networks are always strongly
typed. TensorRT-RTX builds plans on a machine without a GPU; running one needs the GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
import logging
import time
from typing import Any

from flow_ros.runtimes.base import check_precision, RuntimeUnavailable
from flow_ros.runtimes.tensorrt import finding
from flow_ros.runtimes.tensorrt.finding import Library, make, quoted
from flow_ros.runtimes.tensorrt.progress import interrupts_kept, Meter, Progress

Shape = tuple[int, ...]

_log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """TensorRT cannot build a plan of this graph; the text says which node and why."""


@dataclass(frozen=True)
class BuildOptions:
    """What shapes a plan, beside its graph.

    ``precision``: 'f32' switches TF32 off, 'fast' leaves it on; halves are in the graph, or not.
    ``workspace_mib``: the most GPU memory that a layer may use while it runs, None for
    TensorRT's default, all there is. ``optimisation_level``: 0 (quick build) to 5 (slow build,
    fastest plan), None for TensorRT's default (3).
    """

    precision: str = 'f32'
    workspace_mib: int | None = None
    optimisation_level: int | None = None

    def __post_init__(self) -> None:
        """Refuse what TensorRT would refuse later, or misread."""
        check_precision(self.precision)
        if self.workspace_mib is not None and (isinstance(self.workspace_mib, bool)
                                               or self.workspace_mib < 1):
            raise ValueError(f"workspace_mib must be at least 1 MiB, or None for TensorRT's "
                             f'default; seen {self.workspace_mib}')
        level = self.optimisation_level
        if level is not None and (isinstance(level, bool) or level not in range(6)):
            raise ValueError(f"optimisation_level must be 0 to 5, or None for TensorRT's "
                             f'default; seen {level}')

    def flags(self) -> dict[str, str | int | bool | None]:
        """Return all that changes the plan, for the key under which it is kept."""
        return {'strongly_typed': True, 'tf32': self.precision != 'f32', 'device_type': 'GPU',
                'memory': 'user', 'workspace_mib': self.workspace_mib,
                'optimisation_level': self.optimisation_level}


@dataclass(frozen=True)
class BuiltPlan:
    """A plan, the timing cache after its build (None where the package has none), and facts.

    ``seconds`` the build took; ``layers`` of the network as it was parsed.
    """

    plan: bytes
    timing_cache: bytes | None
    seconds: float
    layers: int


def build_plan(model: bytes, *, name: str, options: BuildOptions,
               profile: Mapping[str, tuple[Shape, Shape, Shape]] | None = None,
               progress: Progress | None = None,
               timing_cache: bytes | None = None) -> BuiltPlan:
    """Build the plan of an ONNX graph; seconds here, minutes on a Jetson.

    ``name`` of the act is used in messages. ``profile`` gives the smallest, the usual and the
    largest shape of each input with free dimensions. ``progress`` may cancel; see there.
    ``timing_cache`` of an earlier build makes this one quicker; one that does not fit is left
    out. The plan is for the current CUDA device, all of it: nothing goes to a DLA.

    Raises BuildError, BuildCancelled, RuntimeUnavailable without TensorRT, and whatever
    ``progress`` or Ctrl-C raises, once TensorRT has come to a stop.
    """
    library, why = finding.search()
    if library is None:
        raise RuntimeUnavailable(why)
    start = time.monotonic()
    meter = Meter(name, progress)
    with library.one_build, library.messages.collected(whole_build=True) as messages, \
            interrupts_kept(meter):
        monitor = library.monitor(meter)  # outlives all that reports to it
        build = _Build(library, messages, name, options)
        network, plan, cache = build.run(model, profile or {}, monitor, timing_cache)
    meter.check()
    meter.finished()
    return BuiltPlan(plan=plan, timing_cache=cache, layers=network,
                     seconds=time.monotonic() - start)


@dataclass(frozen=True)
class _GridSample:
    """How one GridSample of the ONNX graph samples."""

    align_corners: bool
    padding: str


class _Build:
    """One build: parse, check what was read, build."""

    def __init__(self, library: Library, messages: list[str], name: str,
                 options: BuildOptions) -> None:
        self._api = library.api
        self._library = library
        self._messages = messages
        self._name = name
        self._options = options

    def run(self, model: bytes, profile: Mapping[str, tuple[Shape, Shape, Shape]], monitor: Any,
            timing_cache: bytes | None) -> tuple[int, bytes, bytes | None]:
        """Return the number of layers, the plan and the timing cache."""
        api = self._api
        meter = monitor.meter
        builder = make(api.Builder, self._library.logger)
        if builder is None:
            raise self._error('cannot start its builder')
        typed = getattr(api.NetworkDefinitionCreationFlag, 'STRONGLY_TYPED', None)
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        self._goes_on(meter, 'Reading the graph')
        parser = self._parse(network, model)
        check_grid_samples(api, network, read_grid_samples(model), name=self._name,
                           version=self._library.installation.text)
        config = builder.create_builder_config()
        self._configure(config)
        self._set_profile(builder, network, config, profile)
        cache = self._timing_cache(config, timing_cache)
        config.progress_monitor = monitor
        self._goes_on(meter, 'Building')
        plan = builder.build_serialized_network(network, config)
        # Until here, whatever Python thinks of it: the weights of the network are memory of the
        # parser, which a build reads to its end.
        del parser
        meter.check()
        if plan is None:
            raise self._error('cannot build this graph')
        return network.num_layers, bytes(plan), cache and bytes(cache.serialize())

    def _goes_on(self, meter: Meter, phase: str) -> None:
        meter.tell(phase)
        meter.check()

    def _parse(self, network: Any, model: bytes) -> Any:
        """Read the graph into ``network``; returns the parser, which must outlive the build."""
        api = self._api
        parser = make(api.OnnxParser, network, self._library.logger)
        if parser is None:
            raise self._error('cannot start its parser')
        native = getattr(api.OnnxParserFlag, 'NATIVE_INSTANCENORM', None)
        if native is not None:  # the default since 10.0
            parser.set_flag(native)
        parsed = parser.parse(model)
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        if not parsed or errors:
            nodes = '\n'.join(f'  {_node_error(error)}' for error in errors)
            # The parser's errors are in the messages again, in many more lines.
            raise BuildError(f'{self._head()} cannot read this graph:\n{nodes or "  no reason"}\n'
                             f'{_WHAT_TO_DO}')
        if not network.num_outputs:
            raise BuildError(f'{self._head()} finds no outputs in this graph ({len(model)} '
                             f'bytes): export it again')
        return parser

    def _configure(self, config: Any) -> None:
        api, options = self._api, self._options
        flags = api.BuilderFlag
        for flag in ('TF32',) if options.precision == 'f32' else ():
            if hasattr(flags, flag):
                config.clear_flag(getattr(flags, flag))
        if hasattr(flags, 'GPU_FALLBACK'):
            config.clear_flag(flags.GPU_FALLBACK)
        if hasattr(config, 'default_device_type') and hasattr(api, 'DeviceType'):
            config.default_device_type = api.DeviceType.GPU
        if hasattr(flags, 'REQUIRE_USER_ALLOCATION'):
            # TensorRT-RTX: else an engine may allocate while it runs, which cannot be captured
            # in a CUDA graph. The runtime brings the memory anyway.
            config.set_flag(flags.REQUIRE_USER_ALLOCATION)
        if options.workspace_mib is not None:
            config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE,
                                         options.workspace_mib << 20)
        if options.optimisation_level is not None:
            config.builder_optimization_level = options.optimisation_level

    def _set_profile(self, builder: Any, network: Any, config: Any,
                     shapes: Mapping[str, tuple[Shape, Shape, Shape]]) -> None:
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        free = {tensor.name: tuple(tensor.shape) for tensor in inputs
                if any(size < 0 for size in tensor.shape)}
        unknown = sorted(set(shapes) - {tensor.name for tensor in inputs})
        missing = sorted(set(free) - set(shapes))
        if unknown or missing:
            raise BuildError(f'{self._head()}: the profile must give shapes for the inputs '
                             f'{sorted(free)}; it lacks {missing} and has {unknown}, which the '
                             f'graph does not')
        if not free:
            return
        profile = builder.create_optimization_profile()
        for name in free:
            smallest, usual, largest = shapes[name]
            try:
                profile.set_shape(name, smallest, usual, largest)
            except (ValueError, RuntimeError) as error:
                raise self._error(f'refuses the shapes {smallest}, {usual}, {largest} of input '
                                  f'{name} {free[name]} ({error})') from error
        if config.add_optimization_profile(profile) < 0:
            raise self._error(f'refuses the profile {dict(shapes)}')

    def _timing_cache(self, config: Any, before: bytes | None) -> Any:
        """Attach a timing cache and return it; None where the package has none."""
        if self._library.installation.package == 'tensorrt_rtx' \
                or not hasattr(config, 'create_timing_cache'):
            return None  # TensorRT-RTX times nothing at the build
        for content in ([before] if before else []) + [b'']:
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, False):
                return cache
            if content:
                _log.info('the timing cache is of another GPU or version: a new one is begun')
        return None

    def _head(self) -> str:
        return f'{self._name}: {self._library.installation.text}'

    def _error(self, what: str) -> BuildError:
        return BuildError(f'{self._head()} {what}:{quoted(self._messages)}\n{_WHAT_TO_DO}')


_WHAT_TO_DO = ("Export the network with this version of flow_ros, try another version of "
               "TensorRT, or use runtime 'torch'.")


def _node_error(error: Any) -> str:
    """Return one error of the parser as 'node 3 name (Operator): what'."""
    code = getattr(error.code(), 'name', str(error.code()))
    text = error.desc()
    operator = getattr(error, 'node_operator', str)()
    if code == 'UNSUPPORTED_NODE' and text in {'false', ''}:
        text = f'this version does not know {operator or "this operator"} in this use'
    elif 'Plugin not found' in text:
        text = f'neither an operator nor a plugin is called {operator or "that"}'
    if error.node() < 0:
        return f'{text} [{code}]'
    name = getattr(error, 'node_name', str)()
    return f'node {error.node()} {name} ({operator}): {text} [{code} in {error.func()}]'


def read_grid_samples(model: bytes) -> dict[str, _GridSample] | None:
    """Return how each GridSample of the ONNX graph samples; None without the package onnx."""
    try:
        import onnx
    except ImportError:
        return None
    samples = {}
    for node in onnx.ModelProto.FromString(model).graph.node:
        if node.op_type == 'GridSample':
            values = {attribute.name: attribute for attribute in node.attribute}
            samples[node.name] = _GridSample(
                align_corners=bool(values['align_corners'].i if 'align_corners' in values else 0),
                padding=(values['padding_mode'].s.decode() if 'padding_mode' in values
                         else 'zeros'))
    return samples


def check_grid_samples(api: Any, network: Any, asked: Mapping[str, _GridSample] | None, *,
                       name: str, version: str) -> None:
    """Raise BuildError unless each GridSample layer samples linearly, and as ``asked``.

    Several versions read GridSample of opset 20 and later as nearest, and say nothing
    (NVIDIA/TensorRT#4646): the flow would be quietly wrong.
    """
    modes = {'zeros': 'FILL', 'border': 'CLAMP', 'reflection': 'REFLECT'}
    kinds = {(sample.align_corners, modes.get(sample.padding, sample.padding))
             for sample in (asked or {}).values()}
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type != api.LayerType.GRID_SAMPLE:
            continue
        count += 1
        layer.__class__ = api.IGridSampleLayer  # the bindings give its base class
        mode = layer.interpolation_mode
        if mode != api.InterpolationMode.LINEAR:
            raise BuildError(f'{name}: {version} reads the GridSample {layer.name!r} as {mode}, '
                             f'expected LINEAR: the flow would be wrong. Export at opset 18')
        sample = (asked or {}).get(layer.name)
        wanted = kinds if sample is None else {
            (sample.align_corners, modes.get(sample.padding, sample.padding))}
        seen = (bool(layer.align_corners), layer.sample_mode.name)
        if asked is not None and seen not in wanted:
            raise BuildError(f'{name}: {version} reads the GridSample {layer.name!r} with '
                             f'(align_corners, padding) {seen}, expected '
                             f'{" or ".join(map(str, sorted(wanted)))}: the flow would be wrong')
    if asked is not None and count < len(asked):
        raise BuildError(f'{name}: {version} made {count} layers of {len(asked)} GridSample '
                         f'nodes: the flow would be wrong')
