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

"""Readers of the public data sets with ground truth, by name."""

from pathlib import Path

from flow_ros.evaluation.data_sets.base import DataSet, DataSetError, Files, Sample, SetPair
from flow_ros.evaluation.data_sets.recorded import (
    Folders,
    Hd1k,
    Kitti2012,
    Kitti2015,
    Middlebury,
)
from flow_ros.evaluation.data_sets.rendered import (
    FlyingChairs,
    FlyingChairs2,
    FlyingThings3D,
    FlyingThingsClean,
    FlyingThingsFinal,
    Sintel,
    SintelClean,
    SintelFinal,
    Spring,
    TartanAir,
)

KINDS: dict[str, type[DataSet]] = {
    'chairs': FlyingChairs,
    'chairs2': FlyingChairs2,
    'things': FlyingThings3D,
    'things_clean': FlyingThingsClean,
    'things_final': FlyingThingsFinal,
    'sintel': Sintel,
    'sintel_clean': SintelClean,
    'sintel_final': SintelFinal,
    'kitti2012': Kitti2012,
    'kitti2015': Kitti2015,
    'hd1k': Hd1k,
    'middlebury': Middlebury,
    'spring': Spring,
    'tartanair': TartanAir,
    'folders': Folders,
}


def data_set_names() -> tuple[str, ...]:
    """Return the names that ``open_data_set`` knows."""
    return tuple(KINDS)


def open_data_set(name: str, root: str | Path, split: str | None = None) -> DataSet:
    """Return the data set ``name`` below ``root``; DataSetError says what is wrong.

    ``split`` None or '' is the set's own: 'train', or all of it where it has no parts.
    """
    kind = KINDS.get(name)
    if kind is None:
        raise DataSetError(f'no data set is called {name!r}; known are {", ".join(KINDS)}')
    return kind(name, root, split)


__all__ = ['data_set_names', 'DataSet', 'DataSetError', 'Files', 'open_data_set', 'Sample',
           'SetPair']
