"""Functions that ranks import: a notebook's or a test's own `__main__` is out of their reach."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist


def sum_of_ranks(offset):
    total = torch.tensor([float(dist.get_rank() + offset)], dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def rank_and_size():
    return dist.get_rank(), dist.get_world_size(), int(os.environ["OMP_NUM_THREADS"])


def raise_on(rank, message="boom"):
    if dist.get_rank() == rank:
        raise ValueError(message)
    return sum_of_ranks(0)  # waits for a rank that never comes


def raise_everywhere():
    raise KeyError("both")


def leave(code):
    if dist.get_rank() == 1:
        os._exit(code)
    time.sleep(60)


def returns_a_lambda():
    return lambda: 1


def sleep_and_tell(folder, seconds):
    Path(folder, f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
    time.sleep(seconds)


def sharded_norm():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    layer(torch.ones(2, 4)).sum().backward()
    return layer.weight.grad.full_tensor().norm().item()
