"""One native call for a whole stack: it computes what the blocks compute, over forms, batches, windows and caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headway.config import ModelConfig
from headway.errors import InputError
from headway.generation.prompts import Prompt
from headway.generation.session import Session
from headway.kernels import steps
from headway.kernels.ggml import quantize
from headway.nn import Transformer
from headway.nn.attention import use_backend
from headway.nn.cache import Cache
from headway.nn.fused import Fused
from headway.nn.next_token import NextToken
from headway.nn.packed import Packed, exact, use_planes

pytestmark = pytest.mark.skipif(not steps.levels(), reason="no C++ compiler built the native kernels")

SIZES: dict[str, Any] = {"d_model": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_head": 32, "d_ff": 96}
SIZES |= {"vocab_size": 50, "max_len": 40, "norm": "rmsnorm", "positions": "rope"}
SWIGLU = {"activation": "silu", "gated": True}
FORMS: dict[str, dict[str, Any]] = {
    "llama": {"feed_forward": SWIGLU},
    "gpt2": {"norm": "layernorm", "positions": "learned", "feed_forward": {"activation": "gelu-tanh", "bias": True},
             "attention": {"bias": True, "output_bias": True}, "n_kv_heads": 4},
    "neox": {"norm": "layernorm", "residual": "parallel", "positions": {"type": "rope", "fraction": 0.5},
             "feed_forward": {"activation": "gelu", "bias": True}},
    "gemma": {"norm": {"type": "rmsnorm", "offset": 1}, "placement": "sandwich", "feed_forward": {"activation":
              "gelu-tanh", "gated": True}, "attention": {"softcap": 20.0, "window": 5,
              "pattern": ["sliding", "causal"]}},
    "olmo2": {"placement": "inside", "attention": {"qk_norm": "rmsnorm"}, "feed_forward": SWIGLU},
    "post": {"placement": "post", "norm": "layernorm", "positions": "sinusoidal", "feed_forward": "relu"},
    "ours": {"attention": {"qk_norm": "rmsnorm"}, "feed_forward": "relu2", "positions": {"type": "rope",
             "layout": "interleaved"}, "layer_scale": 0.5},
    "mistral": {"attention": {"window": 6, "pattern": ["sliding"]}, "feed_forward": SWIGLU, "n_kv_heads": 1},
    "quick": {"attention": {"qk_norm": "layernorm"}, "feed_forward": "quick-gelu"},
    "alibi": {"positions": "alibi", "norm": "layernorm", "feed_forward": "gelu"},
    "t5": {"positions": {"type": "relative", "buckets": 8, "max_distance": 10}, "feed_forward": SWIGLU},
    "opt": {"norm": "layernorm", "positions": {"type": "learned", "offset": 2}, "feed_forward": "relu"},
    "bloom": {"norm": "layernorm", "positions": "alibi", "embeddings": {"norm": True}, "feed_forward": "gelu"},
    "granite": {"embeddings": {"scale": 12.0}, "head": {"type": "causal-lm", "scale": 0.125, "softcap": 3.0}},
    "by length": {"positions": {"type": "rope", "scaling": {"type": "dynamic", "factor": 2.0, "original_len": 8}}},
}  # fmt: skip

IN_PARTS = ("post", "by length")  # with sinusoids, or angles that depend on the length: a call for each part


def in_codes(config: ModelConfig, kinds: tuple[str, ...] = ("Q8_0",)) -> Transformer:
    """A random model with its matrices in codes, those of each kind in turn; norms and biases are random too."""
    torch.manual_seed(0)
    weights: dict[str, Tensor | Packed] = {}
    model = Transformer(config)
    for leaf in model.modules():
        if isinstance(leaf, nn.Linear):  # the recipe's start of zero would hide a part
            nn.init.normal_(leaf.weight, std=leaf.in_features**-0.5)
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if tensor.ndim == 2 and not any(part in name for part in ("positions", "learned", "bias", "patches")):
            kind = kinds[number % len(kinds)]
            weights[name] = Packed.of_blocks(((kind, quantize(kind, tensor)),))
        else:
            weights[name] = torch.rand_like(tensor) if tensor.ndim == 1 else tensor
    return Transformer.of(config, weights)


def decoded(
    model: Transformer, ids: Tensor, first: int, real: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Cache]:
    """Logits of a prompt of `first` tokens and then of one token at a time."""
    cache = model.new_cache(len(ids), 32, dtype=dtype)
    parts = [model(ids[:, :first], attention_mask=real, cache=cache).logits]
    parts += [model(ids[:, t : t + 1], cache=cache).logits for t in range(first, ids.shape[1])]
    return torch.cat(parts, 1), cache


def gap(one: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the largest number."""
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_fused_stack_is_its_blocks(form: str) -> None:
    """Inputs keep 15 bits: with 8, a rounding that falls the other way is already as large as an error would be."""
    model = in_codes(ModelConfig(**{**SIZES, **FORMS[form]}))
    ids = torch.randint(50, (2, 14))
    with use_planes(2):
        found, cache = decoded(model, ids, 6)
        with use_backend("naive"):
            known, slow = decoded(model, ids, 6)
    with exact():
        right, _ = decoded(model, ids, 6)
    assert type(cache.fused) is (Fused if form in IN_PARTS else NextToken) and slow.fused is None
    assert gap(found, known) < 1e-3 and gap(found, right) < 2e-3
    # Other tokens before the last one show in it by ten times as much.
    changed, _ = decoded(model, torch.cat((ids[:, :-1].flip(1), ids[:, -1:]), 1), 6)
    assert gap(changed[:, -1], known[:, -1]) > 10 * gap(found, known)


