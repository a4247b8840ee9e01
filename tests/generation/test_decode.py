"""The decoding loop: batch = single = uncached, seeds, endings, limits, log-probabilities, and every G row."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from generation_toys import Scripted, byte_tokenizer, toy_config, toy_model

from headway.errors import ConfigError, DivergedError, InputError
from headway.generation import Generation, GenerationOptions, generate, session
from headway.generation.prompts import prepare
from headway.nn import Transformer
from headway.text import train_tokenizer

SCALED = {"factor": 2.0, "original_len": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {},
    "none": {"positions": "none"},
    "sinusoidal": {"positions": "sinusoidal"},
    "learned": {"positions": "learned"},
    "relative": {"positions": {"type": "relative", "buckets": 8, "max_distance": 20}},
    "alibi": {"positions": "alibi"},
    "rope-interleaved": {"positions": {"type": "rope", "layout": "interleaved", "fraction": 0.5}},
    "rope-dynamic": {"positions": {"type": "rope", "scaling": {"type": "dynamic", **SCALED}}},
    "rope-longrope": {
        "positions": {
            "type": "rope",
            "scaling": {"type": "longrope", "short": [1.0] * 4, "long": [1.0, 2.0, 3.0, 4.0], "original_len": 16},
        }
    },
    "grouped": {"n_heads": 4, "n_kv_heads": 2, "norm": "layernorm", "placement": "sandwich"},
    "sliding": {"attention": {"pattern": ["sliding", "causal"], "window": 5}},
    "sliding-alibi": {"attention": {"pattern": ["sliding"], "window": 3}, "positions": "alibi"},
    "softcap": {"attention": {"softcap": 5.0, "qk_norm": "rmsnorm"}, "residual": "parallel"},
    "experts": {"feed_forward": {"activation": "silu", "gated": True, "experts": {"experts": 4, "top_k": 2}}},
    "pair": {"kind": "encoder-decoder", "tokens": {"decoder_start": 256}},
    "pair-relative": {"kind": "encoder-decoder", "tokens": {"decoder_start": 0}, "positions": "relative"},
}
PROMPTS = ["hello", "", "a much longer prompt than that", "x", "hello", "日本"]
GREEDY = {"temperature": 0.0, "max_tokens": 20}
SAMPLED = {"temperature": 1.2, "seed": 7, "max_tokens": 20, "repetition_penalty": 1.1, "frequency_penalty": 0.3}


def run(model: Transformer, prompts: Any, on_text: Any = None, **options: Any) -> list[Generation]:
    return generate(model, byte_tokenizer(), prompts, GenerationOptions(**options), on_text)


def same(a: list[Generation], b: list[Generation]) -> None:
    assert [x.token_ids for x in a] == [x.token_ids for x in b]
    assert [x.text for x in a] == [x.text for x in b]
    assert [x.finish_reason for x in a] == [x.finish_reason for x in b]


# --- one by one, together, with and without the cache ---------------------------------------------------------------


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_batch_answers_as_one_by_one(name: str, options: dict[str, Any]) -> None:
    model = toy_model(**VARIANTS[name])
    together = run(model, PROMPTS, **options)
    same(together, [answer for prompt in PROMPTS for answer in run(model, [prompt], **options)])
    same(together, run(model, PROMPTS, batch_size=4, **options))
    assert len({tuple(answer.token_ids) for answer in together}) >= 4  # the prompts matter


@pytest.mark.parametrize("name", list(VARIANTS))
def test_cached_decoding_equals_the_full_forward(name: str) -> None:
    model = toy_model(**VARIANTS[name])
    prompts = ["hello", "a longer one"]
    for prompt, answer in zip(prompts, run(model, prompts, logprobs=0, **GREEDY), strict=True):
        ids = byte_tokenizer().encode(prompt)
        start = [model.config.tokens.decoder_start] if model.is_pair else ids
        whole = torch.tensor([[*start, *answer.token_ids]])
        with torch.no_grad():
            if model.is_pair:
                logits = model(torch.tensor([ids]), decoder_input_ids=whole[:, :-1]).logits
            elif name in ("rope-dynamic", "rope-longrope"):
                # Their angles depend on the length that the sequence was declared for: pad the forward to it.
                real = torch.ones(1, len(ids) + 20, dtype=torch.long)
                padded = torch.zeros(1, len(ids) + 20, dtype=torch.long)
                padded[:, : whole.shape[1]] = whole
                logits = model(padded, attention_mask=real).logits[:, : whole.shape[1] - 1]
            else:
                logits = model(whole[:, :-1]).logits
        log_p = logits[0, len(start) - 1 :].log_softmax(-1)
        assert log_p.argmax(-1).tolist() == answer.token_ids
        assert answer.logprobs is not None
        expected = log_p.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor([row.logprob for row in answer.logprobs], dtype=torch.float64), expected, rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_prompt_in_parts_is_the_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of unequal length end in different parts; in float64 the order of the sums does not show."""
    model = toy_model(**VARIANTS[name])
    ready = [prepare(text, "prompt", model.config, byte_tokenizer(), GenerationOptions()) for text in PROMPTS if text]
    found = {}
    for size in (512, 4, 1):
        monkeypatch.setattr(session, "CHUNK", size)
        with session.inference(model):
            for everywhere in (False, True):
                one = session.Session(model, ready, 257)
                found[size, everywhere] = one.last(one.prefill(everywhere=everywhere))
                assert torch.equal(one.cache.lengths, found.setdefault("lengths", one.cache.lengths))
    for place, logits in found.items():
        if place != "lengths":
            assert torch.allclose(logits, found[512, True], rtol=0, atol=1e-10), place


