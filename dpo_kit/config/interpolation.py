"""`${...}` in a whole tree: every reference replaced by what it means, every failure kept as one line.

OmegaConf does the work, so its whole language is there: `${actor.path}`, relative `${.path}`,
`run-${seed}`, `${oc.env:HOME}`.

Deliberately not here: types and known keys; the tree may hold anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from dpo_kit.config import schema
from dpo_kit.config.hints import nearest
from dpo_kit.config.values import show


@dataclass
class Resolved:
    """A tree without references.

    `interpolated` maps the dotted names that were references to their text, `problems` those that failed to
    their error line, which is empty where the missing thing itself is the problem.
    """

    tree: dict[str, Any]
    interpolated: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def resolve(tree: dict[str, Any]) -> Resolved:
    """Replace every reference of a plain tree; one that fails leaves its key out."""
    found = Resolved({})
    readable = _without_bad_grammar(tree, "", found)
    found.tree = _section(OmegaConf.create(readable), readable, "", found)
    for name in [name for name in found.problems if _repeats(name, found)]:
        found.problems[name] = ""
    return found


def _repeats(name: str, found: Resolved) -> bool:
    """Whether a reference fails only because what it points at failed, which is said there."""
    seen, at = set(), name
    while at not in seen:
        seen.add(at)
        at = found.interpolated.get(at, "")[2:-1]
    return found.interpolated.get(name, "")[2:-1] in found.problems and at != name


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _without_bad_grammar(value: Any, name: str, found: Resolved) -> Any:
    """The tree with unreadable references set to null: one of them would keep OmegaConf from reading any."""
    if isinstance(value, dict):
        return {k: _without_bad_grammar(v, f"{name}.{k}" if name else k, found) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_bad_grammar(v, f"{name}[{i}]", found) for i, v in enumerate(value)]
    if _is_reference(value):
        try:
            OmegaConf.create({"value": value})
        except OmegaConfBaseException as error:
            found.problems[name] = f"{name} = {show(value)} cannot be read: {_first_line(error)}"
            return None
    return value


def _section(node: Any, plain: dict[str, Any], prefix: str, found: Resolved) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in plain.items():
        name = prefix + key
        if name in found.problems:
            continue
        if isinstance(value, dict):
            out[key] = _section(node[key], value, name + ".", found)
        elif isinstance(value, list) or _is_reference(value):
            try:
                out[key] = _value(node, key)
            except InterpolationToMissingValueError:
                found.problems[name] = ""
            except (OmegaConfBaseException, RecursionError) as error:
                found.problems[name] = f"{name} = {show(value)} leads nowhere: {_first_line(error)}"
            if isinstance(value, str):
                found.interpolated[name] = value
        else:
            out[key] = value
    return out


def _value(node: Any, key: str) -> Any:
    value = node[key]
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return MISSING if value is None and OmegaConf.is_missing(node, key) else value


def _first_line(error: BaseException) -> str:
    """What OmegaConf says, without its trailing lines, and the nearest key where one is not found."""
    if isinstance(error, RecursionError):
        return "it refers to itself"
    text = str(error).strip().splitlines()[0]
    missing = re.search(r"Interpolation key '([^']*)' not found", text)
    if missing:
        near = nearest(missing[1], schema.field_names())
        return f"there is no {missing[1]}" + (f"; did you mean ${{{near}}}?" if near else "")
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", text).strip('"')
