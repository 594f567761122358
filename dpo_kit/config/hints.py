"""What somebody may have meant: the nearest key, the choice that another trainer calls otherwise.

Deliberately not here: what is wrong (`values`, `tree`, `load`), and the names themselves (`foreign_names`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from dpo_kit.config import foreign_names, schema


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like a word, upper and lower case alike; None when nothing is close."""
    by_lower = {c.lower(): c for c in candidates}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def _known(name: str, names: dict[str, str]) -> str | None:
    return names.get(name.lower().removeprefix("torch.").replace("-", "_").replace(" ", "_"))


def known_key(name: str) -> str | None:
    """The dotted key of what other trainers call by another name."""
    return _known(name, foreign_names.KEYS)


def choice(value: str, rule: dict[str, Any]) -> str:
    """What to say about a text that is none of a field's choices: `; did you mean ipo?`, or nothing."""
    accepted = [*rule["choices"], *(a for a in rule.get("alias", {}) if isinstance(a, str))]
    told = _known(value, rule.get("elsewhere", {})) or nearest(value, accepted)
    if told is None:
        return ""
    told = rule.get("alias", {}).get(told, told)
    return f"; did you mean {told}?" if told in rule["choices"] else f"; {told}"


def unknown_key(name: str, siblings: Iterable[str]) -> str:
    """The error line for a key that does not exist, naming the nearest one that does.

    Args:
        name: the dotted key as given.
        siblings: the keys that its section knows.
    """
    section, _, leaf = name.rpartition(".")
    if remark := _known(leaf, foreign_names.REMARKS):
        return f"{name} is not a known key; {remark}"
    siblings = list(siblings)
    near = nearest(leaf, siblings)
    same = [k for k in schema.field_names() if k.rpartition(".")[2] == leaf.lower()]
    same.sort(key=lambda key: key.startswith("ref."))  # what is set is the policy's, nearly always
    if best := known_key(leaf):
        pass
    elif near and (not same or difflib.SequenceMatcher(None, near, leaf).ratio() > 0.8):
        best = f"{section}.{near}" if section else near
    else:
        best = same[0] if same else nearest(name, schema.field_names())
    place = section or "the top level"
    known = f"known keys of {place}: {', '.join(siblings)}"
    return f"{name} is not a known key; " + (f"did you mean {best}?" if best else known)
