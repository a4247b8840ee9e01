"""Who may look at whom: small predicates over positions, combined with `and`.

Everything is stated in positions, not in columns of a tensor, so the same predicates serve training, padding on
either side, packed documents, prefill and cached decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sight:
    """Queries and keys of one attention: where they stand, which are real, which document they belong to.

    `plain` promises that both sides are the same unpadded single document from position 0 on, so that a causal mask
    is the triangle that fused kernels build themselves. `latest` promises that no key lies after any query,
    `sighted` that every query sees a key.
    Shapes: positions (B|1, T) and (B|1, S); `k_real` (B, S) bool; documents (B, T) and (B, S).
    """

    q_positions: Tensor
    k_positions: Tensor
    k_real: Tensor | None = None
    q_documents: Tensor | None = None
    k_documents: Tensor | None = None
    plain: bool = False
    latest: bool = False
    sighted: bool = False

    def document_lengths(self) -> Tensor | None:
        """(B, T) tokens in the document of each query, None where a row is one document."""
        if self.q_documents is None:
            return None
        return (same_document(self) * self.k_positions[:, None, :]).amax(-1) + 1


def causal(sight: Sight) -> Tensor:
    """A key at or before the query."""
    return sight.k_positions[:, None, :] <= sight.q_positions[:, :, None]


def within(sight: Sight, window: int) -> Tensor:
    """A key closer than `window` positions: the query itself and window - 1 on each allowed side."""
    return (sight.k_positions[:, None, :] - sight.q_positions[:, :, None]).abs() < window


def real(sight: Sight) -> Tensor:
    """A key that is not padding (call only where `k_real` is set)."""
    assert sight.k_real is not None
    return sight.k_real[:, None, :]


def same_document(sight: Sight) -> Tensor:
    """Query and key in the same packed document (call only where both are set)."""
    assert sight.q_documents is not None and sight.k_documents is not None
    return sight.q_documents[:, :, None] == sight.k_documents[:, None, :]


@dataclass(frozen=True)
class Mask:
    """What an attention backend needs: the triangle that it can build itself, or a dense (B|1, 1, T, S) bool.

    `starts` (B, T) says the same as `dense` where every query sees the keys from a start up to itself. `sighted`: every
    query sees a key.
    """

    is_causal: bool = False
    dense: Tensor | None = None
    starts: Tensor | None = None
    sighted: bool = False

    def tensor(self, T: int, S: int, device: torch.device) -> Tensor | None:
        """The mask as a dense tensor, None when everything is visible."""
        if self.is_causal:
            return torch.ones(T, S, dtype=torch.bool, device=device).tril()[None, None]
        return self.dense


def build_mask(sight: Sight, *, is_causal: bool, window: int | None) -> Mask:
    """The conjunction of the predicates that this layer needs; nothing is computed that is always true."""
    T, S = sight.q_positions.shape[1], sight.k_positions.shape[1]
    narrow = window is not None and not (sight.plain and window >= S)
    if sight.plain and is_causal and not narrow:
        return Mask(is_causal=T > 1)
    parts = []
    if is_causal and not (sight.latest and T == 1):
        parts.append(causal(sight))
    if narrow:
        assert window is not None
        parts.append(within(sight, window))
    if sight.k_real is not None:
        parts.append(real(sight))
    if sight.q_documents is not None and sight.k_documents is not None:
        parts.append(same_document(sight))
    if not parts:
        return Mask()
    dense = parts[0]
    for part in parts[1:]:
        dense = dense & part
    packed = is_causal and not narrow and sight.k_real is None and sight.q_documents is not None
    order = torch.arange(T, device=dense.device)
    starts = order - sight.q_positions if packed and S == T else None
    return Mask(dense=dense[:, None], starts=starts, sighted=sight.sighted)
