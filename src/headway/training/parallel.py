"""One model on several processes, by torch's own means: DDP, FSDP2, tensor parallelism, or two of them at once.

    ddp     every process holds the whole model; gradients are averaged as they appear     (arXiv:2006.15704)
    fsdp    each holds a share of every tensor and gathers a block's when it is needed     (arXiv:2304.11277)
    tensor  heads and hidden units are split, two sums a block bring them together         (arXiv:1909.08053)

The plan of the last is read off the stack, so every family has one: what an attention or a feed-forward network writes
with is split by columns, what it ends with by rows. A fused matrix (queries, keys and values; gate and product) has
its rows put in order first, so that a process's share holds whole heads of each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headway.errors import ConfigError
from headway.nn import Transformer
from headway.nn.attention import Attention
from headway.nn.block import Block
from headway.nn.feed_forward import FeedForward
from headway.nn.stack import Stack
from headway.training.parts import exported, fused_rows, is_shared_out, local, shares
from headway.training.world import ALONE, World

Strategy = Literal["ddp", "fsdp"]


# --- the model ---------------------------------------------------------------------------------------------------


class _Method(nn.Module):
    """A model whose methods are called through `forward`, where DDP listens."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, inputs: Mapping[str, Tensor]) -> Any:
        """`model.method(**inputs)`."""
        return getattr(self.model, method)(**inputs)


