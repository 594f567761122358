from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from dpo_kit import preferences
from dpo_kit.errors import DataError
from dpo_kit.preferences import longest_common_prefix, open_store, write_store
from dpo_kit.system.files import sha256


def brute_force(a, b) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def example_arrays() -> dict:
    """The picture of the module docstring: pairs (PPPPPCCCe, PPPPPRRe) and (Ce, e)."""
    return {
        "chosen_ids": np.array([1, 1, 1, 1, 1, 2, 2, 2, 9, 2, 9]),
        "chosen_offsets": np.array([0, 9, 11]),
        "rejected_ids": np.array([1, 1, 1, 1, 1, 3, 3, 9, 9]),
        "rejected_offsets": np.array([0, 8, 9]),
        "shared": np.array([5, 0]),
        "prompt": np.array([4, 0]),
        "context": np.array([4, 0]),
        "index": np.array([0, 7]),
    }


META = {"tokenizer": {"path": "tok"}, "report": {"kept": 2}}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([], [], 0),
        ([1], [], 0),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2, 4], 2),
        ([5], [6], 0),
        ((1, 2), np.array([1, 3], np.int32), 1),
        ([2**40, 1], [2**40, 2], 1),
    ],
)
def test_longest_common_prefix_by_hand(a, b, expected):
    assert longest_common_prefix(a, b) == expected
    assert longest_common_prefix(b, a) == expected
    assert type(longest_common_prefix(a, b)) is int


def test_longest_common_prefix_equals_brute_force_on_random_lists():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        a, b = (rng.integers(0, 2, rng.integers(0, 12)) for _ in range(2))
        assert longest_common_prefix(a, b) == longest_common_prefix(list(a), list(b)) == brute_force(a, b)


def test_longest_common_prefix_refuses_matrices():
    with pytest.raises(ValueError, match="one-dimensional"):
        longest_common_prefix([[1], [2]], [[1], [2]])


def test_store_comes_back_as_written(tmp_path):
    store = write_store(tmp_path / "deep" / "store", example_arrays(), META)
    assert len(store) == 2
    first, second = store.pair(0), store.pair(1)
    assert first.chosen_ids.tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 9]
    assert first.rejected_ids.tolist() == [1, 1, 1, 1, 1, 3, 3, 9]
    assert first.chosen_ids.dtype == np.int32
    lengths = store.all_lengths()
    assert (type(lengths), lengths.dtype) == (np.ndarray, np.int64)
    assert lengths.tolist() == [[5, 9, 8], [0, 2, 1]]
    assert store.lengths_of([1, 0]).tolist() == [[0, 2, 1], [5, 9, 8]]
    assert (first.shared, first.prompt, first.context, first.index) == (5, 4, 4, 0)
    assert second.rejected_ids.tolist() == [9]
    assert second.index == 7
    assert store.tokenizer_path == "tok"
    assert store.report == {"kept": 2}
    assert [p.name for p in store.path.parent.iterdir()] == ["store"]
    for outside in (-1, 2):
        with pytest.raises(IndexError):
            store.pair(outside)