@pytest.mark.parametrize("name", ["rope", "learned", "alibi", "rope-dynamic", "sliding"])
def test_a_text_goes_on_where_the_context_is_full(name: str) -> None:
    """Each time as if its first tokens and its end had been the prompt; with neighbours or without, guessing or not."""
    model, context, sinks = toy_model(**VARIANTS[name]), 64, 3
    prompts = [[7, 8, 9, 10, 11], [5] * 30, list(range(60))]
    options: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "context_shift": True, "sinks": sinks}
    found = run(model, prompts, max_tokens=150, **options)
    same(found, [run(model, [prompt], max_tokens=150, **options)[0] for prompt in prompts])
    same(found[:1], run(model, prompts[:1], max_tokens=150, lookup=3, **options))
    for prompt, answer in zip(prompts, found, strict=True):
        assert len(answer.token_ids) == 150 and answer.finish_reason == "length"
        ids, left, known = prompt, 150, list[int]()
        while left:
            # Lengths that angles depend on are those of the whole: as many tokens are asked for, and fewer used.
            more = {"context_shift": name == "rope-dynamic", "max_tokens": left}
            part = run(model, [ids], **{**options, **more})[0].token_ids[: context - len(ids)]
            known, left, ids = known + part, left - len(part), [*ids, *part]
            ids = ids[:sinks] + ids[-(context // 2 - sinks) :]
        assert answer.token_ids == known


def test_a_context_that_cannot_shift() -> None:
    options = GenerationOptions(context_shift=True)
    with pytest.raises(ConfigError, match="context_shift"):
        generate(toy_model(**VARIANTS["pair"]), byte_tokenizer(), "x", options)
    with pytest.raises(ConfigError, match="memory"):
        generate(toy_model(), byte_tokenizer(), "x", options, memory=session.Memory())


@pytest.mark.parametrize("name", ["rope", "sliding", "pair", "grouped"])
@pytest.mark.parametrize("kv_dtype,most", [("float16", 1e-2), ("int8", 0.3)])
def test_keys_in_fewer_bits_move_the_logits_a_little(name: str, kv_dtype: str, most: float) -> None:
    """These toys have logits of some tens. A memory of another sort of keys is not gone on with."""
    model, known = toy_model(**VARIANTS[name]), {}
    ready = prepare([5, 9, 200, 3, 77, 18, 54, 2], "prompt", model.config, byte_tokenizer(), GenerationOptions())
    for kind in ("model", kv_dtype):
        with session.inference(model):
            one = session.Session(model, [ready], 257, kv_dtype=kind)
            one.prefill()
            known[kind] = torch.cat([one.next(torch.tensor([token])) for token in (7, 8, 9)])
    gap = float((known[kv_dtype] - known["model"]).abs().max() / known["model"].abs().max())
    assert 1e-9 < gap < most
    assert one.cache.dtype == getattr(torch, kv_dtype)
    if name == "rope":
        memory = session.Memory()
        for kind, reused in (("model", 0), ("model", 7), (kv_dtype, 0), (kv_dtype, 7)):
            options = GenerationOptions(**GREEDY, kv_dtype=kind)
            generate(model, byte_tokenizer(), [ready.ids], options, memory=memory)
            assert memory.reused == reused


def test_samples_of_a_prompt_equal_separate_rows() -> None:
    """n samples share one prefill; each is what its own seed and number give."""
    model = toy_model()
    many = run(model, ["hello", "you there"], n=4, **SAMPLED)
    assert [(x.prompt, x.sample) for x in many] == [(p, s) for p in range(2) for s in range(4)]
    assert len({x.text for x in many}) == 8
    same(run(model, ["hello"], n=2, **SAMPLED), many[:2])
    same(run(model, ["you there"], n=1, **SAMPLED), many[4:5])
    same(run(model, ["hello", "you there"], n=4, batch_size=1, **SAMPLED), many)


@pytest.mark.fault("G17")
def test_seeds() -> None:
    model = toy_model()
    fields = {**SAMPLED, "seed": None}
    first = run(model, ["hello"], **fields)[0]
    assert first.seed is not None
    assert run(model, ["hello"], **{**fields, "seed": first.seed})[0].text == first.text
    assert run(model, ["hello"], **fields)[0].text != first.text
    assert run(model, ["hello"], **GREEDY)[0].seed is None


@pytest.mark.fault("G5")
def test_tiny_temperature_is_greedy() -> None:
    model = toy_model()
    same(run(model, PROMPTS, **GREEDY), run(model, PROMPTS, **{**GREEDY, "temperature": 1e-9, "seed": 3}))


# --- endings --------------------------------------------------------------------------------------------------------


def scripted(text: str | list[int], prompt: str = "p", **options: Any) -> tuple[Generation, str]:
    script = byte_tokenizer().encode(text) if isinstance(text, str) else text
    shown: list[str] = []
    model = Scripted(script, len(prompt))
    [answer] = run(model, prompt, lambda _, part: shown.append(part), **{"temperature": 0.0, **options})
    return answer, "".join(shown)


def test_ends_at_the_end_token() -> None:
    answer, shown = scripted([104, 105, 256, 33])
    assert (answer.text, shown, answer.finish_reason) == ("hi", "hi", "stop")
    assert answer.token_ids == [104, 105, 256]
    assert answer.generated_tokens == 3
    assert scripted([104, 256, 105, 33], ignore_eos=True, max_tokens=4)[0].text == "hi!"
    assert scripted([104, 105, 33], stop_ids=[105])[0].text == "h"


def test_stop_string_across_tokens() -> None:
    answer, shown = scripted("hello END of it", stop=["END"])
    assert (answer.text, shown, answer.finish_reason) == ("hello ", "hello ", "stop")
    assert answer.generated_tokens == len("hello END")
    answer, shown = scripted("hello EN", stop=["END"], max_tokens=8)
    assert (answer.text, shown, answer.finish_reason) == ("hello EN", "hello EN", "length")


def test_min_tokens_rules_out_early_ends() -> None:
    model = toy_model()
    with torch.no_grad():
        model.head.output.weight.zero_()
        model.head.output.weight[256, :] = 1e-9  # the end token wins or ties everywhere
    ends = run(model, "p", temperature=0.0, logit_bias={256: 50})
    assert ends[0].token_ids == [256]
    later = run(model, "p", temperature=0.0, logit_bias={256: 50}, min_tokens=5)
    assert later[0].generated_tokens == 6
    assert later[0].finish_reason == "stop"
    assert scripted("aabaa", stop="a", min_tokens=3)[0].text == "aab"


@pytest.mark.fault("G12")
@pytest.mark.parametrize("text", ["🙂🇩🇪 日本語 naïve", "👩‍👩‍👧‍👦"])
def test_max_tokens_never_leaves_half_a_character(text: str) -> None:
    for limit in range(1, len(text.encode()) + 1):
        answer, shown = scripted(text, max_tokens=limit)
        assert answer.text == shown == text.encode()[:limit].decode(errors="ignore")
        assert answer.finish_reason == "length"
        assert answer.generated_tokens == limit


@pytest.mark.fault("G12")
def test_deltas_add_up_to_the_text() -> None:
    model = toy_model()
    shown: dict[int, str] = {}

    def show(place: int, part: str) -> None:
        shown[place] = shown.get(place, "") + part

    answers = run(model, PROMPTS, show, n=3, stop=["e", "\x05\x06"], echo=True, **SAMPLED)
    assert [shown.get(place, "") for place in range(len(answers))] == [answer.text for answer in answers]


# --- the context ----------------------------------------------------------------------------------------------------


@pytest.mark.fault("G1")
def test_prompt_and_context() -> None:
    model = toy_model()  # context 64
    for length, generated in ((62, 2), (63, 1)):
        [answer] = run(model, "x" * length, max_tokens=10, temperature=0, ignore_eos=True)
        assert (answer.generated_tokens, answer.finish_reason) == (generated, "length")
    for length in (64, 65, 640):
        with pytest.raises(ConfigError) as caught:
            run(model, ["fine", "x" * length])
        assert str(caught.value).startswith(f"prompts[1]: {length} tokens in a context of 64; expected at most 63")
        assert "truncate" in caught.value.fix


@pytest.mark.fault("G1")
@pytest.mark.parametrize("length", [64, 65, 640])
def test_truncation_is_explicit_and_keeps_the_end(length: int) -> None:
    model = toy_model()
    prompt = "".join(chr(97 + i % 26) for i in range(length))
    [answer] = run(model, prompt, truncate="left", max_tokens=10, temperature=0, ignore_eos=True)
    assert (answer.prompt_tokens, answer.truncated, answer.generated_tokens) == (54, length - 54, 10)
    same([answer], run(model, prompt[-54:], max_tokens=10, temperature=0, ignore_eos=True))
    [answer] = run(model, prompt, truncate="left", max_tokens=1000, temperature=0, ignore_eos=True)
    assert (answer.prompt_tokens, answer.generated_tokens) == (32, 32)  # half stays with the prompt


@pytest.mark.fault("G1")
def test_without_the_check_the_model_would_fail_inside() -> None:
    """Negative control: the cache refuses what the prompt check lets through."""
    with pytest.raises(Exception, match=r"index|at most"):
        model = toy_model()
        model(torch.zeros(1, 65, dtype=torch.long), cache=model.new_cache(1, 64))


@pytest.mark.fault("G2")
@pytest.mark.parametrize("extra", [-1, 0, 1, 10**6])
@pytest.mark.parametrize("name", ["rope", "learned", "pair"])
def test_stops_at_the_end_of_the_context(name: str, extra: int) -> None:
    model = toy_model(**VARIANTS[name])
    room = 64 if model.is_pair else 59
    [answer] = run(model, "hello", max_tokens=room + extra, temperature=0, ignore_eos=True)
    assert answer.generated_tokens == min(room + extra, room)
    assert answer.finish_reason == "length"


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("G3")
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [({"bos": 5, "eos": 6}, [5]), ({"eos": 6}, [6]), ({}, [256])],
    ids=["bos", "eos", "tokenizer"],
)
def test_an_empty_prompt_starts_from_the_begin_or_end_token(tokens: dict[str, int], expected: list[int]) -> None:
    for empty in ("", []):
        prompt = prepare(empty, "prompt", toy_config(tokens=tokens), byte_tokenizer(), GenerationOptions())
        assert (prompt.ids, prompt.at_start) == (expected, True)


@pytest.mark.fault("G3")
def test_an_empty_prompt_without_any_start_is_refused() -> None:
    bare = train_tokenizer(["abc"], "byte", 256, special_tokens=())
    model = toy_model(vocab_size=256)
    with pytest.raises(InputError, match="empty, and the model has no begin or end token"):
        generate(model, bare, [""])


@pytest.mark.fault("G3", "G4")
@pytest.mark.parametrize(
    ("prompts", "where"),
    [
        ([], "prompts"),
        (None, "prompts"),
        (5, "prompts"),
        ([None], "prompts[0]"),
        (["a", 7], "prompts[1]"),
        ([b"raw"], "prompts[0]"),
        ([[-1]], "prompts[0][0]"),
        ([[1, 257]], "prompts[0][1]"),
        ([[1, 2.0]], "prompts[0][1]"),
        ([[1, 2, True]], "prompts[0][2]"),
        ([[None]], "prompts[0][0]"),
        ([["5"]], "prompts[0][0]"),
        ([[10**30]], "prompts[0][0]"),
        ("\ud800", ""),
    ],
)
def test_prompts_that_are_none(prompts: Any, where: str) -> None:
    with pytest.raises(InputError) as caught:
        run(toy_model(), prompts)
    assert caught.value.where == where or not where


@pytest.mark.fault("G4")
def test_a_bad_id_would_reach_the_embedding_without_the_check() -> None:
    with pytest.raises(IndexError):
        toy_model()(torch.tensor([[257]]))


def test_token_ids_and_text_are_the_same_prompt() -> None:
    model = toy_model()
    same(run(model, ["hello"], **GREEDY), run(model, [list(b"hello")], **GREEDY))


def test_control_tokens_in_a_prompt_are_plain_text() -> None:
    prompt = prepare("<|endoftext|>", "prompt", toy_config(), byte_tokenizer(), GenerationOptions())
    assert 256 not in prompt.ids
    assert len(prompt.ids) == len("<|endoftext|>")


def test_add_bos() -> None:
    config = toy_config(tokens={"bos": 5})
    assert prepare("hi", "p", config, byte_tokenizer(), GenerationOptions(add_bos=True)).ids == [5, 104, 105]
    cut = prepare("x" * 100, "p", config, byte_tokenizer(), GenerationOptions(add_bos=True, truncate="left"))
    assert cut.ids[0] == 5
    assert len(cut.ids) == 32
    with pytest.raises(ConfigError, match="begin token"):
        prepare("hi", "p", toy_config(), byte_tokenizer(), GenerationOptions(add_bos=True))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("G19", "F5")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "encoder"}, "encoder-only"),
        (
            {"kind": "vision", "vocab_size": 0, "max_len": 17, "embeddings": {"patch": {"size": 4, "image": 16}}},
            "vision",
        ),
        ({"head": {"type": "sequence-classification", "labels": 3}}, "no next token"),
        ({"kind": "encoder-decoder"}, "tokens.decoder_start"),
    ],
)
def test_models_that_write_no_text(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        run(toy_model(**fields), "hello")
    assert caught.value.exit_code == 2


@pytest.mark.fault("G9")
def test_ids_outside_the_vocabulary() -> None:
    for fields in ({"logit_bias": {257: 1.0}}, {"stop_ids": [257]}):
        with pytest.raises(ConfigError, match="token id 257; expected an id below the vocabulary's 257"):
            run(toy_model(), "hello", **fields)


@pytest.mark.fault("G9")
def test_all_tokens_banned() -> None:
    everything = dict.fromkeys(range(257), -100.0)
    [answer] = run(toy_model(), "hello", logit_bias=everything, **GREEDY)
    same([answer], run(toy_model(), "hello", **GREEDY))  # the same bias for all changes nothing
    [answer] = run(toy_model(), "hello", stop_ids=list(range(257)))
    assert (answer.text, answer.finish_reason, answer.generated_tokens) == ("", "stop", 1)
    with pytest.raises(ConfigError, match="every token ends the text"):
        run(toy_model(), "hello", stop_ids=list(range(257)), min_tokens=1)


@pytest.mark.fault("G15")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["rope", "experts", "pair", "sliding"])
def test_a_row_with_nan_fails_alone(name: str, temperature: float) -> None:
    model = toy_model(**VARIANTS[name])
    with torch.no_grad():
        model.embeddings.tokens.weight[ord("Q")] = float("nan")
    options = GenerationOptions(temperature=temperature, seed=1, logit_bias={ord("Q"): -100}, max_tokens=12)
    clean = generate(model, byte_tokenizer(), ["hello", "to be"], options)
    mixed = generate(model, byte_tokenizer(), ["hello", "aQb", "to be"], options, on_error="return")
    same([mixed[0], mixed[2]], clean)
    assert mixed[1].finish_reason == "error"
    assert isinstance(mixed[1].error, DivergedError)
    assert "logits for token 1 are not finite" in str(mixed[1].error)
    with pytest.raises(DivergedError, match="prompt 1: the model's logits"):
        generate(model, byte_tokenizer(), ["hello", "aQb"], options)


