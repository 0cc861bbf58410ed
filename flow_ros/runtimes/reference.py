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

"""Reference outputs, and the check of a runtime against them.

The reference is what torch computes eagerly in float32 on the CPU, with the same network and
weights, at the frame size that is to be served: the flow of one shipped pair of images after
several budgets, from a cold and from a warm start. A runtime is judged by quantiles of the
endpoint error against it: networks that contain an argmax may differ by a whole cell at some
pixels, so the largest error says nothing.

References are kept in the cache (``cache_directory()/references``), because torch on the CPU of
a small board is slow. Beside the shipped weights lie references of their own at the pair's own
size (``NAME.reference.npz``): they find a torch that computes wrongly on this very machine.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import copy
from dataclasses import dataclass, replace
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
import tempfile
from typing import Any
import zipfile
import zlib

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor
from torch.nn import functional

from flow_ros import __version__
from flow_ros.networks.base import Call, Features, FlowNetwork, FlowOutput, State, Step
from flow_ros.ops.sampling import resize_flow
from flow_ros.runtimes.base import check_precision, Runtime
from flow_ros.runtimes.cache import cache_directory

QUANTILES: tuple[float, float, float] = (0.5, 0.99, 0.999)
STRIDE = 3
"""Every third pixel both ways is kept: odd, so that all places within a cell are seen."""

SUFFIX = '.reference.npz'
PAIR = Path(__file__).with_name('reference_pair.npz')

_FORMAT = 1  # part of every key: raise it when what is computed or stored changes
# What reading a damaged file raises.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)

Say = Callable[[str], object]


@dataclass(frozen=True)
class Limits:
    """What the quantiles ``QUANTILES`` of the endpoint error must stay under, px."""

    p50: float
    p99: float
    p999: float

    def __iter__(self) -> Any:
        """Go through the limits in the order of ``QUANTILES``."""
        return iter((self.p50, self.p99, self.p999))


LIMITS: Mapping[str, Limits] = {
    'f32': Limits(0.001, 0.005, 0.01),
    'f16': Limits(0.02, 1.5, 6.0),
    'bf16': Limits(0.1, 4.0, 16.0),
}
"""By what a runtime computes in; at least twice what right ones were seen to need.

Worst of all cases of the shipped models at 640x480 (px at 50, 99 and 99.9 %): OpenVINO f32
0.000005, 0.00004, 0.0004, and torch with all weights off by 1e-5 of themselves 0.0001, 0.0007,
0.003; torch in half precision 0.006, 0.55, 2.5; OpenVINO bf16 0.045, 1.6, 7.7. The tails are
HD3's, which decides between cells, and differ from one training to the next: the median is
what tells. A GridSample that takes the nearest pixel, the fault several TensorRT have, is 2.1,
6.7, 12 in DIP-RT, so it is refused in every precision; in HD3 it is 0.015, 1, 2, which only f32
can tell.
"""


@dataclass(frozen=True)
class ReferenceCase:
    """One run of the pair: ``budget`` as ``iterations`` of ``start``, cold or ``warm``."""

    budget: int
    warm: bool

    @property
    def text(self) -> str:
        """The case in words."""
        return f'{"warm" if self.warm else "cold"}, budget {self.budget}'


@dataclass(frozen=True)
class Reference:
    """What a network's flow should be.

    ``image1`` and ``image2`` (1, 3, H, W), float RGB 0..255, and ``prior`` (1, 2, H, W), px,
    are on the CPU; ``flows`` has for each case the flow (2, H/stride, W/stride), float32 px.
    ``made_by`` says with which versions, ``weights`` is the sha256 of the network's tensors.
    """

    network: str
    weights: str
    image1: Tensor
    image2: Tensor
    prior: Tensor
    flows: Mapping[ReferenceCase, NDArray[np.float32]]
    stride: int
    made_by: str

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the frames, px."""
        return self.image1.shape[-1], self.image1.shape[-2]


@dataclass(frozen=True)
class CaseResult:
    """How one case went: the endpoint error's ``QUANTILES``, px; NaN where there is NaN.

    ``replayed``: as a CUDA graph, which a case that has one is judged by too.
    """

    case: ReferenceCase
    quantiles: tuple[float, float, float]
    passed: bool
    replayed: bool = False

    @property
    def text(self) -> str:
        """The case in words."""
        return self.case.text + (', as a CUDA graph' if self.replayed else '')


