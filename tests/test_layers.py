"""Imports point one way: packages import root modules and packages before them (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import headway

SRC = Path(headway.__file__).parent
# What composes everything stands above the packages: api and launch, and the command.
ROOT = {
    "errors",
    "files",
    "strict",
    "plain_yaml",
    "config",
    "config_rules",
    "run_config",
    "tuning_config",
    "cost",
    "machine",
    "protobuf",
    "__init__",
}
TOP = {
    "api",
    "assess",
    "compare",
    "launch",
    "loading",
    "material",
    "peers",
    "prepare",
    "signals",
    "runtimes",
    "saving",
    "__main__",
}
# kernels come first: they are operations on tensors, know no module, and nn calls them.
ORDER = (
    *("kernels", "nn", "families", "checkpoints", "text", "data", "training", "tuning"),
    *("generation", "evaluation", "quantization", "grounding", "serving", "studies"),
)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, first name below headway) of each import in a file, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "headway" else [node.module]
            )
        for name in names:
            parts = name.split(".")
            if parts[0] == "headway" and len(parts) > 1 and parts[1] != "__version__":
                yield node.lineno, parts[1]


def rank(name: str) -> int:
    if name in ROOT:
        return -1
    if name in ORDER:
        return ORDER.index(name)
    assert name in TOP or name == "cli", f"{name} has no place in the order"
    return len(ORDER) + (name == "cli")


FILES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SRC)) for path in FILES])
def test_imports_point_one_way(path):
    inside = path.relative_to(SRC)
    here = inside.parts[0] if len(inside.parts) > 1 else inside.stem
    if here in ("__init__", "__main__"):
        return  # the public names and `python -m headway` are doors to what stands at the top
    wrong = [f"line {line}: {here} imports {name}" for line, name in imported(path) if rank(name) > rank(here)]
    assert not wrong, wrong


def test_every_package_has_a_place():
    packages = {path.parent.name for path in SRC.glob("*/__init__.py")} | {path.stem for path in SRC.glob("*.py")}
    for name in packages:
        rank(name)


def test_the_check_sees_an_import_upwards(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from headway.training.loop import Trainer\n    import headway.cli.main\n")
    assert [rank(name) > rank("nn") for _, name in imported(path)] == [True, True]


def test_the_command_imports_torch_only_when_asked():
    """The command and its verbs import only the standard library, typer and light files of ours at the top."""
    light = {"headway", "typer"} | {"errors", "files", "strict", "machine"}
    from headway.cli.main import VERBS

    for name in ("main", "options", "output", *VERBS):
        tree = ast.parse((SRC / "cli" / f"{name}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None) or node.names[0].name
                assert not module.startswith(("torch", "numpy", "pydantic", "yaml", "rich")), (name, module)
                if module.startswith("headway.") and not module.startswith("headway.cli"):
                    assert module.split(".")[1] in light, (name, module)
