"""One owner for a run folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

import pytest
from filelock import FileLock, Timeout

from dpo_kit.errors import UserError
from dpo_kit.records import lock
from dpo_kit.system.files import atomic_write, read_json, to_json
from dpo_kit.system.processes import identify


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def hold(folder, process):
    atomic_write(folder / "lock.json", to_json({**identify(process.pid), "inode": folder.stat().st_ino}))


def test_a_lock_is_given_back(tmp_path):
    with lock.lock(tmp_path):
        assert lock.lock_owner(tmp_path)["pid"] == identify()["pid"]
    assert lock.lock_owner(tmp_path) is None


def test_a_second_process_is_refused_and_told_who(tmp_path, sleeper):
    hold(tmp_path, sleeper)
    with pytest.raises(UserError, match=f"belongs to process {sleeper.pid} on "):
        lock.take_lock(tmp_path)
    lock.release_lock(tmp_path)
    assert lock.lock_owner(tmp_path)["pid"] == sleeper.pid


def test_what_a_dead_process_left_is_taken_over(tmp_path, sleeper):
    hold(tmp_path, sleeper)
    sleeper.kill()
    sleeper.wait()
    with lock.lock(tmp_path):
        assert lock.lock_owner(tmp_path)["pid"] == identify()["pid"]


def test_a_reused_pid_is_another_process(tmp_path, sleeper):
    hold(tmp_path, sleeper)
    owner = read_json(tmp_path / "lock.json")
    atomic_write(tmp_path / "lock.json", to_json({**owner, "create_time": owner["create_time"] - 100}))
    assert lock.lock_owner(tmp_path) is None


def test_the_copy_of_a_live_folder_is_free_and_a_renamed_one_is_not(tmp_path, sleeper):
    original = tmp_path / "original"
    original.mkdir()
    hold(original, sleeper)
    shutil.copytree(original, tmp_path / "copy")
    assert lock.lock_owner(tmp_path / "copy") is None
    original.rename(tmp_path / "renamed")
    assert lock.lock_owner(tmp_path / "renamed")["pid"] == sleeper.pid


def test_only_one_of_many_takes_a_stale_lock(tmp_path, sleeper):
    hold(tmp_path, sleeper)
    sleeper.kill()
    sleeper.wait()
    code = (
        "import sys, time; from pathlib import Path; from dpo_kit.records import lock\n"
        "read = lock.lock_owner\n"
        "def slow(folder):\n owner = read(folder); time.sleep(0.5); return owner\n"
        "lock.lock_owner = slow\n"
        "try:\n lock.take_lock(Path(sys.argv[1])); print('mine', flush=True); time.sleep(2)\n"
        "except ValueError: print('refused', flush=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    words = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(words) == ["mine", "refused", "refused", "refused"]


def test_who_is_killed_while_it_looks_at_the_lock_leaves_it_to_the_next(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from dpo_kit.records import lock\n"
        "with lock.unowned(Path(sys.argv[1])):\n print('looks', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "looks\n"
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".lock").acquire(blocking=False)
        holder.kill()
    with lock.lock(tmp_path):
        assert lock.lock_owner(tmp_path)["pid"] == identify()["pid"]


def test_a_process_of_another_machine_with_our_pid_is_another(tmp_path):
    """Containers on several machines often share small pids."""
    mine = {**identify(), "inode": tmp_path.stat().st_ino}
    atomic_write(tmp_path / "lock.json", to_json({**mine, "host": "node-b"}))
    atomic_write(tmp_path / "status.json", to_json({"state": "running", "updated_at": time.time()}))
    with pytest.raises(UserError, match="on node-b"):
        lock.take_lock(tmp_path)
    lock.release_lock(tmp_path)
    assert lock.lock_owner(tmp_path)["host"] == "node-b"


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"pid": "abc"}'])
def test_a_damaged_lock_holds_nothing(tmp_path, text):
    (tmp_path / "lock.json").write_text(text)
    with lock.lock(tmp_path):
        assert lock.lock_owner(tmp_path)["pid"] == identify()["pid"]
