"""Guesses by lookup or a draft model: the same text in fewer passes; guessing stops where it does not pay."""

from __future__ import annotations

import pytest
from generation_toys import byte_tokenizer, toy_model

from headway.errors import ConfigError
from headway.generation import GenerationOptions, generate
from headway.generation import guessing as module
from headway.generation.guessing import Guessing
from headway.generation.session import Memory


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Guessing]:
    """Every Guessing that is made, guessing whatever it costs."""
    made: list[Guessing] = []
    init = Guessing.__init__

    def noted(self: Guessing, *given: object) -> None:
        init(self, *given)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(Guessing, "__init__", noted)
    monkeypatch.setattr(module._Balance, "is_on", True)
    return made


PROMPT = [1, 5, 9, 13, 1, 5, 9, 2, 1, 5]  # the toy soon repeats itself, as greedy texts do
GREEDY = GenerationOptions(max_tokens=40, temperature=0.0, ignore_eos=True)
SAMPLED = GenerationOptions(max_tokens=40, temperature=0.3, seed=3, ignore_eos=True, repetition_penalty=0.5)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_the_text_is_the_one_without_guesses(counted: list[Guessing], options: GenerationOptions, width: int) -> None:
    """In float64 the sums of one token and of several are alike; some guesses come true, others are taken back."""
    for seed in range(4):
        model = toy_model(seed)
        known = generate(model, byte_tokenizer(), [PROMPT], options)[0]
        found = generate(model, byte_tokenizer(), [PROMPT], options.model_copy(update={"lookup": width}))[0]
        assert found.token_ids == known.token_ids and found.finish_reason == known.finish_reason
    assert len(counted) == 4 and any(one.accepted for one in counted)
    for one in counted:
        assert one.passes + one.accepted == 39  # the last token is not read


def test_logprobs_are_those_of_the_tokens(counted: list[Guessing]) -> None:
    options = GREEDY.model_copy(update={"logprobs": 2})
    known = generate(toy_model(), byte_tokenizer(), [PROMPT], options)[0]
    found = generate(toy_model(), byte_tokenizer(), [PROMPT], options.model_copy(update={"lookup": 4}))[0]
    assert counted[0].accepted
    for one, other in zip(found.logprobs or (), known.logprobs or (), strict=True):
        assert one.token_id == other.token_id and one.logprob == pytest.approx(other.logprob, abs=1e-9)


def test_a_text_ends_where_the_context_does(counted: list[Guessing]) -> None:
    """No guess reaches beyond the cache."""
    options = GREEDY.model_copy(update={"max_tokens": 500, "lookup": 8})
    found = generate(toy_model(), byte_tokenizer(), [PROMPT], options)[0]
    assert found.finish_reason == "length" and len(found.token_ids) == 64 - len(PROMPT) and counted[0].accepted


def test_a_memory_holds_what_was_said_and_no_guess(counted: list[Guessing]) -> None:
    model, memory = toy_model(), Memory()
    first = generate(model, byte_tokenizer(), [PROMPT], GREEDY.model_copy(update={"lookup": 8}), memory=memory)[0]
    assert counted[0].accepted
    assert memory.ids == [*PROMPT, *first.token_ids[:-1]]
    after = [*PROMPT, *first.token_ids, 7, 8]
    again = generate(model, byte_tokenizer(), [after], GREEDY.model_copy(update={"max_tokens": 10}), memory=memory)[0]
    plain = generate(model, byte_tokenizer(), [after], GREEDY.model_copy(update={"max_tokens": 10}))[0]
    assert memory.reused == len(after) - 3 and again.token_ids == plain.token_ids


def test_where_nothing_can_be_taken_back_nothing_is_guessed(counted: list[Guessing]) -> None:
    options = GREEDY.model_copy(update={"lookup": 4})
    rolling = toy_model(attention={"window": 8, "pattern": ["sliding"]})
    assert generate(rolling, byte_tokenizer(), [PROMPT], options)
    assert len(generate(toy_model(), byte_tokenizer(), [PROMPT, PROMPT[:4]], options)) == 2
    assert not counted
    with pytest.raises(ConfigError, match="lookup"):
        GenerationOptions(beams=2, lookup=4)


def test_guessing_stops_where_it_does_not_pay_and_tries_again() -> None:
    """Passes of several at three times the price: worth it with three tokens a pass, not with one."""
    balance = module._Balance()
    for true in (3, 3, 3, 3):
        balance.took(1.0, False)
        balance.took(3.0, True)
        for _ in range(true):
            balance.came_true()
    assert balance.is_on
    rests = []
    for _ in range(3):
        while balance.is_on:
            balance.took(3.0, True)
        rests.append(0)
        while not balance.is_on:
            balance.took(1.0, False)
            rests[-1] += 1
    assert rests == [16, 32, 64]


def test_what_always_guesses_is_compared_with_plain_passes_too() -> None:
    """Two at the beginning, so that the first, which prepares, does not count; and one in 65."""
    balance, passes = module._Balance(), []
    for _ in range(200):
        passes.append(balance.is_on)
        balance.took(1.0, passes[-1])
        for _ in range(3):
            balance.came_true()
    assert [place for place, guesses in enumerate(passes) if not guesses] == [0, 1, 66, 131, 196]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("same", [True, False])
def test_a_draft_changes_no_text(counted: list[Guessing], options: GenerationOptions, same: bool) -> None:
    """The model itself drafts what is always true when nothing is drawn; another model is mostly wrong."""
    for seed in range(3):
        model = toy_model(seed)
        draft = model if same else toy_model(seed + 10, n_layers=1)
        known = generate(model, byte_tokenizer(), [PROMPT], options)[0]
        found = generate(model, byte_tokenizer(), [PROMPT], options, draft=draft)[0]
        assert found.token_ids == known.token_ids
    passes = [one.passes for one in counted]
    assert all(one.passes + one.accepted == 39 for one in counted)
    if same and options is GREEDY:
        assert passes == [8, 8, 8]  # the first token costs none, five each the others
    if not same:
        assert max(passes) > 12


def test_a_draft_that_comes_to_its_end_says_nothing(counted: list[Guessing]) -> None:
    """Its context is shorter than the text, or than the prompt: the text goes on without guesses."""
    known = generate(toy_model(), byte_tokenizer(), [PROMPT], GREEDY)[0]
    for longest in (24, 8):
        found = generate(toy_model(), byte_tokenizer(), [PROMPT], GREEDY, draft=toy_model(max_len=longest))[0]
        assert found.token_ids == known.token_ids
    assert counted[0].accepted == 8 and counted[1].accepted == 0  # 14 places: two guesses of four tokens


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="draft"):
        generate(toy_model(), byte_tokenizer(), [PROMPT], GREEDY, draft=toy_model(vocab_size=100))


@pytest.mark.parametrize("lookup", [0, 4])
def test_a_pass_that_is_broken_off_was_not_said(monkeypatch: pytest.MonkeyPatch, lookup: int) -> None:
    """What a memory holds has been read: else the next prompt would find keys that nobody wrote."""
    model, memory, calls = toy_model(), Memory(), []
    forward = model.forward

    def broken(*given: object, **more: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        generate(
            model, byte_tokenizer(), [[3, 7, 200, 41]], GREEDY.model_copy(update={"lookup": lookup}), memory=memory
        )
    said = len(memory.ids)
    monkeypatch.undo()
    known = generate(model, byte_tokenizer(), [[3, 7, 200, 41]], GREEDY)[0].token_ids
    assert memory.ids == [3, 7, 200, 41, *known[: said - 4]] and (said == 6 or lookup)
