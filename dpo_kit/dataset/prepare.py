"""What comes before the ranks: `python -m dpo_kit.dataset.prepare RUN_DIR`, started by the supervisor.

Makes the built-in models that the run names, checks that they are whole, fit their tokenizer and each other, and hold
numbers; builds the pair stores, compares all of it with the checkpoint that the run would go on from, and leaves the
stores' folders in `data.json` and their fingerprints in `manifest.json`. A process of its own, so that it can be ended
at any moment: what it writes is whole or not there.

Exit status: 0 done, 2 a user's mistake, 1 anything else; the cause stands in `logs/prepare.error.json`.

Deliberately not here: how pairs are built (`builder`), what is wrong with a folder (model), what may go on from
a checkpoint (records/resuming).
"""

from __future__ import annotations

import atexit
import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_kit import config as config_module
from dpo_kit.config import Config, paths
from dpo_kit.dataset import inspection, tokens
from dpo_kit.errors import ConfigError, ExitStatus, UserError
from dpo_kit.model import builtin, model_folder
from dpo_kit.preferences import PairStore
from dpo_kit.records import findings, manifest, resuming, status
from dpo_kit.records.facts import read_facts
from dpo_kit.records.findings import Finding
from dpo_kit.system import processes
from dpo_kit.system.files import atomic_write, remembered, to_json

_WORTH_TELLING_S = 2.0


def prepare(run_dir: Path) -> None:
    """Does all of it; see the module."""
    config = config_module.load(run_dir / "config.yaml")
    ready = all(model_folder.cached(path) for path in _models(config) if path in model_folder.NAMES)
    status.write_progress(run_dir, phase="convert model", expected_s=1.0 if ready else None)
    make_models(config)
    status.write_progress(run_dir, phase="build pairs")
    stores = build_pairs(
        config,
        lambda done, total: status.write_progress(run_dir, phase="build pairs", done=done, total=total),
    )
    report(stores)
    check_lengths(config, stores)
    check_values(config, _percent(run_dir))  # after the data, so that bad data leave nothing behind
    run = read_facts(run_dir, config)
    if problem := resuming.refusal(run, config, fingerprints(config, stores) if run.at else None):
        raise UserError(problem)
    before = [found for found in findings.read(run_dir) if run.at and found.name in findings.OF_RANKS]
    findings.write(run_dir, [*_inspect(config, stores), *before])
    data = {split: None if store is None else str(store.path) for split, store in stores.items()}
    atomic_write(run_dir / "data.json", to_json(data, indent=1))
    made = {
        split: {
            "store": str(store.path),
            "fingerprint": store.fingerprint,
            "num_pairs": len(store),
            "layout": store.meta["layout"],
        }
        for split, store in stores.items()
        if store is not None
    }
    manifest.update(run_dir, data=made)


def _models(config: Config) -> list[str]:
    return list(dict.fromkeys([config.actor.path, config.ref.path, config.tokenizer_path]))


def make_models(config: Config) -> None:
    """Makes the built-in models that a configuration names; checks that all are whole and fit their tokenizer.

    Raises:
        UserError: they do not, or cannot be made.
    """
    for path in _models(config):
        builtin.ensure(path, functools.partial(print, flush=True))
    check_models(config)
    check_tokenizers(config)


def build_pairs(config: Config, progress: Callable[[int, int | None], None] | None = None) -> dict[str, Any]:
    """The pair stores by split: `train`, and `valid` (None without a valid_dataset)."""
    from dpo_kit.dataset import builder

    stores: dict[str, Any] = {"train": builder.build(config, "train", progress), "valid": None}
    if config.valid_dataset is not None:
        stores["valid"] = builder.build(config, "valid", progress)
    return stores


def report(stores: dict[str, Any]) -> None:
    """Prints what became of the rows of each split."""
    from dpo_kit.dataset.report import format_report

    print(format_report(stores["train"]), flush=True)
    if stores["valid"] is not None:
        print(format_report(stores["valid"], stores["train"]), flush=True)


def content(config: Config) -> dict[str, Any]:
    """Fingerprints of what a configuration names, as `differences.refused` takes them; all that is needed is made.

    Raises:
        UserError: models or data cannot be used.
    """
    make_models(config)
    return fingerprints(config, build_pairs(config))


def fingerprints(config: Config, stores: dict[str, Any]) -> dict[str, Any]:
    """`content` of pair stores that are built."""
    known = model_folder.known_hashes(config.cluster.fileroot)
    return {
        **{split: None if store is None else store.fingerprint for split, store in stores.items()},
        "weights": {
            name: model_folder.fingerprint(builtin.ensure(path), known)
            for name, path in (("actor", config.actor.path), ("ref", config.ref.path))
        },
    }


def _inspect(config: Config, stores: dict[str, Any]) -> Iterator[Finding]:
    """The checks that every run makes; for a reader of its figures."""
    made = model_folder.read_config(builtin.folder(config.actor.path))
    yield from inspection.settings(config, made)
    yield from inspection.pairs(stores["train"], stores["valid"])
    train, paths = stores["train"], (config.tokenizer_path, config.actor.path)

    def look() -> list[dict[str, Any]]:
        used, own = (tokens.load_tokenizer(path)[1] for path in paths)
        return [asdict(found) for found in inspection.texts(train, used, own)]

    marks = [train.fingerprint, train.meta["layout"], train.tokenizer_path]
    marks += [tokens.facts(config, path)["fingerprint"] for path in paths]
    known = model_folder.known_checks(config.cluster.fileroot)
    for found in remembered(known, f"texts {' '.join(marks)}", look):
        yield Finding(**found)


