"""The ranking rule by hand: each property's points, the mean over sentences, and what must not matter."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dpo_kit.view import ranking

QUESTION = "How do I keep basil alive on my windowsill?"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # reader 1 + reason 1 + topic 1
        ("Water your basil, because it likes wet soil.", 3),
        # speaker -1 + hedge -1
        ("I might try a bigger pot.", -2),
        # nothing
        ("Sunlight.", 0),
        # reader 1
        ("You need light.", 1),
        # reader 1 + speaker -1
        ("You need what I have.", 0),
        # topic 1 + hedge -1
        ("The windowsill could be cold.", 0),
        # reason 1
        ("Wet soil helps.", 1),
        # topic 1: the stem counts
        ("Two windowsills are plenty.", 1),
        # counted once a sentence, however often it shows: reader 1
        ("You, you and you.", 1),
        # mean of 3 and 0
        ("Water your basil, because it likes wet soil. Sunlight.", 1.5),
        # mean of 1, -2 and 1
        ("You need light! Perhaps we do. The basil", 0),
        # a decimal point is no sentence end: reader 1, not half of it
        ("Use 1.5 cups on your plant.", 1),
        # the curly apostrophe: reader 1
        ("It is what you’re used to.", 1),
        # a word that only contains a listed one has no points
        ("Youth, iron, sofa, mayor, wear.", 0),
        # a next turn is not part of the answer: reader 1
        ("You need light.\n\nHuman: I might.", 1),
        ("You need light.\nHuman: I might.", 1),
        # no words
        ("", -2),
        (" ... ", -2),
    ],
)
def test_scores_by_hand(answer, expected):
    assert ranking.score(QUESTION, answer) == pytest.approx(expected)


def test_explain_gives_the_share_of_sentences():
    found = ranking.explain(QUESTION, "Your basil wilts. I know. You may ask me.")
    assert found == {
        "sentences": 3,
        "reader": pytest.approx(2 / 3),
        "speaker": pytest.approx(2 / 3),
        "hedge": pytest.approx(1 / 3),
        "reason": 0.0,
        "topic": pytest.approx(1 / 3),
    }


def test_the_last_human_turn_is_the_question():
    dialogue = "\n\nHuman: I bake bread.\n\nAssistant: Nice.\n\nHuman: And which cheese?\n\nAssistant:"
    assert ranking.score(dialogue, "Old cheese.") == 1
    assert ranking.score(dialogue, "Old bread.") == 0
    assert ranking.score("And which cheese?", "Old cheese.") == 1


def test_words_of_the_lists_are_no_topic():
    assert ranking.score("Could you help me, because we may need it?", "It has need of it.") == 0


def test_saying_it_twice_changes_nothing():
    answer = "Water your basil. I might not."
    assert ranking.score(QUESTION, f"{answer} {answer}") == ranking.score(QUESTION, answer)


def test_layout_and_case_change_nothing():
    plain = "Water your basil. It helps."
    assert ranking.score(QUESTION, plain.upper()) == ranking.score(QUESTION, plain)
    assert ranking.score(QUESTION, plain.replace(". ", ".\n- ")) == ranking.score(QUESTION, plain)


def test_the_range_is_reached_and_kept():
    assert sum(points for points in ranking.POINTS.values() if points < 0) == ranking.LOWEST_SCORE
    best = "Your basil grows, because you water it."
    assert ranking.score(QUESTION, best) == sum(p for p in ranking.POINTS.values() if p > 0)


def test_rule_needs_the_standard_library_only():
    code = "import sys, dpo_kit.view.ranking; print(sorted({'numpy', 'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
