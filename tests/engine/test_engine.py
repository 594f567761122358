"""The step and the loop: invariances, known answers, and the reference in its two places."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_kit.config import steps
from dpo_kit.engine import loop, schedule
from dpo_kit.engine.optimizer import make_optimizer
from dpo_kit.engine.step import evaluate, micro_batches, train_step
from dpo_kit.errors import UserError
from dpo_kit.model import blocks, builtin
from dpo_kit.model.parallel import full_tensor
from dpo_kit.preferences import open_store
from tests.helpers import make_engine, one_rank, random_pairs, store_of, tiny_config, train_tiny

# Micro-batches of 1, 2 and 8 of the random pairs: the longest has 47 tokens shared, 66 unshared.
MICRO_BATCHES = {1: 48, 2: 80, 8: 100_000}
STEPS = 20


def curves(records):
    return np.array([r["dpo/loss"] for r in records]), np.array([r["grad_norm"] for r in records])


def assert_same(a, b, dtype, relative_loss=False):
    (loss_a, norm_a), (loss_b, norm_b) = curves(a), curves(b)
    assert len(loss_a) == len(loss_b) == STEPS
    assert norm_a.min() > 1e-3
    difference = np.abs(loss_a - loss_b) / (np.abs(loss_a) if relative_loss else 1)
    assert difference.max() < (1e-9 if dtype == "float64" else 1e-5)
    assert (np.abs(norm_a - norm_b) / norm_a).max() < (1e-7 if dtype == "float64" else 1e-3)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_ranks_and_micro_batches_do_not_change_the_steps(ranks, tmp_path, dtype, loss_type):
    common = (f"actor.dtype={dtype}", f"actor.loss_type={loss_type}")
    alone = train_tiny(str(tmp_path / "1"), common)
    for pairs, tokens in MICRO_BATCHES.items():
        if pairs != 8:
            other = train_tiny(
                str(tmp_path / f"mb{pairs}"), (*common, f"actor.mb_spec.max_tokens_per_mb={tokens}")
            )
            assert_same(alone, other, dtype, loss_type == "ipo")
    for tokens in (100_000, 80):
        overrides = (*common, "actor.backend=fsdp:d2", f"actor.mb_spec.max_tokens_per_mb={tokens}")
        both = ranks.run(train_tiny, str(tmp_path / f"r{tokens}"), overrides)
        assert curves(both[0])[0].tolist() == curves(both[1])[0].tolist()
        assert_same(alone, both[0], dtype, loss_type == "ipo")


def test_sharing_the_prompt_does_not_change_the_steps(tmp_path):
    shared = train_tiny(str(tmp_path / "a"))
    unshared = train_tiny(str(tmp_path / "b"), ("actor.share_prompt=false",))
    # Scored prefix tokens cancel exactly when shared and up to rounding when not; Adam enlarges that rounding.
    for a, b in zip(curves(shared), curves(unshared), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_cached_and_online_reference_give_the_same_steps(ranks, tmp_path):
    for dtype in ("float32", "float64"):
        common = (f"actor.dtype={dtype}",)
        cached = train_tiny(str(tmp_path / dtype), common)
        online = train_tiny(str(tmp_path / dtype), (*common, "ref.logps=online"))
        assert_same(cached, online, dtype)
    online = ranks.run(train_tiny, str(tmp_path / "r"), ("actor.backend=fsdp:d2", "ref.logps=online"))[0]
    assert_same(cached, online, "float64")


def test_a_run_repeats_bit_for_bit(tmp_path):
    a, b = (train_tiny(str(tmp_path / n), ("actor.dtype=float32", "total_train_steps=5")) for n in "ab")
    assert [r["dpo/loss"] for r in a] == [r["dpo/loss"] for r in b]
    assert [r["grad_norm"] for r in a] == [r["grad_norm"] for r in b]


@pytest.mark.parametrize(("loss_type", "first"), [("sigmoid", math.log(2)), ("ipo", 6.25), ("hinge", 1.0)])
def test_first_loss_is_the_known_one_and_ties_are_no_accuracy(tmp_path, loss_type, first):
    step = train_tiny(
        str(tmp_path), (f"actor.loss_type={loss_type}", "actor.beta=0.2", "total_train_steps=1")
    )[0]
    assert step["dpo/loss"] == pytest.approx(first, abs=1e-12)
    assert step["dpo/reward_accuracy"] is None
    assert 0 < step["dpo/logp_accuracy"] < 1


def test_learning_rate_zero_changes_nothing(tmp_path):
    steps = train_tiny(str(tmp_path), ("actor.optimizer.lr=0", "total_train_steps=6"))
    assert [s["dpo/loss"] for s in steps] == [pytest.approx(math.log(2), abs=1e-12)] * 6
    assert [s["lr"] for s in steps] == [0.0] * 6


def test_the_short_last_batch_divides_by_its_own_pairs(tmp_path):
    """11 pairs in steps of 8: the second step has 3; at lr 0 its loss is still ln 2, not 3/8 of it."""
    steps = train_tiny(str(tmp_path), ("actor.optimizer.lr=0", "total_train_epochs=1"), num_pairs=11)
    assert [s["dpo/loss"] for s in steps] == [pytest.approx(math.log(2), abs=1e-12)] * 2


def test_fewer_pairs_than_ranks(ranks, tmp_path):
    """The last step has one pair for two ranks: the second runs it with weight 0."""
    one = train_tiny(str(tmp_path / "1"), ("total_train_epochs=1",), num_pairs=9)
    two = ranks.run(train_tiny, str(tmp_path / "2"), ("total_train_epochs=1", "actor.backend=fsdp:d2"), 9)[0]
    assert len(one) == len(two) == 2
    np.testing.assert_allclose(curves(one), curves(two), rtol=1e-9)


def test_numbers_that_are_not_finite_change_no_weight(tmp_path):
    with one_rank() as world:
        config = tiny_config(tmp_path)
        state = make_engine(world, config, store_of(random_pairs(8), tmp_path / "pairs"))
        optimizer = make_optimizer(state.policy, config.actor.optimizer)
        batches = list(micro_batches(state, state.train, range(8), state.max_tokens))
        before = [full_tensor(p).clone() for p in state.policy.parameters()]
        state.ref_train[3, 0] = np.nan
        _, norm, _ = train_step(state, optimizer, batches, 8, 1e-3)
        assert not torch.isfinite(norm)
        for a, p in zip(before, state.policy.parameters(), strict=True):
            assert torch.equal(a, full_tensor(p))
        state.ref_train[3, 0] = -1.0
        train_step(state, optimizer, batches, 8, 1e-3)
        assert not all(
            torch.equal(a, full_tensor(p)) for a, p in zip(before, state.policy.parameters(), strict=True)
        )


def broken_step(folder, *, step, side, **settings):
    """What is said, and of which rows, when pair 3's log-prob of a side is no number (None: the loss alone)."""
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
    with one_rank() as world:
        config = tiny_config(Path(folder), f"actor.backend=fsdp:d{world.size}", *overrides)
        if world.is_main:
            store_of(random_pairs(8), Path(folder) / "pairs")
        world.barrier()
        state = make_engine(world, config, open_store(Path(folder) / "pairs"))
        batches = list(micro_batches(state, state.train, range(8), state.max_tokens))
        if side == "reference":
            state.ref_train[3, 0] = np.nan
        if side == "policy":
            run = state.policy.forward

            def forward(batch):
                logps = run(batch)
                position = batch.rows.tolist().index(3) if 3 in batch.rows.tolist() else None
                if position is None or not batch.weights[position]:
                    return logps
                at = batch.summands[batch.owners == 2 * position]
                return logps.index_fill(0, at, np.nan)

            state.policy.forward = forward
        record = {"step": step, "dpo/loss": math.nan, "grad_norm": math.nan}
        with pytest.raises(UserError) as caught:
            loop.check_finite(state, record, batches)
        return str(caught.value), list(caught.value.data_rows)


