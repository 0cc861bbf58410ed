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

"""Builds the engines of a network: acts, ONNX, cache, TensorRT; and says how far it is.

A plan is kept under all that decides it, the ONNX file among that (``cache.PlanKey``). To
export only to learn that the plan is there would cost seconds per act at every start. So the
cache also remembers which ONNX file an export gave (``_export_digest``), under all that decides
an export: the network's class, options and weights, the act with its shapes and types, the
precision, the versions of flow_ros and torch, and the source code of the network, its operators
and the exporter itself. An entry can be missing, and then the act is exported once more, but
not wrong, unless the exporter (onnx, onnxscript) has changed; which is left out on purpose: a
robot whose image has the plans needs no exporter. Every plan is checked numerically before it
serves (``reference.compare``), whatever its age.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
import hashlib
import inspect
from pathlib import Path
import sys
import tempfile
import time
from typing import Any, Protocol

import torch

from flow_ros import __version__
from flow_ros.apart import ChildDied, run_apart
from flow_ros.networks import create, FlowNetwork, names, save
from flow_ros.runtimes.acts import Act, record_acts
from flow_ros.runtimes.base import check_precision, RuntimeUnavailable
from flow_ros.runtimes.build_progress import EngineProgress, in_words, Pace, Progress
from flow_ros.runtimes.cache import (
    digest_of,
    EngineCache,
    log_it,
    PlanKey,
    Say,
    WaitCancelled,
)
from flow_ros.runtimes.export import (
    export_act,
    ExportError,
    multiple_of,
    prepared,
    profile,
    SizeRange,
)
from flow_ros.runtimes.handover import EngineRefused
from flow_ros.runtimes.reference import compare, reference_for, weights_sha256
from flow_ros.runtimes.tensorrt import (
    build_plan,
    BuildCancelled,
    BuildError,
    BuildOptions,
    BuildProgress,
    BuiltPlan,
    find_tensorrt,
    Installation,
    missing_tensorrt,
    PlanError,
    TensorRtRuntime,
)

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class Gpu:
    """The kind of GPU that engines are for."""

    name: str
    compute_capability: str
    """As '8.7'."""

    @property
    def text(self) -> str:
        """The GPU in words."""
        if self == PORTABLE:
            return f'any GPU of compute capability {self.compute_capability}'
        return f'{self.name} (compute capability {self.compute_capability})'


WORKER = 'flow_ros.runtimes.build_worker'

FAILURES: tuple[type[RuntimeError], ...] = (BuildError, BuildCancelled, ExportError,
                                            RuntimeUnavailable)
"""What ``build_engines`` raises."""

PORTABLE = Gpu('any', '8.0 and later')
"""What TensorRT-RTX builds for by default: it finds the kernels of a GPU when it runs there."""


@dataclass(frozen=True)
class BuildRequest:
    """What engines are wanted: for frames of ``size`` (width, height) px, or a range of them.

    ``precision`` is 'f32' or 'fast'; ``workspace_mib`` and ``optimisation_level`` None are
    TensorRT's own.
    """

    size: tuple[int, int] | SizeRange
    precision: str = 'f32'
    workspace_mib: int | None = None
    optimisation_level: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        check_precision(self.precision)

    @property
    def dynamic(self) -> bool:
        """Whether the engines take a range of sizes."""
        return isinstance(self.size, SizeRange)

    @property
    def text(self) -> str:
        """The request in words: '640x480 f32'."""
        if isinstance(self.size, SizeRange):
            sizes = '..'.join(f'{width}x{height}' for width, height in (
                self.size.minimum, self.size.maximum))
        else:
            sizes = f'{self.size[0]}x{self.size[1]}'
        return f'{sizes} {self.precision}'

    @property
    def usual_size(self) -> tuple[int, int]:
        """(width, height) that the engines are made for, or made fastest for."""
        return self.size.optimum if isinstance(self.size, SizeRange) else self.size

    @property
    def options(self) -> BuildOptions:
        """What the builder is told."""
        return BuildOptions(precision=self.precision, workspace_mib=self.workspace_mib,
                            optimisation_level=self.optimisation_level)


@dataclass(frozen=True)
class EngineRecord:
    """What became of one act: ``seconds`` are those of export and build, 0 from the cache.

    ``folder`` is where the plan is kept; None where it could not be.
    """

    act: str
    size: int
    cached: bool
    seconds: float
    folder: Path | None
    key: PlanKey


@dataclass(frozen=True)
class BuiltEngines:
    """All engines of a network: the acts and for each, by its name, the plan."""

    acts: tuple[Act, ...]
    plans: Mapping[str, bytes] = field(repr=False)
    records: tuple[EngineRecord, ...]
    installation: Installation
    gpu: Gpu
    seconds: float

    @property
    def text(self) -> str:
        """What was done, in one line."""
        built = [record.act for record in self.records if not record.cached]
        size = sum(record.size for record in self.records)
        done = (f'built {", ".join(built)} in {in_words(self.seconds)}' if built
                else 'all engines were in the cache')
        return (f'{done}; {len(self.plans)} engines, {size / 1e6:.1f} MB, for '
                f'{self.installation.text}, {self.gpu.text}')


class Builder(Protocol):
    """Makes a plan of an ONNX file: ``tensorrt.build_plan``, or a test's own."""

    def __call__(self, model: bytes, *, name: str, options: BuildOptions,
                 profile: Profile | None = None,
                 progress: Callable[[BuildProgress], bool] | None = None,
                 timing_cache: bytes | None = None) -> BuiltPlan:
        """Return the plan; raises BuildError and BuildCancelled."""
        ...


