"""Checkpoint folders of a run: saved so that a crash at any moment leaves a good one, read so that only good
ones count.

    RUN/checkpoints/step-00000100/   model.safetensors, ..., manifest.json
    RUN/checkpoints/latest           the newest one's name, for people: a hint, never the truth
    RUN/checkpoints/.tmp-...         unfinished; readers ignore it, clean_temporary removes it

Saving: temporary folder -> write and fsync each file -> manifest (sizes, sha256, shapes, the caller's meta,
and a hash of itself), fsync -> rename -> fsync the parent -> replace `latest` -> remove older ones, never
below two that verify. The truth is the highest step whose folder matches its manifest.

Callers hold files.RunLock on the run: two writers in one folder are not supported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

from torch import Tensor

from headway import files
from headway.checkpoints.tensors import shapes, snapshot, tensor_hash, write_tensors
from headway.errors import BugError, InputError, MachineError
from headway.strict import strict_json

# Beside checkpoints/ in a run folder: the model's config, the resolved run, the tokenizer.
MODEL, CONFIG, TOKENIZER = "model.json", "config.yaml", "tokenizer.json"
WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = "headway checkpoint 1"
MAX_MANIFEST = 1 << 26
_STEP = re.compile(r"step-(\d{8,18})(\.old)?")
_RECORD = {"size": int, "sha256": str}
_BARE = re.compile(r"[^./\\\0][^/\\\0]{0,254}")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder must hold.

    Attributes:
        step: optimizer steps done.
        weights: tensor_hash of model.safetensors.
        files: {name: {"size": bytes, "sha256": hex}}.
        tensors: {file: {tensor: [dtype, *shape]}}.
        meta: the caller's JSON: config and tokenizer hashes, random state, data cursor, threads, torch.
    """

    step: int
    weights: str
    files: dict[str, dict[str, int | str]]
    tensors: dict[str, dict[str, list[str | int]]]
    meta: dict[str, object]


class Found(NamedTuple):
    """The newest checkpoint that verifies, and why each newer one does not."""

    path: Path
    manifest: Manifest
    rejected: list[str]


def checkpoint_path(run: Path, step: int) -> Path:
    """RUN/checkpoints/step-00000100."""
    return run / "checkpoints" / f"step-{step:08d}"


def _canonical(value: object) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise BugError(MANIFEST, f"meta is not JSON: {error}") from error


def _seal(body: Mapping[str, object]) -> bytes:
    """The manifest's text with a hash of the rest of it, so that a flipped bit in the meta shows too."""
    return _canonical({**body, "sha256": hashlib.sha256(_canonical(body)).hexdigest()})


def _recorded(data: files.Content, record: dict[str, int | str]) -> Iterator[files.Chunk]:
    digest, size = hashlib.sha256(), 0
    for chunk in files.chunks(data):
        digest.update(chunk)
        size += len(chunk)
        yield chunk
    record.update(size=size, sha256=digest.hexdigest())


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) in rising order, good or not. Raises InputError if the run is unreadable."""
    folder = run / "checkpoints"
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise InputError(str(folder), f"cannot be listed: {error}", "a run folder") from error
    # "step-8.old", a checkpoint being replaced, sorts just below "step-8"
    found = [(int(match[1]), not match[2], folder / name) for name in names if (match := _STEP.fullmatch(name))]
    return [(step, path) for step, _, path in sorted(found)]


def read_manifest(path: Path) -> Manifest:
    """A checkpoint's manifest, itself intact, its files not yet checked. Raises InputError."""
    where = str(path / MANIFEST)
    raw = files.read_bytes(path / MANIFEST, MAX_MANIFEST)
    body = strict_json(raw, where)
    if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
        raise InputError(where, "not a checkpoint manifest", f"format {FORMAT!r}")
    body.pop("sha256", None)
    if _seal({"format": FORMAT, **body}) != raw:
        raise InputError(where, "does not match its own hash", "an unchanged manifest")
    manifest = _manifest(where, body)
    name = _STEP.fullmatch(path.name)
    if name and int(name[1]) != manifest.step:
        raise InputError(where, f"belongs to step {manifest.step}", f"step {int(name[1])}, the folder's name")
    return manifest


