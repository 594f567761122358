"""The import contracts of `pyproject.toml` catch what they forbid: one planted import each."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Contract, by the beginning of its name; the module that gets a line; the line.
PLANTED = [
    ("Imports go down", "system/text.py", "from dpo_kit.records import status"),
    ("What trains", "engine/step.py", "from dpo_kit.dataset import rows"),
    ("What reads", "view/analysis.py", "import torch"),
    ("A chart", "plots/charts.py", "from dpo_kit import config"),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What the linter says of a copy of the package with all of the lines planted."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "dpo_kit", folder / "dpo_kit", ignore=shutil.ignore_patterns("__pycache__"))
    for _, name, line in PLANTED:
        path = folder / "dpo_kit" / name
        path.write_text(path.read_text() + f"\n{line}\n")
    linter = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([linter, "--no-cache"], capture_output=True, text=True, cwd=folder).stdout


@pytest.mark.parametrize(("contract", "name", "line"), PLANTED)
def test_a_planted_import_is_caught(broken, contract, name, line):
    assert re.search(rf"^{contract}.* BROKEN", broken, re.MULTILINE)
    importer = "dpo_kit." + name.removesuffix(".py").replace("/", ".")
    imported = line.split()[1]
    assert re.search(rf"{re.escape(importer)} -> {re.escape(imported)}", broken)


def test_every_contract_has_a_planted_import():
    names = re.findall(r'^name = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    contracts = [name for name in names if name != "dpo-kit"]
    assert [next(c for c in contracts if c.startswith(start)) for start, *_ in PLANTED] == contracts
