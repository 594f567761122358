"""`budget.json`: the tokens of a micro-batch that a run settled on, and every halving since. No torch.

    {"actor": 2048, "ref": 4096, "source": {"actor": "estimated", "ref": "estimated"},
     "asked": {"actor": "auto", "ref": "auto"}, "longest_pair": 913, "largest": {"actor": 4051, "ref": 4096},
     "halvings": [{"section": "actor", "from": 4096, "to": 2048, "step": 3, "rank": 1, "error": "..."}],
     "config_sha256": "..."}

The ranks write it when they have settled (engine/token_budget); after one of them ran out of memory the supervisor
halves and starts them again. Micro-batching does not change a step's result, so the numbers are the machine's matter
and `config.yaml` keeps what the user asked for. Not here: settling and measuring (engine/token_budget), processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_kit.system.files import atomic_write, read_json, sha256, to_json

MOST_HALVINGS = 3
SECTIONS = ("actor", "ref")


def read(run_dir: Path) -> dict[str, Any]:
    """The budget of a run; empty before the ranks settled, and when `config.yaml` has changed since."""
    made = read_json(Path(run_dir) / "budget.json", {})
    return made if made.get("config_sha256") == _config_hash(run_dir) else {}


def write(run_dir: Path, made: dict[str, Any]) -> None:
    """Writes the budget, with the mark of the configuration that it is for."""
    made = {**made, "config_sha256": _config_hash(run_dir)}
    atomic_write(Path(run_dir) / "budget.json", to_json(made, indent=1))


def _config_hash(run_dir: Path) -> str:
    try:
        return sha256(Path(run_dir) / "config.yaml")
    except FileNotFoundError:
        return ""


def overrides(run_dir: Path) -> list[str]:
    """What a command needs to use the numbers at hand: those that differ from what the configuration says."""
    made = read(run_dir)
    return [
        f"{section}.mb_spec.max_tokens_per_mb={made[section]}"
        for section in SECTIONS
        if made and made[section] != made["asked"][section]
    ]


def half(tokens: int, floor: int, largest: int | None = None) -> int:
    """The next budget to try: halved, and on until it splits the largest micro-batch that there is.

    Args:
        tokens: the budget that did not fit.
        floor: the longest pair; never less.
        largest: tokens of the largest micro-batch under that budget; a half above it would change nothing.
    """
    tokens //= 2
    while largest is not None and largest <= tokens > floor:
        tokens //= 2
    return max(floor, tokens)


def halve(
    run_dir: Path, *, section: str, rank: int, step: int | None, error: str, online: bool
) -> dict[str, Any] | None:
    """Halves the budget of a section on disk.

    Args:
        section: `actor`, or `ref` after the reference pass.
        rank: who ran out of memory.
        step: at which step; None before the first.
        error: what it said, in one line.
        online: a resident reference runs the policy's micro-batches: both numbers come down.

    Returns:
        The entry of `halvings`; None when the ranks had not settled yet or the longest pair alone is left.
    """
    made = read(run_dir)
    if not made:
        return None
    changed = SECTIONS if online else (section,)
    before = min(made[name] for name in changed)
    after = half(before, made["longest_pair"], made["largest"].get(section))
    if after >= before:
        return None
    entry = {"section": section, "from": before, "to": after, "step": step, "rank": rank, "error": error}
    made |= {name: min(after, made[name]) for name in changed}
    made["largest"] = {**made["largest"], section: after}
    made["halvings"] = [*made["halvings"], entry]
    write(run_dir, made)
    return entry
