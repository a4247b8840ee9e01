"""The gradient of one batch, in as many passes as memory asks for; the same however the batch is cut.

A loss per label is a mean, so each pass counts by its share of the labels. A contrastive loss is not: every row looks
for its partner among all rows. There the vectors of all passes are computed first and kept alone, the loss of the whole
batch gives the gradient of each vector, and each pass is run once more to carry it on (arXiv:2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from headway.nn.heads import EmbeddingHead
from headway.training.evaluate import to_device
from headway.training.parallel import Parallel
from headway.training.resume import random_state, restore_random
from headway.training.world import Share

Inputs = Mapping[str, Tensor]
Precision = Callable[[], AbstractContextManager[object]]


def backward(
    parallel: Parallel, passes: Sequence[Inputs], precision: Precision, scale: float | None = None
) -> tuple[int, Tensor | None]:
    """Add the gradient of the batch's mean loss to the parameters.

    Args:
        parallel: a model in training mode, its gradients as they are. passes: parts of one batch, `labels` among them,
            so many that each process has its own. precision: makes the context that a forward pass runs in.
        scale: of the loss, for float16.

    Returns (supervised labels of the batch, this process's share of the mean loss), None if there are no labels.
    """
    model, world = parallel.model, parallel.world
    device = next(model.parameters()).device
    tokens, own = world.share(passes)
    if not tokens:
        return 0, None
    total: Tensor | None = None
    if isinstance(model.head, EmbeddingHead) and len(passes) > 1:
        labels = torch.cat([inputs["labels"] for inputs in passes]).to(device)
        total = _together(parallel, own, [len(i["labels"]) for i in passes], labels, precision, scale or 1.0)
    else:
        for number, (inputs, weight) in enumerate(own):
            with parallel.last(number + 1 == len(own)):
                with precision():
                    loss = parallel.loss(to_device(inputs, device))
                share = loss * weight
                # Processes that share out the rows take the mean of their gradients; this makes it the sum.
                factor = world.data_size * (scale or 1.0)
                torch.autograd.backward(share if factor == 1 else share * factor)
            total = share.detach() if total is None else total + share.detach()
    parallel.finish()
    return tokens, total


def _together(
    parallel: Parallel, own: Sequence[Share], sizes: Sequence[int], labels: Tensor, precision: Precision, scale: float
) -> Tensor:
    """One contrastive loss over the rows of all passes; what is drawn in a pass is drawn again in its second run.

    `own` are this process's passes, `sizes` and `labels` those of all passes of all processes.
    """
    model, world, device = parallel.model, parallel.world, labels.device
    inputs = [{name: tensor for name, tensor in one.items() if name != "labels"} for one, _ in own]
    states, vectors = [], []
    with torch.no_grad():
        for one in inputs:
            states.append(random_state(device))
            with precision():
                vectors.append(parallel.vectors(to_device(one, device)))
        rows = world.gathered(vectors, sizes)
    whole = rows.requires_grad_()
    loss = model.head.loss(whole, labels)
    # Processes that share out the rows take the mean of their gradients; the factor makes it the sum.
    factor = world.data_size * scale
    (slope,) = torch.autograd.grad(loss * factor, whole)
    slopes = torch.split(slope, list(sizes))[world.data_rank :: world.data_size]
    total = loss.detach() / world.data_size
    for number, (one, state, (_, weight)) in enumerate(zip(inputs, states, own, strict=True)):
        restore_random(state, device)
        with parallel.last(number + 1 == len(own)):
            with precision():
                found = parallel.vectors(to_device(one, device))
            part = slopes[number] if weight else torch.zeros_like(found)
            roots, gradients = [found], [part]
            if (extra := model.balance_loss()) is not None:
                share = extra * weight
                roots, gradients = [*roots, share], [*gradients, torch.full_like(share, factor)]
                total = total + share.detach()
            torch.autograd.backward(roots, gradients)
    return total
