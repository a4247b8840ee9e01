"""Published architectures as data: one file each, found by `model_type`.

A file of this folder (without an underscore in front) holds one FAMILY. docs/how-to/add-a-family.md says how to add
one; the parity table in tests/families picks it up by itself.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from headway.errors import InputError, nearest
from headway.families._table import Family

__all__ = ["Family", "families", "family_of"]


@functools.cache
def families() -> dict[str, Family]:
    """Every family by its model_type."""
    found = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in found]
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


def family_of(raw: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json. Raises InputError: no model_type, or one that is not known, with the list."""
    name = raw.get("model_type")
    if not isinstance(name, str):
        raise InputError(where, "no model_type", f"one of {', '.join(families())}")
    if name not in families():
        near = nearest(name, families())
        raise InputError(f"{where} model_type", f"{name[:80]!r}{near}", f"one of {', '.join(families())}")
    return families()[name]
