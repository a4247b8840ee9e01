"""The model as decoding sees it: prompts in, then one token per row in, next-token logits out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from headway.generation.prompts import Prompt
from headway.nn.model import Transformer


@contextlib.contextmanager
def inference(model: Transformer) -> Iterator[None]:
    """Evaluation mode without gradients; the mode is restored, so a training loop may sample in between.

    Not torch.inference_mode: tables that the model computes lazily inside would be unusable in training afterwards.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class Session:
    """One batch of sequences with its cache. Rows may have prompts of different lengths.

    An encoder-decoder encodes the prompts once and begins each row with its start token.

    Args:
        model: a decoder or encoder-decoder. prompts: one per row. vocab: how many logits count (a model's table may
            have more rows than its tokenizer has tokens, and nobody could read those).
    """

    def __init__(self, model: Transformer, prompts: Sequence[Prompt], vocab: int) -> None:
        self.model, self.vocab = model, vocab
        self.device = next(model.parameters()).device
        self._ids, self._real = self._pad([prompt.ids for prompt in prompts])
        used = [prompt.room + (0 if model.is_pair else len(prompt.ids)) for prompt in prompts]
        # Rows declare the length they are meant to reach: RoPE scalings that depend on it must not see the neighbours.
        self.cache = model.new_cache(len(prompts), max(used), torch.tensor(used, device=self.device))

    def prefill(self, *, everywhere: bool = False) -> Tensor:
        """Read the prompts: logits (B, 1, V) of each row's last place, or with `everywhere` of every place (B, T, V).

        In an encoder-decoder they are those of the answer's first place.
        """
        self.cache.last_only = not everywhere
        if self.model.is_pair:
            start = torch.full((len(self._ids), 1), self.model.config.tokens.decoder_start or 0, device=self.device)
            out = self.model(self._ids, attention_mask=self._real, decoder_input_ids=start, cache=self.cache)
        else:
            out = self.model(self._ids, attention_mask=self._real, cache=self.cache)
        logits: Tensor = out.logits[..., : self.vocab]
        return logits

    def last(self, logits_BTV: Tensor) -> Tensor:
        """The logits (B, V) of each row's last place, from those of `prefill`."""
        if self._real is None or logits_BTV.shape[1] == 1:
            return logits_BTV[:, -1]
        place = self._real.sum(1) - 1
        return logits_BTV[torch.arange(len(place), device=self.device), place]

    def next(self, ids_B: Tensor) -> Tensor:
        """Append a token to each row: (B,) -> (B, V)."""
        column = ids_B[:, None]
        if self.model.is_pair:
            out = self.model(decoder_input_ids=column, cache=self.cache)
        else:
            out = self.model(column, cache=self.cache)
        logits: Tensor = out.logits[:, -1, : self.vocab]
        return logits

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of row rows[i]; the number of rows may change."""
        self.cache.reorder(rows)

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Ids (B, T) padded on the right with their mask, which is None when nothing was padded."""
        lengths = [len(ids) for ids in prompts]
        longest = max(lengths)
        padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts], device=self.device)
        if min(lengths) == longest:
            return padded, None
        order = torch.arange(longest, device=self.device)
        return padded, order[None] < torch.tensor(lengths, device=self.device)[:, None]