# --- log-probabilities ----------------------------------------------------------------------------------------------


@pytest.mark.fault("G8")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_the_models_own(temperature: float) -> None:
    """Whatever the options do, the numbers are those of log softmax over the raw logits: finite, strict JSON."""
    model = toy_model()
    fields = {"temperature": temperature, "seed": 1, "top_k": 1, "logit_bias": {5: -100}, "logprobs": 20}
    [answer] = run(model, "hello", max_tokens=8, echo=True, **fields)
    assert answer.logprobs is not None
    ids = [*b"hello", *answer.token_ids]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert answer.logprobs[0] == (ids[0], None, ())
    assert [row.token_id for row in answer.logprobs] == ids
    for place, row in enumerate(answer.logprobs[1:]):
        assert row.logprob == pytest.approx(log_p[place, row.token_id].item(), abs=1e-9)
        values, places = log_p[place].topk(20)
        assert [token for token, _ in row.top] == places.tolist()
        assert [value for _, value in row.top] == pytest.approx(values.tolist(), abs=1e-9)
    json.dumps([row._asdict() for row in answer.logprobs], allow_nan=False)


@pytest.mark.fault("G8")
def test_infinite_logprobs_are_null() -> None:
    model = toy_model()
    with torch.no_grad():
        model.head.output.weight.mul_(1e5)
    answers = run(model, PROMPTS, logprobs=20, **GREEDY)
    values = [v for answer in answers for row in answer.logprobs or [] for _, v in row.top]
    assert all(v is None or math.isfinite(v) for v in values)


