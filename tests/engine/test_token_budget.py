"""Tokens of a micro-batch: what is settled, what trying leaves behind, and what halving makes of it."""

from __future__ import annotations

import dataclasses
import errno
import functools
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_kit.config.steps import num_steps
from dpo_kit.engine import loop, schedule, state, step, token_budget
from dpo_kit.errors import UserError
from dpo_kit.model import costs, packing, parallel
from dpo_kit.model.costs import Shape
from dpo_kit.records import budget, manifest
from dpo_kit.system.files import atomic_write, read_json
from tests.helpers import make_engine, one_rank, random_pairs, store_of, tiny_config

SHAPE = Shape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, vocab=1000, tied=False)
AUTO = "actor.mb_spec.max_tokens_per_mb=auto"
COSTS = np.array([900, 700, 500, 300, 100, 100, 100, 100])


@pytest.fixture
def make(tmp_path):
    """`estimated` on one rank, for a configuration with these overrides."""

    def estimated(*overrides, free=1 << 40, before=None, on_cuda=False):
        with one_rank() as world:
            world = dataclasses.replace(world, device=torch.device("cuda")) if on_cuda else world
            engine = engine_of(tiny_config(tmp_path, *overrides), world, free)
            return token_budget.estimated(engine, COSTS, None, before or {})

    return estimated


def engine_of(config, world=None, free=1 << 40):
    """What the budget asks an engine for."""
    policy = types.SimpleNamespace(shape=SHAPE)
    return types.SimpleNamespace(config=config, world=world, free_bytes=free, policy=policy)


# ---------------------------------------------------------------- what is settled


def test_numbers_of_the_config_are_taken_as_they_are(make):
    made = make("actor.mb_spec.max_tokens_per_mb=2000", "ref.mb_spec.max_tokens_per_mb=10240", free=0)
    assert (made["actor"], made["ref"]) == (2000, 10240)
    assert made["source"] == {"actor": "config", "ref": "config"}
    assert made["halvings"] == []


@pytest.mark.parametrize(("on_cuda", "most"), [(False, 4096), (True, 65536)])
def test_auto_is_the_estimate_up_to_what_the_device_likes(make, on_cuda, most):
    made = make(AUTO, on_cuda=on_cuda)
    assert (made["actor"], made["ref"]) == (most, most)
    assert made["source"] == {"actor": "estimated", "ref": "estimated"}


def test_auto_is_what_fits_and_never_less_than_the_longest_pair(make, tmp_path):
    config = tiny_config(tmp_path, AUTO)
    free = sum(costs.step_bytes(SHAPE, config, num_ranks=1, tokens=1500).values())
    assert make(AUTO, free=free)["actor"] == 1500
    made = make(AUTO, free=0)
    assert (made["actor"], made["longest_pair"]) == (900, 900)


def test_auto_of_the_reference_alone(make):
    made = make("actor.mb_spec.max_tokens_per_mb=2000", "ref.mb_spec.max_tokens_per_mb=auto")
    assert (made["actor"], made["ref"]) == (2000, 4096)
    assert made["source"] == {"actor": "config", "ref": "estimated"}


def test_halved_numbers_take_the_place_of_the_estimate(make):
    entry = {"section": "actor", "from": 4096, "to": 2048}
    made = make(AUTO, before={"actor": 2048, "ref": 4096, "halvings": [entry]})
    assert (made["actor"], made["ref"], made["halvings"]) == (2048, 4096, [entry])
    # Without a halving an earlier number says nothing: memory may have become free.
    assert make(AUTO, before={"actor": 2048, "ref": 2048, "halvings": []})["actor"] == 4096


def test_ranks_agree_on_the_least(ranks, tmp_path):
    assert ranks.run(estimate_of_ranks, str(tmp_path)) == [1500, 1500]


def estimate_of_ranks(folder):
    world, config = parallel.init_world(cuda=False), tiny_config(Path(folder), AUTO)
    free = sum(costs.step_bytes(SHAPE, config, num_ranks=2, tokens=1500 + 500 * world.rank).values())
    return token_budget.estimated(engine_of(config, world, free), COSTS, None, {})["actor"]


