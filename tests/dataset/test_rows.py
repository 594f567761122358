"""Where rows come from, and what is said about files that are wrong: one line, nothing left on disk."""

from __future__ import annotations

import builtins
import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from dpo_kit import config as config_module
from dpo_kit import dataset
from dpo_kit.dataset import rows
from dpo_kit.errors import DataError
from dpo_kit.system import hub as hub_module
from tests.toy_tokenizers import CHATML, save_tokenizer

PAIR = {"chosen": "Hello yes", "rejected": "Hello no"}
OTHER = {"chosen": "Hello 1, é", "rejected": "Hello 2\nand more"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos="<s>", template=CHATML)


@pytest.fixture
def build(tmp_path, toy):
    def run(path, **train):
        tree = {
            "tokenizer_path": toy,
            "cluster": {"fileroot": str(tmp_path / "runs")},
            "actor": {"path": "tiny-random"},
            "ref": {"path": "tiny-random"},
            "train_dataset": {"path": str(path), **train},
        }
        return dataset.build(config_module.from_tree(tree))

    return run


def jsonl(*items) -> bytes:
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in items]
    return b"".join(line + b"\n" for line in lines)


def parquet(columns: dict, names=None) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(list(columns.values()), names=names) if names else pa.table(columns)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def not_utf8_parquet() -> bytes:
    import pyarrow as pa

    bad = pa.array([b"ok", b"caf\xe9"], pa.binary()).view(pa.string())
    return parquet({"chosen": bad, "rejected": ["a", "b"]})


def csv_text(*lines: str) -> bytes:
    return "\r\n".join(lines).encode() + b"\r\n"


# ---------------------------------------------------------------- good files

GOOD = {
    "a.jsonl": jsonl(PAIR, OTHER),
    "blank lines.jsonl": b"\n" + jsonl(PAIR) + b"  \n\r\n" + jsonl(OTHER),
    "no last line break.jsonl": jsonl(PAIR, OTHER).rstrip(),
    "windows.jsonl": jsonl(PAIR, OTHER).replace(b"\n", b"\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(PAIR, OTHER),
    "utf8.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (PAIR, OTHER)).encode(),
    "more columns.jsonl": jsonl({**PAIR, "score": float("nan"), "x": {}}, {**OTHER, "y": [None]}),
    "UPPER.JSONL": jsonl(PAIR, OTHER),
    "a.json": json.dumps([PAIR, OTHER]).encode(),
    "pretty.json": b"\xef\xbb\xbf" + json.dumps([PAIR, OTHER], indent=2).encode() + b"\n\n",
    "lines.json": jsonl(PAIR, OTHER),
    "a.csv": csv_text("chosen,rejected", "Hello yes,Hello no", '"Hello 1, é","Hello 2\nand more"'),
    "bom.csv": b"\xef\xbb\xbf"
    + csv_text("id, chosen ,rejected", "1,Hello yes,Hello no", "", '2,"Hello 1, é","Hello 2\nand more"'),
    "a.parquet": parquet(
        {"chosen": [PAIR["chosen"], OTHER["chosen"]], "rejected": [PAIR["rejected"], OTHER["rejected"]]}
    ),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", GOOD)
def test_every_format_gives_the_same_pairs(tmp_path, build, name, packed):
    reference = build(write(tmp_path / "reference" / "a.jsonl", GOOD["a.jsonl"]))
    path = write(
        tmp_path / (f"{name}.gz" if packed else name), gzip.compress(GOOD[name]) if packed else GOOD[name]
    )
    store = build(path)
    assert store.fingerprint == reference.fingerprint
    assert store.index.tolist() == [0, 1]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_conversations_from_parquet_lose_the_nulls_that_arrow_adds(tmp_path, build):
    def messages(answer, **more):
        return [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer, **more}]

    chosen, rejected = [messages("yes"), messages("a", name="x")], [messages("no"), messages("b")]
    plain = jsonl(*({"chosen": c, "rejected": r} for c, r in zip(chosen, rejected, strict=True)))
    stores = [
        build(write(tmp_path / "a.jsonl", plain)),
        build(write(tmp_path / "a.parquet", parquet({"chosen": chosen, "rejected": rejected}))),
    ]
    assert stores[0].fingerprint == stores[1].fingerprint


def test_a_large_csv_cell_is_read_and_the_limit_of_csv_is_put_back(tmp_path, build):
    import csv

    before = csv.field_size_limit(1000)
    path = write(tmp_path / "a.csv", csv_text("chosen,rejected", f"{'Hello ' * 50_000},no", "yes,no"))
    with pytest.warns(UserWarning, match="over max_length"):
        assert build(path).index.tolist() == [1]
    assert csv.field_size_limit(before) == 1000


def test_a_folder_gives_the_file_of_the_split(tmp_path, build):
    for name, row in {"train.jsonl": PAIR, "test.jsonl.gz": OTHER, "notes.txt": {}}.items():
        content = jsonl(row)
        write(tmp_path / "data" / name, gzip.compress(content) if name.endswith("gz") else content)
    train, test, valid = (build(tmp_path / "data", split=split) for split in ("train", "test", "validation"))
    assert train.fingerprint != test.fingerprint == valid.fingerprint
    with pytest.raises(
        DataError,
        match=r"split = 'other': no file named other with one of .* found 'test.jsonl.gz', 'train.jsonl'",
    ):
        build(tmp_path / "data", split="other")
    write(tmp_path / "data" / "train.csv", b"")
    with pytest.raises(DataError, match=r"'train\.csv', 'train\.jsonl' are all split 'train'"):
        build(tmp_path / "data")


def test_sample_is_the_embedded_one(tmp_path, monkeypatch, build):
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "package" / "rows.py"))
    folder = tmp_path / "package" / "sample"
    folder.mkdir(parents=True)
    for name, row in {"train": PAIR, "valid": OTHER}.items():
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(jsonl(row)))
    train, test = build("sample"), build("sample", split="test")
    assert "pairs      sample/train.jsonl.gz\n" in dataset.format_report(train)
    assert train.fingerprint != test.fingerprint == build("sample", split="valid").fingerprint


