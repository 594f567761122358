"""Readers of preference files, one a format: each streams `Row`s.

What is wrong with one row travels with the row, so that the builder can count every bad row of a file; what
is wrong with the whole file is raised at once. Bytes that are not UTF-8 come through as surrogates
(`surrogateescape`), so that the check of the text names the column that holds them.

Deliberately not here: finding the file (`rows.py`), what the columns mean (`layouts.py`).
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dpo_kit.errors import DataError
from dpo_kit.system.text import listed, show, show_text

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
REQUIRED = ("chosen", "rejected")
KNOWN = ("prompt", *REQUIRED)
BATCH_ROWS = 256
_QUOTE_CELLS = "put cells that hold commas into quotes"


@dataclass(frozen=True)
class Row:
    """One row of a source; exactly one of `values` and `problem` is None."""

    index: int
    """Counted from 0 over the rows of the source."""
    where: str
    """For messages: `line 7`, or `row 6 (from 0)` where a file has no lines."""
    values: dict[str, Any] | None
    problem: str | None = None


def check_columns(found: Sequence[str], label: str, where: str = "") -> None:
    """Raise unless `found` holds the columns of a preference pair, each once."""
    missing = [column for column in REQUIRED if column not in found]
    twice = [column for column in sorted(KNOWN) if list(found).count(column) > 1]
    if twice and not missing:
        raise DataError(f"{label}: column {show(twice[0])} is there twice; remove or rename one of them")
    if not missing:
        return
    hint = ""
    if where == "header":
        names = {len(REQUIRED): REQUIRED, len(KNOWN): KNOWN}.get(len(found))
        hint = f"; if the file has no header line, add one: {','.join(names)}" if names else ""
        if len(found) == 1 and re.search("[;\t|]", found[0]):
            hint = f"; separate columns by commas, and {_QUOTE_CELLS}"
    raise DataError(
        f"{label}{' line 1' if where == 'header' else ''}: no column {' and no column '.join(map(repr, missing))}"
        f"; looked for 'chosen' and 'rejected' (optional: 'prompt'), found {listed(found)}{hint}"
    )


def type_name(value: object) -> str:
    """What a value is, in the words of a data file."""
    if value is None:
        return "null"
    if isinstance(value, float) and value != value:
        return "NaN"
    numbers = {bool: "a boolean", int: "a number", float: "a number"}
    names = {**numbers, str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def format_of(path: Path) -> str | None:
    """`.jsonl`, ... without `.gz`, or None."""
    stem = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if stem.endswith(suffix)), None)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed; what is wrong with the file as such becomes a DataError."""
    try:
        with path.open("rb") as raw:
            if not path.name.lower().endswith(".gz"):
                yield raw
                return
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked  # type: ignore[misc]
    except EOFError:
        raise DataError(f"{path}: the gzip file is cut short; copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: not a gzip file, or a damaged one ({error}); download it again, or drop .gz from its name"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or show_text(str(error))}") from None


def read_jsonl(path: Path) -> Iterator[Row]:
    reader = _ObjectReader()
    index = 0
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            bare = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            text = bare.decode("utf-8", "surrogateescape").strip()
            if not text:
                continue
            yield _row_of_line(reader, text, index, f"line {number}")
            index += 1


