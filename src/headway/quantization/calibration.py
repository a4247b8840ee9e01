"""What goes into each layer, on text of the user's: the second moments that better rounding looks at.

For a layer y = W x the mean of x x^T, called H, says how an error in W shows: E |dW x|^2 = tr(dW H dW^T). In it every
token counts alike, whatever its size: a decoder's first token meets some layers with activations a thousand times as
large as all others (arXiv:2402.17762), and would be all that an error is measured by (docs/log.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headway.nn import Transformer


class Moments(NamedTuple):
    """Of a layer's inputs x (C,): `products` (C, C), the mean of x x^T of tokens brought to one size; `squares` (C,),
    the mean of x^2 of tokens as they are."""

    products: Tensor
    squares: Tensor


@torch.no_grad()
def second_moments(
    model: Transformer,
    names: Iterable[str],
    batches: Iterable[Mapping[str, Tensor]],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Moments]:
    """Float32, of every named layer that saw an input.

    Args:
        model: in evaluation mode. names: of linear layers. batches: inputs of `forward` by name, without padding.
        progress: told the number of batches done.
    """
    sums: dict[str, Moments] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def seen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            counts[name] = counts.get(name, 0) + len(x)
            if name not in sums:
                sums[name] = Moments(x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1]))
            sums[name].squares.add_(x.square().sum(0))
            x = x * x.square().mean(1, keepdim=True).clamp_min(1e-30).rsqrt()
            sums[name].products.addmm_(x.T, x)

        return seen

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        for done, batch in enumerate(batches, 1):
            model(**batch)
            progress(done)
    finally:
        for handle in handles:
            handle.remove()
    return {name: Moments(*(some / counts[name] for some in both)) for name, both in sums.items() if counts[name]}
