"""What a family file may say: config keys, weight names, and the few operations between a published layout and ours.

Everything here is data with an inverse: the table that loads a checkpoint is read backwards to save one. A family file
holds no class and no branch; what it cannot say belongs into `config.py` as a field of the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from headway.config import ModelConfig

Shape = tuple[int, ...]
Fetch = Callable[[str], Tensor]


# --- config keys -------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """One key of a config.json and our dotted field. `default` holds where the key is missing, None for no value.

    `names` translates values that are names; several of theirs may mean one of ours, the first is written.
    `also` are further fields that get the same value. `least` is the smallest count that the architecture can have.
    """

    ours: str
    default: object = None
    names: Mapping[str, str] | None = None
    also: tuple[str, ...] = ()
    least: int = 0


class Special(NamedTuple):
    """Facts that take more than one key: `read(their config)` gives our dotted fields, `write(config)` their keys."""

    read: Callable[[Mapping[str, Any]], dict[str, object]]
    write: Callable[[ModelConfig], dict[str, object]]


# --- weight names ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """An invertible step between tensors of a file and one of ours.

    `shapes(ours, config)` are the shapes of the inner tensors, `join` makes ours of them, `split` is its inverse.
    `stacks`: join puts the inner tensors above each other and does nothing else.
    """

    inner: tuple[Node, ...]
    shapes: Callable[[Shape, ModelConfig], list[Shape]]
    join: Callable[[list[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], list[Tensor]]
    stacks: bool = False


class NoBias(str):
    """The name of a projection that has no bias where ours has one: read as zeros, not written.

    Exact for keys: what a key's bias adds to the scores of one query is the same for every key, and softmax ignores it.
    """


class Spare(str):
    """A second name of the tensor beside it in `shared`: a file may hold it too, with the same values; not written."""


class Copy(Spare):
    """The same, and written: their class has a tensor of its own there."""


Node: TypeAlias = "str | Op | Choice"
"""The name of a module (weight and bias follow it) or of a parameter, `{i}` for the layer and `{e}` for the expert; or
an operation on such."""


def transpose(name: Node) -> Op:
    """A matrix stored (in, out), as GPT-2's Conv1D does; a bias is left alone."""
    return Op((name,), lambda s, _: [s[::-1]], lambda t, _: t[0].t(), lambda t, _: [t.t()])


def lead(name: Node) -> Op:
    """The same numbers with one leading dimension of one: (1, ...)."""
    return Op((name,), lambda s, _: [(1, *s)], lambda t, _: t[0][0], lambda t, _: [t[None]])


def conv(name: Node) -> Op:
    """A convolution over patches, (D, C, size, size), whose bias is left alone."""

    def shape(flat: Shape, config: ModelConfig) -> Shape:
        patch = config.embeddings.patch
        assert patch is not None
        return (flat[0], patch.channels, patch.size, patch.size) if len(flat) > 1 else flat

    return Op(
        (name,),
        lambda s, c: [shape(s, c)],
        lambda t, _: t[0].flatten(1) if t[0].ndim > 1 else t[0],
        lambda t, c: [t.reshape(shape(tuple(t.shape), c))],
    )


def rows(*names: Node, sizes: Callable[[int, ModelConfig], list[int]]) -> Op:
    """Several matrices above each other; `sizes(all rows, config)` are the rows of each."""
    return Op(
        names,
        lambda s, c: [(size, *s[1:]) for size in sizes(s[0], c)],
        lambda t, _: torch.cat(t),
        lambda t, c: list(torch.split(t, sizes(len(t), c))),
        stacks=True,
    )


def qkv(query: Node, key: Node, value: Node) -> Op:
    """Three projections as the one of ours, in this order."""
    return rows(query, key, value, sizes=lambda _, c: [n * c.d_head for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)])


