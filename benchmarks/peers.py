"""Headway in codes beside its peers on this machine: rounds in which each takes its turn, medians, ratios.

    python benchmarks/peers.py decode contended far large prefill batch pair embed vision [--rounds 5] [--threads 2]

decode, far, prefill, batch: SmolLM2-135M in Q8_0, Q4_0 and Q4_1 against llama.cpp's own loop (package xllamacpp), which
reads the same files and tells its own times, and with `--against llama.cpp,transformers,ctranslate2,openvino` others;
contended decodes beside a process that keeps one core busy; far decodes after 1,800 tokens. large: Llama 3.2 1B's shape
with SmolLM2's vocabulary, random weights in Q4_0, larger than any cache: every instruction set against llama.cpp and
transformers. pair: an encoder-decoder of flan-t5-small's shape, random weights in INT8, against transformers in float32
and CTranslate2 in INT8 where that is installed. embed: all-MiniLM in INT8 against transformers in float32, sorted and
batched as sentence-transformers does. vision: a ViT-S/16 with random weights.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import clock, gemm_peak, memory_read, report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "real"))

from real_data import minilm, smollm2, wikitext

import headway
from headway import peers, saving
from headway.generation import GenerationOptions, generate
from headway.nn import Transformer
from headway.quantization.walk import SCHEMES, quantized

KINDS = ("q8_0", "q4_0", "q4_1")
WRITTEN = 128  # tokens a run of decoding writes


def in_turn(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Each call's figure, once to warm up and then once a round in turn: medians, and lowest and highest."""
    rows = {name: [round(x, 2) for x in rate] for name, rate in peers.in_turn(calls, rounds, lambda _: None).items()}
    print(rows, flush=True)
    ours = rows["headway"][0]
    return {**rows, "ratios": {name: round(ours / row[0], 2) for name, row in rows.items() if name != "headway"}}


def gguf_files(folder: Path) -> dict[str, Path]:
    """Written once, by the first part that asks."""
    paths = {kind: folder / f"{kind}.gguf" for kind in KINDS}
    if not all(path.exists() for path in paths.values()):
        plain = headway.load(smollm2(), dtype="float32")
        for kind, path in paths.items():
            saving.save(plain, path, "gguf", dtype=kind)
    return paths


def prompt_of(loaded: headway.Loaded, length: int) -> list[int]:
    return loaded.words.encode(wikitext("test")[:9000])[:length]


def seconds(loaded: headway.Loaded, prompts: list[list[int]], count: int, beams: int = 1) -> float:
    how = {"beams": beams} if beams > 1 else {"temperature": 0.0}
    options = GenerationOptions(max_tokens=count, min_tokens=count, batch_size=len(prompts), **how)
    return clock(lambda: generate(loaded.model, loaded.words, prompts, options))


def beside(
    args: argparse.Namespace, what: str, path: Path, rows: int, length: int, new: int = WRITTEN
) -> dict[str, Any]:
    """Headway and whoever of `--against` is installed and does that, from one file, after real prompts."""
    with tempfile.TemporaryDirectory() as place:
        given = peers.Given(headway.load(path), Path(place), args.threads)
        others, absent = peers.opened(args.against, what, given)
        work = peers.Work([prompt_of(given.loaded, length)] * rows, new)
        everyone = {"headway": peers.Headway(given), **others}
        calls = {name: partial(peers.rate, what, peer, work) for name, peer in everyone.items()}
        return {**in_turn(calls, args.rounds), **({"absent": absent} if absent else {})}


