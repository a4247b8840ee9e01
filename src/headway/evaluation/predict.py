"""What a trained model says about examples: classes, tags, answers, vectors; the raw side of every metric on labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from headway.data.encode import Coder, question_windows
from headway.data.forms import Question
from headway.training.evaluate import resting, to_device
from headway.training.objectives import TrainingBatch

LONGEST_ANSWER = 30  # tokens, as SQuAD's published readers take it (arXiv:1810.04805's code)
Progress = Callable[[int], None]


def outputs(
    model: nn.Module, batches: Iterable[TrainingBatch], progress: Progress | None = None
) -> dict[int, NDArray[np.float32]]:
    """The head's output for each example, by its number; of sequences the real positions only."""
    device = next(model.parameters()).device
    found: dict[int, NDArray[np.float32]] = {}
    with resting(model, device):
        for batch in batches:
            inputs = {name: tensor for name, tensor in to_device(batch.inputs, device).items() if name != "labels"}
            rows = model(**inputs).logits.float().cpu().numpy()
            mask = batch.inputs.get("attention_mask")
            for place, number in enumerate(batch.sample_ids):
                row = rows[place]
                is_sequence = mask is not None and row.ndim == 2
                found[number] = row[mask[place].bool().numpy()] if is_sequence and mask is not None else row
            if progress is not None:
                progress(len(found))
    return found


def in_order(found: dict[int, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Outputs of one size as a table, in the order of the examples' numbers."""
    return np.stack([found[number] for number in sorted(found)])


def best_span(logits: NDArray[np.float32], offset: int, length: int) -> tuple[float, int, int]:
    """(score, first, last) of the likeliest answer among `length` tokens from `offset` on; logits (T, 2)."""
    starts, ends = (logits[offset : offset + length, side] for side in (0, 1))
    scores = starts[:, None] + ends[None, :]
    allowed = np.triu(np.ones_like(scores, bool)) & ~np.triu(np.ones_like(scores, bool), LONGEST_ANSWER)
    place = int(np.where(allowed, scores, -np.inf).argmax())
    first, last = divmod(place, length)
    return float(scores[first, last]), first, last


def answers(
    model: nn.Module, questions: Sequence[Question], coder: Coder, progress: Progress | None = None
) -> list[str]:
    """The text that a span model reads out of each context: of all windows the span that scores most over no answer."""
    device = next(model.parameters()).device
    texts = []
    with resting(model, device):
        for done, question in enumerate(questions, 1):
            best = (-np.inf, "")
            for window in question_windows(question, coder):
                inputs = {name: torch.tensor([ids], device=device) for name, ids in window.columns.items()}
                logits = model(**inputs).logits[0].float().cpu().numpy()
                if not window.spans:
                    continue
                score, first, last = best_span(logits, window.offset, len(window.spans))
                score -= float(logits[0].sum())
                if score > best[0]:
                    best = (score, question.context[window.spans[first][0] : window.spans[last][1]])
            texts.append(best[1])
            if progress is not None:
                progress(done)
    return texts


def ranks_of(queries: NDArray[np.float32], documents: NDArray[np.float32], own: Sequence[int]) -> list[list[int]]:
    """The rank, from 1, of each query's own document among all by cosine; equal scores count against it.

    queries (N, D) and documents (M, D) of unit length, own: N places among the documents.
    """
    ranks = []
    for begin in range(0, len(queries), 256):
        scores = queries[begin : begin + 256] @ documents.T
        mine = scores[np.arange(len(scores)), own[begin : begin + 256]]
        ranks += [[int(rank)] for rank in (scores >= mine[:, None]).sum(1)]
    return ranks
