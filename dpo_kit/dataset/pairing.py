"""Rows to token arrays: every row checked, tokenized in batches, kept or dropped by policy, and counted.

| pair | |
|---|---|
| both texts have the same tokens | dropped: `identical` |
| either text is longer than `max_length` tokens | dropped: `over max_length`, never truncated |
| a response is only its end token, the other is not | kept |
| a response begins with the whole other one | kept; its end token is where they part |
| no token in common, no BOS | kept; the first token of each is not scored |
| unusable row (null, mixed types, broken text, ...) | an error that counts all; in quarantine dropped, each named |

Rows are streamed: what is held is one batch of text and some 100 bytes a pair; the tokens go to files.

Deliberately not here: the config, the store on disk (`dataset.py`), reading files (`rows.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_kit.dataset import tokens
from dpo_kit.dataset.layouts import (
    CONVERSATION,
    NotUtf8,
    RowProblem,
    Texts,
    check_kinds,
    kinds_of,
    layout_of,
    texts_of,
)
from dpo_kit.dataset.readers import KNOWN, Row, check_columns
from dpo_kit.dataset.report import summarize
from dpo_kit.dataset.rows import Source, utf8_remedy
from dpo_kit.errors import DataError
from dpo_kit.preferences import TokenFile, longest_common_prefix

if TYPE_CHECKING:
    from tokenizers import Encoding


BATCH_ROWS = 256
BATCH_CHARS = 4_000_000
NAMED_BAD_ROWS = 3
QUARANTINED_ROWS = 10_000  # as many are named; more are counted
IDENTICAL, TOO_LONG, UNUSABLE = "identical", "over max_length", "unusable"
EMPTY = "kept with an empty response"
REPEATED = "kept that repeat an earlier pair"
CONTRADICTORY = "kept that contradict an earlier pair (chosen and rejected swapped)"

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Selection:
    """Which rows of a source are taken."""

    max_length: int
    num_rows: int | None
    """The first rows of the source only."""
    in_split: Callable[[bytes], bool]
    """Of an 8-byte hash of the prompt's text: whether the row belongs to this split."""
    num_in_split: int | None
    """The first rows of this split only."""
    section: str
    """The config section, for messages."""
    quarantine: bool
    """Unusable rows are dropped and named in the report, instead of being an error."""


@dataclass
class _Tally:
    """What became of the rows so far."""

    rows: int = 0
    num_bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    other_split: int = 0
    unused_columns: list[str] = field(default_factory=list)
    not_utf8: bool = False
    prompts: set[bytes] = field(default_factory=set)
    """Hashes of two prompts, or of the only one."""
    shortest_too_long: int | None = None
    """Tokens; of the pairs that were tokenized."""


class _Chunks:
    """Token arrays as they grow: tokens in files, numbers in memory.

    Args:
        spool: the folder of those files; they have no name.
    """

    def __init__(self, spool: Path | None = None) -> None:
        self.ids = {side: TokenFile(spool) for side in ("chosen", "rejected")}
        self.lengths, self.last = ({side: array("q") for side in self.ids} for _ in range(2))
        self.digests = {side: array("Q") for side in self.ids}
        self.numbers = {name: array("q") for name in ("shared", "prompt", "context", "index", "prompt_key")}
        self.first_token: int | None = None

    def add(self, chosen: np.ndarray, rejected: np.ndarray, numbers: dict[str, int]) -> None:
        if self.first_token is None:
            self.first_token = int(chosen[0])
        for side, ids in (("chosen", chosen), ("rejected", rejected)):
            self.ids[side].append(ids)
            self.lengths[side].append(len(ids))
            self.last[side].append(int(ids[-1]))
            digest = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
            self.digests[side].append(int.from_bytes(digest, "big"))
        for name, number in numbers.items():
            self.numbers[name].append(number)

    def arrays(self) -> dict[str, Any]:
        """The arrays of a store; the tokens stay in their files."""
        result: dict[str, Any] = {name: np.array(numbers, np.int64) for name, numbers in self.numbers.items()}
        for side, ids in self.ids.items():
            ends = np.cumsum(np.array(self.lengths[side], np.int64), dtype=np.int64)
            result[f"{side}_ids"], result[f"{side}_offsets"] = ids, np.concatenate([ends[:0], [0], ends])
        return result

    def ends(self) -> dict[int, int]:
        """How many texts end in each token."""
        ids, counts = np.unique(np.concatenate([np.array(a) for a in self.last.values()]), return_counts=True)
        return dict(zip(ids.tolist(), counts.tolist(), strict=True))

    def repeated(self) -> dict[str, int]:
        """How many pairs were there before, as they are or with chosen and rejected swapped."""
        sides = [np.array(self.digests[side], np.uint64) for side in ("chosen", "rejected")]
        pairs, swapped = (np.stack(order, 1).view("V16").ravel() for order in (sides, sides[::-1]))
        known, first = np.unique(pairs, return_index=True)
        at = np.minimum(np.searchsorted(known, swapped), max(len(known) - 1, 0))
        is_swapped = (known[at] == swapped) & (first[at] < np.arange(len(pairs)))
        return {REPEATED: len(pairs) - len(known), CONTRADICTORY: int(is_swapped.sum())}


