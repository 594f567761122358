"""One value at a time: what a string spells, whether it fits its field, and how an error says so.

Values arrive from YAML, from the shell and from papermill, which hands `5e-6`, `null` and `[1, 2]` over as
strings. A string is therefore read as what it spells whenever its field is not text.

Deliberately not here: the tree, and anything that looks at two fields.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable
from types import NoneType
from typing import Any, get_args

import yaml

from dpo_kit.config import schema
from dpo_kit.errors import ConfigError

# What people write for a key that has another name here.
SYNONYMS = {
    "learning_rate": "actor.optimizer.lr",
    "max_steps": "total_train_steps",
    "num_train_epochs": "total_train_epochs",
    "epochs": "total_train_epochs",
    "model": "actor.path",
    "model_path": "actor.path",
    "dataset": "train_dataset",
}


class BadValue(ValueError):
    """One value that does not fit its field; the text follows `field = value`."""


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader that keeps dates as text, as papermill does, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 wants `5.0e-6`; the files are read exactly as papermill reads them, and a numeric field then
# reads the text that is left over.
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
_NOT_FINITE = frozenset(sign + word for sign in ("", "+", "-") for word in ("nan", "inf", "infinity"))


def parse_yaml(text: str) -> Any:
    """YAML text as plain Python values.

    Raises:
        yaml.YAMLError: the text is not YAML, or a mapping names a key twice.
    """
    return yaml.load(text, Loader=Loader)


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
    kinds = set(get_args(hint) or (hint,))
    if value is None or value == "null":
        if NoneType in kinds or hint is Any:
            return None
        raise BadValue(f"is empty; give {_allowed(kinds, rule)}")
    if hint is Any:
        return value
    if value == "" and NoneType in kinds and rule.get("blank", True):
        return None
    kinds.discard(NoneType)
    if kinds == {str}:
        return _text(value, rule, interpolated)
    if "words" in rule and value in rule["words"]:
        return value
    number = parse_scalar(value) if isinstance(value, str) else value
    return _number(number, value, kinds, rule)


def parse_scalar(text: str) -> Any:
    """What a string spells in YAML; the string itself when it spells nothing else."""
    if _EXPONENT.fullmatch(text.strip()) or text.strip().lower() in _NOT_FINITE:
        return float(text)
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a number of more digits than Python reads
        return text


def _text(value: Any, rule: dict[str, Any], interpolated: bool) -> str:
    alias = rule.get("alias", {})
    key = value.lower() if isinstance(value, str) else value
    # 1 == True in Python: only a real boolean may use the alias of a boolean.
    if isinstance(key, str | bool) and key in alias:
        value = alias[key]
    if interpolated and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and not value.strip():
        raise BadValue(f"is empty; give {_allowed({str}, rule)}")
    if isinstance(value, str) and not value.isprintable():
        raise BadValue("has control characters; leave them out")
    if not isinstance(value, str):
        raise BadValue(
            f"is {_kind(value)}, not text; put it in quotes (an override, and papermill -r, take it as it is)"
        )
    choices = rule.get("choices")
    if choices and value not in choices:
        near = nearest(value, [*choices, *(a for a in alias if isinstance(a, str))])
        raise BadValue(
            f"is not one of {', '.join(choices)}"
            + (f" ({rule['why']})" if "why" in rule else "")
            + (f"; did you mean {near}?" if near else "")
        )
    return value


def _number(number: Any, given: Any, kinds: set[type], rule: dict[str, Any]) -> Any:
    if bool in kinds:
        if isinstance(number, bool):
            return number
        raise BadValue(f"is {_kind(given)}; give {_allowed(kinds, rule)}")
    wrong = BadValue(f"is {_kind(given)}; give {_allowed(kinds, rule)}")
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise wrong
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
    kinds = kinds - {NoneType}
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


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like a word, upper and lower case alike; None when nothing is close."""
    by_lower = {c.lower(): c for c in candidates}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def unknown_key(name: str, siblings: Iterable[str]) -> str:
    """The error line for a key that does not exist, naming the nearest one that does.

    Args:
        name: the dotted key as given.
        siblings: the keys that its section knows.
    """
    section, _, leaf = name.rpartition(".")
    siblings = list(siblings)
    near = nearest(leaf, siblings)
    elsewhere = [k for k in schema.field_names() if k.rpartition(".")[2] == leaf.lower()]
    if near and (not elsewhere or difflib.SequenceMatcher(None, near, leaf).ratio() > 0.8):
        best: str | None = f"{section}.{near}" if section else near
    elif elsewhere:
        best = elsewhere[0]
    else:
        best = SYNONYMS.get(leaf.lower()) or nearest(name, schema.field_names())
    place = section or "the top level"
    known = f"known keys of {place}: {', '.join(siblings)}"
    return f"{name} is not a known key; " + (f"did you mean {best}?" if best else known)


def read_list(name: str, value: Any, kind: type) -> list:
    """A notebook's list parameter (`betas`, `loss_types`, ...) as a list of numbers or texts.

    Args:
        name: the parameter, for the error.
        value: a list, a single value, or a string that spells a YAML list or value; None is an empty list.
        kind: `int`, `float` or `str`: the type of every element.

    Raises:
        ConfigError: an element is of another type.
    """
    if isinstance(value, str) and (kind is not str or value.lstrip().startswith("[")):
        value = parse_scalar(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
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