UNTRAINED = " are not finite before any update, so the learning rate is not to blame."
OVERFLOWS = "The model overflows on these rows: leave them out, or use another model"
LOW = {"actor__dtype": "bfloat16", "ref__dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("step", "side", "settings", "said", "rows"),
    [
        (1, "policy", {}, f": log-probs of the policy{UNTRAINED} {OVERFLOWS}", [3]),
        (1, "policy", LOW, f": log-probs of the policy{UNTRAINED} Use actor.dtype=float32", [3]),
        (1, "reference", {}, f": log-probs of the reference{UNTRAINED} {OVERFLOWS}", [3]),
        (1, "reference", LOW, f": log-probs of the reference{UNTRAINED} Use ref.dtype=float32", [3]),
        (
            1,
            None,
            LOW,
            f": the gradient is{UNTRAINED.removeprefix(' are')} Use actor.dtype=float32",
            list(range(8)),
        ),
        (
            5,
            "policy",
            {},
            "; no weight was changed by this step. Lower actor.optimizer.lr = 0.001",
            [3],
        ),
        (
            5,
            "policy",
            LOW,
            "; no weight was changed by this step. Lower actor.optimizer.lr = 0.001, or use actor.dtype=float32",
            [3],
        ),
        (5, "reference", {}, f": log-probs of the reference are not finite. {OVERFLOWS}", [3]),
        (5, "policy", {"actor__optimizer__lr": 0}, f": log-probs of the policy{UNTRAINED} {OVERFLOWS}", [3]),
    ],
)
def test_what_is_said_of_numbers_that_are_not_finite(tmp_path, step, side, settings, said, rows):
    told, found = broken_step(tmp_path, step=step, side=side, **settings)
    assert told == f"step {step}: loss nan, gradient norm nan{said}"
    assert found == rows


