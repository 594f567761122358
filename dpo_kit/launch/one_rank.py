"""One rank of `launch.spawn`: `python -m dpo_kit.launch.one_rank FOLDER`, started by `on_ranks`.

Reads `task.pkl`, joins the process group, calls the function and leaves `result-N.pkl`, which holds either
`result` or `error`, `traceback` and `at`.

Deliberately not here: deciding what to run and what to do about an error (`on_ranks`).
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import time
import traceback
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any

from dpo_kit.records.status import one_line
from dpo_kit.system.files import atomic_write
from dpo_kit.system.processes import die_with_parent, leave


def find(module: str, name: str) -> Any:
    """The function of that name, imported."""
    return reduce(getattr, name.split("."), importlib.import_module(module))


def join(store: Path, backend: str, timeout_s: float) -> None:
    """Initialises `torch.distributed` over a file; rank and size come from the environment."""
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=store.as_uri(),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )


def main(folder: Path) -> int:
    """Runs the task of this rank; 0 when it returned."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    code = 1
    try:
        task = pickle.loads((folder / "task.pkl").read_bytes())
        join(folder / "store", task["backend"], task["timeout_s"])
        result = find(task["module"], task["name"])(*task["args"])
        content = pickle.dumps({"result": result})
        dist.barrier()  # no rank leaves while another still talks to it
        code = 0
    except BaseException as error:
        content = pickle.dumps(
            {"error": one_line(error), "traceback": traceback.format_exc(), "at": time.time()}
        )
        traceback.print_exc()
    atomic_write(folder / f"result-{rank}.pkl", content, durable=False)
    # The process group is not destroyed: after an error that would wait for the other ranks.
    leave(code)


if __name__ == "__main__":
    die_with_parent()
    main(Path(sys.argv[1]))
