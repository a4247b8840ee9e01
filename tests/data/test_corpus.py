"""Splits, sizes and hashes: FAULTS rows C2, C9, C10, C12, R10, T12 and S1 for token stores."""

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from fault_injection import count_primitives, failing, hooked, in_child, killed_at
from hypothesis import given
from hypothesis import strategies as st

from headway.data import ReadOptions, ReadReport, corpus, open_corpus, prepare, sources, store
from headway.errors import InputError, MachineError
from headway.text import train_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "through", "old", "forest"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([], "byte", 257)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer([" ".join(WORDS) * 50], "bpe", 300)


def rows(path, count=40):
    path.write_text(
        "".join(json.dumps({"text": f"row {n}: {' '.join(WORDS[: n % 9 + 2])}"}) + "\n" for n in range(count))
    )
    return path


def texts_of(store_, tokenizer):
    return [tokenizer.decode(store_.document(number).tolist()) for number in range(len(store_.ends))]


def test_documents_arrive_as_tokens_with_eos_and_bytes(tmp_path, tokenizer, bpe):
    path = rows(tmp_path / "rows.jsonl")
    wanted = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    for kind in (tokenizer, bpe):
        data = prepare(open_corpus(path, val_fraction=0.2), kind, tmp_path / "cache", 8)
        found = texts_of(data.train, kind) + texts_of(data.valid, kind)
        assert sorted(found) == sorted(wanted) and len(data.valid.ends) > 1
        for side in (data.train, data.valid):
            assert side.tokens.dtype == np.uint16
            assert [int(size) for size in side.sizes] == [len(text.encode()) for text in texts_of(side, kind)]
            assert all(side.document(number)[-1] == kind.eos_id for number in range(len(side.ends)))
            assert side.bytes_per_token == side.bytes / len(side.tokens)
    assert store.token_dtype(65536) == "<u2" and store.token_dtype(65537) == "<u4"


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_long_document_has_the_tokens_of_its_text(tmp_path, tokenizer, bpe, kind, monkeypatch):
    """Pieces, blocks and the batch encoder leave no trace."""
    kind = {"byte": tokenizer, "bpe": bpe}[kind]
    monkeypatch.setattr(sources, "BLOCK", 700)
    monkeypatch.setattr(sources, "PIECE", 2000)
    monkeypatch.setattr(store, "_SMALL", 500)
    monkeypatch.setattr(store, "_FLUSH", 3000)
    text = "".join(f"{word} é{number}, " for number in range(900) for word in WORDS)
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "valid.txt").write_text("short and held out")
    data = prepare(open_corpus(tmp_path / "train.txt", tmp_path / "valid.txt"), kind, tmp_path / "cache", 8)
    assert data.train.tokens.tolist() == [*kind.encode(text), kind.eos_id]
    assert data.train.bytes == len(text.encode()) and len(data.train.ends) == 1


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")).filter(str.strip), min_size=2, unique=True)
)
def test_no_document_is_lost_or_on_both_sides(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("split") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    opened = open_corpus(path, val_fraction=0.3)
    train, valid = list(opened.texts("train")), list(opened.texts("valid"))
    assert sorted(train + valid) == sorted(documents)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["new", *documents[::-1], *documents]))
    assert set(open_corpus(path, val_fraction=0.3).texts("valid")) - {"new"} == set(valid)  # no one changes sides


def test_the_hash_split_takes_its_share(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(4000)))
    assert 150 < len(list(open_corpus(path).texts("valid"))) < 250


