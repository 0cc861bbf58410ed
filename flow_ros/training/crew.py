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

"""The processes that train together, by Lightning Fabric: one, or those torchrun has started."""

from contextlib import AbstractContextManager
import logging
import os
from typing import Any, TypeVar

import torch
from torch import distributed, nn, Tensor

Thing = TypeVar('Thing')


class Crew:
    """One process's place among those that train one network; each takes its share of a batch.

    Two processes of one thread each are also the fastest way to use two CPU cores: nothing
    waits at the end of every small operation, only once a step for the gradients. These are
    averaged in one message and not, as DistributedDataParallel would, in buckets on the way:
    which weights get a gradient changes from step to step (schedules, missing truth), and what
    is not used would have to be searched for in every graph.
    """

    def __init__(self, device: torch.device | None = None, *,
                 precision: str = 'bf16-mixed') -> None:
        """Join the crew; raises ValueError where ``device`` is not there."""
        device = own_device(device)
        fabric = _fabric_class()
        size = int(os.environ.get('WORLD_SIZE', '1'))
        kind = 'cpu' if device.type == 'cpu' else device.type
        options: dict[str, Any] = {'accelerator': kind, 'precision': precision}
        if size == 1:
            options['devices'] = 1 if device.index is None or kind == 'cpu' else [device.index]
        else:
            options |= _crew_options(size)
        try:
            self.fabric = fabric(**options)
            self.fabric.launch()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f'training cannot start on {device} with {size} processes: '
                             f'{" ".join(str(error).split())[:300]}') from error
        self.rank, self.size = self.fabric.global_rank, size

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self.fabric.device
        return device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return bool(self.rank == 0)

    def share(self, batch: int) -> int:
        """Return how many pairs of a batch one process takes; at least one."""
        return max(1, batch // self.size)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the network is run."""
        context: AbstractContextManager[Any] = self.fabric.autocast()
        return context

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""
        self.fabric.backward(loss)

    def mean_gradients(self, network: nn.Module) -> None:
        """Replace every gradient, and the running statistics, by their mean over the crew."""
        if self.size == 1:
            return
        for weight in network.parameters():
            if weight.grad is None:  # this process's schedule did not use it
                weight.grad = torch.zeros_like(weight)
        values = [weight.grad for weight in network.parameters() if weight.grad is not None]
        # Batch norm's, too: a warm start is made with them, and a checkpoint holds but one set.
        values += [value for value in network.buffers() if value.is_floating_point()]
        flat = self.sum(torch.cat([value.detach().flatten() for value in values])) / self.size
        for own, mean in zip(values, flat.split([value.numel() for value in values])):
            own.detach().copy_(mean.view_as(own))

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the crew, in place."""
        if self.size > 1:  # not Fabric's own, which waits for all before it begins
            distributed.all_reduce(values)
        return values

    def agree(self, value: float, stop: bool) -> tuple[float, bool]:
        """Return the first process's ``value``, and whether any process wants to stop."""
        if self.size == 1:
            return value, stop
        told = torch.tensor([value if self.first else 0.0, float(stop)], dtype=torch.float64)
        told = self.sum(told.to(self.device) if self.device.type == 'cuda' else told).cpu()
        return float(told[0]), bool(told[1] > 0)

    def told(self, thing: Thing) -> Thing:
        """Return what the first process has passed."""
        if self.size == 1:
            return thing
        told: Thing = self.fabric.broadcast(thing)
        return told

    def barrier(self) -> None:
        """Wait for the others."""
        self.fabric.barrier()


def own_device(device: torch.device | None) -> torch.device:
    """Return the device of this process: of torchrun's processes each has a GPU of its own."""
    if device is None:
        device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if str(device) != 'cuda':  # one that is told by its number is taken
        return device
    rank, count = int(os.environ.get('LOCAL_RANK', '0')), torch.cuda.device_count()
    if rank >= count:
        raise ValueError(f'process {rank} of this machine has no GPU: torch sees {count}; start '
                         f'at most one process per GPU, or train on the CPU (--device cpu)')
    return torch.device('cuda', rank)


def _fabric_class() -> Any:
    try:
        from lightning_fabric import Fabric
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'training needs the package lightning_fabric: pip install lightning-fabric',
            name=error.name) from error
    # It tells at length what a recipe has said already.
    for name in ('lightning_fabric', 'lightning.fabric'):
        logging.getLogger(name).setLevel(logging.WARNING)
    return Fabric


def _crew_options(size: int) -> dict[str, Any]:
    """Return Fabric's options for processes that are there already."""
    from lightning_fabric.plugins.environments import TorchElasticEnvironment

    # Processes may also be started by hand, with fewer variables than torchrun sets.
    os.environ.setdefault('LOCAL_RANK', os.environ.get('RANK', '0'))
    local = int(os.environ.get('LOCAL_WORLD_SIZE', size))
    return {'strategy': 'ddp', 'devices': local, 'num_nodes': max(1, size // local),
            'plugins': [TorchElasticEnvironment()]}
