"""Rules on one feature: planted shortcuts are found, chance is not, nothing held-out leaks into a fit."""

from __future__ import annotations

import random

import pytest

from dpo_kit.view.baselines import (
    FIRST_TOKEN,
    Answer,
    best_by_family,
    best_threshold,
    features,
    longer_wins,
    shorter_wins,
)


def answer(text: str, first_token: int = 0) -> Answer:
    return Answer(text, len(text.split()), first_token)


def noise(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(["red", "blue", "green", "small", "large", "quick"]) for _ in range(words))


def pairs_with(make, n=120, seed=0):
    rng = random.Random(seed)
    return [make(rng, noise(rng, rng.randint(8, 20)), noise(rng, rng.randint(8, 20))) for _ in range(n)]


def test_shorter_and_longer_by_hand():
    pairs = [(answer("a b"), answer("a")), (answer("a"), answer("a b")), (answer("a"), answer("b"))]
    assert shorter_wins(pairs).correct == 1.5
    assert longer_wins(pairs).correct == 1.5
    assert longer_wins(pairs[:1]).value == 1


@pytest.mark.parametrize(
    ("family", "make"),
    [
        ("length", lambda rng, a, b: (answer(a + " and more" * 20), answer(b))),
        ("punctuation", lambda rng, a, b: (answer(a + "!"), answer(b))),
        ("list marks", lambda rng, a, b: (answer("- " + a + "\n- " + b), answer(a + " - " + b))),
        (
            "repetition",
            lambda rng, a, b: (answer(a), answer(b[:10] + " same same same same same same same" + b[10:])),
        ),
        (
            "first token",
            lambda rng, a, b: (answer(a, rng.choice([3, 5, 8])), answer(b, rng.choice([2, 4, 9]))),
        ),
    ],
)
def test_a_planted_shortcut_is_found(family, make):
    rules = {r.family: r for r in best_by_family(pairs_with(make), pairs_with(make, 60, seed=1))}
    assert rules[family].train.value > 0.9
    assert rules[family].held_out.value > 0.9
    best = best_threshold(pairs_with(make), pairs_with(make, 60, seed=1))
    assert best.train.correct == max(r.train.correct for r in rules.values())


def test_direction_and_threshold_are_fitted():
    # 30 words or more are bad, whatever else: a threshold, with no use for "shorter wins" among the rest
    def make(rng, a, b):
        return answer(" ".join(["w"] * rng.randint(5, 25))), answer(" ".join(["w"] * rng.choice([4, 26, 40])))

    rule = best_threshold(pairs_with(make), pairs_with(make, 60, seed=1))
    assert rule.threshold is not None
    assert not rule.higher
    assert "<" in str(rule)


def test_chance_stays_chance_on_held_out_pairs():
    def make(rng, a, b):
        return answer(a, rng.randint(0, 200)), answer(b, rng.randint(0, 200))

    rule = best_threshold(pairs_with(make, 200), pairs_with(make, 400, seed=1))
    assert 0.4 < rule.held_out.value < 0.6


def test_held_out_outcomes_teach_the_rule_nothing():
    # tokens that training never saw are ties; had their own outcomes been counted, all would be right
    train = [(answer("a", 1), answer("a", 2))] * 40
    held_out = [(answer("a", 10 + 2 * i), answer("a", 11 + 2 * i)) for i in range(20)]
    rule = next(r for r in best_by_family(train, held_out) if r.family == "first token")
    assert rule.train.value == 1
    assert rule.held_out.correct == 10


def test_first_token_seen_once_does_not_know_its_own_answer():
    # every token appears once: without leaving the pair out, training accuracy would be 100 %
    pairs = [(answer("a", 2 * i), answer("a", 2 * i + 1)) for i in range(50)]
    rule = next(r for r in best_by_family(pairs, pairs[:5]) if r.feature == FIRST_TOKEN)
    assert rule.train.correct == 25


def test_a_token_that_wins_as_often_as_it_loses_is_no_rule():
    # each of four tokens wins 30 and loses 30 times, so nothing is to be learned from it in either direction
    tokens = [(a, b) for a in range(4) for b in range(4) if a != b] * 10
    random.Random(0).shuffle(tokens)
    pairs = [(answer("a", a), answer("a", b)) for a, b in tokens]
    rule = next(r for r in best_by_family(pairs, pairs[:5]) if r.family == "first token")
    assert rule.higher
    assert rule.train.value < 0.6


def test_features_by_hand():
    f = {k: v for k, (_, v) in features(answer("One, two.\n- three three\n2. **four**!")).items()}
    assert f["words"] == 6
    assert f["commas"] == 1
    assert f["exclamation marks"] == 1
    assert f["list items"] == 2
    assert f["lines"] == 3
    assert f["bold marks"] == 2
    assert f["ends with . ! or ?"] == 1
    assert f["distinct words, share"] == pytest.approx(5 / 6)
    assert {family for family, _ in features(answer("")).values()} == {
        "length",
        "punctuation",
        "list marks",
        "repetition",
    }


def test_no_pairs_is_refused():
    with pytest.raises(ValueError, match="got 0 and 1"):
        best_threshold([], [(answer("a"), answer("b"))])
