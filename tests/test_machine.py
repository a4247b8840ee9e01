"""The machine probe: what is measured, how it is kept, when it is believed, and what is chosen by it."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fault_injection import failing, hooked
from hypothesis import given
from hypothesis import strategies as st

from headway import machine
from headway.machine import Probe
from headway.strict import dump_json

RATES = {1: 50.0, 2: 90.0}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def made(**changes: Any) -> Probe:
    """A quiet machine's probe with this machine's key."""
    whole = Probe(
        *machine._key("cpu"), 1e9, {"float32": RATES, "bfloat16": {1: 5.0, 2: 9.0}}, RATES, {1: 70.0, 2: 80.0}, 2.5
    )
    return replace(whole, **changes)


def place() -> Path:
    """Where this machine's probe is kept."""
    path = machine._file(machine._key("cpu"))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def keep(probe: Probe) -> Path:
    path = place()
    path.write_text(dump_json(asdict(probe)))
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Probe]:
    """`measure` replaced by a counter: the list has one probe per call."""
    calls: list[Probe] = []

    def fake(device: str = "cpu") -> Probe:
        calls.append(made(taken=2e9 + len(calls)))
        return calls[-1]

    monkeypatch.setattr(machine, "measure", fake)
    return calls


# --- kept and read back --------------------------------------------------------------------------------------------

positive = st.floats(1e-6, 1e9)
rates = st.dictionaries(st.integers(1, 512), positive, min_size=1, max_size=6)


@given(
    gemm=st.dictionaries(st.sampled_from(["bfloat16", "float16", "int8"]), rates),
    base=rates,
    read=rates,
    copy=rates,
    numbers=st.tuples(positive, positive, st.floats(0, 1e12), positive),
)
def test_what_is_kept_comes_back_equal(gemm: Any, base: Any, read: Any, copy: Any, numbers: Any):
    taken, overhead, load, share = numbers
    probe = made(gemm={"float32": base, **gemm}, read=read, copy=copy)
    probe = replace(probe, taken=taken, overhead=overhead, load=load, share=share)
    keep(probe)
    again = machine.cached()
    assert again == probe and again is not None and set(again.gemm["float32"]) == set(base)


def test_every_field_is_kept(measured: list[Probe]):
    """No field may come back as its default: the sweep above would not see a field that is dropped on both ways."""
    odd = {"load": 0.123, "share": 0.987, "overhead": 3.21, "taken": 123.0}
    keep(made(**odd))
    again = machine.cached()
    assert again is not None and {name: getattr(again, name) for name in odd} == odd
    assert set(json.loads(place().read_text())) == {field.name for field in fields(Probe)}


def test_a_probe_is_measured_once_and_kept(measured: list[Probe]):
    first = machine.probe()
    assert machine.probe() == machine.probe() == first and len(measured) == 1
    text = place().read_text()
    assert text.endswith("}\n") and json.loads(text)["gemm"]["float32"] == {"1": 50.0, "2": 90.0}
    assert machine.probe(refresh=True) == measured[1] and machine.probe() == measured[1]


@pytest.mark.parametrize("what", ["cpu", "cores", "torch", "format"])
def test_another_machine_is_measured_anew(what: str, measured: list[Probe], monkeypatch: pytest.MonkeyPatch):
    machine.probe()
    if what == "cpu":
        monkeypatch.setattr(machine, "cpu_name", lambda: "another processor")
    if what == "cores":
        monkeypatch.setattr(machine, "cores", lambda: 4096)
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    if what == "format":
        monkeypatch.setattr(machine, "FORMAT", machine.FORMAT + 1)
    machine.probe()
    assert len(measured) == 2 and len(list(place().parent.iterdir())) == 2


# --- damage --------------------------------------------------------------------------------------------------------


def use(probe: Probe) -> None:
    """What the rest of Headway asks of a probe; all of it must be a number that can be divided by."""
    choice = machine.choose(probe)
    assert choice.dtype in machine.TRAINING_DTYPES and type(choice.threads) is int and choice.threads > 0
    assert isinstance(choice.reason, str) and probe.is_quiet in (True, False)
    assert isinstance(probe.cpu, str) and type(probe.cores) is int and probe.cores > 0
    for number in (
        probe.peak(),
        probe.peak("bfloat16", 1),
        probe.peak("int8", 64),
        probe.bandwidth,
        *probe.copy.values(),
    ):
        assert math.isfinite(number) and number > 0
    assert math.isfinite(probe.age) and math.isfinite(probe.overhead) and math.isfinite(probe.share)


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))


