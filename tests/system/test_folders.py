"""Folders that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_kit.records import checkpoint_folders
from dpo_kit.system import folders, machine

NAMES = ("a.bin", "b.bin", ".metadata", "inner/c.bin")


def write(folder: Path, step: int) -> Path:
    """A checkpoint whose content follows from its step."""
    target = folder / f"step-{step}"
    with folders.staged(target, "replace") as part:
        (part / "inner").mkdir()
        for name in NAMES:
            (part / name).write_bytes(f"{name} of {step}".encode() * 1000)
        folders.seal(part, folders.hashes(part, folders.file_names(part)))
    return target


def test_what_was_written_is_whole(tmp_path):
    target = write(tmp_path, 3)
    assert folders.damage(target) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3"]
    assert folders.file_names(target) == sorted(NAMES)
    assert checkpoint_folders.newest(tmp_path) == (3, [])


@pytest.mark.parametrize("name", [*NAMES, folders.COMMIT])
@pytest.mark.parametrize("at", [0, 0.5, -1])
def test_a_flipped_byte_is_found_in_every_file(tmp_path, name, at):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    content[at if at == -1 else int(at * len(content))] ^= 1
    file.write_bytes(content)
    step, told = checkpoint_folders.newest(tmp_path)
    assert step == 1
    assert len(told) == 1
    assert "step-2 is damaged" in told[0]
    assert name in told[0]


@pytest.mark.parametrize("name", [*NAMES, folders.COMMIT])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_cut_and_missing_files_are_found(tmp_path, name, how):
    file = write(tmp_path, 2) / name
    if how == "gone":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1)
    assert name in folders.damage(tmp_path / "step-2")
    assert checkpoint_folders.newest(tmp_path)[0] is None


def test_a_file_that_a_browser_added_is_no_damage(tmp_path):
    (write(tmp_path, 2) / ".DS_Store").write_bytes(b"x")
    assert folders.damage(tmp_path / "step-2") == ""


def test_ranks_share_the_reading(tmp_path):
    file = write(tmp_path, 2) / "b.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"?")
    problems = [folders.damage(tmp_path / "step-2", part, 2) for part in range(2)]
    assert sorted(map(bool, problems)) == [False, True]


def test_the_newest_stay_and_removing_twice_changes_nothing(tmp_path):
    for step in (1, 2, 10, 9):
        write(tmp_path, step)
    assert checkpoint_folders.steps(tmp_path) == [1, 2, 9, 10]
    assert checkpoint_folders.retain(tmp_path, 2, 10) == [2, 1]
    assert checkpoint_folders.retain(tmp_path, 2, 10) == []
    assert checkpoint_folders.steps(tmp_path) == [9, 10]
    assert checkpoint_folders.retain(tmp_path, 0, 10) == [9]  # the last one is never removed


def test_a_damaged_one_does_not_count_as_one_that_stays(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "step-3" / "a.bin").unlink()
    assert checkpoint_folders.retain(tmp_path, 1, 3) == [1]
    assert checkpoint_folders.newest(tmp_path)[0] == 2


def test_later_ones_that_were_passed_over_do_not_push_out_what_was_written_now(tmp_path):
    """Bits flipped in step 8, which sizes do not show: the run went on from 4 and wrote 5."""
    for step in (4, 8, 5):
        write(tmp_path, step)
    (tmp_path / "step-8" / "a.bin").write_bytes((tmp_path / "step-8" / "a.bin").read_bytes()[::-1] + b"")
    assert checkpoint_folders.retain(tmp_path, 1, 5) == [8, 4]
    assert checkpoint_folders.newest(tmp_path) == (5, [])
    assert checkpoint_folders.retain(tmp_path, 1, 5) == []


def test_a_checkpoint_that_somebody_else_removed_is_removed(tmp_path):
    folders.discard(tmp_path / "step-3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files", [[1], {"a": 1}, {"a": {"size": 1}}, None])
def test_a_commit_file_that_says_something_else_is_damage(tmp_path, files):
    target = write(tmp_path, 2)
    text = json.dumps({"files": files}) + "\n"
    (target / folders.COMMIT).write_bytes(folders._commit_text(text))
    assert "COMMIT.json cannot be read" in folders.damage(target)


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    def put(content, error=None):
        with folders.staged(tmp_path / "model", "replace") as part:
            (part / "a.txt").write_text(content)
            if error:
                raise error

    put("old")
    put("new")
    with pytest.raises(KeyError):
        put("half", KeyError())
    assert (tmp_path / "model" / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "killed", ["while it wrote", "between the renames", "before the old one was removed"]
)
def test_what_a_kill_left_of_a_replacement_is_mended(tmp_path, killed):
    with folders.staged(tmp_path / "model", "replace") as part:
        (part / "a.txt").write_text("old")
    if killed != "before the old one was removed":
        (tmp_path / ".model-7.part").mkdir()
    else:
        (tmp_path / ".model-7.old").mkdir()
    if killed == "between the renames":
        (tmp_path / "model").rename(tmp_path / ".model-7.old")
    folders.sweep(tmp_path)
    assert (tmp_path / "model" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_damaged_one_makes_room_for_the_same_step(tmp_path):
    target = write(tmp_path, 2)
    (target / "a.bin").write_bytes(b"")
    write(tmp_path, 2)
    assert folders.damage(target) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


LEFT = (".step-4-0a1b2c3d.part", ".step-5-7.old", ".tmp-step-4-1", ".trash-step-1-1")


def test_what_killed_writers_left_is_swept(tmp_path):
    """The last two are names that they had once."""
    write(tmp_path, 5)
    for name in LEFT:
        (tmp_path / name).mkdir()
    assert checkpoint_folders.steps(tmp_path) == [5]
    assert [path.name for path in folders.leftovers(tmp_path)] == sorted(LEFT)
    folders.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


def test_a_writer_clears_away_what_was_abandoned_and_is_of_its_own_name(tmp_path):
    for name in (".a[1]-00.part", ".a[1]-01.part", ".b-00.part", ".tmp-a1-0"):
        (tmp_path / name).mkdir()
        if not name.startswith(".a[1]-01"):
            os.utime(tmp_path / name, (0, 0))
    with folders.staged(tmp_path / "a[1]", "refuse"):
        pass
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".a[1]-01.part", ".b-00.part", ".tmp-a1-0", "a[1]"]


@pytest.mark.parametrize(
    ("if_there", "is_whole", "stands"),
    [("replace", True, "new"), ("keep", True, "old"), ("keep", False, "new"), ("refuse", True, "old")],
)
def test_what_becomes_of_a_folder_that_another_writer_put_there_meanwhile(
    tmp_path, if_there, is_whole, stands
):
    target = tmp_path / "a"
    refused = pytest.raises(FileExistsError, match="a") if if_there == "refuse" else contextlib.nullcontext()
    with refused, folders.staged(target, if_there, lambda folder: is_whole) as part:
        (part / "text").write_text("new")
        target.mkdir()
        (target / "text").write_text("old")
    assert (target / "text").read_text() == stands
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


WRITER = """
import sys
from pathlib import Path
from dpo_kit.records import checkpoint_folders
from tests.system.test_folders import write
folder = Path(sys.argv[1])
for step in range(int(sys.argv[2]), 10_000):
    write(folder, step)
    checkpoint_folders.retain(folder, 2, step)
    print(step, flush=True)
