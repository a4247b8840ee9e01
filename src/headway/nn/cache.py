"""What a decoder remembers, so that a new token costs one token: keys and values per layer, by position.

A key at position p lives in column p mod capacity. With capacity = max_len that is the contiguous static cache, with
capacity = window the rolling one; the same code serves both, and rows of unequal length need no padding columns.
All layers with the same window share one set of column positions. Cross-attention keys and values are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headway.errors import BugError
from headway.kernels.codes import code_rows


class Vectors:
    """The keys, or the values, of some layers: `numbers` (L, B, K, S, H), which are codes where there are `scales`.

    A vector of a head in codes is int8 times a scale of its own, (L, B, K, S, 1): its largest number is 127 of them.
    """

    def __init__(self, numbers: Tensor, like: Tensor) -> None:
        self.numbers, self.dtype = numbers, like.dtype
        self.scales: Tensor | None = None
        if numbers.dtype == torch.int8:
            self.scales = numbers.new_zeros(*numbers.shape[:-1], 1, dtype=torch.float32)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it."""
        return (self.numbers,) if self.scales is None else (self.numbers, self.scales)

    def packed(self, new_BKTH: Tensor) -> tuple[Tensor, ...]:
        """New vectors as they are kept, one for each of `tensors`."""
        if self.scales is None:
            return (new_BKTH.to(self.numbers.dtype),)
        codes, scales, _ = code_rows(new_BKTH.flatten(0, 2), new_BKTH.shape[3], planes=1)
        return codes.view_as(new_BKTH), scales.view(*new_BKTH.shape[:3], 1)

    def unpacked(self, kept: Sequence[Tensor]) -> Tensor:
        """What such tensors stand for: as they are, or codes times scales."""
        return kept[0] if self.scales is None else (kept[0] * kept[1]).to(self.dtype)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.numbers = self.numbers.index_select(1, rows)
        self.scales = None if self.scales is None else self.scales.index_select(1, rows)


