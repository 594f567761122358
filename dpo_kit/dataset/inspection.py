"""What a run's settings and pairs say about its figures: the checks that cost nothing and that every run makes.

Each check yields `Finding`s that are not `ok`; a run with none has nothing that a reader need know. Not here: checks
that need a model's weights (tools/doctor), refusals (launch/preflight, `builder`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_kit.config import Config
from dpo_kit.config.schema import ActorConfig
from dpo_kit.dataset.builder import WARN_DROPPED_SHARE
from dpo_kit.dataset.pairing import CONTRADICTORY, EMPTY, REPEATED, TOO_LONG, UNUSABLE
from dpo_kit.dataset.report import shared_prompts
from dpo_kit.preferences import PairStore
from dpo_kit.records.findings import Finding
from dpo_kit.system.text import listed

TEXTS_LOOKED_AT = 96  # pairs
_SAID = {
    EMPTY: "with an empty response: fill them in, or remove those rows",
    REPEATED: "that repeat an earlier one",
    CONTRADICTORY: "that contradict an earlier one (chosen and rejected swapped)",
}
DROPPED = "dropped"  # name of findings on rows that are left out


def settings(config: Config, model_config: Mapping[str, Any]) -> Iterator[Finding]:
    """What the configuration says about the figures.

    Args:
        config: loaded.
        model_config: the policy's `config.json`.
    """
    actor, train, valid = config.actor, config.train_dataset, config.valid_dataset
    whole = valid if valid is not None and valid.path == train.path and not valid.from_train else None
    if whole and (whole.split == train.split or Path(train.path).is_file()):  # a file has no splits
        text = f"valid_dataset is the training data ({train.path}): held-out figures mean nothing"
        yield Finding("bad", "held-out", f"{text}; use valid_dataset.path=null valid_dataset.from_train=0.05")
    if actor.optimizer.lr == 0:
        text = "actor.optimizer.lr = 0: no weight will change; use 5e-6 or another rate above 0"
        yield Finding("bad", "settings", text)
    given = {name: getattr(actor, name) for name in ("lora_rank", "lora_alpha", "target_modules")}
    own = ActorConfig()
    unused = ", ".join(
        f"actor.{name} = {value}" for name, value in given.items() if value != getattr(own, name)
    )
    if unused and not actor.use_lora:
        text = (
            f"{unused}: not used, all weights are trained (actor.use_lora = false); use actor.use_lora=true"
        )
        yield Finding("look", "settings", f"{text} to train adapters")
    dropout = {k: v for k, v in model_config.items() if "dropout" in k or k.endswith("pdrop")}
    where = ", ".join(f"{k} = {v:g}" for k, v in dropout.items() if isinstance(v, float) and v > 0)
    if not actor.disable_dropout and where:
        text = f"dropout is on (actor.disable_dropout=false, {where}): policy and reference differ from the start"
        yield Finding("look", "settings", f"{text}; use actor.disable_dropout=true")
    if actor.dtype != config.ref.dtype and actor.path == config.ref.path:
        text = f"actor.dtype = {actor.dtype} and ref.dtype = {config.ref.dtype} differ: before training, rewards and"
        text += " accuracy are rounding, and the first loss is not checked; use one dtype"
        yield Finding("look", "held-out", text)


def pairs(train: PairStore, valid: PairStore | None) -> Iterator[Finding]:
    """What was dropped, kept with doubt or left out while the pair stores were built, and what leaks between them."""
    for title, store in (("training", train), ("held-out", valid)):
        if store is not None:
            yield from _rows(title, store)
    if valid is not None and (count := shared_prompts(train, valid)):
        text = f"{count} of {len(valid)} held-out pairs have a prompt that is also in training"
        remedy = "held-out figures look better than they are; use valid_dataset.path=null valid_dataset.from_train=0.05"
        yield Finding("bad" if count == len(valid) else "look", "held-out", f"{text}: {remedy}")


def _rows(title: str, store: PairStore) -> Iterator[Finding]:
    made = store.report
    dropped = {reason: count for reason, count in made["dropped"].items() if count}
    rows = made["kept"] + sum(dropped.values())
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        reasons = reasons.replace(TOO_LONG, f"{TOO_LONG} = {made['max_length']} tokens")
        first = f"the first: {made['unusable_rows'][0]}" if dropped.get(UNUSABLE) else ""
        share = sum(dropped.values()) / rows
        level = "bad" if share > WARN_DROPPED_SHARE else "look"
        text = f"{sum(dropped.values())} of {rows} {title} rows are dropped ({reasons})"
        if dropped.get(TOO_LONG) == max(dropped.values()) and level == "bad":
            section = "train" if title == "training" else "valid"
            text += f"; a larger {section}_dataset.max_length keeps more"
        yield Finding(level, DROPPED if title == "training" else title, text, first)
    if count := len(made["unused_columns"]):
        columns = "columns" if count > 1 else "column"
        text = f"{count} {columns} of the {title} data {'are' if count > 1 else 'is'} not used"
        yield Finding("look", title, text, listed(made["unused_columns"]))
    for note in (EMPTY, REPEATED, CONTRADICTORY):
        if count := made["notes"].get(note):
            text = f"{count} of {made['kept']} {title} pairs {_SAID[note]}"
            is_bad = note == EMPTY and count > WARN_DROPPED_SHARE * made["kept"]
            yield Finding("bad" if is_bad else "look", title, text)


def texts(store: PairStore, tokenizer: Any, own: Any) -> Iterator[Finding]:
    """Whether responses end once, and as the policy's own tokenizer ends them.

    Args:
        store: its first `TEXTS_LOOKED_AT` pairs are looked at.
        tokenizer: that the pairs were made with.
        own: the policy's.
    """
    names = {name for name in (*tokenizer.all_special_tokens, *own.all_special_tokens) if name.strip()}
    looked_at = min(len(store), TEXTS_LOOKED_AT)
    ends = 0
    for i in range(looked_at):
        pair = store.pair(i)
        for ids in (pair.chosen_ids, pair.rejected_ids):
            text = tokenizer.decode(ids[:-1].tolist()).rstrip()
            ends += any(text.endswith(name) for name in names)
    if ends:
        text = f"{ends} of {2 * looked_at} responses end twice: an end token's name stands at the end of the text"
        remedy = "the kit adds the end token itself, so cut it from the data"
        yield Finding("bad", "training", f"{text}; {remedy}")
    if store.meta["layout"] == "conversation" and own.chat_template != tokenizer.chat_template:
        text = f"tokenizer_path = {store.tokenizer_path!r} has another chat template than actor.path"
        remedy = "leave tokenizer_path out, so that the policy's own is used"
        yield Finding("bad", "training", f"{text}; {remedy}")
