"""Building pair stores: layouts, boundaries, policies, the split by prompt, keys and reuse."""

from __future__ import annotations

import gzip
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from dpo_kit import config as config_module
from dpo_kit import dataset, preferences
from dpo_kit.dataset import builder, pairing
from dpo_kit.errors import DataError
from dpo_kit.model import builtin, model_folder
from dpo_kit.preferences import longest_common_prefix
from tests.test_preferences import brute_force
from tests.toy_tokenizers import CHATML, TEMPLATES, save_tokenizer, toy_tokenizer

REAL_PAIRS = Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf" / "harmless-base-test.jsonl.gz"
HELLO = "\n\nHuman: Hello there\n\nAssistant:"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> str:
    """A byte-level tokenizer without BOS, EOS `</s>`, ChatML."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos="<s>", template=CHATML)


@pytest.fixture
def configure(tmp_path, toy):
    """`configure(path, **train)`: a configuration whose stores go under tmp_path/runs."""

    def make(path, *, valid=None, tokenizer=toy, seed=1, **train):
        tree = {
            "seed": seed,
            "tokenizer_path": str(tokenizer),
            "cluster": {"fileroot": str(tmp_path / "runs")},
            "actor": {"path": "tiny-random"},
            "ref": {"path": "tiny-random"},
            "train_dataset": {"path": str(path), **train},
        }
        if valid:
            tree["valid_dataset"] = valid
        return config_module.from_tree(tree)

    return make


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def raw(question: str, chosen: str, rejected: str) -> dict:
    start = f"\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": f"{start} {chosen}", "rejected": f"{start} {rejected}"}


def chat(*turns: str) -> list[dict]:
    """Messages, the user's first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def decoded(store, tokenizer, i=0):
    pair = store.pair(i)
    return {
        "chosen": tokenizer.decode(pair.chosen_ids),
        "rejected": tokenizer.decode(pair.rejected_ids),
        "shared": tokenizer.decode(pair.chosen_ids[: pair.shared]),
        "prompt": tokenizer.decode(pair.chosen_ids[: pair.prompt]),
        "context": tokenizer.decode(pair.chosen_ids[: pair.context]),
    }


# ---------------------------------------------------------------- layouts


def test_raw_text_is_scored_from_the_lcp_and_answers_start_after_the_mark(tmp_path, configure):
    path = write_rows(tmp_path / "a.jsonl", [raw("Hello there", "The answer is yes.", "The answer is no.")])
    store = dataset.build(configure(path))
    assert store.meta["layout"] == "raw"
    assert decoded(store, toy_tokenizer()) == {
        "chosen": f"{HELLO} The answer is yes.</s>",
        "rejected": f"{HELLO} The answer is no.</s>",
        "shared": f"{HELLO} The answer is",
        "prompt": f"{HELLO} The answer is",
        "context": HELLO,
    }


