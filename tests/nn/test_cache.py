"""The cache against a list per row: which keys a new token sees, after chunks, padding, rolling, crop and reorder.

Every token carries its own number as its key, so a key that went to the wrong column, row or layer shows.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from headway.config import ModelConfig
from headway.errors import BugError, ConfigError, HeadwayError
from headway.nn import Cache, Transformer
from headway.nn.attention import Attention
from headway.nn.masks import Sight, build_mask

HEADS = (2, 3)  # n_kv_heads, d_head
LIKE = torch.zeros((), dtype=torch.float64)


class Twin:
    """The real tokens of each row, as numbers, beside the cache that holds them as keys."""

    def __init__(self, windows: list[int | None], batch: int, max_len: int) -> None:
        self.cache = Cache(windows, batch, max_len, HEADS, LIKE)
        self.windows = windows
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.fresh = itertools.count(1)

    def feed(self, real: list[list[bool]] | int) -> None:
        """Append tokens (all real when given as a number) and check what each of them sees in each layer."""
        mask = None if isinstance(real, int) else torch.tensor(real)
        T = real if isinstance(real, int) else len(real[0])
        numbers = torch.tensor([[next(self.fresh) for _ in range(T)] for _ in self.rows])
        before = [len(row) for row in self.rows]
        for b, row in enumerate(self.rows):
            row += [int(n) for t, n in enumerate(numbers[b]) if mask is None or mask[b, t]]
        positions = self.cache.next_positions(T, mask)
        seen = self.cache.begin(positions, mask)
        for layer, window in enumerate(self.windows):
            keys, values = self.cache.append(layer, tokens(numbers, layer), -tokens(numbers, layer))
            assert torch.equal(keys, -values)
            k_positions = seen[self.cache.layers[layer][0]]
            assert keys.shape == (len(self.rows), k_positions.shape[1], *HEADS)
            sight = Sight(positions.expand(len(self.rows), T), k_positions, k_positions >= 0, latest=True)
            visible = build_mask(sight, is_causal=True, window=window).dense
            for b, row in enumerate(self.rows):
                at = before[b]
                for t in range(T):
                    if mask is None or mask[b, t]:
                        at += 1
                        expected = row[max(0, at - window) if window else 0 : at]
                        assert sorted(read(keys[b], layer, visible[b, 0, t])) == expected

    def reorder(self, rows: list[int]) -> None:
        self.cache.reorder(torch.tensor(rows))
        self.rows = [list(self.rows[b]) for b in rows]

    def crop(self, length: int) -> None:
        self.cache.crop(length)
        self.rows = [row[:length] for row in self.rows]


def tokens(numbers: Tensor, layer: int) -> Tensor:
    """(B, T) -> keys (B, T, K, H) that differ by layer, head and dimension."""
    tail = torch.arange(6, dtype=torch.float64).view(HEADS) / 10
    return numbers[..., None, None].double() + 1000 * layer + tail


def read(keys_SKH: Tensor, layer: int, visible: Tensor) -> list[int]:
    """The numbers of the visible keys; every head and dimension must agree."""
    found = (keys_SKH[visible] - tokens(torch.zeros(1), layer)[0]).round(decimals=6)
    assert (found == found[:, :1, :1]).all()
    return [int(n) for n in found[:, 0, 0]]


# --- who is seen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 4, 1], [3, 3, 3, 3]], ids=str)
@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 12, 64])
def test_each_token_sees_the_last_window_of_keys(window: int | None, chunks: list[int]) -> None:
    """Prefill, single steps and blocks that roll over while their own first tokens still need the old keys."""
    twin = Twin([window], 2, 12)
    for chunk in chunks:
        twin.feed(chunk)
    assert twin.cache.length == 12 and twin.cache.lengths.tolist() == [12, 12]


@pytest.mark.parametrize("seed", range(40))
def test_random_histories(seed: int) -> None:
    """Ragged chunks with padding anywhere, beams that move and multiply, crops where no window has rolled."""
    rng = random.Random(seed)
    windows = rng.choice([[None], [3], [2, None, 2], [5, None]])
    twin = Twin(windows, 3, 16)
    for _ in range(12):
        room, batch = 16 - max(map(len, twin.rows)), len(twin.rows)
        action, T = rng.random(), rng.randint(1, 4)
        if action < 0.35 and room >= T:
            twin.feed(T)
        elif action < 0.7 and room >= T:
            twin.feed([[rng.random() < 0.6 for _ in range(T)] for _ in range(batch)])
        elif action < 0.85:
            twin.reorder([rng.randrange(batch) for _ in range(rng.randint(1, 4))])
        elif max(map(len, twin.rows)) <= min((w for w in windows if w), default=16):
            twin.crop(rng.randint(0, 5))
        assert twin.cache.lengths.tolist() == [len(row) for row in twin.rows]


def test_the_twin_notices_a_swapped_row() -> None:
    """Negative control: the list says one order, the cache another."""
    twin = Twin([None], 2, 8)
    twin.feed(3)
    twin.cache.reorder(torch.tensor([1, 0]))
    with pytest.raises(AssertionError):
        twin.feed(1)


def test_rows_of_unequal_length_go_on_from_their_own_length() -> None:
    twin = Twin([None, 3], 3, 12)
    twin.feed([[True, True, True, True], [False, False, True, True], [True, False, False, False]])
    assert twin.cache.length is None
    assert twin.cache.next_positions(2, None).tolist() == [[4, 5], [2, 3], [1, 2]]
    twin.feed(2)
    twin.feed([[False], [True], [False]])
    assert twin.cache.lengths.tolist() == [6, 5, 3]


# --- crop, reorder, overflow -------------------------------------------------------------------------------------


def test_crop_forgets_and_the_next_tokens_take_the_place() -> None:
    """Speculative decoding: rejected tokens leave no trace."""
    twin = Twin([None, 8], 2, 12)
    twin.feed(6)
    twin.crop(4)
    assert twin.cache.length == 4
    twin.feed(3)
    assert twin.cache.length == 7


def test_crop_beyond_the_end_changes_nothing() -> None:
    twin = Twin([None], 2, 12)
    twin.feed([[True, True, True], [True, False, False]])
    twin.crop(9)
    assert twin.cache.lengths.tolist() == [3, 1]
    twin.feed(1)


def test_a_rolled_cache_cannot_be_cropped() -> None:
    """Position 0 is gone: cropping back to 2 would leave a window without its older keys."""
    twin = Twin([3, None], 1, 12)
    twin.feed(3)
    twin.crop(2)  # nothing lost yet
    twin.feed(2)
    with pytest.raises(BugError, match="wrapped"):
        twin.crop(2)


def test_reorder_moves_everything_that_belongs_to_a_row() -> None:
    cache = Cache([None], 3, 8, HEADS, LIKE)
    cache.declared = torch.tensor([5, 6, 7])
    kv = torch.arange(3.0).view(3, 1, 1, 1).expand(-1, 4, *HEADS)
    cache.cross = [(kv, kv + 10)]
    cache.encoder_real, cache.encoder_hidden = torch.eye(3), torch.eye(3) + 1
    cache.reorder(torch.tensor([2, 2, 0, 1]))
    assert cache.declared.tolist() == [7, 7, 5, 6] and cache.lengths.shape == (4,)
    assert cache.cross[0][0][:, 0, 0, 0].tolist() == [2, 2, 0, 1]
    assert cache.cross[0][1][:, 0, 0, 0].tolist() == [12, 12, 10, 11]
    assert torch.equal(cache.encoder_real, torch.eye(3)[[2, 2, 0, 1]])
    assert torch.equal(cache.encoder_hidden, torch.eye(3)[[2, 2, 0, 1]] + 1)


@pytest.mark.parametrize("window", [None, 3])
def test_more_tokens_than_declared_are_our_bug(window: int | None) -> None:
    """Also in a rolling cache, which could take them: positions end at max_len."""
    twin = Twin([window], 2, 5)
    twin.feed(4)
    with pytest.raises(BugError, match=r"6 tokens; expected at most 5"):
        twin.feed(2)
    ragged = Twin([window], 2, 5)
    ragged.feed([[True] * 4, [False, True, False, False]])
    with pytest.raises(BugError):
        ragged.feed([[True, True], [False, True]])


def test_padding_takes_no_room() -> None:
    """Four columns of padding on a row that is nearly full."""
    twin = Twin([None], 2, 5)
    twin.feed([[True] * 4, [True, False, False, False]])
    twin.feed([[False, False, False, True], [False, True, False, False]])
    assert twin.cache.lengths.tolist() == [5, 2]


def test_a_short_row_may_grow_while_a_full_one_rests() -> None:
    twin = Twin([None], 2, 5)
    twin.feed([[True] * 4, [True, False, False, False]])
    twin.feed([[True, False, False], [True, True, True]])
    assert twin.cache.lengths.tolist() == [5, 4]


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype,size", [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_bytes_count_every_column(dtype: torch.dtype, size: int) -> None:
    """Full layers and windows wider than the sequence have 32 columns, windows of 4 have 4; and one for padding."""
    cache = Cache([None, 4, 4, None, 4, 99], 3, 32, HEADS, torch.zeros((), dtype=dtype))
    assert cache.bytes == 2 * 3 * (2 * 3) * (3 * (32 + 1) + 3 * (4 + 1)) * size
    held = [tensor for slots in cache.groups.values() for tensor in slots.tensors]
    assert cache.bytes == sum(tensor.untyped_storage().nbytes() for tensor in held)


def test_bytes_of_codes_and_their_scales() -> None:
    cache = Cache([None, 4], 3, 32, (2, 16), torch.zeros(()), torch.int8)
    assert cache.bytes == 2 * (3 * 2) * ((32 + 1) + (4 + 1)) * (16 + 4)


@pytest.mark.parametrize("window", [None, 4])
def test_codes_are_within_half_a_step_wherever_they_go(window: int | None) -> None:
    """The step of a vector is a 127th of its largest number; a vector that is not finite is not."""
    torch.manual_seed(0)
    cache, kept = Cache([window], 2, 16, (2, 16), torch.zeros(()), torch.int8), torch.zeros(2, 0, 2, 16)
    for T in (3, 1, 1, 5, 1):
        new = torch.randn(2, T, 2, 16) * 10 ** torch.randint(-3, 3, (2, T, 2, 1))
        kept = torch.cat((kept, new), 1)
        positions = cache.next_positions(T, None)
        places = cache.begin(positions, None)[window]
        keys, values = cache.append(0, new, 2 * new)
        if T == 1:  # rows swap places, and with them what they hold
            cache.reorder(torch.tensor([1, 0]))
            kept, keys, values = kept.flip(0), keys.flip(0), values.flip(0)
        true = kept[:, places[0]]
        step = true.abs().amax(-1, keepdim=True) / 127
        assert bool(((keys - true).abs() <= 0.501 * step).all()) and bool(
            ((values - 2 * true).abs() <= 1.002 * step).all()
        )
        assert keys.dtype == torch.float32 and not torch.equal(keys, true)
    new[0, 0, 0, 3] = torch.inf
    positions = cache.next_positions(1, None)
    cache.begin(positions, None)
    found = cache.append(0, new, new)[0][0, :, 0].isnan()
    assert found.any(1).sum() == 1 and found.any(1).equal(found.all(1))


def test_a_window_keeps_its_memory_while_the_sequence_grows() -> None:
    cache = Cache([4], 1, 1000, HEADS, LIKE)
    before = cache.bytes
    for _ in range(50):
        cache.begin(cache.next_positions(3, None), None)
        cache.append(0, torch.zeros(1, 3, *HEADS, dtype=LIKE.dtype), torch.zeros(1, 3, *HEADS, dtype=LIKE.dtype))
    assert cache.bytes == before == 2 * 6 * 5 * 8


# --- in a model --------------------------------------------------------------------------------------------------


def model(**fields: Any) -> Transformer:
    sizes = {"d_model": 8, "n_layers": 2, "n_heads": 2, "vocab_size": 11, "max_len": 12}
    return Transformer(ModelConfig(**{**sizes, **fields})).double().eval()


def test_cross_attention_keys_are_computed_once() -> None:
    """One encoder pass and one projection per layer, however many tokens are decoded."""
    pair = model(kind="encoder-decoder", tokens={"decoder_start": 0})
    calls: list[str] = []
    pair.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    for name, module in pair.named_modules():
        if isinstance(module, Attention) and module.is_cross:
            module.kv.register_forward_hook(lambda *_, name=name: calls.append(name))
    ids, targets = torch.randint(11, (2, 5)), torch.randint(11, (2, 6))
    with torch.no_grad():
        cache = pair.new_cache(2, 6)
        steps = [pair(ids, decoder_input_ids=targets[:, :3], cache=cache).logits]
        steps += [pair(decoder_input_ids=targets[:, t : t + 1], cache=cache).logits for t in (3, 4, 5)]
        assert sorted(calls) == [f"decoder.blocks.{layer}.cross_attention" for layer in (0, 1)] + ["encoder"]
        full = pair(ids, decoder_input_ids=targets).logits
    assert len(calls) == 6  # without a cache, all three again
    assert torch.allclose(torch.cat(steps, 1), full, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_last_only_gives_the_last_real_row(side: str, window: int | None) -> None:
    """The same numbers, and none for the other positions: the head sees one vector per row."""
    attention = {"pattern": "sliding", "window": window} if window else "causal"
    decoder, ids, real = model(attention=attention), torch.randint(11, (3, 7)), None
    last = [6, 6, 6]
    if side != "none":
        real = torch.arange(7) < torch.tensor([[7], [3], [1]])
        real, last = (real, [6, 2, 0]) if side == "right" else (real.flip(1), last)
    shapes: list[tuple[int, ...]] = []
    decoder.head.register_forward_hook(lambda module, arguments, output: shapes.append(tuple(arguments[0].shape)))
    found = []
    for last_only in (True, False):
        cache = decoder.new_cache(3, 12)
        cache.last_only = last_only
        with torch.no_grad():
            prefill = decoder(ids, attention_mask=real, cache=cache).logits
            step = decoder(torch.full((3, 1), 4), cache=cache).logits
        found.append((prefill if last_only else prefill[range(3), last][:, None], step))
    assert [shape[1] for shape in shapes] == [1, 1, 7, 1]
    for one, other in zip(*found, strict=True):
        assert one.shape == (3, 1, 11)
        assert torch.allclose(one, other, atol=1e-14)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_cache_longer_than_the_table_of_positions_is_refused(positions: str) -> None:
    """Without a cache the model says so in one sentence (InputError)."""
    decoder = model(max_len=4, positions=positions)
    with pytest.raises(HeadwayError):
        cache = decoder.new_cache(1, 8)
        decoder(torch.zeros(1, 3, dtype=torch.long), cache=cache)
        decoder(torch.zeros(1, 3, dtype=torch.long), cache=cache)


def test_an_encoder_has_no_cache() -> None:
    with pytest.raises(ConfigError, match="encoder keeps no cache"):
        model(kind="encoder").new_cache(1, 4)
