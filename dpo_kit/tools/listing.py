"""Runs as text: a table of all of them, the figures of one. No torch, no pandas."""

from __future__ import annotations

import time
from pathlib import Path

from dpo_kit.errors import UserError
from dpo_kit.records import findings, lock, manifest, metrics, resuming, run_folder
from dpo_kit.records.facts import read_facts
from dpo_kit.records.status import read_rank_errors, steps_text
from dpo_kit.runs import Run
from dpo_kit.system.machine import size_of, size_text
from dpo_kit.view import progress
from dpo_kit.view.html import plain_table


def list_table(fileroot: str | Path) -> str:
    """Every run under a root, newest first, as a text table."""
    rows = []
    for folder in reversed(run_folder.list_runs(Path(fileroot))):
        run = Run(folder)
        try:
            status = run.status
        except UserError as error:
            status = {"state": "unknown", "message": str(error)}
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.get("created_at") or 0))
        is_live = status["state"] in ("queued", "running")
        told = progress.describe(status) if is_live else status.get("message") or ""
        rows.append([run.name, status["state"], steps_text(status), created, told])
    if not rows:
        return f"no runs under {fileroot}"
    return plain_table(["run", "state", "step", "started", ""], rows)


def show_text(run: Run) -> str:
    """State, figures and places of one run."""
    status, made = run.status, manifest.read(run.dir)
    lines = [f"{run.name}", f"  state    {progress.describe(status)}", f"  step     {steps_text(status)}"]
    if last := metrics.last_record(run.dir):
        names = ("dpo/loss", "dpo/reward_accuracy")
        figures = [f"{name} {last[name]:.6g}" for name in names if last.get(name) is not None]
        lines.append(f"  last     step {last['step']}: {', '.join(figures)}")
    lines += [f"  {finding.level:<8} {finding.told}" for finding in findings.read(run.dir)]
    if parent := made.get("parent"):
        lines.append(f"  fork of  {manifest.fork_text(parent)}")
    if kept := run.checkpoints():
        lines.append(f"  goes on  from a checkpoint of step {', '.join(map(str, kept))}")
    lines += [f"  phase    {phase['name']}: {phase['seconds']:.1f} s" for phase in status.get("phases", [])]
    lines += [f"  error    {error['rank']}: {error['error']}" for error in read_rank_errors(run.dir)]
    if status.get("samples"):
        lines.append(f"  samples  {status['samples']}")
    if owner := lock.lock_owner(run.dir):
        lines.append(f"  process  supervisor {owner['pid']} on {owner['host']}; ranks {status.get('ranks')}")
        lines.append(f"  stop     {manifest.command('stop', run.dir)}")
    versions = made.get("versions", {})
    lines.append(f"  made by  {', '.join(f'{name} {version}' for name, version in versions.items())}")
    lines.append(f"  repeat   {manifest.repeat_command(run.dir)}")
    if status.get("state") not in ("done", "queued", "running"):
        lines += [f"  next     {line}" for line in resuming.way_on(read_facts(run.dir)).splitlines()]
    lines.append(f"  folder   {run.dir} ({size_text(size_of(run.dir))})")
    return "\n".join(lines)