class Exporter(Protocol):
    """Makes an ONNX file of an act: ``export.export_act``, or a test's own."""

    def __call__(self, network: FlowNetwork, act: Act, *, dynamic: bool = False) -> bytes:
        """Return the file's content; raises ExportError."""
        ...


def gpu_of(device: torch.device) -> Gpu:
    """Return the kind of GPU a CUDA device is; RuntimeUnavailable where it cannot be asked."""
    try:
        facts = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError) as error:
        raise RuntimeUnavailable(f"device '{device}' cannot be used: "
                                 f'{str(error).splitlines()[0]}') from error
    return Gpu(facts.name, f'{facts.major}.{facts.minor}')


def build_target(installation: Installation, gpu: Gpu | None) -> Gpu:
    """Return for which kind of GPU ``installation`` builds where ``gpu`` (or none) is there.

    TensorRT builds for the very GPU that is there. TensorRT-RTX builds for every GPU of compute
    capability 8.0 and later, without one too (NVIDIA's documentation, "CPU-only AOT and
    TensorRT-RTX engines"; for Turing it would have to be told, which is not done here). Raises
    RuntimeUnavailable where it can build for none.
    """
    if installation.package == 'tensorrt_rtx':
        if gpu is None or _capability(gpu) >= (8, 0):
            return PORTABLE
        raise RuntimeUnavailable(f'{installation.text} is used for GPUs of compute capability '
                                 f"{PORTABLE.compute_capability}; seen {gpu.text}: install "
                                 f"TensorRT, or use runtime 'torch'")
    if gpu is None:
        raise RuntimeUnavailable(f'{installation.text} can only build on the GPU that is to run '
                                 f'the engines, and no CUDA device is there: build on that '
                                 f'machine, or use runtime openvino')
    return gpu


def build_engines(network: FlowNetwork, request: BuildRequest, *, installation: Installation,
                  gpu: Gpu | None, cache: EngineCache | None = None,
                  progress: Progress | None = None, say: Say | None = None,
                  builder: Builder = build_plan,
                  exporter: Exporter = export_act) -> BuiltEngines:
    """Return the engines of ``network``: those in ``cache`` (default: the user's), others built.

    ``network`` may be on any device and is left as it is. ``gpu`` is the one there, None where
    there is none (see ``build_target``). What was built is kept at once, so that a build that
    ends early goes on there the next time; and each engine is built under a lock, so that two
    processes build it once. Raises ExportError, BuildError, and BuildCancelled where
    ``progress`` returned False; these name the act.
    """
    say = log_it if say is None else say
    cache = EngineCache(say=say) if cache is None else cache
    job = _Job(network, request, installation, build_target(installation, gpu), cache, builder,
               exporter)
    return job.run(progress)


