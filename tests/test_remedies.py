"""What the errors about data advise, followed to the letter: the mended file builds, or there is no such advice."""

# ruff: noqa: F811  (fixtures of another file)

from __future__ import annotations

import ast
import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dpo_kit import dataset
from dpo_kit.errors import DataError
from dpo_kit.model import builtin
from tests.dataset.test_builder import chat, configure, raw, toy, write_rows  # noqa: F401  (fixtures)

QUOTES = "He said \u201cyes\u201d \u2013 5 \u20ac"


@pytest.fixture
def refused(configure):
    """`refused(path, **train)`: the error of a build, as text."""

    def build(path, split="train", **settings) -> str:
        with pytest.raises(DataError) as caught:
            dataset.build(configure(path, **settings), split)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700
        return str(caught.value)

    return build


def lines(*rows, encoding="utf-8") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding)


def row(text: str, i: int = 0) -> dict:
    return {"chosen": f"{text} {i} yes", "rejected": f"{text} {i} no"}


def run_command(error: str, old, new) -> None:
    """Runs the command that an error shows."""
    if not shutil.which("iconv"):
        pytest.skip("there is no iconv")
    command = re.search(r"((?:gzip -dc OLD|iconv) .*? > NEW)", error)[1]
    command = command.replace("OLD", str(old)).replace("NEW", str(new))
    subprocess.run(["bash", "-ec", "set -o pipefail; " + command], check=True)


# --- text that is not UTF-8 ------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("text", "encoding"),
    [(QUOTES, "cp1252"), ("caf\u00e9", "latin-1"), ("caf\u00e9", "utf-16"), ("caf\u00e9", "utf-32"),
     ("cafe", "utf-16-le"), ("cafe", "utf-16-be"), ("cafe", "utf-32-le"), ("cafe", "utf-32-be")],
)  # fmt: skip
def test_the_command_for_another_encoding_gives_the_text(
    tmp_path,
    configure,
    refused,
    text,
    encoding,
    packed,
):
    rows = [row("plain"), row(text, 1), row(text, 2)]
    name = "a.jsonl.gz" if packed else "a.jsonl"
    content, wanted = lines(*rows, encoding=encoding), lines(*rows)
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    error = refused(tmp_path / name)
    run_command(error, tmp_path / name, tmp_path / f"new-{name}")
    mended = (tmp_path / f"new-{name}").read_bytes()
    assert (gzip.decompress(mended) if packed else mended) == wanted
    assert len(dataset.build(configure(tmp_path / f"new-{name}"))) == 3


def test_cp1252_is_shown_as_it_reads(tmp_path, refused):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(row("plain"), row(QUOTES), encoding="cp1252"))
    error = refused(path)
    assert "column 'chosen' holds byte 0x93 at character 8, which is not UTF-8; " in error
    assert "He said \u201cyes\u201d" in error
    assert "iconv -f cp1252 -t utf-8 OLD > NEW" in error
    assert "latin1" not in error


@pytest.mark.parametrize("bad", [b"\x81", b"\x9d"])
def test_bytes_that_cp1252_does_not_have_are_given_no_guess(tmp_path, refused, bad):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(row("plain")) + lines(row("caf!")).replace(b"!", bad))
    error = refused(path)
    assert (
        "which is not UTF-8; nor Western Windows (cp1252); find out its encoding, then: iconv -f ENCODING"
        in error
    )


@pytest.mark.parametrize("other", ["\u4f60\u597d", "\u00e9"])
def test_a_file_that_is_utf_8_but_for_some_rows_is_not_converted_as_a_whole(
    tmp_path, configure, refused, other
):
    path = tmp_path / "a.jsonl"
    good = [row(other, i) for i in range(3)]
    path.write_bytes(lines(*good) + lines(row("caf\u00e9", 9), encoding="cp1252"))
    error = refused(path)
    assert "iconv" not in error
    assert "elsewhere the file is UTF-8, so do not convert it as a whole: mend what is not" in error
    assert "train_dataset.bad_rows=quarantine" in error
    with pytest.warns(UserWarning, match="1 unusable"):
        assert len(dataset.build(configure(path, bad_rows="quarantine"))) == 3


