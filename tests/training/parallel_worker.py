"""The processes of test_parallel.py: the gradients of every case in every layout, written by the first of them.

python parallel_worker.py FOLDER SIZE LAYOUT...      LAYOUT is ddp, fsdp or the number of tensor ranks

One process imports torch and forks the ranks, since importing takes longer than the gradients of a few small cases.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from headway.config import ModelConfig
from headway.nn import Transformer
from headway.training.gradients import backward
from headway.training.objectives import TrainingBatch
from headway.training.parallel import Parallel
from headway.training.parts import local, whole
from headway.training.world import World


def work(folder: Path, rank: int, size: int, layouts: list[str]) -> None:
    """What one rank does."""
    torch.set_default_dtype(torch.float64)
    store = torch.distributed.FileStore(str(folder / f"store{size}"), size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    worlds = {tensor: World(rank, size, tensor) for tensor in {int(x) if x.isdecimal() else 1 for x in layouts}}
    for case in sorted(folder.glob("*.json")):
        config = ModelConfig(**json.loads(case.read_text()))
        inputs = load_file(case.with_suffix(".batch"))
        for layout in layouts:
            world = worlds[int(layout) if layout.isdecimal() else 1]
            model = Transformer(config).double().train()
            model.load_state_dict(load_file(case.with_suffix(".weights")))
            parallel = Parallel(model, world, "ddp" if layout == "ddp" else "fsdp")
            torch.manual_seed(1)
            batch = TrainingBatch(inputs, range(len(inputs["labels"])))
            _, share = backward(parallel, batch.split(2 * world.data_size), nullcontext)
            assert share is not None
            loss, square = world.sums(share / world.tensor, parallel.square())
            found = {n: whole(local(p.grad), p).contiguous() for n, p in model.named_parameters() if p.grad is not None}
            if rank == 0:
                out = {**found, "loss": torch.tensor(loss), "norm": torch.tensor(square**0.5)}
                save_file(out, str(case.with_suffix(f".{size}-{layout}")))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> int:
    """0 if all ranks ended well; a failed one's traceback stands on stderr, and the others are ended with it."""
    folder, size, layouts = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)  # before the fork: a child has none of its parent's threads
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(folder, rank, size, layouts), daemon=True) for rank in range(size)]
    for one in ranks:
        one.start()
    while any(one.exitcode is None for one in ranks):
        for one in ranks:
            one.join(0.05)
            if one.exitcode:
                return 1  # what is daemonic ends with this process
    return 0


if __name__ == "__main__":
    sys.exit(main())
