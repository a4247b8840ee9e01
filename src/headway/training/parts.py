"""Parts of tensors: what this process holds where several share a model (parallel.py); alone it holds all of each.

A parameter that is shared out is a DTensor. The optimizers work on `local` parts; what needs the whole of a matrix
(Muon, Adafactor) asks for `whole` and takes its `part` of the answer. For plain tensors all of these are the identity.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headway.config import ModelConfig


def is_shared_out(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; asked this way nothing of torch.distributed is imported for it."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory; a plain tensor is its own."""
    found: Tensor = tensor.detach().to_local() if is_shared_out(tensor) else tensor  # type: ignore[attr-defined]
    return found


def row_order(parameter: Tensor) -> Tensor | None:
    """Where the rows of a fused matrix come from, None where they stand as in the model's own."""
    return getattr(parameter, "row_order", None)


def whole(shard: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which each process has the part that it has of the parameter `like`; all must ask at once."""
    if not is_shared_out(like):
        return shard
    full: Tensor = _spread(shard, like).full_tensor()
    order = row_order(like)
    return full if order is None else full[order.argsort()]


def part(full: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, what this process holds where it holds `like`."""
    if not is_shared_out(like):
        return full
    order, (mesh, placements) = row_order(like), _layout(like)
    out = full if order is None else full[order.to(full.device)]
    # The tensor ranks' split is the outer one.
    for place, size, coordinate in reversed([*zip(placements, mesh.shape, mesh.get_coordinate(), strict=True)]):
        if hasattr(place, "dim"):
            pieces = out.chunk(size, place.dim)
            out = pieces[coordinate] if coordinate < len(pieces) else out.narrow(place.dim, 0, 0)
    return out


def exported(shard: Tensor, like: Tensor) -> Tensor:
    """What a checkpoint takes of a part of `like`: a DTensor, each process's share of which is written by itself.

    Where rows are in another order than the model's it is the whole tensor, since a share is then in several places.
    """
    if not is_shared_out(like):
        return shard
    return _spread(shard, like) if row_order(like) is None else whole(shard, like)


def shares(tensor: Tensor) -> int:
    """Into how many parts a tensor is shared out."""
    count = 1
    if is_shared_out(tensor):
        mesh, placements = _layout(tensor)
        for place, size in zip(placements, mesh.shape, strict=True):
            count *= size if hasattr(place, "dim") else 1
    return count


def _layout(tensor: Tensor) -> tuple[Any, Any]:
    return tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]  # a DTensor


def _spread(shard: Tensor, like: Tensor) -> Any:
    from torch.distributed.tensor import DTensor

    mesh, placements = _layout(like)
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape, stride=stride)


def fused_rows(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The rows of each part of a fused matrix, by the name of its layer."""
    q, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    halves = (config.d_ff, config.d_ff) if config.feed_forward.gated else (config.d_ff,)
    return {"qkv": (q, kv, kv), "kv": (kv, kv), "up": halves}