@dataclass(frozen=True)
class Verdict:
    """Whether a runtime may serve: ``text`` says it in a paragraph, with the numbers.

    ``fault`` is what the runtime said where it did not run at all; ``cases`` are then those
    before it.
    """

    network: str
    runtime: str
    precision: str
    arithmetic: str
    device: str
    size: tuple[int, int]
    versions: str
    limits: Limits
    cases: tuple[CaseResult, ...]
    fault: str = ''

    @property
    def passed(self) -> bool:
        """True where every case ran and stayed under every limit."""
        return not self.fault and bool(self.cases) and all(each.passed for each in self.cases)

    @property
    def worst(self) -> CaseResult | None:
        """The case furthest over, or closest to, its limits; None where none was run."""
        return max(self.cases, key=self._share, default=None)

    @property
    def text(self) -> str:
        """What was checked, what was seen and expected, and what happens next."""
        width, height = self.size
        precision = (self.precision if self.precision == self.arithmetic
                     else f'{self.precision}: {self.arithmetic}')
        head = (f'check of {self.network} on {self.runtime} ({precision}, {self.device}, '
                f'{width}x{height}; {self.versions})')
        if self.passed:
            return f'{head}: passed; {self._numbers()}'
        seen = f'it failed: {self.fault}' if self.fault else self._numbers()
        return (f'{head}: REFUSED; {seen}. It is not used: the next runtime serves instead. '
                f'`flow_ros self-test --runtime {self.runtime} --precision {self.precision} '
                f'--size {width}x{height}` shows all numbers; please report them. Another '
                f'version of {_package(self.runtime)} may help')

    def _share(self, result: CaseResult) -> float:
        shares = [error / limit for error, limit in zip(result.quantiles, self.limits)]
        return float('inf') if any(np.isnan(shares)) else max(shares)

    def _numbers(self) -> str:
        worst = self.worst
        if worst is None:
            return 'there was nothing to compare with'
        if any(np.isnan(worst.quantiles)):
            return f'NaN or infinite values in its output ({worst.text})'
        seen = ', '.join(f'{100 * share:g} % at {error:.2g} (limit {limit:g})' for
                         share, error, limit in zip(QUANTILES, worst.quantiles, self.limits))
        return (f'endpoint error in px against torch f32 on the CPU, worst of '
                f'{len(self.cases)} cases ({worst.text}): {seen}')