class _Reading:
    """The layout of a file, and the encoder for it, both known once its first usable row is."""

    def __init__(self, source: Source, tokenizer: Any, label: str):
        self.source, self.tokenizer, self.label = source, tokenizer, label
        self.kinds: dict[str, str] = {}
        self.layout = ""
        self.encoder: tokens.Encoder
        self.chat: tokens.Chat | None = None

    def texts(self, row: Row, tally: _Tally) -> Texts:
        """The row's texts; raises `RowProblem`."""
        if row.values is None:
            raise RowProblem(row.problem)
        if not self.kinds:
            check_columns(list(row.values), self.source.label)
            tally.unused_columns = [column for column in row.values if column not in KNOWN]
        kinds = kinds_of(row.values)
        if self.kinds:
            check_kinds(kinds, self.kinds)
        else:
            self._start(kinds)
        return texts_of(row.values, self.layout, self.encoder, self.chat)

    def _start(self, kinds: dict[str, str]) -> None:
        layout = layout_of(kinds)
        is_chat = layout == CONVERSATION
        turn_end = tokens.probe_turn_end(self.tokenizer, self.label) if is_chat else None
        self.encoder = tokens.make_encoder(self.tokenizer, self.label, turn_end)
        self.chat = tokens.make_chat(self.encoder, self.label) if is_chat else None
        self.kinds, self.layout = kinds, layout


