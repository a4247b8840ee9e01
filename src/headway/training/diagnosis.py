"""Where the first number that is not finite came from: a layer of the forward pass, or a gradient near the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from headway.training.evaluate import resting, to_device, watched
from headway.training.gradients import Precision
from headway.training.parallel import Parallel
from headway.training.parts import local


def first_nonfinite(parallel: Parallel, passes: Sequence[Mapping[str, Tensor]], precision: Precision) -> str:
    """`, first in decoder.blocks.3.attention`, or `, first in the gradient of head.output.weight`, or nothing.

    The passes are run once more, without dropout, so what chance alone brought about may not be found again. Of
    gradients the one of the last module counts: the backward pass reached it first.

    Args:
        parallel: with the gradients of the update that failed. passes: of that update, this process's or all.
        precision: makes the context that a forward pass runs in.
    """
    model, found = parallel.model, list[str]()
    device = next(model.parameters()).device

    def look(name: str, output: Tensor) -> None:
        if not found and output.is_floating_point() and not bool(torch.isfinite(output.sum(dtype=torch.float64))):
            found.append(name)

    # A parent is seen after its children: the innermost module is named.
    modules = {name: module for name, module in model.named_modules() if name}
    with watched(modules, look), resting(model, device):
        for inputs in passes:
            with precision():
                parallel.loss(to_device(inputs, device))
        parallel.settle()
    if found:
        return f", first in {found[0]}"
    held = [(name, local(p.grad)) for name, p in model.named_parameters() if p.grad is not None]
    bad = [name for name, grad in held if not bool(torch.isfinite(grad.sum(dtype=torch.float64)))]
    return f", first in the gradient of {bad[-1]}" if bad else ""
