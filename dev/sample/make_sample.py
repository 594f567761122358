"""Makes the embedded sample: answers from SmolLM2-135M-Instruct, ranked by `view/ranking`, frozen in the package.

    python -m dev.sample.make_sample answers ANSWERS.jsonl    ask the model (minutes)
    python -m dev.sample.make_sample pairs ANSWERS.jsonl      rank, pair, write the two .jsonl.gz (seconds)
    python -m dev.sample.report                               the figures in README.md, from the two files

`answers` asks each conversation of `conversations.jsonl` up to ten times in each of three ways (STYLES: one
system line and four example turns) through the chat template, so that answers differ in the rule's
properties; the plain "\\n\\nHuman:" layout alone gives a model this small too little sense. One or two whole
sentences are kept as they were sampled; nothing is rewritten. `pairs` is exact; `answers` repeats
up to the rounding of bf16 on the machine it runs on.

Deliberately not here: any training, and any choice of pairs by what a trained model makes of them. The files are
frozen by their sha256 in `tests/dataset/test_sample.py`; running this again is a new sample, not a repair.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dpo_kit.view import ranking

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "dpo_kit" / "dataset" / "sample"
ANSWER_SEED = 20
PAIR_SEED = 21
TEMPERATURE, TOP_P = 0.75, 0.9
MIN_TOKENS, MAX_TOKENS = 5, 18
PAIRS_PER_CONVERSATION = 2
NUM_VALID_SINGLE, NUM_VALID_MULTI = 40, 22  # conversations with one and with two human turns

SYSTEM_LINE = "Answer in one short sentence."
NUM_EXAMPLES = 3  # drawn from these for each conversation and style
EXAMPLES = [
    {
        "question": "How do I get rid of onion smell?",
        "matter of fact": "Rub both hands on steel under cold water.",
        "direct": "Rub your hands on steel, because it takes the smell away.",
        "about oneself": "Some lemon juice might work, but I never tried it.",
    },
    {
        "question": "We are looking for a first bike for our son. What should we check?",
        "matter of fact": "The brakes and the weight are most important.",
        "direct": "The brakes matter most, so you should try them first.",
        "about oneself": "The weight, maybe, since our own bike was too heavy.",
    },
    {
        "question": "How can I read more books?",
        "matter of fact": "Choose short chapters and read before bed.",
        "direct": "If you keep a book by your bed, you read a little every night.",
        "about oneself": "If the book is short, I may finish it.",
    },
    {
        "question": "How do I cool a hot room?",
        "matter of fact": "Close the curtains before the sun comes in.",
        "direct": "Close your curtains early, since the sun heats your room.",
        "about oneself": "My fan helps a bit, but the curtains might be better.",
    },
    {
        "question": "How do I remember a birthday?",
        "matter of fact": "Write the date on the kitchen calendar.",
        "direct": "Write it on your calendar, so you see it each morning.",
        "about oneself": "It could be easier with a list, because we always forget.",
    },
    {
        "question": "My plant looks sad. What could be wrong?",
        "matter of fact": "It often gets too much water.",
        "direct": "It often gets too much water, so let your plant dry first.",
        "about oneself": "It may need water, but my own plants are no better.",
    },
    {
        "question": "What can we do on a rainy day?",
        "matter of fact": "A long board game is a good idea.",
        "direct": "A board game keeps you busy, and you can bake for your friends.",
        "about oneself": "A museum, perhaps, or we just stay in bed.",
    },
    {
        "question": "How do I make good tea?",
        "matter of fact": "Warm the pot and wait three minutes.",
        "direct": "Warm your pot first, because it keeps the tea hot.",
        "about oneself": "The water was probably too hot when I tried.",
    },
]
STYLES = {"matter of fact": 10, "direct": 6, "about oneself": 6}  # and the answers sampled of each


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


UNWANTED = _listed(  # in an answer to anybody, or no words at all
    """kill killed killing die died dies dead death blood drug drugs alcohol alcoholic liquor booze beer
    wine whiskey vodka cocktail cocktails drunk gun guns weapon bomb knife sex sexy sexual nude naked
    hell damn stupid idiot hate hates suicide murder poison toxic bleach cancer god jesus allah devil
    race racist slave nazi war shoot attack abuse violence victim cigarette smoke smoking porn rape
    terror hurt hurts crazy assassin ugly fat loser medication pills pill dose diet betcha ain devilish
    bloody suicidal corpse funeral kidnap steal thief lover lovers kiss lick dumbass shit butt hated
    hurting hurtful bourbon pub cigar sober killer deadly spit laxation methanol bullet machete sword
    minecraft tokyo athanasiak's zombie nemesis enemy sedative oxytocin spirits lye injury disease
    pesticide pesticides liquor's pig shank spouse wife husband nocturnal bowels rebalteur carpelinate
    shearz sheed stopging eutaperemia crum birra lawnmascarpher comforcer sillamourek catgyre mox
    deboner delisher saider spasite stovetrap beachcombiner bos immagine quicke peice alot rebus re
    heres somethings leter washs theifing"""
)
CAPITALISED = _listed(
    """I Earth Moon Sun English French Spanish Monday Tuesday Wednesday Thursday Friday Saturday Sunday January
    February March April May June July August September October November December"""
)


def read_conversations() -> list[list[str]]:
    lines = (HERE / "conversations.jsonl").read_text().splitlines()
    return [json.loads(line)["turns"] for line in lines]


# --- answers: ask the model ---------------------------------------------------------------------------------


def chat_messages(turns: list[str], style: str, examples: list[dict[str, str]]) -> list[dict[str, str]]:
    said = [SYSTEM_LINE]
    for example in examples:
        said += [example["question"], example[style]]
    roles = ["system", *itertools.islice(itertools.cycle(["user", "assistant"]), len(said) - 1 + len(turns))]
    return [{"role": role, "content": text} for role, text in zip(roles, said + turns, strict=True)]


def sample_answers(path: Path) -> None:
    """Write one line per conversation and style: {"conversation", "style", "texts"} as they were sampled."""
    import torch
    from transformers import AutoModelForCausalLM

    from dpo_kit.model import builtin, model_folder

    torch.set_num_threads(2)
    folder = builtin.ensure(model_folder.SMOLLM2)
    tokenizer = builtin.load_tokenizer(folder)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(ANSWER_SEED)
    shuffler = random.Random(ANSWER_SEED)
    conversations = read_conversations()
    with open(path, "w") as out:
        for style, num_answers in STYLES.items():
            for start in range(0, len(conversations), 24):
                batch = conversations[start : start + 24]
                prompts = [
                    tokenizer.apply_chat_template(
                        chat_messages(turns, style, shuffler.sample(EXAMPLES, NUM_EXAMPLES)),
                        tokenize=False,
                        add_generation_prompt=True,
                    )
                    for turns in batch
                ]
                ids = generate(
                    model, tokenizer(prompts, return_tensors="pt", padding=True), num_answers, generator
                )
                texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
                for at in range(len(batch)):
                    own = texts[at * num_answers : (at + 1) * num_answers]
                    out.write(json.dumps({"conversation": start + at, "style": style, "texts": own}) + "\n")
                out.flush()
                print(f"{style}: {start + len(batch)} of {len(conversations)}", flush=True)


def generate(model: Any, prompts: Any, num_answers: int, generator: Any) -> Any:
    """`num_answers` continuations of each left-padded prompt, whose cache is computed once.

    Returns:
        int64 (prompts * num_answers, MAX_TOKENS + 2), rows of one prompt side by side, EOS after the end.
    """
    import torch

    with torch.inference_mode():
        mask = prompts["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        first = model(
            prompts["input_ids"],
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = first.past_key_values
        cache.batch_repeat_interleave(num_answers)
        logits = first.logits[:, -1].repeat_interleave(num_answers, 0)
        mask = mask.repeat_interleave(num_answers, 0)
        position = positions[:, -1].repeat_interleave(num_answers, 0)
        ended = torch.zeros(len(mask), dtype=torch.bool)
        chosen = []
        for _ in range(MAX_TOKENS + 2):
            token = draw(logits.float(), generator).masked_fill(ended, model.config.eos_token_id)
            ended |= token == model.config.eos_token_id
            chosen.append(token)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            position = position + 1
            step = model(
                token[:, None], attention_mask=mask, position_ids=position[:, None], past_key_values=cache
            )
            logits = step.logits[:, -1]
        return torch.stack(chosen, 1)


def draw(logits: Any, generator: Any) -> Any:
    """One token per row from the top TOP_P of the distribution at TEMPERATURE."""
    import torch

    top, ids = (logits / TEMPERATURE).softmax(-1).topk(512)
    kept = top.cumsum(-1) - top < TOP_P  # the token that crosses TOP_P is kept
    return ids.gather(1, torch.multinomial(top * kept, 1, generator=generator)).squeeze(1)


# --- pairs: rank and choose -----------------------------------------------------------------------------------


def whole_sentences(text: str) -> str:
    """What stands before the first line break, cut after its last finished sentence; "" when none is finished."""
    line = text.split("\n", 1)[0]
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", line)]
    return line[: ends[-1]].strip() if ends else ""


def usable(answer: str) -> bool:
    """Plain words only: no names, numbers over 99, quotes, links, unwanted words, repeated or borrowed phrases."""
    if not re.fullmatch(r"[A-Z][A-Za-z0-9 ,.'!?-]*", answer) or re.search(r"\d{3}|\.\w|\.\.", answer):
        return False
    words = re.findall(r"[A-Za-z']+", answer)
    lower = [word.lower() for word in words]
    inner = re.findall(r"(?<![.!?] )(?<!^)\b([A-Z][A-Za-z]*)", answer)
    return (
        len(words) >= 3
        and UNWANTED.isdisjoint(lower)
        and CAPITALISED.issuperset(inner)
        and len(set(itertools.pairwise(lower))) == len(lower) - 1
        and _runs_of_four(lower).isdisjoint(_borrowed())
    )


def _runs_of_four(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + 4]) for at in range(len(words) - 3)}


@functools.cache
def _borrowed() -> frozenset[tuple[str, ...]]:
    """Four words in a row of an example answer: the model copied them."""
    answers = (example[style] for example in EXAMPLES for style in STYLES)
    return frozenset().union(*(_runs_of_four(re.findall(r"[a-z']+", answer.lower())) for answer in answers))


def candidates(turns: list[str], texts: list[str], count_tokens: Any) -> list[tuple[str, str]]:
    """Every (chosen, rejected) of one conversation's answers that the rule tells apart by `ranking.MARGIN`."""
    left_out = {
        *turns,
        *(HERE / "left_out.txt").read_text().splitlines(),
    }  # the file: after reading all pairs
    answers = sorted({answer for answer in map(whole_sentences, texts) if usable(answer)} - left_out)
    answers = [answer for answer in answers if MIN_TOKENS <= count_tokens(" " + answer) <= MAX_TOKENS]
    scores = {answer: ranking.score(turns[-1], answer) for answer in answers}
    return [
        pair
        for pair in itertools.permutations(answers, 2)
        if scores[pair[0]] - scores[pair[1]] >= ranking.MARGIN
    ]