def test_numpy_alone_reads_it(tmp_path):
    """Only numpy and the standard library are imported by `preferences`."""
    write_store(tmp_path / "s", example_arrays(), META)
    code = (
        "import sys; from dpo_kit.preferences import open_store\n"
        f"assert open_store({str(tmp_path / 's')!r}).pair(0).shared == 5\n"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fingerprint_is_of_the_content_only(tmp_path):
    one = write_store(tmp_path / "a", example_arrays(), META)
    two = write_store(tmp_path / "b", example_arrays(), {**META, "report": {"seconds": 3}})
    assert one.fingerprint == two.fingerprint
    for name in ("shared", "index", "chosen_ids", "prompt", "context"):
        changed = example_arrays()
        changed[name] = changed[name].copy()
        changed[name][0] = 3 if name != "shared" else 6
        assert write_store(tmp_path / name, changed, META).fingerprint != one.fingerprint


def remove_array(folder):
    (folder / "shared.npy").unlink()


def cut_array(folder):
    path = folder / "rejected_ids.npy"
    os.truncate(path, path.stat().st_size - 4)


def flip_bit(folder):
    path = folder / "chosen_ids.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def remove_meta(folder):
    (folder / "meta.json").unlink()


def cut_meta(folder):
    path = folder / "meta.json"
    os.truncate(path, path.stat().st_size // 2)


def swap_hashes(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta["fingerprint"] = "0" * 64
    (folder / "meta.json").write_text(json.dumps(meta))


def lie_about_offsets(folder):
    """Offsets that point outside, with a matching hash: the structure check sees it."""
    offsets = np.array([0, 9, 12])
    np.save(folder / "chosen_offsets.npy", offsets)
    meta = json.loads((folder / "meta.json").read_text())
    meta["arrays"]["chosen_offsets"]["sha256"] = sha256(folder / "chosen_offsets.npy")
    meta["fingerprint"] = preferences._fingerprint(meta["arrays"])
    (folder / "meta.json").write_text(json.dumps(meta))


DAMAGES = [remove_array, cut_array, flip_bit, remove_meta, cut_meta, swap_hashes, lie_about_offsets]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_store_is_refused_and_replaced(tmp_path, damage):
    whole = write_store(tmp_path / "s", example_arrays(), META)
    damage(tmp_path / "s")
    with pytest.raises(DataError, match=r"pair store"):
        open_store(tmp_path / "s")
    again = write_store(tmp_path / "s", example_arrays(), META)
    assert again.fingerprint == whole.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_without_hashes_sizes_are_still_checked(tmp_path):
    write_store(tmp_path / "s", example_arrays(), META)
    flip_bit(tmp_path / "s")
    open_store(tmp_path / "s", check_hashes=False)
    cut_array(tmp_path / "s")
    with pytest.raises(DataError, match=r"rejected_ids.npy has \d+ bytes, meta.json says \d+"):
        open_store(tmp_path / "s", check_hashes=False)


def test_no_store_there(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_store(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no meta\.json"):
        open_store(tmp_path)


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preferences, "_write_array", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\); it needs 0\.0 MiB"):
        write_store(tmp_path / "s", example_arrays(), META)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_many_builders_wins(tmp_path):
    results = []

    def build(number):
        results.append(write_store(tmp_path / "s", example_arrays(), {**META, "builder": number}))

    threads = [threading.Thread(target=build, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({store.meta["builder"] for store in results}) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_leftovers_of_a_killed_builder_go(tmp_path):
    for name in (".tmp-s-killed", ".s-killed.part", ".s-working.part"):
        (tmp_path / name).mkdir()
        if "killed" in name:
            os.utime(tmp_path / name, (0, 0))
    write_store(tmp_path / "s", example_arrays(), META)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".s-working.part", "s"]


def test_store_that_is_no_set_of_pairs_is_not_written(tmp_path):
    for name, value in {"shared": [9, 0], "prompt": [6, 0], "context": [10, 0], "index": [1]}.items():
        with pytest.raises(AssertionError, match=name):
            write_store(tmp_path / "s", {**example_arrays(), name: np.array(value)}, META)
    assert not (tmp_path / "s").exists()


def test_tokens_in_a_file_give_the_same_store(tmp_path):
    ids = [np.arange(5, dtype=np.int32), np.arange(7, dtype=np.int32) + 3]
    tokens = preferences.TokenFile(tmp_path)
    for part in ids:
        tokens.append(part)
    numbers = {name: np.zeros(2, np.int64) for name in ("shared", "prompt", "context", "index")}
    offsets = np.array([0, 5, 12])
    offsets = {"chosen_offsets": offsets, "rejected_offsets": offsets}
    made = []
    for name, given in (("file", tokens), ("memory", np.concatenate(ids))):
        arrays = {"chosen_ids": given, "rejected_ids": given, **offsets, **numbers}
        made.append(preferences.write_store(tmp_path / name, arrays, {"tokenizer": {}, "report": {}}))
    assert made[0].fingerprint == made[1].fingerprint
    assert made[0].pair(1).chosen_ids.tolist() == ids[1].tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "memory"]