WRONG: list[Any] = [
    None,
    True,
    -1,
    0,
    -1.5,
    "x",
    "12",
    [],
    [1],
    {},
    {"x": 1},
    {"-1": 5.0},
    {"1": None},
    {"1": "2"},
    {"1": -3.0},
]


def test_every_damage_of_every_value_counts_as_no_probe():
    """Each value replaced by each wrong one and each left out: what is still believed is still of use."""
    tree = json.loads(dump_json(asdict(made())))
    path = place()
    refused = tried = 0
    believed: dict[str, str] = {}
    for where in leaves(tree):
        for value in [*WRONG, KeyError]:
            damaged = json.loads(json.dumps(tree))
            inner = damaged
            for name in where[:-1]:
                inner = inner[name]
            if value is KeyError:
                del inner[where[-1]]
            else:
                inner[where[-1]] = value
            path.write_text(json.dumps(damaged))
            tried += 1
            probe = machine.cached()
            if probe is None:
                refused += 1
                continue
            try:
                use(probe)
            except Exception as error:
                believed[f"{'.'.join(where)} = {value!r}"] = f"{error!r:.60}"
    assert believed == {}
    assert tried > 200 and refused > tried // 2


def test_a_file_cut_short_counts_as_no_probe():
    path = keep(made())
    whole = path.read_text()
    for cut in range(0, len(whole), max(len(whole) // 50, 1)):
        path.write_text(whole[:cut])
        assert machine.cached() is None, cut
    path.write_text(whole + "x")
    assert machine.cached() is None
    path.write_text(whole + " " * (1 << 20))
    assert machine.cached() is None, "a megabyte is no probe"


@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling link", "bytes"])
def test_what_is_no_file_counts_as_no_probe(kind: str, measured: list[Probe]):
    path = place()
    if kind == "folder":
        path.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    if kind == "dangling link":
        path.symlink_to("nowhere")
    if kind == "bytes":
        path.write_bytes(b"\xff\xfe\x00")
    assert machine.cached() is None
    if kind != "fifo":  # writing to one waits for a reader, as everywhere
        assert machine.probe() == measured[0]


def test_a_disk_that_fails_at_any_moment_costs_the_file_only(measured: list[Probe]):
    """ENOSPC at the k-th file primitive, for every k: the probe is returned, the old file is whole or replaced."""
    old = made(cpu="old")
    for k in range(1, 40):
        keep(old)
        calls = len(measured)
        with hooked(failing(k, errno.ENOSPC)):
            assert machine.probe(refresh=True) == measured[calls]
        kept = machine.cached()
        assert kept in (old, measured[calls]), k
        assert [path.name for path in place().parent.iterdir()] == [place().name], "no temporary file is left"
        if kept == measured[calls] and k > 5:
            break
    else:
        pytest.fail("no clean run in 40 tries")


# --- believed for how long -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "age", "believed"),
    [
        ({}, 0, True),
        ({}, 10**9, True),
        ({"load": 1e6}, 0, True),
        ({"load": 1e6}, 3599, True),
        ({"load": 1e6}, 3601, False),
        ({"share": 0.5}, 3599, True),
        ({"share": 0.5}, 3601, False),
        ({"share": 1.0}, 3601, True),
        ({"load": 1e6}, -(10**6), True),  # the clock was set back: an age is never negative
    ],
)
def test_a_busy_machines_probe_is_believed_for_an_hour(
    changes: dict[str, Any], age: float, believed: bool, measured: list[Probe], monkeypatch: pytest.MonkeyPatch
):
    keep(made(taken=5e9, **changes))
    monkeypatch.setattr(machine, "time", SimpleNamespace(time=lambda: 5e9 + age))
    kept = machine.cached()
    assert kept is not None and kept.age == max(age, 0)
    machine.probe()
    assert (not measured) == believed


def test_quiet_means_less_than_half_of_the_cores():
    for cores in (1, 2, 64):
        assert made(cores=cores, load=0.49 * cores).is_quiet
        assert not made(cores=cores, load=0.5 * cores).is_quiet
    assert made(share=0.95).is_quiet and not made(share=0.55).is_quiet


# --- measuring -----------------------------------------------------------------------------------------------------


def test_a_measurement_of_a_tiny_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_SIZE", 64)
    monkeypatch.setattr(machine, "_STREAM", 1 << 16)
    monkeypatch.setattr(machine, "cores", lambda: 3)
    probe = machine.measure()
    use(probe)
    assert (probe.cpu, probe.cores, probe.torch, probe.device) == machine._key("cpu")
    assert set(probe.gemm["float32"]) == set(probe.read) == set(probe.copy) == {1, 2, 3}
    assert probe.overhead > 0 and probe.share > 0 and probe.age < 60
    keep(probe)
    assert machine.cached() == probe


def test_the_figures_follow_from_the_seconds(monkeypatch: pytest.MonkeyPatch):
    """With every run taking 2 ms: bytes and operations over seconds, a copy counting both ways."""
    monkeypatch.setattr(machine, "_SIZE", 64)
    monkeypatch.setattr(machine, "_STREAM", 1 << 20)
    monkeypatch.setattr(machine, "cores", lambda: 1)
    monkeypatch.setattr(machine, "_median_seconds", lambda run, finish, limit=0.5: 0.002)
    probe = machine.measure()
    assert probe.gemm == {name: {1: 2 * 64**3 / 0.002 / 1e9} for name in ("float32", "bfloat16", "float16", "int8")}
    assert probe.read == {1: (1 << 20) / 0.002 / 1e9} and probe.copy == {1: 2 * (1 << 20) / 0.002 / 1e9}
    assert probe.overhead == pytest.approx(2.0), "a thousand operations in 2 ms are 2 microseconds each"


@pytest.mark.parametrize(("seconds", "size"), [(0.0001, 64), (0.021, 8)])
def test_a_slow_product_is_not_tried_at_twice_the_size(seconds: float, size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_SIZE", 64)
    monkeypatch.setattr(machine, "_median_seconds", lambda run, finish, limit=0.5: seconds)
    rate = machine._gemm("float32", torch.device("cpu"), bool)
    assert rate == pytest.approx(2 * size**3 / seconds / 1e9)


def test_a_dtype_that_torch_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_SIZE", 64)
    monkeypatch.setattr(machine, "_STREAM", 1 << 16)
    monkeypatch.setattr(machine, "cores", lambda: 1)

    def refuse(*_: object) -> None:
        raise RuntimeError("not implemented for 'Char'")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    probe = machine.measure()
    assert "int8" not in probe.gemm and "float32" in probe.gemm
    assert probe.peak("int8") == probe.peak("float32")
    keep(probe)
    assert machine.cached() == probe


def test_threads_are_put_back_when_measuring_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_STREAM", 1 << 16)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    before, asked = torch.get_num_threads(), []

    def fail(*_: object) -> float:
        asked.append(torch.get_num_threads())
        if len(asked) > 4:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(machine, "_gemm", fail)
    with pytest.raises(KeyboardInterrupt):
        machine.measure()
    assert torch.get_num_threads() == before and asked == [1, 1, 1, 1, 2]


class Clock:
    """A clock that only the runs move."""

    def __init__(self, durations: list[float]) -> None:
        self.now, self.durations, self.runs = 0.0, durations, 0

    def run(self) -> None:
        self.now += self.durations[min(self.runs, len(self.durations) - 1)]
        self.runs += 1


@pytest.mark.parametrize(
    ("durations", "runs", "median"),
    [
        ([9.0, 0.01, 0.03, 0.02, 0.05, 0.04], 6, 0.03),  # the first is warming up
        ([9.0, 0.1, 0.3, 0.2, 5.0, 5.0], 4, 0.2),  # half a second is enough
        ([9.0, 2.0, 4.0], 3, 3.0),  # but never fewer than two
    ],
)
def test_the_median_of_a_few_runs(durations: list[float], runs: int, median: float, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(durations)
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    finished: list[int] = []
    seconds = machine._median_seconds(clock.run, lambda: finished.append(clock.runs))
    assert seconds == pytest.approx(median) and clock.runs == runs == len(finished)


# --- chosen --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bfloat16", "dtype"),
    [(0.5, "float32"), (1.0, "float32"), (1.19, "float32"), (1.2, "float32"), (1.21, "bfloat16"), (8.0, "bfloat16")],
)
def test_bfloat16_only_where_it_was_measured_clearly_faster(bfloat16: float, dtype: str):
    probe = made(gemm={"float32": {1: 100.0}, "bfloat16": {1: 100.0 * bfloat16}, "float16": {1: 1e6}, "int8": {1: 1e6}})
    choice = machine.choose(probe)
    assert choice.dtype == dtype, choice
    assert machine.choose(replace(probe, gemm={"float32": {1: 100.0}})).dtype == "float32"


@given(float32=rates, bfloat16=rates)
def test_the_choice_can_be_defended(float32: dict[int, float], bfloat16: dict[int, float]):
    """Nothing measured is much faster than what is chosen, and no smaller number of threads does as well."""
    probe = made(gemm={"float32": float32, "bfloat16": bfloat16, "int8": {1: 1e12}})
    choice = machine.choose(probe)
    table = probe.gemm[choice.dtype]
    best = max(*float32.values(), *bfloat16.values())
    assert table[choice.threads] >= 0.95 * max(table.values())
    assert all(rate < 0.95 * max(table.values()) for count, rate in table.items() if count < choice.threads)
    assert max(table.values()) * 1.2 >= best * (1 - 1e-9)
    assert choice.dtype == "float32" or max(bfloat16.values()) > max(float32.values())
    assert str(choice.threads) in choice.reason and "float32" in choice.reason


def test_peak_of_the_nearest_measured_thread_count():
    probe = made(gemm={"float32": {1: 10.0, 2: 20.0, 8: 60.0, 16: 50.0}})
    for threads, rate in ((None, 60), (1, 10), (2, 20), (3, 20), (6, 60), (8, 60), (13, 50), (1000, 50)):
        assert probe.peak("float32", threads) == rate * 1e9
    assert probe.bandwidth == 90e9


def test_thread_counts():
    assert [machine.thread_counts(n) for n in (1, 2, 3, 4, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]
    for n in range(1, 300):
        counts = machine.thread_counts(n)
        assert counts == sorted(set(counts)) and counts[0] == 1 and counts[-1] == n
        assert all(count.bit_count() == 1 for count in counts[:-1])


# --- what the system says ------------------------------------------------------------------------------------------

MEMINFO = ["MemTotal:       16000 kB", "MemFree:         1000 kB", "MemAvailable:    9000 kB", "", "odd"]


def system(monkeypatch: pytest.MonkeyPatch, **texts: list[str]) -> None:
    """Files of /proc and /sys by their last name; the others are missing."""
    known: Callable[[str], list[str]] = lambda path: texts.get(path.rpartition("/")[2].replace(".", "_"), [])  # noqa: E731
    monkeypatch.setattr(machine, "_lines", known)


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        (None, None, (16000, 9000)),
        ("max", "4096000", (16000, 9000)),
        ("8192000", "1024000", (8000, 7000)),
        ("8192000", "9999999999", (8000, 0)),
        ("99999999999", "1024000", (16000, 9000)),
        ("8192000", None, (16000, 9000)),
        ("", "", (16000, 9000)),
    ],
)
def test_memory_is_what_the_container_may_use(
    limit: str | None, used: str | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    group = {"memory_max": limit, "memory_current": used}
    system(monkeypatch, meminfo=MEMINFO, **{name: [text] for name, text in group.items() if text is not None})
    assert machine.memory() == tuple(1024 * kilobytes if kilobytes else 0 for kilobytes in expected)


def test_a_system_that_says_nothing(monkeypatch: pytest.MonkeyPatch):
    system(monkeypatch)
    assert machine.memory() == (0, 0) and machine.cpu_flags() == [] and isinstance(machine.cpu_name(), str)


def test_this_system():
    total, available = machine.memory()
    assert 0 < available <= total
    assert 1 <= machine.cores() <= (os.cpu_count() or 1) and machine.cpu_name()


def test_processor_name_and_flags(monkeypatch: pytest.MonkeyPatch):
    intel = [
        "processor : 0",
        "model name\t: A Chip: 3 GHz ",
        "flags\t\t: fpu sse avx2 avx512f amx_bf16 fma avx512_bf16",
    ]
    system(monkeypatch, cpuinfo=[*intel, *intel])
    assert machine.cpu_name() == "A Chip: 3 GHz"
    assert machine.cpu_flags() == ["avx2", "avx512f", "amx_bf16", "fma", "avx512_bf16"]
    system(monkeypatch, cpuinfo=["Features : fp asimd crc32 svebf16 i8mm bf16"])
    assert machine.cpu_flags() == ["asimd", "svebf16", "i8mm", "bf16"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert machine.cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in (lambda: monkeypatch.setenv("HEADWAY_CACHE", ""), lambda: monkeypatch.delenv("HEADWAY_CACHE")):
        unset()
        assert machine.cache_folder() == tmp_path / ".cache" / "headway"
