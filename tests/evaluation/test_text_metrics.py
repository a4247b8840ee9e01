"""Metrics of texts and tags against sacrebleu, rouge-score, conlleval's two tables and SQuAD's script."""

from __future__ import annotations

import collections
import random
import re
import string
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from headway.errors import ConfigError, InputError, MachineError
from headway.evaluation import (
    Interval,
    Measured,
    bleu,
    chrf,
    exact_match,
    rouge,
    span_f1,
    spans,
    squad_exact_match,
    squad_f1,
    squad_normal,
    text_metrics,
    token_accuracy,
)

ULPS = 1e-12


def conlleval(tags: list[str]) -> set[tuple[str, int, int]]:
    """Entities by the tables endOfChunk and startOfChunk of conlleval (CoNLL-2000), for B, I and O."""
    found, begin = set(), 0
    before, before_type = "O", ""
    for i, (tag, kind) in enumerate([*((tag[0], tag[2:]) for tag in tags), ("O", "")]):
        end = (before, tag) in {("B", "B"), ("B", "O"), ("I", "B"), ("I", "O")}
        start = (before, tag) in {("B", "B"), ("I", "B"), ("O", "B"), ("O", "I")}
        end |= before != "O" and before_type != kind
        start |= tag != "O" and before_type != kind
        if end:
            found.add((before_type, begin, i - 1))
        if start:
            begin = i
        before, before_type = tag, kind
    return found


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B", "I-A-B"]), max_size=12))
def test_spans_are_those_of_conlleval(tags):
    assert spans(tags) == conlleval(tags)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", set()),
        ("O O", set()),
        ("B-PER I-PER O B-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),
        ("B-PER B-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("O I-PER I-PER", {("PER", 1, 2)}),
        ("B-PER I-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 2)}),
        ("I-PER I-LOC B-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 1), ("LOC", 2, 3)}),
        ("B I O I", {("_", 0, 1), ("_", 3, 3)}),
    ],
)
def test_spans_by_hand(tags, expected):
    assert spans(tags.split()) == expected


def test_span_f1_and_token_accuracy_of_seqevals_readme():
    own = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    ours = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert span_f1(ours, own).interval.value == 0.5 and span_f1(ours, own).interval.n == 2
    assert token_accuracy(ours, own).interval.value == 0.8
    assert token_accuracy([[1, 2], []], [[1, 3], []]).interval == (0.5, 0.5, 0.5, 2)


def test_span_f1_is_harmonic_and_0_where_there_is_nothing():
    rng = random.Random(0)
    tags = ["O", "B-A", "I-A", "B-B", "I-B"]
    own = [rng.choices(tags, k=9) for _ in range(30)]
    ours = [[tag if rng.random() < 0.8 else rng.choice(tags) for tag in row] for row in own]
    found = [(i, *one) for i, row in enumerate(ours) for one in conlleval(row)]
    wanted = {(i, *one) for i, row in enumerate(own) for one in conlleval(row)}
    hits = sum(one in wanted for one in found)
    precision, recall = hits / len(found), hits / len(wanted)
    measured = span_f1(ours, own).interval
    assert measured.value == pytest.approx(2 * precision * recall / (precision + recall), abs=ULPS)
    assert measured.low < measured.value < measured.high
    assert span_f1([["O"], ["O"]], [["O"], ["O"]]).interval == (0.0, 0.0, 0.0, 2)


def test_exact_match_normalises_nothing():
    assert exact_match(["a", "A", "b "], ["a", "a", ["b", "b "]]).interval.value == pytest.approx(2 / 3)
    assert exact_match(["ab"], ["abc"]).interval == (0.0, None, None, 1)  # a text is one reference, not its letters
    assert exact_match(["a"], ["abc"]).interval.value == 0.0


def official_normal(text: str) -> str:
    """normalize_answer of SQuAD's evaluate-v2.0.py, in its own steps."""
    text = text.lower()
    text = "".join(ch for ch in text if ch not in set(string.punctuation))
    text = re.compile(r"\b(a|an|the)\b", re.UNICODE).sub(" ", text)
    return " ".join(text.split())


def official_f1(own: str, ours: str) -> float:
    """compute_f1 of the same."""
    gold, predicted = official_normal(own).split(), official_normal(ours).split()
    same = sum((collections.Counter(gold) & collections.Counter(predicted)).values())
    if not gold or not predicted:
        return int(gold == predicted)
    if same == 0:
        return 0
    precision, recall = same / len(predicted), same / len(gold)
    return 2 * precision * recall / (precision + recall)


WORDS = st.lists(st.sampled_from(["the", "The", "an", "cat", "Cat.", "(dog)", "x-y", "é", "а", "  ", "\n", "U.S."]))
ANSWERS = st.one_of(WORDS.map(" ".join), st.text(max_size=12))


@given(ANSWERS, st.lists(ANSWERS, max_size=3))
def test_squad_is_the_official_script(ours, own):
    answers = [answer for answer in own if official_normal(answer)] or [""]
    assert squad_normal(ours) == official_normal(ours)
    known = max(official_f1(answer, ours) for answer in answers)
    assert squad_f1([ours], [own]).interval.value == pytest.approx(known, abs=ULPS)
    known = max(official_normal(answer) == official_normal(ours) for answer in answers)
    assert squad_exact_match([ours], [own]).interval.value == known


def test_squad_by_hand():
    assert squad_normal("  The U.S. -- an   Example,\tof A\u00a0thing! ") == "us example of thing"
    assert squad_exact_match(["the Broncos!"], [["Denver Broncos", "Broncos"]]).interval.value == 1
    assert squad_f1(["Denver"], ["the Denver Broncos"]).interval.value == pytest.approx(2 / 3)
    assert squad_f1(["b b a1 b"], ["b b"]).interval.value == pytest.approx(2 * 2 / 6)
    # A question without answer: the empty answer is right, also where a reference is an article alone.
    assert squad_f1(["", "x", "a"], [[], [], "The"]).interval.value == pytest.approx(2 / 3)


def texts(n: int, seed: int = 0, longest: int = 25) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        ",",
        "1,000",
        "dogs",
        "bark",
        "Köln",
        ".",
        "“yes”",
        "it's",
        "東京",
        "x-y",
    ]
    own = [" ".join(rng.choices(words, k=rng.randint(1, longest))) for _ in range(n)]
    ours = [" ".join(w if rng.random() < 0.8 else rng.choice(words) for w in text.split()) for text in own]
    return ours, own


CORPORA = {
    "random": texts(60),
    "short": texts(20, 1, 3),
    "too short": ([text[: len(text) * 2 // 3] for text in texts(30)[0]], texts(30)[1]),
    "too long": ([f"{text} and more" for text in texts(30)[0]], texts(30)[1]),
    "one": (["the cat sat on the mat today"], ["the cat sat on the mat"]),
    "empty predictions": (["", "", "a b"], ["the cat", "sat", "a b c d e f"]),
    "no match": (["x y z w v", "u"], ["a b c d e", "f"]),
    "all empty": (["", ""], ["", ""]),
    "perfect": (texts(5)[1], texts(5)[1]),
    "four-grams missing": (["a b c", "a c"], ["a b c", "a b"]),
    "no pair matches": (["a c b d e"], ["a b c d x"]),
}


@pytest.mark.parametrize("corpus", CORPORA)
def test_bleu_and_chrf_are_sacrebleus(corpus):
    ours, own = CORPORA[corpus]
    rows = [
        (bleu(ours, own), BLEU()),
        (bleu(ours, own, lowercase=True, tokenizer="char"), BLEU(lowercase=True, tokenize="char")),
        (bleu(ours, own, tokenizer="intl"), BLEU(tokenize="intl")),
        (chrf(ours, own), CHRF()),
        (chrf(ours, own, word_order=2), CHRF(word_order=2)),
    ]
    for found, metric in rows:
        assert found.interval.value == metric.corpus_score(ours, [own]).score  # to the last bit
        assert found.signature == (
            f"{found.name}|{metric.get_signature().format()}|units:sentences|bootstrap:1000|seed:0|level:0.95"
        )
        if len(ours) > 1:
            assert found.interval.low - 1e-9 <= found.interval.value <= found.interval.high + 1e-9
    assert [found.name for found, _ in rows] == ["bleu", "bleu", "bleu", "chrf", "chrf++"]


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("make", [lambda: (bleu, BLEU()), lambda: (chrf, CHRF())], ids=["bleu", "chrf"])
def test_each_resample_has_the_score_that_sacrebleu_gives_it(monkeypatch, corpus, make):
    ours, own = CORPORA[corpus]
    given = {}

    def keep(name, what, units, figure, seed):
        given.update(units=units, figure=figure)
        return Measured(name, Interval(0.0, 0.0, 0.0, 1), what)

    monkeypatch.setattr(text_metrics, "of_sums", keep)
    function, metric = make()
    function(ours, own)
    n = len(ours)
    counts = np.vstack([np.ones(n, int), np.random.default_rng(1).multinomial(n, [1 / n] * n, 12)])
    for row, figure in zip(counts, given["figure"](counts @ given["units"]), strict=True):
        drawn_ours, drawn_own = (
            [text for text, k in zip(side, row, strict=True) for _ in range(k)] for side in (ours, own)
        )
        assert figure == pytest.approx(metric.corpus_score(drawn_ours, [drawn_own]).score, rel=1e-12, abs=1e-9)


def test_references_may_be_several_and_uneven():
    ours = ["the cat sat on the mat", "a dog", "it rains"]
    own = [["a cat sat on the mat", "the cat sat here"], "the dog", ["it rains", "it pours", "rain falls"]]
    streams = [
        ["a cat sat on the mat", "the dog", "it rains"],
        ["the cat sat here", None, "it pours"],
        [None, None, "rain falls"],
    ]
    for found, metric in ((bleu(ours, own), BLEU()), (chrf(ours, own), CHRF())):
        assert found.interval.value == metric.corpus_score(ours, streams).score
        assert "|nrefs:var|" in found.signature


@pytest.mark.parametrize("metric", [bleu, chrf])
def test_a_thousand_resamples_count_each_sentence_once(monkeypatch, metric):
    """And compute one score in Python: the others come from products of matrices."""
    calls = collections.Counter()
    for kind in (BLEU, CHRF):
        for name in ("_compute_segment_statistics", "_compute_score_from_stats"):
            monkeypatch.setattr(kind, name, counted(getattr(kind, name), name, calls))
    found = metric(*texts(200)).interval
    assert calls == {"_compute_segment_statistics": 200, "_compute_score_from_stats": 1}
    assert found.low < found.value < found.high


def counted(function, name, calls):
    def call(*args, **options):
        calls[name] += 1
        return function(*args, **options)

    return call


def test_a_missing_sacrebleu_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    for metric in (bleu, chrf):
        with pytest.raises(MachineError) as caught:
            metric(["a"], ["a"])
        line = "sacrebleu: not installed; expected it, for BLEU and chrF. Fix: pip install 'headway[eval]'"
        assert str(caught.value) == line
    assert rouge(["a"], ["a"]).interval.value == 1.0  # ours, and needs nothing


def test_sacrebleu_is_imported_only_when_asked():
    program = "import sys, headway.evaluation; print('sacrebleu' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SCORER = RougeScorer(KINDS)
HARD = [
    "",
    " ",
    "\n",
    "\n\n",
    "a",
    "A",
    "a a a a",
    "the cat",
    "日本語",
    "naïve Straße",
    "İK",
    "x_y-z's 3.14",
    "a\nb a\n\nb",
]
LINES = st.lists(st.lists(st.sampled_from(["a", "b", "c", "d", "e", "the"]), max_size=8).map(" ".join), max_size=4).map(
    "\n".join
)
STRINGS = st.one_of(LINES, st.sampled_from(HARD), st.text(max_size=30), st.text(alphabet="ab1. \n\tÉK_", max_size=40))


@given(STRINGS, STRINGS)
def test_rouge_is_rouge_scores(ours, own):
    known = SCORER.score(own, ours)
    for kind in KINDS:
        assert rouge([ours], [own], kind).interval.value == pytest.approx(known[kind].fmeasure, abs=ULPS)


@given(LINES, LINES)
def test_rouge_of_many_lines_takes_the_same_one_of_the_longest_subsequences(ours, own):
    """Of several longest common subsequences rougeLsum depends on which is taken."""
    assert rouge([ours], [own], "rougeLsum").interval.value == pytest.approx(
        SCORER.score(own, ours)["rougeLsum"].fmeasure, abs=ULPS
    )


def test_rouge_of_hard_pairs_long_texts_and_many_references():
    for ours in HARD:
        for own in HARD:
            known = SCORER.score(own, ours)
            assert all(
                rouge([ours], [own], kind).interval.value == pytest.approx(known[kind].fmeasure, abs=ULPS)
                for kind in KINDS
            ), (ours, own)
    ours, own = (["\n".join(texts(6, seed)[side]) for seed in range(8)] for side in (0, 1))
    several = [[text, other, ""] for text, other in zip(own, reversed(own), strict=True)]
    for kind in KINDS:
        known = [SCORER.score_multi(refs, text)[kind].fmeasure for text, refs in zip(ours, several, strict=True)]
        found = rouge(ours, several, kind).interval
        assert found.value == pytest.approx(np.mean(known), abs=ULPS) and found.n == 8
        assert found.low < found.value < found.high


def test_which_subsequence_matters(monkeypatch):
    """A negative control: the longest subsequence found from the other end gives another rougeLsum."""
    reference, text = "a b", "b a\na"
    known = SCORER.score(reference, text)["rougeLsum"].fmeasure
    assert rouge([text], [reference], "rougeLsum").interval.value == pytest.approx(known, abs=ULPS)
    chosen = text_metrics._positions

    def other(own, ours):
        return {len(own) - 1 - i for i in chosen(own[::-1], ours[::-1])}

    monkeypatch.setattr(text_metrics, "_positions", other)
    assert rouge([text], [reference], "rougeLsum").interval.value != pytest.approx(known, abs=0.1)


@pytest.mark.parametrize("metric", [exact_match, squad_f1, bleu, chrf, rouge])
def test_texts_without_partner_are_refused(metric):
    with pytest.raises(InputError, match="predictions: 2 texts; expected 1, as many as there are references"):
        metric(["a", "b"], ["a"])
    if metric is not squad_f1:
        with pytest.raises(InputError, match="references: none for prediction 2; expected one text, or several"):
            metric(["a", "b"], ["a", []])


def test_wrong_tags_and_options_are_refused():
    for tag in ("E-PER", "S-PER", "b-per", "PER", "", "O-PER"):
        with pytest.raises(InputError, match=r"tags: '.*'; expected B-TYPE, I-TYPE or O"):
            spans(["O", tag])
    for metric in (span_f1, token_accuracy):
        with pytest.raises(InputError, match="predictions: sentence 2 has 1 tags; expected 2, one per token"):
            metric([["O"], ["O"]], [["O"], ["O", "O"]])
    with pytest.raises(InputError, match="predictions: 0 tokens"):
        token_accuracy([[]], [[]])
    with pytest.raises(ConfigError, match="tokenizer: 'spm'; expected 13a"):
        bleu(["a"], ["a"], tokenizer="spm")
    with pytest.raises(ConfigError, match="word_order: 3"):
        chrf(["a"], ["a"], word_order=3)
    with pytest.raises(ConfigError, match="kind: 'rouge3'; expected rouge1, rouge2"):
        rouge(["a"], ["a"], "rouge3")
