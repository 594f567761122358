"""What the checks of a run found: kept in its folder, and told wherever its figures are read.

    ok     fine
    look   it runs, and may not be what was meant
    bad    it fails or learns nothing; the text says why and what to do

`findings.json` holds those that are not `ok`. dataset/prepare writes it once the pairs are built, rank 0 adds what
only the models tell; progress, tables, notebooks and the model card read it.

Deliberately not here: the checks (dataset/inspection, tools/doctor, engine).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from dpo_kit.errors import UserError
from dpo_kit.system.files import atomic_write, read_json, to_json

# What ranks find, once: a run that goes on still rests on it.
OF_RANKS = ("first step", "preference")
_FILE = "findings.json"


@dataclass(frozen=True)
class Finding:
    """One line of what was found; `name` is the part of the run that it is about."""

    level: str
    name: str
    text: str
    detail: str = ""
    """What may quote the data, and therefore does not go into a model card."""

    def __str__(self) -> str:
        return f"{self.level}: {self.told}"

    @property
    def told(self) -> str:
        """Text and detail."""
        return self.text + (f"; {self.detail}" if self.detail else "")


def write(run_dir: Path, found: Iterable[Finding]) -> None:
    """Keeps what was found, instead of what an earlier attempt found."""
    kept = [asdict(finding) for finding in dict.fromkeys(found) if finding.level != "ok"]
    atomic_write(Path(run_dir) / _FILE, to_json(kept, indent=1))


def add(run_dir: Path, finding: Finding) -> None:
    """Keeps one more, once."""
    write(run_dir, [*read(run_dir), finding])


def read(run_dir: Path) -> list[Finding]:
    """What was found, `bad` first; nothing where no check has been made, or where the file is damaged."""
    try:
        kept = read_json(Path(run_dir) / _FILE, [])
        found = [Finding(*(str(f[name]) for name in ("level", "name", "text", "detail"))) for f in kept]
    except (UserError, TypeError, KeyError):
        return []
    return sorted(found, key=lambda finding: finding.level != "bad")
