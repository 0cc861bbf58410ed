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
only some versions know are read with ``getattr``. TensorRT is imported when it is first needed,
so this module can be imported without it. All precision is in the ONNX graph (TensorRT 11 knows
no other way): networks are always strongly typed.

A plan can be built by TensorRT-RTX on a machine without a GPU; running one needs the GPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
import functools
from importlib.util import find_spec
import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from flow_ros.networks.base import FlowNetwork, FlowOutput, State
from flow_ros.runtimes.acts import Act
from flow_ros.runtimes.base import (
    check_precision,
    EngineFault,
    Lap,
    run_loop,
    RuntimeUnavailable,
)
from flow_ros.runtimes.cuda_graphs import (
    CudaGraphDevice,
    GraphDevice,
    GraphedLoop,
    ONE_CAPTURE,
)

PACKAGES: tuple[str, ...] = ('tensorrt', 'tensorrt_rtx')
"""In the order in which they are looked for."""

VARIABLE = 'FLOW_ROS_TENSORRT'

Shape = tuple[int, ...]

_NAMES = {'tensorrt': 'TensorRT', 'tensorrt_rtx': 'TensorRT-RTX'}
_MOST_LINES = 12
"""Of TensorRT's own words in one error: the first ones name the cause."""

_log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """TensorRT cannot build a plan of this graph; the text says which node and why."""


class PlanError(RuntimeError):
    """A plan cannot be used: truncated, or of another version or GPU; build it again."""


class UnknownShape(RuntimeError):  # noqa: N818 -- what is wrong, as it reads
    """There is no plan for tensors of these shapes."""


class BuildCancelled(RuntimeError):  # noqa: N818 -- what happened, as it reads
    """The build was stopped because ``progress`` asked for it; nothing was made."""


@dataclass(frozen=True)
class Installation:
    """The TensorRT of this process: ``package`` as it is imported, and its version."""

    package: str
    version: str

    @property
    def text(self) -> str:
        """Name and version for messages, such as 'TensorRT 10.3.0'."""
        return f'{_NAMES.get(self.package, self.package)} {self.version}'


@dataclass(frozen=True)
class BuildProgress:
    """How far the build of one plan is.

    ``fraction`` (0 to 1) never falls. It counts TensorRT's own steps, which take very different
    times, so ``left_s`` is a guess; it is None while there is nothing to guess from.
    """

    act: str
    phase: str
    fraction: float
    elapsed_s: float
    left_s: float | None


Progress = Callable[[BuildProgress], bool]
"""Told after each step of the builder; returns False to cancel the build."""


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


def find_tensorrt() -> Installation | None:
    """Return the TensorRT to use, or None; ``missing_tensorrt`` says why there is none.

    TensorRT comes before TensorRT-RTX. The environment variable FLOW_ROS_TENSORRT chooses:
    'tensorrt', 'tensorrt_rtx', or 'none' to do without. It is imported here, because a package
    may be found whose libraries are not there. Raises ValueError for other values of it.
    """
    library, _ = _search()
    return None if library is None else library.installation


def missing_tensorrt() -> str:
    """Return why ``find_tensorrt`` finds none and what to do, '' where it finds one."""
    library, why = _search()
    return '' if library is not None else why


def refuses_gpu(capability: tuple[int, int]) -> str:
    """Return why the TensorRT found does not run on a GPU of this compute capability, or ''.

    TensorRT-RTX lists what it can be built for. TensorRT has no list: '' is then no promise.
    """
    library, why = _search()
    if library is None:
        return why
    known = getattr(library.api, 'ComputeCapability', None)
    if known is None or library.installation.package != 'tensorrt_rtx':
        return ''
    numbers = sorted(int(name[2:]) for name in known.__members__ if name[2:].isdigit())
    number = 10 * capability[0] + capability[1]
    if not numbers or number in numbers or number > numbers[-1]:
        return ''
    return (f'{library.installation.text} does not run on GPUs of compute capability '
            f'{capability[0]}.{capability[1]}, only on '
            f'{", ".join(f"{known // 10}.{known % 10}" for known in numbers)}')


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
    library, why = _search()
    if library is None:
        raise RuntimeUnavailable(why)
    start = time.monotonic()
    meter = Meter(name, progress)
    with library.one_build, library.messages.collected(whole_build=True) as messages, \
            _interrupts_kept(meter):
        monitor = library.monitor(meter)  # outlives all that reports to it
        build = _Build(library, messages, name, options)
        network, plan, cache = build.run(model, profile or {}, monitor, timing_cache)
    meter.check()
    meter.finished()
    return BuiltPlan(plan=plan, timing_cache=cache, layers=network,
                     seconds=time.monotonic() - start)


