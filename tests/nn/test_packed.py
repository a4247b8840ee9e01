"""Layers in blocks: what they answer is what the unpacked matrix answers, and no second copy of it stays in memory."""

from __future__ import annotations

import copy
import gc
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.config import ModelConfig
from headway.errors import BugError
from headway.kernels import steps
from headway.kernels.codes import CODED, CodedMatrix, Codes
from headway.kernels.ggml import BLOCKS, quantize
from headway.kernels.native import twins_only
from headway.nn import Transformer
from headway.nn.packed import Packed, PackedEmbedding, PackedLinear, exact, pack_leaf

ROWS, COLUMNS = 12, 512  # two of the longest blocks a row
KINDS = pytest.mark.parametrize("kind", CODED)


def unpacked(kind: str, raw: Tensor) -> Tensor:
    """By the `gguf` package."""
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(BLOCKS[kind].id))
    return torch.from_numpy(values.copy()).view(len(raw), -1)


def blocks(kind: str, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Random bytes that make moderate weights: (rows, bytes of a row)."""
    block = BLOCKS[kind]
    count = rows * columns // block.size
    found = torch.randint(0, 256, (20 * count, block.bytes), dtype=torch.uint8)
    # Bytes of any scale, NaN and infinity among them, leave these to be drawn.
    largest = unpacked(kind, found).abs().amax(1)
    found = found[(largest > 1e-3) & (largest < 30)]
    assert len(found) >= count
    return found[:count].reshape(rows, -1)


def matrix(*kinds: str) -> tuple[Packed, Tensor]:
    """A matrix whose groups of rows have these formats, and its weights."""
    parts = tuple((kind, blocks(kind, ROWS - number)) for number, kind in enumerate(kinds))
    weights = torch.cat([unpacked(kind, raw) for kind, raw in parts])
    return Packed.of_blocks(parts), weights


def held(module: nn.Module) -> int:
    """Bytes of all that a module keeps, whatever it is registered as."""
    tensors = {t.data_ptr(): t for m in module.modules() for t in gc.get_referents(m.__dict__, *m.__dict__.values())
               if isinstance(t, Tensor)}  # fmt: skip
    return sum(tensor.nbytes for tensor in tensors.values())


MIXED = [("Q4_K", "Q6_K", "Q4_K"), ("Q8_0", "Q4_0"), ("Q5_1", "Q5_0", "Q4_1"), ("Q5_K", "Q6_K", "Q8_0", "Q4_1")]
GROUPS = pytest.mark.parametrize("kinds", [*((kind,) for kind in CODED), *MIXED], ids="+".join)


@GROUPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_that_of_the_unpacked_matrix(kinds: tuple[str, ...], dtype: torch.dtype) -> None:
    """To the last bit, with a bias and without, in the input's precision."""
    packed, weights = matrix(*kinds)
    assert torch.equal(packed.unpack(), weights)
    x, bias = torch.randn(2, 3, COLUMNS, dtype=dtype), torch.randn(len(weights))
    for given in (None, bias):
        layer = PackedLinear(packed, None if given is None else nn.Parameter(given))
        expected = F.linear(x, weights.to(dtype), None if given is None else given.to(dtype))
        with exact():
            found = layer(x)
        assert found.dtype is dtype and torch.equal(found, expected)
        # In codes an input is off by half of 1/127 of its chunk's largest number, at random.
        near = layer(x)
        assert near.dtype is dtype and (near - found).norm() < 0.01 * found.norm()
    assert repr(layer) == f"PackedLinear({len(weights)}x{COLUMNS}, {'+'.join(kinds)})"


@KINDS
def test_embedding_unpacks_the_rows_asked_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, weights = matrix(kind)
    table = PackedEmbedding(packed)
    for ids in (torch.randint(ROWS, (2, 5)), torch.tensor(3), torch.tensor([0, 0, ROWS - 1]), torch.empty(0).long()):
        assert torch.equal(table(ids), F.embedding(ids, weights))
    with pytest.raises(IndexError):
        table(torch.tensor([ROWS]))
    asked: list[int] = []
    whole = Codes.weights
    monkeypatch.setattr(Codes, "weights", lambda self, group: asked.append(self.codes.numel()) or whole(self, group))
    table(torch.tensor([[4, 7]]))
    assert asked == ([] if steps.levels() else [2 * COLUMNS])  # a kernel writes the rows themselves
    asked.clear()
    with twins_only():
        table(torch.tensor([[4, 7]]))
    assert asked == [2 * COLUMNS]


@GROUPS
def test_gradients_reach_x_and_the_bias(kinds: tuple[str, ...]) -> None:
    packed, weights = matrix(*kinds)
    bias = nn.Parameter(torch.randn(len(weights)))
    x, again = (torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    layer = PackedLinear(packed, bias)
    layer(x).square().sum().backward()
    F.linear(again, weights, bias.detach()).square().sum().backward()
    assert torch.equal(x.grad, again.grad) and bias.grad is not None
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("kinds", [("Q4_0",), ("Q4_K", "Q6_K")], ids="+".join)
def test_no_second_copy_is_kept(kinds: tuple[str, ...]) -> None:
    """After forward and backward a layer holds the file's bytes and its bias, and tied leaves hold them once."""
    packed, weights = matrix(*kinds)
    layer = PackedLinear(packed, nn.Parameter(torch.zeros(len(weights))))
    size = sum(part.bytes for _, part in packed.parts)
    x = torch.randn(1, COLUMNS, requires_grad=True)
    y = layer(x)
    assert held(layer) == size + 4 * len(weights)
    y.sum().backward()
    layer.bias.grad = None
    assert held(layer) == size + 4 * len(weights) < weights.nbytes
    layer.remembered = {"weight": weights}  # the control: wherever a copy were kept, it would be counted
    assert held(layer) == size + 4 * len(weights) + weights.nbytes
    del layer.remembered
    if len(kinds) == 1:
        both = nn.ModuleList([layer, PackedEmbedding(packed)])
        both[1](torch.tensor([1, 2]))
        assert held(both) == size + 4 * len(weights)


def test_a_large_matrix_is_never_whole_in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a product for gradients: pieces that cut through its parts, whose sums differ by their order alone."""
    packed, weights = matrix("Q8_0", "Q5_K")
    bias = nn.Parameter(torch.randn(len(weights)))
    layer, found = PackedLinear(packed, bias), []
    for most in (weights.numel(), 5 * COLUMNS):
        monkeypatch.setattr("headway.nn.packed.UNPACKED", most)
        x = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(1)).requires_grad_()
        bias.grad = None
        out = layer(x)
        out.square().sum().backward()
        found.append((out.detach(), x.grad, bias.grad))
        sizes = [len(weight) for _, weight in packed.pieces()]
        assert sum(sizes) == len(weights) and (max(sizes) == 5 if most < weights.numel() else len(sizes) == 1)
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_moves_leave_the_blocks_alone() -> None:
    """Casting a model casts its norms and biases; the bytes are no numbers."""
    packed, weights = matrix("Q8_0", "Q5_K")
    layer = PackedLinear(packed, nn.Parameter(torch.randn(len(weights))))
    pointers = [part.codes.data_ptr() for _, part in packed.parts]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(dtype)
        assert layer.bias.dtype is dtype and [part.codes.data_ptr() for _, part in layer.packed.parts] == pointers
        assert torch.equal(layer.packed.unpack(), weights)
        x = torch.randn(2, COLUMNS)
        with exact():
            assert torch.equal(layer(x), F.linear(x, weights, layer.bias.float()))  # x may come in another precision
    layer.to("meta")
    assert all(part.codes.is_meta and part.scales.is_meta for _, part in layer.packed.parts)


def nothing(part: CodedMatrix) -> CodedMatrix:
    return part._replace(codes=torch.zeros_like(part.codes), scales=torch.zeros_like(part.scales))


def test_state_dict() -> None:
    packed, weights = matrix("Q4_0", "Q8_0")
    layer = PackedLinear(packed, nn.Parameter(torch.randn(len(weights))))
    state = layer.state_dict()
    assert list(state) == ["bias", "codes0", "scales0", "codes1", "scales1"]
    empty = Packed(tuple((kind, nothing(part)) for kind, part in packed.parts), packed.shape)
    other = PackedLinear(empty, nn.Parameter(torch.zeros(len(weights))))
    other.load_state_dict(state)
    x = torch.randn(3, COLUMNS)
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    third = PackedLinear(empty, nn.Parameter(torch.zeros(len(weights))))
    assert not torch.equal(third(x), layer(x))
    third.load_state_dict(state, assign=True)
    assert torch.equal(third(x), layer(x))


# --- in a model --------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 40, "max_len": 16}
SIZES |= {"feed_forward": {"activation": "silu", "gated": True, "bias": True}, "attention": {"bias": True}}
SIZES |= {"norm": "rmsnorm", "positions": "rope"}


def in_blocks(config: ModelConfig, kind: str = "Q8_0") -> tuple[dict[str, Tensor | Packed], dict[str, Tensor]]:
    """The weights of a random model with its matrices in blocks, and those weights unpacked."""
    weights: dict[str, Tensor | Packed] = dict(Transformer(config).state_dict())
    plain: dict[str, Tensor] = {}
    tied: dict[int, Packed] = {}
    for name, tensor in weights.items():
        assert isinstance(tensor, Tensor)
        plain[name] = tensor
        if tensor.ndim == 2:
            packed = Packed.of_blocks(((kind, quantize(kind, tensor)),))
            weights[name] = packed = tied.setdefault(tensor.data_ptr(), packed)
            plain[name] = packed.unpack()
        elif name.endswith("bias"):
            plain[name] = weights[name] = torch.randn_like(tensor)
    return weights, plain


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_packed_leaves(tied: bool) -> None:
    config = ModelConfig(**SIZES, embeddings={"tied": tied})
    weights, plain = in_blocks(config)
    packed, model = Transformer.of(config, weights), Transformer.of(config, plain)
    assert not packed.training and not any(parameter.requires_grad for parameter in packed.parameters())
    leaves = {name for name, one in packed.named_modules() if isinstance(one, PackedLinear | PackedEmbedding)}
    assert leaves == {name.removesuffix(".weight") for name, one in weights.items() if isinstance(one, Packed)}
    assert not any(isinstance(one, nn.Linear | nn.Embedding) for one in packed.modules())
    ids = torch.randint(40, (2, 9))
    with exact():
        assert torch.equal(packed(ids).logits, model(ids).logits)
    shares = packed.head.output.codes0.data_ptr() == packed.embeddings.tokens.codes0.data_ptr()
    assert shares is tied
    # Blocks of 8.5 bits in place of 32; norms and biases are beside them.
    assert held(packed) < 0.35 * held(model)


def test_a_packed_model_can_be_cast() -> None:
    """Norms and biases go to 16 bits, the answer stays that of the model: 2 % of the largest logit by rounding."""
    config = ModelConfig(**SIZES)
    weights, plain = in_blocks(config)
    model = Transformer.of(config, weights).to(torch.bfloat16)
    ids = torch.randint(40, (2, 9))
    found, expected = model(ids).logits.float(), Transformer.of(config, plain)(ids).logits
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_packed_model_decodes_through_its_cache() -> None:
    config = ModelConfig(**SIZES)
    model = Transformer.of(config, in_blocks(config)[0])
    ids = torch.randint(40, (1, 8))
    cache = model.new_cache(1, 8)
    parts = [model(ids[:, :5], cache=cache).logits] + [model(ids[:, t : t + 1], cache=cache).logits for t in (5, 6, 7)]
    assert (torch.cat(parts, 1) - model(ids).logits).abs().max() < 1e-5


def test_gradients_pass_through_a_packed_model() -> None:
    """As adapters on top of it need them."""
    config = ModelConfig(**SIZES)
    weights, plain = in_blocks(config)
    found = []
    for given in (weights, plain):
        model = Transformer.of(config, given)
        model.decoder.norm.weight.requires_grad_(True)
        model.decoder.blocks[0].feed_forward_residual.before.weight.requires_grad_(True)
        ids = torch.arange(9)[None]
        with exact():
            model(ids, labels=ids).loss.backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert len(found[0]) == 2
    for one, other in zip(*found, strict=True):
        assert one is not None and torch.equal(one, other)


def test_missing_weights_are_our_mistake() -> None:
    config = ModelConfig(**SIZES)
    weights, plain = in_blocks(config)
    for given in (weights, plain):
        name = "decoder.blocks.1.feed_forward.up.bias"
        with pytest.raises(BugError, match=r"1 missing \(decoder.blocks.1.feed_forward.up.bias"):
            Transformer.of(config, {key: value for key, value in given.items() if key != name})
    with pytest.raises(RuntimeError, match="size mismatch"):
        Transformer.of(config, plain | {"decoder.norm.weight": torch.ones(3)})


def test_weights_are_neither_copied_nor_cast() -> None:
    config = ModelConfig(**SIZES)
    plain = {name: tensor.to(torch.float16) for name, tensor in Transformer(config).state_dict().items()}
    state = torch.get_rng_state()
    model = Transformer.of(config, plain)
    assert torch.equal(state, torch.get_rng_state()), "nothing is drawn"
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == plain[name].data_ptr() and tensor.dtype is torch.float16


def test_pack_leaf_keeps_the_bias_of_a_linear_layer() -> None:
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Embedding(ROWS, COLUMNS))
    bias = model[0].bias
    packed, weights = matrix("Q4_1")
    pack_leaf(model, "0.weight", packed)
    pack_leaf(model, "1.weight", packed)
    assert isinstance(model[0], PackedLinear) and model[0].bias is bias and isinstance(model[1], PackedEmbedding)
    x = torch.randn(2, COLUMNS)
    with exact():
        assert torch.equal(model[0](x), F.linear(x, weights, bias))
