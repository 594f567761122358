"""What is wrong with a run before it is started: `dpo-kit doctor --config X`, one line a check.

    ok     fine
    look   it runs, and may not be what was meant
    bad    it fails or learns nothing; the line says why and what to do

The checks use the config's own models and its first rows, and leave nothing behind. Not here: what a run costs
(`estimate`), the checks themselves where a run makes them, too (`preflight`, `engine`).
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_kit import builtin, dataset, engine, folders, launch, loading, parallel, preflight, prepare
from dpo_kit.config import Config
from dpo_kit.errors import UserError
from dpo_kit.losses import loss_at_reference
from dpo_kit.pairing import CONTRADICTORY, EMPTY, REPEATED, UNUSABLE
from dpo_kit.preferences import PairStore
from dpo_kit.records import one_line

ROWS = 96
OVERFIT_PAIRS, OVERFIT_STEPS, OVERFIT_LR, LEARNED = 4, 8, 1e-4, 0.7
SWAPPED_P = 0.01
_SHOWN_TOKENS = 48


@dataclass(frozen=True)
class Finding:
    """One line of the report; `level` is `ok`, `look` or `bad`."""

    level: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<5} {self.name:<11} {self.text}"


class _Report:
    def __init__(self, tell: Callable[[Finding], Any]):
        self.findings: list[Finding] = []
        self.tell = tell

    def add(self, name: str, text: str, level: str = "ok") -> None:
        self.findings.append(Finding(level, name, " ".join(text.split())))
        self.tell(self.findings[-1])

    def problems(self, name: str, fine: str, found: Iterable[tuple[str, str]]) -> None:
        """Adds each (level, text), or the fine line when there is none."""
        found = list(found)
        for level, text in found:
            self.add(name, text, level)
        if not found:
            self.add(name, fine)


def examine(config: Config, tell: Callable[[Finding], Any] = print) -> list[Finding]:
    """Checks a configuration on this machine.

    Args:
        config: loaded; not changed.
        tell: called with each finding as soon as it is there.
    """
    report = _Report(tell)
    config = _devices(config, report)
    report.problems(
        "settings", f"lr {config.actor.optimizer.lr:g}, beta {config.actor.beta:g}", _settings(config)
    )
    usable = _places(config, report)
    with tempfile.TemporaryDirectory(prefix="dpo-kit-doctor-") as folder:
        tried = _small(config, Path(folder))
        store = _data(tried, report, config.train_dataset.bad_rows) if usable else None
        if store is None:
            report.add("training", "not tried: mend the lines above first", "look")
        else:
            _training(tried, store, report)
    return report.findings


# --- before anything is loaded --------------------------------------------------------------------------------


def _devices(config: Config, report: _Report) -> Config:
    said: list[str] = []
    try:
        resolved = launch.resolve_world(config, said.append)
    except UserError as error:
        report.add("devices", str(error), "bad")
        resolved = copy.deepcopy(config)
        resolved.cluster.n_gpus_per_node, resolved.scheduler.type = 0, "local"
        resolved.actor.backend = resolved.ref.backend = "fsdp:d1p1t1"
        return resolved
    report.add("devices", f"{said[-1]}; {config.actor.dtype}")
    return resolved


def _settings(config: Config) -> Iterable[tuple[str, str]]:
    train, valid = config.train_dataset, config.valid_dataset
    if valid is not None and valid.path == train.path and valid.split == train.split and not valid.from_train:
        yield "bad", f"valid_dataset is the training data ({train.path}): held-out figures would mean nothing"
    if config.actor.optimizer.lr == 0:
        yield "bad", "actor.optimizer.lr = 0: no weight will change; use 5e-6 or another rate above 0"
    if not config.actor.disable_dropout and (where := _dropout_of(config)):
        yield (
            "look",
            f"dropout is on (actor.disable_dropout=false, {where}): policy and reference then differ from the start;"
            " use actor.disable_dropout=true",
        )


def _dropout_of(config: Config) -> str:
    """Fields of the model's config that are dropout above 0."""
    try:
        made = folders.read_config(folders.snapshot(builtin.ensure(config.actor.path)))
    except UserError:
        return ""
    fields = {
        k: v for k, v in made.items() if ("dropout" in k or k.endswith("pdrop")) and isinstance(v, float)
    }
    return ", ".join(f"{name} = {value:g}" for name, value in fields.items() if value > 0)


