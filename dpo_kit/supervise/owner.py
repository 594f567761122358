"""Whose run it is: does somebody sit before this process, and whose end ends the run?

    interactive   JupyterLab, a terminal IPython, a REPL: the run outlives its kernel; nobody owns it
    headless      papermill, nbconvert, pytest, a plain script: the run belongs to this process and, in a
                  kernel, to the program that started the kernel; when one of them is gone the run saves and
                  ends as `preempted`

`DPO_KIT_HEADLESS=1` (or `0`) in the environment decides where the signs do not: a program of your own that
drives notebooks looks like any other Jupyter front end.

Deliberately not here: watching the owners (supervise/children).
"""

from __future__ import annotations

import os
import sys
from pathlib import PurePath
from typing import Any

import psutil

from dpo_kit.system.processes import identify

OVERRIDE = "DPO_KIT_HEADLESS"
# Programs that run a notebook from end to end without anybody watching.
_RUNNERS = {"papermill", "nbconvert", "nbclient", "pytest", "py.test", "nbval", "testbook", "treon"}
_RUNNERS |= {f"jupyter-{name}" for name in ("nbconvert", "execute", "run", "nbclient")}


def is_headless() -> bool:
    """True when nobody sits before this process, so that a run must not outlive it.

    Decided by, in this order: `DPO_KIT_HEADLESS`; `PYTEST_CURRENT_TEST`; no IPython and no REPL (a plain
    script); in a kernel, the command line of the process that started it (`JPY_PARENT_PID`).
    """
    override = os.environ.get(OVERRIDE, "")
    if override:
        return override not in ("0", "false", "no")
    if "PYTEST_CURRENT_TEST" in os.environ:
        return True
    if shell() is None:
        return not (hasattr(sys, "ps1") or sys.flags.interactive)
    parent = kernel_parent()
    return parent is not None and runs_notebooks(parent["command"])


def shell() -> Any:
    """The IPython shell this code runs in, or None; never imports IPython."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None


def in_notebook() -> bool:
    """True in a kernel, whose front end can show HTML and update it."""
    return hasattr(shell(), "kernel")


def kernel_parent() -> dict[str, Any] | None:
    """Identity and command line of the program that started this kernel; None outside one, or when it is gone."""
    text = os.environ.get("JPY_PARENT_PID", "")
    if not text.isdigit() or int(text) <= 1:
        return None
    try:
        return {**identify(int(text)), "command": psutil.Process(int(text)).cmdline()}
    except psutil.Error:
        return None


def runs_notebooks(command: list[str]) -> bool:
    """True for the command line of papermill, nbconvert, pytest and their like.

    The program is the first word, or what a Python there is told to run: `python -m papermill`,
    `python /venv/bin/jupyter-nbconvert`. Later words are data: a notebook may be called pytest.
    """
    words = [PurePath(word).name.removesuffix(".exe") for word in command[:1]]
    arguments = command[1:]
    if words and words[0].startswith(("python", "pypy")):
        while arguments:
            word, arguments = arguments[0], arguments[1:]
            if word == "-m" and arguments:
                words.append(arguments.pop(0).split(".")[0])
                break
            if word in ("-W", "-X"):
                arguments = arguments[1:]
            elif not word.startswith("-"):
                words.append(PurePath(word).name.removesuffix(".py"))
                break
    if words and words[-1] == "jupyter" and arguments:
        words.append(f"jupyter-{arguments[0]}")
    return any(word in _RUNNERS for word in words)


def owners() -> list[dict[str, Any]]:
    """Identities of the processes to which a headless run belongs: this one and its kernel's parent."""
    found = [identify()]
    parent = kernel_parent() if shell() is not None else None
    if parent is not None:
        found.append({key: parent[key] for key in ("pid", "create_time", "host")})
    return found
