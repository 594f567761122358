"""Peak memory of the log-prob head, forward and backward, against plain full logits on the same batch.

    python benchmarks/head_memory.py [TOKENS] [HIDDEN] [VOCAB]

Each side runs in a process of its own; the figure is the peak resident memory above what the inputs need.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch

from dpo_kit.model.logprobs import token_logps


def measure(side: str, num_tokens: int, hidden_size: int, vocab_size: int) -> None:
    """Runs one side once and prints MiB above the inputs and the gradients they must have anyway."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size).mul_(0.02).requires_grad_()
    targets = torch.randint(vocab_size, (num_tokens,))
    (hidden[:2] @ weight[:3].T).sum().backward()  # gradients allocated, libraries loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if side == "kit":
        logps = token_logps(hidden, weight, targets)
    else:
        logits = (hidden @ weight.T).float()
        logps = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
    logps.sum().backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{(peak - before) / 1024:.0f} {logps.detach().double().sum():.4f}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("kit", "plain"):
        measure(sys.argv[1], *map(int, sys.argv[2:5]))
    else:
        shape = [*sys.argv[1:], *["2048", "512", "150000"][len(sys.argv) - 1 :]]
        found = {}
        for side in ("plain", "kit"):
            out = subprocess.run(
                [sys.executable, __file__, side, *shape], capture_output=True, text=True, check=True
            )
            found[side], checksum = out.stdout.split()
            print(f"{side:6} {found[side]:>6} MiB   sum of log-probs {checksum}")
        print(f"kit / plain = {float(found['kit']) / float(found['plain']):.3f}")
