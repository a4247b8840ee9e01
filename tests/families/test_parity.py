"""One table over all families: a tiny random model of `transformers`, saved by it, loaded here, compared in every way.

A new file in `headway/families` adds its rows by itself (see reference.py). Tolerances are relative to the largest
value: float32, three layers, sums of 32 to 128 terms in another order.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from reference import Reference
from torch import Tensor

from headway.checkpoints.hub_folder import Checkpoint, folder_files, read_folder, write_folder
from headway.families import families
from headway.nn import Transformer
from headway.nn.block import Block

ROWS = list(reference.rows())
EVERY = pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
TOLERANCE = 1e-5
B, T, S = 3, 11, 8
LENGTHS = (11, 4, 7)

Inputs = dict[str, Tensor]


@functools.cache
def folder(row: Reference) -> Path:
    """The model as transformers saves it; removed when the process ends."""
    place = tempfile.TemporaryDirectory()
    KEPT.append(place)
    reference.saved(row, place.name)
    return Path(place.name)


KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def loaded(row: Reference) -> tuple[Checkpoint, Transformer]:
    """What this library makes of it."""
    checkpoint = read_folder(folder(row))
    return checkpoint, Transformer.of(checkpoint.config, checkpoint.weights)


def inputs(row: Reference) -> Inputs:
    """Inputs that both sides take under the same names."""
    config = loaded(row)[0].config
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> Tensor:
        return torch.randint(3, 60, (B, length), generator=generator)

    shape = config.embeddings
    out: Inputs = {}
    if shape.patch is not None:
        size = (B, shape.patch.channels, shape.patch.image, shape.patch.image)
        out["pixel_values"] = torch.randn(size, generator=generator)
    elif shape.audio is not None:
        out["input_features"] = torch.randn((B, shape.audio.bins, shape.audio.frames), generator=generator)
    else:
        out["input_ids"] = ids(T)
        out["input_ids"][:, -1] = 60  # CLIP's end token, where its text tower pools
    if config.kind == "encoder-decoder":
        out["decoder_input_ids"] = ids(S)
    return out


def answer(row: Reference, theirs: Any) -> Tensor:
    """Their tensor that our `logits` are, from the output of their model."""
    if "start_logits" in theirs:
        return torch.stack((theirs.start_logits, theirs.end_logits), -1)
    names = ("logits", "prediction_logits", "image_embeds", "text_embeds", "pooler_output")
    found = next((theirs[name] for name in names if name in theirs and theirs[name] is not None), None)
    if found is None or row.architecture == "ElectraForPreTraining":  # bare models: the first place
        found = (theirs.last_hidden_state if "last_hidden_state" in theirs else theirs.hidden_states[-1])[:, 0]
    return found


def assert_same(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max().item() <= tolerance * max(1.0, expected.abs().max().item())


# --- the table itself ------------------------------------------------------------------------------------------


def test_every_named_family_is_there() -> None:
    """Those that docs and README promise; printed with their length, which a budget bounds."""
    decoders = "gpt2 gpt_neox opt bloom llama mistral mixtral qwen2 qwen3 qwen3_moe gemma2 gemma3_text phi3 olmo2"
    decoders += " smollm3 starcoder2 falcon gpt_bigcode"
    encoders = "bert roberta xlm-roberta distilbert electra modernbert nomic_bert"
    pairs = "t5 mt5 bart mbart marian pegasus whisper"
    vision = "vit deit dinov2 siglip_vision_model clip_vision_model siglip_text_model clip_text_model"
    promised = " ".join((decoders, encoders, pairs, vision)).split(" ")
    assert set(promised) <= set(families())
    place = Path(reference.__file__).parents[2] / "src" / "headway" / "families"
    lines = {path.name: len(path.read_text().splitlines()) for path in place.glob("[a-z]*.py")}
    print(f"{len(families())} families, {len(ROWS)} rows;", ", ".join(f"{n} {c}" for n, c in sorted(lines.items())))
    assert max(lines.values()) <= 60, lines


# --- forward and backward --------------------------------------------------------------------------------------


@EVERY
def test_logits_and_residual_stream(row: Reference) -> None:
    """The answer, and what enters every block of every stack."""
    _, model = loaded(row)
    row_inputs = inputs(row)
    with torch.no_grad(), recorded(model) as streams:
        found = model(**row_inputs)
    with torch.no_grad():
        expected = reference.build(row)(**row_inputs, output_hidden_states=True)
    assert_same(found.logits, answer(row, expected))
    sides = {"encoder": "encoder_hidden_states", "decoder": "decoder_hidden_states"} if model.is_pair else {
        "encoder" if model.encoder is not None else "decoder": "hidden_states"
    }  # fmt: skip
    for side, name in sides.items():
        theirs = expected[name]
        assert len(streams[side]) == len(theirs) - 1
        for ours, stream in zip(streams[side], theirs, strict=False):
            assert_same(ours, stream)


class recorded:  # noqa: N801
    """Records the input of every block, by stack, while inside."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.hooks = model, []

    def __enter__(self) -> dict[str, list[Tensor]]:
        streams: dict[str, list[Tensor]] = {"encoder": [], "decoder": []}
        for side, stack in (("encoder", self.model.encoder), ("decoder", self.model.decoder)):
            for block in stack.blocks if stack is not None else ():
                assert isinstance(block, Block)
                keep = streams[side].append
                self.hooks.append(block.register_forward_pre_hook(lambda _, given, keep=keep: keep(given[0])))
        return streams

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


