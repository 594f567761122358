"""The parameters of a notebook as a configuration: one contract for every notebook.

papermill sets variables, a person edits them in the cell; both arrive here as one dict. Later wins: the
base file, sections, `overrides`, the short names. A params file given with `-f` arrives as its top-level
keys and means what it means to `load`.

Deliberately not here: how a notebook collects its variables (`dpo_kit.notebook`), and lists such as `betas`
(`values.read_list`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dpo_kit.config import schema
from dpo_kit.config.load import configure, read_params, warn_ignored
from dpo_kit.config.overrides import parse_override, set_dotted
from dpo_kit.config.paths import project_root
from dpo_kit.config.schema import Config
from dpo_kit.config.tree import is_empty, plain_tree
from dpo_kit.config.values import nearest, parse_scalar, show
from dpo_kit.errors import ConfigError

DEFAULT_PARAMS = "params/demo.yaml"

SHORT_NAMES = {
    "beta": "actor.beta",
    "loss_type": "actor.loss_type",
    "lr": "actor.optimizer.lr",
    "max_steps": "total_train_steps",
    "seed": "seed",
}

_SYNONYMS = {"learning_rate": "lr", "steps": "max_steps", "total_steps": "max_steps", "override": "overrides"}


def parameter_names() -> list[str]:
    """Every name that the parameters cell of a notebook may hold."""
    return list(dict.fromkeys(["config", *SHORT_NAMES, "overrides", *schema.section_fields(Config)]))


def from_notebook(
    parameters: Mapping[str, Any], *, extra: Collection[str] = (), root: str | Path | None = None
) -> tuple[Config, list[str]]:
    """The configuration that a notebook's parameters mean.

    None, "", {}, [] and the text `null` say nothing: the value is the file's.

    Args:
        parameters: names and values, as papermill injected or a person wrote them.
        extra: names that the notebook reads itself (`betas`, ...); allowed, and not looked at.
        root: the project root, found from the working directory by default.

    Returns:
        the configuration, and one line for each place that keys came from.

    Raises:
        ConfigError: an unknown name (the nearest is named), `config` beside `actor`, or anything that is
            wrong with the configuration itself.
    """
    root = Path(root) if root is not None else project_root()
    problems = _unknown_names(parameters, extra)
    given = {
        k: v
        for k, v in parameters.items()
        if not is_empty(v) and k in (*parameter_names(), *schema.FOREIGN[""])
    }
    if "actor" in given and "config" in given:
        problems.append(
            f"config = {show(given['config'])} and actor are both given, and actor makes the parameters the whole "
            "configuration; leave out config, or change single keys with beta, lr, ... or overrides"
        )
    if problems:
        raise ConfigError(problems)
    sections = plain_tree(
        {k: v for k, v in given.items() if k not in (*SHORT_NAMES, "config", "overrides")},
        "parameters",
        problems,
    )
    origin: dict[str, str] = {}
    if "actor" in given:
        base = f"the parameters ({', '.join(sections)}); sections left out take the package defaults"
        tree = sections
    else:
        base = str(given.get("config", DEFAULT_PARAMS))
        tree = plain_tree(read_params(base, root), f"config {base!r}", problems)
        _lay_over(tree, sections, origin, problems)
    assignments = _overrides(given.get("overrides"), problems)
    _assign(tree, [(name, value, "overrides") for name, value in assignments], origin, problems)
    short = [(dotted, given[name], name) for name, dotted in SHORT_NAMES.items() if name in given]
    _assign(tree, short, origin, problems)
    config, ignored = _configure(tree, root, problems, whole="actor" in given)
    warn_ignored(ignored)
    return config, [f"configuration: {base}", *_provenance(config, origin)]


def _configure(
    tree: dict[str, Any], root: Path, problems: list[str], whole: bool
) -> tuple[Config, list[str]]:
    try:
        return configure(tree, (), root, problems)
    except ConfigError as error:
        missing = [p for p in error.problems if " is missing; " in p]
        if not whole or not missing:
            raise
        remark = (
            "(actor is among the parameters, which makes them the whole configuration; to change single keys of "
            "a file use beta, lr, ... or overrides)"
        )
        raise ConfigError([*error.problems, remark]) from None


def _unknown_names(parameters: Mapping[str, Any], extra: Collection[str]) -> list[str]:
    names = [*parameter_names(), *extra]
    problems = []
    for name in parameters:
        if name in names or name in schema.FOREIGN[""] or str(name).startswith("PAPERMILL_"):
            continue
        near = _SYNONYMS.get(str(name)) or nearest(str(name), names)
        if schema.lookup(str(name)):
            hint = f"give {name}=... in overrides"
        elif near:
            hint = f"did you mean {near}?"
        else:
            hint = f"parameters: {', '.join(names)}"
        problems.append(f"{name} is not a parameter of this notebook; {hint}")
    return problems


def _overrides(value: Any, problems: list[str]) -> list[tuple[str, Any]]:
    """The assignments in a list of overrides, or in the text that spells one."""
    if isinstance(value, str):
        spelled = parse_scalar(value) if value.lstrip().startswith("[") else None
        value = spelled if isinstance(spelled, list) else [value]
    if not is_empty(value) and not isinstance(value, list | tuple):
        problems.append(f"overrides = {show(value)} is not a list; give ['actor.beta=0.2', ...]")
        return []
    out = []
    for text in value or ():
        try:
            out.append(parse_override(text))
        except ValueError as error:
            problems.append(str(error))
    return out


def _assign(
    tree: dict[str, Any], assignments: list[tuple[str, Any, str]], origin: dict[str, str], problems: list[str]
) -> None:
    for dotted, value, name in assignments:
        try:
            set_dotted(tree, dotted, value)
            origin.pop(dotted, None)
            origin[dotted] = name
        except ValueError as error:
            problems.append(str(error))


def _lay_over(
    tree: dict[str, Any], sections: dict[str, Any], origin: dict[str, str], problems: list[str]
) -> None:
    """Merge the sections given as parameters over the base, key by key."""
    leaves = []

    def collect(value: Any, dotted: str, top: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                collect(inner, f"{dotted}.{key}", top)
        else:
            leaves.append((dotted, value, f"the parameter {top}"))

    for name, value in sections.items():
        collect(value, name, name)
    _assign(tree, leaves, origin, problems)


def _provenance(config: Config, origin: dict[str, str]) -> list[str]:
    lines = []
    for dotted, name in origin.items():
        node: Any = config
        for part in dotted.split("."):
            node = getattr(node, part, None)
        if found := schema.lookup(dotted):
            shown = "given" if schema.section_type(found[0]) and node else show(node)
            lines.append(f"{dotted} = {shown} (from {name})")
    return lines
