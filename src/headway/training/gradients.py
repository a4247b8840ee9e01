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

from headway.nn import Transformer
from headway.nn.heads import EmbeddingHead
from headway.training.evaluate import to_device
from headway.training.objectives import count_supervised
from headway.training.resume import random_state, restore_random

Inputs = Mapping[str, Tensor]
Precision = Callable[[], AbstractContextManager[object]]


def backward(
    model: Transformer, passes: Sequence[Inputs], precision: Precision, scale: float | None = None
) -> tuple[int, Tensor | None]:
    """Add the gradient of the batch's mean loss to the parameters.

    Args:
        model: in training mode, its gradients as they are. passes: parts of one batch, `labels` among them.
        precision: makes the context that a forward pass runs in. scale: of the loss, for float16.

    Returns (supervised labels, mean loss), the loss None if there are no labels.
    """
    device = next(model.parameters()).device
    counts = [count_supervised(inputs) for inputs in passes]
    tokens = sum(counts)
    if isinstance(model.head, EmbeddingHead) and len(passes) > 1 and tokens:
        return tokens, _together(model, [to_device(inputs, device) for inputs in passes], precision, scale or 1.0)
    total: Tensor | None = None
    for inputs, count in zip(passes, counts, strict=True):
        if not count:
            continue
        with precision():
            loss = model.loss(**to_device(inputs, device))
        share = loss * (count / tokens)
        torch.autograd.backward(share if scale is None else share * scale)
        total = share.detach() if total is None else total + share.detach()
    return tokens, total


def _together(model: Transformer, passes: Sequence[dict[str, Tensor]], precision: Precision, scale: float) -> Tensor:
    """One contrastive loss over the rows of all passes; what is drawn in a pass is drawn again in its second run."""
    device = passes[0]["labels"].device
    labels = torch.cat([inputs["labels"] for inputs in passes])
    inputs = [{name: tensor for name, tensor in one.items() if name != "labels"} for one in passes]
    states, vectors = [], []
    with torch.no_grad():
        for one in inputs:
            states.append(random_state(device))
            with precision():
                vectors.append(model(**one).logits)
    whole = torch.cat(vectors).requires_grad_()
    loss = model.head.loss(whole, labels)
    (slope,) = torch.autograd.grad(loss * scale, whole)
    balanced = loss.detach()
    for one, state, part in zip(inputs, states, torch.split(slope, [len(v) for v in vectors]), strict=True):
        restore_random(state, device)
        with precision():
            found = model(**one).logits
        torch.autograd.backward(found, part, retain_graph=(extra := model.balance_loss()) is not None)
        if extra is not None:
            share = extra * (len(part) / len(whole))
            torch.autograd.backward(share * scale)
            balanced = balanced + share.detach()
    return balanced
