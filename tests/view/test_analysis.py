"""Intervals against published values, accuracies of hand-made evaluations, and how a curve is read."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dpo_kit.view import analysis


def evaluation(chosen, rejected, ref_chosen=None, ref_rejected=None):
    n = len(chosen)
    columns = {
        "policy_chosen_logps": chosen,
        "policy_rejected_logps": rejected,
        "ref_chosen_logps": ref_chosen if ref_chosen is not None else [0.0] * n,
        "ref_rejected_logps": ref_rejected if ref_rejected is not None else [0.0] * n,
    }
    return {k: np.asarray(v, dtype=np.float64) for k, v in columns.items()}


# Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score): 81/263, 15/148, 0/20, 1/29
@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published_values(correct, n, low, high):
    assert analysis.wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_refuses_what_is_no_share():
    with pytest.raises(ValueError, match="correct = 3 of n = 2"):
        analysis.wilson(3, 2)
    with pytest.raises(ValueError, match="n >= 1"):
        analysis.wilson(0, 0)


# Two-sided 95 % points of any Student t table
@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (39, 2.023), (1000, 1.962)]
)
def test_t_quantile_table_values(degrees, t):
    assert analysis.t_quantile(0.975, degrees) == pytest.approx(t, abs=6e-4)


def test_paired_interval_by_hand():
    # d = 1, 2, 3: mean 2, sd 1, t(2) = 4.303, half width 4.303 / sqrt(3) = 2.484
    paired = analysis.paired_interval([1, 1, 1], [2, 3, 4])
    assert (paired.before, paired.after, paired.difference, paired.n) == (1, 3, 2, 3)
    assert (paired.low, paired.high) == pytest.approx((2 - 2.484, 2 + 2.484), abs=2e-3)
    assert "paired t" in str(paired)
    with pytest.raises(ValueError, match="got 1 and 1"):
        analysis.paired_interval([1], [2])


def test_step_zero_is_undefined_never_zero_percent():
    before = analysis.reward_accuracy(evaluation([-5, -6], [-7, -8], [-5, -6], [-7, -8]))
    assert before.value is None
    assert before.percent == "undefined (all ties)"
    assert before.interval is None


def test_rounding_is_no_preference():
    noise = analysis.reward_accuracy(evaluation([-5 + 2e-5, -6], [-7, -8 + 1e-5], [-5, -6], [-7, -8]))
    assert noise.percent == "undefined (all ties)"
    moved = analysis.reward_accuracy(evaluation([-5 + 1e-2, -6], [-7, -8], [-5, -6], [-7, -8]))
    assert (moved.correct, moved.n, moved.ties) == (1, 2, 1)
    assert moved.percent == "50.0 %"


def test_reward_accuracy_is_of_log_ratios_and_logp_accuracy_is_not():
    # pair 0: rewards +1 / -1; pair 1: -1 / +1; raw log-probs prefer the rejected answer of pair 0
    e = evaluation([-9, -3], [-4, -2], [-10, -2], [-3, -3])
    assert analysis.log_ratio_margins(e).tolist() == [2, -2]
    assert analysis.reward_accuracy(e).correct == 1
    assert analysis.logp_accuracy(e).correct == 0
    assert analysis.logp_accuracy(e, "ref").correct == 1


def test_ranked_counts_ties_half():
    assert analysis.ranked(np.array([1.0, 0.0, -1.0, 0.0])) == analysis.Share(2.0, 4, 2)


def test_evaluations_are_read_in_order_and_without_a_torn_line(tmp_path):
    folder = tmp_path / "evaluations"
    folder.mkdir()
    for step in (10, 0, 9):
        lines = [json.dumps({"index": i, "policy_chosen_logps": -1.5 * step}) for i in (4, 7)]
        (folder / f"step-{step}.jsonl").write_text("\n".join([*lines, '{"index": 9, "pol']))
    (folder / "notes.jsonl").write_text("x")
    assert analysis.evaluation_steps(tmp_path) == [0, 9, 10]
    columns = analysis.read_evaluation(tmp_path, 10)
    assert columns["index"].tolist() == [4, 7]
    assert columns["policy_chosen_logps"].tolist() == [-15.0, -15.0]
    assert analysis.read_evaluation(tmp_path, 11) == {}
    assert analysis.evaluation_steps(tmp_path / "nothing") == []


def test_samples_are_scored_before_and_after():
    samples = [
        {"prompt": "p", "reference": "xx", "policy": "xxxx"},
        {"prompt": "qq", "reference": "y", "policy": ""},
    ]
    before, after = analysis.score_samples(samples, lambda prompt, answer: 10 * len(prompt) + len(answer))
    assert before.tolist() == [12, 21]
    assert after.tolist() == [14, 20]


def test_best_and_worst_never_overlap():
    assert analysis.best_and_worst([1, 5, 3, 2, 4, 0, 6]) == ([6, 1, 4], [5, 0, 3])
    assert analysis.best_and_worst([1, 2, 3]) == ([2, 1], [0])
    assert analysis.best_and_worst([7]) == ([0], [])
    assert analysis.best_and_worst([]) == ([], [])


def step(k, loss, chosen, rejected):
    return {"step": k, "dpo/loss": loss, "dpo/chosen_reward": chosen, "dpo/rejected_reward": rejected}


def read(lines, loss_type="sigmoid", beta=0.1):
    return " ".join(analysis.reading(lines, loss_type=loss_type, beta=beta))


def test_reading_names_the_first_loss():
    assert "0.693 (ln 2 = 0.693" in read([step(1, math.log(2), 0, 0)])
    assert "6.250 ((1/(2 beta))^2 = 6.250" in read([step(1, 6.25, 0, 0)], "ipo", 0.2)
    assert "expected 1 = 1.000" in read([step(1, 0.9, 0, 0)], "hinge")
    assert "No optimizer step" in read([])


@pytest.mark.parametrize(
    ("chosen", "rejected", "text"),
    [
        (0.0, 0.0, "stuck at 0"),
        (-0.5, -1.0, "Both rewards fell"),
        (0.5, -1.0, "one hopes for"),
        (1.5, 0.5, "Both rewards rose"),
        (-1.0, -0.5, "margin is not positive"),
    ],
)
def test_reading_of_rewards(chosen, rejected, text):
    assert text in read([step(k, 0.6, chosen, rejected) for k in range(1, 21)])


def test_reading_of_evaluations():
    held_out = [
        {"step": s, "dpo-eval/loss": loss, "dpo-eval/reward_accuracy": a}
        for s, loss, a in ((0, 0.693, None), (10, 0.5, 0.8), (20, 0.6, 0.75))
    ]
    text = read([step(1, math.log(2), 0, 0), *held_out])
    assert "ends at 75.0 % (step 20)" in text
    assert "lowest at step 10 (0.500) and rose to 0.600" in text
    assert "undefined (all ties)" in read([step(1, math.log(2), 0, 0), held_out[0]])
    early = [{**held_out[0], "step": 0, "dpo-eval/loss": 0.4}, held_out[2]]
    assert "lowest before training (0.400) and rose to 0.600" in read([step(1, math.log(2), 0, 0), *early])
    assert "lowest" not in read([step(1, math.log(2), 0, 0), *held_out[:2]])


def test_a_gradient_that_jumps_is_told():
    lines = [
        {"step": i, "dpo/loss": 0.6, "dpo/chosen_reward": 1.0, "dpo/rejected_reward": 0.1, "grad_norm": 2.0}
        for i in range(1, 31)
    ]
    assert analysis.spikes(lines) == []
    lines[4]["grad_norm"] = 100.0  # too early to know what is usual
    lines[20]["grad_norm"] = 11.0
    assert analysis.spikes(lines) == [21]
    said = analysis.reading(lines, loss_type="sigmoid", beta=0.1)
    assert any("jumped at step 21 " in line for line in said)
