"""A tree of keys against the schema: plain values, defaults, then one walk that checks every key.

Deliberately not here: files and overrides (`load`), and fields that contradict each other
(`checks`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from dpo_kit.config import schema
from dpo_kit.config.hints import nearest, unknown_key
from dpo_kit.config.scalars import is_empty, is_null, parse_scalar
from dpo_kit.config.schema import Config
from dpo_kit.config.values import BadValue, coerce, native, show
from dpo_kit.errors import ConfigError

MAX_NODES = 20_000  # a file of ours has about 100; YAML aliases can spell billions in ten lines


def plain_tree(tree: Any, source: str, problems: list[str]) -> dict[str, Any]:
    """A copy of a tree in plain dicts, lists and values; a section given as the text that spells it is read.

    Keys that are no text and values that are no configuration become problems and are left out.
    """
    if OmegaConf.is_config(tree):
        tree = OmegaConf.to_container(tree, resolve=False)
    if not isinstance(tree, Mapping):
        raise ConfigError([f"{source} holds {show(tree)}, not keys and values"])
    count = 0

    def copied(value: Any, name: str) -> Any:
        nonlocal count
        count += 1
        if count > MAX_NODES:
            raise ConfigError([f"{source} has more than {MAX_NODES} values, or refers to itself"])
        value = _spelled_section(name, native(value))
        if isinstance(value, Mapping):
            out = {}
            for key, inner in value.items():
                dotted = f"{name}.{key}" if name else str(key)
                if problem := _key_problem(key, dotted, name):
                    problems.append(problem)
                else:
                    out[key] = copied(inner, dotted)
            return out
        if isinstance(value, list | tuple):
            return [copied(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
        if value is None or isinstance(value, str | bool | int | float):
            return value
        problems.append(f"{name} = {show(value)} is a {type(value).__name__}; give a text, number or section")
        return None

    try:
        return copied(tree, "")
    except RecursionError:
        raise ConfigError([f"{source} refers to itself or is nested too deeply"]) from None


def _spelled_section(name: str, value: Any) -> Any:
    """papermill's -p hands a section over as text: `{beta: 0.2}`."""
    found = schema.lookup(name)
    if isinstance(value, str) and found and schema.section_type(found[0]):
        parsed = parse_scalar(value)
        return parsed if isinstance(parsed, dict) else value
    return value


def _key_problem(key: Any, dotted: str, section: str) -> str | None:
    at = f" in {section}" if section else ""
    if not isinstance(key, str):
        return f"{show(key)}{at} is not a known key; keys are text"
    if "." in key or not key:
        return f"{show(key)}{at} is not a known key; nest sections instead of writing a dotted key"
    return None


@dataclasses.dataclass
class Walk:
    """One pass over the tree: what is kept, what is wrong, what is ignored."""

    resolved: Resolved
    tree: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    bad: set[str] = dataclasses.field(default_factory=set)
    ignored: list[str] = dataclasses.field(default_factory=list)

    def wrong(self, name: str, problem: str) -> None:
        """Record a problem and that nothing more need be said about this key."""
        self.bad.add(name)
        self.problems.append(problem)


def check_tree(given: dict[str, Any]) -> Walk:
    """Fill in defaults, resolve references, then check and coerce every key.

    Args:
        given: plain values, from `plain_tree`.

    Returns:
        the walk, its `tree` complete except for the keys that are `bad`.
    """
    missing = [name for name in schema.REQUIRED_SECTIONS if is_empty(given.get(name))]
    given = {key: value for key, value in given.items() if key not in missing}
    defaults = dataclasses.asdict(Config())
    if isinstance(given.get("valid_dataset"), dict):
        defaults["valid_dataset"] = dataclasses.asdict(schema.ValidDatasetConfig())
    no_sections: dict[str, str] = {}
    walk = Walk(resolve(_over(defaults, given, "", no_sections)))
    for name in missing:
        walk.wrong(name, f"{name} is missing; {schema.REQUIRED_SECTIONS[name]}")
    for name, problem in no_sections.items():
        walk.wrong(name, problem)
    for name, problem in walk.resolved.problems.items():
        if foreign := schema.is_foreign(name):
            walk.ignored.append(foreign)
        else:
            walk.bad.add(name)
            walk.problems += [problem] if problem else []
    walk.tree = _check_section(Config, walk.resolved.tree, "", walk)
    return walk


def _over(
    default: dict[str, Any], given: dict[str, Any], prefix: str, problems: dict[str, str]
) -> dict[str, Any]:
    """The given keys over the defaults of a section.

    Unknown keys stay, for the walk to report. A top-level section set to null takes its defaults. What is
    no section where one belongs becomes a problem and leaves the defaults, to which others may refer.
    """
    out = dict(default)
    for key, value in given.items():
        name = prefix + key
        if not isinstance(default.get(key), dict):
            out[key] = value
        elif isinstance(value, dict):
            out[key] = _over(default[key], value, name + ".", problems)
        elif isinstance(value, str) and "${" in value:
            out[key] = value
        elif value is not None or prefix:
            problems[name] = f"{name} = {show(value)} is not a section; give it keys and values"
    return out


def _check_section(cls: type, given: dict[str, Any], prefix: str, walk: Walk) -> dict[str, Any]:
    """The coerced keys of one section; problems and ignored keys go into the walk."""
    known = schema.section_fields(cls)
    out: dict[str, Any] = {}
    for key, value in given.items():
        name = prefix + key
        if schema.is_foreign(name):
            _ignore(name, value, walk)
        elif key not in known:
            walk.wrong(name, unknown_key(name, known))
        elif inner := schema.section_type(known[key][0]):
            if isinstance(value, dict):
                out[key] = _check_section(inner, value, name + ".", walk)
            elif value is not None or key != "valid_dataset":
                walk.wrong(name, f"{name} = {show(value)} is not a section; give it keys and values")
        else:
            _check_field(name, value, known[key], out, walk)
    return out


def _check_field(
    name: str, value: Any, known: tuple[Any, dict[str, Any]], out: dict[str, Any], walk: Walk
) -> None:
    section, _, key = name.rpartition(".")
    if isinstance(value, str) and value == MISSING:
        if section in walk.bad:
            walk.bad.add(name)
        else:
            walk.wrong(name, f"{name} is missing; {known[1].get('missing', 'give it a value')}")
        return
    if name == "tokenizer_path" and is_empty(value):
        out[key] = ""  # `load` puts actor.path there
        return
    reference = walk.resolved.interpolated.get(name)
    hint, rule = known
    try:
        out[key] = coerce(value, hint, rule, interpolated=reference is not None)
    except BadValue as error:
        if reference is not None and reference[2:-1] in walk.bad:
            walk.bad.add(name)  # the field that it refers to was reported
        else:
            walk.wrong(name, f"{name} = {show(value)} {error}")


def _ignore(name: str, value: Any, walk: Walk) -> None:
    """A key of the seed's system: ignored, unless its value asks for something that is not done here."""
    fixed = schema.FOREIGN_FIXED.get(name)
    given = parse_scalar(value) if isinstance(value, str) else value
    if fixed and not is_null(given) and given is not fixed[0]:
        remedy = f"use {show(fixed[0])} or leave it out"
        walk.wrong(name, f"{name} = {show(value)} is not possible: {fixed[1]}; {remedy}")
    elif _not_finite(value):
        walk.wrong(name, f"{name} = {show(value)} holds a number that is not finite")
    else:
        walk.ignored.append(name)


def _not_finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_not_finite, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and not math.isfinite(value)


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
