"""The demo with adapters against all weights: accuracy, seconds a step, memory, disk, at two learning rates.

    python benchmarks/lora.py -o FILE                4 runs of `dpo-kit train` on the demo's model and pairs

The real command, one run after the other, with the embedded sample; held-out pairs are scored at the end. Memory is
VmHWM of the rank, polled while it runs, beside what `dpo-kit estimate` says of it; time is the median of `step_s`
without the first step; disk is one checkpoint and `model/`. All runs share the reference's values.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import estimate_check
import inputs

from dpo_kit.records import run_folder
from dpo_kit.system import machine
from dpo_kit.view import analysis

SIDES = {"all weights": "false", "adapters": "true"}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """What one run takes and comes to."""
    overrides = [
        *(f"actor.use_lora={SIDES[job['side']]}", f"actor.lora_rank={job['rank']}"),
        *(f"actor.optimizer.lr={job['lr']}", f"actor.path={job['model']}", f"actor.dtype={job['dtype']}"),
        *("valid_dataset.path=sample", "valid_dataset.split=test", "valid_dataset.max_length=512"),
        *(
            f"total_train_steps={job['steps']}",
            "evaluator.freq_steps=null",
            "evaluator.before_training=false",
        ),
        *("recover.keep=all", *job["set"]),
    ]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ".cache").symlink_to(job["cache"])
        estimated = estimate_check.estimated(overrides, folder)[2]
        gib, step_s = estimate_check.measured(overrides, folder)
        (run_dir,) = run_folder.list_runs(Path(folder))
        (step,) = analysis.evaluation_steps(run_dir)
        share = analysis.reward_accuracy(analysis.read_evaluation(run_dir, step))
        return {
            **{"gib": gib, "estimated_gib": estimated["memory"]["total"] / 2**30, "step_s": step_s},
            **{"trained": estimated["model"]["trained_params"], "params": estimated["model"]["params"]},
            **{"correct": share.correct, "n": share.n, "ties": share.ties},
            "loss": analysis.read_lines(run_dir / "metrics.jsonl")[-1]["dpo-eval/loss"],
            "checkpoint": machine.size_of(run_dir / "checkpoints"),
            "model": machine.size_of(run_dir / "model"),
        }


def report(o: Any, call: Any) -> str:
    """Runs both sides at both rates, in turns, and writes the table."""
    cache = inputs.WORK.resolve() / "lora-cache"
    cache.mkdir(parents=True, exist_ok=True)
    job = {"model": o.model, "dtype": o.dtype, "steps": o.steps, "rank": o.rank}
    rows = []
    for lr in o.rates:
        for side in SIDES:
            found = call(
                {**job, "set": o.set, "cache": str(cache), "side": side, "lr": lr, "name": f"lr {lr}"}
            )
            share = analysis.Share(found["correct"], found["n"], found["ties"])
            rows.append(
                [
                    *(
                        side,
                        lr,
                        f"{found['trained'] / 1e6:.1f}",
                        f"{share.percent} ({share.interval_percent})",
                    ),
                    *(f"{found['loss']:.4f}", f"{found['step_s']:.2f}"),
                    *(f"{found['gib']:.2f}", f"{found['estimated_gib']:.2f}"),
                    *(f"{found[name] / 2**20:,.0f}" for name in ("checkpoint", "model")),
                ]
            )
    header = [
        "trained",
        "lr",
        "M parameters",
        "held-out accuracy (95 %)",
        "held-out loss",
        "s a step",
        "peak GiB",
    ]
    return "\n\n".join(
        [
            common.head(
                "The demo with adapters against all weights",
                f"{Path(o.model).name}, {o.dtype}, embedded sample, {o.steps} steps of 8 pairs, {found['n']} held-out "
                f"pairs; adapters of rank {o.rank}, alpha 16, on all linear layers. {o.note}".strip(),
            ),
            common.table([*header, "estimated GiB", "checkpoint MiB", "model/ MiB"], rows),
        ]
    )


if __name__ == "__main__":
    options = common.parser(__doc__)
    options.add_argument("--steps", type=int, default=40, help="steps of each run")
    options.add_argument("--rank", type=int, default=32, help="of the adapters")
    options.add_argument("--rates", type=float, nargs="+", default=[3e-5, 3e-4], help="learning rates")
    options.add_argument("--note", default="", help="a sentence for the report's head")
    sys.exit(common.main(options, measure, report))
