"""From a cold process to SmolLM2's first token, and what memory loading takes, from its GGUF file of 98 MB.

    python benchmarks/cold_start.py [--runs 5]

Time: a new Python that loads the model and writes one token, in float32 and in the file's codes, against one that
imports torch alone. Memory: the peak beyond what importing torch takes, over the file's size while blocks stay packed,
over the size in float32 when they are unpacked; and the peak of writing 64 tokens from Q8_0, beside llama.cpp's
(xllamacpp) with the same file. Each process tells its own peak (VmHWM). The last line is JSON.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import options, report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "real"))

from real_data import smollm2  # noqa: E402

# Not ru_maxrss, which begins with the peak of the process that started this one.
PEAK = "print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) * 1024)"
TORCH = f"import torch; {PEAK}"
FIRST = """
import torch, headway
loaded = headway.load({path!r}, dtype={dtype})
print(headway.generate(loaded, "The capital of France is", max_tokens=1, temperature=0.0)[0].text)
"""
CODE = """
import headway
from headway import saving
saving.save(headway.load({path!r}, dtype="float32"), {coded!r}, "gguf", dtype="q8_0")
"""
WRITE = """
import headway
loaded = headway.load({path!r})
headway.generate(loaded, "The capital of France is", max_tokens=64, temperature=0.0, ignore_eos=True)
"""
LLAMA_CPP = """
import http.client, json, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers, params.n_parallel, params.verbosity = {path!r}, 256, 0, 1, 0
server = xllamacpp.Server(params)
line = http.client.HTTPConnection(server.listening_address.split("//")[1])
body = {{"prompt": "The capital of France is", "n_predict": 64, "temperature": 0, "ignore_eos": True}}
line.request("POST", "/completion", json.dumps(body), {{"Content-Type": "application/json"}})
assert json.loads(line.getresponse().read())["timings"]["predicted_n"] == 64
"""
LOAD = "import torch, headway; loaded = headway.load({path!r}, dtype={dtype})\n"


def timed(code: str) -> tuple[float, list[str]]:
    """Seconds until it prints its first line, which is when a token is there, and all that it prints."""
    # As for a user's second call: modules are compiled already, also where this shell forbids to keep them.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE, text=True, env=kept) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        seconds = time.perf_counter() - began
        rest = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"a process ended with {process.returncode}")
    return seconds, (first + rest).split("\n")


def main() -> None:
    chosen = options(__doc__ or "", runs=5)
    path = str(smollm2())
    names = {"torch alone": TORCH, "first token": FIRST.format(path=path, dtype="torch.float32")}
    names["first token, in codes"] = FIRST.format(path=path, dtype="None")
    times: dict[str, list[float]] = {name: [] for name in names}
    for code in names.values():
        timed(code)
    for _ in range(chosen.runs):  # interleaved
        for name, code in names.items():
            times[name].append(timed(code)[0])
    base = int(timed(TORCH)[1][0])
    size, parameters = Path(path).stat().st_size, 134_515_008
    memory = {}
    for dtype, unit in (("None", size), ("torch.float32", 4 * parameters)):
        peak = int(timed(LOAD.format(path=path, dtype=dtype) + PEAK)[1][-2])
        memory[dtype] = round((peak - base) / unit, 3)
    with tempfile.TemporaryDirectory() as folder:
        coded = Path(folder) / "q8_0.gguf"
        timed(CODE.format(path=path, coded=str(coded)))
        writers = {"headway": WRITE, "llama.cpp": LLAMA_CPP}
        peaks = {name: int(timed(code.format(path=str(coded)) + PEAK)[1][-2]) for name, code in writers.items()}
    report(
        {
            "peak of writing from Q8_0, MB": {name: round(peak / 1e6) for name, peak in peaks.items()},
            "import torch, MB": round(base / 1e6),
            "seconds": {name: round(statistics.median(values), 2) for name, values in times.items()},
            "spread": {name: [round(min(values), 2), round(max(values), 2)] for name, values in times.items()},
            "peak_over_file_packed": memory["None"],
            "peak_over_float32": memory["torch.float32"],
        }
    )


if __name__ == "__main__":
    main()
