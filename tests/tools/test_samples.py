"""Prompts and answers: which prompts are asked, how answers are drawn, and in which layout."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_kit import config as config_module
from dpo_kit import dataset
from dpo_kit.errors import UserError
from dpo_kit.model import builtin
from dpo_kit.preferences import Pair
from dpo_kit.records import run_folder
from dpo_kit.supervise import restarts
from dpo_kit.tools import samples
from tests.helpers import store_of, tiny_config
from tests.toy_tokenizers import TEMPLATES, save_tokenizer


@pytest.fixture(scope="module")
def tiny():
    """The tiny model as `samples` loads it."""
    return samples.load_plain(builtin.ensure("tiny-random"), "float32")


def pair_of(context, chosen, rejected, index=0):
    ids = [np.array([*context, *tail], np.int32) for tail in (chosen, rejected)]
    return Pair(*ids, len(context), len(context), len(context), index)


# ---------------------------------------------------------------- prompts


def test_each_prompt_is_asked_once_in_store_order(tmp_path):
    pairs = [
        pair_of([5, 6], [7], [8], index=3),
        pair_of([5, 6], [9], [8], index=4),  # the same prompt again
        pair_of([], [7], [8], index=5),  # nothing to answer
        pair_of([5], [6], [8], index=7),
        pair_of([4], [6], [8], index=9),
    ]
    store = store_of(pairs, tmp_path / "pairs")
    assert samples.distinct_prompts(store, 9) == [([5, 6], 3), ([5], 7), ([4], 9)]
    assert samples.distinct_prompts(store, 2) == [([5, 6], 3), ([5], 7)]
    assert samples.distinct_prompts(store, 0) == []


def chat(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


QUESTION = "What </s> is <|im_end|> it?"  # special-token text of a user stays text
ROWS = {
    "raw": {side: f"\n\nHuman: {QUESTION}\n\nAssistant: {side}" for side in ("chosen", "rejected")},
    "prompt": {"prompt": QUESTION, "chosen": " yes", "rejected": " no"},
    "conversation": {side: chat(QUESTION, side) for side in ("chosen", "rejected")},
}


@pytest.mark.parametrize("adds", ["", "bos"])
@pytest.mark.parametrize(
    ("layout", "template"), [("raw", None), ("prompt", None), *(("conversation", name) for name in TEMPLATES)]
)
def test_a_question_is_put_as_the_pair_store_puts_it(tmp_path, layout, template, adds):
    folder = save_tokenizer(tmp_path / "t", bos="<s>", adds=adds, template=TEMPLATES.get(template))
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[layout]) + "\n")
    overrides = (f"tokenizer_path={folder}", f"train_dataset.path={tmp_path / 'rows.jsonl'}")
    store = dataset.build(tiny_config(tmp_path / "runs", *overrides))
    assert store.meta["layout"] == layout
    pair = store.pair(0)
    asked = samples.prompt_ids(builtin.load_tokenizer(folder), layout, QUESTION)
    assert asked == pair.chosen_ids[: pair.context].tolist()


def test_raw_text_that_says_who_speaks_is_taken_as_it_is():
    tokenizer = builtin.load_tokenizer(builtin.ensure("tiny-random"))
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert tokenizer.decode(samples.prompt_ids(tokenizer, "raw", text)) == text


# ---------------------------------------------------------------- answers


def answers_of(model, prompts, end_ids=(0,), max_new_tokens=12, temperature=0.0, seed=0, **more):
    return samples.generate(
        model,
        prompts,
        end_ids=list(end_ids),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        **more,
    )


PROMPTS = [[10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32]]


def test_left_padding_does_not_change_greedy_answers(tiny):
    together = answers_of(tiny, PROMPTS)
    assert together == [answers_of(tiny, [prompt])[0] for prompt in PROMPTS]
    assert len({tuple(answer) for answer in together}) == 3


def test_the_same_seed_gives_the_same_answers_and_another_one_others(tiny):
    twin = samples.load_plain(builtin.ensure("tiny-random"), "float32")
    first = answers_of(tiny, PROMPTS, temperature=1.0, seed=7)
    torch.manual_seed(99)  # what was drawn before does not matter
    assert answers_of(twin, PROMPTS, temperature=1.0, seed=7) == first
    assert answers_of(tiny, PROMPTS, temperature=1.0, seed=8) != first


def test_sampling_draws_from_every_token(tiny, monkeypatch):
    """transformers' own default keeps the 50 likeliest tokens; random weights are nearly uniform over 264."""
    monkeypatch.setattr(samples, "BATCH", 1000)
    drawn = answers_of(tiny, [[5]] * 1000, max_new_tokens=1, temperature=1.0)
    assert len({token for answer in drawn for token in answer}) > 150


