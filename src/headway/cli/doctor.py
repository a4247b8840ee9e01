"""`headway doctor`: what this machine has, and with `--probe` what it can do."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headway import __version__, machine
from headway.cli.options import Common, by_name
from headway.cli.output import Printer, duration, size
from headway.files import free_space

if TYPE_CHECKING:
    from headway.machine import Choice, Probe

CORE = ("torch", "numpy", "safetensors", "tokenizers", "pydantic", "PyYAML", "typer", "rich", "jinja2")
OPTIONAL = {
    "matplotlib": "plots",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "transformers": "test",
    "pytest": "test",
}
_COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway doctor` takes."""

    probe: Annotated[bool, typer.Option("--probe", help="Measure matrix products, memory and overhead.")] = False
    device: Annotated[str, typer.Option(help="What to probe: cpu or cuda.")] = "cpu"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, object]:
    """Versions, processor, compiler, memory (bytes), disk (bytes), folders. Imports nothing heavy."""
    from headway.kernels import built

    total, available = machine.memory()
    cache = machine.cache_folder()
    return {
        "headway": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in CORE},
        "optional": {name: _version(name) for name in OPTIONAL},
        "cpu": machine.cpu_name(),
        "cores": machine.cores(),
        "flags": machine.cpu_flags(),
        "load": os.getloadavg()[0],
        "native_kernels": bool(built.files()),
        "kernel_levels": _levels(),
        "compiler": next((found for name in _COMPILERS if (found := shutil.which(name))), None),
        "memory": total,
        "memory_available": available,
        "disk_free": free_space(Path.cwd()),
        "cache": str(cache),
        "cache_writable": os.access(next(p for p in (cache, *cache.parents) if p.exists()), os.W_OK),
    }


def run(options: Options) -> None:
    """Print the facts, and the probe when asked."""
    options = by_name(options, "headway doctor")
    printer = Printer(json=options.json)
    known = facts()
    _show_facts(printer, known)
    if options.probe:
        limits = machine.probe(options.device, refresh=True)
        choice = machine.choose(limits)
        _show_probe(printer, limits, choice)
        known["probe"] = asdict(limits)
        known["choice"] = choice._asdict()
    else:
        printer.say("\nheadway doctor --probe measures the speed of this machine.")
    printer.result(known)


def _levels() -> list[str]:
    """The instruction sets that the kernels can use here."""
    from headway.kernels import built

    for path in built.files():
        with contextlib.suppress(OSError, AttributeError):  # of another machine, or of an older build
            return built.levels(ctypes.CDLL(str(path)))
    return []


def _kernels(known: dict[str, object]) -> str:
    """What runs the products of weights in codes."""
    from headway.kernels import built

    levels = known["kernel_levels"]
    assert isinstance(levels, list)
    if not known["native_kernels"]:
        return "not built: slower PyTorch twins; reinstall with a compiler"
    if not levels:
        return "built, but not for this machine: slower PyTorch twins; reinstall with a compiler"
    return f"built: {', '.join(levels)}" + (f" (HEADWAY_KERNELS={built.FORCED})" if built.FORCED else "")


def _show_facts(printer: Printer, known: dict[str, object]) -> None:
    packages, optional = known["packages"], known["optional"]
    assert isinstance(packages, dict) and isinstance(optional, dict)
    flags = known["flags"]
    assert isinstance(flags, list)
    missing = [f"{name} (pip install 'headway[{OPTIONAL[name]}]')" for name, have in optional.items() if not have]
    numbers = {key: value for key, value in known.items() if isinstance(value, int)}
    rows = [
        ("headway", f"{known['headway']} on Python {known['python']}, {known['system']}"),
        ("packages", ", ".join(f"{name} {have or 'MISSING'}" for name, have in packages.items())),
        ("optional", ", ".join(f"{name} {have}" for name, have in optional.items() if have) or "none"),
        ("absent", ", ".join(missing) or "nothing"),
        ("processor", f"{known['cpu']}, {known['cores']} cores usable, load {known['load']:.2f}"),
        ("vector", " ".join(flags) or "unknown"),
        ("compiler", known["compiler"] or "none"),
        ("kernels", _kernels(known)),
        ("memory", f"{size(numbers['memory_available'])} available of {size(numbers['memory'])}"),
        ("disk", f"{size(numbers['disk_free'])} free here"),
        ("cache", f"{known['cache']}{'' if known['cache_writable'] else ' (not writable)'}"),
    ]
    printer.table(rows)


def _show_probe(printer: Printer, limits: Probe, choice: Choice) -> None:
    counts = sorted(limits.read)
    printer.say(f"\n{limits.device}: {limits.cpu}, torch {limits.torch}, medians, {duration(limits.age)} ago")
    header = ("", *(f"{count} thread{'s' * (count > 1)}" for count in counts), "")
    rows: list[tuple[str, ...]] = []
    for name, rates in limits.gemm.items():
        unit = "Gop/s" if name == "int8" else "GFLOP/s"
        rows.append((f"{name} product", *(f"{rates.get(count, 0):.1f}" for count in counts), unit))
    for name, bandwidth in (("memory read", limits.read), ("memory copy", limits.copy)):
        rows.append((name, *(f"{bandwidth[count]:.1f}" for count in counts), "GB/s"))
    printer.table(rows, header=header, right=True)
    printer.say(f"one small operation costs {limits.overhead:.1f} us")
    printer.say(f"training here tries {choice.dtype} on {choice.threads} threads ({choice.reason})")
    if not limits.is_quiet:
        printer.say(
            f"the machine was busy (load {limits.load:.1f}, {limits.share:.0%} of the processors granted): "
            "other work was measured too; run it again when idle"
        )
