"""The files that make an environment say the same as pyproject.toml, and setup names what is missing."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from dpo_kit import config as config_module

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# It brings another framework that the tests do without.
UNPINNED_EXTRAS = {"bench"}


def makefile_extras():
    return re.search(r"^EXTRAS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]


def pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}


def test_conda_installs_what_make_installs():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", f"-e .[{makefile_extras()}]"]
    python = [entry for entry in environment["dependencies"] if str(entry).startswith("python")]
    assert python == [f"python{PROJECT['requires-python']}"]
    assert set(makefile_extras().split(",")) == set(PROJECT["optional-dependencies"]) - UNPINNED_EXTRAS


def test_every_direct_dependency_has_a_tested_version():
    groups = {
        name: deps for name, deps in PROJECT["optional-dependencies"].items() if name not in UNPINNED_EXTRAS
    }
    pinned = pins()
    for text in [*PROJECT["dependencies"], *(dep for deps in groups.values() for dep in deps)]:
        requirement = Requirement(text)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} and {version}"


def test_the_pins_hold_on_every_platform():
    """A local version (torch's +cpu) exists on one index only."""
    assert [pin for pin in pins().values() if "+" in pin] == []


def test_python_and_package_agree():
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.11")
    assert "3, 11" in (ROOT / ".ci" / "preflight.py").read_text()
    assert set(PROJECT["optional-dependencies"]) == {
        "notebook",
        "lora",
        "ray",
        "slurm",
        "tracking",
        "bench",
        "dev",
    }


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda path: path.name)
def test_every_params_file_loads(path):
    config = config_module.load(path)
    assert config.actor.path == config.ref.path == config.tokenizer_path


# ---------------------------------------------------------------- what setup checks first


@pytest.fixture
def preflight():
    spec = importlib.util.spec_from_file_location("preflight", ROOT / ".ci" / "preflight.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Usage = namedtuple("Usage", "total used free")


def test_this_machine_has_what_setup_needs(preflight, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: Usage(0, 0, 9e9))
    assert preflight.problems() == []


def test_an_old_python_is_named(preflight, monkeypatch):
    monkeypatch.setattr(preflight, "PYTHON", (9, 1))
    (problem,) = [text for text in preflight.problems() if "disk" not in text]
    assert problem.startswith(
        f"Python 9.1 or newer is needed, this is {sys.version.split()[0]}; install it and run:"
    )


def test_little_disk_is_named_in_gigabytes(preflight, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: Usage(0, 0, 1.25e9))
    (problem,) = preflight.problems()
    assert problem == f"{preflight.DISK_GB} GB of free disk are needed here, there are 1.2; free some first"


def test_a_python_without_venv_is_named(preflight, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert any("has no venv" in text for text in preflight.problems())


def test_all_problems_are_told_at_once_and_stop_make(tmp_path):
    code = (ROOT / ".ci" / "preflight.py").read_text()
    code = code.replace("PYTHON = (3, 11)", "PYTHON = (9, 1)").replace("DISK_GB = 5", "DISK_GB = 10**9")
    (tmp_path / "preflight.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "preflight.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["setup:", "Python"],
        ["setup:", "1000000000"],
    ]


def test_preflight_runs_on_an_old_python():
    """It has to tell a Python 3.8 that it is too old."""
    import ast

    assert ast.parse((ROOT / ".ci" / "preflight.py").read_text(), feature_version=(3, 7)).body
