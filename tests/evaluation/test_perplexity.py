"""Perplexity against a loop that scores one token at a time, and against transformers' loss."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from headway.config import ModelConfig
from headway.errors import ConfigError, InputError
from headway.evaluation import TextTokens, perplexity
from headway.evaluation import perplexity as module
from headway.nn import Transformer

VOCABULARY = 23


def make(**fields) -> Transformer:
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": VOCABULARY, "max_len": 12}
    model = Transformer(ModelConfig(**{**sizes, "init": {"std": 0.5, "residual": "plain"}, **fields}))
    return model.double().eval()


def documents(*lengths: int) -> list[TextTokens]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [TextTokens(ids, [1 + token % 3 for token in ids]) for ids in rows]


def one_by_one(model: Transformer, texts: list[TextTokens], context: int, stride: int) -> tuple[float, int, int]:
    """Nats, tokens and bytes by the definition: token t of a document sees what its window holds before it."""
    nats, tokens, size = 0.0, 0, 0
    for ids, sizes in texts:
        ends = [min(context, len(ids))]
        while ends[-1] < len(ids):
            ends.append(min(ends[-1] + stride, len(ids)))
        for begin, end in pairwise([1, *ends]):
            for t in range(begin, end):
                with torch.no_grad():
                    logits = model(torch.tensor([ids[max(end - context, 0) : t]])).logits[0, -1]
                nats -= float(torch.log_softmax(logits, -1)[ids[t]])
                tokens, size = tokens + 1, size + sizes[t]
    return nats, tokens, size


@pytest.mark.parametrize(("context", "stride"), [(12, 6), (12, 1), (12, 11), (5, 2), (2, 1)])
@pytest.mark.parametrize("lengths", [(30,), (12, 13), (2, 3, 40, 7, 1, 12, 2, 9, 25)])
def test_every_token_is_scored_once_in_its_window(context, stride, lengths):
    model, texts = make(), documents(*lengths)
    nats, tokens, size = one_by_one(model, texts, context, stride)
    found = perplexity(model, texts, context=context, stride=stride)
    assert (found.tokens, found.bytes) == (tokens, size)
    # The last step is float32: 1e-6 relative.
    assert found.loss.value == pytest.approx(nats / tokens, rel=1e-6)
    assert found.perplexity.value == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found.bits_per_byte.value == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_padding_in_a_batch_changes_nothing_even_where_length_counts():
    """Dynamic RoPE turns by the length of the sequence: rows of a padded batch must keep their own."""
    positions = {"type": "rope", "scaling": {"type": "dynamic", "factor": 4.0, "original_len": 4}}
    model, texts = make(positions=positions), documents(9, 8, 7, 10)
    nats, tokens, _ = one_by_one_whole(model, texts)
    assert perplexity(model, texts).loss.value == pytest.approx(nats / tokens, rel=1e-6)


def one_by_one_whole(model: Transformer, texts: list[TextTokens]) -> tuple[float, int, int]:
    """As above for documents shorter than the context, each in one forward of its own."""
    nats, tokens = 0.0, 0
    for ids, _ in texts:
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([ids[:-1]])).logits[0], -1)
        nats -= float(log_p.gather(1, torch.tensor(ids[1:])[:, None]).sum())
        tokens += len(ids) - 1
    return nats, tokens, 0


def test_against_transformers_loss():
    """GPT-2's own mean loss on one document of one window, its weights in our stack."""
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=12, n_embd=16, n_layer=1, n_head=2)).eval()
    ours = make(
        n_layers=1,
        positions="learned",
        norm="layernorm",
        attention={"bias": True, "output_bias": True},
        feed_forward={"activation": "gelu-tanh", "bias": True},
        embeddings={"tied": True},
    ).float()
    block, source = ours.decoder.blocks[0], theirs.transformer.h[0]
    pairs = [
        (ours.embeddings.tokens.weight, theirs.transformer.wte.weight),
        (ours.embeddings.learned.weight, theirs.transformer.wpe.weight),
        (block.attention.qkv.weight, source.attn.c_attn.weight.T),
        (block.attention.qkv.bias, source.attn.c_attn.bias),
        (block.attention.output.weight, source.attn.c_proj.weight.T),
        (block.attention.output.bias, source.attn.c_proj.bias),
        (block.feed_forward.up.weight, source.mlp.c_fc.weight.T),
        (block.feed_forward.up.bias, source.mlp.c_fc.bias),
        (block.feed_forward.down.weight, source.mlp.c_proj.weight.T),
        (block.feed_forward.down.bias, source.mlp.c_proj.bias),
    ]
    for target, value in pairs:
        target.data.copy_(value.data)
    (text,) = documents(12)
    ids = torch.tensor([text.ids])
    with torch.no_grad():
        expected = theirs(ids, labels=ids).loss.item()
    assert perplexity(ours, [text]).loss.value == pytest.approx(expected, rel=1e-5)


