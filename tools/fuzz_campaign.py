"""Damaged files by the seed through every parser of files from outside (row K18, promise P1).

    python tools/fuzz_campaign.py [--count 100000] [--only gguf,onnx] [--seed 0]

For each parser a few small valid files are damaged, one to four times each: bytes changed, taken out, put in, copied,
the rest cut off. Each mutant must be read, or refused by an InputError or ConfigError; anything else is an escape.
Children do the work with 512 MB of address space beyond what they begin with, so a believed length kills one and
counts as an escape too. The last line is JSON: mutants, refused, escapes, median and worst milliseconds, MB grown.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("", "checkpoints", "text")]

import torch  # noqa: E402
from mutants import mutant  # noqa: E402

from headway.checkpoints.gguf import Source, read_gguf, write_gguf  # noqa: E402
from headway.checkpoints.tensors import read_tensors, write_tensors  # noqa: E402
from headway.errors import ConfigError, InputError  # noqa: E402
from headway.kernels.ggml import BLOCKS, dequantize  # noqa: E402
from headway.text import Tokenizer  # noqa: E402
from headway.text.train import train_tokenizer  # noqa: E402

ROOM = 512 << 20
TEXT = "the quick brown fox jumps over the lazy dog; 1234 and a few words more, so that merges exist. " * 4


def gguf_bytes() -> list[bytes]:
    tensors = {}
    for kind, block in BLOCKS.items():
        raw = torch.randint(0, 255, (2, block.bytes * (32 // min(block.size, 32))), dtype=torch.uint8)
        columns = raw.shape[1] // block.bytes * block.size
        tensors[f"blk.0.{kind}.weight"] = Source(kind, (2, columns), raw)
    metadata = {"general.architecture": "llama", "llama.block_count": 1, "llama.rope.freq_base": 1e4, "flag": True}
    metadata |= {"tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.scores": [0.0, -1.0, -2.0]}
    return [b"".join(map(bytes, write_gguf(metadata, tensors)))]


def read_all_gguf(path: Path) -> None:
    with read_gguf(path) as file:
        for name, tensor in file.tensors.items():
            dequantize(tensor.kind, file.raw(name))


def safetensors_bytes() -> list[bytes]:
    table = torch.randn(3, 4)
    tensors = {
        "a": table,
        "tied": table,
        "half": torch.ones(2, 3).half(),
        "ids": torch.arange(5),
        "yes": torch.ones(2) > 0,
    }
    return [b"".join(map(bytes, write_tensors(tensors, {"format": "pt"})))]


def tokenizer_bytes() -> list[bytes]:
    kinds = ("bpe", "wordpiece", "unigram")
    return [train_tokenizer([TEXT], kind=kind, vocab_size=300).to_json().encode() for kind in kinds]


def read_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.from_json(path.read_bytes(), str(path))
    tokenizer.decode(tokenizer.encode("the quick brown <s> 1234"))


def sentencepiece_bytes() -> list[bytes]:
    from test_sentencepiece import trained_model

    return [trained_model(kind, "nmt_nfkc", byte_fallback=True) for kind in ("bpe", "unigram")]


def read_sentencepiece(path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    tokenizer.decode(tokenizer.encode("the quick brown <s> 1234"))


def onnx_bytes() -> list[bytes]:
    import test_onnx
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 8, "patch_size": 4}
    model = Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2, layer_norm_eps=1e-5, use_mask_token=False)).eval()
    return [test_onnx.exported({name: tensor.detach() for name, tensor in model.state_dict().items()})]


def ctranslate2_bytes() -> list[bytes]:
    import test_ctranslate2
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 3, "vocab_size": 60}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 20, "num_mel_bins": 8}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 40) | {"decoder_start_token_id": 41}
    ids |= {"begin_suppress_tokens": None, "suppress_tokens": None}
    config = WhisperConfig(**sizes, **ids, max_source_positions=10, max_target_positions=9)
    state = WhisperForConditionalGeneration(config).half().state_dict()
    with tempfile.TemporaryDirectory() as folder:
        variables = test_ctranslate2.converted(
            {name: tensor for name, tensor in state.items() if name != "proj_out.weight"}
        )
        made = test_ctranslate2.folder_of(Path(folder) / "w", variables)
        BESIDE.update({name: (made / name).read_bytes() for name in ("tokenizer.json", "config.json")})
        return [(made / "model.bin").read_bytes()]


BESIDE: dict[str, bytes] = {}


def read_ctranslate2_folder(path: Path) -> None:
    for name, data in BESIDE.items():
        if not path.with_name(name).exists():
            path.with_name(name).write_bytes(data)
    read_foreign_file(path)


def read_foreign_file(path: Path) -> None:
    from headway.checkpoints.foreign import read_foreign

    read_foreign(path, say=lambda line: None)


PARSERS: dict[str, tuple[str, Callable[[], list[bytes]], Callable[[Path], object]]] = {
    "safetensors": ("model.safetensors", safetensors_bytes, read_tensors),
    "gguf": ("model.gguf", gguf_bytes, read_all_gguf),
    "tokenizer.json": ("tokenizer.json", tokenizer_bytes, read_tokenizer),
    "sentencepiece": ("tokenizer.model", sentencepiece_bytes, read_sentencepiece),
    "onnx": ("model.onnx", onnx_bytes, read_foreign_file),
    "ctranslate2": ("model.bin", ctranslate2_bytes, read_ctranslate2_folder),
}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def batch(files: list[bytes], read: Callable[[Path], object], path: Path, seed: int, count: int) -> dict[str, object]:
    """What one child finds: refused, escapes with what went wrong, milliseconds of each, growth of memory."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    rng, refused, escapes, times = random.Random(seed), 0, [], []
    before = resident()
    for number in range(count):
        path.write_bytes(mutant(files[number % len(files)], rng))
        began = time.perf_counter()
        try:
            read(path)
        except (InputError, ConfigError):
            refused += 1
        except BaseException as error:
            escapes.append(f"seed {seed}, mutant {number}: {type(error).__name__}: {error}"[:300])
        times.append(1000 * (time.perf_counter() - began))
    return {"refused": refused, "escapes": escapes, "times": times, "grown": (resident() - before) / 1e6}


