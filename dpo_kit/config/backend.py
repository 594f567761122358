"""`actor.backend`: how many ranks there are and what they share (`fsdp:d8p1t1`).

Deliberately not here: how many devices exist, and whether a size can be run (`checks`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dpo_kit.errors import ConfigError


@dataclass(frozen=True)
class Backend:
    """A parsed backend: `kind` and the sizes of the data (d), pipeline (p) and tensor (t) dimension.

    `explicit` is False when no size was written: every device is taken.
    """

    kind: str
    d: int = 1
    p: int = 1
    t: int = 1
    explicit: bool = True

    @property
    def world_size(self) -> int:
        """Number of ranks, d * p * t."""
        return self.d * self.p * self.t

    def __str__(self) -> str:
        return f"{self.kind}:d{self.d}p{self.p}t{self.t}" if self.explicit else self.kind


def parse_backend(text: str) -> Backend:
    """Read `fsdp` or `fsdp:dNpNtN`: the sizes in any order, each optional and 1 when left out.

    Raises:
        ConfigError: another kind, a size of 0, a size given twice, anything else behind the colon.
    """
    form = "write fsdp, or fsdp:dNpNtN with sizes of 1 or more, in any order, each optional (fsdp:d8p1t1)"
    kind, colon, sizes = text.strip().partition(":")
    if kind != "fsdp":
        raise ConfigError([f"backend {text!r}: {kind!r} is not a backend, only fsdp is; {form}"])
    if not colon:
        return Backend(kind, explicit=False)
    if not re.fullmatch(r"(?:[dpt][0-9]{1,9})+", sizes):
        raise ConfigError([f"backend {text!r}: {sizes!r} is not a list of sizes; {form}"])
    found: dict[str, int] = {}
    for letter, number in re.findall(r"([dpt])([0-9]+)", sizes):
        if letter in found:
            raise ConfigError([f"backend {text!r}: {letter} is given twice; {form}"])
        if number != str(int(number)):
            raise ConfigError(
                [f"backend {text!r}: {letter} = {number} has a leading zero; write {letter}{int(number)}"]
            )
        if int(number) < 1:
            raise ConfigError([f"backend {text!r}: {letter} = {number} leaves no rank; {form}"])
        found[letter] = int(number)
    return Backend(kind, d=found.get("d", 1), p=found.get("p", 1), t=found.get("t", 1))
