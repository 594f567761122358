"""`dpo-kit score` against plain transformers with full logits, row by row, in fp32.

    python benchmarks/score_parity.py PAIRS.jsonl[.gz] [NUM_ROWS] [MODEL]

Prints the largest difference of a response's summed log-probs, in nats, against two ways of normalising the same
fp32 logits: torch's fp32 log_softmax, and log_softmax after an upcast to float64. On a CPU the former is itself off
by about 1e-5 nats a token (docs/log.md), so the latter is the one that measures the kit.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from dpo_kit import cli, dataset
from dpo_kit import config as config_module
from dpo_kit.model import builtin


def plain(lm, ids: list[int], start: int) -> list[float]:
    """Summed log-probs of ids[start:] from the model's full logits, normalised in fp32 and in float64."""
    row = torch.tensor(ids)[None]
    logits = lm(row).logits[0, max(start, 1) - 1 : -1]
    targets = row[0, max(start, 1) :, None]
    both = (torch.log_softmax(x, -1).gather(-1, targets) for x in (logits, logits.double()))
    return [float(logps.double().sum()) for logps in both]


def main(pairs: str, num_rows: int = 200, model: str = "smollm2-135m-instruct") -> None:
    """Runs both and prints the figures."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        params = Path(folder) / "params.yaml"
        tree = {
            "actor": {"path": model, "dtype": "float32"},
            "ref": {"path": model},
            "train_dataset": {"path": str(Path(pairs).resolve()), "num_rows": num_rows, "max_length": 2048},
            "cluster": {"fileroot": folder, "n_gpus_per_node": 0},
        }
        params.write_text(json.dumps(tree))
        start = time.perf_counter()
        assert cli.main(["score", "--config", str(params), "-o", f"{folder}/out.jsonl"]) == 0
        scored_s = time.perf_counter() - start
        lines = [json.loads(line) for line in Path(folder, "out.jsonl").read_text().splitlines()]
        store = dataset.build(config_module.load(params))
        lm = AutoModelForCausalLM.from_pretrained(builtin.ensure(model), dtype=torch.float32).eval()
        worst, start = [0.0, 0.0], time.perf_counter()
        with torch.no_grad():
            for row, line in enumerate(lines):
                pair = store.pair(row)
                for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
                    for i, value in enumerate(plain(lm, ids.tolist(), pair.prompt)):
                        differences = [
                            abs(value - line[f"{side}_{name}_logps"]) for side in ("policy", "ref")
                        ]
                        worst[i] = max(worst[i], *differences)
    print(
        f"{len(lines)} pairs; largest |difference of summed log-probs| against fp32 log_softmax {worst[0]:.3g}, ",
        end="",
    )
    print(f"against float64 log_softmax of the same fp32 logits {worst[1]:.3g} nats")
    print(
        f"score {scored_s:.0f} s (policy and reference), plain {time.perf_counter() - start:.0f} s (one model)"
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]), *sys.argv[3:4])