def test_logprobs_in_a_batch_with_samples() -> None:
    model = toy_model()
    both = run(model, ["hello", "a longer prompt"], n=2, logprobs=2, echo=True, **SAMPLED)
    for answer, prompt in zip(both[::2], ["hello", "a longer prompt"], strict=True):
        [alone] = run(model, [prompt], logprobs=2, echo=True, **SAMPLED)
        assert [row.token_id for row in answer.logprobs or []] == [*prompt.encode(), *answer.token_ids]
        for row, other in zip(answer.logprobs or [], alone.logprobs or [], strict=True):
            assert (row.logprob or 0) == pytest.approx(other.logprob or 0, abs=1e-9)


# --- manners --------------------------------------------------------------------------------------------------------


def test_training_goes_on_after_a_sample() -> None:
    """The mode comes back, no gradient is kept, and tables made while sampling still serve training."""
    for fields in ({}, {"positions": "alibi"}, {"positions": "sinusoidal"}):
        torch.manual_seed(0)
        model = Transformer(toy_config(dropout=0.5, **fields)).train()
        run(model, "hello", **GREEDY)
        assert model.training
        ids = torch.randint(0, 257, (2, 9))
        loss = model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())


def test_rows_of_the_model_without_a_token_are_never_said() -> None:
    """A table padded to a round size has rows that nobody could read."""
    model = toy_model(vocab_size=320)
    with torch.no_grad():
        model.head.output.weight[257:] *= 50
    answers = run(model, PROMPTS, logprobs=5, **SAMPLED)
    assert all(token < 257 for answer in answers for token in answer.token_ids)


@pytest.mark.fault("G7")
def test_many_prompts_are_decoded_in_groups() -> None:
    """The cache never holds more than batch_size rows, however many prompts come."""
    model = toy_model()
    rows: list[int] = []
    make = model.new_cache

    def counted(batch: int, *args: Any) -> Any:
        rows.append(batch)
        return make(batch, *args)

    model.new_cache = counted  # type: ignore[method-assign]
    answers = run(model, ["x"] * 50, batch_size=8, n=2, max_tokens=2)
    assert len(answers) == 100
    assert max(rows) == 4
