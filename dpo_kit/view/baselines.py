"""How far one gets on the pairs without training: rules on a single property of the answer.

A preference set with a shortcut ("the shorter answer wins", "answers that start with a list win") is learned
through the shortcut. A rule here looks at one feature of each answer; what it reaches on held-out pairs is
what training has to beat before its accuracy says anything.

    feature f of both answers      rule "higher f wins"            rule "f >= t wins"
    chosen 12, rejected 7          right                           t = 10: right;  t = 5: tie (counts half)

Rules are fitted on the training pairs (which feature, which direction, which threshold) and only then read
off the held-out pairs.

Deliberately not here: tokenizers and pair stores (the caller brings text), the model's own log-probs
(`analysis.logp_accuracy`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_kit.view.analysis import Share, ranked

NUM_THRESHOLDS = 64
NUM_FOLDS = 10
FIRST_TOKEN = "first token: share of wins in training"


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its number of tokens, and its first token's id."""

    text: str
    num_tokens: int
    first_token: int


@dataclass(frozen=True)
class Rule:
    """A fitted rule; `threshold` None means that the higher (or lower) value itself wins."""

    feature: str
    family: str
    higher: bool
    threshold: float | None
    train: Share
    held_out: Share

    def __str__(self) -> str:
        if self.threshold is None:
            return f"{self.feature}: {'higher' if self.higher else 'lower'} wins"
        return f"{self.feature} {'>=' if self.higher else '<'} {self.threshold:.4g} wins"


Pairs = Sequence[tuple[Answer, Answer]]


def shorter_wins(pairs: Pairs) -> Share:
    """Share of pairs whose chosen answer has fewer tokens; a tie counts half."""
    return ranked(np.asarray([r.num_tokens - c.num_tokens for c, r in pairs]))


def longer_wins(pairs: Pairs) -> Share:
    """Share of pairs whose chosen answer has more tokens; a tie counts half."""
    return ranked(np.asarray([c.num_tokens - r.num_tokens for c, r in pairs]))


def best_threshold(train: Pairs, held_out: Pairs) -> Rule:
    """The rule on one feature that is right most often on the training pairs, read off the held-out pairs."""
    return max(best_by_family(train, held_out), key=lambda rule: rule.train.correct / rule.train.n)


def best_by_family(train: Pairs, held_out: Pairs) -> list[Rule]:
    """The best fitted rule of each family: length, first token, punctuation, list marks, repetition.

    Raises:
        ValueError: when there are no training or no held-out pairs.
    """
    if not train or not held_out:
        raise ValueError(f"a rule needs pairs to fit and to read; got {len(train)} and {len(held_out)}")
    columns = _columns(train)
    columns[FIRST_TOKEN] = ("first token", _own_first_token_shares(train))
    best: dict[str, tuple[float, str, bool, float | None]] = {}
    for name, (family, values) in columns.items():
        correct, higher, threshold = _fit(values, only_higher=name == FIRST_TOKEN)
        if family not in best or correct > best[family][0]:
            best[family] = (correct, name, higher, threshold)
    told = _columns(held_out)
    told[FIRST_TOKEN] = ("first token", _first_token_shares(train, held_out))
    rules = []
    for family, (_, name, higher, threshold) in best.items():
        trained, held = (_apply(values[name][1], higher, threshold) for values in (columns, told))
        rules.append(Rule(name, family, higher, threshold, trained, held))
    return rules


