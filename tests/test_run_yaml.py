"""YAML as config files use it: plain data, one key once, numbers as YAML 1.2 writes them, and back unchanged."""

from __future__ import annotations

import itertools
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ConfigError, InputError
from headway.plain_yaml import dump_yaml, parse_yaml
from headway.run_config import RunConfig, flatten, load_run, parse_overrides

NO_ENVIRONMENT: dict[str, str] = {}
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def file(folder: Path, content: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


# --- F7: YAML is data ----------------------------------------------------------------------------------------------

SCALARS: dict[str, object] = {
    "1e-3": 0.001,
    "1E5": 100000.0,
    "-1e-3": -0.001,
    "1.5e3": 1500.0,
    ".5": 0.5,
    "5.": 5.0,
    "+3": 3,
    "-0": 0,
    "010": 10,
    "1_000": 1000,
    "1e400": float("inf"),
    ".inf": float("inf"),
    "-.Inf": float("-inf"),
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    # YAML 1.1 makes booleans, numbers to base 60, 16 and 8, and dates of these; here they are what they look like.
    "on": "on",
    "off": "off",
    "yes": "yes",
    "No": "No",
    "y": "y",
    "2020-01-01": "2020-01-01",
    "2020-01-01 10:00:00": "2020-01-01 10:00:00",
    "1:30": "1:30",
    "190:20:30": "190:20:30",
    "0x10": "0x10",
    "0b11": "0b11",
    "0o17": "0o17",
    "=": "=",
    "<<": "<<",
    "1e": "1e",
    "1.2.3": "1.2.3",
    ".": ".",
    "nan": "nan",
    "inf": "inf",
    "'1e-3'": "1e-3",
    '"true"': "true",
}


@pytest.mark.fault("F7")
@pytest.mark.parametrize("written", SCALARS)
def test_scalars(written: str):
    value = parse_yaml(f"a: {written}", "f.yaml")["a"]
    assert value == SCALARS[written] and type(value) is type(SCALARS[written])
    assert parse_yaml(written, "key") == SCALARS[written], "an override reads as a file does"


@given(st.floats() | st.integers(-(10**30), 10**30))
def test_every_number_reads_as_itself(number: float):
    written = [dump_yaml({"a": number})]
    if math.isfinite(number):
        written.append(f"a: {number!r}")
    for line in written:
        value = parse_yaml(line, "f.yaml")["a"]
        assert type(value) is type(number) and (value == number or (math.isnan(value) and math.isnan(number)))


TAGS = [
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/object/apply:subprocess.check_call [['touch', '{canary}']]",
    "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
    "!include {secret}",
    "!!include {secret}",
    "!ENV ${{HOME}}",
    "!anything x",
    "!!set {{a, b}}",
    "!!binary aGVsbG8=",
    "!!timestamp 2020-01-01",
    "!!omap [a: 1]",
    "!!pairs [a: 1]",
    "!!bool perhaps",
    "!!int x",
    "!!float x",
    "!!str 3",
]


@pytest.mark.fault("F7")
@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_is_refused_and_nothing_runs(tag: str, tmp_path: Path):
    canary, secret = tmp_path / "canary", file(tmp_path, "train: {seed: 77}", "secret.yaml")
    value = tag.format(canary=canary, secret=secret)
    for content in (f"train:\n  lr: {value}", f"train:\n  lr: [1, {{x: {value}}}]", f"train:\n  ? {value}\n  : 1"):
        with pytest.raises(ConfigError) as caught:
            load_run([file(tmp_path, content)], [], NO_ENVIRONMENT)
        assert re.match(rf"{tmp_path}/run.yaml, line [23]: ", str(caught.value)), caught.value
        assert "77" not in str(caught.value) and len(str(caught.value)) < 500
    for layers in (([], [f"train.lr={value}"], {}), ([], [], {"HEADWAY__TRAIN__LR": value})):
        with pytest.raises(ConfigError, match=r"^train.lr"):
            load_run(*layers)
    assert not canary.exists()


def test_negative_control_a_full_loader_runs_the_tags(tmp_path: Path):
    for tag in (TAGS[0], TAGS[2]):
        canary = tmp_path / "canary"
        yaml.unsafe_load(f"a: {tag.format(canary=canary, secret='')}")
        assert canary.exists()
        canary.unlink()


LEAVES = {"list": "[{}]", "map": "{{{}}}"}


def bomb(kind: str, depth: int) -> str:
    """Nine aliases of nine aliases of...: 9^depth values from a few lines."""
    names = [f"n{level}" for level in range(depth)]

    def nine(value: str) -> str:
        return LEAVES[kind].format(", ".join(value if kind == "list" else f"k{i}: {value}" for i in range(9)))

    rows = [f"  - &{names[0]} {nine('1')}"]
    rows += [f"  - &{name} {nine('*' + below)}" for below, name in itertools.pairwise(names)]
    return "train:\n  lr:\n" + "\n".join(f"  {row}" for row in rows) + f"\n  seed: *{names[-1]}\n"


CHILD = """
import sys
from pathlib import Path
from headway.errors import HeadwayError
from headway.run_config import load_run
for name in sys.argv[1:]:
    try:
        load_run([Path(name)], [], {})
    except HeadwayError as error:
        print(error.exit_code, str(error)[:300])
"""


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (5, 5))