def build_engines_apart(network: FlowNetwork, request: BuildRequest, *,
                        installation: Installation, gpu: Gpu | None,
                        cache: EngineCache | None = None, progress: Progress | None = None,
                        say: Say | None = None, device: torch.device | None = None,
                        worker: str = WORKER) -> BuiltEngines:
    """Do what ``build_engines`` does, in a process of its own.

    An export holds Python's lock for seconds, changes what torch does in all threads meanwhile
    (``torch.compiler.is_exporting``), and a builder takes memory, or crashes: a process that
    serves frames shall have none of that. Networks that are not in the registry, which the
    other process could not make, are built here. ``device`` is the CUDA device to build on.
    Raises BuildError too where the process dies.
    """
    say = log_it if say is None else say
    cache = EngineCache(say=say) if cache is None else cache
    job = _Job(network, request, installation, build_target(installation, gpu), cache,
               build_plan, export_act)
    if job.complete():
        return job.run(progress)
    try:
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / 'network.safetensors'
            if not _goes_by_file(network, weights):
                return job.run(progress)
            unkept = EngineCache(Path(folder) / 'unkept', lambda level, text: None)
            _run_worker(worker, {
                'network': network.name, 'weights': str(weights), 'request': asdict(request),
                'installation': asdict(installation), 'gpu': None if gpu is None else asdict(gpu),
                'cache': str(cache.directory.absolute()), 'unkept': str(unkept.directory),
                'device': None if device is None else str(device)}, progress, say)
            job.remember(unkept)
            if not job.complete():
                say('warning', f'engines that were built did not find room in {folder}: they are '
                               f'built again in this process, which may be slow meanwhile')
            return job.run(progress)
    except OSError as error:  # no room for as much as the weights
        say('warning', f'engines are built in this process, which may be slow meanwhile: {error}')
        return job.run(progress)


def pass_on(engines: BuiltEngines, network: FlowNetwork, request: BuildRequest,
            folder: Path) -> None:
    """Write to ``folder`` what the cache could not keep of ``engines``, for another process."""
    unkept = EngineCache(folder, lambda level, text: None)
    inputs = _export_inputs(network, request)
    for act, record in zip(engines.acts, engines.records):
        if record.folder is None:
            unkept.put_record('exports', _export_digest(act, inputs),
                              record.key.onnx_sha256.encode())
            unkept.put(record.key, engines.plans[act.name], {})


def make_runtime(network: FlowNetwork, request: BuildRequest, *, device: torch.device,
                 installation: Installation | None = None, cache: EngineCache | None = None,
                 progress: Progress | None = None, say: Say | None = None,
                 reason: str = '') -> TensorRtRuntime:
    """Return the TensorRT runtime of ``network`` on ``device``, its engines built where needed.

    They are built in a process of their own (``build_engines_apart``). The runtime is
    not checked yet: see ``reference.compare``. Engines of the cache that this TensorRT does not
    take are removed and built once more. Raises as ``build_engines`` does,
    RuntimeUnavailable without TensorRT and PlanError where new engines are not taken either.
    """
    installation = find_tensorrt() if installation is None else installation
    if installation is None:
        raise RuntimeUnavailable(missing_tensorrt())
    say = log_it if say is None else say
    cache = EngineCache(say=say) if cache is None else cache
    gpu = gpu_of(device)
    for attempt in range(2):
        with torch.cuda.device(device):  # TensorRT builds for the current one
            engines = build_engines_apart(network, request, installation=installation, gpu=gpu,
                                          cache=cache, progress=progress, say=say,
                                          device=device)
        try:
            return TensorRtRuntime(prepared(network, request.precision).to(device),
                                   plans=engines.plans, acts=engines.acts, device=device,
                                   precision=request.precision, reason=reason)
        except PlanError as error:
            old = [record for record in engines.records if record.cached]
            if attempt or not old:
                raise
            say('warning', f'the engines in the cache are built anew: {error}')
            for record in old:
                cache.drop(record.key)
    raise AssertionError('not reached')


