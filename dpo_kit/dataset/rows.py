"""Raw preference rows from where they lie: local files, a folder of them, the embedded sample, the hub.

`open_source` finds the data, hashes its content (so that a pair store can be keyed by it) and returns a
`Source`, whose `read()` streams `Row`s. What is wrong with one row travels with the row, so that the
builder can count every bad row of a file; what is wrong with the whole file is raised at once.

| source | rows |
|---|---|
| `.jsonl` | one object a line, blank lines skipped |
| `.json`  | a list of objects, or one object a line |
| `.csv`   | comma separated, UTF-8, with a header line |
| `.parquet` | any row groups |
| each of them `.gz` | the same, decompressed as it is read |
| a folder | its one file whose name is the split's (`train.jsonl`, `test.csv.gz`, ...) |
| `sample` | the embedded sample: splits `train` and `test` (also `valid`) |
| anything else | a hub id, through the `datasets` package |

A local file is one split: `split` may say `train`, `test` or another plain split name, which changes nothing;
slices such as `train[:10%]` are refused (`num_rows` takes the first rows).

Deliberately not here: what the columns mean (see `layouts.py`), tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_kit.dataset import charset
from dpo_kit.dataset.readers import (
    BATCH_ROWS,
    KNOWN,
    SUFFIXES,
    Row,
    batch_rows,
    check_columns,
    format_of,
    open_parquet,
    opened,
    read_csv,
    read_json_list,
    read_jsonl,
    read_parquet,
    row_of_table,
)
from dpo_kit.errors import DataError
from dpo_kit.system.hub import cache_only_when_unreachable
from dpo_kit.system.text import listed, show_text

SAMPLE = "sample"
_SPLIT_NAMES = {
    "train": ("train",),
    "test": ("test", "valid", "validation"),
    "valid": ("valid", "validation", "test"),
    "validation": ("validation", "valid", "test"),
}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """Rows that can be read, and what identifies their content."""

    label: str
    """For messages: the file, or the hub id and its split."""
    digest: str
    """sha256 of the (decompressed) content."""
    total: int | None
    """Number of rows where it is known ahead."""
    read: Callable[[], Iterator[Row]]
    path: Path | None = None
    """The text file, where the rows are from one."""


def utf8_remedy(source: Source) -> str:
    """What to do about a source in which some text is not UTF-8; nothing where that is no text file."""
    if source.path is None:
        return ""
    with opened(source.path) as file:
        return charset.remedy(file, source.path.name)


def open_source(path: str, *, name: str | None = None, split: str = "train", section: str) -> Source:
    """Find `path` (see the module docstring) and hash its content.

    Args:
        path: a local file or folder, `sample`, or a hub id.
        name: for a hub id only, its configuration or data_dir.
        split: for a hub id, a folder and the sample.
        section: the config section, for messages.

    Raises:
        DataError: nothing there, not readable, or empty.
    """
    if not path:
        raise DataError(f"{section}.path is empty; give a file, a folder, {SAMPLE!r} or a hub id")
    if path == SAMPLE:
        file = _in_folder(Path(__file__).parent / SAMPLE, split, section)
        return replace(_open_file(file), label=f"{SAMPLE}/{file.name}")
    local = Path(path).expanduser()
    if local.exists():
        if not (local.is_file() or local.is_dir()):
            raise DataError(f"{section}.path = {path!r} is neither a file nor a folder; give one of these")
        _check_local_options(name, split, section)
        return _open_file(_in_folder(local, split, section) if local.is_dir() else local)
    if format_of(local) or path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise DataError(
            f"{section}.path = {path!r}: no such file ({local.absolute()}); give an existing "
            f"{', '.join(SUFFIXES)} file (each also .gz), a folder, {SAMPLE!r} or a hub id"
        )
    return _open_hub(path, name, split, section)


def _check_local_options(name: str | None, split: str, section: str) -> None:
    if name:
        raise DataError(
            f"{section}.name = {name!r} is for hub datasets; a local file has no configurations: "
            f"use {section}.name=null"
        )
    if not re.fullmatch(r"[A-Za-z_][\w.-]*", split):
        raise DataError(
            f"{section}.split = {split!r}: a local file is one split; leave split out, or take the first rows "
            f"with {section}.num_rows"
        )


def _in_folder(folder: Path, split: str, section: str) -> Path:
    """The folder's one file that is named after the split."""
    files = sorted(file for file in folder.glob("*") if format_of(file) and file.is_file())
    names = _SPLIT_NAMES.get(split, (split,))
    endings = [suffix + packed for suffix in SUFFIXES for packed in ("", ".gz")]
    for name in names:
        matching = [f for f in files if f.name.startswith(name) and f.name[len(name) :].lower() in endings]
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise DataError(
                f"{section}.path = {str(folder)!r}: {listed([f.name for f in matching])} are all split "
                f"{split!r}; give the file itself"
            )
    raise DataError(
        f"{section}.path = {str(folder)!r}, {section}.split = {split!r}: no file named "
        f"{' or '.join(names)} with one of {', '.join(SUFFIXES)} (each also .gz); found "
        f"{listed([f.name for f in files])}"
    )


