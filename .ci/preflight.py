"""Checks what `make setup` needs before anything is downloaded: Python, pip's venv, free disk.

Runs on any Python 3 (it has to say that 3.8 is too old), so: no new syntax, standard library only.
"""

import shutil
import sys

PYTHON = (3, 11)
DISK_GB = 5


def problems():
    """Everything that is missing, with its remedy."""
    found = []
    if sys.version_info < PYTHON:
        found.append(
            "Python %d.%d or newer is needed, this is %s; install it and run: make setup PYTHON=python3.11"
            % (PYTHON[0], PYTHON[1], sys.version.split()[0])
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        found.append("this Python has no venv; on Debian or Ubuntu: apt-get install python3-venv")
    free = shutil.disk_usage(".").free / 1e9
    if free < DISK_GB:
        found.append("%d GB of free disk are needed here, there are %.1f; free some first" % (DISK_GB, free))
    if sys.platform == "win32":
        found.append("Windows is served through WSL2: run this inside a WSL2 shell")
    return found


if __name__ == "__main__":
    for problem in problems():
        print("setup: " + problem)
    sys.exit(1 if problems() else 0)
