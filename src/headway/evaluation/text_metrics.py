"""Metrics of tags and texts: spans, SQuAD, exact match, BLEU, chrF, ROUGE.

Each equals the program by which the field compares: spans seqeval, BLEU and chrF sacrebleu (which computes them here,
`pip install 'headway[eval]'`), ROUGE the package rouge-score. BLEU and chrF run from 0 to 100, the others from 0 to 1.
Intervals resample sentences, questions or texts whole. Left out: stemming, METEOR, metrics that are themselves models.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from headway.errors import ConfigError, InputError, MachineError
from headway.evaluation.interval import Array, Measured, check_paired, mean_of, of_sums, ratio

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

Texts = Sequence[str]
References = Sequence[str | Sequence[str]]
"""Per prediction one text, or several of which any will do."""
Tags = Sequence[Sequence[str]]
"""Per sentence one tag per token."""
Rouge = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]
BLEU_TOKENIZERS = ("13a", "intl", "zh", "char", "none")
"""Those of sacrebleu's that need nothing more to be installed or fetched."""


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities of one sentence's BIO tags as (type, first token, last token), tokens counted from 0.

    As conlleval (CoNLL-2000) and seqeval's default read them: a B- always begins an entity, an I- goes on with the one
    before it if that has its type, else begins one too. `B` and `I` alone are of the type "_".

    Raises InputError for other tags.
    """
    found: set[tuple[str, int, int]] = set()
    kind, begin = "", -1  # begin: -1 outside of entities
    for i, tag in enumerate([*tags, "O"]):
        letter, _, name = tag.partition("-")
        own = name or "_"
        if letter not in ("B", "I", "O") or (letter == "O" and tag != "O"):
            raise InputError("tags", repr(tag), "B-TYPE, I-TYPE or O")
        goes_on = letter == "I" and begin >= 0 and own == kind
        if begin >= 0 and not goes_on:
            found.add((kind, begin, i - 1))
        if not goes_on:
            kind, begin = own, -1 if letter == "O" else i
    return found


def span_f1(predicted: Tags, true: Tags, *, seed: int = 0) -> Measured:
    """F1 of entities over all sentences (micro): type, first and last token must be right. Resamples sentences.

    Equals seqeval.metrics.f1_score (default mode). 0 where there is no entity, predicted or true.

    Args:
        predicted, true: per sentence one of B-TYPE, I-TYPE, O per token.

    Raises InputError for other tags, no sentences, or sentences of different length.
    """
    _check_tokens(predicted, true)
    rows = []
    for ours, theirs in zip(predicted, true, strict=True):
        found, wanted = spans(ours), spans(theirs)
        rows.append([2 * len(found & wanted), len(found) + len(wanted)])
    what = "span_f1|average:micro|scheme:bio|mode:conlleval|units:sentences"
    return of_sums("span_f1", what, np.array(rows, float), lambda sums: ratio(sums[:, 0], sums[:, 1], 0.0), seed)


def token_accuracy(
    predicted: Sequence[Sequence[str | int]], true: Sequence[Sequence[str | int]], *, seed: int = 0
) -> Measured:
    """The share of tokens whose tag is right, O among them. Resamples sentences.

    Args:
        predicted, true: per sentence one tag, a name or a number, per token.

    Raises InputError for no tokens, or sentences of different length.
    """
    _check_tokens(predicted, true)
    pairs = list(zip(predicted, true, strict=True))
    rows = [[sum(a == b for a, b in zip(ours, own, strict=True)), len(own)] for ours, own in pairs]
    if not sum(row[1] for row in rows):
        raise InputError("predictions", "0 tokens", "one or more")
    what = "token_accuracy|units:sentences"
    return of_sums("token_accuracy", what, np.array(rows, float), lambda sums: ratio(sums[:, 0], sums[:, 1]), seed)


def _check_tokens(predicted: Sequence[Sequence[object]], true: Sequence[Sequence[object]]) -> None:
    check_paired(predicted, true, "sentences")
    for number, (ours, theirs) in enumerate(zip(predicted, true, strict=True), 1):
        if len(ours) != len(theirs):
            raise InputError("predictions", f"sentence {number} has {len(ours)} tags", f"{len(theirs)}, one per token")


def exact_match(predictions: Texts, references: References, *, seed: int = 0) -> Measured:
    """The share of texts that equal a reference of theirs, character by character: nothing is normalised.

    Raises InputError for no texts, or a text without reference.
    """
    rows = _paired(predictions, references)
    what = "exact_match|normalised:no|references:any|units:texts"
    return mean_of("exact_match", what, [float(ours in own) for ours, own in rows], seed)


def squad_normal(text: str) -> str:
    """An answer as SQuAD compares it (arXiv:1606.05250): lower case, no ASCII punctuation, articles, extra spaces."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def squad_exact_match(predictions: Texts, references: References, *, seed: int = 0) -> Measured:
    """SQuAD's exact match, 0 to 1: the share of answers that are, normalised, one of the references.

    As evaluate-v2.0.py (arXiv:1806.03822): references that normalise to nothing do not count, and a question left
    without any cannot be answered: the right answer is then an empty one.

    Raises InputError for no answers.
    """
    what = "squad_exact_match|normalised:squad|references:max|rules:2.0|units:questions"
    return mean_of("squad_exact_match", what, _squad(predictions, references, _same), seed)