def features(answer: Answer) -> dict[str, tuple[str, float]]:
    """Every numeric feature of one answer: name -> (family, value)."""
    text = answer.text.strip()
    words = re.findall(r"\w+(?:'\w+)?", text.lower())
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    marks = re.findall(r"[.,;:!?]", text)
    items = [line for line in lines if re.match(r"(\d+[.)]|[-*•])\s", line)]
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return {
        "tokens": ("length", float(answer.num_tokens)),
        "characters": ("length", float(len(text))),
        "words": ("length", float(len(words))),
        "letters a word": ("length", sum(map(len, words)) / max(1, len(words))),
        "punctuation marks": ("punctuation", float(len(marks))),
        "punctuation marks a word": ("punctuation", len(marks) / max(1, len(words))),
        "commas": ("punctuation", float(text.count(","))),
        "full stops": ("punctuation", float(text.count("."))),
        "exclamation marks": ("punctuation", float(text.count("!"))),
        "question marks": ("punctuation", float(text.count("?"))),
        "colons": ("punctuation", float(text.count(":"))),
        "quotation marks": ("punctuation", float(len(re.findall(r"[\"“”]", text)))),
        "ends with . ! or ?": ("punctuation", float(text.endswith((".", "!", "?")))),
        "list items": ("list marks", float(len(items))),
        "lines": ("list marks", float(len(lines))),
        "bold marks": ("list marks", float(text.count("**"))),
        "distinct words, share": ("repetition", len(set(words)) / max(1, len(words))),
        "repeated 3-word runs, share": ("repetition", _repeated(runs)),
        "repeated lines, share": ("repetition", _repeated(lines)),
        "most frequent word, share": ("repetition", _most_frequent(words)),
    }


def _repeated(items: Sequence[object]) -> float:
    return 1 - len(set(items)) / len(items) if items else 0.0


def _most_frequent(words: Sequence[str]) -> float:
    return Counter(words).most_common(1)[0][1] / len(words) if words else 0.0


def _columns(pairs: Pairs) -> dict[str, tuple[str, np.ndarray]]:
    """Each feature over all pairs, shape (num_pairs, 2): chosen, rejected."""
    rows = [(features(chosen), features(rejected)) for chosen, rejected in pairs]
    return {
        name: (family, np.asarray([[c[name][1], r[name][1]] for c, r in rows]))
        for name, (family, _) in rows[0][0].items()
    }


def _first_token_shares(train: Pairs, pairs: Pairs) -> np.ndarray:
    """(num_pairs, 2): how often an answer with this first token won in training, smoothed towards one half."""
    wins = Counter(chosen.first_token for chosen, _ in train)
    seen = wins + Counter(rejected.first_token for _, rejected in train)

    def share(answer: Answer) -> float:
        return (wins[answer.first_token] + 1) / (seen[answer.first_token] + 2)

    return np.asarray([[share(chosen), share(rejected)] for chosen, rejected in pairs])


def _own_first_token_shares(train: Pairs) -> np.ndarray:
    """The same for the training pairs, each from the other folds: a pair must not know its own outcome.

    Folds, and not one pair left out at a time: without its own win the winner's token has always won less
    often than without its own loss, so that leaving one out makes the token of the loser look better.
    """
    out = np.empty((len(train), 2))
    for fold in range(NUM_FOLDS):
        others = [pair for i, pair in enumerate(train) if i % NUM_FOLDS != fold]
        out[fold::NUM_FOLDS] = _first_token_shares(others, train[fold::NUM_FOLDS]).reshape(-1, 2)
    return out


def _fit(values: np.ndarray, only_higher: bool = False) -> tuple[float, bool, float | None]:
    """(correct pairs, higher wins?, threshold) of the best rule on one feature, ties counted half."""
    unique = np.unique(values)
    if len(unique) > NUM_THRESHOLDS:
        unique = np.unique(np.quantile(unique, np.linspace(0, 1, NUM_THRESHOLDS)))
    best = (-1.0, True, None)
    for threshold in (None, *((unique[1:] + unique[:-1]) / 2).tolist()):
        correct = _apply(values, True, threshold).correct
        for higher, count in ((True, correct), (False, 0.0 if only_higher else len(values) - correct)):
            if count > best[0]:
                best = (count, higher, threshold)
    return best


def _apply(values: np.ndarray, higher: bool, threshold: float | None) -> Share:
    told = values if threshold is None else (values >= threshold).astype(np.float64)
    difference = told[:, 0] - told[:, 1]
    return ranked(difference if higher else -difference)
