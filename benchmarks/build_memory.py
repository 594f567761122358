"""Memory and speed of building a pair store from a large JSONL file.

    python benchmarks/build_memory.py --gib 1        writes a file of that size below runs/benchmarks, then removes it

Rows are those of the embedded sample with made-up words, so that none repeats another. The build runs in a process of
its own; peak is its resident memory (VmHWM, Linux).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import inputs

SAMPLE = inputs.ROOT / "dpo_kit" / "sample" / "train.jsonl.gz"
CHILD = """
import sys, warnings
from dpo_kit import config, dataset
warnings.simplefilter("ignore")
tree = {"actor": {"path": sys.argv[2]}, "ref": {"path": sys.argv[2]}, "train_dataset": {"path": sys.argv[1]},
        "cluster": {"fileroot": sys.argv[3], "n_gpus_per_node": 0}}
store = dataset.build(config.from_tree(tree))
print(len(store), store.report["rows_per_s"], int(store.chosen_offsets[-1] + store.rejected_offsets[-1]))
"""


def write(path: Path, size: int) -> int:
    """Rows of the sample, each with words of its own, until the file has `size` bytes; the number of rows."""
    opener = gzip.open if SAMPLE.exists() else open
    file = SAMPLE if SAMPLE.exists() else SAMPLE.with_suffix("")
    with opener(file, "rt", encoding="utf-8") as rows:
        base = [json.loads(line) for line in rows]
    rng, written, num_rows = random.Random(1), 0, 0
    with path.open("w", encoding="utf-8") as out:
        while written < size:
            row = base[num_rows % len(base)]
            words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(120)]
            question, _, answer = row["chosen"].rpartition("\n\nAssistant:")
            ask, yes, no = " ".join(words[:40]), " ".join(words[40:80]), " ".join(words[80:])
            row = {
                "chosen": f"{question} {ask}\n\nAssistant:{answer} {yes}",
                "rejected": f"{question} {ask}\n\nAssistant: {no} {num_rows}",
            }
            text = json.dumps(row) + "\n"
            out.write(text)
            written += len(text)
            num_rows += 1
    return num_rows


def main() -> None:
    """Writes the file, builds, reports."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--gib", type=float, default=1.0)
    options.add_argument("--model", default="tiny-random", help="whose tokenizer")
    options.add_argument("-o", "--output")
    o = options.parse_args()
    inputs.WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=inputs.WORK) as folder:
        path = Path(folder) / "pairs.jsonl"
        num_rows = write(path, int(o.gib * 2**30))
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(path), o.model, str(Path(folder) / "runs")],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds = time.perf_counter() - start
    kept, rate, tokens = done.stdout.split()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    text = "\n\n".join(
        [
            common.head("Building a pair store from a large file"),
            common.table(
                ["file", "rows", "kept", "tokens", "rows/s", "seconds in all", "peak resident"],
                [[f"{o.gib:g} GiB", num_rows, kept, tokens, rate, f"{seconds:.0f}", f"{peak:.2f} GiB"]],
            ),
        ]
    )
    print(text)
    if o.output:
        Path(o.output).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
