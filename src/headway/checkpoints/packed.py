"""Matrices in codes in a run folder: their tensors stand in model.safetensors as kernels read them (kernels/codes.py).

For a layer `L` the file holds `L.codes0`, `L.scales0`, `L.minima0` (asymmetric ones), the same with 1, 2, ... for
further groups of rows, and `L.input_scale`. What no tensor says stands in the manifest under `packed`. Kernels trust
what they are given, so everything is compared here with the sizes it must have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headway.errors import InputError
from headway.kernels.codes import ROWS, CodedMatrix
from headway.nn.packed import Packed, PackedEmbedding, PackedLinear

PACKED = "packed"
_BITS, _CHUNKS, _SCALES = (4, 7, 8), (16, 32), {"float16": torch.float16, "float32": torch.float32}


def forms(model: nn.Module) -> dict[str, Any]:
    """{layer: what its tensors do not say}, as JSON values."""
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            parts = [{"kind": kind, **_form(part)} for kind, part in module.packed.parts]
            out[name] = {"columns": module.shape[1], "parts": parts}
    return out


def _form(part: CodedMatrix) -> dict[str, Any]:
    scales = str(part.scales.dtype).removeprefix("torch.")
    numbers = {name: getattr(part, name) for name in ("bits", "chunk", "group", "zero")}
    return {"rows": part.shape[0], "scales": scales, **numbers}


def joined(said: object, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor | Packed]:
    """The tensors of a file with those of each layer in codes as one `L.weight`. Raises InputError."""
    if not isinstance(said, dict):
        raise InputError(f"{where} {PACKED}", f"a {type(said).__name__}", "layers by name")
    out: dict[str, Tensor | Packed] = dict(tensors)
    known: dict[tuple[int, ...], Packed] = {}  # by the places of its tensors: what is tied stays tied
    for name, form in said.items():
        packed = _packed(name, form, out, f"{where} {PACKED} {name[:80]}")
        key = tuple(part.codes.data_ptr() for _, part in packed.parts)
        if key not in known:
            known[key] = packed._replace(parts=tuple((kind, part.settled()) for kind, part in packed.parts))
        out[f"{name}.weight"] = known[key]
    return out


def _packed(name: str, form: object, tensors: dict[str, Tensor | Packed], where: str) -> Packed:
    columns, parts = (form.get("columns"), form.get("parts")) if isinstance(form, dict) else (None, None)
    if not isinstance(columns, int) or not _is_count(columns) or not isinstance(parts, list) or not parts:
        raise InputError(where, "malformed", "columns and parts")
    found = []
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or not _is_form(part):
            raise InputError(where, f"part {number} is malformed", "rows, bits, chunk, group, zero and scales")
        taken = {one: tensors.pop(f"{name}.{one}{number}", None) for one in ("codes", "scales", "minima")}
        found.append((str(part.get("kind")), _matrix(part, columns, taken, where)))
    scale = tensors.pop(f"{name}.input_scale", None)
    if not isinstance(scale, Tensor | None):
        raise InputError(where, "a matrix called input_scale", "numbers")
    if scale is not None and (scale.shape != (columns,) or scale.dtype != torch.float32):
        raise InputError(where, f"input_scale {scale.dtype} {tuple(scale.shape)}", f"float32 ({columns},)")
    return Packed(tuple(found), (sum(part.shape[0] for _, part in found), columns), scale)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_form(part: Mapping[str, object]) -> bool:
    bits, chunk, group, zero = (part.get(name) for name in ("bits", "chunk", "group", "zero"))
    if type(zero) is not int or type(chunk) is not int or type(group) is not int or not 0 <= zero < 256:
        return False
    fits = bits in _BITS and chunk in _CHUNKS and (bits, chunk) != (4, 16)  # no kernel has that
    return fits and str(part.get("scales")) in _SCALES and _is_count(part.get("rows")) and group > 0 == group % chunk


def _matrix(
    part: Mapping[str, Any], columns: int, taken: Mapping[str, Tensor | Packed | None], where: str
) -> CodedMatrix:
    bits, chunk, group, rows = part["bits"], part["chunk"], part["group"], part["rows"]
    blocks, chunks, dtype = -(-rows // ROWS), -(-columns // chunk), _SCALES[part["scales"]]
    numbers = (blocks, -(-columns // group), ROWS)
    wanted = {
        "codes": (torch.uint8, (blocks, chunks, chunk // (8 if bits == 4 else 4), ROWS, 4)),
        "scales": (dtype, numbers),
        "minima": (dtype, numbers),
    }
    made: dict[str, Tensor] = {}
    for name, (kind, shape) in wanted.items():
        tensor = taken[name]
        if tensor is None and name == "minima":
            continue
        if not isinstance(tensor, Tensor):
            raise InputError(where, f"no tensor {name}", f"{kind} {shape}".removeprefix("torch."))
        as_bits = {torch.float16: torch.int16, torch.float32: torch.int32}.get(kind, kind)
        if tensor.shape != shape or tensor.dtype not in (kind, as_bits):
            raise InputError(where, f"{name} {tensor.dtype} {tuple(tensor.shape)}", f"{kind} {shape}")
        made[name] = tensor.contiguous().view(kind)
        if kind.is_floating_point and not bool(made[name].isfinite().all()):
            raise InputError(where, f"{name} holds NaN or infinity", "finite numbers")
    if bits == 7 and int(made["codes"].max()) > 127:
        raise InputError(where, "a code above 127", "codes of 7 bits")
    return CodedMatrix(
        made["codes"], made["scales"], made.get("minima"), (rows, columns), bits, chunk, group, part["zero"]
    )
