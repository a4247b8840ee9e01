"""The model as decoding sees it: prompts in, then one token per row in, next-token logits out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

import torch
from torch import Tensor

from headway.generation.prompts import Prompt
from headway.nn import packed
from headway.nn.cache import Cache
from headway.nn.model import Transformer


@contextlib.contextmanager
def inference(model: Transformer) -> Iterator[None]:
    """Evaluation mode without gradients; the mode is restored, so a training loop may sample in between.

    Not torch.inference_mode: tables that the model computes lazily inside would be unusable in training afterwards.
    """
    was_training = model.training
    if any(module.training for module in model.modules()):  # a look takes a quarter of what setting takes
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            model.train()


_ROOM = 256  # tokens that a memory holds at least
CHUNK = 512  # tokens of a prompt read at a time: what a pass holds of them does not grow with the prompt
_KV_DTYPES = {"model": None, "float16": torch.float16, "int8": torch.int8}


class Memory:
    """What one sequence leaves behind for the next whose prompt begins alike: its cache, and the ids in it.

    An exception in the middle of a forward pass leaves more in the cache than in `ids`; what counts is `ids`.
    `reused` is how many tokens the last prompt found here.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.reused = 0
        self._cache: Cache | None = None

    def cache(self, model: Transformer, prompt: Prompt, dtype: torch.dtype | None = None) -> Cache:
        """A cache with room for prompt and answer that holds the first `reused` ids of the prompt.

        That is the common prefix, or nothing where it cannot be kept: the room has become too small, a rolling window
        has passed it, or the positions depend on the length of the whole. One token is always left to be read.
        """
        used, shared = len(prompt.ids) + prompt.room, min(beginning(self.ids, prompt.ids), len(prompt.ids) - 1)
        rope = model.decoder.rope if model.decoder is not None else None
        cache = self._cache
        kept = dtype or next(model.parameters()).dtype
        fits = cache is not None and used <= cache.max_len and cache.dtype == kept
        fits = fits and not (rope is not None and rope.by_length)
        self.ids = self.ids[:shared]
        if cache is None or not fits or not _crop(cache, shared):
            # By powers of two: a growing conversation is read again once per doubling and takes no more than twice
            # the memory of what is in it.
            self.ids, self._cache = [], None
            room = min(max(1 << (used - 1).bit_length(), _ROOM), model.config.max_len)
            cache = model.new_cache(1, room, dtype=dtype)
        self._cache, self.reused = cache, len(self.ids)
        cache.declared.fill_(used)
        return cache


def kv_dtype_of(model: Transformer, name: str) -> torch.dtype | None:
    """What keys and values are kept in; None for the model's own dtype.

    auto: half floats beside weights in codes as long as their inputs are rounded to 8 bits; what the model computes in
    otherwise.
    """
    if name == "auto":
        name = "float16" if packed.planes() == 1 and packed.is_packed(model) else "model"
    return _KV_DTYPES[name]


