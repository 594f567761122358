"""Dotted assignments over a tree: `actor.beta=0.2`, `trial_name=001`, `valid_dataset=null`.

Deliberately not here: types and ranges, which the walk over the whole tree checks afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType
from typing import Any, get_args

import yaml

from dpo_kit.config import schema
from dpo_kit.config.hints import unknown_key
from dpo_kit.config.scalars import is_null, parse_scalar, parse_yaml
from dpo_kit.config.values import show

FORM = "write key=value with the dotted key, e.g. actor.beta=0.2"


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Set each override in the tree, in order, and return the problems, one line each.

    A value for a text field is taken literally, without YAML (`trial_name=no` stays `no`), except what means
    nothing (`null`, `~`, `None`) and `${...}`. Any other value is read as YAML. A mapping is merged into the
    section that it is for.

    Args:
        tree: plain dicts and values; changed in place.
        overrides: `a.b=value` strings (one string is one override).
    """
    problems = []
    for text in [overrides] if isinstance(overrides, str) else overrides:
        try:
            name, value = parse_override(text)
            set_dotted(tree, name, value)
        except ValueError as error:
            problems.append(str(error))
    return problems


def parse_override(text: str) -> tuple[str, Any]:
    """The dotted name and the value of one override.

    Raises:
        ValueError: it is no assignment, or its key does not exist.
    """
    if not isinstance(text, str):
        raise ValueError(f"override {show(text)} is not text; {FORM}")
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name or name[0] in "+~-" or not all(name.split(".")):
        raise ValueError(f"override {text!r} is not an assignment; {FORM}")
    hint = _hint(name)
    if hint is None or "${" in value or set(get_args(hint) or (hint,)) - {NoneType} == {str}:
        return name, (value if hint is not None or "${" in value else parse_scalar(value))
    if is_null(value):
        return name, None
    try:
        parsed = parse_yaml(value)
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"{name} = {show(value)} cannot be read: {problem}") from None
    if schema.section_type(hint) and not isinstance(parsed, dict | NoneType):
        raise ValueError(f"{name} = {show(value)} is not a section; give {name}.key=value, or null")
    return name, parsed


def _hint(name: str) -> Any:
    """The type hint of a dotted name, None for an ignored key of the seed's system.

    Raises:
        ValueError: there is no such key; names the nearest.
    """
    if schema.is_foreign(name):
        return None
    cls: type | None = schema.Config
    hint: Any = None
    parts = name.split(".")
    for i, part in enumerate(parts):
        here = ".".join(parts[: i + 1])
        if cls is None:
            raise ValueError(f"{here} is not a known key: {'.'.join(parts[:i])} is a value and not a section")
        known = schema.section_fields(cls)
        if part not in known:
            raise ValueError(unknown_key(here, known))
        hint = known[part][0]
        cls = schema.section_type(hint)
    return hint


def set_dotted(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set one dotted name in a tree of plain dicts, making the sections on the way; mappings are merged.

    Raises:
        ValueError: a section on the way is a reference such as `${train_dataset}`.
    """
    *sections, leaf = name.split(".")
    node = tree
    for i, part in enumerate(sections):
        inner = node.get(part)
        if isinstance(inner, str) and "${" in inner:
            here = ".".join(sections[: i + 1])
            raise ValueError(
                f"{name} cannot be set because {here} is the reference {inner}; spell {here} out, or change "
                "what it refers to"
            )
        if inner is not None and not isinstance(inner, dict):
            raise ValueError(
                f"{'.'.join(sections[: i + 1])} = {show(inner)} is not a section; give keys and values"
            )
        if inner is None:
            inner = node[part] = {}
        node = inner
    if isinstance(value, dict) and isinstance(node.get(leaf), dict | str):
        for key, inner in value.items():
            set_dotted(tree, f"{name}.{key}", inner)
    else:
        node[leaf] = value
