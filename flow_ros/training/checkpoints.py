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

"""Checkpoints to resume from: written whole or not at all, and never over the last good one."""

from collections.abc import Mapping
import io
import os
from pathlib import Path
import pickle
import shutil
from typing import Any

import torch

PARTS = ('state', 'optimizer')
"""A checkpoint's files, apart so that each stays small enough for what carries 16 MiB a file."""


class SaveError(OSError):
    """Something could not be written; what was there before is still there."""


class Checkpoints:
    """The checkpoints of a run, one folder each: ``step-00001200/{state,optimizer}.pt``.

    A new one is written beside the others and renamed when it is complete; the ``keep`` newest
    stay.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob('step-*')
                      if path.is_dir() and path.name.removeprefix('step-').isdigit())

    def latest(self) -> Path | None:
        """Return the newest one."""
        found = self.all()
        return found[-1] if found else None

    def save(self, step: int, parts: Mapping[str, Any]) -> Path:
        """Write the checkpoint of ``step``; raises SaveError, and nothing is lost."""
        path = self.folder / f'step-{step:08}'
        if path.exists():  # the same step of the same run
            return path
        unfinished = path.with_name(path.name + '.part')
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for name, content in parts.items():
                memory = io.BytesIO()
                torch.save(content, memory)  # what writes to a full disk is better told apart
                with (unfinished / f'{name}.pt').open('wb') as file:
                    file.write(memory.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = self.latest()
            raise SaveError(f'checkpoint {path} could not be written '
                            f'({error.strerror or error}); '
                            + (f'{kept.name} is kept' if kept else 'there is none before it')) \
                from error
        for old in self.all()[:-self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def load(self, path: Path) -> dict[str, Any]:
        """Return the parts of ``path``, on the CPU; raises ValueError if it is damaged."""
        parts = {}
        for name in PARTS:
            try:
                parts[name] = torch.load(path / f'{name}.pt', map_location='cpu',
                                         weights_only=True)
            except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
                raise ValueError(
                    f'{path / name}.pt cannot be read: damaged, or cut off '
                    f'({" ".join(str(error).split())[:100]}). {self.advice(path)}') from error
        return parts

    def advice(self, path: Path) -> str:
        """Return what to do about a checkpoint that cannot be used."""
        others = [other for other in self.all() if other < path]
        if others:
            return (f'Remove the folder {path} to go on from {others[-1].name}, or train into '
                    f'another folder')
        return f'Train into another folder, or remove {path} to begin again'