def test_another_language_is_shown_as_it_would_read_and_may_be_converted_from_what_it_is(
    tmp_path, configure, refused
):
    path, rows = tmp_path / "a.jsonl", [row("\u4f60\u597d\uff0c\u4e16\u754c", i) for i in range(9)]
    path.write_bytes(lines(*rows, encoding="gb18030"))
    error = refused(path)
    assert "'\u00c4\u00e3\u00ba\u00c3" in error.replace('"', "'")
    assert error.endswith("else find out its encoding")
    run_command(error.replace("cp1252 -t", "gb18030 -t"), path, tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == lines(*rows)


def test_a_letter_of_utf_8_that_was_cut_is_no_reason_to_convert(tmp_path, refused):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(row("\u3041"), row("\u3041!", 1)).replace(b"\x81!", b"!"))
    assert "mend what is not, or leave the row out with train_dataset.bad_rows=quarantine" in refused(path)


def test_utf_8_in_the_very_line_counts_as_well(tmp_path, refused):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(row("plain")) + lines(row("caf\u00e9 !")).replace(b"!", b"\x93"))
    assert "elsewhere the file is UTF-8, so do not convert it as a whole: mend what is not" in refused(path)


# --- bad rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad_rows", ["strict", "quarantine"])
def test_where_every_row_is_bad_no_quarantine_is_advised(tmp_path, refused, bad_rows):
    path = write_rows(tmp_path / "a.jsonl", [{"chosen": None, "rejected": "b"}] * 5)
    error = refused(path, bad_rows=bad_rows)
    null = "column 'chosen' is null; text or a message list is needed"
    assert error == (
        f"{path}: all 5 rows are bad, so it is the file that needs mending; "
        f"line 1: {null}; then line 2: {null}; line 3: {null}"
    )
    assert "quarantine" not in refused(write_rows(tmp_path / "b.jsonl", [{"chosen": None, "rejected": "b"}]))


@pytest.mark.parametrize("count", [1, 2])
def test_quarantine_works_where_it_is_advised_and_for_the_section_that_needs_it(
    tmp_path, configure, refused, count
):
    good = [raw(f"q{i}", "yes", "no") for i in range(4)]
    path = write_rows(tmp_path / "a.jsonl", [*good, *[{"chosen": None, "rejected": "b"}] * count])
    assert "leave " in (error := refused(path))
    assert error.endswith("out with train_dataset.bad_rows=quarantine")
    with pytest.warns(UserWarning, match=f"{count} unusable"):
        assert len(dataset.build(configure(path, bad_rows="quarantine"))) == 4
    valid = {"path": str(path), "bad_rows": "strict"}
    error = refused(write_rows(tmp_path / "b.jsonl", good), split="valid", valid=valid)
    assert error.endswith("out with valid_dataset.bad_rows=quarantine")


# --- pairs that were dropped -----------------------------------------------------------------------------


@pytest.fixture
def positions() -> int:
    """How many positions tiny-random has; a model that is not there yet is not made for a message."""
    folder = Path(builtin.ensure("tiny-random"))
    return json.loads((folder / "config.json").read_text())["max_position_embeddings"]


def test_raising_max_length_to_what_is_said_keeps_a_pair(tmp_path, configure, refused, positions):
    path = write_rows(tmp_path / "a.jsonl", [raw("q", "yes " * n, "no") for n in (30, 20, 40)])
    told = r"raise train_dataset\.max_length \(one of them has (\d+) tokens; the model has (\d+) positions\)$"
    needed, most = map(int, re.search(told, refused(path, max_length=24)).groups())
    assert most == positions
    with pytest.warns(UserWarning, match="2 of 3 rows"):
        assert len(dataset.build(configure(path, max_length=needed))) == 1


def test_max_length_is_not_raised_past_the_positions_of_the_model(tmp_path, refused, positions):
    path = write_rows(tmp_path / "a.jsonl", [raw("q", "yes " * 9000, "no")])
    error = refused(path, max_length=positions)
    assert error.endswith(f"; shorten the texts: the model has {positions} positions")