def squad_f1(predictions: Texts, references: References, *, seed: int = 0) -> Measured:
    """SQuAD's F1, 0 to 1: words shared by answer and reference, the best reference's; mean over questions.

    Rules and errors as in `squad_exact_match`.
    """
    what = "squad_f1|normalised:squad|references:max|rules:2.0|units:questions"
    return mean_of("squad_f1", what, _squad(predictions, references, _word_f1), seed)


def _squad(predictions: Texts, references: References, score: Callable[[str, str], float]) -> list[float]:
    scores = []
    for ours, own in _paired(predictions, references, unanswerable=True):
        answers = [normal for normal in map(squad_normal, own) if normal] or [""]
        scores.append(max(score(squad_normal(ours), answer) for answer in answers))
    return scores


def _same(ours: str, answer: str) -> float:
    return float(ours == answer)


def _word_f1(ours: str, answer: str) -> float:
    if not ours or not answer:
        return _same(ours, answer)
    a, b = ours.split(), answer.split()
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


def bleu(
    predictions: Texts, references: References, *, tokenizer: str = "13a", lowercase: bool = False, seed: int = 0
) -> Measured:
    """Corpus BLEU (Papineni et al. 2002), 0 to 100, exactly sacrebleu's (arXiv:1804.08771). Resamples sentences.

    The signature holds sacrebleu's own.

    Args:
        predictions, references: texts as they are, not tokenized.
        tokenizer: 13a, intl, zh (Chinese), char, none.

    Raises InputError for no sentences or one without reference, ConfigError for another tokenizer, MachineError where
    sacrebleu is missing.
    """
    if tokenizer not in BLEU_TOKENIZERS:
        raise ConfigError("tokenizer", repr(tokenizer), ", ".join(BLEU_TOKENIZERS))
    # force: no warning about what looks tokenized already.
    metric = _sacrebleu()[0](tokenize=tokenizer, lowercase=lowercase, force=True)
    return _corpus("bleu", metric, predictions, references, _bleu, seed)


def chrf(predictions: Texts, references: References, *, word_order: int = 0, seed: int = 0) -> Measured:
    """Corpus chrF (Popović 2015, doi:10.18653/v1/W15-3049), 0 to 100, exactly sacrebleu's. Resamples sentences.

    Args:
        word_order: 0 for chrF, of characters alone, 2 for chrF++.

    Raises InputError for no sentences or one without reference, ConfigError for another order, MachineError where
    sacrebleu is missing.
    """
    if word_order not in (0, 1, 2):
        raise ConfigError("word_order", str(word_order), "0 to 2")
    name = "chrf" + "+" * word_order
    return _corpus(name, _sacrebleu()[1](word_order=word_order), predictions, references, _chrf, seed)


def _sacrebleu() -> tuple[type[BLEU], type[CHRF]]:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        fix = "pip install 'headway[eval]'"
        raise MachineError("sacrebleu", "not installed", "it, for BLEU and chrF", fix) from None
    return BLEU, CHRF


def _corpus(
    name: str,
    metric: BLEU | CHRF,
    predictions: Texts,
    references: References,
    figure: Callable[[Array], Array],
    seed: int,
) -> Measured:
    """The value by sacrebleu itself, the bounds by its formula over sums of what it counted in each sentence."""
    rows = _paired(predictions, references)
    most = max(len(own) for _, own in rows)
    # sacrebleu has one list per reference; None where a sentence has fewer.
    streams = [[own[i] if i < len(own) else None for _, own in rows] for i in range(most)]
    # What sacrebleu.corpus_score and its own bootstrap call, private for want of a public name.
    counted = metric._extract_corpus_statistics(list(predictions), streams)  # type: ignore[arg-type]
    exact = float(metric._aggregate_and_compute(counted).score)
    what = f"{name}|{metric.get_signature().format()}|units:sentences"
    found = of_sums(name, what, np.array(counted, float), figure, seed)
    return found._replace(interval=found.interval._replace(value=exact))


def _bleu(sums: Array) -> Array:
    """BLEU of sums (R, 10): lengths of predictions and references, n-grams that match and all, n from 1 to 4."""
    length, wanted, right, total = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:]
    # Smoothing "exp": each order without a match counts half as much of a match as the one before.
    misses = np.cumsum(right == 0, axis=1)
    precisions = ratio(np.where(right > 0, right, 0.5**misses), total, 0.0)
    defined = (right.sum(1) > 0) & (total > 0).all(1)
    means = np.exp(np.log(np.where(defined[:, None], precisions, 1.0)).mean(1))
    brevity = np.exp(np.minimum(1 - ratio(wanted, length, np.inf), 0))
    return np.where(defined, 100 * brevity * means, 0.0)