@EVERY
def test_gradients(row: Reference, tmp_path: Path) -> None:
    """Theirs, written by their own code under the names of a checkpoint and read by ours, against ours."""
    _, model = loaded(row)
    # In float64, so that no difference hides in rounding; their rotary tables stay float32 throughout.
    model = copy.deepcopy(model).double().requires_grad_(True)
    theirs = copy.deepcopy(reference.build(row)).double()
    row_inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs(row).items()}
    found = model(**row_inputs).logits
    expected = answer(row, theirs(**row_inputs, output_hidden_states=True))
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for logits in (found, expected):
        (logits * weights).sum().backward()
    with torch.no_grad():  # what they do not train (buffers, frozen tables) is NaN, and compared with nothing
        for tensor in [*theirs.parameters(), *theirs.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.full_like(tensor, float("nan")) if tensor.grad is None else tensor.grad)
    theirs.save_pretrained(tmp_path)
    gradients = read_folder(tmp_path, allow_nonfinite=True).weights
    compared = {name: gradient for name, gradient in gradients.items() if not gradient.isnan().all()}
    scale = max(float(g.abs().max()) for g in compared.values())
    assert len(compared) >= len(gradients) - 4
    for name, gradient in compared.items():
        ours = model.get_parameter(name).grad
        assert ours is not None, name
        assert (ours - gradient).abs().max() <= TOLERANCE * scale, name


# --- decoding and padding --------------------------------------------------------------------------------------

WRITERS = [row for row in ROWS if row.family.heads[row.architecture].fields["head.type"] == "causal-lm"]
READERS = [row for row in ROWS if row.family.fixed["kind"] != "vision" and row.model_type != "whisper"]


