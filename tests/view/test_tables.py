"""Tables of a run from hand-made files: step 0 is undefined, baselines stand beside, everything is escaped."""

from __future__ import annotations

import json
import types

import pytest

from dpo_kit import config
from dpo_kit.records import metrics
from dpo_kit.view import ranking, tables
from tests.test_notebook import Letters, store_of

NASTY = "<script>alert(1)</script>"


@pytest.fixture
def run(tmp_path):
    """A run whose policy prefers the chosen answer in 3 of 4 held-out pairs after step 8."""
    settings = config.from_tree(
        {
            "actor": {"path": "tiny-random"},
            "ref": {"logps": "cached"},
            "train_dataset": {"path": "sample"},
            "valid_dataset": {"path": "sample"},
        }
    )
    folder = tmp_path / "dpo" / "brave-fox"
    (folder / "evaluations").mkdir(parents=True)
    for step, moved in ((0, [0, 0, 0, 0]), (8, [1, 2, 1, -1])):
        rows = [
            {
                "index": i,
                "policy_chosen_logps": -10.0 - i + d,
                "policy_rejected_logps": -11.5,
                "ref_chosen_logps": -10.0 - i,
                "ref_rejected_logps": -11.5,
            }
            for i, d in enumerate(moved)
        ]
        text = "\n".join(map(json.dumps, rows))
        (folder / "evaluations" / f"step-{step}.jsonl").write_text(text + "\n")
    for step in range(1, 31):
        line = {
            "step": step,
            "dpo/loss": 0.7 - step / 100,
            "dpo/chosen_reward": 0.1,
            "dpo/rejected_reward": -0.2,
        }
        line |= {"dpo/reward_margin": 0.3, "dpo/reward_accuracy": None if step == 1 else 0.75}
        metrics.append_metrics(folder, line)
    return types.SimpleNamespace(dir=folder, name="dpo/brave-fox", config=settings, status={"state": "done"})


def with_stores(run, monkeypatch, train, held_out):
    monkeypatch.setattr(tables, "tokenizer_of", lambda store: Letters())
    folders = {
        split: str(store_of(run.dir.parent / split, pairs).path)
        for split, pairs in (("train", train), ("valid", held_out))
    }
    (run.dir / "data.json").write_text(json.dumps(folders))


def with_samples(run, samples):
    (run.dir / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))


def line_of(table, start):
    return next(line for line in table.text.split("\n") if line.startswith(start))


def test_phases_say_where_the_time_went(run):
    run.status["phases"] = [
        {"name": "reference pass", "seconds": 127.548},
        {"name": "training", "seconds": 3.0},
    ]
    text = tables.phases_table(run).text
    assert text.split("\n")[0] == "dpo/brave-fox: done"
    assert "reference pass  127.5 s" in text


def test_steps_are_an_even_choice_with_both_ends(run):
    text = tables.steps_table(run, most=4).text.split("\n")
    assert [line.split()[0] for line in text[2:]] == ["1", "11", "20", "30"]
    assert "undefined (all ties)" in text[2]
    assert "75 %" in text[-1]
    assert len(tables.steps_table(run).text.split("\n")) == 14


def test_a_first_step_of_rounding_noise_is_undefined_too(run):
    noise = {"dpo/chosen_reward": 1e-15, "dpo/rejected_reward": 2e-15, "dpo/reward_margin": -1e-15}
    for step, accuracy in ((31, 0.0), (32, 0.5)):
        line = {"step": step, "dpo/loss": 0.693, **noise, "dpo/reward_accuracy": accuracy}
        metrics.append_metrics(run.dir, line if step == 31 else {**line, "dpo/chosen_reward": 0.001})
    last, end = tables.steps_table(run, most=32).text.split("\n")[-2:]
    assert last.split() == ["31", "0.693", "+0.000", "+0.000", "+0.000", "undefined", "(all", "ties)"]
    assert end.endswith("50 %")


def test_accuracy_before_is_undefined_and_after_has_n_and_interval(run):
    table = tables.accuracy_table(run)
    assert "undefined (all ties)" in line_of(table, "reward accuracy, step 0")
    assert line_of(table, "reward accuracy, step 8").split()[4:] == [
        "3",
        "4",
        "75.0",
        "%",
        "30.1",
        "to",
        "95.4",
        "%",
    ]
    # chosen -10, -11, -12, -13 against -11.5: two right before; after +1 +2 +1 -1: three right
    assert " 2  4  50.0 %" in " ".join(line_of(table, "raw log-prob accuracy, step 0").split(" "))
    assert "75.0 %" in line_of(table, "raw log-prob accuracy, step 8")
    assert "50.0 %" in line_of(table, "without training: the reference's own log-prob")