@given(st.text(alphabet="ab é€😀\n", min_size=1).filter(str.strip), st.floats(0.01, 0.99), st.integers(1, 9))
def test_a_single_document_is_cut_near_its_end(tmp_path_factory, text, fraction, piece):
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(text.encode())
    keep, sources.PIECE = sources.PIECE, piece
    try:
        opened = open_corpus(path, val_fraction=fraction)
        train, valid = "".join(opened.texts("train")), "".join(opened.texts("valid"))
        parts = list(opened.pieces(ReadReport()))
    finally:
        sources.PIECE = keep
    assert train + valid == text and valid
    held = len(valid.encode())
    assert fraction * len(text.encode()) <= held <= 2 * fraction * len(text.encode()) + 4
    for side in ("train", "valid"):
        of_side = [part for where, part in parts if where == side]
        assert [part.first for part in of_side] == [True] + [False] * (len(of_side) - 1) if of_side else True
        assert [part.last for part in of_side] == [False] * (len(of_side) - 1) + [True] if of_side else True


def test_a_single_document_is_cut_at_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {number}\n" for number in range(1000)))
    opened = open_corpus(path)
    assert next(iter(opened.texts("valid"))).startswith("line ")
    assert "of the single document, its end" in opened.split
    assert "by hash" in open_corpus(rows(tmp_path / "b.jsonl")).split


@pytest.mark.fault("C2")
def test_prepare_without_documents_names_what_it_needs(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("some text to be held out")
    for valid in (None, tmp_path / "b.txt"):
        with pytest.raises(InputError, match=r"0 documents"):
            prepare(open_corpus(tmp_path / "a.txt", valid), tokenizer, tmp_path / "cache", 8)
    assert not [entry for entry in (tmp_path / "cache").glob("*") if entry.name.startswith(".tmp")]


@pytest.mark.fault("C9")
def test_fewer_tokens_than_one_window(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 2)
    with pytest.raises(InputError) as caught:
        prepare(open_corpus(path), tokenizer, tmp_path / "cache", 64)
    message = str(caught.value)
    assert "20 tokens to train on" in message and "at least 65" in message
    context = int(re.search(r"data\.context=(\d+) \(--context \1\)", message).group(1))
    with pytest.raises(InputError, match="tokens to train on"):
        prepare(open_corpus(path), tokenizer, tmp_path / "cache", context + 1)
    assert prepare(open_corpus(path), tokenizer, tmp_path / "cache", context).train  # the fix is right


@pytest.mark.fault("C10")
def test_an_empty_validation_split_gives_sizes_and_a_fraction_that_works(tmp_path, tokenizer):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"document number {number} with some words")
    with pytest.raises(InputError) as caught:
        prepare(open_corpus(tmp_path, val_fraction=0.01), tokenizer, tmp_path.parent / "cache", 8)
    message = str(caught.value)
    assert "(3 documents) to train, 0 (0) held out" in message
    fraction = float(re.search(r"data\.val_fraction=([0-9.]+) \(--val-fraction \1\)", message).group(1))
    assert (
        len(prepare(open_corpus(tmp_path, val_fraction=fraction), tokenizer, tmp_path.parent / "c", 8).valid.ends) == 1
    )
    with pytest.raises(InputError, match=r"nothing left to train on.*0 tokens.*data\.val_fraction="):
        prepare(open_corpus(tmp_path, val_fraction=0.9999), tokenizer, tmp_path.parent / "cache", 8)
    (tmp_path.parent / "tiny.txt").write_text("x" * 40)
    (tmp_path.parent / "blank.txt").write_text(" \n ")
    with pytest.raises(InputError, match=r"blank.txt: the validation split is empty"):
        opened = open_corpus(tmp_path.parent / "tiny.txt", tmp_path.parent / "blank.txt")
        prepare(opened, tokenizer, tmp_path.parent / "cache", 8)


