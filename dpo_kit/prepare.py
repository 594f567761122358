"""What comes before the ranks: `python -m dpo_kit.prepare RUN_DIR`, started by the supervisor.

Makes the built-in models that the run names, checks that reference and policy share a tokenizer, builds the
pair stores, and leaves their folders in `data.json` and their fingerprints in `manifest.json`. A process of
its own, so that it can be ended at any moment: what it writes is whole or not there.

Exit status: 0 done, 2 a user's mistake, 1 anything else; the cause stands in `logs/prepare.error.json`.

Deliberately not here: how pairs are built (dataset), weights and their hashes (worker).
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpo_kit import builtin, findings, inspection, preflight, records
from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.errors import ConfigError, UserError
from dpo_kit.files import atomic_write, read_json, to_json
from dpo_kit.findings import Finding


def prepare(run_dir: Path) -> None:
    """Does all of it; see the module."""
    config = config_module.load(run_dir / "config.yaml")
    paths = list(dict.fromkeys([config.actor.path, config.ref.path, config.tokenizer_path]))
    ready = all(builtin.cached(path) for path in paths if path in builtin.NAMES)
    records.write_progress(run_dir, phase="convert model", expected_s=1.0 if ready else None)
    for path in paths:
        builtin.ensure(path, _say)
    check_tokenizers(config)
    records.write_progress(run_dir, phase="build pairs")
    stores = build_pairs(run_dir, config)
    findings.write(run_dir, _inspect(config, stores))
    data = {split: None if store is None else str(store.path) for split, store in stores.items()}
    atomic_write(run_dir / "data.json", to_json(data, indent=1))
    manifest = read_json(run_dir / "manifest.json", {})
    manifest["data"] = {
        split: {
            "store": str(store.path),
            "fingerprint": store.fingerprint,
            "num_pairs": len(store),
            "layout": store.meta["layout"],
        }
        for split, store in stores.items()
        if store is not None
    }
    atomic_write(run_dir / "manifest.json", to_json(manifest, indent=2))


def build_pairs(run_dir: Path, config: Config) -> dict[str, Any]:
    """The pair stores by split: `train`, and `valid` (None without a valid_dataset)."""
    from dpo_kit import dataset

    stores: dict[str, Any] = {"train": None, "valid": None}
    for split in stores:
        if split == "train" or config.valid_dataset is not None:
            stores[split] = dataset.build(config, split, progress=_counter(run_dir))
            train = stores["train"] if split != "train" else None
            print(dataset.format_report(stores[split], train), flush=True)
    return stores


def _inspect(config: Config, stores: dict[str, Any]) -> Iterator[Finding]:
    """The checks that every run makes; for a reader of its figures."""
    folder = Path(builtin.ensure(config.actor.path))
    yield from inspection.settings(config, read_json(folder / "config.json", {}))
    yield from inspection.pairs(stores["train"], stores["valid"])
    own = builtin.load_tokenizer(config.actor.path) if config.tokenizer_path != config.actor.path else None
    tokenizer = builtin.load_tokenizer(stores["train"].tokenizer_path)
    yield from inspection.texts(stores["train"], tokenizer, own or tokenizer)


def check_tokenizers(config: Config) -> None:
    """The reference scores the policy's tokens, so both models must read the same ids.

    Raises:
        ConfigError: their vocabularies differ.
    """
    if config.ref.path == config.tokenizer_path:
        return
    from dpo_kit import dataset

    own = dataset.load_tokenizer(config.tokenizer_path)[1].get_vocab()
    other = dataset.load_tokenizer(config.ref.path)[1].get_vocab()
    if own != other:
        raise ConfigError([preflight.tokenizer_problem(config, own, other)])


def _counter(run_dir: Path) -> Callable[[int, int | None], None]:
    def count(done: int, total: int | None = None) -> None:
        records.write_progress(run_dir, phase="build pairs", done=done, total=total)

    return count


def _say(text: str) -> None:
    print(text, flush=True)


def main(run_dir: Path) -> int:
    """Prepares a run; its exit status."""
    try:
        prepare(run_dir)
    except Exception as error:
        records.write_rank_error(run_dir, "prepare", error)
        if isinstance(error, UserError):
            print(error, flush=True)
            return 2
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