def test_baselines_are_read_off_the_held_out_pairs(run, monkeypatch):
    train = [("Q:a, b, c", "Q:d e")] * 6
    held_out = [("Q:x, y", "Q:z"), ("Q:x, y", "Q:z"), ("Q:long, long", "Q:n"), ("Q:a", "Q:long, one")]
    with_stores(run, monkeypatch, train, held_out)
    table = tables.accuracy_table(run)
    assert "25.0 %" in line_of(table, "without training: shorter wins")
    assert "75.0 %" in line_of(table, "without training: longer wins")
    assert "75.0 %" in line_of(table, "without training: best threshold on one feature")
    assert "fitted on the 6 training pairs, where 100.0 % are right" in table.text
    assert "does not beat: longer wins; best threshold" in table.text


def test_training_that_beats_all_says_so(run, monkeypatch):
    train = [("Q:a, b, c", "Q:d e")] * 6
    held_out = [("Q:x, y", "Q:z"), ("Q:x, y", "Q:z"), ("Q:x", "Q:n, o"), ("Q:a", "Q:long, one")]
    with_stores(run, monkeypatch, train, held_out)
    assert (
        "Training (75.0 %) beats all 4 baselines; the best reaches 50.0 %" in tables.accuracy_table(run).text
    )


def test_without_pair_stores_the_other_baseline_stands_alone(run):
    (run.dir / "data.json").write_text(json.dumps({"train": None, "valid": None}))
    table = tables.accuracy_table(run)
    assert "the reference's own log-prob" in table.text
    assert "shorter wins" not in table.text
    assert "beats all 1" not in table.text
    assert "left out: the run names no pair store" in table.text
    assert "beats the reference's own log-prob." in table.text


def test_a_damaged_or_missing_store_costs_the_baselines_only(run, monkeypatch):
    with_stores(run, monkeypatch, [("Q:a", "Q:b")] * 3, [("Q:x", "Q:z")] * 4)
    (run.dir.parent / "valid" / "shared.npy").write_bytes(b"cut")
    assert "left out: " in tables.accuracy_table(run).text
    assert "75.0 %" in line_of(tables.accuracy_table(run), "reward accuracy, step 8")


def test_rules_are_fitted_on_an_even_choice_of_many_pairs(run, monkeypatch):
    with_stores(run, monkeypatch, [(f"Q:{i}", "Q:b") for i in range(10)], [("Q:x", "Q:z")] * 4)
    monkeypatch.setattr(tables, "_MOST_FITTED", 4)
    assert "fitted on the 4 training pairs" in tables.accuracy_table(run).text


def test_one_evaluation_is_one_line(run):
    (run.dir / "evaluations" / "step-0.jsonl").unlink()
    assert tables.accuracy_table(run).text.count("reward accuracy, step 8") == 1


def test_without_held_out_pairs_it_says_what_to_set(run):
    for file in (run.dir / "evaluations").iterdir():
        file.unlink()
    assert "set valid_dataset" in tables.accuracy_table(run).text


def sample(prompt, reference, policy):
    return {"prompt": prompt, "reference": reference, "policy": policy, "index": 0, "seed": 0}


def test_samples_with_the_rule(run):
    good, bad = "You can water it, because it helps you.", "I might go."
    samples = [sample(f"\n\nHuman: how do I water plant {i}?\n\nAssistant:", bad, good) for i in range(5)]
    samples.append(sample("\n\nHuman: x\n\nAssistant:", good, bad + NASTY))
    with_samples(run, samples)
    table = tables.samples_table(run, count=2)
    before = [ranking.score(s["prompt"], s["reference"]) for s in samples]
    after = [ranking.score(s["prompt"], s["policy"]) for s in samples]
    assert f"mean {sum(before) / 6:.3f} before, {sum(after) / 6:.3f} after" in table.text
    assert "n = 6" in table.text
    assert "paired t" in table.text
    assert "the first 2 of 6" in table.text
    assert "best answers after training" in table.text
    assert "worst answers after training" in table.text
    assert "<script" not in table.markup
    assert NASTY not in table.markup


def test_samples_of_other_data_carry_no_score(run):
    with_samples(run, [sample("p", "a", "b")])
    run.config.train_dataset.path = "/data/mine.jsonl"
    table = tables.samples_table(run)
    assert "rule before" not in table.markup
    assert "embedded sample" in table.text


def test_one_sample_has_no_interval(run):
    with_samples(run, [sample("p", "I might.", "You can.")])
    assert "one prompt only" in tables.samples_table(run).text


def test_no_samples_says_why(run):
    run.status["samples"] = "failed: out of memory"
    assert "failed: out of memory" in tables.samples_table(run).text


def test_reading_is_of_the_runs_own_loss(run):
    assert "The loss starts at 0.690" in tables.reading(run).text
    assert "one hopes for" in tables.reading(run).text


def test_where_names_what_is_there_and_quotes_for_the_shell(run):
    (run.dir / "model").mkdir()
    run.dir.rename(run.dir.with_name("a b"))
    run.dir = run.dir.with_name("a b")
    text = tables.where(run).text
    assert "Hugging Face folder" in text
    assert "config.yaml" not in text
    assert "tensorboard" not in text
    assert f"dpo-kit sample '{run.dir}' --prompt" in tables.where(run).markup.replace("&#x27;", "'").replace(
        "&quot;", '"'
    )