def test_an_end_token_cuts_the_answer(tiny):
    (whole,) = answers_of(tiny, [PROMPTS[0]])
    assert len(whole) == 12
    end = whole[5]
    (cut,) = answers_of(tiny, [PROMPTS[0]], end_ids=[0, end])
    assert cut == whole[: whole.index(end)]


def test_progress_counts_prompts_over_batches(tiny, monkeypatch):
    monkeypatch.setattr(samples, "BATCH", 2)
    told = []
    answers_of(tiny, PROMPTS, done=10, progress=told.append)
    assert told == [12, 13]


# ---------------------------------------------------------------- a run's samples


def make_run(tmp_path, *overrides):
    config = tiny_config(
        tmp_path / "runs", "evaluator.max_new_tokens=4", "evaluator.num_samples=2", *overrides
    )
    text = config_module.to_yaml(config)
    run_dir = run_folder.create(tmp_path / "runs", "dpo", "one", config_text=text, manifest={})
    return run_dir


def export_tiny(folder, end_ids):
    """tiny-random as a run exports it, with its trained end tokens."""
    import shutil

    shutil.copytree(builtin.ensure("tiny-random"), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end_ids}))


def test_the_newest_export_is_taken(tmp_path):
    run_dir = make_run(tmp_path)
    with pytest.raises(UserError, match="has no exported model yet; wait for the run to end, or set saver"):
        samples.latest_export(run_dir)
    for step in (9, 10):
        export_tiny(run_dir / "exports" / f"step-{step}", 256)
    assert samples.latest_export(run_dir).name == "step-10"
    export_tiny(run_dir / "model", 256)
    assert samples.latest_export(run_dir).name == "model"


def test_answers_end_where_the_trained_texts_do(tmp_path):
    run_dir = make_run(tmp_path)
    tokenizer = SimpleNamespace(eos_token_id=7)
    export_tiny(run_dir / "model", [5, 7])
    assert samples.end_tokens(run_dir, tokenizer) == [5, 7]
    (run_dir / "model" / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert samples.end_tokens(run_dir, tokenizer) == [9, 7]


def test_samples_prefer_held_out_prompts_and_equal_weights_answer_equally(tmp_path):
    run_dir = make_run(tmp_path, "evaluator.temperature=1.0")
    export_tiny(run_dir / "model", 256)
    store_of([pair_of([70, 71], [7], [8])], tmp_path / "train")
    store_of([pair_of([80 + i, 81], [7], [8], index=i) for i in range(5)], tmp_path / "valid")
    data = {"train": str(tmp_path / "train"), "valid": str(tmp_path / "valid")}
    (run_dir / "data.json").write_text(json.dumps(data))
    assert samples.write_samples(run_dir) == 2
    lines = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["PQ", "QQ"]
    assert [line["index"] for line in lines] == [0, 1]
    for line in lines:
        assert line["reference"] == line["policy"]
    (run_dir / "data.json").write_text(json.dumps({**data, "valid": None}))
    assert samples.write_samples(run_dir) == 1


def test_a_failure_is_an_exit_status_and_leaves_no_half_file(tmp_path):
    run_dir = make_run(tmp_path)
    (run_dir / "data.json").write_text(json.dumps({"train": str(tmp_path / "gone"), "valid": None}))
    assert samples.main(run_dir) == 1
    message = restarts.child_failure(run_dir, "samples", 1).message
    assert message == f"{tmp_path / 'gone'} is not a pair store: no such folder"
    assert not (run_dir / "samples.jsonl").exists()