def _manifest(where: str, body: dict[str, object]) -> Manifest:
    """Types and names checked: the hash proves that nothing changed, not that we wrote it."""
    kinds = {"step": int, "weights": str, "files": dict, "tensors": dict, "meta": dict}
    if set(body) != set(kinds) or not all(type(body[key]) is kind for key, kind in kinds.items()):
        raise InputError(where, "other keys or types than a manifest's", ", ".join(kinds))
    manifest = Manifest(**body)  # type: ignore[arg-type]
    for name, record in manifest.files.items():
        if not _BARE.fullmatch(name):
            raise InputError(where, f"file name {name[:80]!r}", "a bare file name")
        if not isinstance(record, dict) or {key: type(value) for key, value in record.items()} != _RECORD:
            raise InputError(where, f"the entry of {name!r} is malformed", "size and sha256")
    return manifest


def verify(path: Path) -> Manifest:
    """Check every file of a checkpoint folder against its manifest, byte for byte.

    Raises InputError naming the first file that is missing, has another size or other bytes (K14).
    """
    manifest = read_manifest(path)
    for name, record in manifest.files.items():
        with files.open_regular(path / name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record["size"]:
                raise InputError(str(path / name), f"{size} bytes", f"{record['size']} bytes by the manifest")
            try:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise InputError(str(path / name), f"cannot be read: {error.strerror}") from error
        if sha256 != record["sha256"]:
            raise InputError(str(path / name), f"sha256 {sha256}", f"{record['sha256']} by the manifest")
    return manifest


def newest_good(run: Path) -> Found:
    """The checkpoint with the highest step that verifies, and why each newer one was rejected.

    Raises InputError that says what was tried and why each failed when none verifies (R12).
    """
    rejected: list[str] = []
    for _, path in reversed(list_checkpoints(run)):
        try:
            return Found(path, verify(path), rejected)
        except InputError as error:
            rejected.append(str(error))
    tried = "no usable checkpoint" + (f", tried {len(rejected)}: {' | '.join(rejected)}" if rejected else "")
    raise InputError(str(run / "checkpoints"), tried, "one that matches its manifest", "start without --resume")


def clean_temporary(run: Path) -> list[Path]:
    """Remove what a killed process left unfinished (S11); call it under the run's lock. Returns what went."""
    places = [place for place in (run, run / "checkpoints") if place.is_dir()]
    orphans = sorted(path for place in places for path in place.glob(f"{files.TEMPORARY_PREFIX}*"))
    for path in orphans:
        files.remove_tree(path)
    return orphans


def _discard(path: Path) -> None:
    """Remove a folder; renamed first, so that a crash half-way leaves nothing like a checkpoint."""
    temporary = files.temporary_sibling(path)
    files.rename(path, temporary)
    files.remove_tree(temporary)


def _set_aside(target: Path, overwrite: bool) -> None:
    """Free the name `target`. A good checkpoint there stays readable as `.old` until the new one stands."""
    if not target.exists():
        return
    try:
        verify(target)
    except InputError:
        return _discard(target)
    if not overwrite:
        raise MachineError(str(target), "exists and is a good checkpoint", "a new step", "add --overwrite")
    old = target.with_name(target.name + ".old")
    if old.exists():
        _discard(old)
    files.rename(target, old)


def _prune(run: Path, saved: Path, keep: int, protect: Collection[int]) -> None:
    """Keep the `keep` newest that verify, the protected steps and the one just saved; newer ones stay too."""
    step_saved = int(saved.name.removeprefix("step-"))
    good: set[int] = set()
    doomed = []
    for step, path in reversed(list_checkpoints(run)):
        if len(good) < keep and step not in good:
            try:
                verify(path)
                good.add(step)
                continue
            except InputError as error:
                if path == saved:
                    raise MachineError(str(error), "the disk returns other bytes than were written") from error
        if path != saved and step <= step_saved and (step in good or step not in protect):
            doomed.append(path)
    for path in doomed:
        _discard(path)


def _refuse_unmoved(run: Path, step: int, weights: str) -> None:
    for earlier, path in reversed(list_checkpoints(run)):
        if earlier < step:
            with contextlib.suppress(InputError):
                if read_manifest(path).weights == weights:
                    found = f"step {step} has the very weights of step {earlier}"
                    raise BugError(str(run), found, "training to have moved them")
                return


def save_checkpoint(
    run: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, object],
    *,
    others: Mapping[str, files.Content] | None = None,
    keep: int = 2,
    protect: Collection[int] = (),
    moved: bool = True,
    overwrite: bool = False,
    shares: Callable[[Path], str] | None = None,
) -> Path:
    """Write RUN/checkpoints/step-N by the protocol above and return it.

    Args:
        tensors: {file name: {tensor name: tensor}}; `model.safetensors` holds the weights. They must not
            change during the call (see BackgroundSaver).
        meta: what else the manifest should say, as JSON values.
        others: {file name: bytes or chunks} for the config, the tokenizer, state trees.
        keep: how many verified checkpoints to keep, at least two.
        protect: steps never removed, such as the best one.
        moved: False when the weights need not have changed since the last save (learning rate 0).
        overwrite: replace a good checkpoint of the same step instead of refusing (S13).
        shares: has every process write its share into the temporary folder (shards.py), gives the weights' hash.

    Raises MachineError (disk; the last checkpoint is untouched) and BugError (weights identical to the
    previous checkpoint's although `moved`, S10).
    """
    target, weights = checkpoint_path(run, step), tensor_hash(tensors.get(WEIGHTS, {}))
    contents: dict[str, files.Content] = dict(others or {})
    contents.update({name: write_tensors(group) for name, group in tensors.items()})
    for name in contents:
        if not _BARE.fullmatch(name) or name == MANIFEST:
            raise BugError("checkpoint", f"file name {name!r}", "a bare file name")
    if moved and tensors.get(WEIGHTS):
        _refuse_unmoved(run, step, weights)
    layout = {name: shapes(group) for name, group in tensors.items()}
    files.make_dir(target.parent)
    files.sync(run)
    temporary = files.temporary_sibling(target)
    try:
        files.make_dir(temporary)
        records: dict[str, dict[str, int | str]] = {}
        if shares is not None:
            weights = shares(temporary)
            if moved:
                _refuse_unmoved(run, step, weights)
            records = _recorded_shares(temporary)
        _fill(temporary, contents, Manifest(step, weights, records, layout, dict(meta)))
        _set_aside(target, overwrite)
        files.rename(temporary, target)
    except BaseException:
        with contextlib.suppress(MachineError):
            files.remove_tree(temporary)
        raise
    files.sync(target.parent)
    files.atomic_write(target.parent / LATEST, target.name.encode() + b"\n")
    _prune(run, target, max(keep, 2), protect)
    return target