def checked_runtime(network: FlowNetwork, request: BuildRequest, *, device: torch.device,
                    cache: EngineCache | None = None, progress: Progress | None = None,
                    say: Say | None = None, reason: str = '') -> TensorRtRuntime:
    """Return the TensorRT runtime of ``network`` once its flow agrees with the reference.

    A range of sizes is checked at its optimum. Raises as ``make_runtime`` does, and
    EngineRefused, with versions and numbers, where the flow does not agree. The engines are
    kept in the cache even so: to build them again at every start would end the same way.
    """
    say = log_it if say is None else say
    runtime = make_runtime(network, request, device=device, cache=cache, progress=progress,
                           say=say, reason=reason)
    start = time.monotonic()
    if progress is not None and not progress(EngineProgress(
            act='', index=0, count=1, phase='check', fraction=0.0, elapsed_s=0.0, left_s=None)):
        raise BuildCancelled('cancelled before the engines were checked; they are kept')
    width, height = request.usual_size
    references = None if cache is None else cache.directory / 'references'
    reference = reference_for(network, width=width, height=height, directory=references,
                              say=lambda text: say('info', text))
    verdict = compare(runtime, reference, precision=request.precision)
    if not verdict.passed:
        raise EngineRefused(verdict.text)
    say('info', f'{verdict.text}; it took {in_words(time.monotonic() - start)}')
    return runtime


def _goes_by_file(network: FlowNetwork, path: Path) -> bool:
    """Write the weights; True where a network made of the file is the same as ``network``.

    Raises OSError where they cannot be written.
    """
    if network.name not in names():
        return False
    try:
        save(network, path)
        again = create(network.name, weights=path)
    except ValueError:
        return False
    return type(again) is type(network) and weights_sha256(again) == weights_sha256(network)


def _run_worker(worker: str, job: Mapping[str, object], progress: Progress | None,
                say: Say) -> None:
    """Run ``build_worker`` in a process of its own; pass on what it tells and raises."""
    last = EngineProgress(act='', index=0, count=1, phase='start', fraction=0.0, elapsed_s=0.0,
                          left_s=None)
    failure: RuntimeError | None = None
    cancelled = False

    def go_on() -> bool:
        nonlocal cancelled
        if progress is not None and last.phase != 'done':
            cancelled = cancelled or not progress(last)
        return not cancelled

    def on_message(message: Mapping[str, object]) -> bool:
        nonlocal last, failure
        told: Any = message
        if 'say' in told:
            say(*told['say'])
        elif 'error' in told:
            kind, text = told['error']
            failure = next(each for each in FAILURES if each.__name__ == kind)(text)
        elif 'progress' in told:
            last = EngineProgress(**told['progress'])
            if last.phase == 'done' and progress is not None:
                progress(last)  # it is too late to cancel
            return go_on()
        return True

    try:
        run_apart(worker, job, on_message=on_message, go_on=go_on)
    except ChildDied as error:
        raise BuildError(f'the process that builds engines died while {last.text}: {error}') \
            from error
    if failure is not None:
        raise failure
    if cancelled:
        raise BuildCancelled(f'cancelled while {last.text}; what was finished is kept in '
                             f'{job["cache"]}: the next build goes on from there')


@dataclass(frozen=True)
class _Todo:
    """An act whose plan is not there yet; ``seen`` is the key that was looked for."""

    act: Act
    title: str
    export: str
    seen: PlanKey | None


