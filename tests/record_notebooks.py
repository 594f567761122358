"""Records the notebooks for nbval: papermill renderings on the smoke params, into `tests/notebooks/`.

    python -m tests.record_notebooks [NAME ...]

nbval takes no parameters, so a recording carries them in the cell that papermill injects: `params/smoke.yaml`
as it stands, float64 on one CPU rank, and runs under `$DPO_KIT_TEST_RUNS`, which `tests/notebooks/conftest.py`
points at a temporary folder. What differs from machine to machine (paths, times, pictures, papermill's own
metadata) is taken out, so that re-recording an unchanged notebook changes little.

Deliberately not here: comparing (nbval does it, `test_notebooks` compares the cells).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS, RECORDINGS = ROOT / "notebooks", ROOT / "tests" / "notebooks"
RUNS_VARIABLE = "DPO_KIT_TEST_RUNS"
OVERRIDES = [
    "actor.dtype=float64",
    "actor.backend=fsdp:d1",
    "cluster.n_gpus_per_node=0",
    "cluster.fileroot=${oc.env:DPO_KIT_TEST_RUNS}",
]
MORE: dict[str, dict[str, Any]] = {
    "sweep": {
        "betas": [0.1],
        "loss_types": ["sigmoid", "ipo"],
        "overrides": [*OVERRIDES, "evaluator.num_samples=0"],
    }
}


def parameters(name: str) -> dict[str, Any]:
    """What the recording of a notebook is made with."""
    smoke = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text(encoding="utf-8"))
    return {**smoke, "overrides": OVERRIDES, **MORE.get(name, {})}


def record(name: str) -> Path:
    """Renders one notebook and puts the cleaned result into `tests/notebooks/`."""
    import papermill

    out = RECORDINGS / f"{name}.ipynb"
    with tempfile.TemporaryDirectory(prefix="dpo-kit-record-") as folder:
        os.environ.update(private_folders(Path(folder)))
        rendered = Path(folder) / "out.ipynb"
        papermill.execute_notebook(
            str(NOTEBOOKS / f"{name}.ipynb"), str(rendered), parameters=parameters(name), cwd=str(NOTEBOOKS)
        )
        notebook = nbformat.read(rendered, as_version=4)
        clean(notebook, {str(ROOT): "PROJECT", folder: "TEMPORARY"})
        out.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    return out


def private_folders(folder: Path) -> dict[str, str]:
    """Environment that keeps everything a notebook writes below one folder, the kernel's own files too."""
    return {
        RUNS_VARIABLE: str(folder / "runs"),
        "DPO_KIT_HEADLESS": "1",
        "DPO_KIT_CACHE": str(folder / "cache"),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "jupyter"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def clean(notebook: Any, names: dict[str, str]) -> None:
    """Takes out of a rendered notebook what another machine or another minute would change.

    Args:
        notebook: changed in place.
        names: paths and what stands for them.
    """
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/png", None)
            _rename(output, names)


def _rename(node: Any, names: dict[str, str]) -> None:
    for key, value in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
        if isinstance(value, str):
            for path, name in names.items():
                value = value.replace(path, name)
            node[key] = value
        elif isinstance(value, dict | list):
            _rename(value, names)


def main(names: list[str]) -> None:
    """Records the named notebooks, or all."""
    for name in names or sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")):
        out = record(name)
        print(f"{out.relative_to(ROOT)}: {out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
