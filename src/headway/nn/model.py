"""The whole model: front end, one or two stacks, head. Four kinds, one class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.config import ModelConfig
from headway.errors import BugError, ConfigError, InputError
from headway.nn import next_token, recorded
from headway.nn.cache import Cache
from headway.nn.embeddings import Embeddings
from headway.nn.feed_forward import MixtureOfExperts
from headway.nn.heads import IGNORED, LanguageModelHead, Taught, make_head, pool
from headway.nn.init import Unfilled, initialize
from headway.nn.masks import Sight
from headway.nn.packed import Packed, pack_leaf
from headway.nn.preferences import Preferences
from headway.nn.stack import Stack


class Output(NamedTuple):
    """loss: scalar or None. logits: see heads.py. hidden: (B, T, D). encoder_hidden: (B, S, D) or None."""

    loss: Tensor | None
    logits: Tensor
    hidden: Tensor
    encoder_hidden: Tensor | None = None


class States(NamedTuple):
    """hidden: (B, T, D). real: (B, T) bool, None where nothing is padding. encoded: (B, S, D) or None."""

    hidden: Tensor
    real: Tensor | None
    encoded: Tensor | None = None


class Teaching(NamedTuple):
    """A frozen model in evaluation mode whose answers are `weight` of the training loss (arXiv:1503.02531)."""

    model: Transformer
    weight: float = 0.5
    temperature: float = 2.0


class Transformer(nn.Module):
    """A model of any kind, initialised by `config.init`.

    `teaching` is set by the training loop; it acts in `loss` while the model trains, and is no part of its state.

    Raises:
        ConfigError: from the config, before any memory is taken.
    """

    elsewhere: frozenset[str] = frozenset()  # names of tensors that lie in the files of a base, not in those of a run
    base_sha256 = ""  # that base's hash
    preferences = Preferences()  # what `loss` and `rewards` make of pairs of completions

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.teaching: Teaching | None = None
        self.prompt: nn.Module | None = None  # trained vectors before the input (tuning/small.py)
        self.is_pair = config.kind == "encoder-decoder"
        self.embeddings = Embeddings(config)
        # The two sides read one vocabulary; positions and norms are each side's own.
        shared = self.embeddings.tokens
        self.decoder_embeddings = Embeddings(config, is_decoder=True, tokens=shared) if self.is_pair else None
        self.encoder = Stack(config, is_decoder=False) if config.kind != "decoder" else None
        self.decoder = Stack(config, is_decoder=True) if config.kind in ("decoder", "encoder-decoder") else None
        self.head = make_head(config)
        self._tie()
        initialize(self, config)

    @classmethod
    def blank(cls, config: ModelConfig) -> Transformer:
        """A model of shapes alone, on the meta device: it takes no memory for weights and draws none."""
        with torch.device("meta"), Unfilled():
            return cls(config)

    @classmethod
    def of(cls, config: ModelConfig, weights: Mapping[str, Tensor | Packed]) -> Transformer:
        """A model around these weights as they are: nothing is initialised, copied or cast. In evaluation mode, frozen.

        `weights` hold every name of the state dict; a packed one makes its layer a packed one. Raises BugError where a
        name is missing, RuntimeError from torch where shapes do not fit.
        """
        model = cls.blank(config)
        for name, weight in weights.items():
            if isinstance(weight, Packed):
                pack_leaf(model, name, weight)
        plain = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
        model.load_state_dict(plain, assign=True, strict=False)
        model._tie()
        missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if missing:
            raise BugError("weights", f"{len(missing)} missing ({missing[0]})", "every tensor of the model")
        return model.eval().requires_grad_(False)

    def _tie(self) -> None:
        """One table for input and output where the config says so."""
        table = (self.decoder_embeddings or self.embeddings).tokens
        if self.config.embeddings.tied and isinstance(self.head, LanguageModelHead) and isinstance(table, nn.Embedding):
            self.head.output.weight = table.weight

    def own_state(self) -> dict[str, Tensor]:
        """The state dict without what lies elsewhere: what a run's files hold."""
        return {name: tensor for name, tensor in self.state_dict().items() if name not in self.elsewhere}

    @property
    def ties(self) -> dict[str, str]:
        """{name: first name} of parameters that stand under two names."""
        first: dict[int, str] = {}
        named = self.named_parameters(remove_duplicate=False)
        return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Run the model.

        Args:
            input_ids: (B, T) ids; with `cache` the new ones only. In an encoder-decoder, the encoder's.
            attention_mask: (B, T), nonzero for real tokens, padding on either side.
            documents: (B, T) numbers; tokens with different numbers cannot see each other, positions restart.
            token_types: (B, T) segment numbers (BERT).
            decoder_input_ids, decoder_attention_mask: (B, T) of an encoder-decoder; ids default to labels shifted
                right behind `tokens.decoder_start` (teacher forcing).
            pixel_values: (B, C, height, width) for vision. input_features: (B, bins, frames) for audio.
            labels: see heads.py. For language models they already stand where they are predicted; for masked patches
                the model sees only those patches that have none.
            cache: from `new_cache`; remembers what it has seen.
        """
        others = (attention_mask, documents, token_types, decoder_attention_mask, labels)
        new = decoder_input_ids if self.is_pair else input_ids
        if cache is not None and new is not None and all(other is None for other in others):
            found = next_token.next_token(self, new, cache) or recorded.next_token(self, new, cache)
            if found is not None:
                return Output(None, found[1], found[0], cache.encoder_hidden)
        hidden, real, encoded = self._states(
            input_ids,
            attention_mask,
            documents,
            token_types,
            decoder_input_ids,
            decoder_attention_mask,
            pixel_values if pixel_values is not None else input_features,
            labels,
            cache,
        )
        is_last_only = cache is not None and cache.last_only and hidden.shape[1] > 1
        logits = self.head(pool(hidden, real, "last")[:, None], None) if is_last_only else self.head(hidden, real)
        loss = None if labels is None else self._balanced(self.head.loss(logits, labels))
        return Output(loss, logits, hidden, encoded)

    def loss(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """The loss alone: `forward(labels=labels, **inputs).loss` up to the order of sums, for less memory and work.

        A head over a vocabulary never holds the logits of the whole batch then, and positions whose label is -100 do
        not reach it (heads.LanguageModelHead.loss_of); `teaching` counts here alone. Hooks on the whole model are not
        called.

        Args:
            labels: see heads.py. inputs: those of `forward`, by name; with `reference` rows are pairs of completions,
                and the loss is that of their `rewards`.
        """
        if "reference" in inputs:
            return self._balanced(self.preferences.loss(self.rewards(labels, **inputs)))
        signals = [inputs.pop(name) for name in ("pixel_values", "input_features") if name in inputs]
        given: dict[str, Any] = {**inputs, "labels": labels, **({"signal": signals[0]} if signals else {})}
        hidden, real, _ = self._states(**given)
        taught = None
        if self.teaching is not None and self.training:
            teacher, weight, temperature = self.teaching
            with torch.no_grad():
                known = teacher._states(**given)
            taught = Taught(teacher.head, known.hidden, known.real, weight, temperature)
        return self._balanced(self.head.loss_of(hidden, real, labels, taught))

    def rewards(self, labels: Tensor, reference: Tensor, **inputs: Tensor) -> Tensor:
        """The rewards of pairs of completions that the model's likelihoods imply, (B / 2, 2); see preferences.py.

        Args:
            labels: (B, T); rows chosen and rejected in turn. reference: (B,) log-likelihoods by the reference.
            inputs: those of `forward`.
        """
        found = self.log_likelihoods(labels, **inputs)
        return self.preferences.rewards(found, reference, (labels != IGNORED).sum(1))

    def log_likelihoods(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """log p of each row's labels together, (B,). Raises BugError for a head without a vocabulary."""
        if not isinstance(self.head, LanguageModelHead):
            raise BugError("log_likelihoods", f"head {self.config.head.type}", "a head over a vocabulary")
        given: dict[str, Any] = {**inputs, "labels": labels}
        hidden, _, _ = self._states(**given)
        return self.head.log_likelihoods(hidden, labels)

    def _states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        signal: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
    ) -> States:
        """What the head reads; `signal` is the image or the sound."""
        inputs = signal if signal is not None else input_ids
        real = None if attention_mask is None else attention_mask.bool()
        if not self.is_pair:
            stack = self.decoder if self.decoder is not None else self.encoder
            assert stack is not None
            hides = labels is not None and self.config.head.type == "masked-patches"
            hidden_BP = labels[..., 0] != IGNORED if labels is not None and hides else None
            return States(self._run(stack, self._check(inputs), real, documents, token_types, cache, hidden_BP), real)
        assert self.encoder is not None and self.decoder is not None
        encoded, encoder_real = self._encode(inputs, real, documents, cache)
        if decoder_input_ids is None:
            decoder_input_ids = self._shift(labels)
        decoder_real = None if decoder_attention_mask is None else decoder_attention_mask.bool()
        ids = self._check(decoder_input_ids)
        hidden = self._run(self.decoder, ids, decoder_real, None, None, cache, None, encoded, encoder_real)
        return States(hidden, decoder_real, encoded)

    def new_cache(
        self, batch: int, max_len: int, lengths: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Cache:
        """Empty memory for `batch` sequences of up to `max_len` tokens through the decoder.

        `lengths` (B,) declares how long each row will become (default `max_len`), for length-dependent RoPE. `dtype`
        is what keys and values are kept in (default the model's own; int8 is codes with a scale for each vector).
        """
        if self.decoder is None:
            raise ConfigError("kind and cache", f"kind {self.config.kind} keeps no cache", "a decoder")
        has_table = (self.decoder_embeddings or self.embeddings).learned is not None or (
            self.decoder.rope is not None and not self.decoder.rope.by_length
        )
        if has_table and max_len > self.config.max_len:
            raise ConfigError("cache and max_len", f"room for {max_len} tokens", f"at most {self.config.max_len}")
        max_len += 0 if self.is_pair else self._before
        heads = (self.config.n_kv_heads, self.config.d_head)
        cache = Cache(self.decoder.windows, batch, max_len, heads, next(self.parameters()), dtype)
        if lengths is not None:
            cache.declared = lengths.to(cache.declared)
        return cache

    def balance_loss(self) -> Tensor | None:
        """The sum of the load-balancing terms of the last forward, None without experts."""
        if self.config.feed_forward.experts is None:
            return None
        terms = [
            m.balance_loss for m in self.modules() if isinstance(m, MixtureOfExperts) and m.balance_loss is not None
        ]
        return torch.stack(terms).sum() if terms else None

    def _run(
        self,
        stack: Stack,
        inputs: Tensor,
        real: Tensor | None,
        documents: Tensor | None,
        token_types: Tensor | None,
        cache: Cache | None,
        hidden_BP: Tensor | None = None,
        encoder_BSD: Tensor | None = None,
        encoder_real: Tensor | None = None,
    ) -> Tensor:
        """Embed and pass through one stack."""
        embeddings = self.embeddings if stack is not self.decoder else self.decoder_embeddings or self.embeddings
        before = self._before if embeddings is self.embeddings else 0
        ahead = before if cache is None or cache.length == 0 else 0  # a cache remembers them after its first call
        sight = self._sight(inputs, real, documents, cache, ahead)
        # The input keeps its own places in tables.
        places = sight.q_positions if not before else (sight.q_positions[:, ahead:] - before).clamp(min=0)
        x_BTD = embeddings(places, inputs, token_types, hidden_BP)
        if ahead and self.prompt is not None:
            x_BTD = self.prompt(x_BTD)
        out: Tensor = stack(x_BTD, sight, cache, encoder_BSD, encoder_real)
        return out[:, min(ahead, out.shape[1] - 1) :]  # which may be the last alone

    @property
    def _before(self) -> int:
        """Vectors that stand before the input."""
        return int(getattr(self.prompt, "count", 0))

    def _sight(
        self, inputs: Tensor, real: Tensor | None, documents: Tensor | None, cache: Cache | None, ahead: int
    ) -> Sight:
        """Positions count real tokens from zero, from the cache's length, or from the start of a document."""
        device = inputs.device
        front = {3: self.config.embeddings.audio, 4: self.config.embeddings.patch}.get(inputs.ndim)
        T = ahead + (front.count if front is not None else inputs.shape[1])
        if ahead and documents is not None:
            fix = "data.isolate=false, or rows instead of running text"
            raise ConfigError("tuning.type and data", "a prompt before packed documents", "one text a row", fix)
        real = real if real is None or not ahead else F.pad(real, (ahead, 0), value=True)
        if cache is not None:
            positions = cache.next_positions(T, real)
        elif documents is not None:
            documents, positions = _parted(documents)
        elif real is not None:
            positions = (real.long().cumsum(1) - 1).clamp(min=0)
        else:
            positions = torch.arange(T, device=device)[None]
        if cache is None and front is None and self.config.max_len < T and int(positions.max()) >= self.config.max_len:
            found = f"{int(positions.max()) + 1} positions" + (f", {ahead} of them a prompt's" if ahead else "")
            raise InputError("input_ids", found, f"at most max_len {self.config.max_len}")
        plain = real is None and documents is None and cache is None
        return Sight(positions, positions, real, documents, documents, plain=plain)

    def _encode(
        self, inputs: Tensor | None, real: Tensor | None, documents: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """The encoder's states: computed, or remembered by the cache after its first call."""
        if cache is not None and cache.encoder_hidden is not None:
            return cache.encoder_hidden, cache.encoder_real
        assert self.encoder is not None
        encoded = self._run(self.encoder, self._check(inputs, is_encoder=True), real, documents, None, None)
        if cache is not None:
            cache.encoder_hidden, cache.encoder_real = encoded, real
            cache.sees_encoder = real is None or bool(real.any(1).all())
        return encoded, real

    def _balanced(self, loss: Tensor) -> Tensor:
        """In training the experts' balance counts too."""
        balance = self.balance_loss() if self.training else None
        return loss if balance is None else loss + balance

    def _shift(self, labels: Tensor | None) -> Tensor:
        """Teacher forcing: the decoder reads its start token and then the labels up to the one before."""
        start = self.config.tokens.decoder_start
        if labels is None or start is None:
            raise ConfigError(
                "kind and tokens.decoder_start",
                f"kind encoder-decoder with {'no labels' if labels is None else 'tokens.decoder_start unset'}",
                "decoder_input_ids, or labels and the id that begins a target",
                "tokens.decoder_start=0",
            )
        pad = self.config.tokens.pad or 0
        shifted = torch.cat((labels.new_full((len(labels), 1), start), labels[:, :-1]), 1)
        return shifted.masked_fill(shifted == IGNORED, pad)

    def _check(self, inputs: Tensor | None, *, is_encoder: bool = False) -> Tensor:
        """One sentence instead of an index error deep inside."""
        shape = self.config.embeddings
        sizes: tuple[int, ...] | None = None
        field = "input_ids"
        if shape.patch is not None:
            field, sizes = "pixel_values", (shape.patch.channels, shape.patch.image, shape.patch.image)
        elif shape.audio is not None and (is_encoder or not self.is_pair):
            field, sizes = "input_features", (shape.audio.bins, shape.audio.frames)
        if inputs is None:
            raise InputError(field, "missing", f"the input of kind {self.config.kind}")
        if sizes is not None and inputs.shape[1:] != sizes:
            raise InputError(field, f"shape {tuple(inputs.shape)}", f"(B, {', '.join(map(str, sizes))})")
        if sizes is None and (inputs.ndim != 2 or inputs.shape[1] == 0):
            raise InputError(field, f"shape {tuple(inputs.shape)}", "(B, T) with T of at least 1")
        return inputs


def _parted(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Documents numbered in order, and positions that begin at zero in each. (B, T) -> (B, T), (B, T).

    A number that comes back after another one is a new document: what lies between would part it.
    """
    is_first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    order = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return is_first.long().cumsum(1), order - torch.where(is_first, order, 0).cummax(1).values