def _recorded_shares(folder: Path) -> dict[str, dict[str, int | str]]:
    """Force what other processes wrote to the disk; its sizes and hashes."""
    records: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.iterdir()):
        files.sync(path)
        with files.open_regular(path) as file:
            size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256")
        records[path.name] = {"size": size, "sha256": digest.hexdigest()}
    return records


def _fill(folder: Path, contents: Mapping[str, files.Content], manifest: Manifest) -> None:
    """Write the files, then the manifest that records them."""
    for name, data in contents.items():
        record = manifest.files[name] = {}
        files.write(folder / name, _recorded(data, record))
        files.sync(folder / name)
    files.write(folder / MANIFEST, _seal({"format": FORMAT, **asdict(manifest)}))
    files.sync(folder / MANIFEST)
    files.sync(folder)


class SaveOptions(TypedDict, total=False):
    """The keyword options of save_checkpoint."""

    keep: int
    protect: Collection[int]
    moved: bool
    overwrite: bool


class BackgroundSaver:
    """Saves while training goes on: the bytes are the state at the call, whatever happens afterwards (S9).

    `save` waits for the save before it, copies the tensors (one more model in memory), and starts writing in
    a thread. An error of the writing is raised by the next `save` or by `join`.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[Path] | None = None

    def save(
        self,
        run: Path,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        meta: Mapping[str, object],
        others: Mapping[str, files.Content] | None = None,
        **options: Unpack[SaveOptions],
    ) -> None:
        """Like save_checkpoint, with its result at `join`. Raises what the previous save raised."""
        self.join()
        copies = {name: snapshot(group) for name, group in tensors.items()}
        plain = json.loads(_canonical(meta))
        held = {name: b"".join(files.chunks(data)) for name, data in (others or {}).items()}
        self._running = self._pool.submit(save_checkpoint, run, step, copies, plain, others=held, **options)

    def join(self) -> Path | None:
        """Wait for the save in progress; its path, or None when there was none. Raises what it raised."""
        running, self._running = self._running, None
        return running.result() if running else None
