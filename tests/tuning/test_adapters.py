"""Adapters on the stack: formulas, targets, several at once, codes, merging, and runs that hold nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headway
from headway.config import ModelConfig
from headway.errors import ConfigError, InputError
from headway.kernels.ggml import quantize
from headway.launch import Launch, train
from headway.nn import Transformer
from headway.nn.packed import Packed, exact
from headway.tuning import adapters, peft_folder
from headway.tuning.beside import Adapted, Rows
from headway.tuning.low_rank import LowRank
from headway.tuning.tuned import tuned
from headway.tuning_config import LowRankTuning

SIZES: dict[str, Any] = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 16, "d_ff": 64}
SIZES |= {"vocab_size": 50, "max_len": 40, "norm": "rmsnorm", "feed_forward": "swiglu"}
KINDS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "encoder": {"kind": "encoder"},
    "pair": {"kind": "encoder-decoder"},
    "vision": {"kind": "vision", "vocab_size": 0, "head": {"type": "image-classification", "labels": 5},
               "embeddings": {"patch": {"image": 16, "size": 8, "channels": 3}}},
    "experts": {"feed_forward": {"activation": "silu", "gated": True, "experts": {"experts": 2, "top_k": 1}}},
}  # fmt: skip


def model_of(kind: str = "decoder") -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SIZES, **KINDS[kind]})).eval()
    for leaf in model.modules():
        if isinstance(leaf, nn.Linear):  # the recipe's start of zero would hide a part
            nn.init.normal_(leaf.weight, std=leaf.in_features**-0.5)
    return model


def inputs_of(kind: str, rows: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (rows, 9), generator=generator)
    if kind == "vision":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :6]} if kind == "pair" else {})}


def stir(model: nn.Module, name: str = adapters.DEFAULT, seed: int = 2) -> None:
    """Random numbers in the place of an adapter's zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapters.adapted(model).values():
            for parameter in layer.added[name].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_new_adapter_changes_nothing_and_a_merged_one_what_it_did(kind: str) -> None:
    model, inputs = model_of(kind), inputs_of(kind)
    plain = model(**inputs).logits
    adapters.attach(model, LowRankTuning(rank=4))
    assert torch.equal(model(**inputs).logits, plain)
    stir(model)
    found = model(**inputs).logits
    adapters.use(model, {adapters.DEFAULT: 0.5})
    half = model(**inputs).logits
    adapters.use(model, {})
    assert torch.equal(model(**inputs).logits, plain) and gap(found, plain) > 0.01 < gap(half, found)
    adapters.use(model, {adapters.DEFAULT: 1.0})
    count = len(adapters.adapted(model))
    assert adapters.merge(model) == count >= 8
    # Sums of 32 to 64 products in another order, through two layers.
    assert gap(model(**inputs).logits, found) < 1e-5 and not adapters.names(model)


def test_it_is_the_papers_formula_in_float64() -> None:
    """Two parts of one layer, one left out, with its gradient by hand: d A = s B^T dy x^T, d B = s dy (A x)^T."""
    torch.manual_seed(0)
    layer = Adapted(nn.Linear(6, 10).double())
    rows = {"k": Rows(4, 3), "v": Rows(7, 3)}
    layer.added["one"] = LowRank(6, 10, rows, {"k": 2, "v": 3}, {"k": 0.5, "v": 2.0}).double()
    layer.strengths = {"one": 1.0}
    stir_one = layer.added["one"]
    for parameter in stir_one.parameters():
        nn.init.normal_(parameter)
    x, dy = torch.randn(5, 6).double(), torch.randn(5, 10).double()
    out = layer(x)
    expected = x @ layer.base.weight.T + layer.base.bias
    for name, part in rows.items():
        delta = stir_one.scales[name] * x @ stir_one.A[name].T @ stir_one.B[name].T
        expected[:, part.start : part.start + part.size] += delta
    assert torch.allclose(out, expected, atol=1e-12)
    out.backward(dy)
    for name, part in rows.items():
        mine, scale = dy[:, part.start : part.start + part.size], stir_one.scales[name]
        A, B = stir_one.A[name], stir_one.B[name]
        assert torch.allclose(A.grad, scale * B.T @ mine.T @ x, atol=1e-12)
        assert torch.allclose(B.grad, scale * mine.T @ (x @ A.T), atol=1e-12)


def test_targets_name_parts_by_role_name_or_pattern() -> None:
    model = model_of()
    count = {t: sum(len(parts) for _, parts in adapters.chosen(model, (t,))) for t in
             ("all", "attention", "feed_forward", "q", "gate", "decoder.blocks.1.*")}  # fmt: skip
    assert count == {"all": 14, "attention": 8, "feed_forward": 6, "q": 2, "gate": 2, "decoder.blocks.1.*": 7}
    with pytest.raises(ConfigError, match=r"'query', which is in no layer.*all, attention, feed_forward, q, k, v"):
        adapters.attach(model, LowRankTuning(targets=("q", "query")))
    assert not adapters.adapted(model)
    tuning = LowRankTuning(rank=4, targets=("all",), rank_pattern={"*.blocks.0.*.q": 7}, alpha_pattern={"*.v": 2.0})
    adapters.attach(model, tuning)
    first = model.decoder.blocks[0].attention.qkv.added[adapters.DEFAULT]
    assert len(first.A["q"]) == 7 and len(first.A["k"]) == 4 and first.scales == {"q": 8 / 7, "k": 2.0, "v": 0.5}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for layer in adapters.adapted(model).values() for p in layer.added.parameters())


