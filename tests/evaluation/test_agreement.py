"""Two forms of one model: equal ones agree, each damage fails in its own row, the figures are those of a formula."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

import reference

from headway.checkpoints.gguf_model import gguf_chunks
from headway.checkpoints.hub_folder import read_folder
from headway.config import ModelConfig, with_fields
from headway.errors import ConfigError, InputError
from headway.evaluation import agreement
from headway.evaluation.agreement import EXACT, PROMPTS, ROUGH, Agreement, agree, hard_strings
from headway.generation import GenerationOptions, generate
from headway.loading import Loaded, load
from headway.nn import Transformer
from headway.nn.packed import PackedLinear
from headway.strict import dump_json
from headway.text import Tokenizer, train_tokenizer
from headway.text.gguf_vocab import to_gguf

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>")


@functools.cache
def trained() -> str:
    return train_tokenizer([*PROMPTS, *hard_strings()], "bpe", 400, special_tokens=SPECIALS).to_json()


def tokenizer(template: str | None = TEMPLATE, swap: tuple[str, str] = ("a", "a")) -> Tokenizer:
    """With this template, and the ids of two tokens swapped."""
    tree = json.loads(trained())
    vocab, (x, y) = tree["model"]["vocab"], swap
    vocab[x], vocab[y] = vocab[y], vocab[x]
    for entry in tree["added_tokens"]:
        entry["id"] = vocab[entry["content"]]
    tree["added_tokens"].sort(key=lambda entry: entry["id"])
    return Tokenizer(tree, "tokenizer", {"chat_template": template})


@functools.cache
def words() -> Tokenizer:
    return tokenizer()


def drawn(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose every parameter is drawn wide enough for distributions far from uniform."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter[0].numel() ** -0.5
            parameter.normal_(float(parameter.ndim == 1), spread)
    return model.eval().requires_grad_(False)


SIZES: dict[str, Any] = {"d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "max_len": 64}


def form(**fields: Any) -> Loaded:
    """A decoder with the tokenizer."""
    config = ModelConfig(**{**SIZES, "vocab_size": words().vocab_size, "tokens": {"eos": words().eos_id}, **fields})
    return Loaded(drawn(config), words(), config, Path("a"))


def changed(one: Loaded, weights: Mapping[str, Tensor] | None = None, **attributes: Any) -> Loaded:
    """A copy with other weights, config or tokenizer."""
    config = attributes.get("config", one.config)
    state = {name: value.clone() for name, value in one.model.state_dict().items()} | dict(weights or {})
    model = Transformer(config).eval()
    wanted = model.state_dict()
    model.load_state_dict({name: value for name, value in state.items() if name in wanted})
    return dataclasses.replace(one, model=model, path=Path("b"), **attributes)


def row(found: Agreement, name: str) -> agreement.Row:
    return next(row for row in found.rows if row.name == name)


def failed(found: Agreement) -> list[str]:
    return [row.name for row in found.rows if row.passed is False]


# --- equal forms -------------------------------------------------------------------------------------------------

# One row of every kind of model, head and front end.
KINDS = {
    (r.family.fixed["kind"], r.family.heads[r.architecture].fields["head.type"], r.model_type == "whisper"): r
    for r in reversed([r for r in reference.rows() if not r.variant])
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}{'-audio' * kind[2]}")
def test_every_kind_of_model(kind, tmp_path):
    """A Hugging Face folder against its own copy, and against one with a changed weight."""
    reference.saved(KINDS[kind], tmp_path)
    a, b = load(tmp_path), load(tmp_path)
    found = agree(a, b, max_tokens=5)
    assert found.agrees and found.tolerance == EXACT and not found.config_differences
    names = [row.name for row in found.rows]
    assert names[0] == "logits" and ("greedy text" in names) == (kind[1] == "causal-lm")
    assert all(row.difference == 0 and row.count >= 4 for row in found.rows)
    last = [name for name in b.model.state_dict() if name.endswith("feed_forward.down.weight")][-1]
    with torch.no_grad():
        b.model.get_parameter(last)[3] += 0.5
    found = agree(a, b, max_tokens=5)
    assert found.first is not None and found.first.name == "logits" and found.first.difference > 10 * EXACT


def test_the_table_of_kinds_is_not_empty():
    assert {kind for kind, _, _ in KINDS} == {"decoder", "encoder", "encoder-decoder", "vision"} and len(KINDS) >= 9


@functools.cache
def published() -> tuple[Loaded, Any]:
    """A Llama as transformers makes it, read by us, with the tokenizer; and its checkpoint."""
    import tempfile

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    reference_row = next(r for r in reference.rows() if r.id == "LlamaForCausalLM")
    ids = {"vocab_size": words().vocab_size, "eos_token_id": words().eos_id, "bos_token_id": None}
    keys = reference.config_keys(reference_row) | ids | {"pad_token_id": None, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**keys))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.3)
    place = tempfile.TemporaryDirectory()
    model.save_pretrained(place.name)
    words().save(Path(place.name))
    KEPT.append(place)
    return load(place.name), read_folder(Path(place.name))


KEPT: list[Any] = []


def gguf(path: Path, kind: str, **vocabulary: object) -> Path:
    checkpoint = published()[1]
    said = to_gguf(words()) | vocabulary
    parts = gguf_chunks(checkpoint.config, checkpoint.weights, checkpoint.family, kind=kind, vocabulary=said)
    path.write_bytes(b"".join(bytes(part) for part in parts))
    return path


def test_a_folder_and_its_gguf_file(tmp_path):
    a = published()[0]
    b = load(gguf(tmp_path / "model.gguf", "F32"))
    found = agree(a, b)
    assert found.agrees and not failed(found)
    assert [row.name for row in found.rows] == [
        "tokens", "vocabulary", "chat template", "logits", "top-1", "greedy text",
    ]  # fmt: skip
    assert row(found, "logits").difference == 0 and row(found, "greedy text").count > 100
    assert row(found, "vocabulary").count == words().vocab_size and row(found, "chat template").count == 3


def test_blocks_and_16_bits(tmp_path):
    """Packed weights equal their dequantized model; 16 bits get the wider tolerance only beside another dtype."""
    a = published()[0]
    path = gguf(tmp_path / "q8.gguf", "Q8_0")
    packed, plain = load(path), load(path, dtype=torch.float32)
    assert any(isinstance(module, PackedLinear) for module in packed.model.modules())
    found = agree(packed, plain, max_tokens=8)
    assert found.agrees and found.tolerance == EXACT
    assert failed(agree(a, packed, PROMPTS[:4], max_tokens=3))[0] == "logits", "quantization is a difference"
    assert agree(a, packed, max_tokens=3, tolerance=0.3).agrees
    half = load(gguf(tmp_path / "f16.gguf", "F16"))
    found = agree(a, half, max_tokens=8)
    assert found.agrees and found.tolerance == ROUGH[torch.float16] and row(found, "logits").difference > EXACT
    assert agree(half, half, PROMPTS[:4], max_tokens=3).tolerance == EXACT
    assert not agree(a, half, PROMPTS[:4], max_tokens=3, tolerance=EXACT).agrees


# --- damage ------------------------------------------------------------------------------------------------------


def test_a_changed_weight_row():
    a = form()
    name = "decoder.blocks.1.feed_forward.down.weight"
    weight = a.model.get_parameter(name).clone()
    weight[7] += 0.1
    found = agree(a, changed(a, {name: weight}), max_tokens=8)
    assert failed(found)[0] == "logits" and "input 1, position 1, logit" in found.first.detail


def test_a_swapped_token():
    a = form()
    found = agree(a, changed(a, tokenizer=tokenizer(swap=("a", "e"))), max_tokens=4)
    assert failed(found) == ["tokens", "vocabulary", "chat template"], "the models are still the same"
    assert "'Once upon a time there was a l...'" in found.first.detail and "against" in found.first.detail
    ids = words().encode("a") + words().encode("e")
    assert f"id {min(ids)}: " in row(found, "vocabulary").detail and row(found, "vocabulary").difference == 2


def test_a_swapped_token_that_no_text_shows():
    """The table of all ids sees what 200 strings cannot."""
    a = form()
    seen = {i for text in (*PROMPTS, *hard_strings()) for i in words().encode_input(text)}
    swap = ("<|system|>", "<|assistant|>")
    assert seen.isdisjoint(words().special_id(name) for name in swap)
    plain = dataclasses.replace(a, tokenizer=tokenizer(None))
    found = agree(plain, changed(plain, tokenizer=tokenizer(None, swap)), max_tokens=2)
    assert failed(found) == ["vocabulary"] and row(found, "vocabulary").difference == 2


@pytest.mark.parametrize(
    ("template", "detail"),
    [
        (TEMPLATE.replace("\n", ""), "conversation 1, character 60: '\\n<|assistant|>' against '<|assistant|>'"),
        (None, "conversation 1, character 1: '<|user|>What is the tallest mo...' against ''"),
        (TEMPLATE.replace("<|assistant|>{% endif", "<{{ '|' }}assistant|>{% endif"), "conversation 1, token "),
    ],
)
def test_another_template(template, detail):
    """In text, missing, and equal in text but not in tokens: what was a control token is spelled out."""
    a = form()
    b = changed(a, tokenizer=tokenizer(template))
    found = agree(a, b, max_tokens=2)
    assert failed(found) == ["chat template"] and found.first.detail.startswith(detail), found.first.detail
    assert agree(b, b, max_tokens=2).agrees


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"positions": {"type": "rope", "theta": 20000.0}}, ["positions.theta"]),
        ({"n_layers": 2}, ["n_layers"]),
        ({"norm": {"type": "rmsnorm", "eps": 1e-2}}, ["norm.eps"]),
        ({"attention": {"pattern": ["sliding"], "window": 3}}, ["attention.pattern", "attention.window"]),
    ],
    ids=["theta", "layer", "eps", "window"],
)
def test_another_config(fields, names):
    a = form()
    found = agree(a, changed(a, config=with_fields(a.config, **fields)), max_tokens=4)
    assert failed(found)[0] == "logits" and list(found.config_differences) == names
    assert found.config_differences[names[0]][0] == {"positions.theta": 10000.0, "n_layers": 3}.get(
        names[0], found.config_differences[names[0]][0]
    )


def test_a_field_of_training_is_no_difference():
    a = form()
    found = agree(a, changed(a, config=with_fields(a.config, dropout=0.1, init={"std": 0.5})), max_tokens=2)
    assert found.agrees and not found.config_differences


def test_another_end_token():
    """B ends where A goes on, after the same tokens."""
    a = form()
    said = generate(a.model, a.tokenizer, PROMPTS[0], GenerationOptions(temperature=0, max_tokens=4))[0].token_ids
    tokens = a.config.tokens.model_copy(update={"ends": (said[2],)})
    b = changed(a, config=with_fields(a.config, tokens=tokens))
    found = agree(a, b, PROMPTS[:1], max_tokens=6)
    assert failed(found) == ["greedy text"] and "ends the text of B alone" in found.first.detail
    place = said.index(said[2]) + 1
    assert (found.first.figures["token"], found.first.figures["a"]) == (place, said[2])
    assert failed(agree(b, a, PROMPTS[:1], max_tokens=6)) == ["greedy text"]


def test_logits_that_are_no_numbers():
    a = form()
    name = "decoder.blocks.2.feed_forward.down.weight"
    b = changed(a, {name: torch.full_like(a.model.get_parameter(name), float("nan"))})
    for one, other in ((a, b), (b, a), (b, b)):
        found = agree(one, other, max_tokens=3)
        assert failed(found)[0] == "logits" and found.first.difference is None and "nan" in found.first.detail
        dump_json(dataclasses.asdict(found))


# --- what cannot be compared -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"d_model": 16}, "d_model 16; expected 32 as in a"),
        ({"kind": "encoder", "attention": "full"}, "kind encoder; expected decoder"),
        ({"head": {"type": "sequence-classification"}}, "head.type sequence-classification; expected causal-lm"),
        ({"vocab_size": 300}, "vocab_size 300"),
    ],
)
def test_models_of_different_kinds_or_sizes(fields, part):
    a, b = form(), form(**fields)
    b = dataclasses.replace(b, path=Path("b"))
    with pytest.raises(InputError, match=part) as caught:
        agree(a, b)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"tolerance": -1.0}, {"tolerance": float("nan")}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        agree(form(), form(), **options)


def test_rows_that_only_pad_the_vocabulary():
    """A larger table is the same model, whatever its rows say; without a tokenizer nobody knows that."""
    a = form()
    sizes = words().vocab_size, words().vocab_size + 56
    tables = {n: v for n, v in a.model.state_dict().items() if v.shape[:1] == sizes[:1]}
    assert len(tables) == 2
    noise = {n: torch.cat((v, 100 * torch.randn(56, v.shape[1]))) for n, v in tables.items()}
    b = changed(a, noise, config=with_fields(a.config, vocab_size=sizes[1]))
    for one, other in ((a, b), (b, a), (b, b)):
        found = agree(one, other, max_tokens=6)
        assert found.agrees and row(found, "logits").difference == 0
    assert max(row(found, "greedy text").figures.values()) == 0
    mute = [dataclasses.replace(one, tokenizer=None) for one in (a, b)]
    with pytest.raises(InputError, match=f"vocab_size {sizes[1]}; expected {sizes[0]}"):
        agree(*mute)


def test_a_tokenizer_on_one_side_only():
    a = form()
    b = changed(a, tokenizer=None)
    found, other = agree(a, b, max_tokens=3), agree(b, a, max_tokens=3)
    assert found.agrees and other.agrees
    first = found.rows[0]
    assert (first.name, first.passed, first.detail) == ("tokens", None, "B has no tokenizer")
    assert other.rows[0].detail == "A has no tokenizer" and row(found, "greedy text").count > 20


def test_prompts_of_ones_own():
    a = form()
    b = changed(a)
    long = "many words " * 40
    found = agree(a, b, ["one", "", long], max_tokens=8)
    assert found.notes == ["prompts cut to the context of 64: 3", "prompts without a token, which are not run: 1"]
    tokens = row(found, "tokens").count
    assert tokens == 3 + len(hard_strings()) and 200 <= len(hard_strings()) <= 240 and len(PROMPTS) == 20
    with pytest.raises(InputError, match="no token in 2 of them"):
        agree(a, b, ["", ""])


# --- the figures -------------------------------------------------------------------------------------------------


def by_hand(a: Loaded, b: Loaded, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """Greedy texts by whole forwards without a cache; the first token that differs."""
    for number, ids in enumerate(prompts, 1):
        said: list[int] = []
        for step in range(1, min(steps, a.config.max_len - len(ids)) + 1):
            with torch.no_grad():
                x, y = (one.model(torch.tensor([[*ids, *said]])).logits[0, -1].double().numpy() for one in (a, b))
            p, q = int(x.argmax()), int(y.argmax())
            if p != q:
                return {"prompt": number, "token": step, "a": p, "b": q, "a_gap": x[p] - x[q], "b_gap": y[q] - y[p]}
            if p == a.config.tokens.eos:
                break
            said.append(p)
    return {}


@pytest.mark.parametrize("spread", [0.3, 0.1, 0.03, 0.01])
def test_the_first_differing_token_is_the_true_one(spread):
    a = form()
    name = "decoder.blocks.2.attention.out.weight"
    name = name if name in a.model.state_dict() else "decoder.blocks.2.feed_forward.down.weight"
    torch.manual_seed(1)
    weight = a.model.get_parameter(name)
    b = changed(a, {name: weight + spread * torch.randn_like(weight)})
    prompts = list(PROMPTS[:12])
    found = agree(a, b, prompts, max_tokens=12, tolerance=1e-6)
    expected = by_hand(a, b, [words().encode_input(text) for text in prompts], 12)
    figures = row(found, "greedy text").figures
    assert expected and {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    texts = [words().decode([expected[side]], skip_special=False) for side in "ab"]
    assert [figures["a_text"], figures["b_text"]] == texts
    assert (
        f"prompt {expected['prompt']}, token {expected['token']}: {expected['a']} " in row(found, "greedy text").detail
    )


@pytest.mark.parametrize("architecture", ["T5ForConditionalGeneration", "WhisperForConditionalGeneration"])
def test_the_answers_of_encoder_decoders_are_the_true_ones(architecture, tmp_path):
    """Of text and of sound, by hand: whole forwards on what both heard, without a session or a cache."""
    reference.saved(next(r for r in reference.rows() if r.id == architecture), tmp_path)
    a, b = load(tmp_path), load(tmp_path)
    with torch.no_grad():
        weight = b.model.decoder.blocks[1].feed_forward.down.weight
        weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    given: list[dict[str, Tensor]] = []
    for one in agreement._inputs(a, b, (), GenerationOptions(max_tokens=7), None, []):
        ids = torch.tensor([one.prompt.ids])
        given.append({"input_ids": ids} if one.signal is None else {"input_features": one.signal})
    start, worst, differing = a.config.tokens.decoder_start or 0, 0.0, list[tuple[int, int, int, int]]()
    for number, inputs in enumerate(given, 1):
        said: list[int] = []
        for step in range(1, 8):
            with torch.no_grad():
                ids = torch.tensor([[start, *said]])
                x, y = (one.model(**inputs, decoder_input_ids=ids).logits[0, -1] for one in (a, b))
            worst = max(worst, float((x - y).abs().max()))
            said.append(int(x.argmax()))
            if said[-1] != int(y.argmax()):
                differing.append((number, step, said[-1], int(y.argmax())))
    assert differing
    found = agree(a, b, max_tokens=7, tolerance=1e-7)
    assert row(found, "logits").figures["max_absolute"] == pytest.approx(worst, rel=1e-4)
    figures = row(found, "greedy text").figures
    assert tuple(figures[name] for name in ("prompt", "token", "a", "b")) == differing[0]
    assert row(found, "greedy text").difference == len({number for number, *_ in differing})


def test_figures_of_logits_are_those_of_the_formula(tmp_path):
    """Every position of an encoder, in numpy and float64."""
    reference.saved(next(r for r in reference.rows() if r.id == "BertForMaskedLM"), tmp_path)
    a, b = load(tmp_path), load(tmp_path)
    with torch.no_grad():
        weight = b.model.head.output.weight
        weight += 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    hook = a.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    found = agree(a, b)
    hook.remove()
    absolute, relative, kls, same = [], [], [], []
    for ids in seen:
        with torch.no_grad():
            x, y = (model(ids).logits[0].double().numpy() for model in (a.model, b.model))
        absolute.append(np.abs(x - y).max())
        relative.append(np.abs(x - y).max() / np.abs(x).max())
        log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (x, y))
        kls.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        same.append(x.argmax(-1) == y.argmax(-1))
    logits, top = row(found, "logits"), row(found, "top-1")
    kl = np.concatenate(kls)
    assert logits.difference == pytest.approx(max(relative)) and logits.figures["max_absolute"] == max(absolute)
    assert logits.figures["mean_kl"] == pytest.approx(kl.mean()) and logits.figures["max_kl"] == pytest.approx(kl.max())
    assert top.figures["agreement"] == np.concatenate(same).mean() < 1
    assert logits.count == top.count == sum(ids.shape[1] for ids in seen)


def test_ties_are_counted_apart():
    """Two tokens that A holds nearly equal: the other choice is no disagreement, unless less is allowed."""
    a = form()
    weight = a.model.head.output.weight.clone()
    best = generate(a.model, a.tokenizer, PROMPTS[0], GenerationOptions(temperature=0, max_tokens=1))[0].token_ids[0]
    other = (best + 1) % words().vocab_size
    one, two = weight.clone(), weight.clone()
    one[other], two[other] = weight[best] * (1 - 1e-6), weight[best] * (1 + 1e-6)
    x, y = changed(a, {"head.output.weight": one}), changed(a, {"head.output.weight": two})
    found = agree(x, y, PROMPTS[:1], max_tokens=1)
    assert found.agrees
    assert row(found, "top-1").figures["near_ties"] >= 1 and row(found, "top-1").figures["agreement"] < 1
    assert row(found, "greedy text").figures == {"near_ties": 1}
    strict = agree(x, y, PROMPTS[:1], max_tokens=1, tolerance=1e-8)
    assert {"top-1", "greedy text"} <= {*failed(strict)} and strict.rows[-1].figures["near_ties"] == 0


def test_batches_do_not_matter(monkeypatch):
    """Prompts read together or one by one: the same positions, the same tokens."""
    a = form()
    b = changed(a, {"head.output.weight": a.model.head.output.weight * 1.01})
    together = agree(a, b, max_tokens=6)
    monkeypatch.setattr(agreement, "_BATCH", 1)
    monkeypatch.setattr(agreement, "_BLOCK", 1)
    alone = agree(a, b, max_tokens=6)
    assert [row.count for row in together.rows] == [row.count for row in alone.rows]
    assert row(alone, "logits").difference == pytest.approx(row(together, "logits").difference, rel=1e-4)
    assert row(alone, "greedy text").figures["near_ties"] == row(together, "greedy text").figures["near_ties"]


@pytest.mark.parametrize("positions", ["rope", "learned", "alibi"])
def test_rows_with_less_room_end_before_the_others(positions):
    """A prompt as long as the context allows is batched with short ones and does not run beyond its end."""
    a = form(positions=positions, max_len=24)
    found = agree(a, changed(a), ["x", "many more words than that, " * 5], max_tokens=20)
    assert found.agrees and row(found, "greedy text").count <= 20 + 12


def test_deterministic_and_without_side_effects():
    a = form()
    b = changed(a, {"head.output.weight": a.model.head.output.weight * 1.01})
    b.model.train()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    before = copy.deepcopy(a.model.state_dict())
    first, second = agree(a, b, max_tokens=4), agree(a, b, max_tokens=4)
    assert first == second and torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert b.model.training and not a.model.training and b.model.head.output.weight.requires_grad
    assert all(torch.equal(before[name], value) for name, value in a.model.state_dict().items())


def test_progress_is_told():
    told: list[tuple[str, int, int]] = []
    a = form()
    agree(a, changed(a), PROMPTS[:3], max_tokens=3, progress=lambda *step: told.append(step))
    assert told and {what for what, _, _ in told} == {"logits and greedy text"}
    assert all(x[1] < y[1] for x, y in itertools.pairwise(told)) and told[-1][1] <= told[-1][2] == 9
