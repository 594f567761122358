"""Layers split over ranks against one rank: losses, gradients, weights; what is wrong on purpose is seen."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_kit.engine import loop, state
from dpo_kit.errors import UserError
from dpo_kit.model import builtin, export, logprobs, pair_model, parallel, tensor_parallel
from dpo_kit.preferences import open_store
from tests.helpers import make_engine, one_rank, random_pairs, store_of, tiny_config, train_tiny
from tests.model.test_pair_model import small_model
from tests.model.test_parallel import UNPACKED, windowed

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
NUM_PAIRS = 16


def model(folder: Path, family: str, tied: bool = False, **sizes: int) -> str:
    """A random model whose biases and norms are random, too: at zeros and ones they would hide a mistake."""
    path = small_model(folder, family, 2, tied, **sizes)
    torch.manual_seed(1)
    tensors = load_file(f"{path}/model.safetensors")
    tensors = {name: value + 0.1 * torch.randn_like(value) for name, value in tensors.items()}
    save_file(tensors, f"{path}/model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Overrides of runs of 20 steps by case and dtype."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for name, (family, tied, settings) in CASES.items():
        path = model(root / name, family, tied)
        for dtype in TOLERANCES:
            common = (f"actor.dtype={dtype}", f"ref.dtype={dtype}", "actor.optimizer.lr=1e-4")
            paths = (f"actor.path={path}", f"ref.path={path}", "tokenizer_path=tiny-random")
            bound = ("train_dataset.batch_size=4", "actor.mb_spec.max_tokens_per_mb=100")
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


def assert_equal(job: tuple[str, str], found: list[dict], alone: list[dict]) -> None:
    losses, norms = TOLERANCES[job[1]]
    for mine, theirs in zip(found, alone, strict=True):
        assert mine["dpo/loss"] == pytest.approx(theirs["dpo/loss"], abs=losses), job
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=norms), job


SOME = {
    "fsdp:d1t2": [(name, "float64") for name in CASES] + [("llama", "float32")],
    "fsdp:d2t2": [("llama tied unshared", "float64"), ("qwen2 tied", "float32"), ("qwen3", "float64")],
}
ALL = [(name, dtype) for name in CASES for dtype in TOLERANCES]


@pytest.mark.parametrize(
    ("backend", "which"),
    [
        *SOME.items(),
        pytest.param("fsdp:d1t2", ALL, marks=pytest.mark.slow),
        pytest.param("fsdp:d2t2", ALL, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_share_layers_train_as_one_rank(request, jobs, alone, tmp_path, backend, which):
    pool = request.getfixturevalue("ranks" if backend == "fsdp:d1t2" else "four_ranks")
    by_rank = pool.run(train_all, str(tmp_path), {job: jobs[job] for job in which}, backend, timeout_s=600)
    for job in which:
        assert len(alone[job]) == 20
        assert_equal(job, by_rank[0][job], alone[job])
        for other in by_rank[1:]:
            assert [s["dpo/loss"] for s in other[job]] == [s["dpo/loss"] for s in by_rank[0][job]]


# --- mistakes that must be seen ---------------------------------------------------------------------------------


def log_sum_exp_of_one_rank(found, is_mine, group):
    """As if each rank's part were the whole vocabulary: only the target's logit crosses the ranks."""
    picked, largest, sums = map(torch.cat, zip(*found, strict=True))
    picked = picked.where(is_mine, 0.0)
    torch.distributed.all_reduce(picked, group=group)
    return picked, largest, sums.log()


def largest_of_one_rank(found, is_mine, group):
    """The sums of exponentials are added without bringing them to one largest logit."""
    picked, largest, sums = map(torch.cat, zip(*found, strict=True))
    both = torch.stack([picked.where(is_mine, 0.0), sums])
    torch.distributed.all_reduce(both, group=group)
    return both[0], largest, both[1].log()


class NotSummed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


MISTAKES = {
    "none": (logprobs, "over_vocabulary", logprobs.over_vocabulary),
    "log-sum-exp of one rank": (logprobs, "over_vocabulary", log_sum_exp_of_one_rank),
    "largest logit of one rank": (logprobs, "over_vocabulary", largest_of_one_rank),
    "gradients of inputs and of norms of heads": (tensor_parallel, "_SumInBackward", NotSummed),
    "norms of heads": (tensor_parallel, "_on_heads", tensor_parallel._plainly),
}


def with_mistake(name: str, folder: str, jobs: dict) -> dict:
    owner, attribute, wrong = MISTAKES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, attribute, wrong)
        return train_all(folder, jobs, "fsdp:d1t2")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_sum_over_ranks_that_is_wrong_is_seen(ranks, jobs, alone, tmp_path, name):
    job = ("qwen3", "float64")
    overrides = (*jobs[job], "ref.first_step_check=off", "total_train_steps=1")
    found = ranks.run(with_mistake, name, str(tmp_path), {job: overrides})[0][job]
    with contextlib.nullcontext() if name == "none" else pytest.raises(AssertionError):
        assert_equal(job, found, alone[job][:1])


# --- reading and writing ----------------------------------------------------------------------------------------


UNEVEN = {"vocab_size": 266, "hidden_size": 30, "intermediate_size": 66, "head_dim": 6}


def parts_and_export(path: str, folder: str, backend: str) -> dict[str, tuple[bool, bool]]:
    """For each weight whether this rank holds its own part of the file, and the whole is the file's; exports it."""
    whole, found = load_file(f"{path}/model.safetensors"), {}
    with one_rank(f"actor.backend={backend}") as world, pytest.MonkeyPatch.context() as patch:
        policy = pair_model.load(path, world, dtype=torch.float32, **OPTIONS)
        for name, param in parallel.masters(policy).items():
            expected = whole[name.removeprefix("lm.")]
            is_own = torch.equal(param.to_local(), expected[parallel.own_part(param)])
            found[name] = is_own, torch.equal(parallel.full_tensor(param), expected)
        patch.setattr(export, "FILE_BYTES", 30_000)
        tokenizer = builtin.load_tokenizer("tiny-random")
        export.write(policy, Path(folder), tokenizer, world, dtype=torch.float32, end_token_id=7)
    return found


