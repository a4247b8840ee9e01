"""How fast a run is: tokens per second, share of the machine's peak, memory, time left."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable

import torch

_SPAN = 10.0  # seconds over which the rate is taken
_MEMORY_EVERY = 1.0


class Meter:
    """Rates over the last ten seconds of steps.

    Args:
        flops_per_token: forward and backward, from the cost model; None when unknown.
        peak_flops: FLOPs per second that the machine was measured to reach; None when unknown.
        memory: reads the memory in use, in bytes; asked at most once a second.
    """

    def __init__(
        self, flops_per_token: float | None, peak_flops: float | None, memory: Callable[[], int] | None = None
    ) -> None:
        self._share = flops_per_token / peak_flops if flops_per_token and peak_flops else None
        self._memory, self._bytes, self._asked = memory or resident_bytes, 0, -_MEMORY_EVERY
        self._seen: deque[tuple[float, int]] = deque()
        self._tokens = 0
        self.restart()

    def restart(self) -> None:
        """Begin the present step's clock now: what came before (evaluation, saving) is not training time."""
        now = time.perf_counter()
        pause = now - self._seen[-1][0] if self._seen else 0.0
        self._seen = deque((at + pause, tokens) for at, tokens in self._seen) or deque([(now, 0)])

    def add(self, tokens: int) -> None:
        """A step of so many tokens is done."""
        now = time.perf_counter()
        self._seen.append((now, tokens))
        self._tokens += tokens
        while len(self._seen) > 2 and now - self._seen[0][0] > _SPAN:
            self._tokens -= self._seen[1][1]
            self._seen.popleft()
        if now - self._asked >= _MEMORY_EVERY:
            self._bytes, self._asked = self._memory(), now

    @property
    def seconds(self) -> float:
        """Length of the span that is looked at."""
        return max(self._seen[-1][0] - self._seen[0][0], 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Supervised tokens per second."""
        return self._tokens / self.seconds

    @property
    def share_of_peak(self) -> float | None:
        """Model FLOPs over the machine's peak, 0 to 1; None when unknown."""
        return self._share and self._share * self.tokens_per_second

    @property
    def memory(self) -> int:
        """Bytes in use when last asked."""
        return self._bytes

    def eta(self, steps_left: int) -> float:
        """Seconds that so many more steps take at the present rate."""
        return steps_left * self.seconds / max(len(self._seen) - 1, 1)


def resident_bytes() -> int:
    """Resident memory of this process; on a system without /proc, 0."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def memory_reader(device: torch.device) -> Callable[[], int]:
    """What measures memory on `device`: resident bytes, or the CUDA allocator's."""
    return resident_bytes if device.type == "cpu" else lambda: int(torch.cuda.memory_allocated(device))
