"""One value at a time: whether it fits its field, and how an error says so.

Values arrive from YAML, from the shell and from papermill, which hands `5e-6`, `null` and `[1, 2]` over as
strings. A string is therefore read as what it spells (`scalars`) whenever its field is not text.

Deliberately not here: the tree, and anything that looks at two fields.
"""

from __future__ import annotations

import contextlib
import math
import os
from types import NoneType
from typing import Any, get_args, get_origin

from dpo_kit.config import hints
from dpo_kit.config.scalars import decimal, is_empty, is_null, parse_scalar, readings, underflows
from dpo_kit.errors import ConfigError


class BadValue(ValueError):
    """One value that does not fit its field; the text follows `field = value`."""


def show(value: Any) -> str:
    """A value as the user would write it in YAML, on one line and not longer than 80 characters."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def native(value: Any) -> Any:
    """numpy scalars as Python numbers, paths as text; anything else unchanged."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def coerce(value: Any, hint: Any, rule: dict[str, Any], interpolated: bool = False) -> Any:
    """The value as its field's type.

    Args:
        value: what was given.
        hint: the field's type hint, e.g. `int | None`.
        rule: what `schema.rule` recorded.
        interpolated: the value came out of `${...}`, so that a number may become text.

    Raises:
        BadValue: it cannot be, with what is allowed.
    """
    value = native(value)
    if get_origin(hint) is list:
        return _texts(value, rule)
    kinds = set(get_args(hint) or (hint,))
    if is_null(value):
        if NoneType in kinds or hint is Any:
            return None
        home = " (the home folder is ~/)" if value == "~" and str in kinds else ""
        raise BadValue(f"is empty (null, ~ and None mean nothing); give {_allowed(kinds, rule)}{home}")
    if hint is Any:
        return value
    if value == "" and NoneType in kinds and rule.get("blank", True):
        return None
    if kinds - {NoneType} == {str}:
        return _text(value, rule, interpolated)
    if "words" in rule and value in rule["words"]:
        return value
    if not isinstance(value, str):
        return _number(value, value, kinds, rule)
    if bool not in kinds and decimal(value) is None:
        _refuse_odd(value, kinds, rule)
    return _number(parse_scalar(value), value, kinds, rule)


def _texts(value: Any, rule: dict[str, Any]) -> list[str]:
    """A list of texts, given as a list or as the text that spells one: `[a, b]`, `a,b`, or one text alone."""
    allowed = "a list of texts" + (f" ({rule['why']})" if "why" in rule else "")
    if is_null(value):
        raise BadValue(f"is empty (null, ~ and None mean nothing); give {allowed}, or []")
    items = spelled_list(value)
    if not isinstance(items, list | tuple):
        raise BadValue(f"is {_kind(items)}; give {allowed}")
    out = []
    for item in items:
        try:
            out.append(_text(item, {}, False))
        except BadValue as error:
            raise BadValue(f"holds {show(item)}, which {error}; give {allowed}") from None
    return out


def spelled_list(value: Any) -> Any:
    """The list that a text spells, in brackets or not: `[a, b]`, `a,b`, `a`. What is no text stays what it is."""
    if not isinstance(value, str) or not value.strip():
        return [] if isinstance(value, str) else value
    is_bare = not value.lstrip().startswith("[")
    return parse_scalar(f"[{value}]" if is_bare else value)


def _refuse_odd(text: str, kinds: set[type], rule: dict[str, Any]) -> None:
    """Raises for a text that somebody may take for a number and that is no plain decimal."""
    if underflows(text):
        raise BadValue(f"is so small that it would be read as 0; give {_allowed(kinds, rule)}")
    fitting = []
    for number in (found := readings(text)):
        with contextlib.suppress(BadValue):
            _number(number, text, kinds, rule)
            fitting.append(repr(number))
    if found:
        told = f"write {' or '.join(fitting)}" if fitting else f"give {_allowed(kinds, rule)}"
        raise BadValue(f"is no plain decimal number; {told}")


def _text(value: Any, rule: dict[str, Any], interpolated: bool) -> str:
    alias = rule.get("alias", {})
    key = value.lower() if isinstance(value, str) else value
    # 1 == True in Python: only a real boolean may use the alias of a boolean.
    if isinstance(key, str | bool) and key in alias:
        value = alias[key]
    if interpolated and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise BadValue(
            f"is {_kind(value)}, not text; put it in quotes (an override, and papermill -r, take it as it is)"
        )
    if not value.strip():
        raise BadValue(f"is empty; give {_allowed({str}, rule)}")
    if not value.isprintable():
        raise BadValue("has control characters; leave them out")
    choices = rule.get("choices")
    if choices and value not in choices:
        why = f" ({rule['why']})" if "why" in rule else ""
        raise BadValue(f"is not one of {', '.join(choices)}{why}{hints.choice(value, rule)}")
    return value


def _number(number: Any, given: Any, kinds: set[type], rule: dict[str, Any]) -> Any:
    wrong = BadValue(f"is {_kind(given)}; give {_allowed(kinds, rule)}")
    if not isinstance(number, int | float) or isinstance(number, bool) != (bool in kinds):
        raise wrong
    if bool in kinds:
        return number
    if isinstance(number, float) and not math.isfinite(number):
        raise BadValue(f"is not a finite number; give {_allowed(kinds, rule)}")
    try:
        result: int | float = float(number) if float in kinds else int(number)
    except OverflowError:
        raise wrong from None
    if result != number:
        raise wrong
    outside = (
        ("gt" in rule and not result > rule["gt"])
        or ("ge" in rule and not result >= rule["ge"])
        or ("lt" in rule and not result < rule["lt"])
        or ("le" in rule and not result <= rule["le"])
    )
    if outside:
        raise BadValue(f"is out of range; give {_allowed(kinds, rule)}")
    return result


def _kind(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict):
        return "a section"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def _allowed(kinds: set[type], rule: dict[str, Any]) -> str:
    """What a field takes, in words: `a number greater than 0 and less than 0.5`."""
    if NoneType in kinds:
        return f"{_allowed(kinds - {NoneType}, rule)} or null"
    if "choices" in rule:
        return "one of " + ", ".join(rule["choices"])
    if kinds == {str}:
        return "a text"
    if bool in kinds:
        return " or ".join(["true or false", *rule.get("words", ())])
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    bounds = [f"{words[key]} {rule[key]}" for key in words if key in rule]
    noun = "a number" if float in kinds else "a whole number"
    text = " ".join([noun, " and ".join(bounds)]).strip()
    if "words" in rule:
        text += " or " + " or ".join(rule["words"])
    return text + (f" ({rule['why']})" if "why" in rule else "")


def read_list(name: str, value: Any, kind: type) -> list:
    """A notebook's list parameter (`betas`, `loss_types`, ...) as a list of numbers or texts.

    Args:
        name: the parameter, for the error.
        value: a list, a single value, or a string that spells a YAML list; what says nothing is an empty list.
        kind: `int`, `float` or `str`: the type of every element.

    Raises:
        ConfigError: an element is of another type.
    """
    if is_empty(value):
        return []
    if isinstance(value, str) and (value.lstrip().startswith("[") or "," in value):
        value = spelled_list(value)
    items = list(value) if isinstance(value, list | tuple) else [value]
    out, problems = [], []
    for item in items:
        try:
            out.append(coerce(item, kind, {}))
        except BadValue as error:
            problems.append(f"{name} = {show(value)}: {show(item)} {error}")
    if problems:
        raise ConfigError(problems)
    return out
