"""The documents are true: every snippet runs, every command parses, every link, path and test they name is there.

A ```python block below a line `<!-- not run: reason -->` is skipped with that reason; nothing else is.
"""

from __future__ import annotations

import ast
import importlib
import random
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from headway.cli import main as command
from headway.config import ModelConfig
from headway.errors import HeadwayError
from headway.generation import GenerationOptions
from headway.plain_yaml import parse_yaml
from headway.run_config import RunConfig, load_run

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONCEPTS = [page for page in PAGES if page.parent.name == "concepts"]

NOT_RUN = re.compile(r"<!-- not run: (\S.*?) -->")
SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?<![\w./-])((?:src|tests|docs|benchmarks|tools)/[\w./-]*)(?:::(\w+))?|^::(\w+)$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block: its language, its text, the line of its fence, and why it is not run."""

    language: str
    code: str
    line: int
    reason: str | None


def read(page: Path) -> tuple[list[Block], str]:
    """The fenced blocks of a page, and the prose without them."""
    blocks: list[Block] = []
    prose: list[str] = []
    inside: list[str] | None = None
    opening, line = "", 0
    for number, text in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not text.startswith("```"):
            (prose if inside is None else inside).append(text)
        elif inside is None:
            inside, opening, line = [], text[3:].strip(), number
        else:
            found = NOT_RUN.fullmatch(prose[-1].strip()) if prose else None
            blocks.append(Block(opening, "\n".join(inside), line, found and found.group(1)))
            inside = None
            prose.append("")
    assert inside is None, f"{page}:{line}: a block without an end"
    return blocks, "\n".join(prose)


def names(page: Path) -> Iterator[tuple[str, str]]:
    """(path, test or "") of every repository path in backticks; `::test_x` belongs to the path before it."""
    last = ""
    for span in SPAN.findall(read(page)[1]):
        for path, test, only_test in PATH.findall(span):
            last = path or last
            yield last, test or only_test


def missing(page: Path, root: Path = ROOT) -> list[str]:
    """What a page names and the repository lacks."""
    wrong = []
    for link in LINK.findall(read(page)[1]):
        target = link.partition("#")[0]
        if target and not re.match(r"[a-z]+:", target) and not (page.parent / target).exists():
            wrong.append(f"link {link}")
    for path, test in names(page):
        if not (root / path).exists():
            wrong.append(f"path {path}")
        elif test and f"def {test}(" not in (root / path).read_text(encoding="utf-8"):
            wrong.append(f"test {path}::{test}")
    return wrong


def execute(block: Block, page: Path) -> None:
    """Run a snippet as a module of its own; a traceback names the page and the line."""
    exec(compile("\n" * block.line + block.code, str(page), "exec"), {"__name__": "snippet"})


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `$ headway ...` line in the blocks of a page."""
    for block in read(page)[0]:
        for line in block.code.splitlines():
            if line.startswith("$ headway "):
                yield shlex.split(line[2:], comments=True)[1:]


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command line as far as it goes without its files. Raises HeadwayError."""
    module = importlib.import_module(f"headway.cli.{words[0]}")
    seen = []
    monkeypatch.setattr(module, "run", seen.append)
    assert command._run(words) == 0
    if words[0] == "train":
        load_run((), seen[0].keys, {})
    if words[0] == "generate":
        GenerationOptions(**seen[0].chosen)
    if words[0] == "inspect" and not seen[0].paths and not seen[0].schema:
        module.find(seen[0])


def build(block: Block) -> None:
    """Make the config that a YAML example states, of a run or of a model with some sizes. Raises ConfigError."""
    fields = parse_yaml(block.code, "example")
    if set(fields) <= set(RunConfig.model_fields):
        RunConfig(**fields)
    else:
        ModelConfig(**{"d_model": 64, "n_layers": 2, "n_heads": 8, "vocab_size": 256, "max_len": 128, **fields})


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder and a cache of its own, one thread, and generators that are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    threads, numbers, others = torch.get_num_threads(), random.getstate(), np.random.get_state()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)
    random.setstate(numbers)
    np.random.set_state(others)


def label(page: Path) -> str:
    return str(page.relative_to(ROOT))


SNIPPETS = [(page, block) for page in PAGES for block in read(page)[0] if block.language == "python"]
EXAMPLES = [(page, block) for page in PAGES for block in read(page)[0] if block.language == "yaml"]
COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "block"), SNIPPETS, ids=[f"{label(page)}:{block.line}" for page, block in SNIPPETS])
@pytest.mark.usefixtures("elsewhere")
def test_snippets_run(page: Path, block: Block) -> None:
    if block.reason:
        pytest.skip(block.reason)
    execute(block, page)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_what_a_page_names_is_there(page: Path) -> None:
    assert missing(page) == []


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{label(p)}: {' '.join(w)}" for p, w in COMMANDS])
def test_commands_parse(page: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parsed(words, monkeypatch)


@pytest.mark.parametrize(("page", "block"), EXAMPLES, ids=[f"{label(page)}:{block.line}" for page, block in EXAMPLES])
def test_examples_of_configs_are_configs(page: Path, block: Block) -> None:
    build(block)


@pytest.mark.parametrize("page", CONCEPTS, ids=label)
def test_a_concept_names_file_test_and_what_is_left_out_and_shows_itself(page: Path) -> None:
    blocks, prose = read(page)
    named = [path for path, _ in names(page)]
    assert any(path.startswith("src/") for path in named), "no file"
    assert any(path.startswith("tests/") for path in named), "no test"
    assert re.search(r"^- source: ", prose, re.MULTILINE) and re.search(r"^- left out: ", prose, re.MULTILINE)
    snippets = [block for block in blocks if block.language == "python"]
    assert len(snippets) == 1 and snippets[0].reason is None
    last = ast.parse(snippets[0].code).body[-1]
    assert any(isinstance(node, ast.Assert) for node in ast.walk(last)), "the snippet must end with what it shows"


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link).resolve() for link in LINK.findall(index.read_text(encoding="utf-8"))}
    assert [label(page) for page in PAGES if page not in linked and page != index] == []


# --- the checks themselves ---------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text("def test_here():\n    pass\n")
    page = tmp_path / "page.md"
    page.write_text(
        "Good: `tests/test_it.py::test_here`, `::test_here`, `python tests/test_it.py`, [it](tests/test_it.py#x).\n"
        "Not ours: [web](https://example.org/x), `my/src/file.py`, `a / b`.\n"
        "Gone: `src/nowhere.py`, `tests/test_it.py::test_gone`, `::test_lost`, [page](gone.md).\n"
        "```python\nassert 1 + 1 == 3\n```\n"
        "<!-- not run: takes an hour -->\n```python\nraise SystemExit\n```\n"
        "<!-- not run: -->\n```python\nraise ValueError\n```\n"
        "```yaml\npositions: rpoe\n```\n"
        "```console\n$ headway train data.path=x trian.lr=1\n$ headway generate x --promt y\n$ ls\n```\n"
    )
    return page


def test_control_a_missing_path_is_reported(broken: Path) -> None:
    expected = ["link gone.md", "path src/nowhere.py", "test tests/test_it.py::test_gone"]
    assert missing(broken, broken.parent) == [*expected, "test tests/test_it.py::test_lost"]


def test_control_a_broken_snippet_is_reported_with_its_line(broken: Path) -> None:
    blocks = [block for block in read(broken)[0] if block.language == "python"]
    with pytest.raises(AssertionError) as caught:
        execute(blocks[0], broken)
    assert caught.traceback[-1].lineno + 1 == 5 and Path(caught.traceback[-1].path) == broken
    assert [block.reason for block in blocks] == [None, "takes an hour", None]


def test_control_a_wrong_example_is_reported(broken: Path) -> None:
    with pytest.raises(HeadwayError, match="did you mean 'rope'"):
        build(next(block for block in read(broken)[0] if block.language == "yaml"))


def test_control_a_wrong_command_is_reported(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(commands(broken))
    assert len(found) == 2
    with pytest.raises(HeadwayError, match="did you mean 'train"):
        parsed(found[0], monkeypatch)
    with pytest.raises(HeadwayError, match="promt"):
        parsed(found[1], monkeypatch)
