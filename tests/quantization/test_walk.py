"""The walk over every kind of model: what is in codes and what is not, what stays tied, save and load bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headway
from headway import saving
from headway.checkpoints.packed import joined
from headway.config import ModelConfig
from headway.errors import ConfigError, InputError
from headway.loading import Loaded
from headway.nn import Transformer
from headway.nn.packed import PackedEmbedding, PackedLinear, exact
from headway.quantization.calibration import second_moments
from headway.quantization.walk import CALIBRATED, METHODS, SCHEMES, linear_layers, quantized, roles, size_of

SIZES: dict[str, Any] = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 96, "max_len": 24}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 50}
KINDS: dict[str, dict[str, Any]] = {
    "decoder": {**TEXT, "embeddings": {"tied": True}},
    "untied": TEXT,
    "experts": {**TEXT, "feed_forward": {"activation": "silu", "gated": True, "experts": {"experts": 4, "top_k": 2}}},
    "encoder": {**TEXT, "kind": "encoder", "head": "masked-lm"},
    "classifier": {**TEXT, "kind": "encoder", "head": {"type": "sequence-classification", "labels": 3}},
    "encoder-decoder": {**TEXT, "kind": "encoder-decoder", "tokens": {"decoder_start": 1}},
    "vision": {**SIZES, "kind": "vision", "head": {"type": "image-classification", "labels": 5},
               "embeddings": {"patch": {"size": 4, "channels": 1, "image": 16}}},
}  # fmt: skip


def model_of(kind: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**KINDS[kind]))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval().requires_grad_(False)


def batch_of(kind: str, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    if kind == "vision":
        return {"pixel_values": torch.randn(2, 1, 16, 16, generator=random)}
    ids = torch.randint(2, 50, (2, 20), generator=random)
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :7]} if kind == "encoder-decoder" else {})


def made(kind: str, to: str, method: str) -> tuple[Transformer, Transformer]:
    model = model_of(kind)
    moments = second_moments(model, linear_layers(model), [batch_of(kind, n) for n in range(1, 9)])
    return model, quantized(model, SCHEMES[to], method, moments if method in CALIBRATED else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_answers_stay_near(kind: str, method: str) -> None:
    """8 bits nearer than 4. A token that comes to other experts is far off, so those may differ more."""
    offs, bounds = {}, (0.1, 0.4) if kind == "experts" else (0.03, 0.3)
    for to in ("int8", "int4"):
        model, small = made(kind, to, method)
        batch = batch_of(kind)
        with exact():
            offs[to] = float((small(**batch).logits - model(**batch).logits).norm() / model(**batch).logits.norm())
    assert offs["int8"] < bounds[0] and offs["int8"] < offs["int4"] < bounds[1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_in_codes(kind: str) -> None:
    """Every product of a block, the token table and the vocabulary's output; nothing else."""
    model, small = made(kind, "int4", "round")
    coded = {name for name, m in small.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}
    coded -= {"decoder_embeddings.tokens"}  # the other side's name for the same table
    assert coded == set(roles(model)) and size_of(small) < 0.5 * size_of(model)
    left = {name for name, m in small.named_modules() if type(m) is torch.nn.Linear}
    assert left == {
        "experts": {f"decoder.blocks.{layer}.feed_forward.router" for layer in range(2)},
        "classifier": {"head.output"},
        "vision": {"head.output", "embeddings.patches.project"},
    }.get(kind, set()) | ({"head.pool.dense"} & left)


def test_what_is_tied_stays_tied() -> None:
    model, small = made("decoder", "int8", "round")
    assert model.config.embeddings.tied
    assert small.head.output.codes0.data_ptr() == small.embeddings.tokens.codes0.data_ptr()
    _, apart = made("untied", "int8", "round")
    assert apart.head.output.codes0.data_ptr() != apart.embeddings.tokens.codes0.data_ptr()


@pytest.mark.fault("Q12")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("to", "method"), [("int8", "smooth"), ("int4", "round"), ("int4", "gptq")])
def test_saved_and_loaded_answers_are_the_same_bits(kind: str, to: str, method: str, tmp_path: Path) -> None:
    _, small = made(kind, to, method)
    whole = Loaded(small, None, small.config, tmp_path)
    if small.config.vocab_size:
        from headway.text import train_tokenizer

        tokenizer = train_tokenizer(["a b c d e"] * 9, "char", 20, special_tokens=())
        whole = replace(whole, tokenizer=tokenizer)
    again = headway.load(saving.save(whole, tmp_path / "run", "headway"))
    batch = batch_of(kind)
    assert torch.equal(again.model(**batch).logits, small(**batch).logits)
    assert size_of(again.model) == size_of(small)
    plain = headway.load(tmp_path / "run", dtype="float32")
    with exact():
        # Unpacked once or at every product: the same weights, other products of matrices.
        assert torch.allclose(plain.model(**batch).logits, small(**batch).logits, atol=1e-5)
    assert not any(isinstance(m, PackedLinear) for m in plain.model.modules())


@pytest.mark.fault("Q10")
def test_a_model_in_codes_is_not_rounded_again() -> None:
    _, small = made("decoder", "int8", "round")
    with pytest.raises(ConfigError, match="INT8/32 already"):
        quantized(small, SCHEMES["int4"], "round")
    with pytest.raises(ConfigError, match="round, search"):
        quantized(model_of("decoder"), SCHEMES["int4"], "magic")


@pytest.mark.fault("Q9")
def test_a_weight_that_is_no_number() -> None:
    model = model_of("decoder")
    model.decoder.blocks[1].feed_forward.up.weight[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"decoder\.blocks\.1\.feed_forward\.up\.weight: 1 of"):
        quantized(model, SCHEMES["int4"], "round")


def tampered(form: Any, tensors: dict[str, Tensor], what: str) -> None:
    part = form["parts"][0]
    if what in part:
        part[what] = {"bits": 5, "chunk": 64, "group": 48, "zero": 300, "rows": 1 << 20, "scales": "int8"}[what]
    elif what == "shape":
        tensors["head.output.codes0"] = tensors["head.output.codes0"][:, :-1]
    elif what == "dtype":
        tensors["head.output.codes0"] = tensors["head.output.codes0"].int()
    elif what == "nan":
        tensors["head.output.scales0"].view(torch.float16)[0, 0, 0] = float("nan")
    elif what == "missing":
        del tensors["head.output.scales0"]
    else:
        form["parts"] = what


@pytest.mark.parametrize(
    "what", ["bits", "chunk", "group", "zero", "rows", "scales", "shape", "dtype", "nan", "missing", "parts"]
)
def test_a_manifest_that_does_not_fit_its_tensors(what: str) -> None:
    """Kernels trust sizes, so a wrong one is refused before they see it."""
    from headway.checkpoints.packed import forms

    _, small = made("untied", "int8", "round")
    said = json.loads(json.dumps(forms(small)))
    tensors = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    joined(said, tensors, "manifest.json")  # as it is, it fits
    tampered(said["head.output"], tensors, what)
    with pytest.raises(InputError, match=r"manifest\.json packed head\.output"):
        joined(said, tensors, "manifest.json")


def test_gradients_reach_the_inputs_of_layers_in_codes() -> None:
    """As through the unpacked matrix, to the last bit."""
    _, small = made("decoder", "int4", "smooth")
    layer = small.decoder.blocks[0].feed_forward.up
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    again = x.detach().requires_grad_()
    scaled = again * layer.input_scale
    (scaled @ (layer.packed.unpack() / layer.input_scale).T).square().sum().backward()
    assert torch.allclose(x.grad, again.grad, rtol=1e-4, atol=1e-4)
