"""Layers split over ranks against one rank: losses, gradients, weights; what is wrong on purpose is seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_kit.engine import step
from dpo_kit.model import export, logprobs, packing, pair_model, parallel, tensor_parallel
from tests.helpers import one_rank, random_pairs, train_tiny
from tests.model.test_pair_model import small_model

UNSHARED, AGAIN = "actor.share_prompt=false", "actor.gradient_checkpointing=selective"
# Family, tied, and what is set beside.
CASES = {
    "llama": ("llama", False, ()),
    "llama tied unshared": ("llama", True, (UNSHARED, "ref.logps=online")),
    "qwen2 tied": ("qwen2", True, (AGAIN,)),
    "qwen2 unshared": ("qwen2", False, (UNSHARED,)),
    "qwen3": ("qwen3", False, (AGAIN,)),
}
TOLERANCES = {"float32": (1e-5, 1e-3), "float64": (1e-9, 1e-7)}
NUM_PAIRS = 24


def model(folder: Path, family: str, tied: bool = False) -> str:
    """A random model whose biases and norms are random, too: at zeros and ones they would hide a mistake."""
    path = small_model(folder, family, 2, tied)
    torch.manual_seed(1)
    tensors = load_file(f"{path}/model.safetensors")
    tensors = {name: value + 0.1 * torch.randn_like(value) for name, value in tensors.items()}
    save_file(tensors, f"{path}/model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Overrides of a run of 20 steps for every case and dtype."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for name, (family, tied, settings) in CASES.items():
        path = model(root / name, family, tied)
        for dtype in TOLERANCES:
            common = (f"actor.dtype={dtype}", f"ref.dtype={dtype}", "actor.optimizer.lr=1e-4")
            paths = (f"actor.path={path}", f"ref.path={path}", "tokenizer_path=tiny-random")
            bound = ("train_dataset.batch_size=6", "actor.mb_spec.max_tokens_per_mb=120")
            made[name, dtype] = (*common, *paths, *bound, "total_train_epochs=5", *settings)
    return made


@pytest.fixture(scope="module")
def alone(jobs, tmp_path_factory):
    """What one rank records of them."""
    root = tmp_path_factory.mktemp("alone")
    return train_all(str(root), jobs)


def train_all(folder: str, jobs: dict, backend: str = "fsdp:d1") -> dict:
    """Records of each run, on the ranks at hand."""
    ranks = (f"actor.backend={backend}", f"ref.backend={backend}")
    return {
        job: train_tiny(f"{folder}/{' '.join(job)}", (*overrides, *ranks), NUM_PAIRS)
        for job, overrides in jobs.items()
    }


def assert_equal(found: dict, alone: dict) -> None:
    for job, steps in found.items():
        losses, norms = TOLERANCES[job[1]]
        assert len(steps) == len(alone[job]) == 20
        for mine, theirs in zip(steps, alone[job], strict=True):
            assert mine["dpo/loss"] == pytest.approx(theirs["dpo/loss"], abs=losses), job
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=norms), job


@pytest.mark.parametrize("backend", ["fsdp:d1t2", "fsdp:d2t2"])
def test_ranks_that_share_layers_train_as_one_rank(request, jobs, alone, tmp_path, backend):
    pool = request.getfixturevalue("ranks" if backend == "fsdp:d1t2" else "four_ranks")
    by_rank = pool.run(train_all, str(tmp_path), jobs, backend)
    assert_equal(by_rank[0], alone)
    for other in by_rank[1:]:
        for job, steps in other.items():
            assert [s["dpo/loss"] for s in steps] == [s["dpo/loss"] for s in by_rank[0][job]]