class Slots:
    """Columns of keys and values for a group of layers with the same window.

    Tensors: keys and values of capacity + 1 columns, positions (B, capacity + 1) with -1 for an empty column. The last
    column is where padding goes: written, never read.
    """

    def __init__(
        self, layers: int, batch: int, capacity: int, heads: tuple[int, int], like: Tensor, dtype: torch.dtype
    ) -> None:
        n_kv_heads, d_head = heads
        self.capacity, self.used = capacity, 0
        shape = (layers, batch, n_kv_heads, capacity + 1, d_head)
        self.keys, self.values = (Vectors(like.new_zeros(shape, dtype=dtype), like) for _ in range(2))
        self.positions = torch.full((batch, capacity + 1), -1, dtype=torch.long, device=like.device)
        self._alike = 0  # the first columns, which hold the same in every row
        self._columns: Tensor | None = None
        self._past: Tensor | None = None
        self._shown = 0  # columns that attention reads where they are not in order

    def begin(self, positions: Tensor, real: Tensor | None, start: int | None) -> Tensor:
        """Reserve columns for new tokens; returns the positions (B, S) of all keys that they may see.

        Args:
            positions: (B|1, T) of the new tokens. real: (B, T) bool, None when all are.
            start: the first position when every row starts there without padding, else None.
        """
        T = positions.shape[1]
        batch = self.positions.shape[0]
        if start is not None and start + T <= self.capacity:
            self._columns, self._past = None, None
            self._start = start
            self.used = start + T
            self.positions[:, start : self.used] = positions
            return self.positions[:, : self.used]
        self._alike = 0
        new = positions.expand(batch, T)
        last = new.masked_fill(~real, -1).amax(1, keepdim=True) if real is not None else new.amax(1, keepdim=True)
        kept = new > last - self.capacity
        kept = kept & real if real is not None else kept
        self._columns = torch.where(kept, new % self.capacity, self.capacity)
        shown = new if real is None else new.masked_fill(~real, -1)
        reach = min(int(last.max()) + 1, self.capacity)
        # A block of new tokens may overwrite keys that its own first tokens still see: attend to old ones beside new.
        if T > 1 and int(last.max()) >= self.capacity:
            self._past = self.positions[:, : self.used].clone()
            seen = torch.cat((self._past, shown), 1)
        else:
            self._past = None
        self.positions.scatter_(1, self._columns, shown)
        self.positions[:, self.capacity] = -1
        self.used = self._shown = max(self.used, reach)
        return seen if self._past is not None else self.positions[:, : self.used]

    def place(self, positions: Tensor, shown: int) -> Tensor:
        """As `begin` for one token a row, over the first `shown` columns, and without a look at any number."""
        self._past, self._shown = None, min(shown, self.capacity)
        self._columns = positions % self.capacity
        self.positions.scatter_(1, self._columns, positions)
        return self.positions[:, : self._shown]

    def append(self, layer: int, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of one layer; returns all that are visible, (B, S, K, H) views."""
        return self._append(self.keys, layer, k_BTKH), self._append(self.values, layer, v_BTKH)

    def _append(self, vectors: Vectors, layer: int, new_BTKH: Tensor) -> Tensor:
        new = vectors.packed(new_BTKH.transpose(1, 2))
        seen = [self._put(kept[layer], some) for kept, some in zip(vectors.tensors, new, strict=True)]
        return vectors.unpacked(seen).transpose(1, 2)

    def _put(self, kept_BKSX: Tensor, new_BKTX: Tensor) -> Tensor:
        """Write into the columns that were reserved; returns what is visible."""
        if self._columns is None:
            kept_BKSX[:, :, self._start : self.used] = new_BKTX
            return kept_BKSX[:, :, : self.used]
        old = None if self._past is None else kept_BKSX[:, :, : self._past.shape[1]].clone()
        kept_BKSX.scatter_(2, self._columns[:, None, :, None].expand_as(new_BKTX), new_BKTX)
        return kept_BKSX[:, :, : self._shown] if old is None else torch.cat((old, new_BKTX), 2)

    def columns(self, positions: Tensor) -> Tensor | None:
        """Where tokens at these positions go, (B|1, T); None where they would overwrite what they still have to see."""
        if self._past is not None:
            return None
        return positions if self._columns is None else self._columns

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values as they are kept, (L, B, K, capacity + 1, ...) each."""
        return (*self.keys.tensors, *self.values.tensors)

    @property
    def in_order(self) -> bool:
        """Whether every column in use stands at its own position, in every row."""
        return self._columns is None

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of row rows[i] (beam search); the batch may change size.

        Of rows that went out from one prompt only what was written since is copied, and in place.
        """
        batch = self.positions.shape[0]
        if len(rows) != batch:
            self.keys.select(rows)
            self.values.select(rows)
            self.positions = self.positions.index_select(0, rows)
            if len(rows) > 1 and bool((rows == rows[0]).all()):
                self._alike = self.used
            return
        moved = (rows != torch.arange(batch, device=rows.device)).nonzero()[:, 0]
        if not len(moved):
            return
        new = slice(self._alike, self.used)
        for store in self.tensors:
            store[:, moved, :, new] = store[:, rows[moved], :, new]
        self.positions[moved] = self.positions[rows[moved]]

    def crop(self, length: int) -> None:
        """Forget every position from `length` on. A rolling cache that has wrapped cannot."""
        if int(self.positions.max()) >= self.capacity:
            raise BugError("cache", "a rolling cache that has wrapped cannot be cropped")
        self.positions[self.positions >= length] = -1
        self.used = min(self.used, length)
        self._alike = min(self._alike, length)


class Cache:
    """The memory of one batch of sequences through a whole model.

    `lengths` (B,) counts the real tokens seen per row; `length` is that number when all rows agree and none was
    padded, else None. `declared` (B,) is the length each sequence is meant to reach, which length-dependent RoPE needs.
    With `last_only` the model gives the logits of each row's last real token alone, (B, 1, V), and its states alone
    where none is padding: over a long prompt and a large vocabulary the others would take more memory than the model.

    Args:
        windows: the window of each layer, None for layers that see everything.
        batch: rows. max_len: tokens a row can hold. heads: (n_kv_heads, d_head). like: dtype and device.
        dtype: that keys and values are kept in, by default that of `like`; int8 is codes with a scale for each vector.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        batch: int,
        max_len: int,
        heads: tuple[int, int],
        like: Tensor,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.max_len, self.heads, self.dtype = max_len, heads, dtype or like.dtype
        self.groups: dict[int | None, Slots] = {}
        self.layers: list[tuple[int | None, int]] = []
        for window in windows:
            window = None if window is not None and window >= max_len else window
            self.layers.append((window, sum(1 for group, _ in self.layers if group == window)))
        for window in dict.fromkeys(group for group, _ in self.layers):
            count = sum(1 for group, _ in self.layers if group == window)
            self.groups[window] = Slots(count, batch, window or max_len, heads, like, self.dtype)
        self.length: int | None = 0
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.declared = torch.full_like(self.lengths, max_len)
        self.cross: list[tuple[Tensor, Tensor] | None] = [None] * len(self.layers)
        self._origin = torch.arange(batch, device=like.device)  # of which row each row's encoder states are
        self.encoder_real: Tensor | None = None
        self.encoder_hidden: Tensor | None = None
        self.sees_encoder = False  # whether in each row at least one of its states is real
        self.last_only = False
        self.fused: object | None = None  # the steps that ran last
        self.programs: dict[object, object | None] = {}  # that nn/fused.py and nn/recorded.py keep
        self.shown: int | None = None  # set while a step is recorded: it may look at no number, and reads these columns
        self.is_whole = True  # nothing is known to keep a new token from being a single call (nn/next_token.py)

    def next_positions(self, T: int, real: Tensor | None) -> Tensor:
        """Positions (B|1, T) of the next T tokens, counting only real ones."""
        if self.shown is not None:
            return self.lengths[:, None].clone()
        if real is None and self.length is not None:
            return torch.arange(self.length, self.length + T, device=self.lengths.device)[None]
        step = torch.arange(T, device=self.lengths.device)[None] if real is None else real.long().cumsum(1) - 1
        return self.lengths[:, None] + step.clamp(min=0)

    def begin(self, positions: Tensor, real: Tensor | None) -> dict[int | None, Tensor]:
        """Reserve room for new tokens; per window, the positions (B, S) of the keys they may see (-1: none)."""
        if self.shown is not None:
            self.lengths += 1
            return {window: slots.place(positions, self.shown) for window, slots in self.groups.items()}
        T = positions.shape[1]
        start = self.length if real is None else None
        new = T if real is None else real.sum(1)
        longest = int((self.lengths + new).max()) if start is None else start + T
        if longest > self.max_len:
            raise BugError("cache", f"{longest} tokens", f"at most {self.max_len}")
        seen = {window: slots.begin(positions, real, start) for window, slots in self.groups.items()}
        self.lengths += new
        self.length = start + T if start is not None else None
        return seen

    def advance(self) -> None:
        """Count a token that each row got while `shown` was set, or when such a step was replayed."""
        self.length = None if self.length is None else self.length + 1
        for slots in self.groups.values():
            slots.used = min(slots.used + 1, slots.capacity)

    def asks_last(self, real: Tensor | None) -> bool:
        """Whether of new tokens nothing but the last states are asked for, which without padding stand at the end."""
        return self.last_only and real is None

    def has_room(self, count: int) -> bool:
        """Whether so many tokens more fit into every row."""
        longest = self.length if self.length is not None else int(self.lengths.max())
        return longest + count <= self.max_len

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a step reads and writes."""
        own = (tensor for slots in self.groups.values() for tensor in (*slots.tensors, slots.positions))
        return (self.lengths, *own, *(tensor for pair in self.cross if pair is not None for tensor in pair))

    def append(self, layer: int, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; returns all visible ones, (B, S, K, H)."""
        window, index = self.layers[layer]
        return self.groups[window].append(index, k_BTKH, v_BTKH)

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of row rows[i]; used by beam search and to drop finished rows."""
        for slots in self.groups.values():
            slots.reorder(rows)
        self.lengths, self.declared = self.lengths[rows], self.declared[rows]
        before, self._origin = self._origin, self._origin[rows]
        if torch.equal(before, self._origin):
            return
        self.cross = [None if kv is None else (kv[0][rows], kv[1][rows]) for kv in self.cross]
        if self.encoder_real is not None:
            self.encoder_real = self.encoder_real[rows]
        if self.encoder_hidden is not None:
            self.encoder_hidden = self.encoder_hidden[rows]

    def crop(self, length: int) -> None:
        """Forget every position from `length` on, in all rows."""
        for slots in self.groups.values():
            slots.crop(length)
        self.lengths.clamp_(max=length)
        self.length = None if self.length is None else min(self.length, length)

    @property
    def bytes(self) -> int:
        """Memory held by self-attention keys and values, in bytes."""
        return sum(tensor.nbytes for slots in self.groups.values() for tensor in slots.tensors)
