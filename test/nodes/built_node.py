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

"""The flow node with an engine that is built and fails as standard input says, line by line.

'tell TEXT' is progress of the build, 'ready' its end, 'refuse TEXT' and 'fail TEXT' others;
'fault nan' and 'fault raise' make the engines that serve fail, 'fault none' mends them. With
'deaf' as the first argument the builder does not listen to anybody.
"""

import copy
from dataclasses import dataclass
import math
import queue
import sys
import threading
import time

import torch

from flow_ros.nodes import flow_node
from flow_ros.runtimes import EngineFault
from flow_ros.runtimes.handover import EngineRefused, Handover
from flow_ros.runtimes.torch import TorchRuntime
from flow_ros.streaming import estimator

CPU = torch.device('cpu')


class Engine(TorchRuntime):
    """Torch under another name, until it shall fail."""

    name = 'tensorrt'
    fault = 'none'

    def loop(self, state, lap=None, control=None):
        if Engine.fault == 'raise':
            raise EngineFault('TensorRT 10.3: enqueue failed on step_8')
        state, output = super().loop(state, lap, control)
        if Engine.fault == 'nan':
            output.flow[..., 0, 0] = math.nan
        return state, output


@dataclass(frozen=True)
class Told:
    text: str


class Builder:
    def __init__(self, deaf):
        self.deaf = deaf
        self.orders = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in sys.stdin:
            verb, _, text = line.strip().partition(' ')
            if verb == 'fault':
                Engine.fault = text
            else:
                self.orders.put((verb, text))

    def create(self, name, network, *, say, **options):
        """Stand in for create_runtime."""
        copied = copy.deepcopy(network)

        def make(*, height, width, progress):
            if self.deaf:
                time.sleep(600.0)
            told = Told('exporting encode (1 of 4): 0 %')
            while progress(told):
                try:
                    verb, text = self.orders.get(timeout=0.05)
                except queue.Empty:
                    continue
                if verb == 'tell':
                    told = Told(text)
                elif verb == 'ready':
                    return Engine(copied, device=CPU, reason='built and checked')
                else:
                    raise {'refuse': EngineRefused, 'fail': RuntimeError}[verb](text)
            raise RuntimeError('cancelled')
        return Handover(serving=[lambda: TorchRuntime(network, device=CPU, threads=1,
                                                      reason='until TensorRT is ready')],
                        make=make, say=say, period_s=0.3)


if __name__ == '__main__':
    estimator.create_runtime = Builder(deaf='deaf' in sys.argv).create
    raise SystemExit(flow_node.main([argument for argument in sys.argv if argument != 'deaf']))
