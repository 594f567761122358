"""Raw preference rows to a pair store, with a report: `build(config, "train")`.

The store lies in `<cluster.fileroot>/.cache/pairs/<key>/`. The key is made of everything that decides its
content: the rows, the tokenizer, `max_length`, `num_rows`, the split. A store that is there is used as it is;
anything changed gives another key. A store is written once the last row is checked, so that bad data leaves
nothing on disk.

A dataset that is split by `valid_dataset.from_train` goes by prompt: a hash of the seed and the prompt's text
decides, so rows with one prompt are never in both parts.

Deliberately not here: reading files (`rows.py`), what columns mean (`layouts.py`), which pairs are kept
(`pairing.py`), shuffling and batches, which are the engine's.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.dataset import tokens
from dpo_kit.dataset.pairing import IDENTICAL, TOO_LONG, UNUSABLE, Progress, Selection, collect
from dpo_kit.dataset.rows import Source, open_source
from dpo_kit.errors import DataError
from dpo_kit.model import builtin, model_folder
from dpo_kit.preferences import PairStore, open_store, write_store
from dpo_kit.system import machine

if TYPE_CHECKING:
    from dpo_kit.config import Config


BUILDER_VERSION = 1
"""Part of every key: raised when the same rows give another store."""
WARN_DROPPED_SHARE = 0.1
open = open_store


@dataclass(frozen=True)
class _Plan:
    """Which rows of which source become which store."""

    section: str
    """Config section, for messages."""
    source: Any
    """The dataset section that names the rows."""
    limits: Any
    """The dataset section that sets max_length and max_dropped_share."""
    model: str
    """The model that will read the pairs, for messages."""
    seed: int
    valid_share: float | None
    """Share of the prompts that is for validation, None where the source is not split."""
    is_valid: bool


def build(config: Config, split: str = "train", progress: Progress | None = None) -> PairStore:
    """The pair store of `train_dataset` (split "train") or `valid_dataset` ("valid"), built if need be.

    Args:
        config: a loaded configuration.
        split: "train" or "valid".
        progress: called with (rows done, rows in all or None) while rows are tokenized.

    Raises:
        DataError: data that cannot be used; one line with file, row, column and remedy. Nothing is written.
    """
    plan = _plan(config, split)
    rows = plan.source
    source = open_source(rows.path, name=rows.name, split=rows.split, section=plan.section)
    named = config.tokenizer_path or config.actor.path
    fingerprint = tokens.facts(config, named)["fingerprint"]
    key = _key(plan, source, fingerprint)
    folder = Path(config.cluster.fileroot) / ".cache" / "pairs" / key
    store = _reuse(folder)
    if store is not None:
        # The content is the same, its names may be others than when it was built.
        store.report.update(source=source.label, tokenizer=named)
        store.meta["tokenizer"]["path"] = builtin.ensure(named)
        _check_dropped(plan, store.report)
        return store
    label, tokenizer = tokens.load_tokenizer(named)
    arrays, report = collect(
        source,
        tokenizer,
        label,
        _selection(plan),
        progress or (lambda done, total: None),
        machine.nearest_folder(folder),
    )
    report["tokenizer"] = named
    _check_dropped(plan, report)
    meta = {
        "key": key,
        "builder_version": BUILDER_VERSION,
        "source": {"path": plan.source.path, "split": plan.source.split, "digest": source.digest},
        "tokenizer": {"path": label, "fingerprint": fingerprint},
        "layout": report["layout"],
        "report": report,
    }
    return write_store(folder, arrays, meta)


def _plan(config: Config, split: str) -> _Plan:
    train, valid = config.train_dataset, config.valid_dataset
    share = valid.from_train if valid is not None else None
    if split == "train":
        return _Plan("train_dataset", train, train, config.actor.path, config.seed, share, False)
    if split != "valid":
        raise DataError(f"split = {split!r}; use 'train' or 'valid'")
    if valid is None:
        raise DataError("valid_dataset is not set; give it a path, or from_train: 0.05")
    source = train if share is not None else valid
    return _Plan("valid_dataset", source, valid, config.actor.path, config.seed, share, is_valid=True)


def _key(plan: _Plan, source: Source, tokenizer_fingerprint: str) -> str:
    parts = {
        "builder": BUILDER_VERSION,
        "rows": source.digest,
        "num_rows": plan.source.num_rows,
        "tokenizer": tokenizer_fingerprint,
        "max_length": plan.limits.max_length,
    }
    if plan.limits.bad_rows != "strict":
        parts["bad_rows"] = plan.limits.bad_rows
    if plan.valid_share is not None:
        num_valid = plan.limits.num_rows if plan.is_valid else None
        parts |= {
            "share": plan.valid_share,
            "seed": plan.seed,
            "valid": plan.is_valid,
            "num_valid": num_valid,
        }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _reuse(folder: Path) -> PairStore | None:
    if not folder.exists():
        return None
    try:
        return open_store(folder)
    except DataError as error:
        warnings.warn(str(error).split(";")[0] + "; it is built again", UserWarning, stacklevel=3)
        return None


def _check_dropped(plan: _Plan, report: dict[str, Any]) -> None:
    """Nothing kept, or more dropped than allowed, is an error; over 10 % a warning."""
    dropped = sum(report["dropped"].values())
    rows = report["kept"] + dropped
    if not rows:
        raise DataError(_no_row(plan, report))
    reasons = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items() if count)
    reasons = reasons.replace(TOO_LONG, f"{TOO_LONG} = {report['max_length']} tokens")
    remedies = _remedies(plan, report)
    if not report["kept"]:
        commonest = max(remedies, key=lambda reason: report["dropped"][reason])
        raise DataError(
            f"{report['source']}: no pair is left: all {rows} rows were dropped ({reasons}); {remedies[commonest]}"
        )
    share = dropped / rows
    said = f"{dropped} of {rows} rows ({100 * share:.1f} %) of {report['source']} were dropped ({reasons})"
    if share > plan.limits.max_dropped_share:
        enough = math.ceil(share * 1000) / 1000
        raise DataError(
            f"{plan.section}.max_dropped_share = {plan.limits.max_dropped_share}, but {said}; "
            f"{', '.join(remedies.values())}, or raise {plan.section}.max_dropped_share to {enough}"
        )
    if share > WARN_DROPPED_SHARE:
        warnings.warn(f"{plan.section}: {said}", UserWarning, stacklevel=3)


def _no_row(plan: _Plan, report: dict[str, Any]) -> str:
    share = f"valid_dataset.from_train = {plan.valid_share} leaves no row for {plan.section} of {report['rows']} rows"
    if report.get("one_prompt"):
        one = f"all {report['rows']} rows have one prompt, which is never in both parts"
        return f"{share}: {one}; give valid_dataset.path in its place"
    return f"{share}; {'raise' if plan.is_valid else 'lower'} it, or give valid_dataset.path in its place"


def _remedies(plan: _Plan, report: dict[str, Any]) -> dict[str, str]:
    """What to do about the dropped rows, by the reason they were dropped for."""
    told = {
        IDENTICAL: "chosen and rejected must differ",
        TOO_LONG: _longer(plan, report),
        UNUSABLE: f"mend the unusable rows (the first: {next(iter(report['unusable_rows']), '')})",
    }
    return {reason: remedy for reason, remedy in told.items() if report["dropped"][reason]}


def _longer(plan: _Plan, report: dict[str, Any]) -> str:
    positions = _positions(plan.model)
    if positions and report["max_length"] >= positions:
        return f"shorten the texts: the model has {positions} positions"
    facts = []
    if needed := report.get("shortest_too_long"):
        facts.append(f"one of them has {needed} tokens")
    if positions:
        facts.append(f"the model has {positions} positions")
    return f"raise {plan.section}.max_length" + (f" ({'; '.join(facts)})" if facts else "")


def _positions(model: str) -> int | None:
    """How many positions a model has, where it is local and its config.json says so."""
    try:
        made = json.loads((model_folder.at_hand(model) / "config.json").read_text("utf-8"))
        found = made.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None


def _selection(plan: _Plan) -> Selection:
    def in_split(prompt_hash: bytes) -> bool:
        if plan.valid_share is None:
            return True
        digest = hashlib.blake2b(prompt_hash + str(plan.seed).encode(), digest_size=8).digest()
        is_valid = int.from_bytes(digest, "big") < plan.valid_share * 2**64
        return is_valid == plan.is_valid

    return Selection(
        plan.limits.max_length,
        plan.source.num_rows,
        section=plan.section,
        quarantine=plan.limits.bad_rows == "quarantine",
        in_split=in_split,
        num_in_split=plan.limits.num_rows if plan.is_valid else None,
    )
