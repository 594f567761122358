"""How evenly the pairs of a step are shared out over ranks: the largest against the mean work, by simulation.

Steps are those of a run (`schedule.rows_by_step`, epochs anew until there are enough), ranks are those of
`packing.plan_step`, work is the FLOPs by which it balances. A step cannot be better balanced than by its dearest pair:
`least` is max(1, work of that pair / mean of a rank), below which no assignment of whole pairs comes.

Not here: seconds of a real step, and what ranks wait for besides each other.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import head, table

from dpo_kit import config as config_module
from dpo_kit import dataset
from dpo_kit.engine import schedule
from dpo_kit.model import builtin, model_folder
from dpo_kit.model.packing import pair_costs, plan_step

RANKS = (2, 4, 8, 16, 32, 64)


def options() -> argparse.Namespace:
    """What may be asked for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data", default="../shared/data/hh-rlhf/harmless-base-test.jsonl.gz", help="preference rows"
    )
    p.add_argument("--model", default=model_folder.SMOLLM2, help="its sizes and its tokenizer")
    p.add_argument("--steps", type=int, default=200, help="steps of each setting")
    p.add_argument("--max-tokens", type=int, default=16384, help="of a micro-batch")
    p.add_argument("-o", "--output", help="write the report here too")
    return p.parse_args()


def config_of(o: argparse.Namespace, fileroot: str, batch_size: int) -> Any:
    """A run of so many pairs a step over all of the data."""
    tree = {
        "actor": {"path": o.model},
        "ref": {"path": o.model},
        "train_dataset": {"path": str(Path(o.data).resolve()), "batch_size": batch_size, "drop_last": True},
        "cluster": {"fileroot": fileroot, "n_gpus_per_node": 0},
        "total_train_epochs": 1000,
    }
    return config_module.from_tree(tree)


def over_mean(values: list[float]) -> float:
    """Largest of the ranks' values over their mean."""
    return max(values) / (sum(values) / len(values))


def simulate(
    config: Any, costs: np.ndarray, work: np.ndarray, num_ranks: int, o: argparse.Namespace
) -> dict[str, Any]:
    """Each step's largest over mean: of work, of tokens, of work in the order of the rows, the least; ms."""
    found: dict[str, Any] = {name: [] for name in ("work", "tokens", "in_order", "least", "ms")}
    for rows in itertools.islice(schedule.rows_by_step(config, len(costs)), o.steps):
        here, tokens = work[rows], costs[rows]
        start = time.perf_counter()
        plan = plan_step(tokens.tolist(), num_ranks, o.max_tokens, here.tolist())
        found["ms"].append(1e3 * (time.perf_counter() - start))
        mine = [[i for members in rank for i in members] for rank in plan]
        assert sorted(i for items in mine for i in items) == list(range(len(rows)))
        found["work"].append(over_mean([here[items].sum() for items in mine]))
        found["tokens"].append(over_mean([tokens[items].sum() for items in mine]))
        found["in_order"].append(over_mean(here.reshape(num_ranks, -1).sum(1).tolist()))
        found["least"].append(max(1.0, here.max() / (here.sum() / num_ranks)))
    return found


def row_of(name: str, values: list[float]) -> list[str]:
    """Median, 95th percentile and worst of the steps."""
    return [name, *(f"{value:.3f}" for value in (np.median(values), np.percentile(values, 95), max(values)))]


def main() -> int:
    """Prints the report."""
    o = options()
    rows = []
    with tempfile.TemporaryDirectory() as fileroot:
        store = dataset.build(config_of(o, fileroot, 8))
        shape, lengths = model_folder.read_shape(builtin.ensure(o.model)), store.all_lengths()
        costs, work = pair_costs(lengths, True), shape.work(lengths, True)
        for pairs, num_ranks in itertools.product((4, 8), RANKS):
            found = simulate(config_of(o, fileroot, pairs * num_ranks), costs, work, num_ranks, o)
            for name in ("work", "least", "tokens", "in_order"):
                told = row_of(name.replace("_", " "), found[name])
                rows.append(
                    [pairs, num_ranks, *told, f"{np.median(found['ms']):.2f}" if name == "work" else ""]
                )
    title = ["pairs a rank", "ranks", "largest / mean of", "median", "95 %", "worst", "ms a plan"]
    text = head(
        "Balance of the ranks",
        f"{len(costs):,} pairs ({Path(o.data).name}), {costs.mean():.0f} tokens run each in the mean, {costs.max()} at"
        f" most; the dearest pair costs {work.max() / work.mean():.1f} times the mean. {o.steps} steps a setting."
        " `work`: FLOPs under the plan that runs; `least`: no assignment of whole pairs is better;"
        " `tokens`: of the same plan; `in order`: work, were pairs dealt out in the order of the rows.",
        table(title, rows),
    )
    print(text)
    if o.output:
        Path(o.output).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
