"""Beam search against an exhaustive search, transformers with the same weights, and the full forward."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from generation_toys import byte_tokenizer, toy_config, toy_model
from test_decode import VARIANTS
from transformers import GPT2Config, GPT2LMHeadModel

from headway.errors import DivergedError
from headway.generation import Generation, GenerationOptions, generate
from headway.nn import Transformer

EOS = 4


def small(seed: int = 0, vocab: int = 5, **fields: Any) -> Transformer:
    return toy_model(seed, vocab_size=vocab, tokens={"eos": EOS}, init={"std": 0.3}, **fields)


def run(model: Transformer, prompts: Any, **options: Any) -> list[Generation]:
    return generate(model, byte_tokenizer(), prompts, GenerationOptions(**options))


def log_p(model: Transformer, prompt: list[int], answer: list[int]) -> float:
    """The log-probability of an answer by one full forward."""
    with torch.no_grad():
        if model.is_pair:
            start = [model.config.tokens.decoder_start or 0]
            logits = model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([[*start, *answer[:-1]]])).logits
            start_at = 0
        else:
            logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits
            start_at = len(prompt) - 1
    rows = logits[0, start_at:].log_softmax(-1)
    return float(rows.gather(1, torch.tensor(answer)[:, None]).sum())


def exhaustive(model: Transformer, prompt: list[int], length: int, penalty: float) -> list[tuple[float, list[int]]]:
    """Every sequence that ends in EOS or is `length` long, best first."""
    vocab = range(model.config.vocab_size)
    open_ids = [token for token in vocab if token != EOS]
    answers = [[*body, EOS] for n in range(length) for body in itertools.product(open_ids, repeat=n)]
    answers += [list(body) for body in itertools.product(open_ids, repeat=length)]
    scored = [(log_p(model, prompt, answer) / len(answer) ** penalty, answer) for answer in answers]
    return sorted(scored, key=lambda pair: -pair[0])


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5, 2.0])
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_wide_beam_is_an_exhaustive_search(kind: str, penalty: float) -> None:
    fields: dict[str, Any] = {"kind": kind}
    model = small(**fields)
    if kind == "encoder-decoder":
        model = toy_model(vocab_size=5, tokens={"eos": EOS, "decoder_start": 0}, init={"std": 0.3}, kind=kind)
    prompt = [1, 2, 3]
    best = exhaustive(model, prompt, 4, penalty)
    found = run(model, [prompt], beams=256, n=10, max_tokens=4, length_penalty=penalty, early_stopping="never")
    assert [answer.token_ids for answer in found] == [ids for _, ids in best[:10]]
    assert [answer.score for answer in found] == pytest.approx([score for score, _ in best[:10]], abs=1e-9)
    assert [answer.finish_reason for answer in found] == ["stop" if i[-1] == EOS else "length" for _, i in best[:10]]


def test_a_narrow_beam_may_miss_the_best() -> None:
    """Negative control of the test above: greedy is not exhaustive for at least one of these models."""
    missed = 0
    for seed in range(3):
        model = small(seed)
        best = exhaustive(model, [1, 2, 3], 4, 0.0)[0][1]
        [greedy] = run(model, [[1, 2, 3]], temperature=0.0, max_tokens=4)
        missed += greedy.token_ids != best
    assert missed


# Dynamic and longrope angles depend on the declared length: test_decode.py covers them.
@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"rope-dynamic", "rope-longrope"}))
def test_scores_are_those_of_the_full_forward(name: str) -> None:
    """Hypotheses move between rows of the cache; every kind of cache must move with them."""
    model = toy_model(**VARIANTS[name])
    prompt = list(b"hello")
    for answer in run(model, [prompt], beams=5, n=5, max_tokens=10, length_penalty=0.7):
        expected = log_p(model, prompt, answer.token_ids) / answer.generated_tokens**0.7
        assert answer.score == pytest.approx(expected, abs=1e-9)


def gpt2_pair(seed: int) -> tuple[Transformer, GPT2LMHeadModel]:
    """The same random weights as our model and as GPT-2 of transformers."""
    torch.manual_seed(seed)
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=7, n_positions=48, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5, eos_token_id=EOS
        )
    )
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model = Transformer(
        toy_config(
            vocab_size=7,
            max_len=48,
            positions="learned",
            norm="layernorm",
            attention={"bias": True, "output_bias": True},
            feed_forward={"activation": "gelu-tanh", "bias": True},
            embeddings={"tied": True},
            tokens={"eos": EOS},
        )
    )
    theirs = reference.state_dict()
    ours = {
        "embeddings.tokens.weight": theirs["transformer.wte.weight"],
        "embeddings.learned.weight": theirs["transformer.wpe.weight"],
        "head.output.weight": theirs["transformer.wte.weight"],
        "decoder.norm.weight": theirs["transformer.ln_f.weight"],
        "decoder.norm.bias": theirs["transformer.ln_f.bias"],
    }
    names = {
        "attention_residual.before": "ln_1",
        "feed_forward_residual.before": "ln_2",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    for layer, (our, their), part in itertools.product(range(2), names.items(), ("weight", "bias")):
        tensor = theirs[f"transformer.h.{layer}.{their}.{part}"]
        ours[f"decoder.blocks.{layer}.{our}.{part}"] = tensor.T if tensor.ndim == 2 else tensor
    model.load_state_dict(ours)
    return model.double().eval(), reference.double().eval()


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_equals_transformers(beams: int, penalty: float, early_stopping: Any) -> None:
    ended = 0
    for seed in range(4):
        model, reference = gpt2_pair(seed)
        prompt = [1, 2, 3, 6]
        theirs = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=penalty,
            early_stopping=early_stopping,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        ours = run(
            model,
            [prompt],
            beams=beams,
            n=beams,
            max_tokens=12,
            length_penalty=penalty,
            early_stopping=early_stopping,
        )
        rows = [row[len(prompt) :].tolist() for row in theirs.sequences]
        expected = [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]
        assert [answer.token_ids for answer in ours] == expected
        # Their sums are kept in float32.
        assert [answer.score for answer in ours] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)
        ended += sum(answer.finish_reason == "stop" for answer in ours)
    assert ended  # the comparison has hypotheses of different lengths in it


@pytest.mark.parametrize("temperature", [None, 0.0])
def test_greedy_equals_transformers(temperature: float | None) -> None:
    model, reference = gpt2_pair(0)
    theirs = reference.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    [ours] = run(model, [[1, 2, 3]], temperature=0.0, max_tokens=20)
    assert ours.token_ids == theirs[0, 3:].tolist()


def test_min_tokens_and_penalties_act_in_a_search() -> None:
    model = small(vocab=23)
    free = run(model, [[1, 2]], beams=4, n=4, max_tokens=8)
    late = run(model, [[1, 2]], beams=4, n=4, max_tokens=8, min_tokens=6)
    assert all(answer.generated_tokens > 6 for answer in late)
    varied = run(model, [[1, 2]], beams=4, max_tokens=8, presence_penalty=2.0, frequency_penalty=2.0)
    assert varied[0].token_ids != free[0].token_ids


def test_prompts_are_searched_independently() -> None:
    model = toy_model()
    prompts = ["hello", "a longer prompt"]
    both = run(model, prompts, beams=3, n=2, max_tokens=8)
    assert [(x.prompt, x.sample) for x in both] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    alone = [answer for prompt in prompts for answer in run(model, [prompt], beams=3, n=2, max_tokens=8)]
    assert [x.token_ids for x in both] == [x.token_ids for x in alone]
    shown: dict[int, str] = {}
    generate(model, byte_tokenizer(), prompts, GenerationOptions(beams=3, n=2, max_tokens=8), shown.__setitem__)
    assert [shown.get(place, "") for place in range(4)] == [x.text for x in both]


@pytest.mark.fault("G15")
def test_nan_in_a_search_is_one_sentence() -> None:
    model = toy_model()
    with torch.no_grad():
        model.embeddings.tokens.weight[ord("Q")] = float("nan")
    options = GenerationOptions(beams=3, n=2, max_tokens=4)
    with pytest.raises(DivergedError, match="prompt 0: the model's logits for token 1 are not finite"):
        generate(model, byte_tokenizer(), ["aQ"], options)
    results = generate(model, byte_tokenizer(), ["aQ", "fine"], options, on_error="return")
    assert [result.finish_reason for result in results] == ["error", "error", "length", "length"]
    assert [(result.prompt, result.sample) for result in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