@torch.no_grad()
def test_with_8_bits_it_is_as_near_as_the_blocks_are() -> None:
    model = in_codes(ModelConfig(**{**SIZES, **FORMS["llama"]}), ("Q4_0", "Q8_0", "Q4_1"))
    ids = torch.randint(50, (2, 14))
    found, cache = decoded(model, ids, 6)
    with exact():
        right, _ = decoded(model, ids, 6)
    assert isinstance(cache.fused, Fused) and 1e-4 < gap(found, right) < 0.05


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_rows_of_unequal_length(side: str) -> None:
    model = in_codes(ModelConfig(**{**SIZES, **FORMS["gemma"]}))
    ids, real = torch.randint(50, (3, 12)), torch.ones(3, 7)
    for row, padding in enumerate((3, 0, 5)):
        real[row, slice(0, padding) if side == "left" else slice(7 - padding, 7)] = 0
    with use_planes(2):
        found, cache = decoded(model, ids, 7, real)
        with use_backend("naive"):
            known, _ = decoded(model, ids, 7, real)
    kept = torch.cat((real.bool(), torch.ones(3, 5).bool()), 1)
    assert isinstance(cache.fused, Fused) and gap(found[kept], known[kept]) < 1e-3


@pytest.mark.parametrize("level", steps.levels())
@pytest.mark.parametrize("form", ["llama", "gemma", "ours", "mistral", "t5"])
@pytest.mark.parametrize("dtype,near,coarse", [(torch.float16, 1e-3, 3e-3), (torch.int8, 8e-3, 0.06)])
@torch.no_grad()
def test_keys_and_values_kept_in_fewer_bits(
    dtype: torch.dtype, near: float, coarse: float, form: str, level: str
) -> None:
    """As far from the blocks as a code that rounds the other way; as far from a whole cache as its bits allow."""
    model = in_codes(ModelConfig(**{**SIZES, **FORMS[form]}))
    ids = torch.randint(50, (2, 14))
    assert steps.use_level(level)
    try:
        with use_planes(2):
            found, cache = decoded(model, ids, 6, dtype=dtype)
            whole, _ = decoded(model, ids, 6)
            with use_backend("naive"):
                known, slow = decoded(model, ids, 6, dtype=dtype)
    finally:
        steps.use_level()
    assert isinstance(cache.fused, NextToken) and slow.fused is None
    assert gap(found, known) < near
    assert 1e-6 < gap(found, whole) < coarse


