"""Three rooms: what may be absent where. Each check runs in a process of its own, and is itself checked."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_kit
from dpo_kit import config as config_module
from dpo_kit.dataset import prepare
from dpo_kit.records import metrics, run_folder
from tests.helpers import tiny_config

ROOT = Path(__file__).parents[1]
OPTIONAL = ["datasets", "ipywidgets", "plotly", "papermill", "ray", "pandas", "IPython", "tensorboard"]
# Folders and modules that do their work where torch is not installed.
VIEWING = ("view", "plots", "records", "supervise", "launch", "config", "system")
VIEWING_DOORS = ("cli", "notebook", "runs", "sweep", "widgets")
# Packages in BLOCKED are as if they were not installed: no finder knows them.
BLOCK = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def python(code: str, *arguments: str, blocked=(), path: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that lacks the `blocked` packages."""
    head = f"BLOCKED = {list(blocked)!r}\n{BLOCK}import sys; sys.path.insert(0, {str(path)!r})\n"
    command = [sys.executable, "-W", "error::UserWarning", "-c", head + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def import_all(modules, **options):
    code = f"import importlib\nfor name in {list(modules)!r}: importlib.import_module(name)\n"
    return python(code + "print(*sorted(m for m in sys.modules if '.' not in m))", **options)


def package_modules():
    names = [m.name for m in pkgutil.walk_packages(dpo_kit.__path__, "dpo_kit.")]
    return [name for name in names if not name.endswith(".__main__")]


def viewing_modules():
    rooms = tuple(f"dpo_kit.{room}." for room in VIEWING)
    of_ranks = ("dpo_kit.launch.one_rank",)
    found = [name for name in package_modules() if name.startswith(rooms) and name not in of_ranks]
    return found + [f"dpo_kit.{door}" for door in VIEWING_DOORS]


def test_every_module_imports_without_the_optional_packages():
    done = import_all(package_modules(), blocked=OPTIONAL)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout.split()


@pytest.mark.parametrize("package", OPTIONAL)
def test_the_check_catches_a_module_that_imports_one(tmp_path, package):
    (tmp_path / "planted.py").write_text(f"import {package}\n")
    done = import_all(["planted"], blocked=OPTIONAL, path=tmp_path)
    assert done.returncode != 0
    assert f"No module named '{package}'" in done.stderr


@pytest.fixture
def run_dir(tmp_path):
    """A queued run over a small file of pairs."""
    rows = [
        {"chosen": f"\n\nHuman: {i}?\n\nAssistant: yes", "rejected": f"\n\nHuman: {i}?\n\nAssistant: no"}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (f"train_dataset.path={tmp_path / 'rows.jsonl'}", "total_train_steps=1")
    config = tiny_config(tmp_path / "runs", *overrides)
    return run_folder.create(
        tmp_path / "runs", "dpo", "one", config_text=config_module.to_yaml(config), manifest={}
    )


TRAIN = """
from pathlib import Path
from dpo_kit.engine import worker
from tests.helpers import one_rank
with one_rank() as world:
    worker.run(Path(sys.argv[1]), world, lambda: False)
"""


def test_a_run_trains_and_exports_without_the_optional_packages(run_dir):
    prepare.prepare(run_dir)
    done = python(TRAIN, str(run_dir), blocked=OPTIONAL)
    assert done.returncode == 0, done.stderr
    assert 'no TensorBoard events: pip install "dpo-kit[tracking]"' in done.stdout
    assert [m["step"] for m in metrics.read_metrics(run_dir)] == [1]
    assert (run_dir / "model" / "model.safetensors").exists()


def test_a_local_file_needs_no_datasets(run_dir):
    code = "from pathlib import Path\nfrom dpo_kit.dataset import prepare\nprepare.prepare(Path(sys.argv[1]))"
    done = python(code, str(run_dir), blocked=OPTIONAL)
    assert done.returncode == 0, done.stderr
    assert (run_dir / "data.json").exists()


def test_what_was_prepared_once_is_prepared_again_without_torch(run_dir):
    code = "from pathlib import Path\nfrom dpo_kit import config, notebook\nfrom dpo_kit.dataset import prepare\n"
    code += "run_dir = Path(sys.argv[1])\nprepare.prepare(run_dir)\n"
    first = python(code, str(run_dir), blocked=["torch"])
    assert "No module named 'torch'" in first.stderr
    prepare.prepare(run_dir)
    code += "notebook.build_pairs(config.load(run_dir / 'config.yaml'))\n"
    done = python(code, str(run_dir), blocked=["torch", "transformers"])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("from dpo_kit import runs; runs.Run('x').metrics()", "notebook"),
        ("from dpo_kit import plots; plots.rewards([('a', [])])", "notebook"),
        (
            "from dpo_kit.dataset import rows; rows.open_source('org/name', section='train_dataset')",
            "notebook",
        ),
    ],
)
def test_what_lacks_a_package_carries_the_install_line(code, extra):
    done = python(code, blocked=OPTIONAL)
    assert done.returncode != 0
    assert f'pip install "dpo-kit[{extra}]"' in done.stderr.splitlines()[-1]


def test_the_viewing_room_imports_neither_torch_nor_pandas():
    done = import_all(viewing_modules())
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "pandas", "plotly", "datasets", "ipywidgets"} & set(
        done.stdout.split()
    )


def test_the_viewing_room_works_on_a_machine_without_torch():
    done = import_all(viewing_modules(), blocked=["torch", "transformers"])
    assert done.returncode == 0, done.stderr


def test_listing_runs_imports_nothing_heavy(tmp_path):
    code = "from dpo_kit import cli; cli.main(['runs', 'list', '--fileroot', sys.argv[1]])\n"
    done = python(code + "print(*sys.modules)", str(tmp_path))
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not {"torch", "transformers", "pandas", "plotly", "numpy", "pyarrow", "datasets"} & loaded