def in_child(*paths: Path) -> list[str]:
    """What load_run says of each file, in a process of 1 GB and 5 seconds."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, *map(str, paths)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=10, env=environment, preexec_fn=limited, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.splitlines()


@pytest.mark.fault("F7")
def test_billion_laughs(tmp_path: Path):
    """Anchors are refused where they stand: expanded, these files would be 9^12 values."""
    paths = [file(tmp_path, bomb(kind, 12), f"{kind}.yaml") for kind in LEAVES]
    paths.append(file(tmp_path, "train: &a\n  lr: *a\n", "loop.yaml"))
    paths.append(file(tmp_path, "train: &a {seed: 1}\ndata:\n  <<: *a\n", "merge.yaml"))
    said = in_child(*paths)
    for path, line in zip(paths, said, strict=True):
        assert line.startswith(f"2 {path}, line ") and ("anchor" in line or "alias" in line), line


def test_negative_control_the_bombs_are_live():
    tree = yaml.safe_load(bomb("map", 5))
    assert len(flatten(tree["train"]["seed"])) == 9**5 > 50 * len(bomb("map", 5))


@pytest.mark.fault("F7")
def test_files_that_are_no_files(tmp_path: Path):
    """A pipe must not hang, a device must not be read to its end."""
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    endless = tmp_path / "endless.yaml"
    endless.symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    paths = [fifo, endless, tmp_path / "folder.yaml", tmp_path / "absent.yaml"]
    assert [line.split(":")[0] for line in in_child(*paths)] == [f"3 {path}" for path in paths]


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        ("train: {lr: 1", 1, "got"),
        ("a: 1\ntrain:\n\tlr: 1", 3, "cannot start any token"),
        ("train:\n  lr: 1\n  lr: 2", 3, "key 'lr' stands twice"),
        ("train: {seed: 1}\ntrain: {lr: 1}", 2, "key 'train' stands twice"),
        ("train:\n  ? [a, b]\n  : 1", 2, "key"),
        ("train: 1\n---\ntrain: 2", 2, "another document"),
        ("train: 'x", 1, "end of stream"),
        ("train: @x", 1, "cannot start any token"),
    ],
)
def test_what_is_no_yaml_is_named_with_its_line(tmp_path: Path, content: str, line: int, found: str):
    with pytest.raises(ConfigError) as caught:
        load_run([file(tmp_path, content)], [], NO_ENVIRONMENT)
    assert caught.value.where == f"{tmp_path}/run.yaml, line {line}" and found in caught.value.found


def test_a_key_may_stand_once_in_each_section_and_file(tmp_path: Path):
    """The same name in two sections, or in two files, is no duplicate."""
    first = file(tmp_path, "data: {path: a}\ntokenizer: {path: b}", "one.yaml")
    second = file(tmp_path, "data: {path: c}", "two.yaml")
    run = load_run([first, second], [], NO_ENVIRONMENT).run
    assert (run.data.path, run.tokenizer.path) == ("c", "b")


@pytest.mark.parametrize("content", ["", "# a comment\n", "{}", "\ufefftrain: {}\n"])
def test_a_file_may_say_nothing(tmp_path: Path, content: str):
    assert load_run([file(tmp_path, content)], [], NO_ENVIRONMENT).run == RunConfig()


@pytest.mark.parametrize("content", ["[]x", "- a\n- b", "3", "word", "true"])
def test_a_file_that_is_no_mapping(tmp_path: Path, content: str):
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        load_run([file(tmp_path, content)], [], NO_ENVIRONMENT)


def test_a_file_that_is_not_utf8(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"data: {path: caf\xe9}")
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_run([path], [], NO_ENVIRONMENT)


def test_deep_nesting_is_an_error_and_no_crash(tmp_path: Path):
    for content in ("[" * 2000 + "]" * 2000, "{a: " * 2000 + "1" + "}" * 2000):
        with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
            load_run([file(tmp_path, content)], [], NO_ENVIRONMENT)


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from("ab:-[]{}&*!|>'\"%@`#,?\n \t1.eE~=\\\x00é"), max_size=40))
def test_any_text_is_yaml_or_a_config_error(content: str):
    try:
        parse_yaml(content, "f.yaml")
        parse_overrides([f"train.lr={content}"])
    except ConfigError as error:
        assert error.where.startswith(("f.yaml", "train.lr")) and "\n" not in str(error)


# --- and back ------------------------------------------------------------------------------------------------------

WORDS = [
    "1e-3",
    "1e5",
    "5.",
    ".5",
    "on",
    "yes",
    "true",
    "null",
    "~",
    "",
    " x",
    "0x10",
    "1:30",
    "2020-01-01",
    "1_0",
    "010",
]
WORDS += [
    "a: b",
    "- a",
    "#",
    "&a",
    "*a",
    "!x",
    "a\nb",
    "\u2028",
    "\x85",
    "\x1b[0m",
    "'",
    '"',
    "=",
    "<<",
    ".inf",
    "+1",
    "é日😀",
]


@settings(max_examples=300, deadline=None)
@given(any_text | st.sampled_from(WORDS))
def test_any_text_survives_the_file(word: str):
    """A prompt `1e5` must not come back as a number: the writer quotes what the reader would take for one."""
    for tree in (
        {"train": {"sample_prompt": word}},
        {"tokenizer": {"special_tokens": [word]}},
        {"a": {word or "k": 1}},
    ):
        assert parse_yaml(dump_yaml(tree), "f.yaml") == tree


def test_every_word_survives_the_file():
    for word in WORDS:
        tree = {"train": {"sample_prompt": word}}
        assert parse_yaml(dump_yaml(tree), "f.yaml") == tree, word