def test_texts_over_the_limit_of_the_held_out_part_name_its_own_field(tmp_path, refused):
    good = write_rows(tmp_path / "a.jsonl", [raw("q", "yes", "no")])
    error = refused(good, split="valid", valid={"path": str(good), "max_length": 4})
    assert "raise valid_dataset.max_length" in error


@pytest.mark.parametrize(
    ("rows", "settings", "remedies"),
    [
        ([raw("a", "yes", "yes"), raw("b", "yes", "no")], {}, ["chosen and rejected must differ"]),
        ([raw("a", "yes " * 99, "x"), raw("b", "yes", "no")], {"max_length": 64}, ["raise train_dataset.max_length"]),
        ([{"chosen": None, "rejected": "b"}, raw("b", "yes", "no")], {"bad_rows": "quarantine"},
         ["mend the unusable rows (the first: line 1: column 'chosen' is null"]),
    ],
)  # fmt: skip
def test_too_many_dropped_names_the_remedies_of_what_was_dropped(
    tmp_path,
    configure,
    refused,
    rows,
    settings,
    remedies,
):
    path = write_rows(tmp_path / "a.jsonl", rows)
    error = refused(path, max_dropped_share=0.3333, **settings)
    told = error.partition("were dropped")[2].partition("; ")[2]
    for remedy in ("chosen and rejected must differ", "raise train_dataset.max_length", "mend the unusable"):
        assert (remedy in told) == any(remedy in r for r in remedies)
    assert all(r in told for r in remedies)
    share = float(re.search(r", or raise train_dataset\.max_dropped_share to ([0-9.]+)$", error)[1])
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert len(dataset.build(configure(path, max_dropped_share=share, **settings))) == 1


def test_a_file_of_one_prompt_cannot_be_split(tmp_path, configure, refused):
    path = write_rows(tmp_path / "a.jsonl", [raw("q", f"yes {i}", "no") for i in range(9)])
    messages = []
    for share in (0.001, 0.999):
        for split in ("train", "valid"):
            try:
                dataset.build(configure(path, valid={"from_train": share}), split)
            except DataError as error:
                messages.append(str(error))
    assert len(messages) == 2
    for message in messages:
        assert "all 9 rows have one prompt" in message
        assert "raise" not in message
        assert "lower" not in message
        assert message.endswith("; give valid_dataset.path in its place")
    other = write_rows(tmp_path / "b.jsonl", [raw("p", "yes", "no")])
    assert len(dataset.build(configure(path, valid={"path": str(other)}), "valid")) == 1


# --- files and layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_list_in_a_jsonl_file_has_another_name(tmp_path, configure, refused, name):
    content = json.dumps([row("a", 1), row("a", 2)]).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    new = re.search(r"name the file (\S+)$", refused(tmp_path / name))[1]
    (tmp_path / name).rename(tmp_path / new)
    assert len(dataset.build(configure(tmp_path / new))) == 2


def test_a_name_that_says_gz_of_a_file_that_is_none(tmp_path, configure, refused):
    (tmp_path / "a.jsonl.gz").write_bytes(lines(row("a")))
    assert "or drop .gz from its name" in refused(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.gz").rename(tmp_path / "a.jsonl")
    assert len(dataset.build(configure(tmp_path / "a.jsonl"))) == 1


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("Hello yes,Hello no\n", "chosen,rejected"),
        ("Say it: ,yes,no\n", "prompt,chosen,rejected"),
        ("a,b,c,d\n", None),
    ],
)
def test_the_header_that_a_csv_file_lacks(tmp_path, configure, refused, text, header):
    path = tmp_path / "a.csv"
    path.write_text(text)
    found = re.search(r"if the file has no header line, add one: (\S+)$", refused(path))
    assert (found and found[1]) == header
    if header:
        path.write_text(f"{header}\n{text}")
        assert len(dataset.build(configure(path))) == 1


