"""The embedded sample is what its README says: counts, ranking, balance, and frozen bytes."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re

import numpy as np
import pytest

from dev.sample import make_sample, report
from dpo_kit.model import builtin, model_folder
from dpo_kit.view import ranking

SHA256 = {
    "train": "c818f2ddae8301b83f0d28860a678f963d87cbe06b2d2bd31141ed239d9729f9",
    "valid": "074e62fc6d4355c69e529e83d648020dda45f6cb27c01d5916539cbfb462eda2",
}
# As `python -m dev.sample.report` counts them, end tokens included.
MEAN_TOKENS = {"train": 51.0, "valid": 51.1}


@pytest.fixture(scope="module")
def parts():
    return {name: report.read_pairs(name) for name in ("train", "valid")}


@pytest.mark.parametrize("name", ["train", "valid"])
def test_the_files_are_frozen(name):
    data = (make_sample.SHIPPED / f"{name}.jsonl.gz").read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256[name]


def test_rows_are_in_the_hh_layout(parts):
    for name in parts:
        text = gzip.decompress((make_sample.SHIPPED / f"{name}.jsonl.gz").read_bytes()).decode()
        for row in map(json.loads, text.splitlines()):
            assert list(row) == ["chosen", "rejected"]
            assert row["chosen"] != row["rejected"]
            for side in row.values():
                assert re.fullmatch(r"(\n\nHuman: [^\n]+\n\nAssistant: [^\n]+)+", side)
                assert side == side.rstrip()


def test_enough_pairs_from_enough_conversations(parts):
    assert len(parts["train"]) >= 400
    assert len(parts["valid"]) >= 100
    heads = {name: {head for head, _, _ in pairs} for name, pairs in parts.items()}
    assert heads["train"].isdisjoint(heads["valid"])
    assert len(heads["valid"]) >= 60
    together = heads["train"] | heads["valid"]
    assert len(together) >= 200
    for some in (*heads.values(), together):
        assert sum(head.count("\n\nHuman:") > 1 for head in some) >= len(some) / 3


def test_conversations_are_different_and_short():
    conversations = make_sample.read_conversations()
    assert len(conversations) >= 200
    assert sum(len(turns) == 3 for turns in conversations) >= len(conversations) / 3
    assert {len(turns) for turns in conversations} == {1, 3}
    words = [frozenset(re.findall(r"[a-z']+", " ".join(turns).lower())) for turns in conversations]
    for one, other in itertools.combinations(words, 2):
        assert len(one & other) / len(one | other) < 0.6
    prefixes = {make_sample.prefix(turns) for turns in conversations}
    assert {head for name in SHA256 for head, _, _ in report.read_pairs(name)} <= prefixes


def test_every_pair_is_ranked_as_stated(parts):
    for head, chosen, rejected in itertools.chain(*parts.values()):
        assert ranking.score(head, chosen) - ranking.score(head, rejected) >= ranking.MARGIN


def test_at_least_three_properties_decide(parts):
    """Each property differs the right way in many pairs, and no single one ranks more than four in five."""
    pairs = list(itertools.chain(*parts.values()))
    for name, points in ranking.POINTS.items():
        shares = [[ranking.explain(head, side)[name] for side in (c, r)] for head, c, r in pairs]
        differs = np.sign(np.diff(shares, axis=1)[:, 0]) * -np.sign(points)
        assert (differs > 0).mean() >= 0.08, name
        assert (differs > 0).mean() <= 0.85, name


def test_nothing_simple_gives_the_chosen_answer_away(parts):
    for name, pairs in parts.items():
        longer = np.mean([len(chosen) > len(rejected) for _, chosen, rejected in pairs])
        assert 0.35 <= longer <= 0.65, name
        words = np.mean([len(chosen.split()) > len(rejected.split()) for _, chosen, rejected in pairs])
        assert 0.3 <= words <= 0.65, name
    assert report.first_word_accuracy(**parts) <= 0.68
    for feature in make_sample.features("A b."):
        both = [report.feature_table(pairs, feature) for pairs in parts.values()]
        assert report.threshold_accuracy(*both) <= 0.68, feature


def test_the_taste_can_be_learned_from_words(parts):
    assert report.bag_of_words_accuracy(**parts) >= 0.85


def test_answers_are_clean_and_used_once_a_conversation(parts):
    for pairs in parts.values():
        said = [(head, answer) for head, *answers in pairs for answer in answers]
        assert len(set(said)) == len(said)
        for _, answer in said:
            assert make_sample.usable(answer), answer
            assert answer[-1] in ".!?"


def test_a_pair_is_short(parts):
    """The recorded means, counted again where the tokenizer is already in the cache."""
    rows = sum(len(pairs) for pairs in parts.values())
    assert sum(MEAN_TOKENS[name] * len(pairs) for name, pairs in parts.items()) / rows <= 60
    if not model_folder.cached(model_folder.SMOLLM2):
        pytest.skip("smollm2-135m-instruct is not in the cache; the recorded means were checked")
    tokenizer = builtin.load_tokenizer(model_folder.SMOLLM2)
    for name, pairs in parts.items():
        assert np.mean(report.run_tokens(tokenizer, pairs)) == pytest.approx(MEAN_TOKENS[name], abs=0.05)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Thr", "One. Two!"),
        ("One.\nTwo.", "One."),
        ("No end", ""),
        ("Use 1.5 cups. Th", "Use 1.5 cups."),
        (" One? ", "One?"),
    ],
)
def test_whole_sentences(text, expected):
    assert make_sample.whole_sentences(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Keep it warm. I do.", True),
        ("In June I water it.", True),
        ("Ask Robert about it.", False),
        ("Call 555 for it.", False),
        ("See example.com for it.", False),
        ("Drink beer with it.", False),
        ("The tea, the tea, the tea.", False),
        ('Say "hello" to it.', False),
        ("Too short.", False),
        ("no capital is here.", False),
    ],
)
def test_usable(answer, expected):
    assert make_sample.usable(answer) is expected


def test_threshold_accuracy_by_hand():
    train = np.array([[3.0, 1.0], [4.0, 2.0], [3.0, 2.0], [1.0, 1.0]])
    # "at least 3 is preferred" is right in three pairs of train and a tie in one
    valid = np.array([[3.0, 2.0], [5.0, 4.0], [2.0, 3.0], [9.0, 0.0]])
    # right, tie, wrong, right
    assert report.threshold_accuracy(train, valid) == pytest.approx(2.5 / 4)
    assert report.threshold_accuracy(train[:, ::-1], valid) == pytest.approx(1.5 / 4)


def test_guessing_by_words_by_hand():
    train = [("", "Yes you can.", "No I can.")] * 3
    valid = [("", "Yes we can.", "No they can."), ("", "No you.", "Yes I."), ("", "Well you.", "Well I.")]
    assert report.first_word_accuracy(train, valid) == pytest.approx((1 + 0 + 0.5) / 3)
    # "yes"/"you" up, "no"/"i" down: the second pair is a tie
    assert report.bag_of_words_accuracy(train, valid) == pytest.approx((1 + 0.5 + 1) / 3)