@pytest.mark.parametrize("tokens", [900, 1300, 5000])
@pytest.mark.parametrize(("num_ranks", "batch_size"), [(1, 6), (2, 6), (2, 3), (3, 4)])
def test_the_largest_micro_batch_is_that_of_all_steps_and_ranks(tmp_path, tokens, num_ranks, batch_size):
    overrides = (f"train_dataset.batch_size={batch_size}", "total_train_steps=null")
    for seed in range(10):
        config = tiny_config(tmp_path, *overrides, f"seed={seed}")
        costs = np.random.default_rng(seed).integers(10, 900, 50)
        planned = {}
        for number in range(1, num_steps(config, 50) + 1):
            rows = schedule.step_rows(config, 50, number)
            for plan in packing.plan_step(costs[rows].tolist(), num_ranks, tokens):
                planned |= {tuple(rows[m]): costs[rows[m]].sum() for m in plan if m}
        largest, rows = token_budget.largest_micro_batch(config, costs, num_ranks, tokens)
        assert 0.99 * max(planned.values()) <= largest <= max(planned.values())
        assert planned[tuple(rows)] == largest


def test_rows_by_step_are_those_of_the_steps(tmp_path):
    for overrides in (["total_train_steps=7"], ["total_train_steps=null", "train_dataset.drop_last=true"]):
        config = tiny_config(tmp_path, "total_train_epochs=3", *overrides)
        steps = [schedule.step_rows(config, 20, s) for s in range(1, num_steps(config, 20) + 1)]
        found = list(schedule.rows_by_step(config, 20))
        assert [rows.tolist() for rows in found] == [rows.tolist() for rows in steps]


# ---------------------------------------------------------------- measuring


@pytest.fixture
def measure(make, tmp_path, monkeypatch):
    """`measured` from 4,096 tokens with all pairs in one step, where more than `limit` tokens do not fit."""

    def measured(limit, *overrides):
        tried, loaded = [], []

        def try_out(engine, rows):
            tried.append(int(COSTS[rows].sum()))
            return torch.OutOfMemoryError("CUDA out of memory.") if tried[-1] > limit else None

        monkeypatch.setattr(token_budget, "try_out", try_out)
        monkeypatch.setattr(state, "reload_policy", loaded.append)
        made = make(AUTO, *overrides) | {"actor": 4096}
        world = types.SimpleNamespace(size=1, dp_size=1)
        engine = engine_of(tiny_config(tmp_path, AUTO, *overrides), world)
        made = token_budget.measured(engine, COSTS, None, made)
        assert len(loaded) == len(tried) - 1
        return made, tried

    return measured


def test_measuring_halves_until_the_largest_planned_micro_batch_fits(measure):
    made, tried = measure(1100)
    # All 2,800 tokens in one; then [900 700 300 100], 2,000 of 2,048; then [900 100], 1,000 of 1,024.
    assert tried == [2800, 2000, 1000]
    assert (made["actor"], made["ref"]) == (1024, 1024)
    assert made["source"] == {"actor": "measured", "ref": "measured"}
    assert made["largest"]["actor"] == 1000


def test_measuring_what_fits_at_once_changes_nothing_and_leaves_the_reference_alone(measure):
    made, tried = measure(5000, "ref.mb_spec.max_tokens_per_mb=3000")
    assert tried == [2800]
    assert (made["actor"], made["ref"]) == (4096, 3000)
    assert made["source"] == {"actor": "measured", "ref": "config"}


def test_a_longest_pair_that_does_not_fit_alone_is_told(measure):
    with pytest.raises(
        token_budget.OutOfMemory, match=r"with 900 tokens a micro-batch \(OutOfMemoryError: CUDA"
    ):
        measure(800)


def test_other_errors_of_the_trial_are_not_swallowed(tmp_path, monkeypatch):
    def run(engine, rows):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(token_budget, "run_micro_batch", run)
    with one_rank() as world:
        engine = make_engine(world, tiny_config(tmp_path, AUTO), store_of(random_pairs(8), tmp_path / "p"))
        with pytest.raises(RuntimeError, match="shape mismatch"):
            token_budget.try_out(engine, [0])