@torch.no_grad()
def test_ten_adapters_on_one_base() -> None:
    """Each by itself is what it is on a base of its own; two weighted ones add up in the weights."""
    model, inputs = model_of(), inputs_of("decoder")
    alone = []
    for number in range(10):
        one = model_of()
        adapters.attach(one, LowRankTuning(rank=2))
        stir(one, seed=number)
        alone.append(one(**inputs).logits)
        adapters.attach(model, LowRankTuning(rank=2), f"n{number}")
        stir(model, f"n{number}", seed=number)
    for number in (3, 9, 0):
        adapters.use(model, {f"n{number}": 1.0})
        assert gap(model(**inputs).logits, alone[number]) < 1e-6
    adapters.use(model, {"n1": 0.3, "n4": -0.7})
    found = model(**inputs).logits
    adapters.merge(model)
    assert gap(model(**inputs).logits, found) < 1e-5
    with pytest.raises(ConfigError, match="'n11'"):
        adapters.use(model, {"n11": 1.0})


def in_codes(kind: str = "Q8_0") -> Transformer:
    model = model_of()
    weights: dict[str, Tensor | Packed] = {}
    for name, tensor in model.state_dict().items():
        is_matrix = tensor.ndim == 2
        weights[name] = Packed.of_blocks(((kind, quantize(kind, tensor)),)) if is_matrix else tensor
    return Transformer.of(model.config, weights)


@pytest.mark.fault("L4")
def test_on_weights_in_codes_gradients_are_the_dequantized_models_and_merging_is_refused() -> None:
    coded = in_codes()
    plain = Transformer.of(coded.config, {n: w.unpack() if isinstance(w, Packed) else w for n, w in
                           headway.nn.packed.weights_of(coded).items()})  # fmt: skip
    grads = []
    for model in (coded, plain):
        adapters.attach(model, LowRankTuning(rank=3))
        stir(model)
        with exact():
            ids = inputs_of("decoder")["input_ids"]
            model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == len(grads[1]) > 20
    for one, other in zip(*grads, strict=True):
        assert gap(one, other) < 1e-5  # the same weights and sums
    with pytest.raises(ConfigError, match=r"is in codes \(Q8_0\).*float32"):
        adapters.merge(coded)
    assert adapters.names(coded) == [adapters.DEFAULT]


@torch.no_grad()
def test_magnitudes_stand_alone() -> None:
    model, inputs = model_of(), inputs_of("decoder")
    adapters.attach(model, LowRankTuning(rank=2))
    adapters.attach(model, LowRankTuning(rank=2, dora=True), "long")
    for strengths in ({"long": 1.0, adapters.DEFAULT: 1.0}, {"long": 0.5}):
        with pytest.raises(ConfigError, match="magnitudes"):
            adapters.use(model, strengths)
    adapters.use(model, {"long": 1.0})
    plain = model_of()(**inputs).logits
    assert gap(model(**inputs).logits, plain) < 1e-6  # lengths begin as they are
    stir(model, "long")
    found = model(**inputs).logits
    adapters.merge(model)
    assert gap(model(**inputs).logits, found) < 1e-5 < 0.01 < gap(found, plain)


def test_a_head_of_other_classes_is_new() -> None:
    """Its type alone does not tell: three classes where the base has two."""
    head = {"type": "sequence-classification", "labels": 2}
    base = Transformer(ModelConfig(**{**SIZES, "kind": "encoder", "head": head})).eval()
    for labels, is_new in ((2, False), (3, True)):
        config = ModelConfig(**{**SIZES, "kind": "encoder", "head": {**head, "labels": labels}})
        model = tuned(base, config, LowRankTuning(rank=2), "")
        assert any(name.startswith("head.") for name in model.own_state()) == is_new
        assert model.head.output.weight.shape[0] == labels and model.head.output.weight.requires_grad == is_new


TEXT = "The quick brown fox jumps over the lazy dog. " * 400


