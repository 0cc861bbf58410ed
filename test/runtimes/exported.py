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

"""Exports of all networks, made once per test session: each act takes seconds."""

import torch

from flow_ros.networks import create
from flow_ros.runtimes.acts import record_acts
from flow_ros.runtimes.export import export_act, multiple_of, prepared, profile, SizeRange

WIDTH, HEIGHT = 192, 128
RANGE = SizeRange((128, 128), (WIDTH, HEIGHT), (384, 256))

NETWORKS = {
    'dip_rt': ('dip_rt', {}),
    'dip': ('dip', {}),
    'hd3': ('hd3', {}),
    'hd3_compact': ('hd3', {'encoder': 'vgg', 'decoder_width': 64, 'context': False,
                            'cost': 'sample', 'cues': True}),
    'hd3_iofpl': ('hd3', {'encoder': 'vgg', 'cost': 'sample', 'radius': 8, 'measure': 'sad',
                          'cues': True}),
    'mscsl': ('mscsl', {}),
}
"""By the names used here: the network and its options. All are untrained, of one seed."""


class Exports:
    """The networks, their acts and these as ONNX, each made when it is first asked for."""

    def __init__(self):
        self._made = {}

    def network(self, name, precision='f32'):
        """Return the network as it is exported."""
        def make():
            torch.manual_seed(0)
            family, options = NETWORKS[name]
            return prepared(create(family, None, **options), precision)

        return self._once(('network', name, precision), make)

    def acts(self, name, precision='f32', dynamic=False):
        """Return its acts for frames of WIDTH x HEIGHT."""
        return self._once(('acts', name, precision, dynamic), lambda: record_acts(
            self.network(name, precision), width=WIDTH, height=HEIGHT, dynamic=dynamic))

    def model(self, name, act, precision='f32', dynamic=False):
        """Return the ONNX bytes of the act of this name."""
        def make():
            found = {each.name: each for each in self.acts(name, precision, dynamic)}[act]
            return export_act(self.network(name, precision), found, dynamic=dynamic)

        return self._once(('model', name, act, precision, dynamic), make)

    def profile(self, name, act, precision='f32'):
        """Return the profile of a dynamic act for ``RANGE``."""
        return profile(act, RANGE, multiple_of(self.acts(name, precision, True)))

    def _once(self, key, make):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
