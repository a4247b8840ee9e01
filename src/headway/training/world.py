"""The processes that train one model together: who they are, what they share out, what they agree on.

    ranks 0 1 2 3 with tensor = 2        (0 1) and (2 3) each work on the same rows, split inside the layers;
                                         0 and 2, 1 and 3 hold the same part of the model, on different rows

`headway train --nproc N` or `torchrun` starts them; everything that passes between them is torch.distributed's. One
process is a world of its own, in which all of this does nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from headway.data.batches import hash_of
from headway.errors import ConfigError, WorkerError
from headway.strict import dump_json, strict_json
from headway.training.objectives import count_supervised

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STORE = "HEADWAY_STORE"
"""Names the file through which the processes of one machine find each other; without it: torchrun's address."""
LAUNCHER = "HEADWAY_LAUNCHER"
"""The process number of what started a worker, which stops when that is gone."""
_BROKEN = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "wait timeout")
Shared = TypeVar("Shared")
Share = tuple[Mapping[str, Tensor], float]


@dataclass(frozen=True)
class World:
    """This process among `size`, number `rank`; `tensor` of them share the work on the same rows."""

    rank: int = 0
    size: int = 1
    tensor: int = 1
    device: str = "cpu"

    @property
    def data_rank(self) -> int:
        """Which share of the rows is this process's."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        """How many shares the rows of a batch have."""
        return self.size // self.tensor

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @cached_property
    def mesh(self) -> DeviceMesh:
        """(data, tensor) ranks as torch's parallel modules want them."""
        from torch.distributed.device_mesh import init_device_mesh

        shape = (self.data_size, self.tensor)
        return init_device_mesh(torch.device(self.device).type, shape, mesh_dim_names=("data", "tensor"))

    # --- what is shared out --------------------------------------------------------------------------------------

    def share(self, pieces: Sequence[Mapping[str, Tensor]]) -> tuple[int, list[Share]]:
        """(supervised labels of a batch, this process's passes over it, each with its share of those labels).

        `pieces` are the whole batch, cut into as many parts as all processes make passes; they are dealt out in turn.
        Every process makes the same number of passes, since they meet in each. One that has nothing to learn from is
        made on another piece's rows with weight zero; a single process leaves it out. No labels at all: no passes.
        """
        counts = [count_supervised(piece) for piece in pieces]
        total, passes = sum(counts), list[Share]()
        filler = pieces[max(range(len(pieces)), key=lambda number: counts[number])]
        for number in range(self.data_rank, -(-len(pieces) // self.data_size) * self.data_size, self.data_size):
            count = counts[number] if number < len(pieces) else 0
            if count:
                passes.append((pieces[number], count / total))
            elif total and self.size > 1:
                passes.append((filler, 0.0))
        return total, passes

    def gathered(self, rows: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """The rows of every piece in order, each process giving those of its own pieces (and of fillers, left out).

        rows: (n, D) for each pass of this process. sizes: rows of every piece. -> (sum of sizes, D).
        """
        if self.size == 1:
            return torch.cat(list(rows))
        longest = max(sizes)
        own = torch.stack([torch.nn.functional.pad(r[:longest], (0, 0, 0, longest - len(r[:longest]))) for r in rows])
        held = _of_all(own, self.data_size, self.mesh["data"].get_group())
        return torch.cat([held[n % self.data_size][n // self.data_size, :size] for n, size in enumerate(sizes)])

    def seed(self, seed: int, step: int) -> None:
        """Draw from a stream that step and share of the rows name, so that no two shares drop the same activations.

        One process goes on with its own stream, whose state its checkpoints hold.
        """
        if self.size > 1:
            torch.manual_seed(hash_of(seed, step, self.data_rank) >> 1)

    # --- what is agreed on ---------------------------------------------------------------------------------------

    def sums(self, *values: Tensor | float) -> list[float]:
        """The sum of each number over all processes, in float64, the same bits in each: the step's one wait."""
        device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
        own = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
        if self.size > 1:
            own = torch.stack(_of_all(own, self.size)).sum(0)
        found: list[float] = own.tolist()
        return found

    def any(self, number: int) -> int:
        """The largest number that a process has, such as that of a signal it caught."""
        if self.size == 1:
            return number
        value = torch.tensor([number], device=self.device)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return int(value.item())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()

    def in_turn(self, make: Callable[[], Shared]) -> Shared:
        """`make` in the first process, then in the others, which find what it left on the disk."""
        if self.size == 1:
            return make()
        if not self.is_first:
            self.wait()
        made = make()
        if self.is_first:
            self.wait()
        return made

    def told(self, make: Callable[[], str]) -> str:
        """A text that the first process makes and all get."""
        if self.size == 1:
            return make()
        return self.texts(make() if self.is_first else "")[0]

    def texts(self, own: str) -> list[str]:
        """The texts of all processes, in the order of their numbers."""
        if self.size == 1:
            return [own]
        data = torch.frombuffer(bytearray(own.encode() + b"\n"), dtype=torch.uint8).to(self.device)
        sizes = [int(size) for size in _of_all(torch.tensor([len(data)], device=self.device), self.size)]
        rows = _of_all(torch.nn.functional.pad(data, (0, max(sizes) - len(data))), self.size)
        return [bytes(row[: size - 1].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]

    def check_same(self, facts: Callable[[], Mapping[str, object]]) -> None:
        """Refuse to begin where processes differ (D3). Raises ConfigError that names the rank and what differs."""
        if self.size == 1:
            return
        texts = self.texts(dump_json(facts()))
        all_ = [strict_json(text.encode(), f"rank {rank}") for rank, text in enumerate(texts)]
        first = all_[0]
        assert isinstance(first, dict)
        for rank, other in enumerate(all_):
            assert isinstance(other, dict)
            for key in sorted({*first, *other}):
                if first.get(key) != other.get(key):
                    found = f"{other.get(key)!r:.200} on rank {rank}, {first.get(key)!r:.200} on rank 0"
                    raise ConfigError(key, found, "the same on every rank", "start all ranks with one command line")

    def is_deserted(self) -> bool:
        """Whether what started this process is gone."""
        launcher = os.environ.get(LAUNCHER)
        return launcher is not None and os.getppid() != int(launcher)


def _of_all(own: Tensor, count: int, group: torch.distributed.ProcessGroup | None = None) -> list[Tensor]:
    """The tensors, of one shape, that `count` processes give."""
    held = [torch.empty_like(own) for _ in range(count)]
    torch.distributed.all_gather(held, own.contiguous(), group)
    return held


ALONE = World()


@contextlib.contextmanager
def joined(tensor: int, device: str, timeout: float) -> Iterator[World]:
    """The world that the environment names (RANK and WORLD_SIZE, as torchrun sets them), and its end.

    Args:
        tensor: ranks that share the work on the same rows. device: cpu or cuda. timeout: seconds that one process waits
            for the others before it gives up.

    Raises ConfigError where the sizes do not fit, WorkerError when another process is gone (D1, D2).
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size % tensor:
        found, fix = f"{size} processes in groups of {tensor}", f"--nproc {-(-size // tensor) * tensor}"
        raise ConfigError("train.tensor_parallel", found, "a divisor of the number of processes", fix)
    if size == 1:
        yield ALONE
        return
    place = os.environ.get(STORE)
    with _naming_lost(rank):
        torch.distributed.init_process_group(
            "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
            **({"store": FileStore(place, size)} if place else {"init_method": "env://"}),
        )
        try:
            yield World(rank, size, tensor, device)
        finally:
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _naming_lost(rank: int) -> Iterator[None]:
    """A broken connection becomes one sentence."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        is_lost = isinstance(error, torch.distributed.DistError) or any(sign in text.lower() for sign in _BROKEN)
        if not is_lost:
            raise
        fix = "look for what the others say; --resume goes on from the last checkpoint"
        raise WorkerError(f"rank {rank}", f"lost the others: {text[:200]}", "all ranks alive", fix) from error
