"""What is remembered in a file: made once, made again where the file is damaged, and never lost to others."""

from __future__ import annotations

import json

import pytest

from dpo_kit.system.files import remembered


def test_a_value_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        assert remembered(tmp_path / "c.json", "k", lambda: made.append(1) or [1]) == [1]
    assert made == [1]


@pytest.mark.parametrize("content", ["null", "[1]", '{"k": nu', '{"k": null}', b"\xff", None])
def test_a_damaged_file_is_made_again(tmp_path, content):
    file = tmp_path / "c.json"
    if content is None:
        file.mkdir()  # it cannot be written either: nothing is remembered
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert remembered(file, "k", lambda: "made") == "made"
    if content is not None:
        assert json.loads(file.read_text()) == {"k": "made"}


def test_what_others_added_meanwhile_stays(tmp_path):
    file = tmp_path / "c.json"

    def make():
        remembered(file, "other", lambda: 2)
        return 1

    assert remembered(file, "mine", make) == 1
    assert json.loads(file.read_text()) == {"other": 2, "mine": 1}
