"""What this machine can do, measured: matrix products per dtype, memory bandwidth, the cost of one small operation.

A data sheet is a poor guide: there are CPUs with bfloat16 instructions on which a bfloat16 product runs at half the
rate of float32, or a tenth. So the dtype and the thread count of a run are chosen from `probe`, which takes a few
seconds, is kept under `cache_folder()` and is taken again when the CPU, its number of threads or torch changes.

Every figure is the median of several runs. torch.utils.benchmark.Timer is not used: it measures one thread unless
told otherwise.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from headway import files
from headway.errors import HeadwayError, InputError
from headway.strict import dump_json, strict_json

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16", "int8"]
TRAINING_DTYPES = ("float32", "bfloat16")
FORMAT = 2
_SIZE = 1024  # of the square matrices: large enough for the peak rate, 7 ms at 300 GFLOP/s
_QUICK = 0.02  # seconds; a product slower than this is not tried at twice the size
_BUSY_AGE = 3600.0
# A neighbour on one of two processors halves the share; the kernel's own housekeeping costs a few hundredths.
_GRANTED = 0.9
_STREAM = 128 << 20  # bytes: beyond most last-level caches
_REPEATS = 5
# A lower precision must be this much faster than float32 to be worth its rounding.
_WORTH = 1.2


@dataclass(frozen=True)
class Probe:
    """One machine's measured limits.

    Attributes:
        cpu, cores, torch: what the figures belong to.
        device: "cpu" or the CUDA device measured.
        taken: when, in seconds since 1970.
        gemm: dtype -> threads -> 10^9 floating (or integer) operations per second of a square product.
        read, copy: threads -> 10^9 bytes per second; a copy counts what it reads and what it writes.
        overhead: microseconds of one elementwise operation on a few numbers.
        load: the system's load average before measuring.
        share: CPU time that the threads got over what they asked for; below 1, others were measured too.
    """

    cpu: str
    cores: int
    torch: str
    device: str
    taken: float
    gemm: dict[str, dict[int, float]]
    read: dict[int, float]
    copy: dict[int, float]
    overhead: float
    load: float = 0.0
    share: float = 1.0

    @property
    def is_quiet(self) -> bool:
        """Whether the machine had little else to do while it was measured."""
        return self.load < 0.5 * self.cores and self.share > _GRANTED

    @property
    def age(self) -> float:
        """Seconds since it was taken."""
        return max(time.time() - self.taken, 0.0)

    def peak(self, dtype: str = "float32", threads: int | None = None) -> float:
        """Measured operations per second of `dtype`'s product: at `threads` (or the nearest measured), or the best."""
        rates = self.gemm.get(dtype) or self.gemm["float32"]
        if threads is None:
            return max(rates.values()) * 1e9
        return rates[min(rates, key=lambda count: abs(count - threads))] * 1e9

    @property
    def bandwidth(self) -> float:
        """Measured bytes per second of reading memory, at the best thread count."""
        return max(self.read.values()) * 1e9


class Choice(NamedTuple):
    """The dtype worth a trial and the threads with the highest measured rate, and the figures behind them."""

    dtype: str
    threads: int
    reason: str


def cache_folder() -> Path:
    """Where Headway keeps what can be made again: $HEADWAY_CACHE or ~/.cache/headway."""
    return Path(os.environ.get("HEADWAY_CACHE") or Path.home() / ".cache" / "headway")


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The vector instructions that matter here, in the system's spelling; empty where it does not say."""
    wanted = ("avx", "avx2", "fma", "f16c", "avx512", "avx_vnni", "amx", "asimd", "sve", "bf16", "i8mm")
    for line in _lines("/proc/cpuinfo"):
        if line.startswith(("flags", "Features")):
            return [flag for flag in line.partition(":")[2].split() if flag.startswith(wanted) or "bf16" in flag]
    return []