def _open_file(path: Path) -> Source:
    suffix = format_of(path)
    if suffix is None:
        raise DataError(f"{path}: unknown kind of file; use one of {', '.join(SUFFIXES)}, each also .gz")
    label = str(path)
    digest, num_lines = _hash_content(path)
    if suffix == ".parquet":
        table = open_parquet(path)
        total = table.metadata.num_rows
        if not total:
            raise DataError(f"{label} is empty: it has no rows")
        return Source(label, digest, total, lambda: read_parquet(path, label))
    if suffix == ".csv":
        return Source(label, digest, None, lambda: read_csv(path, label), path)
    if suffix == ".json" and _first_letter(path) == b"[":
        return Source(label, digest, None, lambda: read_json_list(path, label), path)
    if suffix == ".json":
        _check_object_line(path, label)
    elif _first_letter(path) == b"[":
        name = re.sub(r"(?i)\.jsonl", ".json", path.name)
        raise DataError(f"{label} line 1: holds a list, not one object a line; name the file {name}")
    return Source(label, digest, num_lines, lambda: read_jsonl(path), path)


def _hash_content(path: Path) -> tuple[str, int]:
    """sha256 of the content and the number of its lines, an unfinished last one included."""
    digest, num_lines, size, last = hashlib.sha256(), 0, 0, b"\n"
    blank = True
    with opened(path) as file:
        while block := file.read(_BLOCK):
            if size == 0 and format_of(path) != ".parquet" and (codec := charset.wide_codec(block)):
                raise DataError(
                    f"{path} line 1: is {codec.upper()}; save it as UTF-8 ({charset.command(codec, path.name)})"
                )
            digest.update(block)
            num_lines += block.count(b"\n")
            size += len(block)
            last = block[-1:]
            blank = blank and not block.removeprefix(b"\xef\xbb\xbf").strip()
    if blank:
        raise DataError(f"{path} is empty: it has no rows")
    return digest.hexdigest(), num_lines + (last != b"\n")


def _first_letter(path: Path) -> bytes:
    with opened(path) as file:
        while block := file.read(_BLOCK).removeprefix(b"\xef\xbb\xbf"):
            if block.strip():
                return block.strip()[:1]
    return b""


def _check_object_line(path: Path, label: str) -> None:
    """A `.json` file that is no list must hold one object a line."""
    with opened(path) as file:
        first = next((line for line in file if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")
    try:
        is_object = isinstance(json.loads(first.decode("utf-8-sig", "surrogateescape")), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        told = "a .json file holds a list of rows, [{...}, ...], or one row a line"
        raise DataError(f"{label} line 1: {told}")


def _open_hub(path: str, name: str | None, split: str, section: str) -> Source:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{section}.path = {path!r} is no local file, and a hub dataset needs the `datasets` package: "
            'pip install "dpo-kit[notebook]"'
        ) from None
    label = f"{path} [{split}]" if not name else f"{path} ({name}) [{split}]"
    try:
        with cache_only_when_unreachable():
            data = _load_hub(datasets, path, name, split)
    except Exception as error:  # the hub's client raises dozens of kinds, many of them bare
        cause = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise DataError(
            f"{section}.path = {path!r} is no local file and cannot be loaded from the hub ({show_text(cause)}); "
            f"check the name and {section}.split = {split!r}, or, offline, give a local file or {SAMPLE!r}"
        ) from None
    columns = list(data.column_names)
    check_columns(columns, label)
    if not len(data):
        raise DataError(f"{label} is empty: it has no rows")
    chosen = data.select_columns([column for column in KNOWN if column in columns])
    return Source(label, _hash_dataset(chosen, label), len(data), lambda: _read_hub(chosen, columns))


def _load_hub(datasets: Any, path: str, name: str | None, split: str) -> Any:
    """`name` is a configuration, else a data_dir (as `harmless-base` of Anthropic/hh-rlhf)."""
    if not name:
        return datasets.load_dataset(path, split=split)
    try:
        return datasets.load_dataset(path, name=name, split=split)
    except ValueError as error:
        if "BuilderConfig" not in str(error) and "Unknown config" not in str(error):
            raise
        return datasets.load_dataset(path, data_dir=name, split=split)


def _hash_dataset(data: Any, label: str) -> str:
    """sha256 of the rows themselves, so that another machine's download has the same key."""
    digest = hashlib.sha256(label.encode())
    for row in _read_hub(data, data.column_names):
        digest.update(repr(row.values or row.problem).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _read_hub(data: Any, columns: Sequence[str]) -> Iterator[Row]:
    index = 0
    for table in data.with_format("arrow").iter(BATCH_ROWS):
        for batch in table.to_batches():
            for values in batch_rows(batch):
                yield row_of_table(values, index, columns)
                index += 1
