"""Every method of tuning on every kind of model: how it begins, what it computes, with a cache, in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapters import KINDS, base, gap, in_codes, inputs_of, model_of, stir, tuned_run
from torch import Tensor, nn
from torch.nn import functional as F

import headway
from headway import saving
from headway.checkpoints.folder import newest_good
from headway.checkpoints.tensors import read_tensors
from headway.config import ModelConfig
from headway.errors import ConfigError
from headway.nn import Transformer
from headway.nn.attention import Attention
from headway.nn.masks import Mask
from headway.tuning import adapters, peft_folder
from headway.tuning.beside import plain
from headway.tuning.tuned import tuned
from headway.tuning_config import (
    BottleneckTuning,
    LowRankTuning,
    PartialTuning,
    PrefixTuning,
    PromptTuning,
    ScalingTuning,
)

assert base is not None  # a fixture
METHODS: dict[str, Any] = {
    "lora": LowRankTuning(rank=2),
    "svd": LowRankTuning(rank=2, start="svd"),
    "ia3": ScalingTuning(),
    "bottleneck": BottleneckTuning(size=4),
    "prefix": PrefixTuning(tokens=3),
    "prompt": PromptTuning(tokens=3),
}
NEUTRAL = ("lora", "svd", "ia3", "bottleneck")


def attached(method: str, kind: str = "decoder", *, stirred: bool = True) -> Transformer:
    model = model_of(kind)
    adapters.attach(model, METHODS[method])
    if stirred:
        stir(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_it_begins_neutral_acts_and_is_put_aside(method: str, kind: str) -> None:
    inputs, before = inputs_of(kind), model_of(kind)(**inputs_of(kind)).logits
    model = attached(method, kind, stirred=False)
    first = model(**inputs).logits
    assert first.shape == before.shape
    # A factor of one and a sum with zero are exact.
    assert torch.equal(first, before) if method in NEUTRAL else gap(first, before) > 1e-6
    stir(model)
    assert gap(model(**inputs).logits, before) > 1e-3
    with adapters.unused(model):
        assert torch.equal(model(**inputs).logits, before)
    assert gap(model(**inputs).logits, before) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_only_it_is_trained_and_all_of_it(method: str, kind: str) -> None:
    model, inputs = attached(method, kind).train(), inputs_of(kind)
    labels = torch.tensor([1, 3]) if kind == "vision" else inputs.get("decoder_input_ids", inputs.get("input_ids"))
    model.loss(labels, **inputs).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".added." in name), name
        # An expert that no token visits has nothing to learn.
        assert parameter.grad is None or kind == "experts" or bool(parameter.grad.abs().max() > 0), name


@torch.no_grad()
def test_factors_are_those_of_the_weights_rows_and_columns() -> None:
    """(IA)^3 against a model whose weights were multiplied by hand."""
    model, other, inputs = attached("ia3"), model_of(), inputs_of("decoder")
    for mine, theirs in zip(model.decoder.blocks, other.decoder.blocks, strict=True):
        part = mine.attention.qkv.added[adapters.DEFAULT]
        theirs.attention.qkv.weight[64:96] *= part.factors["k"][:, None]
        theirs.attention.qkv.weight[96:128] *= part.factors["v"][:, None]
        if theirs.attention.qkv.bias is not None:
            theirs.attention.qkv.bias[64:96] *= part.factors["k"]
            theirs.attention.qkv.bias[96:128] *= part.factors["v"]
        theirs.feed_forward.down.weight *= mine.feed_forward.down.added[adapters.DEFAULT].factors["inputs"]
    found = model(**inputs).logits
    assert gap(found, other(**inputs).logits) < 1e-5
    adapters.use(model, {adapters.DEFAULT: 0.5})
    half = model(**inputs).logits
    assert gap(half, found) > 1e-3
    adapters.merge(model)
    assert gap(model(**inputs).logits, half) < 1e-5


@torch.no_grad()
def test_a_bottleneck_is_a_network_behind_both_parts() -> None:
    model, other, inputs = attached("bottleneck"), model_of(), inputs_of("decoder")
    for mine, theirs in zip(model.decoder.blocks, other.decoder.blocks, strict=True):
        for part, leaf in (("attention", "output"), ("feed_forward", "down")):
            added = getattr(getattr(mine, part), leaf).added[adapters.DEFAULT]

            def behind(module: object, args: object, y: Tensor, one: Any = added) -> Tensor:
                hidden = torch.relu(y @ one.down.weight.T + one.down.bias)
                return y + hidden @ one.up.weight.T + one.up.bias

            getattr(getattr(theirs, part), leaf).register_forward_hook(behind)
    assert gap(model(**inputs).logits, other(**inputs).logits) < 1e-5


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_prefix_is_keys_and_values_that_all_queries_see(is_causal: bool) -> None:
    """Against the formula in float64; a score bias does not move them."""
    model = attached("prefix").double()
    attention = next(one for one in model.modules() if isinstance(one, Attention))
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32).double()
    bias = torch.randn(1, 4, 5, 5).double()
    found = attention(x, Mask(is_causal=is_causal), None, bias)
    q, k, v = attention._heads(attention.qkv(x), None)
    own = attention.prefix.added[adapters.DEFAULT]
    k, v = (
        torch.cat((p.expand(2, -1, -1, -1), t), 1).repeat_interleave(2, 2) for p, t in ((own.keys, k), (own.values, v))
    )
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * attention.scale + F.pad(bias, (3, 0))
    if is_causal:
        scores = scores.masked_fill(~F.pad(torch.ones(5, 5).tril().bool(), (3, 0), value=True), -torch.inf)
    mixed = torch.einsum("bnts,bsnh->btnh", scores.softmax(-1), v).flatten(-2)
    assert torch.allclose(found, plain(attention.output)(mixed), atol=1e-12)


@pytest.mark.parametrize("kind", ["decoder", "encoder", "pair"])
@torch.no_grad()
def test_a_prompt_is_tokens_before_the_text(kind: str) -> None:
    """Against a model whose table has three rows more; with padding on the left too. RoPE sees distances alone."""
    model, inputs = attached("prompt", kind), inputs_of(kind)
    config = ModelConfig(**{**model.config.model_dump(), "vocab_size": 53})
    state = {name: tensor for name, tensor in model.state_dict().items() if ".added." not in name}
    for name in ("embeddings.tokens.weight", "decoder_embeddings.tokens.weight", "head.output.weight"):
        if name in state:
            state[name] = torch.cat(
                (state[name], model.prompt.added[adapters.DEFAULT].vectors if "tokens" in name else torch.zeros(3, 32))
            )
    if "head.output.bias" in state:
        state["head.output.bias"] = F.pad(state["head.output.bias"], (0, 3))
    other = Transformer(config).eval()
    if other.config.embeddings.tied:
        pytest.skip("one table")
    other.load_state_dict(state)
    front = torch.arange(50, 53).expand(2, 3)
    longer = {**inputs, "input_ids": torch.cat((front, inputs["input_ids"]), 1)}
    found, expected = model(**inputs).logits, other(**longer).logits
    if kind == "pair":
        # Its decoder reads the text's states alone, the other one's those of the prompt too.
        hidden = other._states(**longer).encoded[:, 3:]
        expected = other.head(
            other._run(other.decoder, inputs["decoder_input_ids"], None, None, None, None, None, hidden), None
        )
    else:
        expected = expected[:, 3:]
    assert gap(found, expected[..., :50]) < 1e-5
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    one = model(**{**inputs, "attention_mask": mask}).logits
    alone = {name: tensor[:1, 4:] if name == "input_ids" else tensor[:1] for name, tensor in inputs.items()}
    short = model(**alone).logits
    assert gap(one[:1, 4:] if kind != "pair" else one[:1], short) < 1e-5


@pytest.mark.parametrize("kind", ["decoder", "pair"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_token_by_token_with_a_cache_it_is_the_same(method: str, kind: str) -> None:
    model, inputs = attached(method, kind), inputs_of(kind)
    whole = model(**inputs).logits
    name = "decoder_input_ids" if kind == "pair" else "input_ids"
    ids = inputs[name]
    cache = model.new_cache(2, ids.shape[1])
    pieces = [
        model(**{**inputs, name: ids[:, begin:end]}, cache=cache).logits
        for begin, end in ((0, 3), (3, 4), (4, ids.shape[1]))
    ]
    assert gap(torch.cat(pieces, 1), whole) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_on_weights_in_codes_it_is_what_it_is_on_the_dequantized_ones(method: str) -> None:
    coded, inputs = in_codes(), inputs_of("decoder")
    weights = headway.nn.packed.unpacked(headway.nn.packed.weights_of(coded))
    floats = Transformer.of(coded.config, weights)
    found = []
    for model in (coded, floats):
        torch.manual_seed(3)
        adapters.attach(model, METHODS[method])
        stir(model)
        with headway.nn.packed.exact():
            found.append(model(**inputs).logits)
    assert gap(*found) < 1e-5


def is_norm(name: str) -> bool:
    return any(part in name for part in (".before.", ".inside.", ".after.", "norm."))


def test_partly_trained_the_base_keeps_its_weights() -> None:
    model, inputs = model_of(), inputs_of("decoder")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for codes in (False, True):
        base_model = in_codes() if codes else model
        partly = tuned(base_model, base_model.config, PartialTuning(layers=1), "")
        names = set(partly.own_state())
        assert all(".blocks.1." in name or is_norm(name) or name.endswith(".bias") for name in names), names
        assert {name for name in partly.state_dict() if ".blocks.1." in name} <= names and any(map(is_norm, names))
        partly.loss(inputs["input_ids"], input_ids=inputs["input_ids"]).backward()
        with torch.no_grad():
            for parameter in partly.parameters():
                parameter -= 0.1 * parameter.grad if parameter.grad is not None else 0.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    alone = tuned(model, model.config, PartialTuning(layers=0, biases=False), "")
    assert all(map(is_norm, alone.own_state()))


def test_what_cannot_stand_together_or_be_merged_is_refused() -> None:
    model = attached("prefix")
    adapters.attach(model, METHODS["lora"], "two")
    adapters.use(model, {adapters.DEFAULT: 1.0, "two": 0.5})  # one stands in attention, the other in its layers
    adapters.attach(model, METHODS["prefix"], "three")
    with pytest.raises(ConfigError, match="a prefix or a prompt, weighted or beside"):
        adapters.use(model, {adapters.DEFAULT: 1.0, "three": 1.0})
    with pytest.raises(ConfigError, match="weighted"):
        adapters.use(model, {"three": 0.5})
    with pytest.raises(ConfigError, match=r"has a prefix, which no weight can hold"):
        adapters.use(model, {"three": 1.0})
        adapters.merge(model)
    with pytest.raises(ConfigError, match=r"'q', which is in no layer.*all, attention, feed_forward, k, v, down"):
        adapters.attach(model_of(), ScalingTuning(targets=("q",)))
    with pytest.raises(ConfigError, match="an adapter of the kind bottleneck"):
        peft_folder.write(attached("bottleneck"), Path("nowhere"), None)
    documents = torch.zeros(2, 9, dtype=torch.long)
    with pytest.raises(ConfigError, match="a prompt before packed documents"):
        attached("prompt")(input_ids=inputs_of("decoder")["input_ids"], documents=documents)


@pytest.mark.parametrize("method", ["ia3", "bottleneck", "prefix", "prompt", "partial", "full"])
def test_a_run_of_it_is_read_again(base: Path, tmp_path: Path, method: str) -> None:
    # The base has room for 16 positions, a prompt's among them.
    more = {"data": {"path": str(tmp_path / "text.txt"), "context": 12, "val_fraction": 0.2, "isolate": False}}
    size = {"tokens": 4} if method in ("prefix", "prompt") else {}
    run = tuned_run(tmp_path, base, tuning={"type": method, **size}, **more)
    loaded, before = headway.load(run), headway.load(base)
    ids = torch.tensor([list(b"The quick ")])
    with torch.no_grad():
        found = loaded.model(input_ids=ids).logits
        assert gap(found, before.model(input_ids=ids).logits) > 1e-4
    held = read_tensors(newest_good(run).path / "model.safetensors")
    if method == "full":
        assert set(held) == set(before.model.state_dict())
        return
    wanted = ".added." if method != "partial" else ""
    assert held and all(wanted in name for name in held) and len(held) < len(before.model.state_dict())
    if method in ("bottleneck", "prefix", "prompt"):
        with pytest.raises(ConfigError, match="which no weight can hold"):
            saving.save(loaded, tmp_path / "merged", "headway", merge=True)
        return
    saving.save(loaded, tmp_path / "merged", "headway", merge=method == "ia3")
    with torch.no_grad():
        assert gap(headway.load(tmp_path / "merged").model(input_ids=ids).logits, found) < 1e-5


def test_leading_directions_are_those_of_the_weight() -> None:
    model = attached("svd", stirred=False)
    layer = model.decoder.blocks[0].attention.output
    A = layer.added[adapters.DEFAULT].A["output"].detach()
    assert torch.allclose(A @ A.T, torch.eye(2) / 3, atol=1e-5)
    kept = layer.base.weight.detach() @ (A.T * 3**0.5)
    assert torch.allclose(kept.norm(dim=0), torch.linalg.svdvals(layer.base.weight.detach())[:2], rtol=1e-4)
    assert isinstance(layer.base, nn.Linear)