def default_cases(network: FlowNetwork) -> tuple[ReferenceCase, ...]:
    """Return budgets 1, half and all of the network's own, cold and, where it can, warm."""
    most = network.default_iterations
    budgets = sorted({1, (1 + most) // 2, most})
    starts = (False, True) if network.accepts_prior else (False,)
    return tuple(ReferenceCase(budget, warm) for warm in starts for budget in budgets)


def reference_pair(width: int = 0, height: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shipped images (1, 3, H, W), float RGB 0..255, and a prior flow (1, 2, H, W).

    Resized to ``width`` x ``height`` px; 0 is the pair's own size. The prior is the true flow,
    coarse. Whole grey values, as a camera's, whatever the size.
    """
    with np.load(PAIR, allow_pickle=False) as stored:
        images = torch.from_numpy(stored['images']).permute(0, 3, 1, 2).float()
        prior = torch.from_numpy(stored['prior']).permute(2, 0, 1)[None].float()
    own = (images.shape[-2], images.shape[-1])
    size = (height or own[0], width or own[1])
    # The stored prior is coarse, but in px of the pair's own size.
    prior = functional.interpolate(prior, size=own, mode='bilinear', align_corners=False)
    if size != own:
        images = functional.interpolate(images, size=size, mode='bilinear', align_corners=False,
                                        antialias=True).round().clamp(0, 255)
    return images[:1].clone(), images[1:].clone(), resize_flow(prior, size)


def make_reference(network: FlowNetwork, image1: Tensor, image2: Tensor, prior: Tensor, *,
                   cases: Sequence[ReferenceCase] | None = None,
                   stride: int = STRIDE) -> Reference:
    """Compute the reference: eagerly, in float32, on the CPU, whatever ``network`` is on.

    ``network`` itself is left as it is. Raises ValueError where its flow is not finite.
    """
    if network.training or any(tensor.device.type != 'cpu' or (
            tensor.is_floating_point() and tensor.dtype != torch.float32)
            for tensor in (*network.parameters(), *network.buffers())):
        network = copy.deepcopy(network).eval().to('cpu', torch.float32)
    chosen = default_cases(network) if cases is None else tuple(cases)
    flows: dict[ReferenceCase, NDArray[np.float32]] = {}
    with torch.inference_mode():
        a, b = network.encode(image1), network.encode(image2)
        # What a budget has in common with another one is computed once.
        reached: dict[tuple[bool, tuple[Step, ...]], State] = {}
        for case in chosen:
            state = network.start(a, b, prior_flow=prior if case.warm else None,
                                  iterations=case.budget)
            while state.schedule:
                step, *left = state.schedule
                done = (case.warm, (*state.done, step))
                if done not in reached:
                    reached[done] = network.step(state)
                state = replace(reached[done], schedule=tuple(left))
            flow = network.finish(state).flow[0, :, ::stride, ::stride]
            if not bool(torch.isfinite(flow).all()):
                raise ValueError(f'{network.name} computes NaN or infinite flow in torch f32 on '
                                 f'the CPU ({case.text}): its weights cannot be used')
            flows[case] = flow.contiguous().numpy()
    return Reference(network.name, weights_sha256(network), image1, image2, prior, flows, stride,
                     made_by=f'flow_ros {__version__}, torch {torch.__version__}')


def reference_for(network: FlowNetwork, *, width: int, height: int,
                  directory: Path | None = None, say: Say | None = None) -> Reference:
    """Return the reference of ``network`` at this frame size, from the cache or computed.

    ``directory`` None is ``cache_directory()/references``; where it cannot be written the
    reference is computed each time, and ``say`` told so.
    """
    say = say or (lambda text: None)
    directory = cache_directory() / 'references' if directory is None else directory
    image1, image2, prior = reference_pair(width, height)
    weights = weights_sha256(network)
    key = _key(network, weights, width, height)
    path = directory / f'{network.name}-{width}x{height}-{key[:16]}.npz'
    if path.is_file():
        try:
            return _read(path, key, network.name, weights, image1, image2, prior)
        except _DAMAGED as error:
            say(f'reference {path} cannot be used ({error}): computed again')
    say(f'computing the reference of {network.name} at {width}x{height} with torch on the CPU')
    reference = make_reference(network, image1, image2, prior)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_reference(reference, path, key=key)
    except OSError as error:
        say(f'references are not kept: cannot write to {directory} ({error.strerror}); set '
            f'FLOW_ROS_CACHE to a folder that can be written')
    return reference


def shipped_reference(network: FlowNetwork, weights_file: Path) -> Reference | None:
    """Return the reference beside ``weights_file``, or None where there is none for it.

    It is for the pair's own size. None too where it was made with other weights than those
    ``network`` has. Raises ValueError where the file is damaged.
    """
    path = weights_file.with_name(weights_file.name.removesuffix(weights_file.suffix) + SUFFIX)
    if not path.is_file():
        return None
    weights = weights_sha256(network)
    try:
        return _read(path, None, network.name, weights, *reference_pair())
    except _OtherWeightsError:
        return None
    except _DAMAGED as error:
        raise ValueError(f'reference {path} is damaged ({error}): install flow_ros again') \
            from error


def write_reference(reference: Reference, path: Path, *, key: str = '') -> None:
    """Write the flows of ``reference``, not its images; OSError leaves an older file whole."""
    about = {'key': key, 'weights': reference.weights, 'network': reference.network,
             'stride': reference.stride, 'made_by': reference.made_by, 'format': _FORMAT,
             'pair': _pair_sha256(), 'size': reference.size,
             'cases': [[case.budget, case.warm] for case in reference.flows]}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix='.part')
    try:
        with os.fdopen(handle, 'wb') as file:
            np.savez_compressed(file, about=np.array(json.dumps(about)),
                                flows=np.stack(list(reference.flows.values())))
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def compare(runtime: Runtime, reference: Reference, *, precision: str | None = None,
            limits: Limits | None = None) -> Verdict:
    """Run every case of ``reference`` on ``runtime`` as a stream would, and judge it.

    Where the runtime captures CUDA graphs (its attribute ``graphed``), a case runs until it is
    replayed, which is judged as well: that is what will serve.

    ``precision`` None is that of the runtime (its attribute ``precision``; 'f32' where it has
    none), ``limits`` None those of what it computes in (its attribute ``arithmetic``; where it
    has none, 'f16' for 'fast', the bits that TF32 has too). A runtime that raises is refused.
    """
    precision = precision or str(getattr(runtime, 'precision', 'f32'))
    check_precision(precision)
    usual = 'f32' if precision == 'f32' else 'f16'
    arithmetic = str(getattr(runtime, 'arithmetic', usual))
    limits = limits or LIMITS[arithmetic]
    results: list[CaseResult] = []
    fault = ''
    try:
        for case, expected in reference.flows.items():
            for output, replayed in _runs(runtime, reference, case):
                result = _judge(case, output, expected, reference.stride, limits)
                results.append(replace(result, replayed=replayed))
    except RuntimeError as error:  # an engine's fault, no memory left, an unknown shape
        fault = str(error) or type(error).__name__
    return Verdict(network=runtime.network.name, runtime=runtime.name, precision=precision,
                   arithmetic=arithmetic, device=str(runtime.device), size=reference.size,
                   versions=versions(runtime.name, runtime.device), limits=limits,
                   cases=tuple(results), fault=fault)


def versions(runtime: str, device: torch.device) -> str:
    """Return the versions that decide what ``runtime`` computes, and the GPU, in words."""
    parts = [f'flow_ros {__version__}', f'torch {torch.__version__}']
    if runtime == 'openvino':
        parts.insert(0, f'OpenVINO {_installed("openvino")}')
    if runtime == 'tensorrt':
        from flow_ros.runtimes.tensorrt import find_tensorrt
        found = find_tensorrt()
        parts.insert(0, 'no TensorRT' if found is None else f'{found.package} {found.version}')
    if device.type == 'cuda' and torch.cuda.is_available():
        parts.append(f'{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}')
    return ', '.join(parts)


def weights_sha256(network: FlowNetwork) -> str:
    """Return the sha256 over names, types, shapes and values of the network's tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        values = value.detach().cpu().contiguous()
        digest.update(f'{name} {values.dtype} {tuple(values.shape)}\n'.encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _runs(runtime: Runtime, reference: Reference,
          case: ReferenceCase) -> Iterator[tuple[FlowOutput, bool]]:
    """Run one case the way the estimator does; yield the output, and if a graph made it."""
    network, device = runtime.network, runtime.device
    call: Call = runtime.call
    prior = reference.prior.to(device) if case.warm else None

    def run(a: Features, b: Features) -> FlowOutput:
        with torch.inference_mode():
            state = network.start(a, b, prior_flow=prior, iterations=case.budget, call=call)
            return runtime.loop(state)[1]

    with torch.inference_mode():
        a, b = (network.encode(image.to(device), call=call)
                for image in (reference.image1, reference.image2))
    yield run(a, b), False
    if not getattr(runtime, 'graphed', False):
        return
    # Captured with other features than it is judged by: a graph may not read what it is given.
    run(b, a)
    if getattr(runtime, 'graphed', False):  # still
        yield run(a, b), True


def _judge(case: ReferenceCase, output: FlowOutput, expected: NDArray[np.float32], stride: int,
           limits: Limits) -> CaseResult:
    """Return the quantiles of the endpoint error; NaN anywhere in the output is NaN here."""
    finite = all(bool(torch.isfinite(values).all())
                 for values in (output.flow, output.confidence, output.occlusion)
                 if values is not None)
    flow = output.flow[0, :, ::stride, ::stride].float().cpu().numpy()
    if flow.shape != expected.shape:
        raise RuntimeError(f'its flow has {flow.shape[::-1]} samples where the reference has '
                           f'{expected.shape[::-1]}')
    if not finite:
        nan = float('nan')
        return CaseResult(case, (nan, nan, nan), passed=False)
    error = np.hypot(*(flow.astype(np.float64) - expected))
    p50, p99, p999 = (float(value) for value in np.quantile(error, QUANTILES))
    seen = (p50, p99, p999)
    return CaseResult(case, seen, passed=all(each < limit for each, limit in zip(seen, limits)))


class _OtherWeightsError(ValueError):
    """A reference was made with other weights."""


def _read(path: Path, key: str | None, network: str, weights: str, image1: Tensor,
          image2: Tensor, prior: Tensor) -> Reference:
    """Return the stored reference; ValueError where it is not for these."""
    with np.load(path, allow_pickle=False) as stored:
        about = json.loads(str(stored['about']))
        flows = stored['flows']
    if about['weights'] != weights:
        raise _OtherWeightsError('it was made with other weights')
    if key is not None and about['key'] != key:
        raise ValueError('it was made for something else')
    if about['format'] != _FORMAT or about['pair'] != _pair_sha256():
        raise ValueError('it was made by another version of flow_ros')
    cases = [ReferenceCase(int(budget), bool(warm)) for budget, warm in about['cases']]
    stride = int(about['stride'])
    shape = (2, -(-image1.shape[-2] // stride), -(-image1.shape[-1] // stride))
    if flows.dtype != np.float32 or flows.shape != (len(cases), *shape):
        raise ValueError(f'its flows are {flows.dtype} {flows.shape}, expected float32 '
                         f'{(len(cases), *shape)}')
    if not np.isfinite(flows).all():
        raise ValueError('its flows are not finite')
    return Reference(network, weights, image1, image2, prior, dict(zip(cases, flows)), stride,
                     made_by=str(about['made_by']))


def _key(network: FlowNetwork, weights: str, width: int, height: int) -> str:
    """Return what a stored reference is found by: all that its numbers depend on."""
    about = [_FORMAT, __version__, torch.__version__, network.name, network.options(), weights,
             width, height, STRIDE, _pair_sha256(),
             [(case.budget, case.warm) for case in default_cases(network)]]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _pair_sha256() -> str:
    return hashlib.sha256(PAIR.read_bytes()).hexdigest()


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'of unknown version'


def _package(runtime: str) -> str:
    return {'tensorrt': 'TensorRT', 'openvino': 'OpenVINO'}.get(runtime, 'torch')