def test_trying_leaves_no_trace(tmp_path, monkeypatch):
    gradients = []
    response_logps = step.response_logps

    def watched(policy, batch):
        chosen, rejected = response_logps(policy, batch)
        if chosen.requires_grad:
            chosen.register_hook(gradients.append)
        return chosen, rejected

    monkeypatch.setattr(step, "response_logps", watched)
    with one_rank() as world:
        config = tiny_config(tmp_path, AUTO, "actor.disable_dropout=false", "actor.dtype=bfloat16")
        engine = make_engine(world, config, store_of(random_pairs(16), tmp_path / "pairs"))
        engine.policy.train()
        dropout = torch.nn.Dropout(0.5)
        engine.policy.lm.model.norm.register_forward_hook(lambda _m, _a, output: dropout(output))
        before = weights(engine.policy)
        parameters = [*parallel.masters(engine.policy).values(), *engine.policy.parameters()]
        rng = torch.get_rng_state()
        assert token_budget.try_out(engine, list(range(8))) is None
        assert len(gradients) == 2
        assert torch.equal(rng, torch.get_rng_state())
        assert [p for p in parameters if p.grad is not None] == []
        for (name, new), (_, old) in zip(weights(engine.policy), before, strict=True):
            assert torch.equal(new, old), name


def weights(policy):
    """Names and copies of what the optimizer changes and of what the model computes with."""
    found = [*parallel.masters(policy).items(), *policy.named_parameters()]
    return [(name, parallel.full_tensor(parameter).clone()) for name, parameter in found]


def test_a_trial_that_failed_loads_the_policy_again(tmp_path, monkeypatch):
    def run(engine, rows):
        run_once(engine, rows)
        if len(rows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    run_once = token_budget.run_micro_batch
    monkeypatch.setattr(token_budget, "run_micro_batch", run)
    with one_rank() as world:
        config = tiny_config(tmp_path, AUTO)
        engine = make_engine(world, config, store_of(random_pairs(16), tmp_path / "pairs"))
        first = engine.policy
        assert isinstance(token_budget.try_out(engine, list(range(8))), torch.OutOfMemoryError)
        state.reload_policy(engine)
        assert engine.policy is not first
        assert token_budget.try_out(engine, list(range(4))) is None
        steps = []
        hooks = loop.Hooks(steps.append, lambda *_: None, lambda *_: False, lambda _: None)
        loop.train(engine, hooks)
        fresh = make_engine(world, config, engine.train)
        again = []
        loop.train(fresh, loop.Hooks(again.append, hooks.evaluated, hooks.due, hooks.save))
    assert [s["dpo/loss"] for s in steps] == [s["dpo/loss"] for s in again]


def test_of_several_ranks_one_out_of_memory_ends_the_trial(make, monkeypatch, tmp_path):
    monkeypatch.setattr(token_budget, "try_out", lambda *_: torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(state, "reload_policy", lambda _: pytest.fail("loaded again"))
    engine = engine_of(tiny_config(tmp_path, AUTO), types.SimpleNamespace(size=2, dp_size=2))
    with pytest.raises(token_budget.OutOfMemory) as caught:
        token_budget.measured(engine, COSTS, None, make(AUTO))
    assert caught.value.facts == {"section": "actor", "step": None}


# ---------------------------------------------------------------- errors


def allocate_too_much():
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (np._core._exceptions._ArrayMemoryError((1 << 60,), np.dtype("uint8")), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("Connection closed by peer"), False),
        (ValueError("not enough memory"), False),
        (UserError("not enough memory"), False),
    ],
)
def test_what_running_out_of_memory_is(error, expected):
    assert token_budget.is_out_of_memory(error) is expected


def test_the_allocator_of_the_cpu_is_understood():
    with pytest.raises(RuntimeError) as caught:
        allocate_too_much()
    assert token_budget.is_out_of_memory(caught.value)