def features(answer: str) -> dict[str, float]:
    """What a single-feature guess could look at: length, first word, punctuation, list marks, repetition."""
    words = re.findall(r"[a-z0-9'-]+", answer.lower())
    marks = {f"number of {mark}": float(answer.count(mark)) for mark in ",.!?'-"}
    return marks | {
        "words": float(len(words)),
        "characters": float(len(answer)),
        "list marks": float(len(re.findall(r"(?:^|\n)\s*(?:[-*•]|\d+[.)])", answer))),
        "repetition": 1 - len(set(words)) / len(words),
    }


def choose_pairs(pools: list[list[tuple[str, str]]], seed: int) -> list[list[tuple[str, str]]]:
    """Up to PAIRS_PER_CONVERSATION of each pool, such that no single feature of `features` gives the chosen away.

    A random choice, then sweeps in which each pair is replaced by the one of its pool that brings the sum over all
    pairs of (features of chosen - features of rejected) nearest to zero. An answer is used once.
    """
    shuffler = random.Random(seed)
    vector = _balance_vectors(pools)
    picked = []
    for pool in pools:
        own: list[tuple[str, str]] = []
        for pair in shuffler.sample(pool, len(pool)):
            if len(own) < PAIRS_PER_CONVERSATION and _fresh(pair, own):
                own.append(pair)
        picked.append(own)
    total = sum(vector[pair] for own in picked for pair in own)
    for _ in range(12):
        for pool, own in zip(pools, picked, strict=True):
            for at, old in enumerate(own):
                rest = own[:at] + own[at + 1 :]
                open_pairs = [pair for pair in pool if _fresh(pair, rest)]
                new = min(open_pairs, key=lambda pair: np.square(total - vector[old] + vector[pair]).sum())
                total = total - vector[old] + vector[new]
                own[at] = new
    return picked


