"""The reference cache: hits by content, misses for exactly what changed, never half a file."""

from __future__ import annotations

import json

import numpy as np

from dpo_kit import config, dataset
from dpo_kit.engine import reference
from dpo_kit.model import builtin
from dpo_kit.preferences import Pair


class Store:
    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def pair(self, i):
        return self.pairs[i]


def store(*rows):
    return Store(
        [
            Pair(np.array(c, dtype=np.int32), np.array(r, dtype=np.int32), p, p, p, i)
            for i, (c, r, p) in enumerate(rows)
        ]
    )


ROWS = ([1, 2, 3], [1, 2, 4], 2), ([5, 6], [5, 7, 8], 1), ([1, 2, 3], [1, 9], 1)


def test_a_changed_row_misses_alone(tmp_path):
    keys = reference.pair_keys(store(*ROWS))
    values = np.array([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]])
    reference.add(tmp_path / "a", keys, values)
    for changed in (([5, 6], [5, 7, 9], 1), ([5, 6], [5, 7, 8], 0), ([5, 7, 8], [5, 6], 1)):
        got, found = reference.lookup(tmp_path / "a", reference.pair_keys(store(ROWS[2], changed, ROWS[0])))
        assert found.tolist() == [True, False, True]
        assert got[0].tolist() == [-5.0, -6.0]
        assert got[2].tolist() == [-1.0, -2.0]
        assert np.isnan(got[1]).all()


def test_added_values_join_those_held(tmp_path):
    keys = reference.pair_keys(store(*ROWS))
    values = np.arange(6.0).reshape(3, 2)
    reference.add(tmp_path / "a", keys[:1], values[:1])
    reference.add(tmp_path / "a", keys[1:], values[1:])
    got, found = reference.lookup(tmp_path / "a", keys[::-1])
    assert found.all()
    assert got.tolist() == values[::-1].tolist()


def test_weights_dtype_and_layout_have_folders_of_their_own(tmp_path):
    folders = {
        reference.cache_folder(tmp_path, w, d, s)
        for w in ("w1", "w2")
        for d in ("float32", "bfloat16")
        for s in (True, False)
    }
    assert len(folders) == 8


def test_a_torn_file_is_no_cache(tmp_path):
    keys = reference.pair_keys(store(*ROWS))
    reference.add(tmp_path / "a", keys, np.zeros((3, 2)))
    file = tmp_path / "a" / "values.npz"
    whole = file.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        _, found = reference.lookup(tmp_path / "a", keys)
        assert not found.any()
    reference.add(tmp_path / "a", keys, np.ones((3, 2)))
    assert reference.lookup(tmp_path / "a", keys)[0].tolist() == [[1.0, 1.0]] * 3
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["lock", "values.npz"]


def test_keys_do_not_depend_on_the_order_of_rows():
    a = reference.pair_keys(store(*ROWS))
    b = reference.pair_keys(store(*ROWS[::-1]))
    assert a.tolist() == b[::-1].tolist()
    assert a.shape == (3, 16)


def keys_of(rows, tokenizer_path, folder):
    """Pair keys of rows built into a store with a tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "actor": {"path": "tiny-random"},
        "ref": {"path": "tiny-random"},
        "tokenizer_path": str(tokenizer_path),
        "train_dataset": {"path": str(folder / "pairs.jsonl")},
        "cluster": {"fileroot": str(folder / "runs")},
    }
    return reference.pair_keys(dataset.build(config.from_tree(tree)))


def test_a_changed_tokenizer_misses_for_the_rows_it_changes(tmp_path):
    rows = [
        {"chosen": f"\n\nHuman: {q}\n\nAssistant: yes", "rejected": f"\n\nHuman: {q}\n\nAssistant: no"}
        for q in ("a zebra?", "a horse?", "a dog?")
    ]
    tokenizer = builtin.load_tokenizer(builtin.ensure("tiny-random"))
    tokenizer.save_pretrained(tmp_path / "old")
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "new")
    keys = keys_of(rows, tmp_path / "old", tmp_path / "a")
    reference.add(tmp_path / "cache", keys, np.zeros((3, 2)))
    _, found = reference.lookup(tmp_path / "cache", keys_of(rows, tmp_path / "new", tmp_path / "b"))
    assert found.tolist() == [False, True, True]
