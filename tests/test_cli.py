"""The command line: every command on the tiny model, exit statuses, and a user's mistakes in one line each."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from dpo_kit import cli
from dpo_kit.errors import RunError
from dpo_kit.model import builtin
from dpo_kit.records import metrics
from dpo_kit.records.status import read_status
from dpo_kit.system import machine
from tests.toy_tokenizers import save_tokenizer

SMOKE = Path(__file__).parents[1] / "params" / "smoke.yaml"
SCORE_FIELDS = [
    "index",
    "prompt_tokens",
    "chosen_tokens",
    "rejected_tokens",
    "policy_chosen_logps",
    "policy_rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_reward",
    "rejected_reward",
    "loss",
]


def pair(i, chosen="yes", rejected="no"):
    start = f"\n\nHuman: question {i}\n\nAssistant:"
    return {"chosen": f"{start} {chosen} {i}", "rejected": f"{start} {rejected}"}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(folder, *, name="small.yaml", **sections):
    """A params file over `pairs.jsonl` beside it; seconds on one CPU rank."""
    data = write_rows(folder / "pairs.jsonl", map(pair, range(10)))
    tree = {
        "experiment_name": "cli",
        "cluster": {"fileroot": str(folder / "runs"), "n_gpus_per_node": 0},
        "actor": {"path": "tiny-random", "dtype": "float32", "optimizer": {"lr": 1e-3}},
        "ref": {"path": "${actor.path}"},
        "train_dataset": {"path": str(data), "batch_size": 4},
        "evaluator": {"num_samples": 0, "max_new_tokens": 4},
        "stats_logger": {"tensorboard": False},
        **sections,
    }
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def call(*arguments):
    """Exit status and lines of stdout and stderr of one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(argument) for argument in arguments])
    return status, out.getvalue().splitlines(), err.getvalue().splitlines()


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of the params file, status, lines printed) of one foreground training run."""
    folder = tmp_path_factory.mktemp("cli")
    return folder, *call("train", "--config", write_config(folder), "trial_name=first")


# ---------------------------------------------------------------- the commands


def test_train_prints_the_run_folder_last(trained):
    folder, status, out, err = trained
    assert (status, err) == (0, [])
    assert out[-1] == str(folder / "runs" / "cli" / "first")
    assert out[0] == "1 CPU rank (gloo), " + out[0].split("gloo), ")[1]
    assert read_status(Path(out[-1]))["state"] == "done"
    assert [m["step"] for m in metrics.read_metrics(Path(out[-1]))] == [1, 2, 3]


def test_a_sweep_makes_a_run_for_each_beta(trained):
    folder = trained[0]
    status, out, err = call(
        "sweep", "--config", folder / "small.yaml", "actor.beta=0.1,0.5", "total_train_steps=1"
    )
    assert (status, err) == (0, [])
    assert [line for line in out if line.startswith("run ")][:2] == [
        "run 1 of 2: beta 0.1",
        "run 2 of 2: beta 0.5",
    ]
    assert out[-3].split()[:2] == ["run", "state"]
    assert [line.split()[:3] for line in out[-2:]] == [["beta", "0.1", "done"], ["beta", "0.5", "done"]]
    logs = sorted((folder / "runs" / "cli").glob("*beta*/logs/rank-0.log"))
    found = [re.search(r"reference: (\d+) of (\d+) pairs from the cache", log.read_text()) for log in logs]
    assert [m and int(m[1]) == int(m[2]) > 0 for m in found] == [True, True]


def test_data_prints_the_report_and_the_store(trained):
    status, out, err = call("data", "--config", trained[0] / "small.yaml")
    assert (status, err) == (0, [])
    assert "10" in " ".join(out)
    assert (Path(out[-1]) / "meta.json").exists()


def test_score_writes_a_line_a_pair_in_dataset_order(trained, tmp_path):
    folder = trained[0]
    model = folder / "runs" / "cli" / "first" / "model"
    rows = [*map(pair, range(3)), pair(3, "a", "a 3"), *map(pair, range(4, 12))]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    overrides = [
        f"train_dataset.path={data}",
        f"actor.path={model}",
        "ref.path=tiny-random",
        "actor.beta=0.5",
    ]
    before = dict(os.environ)
    status, out, err = call(
        "score", "--config", folder / "small.yaml", *overrides, "-o", tmp_path / "o.jsonl"
    )
    assert status == 0
    assert not [
        line for line in err if not line.endswith((" rows", " pairs"))
    ]  # it counts where it takes long
    changed = {name for name, value in os.environ.items() if before.get(name) != value}
    assert changed <= {"TORCHINDUCTOR_CACHE_DIR"}  # torch's own, where its compiler is imported first
    assert before.keys() <= os.environ.keys()
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, *range(4, 12)]
    assert out[-1] == str(tmp_path / "o.jsonl")
    for line in lines:
        assert list(line) == SCORE_FIELDS
        for side in ("chosen", "rejected"):
            margin = line[f"policy_{side}_logps"] - line[f"ref_{side}_logps"]
            assert line[f"{side}_reward"] == pytest.approx(0.5 * margin, abs=1e-12)
    assert any(line["chosen_reward"] != 0 for line in lines)


def test_sample_answers_with_reference_and_policy(trained, tmp_path):
    folder = trained[0]
    status, out, err = call("sample", "first", "--fileroot", folder / "runs", "--prompt", "Hello?")
    assert (status, err) == (0, [])
    assert out[0] == "prompt     Hello?"
    assert out[1].startswith("reference  ")
    (tmp_path / "prompts.txt").write_text("One?\n\nTwo?\n")
    run_dir = folder / "runs" / "cli" / "first"
    status, out, err = call("sample", run_dir, "--prompts", tmp_path / "prompts.txt")
    assert [line for line in out if line.startswith("prompt")] == ["prompt     One?", "prompt     Two?"]


def test_export_loads_with_transformers(trained, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    status, out, err = call(
        "export", "cli/first", "--fileroot", trained[0] / "runs", "-o", tmp_path / "new" / "model"
    )
    assert (status, out, err) == (0, [str(tmp_path / "new" / "model")], [])
    assert os.listdir(tmp_path / "new") == ["model"]
    there = [
        AutoModelForCausalLM.from_pretrained(p)
        for p in (tmp_path / "new" / "model", builtin.ensure("tiny-random"))
    ]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new" / "model")
    # Trained on plain text, which ends in EOS; the turn end is the base's.
    assert there[0].generation_config.eos_token_id == [tokenizer.eos_token_id, 258]
    ids = torch.tensor([tokenizer("Hello").input_ids])
    logits = [model(ids).logits for model in there]
    assert logits[0].shape == logits[1].shape
    assert not torch.equal(*logits)
    assert call("export", "cli/first", "--fileroot", trained[0] / "runs", "-o", tmp_path)[0] == 2


def test_runs_list_show_and_rm(trained, fakes):
    status, out, err = call("runs", "list", "--fileroot", trained[0] / "runs")
    assert (status, err) == (0, [])
    assert any(line.split()[:3] == ["cli/first", "done", "3"] for line in out)
    status, out, err = call("runs", "show", "first", "--fileroot", trained[0] / "runs")
    assert (status, err) == (0, [])
    assert any("dpo/loss" in line for line in out)
    config = write_config(fakes.root)
    run_dir = Path(call("train", "--config", config, "trial_name=gone")[1][-1])
    assert call("runs", "rm", run_dir)[0] == 1
    assert run_dir.exists()
    assert call("runs", "rm", run_dir, "--yes")[0] == 0
    assert not run_dir.exists()


def test_detach_stop_and_resume(fakes):
    fakes.play([["train", 600, 0.1]])
    config = write_config(fakes.root)
    status, out, err = call("train", "--config", config, "--detach", "trial_name=long", "actor.beta=0.2")
    assert (status, err) == (0, [])
    run_dir = Path(out[-1])
    assert "beta: 0.2" in (run_dir / "config.yaml").read_text()
    assert read_status(run_dir)["owner"]["kind"] == "detached"
    resumed = call("runs", "resume", run_dir)
    assert (resumed[0], len(resumed[2])) == (2, 1)
    assert call("runs", "stop", run_dir)[:2] == (0, ["cli/long: stopped"])
    fakes.play([["train", 3, 0.01]])
    status, out, err = call("runs", "resume", run_dir)
    assert (status, err, out[-1]) == (0, [], str(run_dir))
    assert "starts anew" in out[0]
    assert call("runs", "resume", run_dir)[:2] == (0, ["cli/long is done; nothing to resume", str(run_dir)])


def test_the_module_is_the_same_command(trained):
    command = [sys.executable, "-m", "dpo_kit", "runs", "list", "--fileroot", str(trained[0] / "runs")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cli/first" in done.stdout


def test_a_reader_that_goes_away_is_no_traceback(trained):
    command = f"{sys.executable} -m dpo_kit runs show first --fileroot {trained[0] / 'runs'} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_a_run_goes_on_when_nobody_reads_its_lines():
    code = "from dpo_kit.view import progress\nfor _ in range(99): progress._print('x' * 9999)\nraise SystemExit(7)"
    command = f'{sys.executable} -c "{code}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")


# ---------------------------------------------------------------- exit statuses


def test_a_failing_rank_is_status_1_and_a_stopped_one_3(fakes):
    fakes.play({"0": [["raise", "ValueError", "boom"]]})
    status, out, err = call("train", "--config", write_config(fakes.root), "trial_name=bad")
    assert status == 1
    assert err[0] == "cli/bad: failed: rank 0: ValueError: boom (logs/rank-0.log)"
    assert err[-1].startswith("to start anew (it has no checkpoint): dpo-kit runs resume ")
    fakes.play({"0": [["exit", 3]]})
    status, out, err = call("train", "--config", write_config(fakes.root), "trial_name=preempted")
    assert status == 3
    assert out[-1].endswith("preempted")
    assert err[0] == "cli/preempted: preempted: as asked, before the first step: there was nothing to save"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RunError("x", state="failed"), 1),
        (RunError("x", state="preempted"), 3),
        (TimeoutError("x"), 1),
        (KeyboardInterrupt(), 1),
        (PermissionError(13, "Permission denied", "x"), 1),
    ],
)
def test_every_end_of_a_command_has_its_status(monkeypatch, error, status):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "_runs_list", fail)
    assert call("runs", "list")[0] == status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND; see dpo-kit --help"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "required: --config"),
        (["train", "--config", "x.yaml", "--detatch"], "unknown arguments: --detatch"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["score", "--config", SMOKE, "-o", "."], "-o . is no file in a folder that exists"),
        (["score", "--config", SMOKE, "-o", "a/b.jsonl"], "-o a/b.jsonl is no file in a folder that exists"),
        (["runs", "list", "a=b"], "unknown arguments: a=b"),
        (["runs", "show", "nobody"], "'nobody' is no run"),
        (["sample", "nobody", "--prompt", "x"], "'nobody' is no run"),
        (["sample", "nobody"], "one of the arguments --prompt --prompts is required"),
    ],
)
def test_a_wrong_command_line_is_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*arguments)
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith("dpo-kit: ")
    assert message in err[0]
    assert listing(tmp_path) == []


# ---------------------------------------------------------------- a user's mistakes


def other_tokenizer(folder):
    """A model folder with another vocabulary than tiny-random."""
    shutil.copytree(builtin.ensure("tiny-random"), folder, dirs_exist_ok=True)
    return save_tokenizer(folder)


WRONG_CONFIGS = {
    "unknown key": (["actor.betta=0.2"], r"actor\.betta.*actor\.beta"),
    "granularity 1": (["actor.mb_spec.granularity=1"], r"actor\.mb_spec\.granularity = 1.*2"),
    "p2": (["actor.backend=fsdp:d1p2t1"], r"actor\.backend = 'fsdp:d1p2t1'.*p"),
    "ref missing": ({"ref": None}, r"ref.*path"),
    "ref.optimizer set": (["ref.optimizer={type: adam}"], r"ref\.optimizer.*null"),
    "beta 0": (["actor.beta=0"], r"actor\.beta = 0.*greater than 0"),
    "loss_type IPO": (["actor.loss_type=IPO"], r"actor\.loss_type = 'IPO'.*ipo"),
    "batch smaller than the ranks": (
        ["actor.backend=fsdp:d4", "train_dataset.batch_size=2"],
        r"train_dataset\.batch_size = 2 is less than 4 data-parallel ranks; use 4 or more",
    ),
    "another tokenizer": (["ref.path=OTHER"], r"ref\.path = .* has another tokenizer than 'tiny-random'"),
    "more ranks than devices": (
        ["actor.backend=fsdp:d512", "cluster.n_gpus_per_node=auto", "train_dataset.batch_size=512"],
        r"actor\.backend = 'fsdp:d512' needs 512 ranks.* 0 CUDA devices",
    ),
    "more devices than there are": (
        ["cluster.n_gpus_per_node=4"],
        r"cluster\.n_gpus_per_node = 4 is more than the 0 CUDA devices",
    ),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_wrong_config_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setattr(machine, "visible_devices", lambda: 0)
    change, message = WRONG_CONFIGS[name]
    builtin.ensure("tiny-random")
    other = other_tokenizer(tmp_path / "other")
    overrides = [text.replace("OTHER", str(other)) for text in change] if isinstance(change, list) else []
    config = write_config(tmp_path, **(change if isinstance(change, dict) else {}))
    before = listing(tmp_path)
    for command in (["train"], ["train", "--detach"]):
        status, out, err = call(*command, "--config", config, *overrides)
        assert (status, len(err)) == (2, 1), err
        assert re.search(message, err[0]), err[0]
        assert "Traceback" not in "".join(out)
        assert listing(tmp_path) == before


def chat(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def jsonl(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


GOOD = pair(0)
WRONG_DATA = {
    "csv without header": ("a.csv", b"hello,yes,no\nhow are you,fine,bad\n", r"header|columns"),
    "prompt repeated inside chosen": (
        "a.jsonl",
        jsonl({"prompt": "Say hi", "chosen": "Say hi hello", "rejected": "Say hi bye"}),
        r"column 'chosen' repeats the prompt",
    ),
    "chosen as a JSON string": (
        "a.jsonl",
        jsonl({"chosen": json.dumps(chat("hi", "yes")), "rejected": json.dumps(chat("hi", "no"))}),
        r"column 'chosen' is a message list written as a string",
    ),
    "no assistant turn": (
        "a.jsonl",
        jsonl({"chosen": chat("hi"), "rejected": chat("ho")}),
        r"column 'chosen'.*assistant",
    ),
    "all pairs identical": (
        "a.jsonl",
        jsonl(pair(0, "a", "a 0"), pair(1, "b", "b 1")),
        r"no pair is left.*2 identical",
    ),
    "gzip cut short": (
        "a.jsonl.gz",
        gzip.compress(jsonl(*map(pair, range(200))))[:-40],
        r"a\.jsonl\.gz.*cut",
    ),
    "latin-1": (
        "a.jsonl",
        jsonl(GOOD) + jsonl(pair(1, "caf\u00e9")).decode().encode("latin-1"),
        r"line 2.*UTF-8",
    ),
    "null": ("a.jsonl", jsonl(GOOD, {**GOOD, "rejected": None}), r"line 2.*column 'rejected' is null"),
    "empty file": ("a.jsonl", b"", r"a\.jsonl.*empty"),
    "unknown columns": (
        "a.jsonl",
        jsonl({"better": "a", "worse": "b"}),
        r"looked for 'chosen' and 'rejected'.*found 'better', 'worse'",
    ),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_wrong_data_are_one_line_and_leave_nothing(tmp_path, name):
    file, content, message = WRONG_DATA[name]
    (tmp_path / file).write_bytes(content)
    config = write_config(tmp_path)
    before = listing(tmp_path)
    status, out, err = call("data", "--config", config, f"train_dataset.path={tmp_path / file}")
    assert (status, out, len(err)) == (2, [], 1), err
    assert re.search(message, err[0]), err[0]
    assert str(tmp_path / file) in err[0]
    assert listing(tmp_path) == before


def test_a_fileroot_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    config = write_config(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    status, _, err = call("train", "--config", config)
    assert (status, len(err)) == (2, 1)
    assert re.search(r"cluster\.fileroot = '.*/runs': .* cannot be made \(Permission denied\)", err[0])


def test_a_file_of_the_seeds_system_trains_with_one_line_of_ignored_keys(fakes):
    overrides = [
        f"cluster.fileroot={fakes.fileroot}",
        f"train_dataset.path={fakes.root / 'data.jsonl'}",
        f"valid_dataset.path={fakes.root / 'data.jsonl'}",
        "actor.path=tiny-random",
        "cluster.n_nodes=1",
        "cluster.n_gpus_per_node=0",
        "actor.backend=fsdp:d2",
        "trial_name=seed",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, out, err = call(
            "train", "--config", Path(__file__).parent / "data" / "seed_full.yaml", *overrides
        )
    assert (status, len(err)) == (0, 1), err
    assert "ignored" in err[0]
    assert "cluster.name_resolve" in err[0]
    assert out[-1].endswith("/seed")


def test_train_removes_the_run_folder_when_the_data_are_wrong(tmp_path):
    config = write_config(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", [GOOD, {**GOOD, "rejected": None}])
    before = listing(tmp_path)
    status, _, err = call("train", "--config", config)
    assert (status, len(err)) == (2, 1), err
    assert "column 'rejected' is null" in err[0]
    assert listing(tmp_path) == before


def test_a_fork_without_changes_equals_its_parent(tmp_path):
    config = write_config(tmp_path, recover={"freq_steps": 1, "keep": "all"})
    status, out, _ = call("train", "--config", config, "trial_name=parent")
    assert status == 0
    parent = Path(out[-1])
    assert [path.name for path in sorted((parent / "checkpoints").iterdir())] == [
        "step-1",
        "step-2",
        "step-3",
    ]
    status, out, err = call("runs", "fork", parent, "--step", "2", "trial_name=child")
    assert (status, err) == (0, [])
    child = Path(out[-1])
    assert child.name == "child"
    assert any(
        "resumed from checkpoint step-2" in line
        for line in (child / "logs/rank-0.log").read_text().split("\n")
    )
    times = ("step_s", "tokens_per_second", "pairs_per_second")
    mine, theirs = (
        [{k: v for k, v in line.items() if k not in times} for line in metrics.read_metrics(run_dir)]
        for run_dir in (child, parent)
    )
    assert mine == theirs
    weights = [(run_dir / "model" / "model.safetensors").read_bytes() for run_dir in (child, parent)]
    assert weights[0] == weights[1]
    status, out, _ = call("runs", "fork", parent, "--step", "2", "actor.beta=0.3", "trial_name=other")
    assert status == 0
    assert (Path(out[-1]) / "model" / "model.safetensors").read_bytes() != weights[0]
    status, _, err = call("runs", "fork", parent, "--step", "7")
    assert (status, len(err)) == (2, 1)
    assert "no checkpoint of step 7; it has those of steps 1, 2, 3" in err[0]


def test_the_command_in_the_manifest_repeats_the_run(trained, tmp_path):
    first = Path(trained[2][-1])
    command = json.loads((first / "manifest.json").read_text())["command"]
    assert command.startswith("dpo-kit train --config ")
    given = shlex.split(command)[1:]
    status, out, err = call(*given, f"cluster.fileroot={tmp_path / 'elsewhere'}", "trial_name=again")
    assert (status, err) == (0, [])
    again = Path(out[-1])
    assert [line["dpo/loss"] for line in metrics.read_metrics(again)] == [
        line["dpo/loss"] for line in metrics.read_metrics(first)
    ]
    (told,) = [line for line in out if line.startswith("repeats ")]
    assert told.startswith("repeats cli/first: differs in cluster.fileroot: ")
    assert told.count(" -> ") == 1
    status, out, _ = call(*given, "actor.beta=0.7")
    (told,) = [line for line in out if line.startswith("repeats ")]
    assert told == "repeats cli/first: differs in actor.beta: 0.1 -> 0.7"


def test_a_repetition_names_what_changed_beside_the_configuration(trained, tmp_path):
    first = tmp_path / "exp" / "first"
    shutil.copytree(trained[2][-1], first)
    made = json.loads((first / "manifest.json").read_text())
    made["versions"]["torch"] = "1.0"
    made["data"]["train"]["fingerprint"] = "abc"
    (first / "manifest.json").write_text(json.dumps(made))
    status, out, _ = call("train", "--config", first / "config.yaml", "trial_name=null")
    assert status == 0
    (told,) = [line for line in out if line.startswith("repeats ")]
    assert "versions.torch: 1.0 -> " in told
    assert "data.train.fingerprint: abc -> " in told


def test_nothing_that_is_shown_steers_the_terminal(tmp_path, capsys):
    """A name, a message and an argument with escape sequences, a title, a bell, a carriage return."""
    evil = "\x1b[31mRED\x1b]0;pwn\x07\rok\u202e"
    folder = tmp_path / "runs" / "exp" / evil
    folder.mkdir(parents=True)
    status = {"state": "failed", "message": f"boom {evil}", "step": 1, "created_at": 1.0}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "manifest.json").write_text("{}")
    root = ["--fileroot", str(tmp_path / "runs")]
    for arguments in (
        ["runs", "list", *root],
        ["runs", "show", str(folder)],
        ["runs", "rm", str(folder)],
        ["runs", "show", evil, *root],
        ["train", "--config", evil],
        ["train", "--config", str(SMOKE), f"--{evil}"],
        ["train", "--config", str(SMOKE), f"actor.{evil}=1"],
    ):
        cli.main(arguments)
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(said), arguments
        assert "[U+001B]" in said


def test_bars_that_draw_over_themselves_still_do():
    for text in ("\rFetching: 50%|", "\r\x1b[A\rmore", "\rtraining: 3\x1b[K", "\x1b[A"):
        assert cli._for_terminals(text) == text
    assert cli._for_terminals("\rname \x1b[31m\x1b[K") == "\rname [U+001B][31m\x1b[K"
