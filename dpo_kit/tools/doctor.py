"""What is wrong with a run before it is started: `dpo-kit doctor --config X`, one line a check.

Levels are those of `findings`. The checks use the config's own models and its first rows, and leave nothing behind.
Not here: what a run costs (`estimate`), the checks that every run makes (dataset/inspection, launch/preflight, engine).
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_kit import dataset, launch
from dpo_kit.config import Config
from dpo_kit.dataset import inspection, prepare
from dpo_kit.dataset.pairing import UNUSABLE
from dpo_kit.engine import reference, state, step
from dpo_kit.engine.optimizer import make_optimizer
from dpo_kit.engine.state import Engine
from dpo_kit.errors import UserError
from dpo_kit.launch import preflight
from dpo_kit.loss_types import loss_at_reference
from dpo_kit.model import builtin, model_folder, parallel
from dpo_kit.preferences import PairStore
from dpo_kit.records.findings import Finding
from dpo_kit.records.status import one_line
from dpo_kit.supervise import fits

ROWS = 96
OVERFIT_PAIRS, OVERFIT_STEPS, OVERFIT_LR, LEARNED = 4, 8, 1e-4, 0.7
_SHOWN_TOKENS = 48


class _Report:
    def __init__(self, tell: Callable[[Finding], Any]):
        self.findings: list[Finding] = []
        self.tell = tell

    def add(self, name: str, text: str, level: str = "ok") -> None:
        self.findings.append(Finding(level, name, " ".join(text.split())))
        self.tell(self.findings[-1])

    def problems(self, name: str, fine: str, found: Iterable[Finding]) -> None:
        """Adds each finding under this name, or the fine line when there is none."""
        found = list(found)
        for finding in found:
            self.add(name, finding.told, finding.level)
        if not found:
            self.add(name, fine)


def line(finding: Finding) -> str:
    """A finding as a line of the report."""
    return f"{finding.level:<5} {finding.name:<11} {finding.text}"


def examine(config: Config, tell: Callable[[Finding], Any] = print) -> list[Finding]:
    """Checks a configuration on this machine.

    Args:
        config: loaded; not changed.
        tell: called with each finding as soon as it is there.
    """
    report = _Report(tell)
    config = _devices(config, report)
    fine = f"lr {config.actor.optimizer.lr:g}, beta {config.actor.beta:g}"
    report.problems("settings", fine, inspection.settings(config, _model_config(config)))
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


def _model_config(config: Config) -> dict[str, Any]:
    try:
        return model_folder.read_config(builtin.folder(config.actor.path))
    except UserError:
        return {}


def _places(config: Config, report: _Report) -> bool:
    """Models, tokenizers, memory, disk; whether models and data are there to be tried."""
    usable = True
    checks: tuple[tuple[str, str, Callable[[Config], object], bool], ...] = (
        ("models", f"{config.actor.path}; the reference reads the same tokens", preflight.check_models, True),
        ("memory", "weights, optimizer and the longest pair fit", fits.check_memory, False),
        ("disk", f"checkpoints and the model fit below {config.cluster.fileroot}", fits.check_disk, False),
        ("data files", config.train_dataset.path, preflight.check_data, True),
    )
    for name, fine, check, is_needed in checks:
        if not is_needed and fits.shape_of(config) is None:
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
    tried.actor.mb_spec.max_tokens_per_mb = tried.ref.mb_spec.max_tokens_per_mb = "auto"
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
    report.problems("data", f"{made['kept']} pairs of the first {made['rows']} rows", _rows(store, bad_rows))
    tokenizer = builtin.load_tokenizer(store.tokenizer_path)
    own = builtin.load_tokenizer(config.actor.path)
    fine = "responses end once, as the tokenizer ends them"
    report.problems("text", fine, inspection.texts(store, tokenizer, own))
    report.add("scored", marked(store, 0, tokenizer))
    return store


def _rows(store: PairStore, bad_rows: str) -> Iterable[Finding]:
    """What is found in every run, and the rows that a strict one would refuse."""
    made = store.report
    unusable = made["unusable_rows"]
    for finding in inspection.pairs(store, None):
        if not (unusable and bad_rows == "strict" and finding.name == inspection.DROPPED):
            yield finding
    if unusable and bad_rows == "strict":
        share = f"{made['dropped'][UNUSABLE]} of {made['rows']} rows"
        yield Finding("bad", inspection.DROPPED, f"{share} cannot be used; {unusable[0]}")


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
            engine = state.build(config, world, store)
            # What a run says of its cache is nobody's concern here.
            with contextlib.redirect_stdout(io.StringIO()):
                reference.prepare(engine, np.arange(len(store)))
            fine = "the reference does not prefer the rejected answers"
            report.problems("preference", fine, reference.swapped_columns(store, engine.ref_train))
            _steps(engine, report)
    except UserError as error:
        report.add("training", str(error), "bad")
    except Exception as error:  # this report is where it should be told, whatever it is
        report.add("training", one_line(error), "bad")


def _steps(engine: Engine, report: _Report) -> None:
    """One step as configured, then a few on four pairs."""
    config, options = engine.config, engine.config.actor.optimizer
    rows = np.arange(min(config.train_dataset.batch_size, len(engine.train), 8))
    before = {name: parallel.full_tensor(p).clone() for name, p in _watched(engine).items()}
    engine.policy.train()
    loss = _step(engine, make_optimizer(engine.policy, options), rows, options.lr)
    expected = loss_at_reference(config.actor.loss_type, config.actor.beta)
    close = abs(loss - expected) <= (1e-3 if config.actor.dtype != "bfloat16" else 3e-2) * max(1.0, expected)
    if engine.policy_is_reference:
        text = f"the first loss is {loss:.6f}, expected {expected:.6f}"
        is_off = config.actor.disable_dropout
        why = "policy and reference do not compute the same" if is_off else "dropout is on"
        report.add("first loss", text if close else f"{text}: {why}", "ok" if close else "bad")
    else:
        report.add("first loss", f"{loss:.6f}; the reference is another model")
    after = {name: parallel.full_tensor(p) for name, p in _watched(engine).items()}
    still = [name for name, value in before.items() if torch.equal(value, after[name])]
    if still:
        moved = len(before) - len(still)
        which = f"{moved} of {len(before)} weights" if moved else "no weight"
        why = f"frozen: {', '.join(still[:3])} ..." if options.lr else "the learning rate is 0"
        report.add("one step", f"{which} changed ({why})", "bad")
    else:
        report.add("one step", f"all {len(before)} weights changed")
    _overfit(engine, report)


def _watched(engine: Engine) -> dict[str, torch.nn.Parameter]:
    """Weights that the first step must change: all of them; of adapters B alone, for A follows when B has moved."""
    held = parallel.weights(engine.policy)
    return {name: p for name, p in held.items() if not engine.policy.adapted or ".lora_B." in name}


def _overfit(engine: Engine, report: _Report) -> None:
    rows = np.argsort(engine.train.all_lengths().sum(1), kind="stable")[:OVERFIT_PAIRS]
    options = engine.config.actor.optimizer
    optimizer, lr = make_optimizer(engine.policy, options), max(OVERFIT_LR, options.lr)
    losses = [_step(engine, optimizer, rows, lr) for _ in range(OVERFIT_STEPS)]
    text = f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {OVERFIT_STEPS} steps"
    text += f" on {len(rows)} pairs at lr {lr:g}"
    if losses[-1] <= LEARNED * losses[0]:
        report.add("overfit", text)
    else:
        report.add("overfit", f"{text}: it does not learn even these; look at the lines above", "bad")


def _step(engine: Engine, optimizer: torch.optim.Optimizer, rows: np.ndarray, lr: float) -> float:
    batches = list(step.micro_batches(engine, engine.train, rows, engine.max_tokens))
    sums, _, _ = step.train_step(engine, optimizer, batches, len(rows), lr)
    return float(sums[1]) / len(rows)
