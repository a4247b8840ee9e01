"""`headway doctor` and the machine probe behind it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from headway import machine
from headway.cli import doctor
from headway.kernels import built, native, steps


def test_doctor_says_what_is_there(command):
    said = command("doctor")
    assert said.code == 0 and f"torch {torch.__version__}" in said.out and "headway doctor --probe" in said.out
    known = command("doctor", "--json").json
    assert known["packages"]["torch"] == torch.__version__ and known["cores"] >= 1 and known["memory"] > 0


def small_probe(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "_SIZE", 64)
    monkeypatch.setattr(machine, "_STREAM", 1 << 16)


def test_probe_measures_prints_and_is_kept(command, monkeypatch, tmp_path):
    small_probe(monkeypatch, tmp_path)
    before = torch.get_num_threads()
    known = command("doctor", "--probe", "--json").json
    assert torch.get_num_threads() == before
    assert all(rate > 0 for rates in known["probe"]["gemm"].values() for rate in rates.values())
    assert set(known["probe"]["gemm"]["float32"]) == {str(n) for n in machine.thread_counts(machine.cores())}
    kept = machine.cached()
    assert kept is not None and kept.gemm["float32"] == {
        int(k): v for k, v in known["probe"]["gemm"]["float32"].items()
    }
    monkeypatch.setattr(machine, "measure", lambda device: pytest.fail("measured again"))
    assert machine.probe() == kept
    said = command("doctor")
    assert said.code == 0


def test_the_table_names_every_measurement(command, monkeypatch, tmp_path):
    small_probe(monkeypatch, tmp_path)
    said = command("doctor", "--probe")
    for name in (
        "float32 product",
        "bfloat16 product",
        "memory read",
        "memory copy",
        "one small operation",
        "training here",
    ):
        assert name in said.out, said.out


def probe(**fields):
    rates = {1: 10.0, 2: 20.0}
    base = machine.Probe("cpu", 2, "2", "cpu", 1e9, {"float32": rates, "bfloat16": rates}, rates, rates, 1.0)
    return dataclasses.replace(base, **fields)


def test_choice_follows_the_measurement():
    slow = probe(gemm={"float32": {1: 100.0, 2: 190.0}, "bfloat16": {1: 10.0, 2: 19.0}})
    assert machine.choose(slow)[:2] == ("float32", 2)
    fast = probe(gemm={"float32": {1: 100.0, 2: 190.0}, "bfloat16": {1: 300.0, 2: 301.0}})
    assert machine.choose(fast)[:2] == ("bfloat16", 1), "a second thread that gives nothing is left to others"
    even = probe(gemm={"float32": {1: 100.0}, "bfloat16": {1: 110.0}})
    assert machine.choose(even).dtype == "float32", "ten per cent are not worth the rounding"


def test_peak_and_bandwidth():
    limits = probe(gemm={"float32": {1: 100.0, 2: 190.0}})
    assert limits.peak() == 190e9 and limits.peak("float32", 1) == 100e9 and limits.peak("float32", 8) == 190e9
    assert limits.peak("int8") == 190e9, "an unmeasured dtype counts as float32"
    assert limits.bandwidth == 20e9


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"gemm": {"float32": {}}}', '{"gemm": {"float32": {"x": 1}}}', "NaN"]
)
def test_a_damaged_probe_is_measured_again(monkeypatch, tmp_path, text):
    small_probe(monkeypatch, tmp_path)
    path = machine._file(machine._key("cpu"))
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert machine.cached() is None
    assert machine.probe().gemm["float32"] and machine.cached() is not None


def test_a_probe_of_a_busy_machine_is_believed_for_an_hour(monkeypatch, tmp_path):
    small_probe(monkeypatch, tmp_path)
    measured = machine.measure()
    path = machine._file(machine._key("cpu"))
    path.parent.mkdir(parents=True)
    for load, share, taken, expected in (
        (0.0, 1.0, 1e9, False),
        (99.0, 1.0, 1e9, True),
        (0.0, 0.5, 1e9, True),
        (99.0, 0.5, 4e10, False),
    ):
        row = dataclasses.asdict(dataclasses.replace(measured, load=load, share=share, taken=taken))
        path.write_text(json.dumps(row))
        again = []
        monkeypatch.setattr(machine, "measure", lambda device, again=again: again.append(1) or measured)
        machine.probe()
        assert bool(again) == expected


def test_an_unwritable_cache_only_means_measuring_again(monkeypatch, tmp_path):
    small_probe(monkeypatch, tmp_path)
    monkeypatch.setenv("HEADWAY_CACHE", "/proc/nowhere")
    assert machine.probe().gemm["float32"]


def test_it_says_whether_the_kernels_are_built(command, monkeypatch):
    known = doctor.facts()
    assert known["native_kernels"] == bool(known["kernel_levels"]) == bool(built.files())
    if native.library() is not None:
        assert (
            known["kernel_levels"] == steps.levels() and f"built: {', '.join(steps.levels())}" in command("doctor").out
        )
    monkeypatch.setattr(doctor, "_levels", list)
    assert not built.files() or "not for this machine" in command("doctor").out
    monkeypatch.setattr(built, "files", list)
    assert "not built" in command("doctor").out
