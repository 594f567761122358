"""Processes of a run without torch: `python -m tests.fake_run RUN_DIR` plays prepare, a rank or samples.

What each part does stands in `play.json` of the run folder, else in the file that `$FAKE_PLAY` names:
`{"prepare": [...], "worker": {"0": [...]}, "samples": [...]}`, lists of actions. Every process writes its
pid to `pid-<part>` first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from dpo_kit import config as config_module
from dpo_kit.errors import DataError, ExitStatus
from dpo_kit.records import budget, checkpoint_folders, metrics, status
from dpo_kit.system import folders, processes


def act(run_dir, part, action, rank):
    name, *arguments = action
    if name == "sleep":
        time.sleep(arguments[0])
    elif name == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif name == "print":
        print(arguments[0], flush=True)
    elif name == "progress":
        status.write_progress(run_dir, **arguments[0])
    elif name == "exit":
        os._exit(arguments[0])
    elif name == "kill":
        os.kill(os.getpid(), arguments[0])
    elif name == "hang":
        processes.answer_requests()
        hang()
    elif name == "wait":  # as a rank does that stands in a collective
        processes.answer_requests()
        exec(compile("import time\ntime.sleep(600)", "torch/distributed/collective.py", "exec"))
    elif name == "checkpoint" and rank != 0:
        return
    elif name == "checkpoint":
        folder = run_dir / "checkpoints" / f"step-{arguments[0]}"
        config = config_module.to_tree(config_module.load(run_dir / "config.yaml"))
        facts = {"step": arguments[0], "identity": {"config": config}}
        with folders.staged(folder, "replace") as part:
            (part / "data").write_text("weights")
            (part / checkpoint_folders.STATE).write_text(json.dumps(facts))
            folders.seal(part, folders.hashes(part, ["data", checkpoint_folders.STATE]))
    elif name == "attempts":  # one list of actions for each attempt; the last one for those that follow
        number = status.read_status(run_dir)["attempt"]
        for inner in arguments[min(number, len(arguments)) - 1]:
            act(run_dir, part, inner, rank)
    elif name == "budget":
        budget.write(run_dir, budget.read(run_dir) or arguments[0])
    elif name == "out of memory":
        error = RuntimeError("not enough memory")
        status.write_rank_error(run_dir, rank, error, out_of_memory=arguments[0])
        os._exit(ExitStatus.OUT_OF_MEMORY)
    elif name == "raise":
        error = {"DataError": DataError, "ValueError": ValueError, "RuntimeError": RuntimeError}[
            arguments[0]
        ](arguments[1])
        status.write_rank_error(run_dir, part if rank is None else rank, error)
        sys.exit(2 if isinstance(error, DataError) else 1)
    elif name == "train":
        train(run_dir, rank, *arguments)
    elif name == "environment":
        (run_dir / f"environment-{rank}.json").write_text(json.dumps(dict(os.environ)))
    else:
        raise AssertionError(action)


def hang():
    time.sleep(600)


def train(run_dir, rank, steps, step_s):
    """Steps with metrics; a SIGTERM ends it after the step in hand, with the state saved and status 3."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    for step in range(1, steps + 1):
        time.sleep(step_s)
        if rank == 0:
            record = {"step": step, "dpo/loss": 0.7 - 0.01 * step, "dpo/reward_accuracy": 0.5}
            metrics.append_metrics(run_dir, record)
            status.write_progress(run_dir, phase="training", done=step, total=steps)
        if asked:
            if rank == 0:
                (run_dir / "saved").write_text(str(step))
            sys.exit(3)


def main():
    run_dir = Path(sys.argv[1])
    rank = int(os.environ["RANK"]) if "RANK" in os.environ else None
    if rank is not None:
        processes.wait_to_go()
    part = Path(sys.argv[0]).stem.removeprefix("fake_") if rank is None else "worker"
    (run_dir / f"pid-{part}{'' if rank is None else f'-{rank}'}").write_text(str(os.getpid()))
    file = run_dir / "play.json"
    play = json.loads((file if file.exists() else Path(os.environ["FAKE_PLAY"])).read_text())[part]
    for action in play if rank is None else play[str(rank)]:
        act(run_dir, part, action, rank)


if __name__ == "__main__":
    main()