def _fresh(pair: tuple[str, str], others: list[tuple[str, str]]) -> bool:
    return set(pair).isdisjoint(itertools.chain.from_iterable(others))


def _balance_vectors(pools: list[list[tuple[str, str]]]) -> dict[tuple[str, str], np.ndarray]:
    """For each pair, features of chosen minus rejected, each feature divided by its spread; first words one-hot."""
    pairs = sorted({pair for pool in pools for pair in pool})
    answers = sorted({answer for pair in pairs for answer in pair})
    table = np.array([list(features(answer).values()) for answer in answers])
    table = table / np.maximum(table.std(0), 1e-9)
    firsts = [first_word(answer) for answer in answers]
    names = {word: at for at, (word, _) in enumerate(Counter(firsts).most_common(60))}
    one_hot = np.zeros((len(answers), len(names)))
    for row, word in enumerate(firsts):
        if word in names:
            one_hot[row, names[word]] = 1.5
    by_answer = dict(zip(answers, np.hstack([table, one_hot]), strict=True))
    longer = {pair: 2.0 * np.sign(len(pair[0]) - len(pair[1])) for pair in pairs}
    return {pair: np.append(by_answer[pair[0]] - by_answer[pair[1]], longer[pair]) for pair in pairs}


def first_word(answer: str) -> str:
    return re.split(r"[^A-Za-z0-9]", answer, maxsplit=1)[0].lower()


