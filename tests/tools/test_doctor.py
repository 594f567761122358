"""Planted defects, each named in a line of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dpo_kit import config as config_module
from dpo_kit.engine import state
from dpo_kit.system import machine
from dpo_kit.tools import doctor
from tests.model import test_model_folder as folders
from tests.toy_tokenizers import CHATML, save_tokenizer

SMOKE = Path(__file__).parents[2] / "params" / "smoke.yaml"


def examined(tmp_path, *overrides):
    """Findings of the smoke config with overrides, by name; a name's worst line counts."""
    config = config_module.load(
        SMOKE, [f"cluster.fileroot={tmp_path / 'runs'}", "cluster.n_gpus_per_node=0", *overrides]
    )
    found = {}
    for finding in doctor.examine(config, lambda _: None):
        if finding.name not in found or finding.level != "ok":
            found[finding.name] = finding
    assert not (tmp_path / "runs").exists()  # nothing is left behind
    return found


def rows_file(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(chosen="yes, number {i}", rejected="no", count=12):
    start = "\n\nHuman: question {i}\n\nAssistant: "
    return [
        {"chosen": (start + chosen).format(i=i), "rejected": (start + rejected).format(i=i)}
        for i in range(count)
    ]


def test_a_run_that_is_fine(tmp_path):
    found = examined(tmp_path)
    assert {finding.level for finding in found.values()} == {"ok"}, "\n".join(map(str, found.values()))
    assert found["first loss"].text == "the first loss is 0.693147, expected 0.693147"
    assert "[" in found["scored"].text
    assert "rejected" in found["scored"].text


@pytest.mark.parametrize("loss_type", ["ipo", "hinge"])
def test_other_losses_begin_where_they_should(tmp_path, loss_type):
    assert examined(tmp_path, f"actor.loss_type={loss_type}")["first loss"].level == "ok"


def test_a_learning_rate_of_zero(tmp_path):
    found = examined(tmp_path, "actor.optimizer.lr=0")
    assert "actor.optimizer.lr = 0: no weight will change" in found["settings"].text
    assert found["one step"].text == "no weight changed (the learning rate is 0)"


def test_adapters_of_a_run_that_is_fine(tmp_path):
    found = examined(tmp_path, "actor.use_lora=true", "actor.optimizer.weight_decay=0")
    assert found["one step"].text == "all 14 weights changed"


def test_frozen_weights(tmp_path, monkeypatch):
    load = state.load_model

    def frozen(*arguments, **options):
        policy = load(*arguments, **options)
        for name, param in policy.named_parameters():
            param.requires_grad_("norm" in name)
        return policy

    monkeypatch.setattr(state, "load_model", frozen)
    found = examined(tmp_path)
    assert found["one step"].level == "bad"
    assert "weights changed (frozen: lm.model.embed_tokens.weight" in found["one step"].text


def test_dropout(tmp_path, model_cache):
    from dpo_kit.model import builtin

    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(builtin.ensure("tiny-random")).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    found = examined(tmp_path, f"actor.path={folder}", "actor.disable_dropout=false")
    assert found["settings"].level == "look"
    assert "attention_dropout = 0.5" in found["settings"].text


def test_too_many_ranks(tmp_path):
    found = examined(
        tmp_path, "cluster.n_gpus_per_node=auto", "actor.backend=fsdp:d64", "train_dataset.batch_size=64"
    )
    assert "needs 64 ranks" in found["devices"].text
    assert found["overfit"].level == "ok"  # the rest is tried all the same


def test_too_small_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_disk", lambda _: 1 << 10)
    found = examined(tmp_path)
    assert found["disk"].level == "bad"
    assert "0.0 MiB are free" in found["disk"].text


def test_a_reference_with_another_tokenizer(tmp_path):
    from dpo_kit.model import builtin

    folder = tmp_path / "ref"
    folder.mkdir()
    for file in Path(builtin.ensure("tiny-random")).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    made = json.loads((folder / "tokenizer.json").read_text())
    first, second = list(made["model"]["vocab"])[:2]
    vocab = made["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(made))
    found = examined(tmp_path, f"ref.path={folder}")
    assert "has another tokenizer" in found["models"].text
    assert found["training"].level == "look"


def test_another_chat_template_than_the_policys(tmp_path):
    row = {
        "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
        "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "go"}],
    }
    data = rows_file(tmp_path / "chat.jsonl", [row])
    tokenizer = save_tokenizer(tmp_path / "tokenizer", bos="<s>", template=CHATML)
    found = examined(
        tmp_path, f"train_dataset.path={data}", f"tokenizer_path={tokenizer}", "valid_dataset=null"
    )
    named = " ".join(finding.text for finding in found.values() if finding.level == "bad")
    assert "chat template" in named or "tokenizer" in named


def test_responses_that_end_twice(tmp_path):
    from dpo_kit.model import builtin

    end = builtin.load_tokenizer(builtin.ensure("tiny-random")).eos_token
    data = rows_file(tmp_path / "pairs.jsonl", pairs(chosen="yes, number {i}" + end))
    found = examined(tmp_path, f"train_dataset.path={data}", "valid_dataset=null")
    assert found["text"].level == "bad"
    assert found["text"].text.startswith("12 of 24 responses end twice")


def test_empty_responses(tmp_path):
    data = rows_file(tmp_path / "pairs.jsonl", pairs(rejected=""))
    found = examined(tmp_path, f"train_dataset.path={data}", "valid_dataset=null")
    assert "12 of 12 training pairs with an empty response" in found["data"].text


def test_rows_that_cannot_be_used(tmp_path):
    data = rows_file(tmp_path / "pairs.jsonl", [*pairs(), {"chosen": None, "rejected": "x"}, {"chosen": "x"}])
    found = examined(tmp_path, f"train_dataset.path={data}", "valid_dataset=null")
    assert "2 of 14 rows cannot be used; line 13: column 'chosen' is null" in found["data"].text


def test_held_out_pairs_that_are_the_training_pairs(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", pairs())
    found = examined(
        tmp_path, f"train_dataset.path={path}", f"valid_dataset.path={path}", "valid_dataset.split=train"
    )
    assert "valid_dataset is the training data" in found["settings"].text


def test_a_broken_row_is_refused_as_the_run_would(tmp_path):
    rows = pairs()
    path = Path(rows_file(tmp_path / "a.jsonl", rows))
    path.write_text(path.read_text() + '{"chosen": null, "rejected": "b"}\n')
    found = examined(tmp_path, f"train_dataset.path={path}")
    assert found["data"].level == "bad"
    assert "1 of 13 rows cannot be used; line 13: column 'chosen' is null" in found["data"].text
    found = examined(tmp_path, f"train_dataset.path={path}", "train_dataset.bad_rows=quarantine")
    assert found["data"].level == "look"
    assert "1 of 13 training rows are dropped (1 unusable); the first: line 13: column" in found["data"].text


def no_numbers(folder):
    def spoilt(held):
        held["model.norm.weight"][3] = float("nan")
        return held

    folders.weights(folders.make(folder), spoilt)


def few_rows(folder):
    folders.make(folder, vocab_size=256)


def few_positions(folder):
    folders.make(folder, max_position_embeddings=64)


DEFECTS = {
    folders.cut: ("models", r"^actor\.path: .*model\.safetensors is cut"),
    folders.adapter: ("models", r"^actor\.path: .*holds an adapter"),
    folders.broken_config: ("models", r"^actor\.path: .*config\.json cannot be read"),
    folders.unknown_model_type: ("models", r"^actor\.path: .*`llama9`"),
    folders.nonsense_in_config: ("models", r"^actor\.path: .*hidden_size"),
    folders.missing_weights: ("models", r"^actor\.path: .*weights are missing"),
    folders.another_shape: ("models", r"^actor\.path: .*model\.embed_tokens\.weight is \(264, 32\)"),
    few_rows: ("models", r"token ids up to 259 .* has 256 rows"),
    few_positions: (
        "data",
        r"^train_dataset: the longest text has \d+ tokens, .* has 64 positions; use train_dataset\.max",
    ),
    no_numbers: (
        "training",
        r"^actor\.path: .*model\.safetensors: model\.norm\.weight holds values that are not finite",
    ),
}


@pytest.mark.parametrize("maker", DEFECTS, ids=lambda maker: maker.__name__)
def test_models_that_cannot_be_trained_are_told_in_a_line(tmp_path, maker):
    maker(tmp_path / "base")
    found = examined(tmp_path, f"actor.path={tmp_path / 'base'}")
    name, said = DEFECTS[maker]
    assert found[name].level == "bad"
    assert re.search(said, found[name].text)


def test_an_error_of_any_kind_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "load_model", lambda *_, **__: {}["weights"])
    assert examined(tmp_path)["training"].text == "KeyError: 'weights'"


def test_what_is_not_known_is_not_ok(tmp_path):
    found = examined(tmp_path, f"actor.path={tmp_path / 'nowhere'}")
    assert (found["models"].level, found["memory"].level, found["disk"].level) == ("bad", "look", "look")


def test_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "empty").mkdir()
    found = examined(tmp_path, f"tokenizer_path={tmp_path / 'empty'}")
    assert found["models"].level == "bad"
    assert "cannot be loaded" in found["models"].text