def broken_step_on_ranks(folder):
    return broken_step(folder, step=1, side="policy")


def test_the_rows_at_fault_are_gathered_from_all_ranks(ranks, tmp_path):
    both = ranks.run(broken_step_on_ranks, str(tmp_path))
    assert both[0] == both[1]
    assert both[0][1] == [3]


def test_first_step_check_catches_a_reference_that_differs(tmp_path):
    with one_rank() as world:
        config = tiny_config(tmp_path)
        state = make_engine(world, config, store_of(random_pairs(8), tmp_path / "pairs"))
        state.ref_train[5, 1] += 0.01  # one response of one pair
        hooks = loop.Hooks(lambda _: None, lambda *_: None, lambda *_: False, lambda _: None)
        with pytest.raises(UserError, match=r"first step: loss 0\.69.*ref\.first_step_check=warn"):
            loop.train(state, hooks)


def test_evaluation_scores_every_pair_once_in_store_order(ranks, tmp_path):
    a = evaluate_tiny(str(tmp_path / "1"))
    b = ranks.run(evaluate_tiny, str(tmp_path / "2"), ("actor.backend=fsdp:d2",))[1]
    assert [line["index"] for line in a[1]] == list(range(13))
    for one, two in zip(a[1], b[1], strict=True):
        assert one == pytest.approx(two, abs=1e-12)
    assert a[0] == pytest.approx(b[0])
    assert a[0]["dpo-eval/reward_accuracy"] is None
    assert a[0]["dpo-eval/num_pairs"] == 13


def evaluate_tiny(folder, overrides=()):
    with one_rank() as world:
        root = Path(folder)
        if world.is_main:
            store_of(random_pairs(13, seed=1), root / "pairs")
        world.barrier()
        store = open_store(root / "pairs")
        state = make_engine(world, tiny_config(root / "runs", *overrides), store, store)
        return evaluate(state, store, state.ref_valid)


def test_reference_values_come_from_the_cache_whatever_beta_loss_or_lr(tmp_path, capsys):
    train_tiny(str(tmp_path), ("total_train_steps=1",))
    assert "reference: 0 of 8 pairs from the cache" in capsys.readouterr().out
    changed = ("actor.beta=0.3", "actor.loss_type=ipo", "actor.optimizer.lr=1e-5", "total_train_steps=1")
    train_tiny(str(tmp_path), changed)
    assert "reference: 8 of 8 pairs from the cache" in capsys.readouterr().out
    train_tiny(str(tmp_path), ("actor.dtype=float32", "total_train_steps=1"))
    assert "reference: 0 of 8 pairs from the cache" in capsys.readouterr().out
    assert len(list((tmp_path / "runs" / ".cache" / "reference").iterdir())) == 2


