"""Freeing room: what would go is shown with its size, and goes only when told so."""

from __future__ import annotations

import os
import time

import pytest

from dpo_kit import cli, runs
from dpo_kit.records import run_folder, status
from dpo_kit.system import folders, machine
from dpo_kit.tools import cleanup
from tests.system.test_folders import write


@pytest.fixture
def run(tmp_path):
    """An ended run with four checkpoints."""
    text = "experiment_name: exp"
    run_dir = run_folder.create(tmp_path / "runs", "exp", "one", config_text=text, manifest={})
    status.update_status(run_dir, state="stopped")
    for step in (1, 2, 3, 4):
        write(run_dir / "checkpoints", step)
    return runs.Run(run_dir)


def test_prune_shows_first_and_removes_when_told(run, capsys):
    command = ["runs", "prune", "--keep", "2", "--fileroot", str(run.dir.parents[1])]
    assert cli.main(command) == 1
    out = capsys.readouterr().out
    assert "exp/one step-1" in out
    assert "exp/one step-2" in out
    assert "exp/one step-3" not in out
    assert "MiB" in out
    assert "add --yes" in out
    assert run.checkpoints() == [1, 2, 3, 4]
    assert cli.main([*command, "--yes"]) == 0
    assert run.checkpoints() == [3, 4]
    assert cli.main([*command, "--yes"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_prune_counts_whole_ones_only(run):
    (run.dir / "checkpoints" / "step-4" / "a.bin").write_bytes(b"x")
    items = cleanup.spare_checkpoints([run], 1)
    assert [item.name for item in items] == ["exp/one step-2", "exp/one step-1"]


def test_a_live_run_keeps_its_checkpoints(run):
    status.reset_status(run.dir)
    assert cleanup.spare_checkpoints([run], 0) == []


def test_the_only_copy_of_an_export_is_not_spare(run):
    """Killed between two renames: the old model has another name, until the run goes on."""
    (run.dir / ".model-7.old").mkdir()
    (run.dir / ".best-7.part").mkdir()
    names = [item.name for item in cleanup.spare_checkpoints([run], 9)]
    assert names == ["exp/one .best-7.part"]
    (run.dir / "model").mkdir()
    assert len(cleanup.spare_checkpoints([run], 9)) == 2


def test_caches_are_listed_and_removed_by_name(tmp_path, capsys):
    for name in ("pairs/aa", "pairs/.half", "reference/bb"):
        folder = tmp_path / ".cache" / name
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"x" * 2**20)
    left = tmp_path / ".cache/pairs/.left"  # by a build that was killed yesterday
    left.mkdir()
    os.utime(left, (time.time() - 86_400,) * 2)
    root = ["--fileroot", str(tmp_path)]
    assert cli.main(["cache", "list", *root]) == 0
    out = capsys.readouterr().out
    assert "pairs/aa" in out
    assert "reference/bb" in out
    assert ".half" not in out
    assert "pairs/.left" in out
    assert "2.0 MiB" in out
    assert cli.main(["cache", "rm", "pairs/zz", *root]) == 2
    assert "has no 'pairs/zz'; it has pairs/.left, pairs/aa, reference/bb" in capsys.readouterr().err
    assert cli.main(["cache", "rm", "pairs/aa", *root]) == 1
    assert cli.main(["cache", "rm", "pairs/aa", "--yes", *root]) == 0
    assert [item.name for item in cleanup.cache_items(tmp_path)] == ["pairs/.left", "reference/bb"]


def test_sizes_are_told_in_words():
    assert (machine.size_text(2**20), machine.size_text(3 * 2**30)) == ("1.0 MiB", "3.00 GiB")
    assert folders.COMMIT == "COMMIT.json"
