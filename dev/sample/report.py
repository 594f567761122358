"""The figures of the embedded sample: sizes, what the rule saw, and how far simple guesses get on held-out pairs.

    python -m dev.sample.report

Deliberately not here: any language model; the tokenizer is used to count tokens only.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from typing import Any

import numpy as np

from dev.sample.make_sample import SHIPPED, features, first_word
from dpo_kit.model import builtin, model_folder
from dpo_kit.view import ranking


def read_pairs(name: str) -> list[tuple[str, str, str]]:
    """The (dialogue up to the answer, chosen answer, rejected answer) of train or valid."""
    rows = map(json.loads, gzip.decompress((SHIPPED / f"{name}.jsonl.gz").read_bytes()).decode().splitlines())
    split = ((row["chosen"].rpartition("\n\nAssistant:"), row["rejected"]) for row in rows)
    return [
        (head + mark, chosen.strip(), text[len(head + mark) :].strip())
        for (head, mark, chosen), text in split
    ]


def threshold_accuracy(train: np.ndarray, valid: np.ndarray) -> float:
    """Held-out accuracy of "at least t is preferred" (or the reverse) with t and direction fitted on train.

    Args:
        train, valid: float (pairs, 2), one feature of the chosen and of the rejected answer.
    """

    def accuracy(pairs: np.ndarray, t: float) -> float:
        above = pairs >= t
        return float(((above[:, 0].astype(int) - above[:, 1]) / 2 + 0.5).mean())  # a tie is half right

    fitted = max(np.unique(train), key=lambda t: abs(accuracy(train, t) - 0.5))
    found = accuracy(valid, fitted)
    return found if accuracy(train, fitted) >= 0.5 else 1 - found


def first_word_accuracy(train: list[tuple[str, str, str]], valid: list[tuple[str, str, str]]) -> float:
    """Held-out accuracy of preferring the first word that was chosen more often than rejected in train."""
    chosen = Counter(first_word(pair[1]) for pair in train)
    rejected = Counter(first_word(pair[2]) for pair in train)

    def odds(answer: str) -> float:
        word = first_word(answer)
        return float(np.log((chosen[word] + 1) / (rejected[word] + 1)))

    return float(np.mean([(np.sign(odds(c) - odds(r)) + 1) / 2 for _, c, r in valid]))


def bag_of_words_accuracy(train: list[tuple[str, str, str]], valid: list[tuple[str, str, str]]) -> float:
    """Held-out accuracy of a logistic regression on which words an answer has: how learnable the taste is."""

    def words(answer: str) -> set[str]:
        return set(re.findall(r"[a-z']+", answer.lower()))

    names = {
        word: at for at, word in enumerate(sorted({w for _, c, r in train for w in words(c) | words(r)}))
    }

    def matrix(pairs: list[tuple[str, str, str]]) -> np.ndarray:
        rows = np.zeros((len(pairs), len(names)))
        for row, (_, c, r) in zip(rows, pairs, strict=True):
            for word in words(c) & names.keys():
                row[names[word]] += 1
            for word in words(r) & names.keys():
                row[names[word]] -= 1
        return rows

    x, weights = matrix(train), np.zeros(len(names))
    for _ in range(2000):
        wrong = 1 / (1 + np.exp(x @ weights))
        weights += 0.5 * (x.T @ wrong / len(x) - 0.002 * weights)
    return float(np.mean((np.sign(matrix(valid) @ weights) + 1) / 2))


def report() -> None:
    """Print the figures that README.md gives."""
    tokenizer = builtin.load_tokenizer(model_folder.SMOLLM2)
    parts = {name: read_pairs(name) for name in ("train", "valid")}
    for name, pairs in parts.items():
        heads = {head for head, _, _ in pairs}
        multi = sum(head.count("\n\nHuman:") > 1 for head in heads)
        scores = np.array([[ranking.score(head, c), ranking.score(head, r)] for head, c, r in pairs])
        tokens = run_tokens(tokenizer, pairs)
        print(f"{name}: {len(pairs)} pairs, {len(heads)} conversations, {multi / len(heads):.0%} multi-turn")
        print(f"  tokens a pair with the prefix shared: {np.mean(tokens):.1f}, at most {max(tokens)}")
        print(f"  chosen longer {np.mean([len(c) > len(r) for _, c, r in pairs]):.0%} (characters)")
        print(f"  score of chosen {scores[:, 0].mean():.2f}, of rejected {scores[:, 1].mean():.2f}")
        for which, column in (("chosen", 1), ("rejected", 2)):
            shares = [ranking.explain(pair[0], pair[column]) for pair in pairs]
            means = {key: np.mean([share[key] for share in shares]) for key in ranking.POINTS}
            print(f"  {which}: " + ", ".join(f"{key} {mean:.0%}" for key, mean in means.items()))
    print("held-out accuracy")
    for feature in features("A b."):
        both = [feature_table(pairs, feature) for pairs in parts.values()]
        print(f"  threshold on {feature}: {threshold_accuracy(*both):.1%}")
    print(f"  first word: {first_word_accuracy(**parts):.1%}")
    print(f"  words of the answer, logistic regression: {bag_of_words_accuracy(**parts):.1%}")


def run_tokens(tokenizer: Any, pairs: list[tuple[str, str, str]]) -> list[int]:
    """Per pair: shared prefix + rest of chosen + rest of rejected, both with their end token."""
    counts = []
    for head, *answers in pairs:
        chosen, rejected = (tokenizer(f"{head} {answer}")["input_ids"] for answer in answers)
        shared = next(
            at for at, (c, r) in enumerate(zip([*chosen, -1], [*rejected, -2], strict=False)) if c != r
        )
        counts.append(len(chosen) + 1 + len(rejected) + 1 - shared)
    return counts


def feature_table(pairs: list[tuple[str, str, str]], feature: str) -> np.ndarray:
    """float (pairs, 2): one of `features`, of the chosen and of the rejected answer."""
    return np.array(
        [[features(chosen)[feature], features(rejected)[feature]] for _, chosen, rejected in pairs]
    )


if __name__ == "__main__":
    report()