def test_beside_weights_in_codes_keys_are_half_floats() -> None:
    config = ModelConfig(**{**SIZES, **FORMS["llama"]})
    for model, dtype in ((in_codes(config), torch.float16), (Transformer(config).eval(), torch.float32)):
        assert Session(model, [Prompt([1, 2], "", 5)], 50).cache.dtype == dtype
    with exact():  # what is compared to the last bit
        assert Session(in_codes(config), [Prompt([1, 2], "", 5)], 50).cache.dtype == torch.float32


@torch.no_grad()
def test_a_rolling_cache_and_a_reordered_one() -> None:
    """Past the window columns are overwritten; rows that change places take their columns along."""
    model = in_codes(ModelConfig(**{**SIZES, **FORMS["mistral"]}))
    ids = torch.randint(50, (3, 30))

    def run() -> Tensor:
        cache, out = model.new_cache(3, 30), []
        for t in range(30):
            out.append(model(ids[:, t : t + 1], cache=cache).logits)
            if t == 17:
                cache.reorder(torch.tensor([2, 0, 0]))
        return torch.cat(out, 1)

    with use_planes(2):
        found = run()
        with use_backend("naive"):
            known = run()
    assert gap(found, known) < 1e-3


@torch.no_grad()
def test_joined_matrices_of_several_formats() -> None:
    """Values in more bits than queries and keys, as GGUF files have them; their inputs are coded in other chunks."""
    config = ModelConfig(**{**SIZES, **FORMS["llama"], "d_model": 256})
    model = in_codes(config)
    for block in model.decoder.blocks:
        leaf = block.attention.qkv
        weights = leaf.packed.unpack()
        parts = [("Q4_0", weights[:192]), ("Q8_0", weights[192:])]
        blocks = tuple((kind, quantize(kind, some)) for kind, some in parts)
        block.attention.qkv = type(leaf)(Packed.of_blocks(blocks), None)
    ids = torch.randint(50, (1, 10))
    with use_planes(2):
        found, cache = decoded(model, ids, 6)
        with use_backend("naive"):
            known, _ = decoded(model, ids, 6)
    assert isinstance(cache.fused, Fused) and gap(found, known) < 1e-3


@pytest.mark.parametrize("level", steps.levels())
@torch.no_grad()
def test_every_instruction_set(level: str) -> None:
    model = in_codes(ModelConfig(**{**SIZES, **FORMS["gemma"]}), ("Q4_0", "Q8_0", "Q4_1"))
    ids = torch.randint(50, (2, 12))
    with use_planes(2), use_backend("naive"):
        known, _ = decoded(model, ids, 6)
    assert steps.use_level(level)
    try:
        with use_planes(2):
            found, cache = decoded(model, ids, 6)
    finally:
        steps.use_level()
    assert isinstance(cache.fused, Fused) and gap(found, known) < 1e-3