def test_a_changed_weight_misses_for_every_pair_and_leaves_the_old_values(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    train_tiny(str(tmp_path), ("total_train_steps=1",))
    changed = tmp_path / "changed"
    shutil.copytree(builtin.ensure("tiny-random"), changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    paths = (
        f"actor.path={changed}",
        f"ref.path={changed}",
        "tokenizer_path=tiny-random",
        "total_train_steps=1",
    )
    capsys.readouterr()
    train_tiny(str(tmp_path), paths)
    assert "reference: 0 of 8 pairs from the cache" in capsys.readouterr().out
    train_tiny(str(tmp_path), ("total_train_steps=1",))
    assert "reference: 8 of 8 pairs from the cache" in capsys.readouterr().out


def test_schedules_start_above_zero_and_end_where_they_should(tmp_path):
    o = tiny_config(tmp_path).actor.optimizer
    o.lr, o.min_lr_ratio, o.warmup_steps_proportion = 1.0, 0.1, 0.1
    for kind, last, middle in (("cosine", 0.1, 0.55), ("linear", 0.1, 0.55), ("constant", 1.0, 1.0)):
        o.lr_scheduler_type = kind
        lrs = [schedule.learning_rate(k, 20, o) for k in range(1, 21)]
        assert lrs[:2] == pytest.approx([0.5, 1.0])
        assert lrs[-1] == pytest.approx(last)
        assert lrs[10] == pytest.approx(middle)
        assert lrs[1:] == sorted(lrs[1:], reverse=True)
    o.warmup_steps_proportion = 0.0
    assert schedule.learning_rate(1, 1, o) > 0


def test_rows_of_a_step_depend_on_seed_and_step_alone(tmp_path):
    config = tiny_config(tmp_path, "train_dataset.batch_size=4")
    epoch = np.concatenate([schedule.step_rows(config, 10, s) for s in (1, 2, 3)])
    assert sorted(epoch) == list(range(10))
    again = np.concatenate([schedule.step_rows(config, 10, s) for s in (4, 5, 6)])
    assert sorted(again) == list(range(10))
    assert epoch.tolist() != again.tolist()
    config.total_train_steps = 2
    used = np.concatenate([schedule.step_rows(config, 10, s) for s in (1, 2)])
    assert schedule.rows_of_run(config, 10).tolist() == sorted(used)
    config.total_train_steps = None
    assert schedule.rows_of_run(config, 10).tolist() == list(range(10))
    config.train_dataset.drop_last = True
    assert steps.steps_per_epoch(config, 10) == 2
    config.train_dataset.shuffle = False
    assert schedule.step_rows(config, 10, 2).tolist() == [4, 5, 6, 7]
    with pytest.raises(UserError, match="leaves no step: 3 pairs"):
        steps.num_steps(config, 3)


class HostSync(Exception):
    """The host asked the device for a value."""


def test_a_step_never_waits_for_the_device(tmp_path, monkeypatch):
    """Every way from a tensor to a Python number raises between the first launch and the update."""

    def refuse(*_):
        raise HostSync

    with one_rank() as world:
        config = tiny_config(tmp_path, "actor.dtype=bfloat16")
        state = make_engine(world, config, store_of(random_pairs(8), tmp_path / "pairs"))
        optimizer = make_optimizer(state.policy, config.actor.optimizer)
        batches = list(micro_batches(state, state.train, range(8), 100))
        assert len(batches) > 1
        state.policy.train()
        train_step(state, optimizer, batches, 8, 1e-3)
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
                patch.setattr(torch.Tensor, name, refuse)
            with pytest.raises(HostSync):
                float(torch.ones(()))
            sums, norm, _ = train_step(state, optimizer, batches, 8, 1e-3)
        assert sums[0] == 8
        assert norm > 0


def weights_after_two_steps(folder, clip, before_update=lambda params: None):
    with one_rank() as world:
        config = tiny_config(folder, "actor.dtype=float32", f"actor.optimizer.gradient_clipping={clip}")
        state = make_engine(world, config, store_of(random_pairs(8), folder / "pairs"))
        optimizer = make_optimizer(state.policy, config.actor.optimizer)
        optimizer.register_step_pre_hook(lambda o, *_: before_update(o.param_groups[0]["params"]))
        batches = list(micro_batches(state, state.train, range(8), 10_000))
        for _ in range(2):
            _, norm, _ = train_step(state, optimizer, batches, 8, 1e-3)
            assert norm > 0.1
        return [full_tensor(p).clone() for p in state.policy.parameters()]


def clip_now(params):
    torch.nn.utils.clip_grad_norm_(params, 0.01)


def test_clipping_inside_the_optimizer_equals_clipping_before_it(tmp_path):
    inside = weights_after_two_steps(tmp_path / "a", 0.01)
    before = weights_after_two_steps(tmp_path / "b", 1e30, clip_now)
    never = weights_after_two_steps(tmp_path / "c", 1e30)
    for a, b in zip(inside, before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)
    assert any((a - c).abs().max() > 1e-5 for a, c in zip(inside, never, strict=True))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # inside torch.compile
@pytest.mark.parametrize(
    "option",
    ["actor.gradient_checkpointing=false", "actor.gradient_checkpointing=selective", "actor.compile=true"],
)
def test_options_for_memory_and_speed_do_not_change_the_numbers(tmp_path, monkeypatch, option):
    # Without a C++ compiler: the same graphs, run by torch's own kernels.
    compiled = blocks.compile_blocks
    monkeypatch.setattr(blocks, "compile_blocks", lambda b, **o: compiled(b, **o, backend="aot_eager"))
    plain = train_tiny(str(tmp_path / "a"), ("total_train_steps=6",))
    other = train_tiny(str(tmp_path / "b"), ("total_train_steps=6", option))
    for a, b in zip(curves(plain), curves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_50_steps_shared_and_unshared_are_one_curve(tmp_path):
    options = (
        "actor.dtype=float32",
        "actor.optimizer.lr=5e-6",
        "total_train_epochs=10",
        "total_train_steps=50",
    )
    shared = train_tiny(str(tmp_path / "a"), options)
    unshared = train_tiny(str(tmp_path / "b"), (*options, "actor.share_prompt=false"))
    a, b = curves(shared)[0], curves(unshared)[0]
    assert len(a) == 50
    assert np.ptp(a) > 1e-3
    assert np.abs(a - b).max() < 1e-5