def _chrf(sums: Array) -> Array:
    """chrF of sums (R, 3 x orders): n-grams of predictions, of references, and those that match, order by order."""
    ours, own, matches = sums[:, 0::3], sums[:, 1::3], sums[:, 2::3]
    orders = np.maximum(((ours > 0) & (own > 0)).sum(1), 1)
    precision, recall = (ratio(matches, all_, 0.0).sum(1) / orders for all_ in (ours, own))
    return ratio(100 * 5 * precision * recall, 4 * precision + recall, 0.0)


def rouge(predictions: Texts, references: References, kind: Rouge = "rougeL", *, seed: int = 0) -> Measured:
    """ROUGE F-measure (Lin 2004, ACL W04-1013), 0 to 1, mean over texts; of several references the best.

    Equals rouge-score without stemming. Words are runs of a-z and 0-9 in lower case: other scripts count for nothing.

    Args:
        kind: rouge1, rouge2 words and pairs of words; rougeL the longest common subsequence of the texts; rougeLsum
            that of their lines, which are sentences.

    Raises InputError for no texts or one without reference, ConfigError for another kind.
    """
    if kind not in _ROUGE:
        raise ConfigError("kind", repr(kind), ", ".join(_ROUGE))
    score = _ROUGE[kind]
    scores = [max(score(ours, reference) for reference in own) for ours, own in _paired(predictions, references)]
    return mean_of(kind, f"{kind}|figure:f|stemmer:no|tokens:[a-z0-9]+|references:max|units:texts", scores, seed)


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _f(hits: int, ours: int, own: int) -> float:
    return 2 * hits / (ours + own) if hits else 0.0


def _rouge_n(text: str, reference: str, n: int) -> float:
    ours, own = (
        Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (_words(text), _words(reference))
    )
    return _f((ours & own).total(), ours.total(), own.total())


def _rouge_l(text: str, reference: str) -> float:
    ours, own = _words(text), _words(reference)
    return _f(len(own) - _common(own, ours)[-1].bit_count(), len(ours), len(own))


def _rouge_lsum(text: str, reference: str) -> float:
    """Section 3.2 of the paper: each line of the reference with all lines of the text. As in ROUGE-1.5.5 no word of
    either side is counted more often than it stands there."""
    ours, own = ([_words(line) for line in side.split("\n")] for side in (text, reference))
    left, left_own = (Counter(word for words in side for word in words) for side in (ours, own))
    lengths = left.total(), left_own.total()
    hits = 0
    for words in own:
        for i in sorted(set().union(*(_positions(words, line) for line in ours))):
            if left[words[i]] and left_own[words[i]]:
                hits += 1
                left[words[i]] -= 1
                left_own[words[i]] -= 1
    return _f(hits, *lengths)


_ROUGE: dict[str, Callable[[str, str], float]] = {
    "rouge1": lambda text, reference: _rouge_n(text, reference, 1),
    "rouge2": lambda text, reference: _rouge_n(text, reference, 2),
    "rougeL": _rouge_l,
    "rougeLsum": _rouge_lsum,
}


def _common(own: list[str], ours: list[str]) -> list[int]:
    """The table of longest common subsequences, a row of bits for each word of `ours` read.

    Of own[:i] and ours[:j] it is i less the ones among the low i bits of row j (Hyyrö 2004): one addition of long
    integers makes a whole row, where the usual table takes a step for each pair of words.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(own):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(own)) - 1
    rows = [full]
    for word in ours:
        here = rows[-1] & places.get(word, 0)
        rows.append((rows[-1] + here | rows[-1] - here) & full)
    return rows


def _positions(own: list[str], ours: list[str]) -> set[int]:
    """Words of `own`, by place, in the one longest common subsequence that rouge-score would choose."""
    rows = _common(own, ours)

    def length(i: int, j: int) -> int:
        return i - (rows[j] & (1 << i) - 1).bit_count()

    i, j, found = len(own), len(ours), set()
    while i and j:
        if own[i - 1] == ours[j - 1]:
            i, j = i - 1, j - 1
            found.add(i)
        elif length(i, j - 1) > length(i - 1, j):
            j -= 1
        else:
            i -= 1
    return found


def _paired(
    predictions: Texts, references: References, *, unanswerable: bool = False
) -> list[tuple[str, Sequence[str]]]:
    """Each prediction with its references."""
    check_paired(predictions, references, "texts")
    rows: list[tuple[str, Sequence[str]]] = []
    for number, (ours, own) in enumerate(zip(predictions, references, strict=True), 1):
        several = (own,) if isinstance(own, str) else tuple(own)
        if not several and not unanswerable:
            raise InputError("references", f"none for prediction {number}", "one text, or several")
        rows.append((ours, several))
    return rows
