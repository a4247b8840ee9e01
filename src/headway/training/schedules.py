r"""The learning rate over a run, as a multiple of its peak.

    1 |    ________          constant: stays up            linear: straight line down
      |   /        \         wsd: up, then down at the end cosine: half a wave down
      |  /          \
    0 |_/____________\____   warmup is linear in all

    1 |    /\.
      |   /   `-.            inverse-sqrt: sqrt(warmup / step), which knows no end (arXiv:1706.03762, section 5.3)
      |  /       ``--..
    0 |_/______________``
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from headway.run_config import Train

# What is left between the peak (1) and final_lr (0) at `progress` of the way down, 0 <= progress <= 1.
# wsd falls as 1 - sqrt, which ends lower than a line of the same length (arXiv:2405.18392, section 3.2).
_SHAPES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "wsd": lambda progress: 1.0 - math.sqrt(progress),
}


def scale(step: int, train: Train) -> float:
    """The multiple of the peak rate at which update number `step` (from 0) is made, in [0, 1].

    Update s of `warmup` W has (s + 1) / W, so that none is wasted on a rate of zero. The way down begins after
    warmup (wsd: at the last `decay` share of the steps, but not within warmup) and would reach `final_lr` at
    update number `steps`; later updates stay there. A constant schedule never falls; inverse-sqrt falls for ever
    towards `final_lr`, without warmup from the first update on.
    """
    steps, warmup = train.steps or 0, train.warmup or 0
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "inverse-sqrt":
        return train.final_lr + (1.0 - train.final_lr) * math.sqrt(max(warmup, 1) / (step + 1))
    start = max(warmup, steps - max(round(train.decay * steps), 1)) if train.schedule == "wsd" else warmup
    progress = min(max(step - start, 0) / max(steps - start, 1), 1.0)
    return train.final_lr + (1.0 - train.final_lr) * _SHAPES[train.schedule](progress)
