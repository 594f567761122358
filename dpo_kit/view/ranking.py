"""The taste by which the embedded sample was ranked: a direct, personal, on-topic answer.

The rule is stated once, here, and frozen with the sample (`dpo_kit/dataset/sample/README.md`). Each sentence of an
answer gets points, and the answer's score is the mean over its sentences:

    +1  it speaks to the reader       (you, your, yourself, ...)
    +1  it gives a reason or a use    (because, since, so, helps, ...)
    +1  it is on topic                (shares a content word with the last question)
    -1  it speaks of the speaker      (I, my, me, we, our, us, ...)
    -1  it hedges                     (may, might, could, maybe, perhaps, probably, ...)

A property counts once a sentence however often it shows, and the mean makes a second sentence worth nothing by
itself, so that a longer answer does not score higher for being longer. A sentence scores from -2 to 3.

    question  How do I keep basil alive on my windowsill?
    answer    Water your basil, because it likes wet soil.    reader 1 + reason 1 + topic 1 =  3
    answer    I might try a bigger pot.                       speaker -1 + hedge -1         = -2

Deliberately not here: length, layout, punctuation, the first word, repetition, and any judgement of whether an
answer is true. It is a taste for a demonstration, not a measure of quality.
"""

from __future__ import annotations

import re


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


WORDS = {
    "reader": _listed("you your yours yourself yourselves you're you'll you've you'd"),
    "speaker": _listed(
        "i i'm i'd i'll i've me my mine myself we we're we'd we'll we've us our ours ourselves"
    ),
    "hedge": _listed("may might could maybe perhaps possibly probably sometimes seems seem guess"),
    "reason": _listed("because since so helps help keeps prevents prevent avoid allows"),
}

POINTS = {"reader": 1, "reason": 1, "topic": 1, "speaker": -1, "hedge": -1}
LOWEST_SCORE = -2.0

# Two answers make a pair of the sample only when their scores are this far apart: of single sentences, two
# properties must speak for the chosen one.
MARGIN = 2.0

_NOT_CONTENT = _listed(
    """a about after again all also am an and any are as at away back be been before being best better between but
    by can cannot did do does doing done down each else enough ever every few find first for from get gets getting
    give go goes going good got had has have he help her here him his how if in instead into is it its just keep
    know let like little long look lot made make makes many more most much need new next no not now of off often on
    one only or other out over own put really right same say she should some something start still stop such take
    than that the their them then there these they thing things this those through time to today too two under up
    use very want was way we well were what when where which while who why will with without would yes"""
)
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n+")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def score(question: str, answer: str) -> float:
    """The rule's score of one answer: the mean of its sentences' points, from -2 to 3; higher is preferred.

    Args:
        question: what was asked: a plain question, or a whole dialogue in "\\n\\nHuman: " / "\\n\\nAssistant:"
            layout, of which the last human turn counts.
        answer: the answer alone. What a model wrote after a next "\\n\\nHuman:" is not part of it.

    Returns:
        The mean over the sentences; an answer without a word gets the lowest score.
    """
    properties = explain(question, answer)
    if not properties["sentences"]:
        return LOWEST_SCORE
    return sum(points * properties[name] for name, points in POINTS.items())


def explain(question: str, answer: str) -> dict[str, float]:
    """The share of the answer's sentences that has each property of `POINTS`, and the number of sentences."""
    topic = _content_words(question.rsplit("\n\nHuman:", 1)[-1].split("\n\nAssistant:", 1)[0])
    own_turn = re.split(r"\n\s*(?:Human|Assistant):", answer, maxsplit=1)[0]
    sentences = [words for words in map(_words, _SENTENCE_END.split(own_turn)) if words]
    shares: dict[str, float] = {"sentences": len(sentences)}
    for name in POINTS:
        having = sum(_has(name, words, topic) for words in sentences)
        shares[name] = having / len(sentences) if sentences else 0.0
    return shares


def _has(name: str, words: list[str], topic: frozenset[str]) -> bool:
    if name == "topic":
        return not topic.isdisjoint(map(_stem, words))
    return not WORDS[name].isdisjoint(words)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("’", "'"))


def _content_words(text: str) -> frozenset[str]:
    skipped = _NOT_CONTENT.union(*WORDS.values())
    return frozenset(_stem(word) for word in _words(text) if word not in skipped and len(word) > 2)


def _stem(word: str) -> str:
    """Enough to see that "plants" and "plant", or "baking" and "bakes", are one word."""
    for ending in ("ing", "es", "ed", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word
