"""What goes into each layer, on text of the user's: the second moments that better rounding looks at.

For a layer y = W x the mean of x x^T, called H, says how an error in W shows: E |dW x|^2 = tr(dW H dW^T).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from headway.nn import Transformer


@torch.no_grad()
def second_moments(
    model: Transformer,
    names: Iterable[str],
    batches: Iterable[Mapping[str, Tensor]],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """H (C, C), float32, of every named layer that saw an input.

    Args:
        model: in evaluation mode. names: of linear layers. batches: inputs of `forward` by name, without padding.
        progress: told the number of batches done.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def seen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            counts[name] = counts.get(name, 0) + len(x)
            if name not in sums:
                sums[name] = x.new_zeros(x.shape[1], x.shape[1])
            sums[name].addmm_(x.T, x)

        return seen

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        for done, batch in enumerate(batches, 1):
            model(**batch)
            progress(done)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / max(counts[name], 1) for name, total in sums.items() if counts[name]}
