"""`score` against plain transformers, row by row, and where its reference values come from."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from dpo_kit.engine import step
from dpo_kit.errors import ConfigError
from dpo_kit.model import builtin
from dpo_kit.tools import score as tools_score
from tests.helpers import random_pairs, store_of, tiny_config
from tests.toy_tokenizers import save_tokenizer


@pytest.fixture
def store(tmp_path):
    return store_of(random_pairs(12), tmp_path / "pairs")


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory):
    """tiny-random with noise on every weight."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("other")
    source = builtin.ensure("tiny-random")
    model = AutoModelForCausalLM.from_pretrained(source)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def plain_sum(path, ids, start):
    """The naive code: full logits, log-softmax, the scored tokens summed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        logps = model(torch.tensor([ids.tolist()])).logits[0].log_softmax(-1)
    return sum(logps[i - 1, int(ids[i])].item() for i in range(max(start, 1), len(ids)))


def score(config, store, out):
    means = tools_score.score(config, store, out)
    return means, [json.loads(line) for line in out.read_text().splitlines()]


def test_every_number_is_that_of_plain_transformers(tmp_path, store, other_weights):
    config = tiny_config(
        tmp_path / "runs", f"actor.path={other_weights}", "ref.path=tiny-random", "actor.beta=0.3"
    )
    means, lines = score(config, store, tmp_path / "out.jsonl")
    folders = {"policy": other_weights, "ref": builtin.ensure("tiny-random")}
    for i in (0, 3, 7):
        pair = store.pair(i)
        plain = {
            f"{who}_{side}_logps": plain_sum(path, getattr(pair, f"{side}_ids"), pair.prompt)
            for who, path in folders.items()
            for side in ("chosen", "rejected")
        }
        assert {name: lines[i][name] for name in plain} == pytest.approx(plain, abs=1e-9)
        rewards = [
            0.3 * (plain[f"policy_{side}_logps"] - plain[f"ref_{side}_logps"])
            for side in ("chosen", "rejected")
        ]
        loss = math.log1p(math.exp(rewards[1] - rewards[0]))
        assert lines[i]["loss"] == pytest.approx(loss, abs=1e-9)
        assert lines[i]["chosen_tokens"] == len(pair.chosen_ids) - max(pair.prompt, 1)
    assert means["dpo-eval/loss"] == pytest.approx(sum(line["loss"] for line in lines) / 12, abs=1e-12)
    assert means["dpo-eval/num_pairs"] == 12


def test_each_pair_passes_the_reference_once_and_then_never(
    tmp_path, store, other_weights, capsys, monkeypatch
):
    rows = []
    monkeypatch.setattr(
        step,
        "reference_pass",
        lambda *a, pass_=step.reference_pass, **k: rows.extend(a[3]) or pass_(*a, **k),
    )
    config = tiny_config(tmp_path / "runs", f"actor.path={other_weights}", "ref.path=tiny-random")
    first = score(config, store, tmp_path / "a.jsonl")
    assert sorted(rows) == list(range(12))
    assert score(config, store, tmp_path / "b.jsonl") == first
    assert len(rows) == 12 + 4  # a few random ones again, to see that the cache still holds
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["reference: 0 of 12 pairs from the cache", "reference: 12 of 12 pairs from the cache"]
    assert said[2].startswith("reference: 4 random pairs of the cache computed again, largest difference")


def test_every_pair_is_scored_however_few_a_run_would_train_on(tmp_path, store):
    options = ("total_train_steps=1", "train_dataset.batch_size=100", "train_dataset.drop_last=true")
    means, lines = score(tiny_config(tmp_path / "runs", *options), store, tmp_path / "a.jsonl")
    assert means["dpo-eval/loss"] == pytest.approx(math.log(2))
    assert [line["ref_chosen_logps"] for line in lines] == [line["policy_chosen_logps"] for line in lines]
    options = ("total_train_steps=1", "train_dataset.batch_size=2")
    assert score(tiny_config(tmp_path / "other", *options), store, tmp_path / "b.jsonl") == (means, lines)


def test_a_resident_reference_gives_the_same_lines(tmp_path, store, other_weights):
    options = (f"actor.path={other_weights}", "ref.path=tiny-random")
    cached = score(tiny_config(tmp_path / "runs", *options), store, tmp_path / "a.jsonl")[1]
    online = score(tiny_config(tmp_path / "runs", *options, "ref.logps=online"), store, tmp_path / "b.jsonl")[
        1
    ]
    for a, b in zip(cached, online, strict=True):
        assert a == pytest.approx(b, abs=1e-9)


def test_another_tokenizer_is_refused_and_nothing_is_written(tmp_path, store):
    other = shutil.copytree(builtin.ensure("tiny-random"), tmp_path / "other")
    save_tokenizer(other)
    config = tiny_config(tmp_path / "runs", f"ref.path={other}")
    with pytest.raises(ConfigError, match="has another tokenizer than 'tiny-random'"):
        tools_score.score(config, store, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "runs").exists()