def test_the_message_names_where_and_the_setting_to_lower():
    cause = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")
    error = token_budget.OutOfMemory("training", cause, step=7, tokens={"actor": 8192, "ref": 4096})
    assert str(error) == (
        "training, step 7, with 8,192 tokens a micro-batch (OutOfMemoryError: CUDA out of memory. Tried to"
        " allocate 2.00 GiB.); lower actor.mb_spec.max_tokens_per_mb = 8192"
    )
    assert error.facts == {"section": "actor", "step": 7}
    error = token_budget.OutOfMemory("reference pass", cause, tokens={"actor": 8192, "ref": 4096})
    assert "lower ref.mb_spec.max_tokens_per_mb = 4096" in str(error)
    error = token_budget.OutOfMemory("load model", cause, tokens={})
    assert error.facts["section"] is None
    assert "; use actor.dtype=bfloat16, more ranks" in str(error)


# ---------------------------------------------------------------- budget.json


@pytest.mark.parametrize(
    ("tokens", "floor", "largest", "expected"),
    [
        (8192, 100, None, 4096),
        (8192, 100, 8000, 4096),
        (8192, 100, 4096, 2048),  # 4,096 would leave the micro-batch as it is
        (16384, 100, 3912, 2048),
        (8192, 5000, 8000, 5000),
        (5000, 5000, 5000, 5000),
        (16384, 900, 900, 900),  # the longest pair alone: one more try, with all others alone as well
    ],
)
def test_a_half_splits_the_largest_micro_batch(tokens, floor, largest, expected):
    assert budget.half(tokens, floor, largest) == expected


@pytest.fixture
def run_dir(tmp_path):
    atomic_write(tmp_path / "config.yaml", "actor: {}\n")
    atomic_write(tmp_path / "manifest.json", '{"versions": {}}')
    both = {"actor": 4096, "ref": 4096}
    budget.write(
        tmp_path,
        both
        | {"source": dict.fromkeys(both, "estimated"), "asked": dict.fromkeys(both, "auto"), "largest": both}
        | {"longest_pair": 900, "halvings": []},
    )
    return tmp_path


halve = functools.partial(budget.halve, rank=1, error="no memory", step=3)


def test_halving_is_written_and_repeated_by_the_commands(run_dir):
    assert halve(run_dir, section="actor", online=False) == {
        "section": "actor",
        "from": 4096,
        "to": 2048,
        "step": 3,
        "rank": 1,
        "error": "no memory",
    }
    assert halve(run_dir, section="ref", online=False)["to"] == 2048
    assert halve(run_dir, section="actor", online=False)["to"] == 1024
    made = read_json(run_dir / "budget.json")
    assert (made["actor"], made["ref"], len(made["halvings"])) == (1024, 2048, 3)
    manifest.write_commands(run_dir)
    numbers = "actor.mb_spec.max_tokens_per_mb=1024 ref.mb_spec.max_tokens_per_mb=2048"
    written = read_json(run_dir / "manifest.json")
    start = f"dpo-kit train --config {run_dir / 'config.yaml'}"
    assert written["command"] == f"{start} trial_name=null {numbers}"
    assert written["continue"] == f"dpo-kit runs resume {run_dir}"  # which reads `budget.json`
    assert written["versions"] == {}


def test_an_online_reference_comes_down_with_the_policy(run_dir):
    entry = halve(run_dir, section="actor", online=True)
    made = budget.read(run_dir)
    assert (entry["from"], made["actor"], made["ref"]) == (4096, 2048, 2048)


def test_the_longest_pair_is_the_end(run_dir):
    for expected in (2048, 1024, 900):
        assert halve(run_dir, section="actor", online=False)["to"] == expected
    assert halve(run_dir, section="actor", online=False) is None
    assert budget.read(run_dir)["actor"] == 900


def test_a_configuration_that_was_changed_has_no_budget_yet(run_dir):
    halve(run_dir, section="actor", online=False)
    atomic_write(run_dir / "config.yaml", "actor: {dtype: float32}\n")
    assert budget.read(run_dir) == {}
    assert budget.overrides(run_dir) == []
    assert halve(run_dir, section="actor", online=False) is None


def test_what_the_config_says_needs_no_override(run_dir):
    budget.write(run_dir, budget.read(run_dir) | {"asked": {"actor": 4096, "ref": "auto"}})
    assert budget.overrides(run_dir) == ["ref.mb_spec.max_tokens_per_mb=4096"]
