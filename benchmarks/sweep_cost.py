"""What a sweep costs against single runs: the same trainings, once with shared caches and once without any.

    python benchmarks/sweep_cost.py                  4 betas: `dpo-kit sweep` against 4 x `dpo-kit train`

The real commands, every one in a process of its own. The sweep has one `cluster.fileroot`, which is empty at first;
each single run has an empty one of its own. The embedded sample, no samples of answers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import inputs

BETAS = (0.05, 0.1, 0.2, 0.5)
REFERENCE = "reference pass"


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Wall time of one command, and what its runs say of their phases and results."""
    with tempfile.TemporaryDirectory() as folder:
        fileroot = Path(folder) / "runs"
        params = Path(folder) / "params.yaml"
        params.write_text(json.dumps(_params(job, fileroot)))
        betas = ",".join(str(beta) for beta in job["betas"])
        command = [
            sys.executable,
            "-m",
            "dpo_kit.system.child",  # so that it ends with this process
            "dpo_kit",
            job["command"],
            "--config",
            str(params),
            f"actor.beta={betas}",
        ]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
        runs = []
        for status in sorted(fileroot.rglob("status.json")):
            phases = {p["name"]: p["seconds"] for p in json.loads(status.read_text())["phases"]}
            lines = [json.loads(line) for line in (status.parent / "metrics.jsonl").read_text().splitlines()]
            losses = [line["dpo/loss"] for line in lines if "dpo/loss" in line]
            runs.append({"phases": phases, "loss": losses[-1], "steps": len(losses)})
    assert len(runs) == len(job["betas"]), f"{len(runs)} runs of {len(job['betas'])}"
    return {"seconds": seconds, "runs": runs}


def _params(job: dict[str, Any], fileroot: Path) -> dict[str, Any]:
    tree = {
        "trial_name": "cost",
        "actor": {
            "path": job["model"],
            "dtype": job["dtype"],
            "gradient_checkpointing": False,
            "mb_spec": {"max_tokens_per_mb": job["max_tokens"]},
            "optimizer": {"lr": 3e-5},
        },
        "ref": {"path": job["model"]},
        "train_dataset": {"path": "sample", "batch_size": 8, "max_length": 512},
        "valid_dataset": {"path": "sample", "split": "test", "max_length": 512, "num_rows": job["valid"]},
        "evaluator": {"num_samples": 0},
        "stats_logger": {"tensorboard": False},
        "cluster": {"fileroot": str(fileroot)},
        "total_train_steps": job["steps"],
    }
    for override in job["set"]:
        key, _, value = override.partition("=")
        section = tree
        for part in key.split(".")[:-1]:
            section = section.setdefault(part, {})
        section[key.split(".")[-1]] = json.loads(value) if value[:1] in "0123456789tfn[{" else value
    return tree


def report(o: Any, call: Any) -> str:
    """Measures the sweep and the single runs, and writes the table."""
    job = {"model": o.model, "dtype": o.dtype, "steps": o.steps, "valid": o.valid, "max_tokens": o.max_tokens}
    job["set"] = o.set
    if o.model.startswith("random:"):
        job["model"] = inputs.model_folder(o.model)
    sweep = call({**job, "name": "sweep", "command": "sweep", "betas": BETAS})
    singles = [
        call({**job, "name": f"single run, beta {beta}", "command": "train", "betas": [beta]})
        for beta in BETAS
    ]
    sides = {"sweep": (sweep["seconds"], sweep["runs"])}
    sides["single runs"] = (sum(s["seconds"] for s in singles), [run for s in singles for run in s["runs"]])
    names = list(dict.fromkeys(name for _, runs in sides.values() for run in runs for name in run["phases"]))
    rows = [["wall time of the commands", *(f"{seconds:.1f}" for seconds, _ in sides.values())]]
    for name in [REFERENCE, *(n for n in names if n != REFERENCE)]:
        rows.append(
            [name, *(f"{sum(r['phases'].get(name, 0) for r in runs):.1f}" for _, runs in sides.values())]
        )
    for row in rows:
        row.append(f"{float(row[1]) / float(row[2]):.2f}" if float(row[2]) else "-")
    passes = [sum(REFERENCE in run["phases"] for run in runs) for _, runs in sides.values()]
    apart = max(
        abs(a["loss"] - b["loss"]) for a, b in zip(*(runs for _, runs in sides.values()), strict=True)
    )
    return "\n\n".join(
        [
            common.head(
                f"A sweep of {len(BETAS)} betas against {len(BETAS)} single runs",
                f"{Path(o.model).name}, {o.dtype}, embedded sample, {o.steps} steps of 8 pairs, {o.valid} held-out "
                "rows evaluated before and after training. Seconds, sums over the runs.",
            ),
            common.table(["phase", "sweep s", "single runs s", "sweep / single"], rows),
            f"Runs with a reference pass: {passes[0]} of the sweep, {passes[1]} of the single runs. Last losses of "
            f"equal betas differ by at most {apart:.1e}.",
        ]
    )


if __name__ == "__main__":
    options = common.parser(__doc__)
    options.add_argument("--steps", type=int, default=12, help="steps of each run")
    options.add_argument("--valid", type=int, default=60, help="held-out rows")
    sys.exit(common.main(options, measure, report))
