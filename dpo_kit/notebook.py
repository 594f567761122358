"""What the notebooks call: collect parameters, look at data, show figures and a run's tables.

    from dpo_kit import launch, notebook as nb, plots
    settings = nb.begin(globals())        prints root, fileroot, provenance, live runs
    run = launch.start(settings); nb.wait(run)
    nb.show(plots.rewards(run)); nb.accuracy_table(run); nb.samples_table(run); nb.where(run)

Deliberately not here: the tables themselves (view/tables), charts (plots), training (launch), HTML details
(view/html).
"""

from __future__ import annotations

import ast
import contextlib
import re
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dpo_kit import config, dataset, launch, plots
from dpo_kit.config import Config
from dpo_kit.config.parameters import from_notebook, parameter_names, unknown_names
from dpo_kit.errors import ConfigError
from dpo_kit.model import builtin
from dpo_kit.preferences import PairStore
from dpo_kit.runs import Run
from dpo_kit.supervise import owner
from dpo_kit.view import html, tables
from dpo_kit.view.html import Html
from dpo_kit.view.tables import accuracy_table, reading, samples_table, steps_table, where

__all__ = [
    "SWEEP_NAMES",
    "accuracy_table",
    "begin",
    "build_pairs",
    "collect",
    "data_report",
    "guard_parameters",
    "pairs",
    "reading",
    "samples_table",
    "show",
    "steps_table",
    "wait",
    "where",
]

SWEEP_NAMES = ("betas", "loss_types", "lrs", "seeds")
_INJECTED = "# Parameters"  # papermill's first line of the cell that it puts after the parameters cell


# ---------------------------------------------------------------- the first cells


def guard_parameters() -> None:
    """From here on, a parameter whose name is no name of Python is refused in words; nothing outside IPython.

    papermill writes `-p actor.beta 0.3` as `actor.beta = 0.3` into its cell, which Python would end with
    an AttributeError before `begin` is reached.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None and _refuse_names not in shell.input_transformers_cleanup:
        shell.input_transformers_cleanup.append(_refuse_names)


def _refuse_names(lines: list[str]) -> list[str]:
    """An input transformer of IPython, which shows what it raises in place of running the cell."""
    given: dict[str, Any] = {}
    known = {*parameter_names(), *SWEEP_NAMES}
    for line in lines[1:] if lines and lines[0].strip() == _INJECTED else ():
        name, equals, text = line.rstrip().partition(" = ")
        # `plots.WIDTH = 900` is somebody's own line in such a cell.
        is_injected = re.fullmatch(r"\w+(?:[.-]\w+)+", name) and (name.split(".")[0] in known or "-" in name)
        if equals and is_injected:
            given[name] = text
            with contextlib.suppress(ValueError, SyntaxError):
                given[name] = ast.literal_eval(text)
    if problems := unknown_names(given, SWEEP_NAMES):
        raise ConfigError(problems)
    return lines


def begin(namespace: Mapping[str, Any], *, extra: Collection[str] = ()) -> Config:
    """Turns the notebook's parameters into a configuration and says where everything is and came from.

    Args:
        namespace: the notebook's `globals()`, or a plain dict of parameters.
        extra: names that this notebook reads itself (`SWEEP_NAMES`).

    Raises:
        ConfigError: a name in the parameters cell, or injected by papermill, that no notebook knows (the
            nearest one is named), or whatever is wrong with the configuration.
    """
    launch.check_alone()
    settings, provenance = from_notebook(collect(namespace, extra), extra=extra)
    print(f"project root: {config.project_root()}")
    print(f"runs go to:   {settings.cluster.fileroot}")
    for line in provenance:
        print(line)
    live = [f"  {_live_line(run)}" for run in launch.live(Path(settings.cluster.fileroot))]
    print("\n".join(["live runs:", *live]) if live else "live runs:    none", flush=True)
    return settings


def collect(namespace: Mapping[str, Any], extra: Collection[str] = ()) -> dict[str, Any]:
    """The parameters among a notebook's variables, unknown names of the parameters cells included.

    papermill only warns about a name that the parameters cell does not have and injects it all the same, so
    the names are read from the source of the cells: the last parameters cell that ran, and the cells that
    papermill put after it. Variables of other cells are nobody's business. A front end that keeps no history
    of its cells (nbval) leaves only the known names to be found.
    """
    cells = namespace.get("In")
    if not isinstance(cells, list):
        values = {k: v for k, v in namespace.items() if not k.startswith("_")}
        return {k: v for k, v in values.items() if not isinstance(v, ModuleType) and not callable(v)}
    known = {*parameter_names(), *extra}
    names: list[str] = []
    for source in reversed(cells):
        assigned = _assigned(source)
        if str(source).startswith(_INJECTED):
            names += assigned
        elif len(known & set(assigned)) >= 5:
            names += assigned
            break
    else:
        names = [*known]
    return {name: namespace[name] for name in dict.fromkeys(reversed(names)) if name in namespace}


def _assigned(source: str) -> list[str]:
    """Names that a cell assigns at its top level; none for a cell that is not plain Python."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return []
    targets: list[ast.expr] = []
    for node in body:
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, ast.AnnAssign):
            targets.append(node.target)
    return [t.id for t in targets if isinstance(t, ast.Name)]


