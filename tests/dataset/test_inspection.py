"""Checks that every run makes: each says what it sees, with the right numbers, and keeps quiet otherwise."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch

from dpo_kit import dataset
from dpo_kit.dataset import inspection
from dpo_kit.engine import reference
from dpo_kit.model import builtin
from dpo_kit.records.findings import Finding
from tests.helpers import pair_of, store_of, tiny_config

PROMPT = "\n\nHuman: question {i}\n\nAssistant:"


def rows(count, **more):
    return [
        {"chosen": f"{PROMPT.format(i=i)} yes {i}", "rejected": f"{PROMPT.format(i=i)} no {i}", **more}
        for i in range(count)
    ]


def built(folder, train, valid=None, *overrides):
    """The stores of rows written to files."""
    names = []
    for name, content in (("train", train), ("valid", valid)):
        if content is not None:
            file = folder / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in content))
            names.append(f"{name}_dataset.path={file}")
    config = tiny_config(folder / "runs", *names, *overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [dataset.build(config, split) for split in ("train", "valid")[: len(names)]]


def texts(found):
    return [str(finding) for finding in found]


def test_pairs_without_a_flaw_say_nothing(tmp_path):
    assert texts(inspection.pairs(*built(tmp_path, rows(4), rows(8)[4:]))) == []


def test_dropped_rows_are_counted_by_reason(tmp_path):
    same, long = {"chosen": "a b", "rejected": "a b"}, {"chosen": "x" * 900, "rejected": "y"}
    (store,) = built(tmp_path, [*rows(2), *[same] * 4, *[long] * 2], None, "train_dataset.max_length=200")
    assert texts(inspection.pairs(store, None)) == [
        "bad: 6 of 8 training rows are dropped (4 identical, 2 over max_length = 200 tokens)"
    ]


def test_a_few_dropped_rows_are_worth_a_look(tmp_path):
    unusable = {"chosen": None, "rejected": "b"}
    (store,) = built(tmp_path, [*rows(19), unusable], None, "train_dataset.bad_rows=quarantine")
    assert texts(inspection.pairs(store, None)) == [
        "look: 1 of 20 training rows are dropped (1 unusable); the first: line 20: column 'chosen' is null; text or a"
        " message list is needed"
    ]


def test_unused_columns_repeats_and_contradictions(tmp_path):
    first, *others = rows(3, source="web", score=1)
    swapped = {**first, "chosen": first["rejected"], "rejected": first["chosen"]}
    (store,) = built(tmp_path, [first, *others, first, swapped])
    found = texts(inspection.pairs(store, None))
    assert found[0] == "look: 2 columns of the training data are not used; 'source', 'score'"
    assert found[1] == "look: 1 of 5 training pairs that repeat an earlier one"
    assert found[2].startswith("look: 1 of 5 training pairs that contradict an earlier one")


def test_prompts_in_both_parts_are_a_leak(tmp_path):
    found = texts(inspection.pairs(*built(tmp_path, rows(6), rows(8)[4:])))
    assert found == [
        "look: 2 of 4 held-out pairs have a prompt that is also in training: held-out figures look better than they"
        " are; use valid_dataset.path=null valid_dataset.from_train=0.05"
    ]


def test_held_out_pairs_that_are_all_in_training_mean_nothing(tmp_path):
    (found,) = texts(inspection.pairs(*built(tmp_path, rows(6), rows(4))))
    assert found.startswith("bad: 4 of 4 held-out pairs have a prompt that is also in training")
    file = tmp_path / "train.jsonl"  # a file has no splits, whatever the params say
    config = tiny_config(
        tmp_path, f"train_dataset.path={file}", f"valid_dataset.path={file}", "valid_dataset.split=test"
    )
    assert texts(inspection.settings(config, {}))[0].startswith("bad: valid_dataset is the training data")


def test_column_names_stay_out_of_what_a_model_card_shows(tmp_path):
    (store,) = built(tmp_path, rows(2, **{"<img src=x>": 1}))
    (found,) = inspection.pairs(store, None)
    assert (found.text, found.detail) == ("1 column of the training data is not used", "'<img src=x>'")


def test_empty_responses(tmp_path):
    start = PROMPT.format(i=0)
    (store,) = built(tmp_path, [{"prompt": start, "chosen": " yes", "rejected": ""}])
    assert texts(inspection.pairs(store, None)) == [
        "bad: 1 of 1 training pairs with an empty response: fill them in, or remove those rows"
    ]
    many = [
        {"prompt": f"{PROMPT.format(i=i)}", "chosen": f" yes {i}", "rejected": " no"} for i in range(1, 20)
    ]
    (store,) = built(tmp_path, [{"prompt": start, "chosen": " yes", "rejected": ""}, *many])
    assert texts(inspection.pairs(store, None))[0].startswith("look: 1 of 20 training pairs with an empty")


def test_an_end_token_written_in_the_data(tmp_path):
    doubled = [{**row, "chosen": row["chosen"] + "<|endoftext|>"} for row in rows(2)]
    (store,) = built(tmp_path, [*rows(4)[2:], *doubled])
    tokenizer = builtin.load_tokenizer("tiny-random")
    (found,) = inspection.texts(store, tokenizer, tokenizer)
    assert found.text.startswith("2 of 8 responses end twice")
    (fine,) = built(tmp_path, rows(4))
    assert list(inspection.texts(fine, tokenizer, tokenizer)) == []


@pytest.mark.parametrize(
    ("overrides", "model_config", "words"),
    [
        ([], {"attention_dropout": 0.1}, None),
        (["actor.optimizer.lr=0"], {}, "bad: actor.optimizer.lr = 0: no weight will change"),
        (["actor.disable_dropout=false"], {"attention_dropout": 0.0}, None),
        (
            ["actor.disable_dropout=false"],
            {"attn_pdrop": 0.1},
            "look: dropout is on (actor.disable_dropout=false, attn_pdrop = 0.1)",
        ),
        (
            ["ref.dtype=bfloat16"],
            {},
            "look: actor.dtype = float64 and ref.dtype = bfloat16 differ: before training, rewards and",
        ),
        (
            ["valid_dataset.path=sample", "valid_dataset.split=train"],
            {},
            "bad: valid_dataset is the training data (sample)",
        ),
        (["valid_dataset.path=sample", "valid_dataset.split=test"], {}, None),
        (["actor.lora_rank=8"], {}, "look: actor.lora_rank = 8: not used, all weights are trained"),
        (["actor.use_lora=true", "actor.lora_rank=8"], {}, None),
    ],
)
def test_settings(tmp_path, overrides, model_config, words):
    config = tiny_config(tmp_path, "train_dataset.path=sample", *overrides)
    found = texts(inspection.settings(config, model_config))
    assert len(found) == (words is not None)
    assert not words or found[0].startswith(words)


def logps(*groups):
    """(count, chosen, rejected) as a table in which no two pairs are the same."""
    table = torch.tensor([[c, r] for count, c, r in groups for _ in range(count)], dtype=torch.float64)
    return table - 1e-9 * torch.arange(len(table), dtype=torch.float64)[:, None]


def test_swapped_columns_show_in_what_the_reference_prefers(tmp_path):
    """Token by token: the chosen answers have 9 tokens, the rejected ones 4."""
    store = store_of([pair_of(5, 9, 4)] * 57, tmp_path / "store")
    (found,) = reference.swapped_columns(store, logps((40, -18, -4), (16, -9, -8), (1, np.nan, np.nan)))
    assert isinstance(found, Finding)
    assert found.level == "look"
    assert "likelier, token by token, in 40 of 56 pairs" in found.text
    assert "swapped?" in found.text
    assert list(reference.swapped_columns(store, logps((41, -9, -8), (16, -18, -4)))) == []
    assert list(reference.swapped_columns(store, None)) == []


def test_a_pair_that_repeats_is_one_toss(tmp_path):
    store = store_of([pair_of(5, 9, 4)] * 50, tmp_path / "store")
    same = torch.tensor([[-18.0, -4.0]] * 50, dtype=torch.float64)
    assert list(reference.swapped_columns(store, same)) == []


def test_a_small_lean_of_many_pairs_is_no_swap(tmp_path):
    store = store_of([pair_of(1, 1, 1)] * 4000, tmp_path / "store")
    assert reference.at_most(1800, 4000) < 1e-9
    assert list(reference.swapped_columns(store, logps((2200, -2, -1), (1800, -1, -2)))) == []
    assert len(list(reference.swapped_columns(store, logps((4000, -2, -1))))) == 1


def test_chances_are_those_of_a_fair_coin():
    assert reference.at_most(2, 4) == pytest.approx(11 / 16)
    assert reference.at_most(0, 10) == pytest.approx(1 / 1024)
    assert reference.at_most(490, 1001) == pytest.approx(
        sum(math.comb(1001, k) for k in range(491)) / 2**1001, rel=1e-3
    )