def check_models(config: Config) -> None:
    """Refuses policy and reference where transformers would not load them cleanly; their values are not read.

    Raises:
        ConfigError: with every problem.
    """
    problems = []
    for field, path in _weights(config).items():
        try:
            made = _model(config, path)
        except UserError as error:
            problems.append(f"{field}: {error}")
            continue
        if field == "actor.path" and config.actor.use_lora:
            problems += _targets(config, made["linear_layers"])
    if problems:
        raise ConfigError(problems)


def _targets(config: Config, layers: list[str]) -> list[str]:
    """What is wrong with the adapters' targets, which are layers of the policy."""
    from dpo_kit.model import lora

    adapters = lora.options(config)
    assert adapters is not None
    wrong = lora.problem(adapters.targets, layers)
    return [wrong] if wrong else []


def _model(config: Config, path: str) -> dict[str, Any]:
    """`rows` of a model's embedding and its `positions`, None where it does not say; names of its `linear_layers`.

    Raises:
        UserError: transformers would not load it cleanly.
    """
    folder = str(builtin.folder(path))
    stamp, known = model_folder.stamp(folder), model_folder.known_checks(config.cluster.fileroot)
    return remembered(known, f"model {stamp}", functools.partial(_checked, folder, stamp))


@functools.lru_cache
def _checked(folder: str, stamp: str) -> dict[str, Any]:
    from dpo_kit.model import lora, pair_model

    layers = lora.linear_layers(pair_model.check(Path(folder)))
    made = pair_model.text_config(Path(folder))
    sizes = {"rows": getattr(made, "vocab_size", None), "positions": pair_model.positions(made)}
    return {**sizes, "linear_layers": layers}


def check_tokenizers(config: Config) -> None:
    """The reference scores the policy's tokens, so both models must read the same ids and have a row for each.

    Raises:
        ConfigError: their vocabularies differ, or are larger than an embedding.
    """
    own, other = (tokens.facts(config, path) for path in (config.tokenizer_path, config.ref.path))
    if own["vocabulary"] != other["vocabulary"]:

        def vocabulary(path: str) -> dict[str, int]:
            return tokens.load_tokenizer(path)[1].get_vocab()

        raise ConfigError(tokens.vocabulary_problems(config, vocabulary))
    token, number = own["last"]
    problems = []
    for field, path in _weights(config).items():
        rows = _model(config, path)["rows"]
        if rows is not None and number >= rows:
            problems.append(
                f"tokenizer_path = {config.tokenizer_path!r} has token ids up to {number} ({token!r}), and the"
                f" embedding of {field} = {path!r} has {rows} rows; use the tokenizer that the model was trained with,"
                f" or a model that was enlarged (resize_token_embeddings({number + 1}))"
            )
    if problems:
        raise ConfigError(problems)


def check_values(config: Config, progress: model_folder.Progress = lambda done, total: None) -> None:
    """Refuses weights that are not finite numbers; the fingerprints that come of it are kept for the ranks.

    Raises:
        ConfigError: file and tensor are named.
    """
    known = model_folder.known_hashes(config.cluster.fileroot)
    for field, path in _weights(config).items():
        try:
            model_folder.fingerprint(builtin.ensure(path), known, progress)
        except UserError as error:
            raise ConfigError([f"{field}: {error}"]) from None


def check_lengths(config: Config, stores: dict[str, PairStore | None]) -> None:
    """Refuses texts that are longer than a model has positions: it was never trained there.

    Args:
        stores: by split, `train` and `valid`.

    Raises:
        ConfigError: with the longest text's tokens, the positions, and what to set.
    """
    problems = []
    for field, path in _weights(config).items():
        most = _model(config, path)["positions"]
        for split, store in stores.items():
            longest = 0 if store is None else int(store.all_lengths()[:, 1:].max())
            if most is not None and longest > most:
                problems.append(
                    f"{split}_dataset: the longest text has {longest} tokens, and {field} = {path!r} has {most}"
                    f" positions; use {_limit(config, split)}.max_length={most}, which leaves longer texts out"
                )
    if problems:
        raise ConfigError(problems)


def _limit(config: Config, split: str) -> str:
    """The section whose `max_length` a split obeys."""
    taken = config.valid_dataset is not None and config.valid_dataset.from_train is not None
    return "train_dataset" if split == "train" or taken else f"{split}_dataset"


def _weights(config: Config) -> dict[str, str]:
    """The fields that name weights, each path once."""
    return {name: path for name, path in paths.named_models(config).items() if name != "tokenizer_path"}


def _percent(run_dir: Path) -> model_folder.Progress:
    started_at, told = time.monotonic(), 0

    def count(done: int, total: int) -> None:
        nonlocal told
        if 100 * done // total > told and time.monotonic() - started_at > _WORTH_TELLING_S:
            told = 100 * done // total
            status.write_progress(run_dir, phase="load model", done=told, total=100)

    return count


def main(run_dir: Path) -> int:
    """Prepares a run; its exit status."""
    try:
        prepare(run_dir)
    except Exception as error:
        status.write_rank_error(run_dir, "prepare", error)
        if isinstance(error, UserError):
            print(error, flush=True)
            return ExitStatus.MISTAKE
        traceback.print_exc()
        return ExitStatus.FAILED
    return ExitStatus.DONE


if __name__ == "__main__":
    processes.imported()
    code = main(Path(sys.argv[1]))
    atexit._run_exitfuncs()
    processes.leave(code)
