"""Runs over fake processes for tests of launching: no torch, a second or two each."""

from __future__ import annotations

import contextlib
import functools
import json

from dpo_kit import config as config_module
from dpo_kit import launch
from dpo_kit.errors import RunError
from dpo_kit.records import status
from dpo_kit.supervise import start as supervise_start
from dpo_kit.supervise import supervisor
from dpo_kit.system.processes import is_alive
from tests.fake_supervisor import MODULES

TREE = {
    "experiment_name": "exp",
    "cluster": {"n_gpus_per_node": 0, "grace_s": 5.0},
    "actor": {"path": "tiny-random", "backend": "fsdp:d2"},
    "ref": {"path": "tiny-random"},
    "train_dataset": {"path": "data.jsonl"},
    "evaluator": {"num_samples": 0},
}
PAIR = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"}
LONG = [["train", 600, 0.1]]


class Fakes:
    """What the runs of a test do, and a configuration for them."""

    def __init__(self, root, monkeypatch):
        self.root, self.fileroot = root, root / "runs"
        self.play_file = root / "play.json"
        (root / "data.jsonl").write_text(json.dumps(PAIR) + "\n")
        monkeypatch.setenv("FAKE_PLAY", str(self.play_file))
        start = functools.partial(supervise_start.spawn_detached, module="tests.fake_supervisor")
        monkeypatch.setattr(supervise_start, "spawn_detached", start)
        monkeypatch.setattr(supervisor, "supervise", functools.partial(supervisor.supervise, **MODULES))
        self.play([["train", 3, 0.02]])

    def play(self, worker, prepare=(), samples=()):
        by_rank = worker if isinstance(worker, dict) else {"0": worker, "1": worker}
        text = json.dumps({"prepare": list(prepare), "worker": by_rank, "samples": list(samples)})
        self.play_file.write_text(text)

    def config(self, *overrides):
        overrides = [f"cluster.fileroot={self.fileroot}", *overrides]
        return config_module.from_tree(TREE, overrides, root=self.root)

    def folders(self):
        return sorted(str(path.relative_to(self.fileroot)) for path in self.fileroot.glob("[!.]*/[!.]*"))

    def pids(self):
        return [int(path.read_text() or 0) for path in self.fileroot.glob("*/*/pid-*")]

    def living(self):
        return [pid for pid in self.pids() if pid and is_alive({"pid": pid})]

    def end(self):
        """Stops what is live; processes of ranks that are left all the same."""
        live = launch.live(self.fileroot)
        for run in live:
            status.request_stop(run.dir, "stopped")
        for (
            process
        ) in supervise_start._supervisors.values():  # also those that have not said yet who they are
            process.wait(10)
        for run in live:
            if run.status.get("supervisor"):
                with contextlib.suppress(RunError, TimeoutError):
                    run.wait(timeout=10, show=False)
        return self.living()