def beginning(one: Iterable[int], other: Iterable[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _crop(cache: Cache, length: int) -> bool:
    """Forget what stands from `length` on; False where a rolling window has lost what stood before it."""
    tops = [(int(slots.positions.max()), slots.capacity) for slots in cache.groups.values()]
    if any(top >= length for top, _ in tops):
        if any(top >= capacity for top, capacity in tops):
            return False
        cache.crop(length)
    return True


class Session:
    """One batch of sequences with its cache. Rows may have prompts of different lengths.

    An encoder-decoder encodes the prompts once and begins each row with its start token.

    Args:
        model: a decoder or encoder-decoder. prompts: one per row. vocab: how many logits count (a model's table may
            have more rows than its tokenizer has tokens, and nobody could read those). memory: of an earlier session
            with one row, for a decoder with one prompt; an encoder-decoder reads its prompt anew. kv_dtype: see
            GenerationOptions.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Prompt],
        vocab: int,
        memory: Memory | None = None,
        kv_dtype: str = "auto",
    ) -> None:
        self.model, self.vocab = model, vocab
        dtype = kv_dtype_of(model, kv_dtype)
        self.device = next(model.parameters()).device
        self._ids, self._real = self._pad([prompt.ids for prompt in prompts])
        self._memory = None if model.is_pair else memory
        if self._memory is not None:
            self.cache = self._memory.cache(model, prompts[0], dtype)
            self._ids = self._ids[:, self._memory.reused :]
            return
        longest = model.config.max_len
        used = [min(prompt.room + (0 if model.is_pair else len(prompt.ids)), longest) for prompt in prompts]
        # Rows declare the length they are meant to reach: RoPE scalings that depend on it must not see the neighbours.
        self.cache = model.new_cache(len(prompts), max(used), torch.tensor(used, device=self.device), dtype)

    def prefill(self, *, everywhere: bool = False) -> Tensor:
        """Read the prompts: logits (B, 1, V) of each row's last place, or with `everywhere` of every place (B, T, V).

        In an encoder-decoder they are those of the answer's first place.
        """
        self.cache.last_only = not everywhere
        if self.model.is_pair:
            start = torch.full((len(self._ids), 1), self.model.config.tokens.decoder_start or 0, device=self.device)
            out = self.model(self._ids, attention_mask=self._real, decoder_input_ids=start, cache=self.cache)
            return self._known(out.logits)
        found: list[Tensor] = []
        for begin in range(0, self._ids.shape[1], CHUNK):
            ids, real = self._ids[:, begin : begin + CHUNK], None
            if self._real is not None:
                real = self._real[:, begin : begin + CHUNK]
            logits = self._known(self.model(ids, attention_mask=real, cache=self.cache).logits)
            if everywhere:
                found.append(logits)
            elif real is None or not found:
                found = [logits]
            else:  # of rows that end here, or go on
                found = [torch.where(real.any(1)[:, None, None], logits, found[0])]
            if self._memory is not None:
                self._memory.ids += ids[0].tolist()
        return torch.cat(found, 1)

    def _known(self, logits_BTV: Tensor) -> Tensor:
        return logits_BTV if logits_BTV.shape[-1] == self.vocab else logits_BTV[..., : self.vocab]

    def last(self, logits_BTV: Tensor) -> Tensor:
        """The logits (B, V) of each row's last place, from those of `prefill`."""
        if self._real is None or logits_BTV.shape[1] == 1:
            return logits_BTV[:, -1]
        place = self._real.sum(1) - 1
        return logits_BTV[torch.arange(len(place), device=self.device), place]

    def next(self, ids_B: Tensor) -> Tensor:
        """Append a token to each row: (B,) -> (B, V)."""
        logits = self._read(ids_B[:, None])[:, -1]
        if self._memory is not None:  # only now: a pass that was broken off has read nothing that counts
            self.keep(int(ids_B[0]))
        return logits

    def several(self, ids: Sequence[int]) -> Tensor:
        """Append a token to the only row, and guesses of what follows it: the logits (T, V) behind each.

        A guess that came true is to be kept, others to be forgotten.
        """
        self.cache.last_only = False
        logits = self._read(torch.tensor([ids], device=self.device))[0]
        self.keep(ids[0])
        return logits

    def keep(self, token: int) -> None:
        """A token that was read counts as said."""
        if self._memory is not None:
            self._memory.ids.append(token)

    def forget(self, count: int) -> None:
        """Take back the last tokens that were read."""
        assert self.cache.length is not None
        self.cache.crop(self.cache.length - count)

    @property
    def can_forget(self) -> bool:
        """Whether it has one row, whose tokens all stay in the cache."""
        rolls = any(slots.capacity < self.cache.max_len for slots in self.cache.groups.values())
        return len(self.cache.lengths) == 1 and self.cache.length is not None and not rolls

    def has_room(self, count: int) -> bool:
        """Whether so many tokens more fit into the cache."""
        return self.cache.length is not None and self.cache.has_room(count)

    def _read(self, ids_BT: Tensor) -> Tensor:
        is_pair = self.model.is_pair
        given, more = (None, {"decoder_input_ids": ids_BT}) if is_pair else (ids_BT, {})
        return self._known(self.model(given, **more, cache=self.cache).logits)

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