def cores() -> int:
    """Processors this process may use (its affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> tuple[int, int]:
    """(total, available) bytes of memory, the container's limit included; zeros when unknown."""
    rows = {line.partition(":")[0]: line.split()[1] for line in _lines("/proc/meminfo") if len(line.split()) > 1}
    total, available = (int(rows.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = "".join(_lines("/sys/fs/cgroup/memory.max")).strip()
    used = "".join(_lines("/sys/fs/cgroup/memory.current")).strip()
    if limit.isdigit() and used.isdigit():
        total, available = min(total, int(limit)), min(available, max(int(limit) - int(used), 0))
    return total, available


def keep_memory() -> None:
    """Have the C library keep what is freed for what comes next, instead of giving it back after every step.

    Pages that are given back are cleared when they come again: 3 % of a training step. Only glibc can be told so.
    """
    if libc := _glibc():
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def return_memory() -> None:
    """Have the C library give back what was freed: after a load, which passes more through memory than it leaves."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def peak_bytes() -> int:
    """Most memory that this process has held at once, from its own beginning on.

    Not getrusage's ru_maxrss, which begins with that of the process that started it; that where there is no /proc.
    """
    told = next((line.split()[1] for line in _lines("/proc/self/status") if line.startswith("VmHWM:")), None)
    if told is not None:
        return int(told) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> bool:
    """Have `peak_bytes` count from now on; whether the system can do that, as Linux does (proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


# --- measuring ---------------------------------------------------------------------------------------------------


def thread_counts(available: int) -> list[int]:
    """1, 2, 4, ... and `available`."""
    powers = [1 << k for k in range(available.bit_length()) if 1 << k < available]
    return [*powers, available]


def _median_seconds(run: Callable[[], object], finish: Callable[[], object], limit: float = 0.5) -> float:
    """Median time of up to `_REPEATS` runs after a warm one; slow runs are repeated less, at least twice."""
    run()
    finish()
    times: list[float] = []
    while len(times) < _REPEATS and (len(times) < 2 or sum(times) < limit):
        begin = time.perf_counter()
        run()
        finish()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _gemm(dtype: str, device: torch.device, finish: Callable[[], object]) -> float | None:
    """10^9 operations per second of one square product, None where torch cannot do it.

    The size doubles while a product stays quick: a dtype without a kernel of its own can be a hundred times slower.
    """
    import torch

    n = _SIZE // 8
    while True:
        try:
            if dtype == "int8":
                a, b = (torch.randint(-128, 127, (n, n), dtype=torch.int8, device=device) for _ in range(2))
                seconds = _median_seconds(lambda a=a, b=b: torch._int_mm(a, b), finish)  # type: ignore[misc]
            else:
                a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
                seconds = _median_seconds(lambda a=a, b=b: a @ b, finish)  # type: ignore[misc]
        except (RuntimeError, AttributeError):
            return None
        if n >= _SIZE or seconds > _QUICK:
            return float(2 * n**3 / seconds / 1e9)
        n *= 2


def _share(threads: int, seconds: float = 0.25) -> float:
    """CPU time got over CPU time asked for, while products keep the threads busy: 1 when nobody else runs.

    The load average is slow to rise and a neighbour's burst is over before it shows.
    """
    import torch

    a = torch.randn(_SIZE, _SIZE)
    begin, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < seconds:
        a @ a
    return (time.process_time() - used) / (time.perf_counter() - begin) / threads


def measure(device: str = "cpu") -> Probe:
    """Measure now. Takes some seconds; torch's thread count is put back afterwards."""
    import torch

    place, load = torch.device(device), os.getloadavg()[0]
    finish = torch.cuda.synchronize if place.type == "cuda" else bool
    before = torch.get_num_threads()
    counts = thread_counts(cores()) if place.type == "cpu" else [before]
    gemm: dict[str, dict[int, float]] = {name: {} for name in ("float32", "bfloat16", "float16", "int8")}
    read: dict[int, float] = {}
    copy: dict[int, float] = {}
    with torch.inference_mode():
        source = torch.ones(_STREAM // 4, device=place)
        target = torch.empty_like(source)
        small = torch.ones(8, device=place)
        try:
            for count in counts:
                torch.set_num_threads(count)
                for name, rates in gemm.items():
                    rate = _gemm(name, place, finish)
                    if rate is not None:
                        rates[count] = rate
                read[count] = _STREAM / _median_seconds(source.sum, finish) / 1e9
                copy[count] = 2 * _STREAM / _median_seconds(lambda: target.copy_(source), finish) / 1e9
            share = _share(counts[-1]) if place.type == "cpu" else 1.0
        finally:
            torch.set_num_threads(before)

        def many() -> None:
            for _ in range(1000):
                small.add_(1.0)

        overhead = _median_seconds(many, finish) * 1e3
    measured = {name: rates for name, rates in gemm.items() if rates}
    return Probe(*_key(device), time.time(), measured, read, copy, overhead, load, share)


def _key(device: str) -> tuple[str, int, str, str]:
    import torch

    name = torch.cuda.get_device_name(device) if device != "cpu" else cpu_name()
    return name, cores(), str(torch.__version__), device


def _file(key: tuple[str, int, str, str]) -> Path:
    digest = hashlib.sha256(dump_json([FORMAT, *key]).encode()).hexdigest()[:16]
    return cache_folder() / f"machine-{digest}.json"


def cached(device: str = "cpu") -> Probe | None:
    """The probe kept for this machine, or None; a damaged file counts as none."""
    path = _file(_key(device))
    try:
        return _parse(strict_json(files.read_bytes(path, 1 << 20), str(path)), str(path))
    except InputError:
        return None


def _parse(tree: object, where: str) -> Probe:
    """A probe from what a file holds; every figure is a number that can be divided by."""

    def above(value: object, *, or_zero: bool = False) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or (value == 0 and not or_zero):
            raise ValueError(value)
        return float(value)

    def rates(value: object) -> dict[int, float]:
        assert isinstance(value, dict) and value
        return {int(above(int(count))): above(rate) for count, rate in value.items()}

    try:
        assert isinstance(tree, dict) and all(type(tree[name]) is str for name in ("cpu", "torch", "device"))
        assert type(tree["cores"]) is int
        gemm = {str(name): rates(value) for name, value in tree["gemm"].items()}
        return Probe(
            *(tree["cpu"], int(above(tree["cores"])), tree["torch"], tree["device"]),
            taken=above(tree["taken"], or_zero=True),
            gemm={"float32": gemm["float32"], **gemm},
            read=rates(tree["read"]),
            copy=rates(tree["copy"]),
            overhead=above(tree["overhead"], or_zero=True),
            load=above(tree["load"], or_zero=True),
            share=above(tree["share"], or_zero=True),
        )
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError):
        raise InputError(where, "not a machine probe", "what headway doctor --probe writes") from None


def probe(device: str = "cpu", *, refresh: bool = False) -> Probe:
    """The machine's limits: kept ones where there are any, else measured now and kept if the disk allows.

    What was measured on a busy machine is believed for an hour only.
    """
    kept = None if refresh else cached(device)
    if kept is not None and (kept.is_quiet or kept.age < _BUSY_AGE):
        return kept
    measured = measure(device)
    path = _file(_key(device))
    try:
        files.make_dir(path.parent)
        files.atomic_write(path, dump_json(asdict(measured)).encode() + b"\n")
    except HeadwayError:
        return measured  # a read-only home only means that the next run measures again
    return measured


def choose(limits: Probe) -> Choice:
    """The dtype and thread count for training on this machine, by what was measured."""
    best = {name: max(limits.gemm[name].values()) for name in TRAINING_DTYPES if name in limits.gemm}
    dtype = "bfloat16" if best.get("bfloat16", 0.0) > _WORTH * best["float32"] else "float32"
    rates = limits.gemm[dtype]
    # Within 5 % of the best the smaller count wins: the rest of the machine stays free for the same speed.
    threads = min(count for count, rate in rates.items() if rate >= 0.95 * max(rates.values()))
    reason = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in best.items())
    return Choice(dtype, threads, f"{reason}; {threads} of {limits.cores} threads give {rates[threads]:.0f}")