OPTIONS = {"trainable": True, "gradient_checkpointing": False, "longest_tokens": 64}


@pytest.mark.parametrize("backend", ["fsdp:d2t2", "fsdp:d4"])
def test_each_rank_reads_its_part_and_rank_0_writes_the_whole(four_ranks, tmp_path, backend):
    """Sizes that do not divide by the data-parallel ranks: some hold a row less."""
    path = model(tmp_path / "m", "qwen2", **UNEVEN)
    for found in four_ranks.run(parts_and_export, path, str(tmp_path / "out"), backend):
        assert set(found.values()) == {(True, True)}
    written, files = load_folder(tmp_path / "out"), sorted(p.name for p in (tmp_path / "out").glob("model*"))
    whole = load_file(f"{path}/model.safetensors")
    assert files[0].startswith("model-00001-of-0000")
    assert files[-1] == "model.safetensors.index.json"
    assert written.keys() == whole.keys()
    assert all(torch.equal(written[name], value) for name, value in whole.items())


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder as transformers reads them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


# --- the run around it --------------------------------------------------------------------------------------------


def stopped_by_one(folder: str) -> int:
    """Steps that were done when only the last rank heard a signal, in its second step."""
    done: list[dict] = []
    with one_rank(*D1T2) as world:
        if world.is_main:
            store_of(random_pairs(16), Path(folder) / "pairs")
        world.barrier()
        engine = make_engine(world, tiny_config(Path(folder), *D1T2), open_store(Path(folder) / "pairs"))
        engine.should_stop = lambda: world.rank == 1 and len(done) == 1
        hooks = loop.Hooks(done.append, lambda *_: None, lambda *_: False, lambda _: None)
        with pytest.raises(state.Stopped):
            loop.train(engine, hooks)
    return len(done)


D1T2 = ("actor.backend=fsdp:d1t2", "ref.backend=fsdp:d1t2")


def test_a_signal_to_any_rank_stops_all(ranks, tmp_path):
    assert ranks.run(stopped_by_one, str(tmp_path)) == [2, 2]


def refusals(paths: list[str]) -> list[str]:
    """What ranks say of models that they cannot share."""
    said = []
    with one_rank(*D1T2) as world:
        for path in paths:
            with pytest.raises(UserError) as caught:
                pair_model.load(path, world, dtype=torch.float32, **OPTIONS)
            said.append(str(caught.value).removeprefix(path))
    return said


def test_what_cannot_be_split_is_refused(ranks, tmp_path):
    """By the ranks, for models that nobody has looked at before, and windows that only the data tell too short."""
    kinds = {
        "odd": lambda folder: model(folder, "llama", vocab_size=265, intermediate_size=45),
        "window": windowed,
        "gpt2": UNPACKED["gpt2"],
    }
    odd, window, other = ranks.run(refusals, [make(tmp_path / name) for name, make in kinds.items()])[0]
    sizes = "45 columns of the gated layer and 265 rows of the vocabulary do not divide by 2; use t1"
    assert odd == f": cannot be split over t = 2 tensor-parallel ranks: {sizes}"
    assert "attention window of 16 tokens is shorter than the longest text (64 tokens)" in window
    assert "model type 'gpt2' is none of" in other
