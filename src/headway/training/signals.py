"""Ctrl-C, `kill` and a closed terminal, turned into a saved run.

Policy: the first SIGINT, SIGTERM or SIGHUP lets the step (or the save) in progress finish; an evaluation is
broken off. Then the run is saved and ends with 130, 143 or 129. The same signal again, or a SIGINT after any,
stops at once; the last checkpoint is untouched. A signal that was ignored at the start stays ignored, so a run
under `nohup` outlives its terminal. A closed stdout never ends a run: see loop.Trainer.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from headway.errors import Interrupted

_CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_Handler = Callable[[int, FrameType | None], object] | int | None


class StopSignals:
    """Watch for signals during a `with` block; `caught` is the first one's number, else None.

    Args:
        last_save: says, for the message of a second signal, what is on the disk.

    Outside the main thread Python cannot catch signals: then this does nothing.
    """

    def __init__(self, last_save: Callable[[], str]) -> None:
        self.caught: int | None = None
        self._last_save = last_save
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _CAUGHT:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None and number in (self.caught, signal.SIGINT):
            name = signal.Signals(number).name
            raise Interrupted(number, name, f"stopped at once; {self._last_save()}", "--resume goes on from there")
        self.caught = self.caught or number