def test_raw_text_without_the_mark_starts_answers_at_the_lcp(tmp_path, configure):
    path = write_rows(tmp_path / "a.jsonl", [{"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}])
    pair = dataset.build(configure(path)).pair(0)
    assert pair.context == pair.prompt == pair.shared > 0


def test_the_mark_counts_only_in_the_common_text(tmp_path, configure):
    """The two diverge in an earlier turn: an answer to the common question is what is generated."""
    row = {
        "chosen": f"{HELLO} yes\n\nHuman: more\n\nAssistant: 1",
        "rejected": f"{HELLO} no\n\nHuman: more\n\nAssistant: 2",
    }
    store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", [row])))
    assert decoded(store, toy_tokenizer())["context"] == HELLO


def test_prompt_layout_is_scored_from_the_given_prompt(tmp_path, configure):
    row = {"prompt": "What is the capital?", "chosen": " The answer is yes", "rejected": " The answer is no"}
    store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", [row])))
    found = decoded(store, toy_tokenizer())
    assert found["prompt"] == found["context"] == row["prompt"]
    assert found["shared"] == f"{row['prompt']} The answer is"
    assert found["chosen"] == f"{row['prompt']} The answer is yes</s>"


def test_a_token_across_the_end_of_the_prompt_is_scored(tmp_path, configure):
    """`What is ` + `the` / `user`: the tokens " the" and " user" begin inside the prompt."""
    row = {"prompt": "What is ", "chosen": "the", "rejected": "user"}
    store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", [row])))
    pair = store.pair(0)
    assert decoded(store, toy_tokenizer())["prompt"] == "What is"
    assert pair.prompt <= pair.shared


@pytest.mark.parametrize("with_prompt", [False, True])
def test_conversation_is_scored_from_the_generation_prompt(tmp_path, configure, with_prompt):
    question, answers = chat("Hello", "Hello!", "What is it?"), ("The answer is yes", "The answer is no")
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
    row = {"chosen": question + chosen, "rejected": question + rejected}
    if with_prompt:
        row = {"prompt": question, "chosen": chosen, "rejected": rejected}
    store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", [row])))
    tokenizer = toy_tokenizer(bos="<s>", template=CHATML)
    opening = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert decoded(store, tokenizer) == {
        "chosen": f"{opening}The answer is yes<|im_end|>",
        "rejected": f"{opening}The answer is no<|im_end|>",
        "shared": f"{opening}The answer is",
        "prompt": opening,
        "context": opening,
    }
    assert store.meta["layout"] == "conversation"
    assert store.report["end_tokens"] == {"<|im_end|>": 2}


def test_a_given_prompt_counts_although_more_messages_are_equal(tmp_path, configure):
    prompt, more = chat("Hello"), [{"role": "assistant", "content": "Hello!"}, *chat("What is it?")]
    row = {"prompt": prompt} | {
        side: [*more, {"role": "assistant", "content": answer}]
        for side, answer in (("chosen", "yes"), ("rejected", "no"))
    }
    store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", [row])))
    assert decoded(store, toy_tokenizer())["prompt"] == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_one_conversation_goes_on_where_the_other_ends(tmp_path, configure):
    row = {"chosen": chat("Hello", "yes", "u", "x"), "rejected": chat("Hello", "yes")}
    store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", [row])))
    assert decoded(store, toy_tokenizer())["prompt"].endswith("Hello<|im_end|>\n<|im_start|>assistant\n")
    assert decoded(store, toy_tokenizer())["shared"].endswith("yes<|im_end|>")


def test_a_generation_prompt_that_says_more_than_the_answer_begins_with(tmp_path, configure):
    """As templates that open a thinking block: what the chosen text really begins with is the prompt."""
    template = CHATML.replace("assistant\n", "assistant\n<think>\n")
    tokenizer = save_tokenizer(tmp_path / "t", template=template)
    row = {"chosen": chat("Hello", "yes"), "rejected": chat("Hello", "no")}
    store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", [row]), tokenizer=tokenizer))
    assert decoded(store, toy_tokenizer())["context"].endswith("<|im_start|>assistant\n")


def test_a_token_across_the_end_of_the_mark_belongs_to_the_context(tmp_path, configure):
    """`:` and the line breaks after it are one token here, as in Llama 3 and Qwen."""
    tokenizer = save_tokenizer(tmp_path / "t", plain_tokens=(":\n\n",))
    row = {"chosen": f"{HELLO}\n\nThe yes", "rejected": f"{HELLO}\n\nThe no"}
    store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", [row]), tokenizer=tokenizer))
    assert decoded(store, toy_tokenizer(plain_tokens=(":\n\n",)))["context"] == f"{HELLO}\n\n"


def test_prompt_as_text_beside_whole_conversations(tmp_path, configure):
    """As UltraFeedback has it: the prompt column says again what the first message says."""
    row = {"prompt": "Hello", "chosen": chat("Hello", "yes"), "rejected": chat("Hello", "no")}
    store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", [row])))
    assert decoded(store, toy_tokenizer())["prompt"].endswith("assistant\n")
    row["prompt"] = "Other"
    with pytest.raises(
        DataError, match="'prompt' is text that is not the first user message of column 'chosen'"
    ):
        dataset.build(configure(write_rows(tmp_path / "b.jsonl", [row])))


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_is_never_past_the_lcp_and_the_context_is_a_prefix(tmp_path, configure, template):
    tokenizer = save_tokenizer(tmp_path / "t", bos="<s>", adds="bos", template=TEMPLATES[template])
    rows = [
        {"chosen": chat("Hello", "yes"), "rejected": chat("Hello", "no")},
        {"chosen": chat("Hello", "yes", "a", "b"), "rejected": chat("Hello", "yes", "a", "b c")},
        {"chosen": chat("Hello", ""), "rejected": chat("Hello", "no")},
        {"chosen": chat("Hello", "yes", "u", "x"), "rejected": chat("Hello", "yes")},
        {"chosen": chat("A", "same"), "rejected": chat("B", "same")},
    ]
    store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", rows), tokenizer=tokenizer))
    assert len(store) == len(rows)
    loaded = toy_tokenizer(bos="<s>", template=TEMPLATES[template])
    for i in range(len(rows)):
        pair = store.pair(i)
        assert pair.shared == longest_common_prefix(pair.chosen_ids, pair.rejected_ids)
        assert 0 <= pair.prompt <= pair.shared
        assert 0 < pair.context < len(pair.chosen_ids)
        assert np.count_nonzero(pair.chosen_ids[:2] == loaded.bos_token_id) <= 1
    # The answer's own text is what follows the context, whatever the template.
    pair = store.pair(0)
    assert loaded.decode(pair.chosen_ids[pair.context : -1]).strip() == "yes"


def test_bos_counts_as_prompt(tmp_path, configure):
    tokenizer = save_tokenizer(tmp_path / "t", bos="<s>", adds="bos")
    row = {"prompt": "Hello", "chosen": " yes", "rejected": " no"}
    path = write_rows(tmp_path / "a.jsonl", [row, {"prompt": "", "chosen": "yes", "rejected": "no"}])
    store = dataset.build(configure(path, tokenizer=tokenizer))
    loaded = toy_tokenizer(bos="<s>")
    assert decoded(store, loaded)["prompt"] == decoded(store, loaded)["context"] == "<s>Hello"
    assert (store.pair(1).prompt, store.pair(1).shared) == (1, 1)
    assert store.report["bos"] == "written by the tokenizer"


# ---------------------------------------------------------------- policies


def test_policies_by_hand(tmp_path, configure):
    rows = [
        raw("a", "yes", "yes"),  # dropped: identical
        raw("a", "yes", "no"),
        raw("b", "yes", "no " * 400),  # dropped: over max_length
        raw("c", "yes", "yes, the answer is yes"),  # one begins with the whole other
        {"chosen": "yes", "rejected": "no"},  # no shared token
        raw("a", "yes", "no"),  # row 1 again
        raw("a", "yes", "no"),
        raw("a", "no", "yes"),  # row 1 the other way round
    ]
    with pytest.warns(
        UserWarning,
        match=r"2 of 8 rows \(25\.0 %\) of .*a\.jsonl were dropped \(1 identical, 1 over max_length = 100 tokens\)",
    ):
        store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", rows), max_length=100))
    assert store.index.tolist() == [1, 3, 4, 5, 6, 7]
    report = store.report
    assert (report["rows"], report["kept"]) == (8, 6)
    assert report["dropped"] == {"identical": 1, "over max_length": 1, "unusable": 0}
    notes = {what: count for what, count in report["notes"].items() if count}
    assert notes == {
        "kept with an empty response": 1,
        "kept where one response begins with the whole other": 1,
        "kept without a shared token": 1,
        "kept that repeat an earlier pair": 2,
        "kept that contradict an earlier pair (chosen and rejected swapped)": 1,
    }


def test_empty_response_is_kept_and_both_empty_are_identical(tmp_path, configure):
    rows = [
        {"prompt": "Hello", "chosen": "", "rejected": " no"},
        {"prompt": "Hello", "chosen": " yes", "rejected": ""},
        {"prompt": "Hello", "chosen": "", "rejected": ""},
    ]
    with pytest.warns(UserWarning, match="1 identical"):
        store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", rows)))
    assert store.index.tolist() == [0, 1]
    pair = store.pair(0)
    assert len(pair.chosen_ids) == pair.prompt + 1
    assert store.report["notes"]["kept with an empty response"] == 2


def test_max_length_counts_the_end_token(tmp_path, configure):
    path = write_rows(tmp_path / "a.jsonl", [{"chosen": "Hello there", "rejected": "Hello"}])
    longest = len(toy_tokenizer()("Hello there").input_ids) + 1
    assert len(dataset.build(configure(path, max_length=longest))) == 1
    with pytest.raises(DataError, match=r"no pair is left: all 1 rows were dropped \(1 over max_length"):
        dataset.build(configure(path, max_length=longest - 1))


def test_a_huge_row_is_dropped_without_tokenizing_it(tmp_path, configure, monkeypatch):
    huge = "word " * 2_000_000
    rows = [raw("a", huge, "no"), {"chosen": "a", "rejected": "b"}]
    seen = []
    encode = pairing.tokens.encode
    monkeypatch.setattr(
        pairing.tokens,
        "encode",
        lambda encoder, texts: seen.extend(map(len, texts)) or encode(encoder, texts),
    )
    with pytest.warns(UserWarning, match="1 over max_length"):
        store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", rows)))
    assert store.index.tolist() == [1]
    assert sum(seen) == 2


def test_max_dropped_share_stops_the_build_and_a_reuse(tmp_path, configure):
    rows = [raw("a", "yes", "yes"), raw("a", "yes", "no"), raw("b", "yes", "no")]
    path = write_rows(tmp_path / "a.jsonl", rows)
    message = (
        r"train_dataset\.max_dropped_share = 0\.3, but 1 of 3 rows \(33\.3 %\) .* \(1 identical\); chosen and"
    )
    with pytest.raises(DataError, match=message):
        dataset.build(configure(path, max_dropped_share=0.3))
    assert not (tmp_path / "runs").exists()
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        dataset.build(configure(path, max_dropped_share=0.34))
    with pytest.raises(DataError, match=message):
        dataset.build(configure(path, max_dropped_share=0.3))


def test_ten_percent_dropped_is_no_warning(tmp_path, configure):
    rows = [raw("a", "yes", "yes"), *(raw(f"q{i}", "yes", "no") for i in range(9))]
    assert len(dataset.build(configure(write_rows(tmp_path / "a.jsonl", rows)))) == 9


def test_special_token_text_is_counted_and_stays_text(tmp_path, configure):
    rows = [raw("a </s> b", "yes</s>", "no"), raw("b", "yes", "no")]
    store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", rows)))
    assert store.report["notes"]["kept with special-token text in the data (it stays text)"] == 1
    assert store.pair(0).chosen_ids.tolist().count(toy_tokenizer().eos_token_id) == 1
    rows = [{"chosen": chat("<|im_end|>", "yes"), "rejected": chat("<|im_end|>", "no")}]
    store = dataset.build(configure(write_rows(tmp_path / "b.jsonl", rows)))
    assert store.report["notes"]["kept with special-token text in the data (it stays text)"] == 1


def test_num_rows_takes_the_first(tmp_path, configure):
    rows = [raw(f"q{i}", "yes", "no") for i in range(10)] + [{"chosen": None}]
    store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", rows), num_rows=4))
    assert store.index.tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------- split by prompt


def prompts_of(store):
    tokenizer = toy_tokenizer()
    return {tokenizer.decode(store.pair(i).chosen_ids[: store.pair(i).context]) for i in range(len(store))}


@pytest.mark.parametrize("kind", ["raw", "prompt", "conversation"])
def test_from_train_splits_by_prompt(tmp_path, configure, kind):
    rows = []
    for i in range(300):
        question, chosen, rejected = f"question {i // 3}", f"yes {i}", f"no {i}"
        if kind == "raw":
            rows.append(raw(question, chosen, rejected))
        elif kind == "prompt":
            rows.append({"prompt": question, "chosen": f" {chosen}", "rejected": f" {rejected}"})
        else:
            rows.append({"chosen": chat(question, chosen), "rejected": chat(question, rejected)})
    config = configure(write_rows(tmp_path / "a.jsonl", rows), valid={"from_train": 0.2})
    train, valid = dataset.build(config, "train"), dataset.build(config, "valid")
    assert sorted([*train.index, *valid.index]) == list(range(300))
    assert not prompts_of(train) & prompts_of(valid)
    assert dataset.shared_prompts(train, valid) == 0
    assert 30 <= len(valid) <= 90
    assert len(valid) % 3 == 0
    assert train.report["other_split"] == len(valid)
    other = configure(tmp_path / "a.jsonl", valid={"from_train": 0.2}, seed=2)
    assert dataset.build(other, "valid").index.tolist() != valid.index.tolist()
    few = configure(tmp_path / "a.jsonl", valid={"from_train": 0.2, "num_rows": 5})
    assert dataset.build(few, "valid").index.tolist() == valid.index.tolist()[:5]
    assert dataset.build(few, "train").index.tolist() == train.index.tolist()


def test_raw_text_without_the_mark_is_split_by_its_common_lines(tmp_path, configure):
    """The answers begin with the same letter, so the common text itself tells the two rows apart."""
    rows = [
        {"chosen": f"Q {i // 2}?\n{a} 1", "rejected": f"Q {i // 2}?\n{a} 2"} for i in range(100) for a in "xy"
    ]
    config = configure(write_rows(tmp_path / "a.jsonl", rows), valid={"from_train": 0.3})
    train, valid = dataset.build(config), dataset.build(config, "valid")
    assert len(valid) > 4
    assert dataset.shared_prompts(train, valid) == 0
    assert {i // 4 for i in train.index}.isdisjoint({i // 4 for i in valid.index})


def test_from_train_drops_count_for_their_own_split(tmp_path, configure):
    rows = [raw(f"q{i}", "yes", "yes" if i % 2 else "no") for i in range(100)]
    config = configure(write_rows(tmp_path / "a.jsonl", rows), valid={"from_train": 0.3})
    with pytest.warns(UserWarning, match="were dropped"):
        stores = [dataset.build(config, split) for split in ("train", "valid")]
    for store in stores:
        assert len(store) + store.report["dropped"]["identical"] + store.report["other_split"] == 100
    assert sum(store.report["dropped"]["identical"] for store in stores) == 50


def test_a_split_that_gets_no_row(tmp_path, configure):
    path = write_rows(tmp_path / "a.jsonl", [raw("q", "yes", "no")])
    messages = []
    for split in ("train", "valid"):
        try:
            dataset.build(configure(path, valid={"from_train": 0.5}), split)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) == 1
    assert "valid_dataset.from_train = 0.5 leaves no row for" in messages[0]


def test_prompts_in_both_files_are_reported(tmp_path, configure):
    train = write_rows(tmp_path / "a.jsonl", [raw("a", "yes", "no"), raw("b", "yes", "no")])
    valid = write_rows(tmp_path / "b.jsonl", [raw("b", "1", "2"), raw("c", "yes", "no")])
    config = configure(train, valid={"path": str(valid)})
    stores = dataset.build(config), dataset.build(config, "valid")
    assert dataset.shared_prompts(*stores) == 1
    assert "leak       1 of 2 pairs have a prompt that is also in training" in dataset.format_report(
        stores[1], stores[0]
    )


def test_split_names(tmp_path, configure):
    path = write_rows(tmp_path / "a.jsonl", [raw("a", "yes", "no")])
    with pytest.raises(DataError, match="split = 'test'; use 'train' or 'valid'"):
        dataset.build(configure(path), "test")
    with pytest.raises(DataError, match="valid_dataset is not set"):
        dataset.build(configure(path), "valid")


# ---------------------------------------------------------------- keys, reuse, nothing half-built


def test_reused_when_nothing_changed_and_keyed_by_what_does(tmp_path, configure, monkeypatch):
    rows = [raw(f"q{i}", "yes", "no") for i in range(5)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    first = dataset.build(configure(path))
    calls = []
    monkeypatch.setattr(builder, "collect", lambda *args: calls.append(args))
    again = dataset.build(configure(path, batch_size=2, shuffle=False))
    assert (again.path, again.fingerprint, calls) == (first.path, first.fingerprint, [])
    shutil.copy(path, tmp_path / "moved.jsonl")
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    for same in ("moved.jsonl", "packed.jsonl.gz"):
        found = dataset.build(configure(tmp_path / same))
        assert found.path == first.path
        assert f"pairs      {tmp_path / same}" in dataset.format_report(found)
    monkeypatch.undo()
    changed = write_rows(tmp_path / "b.jsonl", [*rows[:-1], raw("q4", "yes", "no!")])
    bos = save_tokenizer(tmp_path / "t", bos="<s>", adds="bos")
    others = [
        configure(changed),
        configure(path, tokenizer=bos),
        configure(path, max_length=64),
        configure(path, num_rows=3),
        configure(path, valid={"from_train": 0.5}),
        configure(path, valid={"from_train": 0.5}, seed=5),
    ]
    stores = [dataset.build(config) for config in others]
    assert len({store.path for store in stores} | {first.path}) == 7
    assert stores[0].fingerprint != first.fingerprint
    assert stores[1].fingerprint != first.fingerprint


def test_a_damaged_store_is_built_again_with_a_line(tmp_path, configure):
    path = write_rows(tmp_path / "a.jsonl", [raw("a", "yes", "no")])
    store = dataset.build(configure(path))
    (store.path / "shared.npy").unlink()
    with pytest.warns(UserWarning, match=r"is damaged: shared\.npy is missing; it is built again"):
        again = dataset.build(configure(path))
    assert again.fingerprint == store.fingerprint
    assert [p.name for p in store.path.parent.iterdir()] == [store.path.name]
    assert dataset.open(store.path).pair(0).shared == store.pair(0).shared


def test_numpy_alone_reads_the_store(tmp_path, configure):
    store = dataset.build(configure(write_rows(tmp_path / "a.jsonl", [raw("a", "yes", "no")])))
    offsets = np.load(store.path / "chosen_offsets.npy")
    ids = np.load(store.path / "chosen_ids.npy", allow_pickle=False)
    assert ids[offsets[0] : offsets[1]].tolist() == store.pair(0).chosen_ids.tolist()
    meta = json.loads((store.path / "meta.json").read_text())
    assert meta["report"]["kept"] == 1
    assert store.path.parent == tmp_path / "runs" / ".cache" / "pairs"
    assert len(store.path.name) == 16


def test_an_interrupted_build_leaves_nothing(tmp_path, configure):
    path = write_rows(tmp_path / "a.jsonl", [raw(f"q{i}", "yes", "no") for i in range(600)])

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.build(configure(path), progress=interrupt)
    assert not (tmp_path / "runs").exists()


def test_progress_counts_rows(tmp_path, configure):
    path = write_rows(tmp_path / "a.jsonl", [raw(f"q{i}", "yes", "no") for i in range(600)])
    seen = []
    dataset.build(configure(path), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(256, 600), (512, 600), (600, 600)]


def test_batches_are_bounded_by_characters(tmp_path, configure, monkeypatch):
    monkeypatch.setattr(pairing, "BATCH_CHARS", 200)
    path = write_rows(tmp_path / "a.jsonl", [raw(f"q{i}", "yes", "no") for i in range(10)])
    seen = []
    small = dataset.build(configure(path), progress=lambda done, total: seen.append(done))
    assert seen == [4, 8, 10]
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "runs")
    assert dataset.build(configure(path)).fingerprint == small.fingerprint


def test_tokenizer_that_is_not_there(tmp_path, configure):
    path = write_rows(tmp_path / "a.jsonl", [raw("a", "yes", "no")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"tokenizer .*empty' cannot be loaded \(.*; give tokenizer_path"):
        dataset.build(configure(path, tokenizer=tmp_path / "empty"))


def test_report_by_hand(tmp_path, toy, configure):
    """One pair, `ab` + EOS against `acd` + EOS with one token a letter: 7 tokens, 6 with `a` shared."""
    path = write_rows(tmp_path / "a.jsonl", [{"chosen": "\x01\x02", "rejected": "\x01\x03\x04", "score": 3}])
    store = dataset.build(configure(path))
    assert store.report["tokens"] == {"without_sharing": 7, "with_sharing": 6, "ratio": 1.1667}
    assert store.report["lengths"]["chosen"]["max"] == 3
    assert store.report["lengths"]["rejected response"]["p50"] == 3
    assert store.report["lengths"]["shared (LCP)"]["max"] == 1
    assert store.report["unused_columns"] == ["score"]
    text = dataset.format_report(store)
    for part in (
        "1: kept 1, dropped 0",
        "raw;",
        "7 tokens without sharing, 6 with",
        "</s> (2)",
        "BOS none",
        "not used   columns 'score'",
    ):
        assert part in text


# ---------------------------------------------------------------- the real pairs


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason="the HH-RLHF pairs are not beside the project")
@pytest.mark.parametrize("named", ["toy", "smollm2-135m-instruct"])
def test_lcp_equals_brute_force_on_the_real_pairs(toy, configure, named):
    if named != "toy" and not model_folder.cached(named):
        pytest.skip("the real tokenizer is not in the user cache (make setup)")
    tokenizer_path = toy if named == "toy" else builtin.ensure(named)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = dataset.build(configure(REAL_PAIRS, max_length=8192, tokenizer=tokenizer_path))
    assert len(store) == 2312
    first, second = preferences.open_store(store.path), store
    for i in range(len(store)):
        pair = first.pair(i)
        chosen, rejected = pair.chosen_ids.tolist(), pair.rejected_ids.tolist()
        assert pair.shared == brute_force(chosen, rejected) == longest_common_prefix(chosen, rejected)
        assert pair.shared == second.pair(i).prompt
    tokenizer = builtin.load_tokenizer(tokenizer_path)
    texts = [json.loads(line) for line in gzip.decompress(REAL_PAIRS.read_bytes()).splitlines()]
    for i in range(0, 2312, 97):
        assert tokenizer.decode(store.pair(i).chosen_ids) == texts[i]["chosen"] + tokenizer.eos_token
        context = tokenizer.decode(store.pair(i).chosen_ids[: store.pair(i).context])
        assert context.endswith("\n\nAssistant:")


def mixed_rows(path: Path) -> Path:
    """Six usable rows and three that are not."""
    lines = [json.dumps(raw(f"q{i}", "yes", "no")) for i in range(6)]
    lines[2:2] = ["{not json", json.dumps({"chosen": "a", "rejected": None})]
    lines.append(json.dumps({"chosen": 5, "rejected": "b"}))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_quarantine_drops_unusable_rows_and_names_each(tmp_path, configure):
    path = mixed_rows(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"^3 bad rows; first: .*a.jsonl line 3: "):
        dataset.build(configure(path))
    with pytest.warns(UserWarning, match=r"3 of 9 rows \(33.3 %\) .* were dropped \(3 unusable\)"):
        store = dataset.build(configure(path, bad_rows="quarantine"))
    assert store.index.tolist() == [0, 1, 4, 5, 6, 7]
    assert store.report["dropped"]["unusable"] == 3
    named = store.report["unusable_rows"]
    assert [text.split(":")[0] for text in named] == ["line 3", "line 4", "line 9"]
    assert "'rejected'" in named[1]
    assert f"unusable   {named[0]}" in dataset.format_report(store)


def test_quarantine_counts_towards_the_share_that_may_be_dropped(tmp_path, configure):
    path = mixed_rows(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"max_dropped_share = 0.3, but 3 of 9 rows"):
        dataset.build(configure(path, bad_rows="quarantine", max_dropped_share=0.3))


def test_a_file_of_unusable_rows_is_an_error_in_quarantine_too(tmp_path, configure):
    path = write_rows(tmp_path / "a.jsonl", [{"chosen": None, "rejected": "b"}] * 3)
    with pytest.raises(
        DataError,
        match=r"all 3 rows are bad, so it is the file that needs mending; line 1: column \'chosen\' is null",
    ):
        dataset.build(configure(path, bad_rows="quarantine"))


def test_repeats_and_contradictions_are_counted_over_the_whole_file(tmp_path, configure):
    pairs = [raw(f"q{i}", "yes", "no") for i in range(300)]  # over one batch
    swapped = [{"chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs[:5]]
    rows = [*swapped[:1], *pairs, *pairs[:7], *swapped[1:]]
    notes = dataset.build(configure(write_rows(tmp_path / "a.jsonl", rows))).report["notes"]
    assert notes[pairing.REPEATED] == 7
    # The first swapped one came before: the pair itself and its repeat contradict it.
    assert notes[pairing.CONTRADICTORY] == 2 + 4