def read_json_list(path: Path, label: str) -> Iterator[Row]:
    """Rows of a list, one at a time: the text is held once, its objects are not."""
    with opened(path) as file:
        text = file.read().decode("utf-8-sig", "surrogateescape")
    reader, space = _ObjectReader(), re.compile(r"\s*")

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr]

    def broken(at: int, message: str) -> DataError:
        line = text.count("\n", 0, at) + 1
        return DataError(f"{label} line {line}: is not JSON ({message}, after {index} rows); repair the file")

    index, line, counted = 0, 1, 0
    at = skip(skip(0) + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at, problem = reader.read(text, at)
        except (ValueError, RecursionError) as error:
            place = error.pos if isinstance(error, json.JSONDecodeError) else at
            raise broken(place, getattr(error, "msg", None) or str(error).splitlines()[0]) from None
        where = f"line {line}, row {index} (from 0)"
        yield Row(index, where, None, problem) if problem else Row(index, where, value)
        index += 1
        at = skip(at)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
            if text[at : at + 1] == "]":
                raise broken(at, "a comma before the closing bracket")
        elif text[at : at + 1] != "]":
            raise broken(at, "the list is cut short" if at >= len(text) else "expected a comma")
    if skip(at + 1) != len(text):
        raise broken(at + 1, "more text after the list")


def read_csv(path: Path, label: str) -> Iterator[Row]:
    with opened(path) as file, _large_fields():
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(lines, strict=True)
        header, index = None, 0
        while True:
            first_line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                remedy = 'close every quote; inside quotes write a quote as ""'
                raise DataError(f"{label} line {first_line}: is not CSV ({error}); {remedy}") from None
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                check_columns(header, label, "header")
                continue
            where = f"line {first_line}"
            if len(cells) != len(header):
                remedy = _QUOTE_CELLS if len(cells) > len(header) else "add the cells that are missing"
                problem = f"has {len(cells)} columns, the header has {len(header)}; {remedy}"
                yield Row(index, where, None, problem)
            else:
                yield Row(index, where, dict(zip(header, cells, strict=True)))
            index += 1


def open_parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        if path.name.lower().endswith(".gz"):
            with opened(path) as file:
                return pq.ParquetFile(pa.BufferReader(file.read()))
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None


def read_parquet(path: Path, label: str) -> Iterator[Row]:
    import pyarrow as pa

    table = open_parquet(path)
    names = table.schema_arrow.names
    check_columns(names, label)
    index = 0
    try:
        for batch in table.iter_batches(BATCH_ROWS, columns=[name for name in KNOWN if name in names]):
            for values in batch_rows(batch):
                yield row_of_table(values, index, names)
                index += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{label}: damaged after {index} rows ({str(error).splitlines()[0]})") from None


def batch_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of an Arrow batch; a row whose text is not UTF-8 comes as a message."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"holds byte 0x{error.object[error.start]:02x}, which is not UTF-8; write the column anew"


def row_of_table(values: dict[str, Any] | str, index: int, names: Sequence[str]) -> Row:
    where = f"row {index} (from 0)"
    if isinstance(values, str):
        return Row(index, where, None, values)
    return Row(index, where, {**dict.fromkeys(names), **values})


def _row_of_line(reader: _ObjectReader, text: str, index: int, where: str) -> Row:
    try:
        value, end, problem = reader.read(text, 0)
    except json.JSONDecodeError as error:
        problem = f"is not JSON ({error.msg} at character {error.pos + 1}); repair or remove it"
        return Row(index, where, None, problem)
    except (ValueError, RecursionError) as error:
        return Row(index, where, None, f"is not JSON that can be read ({str(error).splitlines()[0]})")
    if end != len(text):
        problem = f"is not JSON (more text after the object, at character {end + 1})"
    return Row(index, where, None, problem) if problem else Row(index, where, value)


class _ObjectReader:
    """A JSON decoder that remembers whether the object it last read names a key twice."""

    def __init__(self) -> None:
        self._twice: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._pairs)

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            self._twice += [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        return result

    def read(self, text: str, start: int) -> tuple[Any, int, str | None]:
        """The value that starts at `start`, where it ends, and what is wrong with it."""
        self._twice.clear()
        value, end = self._decoder.raw_decode(text, start)
        if not isinstance(value, dict):
            return value, end, f"is {type_name(value)}, not an object with columns"
        return value, end, f"column {show(self._twice[0])} is there twice" if self._twice else None


@contextlib.contextmanager
def _large_fields() -> Iterator[None]:
    """csv refuses cells over 128 KiB by a setting of the whole process: lift it while reading."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)
