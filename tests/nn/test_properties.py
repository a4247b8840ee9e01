"""Contracts that hold for every config: one path's answer is the other path's answer.

Each runs on the whole grid of tests/config_grid.py with all parameters drawn at random (so that no norm is the
identity and no branch is zero), in float64 to 1e-9 and in float32 to 1e-5 of the output's scale.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import config_grid
import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from headway import config as cfg
from headway.checkpoints.tensors import read_tensors, write_tensors
from headway.config_rules import members
from headway.nn import Transformer
from headway.nn.feed_forward import MixtureOfExperts

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
DTYPES = tuple(TOLERANCE)
B, T = 3, 8
LENGTHS = (8, 3, 6)
GRID = config_grid.grid()

Inputs = dict[str, Tensor]


@functools.cache
def build(index: int, dtype: torch.dtype) -> Transformer:
    """The model of config `index` with random parameters, in evaluation mode."""
    model = Transformer(GRID[index]).double()
    torch.default_generator.manual_seed(index)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.normal_(float(parameter.ndim == 1), spread)
    return model.to(dtype).eval()


def inputs(config: cfg.ModelConfig, dtype: torch.dtype, rows: int = B) -> Inputs:
    """Random inputs of the config's kind, (rows, T)."""
    generator = torch.Generator().manual_seed(1)

    def ids(high: int) -> Tensor:
        return torch.randint(high, (rows, T), generator=generator)

    if config.embeddings.patch is not None:
        patch = config.embeddings.patch
        shape = (rows, patch.channels, patch.image, patch.image)
        return {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)}
    out = {"input_ids": ids(config.vocab_size)}
    audio = config.embeddings.audio
    if audio is not None:
        frames = torch.randn((rows, audio.bins, audio.frames), generator=generator, dtype=torch.float64).to(dtype)
        out = {"input_features": frames}
    if config.embeddings.token_types:
        out["token_types"] = ids(config.embeddings.token_types)
    if config.kind == "encoder-decoder":
        out["decoder_input_ids"] = ids(config.vocab_size)
    return out


def by_token(config: cfg.ModelConfig) -> bool:
    """Whether logits stand at tokens rather than at sequences."""
    return config.head.type in ("causal-lm", "masked-lm", "token-classification", "span")