class Parallel:
    """A model as this process runs it: prepared in place, called through here.

    Args:
        model: on its device, the same in every process. world: who else there is. strategy: of the data ranks; with
            tensor ranks it is fsdp.

    Raises ConfigError where nothing of the model can be split among so many tensor ranks.
    """

    def __init__(self, model: Transformer, world: World = ALONE, strategy: Strategy = "ddp") -> None:
        self.model, self.world = model, world
        self.shared: list[nn.Parameter] = []
        self.is_sharded = world.size > 1 and (strategy == "fsdp" or world.tensor > 1)
        self._ddp: nn.Module | None = None
        if self.is_sharded:
            orders = _split(model, world) if world.tensor > 1 else {}
            _shard(model, world)
            named = dict(model.named_parameters())
            for name, order in orders.items():
                named[name].row_order = order  # type: ignore[attr-defined]  # a note on the tensor, see row_order
            self.shared = list(_shared(model))
        elif world.size > 1:
            # Parts of a published model may stand idle (a pooler): their gradients stay None, as in one process.
            self._ddp = nn.parallel.DistributedDataParallel(_Method(model), find_unused_parameters=True)

    def loss(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """`model.loss(**inputs)`."""
        found: Tensor = self._call("loss", inputs)
        return found

    def rewards(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """`model.rewards(**inputs)`."""
        found: Tensor = self._call("rewards", inputs)
        return found

    def vectors(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """`model(**inputs).logits`."""
        found: Tensor = self._call("forward", inputs).logits
        return found

    def _call(self, method: str, inputs: Mapping[str, Tensor]) -> Any:
        """A method of the model, through DDP where gradients will be exchanged."""
        if self._ddp is not None and torch.is_grad_enabled():
            return self._ddp(method, inputs)
        return self.model(**inputs) if method == "forward" else getattr(self.model, method)(**inputs)

    @contextlib.contextmanager
    def last(self, is_last: bool) -> Iterator[None]:
        """Around a pass; gradients are exchanged in the last pass of an update."""
        if self.is_sharded:
            self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]  # fully_shard adds it
        waits = self._ddp is not None and not is_last
        with self._ddp.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator,union-attr]
            yield

    def finish(self) -> None:
        """After the last pass: what each tensor rank found of a gradient that belongs to all of them."""
        for parameter in self.shared:
            if parameter.grad is not None:
                torch.distributed.all_reduce(local(parameter.grad), group=self.world.mesh["tensor"].get_group())

    def settle(self) -> None:
        """After forward passes without a backward one: what was gathered for them is let go, shares stand again."""
        if self.is_sharded:
            from torch.distributed.fsdp import FSDPModule

            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def square(self) -> Tensor:
        """This process's share of the squared norm of the gradients; the shares of all add up to it."""
        held = [(p, local(p.grad)) for p in self.model.parameters() if p.grad is not None]
        squares = torch.stack(torch._foreach_norm([grad for _, grad in held])).double().square()
        if self.world.size == 1:
            return squares.sum()
        holders = [self.world.size // shares(p) for p, _ in held]
        return (squares / torch.tensor(holders, device=squares.device)).sum()

    def state(self) -> dict[str, Tensor]:
        """The model's weights by name, as a checkpoint takes them; of shares a tied one stands there once."""
        if not self.is_sharded:
            return self.model.own_state()
        ties, parameters = self.model.ties, dict(self.model.named_parameters())
        held = {name: tensor for name, tensor in self.model.own_state().items() if name not in ties}
        return {n: exported(local(p), p) if (p := parameters.get(n)) is not None else t for n, t in held.items()}


def _shard(model: Transformer, world: World) -> None:
    """FSDP2: a unit per block, and one of all that is left."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = world.mesh["data"]
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("loss", "rewards"):
        register_fsdp_forward_method(model, method)


# --- tensor parallelism ------------------------------------------------------------------------------------------


def _shared(model: Transformer) -> Iterator[nn.Parameter]:
    """What each tensor rank uses on its own heads alone: norms of queries and keys, score biases of split attention."""
    for module in model.modules():
        if isinstance(module, Attention) and module.is_split:
            yield from (*module.q_norm.parameters(), *module.k_norm.parameters())
        if isinstance(module, Stack) and module.bias is not None:
            splits = any(isinstance(inner, Attention) and inner.is_split for inner in module.modules())
            yield from module.bias.parameters() if splits else ()


def _split(model: Transformer, world: World) -> dict[str, Tensor]:
    """Split the inside of every block among the tensor ranks; {name of a fused parameter: the order of its rows}."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    ranks, rows = world.tensor, fused_rows(model.config)
    orders: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if ".blocks." not in f".{name}" or not _divides(module, ranks):
            continue
        plan: dict[str, Any] = {}
        for child, layer in module.named_children():
            if not isinstance(layer, nn.Linear):
                continue
            plan[child] = RowwiseParallel() if child in ("output", "down") else ColwiseParallel()
            parts = rows.get(child, ())
            if len(parts) > 1:
                order = _interleaved(parts, ranks).to(layer.weight.device)
                for kind, tensor in layer.named_parameters():
                    tensor.data = tensor.data[order]
                    orders[f"{name}.{child}.{kind}"] = order
        parallelize_module(module, world.mesh["tensor"], plan)
        if isinstance(module, Attention):
            module.N, module.K, module.is_split = module.N // ranks, module.K // ranks, True
            module.first = world.rank % ranks * module.N
    if not any(map(is_shared_out, model.parameters())):
        c = model.config
        found = f"{ranks} ranks for {c.n_heads} heads, {c.n_kv_heads} key-value heads and d_ff {c.d_ff}"
        raise ConfigError("train.tensor_parallel", found, "a divisor of heads or of d_ff", "train.strategy=fsdp")
    return orders


def _divides(module: nn.Module, ranks: int) -> bool:
    """Whether a module can be split: whole heads of queries, keys and values, or equal shares of hidden units."""
    if isinstance(module, Attention):
        return module.N % ranks == 0 and module.K % ranks == 0 and module.norm_heads
    return isinstance(module, FeedForward) and module.down.in_features % ranks == 0


def _interleaved(parts: tuple[int, ...], ranks: int) -> Tensor:
    """The order of rows in which each rank's share holds its part of every part."""
    starts = [sum(parts[:number]) for number in range(len(parts))]
    shares = [
        torch.arange(start + rank * size // ranks, start + (rank + 1) * size // ranks)
        for rank in range(ranks)
        for start, size in zip(starts, parts, strict=True)
    ]
    return torch.cat(shares)
