"""The budgets of the code, checked: sizes, repetition, forbidden constructs. Part of `make check`.

Usage: python tools/check_budget.py [SRC]      prints one line per breach, exits 1 when there is one

The library: at most 26,000 lines of Python code (docstrings, comments and blank lines are free: the house asks for
them; the files of families/ are data and have a budget of their own, 60 lines each) and 1,500 native lines; docs/log.md
says why 12,000 became 26,000. A file: 600 lines of any sort. A function: 60 lines and 10 parameters, self aside. No
function body of five lines or more stands twice. No deferred work, no swallowed errors, no pickle, no torch.load.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

LIBRARY, NATIVE, FILE, FAMILY, FUNCTION, PARAMETERS, REPEATED = 26_000, 1_500, 600, 60, 60, 10, 5
NATIVE_SUFFIXES = {".cpp", ".cc", ".h", ".hpp", ".cu"}
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FORBIDDEN = {
    "deferred work": re.compile(r"\b(TODO|FIXME|XXX|HACK)\b"),
    "unfinished function": re.compile(r"\bNotImplementedError\b"),
    "pickle": re.compile(r"\bimport pickle\b|\bpickle\.|\btorch\.(load|save)\("),
    "bare except": re.compile(r"^\s*except:"),
}
# The one call that reads a pickle, in a child that has given up memory, network and writing (rows K9, K10).
_CALL = 'found = torch.load(str(path) if mapped else file, map_location="cpu", mmap=mapped, weights_only=True)'
ALLOWED = {("unpickle.py", _CALL)}


def is_family(path: Path) -> bool:
    """A published architecture as data."""
    return path.parent.name == "families" and not path.name.startswith("_")


def swallows(node: ast.AST) -> bool:
    """`except Exception: pass`: an error that nobody will ever see."""
    return (
        isinstance(node, ast.ExceptHandler)
        and isinstance(node.type, ast.Name)
        and node.type.id in ("Exception", "BaseException")
        and all(isinstance(statement, ast.Pass) for statement in node.body)
    )


def body_text(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, int]:
    """A function's body without its docstring, and the lines it takes."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body:
        return "", 0
    return "\n".join(map(ast.dump, body)), (body[-1].end_lineno or 0) - body[0].lineno + 1


def check_file(path: Path, text: str, bodies: dict[str, list[str]]) -> Iterator[str]:
    """The breaches of one file; `bodies` collects what functions do, over all files."""
    lines = text.splitlines()
    limit = FAMILY if is_family(path) else FILE
    if len(lines) > limit:
        yield f"{path}: {len(lines)} lines, at most {limit}"
    for number, line in enumerate(lines, 1):
        for name, pattern in FORBIDDEN.items():
            if pattern.search(line) and (path.name, line.strip()) not in ALLOWED:
                yield f"{path}:{number}: {name}: {line.strip()[:80]}"
    for node in ast.walk(ast.parse(text, str(path))):
        if swallows(node):
            yield f"{path}:{node.lineno}: an exception is swallowed"  # type: ignore[attr-defined]
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or 0) - node.lineno + 1
        names = [one.arg for one in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if length > FUNCTION:
            yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION}"
        if count > PARAMETERS:
            yield f"{path}:{node.lineno}: {node.name} has {count} parameters, at most {PARAMETERS}"
        body, size = body_text(node)
        if size >= REPEATED:
            bodies.setdefault(body, []).append(f"{path}:{node.lineno} {node.name}")


def code_lines(text: str) -> int:
    """Lines that hold code: the house asks for docstrings and comments, so the budget must not tax them."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def native_lines(paths: Iterator[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def main(root: Path) -> int:
    breaches: list[str] = []
    bodies: dict[str, list[str]] = {}
    python, comments = 0, 0
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        python += 0 if is_family(path) else code_lines(text)
        comments += sum(line.lstrip().startswith("#") for line in text.splitlines())
        breaches += check_file(path, text, bodies)
    breaches += ["same body: " + " = ".join(places) for places in bodies.values() if len(places) > 1]
    native = native_lines(path for path in root.rglob("*") if path.suffix in NATIVE_SUFFIXES)
    for what, count, limit in (("Python code", python, LIBRARY), ("native code", native, NATIVE)):
        if count > limit:
            breaches.append(f"{root}: {count} lines of {what}, at most {limit}")
    print(f"{root}: {python} of {LIBRARY} lines of Python code, {native} of {NATIVE} native lines, {comments} comments")
    print("\n".join(breaches) if breaches else "within all budgets")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "src")))
