"""TRL's DPOTrainer on the same pairs as the kit: at its best, and as it is by default.

Both get the tokens of the pair store as they are (TRL's own tokenisation is left out, and so is its truncation),
the same model with fp32 weights, dtype, AdamW, learning rate, clipping and number of steps.

    best       reference log-probs precomputed in batches of 4x, no activation recompute, rows by length in order,
               fused AdamW, a log line every 50 steps
    defaults   everything else as TRL ships it: reference online, recompute, random order, a log line every 10

Not here: what is measured around it (`bench`, `activations`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import BETA, LR, has_cuda, synchronize

from dpo_kit.preferences import PairStore

INSTALL = "the comparison needs TRL; run: make bench, or pip install -c constraints.txt -e '.[bench]'"


def options(job: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """The arguments of DPOConfig for a job; what is not named here is TRL's default."""
    micro = job.get("micro_batch") or job["batch_size"]
    common = {
        "output_dir": str(output_dir),
        "max_steps": job["steps"],
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": job["batch_size"] // micro,
        "bf16": job["dtype"] == "bfloat16",
        "use_cpu": not has_cuda(),
        "learning_rate": job.get("lr", LR),
        "lr_scheduler_type": "constant",
        "beta": BETA,
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if job["side"] == "trl-defaults":
        return common
    return common | {
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": 4 * micro,
        "gradient_checkpointing": job.get("recompute", False),
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch_fused",
        "logging_steps": 50,
    }


def train(
    job: dict[str, Any], store: PairStore, folder: Path, stepped: Callable[[dict], Any]
) -> dict[str, Any]:
    """Trains as the job says.

    Args:
        folder: keeps the dataset, and with it TRL's own cache of reference log-probs.
        stepped: called after each optimizer step with its loss (a tensor), its data tokens (a tensor) and the
            positions it ran, padding included.

    Returns:
        Seconds of the reference pass (None when there was none or TRL found it in its cache), and the settings.
    """
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise SystemExit(f"{error}; {INSTALL}") from error
    from transformers import TrainerCallback

    seconds: list[float] = []
    batches: list[tuple[Any, Any, int]] = []

    class Trainer(DPOTrainer):  # type: ignore[misc]
        """DPOTrainer over rows that are tokens already, with its reference pass timed."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any) -> Any:
            cached = bool(list(folder.glob("rows/cache-*")))
            start = time.perf_counter()
            found = super()._precompute_ref_logps(*args)
            synchronize()
            if not cached:
                seconds.append(time.perf_counter() - start)
            return found

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, inputs, *args, **kwargs)
            batches.append((loss.detach(), inputs["attention_mask"].sum(), inputs["input_ids"].numel()))
            return loss

    class Stepped(TrainerCallback):
        """Hands over what the micro-batches of a step were."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            losses, tokens, positions = zip(*batches, strict=True)
            stepped({"loss": sum(losses), "tokens": sum(tokens), "positions": sum(positions)})
            batches.clear()

    settings = options(job, folder / "out")
    trainer = Trainer(
        model=job["model"],
        args=DPOConfig(**settings),
        train_dataset=_rows(store, folder / "rows"),
        callbacks=[Stepped()],
    )
    trainer.train()
    shown = {k: v for k, v in settings.items() if k != "output_dir"}
    really = {k: getattr(trainer.args, k) for k in ("gradient_checkpointing", "loss_type", "logging_steps")}
    really["optim"] = str(trainer.args.optim.value)
    really["attention"] = trainer.model.config._attn_implementation
    return {"reference_s": seconds[0] if seconds else None, "settings": shown | really}


def _rows(store: PairStore, folder: Path) -> Any:
    """The pairs as a dataset on disk, where TRL finds its cached reference log-probs again."""
    from datasets import Dataset, load_from_disk

    if not folder.exists():
        pairs = [store.pair(i) for i in range(len(store))]
        starts = [max(p.prompt, 1) for p in pairs]
        Dataset.from_dict(
            {
                "prompt_ids": [p.chosen_ids[:s].tolist() for p, s in zip(pairs, starts, strict=True)],
                "chosen_ids": [p.chosen_ids[s:].tolist() for p, s in zip(pairs, starts, strict=True)],
                "rejected_ids": [p.rejected_ids[s:].tolist() for p, s in zip(pairs, starts, strict=True)],
            }
        ).save_to_disk(folder)
    return load_from_disk(folder)
