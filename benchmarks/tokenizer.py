"""Batch encoding beside the `tokenizers` library's own call on the same tokenizer.json, WikiText-2's lines, all cores.

Ours adds that no user text can spell a control token, pieces of bounded length, and token ids as plain lists; the
library's `encode_batch_fast` is timed with its ids taken out as lists too.
"""

from __future__ import annotations

import statistics

import tokenizers
from common import clock, options, report, wikitext

from headway.text import train_tokenizer


def main() -> None:
    args = options(__doc__ or "", rounds=7, vocab_size=8192)
    lines = wikitext("train").decode().splitlines(keepends=True)
    size = sum(len(line.encode()) for line in lines)
    rows: dict[str, dict[str, float]] = {}
    for kind in ("bpe", "wordpiece", "unigram"):
        ours = train_tokenizer(lines[:8000], kind, args.vocab_size)
        theirs = tokenizers.Tokenizer.from_str(ours.to_json())
        pairs = []
        for _ in range(args.rounds + 1):  # the first warms up
            a = clock(lambda ours=ours: ours.encode_batch(lines))
            b = clock(lambda theirs=theirs: [e.ids for e in theirs.encode_batch_fast(lines, add_special_tokens=False)])
            pairs.append((a, b))
        pairs = pairs[1:]
        seconds = [statistics.median(column) for column in zip(*pairs, strict=True)]
        rows[kind] = {
            "headway_mb_per_s": round(size / seconds[0] / 1e6, 2),
            "tokenizers_mb_per_s": round(size / seconds[1] / 1e6, 2),
            "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        }
        print(f"{kind:10} {rows[kind]}", flush=True)
    report({"benchmark": "tokenizer", "bytes": size, **rows})


if __name__ == "__main__":
    main()