class _Job:
    """One run of ``build_engines``."""

    def __init__(self, network: FlowNetwork, request: BuildRequest, installation: Installation,
                 gpu: Gpu, cache: EngineCache, builder: Builder, exporter: Exporter) -> None:
        self.network = network
        self.request = request
        self.installation = installation
        self.gpu = gpu
        self.cache = cache
        self.builder = builder
        self.exporter = exporter
        # On the CPU, in the usual layout: the export must not depend on where the network is.
        self.exported = prepared(network, request.precision).to('cpu')
        self.exported.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        width, height = request.usual_size
        self.acts = record_acts(self.exported, width=width, height=height,
                                dynamic=request.dynamic)
        self.multiple = multiple_of(self.acts)
        self.inputs = _export_inputs(network, request)
        self.plans: dict[str, bytes] = {}
        self.records: dict[str, EngineRecord] = {}

    def complete(self) -> bool:
        """Tell whether every plan is in the cache; says nothing about those that are not."""
        return not any(self._look_up(act, quiet=True) for act in self.acts)

    def remember(self, other: EngineCache) -> None:
        """Take what ``pass_on`` has written from there, as its folder goes away."""
        for act in self.acts:
            export = _export_digest(act, self.inputs)
            model = other.get_record('exports', export)
            if model is None:
                continue
            key = self._key(act, model.decode())
            plan = other.get(key, quiet=True)
            if plan is not None:
                self.cache.remember(key, plan, 'exports', export, model)

    def run(self, progress: Progress | None) -> BuiltEngines:
        """Look everything up, then build what is missing."""
        start = time.monotonic()
        todo = [each for each in map(self._look_up, self.acts) if each]
        pace = Pace([each.act.name for each in todo], progress)
        try:
            for index, each in enumerate(todo):
                pace.start(index)
                self._make(each, pace)
        except (BuildCancelled, WaitCancelled) as error:
            raise BuildCancelled(self._cancelled(pace)) from error
        except KeyboardInterrupt:
            self.cache.say('info', self._cancelled(pace))
            raise
        if todo:
            pace.done()
        return BuiltEngines(acts=self.acts,
                            plans={act.name: self.plans[act.name] for act in self.acts},
                            records=tuple(self.records[act.name] for act in self.acts),
                            installation=self.installation, gpu=self.gpu,
                            seconds=time.monotonic() - start)

    def _look_up(self, act: Act, *, quiet: bool = False) -> _Todo | None:
        """Take the plan from the cache, or return what is to be done for it."""
        title = self._title(act)
        export = _export_digest(act, self.inputs)
        model = self.cache.get_record('exports', export)
        if model is None:
            return _Todo(act, title, export, None)
        key = self._key(act, model.decode())
        plan = self.cache.get(key, title=title, quiet=quiet)
        if plan is None:
            return _Todo(act, title, export, key)
        self._keep(act, key, plan, cached=True, seconds=0.0)
        return None

    def _make(self, todo: _Todo, pace: Pace) -> None:
        act, title = todo.act, todo.title
        lock = digest_of({'export': todo.export, 'tensorrt': self._tensorrt, 'gpu': self.gpu.name,
                          'flags': dict(self.request.options.flags())})
        with self.cache.lock(lock, title=title, waiting=pace.waiting):
            # Another process may have built it, or at least exported it, in the meantime.
            model = self.cache.get_record('exports', todo.export)
            if model is not None:
                key = self._key(act, model.decode())
                plan = self.cache.get(key, title=title, quiet=key == todo.seen)
                if plan is not None:
                    self._keep(act, key, plan, cached=True, seconds=0.0)
                    return
            self._build(todo, pace)

    def _build(self, todo: _Todo, pace: Pace) -> None:
        act, title = todo.act, todo.title
        start = time.monotonic()
        pace.tell('export')
        onnx = self.exporter(self.exported, act, dynamic=self.request.dynamic)
        sha256 = hashlib.sha256(onnx).hexdigest()
        self.cache.put_record('exports', todo.export, sha256.encode())
        pace.exported()
        key = self._key(act, sha256)
        plan = None if key == todo.seen else self.cache.get(key, title=title)
        if plan is not None:  # the export has changed in nothing that matters
            self._keep(act, key, plan, cached=True, seconds=0.0)
            return
        timing = digest_of({'tensorrt': self._tensorrt, 'gpu': self.gpu.name})
        before = self.cache.get_record('timing', timing)
        built = self.builder(onnx, name=title, options=self.request.options,
                             profile=self._profile(act), progress=pace.building,
                             timing_cache=before)
        pace.built()
        seconds = time.monotonic() - start
        if built.timing_cache is not None and built.timing_cache != before:
            self.cache.put_record('timing', timing, built.timing_cache)
        self.cache.put(key, built.plan, {
            'network': self.network.name, 'act': act.name, 'size': self.request.text,
            'options': self.network.options(), 'seconds': round(seconds, 2),
            'flow_ros': __version__, 'torch': torch.__version__}, title=title)
        self._keep(act, key, built.plan, cached=False, seconds=seconds)

    def _keep(self, act: Act, key: PlanKey, plan: bytes, *, cached: bool, seconds: float) -> None:
        self.plans[act.name] = plan
        folder = self.cache.folder(key)
        self.records[act.name] = EngineRecord(
            act=act.name, size=len(plan), cached=cached, seconds=seconds,
            folder=folder if folder.is_dir() else None, key=key)

    def _key(self, act: Act, onnx_sha256: str) -> PlanKey:
        shapes: Mapping[str, object] = (self._profile(act)
                                        or {spec.name: spec.shape for spec in act.inputs})
        return PlanKey(onnx_sha256=onnx_sha256, tensorrt=self._tensorrt, gpu=self.gpu.name,
                       compute_capability=self.gpu.compute_capability, shapes=shapes,
                       precision=self.request.precision, flags=self.request.options.flags())

    def _profile(self, act: Act) -> Profile | None:
        size = self.request.size
        return profile(act, size, self.multiple) if isinstance(size, SizeRange) else None

    def _title(self, act: Act) -> str:
        return f'{self.network.name} {act.name} {self.request.text}'

    @property
    def _tensorrt(self) -> str:
        return f'{self.installation.package} {self.installation.version}'

    def _cancelled(self, pace: Pace) -> str:
        kept = [record.act for record in self.records.values() if record.folder is not None]
        where = (f'{", ".join(kept)} kept in {self.cache.directory}: the next build goes on from '
                 f'there' if kept else 'nothing was finished before')
        return f'cancelled while {pace.text}; {where}'


