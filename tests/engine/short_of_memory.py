"""`dpo_kit.engine.worker` on a machine where training micro-batches of more than $MOST_TOKENS tokens do not fit.

The last rank runs out of memory first, in its second one; what runs without gradients fits.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from dpo_kit.engine import worker
from dpo_kit.model import pair_model

forward = pair_model.PairModel.forward
wide = []


def short_of_memory(self, batch):
    tokens = batch.input_ids.shape[1]
    if torch.is_grad_enabled() and tokens > int(os.environ["MOST_TOKENS"]):
        wide.append(tokens)
        if len(wide) == 2 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to run {tokens} tokens.")
    return forward(self, batch)


if __name__ == "__main__":
    pair_model.PairModel.forward = short_of_memory
    code = worker.main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
