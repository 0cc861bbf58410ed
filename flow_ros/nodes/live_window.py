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

"""A window for pictures, where there is a display; Tk, because OpenCV's wheel has no windows."""

import os
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


class LiveWindow:
    """Shows the newest picture; ``update`` is to be called often, from the thread it is of."""

    def __init__(self, title: str) -> None:
        """Open it; raises ImportError without Tk, tkinter.TclError without a display."""
        import tkinter

        self._tkinter = tkinter
        self._root: Any = tkinter.Tk()
        self._root.title(title)
        self._root.protocol('WM_DELETE_WINDOW', self.close)
        self._label = tkinter.Label(self._root, borderwidth=0)
        self._label.pack()
        self._photo: Any = None

    @property
    def is_open(self) -> bool:
        """Whether nobody has closed it."""
        return self._root is not None

    def show(self, picture: NDArray[np.uint8]) -> None:
        """Show ``picture``, RGB (H, W, 3)."""
        if self._root is not None:
            good, data = cv2.imencode('.ppm', cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
            if good:
                self._photo = self._tkinter.PhotoImage(data=data.tobytes(), format='PPM')
                self._label.configure(image=self._photo)

    def update(self) -> None:
        """Let the window react."""
        if self._root is not None:
            self._root.update()

    def close(self) -> None:
        """Close it; closing twice does nothing."""
        root, self._root = self._root, None
        if root is not None:
            root.destroy()


def open_window(title: str) -> tuple[LiveWindow | None, str]:
    """Return a window, or None and why there is none."""
    if not os.environ.get('DISPLAY'):
        return None, 'no display'
    try:
        return LiveWindow(title), ''
    except ImportError:
        return None, 'Python has no Tk; on Debian and Ubuntu: sudo apt install python3-tk'
    except Exception as error:  # TclError, whose name needs Tk
        return None, str(error)
