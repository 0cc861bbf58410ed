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

"""What a run tells on its way: ``log.jsonl``, and TensorBoard where it is installed."""

from collections.abc import Mapping
import json
import math
import os
from pathlib import Path
import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm


def say(text: str) -> None:
    """Tell ``text`` on stderr, above the progress bar."""
    tqdm.write(text, file=sys.stderr)


class Journal:
    """Curves and pictures of one run, continued at ``step``.

    What was written after that step, by a run that was killed before its next checkpoint, is
    taken back, so that every step is told once. A full disk costs lines, never the run.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        self.path = folder / 'log.jsonl'
        self._failed = False
        self._cut(step)
        self._writer: Any = None
        self._open(folder, step)

    def _open(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
            self._writer = SummaryWriter(str(folder / 'tensorboard'), purge_step=step + 1)
            _quiet_tensorboard()
        except ImportError:
            say(f'no TensorBoard curves and pictures (pip install tensorboard): the '
                f'curves are in {self.path}')
        except OSError as error:
            self._warn(error)

    def line(self, progress: Mapping[str, Any], values: Mapping[str, float], *,
             kind: str = 'train') -> None:
        """Add one line, and one point to each curve."""
        told = {key: float(f'{value:.6g}') if math.isfinite(value) else None
                for key, value in values.items()}
        content = {**progress, **told} if kind == 'train' else {**progress, kind: told}
        try:
            self._append(json.dumps(content) + '\n')
            if self._writer is not None:
                for key, value in values.items():
                    self._writer.add_scalar(f'{kind}/{key}', value, progress['step'])
        except OSError as error:
            self._warn(error)

    def picture(self, name: str, picture: NDArray[np.uint8], step: int) -> None:
        """Add an RGB picture (H, W, 3)."""
        if self._writer is not None:
            try:
                self._writer.add_image(name, picture, step, dataformats='HWC')
            except OSError as error:
                self._warn(error)

    def flush(self) -> None:
        """Bring everything to the disk."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:
                self._warn(error)

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._warn(error)

    def _append(self, line: str) -> None:
        """Write a line whole or not at all, so that it does not spoil the next one."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open('a') as file:
                file.write(line)
        except OSError:
            if self.path.exists():
                os.truncate(self.path, size)
            raise

    def _cut(self, step: int) -> None:
        """Leave the lines up to ``step``."""
        if not self.path.exists():
            return
        try:
            lines = self.path.read_text(errors='replace').splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                part = self.path.with_name('log.jsonl.part')
                part.write_text(''.join(kept))
                part.replace(self.path)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            say(f'the log in {self.path.parent} cannot be written '
                f"({error.strerror or error}): lines are missing there, TensorBoard's end")
        self._failed = True
        self._writer = None  # its thread has ended with the first failure


def _quiet_tensorboard() -> None:
    """Keep TensorBoard's thread from printing a traceback: it raises where it is called, too."""
    shown = threading.excepthook

    def show(failed: threading.ExceptHookArgs) -> None:
        ours = type(failed.thread).__module__.startswith('tensorboard')
        if not (ours and isinstance(failed.exc_value, OSError)):
            shown(failed)

    threading.excepthook = show


def _step_of(line: str) -> float:
    """Return the step of a line; that of one which was cut off is past everything."""
    try:
        return float(json.loads(line)['step'])
    except (ValueError, KeyError, TypeError):
        return math.inf