"""


def test_a_killed_writer_leaves_the_last_acknowledged_checkpoint(tmp_path):
    rng, last = random.Random(5), 0
    for _ in range(8):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(last + 1)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(rng.uniform(0, 0.2))
        writer.send_signal(signal.SIGKILL)
        said = writer.stdout.read().split("\n")
        writer.wait()
        writer.stdout.close()
        acknowledged = max([int(line) for line in said[:-1] if line], default=last + 1)
        step, told = checkpoint_folders.newest(tmp_path)
        assert told == []
        assert step is not None
        assert step >= acknowledged
        for name in NAMES:
            assert (tmp_path / f"step-{step}" / name).read_bytes() == f"{name} of {step}".encode() * 1000
        last = step


def test_sizes_count_every_file(tmp_path):
    target = write(tmp_path, 1)
    expected = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    assert machine.size_of(target) == expected
    shutil.rmtree(target)
    assert machine.size_of(target) == 0


def test_an_old_folder_gets_its_name_back_when_the_new_one_cannot_have_it(tmp_path, monkeypatch):
    with folders.staged(tmp_path / "best", "replace") as part:
        (part / "one").write_text("old")
    renamed = folders._renamed

    def fails(part, folder):
        if not folder.exists():
            raise OSError(5, "Input/output error")
        return renamed(part, folder)

    monkeypatch.setattr(folders, "_renamed", fails)
    with pytest.raises(OSError, match="Input/output"), folders.staged(tmp_path / "best", "replace") as part:
        (part / "one").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "one").read_text() == "old"
