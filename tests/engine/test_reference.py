"""The reference's values: checked against the model that made them, kept slice by slice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpo_kit.engine import reference, step
from dpo_kit.engine.state import Stopped
from dpo_kit.preferences import open_store
from tests.helpers import make_engine, one_rank, random_pairs, store_of, tiny_config


def cached(root: Path) -> Path:
    """The only file of values below a root of runs."""
    (file,) = root.glob("runs/.cache/reference/*/values.npz")
    return file


def shifted(file: Path, nats: float) -> None:
    """Makes a cache stale: every value is off."""
    with np.load(file) as held:
        keys, logps = held["keys"], held["logps"]
    np.savez(file, keys=keys, logps=logps + nats)


def values(root: Path, *overrides: str) -> np.ndarray:
    """What an engine takes for the reference's log-probs of 12 pairs."""
    with one_rank() as world:
        if not (root / "pairs").exists():
            store_of(random_pairs(12), root / "pairs")
        state = make_engine(world, tiny_config(root / "runs", *overrides), open_store(root / "pairs"))
        return state.ref_train.numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stale_cache_is_found_and_made_anew(tmp_path, capsys, dtype):
    made = values(tmp_path, f"actor.dtype={dtype}", f"ref.dtype={dtype}")
    shifted(cached(tmp_path), 0.5)
    assert (values(tmp_path, f"actor.dtype={dtype}", f"ref.dtype={dtype}") == made).all()
    said = capsys.readouterr().out
    assert (
        "reference: 12 of 12 pairs from the cache\nreference: 4 random pairs of the cache computed again"
        in said
    )
    assert "the cache is stale, all pairs are computed anew" in said
    assert (values(tmp_path, f"actor.dtype={dtype}", f"ref.dtype={dtype}") == made).all()
    assert "stale" not in capsys.readouterr().out


def test_a_value_that_is_no_number_is_missing(tmp_path, capsys):
    made = values(tmp_path)
    file = cached(tmp_path)
    with np.load(file) as held:
        keys, logps = held["keys"], held["logps"]
    logps[3, 1] = np.nan
    np.savez(file, keys=keys, logps=logps)
    assert values(tmp_path) == pytest.approx(made, abs=1e-5)
    assert "reference: 11 of 12 pairs from the cache" in capsys.readouterr().out
    reference.add(file.parent, keys[:1] + 1, np.array([[np.nan, 0.0]]))
    with np.load(file) as held:
        assert len(held["keys"]) == 12


def test_rounding_is_not_stale(tmp_path, capsys):
    made = values(tmp_path)
    shifted(cached(tmp_path), 1e-5)
    assert values(tmp_path) == pytest.approx(made + 1e-5, abs=1e-12)
    assert "largest difference 1e-05 nats" in capsys.readouterr().out


def test_all_ranks_agree_on_a_stale_cache(ranks, tmp_path):
    made = ranks.run(values_of_a_rank, str(tmp_path))
    shifted(cached(tmp_path), 0.5)
    again = ranks.run(values_of_a_rank, str(tmp_path))
    assert made[0] == made[1] == again[0] == again[1]


def values_of_a_rank(folder: str) -> list:
    root = Path(folder)
    with one_rank() as world:
        if world.is_main and not (root / "pairs").exists():
            store_of(random_pairs(12), root / "pairs")
        world.barrier()
        return make_engine(world, tiny_config(root / "runs"), open_store(root / "pairs")).ref_train.tolist()


def test_a_pass_that_is_stopped_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference, "MIN_SLICE", 4)
    whole = values(tmp_path / "whole")
    passes = []

    def stopped(*arguments, **named):
        if len(passes) == 2:
            raise Stopped
        passes.append(named)
        return run(*arguments, **named)

    run = step.reference_pass
    monkeypatch.setattr(step, "reference_pass", stopped)
    with pytest.raises(Stopped):
        values(tmp_path / "cut")
    monkeypatch.setattr(step, "reference_pass", run)
    capsys.readouterr()
    assert (values(tmp_path / "cut") == whole).all()
    assert "reference: 8 of 12 pairs from the cache" in capsys.readouterr().out


def test_two_that_add_at_once_lose_nothing(tmp_path):
    code = (
        "import sys, numpy as np; from pathlib import Path; from dpo_kit.engine import reference\n"
        "ready = Path(sys.argv[1] + sys.argv[2]); ready.touch()\n"
        "while len(list(ready.parent.glob('a[01]'))) < 2: pass\n"
        "for i in range(100):\n"
        "    keys = np.full((1, 16), i, np.uint8); keys[0, 0] = int(sys.argv[2])\n"
        "    reference.add(Path(sys.argv[1]), keys, np.full((1, 2), float(sys.argv[2])))\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a"), str(i)]) for i in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    keys = np.repeat(np.arange(100, dtype=np.uint8)[:, None], 16, 1)
    for i in range(2):
        keys[:, 0] = i
        got, found = reference.lookup(tmp_path / "a", keys)
        assert found.all()
        assert (got == i).all()


def test_a_flipped_byte_is_no_value(tmp_path):
    made = values(tmp_path)
    file = cached(tmp_path)
    keys = reference.pair_keys(open_store(tmp_path / "pairs"))
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        got, found = reference.lookup(file.parent, keys)
        assert (got[found] == made[found]).all(), at