def prefix(turns: list[str]) -> str:
    roles = itertools.cycle(["Human", "Assistant"])
    said = "".join(f"\n\n{role}: {turn}" for role, turn in zip(roles, turns, strict=False))
    return said + "\n\nAssistant:"


def make_pairs(path: Path) -> None:
    """Rank the answers in `path` and write train.jsonl.gz and valid.jsonl.gz."""
    from dpo_kit.model import builtin, model_folder

    tokenizer = builtin.load_tokenizer(model_folder.SMOLLM2)
    conversations = read_conversations()
    texts: dict[int, list[str]] = {at: [] for at in range(len(conversations))}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        texts[row["conversation"]] += row["texts"]
    pools = {
        at: candidates(turns, texts[at], lambda text: len(tokenizer(text)["input_ids"]))
        for at, turns in enumerate(conversations)
    }
    left = [at for at, pool in pools.items() if pool]
    random.Random(PAIR_SEED).shuffle(left)
    left.sort(key=lambda at: len(conversations[at]) > 1)
    held_out = set(left[:NUM_VALID_SINGLE] + left[len(left) - NUM_VALID_MULTI :])
    parts = {
        "valid": [at for at in left if at in held_out],
        "train": [at for at in left if at not in held_out],
    }
    for name, part in parts.items():
        picked = choose_pairs([pools[at] for at in part], PAIR_SEED)
        rows = [
            {
                "chosen": f"{prefix(conversations[at])} {chosen}",
                "rejected": f"{prefix(conversations[at])} {rejected}",
            }
            for at, own in zip(part, picked, strict=True)
            for chosen, rejected in own
        ]
        random.Random(PAIR_SEED).shuffle(rows)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (SHIPPED / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
        print(f"{name}: {len(rows)} pairs of {len(part)} conversations")


def main(arguments: list[str]) -> None:
    if len(arguments) == 2 and arguments[0] in ("answers", "pairs"):
        {"answers": sample_answers, "pairs": make_pairs}[arguments[0]](Path(arguments[1]))
    else:
        print(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