def _live_line(run: Run) -> str:
    status = run.status
    age = _duration(time.time() - float(status.get("created_at") or time.time()))
    step, total = status.get("step") or 0, status.get("total_steps")
    where = f"step {step}" + (f" of {total}" if total else "")
    stop = f"dpo-kit runs stop {shlex.quote(str(run.dir))}"
    return f"{run.name}: {where}, started {age} ago; stop it with: {stop}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------- data


def build_pairs(settings: Config) -> tuple[PairStore, PairStore | None]:
    """The pair stores of a configuration, training and held-out, built unless they are there already.

    Prints a line now and then while it takes time, and each warning of the builder as one line.
    """
    train = _build(settings, "train")
    return train, None if settings.valid_dataset is None else _build(settings, "valid")


def _build(settings: Config, split: str) -> PairStore:
    with warnings.catch_warnings(record=True) as caught, _heartbeat(f"{split} pairs") as say:
        warnings.simplefilter("always")
        builtin.ensure(settings.tokenizer_path or settings.actor.path, progress=say)
        store = dataset.build(settings, split, lambda done, total: say(f"{done} of {total or '?'} rows"))
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            print(f"warning: {warning.message}", flush=True)
    return store


def data_report(train: PairStore, held_out: PairStore | None = None) -> Html:
    """What was kept, dropped, and is shared, of the training pairs and the held-out ones."""
    reports = [("Training pairs", dataset.format_report(train))]
    if held_out is not None:
        reports.append(("Held-out pairs", dataset.format_report(held_out, train)))
    return html.stack(*(html.card(title, html.preformatted(text)) for title, text in reports))


@contextlib.contextmanager
def _heartbeat(title: str, every_s: float = 3.0) -> Iterator[Callable[[str], None]]:
    """While the body runs, prints a line now and then: what was said last, and for how long it has taken."""
    over, said, begun = threading.Event(), ["working"], time.monotonic()

    def beat() -> None:
        while not over.wait(every_s):
            print(f"{title}: {said[-1]}, {time.monotonic() - begun:.0f} s", flush=True)

    thread = threading.Thread(target=beat, name=title, daemon=True)
    thread.start()
    try:
        yield said.append
    finally:
        over.set()
        thread.join()


def pairs(store: PairStore, count: int = 3, start: int = 0) -> Html:
    """Some pairs as text, the shared prefix (run once) set apart from what differs."""
    tokenizer = tables.tokenizer_of(store)
    shown = [_pair_card(store, i, tokenizer) for i in range(start, min(start + count, len(store)))]
    meanings = [
        ("shared by both, run once", html.SHARED),
        ("chosen", html.CHOSEN),
        ("rejected", html.REJECTED),
    ]
    return html.stack(html.legend(meanings), *shown)


def _pair_card(store: PairStore, i: int, tokenizer: Any) -> Html:
    pair = store.pair(i)
    prefix, chosen = _split_text(tokenizer, pair.chosen_ids, pair.shared)
    _, rejected = _split_text(tokenizer, pair.rejected_ids, pair.shared)
    prefix = prefix.lstrip("\n")
    left_out = len(prefix) - 1500
    if left_out > 0:
        prefix = f"({left_out} earlier characters) … {prefix[left_out:]}"
    counts = (
        f"row {pair.index}: {pair.shared} tokens shared, scored from token {pair.prompt}; "
        f"chosen {len(pair.chosen_ids) - pair.shared} and rejected {len(pair.rejected_ids) - pair.shared} more"
    )
    sides = html.columns(html.marked([(chosen, html.CHOSEN)]), html.marked([(rejected, html.REJECTED)]))
    return html.card(counts, html.marked([(prefix, html.SHARED)]), sides)


def _split_text(tokenizer: Any, ids: np.ndarray, boundary: int) -> tuple[str, str]:
    """Text before and after a token boundary; special tokens stay visible."""
    prefix = tokenizer.decode(ids[:boundary].tolist())
    whole = tokenizer.decode(ids.tolist())
    if whole.startswith(prefix):
        return prefix, whole[len(prefix) :]
    return prefix, tokenizer.decode(ids[boundary:].tolist())


def wait(run: Run) -> None:
    """Waits for the end of a run, showing progress (`run.wait`).

    Where nobody watches, the many lines of progress are replaced at the end by one a phase: they went to the
    log when they were news, and a reader of the saved notebook has no use for them.

    Raises:
        RunError: the run did not end `done`; then every line stays.
    """
    run.wait()
    if owner.in_notebook() and owner.is_headless():
        html.replace_output(tables.phases_table(run))


def show(figure: Any) -> None:
    """Displays a figure: interactive in a notebook, a picture in static viewers, one line elsewhere."""
    from IPython.display import display as show_bundle

    show_bundle(plots.mimebundle(figure), raw=True)