def test_cells_of_a_csv_file(tmp_path, configure, refused):
    path = tmp_path / "a.csv"
    path.write_text("chosen;rejected\na, b;c\n")
    assert "separate columns by commas, and put cells that hold commas into quotes" in refused(path)
    path.write_text('chosen,rejected\n"a, b",c\n')
    assert len(dataset.build(configure(path))) == 1
    path.write_text("chosen,rejected\na,b\na, b,c\n")
    assert "has 3 columns, the header has 2; put cells that hold commas into quotes" in refused(path)
    path.write_text("chosen,rejected\na,b\na\n")
    error = refused(path)
    assert "has 1 columns, the header has 2; add the cells that are missing" in error
    path.write_text('chosen,rejected\n"a,b\n')
    assert 'close every quote; inside quotes write a quote as ""' in refused(path)
    path.write_text('chosen,rejected\n"a ""b""",b\n')
    assert len(dataset.build(configure(path))) == 1


CHATS = chat("hi", "yes"), chat("hi", "no")


@pytest.mark.parametrize(("write", "read"), [(json.dumps, "json.loads"), (repr, "ast.literal_eval")])
def test_a_message_list_as_text_is_read_by_what_is_said(tmp_path, configure, refused, write, read):
    texts = {"chosen": write(CHATS[0]), "rejected": write(CHATS[1])}
    path = write_rows(tmp_path / "a.jsonl", [texts])
    assert f"store it as a list ({read} it, and save as .jsonl or .parquet)" in refused(path)
    made = {
        key: {"json.loads": json.loads, "ast.literal_eval": ast.literal_eval}[read](t)
        for key, t in texts.items()
    }
    assert len(dataset.build(configure(write_rows(path, [made])))) == 1


def test_a_message_list_as_text_that_nothing_reads(tmp_path, refused):
    texts = {"chosen": json.dumps(CHATS[0])[:-4], "rejected": json.dumps(CHATS[1])[:-4]}
    error = refused(write_rows(tmp_path / "a.jsonl", [texts]))
    assert "is a message list written as a string, and cut or damaged; make it anew" in error


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": "What is it?", "chosen": "What is it? a", "rejected": "What is it? b"},
        {"prompt": CHATS[0][:1], "chosen": CHATS[0], "rejected": CHATS[1]},
    ],
)
def test_both_ways_for_a_repeated_prompt_work(tmp_path, configure, refused, given):
    path = tmp_path / "a.jsonl"
    error = refused(write_rows(path, [given]))
    assert "cut it from chosen and rejected, or leave the column 'prompt' out" in error
    cut = {key: given[key][len(given["prompt"]) :] for key in ("chosen", "rejected")}
    assert len(dataset.build(configure(write_rows(path, [{**given, **cut}])))) == 1
    without = {key: value for key, value in given.items() if key != "prompt"}
    assert len(dataset.build(configure(write_rows(path, [without])))) == 1


def test_both_ways_for_a_prompt_as_text_beside_answers_work(tmp_path, configure, refused):
    path = tmp_path / "a.jsonl"
    given = {"prompt": "hi", "chosen": CHATS[0][1:], "rejected": CHATS[1][1:]}
    error = refused(write_rows(path, [given]))
    assert "make it a message list, or leave it out" in error
    for mended in (
        {**given, "prompt": [{"role": "user", "content": "hi"}]},
        {k: given[k] for k in ("chosen", "rejected")},
    ):
        assert len(dataset.build(configure(write_rows(path, [mended])))) == 1


def configure_split(config):
    config.train_dataset.split = "train[:10%]"
    return config


def test_a_hub_option_for_a_local_file_is_taken_out_as_said(tmp_path, configure, refused):
    path = write_rows(tmp_path / "a.jsonl", [raw("q", "yes", "no")])
    assert refused(path, name="x").endswith("a local file has no configurations: use train_dataset.name=null")
    assert len(dataset.build(configure(path, name="null"))) == 1
    with pytest.raises(DataError) as caught:
        dataset.build(configure_split(configure(path)))
    error = str(caught.value)
    assert "leave split out, or take the first rows with train_dataset.num_rows" in error
    assert len(dataset.build(configure(path, num_rows=1))) == 1