def _export_inputs(network: FlowNetwork, request: BuildRequest) -> dict[str, object]:
    """Return what decides the export of every act of ``network``."""
    return {'network': f'{type(network).__module__}.{type(network).__qualname__}',
            'options': {name: repr(value) for name, value in network.options().items()},
            'weights': weights_sha256(network), 'precision': request.precision,
            'dynamic': request.dynamic, 'flow_ros': __version__,
            'torch': torch.__version__, 'code': _code_sha256(network)}


def _export_digest(act: Act, inputs: Mapping[str, object]) -> str:
    """Return the name under which the cache remembers what ``act`` was exported to."""
    tensors = [(spec.name, spec.shape, str(spec.dtype), spec.px_per_cell)
               for spec in (*act.inputs, *act.outputs)]
    return digest_of({**inputs, 'act': act.name, 'engine': act.engine, 'tensors': tensors})


def _code_sha256(network: FlowNetwork) -> str:
    """Return the sha256 over the source code an export comes from.

    Within one version of flow_ros the code changes too, while it is worked on. Of torch only
    the version counts.
    """
    package = Path(__file__).parents[1]
    files = {*(package / 'ops').glob('*.py'), *(package / 'networks').glob('*.py'),
             package / 'runtimes' / 'acts.py', package / 'runtimes' / 'export.py'}
    for kind in {kind for module in network.modules() for kind in type(module).__mro__}:
        if kind.__module__.split('.')[0] not in ('builtins', 'torch', 'flow_ros'):
            source = inspect.getsourcefile(sys.modules[kind.__module__])
            files |= {Path(source)} if source else set()
    # An installation may have compiled files only.
    contents = sorted(f'{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}'
                      for path in files if path.is_file())
    return hashlib.sha256('\n'.join(contents).encode()).hexdigest()


def _capability(gpu: Gpu) -> tuple[int, int]:
    major, _, minor = gpu.compute_capability.partition('.')
    return int(major), int(minor or 0)
