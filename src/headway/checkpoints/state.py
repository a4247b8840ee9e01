"""Nested state (optimizer, random generators, data cursor) as named tensors plus a JSON tree, never pickled.

A tree is null, a bool, an int, a finite float, a string, a list, or a one-key object that says what it is:
{"pairs": [[key, value], ...]} a dict with keys of any of these kinds, {"tuple": [...]}, {"tensor": name},
{"array": name} (numpy), {"float": "nan" | "inf" | "-inf"}. Order, key types and float bits survive the way
there and back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from headway.errors import BugError, InputError

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


def _flatten(value: object, path: str, tensors: dict[str, Tensor]) -> JSON:
    if isinstance(value, Tensor | np.ndarray):
        name, number = path or "tensor", 1
        while name in tensors:  # the keys 1 and "1" read alike in a path
            number += 1
            name = f"{path}#{number}"
        tensors[name] = value.detach() if isinstance(value, Tensor) else torch.from_numpy(value.copy())
        return {"tensor" if isinstance(value, Tensor) else "array": name}
    if isinstance(value, dict):
        return {
            "pairs": [
                [_flatten(key, f"{path}/key", tensors), _flatten(item, f"{path}/{key}".lstrip("/"), tensors)]
                for key, item in value.items()
            ]
        }
    if type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        items = [_flatten(item, f"{path}/{i}".lstrip("/"), tensors) for i, item in enumerate(value)]
        return {"tuple": list(items)} if isinstance(value, tuple) else list(items)
    if value is None or type(value) in (bool, int, str):
        return value  # type: ignore[return-value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    raise BugError(f"state {path}", f"a {type(value).__name__} cannot be saved", "tensors and plain values")


def flatten_state(value: object) -> tuple[dict[str, Tensor], JSON]:
    """Split nested dicts, lists, tuples, scalars, tensors, numpy arrays into named tensors and a JSON tree.

    Tensors are detached but not copied. Raises BugError naming the place of a value of any other type.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(value, "", tensors)


def unflatten_state(tensors: Mapping[str, Tensor], tree: object, where: str = "state") -> object:
    """The value that flatten_state took apart, its tensors on the CPU as given.

    Raises InputError, naming `where`, for a tree that flatten_state does not write.
    """

    def build(node: object) -> object:
        if isinstance(node, list):
            return [build(item) for item in node]
        if not isinstance(node, dict):
            return node
        match list(node.items()):
            case [("pairs", list(pairs))] if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
                return {build_key(key): build(item) for key, item in pairs}
            case [("tuple", list(items))]:
                return tuple(build(item) for item in items)
            case [("tensor", str(name))] if name in tensors:
                return tensors[name]
            case [("array", str(name))] if name in tensors:
                return tensors[name].numpy()
            case [("float", "nan" | "inf" | "-inf" as text)]:
                return float(text)
        raise InputError(where, f"an unknown node with keys {sorted(map(str, node))[:3]}", "a saved state")

    def build_key(node: object) -> object:
        key = build(node)
        if isinstance(key, list | dict):
            raise InputError(where, "a list or dict as a key", "a saved state")
        return key

    return build(tree)