def collect(
    source: Source,
    tokenizer: Any,
    label: str,
    selection: Selection,
    progress: Progress,
    spool: Path | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every row of `source` as the arrays of a pair store, and the build report.

    Args:
        source: from `rows.open_source`.
        tokenizer: a fast tokenizer.
        label: the tokenizer's name, for messages.
        selection: which rows are taken.
        progress: called with (rows done, rows in all or None).
        spool: a folder for the tokens until they are in a store; the system's when left out.

    Raises:
        DataError: bad rows (all counted, the first named), or no row at all.
    """
    started = time.perf_counter()
    tally, chunks = _Tally(), _Chunks(spool)
    reading = _Reading(source, tokenizer, label)
    known = [number for number in (source.total, selection.num_rows) if number is not None]
    total = min(known) if known else None
    for batch in _batches(_usable(reading, selection, tally)):
        _add_batch(reading.encoder, selection.max_length, batch, tally, chunks)
        progress(tally.rows, total)
    if tally.num_bad and (not selection.quarantine or tally.num_bad == tally.rows):
        raise _bad_rows(source, tally, selection.section)
    tally.dropped[UNUSABLE] = tally.num_bad
    if not tally.rows:
        raise DataError(f"{source.label} is empty: it has no rows")
    arrays = chunks.arrays()
    report: dict[str, Any] = {
        "source": source.label,
        "rows": tally.rows,
        "kept": len(arrays["shared"]),
        "dropped": {reason: tally.dropped[reason] for reason in (IDENTICAL, TOO_LONG, UNUSABLE)},
        "unusable_rows": tally.first_bad,
        "other_split": tally.other_split,
        "notes": {**tally.notes, **chunks.repeated()},
        "layout": reading.layout,
        "unused_columns": tally.unused_columns,
        "max_length": selection.max_length,
        "shortest_too_long": tally.shortest_too_long,
        "one_prompt": len(tally.prompts) == 1,
    }
    if report["kept"]:
        report |= summarize(arrays) | _ends(chunks, tokenizer, reading.layout)
    seconds = time.perf_counter() - started
    return arrays, report | {"build_s": round(seconds, 3), "rows_per_s": round(tally.rows / seconds, 1)}


def _usable(reading: _Reading, selection: Selection, tally: _Tally) -> Iterator[tuple[int, Texts, bytes]]:
    """(row, texts, prompt hash) of the rows of this split that may be kept; the others are counted."""
    num_here = 0
    for row in itertools.islice(reading.source.read(), selection.num_rows):
        tally.rows += 1
        try:
            texts = reading.texts(row, tally)
        except RowProblem as problem:
            tally.num_bad += 1
            tally.not_utf8 |= isinstance(problem, NotUtf8)
            if len(tally.first_bad) < (QUARANTINED_ROWS if selection.quarantine else NAMED_BAD_ROWS):
                tally.first_bad.append(f"{row.where}: {problem}")
            continue
        key = hashlib.blake2b(texts.prompt_text.encode(), digest_size=8).digest()
        if len(tally.prompts) < 2:
            tally.prompts.add(key)
        if not selection.in_split(key):
            tally.other_split += 1
            continue
        num_here += 1
        if _surely_too_long(texts, selection.max_length, reading.encoder):
            tally.dropped[TOO_LONG] += 1
        elif selection.quarantine or not tally.num_bad:
            yield row.index, texts, key
        if num_here == selection.num_in_split:
            return


def _batches(items: Iterator[tuple[int, Texts, bytes]]) -> Iterator[list[tuple[int, Texts, bytes]]]:
    """Batches of at most BATCH_ROWS rows that end once they hold BATCH_CHARS characters."""
    batch: list[tuple[int, Texts, bytes]] = []
    num_chars = 0
    for item in items:
        batch.append(item)
        num_chars += len(item[1].chosen) + len(item[1].rejected)
        if len(batch) == BATCH_ROWS or num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _surely_too_long(texts: Texts, max_length: int, encoder: tokens.Encoder) -> bool:
    """Whether a text has more characters than `max_length` tokens can stand for: then it is not tokenized."""
    if encoder.max_token_chars is None:
        return False
    return max(len(texts.chosen), len(texts.rejected)) > max_length * encoder.max_token_chars


def _bad_rows(source: Source, tally: _Tally, section: str) -> DataError:
    """The first bad rows and what to do: by the bytes where text is not UTF-8, quarantine where rows are left."""
    first, *others = tally.first_bad[:NAMED_BAD_ROWS]
    told = f"{first}; then {'; '.join(others)}" if others else first
    remedy = f"; {utf8_remedy(source)}" if tally.not_utf8 and source.path else ""
    if tally.num_bad == tally.rows:
        all_bad = f": all {tally.num_bad} rows are bad, so it is the file that needs mending;"
        return DataError(f"{source.label}{all_bad if others else ''} {told}{remedy}")
    head = f"{tally.num_bad} bad rows; first: " if others else ""
    bad = "the bad rows" if others else "the row"
    way = f"{', or' if remedy else f'; mend {bad}, or'} leave {bad} out with {section}.bad_rows=quarantine"
    return DataError(f"{head}{source.label} {told}{remedy}{way}")


def _add_batch(
    encoder: tokens.Encoder,
    max_length: int,
    batch: Sequence[tuple[int, Texts, bytes]],
    tally: _Tally,
    chunks: _Chunks,
) -> None:
    """Tokenize a batch of rows and keep the pairs that the policy keeps."""
    encodings = tokens.encode(encoder, [side for _, t, _ in batch for side in (t.chosen, t.rejected)])
    for (index, texts, key), left, right in zip(batch, encodings[::2], encodings[1::2], strict=True):
        chosen, moved = tokens.finish(encoder, left.ids, plain=texts.plain, add_eos=texts.chosen_eos)
        rejected, _ = tokens.finish(encoder, right.ids, plain=texts.plain, add_eos=texts.rejected_eos)
        if np.array_equal(chosen, rejected):
            tally.dropped[IDENTICAL] += 1
            continue
        longest = max(len(chosen), len(rejected))
        if longest > max_length:
            tally.dropped[TOO_LONG] += 1
            tally.shortest_too_long = min(tally.shortest_too_long or longest, longest)
            continue
        shared = longest_common_prefix(chosen, rejected)
        prompt, context = _boundaries(texts, left, moved, shared)
        _note(tally, texts, min(len(chosen), len(rejected)), shared, prompt)
        numbers = {"shared": shared, "prompt": prompt, "context": context, "index": index}
        chunks.add(chosen, rejected, numbers | {"prompt_key": int.from_bytes(key, "big", signed=True)})


def _boundaries(texts: Texts, encoding: Encoding, moved: int, shared: int) -> tuple[int, int]:
    """`prompt` and `context` in tokens, from their places in the chosen text.

    A token that lies across the end of a given prompt belongs to the response. In raw text, where the data
    names no prompt, it belongs to the context if both texts share it ("Assistant:" + line break).
    """
    prompt = context = shared
    if texts.prompt_chars is not None:
        prompt = min(shared, max(0, tokens.tokens_within(encoding, texts.prompt_chars) + moved))
    if texts.context_chars is not None:
        within = tokens.tokens_within(encoding, texts.context_chars)
        context = max(0, within + moved)
        if texts.prompt_chars is None and context < shared:
            span = encoding.token_to_chars(within)
            context += span is not None and span[0] < texts.context_chars
    return prompt, context


def _note(tally: _Tally, texts: Texts, shorter: int, shared: int, prompt: int) -> None:
    """Count what is kept but worth knowing; `shorter` is the shorter text's number of tokens."""
    notes = tally.notes
    notes[EMPTY] += shorter - 1 <= prompt
    notes["kept where one response begins with the whole other"] += shared == shorter - 1
    notes["kept without a shared token"] += shared == 0
    notes["kept with special-token text in the data (it stays text)"] += texts.has_special


def _ends(chunks: _Chunks, tokenizer: Any, layout: str) -> dict[str, Any]:
    """Which tokens end the texts, and where BOS comes from."""
    counts = chunks.ends()
    names = tokenizer.convert_ids_to_tokens(list(counts))
    bos = tokenizer.bos_token_id
    writer = "the chat template" if layout == CONVERSATION else "the tokenizer"
    return {
        "end_tokens": dict(zip(names, counts.values(), strict=True)),
        "bos": f"written by {writer}" if bos is not None and chunks.first_token == bos else "none",
    }
