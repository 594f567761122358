"""What a rank records while it works: progress, metrics, TensorBoard events, evaluations, weights' fingerprints.

Rank 0 writes, the others keep quiet. Not here: what is measured (engine/step), the files' formats (records).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dpo_kit.config import Config
from dpo_kit.engine import schedule
from dpo_kit.model.parallel import World
from dpo_kit.records import findings, manifest, metrics, run_folder, status
from dpo_kit.records.findings import Finding
from dpo_kit.system.files import atomic_write, to_json

PROGRESS_EVERY_S = 0.2


class Recorder:
    """Rank 0 writes what the run records; the other ranks keep quiet. One instance a rank."""

    def __init__(self, run_dir: Path, config: Config, world: World):
        self.run_dir, self.config, self.world = run_dir, config, world
        self.due_at: dict[str, float] = {}
        self.phase = ""
        self.shown: tuple[str, float] = ("", 0.0)
        self.untold: dict[str, Any] | None = None
        self.done: int | None = None  # steps
        self.step: int | None = None  # the one at hand
        self.tensorboard: Any = None
        self.untold_events: list[dict[str, Any]] | None = None  # TensorBoard is not open yet
        self.resumed_at = 0

    def resume(self, step: int, *, owes_evaluation: bool = False) -> None:
        """Takes up after `step` (0: the beginning): what an interrupted attempt recorded beyond it is removed."""
        if not self.world.is_main:
            return
        run_folder.sweep(self.run_dir)
        for note in metrics.cut_records(self.run_dir, step, owes_evaluation=owes_evaluation):
            self.tell(note)
        if self.config.stats_logger.tensorboard:
            self.untold_events, self.resumed_at = [], step

    def progress(
        self, phase: str, done: int = 0, total: int | None = None, *, step: int | None = None
    ) -> None:
        """Shows where the run is; at most a few times a second within one phase."""
        now = time.monotonic()
        self.phase = phase
        if step is not None:
            self.done, self.step = step, min(step + 1, total or step + 1)
        self.untold = {"phase": phase, "done": done, "total": total, "step": self.done}
        self.untold["total_steps"] = total if phase == "first step" else None
        if phase != self.shown[0] or now - self.shown[1] > PROGRESS_EVERY_S or done == total:
            self.shown = (phase, now)
            self.flush()

    def tell(self, note: str) -> None:
        """Says something to whoever watches the run: in the log, and in its status; rank 0 does."""
        if self.world.is_main:
            print(note, flush=True)
            status.write_progress(self.run_dir, phase=self.phase, note=note)

    def found(self, finding: Finding) -> None:
        """Keeps a finding for whoever reads the run's figures; rank 0 does."""
        if self.world.is_main:
            findings.add(self.run_dir, finding)

    def flush(self) -> None:
        """Shows what `progress` held back, so that a run that ends early says at which step."""
        if self.world.is_main and self.untold:
            status.write_progress(self.run_dir, **self.untold)
        self.untold = None

    def record(self, values: dict[str, Any]) -> None:
        """Appends one line to `metrics.jsonl` and to the TensorBoard events."""
        if not self.world.is_main:
            return
        metrics.append_metrics(self.run_dir, values)
        if self.untold_events is not None:
            self.untold_events.append(values)
            if not values["step"]:
                return  # TensorBoard takes a while to import: not before the first step
            self.tensorboard = _tensorboard(self.run_dir, self.resumed_at)
        events, self.untold_events = self.untold_events or [values], None
        if self.tensorboard:
            try:
                for event in events:
                    for name, value in event.items():
                        if name != "step" and value is not None:
                            self.tensorboard.add_scalar(name, value, event["step"])
                self.tensorboard.flush()
            except Exception as error:  # a full disk, or a writer whose thread has died of something
                self.tensorboard = None
                _without_tensorboard("no more TensorBoard events", error)

    def write_evaluation(self, step: int, means: dict[str, Any], pairs: list[dict[str, Any]]) -> None:
        """Records the means of an evaluation and its per-pair lines (`evaluations/step-N.jsonl`)."""
        if self.world.is_main:
            folder = self.run_dir / "evaluations"
            folder.mkdir(exist_ok=True)
            atomic_write(folder / f"step-{step}.jsonl", "".join(to_json(pair) + "\n" for pair in pairs))
        self.record({"step": step, **means})

    def write_weights(self, fingerprints: dict[str, str]) -> None:
        """Adds what the run starts from to its manifest."""
        if self.world.is_main:
            weights = {
                name: {"path": getattr(self.config, name).path, "fingerprint": fingerprint}
                for name, fingerprint in fingerprints.items()
            }
            manifest.update(self.run_dir, weights=weights)

    def due(self, section: str, step: int, steps_per_epoch: int) -> bool:
        """Whether `saver`, `evaluator` or `recover` is due after a step; rank 0's clock decides for all ranks."""
        freq = getattr(self.config, section)
        if schedule.is_due(freq, step, steps_per_epoch):
            return True
        if not freq.freq_secs:
            return False
        now = self.world.of_main(time.time())
        due = now >= self.due_at.setdefault(section, now + freq.freq_secs)
        if due:
            self.due_at[section] = now + freq.freq_secs
        return due


def _tensorboard(run_dir: Path, step: int) -> Any:
    """The writer of events; None where there is none to be had, for whatever reason: a run does without."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)
    except Exception as error:  # not installed, or at odds with its protobuf or numpy
        _without_tensorboard("no TensorBoard events", error)
        return None


def _without_tensorboard(what: str, error: Exception) -> None:
    cause = "" if isinstance(error, ModuleNotFoundError) else f" ({status.one_line(error)})"
    is_missing = isinstance(error, ImportError)
    remedy = 'pip install "dpo-kit[tracking]"' if is_missing else "stats_logger.tensorboard=false"
    print(f"{what}{cause}: {remedy}; metrics.jsonl has every number", flush=True)
