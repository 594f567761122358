"""What becomes of a run that is started again, as a table: no disk, no process."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_kit import config as config_module
from dpo_kit.records import resuming
from dpo_kit.records.facts import Facts, Point
from tests.fakes import TREE

OWN = config_module.from_tree(TREE, ["trial_name=one", "total_train_steps=9", "recover.mode=auto"])
SUPERVISOR = {"pid": 7, "host": "there"}


def facts(state="stopped", *, steps=(), trained=False, **given):
    """A run as its folder would tell it."""
    of = {"config": config_module.to_tree(OWN), "train": "aaa"}
    at = Point(max(steps), of) if steps else Point(9, of, trained=True) if trained else None
    status = {"state": state, "step": 9 if trained or state == "done" else 4, "supervisor": SUPERVISOR}
    return Facts(Path("/r/exp/one"), status, OWN, at=at, whole=steps, trained=trained, **given)


def other(*overrides):
    return config_module.from_tree(config_module.to_tree(OWN), overrides)


LATER = ["evaluator.num_samples=3"]
TABLE = [
    # the run                                      other settings             act            told
    (
        facts("running"),
        [],
        "attach",
        r"exp/one is running, by process 7 on there; stop it \(dpo-kit runs stop",
    ),
    (facts("queued", steps=(2,)), ["actor.beta=0.3"], "attach", "by process 7"),
    (facts("done"), [], "skip", "exp/one is done at step 9: skipped"),
    (facts("done"), ["actor.mb_spec.max_tokens_per_mb=64"], "skip", "skipped"),
    (facts("done"), ["total_train_steps=12"], "refuse", "it kept no checkpoint to go on from"),
    (
        facts("done", steps=(9,)),
        ["total_train_steps=12"],
        "go on",
        "done at step 9; going on: total_train_steps",
    ),
    (facts("done", steps=(9, 4)), ["actor.beta=0.3"], "refuse", "fork it: .* --step 4 actor.beta=0.3"),
    (
        facts(),
        ["actor.beta=0.3"],
        "start anew",
        "exp/one was stopped; its configuration changes: actor.beta: ",
    ),
    (facts(lost="its checkpoint is gone"), [], "refuse", "its checkpoint is gone"),
    (facts(damaged="none is whole"), [], "refuse", "none is whole"),
    (replace(facts("failed"), config=None, damaged="no JSON"), [], "refuse", "no JSON"),
    (facts("failed", steps=(4, 2)), [], "go on", "^$"),
    (facts("failed", steps=(4,)), ["total_train_steps=12"], "go on", "was failed; its configuration changes"),
    (facts("failed", steps=(4, 2)), ["total_train_steps=3"], "refuse", "end at step 3; raise .* --step 2 "),
    (
        facts("failed", steps=(4,)),
        ["actor.beta=0.3"],
        "refuse",
        "use another trial_name, or fork it: .* --step 4",
    ),
    (facts("failed", steps=(4,)), ["actor.dtype=float64"], "refuse", r"float64\); use another trial_name$"),
    (
        facts("failed", steps=(4,), longest_pair=99),
        ["actor.mb_spec.max_tokens_per_mb=64"],
        "refuse",
        "use 99 or more",
    ),
    (facts("failed", trained=True), [], "finish", "^$"),
    (facts("failed", trained=True, steps=(8,)), LATER, "finish", "evaluator.num_samples: 0 -> 3"),
    (
        facts("failed", trained=True, steps=(8,)),
        ["total_train_steps=12"],
        "go on",
        "total_train_steps: 9 -> 12",
    ),
    (facts("failed", trained=True), ["total_train_steps=12"], "start anew", "total_train_steps: 9 -> 12"),
    (
        facts("failed", trained=True),
        ["actor.beta=0.3"],
        "refuse",
        "exp/one is trained with another configuration",
    ),
]


@pytest.mark.parametrize(("run", "overrides", "act", "told"), TABLE)
def test_what_becomes_of_a_trial(run, overrides, act, told):
    found = resuming.decide(run, other(*overrides))
    assert found.act == act
    assert re.search(told, found.told)
    assert found.step == {"go on": max(run.whole, default=0), "finish": 9}.get(act, 0)
    asked = resuming.decide(run, other(*overrides), mode="disabled")
    assert asked.act == ("attach" if act == "attach" else "refuse")


@pytest.mark.parametrize(
    ("run", "act", "told"),
    [
        (facts("running"), "attach", "exp/one is running; nothing to resume"),
        (facts("done", damaged="none is whole"), "skip", "exp/one is done; nothing to resume"),
        (facts(), "start anew", "^$"),
        (facts(steps=(4, 2)), "go on", "^$"),
        (facts(trained=True), "finish", "^$"),
        (facts(damaged="none is whole"), "refuse", "none is whole"),
        (facts(lost="its checkpoint is gone"), "refuse", "its checkpoint is gone"),
    ],
)
def test_what_becomes_of_a_run_with_its_own_settings(run, act, told):
    found = resuming.decide(run, devices=0)
    assert (found.act, bool(re.search(told, found.told))) == (act, True)


def test_a_resume_needs_the_devices_and_what_is_trained_does_not():
    eight = other("cluster.n_gpus_per_node=8")
    run = replace(facts(steps=(4,)), config=eight)
    told = resuming.decide(run, devices=2).told
    assert "cluster.n_gpus_per_node = 8 is more than the 2 CUDA devices" in told
    assert told.endswith("cluster.n_gpus_per_node=auto actor.backend=fsdp ref.backend=fsdp")
    assert resuming.decide(run, devices=8).act == "go on"
    assert resuming.decide(replace(facts(trained=True), config=eight), devices=0).act == "finish"


def test_other_content_is_refused_where_it_is_known():
    run, moved = facts(steps=(4,)), other("train_dataset.path=/elsewhere.jsonl")
    assert run.at.moved(moved)
    assert resuming.refusal(run, moved) == ""
    assert resuming.refusal(run, moved, {"train": "aaa"}) == ""
    told = resuming.refusal(run, moved, {"train": "bbb"})
    assert "from other data or weights" in told
    assert "the content of train_dataset: aaa -> bbb); put that back, or use another trial_name" in told


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "bfloat16")])
def test_a_fork_does_not_leave_or_enter_float64(dtypes):
    before, now = (
        other(f"actor.dtype={dtype}", f"ref.dtype={dtype}", "ref.logps=online") for dtype in dtypes
    )
    (problem,) = resuming.fork_problems(before, now, 4, 9)
    assert problem.startswith(f"actor.dtype: {dtypes[0]} -> {dtypes[1]}: ")
    assert resuming.fork_problems(before, before, 4, 9) == []
    assert resuming.fork_problems(other("actor.dtype=float32"), other("actor.dtype=bfloat16"), 4, 9) == []


@pytest.mark.parametrize(
    "override", ["actor.lora_rank=8", "actor.target_modules=[q_proj]", "actor.use_lora=false"]
)
def test_a_fork_keeps_its_parents_adapters(override):
    before = other("actor.use_lora=true")
    key = override.partition("=")[0]
    (problem,) = resuming.fork_problems(before, other("actor.use_lora=true", override), 4, 9)
    assert f"makes others of them: {key}: " in problem
    assert "of a run with saver.merged=true" in problem
    assert resuming.fork_problems(other(), other("actor.lora_rank=8"), 4, 9) == []
