"""The parameters of a notebook as a configuration: one contract for every notebook.

papermill sets variables, a person edits them in the cell; both arrive here as one dict. Later wins: the
base file, sections, `overrides`, the short names. A params file given with `-f` arrives as its top-level
keys and means what it means to `load`.

Deliberately not here: how a notebook collects its variables (`dpo_kit.notebook`), and lists such as `betas`
(`values.read_list`).
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from typing import Any

from dpo_kit.config import schema
from dpo_kit.config.hints import known_key, nearest
from dpo_kit.config.load import configure, parse_override, read_params, set_dotted
from dpo_kit.config.paths import project_root
from dpo_kit.config.scalars import is_empty, parse_scalar
from dpo_kit.config.schema import Config
from dpo_kit.config.tree import plain_tree
from dpo_kit.config.values import show
from dpo_kit.errors import ConfigError

DEFAULT_PARAMS = "params/demo.yaml"

SHORT_NAMES = {
    "beta": "actor.beta",
    "loss_type": "actor.loss_type",
    "lr": "actor.optimizer.lr",
    "max_steps": "total_train_steps",
    "seed": "seed",
}


def parameter_names() -> list[str]:
    """Every name that the parameters cell of a notebook may hold."""
    return list(dict.fromkeys(["config", *SHORT_NAMES, "overrides", *schema.section_fields(Config)]))


def from_notebook(parameters: Mapping[str, Any], *, extra: Collection[str] = ()) -> tuple[Config, list[str]]:
    """The configuration that a notebook's parameters mean.

    What says nothing (`scalars.is_empty`) is as in the file. Where `actor` is given there is no file, and it is
    left out.

    Args:
        parameters: names and values, as papermill injected or a person wrote them.
        extra: names that the notebook reads itself (`betas`, ...); allowed, and not looked at.

    Returns:
        the configuration, and one line for each place that keys came from.

    Raises:
        ConfigError: an unknown name (the nearest is named), `config` beside `actor`, or anything that is
            wrong with the configuration itself.
    """
    root = project_root()
    problems = unknown_names(parameters, extra)
    known = (*parameter_names(), *schema.FOREIGN[""])
    given = {k: v for k, v in parameters.items() if k in known and not is_empty(v)}
    if "actor" in given and "config" in given:
        problems.append(
            f"config = {show(given['config'])} and actor are both given, and actor makes the parameters the whole "
            "configuration; leave out config, or change single keys with beta, lr, ... or overrides"
        )
    if problems:
        raise ConfigError(problems)
    keys = {k: v for k, v in given.items() if k not in (*SHORT_NAMES, "config", "overrides")}
    sections = plain_tree(keys, "parameters", problems)
    origin: dict[str, str] = {}
    if "actor" in given:
        left_out = [name for name in schema.section_fields(Config) if name not in given]
        base = f"the parameters ({', '.join(sections)})"
        if left_out:
            base += f"; left out, so the package defaults hold: {', '.join(left_out)}"
        tree = sections
    else:
        base = str(given.get("config", DEFAULT_PARAMS))
        tree = plain_tree(read_params(base, root), f"config {base!r}", problems)
        _lay_over(tree, sections, origin, problems)
    assignments = _overrides(given.get("overrides"), problems)
    _assign(tree, [(name, value, "overrides") for name, value in assignments], origin, problems)
    short = [(dotted, given[name], name) for name, dotted in SHORT_NAMES.items() if name in given]
    _assign(tree, short, origin, problems)
    try:
        config = configure(tree, (), root, problems)
    except ConfigError as error:
        if "actor" not in given or not any(" is missing; " in problem for problem in error.problems):
            raise
        remark = (
            "(actor is among the parameters, which makes them the whole configuration; to change single keys of "
            "a file use beta, lr, ... or overrides)"
        )
        raise ConfigError([*error.problems, remark]) from None
    return config, [f"configuration: {base}", *_provenance(config, origin)]


def unknown_names(parameters: Mapping[str, Any], extra: Collection[str] = ()) -> list[str]:
    """One line for each name that no parameters cell holds, with the way to what was meant."""
    names = [*parameter_names(), *extra]
    unknown = {
        str(name): value
        for name, value in parameters.items()
        if name not in names and name not in schema.FOREIGN[""] and not str(name).startswith("PAPERMILL_")
    }
    dotted = {name: value for name, value in unknown.items() if schema.lookup(name)}
    problems = [f"{name} is not a parameter of this notebook; {_meant(name, names)}"
                for name in unknown if name not in dotted]  # fmt: skip
    return [*problems, _into_overrides(dotted)] if dotted else problems


def _meant(name: str, names: list[str]) -> str:
    """The hint for a name that is neither a parameter nor a dotted key."""
    if "." in name:
        near = nearest(name, schema.field_names())
        return f"did you mean {near} in overrides?" if near else "dotted names go into overrides"
    key = known_key(name)
    short = {dotted: short for short, dotted in SHORT_NAMES.items()}
    near = short.get(key, key) if key else nearest(name, names)
    if near and near not in names:
        return f"did you mean {near} in overrides?"
    return f"did you mean {near}?" if near else f"parameters: {', '.join(names)}"


def _into_overrides(dotted: Mapping[str, Any]) -> str:
    """How to give dotted keys, which are no parameters, ready to be copied."""
    spelled = {name: value if isinstance(value, str) else show(value) for name, value in dotted.items()}
    short = [f"-p {s} {shlex.quote(spelled[d])}" for s, d in SHORT_NAMES.items() if d in spelled]
    short = [" ".join(short)] if len(short) == len(spelled) else []  # all of them, or the list alone
    text = str([f"{name}={value}" for name, value in spelled.items()])
    ways = [*short, "-p overrides " + (shlex.quote(text) if set(text) & set('"$`\\') else f'"{text}"')]
    what = "is not a parameter" if len(dotted) == 1 else "are not parameters"
    return f"{', '.join(dotted)} {what} of this notebook, dotted names go into overrides; give {' or '.join(ways)}"


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