def assert_same(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal within the dtype's tolerance, relative to the largest expected value."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    worst = (found - expected).abs().max().item() if found.numel() else 0.0
    assert worst <= TOLERANCE[dtype] * max(1.0, expected.abs().max().item())


def answers(model: Transformer, row: Inputs) -> tuple[Tensor, Tensor]:
    """Hidden states and logits, without gradients."""
    with torch.no_grad():
        out = model(**row)
    return out.hidden, out.logits


def grid(*kinds: str, audio: bool = True) -> pytest.MarkDecorator:
    """One test per config of these kinds; without those that hear instead of read, if not `audio`."""
    numbers = [n for n, config in enumerate(GRID) if config.kind in kinds and (audio or not config.embeddings.audio)]
    return pytest.mark.parametrize("index", numbers, ids=[f"{number}-{GRID[number].kind}" for number in numbers])


EVERY = grid("decoder", "encoder", "encoder-decoder", "vision")
TEXT = grid("decoder", "encoder", "encoder-decoder")
READS = grid("decoder", "encoder", "encoder-decoder", audio=False)
CACHED = grid("decoder", "encoder-decoder")


# --- the grid itself -------------------------------------------------------------------------------------------


def test_grid_has_at_least_200_distinct_configs() -> None:
    distinct = {config.to_json() for config in GRID}
    print(f"{len(distinct)} configs")
    assert len(distinct) >= 200
    assert {config.kind for config in GRID} == {"decoder", "encoder", "encoder-decoder", "vision"}


def choices(cls: type[BaseModel]) -> Iterator[tuple[str, set[object]]]:
    """(Class.field, values that must appear): literals, booleans, unset and set, each member of a union."""
    for name, field in cls.model_fields.items():
        wanted: set[object] = set()
        parts = [field.annotation]
        while parts:
            part = parts.pop()
            if typing.get_origin(part) in (typing.Annotated, typing.Union, types.UnionType):
                parts += [arg for arg in typing.get_args(part) if typing.get_origin(arg) or isinstance(arg, type)]
            elif typing.get_origin(part) is typing.Literal:
                wanted |= set(typing.get_args(part))
            elif typing.get_origin(part) is tuple:
                parts.append(typing.get_args(part)[0])
            elif part is bool:
                wanted |= {True, False}
            elif part is types.NoneType:
                wanted.add(None)
        yield f"{cls.__name__}.{name}", wanted
        for below in members(field.annotation):
            yield from choices(below)


def values(config: BaseModel) -> Iterator[tuple[str, object]]:
    """(Class.field, value) of a config and of those inside it; the members of a tuple one by one."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        for one in value if isinstance(value, tuple) else (value,):
            yield f"{type(config).__name__}.{name}", type(one) if isinstance(one, BaseModel) else one
        if isinstance(value, BaseModel):
            yield from values(value)


def test_grid_covers_every_choice_of_every_field() -> None:
    """A field or a choice added to config.py without a place in the grid fails here."""
    seen: dict[str, set[object]] = {}
    for config in GRID:
        for name, value in values(config):
            seen.setdefault(name, set()).add(value)
    constant = {"ModelConfig.max_len"}
    for name, wanted in choices(cfg.ModelConfig):
        assert wanted <= seen[name], f"{name}: {wanted - seen[name]} never drawn"
        is_section = all(isinstance(value, type) for value in seen[name])
        if not (is_section or name.endswith(".type") or name in constant):
            assert len(seen[name]) >= 2, f"{name} is always {seen[name]}"


def test_grid_covers_nearly_all_pairs_of_values() -> None:
    """Of the pairs of field values that random valid configs show, at least 95 in 100 stand together in the grid."""
    seen = set().union(*map(config_grid.pairs, GRID))
    possible = set().union(*map(config_grid.pairs, itertools.islice(config_grid.candidates(7), 600)))
    assert len(possible & seen) / len(possible) >= 0.95


# --- the properties --------------------------------------------------------------------------------------------


def chunks(total: int) -> Iterator[slice]:
    """A prefill in two unequal chunks, then one token at a time."""
    yield slice(0, 4)
    yield slice(4, 6)
    for at in range(6, total):
        yield slice(at, at + 1)


def decode(model: Transformer, row: Inputs, real: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of the decoder's tokens through a cache."""
    config = model.config
    pair = config.kind == "encoder-decoder"
    name, mask = ("decoder_input_ids", "decoder_attention_mask") if pair else ("input_ids", "attention_mask")
    tokens = row[name]
    cache = model.new_cache(len(tokens), tokens.shape[1], lengths)
    hidden, logits = [], []
    for part in chunks(tokens.shape[1]):
        new = {name: tokens[:, part]}
        if pair and part.start == 0:
            new |= {key: row[key] for key in ("input_ids", "input_features") if key in row}
        if real is not None:
            new[mask] = real[:, part]
        with torch.no_grad():
            out = model(**new, cache=cache)
        hidden.append(out.hidden)
        logits.append(out.logits)
    return torch.cat(hidden, 1), torch.cat(logits, 1) if by_token(config) else torch.empty(0)


@CACHED
def test_cached_equals_full(index: int) -> None:
    """Prefill in chunks and then one by one; windows shorter than the sequence roll over."""
    for dtype in DTYPES:
        model = build(index, dtype)
        row = inputs(model.config, dtype)
        full_hidden, full_logits = answers(model, row)
        hidden, logits = decode(model, row, None, None)
        assert_same(hidden, full_hidden, dtype)
        if by_token(model.config):
            assert_same(logits, full_logits, dtype)


@CACHED
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batch_cached_equals_each_row_alone(index: int, side: str) -> None:
    """Rows of unequal length through one cache, padded on either side with other tokens."""
    for dtype in DTYPES:
        model = build(index, dtype)
        row = inputs(model.config, dtype)
        name = "decoder_input_ids" if "decoder_input_ids" in row else "input_ids"
        padded, real = pad(row[name], side)
        hidden, logits = decode(model, {**row, name: padded}, real, torch.tensor(LENGTHS))
        for b, length in enumerate(LENGTHS):
            alone = {key: value[b : b + 1] for key, value in row.items()}
            full_hidden, full_logits = answers(model, {**alone, name: alone[name][:, :length]})
            assert_same(hidden[b][real[b]], full_hidden[0], dtype)
            if by_token(model.config):
                assert_same(logits[b][real[b]], full_logits[0], dtype)


@EVERY
def test_batch_equals_single(index: int) -> None:
    for dtype in DTYPES:
        model = build(index, dtype)
        row = inputs(model.config, dtype)
        hidden, logits = answers(model, row)
        for b in range(B):
            alone_hidden, alone_logits = answers(model, {key: value[b : b + 1] for key, value in row.items()})
            assert_same(hidden[b], alone_hidden[0], dtype)
            assert_same(logits[b], alone_logits[0], dtype)


def pad(ids: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Keep LENGTHS[b] tokens of row b at one side, junk on the other. Returns ids and which are real."""
    out, real = ids.flip(0, 1).clone(), torch.zeros_like(ids, dtype=torch.bool)
    for b, length in enumerate(LENGTHS):
        place = slice(T - length, T) if side == "left" else slice(0, length)
        out[b, place] = ids[b, :length]
        real[b, place] = True
    return out, real


@TEXT
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(index: int, side: str) -> None:
    masks = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask", "token_types": ""}
    for dtype in DTYPES:
        model = build(index, dtype)
        row = inputs(model.config, dtype)
        padded: Inputs = {}
        for name, mask in masks.items():
            if name in row:
                padded[name], real = pad(row[name], side)
                padded |= {mask: real} if mask else {}
        padded_not = {"input_features"} & row.keys()
        padded |= {name: row[name] for name in padded_not}
        hidden, logits = answers(model, padded)
        for b, length in enumerate(LENGTHS):
            whole = {k: v[b : b + 1] if k in padded_not else v[b : b + 1, :length] for k, v in row.items()}
            alone_hidden, alone_logits = answers(model, whole)
            assert_same(hidden[b][real[b]], alone_hidden[0], dtype)
            found = logits[b][real[b]] if by_token(model.config) else logits[b]
            assert_same(found, alone_logits[0], dtype)


@READS
def test_packed_documents_are_isolated(index: int) -> None:
    """Three documents in one row give what each gives alone; positions restart."""
    config = GRID[index]
    documents = torch.tensor([[0] * 4 + [1] * 1 + [2] * 3])
    for dtype in DTYPES:
        model = build(index, dtype)
        row = inputs(config, dtype, rows=1)

        def run(part: slice, documents: Tensor | None, model: Transformer = model, row: Inputs = row) -> Tensor:
            with torch.no_grad():
                new = {key: value[:, part] for key, value in row.items()}
                out = model(**new, documents=documents)
            return out.hidden if out.encoder_hidden is None else out.encoder_hidden

        packed = run(slice(None), documents)
        alone = [run(slice(start, stop), None) for start, stop in ((0, 4), (4, 5), (5, 8))]
        assert_same(packed, torch.cat(alone, 1), dtype)


def labels_of(config: cfg.ModelConfig, logits: Tensor) -> Tensor:
    """Labels that fit the head."""
    generator = torch.Generator().manual_seed(2)
    match config.head:
        case cfg.PooledEmbedding():
            return torch.tensor([0, 0, 1, 1])
        case cfg.Span():
            return torch.randint(T, (len(logits), 2), generator=generator)
        case cfg.SequenceClassification(problem="multi"):
            return torch.randint(2, logits.shape, generator=generator)
        case cfg.SequenceClassification(problem="regression"):
            return torch.randn(len(logits), generator=generator)
        case cfg.MaskedPatches():
            hidden = torch.arange(logits.shape[1])[:, None] % 2 == 0
            return torch.randn(logits.shape, generator=generator).where(hidden, -100.0)
    return torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)


def idle(model: Transformer) -> set[str]:
    """Modules and parameters whose gradient is zero by mathematics.

    A query that sees one key gives it weight 1 whatever the score; a router that renormalises its single choice has
    no say; a softmax over positions ignores what all positions share.
    """
    experts = model.config.feed_forward.experts
    out = {"head.output.bias"} if isinstance(model.config.head, cfg.Span) else set()
    if experts and experts.top_k == 1 and experts.normalize and experts.balance == 0:
        out |= {name for name, _ in model.named_modules() if name.endswith("router")}
    for prefix, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        windows = stack.windows if stack is not None else []
        for layer in [layer for layer, window in enumerate(windows) if window == 1]:
            out |= {f"{prefix}.blocks.{layer}.attention.{name}" for name in ("q_norm", "k_norm")}
        if set(windows) == {1}:
            out.add(f"{prefix}.bias")
    return out


@contextlib.contextmanager
def watched_experts(model: Transformer) -> Iterator[set[str]]:
    """The names of the experts whose output had a gradient while inside."""
    reached: set[str] = set()

    def watch(name: str, output: Tensor) -> None:
        output.register_hook(lambda gradient: reached.add(name) if gradient.abs().sum() > 0 else None)

    def hook(name: str) -> Callable[..., None]:
        return lambda module, arguments, output: watch(name, output)

    hooks = [
        expert.register_forward_hook(hook(f"{name}.experts.{number}"))
        for name, layer in model.named_modules()
        if isinstance(layer, MixtureOfExperts)
        for number, expert in enumerate(layer.experts)
    ]
    yield reached
    for handle in hooks:
        handle.remove()


@EVERY
def test_every_parameter_gets_a_gradient(index: int) -> None:
    config = GRID[index]
    model = build(index, torch.float64).train()
    row = inputs(config, torch.float64, rows=4)
    labels = labels_of(config, answers(model, row)[1])
    with watched_experts(model) as reached:
        model(**row, labels=labels).loss.backward()
    model.eval()
    exempt = tuple(f"{name}." for name in idle(model))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        layer, is_expert, rest = name.partition(".experts.")  # one may have no token that the loss reads
        if is_expert:
            assert any(expert.startswith(f"{layer}.") for expert in reached), f"no expert of {layer} learns"
            must = f"{layer}.experts.{rest[0]}" in reached
        else:
            must = not f"{name}.".startswith(exempt)
        assert not must or parameter.grad.abs().max() > 0, name
        parameter.grad = None


@EVERY
def test_saved_and_loaded_state_is_equal(index: int, tmp_path: Path) -> None:
    """Config and weights through their files give the same bits, tied weights still tied."""
    model = build(index, torch.float32)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"".join(bytes(chunk) for chunk in write_tensors(model.state_dict(), {})))
    again = Transformer(cfg.ModelConfig.model_validate_json(model.config.to_json())).eval()
    again.load_state_dict(read_tensors(path, copy=True))
    row = inputs(model.config, torch.float32)
    for one, other in zip(answers(model, row), answers(again, row), strict=True):
        assert torch.equal(one, other)
    assert_shared(again)


def assert_shared(model: Transformer) -> None:
    if model.config.embeddings.tied:
        assert model.head.output.weight is (model.decoder_embeddings or model.embeddings).tokens.weight


# --- negative controls: each property can fail -----------------------------------------------------------------


def first(condition: Callable[[cfg.ModelConfig], bool]) -> int:
    return next(i for i, config in enumerate(GRID) if condition(config))


def plain(config: cfg.ModelConfig) -> bool:
    return config.kind == "decoder" and config.attention.pattern == ("causal",) and config.n_layers == 2


def test_without_a_padding_mask_the_answer_changes() -> None:
    model = build(first(lambda c: c.kind == "encoder" and "full" in c.attention.pattern), torch.float64)
    row = inputs(model.config, torch.float64, rows=B)
    padded, _ = pad(row["input_ids"], "right")
    with torch.no_grad(), pytest.raises(AssertionError):
        hidden = model(padded).hidden
        assert_same(hidden[1:2, :4], model(row["input_ids"][1:2, :4]).hidden, torch.float64)


def test_without_documents_packed_tokens_see_each_other() -> None:
    model = build(first(plain), torch.float64)
    ids = inputs(model.config, torch.float64, rows=1)["input_ids"]
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_same(model(ids).hidden[:, 4:], model(ids[:, 4:]).hidden, torch.float64)


def test_a_cache_that_forgets_a_key_changes_the_answer() -> None:
    model = build(first(plain), torch.float64)
    row: Mapping[str, Any] = inputs(model.config, torch.float64)
    ids = row["input_ids"]
    cache = model.new_cache(B, T)
    with torch.no_grad():
        model(ids[:, : T - 1], cache=cache)
        for slots in cache.groups.values():
            slots.keys.numbers[:, :, :, 2] = 0
        last = model(ids[:, T - 1 :], cache=cache).hidden
        with pytest.raises(AssertionError):
            assert_same(last, model(ids).hidden[:, T - 1 :], torch.float64)
