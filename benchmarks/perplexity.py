"""Perplexity of SmolLM2-135M-Instruct on WikiText-2's whole test text (raw), this library's beside transformers'.

    python benchmarks/perplexity.py [--context 1024] [--stride 512] [--only ours|theirs] [--threads N]

Windows of `context` tokens, a new one every `stride`, each token scored once with the longest past it has in a window
(the method of transformers' own documentation). The reference is a LlamaForCausalLM whose weights the gguf package
unpacked. About 20 minutes a side on two cores. The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "real"))

import torch  # noqa: E402
from common import report  # noqa: E402


def ours(ids: list[int], context: int, stride: int) -> dict[str, float]:
    import test_real_smollm2 as real

    from headway.evaluation import TextTokens, perplexity

    loaded, began = real.ours(), time.perf_counter()
    text = TextTokens.of(ids, loaded.words)
    found = perplexity(loaded.model, [text], context=context, stride=stride)
    return {"perplexity": found.perplexity.value, "tokens": found.tokens, "seconds": time.perf_counter() - began}


def theirs(ids: list[int], context: int, stride: int) -> dict[str, float]:
    import test_real_smollm2 as real

    model, began = real.theirs(), time.perf_counter()
    total, count, end = 0.0, 0, 1
    with torch.no_grad():
        for begin in range(0, len(ids), stride):
            window = torch.tensor([ids[begin : begin + context]])
            new = begin + window.shape[1] - end  # tokens that no window has scored
            logits = model(window, logits_to_keep=new + 1).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, window[0, -new:], reduction="sum").item()
            count, end = count + new, begin + window.shape[1]
            print(f"theirs: {end:,} of {len(ids):,}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
            if end >= len(ids):
                break
    return {"perplexity": math.exp(total / count), "tokens": count, "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--only", choices=("ours", "theirs"))
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    import test_real_smollm2 as real
    from real_data import wikitext

    ids = real.ours().words.encode(wikitext("test"))
    sides = {"ours": ours, "theirs": theirs}
    chosen = [options.only] if options.only else list(sides)
    report({name: sides[name](ids, options.context, options.stride) for name in chosen})


if __name__ == "__main__":
    main()