PATCHES: dict[str, Any] = {
    "kind": "vision",
    "vocab_size": 0,
    "embeddings": {"patch": {"size": 4, "image": 16, "first_token": True}},
    "head": {"type": "image-classification", "labels": 5},
}
WHOLE: dict[str, dict[str, Any]] = {
    "bert": {**FORMS["post"], "kind": "encoder", "head": "masked-lm"},
    "vision": {**FORMS["gpt2"], **PATCHES},
    "t5": {**FORMS["t5"], "kind": "encoder-decoder"},
    "window": {
        **FORMS["gemma"],
        "kind": "encoder",
        "head": "masked-lm",
        "attention": {"window": 3, "pattern": ["sliding"]},
    },
    "gpt2": FORMS["gpt2"],
    "alibi": FORMS["alibi"],
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each native pass."""
    counts: list[int] = []
    for owner, name in ((Fused, "run"), (NextToken, "next")):
        call = getattr(owner, name)

        def counted(self: Fused, *given: Any, call: Callable[..., object] = call) -> object:
            counts.append(self.rows)
            return call(self, *given)

        monkeypatch.setattr(owner, name, counted)
    return counts


def inputs_of(config: ModelConfig, B: int, T: int) -> dict[str, Tensor]:
    if config.kind == "vision":
        return {"pixel_values": torch.randn(B, 3, 16, 16)}
    more = {"decoder_input_ids": torch.randint(50, (B, 5))} if config.kind == "encoder-decoder" else {}
    return {"input_ids": torch.randint(50, (B, T)), **more}


@pytest.mark.parametrize("form", WHOLE)
@torch.no_grad()
def test_whole_sequences_without_a_cache(form: str, passes: list[int]) -> None:
    model = in_codes(ModelConfig(**{**SIZES, **WHOLE[form]}))
    given = inputs_of(model.config, 3, 11)
    with use_planes(2):
        found = model(**given).logits
        count = len(passes)
        with use_backend("naive"):
            known = model(**given).logits
    assert count == len(passes) == 1 + model.is_pair
    assert gap(found, known) < 1e-3


@pytest.mark.parametrize("form", [form for form in WHOLE if form != "vision"])
@torch.no_grad()
def test_padding_costs_nothing_and_changes_nothing(form: str, passes: list[int]) -> None:
    model = in_codes(ModelConfig(**{**SIZES, **WHOLE[form]}))
    given, real = inputs_of(model.config, 3, 11), torch.ones(3, 11, dtype=torch.bool)
    real[0, :4], real[2, 5:] = False, False
    with use_planes(2):
        found = model(**given, attention_mask=real).logits
        with use_backend("naive"):
            known = model(**given, attention_mask=real).logits
    kept = torch.ones(3, 5, dtype=torch.bool) if model.is_pair else real
    assert passes[0] == real.sum() and gap(found[kept], known[kept]) < 1e-3
    # Were padding seen, it would show: other ids there change nothing, others elsewhere do.
    changed = torch.where(real, given["input_ids"], 7)
    with use_planes(2):
        same = model(**{**given, "input_ids": changed}, attention_mask=real).logits
        other = model(**{**given, "input_ids": changed.roll(1, 0)}, attention_mask=real).logits
    assert torch.equal(same[kept], found[kept])
    assert gap(other[kept], found[kept]) > max(10 * gap(found[kept], known[kept]), 1e-3)


@pytest.mark.parametrize("form", ["gpt2", "bert", "alibi"])
@torch.no_grad()
def test_packed_documents_are_sequences_of_their_own(form: str, passes: list[int]) -> None:
    model = in_codes(ModelConfig(**{**SIZES, **WHOLE[form]}))
    ids = torch.randint(50, (2, 12))
    documents = torch.tensor([[1] * 5 + [2] * 7, [1] + [2] * 3 + [3] * 8])
    with use_planes(2):
        found = model(ids, documents=documents).logits
        with use_backend("naive"):
            known = model(ids, documents=documents).logits
    assert passes == [24] and gap(found, known) < 1e-3


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_an_encoder_decoder_writes(padded: bool, passes: list[int]) -> None:
    """Token by token, with rows that change places on the way: cross-attention reads what each row encoded."""
    model = in_codes(ModelConfig(**{**SIZES, **WHOLE["t5"]}))
    ids, targets = torch.randint(50, (3, 9)), torch.randint(50, (3, 8))
    real = torch.ones(3, 9, dtype=torch.bool) if padded else None
    if real is not None:
        real[1, 4:] = False

    def run() -> Tensor:
        cache, out = model.new_cache(3, 8), []
        for t in range(8):
            more = {"input_ids": ids, "attention_mask": real} if t == 0 else {}
            out.append(model(**more, decoder_input_ids=targets[:, t : t + 1], cache=cache).logits)
            if t == 4:
                cache.reorder(torch.tensor([1, 0, 0]))
        return torch.cat(out, 1)

    with use_planes(2):
        found = run()
        count = len(passes)
        with use_backend("naive"):
            known = run()
    assert count == len(passes) == 9 and gap(found, known) < 1e-3


UNFIT: dict[str, dict[str, Any]] = {
    "experts": {"feed_forward": {"activation": "silu", "gated": True, "experts": {"experts": 2, "top_k": 1}}},
}


@pytest.mark.parametrize("form", UNFIT)
@torch.no_grad()
def test_what_has_no_kernel_runs_as_blocks(form: str) -> None:
    model = in_codes(ModelConfig(**{**SIZES, **UNFIT[form]}))
    found, cache = decoded(model, torch.randint(50, (1, 9)), 5)
    assert cache.fused is None and found.isfinite().all()


@torch.no_grad()
def test_plain_weights_run_as_blocks() -> None:
    found, cache = decoded(Transformer(ModelConfig(**SIZES)).eval(), torch.randint(50, (1, 9)), 5)
    assert cache.fused is None and found.isfinite().all()


@torch.no_grad()
def test_an_id_that_is_not_there_leaves_the_cache_as_it_was() -> None:
    model = in_codes(ModelConfig(**{**SIZES, **FORMS["llama"]}))
    ids, cache = torch.randint(50, (1, 6)), model.new_cache(1, 32)
    model(ids[:, :4], cache=cache)
    for wrong in (-1, 50):
        with pytest.raises(IndexError, match="of 50"):
            model(torch.tensor([[wrong]]), cache=cache)
    again = model(ids[:, 4:5], cache=cache).logits
    assert type(cache.fused) is NextToken and torch.equal(again, decoded(model, ids[:, :5], 4)[0][:, -1:])


@torch.no_grad()
def test_answers_are_not_overwritten_by_the_next_token() -> None:
    model = in_codes(ModelConfig(**{**SIZES, **FORMS["llama"]}))
    ids, cache = torch.randint(50, (2, 6)), model.new_cache(2, 32)
    model(ids[:, :4], cache=cache)
    first = model(ids[:, 4:5], cache=cache)
    kept = [part.clone() for part in (first.logits, first.hidden)]
    model(ids[:, 5:6], cache=cache)
    assert type(cache.fused) is NextToken
    assert torch.equal(first.logits, kept[0]) and torch.equal(first.hidden, kept[1])


@pytest.mark.parametrize("level", steps.levels())
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("gemma", "mistral", *IN_PARTS)])
@torch.no_grad()
def test_tokens_read_together_are_those_read_one_by_one(form: str, kind: str, level: str) -> None:
    """To the last bit, without windows: no rounding of a code can fall the other way."""
    model = in_codes(ModelConfig(**{**SIZES, **FORMS[form]}), (kind,))
    ids = torch.randint(50, (2, 30))
    assert steps.use_level(level)
    try:
        one_by_one, _ = decoded(model, ids, 3)
        for T in (2, 3, 5, 9):
            cache = model.new_cache(2, 32)
            model(ids[:, :3], cache=cache)
            parts = [model(ids[:, at : at + T], cache=cache).logits for at in range(3, 30, T)]
            assert type(cache.fused) is NextToken and len(cache.programs) <= 2
            assert torch.equal(torch.cat(parts, 1), one_by_one[:, 3:])
    finally:
        steps.use_level()


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_last_tokens_alone_are_those_among_all(form: str) -> None:
    """Their states and logits, those of the next prompt, and of a token behind it; to the last bit without windows."""
    model = in_codes(ModelConfig(**{**SIZES, **FORMS[form]}))
    ids, found = torch.randint(50, (3, 15)), []
    with use_planes(2):
        for last_only in (True, False):
            cache = model.new_cache(3, 40)
            cache.last_only, cache.is_whole = last_only, False  # all through the blocks, none as a single call
            pieces = [model(piece, cache=cache) for piece in (ids[:, :7], ids[:, 7:14], ids[:, 14:])]
            assert pieces[1].hidden.shape[1] == (1 if last_only else 7)
            found.append([(piece.hidden[:, -1], piece.logits[:, -1]) for piece in pieces])
            assert type(cache.fused) is Fused
    for one, other in zip(*found, strict=True):
        for some, same in zip(one, other, strict=True):
            assert torch.equal(some, same) if form not in ("gemma", "mistral") else gap(some, same) < 1e-4


@pytest.mark.parametrize("shape", [(3,), (1, 0)])
@torch.no_grad()
def test_ids_of_another_shape_are_refused_by_name(shape: tuple[int, ...]) -> None:
    model = in_codes(ModelConfig(**{**SIZES, **FORMS["llama"]}))
    with pytest.raises(InputError, match="input_ids: shape"):
        model(torch.zeros(shape, dtype=torch.long), cache=model.new_cache(1, 8))