def decode(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {kind: beside(args, "decode", path, 1, 16) for kind, path in gguf_files(folder).items()}


@contextlib.contextmanager
def neighbour() -> Iterator[None]:
    """A process that keeps one core busy meanwhile."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


def contended(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Decoding beside a busy process; the ratio to `alone` is what it leaves of the speed."""
    out = {}
    for kind, path in gguf_files(folder).items():
        given = peers.Given(headway.load(path), folder, args.threads)
        work = peers.Work([prompt_of(given.loaded, 16)], WRITTEN)
        ours, theirs = (partial(peers.rate, "decode", peer(given), work) for peer in (peers.Headway, peers.LlamaCpp))
        calls = {"headway": neighbour()(ours), "alone": ours}
        out[kind] = in_turn(calls | {"llama.cpp": neighbour()(theirs), "llama.cpp, alone": theirs}, args.rounds)
    return out


def prefill(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {kind: beside(args, "prefill", path, 1, 512, 1) for kind, path in gguf_files(folder).items()}


def batch(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens a second of all rows together."""
    return {str(rows): beside(args, "batch", gguf_files(folder)["q8_0"], rows, 16, 64) for rows in (4, 16, 64)}


def far(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Decoding after 1,800 tokens, where keys and values weigh as much as the weights."""
    return beside(args, "decode", gguf_files(folder)["q4_0"], 1, 1800)


def large(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens a second, and what they read of the weights as a share of the memory's measured speed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from headway.kernels.steps import levels, use_level

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, tie_word_embeddings=True, rope_theta=500000.0)
    theirs, count = LlamaForCausalLM(config).eval(), 24
    theirs.save_pretrained(folder / "large")
    with tempfile.TemporaryDirectory() as place:
        words = Path(place) / "words"
        saving.save(headway.load(smollm2(), dtype="float32"), words, "hf")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / "large" / name).write_bytes((words / name).read_bytes())
    path = folder / "large.gguf"
    saving.save(headway.load(folder / "large"), path, "gguf", dtype="q4_0")
    loaded = headway.load(path)
    peer = peers.LlamaCpp(peers.Given(loaded, folder, args.threads))
    prompt = prompt_of(loaded, 16)
    given = torch.tensor([prompt])

    def ours(level: str) -> float:
        use_level(level)
        return (count - 1) / (seconds(loaded, [prompt], count) - seconds(loaded, [prompt], 1))

    def transformers(model: Any) -> float:
        def took(new: int) -> float:
            length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
            return clock(lambda: model.generate(given, **length))

        return 7 / (took(8) - took(1))

    int8 = torch.ao.quantization.quantize_dynamic(deepcopy(theirs), {torch.nn.Linear}, torch.qint8)
    calls = {"headway": partial(ours, ""), **{f"headway, {level}": partial(ours, level) for level in levels()}}
    calls |= {"llama.cpp": lambda: peer.writing(peers.Work([prompt], count))}
    calls |= {"transformers": partial(transformers, theirs), "transformers, int8": partial(transformers, int8)}
    calls |= {"memory, GB/s": lambda: memory_read() / 1e9}
    found = in_turn(calls, args.rounds)
    use_level("")
    read = path.stat().st_size / 1e9 * found["headway"][0]
    return {**found, "GB/s": round(read, 1), "share": round(read / found["memory, GB/s"][0], 2)}


def pair(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    shape = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 32128}
    config = T5Config(**shape, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    theirs, count = T5ForConditionalGeneration(config).eval(), 64
    theirs.save_pretrained(folder / "t5")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 32128)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder / "t5")
    loaded = headway.load(folder / "t5")
    ours = replace(loaded, model=quantized(loaded.model, SCHEMES["int8"], "round"))
    prompt = torch.randint(3, 32128, (1, 64))
    tokens = [f"w{i}" for i in prompt[0].tolist()]
    peer = ctranslate2_of(folder, args.threads)
    out = {}
    for beams in (1, 4):
        length = {"max_new_tokens": count, "min_new_tokens": count, "num_beams": beams, "do_sample": False}
        calls = {
            "headway": lambda: count / seconds(ours, prompt.tolist(), count, beams),  # noqa: B023
            "transformers": lambda: count / clock(lambda: theirs.generate(prompt, **length)),  # noqa: B023
        }
        if peer is not None:
            decoding = {"beam_size": beams, "max_decoding_length": count, "min_decoding_length": count}
            calls["ctranslate2"] = lambda: count / clock(lambda: peer.translate_batch([tokens], **decoding))  # noqa: B023
        out[f"beam {beams}" if beams > 1 else "greedy"] = in_turn(calls, args.rounds)
    return out


def ctranslate2_of(folder: Path, threads: int) -> Any:
    try:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        return None
    TransformersConverter(str(folder / "t5")).convert(str(folder / "t5-ct2"), quantization="int8", force=True)
    return ctranslate2.Translator(str(folder / "t5-ct2"), compute_type="int8", inter_threads=1, intra_threads=threads)


def embed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    lines = [line for line in wikitext("test").splitlines() if line.strip()][: args.lines]
    loaded = headway.load(minilm())
    ours = replace(loaded, model=quantized(loaded.model, SCHEMES["int8"], "round"))
    theirs = peers.Transformers(peers.Given(loaded, folder, args.threads))
    cosine = (headway.embed(ours, lines) * theirs.embeddings(lines)).sum(1)
    calls = {
        "headway": lambda: len(lines) / clock(lambda: headway.embed(ours, lines)),
        "headway, float32": lambda: len(lines) / clock(lambda: headway.embed(loaded, lines)),
        "transformers": lambda: len(lines) / theirs.vectors(lines),
    }
    return {**in_turn(calls, args.rounds), "cosine": [round(float(x), 4) for x in (cosine.mean(), cosine.min())]}


@torch.no_grad()
def vision(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    theirs, pixels = ViTForImageClassification(config).eval(), torch.randn(8, 3, 224, 224)
    theirs.save_pretrained(folder / "vit")
    loaded = headway.load(folder / "vit")
    ours: Transformer = quantized(loaded.model, SCHEMES["int8"], "round")
    calls = {
        "headway": lambda: 8 / clock(lambda: ours(pixel_values=pixels)),
        "headway, float32": lambda: 8 / clock(lambda: loaded.model(pixel_values=pixels)),
        "transformers": lambda: 8 / clock(lambda: theirs(pixel_values=pixels)),
    }
    return in_turn(calls, args.rounds)


PARTS = {
    "decode": decode,
    "contended": contended,
    "large": large,
    "prefill": prefill,
    "far": far,
    "batch": batch,
    "pair": pair,
    "embed": embed,
    "vision": vision,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--rounds", type=int, default=5)
    names = ",".join(peers.PEERS)
    parser.add_argument("--against", default="llama.cpp", help=f"of {names}, as far as installed")
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    args.against = [name for name in args.against.split(",") if name]
    torch.set_num_threads(args.threads)
    from headway.kernels.steps import levels

    out: dict[str, Any] = {"benchmark": "peers", "instruction set": levels()[-1:], "before": os.getloadavg()[0]}
    out["float32 products, GFLOP/s"] = round(gemm_peak() / 1e9, 1)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts or PARTS:
            print(f"== {name}", flush=True)
            out[name] = PARTS[name](args, Path(folder))
    report(out)


if __name__ == "__main__":
    main()
