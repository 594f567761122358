"""What takes room below a `cluster.fileroot` and how it is freed: checkpoints of runs, shared caches.

Everything is shown with its size first and removed only when told so. What runs that are live may need is left alone.
Not here: removing whole runs (`runs.remove`).
"""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from dpo_kit.errors import UserError
from dpo_kit.records import lock, run_folder
from dpo_kit.runs import Run
from dpo_kit.system.files import read_json
from dpo_kit.system.folders import damage, discard, is_abandoned
from dpo_kit.system.machine import size_of, size_text
from dpo_kit.view.html import plain_table


@dataclass(frozen=True)
class Item:
    """A folder that could go."""

    path: Path
    name: str
    size: int
    about: str = ""
    run: Path | None = None  # whose it is


def spare_checkpoints(runs: list[Run], keep: int) -> list[Item]:
    """What ended runs could do without: checkpoints beyond the newest `keep` whole ones, what was left half-written,
    what earlier attempts of a trial had made. A run that is not done keeps one checkpoint: it is all that it has.
    """
    found = []
    for run in runs:
        if run.is_live or lock.lock_owner(run.dir):
            continue
        for path in [*run_folder.leftovers(run.dir), *sorted(run.dir.glob(f"{run_folder.EARLIER}/*"))]:
            found.append(Item(path, f"{run.name} {path.relative_to(run.dir)}", size_of(path), run=run.dir))
        whole, stay = 0, keep if run.state == "done" else max(1, keep)  # or it would have to start anew
        for step in reversed(run.checkpoints()):
            folder = run.dir / "checkpoints" / f"step-{step}"
            if whole >= stay:
                found.append(Item(folder, f"{run.name} step-{step}", size_of(folder), run=run.dir))
            elif not damage(folder):
                whole += 1
    return found


def cache_items(fileroot: Path) -> list[Item]:
    """Pair stores and reference caches that the runs below a root share."""
    root = Path(fileroot) / ".cache"
    found = []
    for kind in ("pairs", "reference"):
        folders = [
            f for f in (root / kind).glob("*") if f.is_dir() and (f.name[0] not in ".~" or is_abandoned(f))
        ]
        for folder in sorted(folders, key=lambda f: f.stat().st_mtime):
            source = _source(folder) if kind == "pairs" else ""
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(folder.stat().st_mtime))
            found.append(Item(folder, f"{kind}/{folder.name}", size_of(folder), f"{used}  {source}"))
    return found


def _source(folder: Path) -> str:
    """What a pair store says it was built from; a store that is damaged can go like any other."""
    try:
        return str(read_json(folder / "meta.json")["source"]["path"])
    except (UserError, TypeError, KeyError):
        return "damaged, or not finished"


def pick(items: list[Item], names: list[str], where: str) -> list[Item]:
    """The items of these names; all of them for none.

    Raises:
        UserError: there is no item of a name.
    """
    known = {item.name: item for item in items}
    for name in names:
        if name not in known:
            raise UserError(f"{where} has no {name!r}; it has {', '.join(known) or 'nothing'}")
    return [known[name] for name in names] if names else items


def remove(items: list[Item], *, yes: bool) -> bool:
    """Shows folders with their sizes, and removes them when told so; whether it did."""
    if not items:
        print("nothing to remove", flush=True)
        return True
    print(table(items), flush=True)
    if not yes:
        print("add --yes to remove them", flush=True)
        return False
    freed = 0
    for item in items:
        # The lock: a run that is resumed meanwhile reads its checkpoints.
        with lock.lock(item.run) if item.run else contextlib.nullcontext():
            if item.path.name.startswith("step-"):
                discard(item.path)
            else:
                shutil.rmtree(item.path, ignore_errors=True)
        if item.path.exists():
            raise UserError(f"{item.path} cannot be removed; {size_text(freed)} were, before it")
        freed += item.size
    print(f"removed {size_text(freed)}", flush=True)
    return True


def table(items: list[Item]) -> str:
    """Names, sizes and what is known of each, with the sum."""
    rows = [[item.name, size_text(item.size), item.about] for item in items]
    rows.append(["together", size_text(sum(item.size for item in items)), ""])
    return plain_table(["", "size", ""], rows)
