"""What the checks found is kept once and told wherever a run's figures are read."""

from __future__ import annotations

from dpo_kit.model.export import model_card
from dpo_kit.records import findings
from dpo_kit.records.findings import Finding
from dpo_kit.view import progress
from dpo_kit.view.tables import findings_list
from tests.helpers import tiny_config

LOOK = Finding(
    "look", "dropped", "6 of 8 training rows are dropped (6 unusable)", "the first: line 2: <b>secret</b>"
)
BAD = Finding("bad", "settings", "actor.optimizer.lr = 0: no weight will change")


class Folder:
    def __init__(self, folder):
        self.dir = folder


def test_what_was_found_is_kept_once_and_the_worst_comes_first(tmp_path):
    assert findings.read(tmp_path) == []
    findings.write(tmp_path, [LOOK, Finding("ok", "text", "fine")])
    findings.add(tmp_path, BAD)
    findings.add(tmp_path, BAD)
    assert findings.read(tmp_path) == [BAD, LOOK]
    findings.write(tmp_path, [])
    assert findings.read(tmp_path) == []


def test_a_damaged_file_is_no_finding(tmp_path):
    for text in ("{", "[1]", '[{"level": "bad"}]', "null"):
        (tmp_path / "findings.json").write_text(text)
        assert findings.read(tmp_path) == []


def test_progress_tells_them_once_and_not_those_of_an_earlier_attempt(tmp_path):
    said: list[str] = []
    lines = progress.Lines(tmp_path, said.append)
    findings.write(tmp_path, [LOOK])
    lines.update({"state": "running", "phase": "build pairs", "phases": []})
    assert not any("look" in line for line in said)
    findings.write(tmp_path, [BAD])
    lines.update({"state": "running", "phase": "load model", "phases": []})
    findings.add(tmp_path, LOOK)
    lines.update({"state": "running", "phase": "training", "phases": []})
    told = [line for line in said if line.startswith(("bad", "look"))]
    assert told == [
        "bad: actor.optimizer.lr = 0: no weight will change",
        "look: 6 of 8 training rows are dropped (6 unusable); the first: line 2: <b>secret</b>",
    ]


def test_tables_show_them_escaped_once_and_by_what_they_are_about(tmp_path):
    findings.write(tmp_path, [LOOK, BAD])
    shown = findings_list([Folder(tmp_path), Folder(tmp_path)])
    assert shown.text.split("\n") == [str(BAD), str(LOOK)]
    assert "<b>secret" not in shown._repr_html_()
    assert findings_list([Folder(tmp_path)], about=("settings",)).text == str(BAD)
    (tmp_path / "other").mkdir()
    findings.write(tmp_path / "other", [BAD])
    both = findings_list([Folder(tmp_path), Folder(tmp_path / "other")]).text.split("\n")
    assert both == [str(BAD), f"look: {tmp_path.name}: {LOOK.told}"]


def test_the_model_card_names_them_without_what_quotes_the_data(tmp_path):
    card = model_card(tiny_config(tmp_path), [], [BAD, LOOK])
    assert f"## What the checks found\n\n- {BAD}\n- look: {LOOK.text}\n" in card
    assert "secret" not in card
    assert "What the checks found" not in model_card(tiny_config(tmp_path), [])
