"""One of the processes of test_parallel.py: the gradients of every case in every layout, written by the first of them.

python parallel_worker.py FOLDER RANK SIZE LAYOUT...      LAYOUT is ddp, fsdp or the number of tensor ranks
"""

from __future__ import annotations

import json
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


def main() -> None:
    folder, rank, size, layouts = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
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


if __name__ == "__main__":
    main()