class Meter:
    """From TensorRT's nested phases to one fraction, and the way to stop them.

    A phase fills the step of its parent that is under way. TensorRT may call from several
    threads, ``progress`` is called by one at a time. What it raises stops the build and is
    kept for ``check``, because TensorRT's C++ would swallow it.
    """

    def __init__(self, act: str, progress: Progress | None = None) -> None:
        self.error: BaseException | None = None
        self._act = act
        self._progress = progress
        self._cancelled = False
        self._fraction = 0.0
        self._start = time.monotonic()
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.RLock()

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        """Note that ``phase`` begins, of so many steps, within ``parent`` if that is not None."""
        with self._lock:
            around = self._phases.get(parent) if parent else None
            if around is not None:
                begin, width = around.step_begin, around.step_width
            else:  # the first phase is the whole build; a stray one fills what is left
                begin, width = self._fraction, 1 - self._fraction
                if parent:
                    width = 0.0
            self._phases[phase] = _Phase(begin, width, max(steps, 1))

    def step_complete(self, phase: str, step: int) -> bool:
        """Return whether to go on."""
        with self._lock:
            seen = self._phases.get(phase)
            if seen is not None:
                seen.done = max(seen.done, min(step + 1, seen.steps))
                self._fraction = max(self._fraction, min(seen.step_begin, 1.0))
            return self.tell(phase)

    def phase_finish(self, phase: str) -> None:
        """Note that ``phase`` is over, perhaps before its last step."""
        with self._lock:
            seen = self._phases.pop(phase, None)
            if seen is not None and not self._stopped:
                self._fraction = max(self._fraction, min(seen.begin + seen.width, 1.0))

    def tell(self, phase: str) -> bool:
        """Report, and return whether to go on."""
        with self._lock:
            if not self._stopped and self._progress is not None:
                elapsed = time.monotonic() - self._start
                left = (elapsed * (1 - self._fraction) / self._fraction
                        if self._fraction > 0 else None)
                try:
                    self._cancelled = not self._progress(BuildProgress(
                        act=self._act, phase=phase, fraction=self._fraction, elapsed_s=elapsed,
                        left_s=left))
                except BaseException as error:  # noqa: B036 -- raised again by ``check``
                    self.error = error
            return not self._stopped

    def finished(self) -> None:
        """Report the end, after all has gone well."""
        with self._lock:
            self._fraction = 1.0
        self.tell('done')
        self.check()

    def check(self) -> None:
        """Raise what stopped the build, if anything did."""
        if self.error is not None:
            raise self.error
        if self._cancelled:
            raise BuildCancelled(f'the build of {self._act} was cancelled after '
                                 f'{time.monotonic() - self._start:.1f} s, at '
                                 f'{100 * self._fraction:.0f} %')

    @property
    def _stopped(self) -> bool:
        return self._cancelled or self.error is not None


@dataclass
class _Phase:
    """The part of the whole, ``begin`` to ``begin + width``, that one phase fills."""

    begin: float
    width: float
    steps: int
    done: int = 0

    @property
    def step_width(self) -> float:
        return self.width / self.steps if self.done < self.steps else 0.0

    @property
    def step_begin(self) -> float:
        return self.begin + self.width * self.done / self.steps


@contextmanager
def _interrupts_kept(meter: Meter) -> Iterator[None]:
    """Turn Ctrl-C into a cancelled build, and raise it once TensorRT has come to a stop.

    Python runs the handler as soon as TensorRT calls back. What it raises would then end in
    TensorRT's C++ frame, which prints and forgets it.
    """
    previous = (signal.getsignal(signal.SIGINT)
                if threading.current_thread() is threading.main_thread() else None)
    if not callable(previous):  # not ours to handle
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        try:
            previous(number, frame)
        except BaseException as error:  # noqa: B036 -- raised again by ``Meter.check``
            meter.error = error

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    except Exception:
        meter.check()  # the interrupt is the cause, not what became of the build
        raise
    finally:
        signal.signal(signal.SIGINT, previous)