def _places(config: Config, report: _Report) -> bool:
    """Models, tokenizers, memory, disk; whether models and data are there to be tried."""
    usable = True
    checks: tuple[tuple[str, str, Callable[[Config], object], bool], ...] = (
        ("models", f"{config.actor.path}; the reference reads the same tokens", preflight.check_models, True),
        ("memory", "weights, optimizer and the longest pair fit", preflight.check_memory, False),
        (
            "disk",
            f"checkpoints and the model fit below {config.cluster.fileroot}",
            preflight.check_disk,
            False,
        ),
        ("data files", config.train_dataset.path, preflight.check_data, True),
    )
    for name, fine, check, is_needed in checks:
        if not is_needed and not preflight.shape_is_known(config):
            report.add(name, "not known: the sizes of actor.path are not", "look")
            continue
        try:
            check(config)
            if name == "models":  # what is built in is made here: the sizes that follow are read from it
                prepare.check_models(config)
                prepare.check_tokenizers(config)
        except UserError as error:
            report.add(name, str(error), "bad")
            usable = usable and not is_needed
        else:
            report.add(name, fine)
    return usable


# --- data -----------------------------------------------------------------------------------------------------


def _small(config: Config, folder: Path) -> Config:
    """The config over its first rows, with one rank, everything it writes in `folder`."""
    tried = copy.deepcopy(config)
    rows = tried.train_dataset.num_rows or ROWS
    tried.train_dataset.num_rows, tried.valid_dataset = min(rows, ROWS), None
    tried.train_dataset.bad_rows, tried.train_dataset.max_dropped_share = "quarantine", 1.0
    tried.cluster.fileroot = str(folder)
    tried.actor.backend = tried.ref.backend = "fsdp:d1p1t1"
    tried.ref.first_step_check = "off"
    return tried


def _data(config: Config, report: _Report, bad_rows: str) -> PairStore | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            store = dataset.build(config)
        prepare.check_lengths(config, {"train": store})
    except UserError as error:
        report.add("data", str(error), "bad")
        return None
    made = store.report
    report.problems("data", f"{made['kept']} pairs of the first {made['rows']} rows", _rows(made, bad_rows))
    tokenizer = builtin.load_tokenizer(builtin.ensure(store.tokenizer_path))
    own = builtin.load_tokenizer(builtin.ensure(config.actor.path))
    report.problems("text", "responses end once, as the tokenizer ends them", _texts(store, tokenizer, own))
    report.add("scored", marked(store, 0, tokenizer))
    return store