def tuned_run(folder: Path, base: Path, **more: Any) -> Path:
    (folder / "text.txt").write_text(TEXT.replace("dog", "cat"))
    fields = {"steps": 6, "batch_size": 4, "threads": 1, "sample_tokens": 0, "eval_windows": 2, "lr": 0.01,
              "checkpoint_every": 3}  # fmt: skip
    how = Launch(resume="auto") if more.pop("again", False) else Launch(overwrite=True)
    run = {
        "data": {"path": str(folder / "text.txt"), "context": 16, "val_fraction": 0.2},
        "base": str(base), "tuning": {"rank": 2}, "train": {**fields, **more.pop("train", {})},
        "output": str(folder / "tuned"),
    }  # fmt: skip
    return train({**run, **more}, how).folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text(TEXT)
    fields = {"steps": 4, "batch_size": 4, "threads": 1, "sample_tokens": 0, "eval_windows": 2}
    return train({
        "data": {"path": str(folder / "text.txt"), "context": 16, "val_fraction": 0.2}, "train": fields,
        "tokenizer": {"kind": "byte"}, "model": {"d_model": 32, "n_layers": 2, "n_heads": 2},
        "output": str(folder / "run"),
    }).folder  # fmt: skip


def test_a_run_holds_its_adapters_alone_and_loads_with_its_base(base: Path, tmp_path: Path) -> None:
    run = tuned_run(tmp_path, base)
    loaded, before = headway.load(run), headway.load(base)
    held = max((run / "checkpoints").glob("*/model.safetensors")).stat().st_size
    assert held < 0.5 * max((base / "checkpoints").glob("*/model.safetensors")).stat().st_size
    assert adapters.names(loaded.model) == [adapters.DEFAULT]
    ids = torch.tensor([list(b"The quick brown")])
    with torch.no_grad():
        found, plain = loaded.model(input_ids=ids).logits, before.model(input_ids=ids).logits
        assert gap(found, plain) > 1e-3
        adapters.use(loaded.model, {})
        assert torch.equal(loaded.model(input_ids=ids).logits, plain)
        adapters.use(loaded.model, {adapters.DEFAULT: 1.0})
        peft_folder.write(loaded.model, tmp_path / "peft", None, base=str(base))
        peft_folder.read(before.model, tmp_path / "peft", None)
        assert gap(before.model(input_ids=ids).logits, found) < 1e-6


def test_resuming_gives_the_bytes_of_one_run(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = tuned_run(tmp_path / "a", base)
    tuned_run(tmp_path / "b", base)
    parts = tmp_path / "b" / "tuned"
    newest = sorted((parts / "checkpoints").iterdir())[-1]
    headway.files.remove_tree(newest)
    tuned_run(tmp_path / "b", base, again=True)
    one, other = (sorted((run / "checkpoints").iterdir())[-1] / "model.safetensors" for run in (whole, parts))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.fault("L1")
def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    """By hash, with both named: of a run, and of an adapter's folder."""
    run = tuned_run(tmp_path, base)
    loaded = headway.load(run)
    peft_folder.write(loaded.model, tmp_path / "peft", None, base="first", base_sha256="a" * 64)
    other = headway.load(base)
    with pytest.raises(InputError, match="of first with weights aaaaaaaaaaaa; expected the base in use, bbbb"):
        peft_folder.read(other.model, tmp_path / "peft", None, base_sha256="b" * 64)
    small = Transformer(ModelConfig(**{**other.config.model_dump(), "d_model": 16, "d_head": 8, "d_ff": 20}))
    with pytest.raises(InputError, match=r"A \(2, 32\), B .*; expected \(r, 16\)"):
        peft_folder.read(small, tmp_path / "peft", None)
    assert not adapters.adapted(small)


@pytest.mark.fault("L3")
def test_pickles_and_foreign_kinds_are_refused_and_no_base_is_fetched(tmp_path: Path) -> None:
    model = model_of()
    adapters.attach(model, LowRankTuning(rank=2))
    place = peft_folder.write(model, tmp_path / "a", None, base="https://example.org/base")
    peft_folder.read(model_of(), place, None)  # the address in it is a name and nothing more
    config = json.loads((place / peft_folder.CONFIG).read_text())
    for change, found in (
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"(a+)+": 2}}, "a\\+"),
    ):
        (place / peft_folder.CONFIG).write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=found):
            peft_folder.read(model_of(), place, None)
    (place / peft_folder.CONFIG).write_text(json.dumps(config))
    (place / peft_folder.WEIGHTS).rename(place / peft_folder.PICKLE)
    with pytest.raises(InputError, match="a pickle, which may run code"):
        peft_folder.read(model_of(), place, None)


@pytest.mark.fault("L5")
def test_an_adapter_that_brings_other_tensors_is_refused(tmp_path: Path) -> None:
    """Such as a table with two more tokens: none of it is used, and the model stays as it was."""
    from headway.checkpoints.tensors import read_tensors, write_tensors

    model = model_of()
    adapters.attach(model, LowRankTuning(rank=2))
    place = peft_folder.write(model, tmp_path / "a", None)
    tensors = dict(read_tensors(place / peft_folder.WEIGHTS, copy=True))
    tensors["base_model.model.embeddings.tokens.weight"] = torch.zeros(52, 32)
    headway.files.write(place / peft_folder.WEIGHTS, write_tensors(tensors))
    other = model_of()
    with pytest.raises(InputError, match="1 tensors of no layer here, base_model"):
        peft_folder.read(other, place, None)
    assert not adapters.adapted(other)
