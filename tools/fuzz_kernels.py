"""The native kernels built with AddressSanitizer and called with random shapes, strides, formats and instruction sets.

    python tools/fuzz_kernels.py [--seconds 60] [--seed 0]

A copy of the sources is built aside and run in a child process whose allocator surrounds every tensor with forbidden
bytes: a read or write beside one ends it with a report. So that a clean run means something, a child that reads a row
behind the end of a table must be ended first. Every result is compared with its twin as well. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SANITIZE = "-fsanitize=address -fno-omit-frame-pointer -g -O1"
ENDED = 66  # the exit code of a report


def built(place: Path) -> None:
    """A copy of the sources with a sanitized library in it."""
    shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns("_native*", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / name)
    env = {**os.environ, "CFLAGS": SANITIZE, "CXXFLAGS": SANITIZE, "LDFLAGS": "-fsanitize=address"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=place,
        env=env,
        check=True,
        stderr=subprocess.PIPE,
    )


def child(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    library = subprocess.run(["gcc", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True).stdout
    env = {**os.environ, "LD_PRELOAD": library.strip(), "PYTHONMALLOC": "malloc"}
    env["ASAN_OPTIONS"] = f"detect_leaks=0:exitcode={ENDED}:detect_odr_violation=0"
    env["PYTHONPATH"] = os.pathsep.join(map(str, (place / "src", ROOT / "tests" / "nn", ROOT / "tests")))
    return subprocess.run([sys.executable, __file__, "--inside", *words], env=env, capture_output=True, text=True)


# --- inside the child ----------------------------------------------------------------------------------------------


def each_alone() -> None:
    """Every matrix in an allocation of its own: between those of one region lie no forbidden bytes."""
    from headway.kernels import pages

    pages.empty = lambda shape, like: like.new_empty(*shape)


def beyond_the_end() -> None:
    """A row that a table does not have: what must be seen."""
    import torch

    from headway.kernels import steps
    from headway.kernels.codes import from_blocks
    from headway.kernels.ggml import quantize

    table = from_blocks("Q8_0", quantize("Q8_0", torch.randn(64, 64)))
    steps.rows(table._replace(shape=(10**6, 64)), torch.tensor([64]))


def product(rng: random.Random) -> None:
    import torch

    from headway.kernels import steps
    from headway.kernels.codes import Codes, lay_out
    from headway.kernels.codes import product as twin

    R, C, T = rng.randint(1, 90), rng.randint(1, 400), rng.randint(1, 40)
    bits, chunk = rng.choice([(4, 32), (7, 16), (7, 32), (8, 16), (8, 32)])
    group = chunk * rng.choice([1, 2, 4])
    numbers = torch.rand(2, R, -(-C // group)).to(rng.choice([torch.float16, torch.float32]))
    codes = torch.randint(0, {4: 16, 7: 128, 8: 256}[bits], (R, C), dtype=torch.uint8)
    low = -numbers[1] if rng.random() < 0.5 else None
    matrix = lay_out(Codes(codes, numbers[0], low, 0 if low is not None else 8), bits, chunk, group)
    wide = torch.randn(T, C + 5)
    x = rng.choice([wide[:, 2 : 2 + C], torch.randn(C, T).t(), torch.randn(T, C), torch.randn(1, C).expand(T, C)])
    bias, planes = torch.randn(R) if rng.random() < 0.5 else None, rng.choice([1, 2])
    found, known = steps.linear(x, matrix, bias, planes), twin(x, matrix, planes)
    torch.testing.assert_close(found, known if bias is None else known + bias, rtol=1e-4, atol=1e-2)
    ids = torch.randint(R, (rng.randint(0, 9) * 2,))[:: rng.choice([1, 2])]
    assert torch.equal(steps.rows(matrix, ids), matrix.rows(ids))


def stack(rng: random.Random) -> None:
    """A small model of a random form: packed, padded, and token by token."""
    import test_fused
    import torch

    from headway.config import ModelConfig
    from headway.nn.packed import use_planes

    form = rng.choice(list(test_fused.FORMS))
    sizes = {**test_fused.SIZES, "d_ff": rng.choice([64, 96, 160]), "vocab_size": rng.choice([50, 67])}
    model = test_fused.in_codes(
        ModelConfig(**{**sizes, **test_fused.FORMS[form]}), (rng.choice(["Q8_0", "Q4_0", "Q4_1"]),)
    )
    B, T = rng.randint(1, 5), rng.randint(1, 20)
    ids, real = torch.randint(50, (B, T)), torch.ones(B, T)
    for row in range(B):
        padding = rng.randint(0, T - 1)
        real[row, slice(0, padding) if rng.random() < 0.5 else slice(T - padding, T)] = 0
    with torch.no_grad(), use_planes(rng.choice([1, 2])):
        assert model(ids, attention_mask=rng.choice([None, real])).logits.isfinite().all()
        cache = model.new_cache(B, 30, dtype=rng.choice([None, torch.float16, torch.int8]))
        first = rng.randint(1, T)
        model(ids[:, :first], attention_mask=rng.choice([None, real[:, :first]]), cache=cache)
        for _ in range(rng.randint(0, 6)):
            B = len(cache.lengths)
            assert model(torch.randint(50, (B, 1)), cache=cache).logits.isfinite().all()
            if rng.random() < 0.3:
                cache.reorder(torch.randint(B, (rng.randint(1, 4),)))


def training(rng: random.Random) -> None:
    import torch

    from headway.kernels import training as kernels

    rows, size = rng.randint(1, 70), rng.randint(1, 300)
    x = torch.randn(rows, size, requires_grad=True)
    kernels.rms_norm(x, torch.randn(size, requires_grad=True), 1e-6).sum().backward()
    kernels.relu2(x).sum().backward()
    B, T, K, H = rng.randint(1, 3), rng.randint(1, 90), rng.randint(1, 3), rng.choice([4, 8, 10, 32])
    N, pairs = K * rng.randint(1, 3), rng.randint(1, H // 2)
    shape = kernels.HeadShape(N, K, rng.choice(["half", "interleaved"]), 1e-6)
    weights = (torch.rand(H, requires_grad=True), torch.rand(H, requires_grad=True)) if rng.random() < 0.5 else None
    angles = torch.polar(torch.ones(1, T, pairs), torch.rand(1, T, pairs))[:, :, None]
    qkv = torch.randn(B, T, (N + 2 * K) * H, requires_grad=True)
    q, k, v = (part.transpose(1, 2) for part in kernels.split_heads(qkv, angles, weights, shape))
    starts = torch.randint(0, T, (B, 1)).minimum(torch.arange(T)[None]) if rng.random() < 0.5 else None
    out = kernels.causal_attention(q, k, v, H**-0.5, starts)
    assert out is not None and out.isfinite().all()
    out.sum().backward()


def inside(seconds: float, seed: int) -> None:
    import torch

    from headway.kernels import steps

    torch.set_num_threads(2)
    rng, counts, began = random.Random(seed), dict.fromkeys(("product", "stack", "training"), 0), time.monotonic()
    while time.monotonic() - began < seconds:
        steps.use_level(rng.choice(steps.levels()))
        torch.manual_seed(rng.randrange(2**31))
        for call in (product, product, product, training, stack):
            call(rng)
            counts[call.__name__] += 1
    print(json.dumps({**counts, "levels": steps.levels()}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        each_alone()
    if args.inside == ["beyond"]:
        beyond_the_end()
        return 0
    if args.inside:
        inside(float(args.inside[0]), int(args.inside[1]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        built(place)
        control = child(place, "beyond")
        if control.returncode != ENDED or "AddressSanitizer" not in control.stderr:
            print(control.stderr[-2000:], "error: a read behind a table was not seen", sep="\n", file=sys.stderr)
            return 1
        done = child(place, str(args.seconds), str(args.seed))
    if done.returncode:
        print(done.stderr[-6000:], file=sys.stderr)
        return done.returncode
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps({"benchmark": "fuzz_kernels", "seconds": args.seconds, "seed": args.seed, "reports": 0, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