def _rows(made: dict[str, Any], bad_rows: str) -> Iterable[tuple[str, str]]:
    dropped = {reason: count for reason, count in made["dropped"].items() if count}
    if sum(dropped.values()) > dataset.WARN_DROPPED_SHARE * made["rows"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        first = f"; {made['unusable_rows'][0]}" if made["unusable_rows"] else ""
        yield "bad", f"{sum(dropped.values())} of {made['rows']} rows are dropped ({reasons}){first}"
    elif made["unusable_rows"] and bad_rows == "strict":
        yield "bad", f"{dropped[UNUSABLE]} of {made['rows']} rows cannot be used; {made['unusable_rows'][0]}"
    if count := made["notes"].get(EMPTY):
        yield (
            "bad",
            f"{count} of {made['kept']} pairs have an empty response; remove those rows, or fill them in",
        )
    for note in (REPEATED, CONTRADICTORY):
        if count := made["notes"].get(note):
            yield "look", f"{count} of {made['kept']} pairs {note.removeprefix('kept that ')}"


def _texts(store: PairStore, tokenizer: Any, own: Any) -> Iterable[tuple[str, str]]:
    names = {name for name in (*tokenizer.all_special_tokens, *own.all_special_tokens) if name.strip()}
    ends = 0
    for i in range(len(store)):
        pair = store.pair(i)
        for ids in (pair.chosen_ids, pair.rejected_ids):
            text = tokenizer.decode(ids[:-1].tolist()).rstrip()
            ends += any(text.endswith(name) for name in names)
    if ends:
        yield (
            "bad",
            f"{ends} of {2 * len(store)} responses end twice: an end token's name stands at the end of the text; the"
            " kit adds the end token itself, so cut it from the data",
        )
    if store.meta["layout"] == "conversation" and own.chat_template != tokenizer.chat_template:
        yield (
            "bad",
            f"tokenizer_path = {store.tokenizer_path!r} has another chat template than actor.path; leave tokenizer_path"
            " out, so that the policy's own is used",
        )


def marked(store: PairStore, i: int, tokenizer: Any) -> str:
    """The end of a pair's texts, what is scored in brackets."""
    pair = store.pair(i)

    def tail(ids: np.ndarray) -> str:
        start = max(int(pair.prompt), 1)
        before = tokenizer.decode(ids[max(0, start - 12) : start].tolist())
        scored = ids[start:].tolist()
        more = " ..." if len(scored) > _SHOWN_TOKENS else ""
        return repr(f"{before}[{tokenizer.decode(scored[:_SHOWN_TOKENS])}{more}]")[1:-1]

    return f"row {pair.index}, scored in brackets: chosen {tail(pair.chosen_ids)}; rejected {tail(pair.rejected_ids)}"


# --- training -------------------------------------------------------------------------------------------------


def _training(config: Config, store: PairStore, report: _Report) -> None:
    on_cuda = bool(config.cluster.n_gpus_per_node)
    try:
        prepare.check_values(config)
        with parallel.alone(cuda=on_cuda) as world:
            torch.manual_seed(config.seed)
            policy = loading.load_policy(config, world, store, None)
            state = engine.Engine(config, world, policy, train=store, valid=None)
            # What a run says of its cache is nobody's concern here.
            with contextlib.redirect_stdout(io.StringIO()):
                loading.prepare_reference(state, Path(config.cluster.fileroot), np.arange(len(store)))
            report.problems(
                "preference", "the reference does not prefer the rejected answers", _preference(state)
            )
            _steps(state, report)
    except UserError as error:
        report.add("training", str(error), "bad")
    except Exception as error:  # this report is where it should be told, whatever it is
        report.add("training", one_line(error), "bad")


def _preference(state: engine.Engine) -> Iterable[tuple[str, str]]:
    """Swapped columns show where the untrained reference itself prefers what is called rejected."""
    if state.ref_train is None:
        return
    # Nats a token: the sum would follow the lengths.
    lengths = state.train.all_lengths()[:, 1:]
    prompts = np.array([[max(state.train.pair(i).prompt, 1)] for i in range(len(lengths))])
    values = state.ref_train.cpu().numpy() / np.maximum(lengths - prompts, 1)
    wins, num_pairs = int((values[:, 0] > values[:, 1]).sum()), len(values)
    chance = at_most(wins, num_pairs)
    if chance < SWAPPED_P:
        yield (
            "look",
            f"the reference finds the rejected answer likelier, token by token, in {num_pairs - wins} of {num_pairs}"
            f" pairs (by chance in {100 * chance:.2g} % of cases): are the columns chosen and rejected swapped?",
        )


def at_most(wins: int, tosses: int) -> float:
    """Probability of at most this many heads of a fair coin."""
    return sum(math.comb(tosses, k) for k in range(wins + 1)) / 2**tosses


def _steps(state: engine.Engine, report: _Report) -> None:
    """One step as configured, then a few on four pairs."""
    config = state.config
    rows = np.arange(min(config.train_dataset.batch_size, len(state.train), 8))
    before = {name: parallel.full_tensor(p).clone() for name, p in parallel.masters(state.policy).items()}
    state.policy.train()
    loss = _step(state, engine.make_optimizer(state), rows, config.actor.optimizer.lr)
    expected = loss_at_reference(config.actor.loss_type, config.actor.beta)
    close = abs(loss - expected) <= (1e-3 if config.actor.dtype != "bfloat16" else 3e-2) * max(1.0, expected)
    if state.policy_is_reference:
        text = f"the first loss is {loss:.6f}, expected {expected:.6f}"
        why = (
            "; dropout is on"
            if not config.actor.disable_dropout
            else "; policy and reference do not compute the same"
        )
        report.add("first loss", text if close else f"{text}: {why}", "ok" if close else "bad")
    else:
        report.add("first loss", f"{loss:.6f}; the reference is another model")
    after = {name: parallel.full_tensor(p) for name, p in parallel.masters(state.policy).items()}
    still = [name for name, value in before.items() if torch.equal(value, after[name])]
    if still:
        which = (
            "no weight"
            if len(still) == len(before)
            else f"{len(before) - len(still)} of {len(before)} weights"
        )
        why = (
            "the learning rate is 0"
            if config.actor.optimizer.lr == 0
            else f"frozen: {', '.join(still[:3])} ..."
        )
        report.add("one step", f"{which} changed ({why})", "bad")
    else:
        report.add("one step", f"all {len(before)} weights changed")
    _overfit(state, report)


def _overfit(state: engine.Engine, report: _Report) -> None:
    rows = np.argsort(state.train.all_lengths().sum(1), kind="stable")[:OVERFIT_PAIRS]
    optimizer, lr = engine.make_optimizer(state), max(OVERFIT_LR, state.config.actor.optimizer.lr)
    losses = [_step(state, optimizer, rows, lr) for _ in range(OVERFIT_STEPS)]
    text = (
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {OVERFIT_STEPS} steps on {len(rows)} pairs at lr {lr:g}"
    )
    if losses[-1] <= LEARNED * losses[0]:
        report.add("overfit", text)
    else:
        report.add("overfit", f"{text}: it does not learn even these; look at the lines above", "bad")


def _step(state: engine.Engine, optimizer: torch.optim.Optimizer, rows: np.ndarray, lr: float) -> float:
    batches = list(engine.micro_batches(state, state.train, rows, state.max_tokens))
    sums, _, _ = engine.train_step(state, optimizer, batches, len(rows), lr)
    return float(sums[1]) / len(rows)