def test_split_of_a_single_file(tmp_path, build):
    path = write(tmp_path / "a.jsonl", jsonl(PAIR))
    assert build(path, split="test").fingerprint == build(path).fingerprint
    with pytest.raises(DataError, match=r"train_dataset\.split = 'train\[:10%\]': a local file is one split"):
        build(path, split="train[:10%]")
    with pytest.raises(DataError, match=r"train_dataset\.name = 'x' is for hub datasets"):
        build(path, name="x")


# ---------------------------------------------------------------- bad files

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CHAT2 = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]
PROMPTED = {
    "prompt": "What is the capital?",
    "chosen": "What is the capital? Paris",
    "rejected": "What is the capital? Rome",
}

BAD: dict[str, tuple[bytes, str]] = {
    # the whole file
    "empty.jsonl": (b"", "empty.jsonl is empty: it has no rows"),
    "blank.jsonl": (b"\n \n", "blank.jsonl is empty: it has no rows"),
    "bom only.jsonl": (b"\xef\xbb\xbf", "is empty: it has no rows"),
    "empty list.json": (b"[ ]", "is empty: it has no rows"),
    "empty.csv": (b"", "is empty: it has no rows"),
    "header only.csv": (csv_text("chosen,rejected"), "is empty: it has no rows"),
    "empty.parquet": (parquet({"chosen": [], "rejected": []}), "is empty: it has no rows"),
    "empty.jsonl.gz": (gzip.compress(b""), "is empty: it has no rows"),
    "cut.jsonl.gz": (gzip.compress(jsonl(*[PAIR] * 50))[:-12], "cut.jsonl.gz: the gzip file is cut short"),
    "no gzip.jsonl.gz": (jsonl(PAIR), "no gzip.jsonl.gz: not a gzip file, or a damaged one"),
    "damaged.jsonl.gz": (gzip.compress(jsonl(PAIR))[:20] + b"\0" * 30, "not a gzip file, or a damaged one"),
    "utf16.jsonl": (jsonl(PAIR).decode().encode("utf-16"), "line 1: is UTF-16; save it as UTF-8"),
    "kind.txt": (b"hello", "kind.txt: unknown kind of file; use one of .jsonl, .json, .parquet, .csv"),
    "list.jsonl": (
        json.dumps([PAIR]).encode(),
        "list.jsonl line 1: holds a list, not one object a line; name the file",
    ),
    "columns.json": (
        json.dumps({"chosen": ["a"]}, indent=1).encode(),
        "line 1: a .json file holds a list of rows",
    ),
    "text.json": (b"hello", "line 1: a .json file holds a list of rows"),
    "cut.json": (
        json.dumps([PAIR, PAIR], indent=1).encode()[:-20],
        r"cut.json line 8: is not JSON \(.*, after 1 rows\)",
    ),
    "cut after a row.json": (
        b'[{"chosen": "a", "rejected": "b"}',
        r"is not JSON \(the list is cut short, after 1 rows\)",
    ),
    "comma.json": (b'[{"chosen": "a", "rejected": "b"},]', "a comma before the closing bracket"),
    "no comma.json": (b'[{"chosen": "a", "rejected": "b"} {}]', "expected a comma"),
    "tail.json": (b'[{"chosen": "a", "rejected": "b"}] x', "more text after the list"),
    "no.parquet": (b"PAR1 hello", r"no.parquet: not a parquet file \("),
    "no header.csv": (
        csv_text("Hello yes,Hello no", "a,b"),
        r"no header.csv line 1: no column 'chosen' and no column 'rejected'; looked for 'chosen' and 'rejected' "
        r"\(optional: 'prompt'\), found 'Hello yes', 'Hello no'; if the file has no header line, add one: chosen,",
    ),
    "semicolons.csv": (
        csv_text("chosen;rejected", "a;b"),
        "found 'chosen;rejected'; separate columns by commas, and put cells",
    ),
    "unknown.jsonl": (
        jsonl({"question": "a", "better": "b"}),
        "no column 'chosen' .* found 'question', 'better'$",
    ),
    "one column.parquet": (
        parquet({"chosen": ["a"], "score": [1]}),
        "no column 'rejected'; .* found 'chosen', 'score'",
    ),
    "twice.csv": (csv_text("chosen,rejected,chosen", "a,b,c"), "twice.csv: column 'chosen' is there twice"),
    "twice.parquet": (
        parquet({1: ["a"], 2: ["b"], 3: ["c"]}, ["chosen", "rejected", "chosen"]),
        "column 'chosen' is there twice",
    ),
    "open quote.csv": (csv_text("chosen,rejected", '"a,b', "c,d"), r"open quote.csv line 2: is not CSV \("),
    "identical.jsonl": (
        jsonl(*[{"chosen": "a", "rejected": "a"}] * 3),
        r"identical.jsonl: no pair is left: all 3 rows were dropped \(3 identical\); chosen and rejected must differ",
    ),
    # rows
    "malformed.jsonl": (
        jsonl(PAIR, b'{"chosen": "a", '),
        r"malformed.jsonl line 2: is not JSON \(.* at character 16\)",
    ),
    "two in a line.jsonl": (
        jsonl(b'{"chosen": "a", "rejected": "b"} {}'),
        "line 1: is not JSON .more text after",
    ),
    "number.jsonl": (jsonl(PAIR, b"3"), "line 2: is a number, not an object with columns"),
    "keys twice.jsonl": (
        jsonl(b'{"chosen": "a", "chosen": "c", "rejected": "b"}'),
        "line 1: column 'chosen' is there twice",
    ),
    "deep.jsonl": (jsonl(PAIR, b'{"chosen":' + b"[" * 200_000), "line 2: is not JSON that can be read"),
    "null.jsonl": (
        jsonl(PAIR, {"chosen": None, "rejected": "b"}),
        "null.jsonl line 2: column 'chosen' is null",
    ),
    "nan.jsonl": (jsonl(PAIR, {"chosen": "a", "rejected": float("nan")}), "line 2: column 'rejected' is NaN"),
    "missing.jsonl": (jsonl(PAIR, {"chosen": "a"}), "line 2: has no column 'rejected'"),
    "number column.jsonl": (
        jsonl(PAIR, {"chosen": "a", "rejected": 3}),
        r"column 'rejected' is a number \(3\)",
    ),
    "mixed.jsonl": (
        jsonl(PAIR, {"chosen": CHAT, "rejected": CHAT2}),
        "line 2: column 'chosen' is a message list, in the first row it is text",
    ),
    "half mixed.jsonl": (
        jsonl({"chosen": CHAT, "rejected": "b"}),
        "column 'chosen' is a message list, column 'rejected' is text",
    ),
    "prompt now and then.jsonl": (
        jsonl(PAIR, {"prompt": "p", **PAIR}),
        "line 2: column 'prompt' is text, in the first row it is not there",
    ),
    "prompt messages.jsonl": (
        jsonl({"prompt": CHAT[:1], **PAIR}),
        "column 'prompt' is a message list, column 'chosen' is text",
    ),
    "latin1.jsonl": (
        jsonl(PAIR, '{"chosen": "caf\u00e9", "rejected": "b"}'.encode("latin-1")),
        r"latin1.jsonl line 2: column 'chosen' holds byte 0xe9 at character 3, which is not UTF-8; as Western .* iconv",
    ),
    "latin1.json": (
        '[{"chosen": "caf\u00e9", "rejected": "b"}]'.encode("latin-1"),
        "column 'chosen' holds byte 0xe9",
    ),
    "latin1.csv": (
        "chosen,rejected\na,caf\u00e9\n".encode("latin-1"),
        "line 2: column 'rejected' holds byte 0xe9",
    ),
    "latin1.parquet": (not_utf8_parquet(), r"row 1 \(from 0\): holds byte 0xe9, which is not UTF-8"),
    "surrogate.jsonl": (
        jsonl(b'{"chosen": "a\\ud83d", "rejected": "b"}'),
        r"column 'chosen' .*lone surrogate U\+D83D",
    ),
    "reserved.jsonl": (
        jsonl({"chosen": "a\ufdd0", "rejected": "b"}),
        r"holds U\+FDD0, which Unicode reserves",
    ),
    "null.parquet": (
        parquet({"chosen": ["a", None], "rejected": ["b", "c"]}),
        r"row 1 \(from 0\): column 'chosen' is null",
    ),
    "numbers.parquet": (parquet({"chosen": [1], "rejected": [2]}), r"column 'chosen' is a number \(1\)"),
    "short row.csv": (csv_text("chosen,rejected", "a,b", "c"), "line 3: has 1 columns, the header has 2"),
    "long row.csv": (csv_text("chosen,rejected", "a,b,c"), "line 2: has 3 columns, the header has 2"),
    "repeated.jsonl": (
        jsonl(PROMPTED),
        "repeated.jsonl line 1: column 'chosen' repeats the prompt 'What is the capital\\?'; keep it in one place",
    ),
    "repeated in chosen.jsonl": (
        jsonl({**PROMPTED, "rejected": "Rome"}),
        "column 'chosen' repeats the prompt",
    ),
    "repeated inside.jsonl": (
        jsonl(
            {
                "prompt": "What is it?",
                "chosen": "Human: What is it? Bot: a",
                "rejected": "Human: What is it? Bot: b",
            }
        ),
        "column 'chosen' repeats the prompt",
    ),
    "repeated messages.jsonl": (
        jsonl({"prompt": CHAT[:1], "chosen": CHAT, "rejected": CHAT2}),
        "line 1: column 'chosen' repeats the prompt 'q'",
    ),
    "list as string.jsonl": (
        jsonl({"chosen": json.dumps(CHAT), "rejected": json.dumps(CHAT2)}),
        "line 1: column 'chosen' is a message list written as a string; store it as a list",
    ),
    "python list.csv": (
        csv_text("chosen,rejected", f'"{CHAT}","{CHAT2}"'),
        "line 2: column 'chosen' is a message list written as a string",
    ),
    "no assistant.jsonl": (
        jsonl({"chosen": CHAT[:1], "rejected": CHAT2}),
        "line 1: column 'chosen' has no assistant turn; the last message must be the assistant's",
    ),
    "user last.jsonl": (
        jsonl({"chosen": [*CHAT, CHAT[0]], "rejected": CHAT2}),
        "'chosen' ends with a 'user' turn",
    ),
    "empty messages.jsonl": (jsonl({"chosen": [], "rejected": CHAT2}), "column 'chosen' is an empty list"),
    "one message.jsonl": (
        jsonl({"chosen": CHAT[1], "rejected": CHAT[1]}),
        "column 'chosen' is one object; a message list",
    ),
    "from value.jsonl": (
        jsonl({"chosen": [{"from": "human", "value": "q"}], "rejected": CHAT2}),
        "column 'chosen' message 0 has no text under 'role' .keys: 'from', 'value'.",
    ),
    "strings.jsonl": (
        jsonl({"chosen": ["a"], "rejected": ["b"]}),
        "column 'chosen' message 0 is text; {\"role\"",
    ),
    "content.jsonl": (
        jsonl({"chosen": [CHAT[0], {"role": "assistant", "content": None}], "rejected": CHAT2}),
        "column 'chosen' message 1 has null under 'content'; text is needed",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(tmp_path, build, name):
    content, message = BAD[name]
    before = {write(tmp_path / name, content)}
    with pytest.raises(DataError, match=message) as caught:
        build(tmp_path / name)
    text = str(caught.value)
    assert name in text
    assert "\n" not in text
    assert len(text) < 600
    text.encode("utf-8")
    assert set(tmp_path.iterdir()) == before


def test_all_bad_rows_are_counted_and_the_first_are_named(tmp_path, build):
    items = [
        PAIR,
        b"{",
        {"chosen": None},
        PAIR,
        {"chosen": "a", "rejected": None},
        7,
        *[{"rejected": "a"}] * 300,
    ]
    path = write(tmp_path / "a.jsonl", jsonl(*items))
    with pytest.raises(DataError) as caught:
        build(path)
    text = str(caught.value)
    assert text.startswith(f"304 bad rows; first: {path} line 2: is not JSON")
    assert "; then line 3: column 'chosen' is null" in text
    assert "; line 5: column 'rejected' is null" in text
    assert "line 6" not in text


def test_the_chat_template_refuses(tmp_path, build, toy):
    template = "{{ raise_exception('system is not supported') if messages[0]['role'] == 'system' }}" + CHATML
    strict = save_tokenizer(tmp_path / "strict", template=template)
    system = {"role": "system", "content": "s"}
    path = write(tmp_path / "a.jsonl", jsonl({"chosen": [system, *CHAT], "rejected": [system, *CHAT2]}))
    tree = {"tokenizer_path": strict, "actor": {"path": "tiny-random"}, "ref": {"path": "tiny-random"}}
    tree |= {"train_dataset": {"path": str(path)}, "cluster": {"fileroot": str(tmp_path / "runs")}}
    with pytest.raises(
        DataError, match=r"line 1: column 'chosen' is refused by .* chat template \(system is not supported\)"
    ):
        dataset.build(config_module.from_tree(tree))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"},
        {"prompt": "Hi there", "chosen": "Hi there, how are you?", "rejected": "Go away"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": "Say it", "chosen": "it is said", "rejected": "no"},
    ],
)
def test_an_echo_of_a_word_is_no_repeated_prompt(tmp_path, build, row):
    assert len(build(write(tmp_path / "a.jsonl", jsonl(row)))) == 1


# ---------------------------------------------------------------- files that are not there, the hub


@pytest.mark.parametrize(
    "path", ["nothing.jsonl", "./nothing", "/no/such/folder", "no such file", "a/b/c", "x.csv.gz"]
)
def test_no_such_file(build, path):
    with pytest.raises(
        DataError, match=r"train_dataset\.path = '.*: no such file .*; give an existing \.jsonl"
    ):
        build(path)


def test_unreadable_file(tmp_path, build, monkeypatch):
    path = write(tmp_path / "a.jsonl", jsonl(PAIR))

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: Permission denied"):
        rows.open_source(str(path), section="train_dataset")


def test_hub_without_the_package_gives_the_install_line(build, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    with pytest.raises(
        DataError, match=r"'Anthropic/hh-rlhf' is no local file, .*: pip install \"dpo-kit\[notebook\]\""
    ):
        rows.open_source("Anthropic/hh-rlhf", section="train_dataset")


class FakeHub:
    """`datasets.load_dataset` without a network."""

    def __init__(self, data, configurations=()):
        self.data, self.configurations, self.calls = data, configurations, []

    def load_dataset(self, path, name=None, data_dir=None, split=None):
        from huggingface_hub import constants

        self.calls.append((path, name, data_dir, split))
        self.offline = constants.HF_HUB_OFFLINE
        if isinstance(self.data, Exception):
            raise self.data
        if name and name not in self.configurations:
            raise ValueError(f"BuilderConfig '{name}' not found. Available: ['default']")
        return self.data


@pytest.fixture
def hub(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fake(data, configurations=()):
        if isinstance(data, list):
            data = datasets.Dataset.from_list(data)
        hub = FakeHub(data, configurations)
        monkeypatch.setattr(hub_module, "reachable", lambda endpoint: True)
        monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
        return hub

    return fake


def test_hub_that_cannot_be_reached_is_asked_in_its_cache_only(build, hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for answers in (True, False):
        fake = hub([PAIR, OTHER])
        monkeypatch.setattr(hub_module, "reachable", lambda endpoint, answers=answers: answers)
        build("user/data")
        assert fake.offline is not answers


def test_hub_dataset(tmp_path, build, hub):
    fake = hub([PAIR, OTHER])
    store = build("Anthropic/hh-rlhf", name="harmless-base", split="test")
    local = build(write(tmp_path / "a.jsonl", jsonl(PAIR, OTHER)))
    assert store.fingerprint == local.fingerprint
    assert fake.calls == [
        ("Anthropic/hh-rlhf", "harmless-base", None, "test"),
        ("Anthropic/hh-rlhf", None, "harmless-base", "test"),
    ]
    assert build("Anthropic/hh-rlhf", name="harmless-base", split="test").path == store.path
    hub([PAIR, PAIR])
    assert build("Anthropic/hh-rlhf", name="harmless-base", split="test").path != store.path
    chats = hub([{"chosen": CHAT, "rejected": CHAT2}], ("x",))
    assert build("user/chats", name="x").meta["layout"] == "conversation"
    assert len(chats.calls) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            ConnectionError("Couldn't reach\nthe Hub"),
            r"cannot be loaded from the hub \(ConnectionError: Couldn't reach\); check the name",
        ),
        (KeyError(), r"cannot be loaded from the hub \(KeyError\)"),
        ([{"question": "a"}], r"user/data \[train\]: no column 'chosen' .* found 'question'"),
        (
            [PAIR, {"chosen": None, "rejected": "b"}],
            r"user/data \[train\] row 1 \(from 0\): column 'chosen' is null",
        ),
    ],
)
def test_hub_dataset_that_cannot_be_used(tmp_path, build, hub, data, message):
    hub(data)
    with pytest.raises(DataError, match=message) as caught:
        build("user/data")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_no_data_file(tmp_path, build):
    os.mkfifo(tmp_path / "pairs.jsonl")
    with pytest.raises(DataError, match="is neither a file nor a folder"):
        build(tmp_path / "pairs.jsonl")


def test_utf_32_is_told_from_utf_16(tmp_path, build):
    path = tmp_path / "pairs.jsonl"
    for codec in ("utf-16", "utf-32"):
        path.write_text('{"chosen": "a", "rejected": "b"}\n', codec)
        with pytest.raises(DataError, match=f"iconv -f {codec} -t utf-8"):
            build(path)
