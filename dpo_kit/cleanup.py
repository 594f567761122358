"""What takes room below a `cluster.fileroot` and how it is freed: checkpoints of runs, shared caches.

Everything is shown with its size first and removed only when told so. What runs that are live may need is left alone.
Not here: removing whole runs (`runs.remove`).
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from dpo_kit import commit, locks
from dpo_kit.display import plain_table
from dpo_kit.errors import UserError
from dpo_kit.files import read_json
from dpo_kit.room import size_of, size_text
from dpo_kit.runs import Run


@dataclass(frozen=True)
class Item:
    """A folder that could go."""

    path: Path
    name: str
    size: int
    about: str = ""


def spare_checkpoints(runs: list[Run], keep: int) -> list[Item]:
    """Checkpoints of ended runs beyond the newest `keep` whole ones, as `commit.retain` would remove them."""
    found = []
    for run in runs:
        if run.is_live or locks.lock_owner(run.dir):
            continue
        whole = 0
        for step in reversed(run.checkpoints()):
            folder = run.dir / "checkpoints" / f"step-{step}"
            if whole >= keep:
                found.append(Item(folder, f"{run.name} step-{step}", size_of(folder)))
            elif not commit.damage(folder):
                whole += 1
    return found


def cache_items(fileroot: Path) -> list[Item]:
    """Pair stores and reference caches that the runs below a root share."""
    root = Path(fileroot) / ".cache"
    found = []
    for kind in ("pairs", "reference"):
        folders = [f for f in (root / kind).glob("*") if f.is_dir() and f.name[0] not in ".~"]
        for folder in sorted(folders, key=lambda f: f.stat().st_mtime):
            meta = read_json(folder / "meta.json", {}) if kind == "pairs" else {}
            source = ((meta or {}).get("source") or {}).get("path", "")
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(folder.stat().st_mtime))
            found.append(Item(folder, f"{kind}/{folder.name}", size_of(folder), f"{used}  {source}"))
    return found


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
    for item in items:
        if item.path.name.startswith("step-"):
            commit.discard(item.path)
        else:
            shutil.rmtree(item.path)
    print(f"removed {size_text(sum(item.size for item in items))}", flush=True)
    return True


def table(items: list[Item]) -> str:
    """Names, sizes and what is known of each, with the sum."""
    rows = [[item.name, size_text(item.size), item.about] for item in items]
    rows.append(["together", size_text(sum(item.size for item in items)), ""])
    return plain_table(["", "size", ""], rows)
