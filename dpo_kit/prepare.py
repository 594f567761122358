"""What comes before the ranks: `python -m dpo_kit.prepare RUN_DIR`, started by the supervisor.

Makes the built-in models that the run names, checks that reference and policy share a tokenizer, builds the
pair stores, compares all of it with the checkpoint that the run would go on from, and leaves the stores' folders in
`data.json` and their fingerprints in `manifest.json`. A process of its own, so that it can be ended at any moment:
what it writes is whole or not there.

Exit status: 0 done, 2 a user's mistake, 1 anything else; the cause stands in `logs/prepare.error.json`.

Deliberately not here: how pairs are built (dataset), what may go on from a checkpoint (resuming).
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_kit import builtin, preflight, records, resuming
from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.errors import ConfigError, UserError
from dpo_kit.files import atomic_write, read_json, to_json


def prepare(run_dir: Path) -> None:
    """Does all of it; see the module."""
    config = config_module.load(run_dir / "config.yaml")
    ready = all(builtin.cached(path) for path in _models(config) if path in builtin.NAMES)
    records.write_progress(run_dir, phase="convert model", expected_s=1.0 if ready else None)
    make_models(config)
    records.write_progress(run_dir, phase="build pairs")
    stores = build_pairs(config, _counter(run_dir))
    report(stores)
    at = resuming.point(run_dir)
    if at and (problem := resuming.refusal(run_dir, at, config, fingerprints(config, stores))):
        raise UserError(problem)
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


def _models(config: Config) -> list[str]:
    return list(dict.fromkeys([config.actor.path, config.ref.path, config.tokenizer_path]))


def make_models(config: Config) -> None:
    """Makes the built-in models that a configuration names, and checks that they share a tokenizer.

    Raises:
        UserError: they do not, or cannot be made.
    """
    for path in _models(config):
        builtin.ensure(path, _say)
    check_tokenizers(config)


def build_pairs(config: Config, progress: Callable[[int, int | None], None] | None = None) -> dict[str, Any]:
    """The pair stores by split: `train`, and `valid` (None without a valid_dataset)."""
    from dpo_kit import dataset

    stores: dict[str, Any] = {"train": dataset.build(config, "train", progress), "valid": None}
    if config.valid_dataset is not None:
        stores["valid"] = dataset.build(config, "valid", progress)
    return stores


def report(stores: dict[str, Any]) -> None:
    """Prints what became of the rows of each split."""
    from dpo_kit import dataset

    print(dataset.format_report(stores["train"]), flush=True)
    if stores["valid"] is not None:
        print(dataset.format_report(stores["valid"], stores["train"]), flush=True)


def content(config: Config) -> dict[str, Any]:
    """Fingerprints of what a configuration names, as `identity.refused` takes them; all that is needed is made.

    Raises:
        UserError: models or data cannot be used.
    """
    make_models(config)
    return fingerprints(config, build_pairs(config))


def fingerprints(config: Config, stores: dict[str, Any]) -> dict[str, Any]:
    """`content` of pair stores that are built."""
    from dpo_kit import model

    known = Path(config.cluster.fileroot) / ".cache" / "fingerprints.json"
    return {
        **{split: None if store is None else store.fingerprint for split, store in stores.items()},
        "weights": {
            name: model.fingerprint(builtin.ensure(path), known)
            for name, path in (("actor", config.actor.path), ("ref", config.ref.path))
        },
    }


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