def halves(first: Node, second: Node) -> Op:
    """Two matrices of one size: keys and values, or gate and product."""
    return rows(first, second, sizes=lambda total, _: [total // 2] * 2)


def grouped(name: Node) -> Op:
    """A fused projection ordered by group, (K, N / K queries + key + value, H): GPT-NeoX, BLOOM, Falcon."""

    def join(parts: list[Tensor], c: ModelConfig) -> Tensor:
        K, H, rest = c.n_kv_heads, c.d_head, parts[0].shape[1:]
        heads = parts[0].reshape(K, -1, H, *rest)
        return torch.cat([part.reshape(-1, *rest) for part in torch.split(heads, [c.n_heads // K, 1, 1], 1)])

    def split(whole: Tensor, c: ModelConfig) -> list[Tensor]:
        K, H, rest = c.n_kv_heads, c.d_head, whole.shape[1:]
        parts = torch.split(whole, [n * H for n in (c.n_heads, K, K)])
        return [torch.cat([part.reshape(K, -1, H, *rest) for part in parts], 1).reshape(whole.shape)]

    return Op((name,), lambda s, _: [s], join, split)


def shared(*names: Node) -> Op:
    """One of our tensors stored under several names, all with its value."""
    return Op(names, lambda s, _: [s] * len(names), lambda t, _: t[0], lambda t, _: [t] * len(names))


class Choice(NamedTuple):
    """One of several nodes, by the value of a dotted field of the config."""

    field: str
    nodes: Mapping[object, Node]


def choice(field: str, nodes: Mapping[object, Node]) -> Choice:
    """What stands elsewhere in checkpoints whose config differs in `field`."""
    return Choice(field, nodes)


def chosen(node: Node, config: ModelConfig) -> str | Op:
    """The node that this config has."""
    while isinstance(node, Choice):
        value: Any = config
        for name in node.field.split("."):
            value = getattr(value, name)
        node = node.nodes[value]
    return node


def layers(ours: str, theirs: str, parts: Mapping[str, Node]) -> dict[str, Node]:
    """The parts of one layer, with the layer's name in front on both sides."""
    return {f"{ours}.{name}": prefixed(f"{theirs}.", node) for name, node in parts.items()}


def prefixed(prefix: str, node: Node) -> Node:
    """`node` with `prefix` in front of every name."""
    if isinstance(node, Choice):
        return Choice(node.field, {value: prefixed(prefix, one) for value, one in node.nodes.items()})
    if isinstance(node, Op):
        return replace(node, inner=tuple(prefixed(prefix, one) for one in node.inner))
    return type(node)(prefix + node)


# --- the family --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What an architecture class adds to the body.

    `fields` are dotted fields of ours, `weights` names as the file has them, `prefix` what the body's names begin with,
    `needs` the fields of the body that the class takes for granted.
    """

    fields: Mapping[str, object]
    weights: Mapping[str, Node] = field(default_factory=dict)
    prefix: str = ""
    needs: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One published architecture.

    Attributes:
        model_type: as config.json says it. source: paper and model card.
        fixed: our dotted fields that hold for all its checkpoints.
        keys: {their key: Key}. special: facts that take several keys.
        weights: {our module or parameter: theirs}, without the prefix of the head.
        heads: {architecture class: Head}, the usual one first.
        only: {their key: the one value known here}; another one is refused by name.
        unread: patterns (fnmatch) of tensors that some files hold and no forward reads.
        gguf: its name in a GGUF file, None where llama.cpp does not know it; see `_gguf.py`.
        modules: {part of a tensor's name: what transformers 5 calls it as a module}, where files keep older names.
    """

    model_type: str
    source: str
    fixed: Mapping[str, object]
    keys: Mapping[str, Key]
    weights: Mapping[str, Node]
    heads: Mapping[str, Head]
    special: tuple[Special, ...] = ()
    only: Mapping[str, object] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    gguf: str | None = None
    modules: Mapping[str, str] = field(default_factory=dict)


def leaves(node: Node, shape: Shape, config: ModelConfig, *, is_bias: bool = False) -> Iterator[tuple[str, Shape]]:
    """The (name, shape) that the file must have below a node of ours of this shape."""
    node = chosen(node, config)
    if isinstance(node, Op):
        for one, part in zip(node.inner, node.shapes(shape, config), strict=True):
            yield from leaves(one, part, config, is_bias=is_bias)
    elif not (is_bias and isinstance(node, NoBias)) and not isinstance(node, Spare):
        yield node, shape


def spares(node: Node, config: ModelConfig) -> Iterator[str]:
    """The second names below a node."""
    node = chosen(node, config)
    if isinstance(node, Op):
        for one in node.inner:
            yield from spares(one, config)
    elif isinstance(node, Spare):
        yield node


def gather(node: Node, shape: Shape, config: ModelConfig, fetch: Fetch, *, is_bias: bool = False) -> Tensor:
    """Our tensor of this shape from those of the file."""
    node = chosen(node, config)
    if isinstance(node, Op):
        parts = [
            gather(one, part, config, fetch, is_bias=is_bias)
            for one, part in zip(node.inner, node.shapes(shape, config), strict=True)
            if not isinstance(one, Spare)
        ]
        return node.join(parts, config)
    if is_bias and isinstance(node, NoBias):
        return torch.zeros(shape, dtype=torch.bool)  # takes the dtype of what it is joined to
    return fetch(node)


def scatter(node: Node, tensor: Tensor, config: ModelConfig, *, is_bias: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file, by name, from ours."""
    node = chosen(node, config)
    if isinstance(node, Op):
        for one, part in zip(node.inner, node.split(tensor, config), strict=True):
            yield from scatter(one, part, config, is_bias=is_bias)
    elif not (is_bias and isinstance(node, NoBias)) and (isinstance(node, Copy) or not isinstance(node, Spare)):
        yield node, tensor