def test_a_begin_token_scores_the_first_one_too():
    model, texts = make(), documents(5, 6)
    found = perplexity(model, texts, bos_id=0)
    with_bos = [TextTokens([0, *ids], [0, *sizes]) for ids, sizes in texts]
    assert found.tokens == 11 and found.bytes == sum(sum(sizes) for _, sizes in texts)
    assert found.loss.value == pytest.approx(perplexity(model, with_bos).loss.value, rel=1e-12)


def test_more_context_for_each_token_lowers_the_loss_of_a_model_that_uses_it():
    """Induction: a model that copies from 6 back needs them in its window."""
    texts = [TextTokens([1, 2, 3, 4, 5, 6] * 10, [1] * 60)]
    model = make()
    few, many = (perplexity(model, texts, context=12, stride=stride) for stride in (11, 1))
    assert few.tokens == many.tokens == 59 and few.stride == 11 and many.loss.value != few.loss.value


def test_what_the_interval_rests_on():
    model = make()
    assert perplexity(model, documents(*[9] * 8)).units == "documents"
    few = perplexity(model, documents(60))
    assert few.units == "windows" and few.documents == 1 and few.loss.n == 9  # 12, then 6 at a time
    assert few.loss.low < few.loss.value < few.loss.high
    assert few.perplexity.low == pytest.approx(math.exp(few.loss.low))


def test_batches_are_bounded(monkeypatch):
    """A small bound makes many batches and the same figures."""
    model, texts = make(), documents(*range(2, 40))
    whole = perplexity(model, texts)
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(module_of(), "_LOGITS", 30 * VOCABULARY)
    hook = model.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.logits.shape)))
    cut = perplexity(model, texts)
    hook.remove()
    assert max(b * t * v for b, t, v in shapes) <= 30 * VOCABULARY and len(shapes) > 10
    assert cut.loss.value == pytest.approx(whole.loss.value, rel=1e-6) and cut.tokens == whole.tokens


def module_of():
    import sys

    return sys.modules[module.__module__]


def test_progress_counts_documents():
    seen: list[int] = []
    perplexity(make(), documents(5, 6, 7), progress=seen.append)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "options", "where"),
    [
        ({"kind": "encoder"}, {}, "kind and task"),
        ({"head": "token-classification"}, {}, "kind and task"),
        ({}, {"context": 13}, "context"),
        ({}, {"context": 1}, "context"),
        ({}, {"stride": 12}, "stride"),
        ({}, {"stride": 0}, "stride"),
    ],
)
def test_what_cannot_be_measured_is_named(fields, options, where):
    with pytest.raises(ConfigError) as caught:
        perplexity(make(**fields), documents(5), **options)
    assert caught.value.where == where


@pytest.mark.fault("R18")
@pytest.mark.parametrize("texts", [[], [TextTokens([], [])], [TextTokens([4], [1])], [TextTokens([4, 5], [0, 0])]])
def test_nothing_to_score_is_an_error_and_not_nan(texts):
    with pytest.raises(InputError):
        perplexity(make(), texts)