def in_child(action: Callable[[], dict[str, object]], place: Path) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the tokenizers library prints what it catches
        try:
            place.write_text(json.dumps(action()))
            code = 0
        finally:
            os._exit(code)
    return pid


def campaign(name: str, count: int, seed: int, folder: Path) -> dict[str, object]:
    file, make, read = PARSERS[name]
    files = make()
    for whole in files:  # the undamaged ones must pass, or the campaign would prove nothing
        (folder / file).write_bytes(whole)
        read(folder / file)
    size, workers = 2000, os.cpu_count() or 1
    results: list[dict[str, object]] = []
    escapes: list[str] = []
    starts = list(range(0, count, size))
    for group in (starts[i : i + workers] for i in range(0, len(starts), workers)):
        running = []
        for start in group:
            home = folder / f"{start}"
            home.mkdir()
            action = partial(batch, files, read, home / file, seed + start, min(size, count - start))
            running.append((start, home, in_child(action, home / "result.json")))
        for start, home, pid in running:
            _, status = os.waitpid(pid, 0)
            if status:
                escapes.append(f"seed {seed + start}: the child died with status {status}")
            else:
                results.append(json.loads((home / "result.json").read_text()))
            for left in home.iterdir():
                left.unlink()
        print(f"{name}: {min(group[-1] + size, count):,} of {count:,}", file=sys.stderr, flush=True)
    times = [t for result in results for t in result["times"]]  # type: ignore[attr-defined]
    escapes += [line for result in results for line in result["escapes"]]  # type: ignore[attr-defined]
    return {
        "mutants": len(times),
        "refused": sum(result["refused"] for result in results),  # type: ignore[misc]
        "escapes": len(escapes),
        "first_escapes": escapes[:5],
        "median_ms": round(statistics.median(times), 3) if times else None,
        "worst_ms": round(max(times, default=0.0), 1),
        "grown_mb": round(max((result["grown"] for result in results), default=0.0), 1),  # type: ignore[type-var]
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--only", default=",".join(PARSERS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only.split(","):
            place = Path(folder) / name
            place.mkdir()
            found[name] = campaign(name, options.count, options.seed, place)
            print(
                f"{name:15s}", {key: value for key, value in found[name].items() if key != "first_escapes"}, flush=True
            )
            for line in found[name]["first_escapes"]:  # type: ignore[attr-defined]
                print("   ", line)
    print(json.dumps(found))
    return int(any(result["escapes"] for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
