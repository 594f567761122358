"""Resuming: the same pairs, the same numbers, from any step, and from the last whole checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dpo_kit.engine import checkpoint, loop
from dpo_kit.engine.optimizer import make_optimizer
from dpo_kit.engine.recorder import Recorder
from dpo_kit.engine.state import Stopped
from dpo_kit.errors import UserError
from dpo_kit.model import costs, model_folder
from dpo_kit.model.parallel import full_tensor, masters
from dpo_kit.preferences import open_store
from dpo_kit.records import checkpoint_folders
from dpo_kit.system import folders
from tests.helpers import make_engine, one_rank, random_pairs, store_of, tiny_config

STEPS = 12
# 46 pairs, 8 a step: six steps an epoch, the last one short
LORA = ("actor.use_lora=true", "actor.lora_rank=4")
LENGTH = ("total_train_epochs=2", "total_train_steps=null", "recover.freq_steps=1", "recover.keep=all")


def train_on(folder: str, overrides: tuple[str, ...] = (), *, run: str = "run", stop_after: int = 0) -> dict:
    """Trains with checkpoints on the ranks at hand, from the newest one in the run folder.

    Args:
        stop_after: asks to stop in this step.

    Returns:
        The record of each step that was run, the last step, and all weights.
    """
    root = Path(folder)
    with one_rank(*overrides) as world:
        if world.is_main and not (root / "pairs").exists():
            store_of(random_pairs(46), root / "pairs")
        world.barrier()
        config = tiny_config(root / "runs", *LENGTH, *overrides)
        state = make_engine(world, config, open_store(root / "pairs"))
        optimizer = make_optimizer(state.policy, config.actor.optimizer)
        (root / run).mkdir(exist_ok=True)
        kept = checkpoint.Keeper(root / run, state, optimizer, Recorder(root / run, config, world))
        done, _ = kept.resume()
        steps: list[dict] = []
        state.should_stop = lambda: bool(stop_after) and done + len(steps) + 1 >= stop_after
        hooks = loop.Hooks(
            stepped=steps.append,
            evaluated=lambda *_: None,
            due=lambda section, step, _: section == "recover" and step % config.recover.freq_steps == 0,
            save=lambda _: None,
            checkpoint=kept.save,
        )
        try:
            loop.train(state, hooks, optimizer, done=done)
        except Stopped:
            assert stop_after
        weights = {name: full_tensor(param).clone() for name, param in masters(state.policy).items()}
        return {"first": done + 1, "steps": steps, "weights": weights}


def same(record: dict) -> dict:
    """What two runs must agree on: everything that is no time."""
    return {k: v for k, v in record.items() if k not in ("step_s", "tokens_per_second", "pairs_per_second")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with a run that was never disturbed, and what it recorded."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, train_on(str(folder))


def continue_from(folder: Path, step: int, target: Path, *overrides: str) -> dict:
    """The rest of a run from one of its checkpoints, in a folder of its own."""
    (target / "run" / "checkpoints").mkdir(parents=True)
    shutil.copytree(folder / "pairs", target / "pairs")
    shutil.copytree(
        folder / "run" / "checkpoints" / f"step-{step}", target / "run" / "checkpoints" / f"step-{step}"
    )
    return train_on(str(target), overrides)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_resume_at_every_step_equals_the_undisturbed_run(undisturbed, tmp_path, step):
    folder, whole = undisturbed
    assert checkpoint_folders.steps(folder / "run" / "checkpoints") == list(range(1, STEPS + 1))
    rest = continue_from(folder, step, tmp_path)
    assert rest["first"] == step + 1
    assert list(map(same, rest["steps"])) == list(map(same, whole["steps"][step:]))
    for name, weight in whole["weights"].items():
        assert torch.equal(rest["weights"][name], weight), name


@pytest.mark.parametrize(
    "overrides",
    [
        ("actor.optimizer.state_dtype=bfloat16",),
        ("actor.dtype=bfloat16", "ref.dtype=bfloat16"),
        LORA,
        (*LORA, "actor.dtype=bfloat16", "ref.dtype=bfloat16", "ref.logps=online"),
    ],
    ids=["bfloat16 states", "bfloat16 compute", "adapters", "adapters in bfloat16, reference online"],
)
def test_random_rounding_and_other_dtypes_resume_exactly_too(tmp_path, overrides):
    whole = train_on(str(tmp_path / "whole"), overrides)
    rest = continue_from(tmp_path / "whole", 5, tmp_path / "rest", *overrides)
    assert list(map(same, rest["steps"])) == list(map(same, whole["steps"][5:]))


def test_a_checkpoint_of_adapters_holds_them_alone(tmp_path):
    overrides = (*LORA, "actor.dtype=float32", "ref.dtype=float32")
    trained = train_on(str(tmp_path), overrides)["weights"]
    held = checkpoint.FileSystemReader(tmp_path / "run" / "checkpoints" / "step-12").read_metadata()
    assert all(".lora_A." in name or ".lora_B." in name for name in held.state_dict_metadata)
    assert len(held.state_dict_metadata) == 4 * len(trained) == 4 * 2 * 14
    config = tiny_config(tmp_path / "runs", *overrides)
    needed = costs.checkpoint_bytes(model_folder.read_shape(config.actor.path), config)
    assert needed == 3 * sum(weight.nbytes for weight in trained.values())
    with pytest.raises(UserError, match=r"actor\.lora_rank: 4 -> 8"):
        continue_from(tmp_path, 6, tmp_path / "other", *overrides, "actor.lora_rank=8")


def train_on_ranks(folder: str, overrides: tuple[str, ...] = ()) -> dict:
    """`train_on` in the pool of ranks; rank 0 makes the pairs."""
    found = train_on(folder, overrides)
    dist.barrier()
    return found


TOLERANCES = {"float32": (1e-5, 1e-3), "float64": (1e-9, 1e-7)}


@pytest.mark.parametrize(("dtype", "adapters"), [("float32", ()), ("float64", ()), ("float64", LORA)])
def test_another_number_of_ranks_sees_the_same_pairs_and_losses(ranks, tmp_path, dtype, adapters):
    overrides = (f"actor.dtype={dtype}", f"ref.dtype={dtype}", *adapters)
    losses, norms = TOLERANCES[dtype]
    alone = train_on(str(tmp_path / "alone"), overrides)
    together = ranks.run(train_on_ranks, str(tmp_path / "together"), overrides)[0]
    for folder, runner in (
        (
            "alone",
            lambda target: ranks.run(continue_on_ranks, str(tmp_path / "alone"), str(target), overrides)[0],
        ),
        ("together", lambda target: continue_from(tmp_path / "together", 5, target, *overrides)),
        (
            "together",
            lambda target: ranks.run(continue_on_ranks, str(tmp_path / "together"), str(target), overrides)[
                0
            ],
        ),
    ):
        rest = runner(tmp_path / f"rest-{folder}-{len(list(tmp_path.iterdir()))}")
        assert len(rest["steps"]) == STEPS - 5
        for mine, theirs in zip(rest["steps"], alone["steps"][5:], strict=True):
            assert mine["dpo/loss"] == pytest.approx(theirs["dpo/loss"], abs=losses)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=norms)
    # The last of them ran on the ranks that wrote its checkpoint: bit for bit.
    assert list(map(same, rest["steps"])) == list(map(same, together["steps"][5:]))


def continue_on_ranks(folder: str, target: str, overrides: tuple[str, ...]) -> dict:
    """`continue_from` step 5 in the pool of ranks; rank 0 copies."""
    there = Path(target)
    if dist.get_rank() == 0:
        (there / "run" / "checkpoints").mkdir(parents=True)
        shutil.copytree(Path(folder) / "pairs", there / "pairs")
        step = Path("run") / "checkpoints" / "step-5"
        shutil.copytree(Path(folder) / step, there / step)
    dist.barrier()
    return train_on(target, overrides)


def layout(backend: str) -> tuple[str, ...]:
    return f"actor.backend={backend}", f"ref.backend={backend}", "actor.optimizer.lr=1e-4"


def test_ranks_of_another_layout_go_on(ranks, four_ranks, tmp_path):
    """Four ranks of which two share each layer, then two that share all of them, then one."""
    # transformers' norms compute in fp32: a sum in another order rounds single values of tiny-random another way there.
    losses, norms = 1e-8, 1e-7
    alone = train_on(str(tmp_path / "alone"), layout("fsdp:d1"))
    four = four_ranks.run(train_on_ranks, str(tmp_path / "four"), layout("fsdp:d2t2"))[0]
    job = str(tmp_path / "four"), str(tmp_path / "two"), layout("fsdp:d1t2")
    two, other = ranks.run(continue_on_ranks, *job)
    one = continue_from(tmp_path / "two", 8, tmp_path / "one", *layout("fsdp:d1"))
    assert two["first"] == other["first"] == 6
    assert one["first"] == 9
    for mine, theirs in zip(four["steps"][:5] + two["steps"][:3] + one["steps"], alone["steps"], strict=True):
        assert mine["dpo/loss"] == pytest.approx(theirs["dpo/loss"], abs=losses)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=norms)
    assert [same(step)["dpo/loss"] for step in two["steps"]] == [step["dpo/loss"] for step in other["steps"]]
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(one["weights"][name], weight, atol=1e-7, rtol=0)


def generators_come_back(folder: str) -> list[bool]:
    """Whether a rank has the generator that it had saved, loaded in its own layout and in another."""
    found = []
    policy = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(policy.parameters())
    for saved in ("fsdp:d1t2", "fsdp:d2"):
        target = Path(folder) / saved.partition(":")[2] / "step-1"
        with one_rank(*layout(saved)) as world:
            target.parent.mkdir(exist_ok=True)
            torch.manual_seed(world.rank)
            mine = torch.get_rng_state()
            checkpoint.save(target, policy, optimizer, world, {})
        with one_rank(*layout("fsdp:d1t2")) as world:
            torch.manual_seed(9)
            checkpoint.load(target, policy, optimizer, world)
            found.append(torch.equal(torch.get_rng_state(), mine))
    return found


def test_ranks_that_share_layers_do_not_take_up_generators_of_ranks_that_did_not(ranks, tmp_path):
    """Those may differ from rank to rank, and what a group holds alike would be rounded differently."""
    assert ranks.run(generators_come_back, str(tmp_path)) == [[True, False]] * 2


def test_a_stop_keeps_the_step_at_hand(undisturbed, tmp_path):
    _, whole = undisturbed
    slow = ("recover.freq_steps=100",)
    first = train_on(str(tmp_path), slow, stop_after=4)
    assert len(first["steps"]) == 4
    assert checkpoint_folders.steps(tmp_path / "run" / "checkpoints") == [4]
    rest = train_on(str(tmp_path), slow)
    assert list(map(same, first["steps"] + rest["steps"])) == list(map(same, whole["steps"]))


def files_of_a_checkpoint() -> list[str]:
    return ["__0_0.distcp", ".metadata", "rank-0.safetensors", "state.json", "COMMIT.json"]


@pytest.mark.parametrize("name", files_of_a_checkpoint())
def test_a_flipped_byte_falls_back_to_the_checkpoint_before(undisturbed, tmp_path, capsys, name):
    folder, whole = undisturbed
    assert sorted(p.name for p in (folder / "run/checkpoints/step-8").iterdir()) == sorted(
        files_of_a_checkpoint()
    )
    for step in (7, 8):
        target = tmp_path / "run" / "checkpoints" / f"step-{step}"
        shutil.copytree(folder / "run" / "checkpoints" / f"step-{step}", target)
    shutil.copytree(folder / "pairs", tmp_path / "pairs")
    content = bytearray((target / name).read_bytes())
    content[len(content) // 2] ^= 1
    (target / name).write_bytes(content)
    rest = train_on(str(tmp_path))
    out = capsys.readouterr().out
    assert "checkpoint step-8 is damaged: " in out
    assert name in out
    assert "falling back to step-7" in out
    assert list(map(same, rest["steps"])) == list(map(same, whole["steps"][7:]))
    assert folders.damage(target) == ""  # written again


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("actor.beta=0.2", "actor.beta: 0.1 -> 0.2"),
        ("actor.loss_type=ipo", "actor.loss_type: sigmoid -> ipo"),
        ("seed=2", "seed: 1 -> 2"),
        ("train_dataset.batch_size=4", "train_dataset.batch_size: 8 -> 4"),
    ],
)
def test_another_run_is_refused_with_what_differs(undisturbed, tmp_path, override, told):
    with pytest.raises(UserError, match=told) as caught:
        continue_from(undisturbed[0], 6, tmp_path, override)
    assert "\n" not in str(caught.value)


def test_other_data_are_refused(undisturbed, tmp_path):
    folder, _ = undisturbed
    store_of(random_pairs(46, seed=9), tmp_path / "pairs")
    shutil.copytree(folder / "run" / "checkpoints" / "step-6", tmp_path / "run" / "checkpoints" / "step-6")
    with pytest.raises(UserError, match=r"the content of train_dataset: \w{12} -> \w{12}"):
        train_on(str(tmp_path))


def test_a_longer_run_goes_on(undisturbed, tmp_path):
    rest = continue_from(undisturbed[0], 12, tmp_path, "total_train_epochs=3")
    assert len(rest["steps"]) == 6


def test_a_shorter_run_is_refused(undisturbed, tmp_path):
    with pytest.raises(UserError, match="a checkpoint of step 12, and would have to end at step 6; raise"):
        continue_from(undisturbed[0], 12, tmp_path, "total_train_epochs=1")


def test_without_a_whole_checkpoint_a_run_that_had_some_is_refused(tmp_path):
    train_on(str(tmp_path), stop_after=3)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    for state in tmp_path.glob("run/checkpoints/*/state.json"):
        state.write_bytes(state.read_bytes().replace(b"step", b"stop"))
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: checkpoint step-3 is damaged"):
        train_on(str(tmp_path))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_key_that_came_with_a_later_version_has_its_default(undisturbed, tmp_path):
    target = tmp_path / "run" / "checkpoints" / "step-12"
    shutil.copytree(undisturbed[0] / "pairs", tmp_path / "pairs")
    shutil.copytree(undisturbed[0] / "run" / "checkpoints" / "step-12", target)
    facts = json.loads((target / "state.json").read_text())
    del facts["identity"]["config"]["actor"]["share_prompt"]
    (target / "state.json").write_text(json.dumps(facts))
    reseal(target)
    assert train_on(str(tmp_path))["first"] == 13


def reseal(folder: Path) -> None:
    """Makes `COMMIT.json` fit the files."""
    files = folders.hashes(folder, folders.file_names(folder))
    text = json.dumps({"files": files}, indent=1, sort_keys=True) + "\n"
    (folder / folders.COMMIT).write_bytes(folders._commit_text(text))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_whatever_a_rank_raises_no_rank_waits(ranks, tmp_path, num_ranks):
    """safetensors has errors of its own; the last rank alone cannot read what it wrote."""
    if num_ranks == 1:
        told = save_with_an_error(str(tmp_path))
    else:
        told = ranks.run(save_with_an_error, str(tmp_path), timeout_s=60.0)[0]
    assert "cannot read" in told
    assert "step-3 stands" in told


def save_with_an_error(folder: str) -> str:
    train_on(folder, stop_after=3)

    def fail(*_):
        raise KeyError("cannot read")

    file_names, rank = folders.file_names, int(os.environ.get("RANK", 0))
    last = int(os.environ.get("WORLD_SIZE", 1)) - 1
    folders.file_names = fail if rank == last else file_names
    try:
        train_on(folder)
    except UserError as error:
        return str(error)
    finally:
        folders.file_names = file_names
    return "nothing was raised"


def test_only_the_newest_stay(tmp_path):
    train_on(str(tmp_path), ("recover.keep=2",))
    assert checkpoint_folders.steps(tmp_path / "run" / "checkpoints") == [11, 12]


def test_a_full_disk_names_the_folder_and_the_sizes(tmp_path, monkeypatch):
    train_on(str(tmp_path), stop_after=3)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.folders, "seal", full)
    with pytest.raises(UserError) as caught:
        train_on(str(tmp_path))
    folder = tmp_path / "run" / "checkpoints"
    assert str(folder / "step-4") in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert "MiB is needed, " in str(caught.value)
    assert " are free in " in str(caught.value)
    assert "step-3 stands" in str(caught.value)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    monkeypatch.undo()
    assert checkpoint_folders.newest(folder)[0] == 3


def test_the_state_is_plain_json(undisturbed):
    state = json.loads((undisturbed[0] / "run/checkpoints/step-3/state.json").read_text())
    assert (state["step"], state["num_ranks"], state["owes_evaluation"]) == (3, 1, False)
    assert state["identity"]["config"]["actor"]["beta"] == 0.1