@pytest.mark.fault("C12")
@pytest.mark.parametrize("kind", ["byte", "bpe", "wordpiece", "unigram", "char"])
def test_control_tokens_in_text_are_plain_text(tmp_path, kind):
    texts = [f"text {number} <|endoftext|> and [MASK] more" for number in range(30)]
    size = {"byte": 257}.get(kind, 300)
    chosen = train_tokenizer(texts, kind, size)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = prepare(open_corpus(path, val_fraction=0.2), chosen, tmp_path / "cache", 8)
    for side in (data.train, data.valid):
        eos = np.flatnonzero(side.tokens == chosen.eos_id) + 1
        assert eos.tolist() == side.ends.tolist()  # one at each document's end and nowhere else
        inside = set(side.tokens.tolist()) - {chosen.eos_id, chosen.unk_id}
        assert not inside & chosen.special_ids
    assert any("'<|endoftext|>' stands 30 times" in line for line in data.lines)
    assert chosen.special_id("<|endoftext|>") in chosen.encode(texts[0], control=True)  # the guard off
    again = prepare(open_corpus(path, val_fraction=0.2), chosen, tmp_path / "cache", 8)
    assert not again.built and again.lines == data.lines


@pytest.mark.fault("R10")
def test_the_hash_follows_every_byte_the_tokenizer_and_the_options(tmp_path, tokenizer, bpe):
    path = rows(tmp_path / "rows.jsonl")
    cache = tmp_path / "cache"

    def prepared(kind=tokenizer, fraction=0.2, **options):
        return prepare(open_corpus(path, val_fraction=fraction, options=ReadOptions(**options)), kind, cache, 8)

    first = prepared()
    assert first.built and not prepared().built and prepared().hash == first.hash
    assert prepared(bpe).hash != first.hash and prepared(bpe).data_hash == first.data_hash
    assert prepared(bpe).tokenizer_hash != first.tokenizer_hash
    assert len({first.hash, prepared(fraction=0.3).hash, prepared(newline="lf").hash}) == 3
    assert prepared(max_bytes=10**6).hash == first.hash
    stat = path.stat()
    data = path.read_bytes()
    path.write_bytes(data.replace(b"row 7", b"row 8"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time: the bytes count
    changed = prepared()
    assert changed.built and changed.data_hash != first.data_hash
    path.write_bytes(data + b'{"text": "one more line"}\n')
    assert prepared().data_hash not in (first.data_hash, changed.data_hash)
    path.write_bytes(data)
    path.rename(tmp_path / "other.jsonl")
    path = tmp_path / "other.jsonl"
    assert prepared().hash == first.hash  # only the name has changed


def test_a_damaged_store_is_built_again(tmp_path, tokenizer):
    path = rows(tmp_path / "rows.jsonl")
    cache = tmp_path / "cache"
    first = prepare(open_corpus(path, val_fraction=0.2), tokenizer, cache, 8)
    tokens = first.train.tokens.tolist()
    (folder,) = cache.iterdir()
    files = sorted(folder.iterdir())
    assert len(files) == 7
    for file in files:
        for damage in (lambda data: data[:-1], lambda data: b"\xff" + data[1:], None):
            if damage is None:
                file.unlink()
            else:
                file.write_bytes(damage(file.read_bytes()))
            again = prepare(open_corpus(path, val_fraction=0.2), tokenizer, cache, 8)
            assert again.built and again.train.tokens.tolist() == tokens
            assert any("damaged" in line for line in again.lines)
    assert not prepare(open_corpus(path, val_fraction=0.2), tokenizer, cache, 8).built


@pytest.mark.fault("T12", "S1")
def test_every_failing_primitive_leaves_nothing_visible(tmp_path, tokenizer):
    opened = open_corpus(rows(tmp_path / "rows.jsonl"), val_fraction=0.2)
    total = count_primitives(lambda: prepare(opened, tokenizer, tmp_path / "clean", 8))
    assert total > 20
    for k in range(1, total + 1):
        cache = tmp_path / f"failed-{k}"
        with hooked(failing(k, errno.ENOSPC)):
            try:
                prepare(opened, tokenizer, cache, 8)
                left = []  # the very last call is the folder's fsync: the store stands
            except MachineError as error:
                assert "No space left" in str(error) and "free" in str(error)
                left = list(cache.glob("*")) if cache.exists() else []
        assert left == [] or k >= total - 1
        assert prepare(opened, tokenizer, cache, 8).train.bytes > 0


@pytest.mark.fault("T12", "S2")
def test_a_kill_at_every_primitive_leaves_nothing_that_a_reader_takes(tmp_path, tokenizer):
    opened = open_corpus(rows(tmp_path / "rows.jsonl"), val_fraction=0.2)
    whole = prepare(opened, tokenizer, tmp_path / "clean", 8)
    cache, k = tmp_path / "cache", 1
    while killed_at(k, lambda: prepare(opened, tokenizer, cache, 8)):
        data = prepare(opened, tokenizer, cache, 8)
        assert data.train.tokens.tolist() == whole.train.tokens.tolist()
        assert not list(cache.glob(".tmp-*"))
        for entry in cache.iterdir():
            entry.rename(tmp_path / f"done-{k}")
        k += 1
    assert k > 20


def test_a_living_build_is_left_alone(tmp_path, tokenizer):
    cache = tmp_path / "cache"
    (cache / f".tmp-{os.getppid()}-abc").mkdir(parents=True)
    (cache / ".tmp-999999999-abc").mkdir()
    data = prepare(open_corpus(rows(tmp_path / "rows.jsonl"), val_fraction=0.2), tokenizer, cache, 8)
    assert [entry.name for entry in cache.glob(".tmp-*")] == [f".tmp-{os.getppid()}-abc"]
    assert any("left by a build that was killed" in line for line in data.lines)


def test_two_builders_of_one_store_agree(tmp_path, tokenizer, monkeypatch):
    opened = open_corpus(rows(tmp_path / "rows.jsonl"), val_fraction=0.2)
    rename = store.files.rename

    def late(source, target):  # another process puts the same store there first
        if source.name.startswith(".tmp-") and not target.exists() and target.parent == cache:
            monkeypatch.setattr(store.files, "rename", rename)
            assert in_child(lambda: prepare(opened, tokenizer, cache, 8)) == 0
        rename(source, target)

    cache = tmp_path / "cache"
    monkeypatch.setattr(store.files, "rename", late)
    data = prepare(opened, tokenizer, cache, 8)
    assert data.train.bytes and len(list(cache.iterdir())) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, tokenizer):
    path = rows(tmp_path / "rows.jsonl")
    opened = open_corpus(path, val_fraction=0.2)
    with pytest.raises(InputError, match="changed while it was read"):
        prepare(opened, tokenizer, tmp_path / "cache", 8, progress=lambda done, total: path.write_text('{"text": "x"}'))
    assert list((tmp_path / "cache").iterdir()) == []


def test_progress_reaches_the_end_and_overlap_is_said(tmp_path, tokenizer):
    path = rows(tmp_path / "rows.jsonl")
    seen = []
    data = prepare(open_corpus(path, path), tokenizer, tmp_path / "cache", 8, lambda *step: seen.append(step))
    size = path.stat().st_size
    assert seen[-1] == (2 * size, 2 * size) and sorted(seen) == seen
    assert any("figures will be too good" in line for line in data.lines)


def test_a_tokenizer_sees_the_training_side_only(tmp_path):
    path = rows(tmp_path / "rows.jsonl")
    opened = open_corpus(path, val_fraction=0.3)
    sides = {side: set(opened.texts(side)) for side in ("train", "valid")}
    assert not sides["train"] & sides["valid"] and all(sides.values())
    assert corpus.place(sources.Piece("a", "n", True, True)) == corpus.place(sources.Piece("a", "m", True, True))


@pytest.mark.real
def test_the_standard_library_is_a_corpus(tmp_path, tokenizer):
    """Real files, as they lie on every machine: one package's source, each file one document."""
    folder = Path(json.__file__).parent.parent / "asyncio"
    wanted = {path.read_bytes() for path in folder.rglob("*.py") if path.read_bytes().strip()}
    data = prepare(open_corpus(folder, val_fraction=0.2), tokenizer, tmp_path / "cache", 256)
    found = {text.encode() for side in (data.train, data.valid) for text in texts_of(side, tokenizer)}
    assert found == wanted and len(data.valid.ends) > 1
