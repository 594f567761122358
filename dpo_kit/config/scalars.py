"""What a text spells: a number, nothing, or other YAML. One grammar for every door.

A number is a plain decimal: `8`, `+5`, `-0.5`, `.5`, `5.`, `5e-6`, `1E5`; blanks around it do not count. What else YAML
1.1, Python or C take for a number (`010`, `0x10`, `1:30`, `1_000`, digits of other scripts) stays text here, because
`010` is 8 to one reader and 10 to another; a field that wants a number then refuses it and says what to write.

papermill reads the YAML of -f, -y and the value of -p with readers of its own, and hands over the number that they
found: `-f` and `-y` make 8 of `010`, `-p` makes 10 of it. Nothing of that can be seen afterwards. A file that
`--config` takes holds no such number, and the first lines of a notebook print what arrived by -p.

Nothing is written `null`, as YAML's `~`, `Null` and `NULL` and Python's `None`.

Deliberately not here: what a field makes of it (`values`).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

_DECIMAL = re.compile(r"([-+]?(?:(?:0|[1-9][0-9]*)(\.[0-9]*)?|(\.[0-9]+)))([eE][-+]?[0-9]+)?")
_NOT_FINITE = frozenset(sign + word for sign in ("", "+", "-") for word in ("nan", "inf", "infinity"))
_NULLS = frozenset({"null", "Null", "NULL", "~", "None"})
_LONGEST_ODD = 100


def is_null(value: Any) -> bool:
    """Whether a value is nothing or the text for it."""
    return value is None or (isinstance(value, str) and value.strip() in _NULLS)


def is_empty(value: Any) -> bool:
    """Whether a notebook parameter or top-level key says nothing: nothing, "", {} or []."""
    if isinstance(value, str):
        return is_null(value) or not value.strip()
    return value is None or (isinstance(value, Mapping | list | tuple) and len(value) == 0)


def decimal(text: str) -> int | float | None:
    """The number that a plain decimal spells; None for any other text, and where a computer would read 0 instead."""
    found = _DECIMAL.fullmatch(text.strip())
    if not found:
        return None
    mantissa, *fraction_or_exponent = found.groups()
    if not any(fraction_or_exponent):
        try:
            return int(mantissa)
        except ValueError:  # more digits than Python reads
            pass
    number = float(found[0])
    return None if number == 0 and re.search("[1-9]", mantissa) else number


def underflows(text: str) -> bool:
    """Whether a text is a plain decimal so small that a computer reads 0."""
    return bool(_DECIMAL.fullmatch(text.strip())) and decimal(text) is None


def readings(text: str) -> list[int | float]:
    """The numbers that Python, C or YAML 1.1 take a text for that is no plain decimal."""
    text = text.strip()
    found: list[int | float] = []
    for read in (int, float, lambda t: int(t, 0), yaml.safe_load) if len(text) <= _LONGEST_ODD else ():
        with contextlib.suppress(ValueError, yaml.YAMLError, RecursionError):
            value = read(text)  # type: ignore[operator]
            if type(value) in (int, float) and math.isfinite(value):
                found.append(value)
    return list(dict.fromkeys(found))


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with plain decimals as the only numbers, dates as text (as papermill), no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                twice = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, twice, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        text = self.construct_scalar(node)
        if text.lower().lstrip("+-") in (".inf", ".nan"):
            return self.construct_yaml_float(node)
        number = decimal(text)
        return text if number is None else number


_INT, _FLOAT, _DATE = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _DATE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# What is a number to YAML 1.1 as well, so that a text field sees what papermill sees. `5e-6` is text to it (it wants
# `5.0e-6`), and a numeric field reads the text that is left over.
_WHOLE = r"[-+]?(?:0|[1-9][0-9]*)"
Loader.add_implicit_resolver(_INT, re.compile(_WHOLE + "$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        rf"(?:{_WHOLE}\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
for _tag in (_INT, _FLOAT):
    Loader.add_constructor(_tag, Loader.construct_number)


def parse_yaml(text: str) -> Any:
    """YAML text as plain Python values.

    Raises:
        yaml.YAMLError: the text is not YAML, or a mapping names a key twice.
    """
    return yaml.load(text, Loader=Loader)


def parse_scalar(text: str) -> Any:
    """What a string spells; the string itself when it spells nothing else."""
    number = decimal(text)
    if number is not None:
        return number
    if text.strip().lower() in _NOT_FINITE:
        return float(text)
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text
