"""Which rows of docs/faults.md have a test: rows tested / rows. Part of `make check`.

A test names its rows with `@pytest.mark.fault("C4", ...)`; a row counts when at least one test names it. Exits 1 when a
row has none or a test names a row that the table lacks.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\|[^|]*\|\s*([A-Z]\d+)\b", re.MULTILINE)


def marks(tree: ast.AST) -> Iterator[str]:
    """Every id in a call of something named `fault`: a decorator, or a mark of a parameter."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fault":
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value


def main() -> int:
    rows = ROW.findall((ROOT / "docs" / "faults.md").read_text(encoding="utf-8"))
    tests: defaultdict[str, set[str]] = defaultdict(set)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for row in marks(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            tests[row].add(str(path.relative_to(ROOT)))
    missing = [row for row in rows if row not in tests]
    unknown = sorted(set(tests) - set(rows))
    print(f"fault rows: {len(rows) - len(missing)} tested / {len(rows)}")
    if missing:
        print("without a test: " + ", ".join(missing))
    for row in unknown:
        print(f"{row}: named by {', '.join(sorted(tests[row]))} but not in docs/faults.md")
    return 1 if missing or unknown else 0


if __name__ == "__main__":
    sys.exit(main())