class Messages:
    """What TensorRT's one logger of this process is told, kept for whoever asks.

    A build takes what its own thread says, and what threads say that nobody listens to: the
    builder has threads of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lists: dict[int, list[str]] = {}
        self._build: list[str] | None = None

    @contextmanager
    def collected(self, whole_build: bool = False) -> Iterator[list[str]]:
        """Yield the list that grows by each warning and error until the end."""
        lines: list[str] = []
        thread = threading.get_ident()
        with self._lock:
            before = self._lists.get(thread)
            self._lists[thread] = lines
            if whole_build:
                self._build = lines
        try:
            yield lines
        finally:
            with self._lock:
                if before is None:
                    del self._lists[thread]
                else:
                    self._lists[thread] = before
                if whole_build:
                    self._build = None

    def add(self, level: int, text: str) -> None:
        """Take a message of logging's ``level``."""
        if level >= logging.WARNING:
            with self._lock:
                lines = self._lists.get(threading.get_ident(), self._build)
                if lines is not None:
                    lines.append(text)
            if lines is None:
                _log.log(level, 'TensorRT: %s', text)
        _log.debug('TensorRT: %s', text)


@dataclass(frozen=True)
class _Library:
    """The imported package and what this process has once of it."""

    api: Any
    installation: Installation
    logger: Any
    messages: Messages
    monitor: Callable[[Meter], Any]
    one_build: threading.Lock = field(default_factory=threading.Lock)


