"""TensorBoard beside the records: missing, broken or out of room, it is one line and the run goes on."""

from __future__ import annotations

import sys
import threading
import types

import pytest

from dpo_kit.engine.recorder import Recorder
from dpo_kit.records import metrics
from tests.helpers import one_rank, tiny_config

ROWS = [{"step": step, "dpo/loss": 0.5} for step in (1, 2, 3)]


def recorded(tmp_path) -> None:
    """Three steps through a recorder that was asked for TensorBoard events."""
    with one_rank() as world:
        recorder = Recorder(tmp_path, tiny_config(tmp_path, "stats_logger.tensorboard=true"), world)
        recorder.resume(0)
        for row in ROWS:
            recorder.record(row)
    assert metrics.read_metrics(tmp_path) == ROWS


def writer_that(fails_in: str):
    """A module with a SummaryWriter that raises OSError where it is told to."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    methods = {
        name: (fail if name == fails_in else lambda *_, **__: None)
        for name in ("add_scalar", "flush", "made")
    }
    module = types.ModuleType("torch.utils.tensorboard")
    made = type("SummaryWriter", (), {**methods, "__init__": lambda self, *a, **k: self.made()})
    module.SummaryWriter = made
    return module


def test_events_are_written(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    recorded(tmp_path)
    assert [file.stat().st_size > 0 for file in (tmp_path / "tensorboard").iterdir()] == [True]
    assert capsys.readouterr().out == ""


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    recorded(tmp_path)
    assert capsys.readouterr().out == (
        'no TensorBoard events: pip install "dpo-kit[tracking]"; metrics.jsonl has every number\n'
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            TypeError("Descriptors cannot be created directly.\nIf this call came"),
            "stats_logger.tensorboard=false",
        ),
        (ImportError("cannot import name 'x'"), 'pip install "dpo-kit[tracking]"'),
        (RuntimeError("numpy.core.multiarray failed to import"), "stats_logger.tensorboard=false"),
    ],
)
def test_a_package_that_fails_to_import_is_one_line(tmp_path, monkeypatch, capsys, error, said):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "torch.utils.tensorboard":
                raise error

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    recorded(tmp_path)
    first = str(error).splitlines()[0]
    assert capsys.readouterr().out == (
        f"no TensorBoard events ({type(error).__name__}: {first}): {said}; metrics.jsonl has every number\n"
    )


@pytest.mark.parametrize("where", ["made", "add_scalar", "flush"])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys, where):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer_that(where))
    recorded(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(
        "TensorBoard events (OSError: [Errno 28] No space left on device): stats_logger.tensorboard=false;"
        " metrics.jsonl has every number"
    )
    assert line.startswith("no TensorBoard" if where == "made" else "no more TensorBoard")


def test_a_file_that_cannot_be_written_any_more_ends_the_events_only(tmp_path, monkeypatch, capsys):
    """The real package writes in a thread of its own: its failure is noticed at a later step."""
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer")

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.RecordWriter, "write", full)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # it dies aloud
    before = set(threading.enumerate())
    recorded(tmp_path)
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()
    (line,) = capsys.readouterr().out.splitlines()
    assert "TensorBoard events (OSError: [Errno 28] No space left on device)" in line