@pytest.mark.parametrize("row", WRITERS, ids=[row.id for row in WRITERS])
def test_cached_decoding_equals_their_full_forward(row: Reference) -> None:
    """Five tokens at once and the others one by one, through a cache; windows shorter than the text roll over."""
    _, model = loaded(row)
    row_inputs = inputs(row)
    name = "decoder_input_ids" if model.is_pair else "input_ids"
    ids = row_inputs.pop(name)
    cache = model.new_cache(B, ids.shape[1])
    parts = []
    with torch.no_grad():
        for start, stop in [(0, 5), *((t, t + 1) for t in range(5, ids.shape[1]))]:
            given = row_inputs if start == 0 else {}
            parts.append(model(**given, **{name: ids[:, start:stop]}, cache=cache).logits)
        expected = reference.build(row)(**row_inputs, **{name: ids}).logits
    assert_same(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("row", READERS, ids=[row.id for row in READERS])
def test_padded_batch_equals_their_rows_alone(row: Reference, side: str) -> None:
    """Junk on either side of rows of 11, 4 and 7 tokens; in an encoder-decoder on the encoder's side, where only
    cross-attention could let it through."""
    _, model = loaded(row)
    row_inputs = inputs(row)
    padded, real = pad(row_inputs["input_ids"], side)
    with torch.no_grad():
        found = model(**(row_inputs | {"input_ids": padded, "attention_mask": real})).logits
        for b, length in enumerate(LENGTHS):
            alone = {name: value[b : b + 1] for name, value in row_inputs.items()}
            alone["input_ids"] = padded[b : b + 1][real[b : b + 1].bool()][None]
            expected = answer(row, reference.build(row)(**alone, output_hidden_states=True))
            by_token = found.ndim == 3 and "decoder_input_ids" not in row_inputs
            assert_same(found[b][real[b].bool()] if by_token else found[b], expected[0])
            assert alone["input_ids"].shape[1] == length


def pad(ids: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Rows of LENGTHS tokens that end as before, other ids around them."""
    real = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    real = real if side == "right" else real.flip(1)
    out = torch.where(real, ids, ids.roll(1, 0).clamp(max=59))
    last = torch.where(real, torch.arange(ids.shape[1]), -1).amax(1)
    out[torch.arange(len(ids)), last] = 60
    return out, real.long()


# --- and back --------------------------------------------------------------------------------------------------


@EVERY
def test_round_trip_is_byte_exact_and_loads_there(row: Reference, tmp_path: Path) -> None:
    """HF -> Headway -> HF: the same file of weights; their class loads it and answers the same to the last bit."""
    checkpoint, _ = loaded(row)
    target = tmp_path / "out"
    parts = {"family": checkpoint.family, "architecture": checkpoint.architecture, "raw": checkpoint.raw}
    write_folder(target, folder_files(checkpoint.config, checkpoint.weights, **parts, unread=checkpoint.unread))
    name = "model.safetensors"
    assert (target / name).read_bytes() == (folder(row) / name).read_bytes()
    theirs = reference.build(row)
    again, loading = type(theirs).from_pretrained(target, attn_implementation="eager", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    row_inputs = inputs(row)
    with torch.no_grad():
        one, other = (answer(row, m.eval()(**row_inputs, output_hidden_states=True)) for m in (theirs, again))
    assert torch.equal(one, other)


@EVERY
def test_a_config_of_ours_alone_is_enough_for_theirs(row: Reference, tmp_path: Path) -> None:
    """Without the original config.json: what we write from our own fields gives the same model there."""
    checkpoint, _ = loaded(row)
    target = tmp_path / "out"
    parts = {"family": checkpoint.family, "architecture": checkpoint.architecture}
    write_folder(target, folder_files(checkpoint.config, checkpoint.weights, **parts, unread=checkpoint.unread))
    again = type(reference.build(row)).from_pretrained(target, attn_implementation="eager").eval()
    row_inputs = inputs(row)
    with torch.no_grad():
        found = answer(row, again(**row_inputs, output_hidden_states=True))
        assert_same(found, answer(row, reference.build(row)(**row_inputs, output_hidden_states=True)))
    assert read_folder(target).config == checkpoint.config


@EVERY
def test_defaults_are_theirs(row: Reference) -> None:
    """A config.json that says only what differs from their defaults (as older files do) means the same."""
    if row.variant:
        pytest.skip("the defaults of a family are those of its first row")
    whole = json.loads((folder(row) / "config.json").read_text())
    defaults = type(reference.build(row).config)().to_dict()
    short = {key: value for key, value in whole.items() if key not in defaults or defaults[key] != value}
    from headway.families._translate import read_config

    short |= {"model_type": row.model_type, "architectures": [row.architecture]}
    assert read_config(row.family, short, "short").config == read_config(row.family, whole, "whole").config


# --- negative controls -----------------------------------------------------------------------------------------


def damaged(checkpoint: Checkpoint) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The weights with one thing wrong that a loader could get wrong."""
    w = checkpoint.weights
    qkv = "decoder.blocks.1.attention.qkv.weight"
    heads = w[qkv].view(8, 8, -1)
    yield "keys and values swapped", w | {qkv: heads[[0, 1, 2, 3, 6, 7, 4, 5]].reshape(w[qkv].shape)}
    yield (
        "rotary pairs interleaved",
        w
        | {
            qkv: torch.cat((heads[:6].view(6, 2, 4, -1).transpose(1, 2).reshape(6, 8, -1), heads[6:])).reshape(
                w[qkv].shape
            )
        },
    )
    up = "decoder.blocks.0.feed_forward.up.weight"
    yield "gate and product swapped", w | {up: w[up].roll(48, 0)}


def test_the_table_sees_a_wrong_layout() -> None:
    row = next(row for row in ROWS if row.id == "LlamaForCausalLM")
    checkpoint, _ = loaded(row)
    row_inputs = inputs(row)
    with torch.no_grad():
        expected = reference.build(row)(**row_inputs).logits
        for what, weights in damaged(checkpoint):
            model = Transformer.of(checkpoint.config, weights)
            with pytest.raises(AssertionError):
                assert_same(model(**row_inputs).logits, expected)
                pytest.fail(f"{what} went unseen")