def make_library(api: Any, package: str) -> _Library:
    """Return the adapter of ``api``, the module of the package."""
    messages = Messages()
    severity = api.ILogger.Severity
    levels = {severity.INTERNAL_ERROR: logging.ERROR, severity.ERROR: logging.ERROR,
              severity.WARNING: logging.WARNING, severity.INFO: logging.DEBUG}

    class Logger(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)  # not super(): pybind wants its own

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity)
            if level is not None:  # VERBOSE: thousands of lines
                messages.add(level, msg)

    class Monitor(api.IProgressMonitor):
        def __init__(self, meter: Meter) -> None:
            api.IProgressMonitor.__init__(self)
            self.meter = meter

        def phase_start(self, phase_name: str, parent_phase: str | None,
                        num_steps: int) -> None:
            self.meter.phase_start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self.meter.step_complete(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            self.meter.phase_finish(phase_name)

    return _Library(api=api, logger=Logger(), messages=messages, monitor=Monitor,
                    installation=Installation(package, str(api.__version__)))


_ONE_LOAD = threading.Lock()


@functools.cache  # TensorRT takes one logger per process, so there is one of all this
def _load(package: str) -> _Library:
    """Import ``package``; raises ImportError or OSError where its libraries are missing."""
    if package == 'tensorrt':
        import tensorrt as api
    else:
        import tensorrt_rtx as api
    return make_library(api, package)


def _search() -> tuple[_Library | None, str]:
    """Return the library to use, or None and why."""
    choice = os.environ.get(VARIABLE, '')
    if choice == 'none':
        return None, f'TensorRT is switched off ({VARIABLE}=none)'
    if choice and choice not in PACKAGES:
        raise ValueError(f'{VARIABLE} must be one of {", ".join(PACKAGES)}, none, or unset; '
                         f'seen {choice!r}')
    reasons = []
    for package in (choice,) if choice else PACKAGES:
        if find_spec(package) is None:
            continue
        try:
            with _ONE_LOAD:
                return _load(package), ''
        except (ImportError, OSError, AttributeError, RuntimeError, TypeError) as error:
            # A package without its libraries, for another numpy, or without what 10.3 has.
            reasons.append(f'{_NAMES[package]} is installed but cannot be used ({error})')
    if reasons:
        return None, '; '.join(reasons)
    wanted = _NAMES[choice] if choice else 'TensorRT'
    return None, (f'{wanted} is not installed: on a Jetson it comes with JetPack (make the '
                  f'virtual environment with --system-site-packages); on a desktop GPU: '
                  f'pip install tensorrt, or tensorrt-rtx')


@dataclass(frozen=True)
class _GridSample:
    """How one GridSample of the ONNX graph samples."""

    align_corners: bool
    padding: str


class _Build:
    """One build: parse, check what was read, build."""

    def __init__(self, library: _Library, messages: list[str], name: str,
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
        self._parse(network, model)
        check_grid_samples(api, network, read_grid_samples(model), name=self._name,
                           version=self._library.installation.text)
        config = builder.create_builder_config()
        self._configure(config)
        self._set_profile(builder, network, config, profile)
        cache = self._timing_cache(config, timing_cache)
        config.progress_monitor = monitor
        self._goes_on(meter, 'Building')
        plan = builder.build_serialized_network(network, config)
        meter.check()
        if plan is None:
            raise self._error('cannot build this graph')
        return network.num_layers, bytes(plan), cache and bytes(cache.serialize())

    def _goes_on(self, meter: Meter, phase: str) -> None:
        meter.tell(phase)
        meter.check()

    def _parse(self, network: Any, model: bytes) -> None:
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


def make(kind: Callable[..., Any], *arguments: Any) -> Any:
    """Return a new object of TensorRT's, or None where it could not make one.

    Its bindings raise TypeError then: without a driver, say; the logger was told why.
    """
    try:
        return kind(*arguments)
    except TypeError as error:
        _log.debug('%s was not made: %s', kind, error)
        return None


_WHAT_TO_DO = ("Export the network with this version of flow_ros, try another version of "
               "TensorRT, or use runtime 'torch'.")


def quoted(messages: Sequence[str]) -> str:
    """Return TensorRT's own words as lines to put under an error."""
    lines = list(dict.fromkeys(messages))
    if not lines:
        return ' it gave no reason'
    more = len(lines) - _MOST_LINES
    return ''.join(f'\n  {line}' for line in lines[:_MOST_LINES]) + (
        f'\n  ... and {more} more lines' if more > 0 else '')


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


class Streams(Protocol):
    """Where engines run."""

    def turn(self) -> AbstractContextManager[int]:
        """Give the handle of the CUDA stream for what the caller's current one is to run."""
        ...

    def in_step(self, stream: int) -> AbstractContextManager[None]:
        """Let ``stream`` wait for the caller's current one, and that, at the end, for it.

        What an engine reads and writes must be made before and kept until after.
        """
        ...


class CudaStreams:
    """The caller's current stream; for the default stream, on which TensorRT waits, another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = torch.cuda.Stream(device)

    @contextmanager
    def turn(self) -> Iterator[int]:
        """Give the handle of the stream to use."""
        with torch.cuda.device(self._device):
            yield torch.cuda.current_stream().cuda_stream or self._own.cuda_stream

    @contextmanager
    def in_step(self, stream: int) -> Iterator[None]:
        """Let both streams, where they are two, wait for each other.

        So all memory is used in the order of the caller's stream, of which it is, and the
        allocator needs to know of no other.
        """
        current = torch.cuda.current_stream(self._device)
        if current.cuda_stream == stream:
            yield
            return
        self._own.wait_stream(current)
        try:
            yield
        finally:
            current.wait_stream(self._own)


class TensorRtRuntime:
    """Runs plans of a network's engines on a GPU; the network's own weights are not used.

    ``plans`` are by the names of their ``acts``, as ``build_plan`` made them: one for each
    shape, or dynamic ones. Tensors stay on the GPU, results are new ones. The engines are
    shared by all threads and streams; each stream has execution contexts of its own. The steps
    and finish of a pair are one CUDA graph from their second time on, unless ``graphs`` is
    False.

    Raises PlanError where a plan cannot be used here and RuntimeUnavailable without TensorRT or
    a GPU. ``library``, ``streams`` and ``graph_device`` are for tests, which have no GPU.
    """

    name = 'tensorrt'

    def __init__(self, network: FlowNetwork, *, plans: Mapping[str, bytes], acts: Sequence[Act],
                 device: torch.device, precision: str = 'f32', reason: str = '',
                 graphs: bool = True, library: '_Library | None' = None,
                 streams: Streams | None = None,
                 graph_device: GraphDevice | None = None) -> None:
        check_precision(precision)
        if library is None:
            library, why = _search()
            if library is None:
                raise RuntimeUnavailable(why)
        if device.type != 'cuda' and streams is None:
            raise RuntimeUnavailable(f"runtime 'tensorrt' needs an NVIDIA GPU; seen device "
                                     f"'{device}'")
        missing = [act.name for act in acts if act.name not in plans]
        if missing:
            raise ValueError(f'there are no plans for {", ".join(missing)}; seen plans for '
                             f'{", ".join(plans) or "nothing"}')
        self.network = network.eval()
        self.device = device
        self.precision = precision
        self.reason = reason
        self.installation = library.installation
        self.versions = _versions(library.installation, device)
        self._library = library
        self._streams = streams or CudaStreams(device)
        self._lock = threading.Lock()
        self._lanes: dict[int, _Lane] = {}
        with self._streams.turn():
            self._runtime = make(library.api.Runtime, library.logger)
            self._plans: dict[str, list[_Plan]] = {}
            for act in acts:
                self._plans.setdefault(act.engine, []).append(self._load(act, plans[act.name]))
        self._graphed = None
        if graphs and (graph_device is not None or device.type == 'cuda'):
            self._graphed = GraphedLoop(network, self.call, graph_calls=self._graph_calls,
                                        device=graph_device or CudaGraphDevice(device))

    @property
    def graphed(self) -> bool:
        """True where a loop's runs after the first of their kind are a CUDA graph."""
        return self._graphed is not None and not self._graphed.failure

    def call(self, engine: str, /, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one engine on the current CUDA stream; it may still run on return.

        Raises UnknownShape where no plan fits and EngineFault where TensorRT fails.
        """
        plan = self._plan(engine, tensors)
        with self._streams.turn() as stream:
            lane = self._lane(stream)
            with lane.lock:
                return self._run(plan, lane.context, tensors, stream)

    def loop(self, state: State, lap: Lap | None = None) -> tuple[State, FlowOutput]:
        """Do the steps of ``state`` and finish."""
        if self._graphed is not None:
            return self._graphed(state, lap)
        return run_loop(self.network, state, self.call, lap)

    def _load(self, act: Act, plan: bytes) -> '_Plan':
        with ONE_CAPTURE, self._library.messages.collected() as messages:
            try:
                engine = (None if self._runtime is None
                          else self._runtime.deserialize_cuda_engine(plan))
            except (RuntimeError, TypeError) as error:
                messages.append(str(error))
                engine = None
            why = ('' if engine is not None
                   else _diagnosis(self._library.api, self._runtime, plan, messages))
        if engine is None:
            raise PlanError(f'{act.name}: this plan of {len(plan)} bytes cannot be used '
                            f'({why}); with {self.versions}:{quoted(messages)}\nBuild it again '
                            f'on this machine (flow_ros build)')
        return _Plan(self._library.api, act, engine, versions=self.versions)

    def _plan(self, engine: str, tensors: Sequence[Tensor]) -> '_Plan':
        plans = self._plans.get(engine)
        if plans is None:
            known = tuple(self._plans)
            raise ValueError(f'{self.network.name} has no engine {engine!r}; it has {known}')
        for plan in plans:
            if plan.takes(tensors):
                return plan
        seen = ', '.join('x'.join(map(str, tensor.shape)) for tensor in tensors)
        raise UnknownShape(f'{self.network.name} {engine!r}: no plan takes tensors of the shapes '
                           f'{seen}; there are plans for '
                           f'{"; ".join(plan.shapes_text for plan in plans)}. Build engines for '
                           f'this frame size (flow_ros build), or a dynamic one')

    def _lane(self, stream: int) -> '_Lane':
        with self._lock:
            lane = self._lanes.get(stream)
            if lane is None:
                lane = self._lanes[stream] = _Lane(self._library.api, self.device)
            return lane

    def _graph_calls(self) -> '_GraphCalls':
        return _GraphCalls(self)

    def _run(self, plan: '_Plan', context_of: Callable[['_Plan'], '_Context'],
             tensors: Sequence[Tensor], stream: int) -> tuple[Tensor, ...]:
        """Bind ``tensors`` and new outputs to a context, and run it."""
        with self._library.messages.collected() as messages:
            try:
                context = context_of(plan)
                inputs = [_bindable(tensor, binding, self.device)
                          for tensor, binding in zip(tensors, plan.inputs)]
                outputs = context.bind(inputs)
                with self._streams.in_step(stream):
                    context.execute(stream)
                return outputs
            except (_Refused, RuntimeError, TypeError, AttributeError) as error:
                # The last two: bindings of a version that nobody here has seen.
                raise EngineFault(f'{self.network.name} {plan.act.name}: the engine failed '
                                  f'({error}); with {self.versions}:{quoted(messages)}'
                                  ) from error


class _Refused(Exception):  # noqa: N818
    """TensorRT said no to a call."""


@dataclass(frozen=True)
class _Binding:
    """An input or output of an engine; -1 in ``shape`` is free within the bounds."""

    name: str
    dtype: torch.dtype
    shape: Shape
    smallest: Shape
    largest: Shape

    @property
    def free(self) -> bool:
        return any(size < 0 for size in self.shape)

    def takes(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.shape) and all(
            low <= size <= high for low, size, high in zip(self.smallest, shape, self.largest))

    @property
    def text(self) -> str:
        return 'x'.join(str(low) if low == high else f'{low}..{high}'
                        for low, high in zip(self.smallest, self.largest))


class _Plan:
    """An engine that was read back, with its tensors in the order of the act's."""

    def __init__(self, api: Any, act: Act, engine: Any, *, versions: str) -> None:
        self.act = act
        self.engine = engine
        self._api = api
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        of = {mode: [name for name in names if engine.get_tensor_mode(name) == mode]
              for mode in (api.TensorIOMode.INPUT, api.TensorIOMode.OUTPUT)}
        self.inputs = self._bindings([spec.name for spec in act.inputs],
                                     of[api.TensorIOMode.INPUT], 'inputs', versions)
        self.outputs = self._bindings([spec.name for spec in act.outputs],
                                      of[api.TensorIOMode.OUTPUT], 'outputs', versions)
        self._config = self._runtime_config()

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self.inputs) and all(
            binding.takes(tensor.shape) for binding, tensor in zip(self.inputs, tensors))

    @property
    def shapes_text(self) -> str:
        return ', '.join(binding.text for binding in self.inputs)

    @property
    def scratch_bytes(self) -> int:
        """How much memory a context needs while it runs."""
        for name in ('device_memory_size_v2', 'device_memory_size'):
            if hasattr(self.engine, name):
                return int(getattr(self.engine, name))
        return 0

    def new_context(self) -> tuple[Any, bool]:
        """Return a new execution context, and whether it must be given its memory."""
        strategy = getattr(self._api, 'ExecutionContextAllocationStrategy', None)
        managed = strategy is not None and hasattr(strategy, 'USER_MANAGED')
        with ONE_CAPTURE:
            if self._config is not None:
                context = self.engine.create_execution_context(self._config)
            elif managed:
                assert strategy is not None
                context = self.engine.create_execution_context(strategy.USER_MANAGED)
            else:
                context = self.engine.create_execution_context()
        if context is None:
            raise _Refused('no execution context could be made: is the GPU out of memory?')
        return context, managed

    def _bindings(self, wanted: Sequence[str], seen: Sequence[str], what: str,
                  versions: str) -> tuple[_Binding, ...]:
        if set(wanted) != set(seen):
            raise PlanError(f'{self.act.name}: this plan has the {what} {", ".join(seen)}, '
                            f'expected {", ".join(wanted)}; with {versions}: build it again')
        return tuple(self._binding(name, what == 'inputs') for name in wanted)

    def _binding(self, name: str, is_input: bool) -> _Binding:
        engine = self.engine
        shape = tuple(engine.get_tensor_shape(name))
        smallest = largest = shape
        if is_input and any(size < 0 for size in shape):
            bounds = engine.get_tensor_profile_shape(name, 0)
            smallest, largest = tuple(bounds[0]), tuple(bounds[2])
        return _Binding(name=name, dtype=_torch_type(self._api, engine.get_tensor_dtype(name)),
                        shape=shape, smallest=smallest, largest=largest)

    def _runtime_config(self) -> Any:
        """Return how TensorRT-RTX compiles kernels when a context first runs; else None.

        The contexts of an engine share what was compiled, and the first run waits for the
        kernels of its shapes: what runs first is what a CUDA graph captures.
        """
        if not hasattr(self.engine, 'create_runtime_config'):
            return None
        config = self.engine.create_runtime_config()
        if config is None or not hasattr(config, 'create_runtime_cache'):
            return None
        config.set_execution_context_allocation_strategy(
            self._api.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._kernels = config.create_runtime_cache()  # as long as the engine
        config.set_runtime_cache(self._kernels)
        strategies: Any = getattr(self._api, 'DynamicShapesKernelSpecializationStrategy', None)
        if hasattr(strategies, 'EAGER'):
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return config


class _Scratch:
    """Memory that the contexts of one stream share: there they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Tensor | None = None

    def at_least(self, size: int) -> Tensor:
        """Return the memory, which is grown if it is too small."""
        if self._memory is None or self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._memory


class _Context:
    """An execution context of a plan, used by one thread at a time and on one stream."""

    def __init__(self, plan: _Plan, device: torch.device) -> None:
        # Before the plan, so that it goes before: of its engine and configuration it only
        # knows the addresses.
        self._context, self._needs_memory = plan.new_context()
        self._plan = plan
        self._device = device
        self._memory: Tensor | None = None
        self._shapes: tuple[Shape, ...] = ()
        self._ran = False

    def give(self, scratch: _Scratch) -> None:
        """Let it run in this memory."""
        size = self._plan.scratch_bytes
        if not self._needs_memory or not size:
            return
        memory = scratch.at_least(size)
        if self._memory is memory:
            return
        if hasattr(self._context, 'set_device_memory'):
            self._context.set_device_memory(memory.data_ptr(), memory.numel())
        else:
            self._context.device_memory = memory.data_ptr()
        self._memory = memory

    def bind(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs, in new memory, that ``execute`` will fill from ``inputs``.

        The caller keeps both.
        """
        context, plan = self._context, self._plan
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        if shapes != self._shapes:
            self._shapes = ()  # until all are taken
            for binding, shape in zip(plan.inputs, shapes):
                if binding.free and not context.set_input_shape(binding.name, shape):
                    raise _Refused(f'shape {shape} of {binding.name} refused')
            self._shapes = shapes
        outputs = []
        for binding in plan.outputs:
            shape = (tuple(context.get_tensor_shape(binding.name)) if binding.free
                     else binding.shape)
            if any(size < 0 for size in shape):
                raise _Refused(f'the shape of {binding.name} is not known, but {shape}')
            outputs.append(torch.empty(shape, dtype=binding.dtype, device=self._device))
        for binding, tensor in [*zip(plan.inputs, inputs), *zip(plan.outputs, outputs)]:
            if not context.set_tensor_address(binding.name, tensor.data_ptr()):
                raise _Refused(f'address of {binding.name} refused')
        return tuple(outputs)

    def execute(self, stream: int) -> None:
        """Run on what is bound."""
        # The first time it loads kernels, or compiles them.
        with nullcontext() if self._ran else ONE_CAPTURE:
            if not self._context.execute_async_v3(stream):
                raise _Refused('execute_async_v3 returned False')
        self._ran = True


class _Lane:
    """The contexts of one stream, one for each plan."""

    def __init__(self, api: Any, device: torch.device) -> None:
        self.lock = threading.Lock()
        self._device = device
        self._scratch = _Scratch(device)
        self._contexts: dict[int, _Context] = {}

    def context(self, plan: _Plan) -> _Context:
        context = self._contexts.get(id(plan))
        if context is None:
            context = self._contexts[id(plan)] = _Context(plan, self._device)
        context.give(self._scratch)
        return context


class _GraphCalls:
    """The calls of one CUDA graph, each with a context of its own.

    A graph holds what a context had bound and set up when it was captured, so no other call
    may change it.
    """

    def __init__(self, runtime: TensorRtRuntime) -> None:
        self._runtime = runtime
        self._scratch = _Scratch(runtime.device)
        self._contexts: list[tuple[_Plan, _Context]] = []
        self._next = 0

    def rewind(self) -> None:
        """Begin again with the first call."""
        self._next = 0

    def __call__(self, engine: str, /, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run one engine."""
        runtime = self._runtime
        plan = runtime._plan(engine, tensors)
        with runtime._streams.turn() as stream:
            return runtime._run(plan, self._context, tensors, stream)

    def _context(self, plan: _Plan) -> _Context:
        if self._next == len(self._contexts):
            self._contexts.append((plan, _Context(plan, self._runtime.device)))
        expected, context = self._contexts[self._next]
        if expected is not plan:
            raise RuntimeError(f'call {self._next} of this graph was {expected.act.name} and is '
                               f'now {plan.act.name}')
        self._next += 1
        context.give(self._scratch)
        return context


def _bindable(tensor: Tensor, binding: _Binding, device: torch.device) -> Tensor:
    """Return ``tensor`` as the engine reads it: its type, contiguous, aligned to 256 bytes."""
    if tensor.device.type != device.type or (
            None not in (device.index, tensor.device.index)
            and tensor.device.index != device.index):
        raise ValueError(f'{binding.name} must be on {device}; seen on {tensor.device}')
    tensor = tensor.detach().to(binding.dtype).contiguous()
    # Parts of a batch may begin anywhere; memory of one's own is aligned on CUDA.
    return tensor.clone() if tensor.data_ptr() % 256 else tensor


def _torch_type(api: Any, dtype: Any) -> torch.dtype:
    names = {'FLOAT': torch.float32, 'HALF': torch.float16, 'BF16': torch.bfloat16,
             'INT32': torch.int32, 'INT64': torch.int64, 'INT8': torch.int8,
             'UINT8': torch.uint8, 'BOOL': torch.bool}
    for name, torch_type in names.items():
        if dtype == getattr(api.DataType, name, None):
            return torch_type
    raise PlanError(f'this plan has a tensor of type {dtype}, which torch does not have')


def _versions(installation: Installation, device: torch.device) -> str:
    """Return the versions and the GPU for messages."""
    gpu = f"device '{device}'"
    if device.type == 'cuda':
        major, minor = torch.cuda.get_device_capability(device)
        gpu = (f'{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}), '
               f'CUDA {torch.version.cuda}')
    return f'{installation.text}, {gpu}, torch {torch.__version__}'


def _diagnosis(api: Any, runtime: Any, plan: bytes, messages: Sequence[str]) -> str:
    """Return in a few words why a plan could not be read."""
    text = ' '.join(messages).lower()
    for words, meaning in _PLAN_FAULTS:
        if any(word in text for word in words):
            return meaning
    if hasattr(runtime, 'get_engine_validity'):  # TensorRT-RTX
        try:
            found = int(runtime.get_engine_validity(plan)[1])
        except (RuntimeError, TypeError, ValueError) as error:
            _log.debug('no diagnosis of the plan: %s', error)
        else:
            names = [name.lower().replace('_', ' ') for name, bit
                     in api.EngineInvalidityDiagnostics.__members__.items() if int(bit) & found]
            if names:
                return ', '.join(names)
    return 'TensorRT gives no known reason'


_PLAN_FAULTS = (
    (('minbuffersize', 'blobsize', 'offset >= cursor', 'empty memory buffer', 'truncat',
      'archive', 'checksum'), 'it is truncated or damaged'),
    (('magic', 'version tag', 'serialization_version', 'serialization version'),
     'it was built by another version, or is no plan'),
    (('incompatible device', 'target gpu', 'different gpu', 'generated on a'),
     'it was built for another GPU'),
    (('driver version', 'no cuda-capable device'), 'there is no GPU, or its driver is too old'),
    (('out of memory', 'outofmemory'), 'the GPU is out of memory'),
)
"""What TensorRT says, in small letters, and what it means; the first that fits."""
