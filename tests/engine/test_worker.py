"""Real runs on two gloo ranks, and everything that they leave in their folders."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shlex
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_kit import cli, launch, runs
from dpo_kit import config as config_module
from dpo_kit.dataset import prepare
from dpo_kit.engine import reference, state, step, token_budget, worker
from dpo_kit.engine.recorder import Recorder
from dpo_kit.errors import UserError
from dpo_kit.model import builtin, packing, parallel
from dpo_kit.preferences import open_store
from dpo_kit.records import checkpoint_folders, metrics, run_folder
from dpo_kit.records.status import PHASES, read_status
from dpo_kit.supervise import supervisor
from dpo_kit.system.files import read_json
from tests.helpers import make_engine, one_rank, random_pairs, store_of, tiny_config, train_tiny

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "data"
TRAIN_KEYS = [
    "dpo/loss",
    "dpo/chosen_reward",
    "dpo/rejected_reward",
    "dpo/reward_accuracy",
    "dpo/reward_margin",
    "dpo/chosen_logps",
    "dpo/rejected_logps",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "pairs_per_second",
    "step_s",
]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The run folder of `params/smoke.yaml` on two ranks, with exports on the way."""
    fileroot = tmp_path_factory.mktemp("smoke")
    overrides = [
        f"cluster.fileroot={fileroot}",
        "cluster.n_gpus_per_node=0",
        "actor.backend=fsdp:d2",
        "saver.freq_steps=2",
        "saver.best=true",
        "evaluator.freq_steps=2",
    ]
    config = config_module.load(ROOT / "params" / "smoke.yaml", overrides)
    assert launch.run_in_foreground(config) == 0
    (run_dir,) = run_folder.list_runs(fileroot)
    return run_dir


# ---------------------------------------------------------------- the folder


def test_the_config_is_resolved_and_reloads_equal(smoke):
    text = (smoke / "config.yaml").read_text()
    assert "${" not in text
    config = config_module.load(smoke / "config.yaml")
    assert config_module.to_yaml(config) == text
    assert (config.actor.backend, config.cluster.n_gpus_per_node) == ("fsdp:d2", 0)
    assert config.trial_name == smoke.name


def test_the_manifest_tells_what_the_run_was_made_from(smoke):
    made = json.loads((smoke / "manifest.json").read_text())
    stores = json.loads((smoke / "data.json").read_text())
    assert {"versions", "git", "hardware", "seeds", "data", "weights", "command"} <= set(made)
    assert made["data"]["train"]["fingerprint"] == open_store(stores["train"]).fingerprint
    assert made["data"]["valid"]["num_pairs"] == 16
    assert made["weights"]["actor"] == made["weights"]["ref"]
    assert len(made["weights"]["ref"]["fingerprint"]) == 64


def test_the_status_is_done_with_every_phase(smoke):
    status = read_status(smoke)
    assert (status["state"], status["step"], status["total_steps"]) == ("done", 4, 4)
    names = [phase["name"] for phase in status["phases"]]
    assert sorted(names, key=PHASES.index) == [name for name in PHASES if name != "find nodes"]
    assert status["samples"] == "made"


def test_training_lines_are_one_a_step_with_the_names_of_the_seed(smoke):
    lines = [m for m in metrics.read_metrics(smoke) if "dpo/loss" in m]
    assert [m["step"] for m in lines] == [1, 2, 3, 4]
    for line in lines:
        assert set(TRAIN_KEYS) <= set(line)
        assert not [key for key in line if key.startswith("dpo-eval/")]
        margin = line["dpo/chosen_reward"] - line["dpo/rejected_reward"]
        assert line["dpo/reward_margin"] == pytest.approx(margin, abs=1e-12)
        assert line["pairs_per_second"] == pytest.approx(8 / line["step_s"])
    assert lines[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert lines[0]["dpo/reward_accuracy"] is None
    # The four steps take each of the 32 pairs once; a prompt counts for both of its responses.
    store = open_store(json.loads((smoke / "data.json").read_text())["train"])
    tokens = sum(m["tokens_per_second"] * m["step_s"] for m in lines)
    assert tokens == pytest.approx(int(store.all_lengths()[:, 1:].sum()))


def test_evaluation_lines_hold_nothing_else_and_begin_before_training(smoke):
    lines = metrics.read_metrics(smoke)
    evaluations = [m for m in lines if "dpo-eval/loss" in m]
    assert [m["step"] for m in evaluations] == [0, 2, 4]
    assert lines[0] is evaluations[0]
    for line in evaluations:
        assert all(key == "step" or key.startswith("dpo-eval/") for key in line)
        assert line["dpo-eval/num_pairs"] == 16
    assert evaluations[0]["dpo-eval/reward_accuracy"] is None
    assert 0 <= evaluations[0]["dpo-eval/logp_accuracy"] <= 1
    assert 0 <= evaluations[-1]["dpo-eval/reward_accuracy"] <= 1


def test_evaluations_are_kept_pair_by_pair(smoke):
    for line in metrics.read_metrics(smoke):
        if "dpo-eval/loss" in line:
            pairs = read_lines(smoke / "evaluations" / f"step-{line['step']}.jsonl")
            assert [pair["index"] for pair in pairs] == list(range(16))
            for name in ("loss", "chosen_reward", "rejected_reward"):
                mean = np.mean([pair[name] for pair in pairs])
                assert line[f"dpo-eval/{name}"] == pytest.approx(mean, abs=1e-12)


def test_models_are_exported_on_the_way_and_at_the_end(smoke):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sorted(path.name for path in (smoke / "exports").iterdir()) == ["best", "step-2"]
    folders = [smoke / "model", smoke / "exports" / "best", smoke / "exports" / "step-2"]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    ids = torch.tensor([tokenizer("\n\nHuman: Hello\n\nAssistant:").input_ids])
    last, best, second, start = (
        AutoModelForCausalLM.from_pretrained(path)(ids).logits
        for path in (*folders, builtin.ensure("tiny-random"))
    )
    assert not torch.equal(last, second)
    assert not torch.equal(second, start)
    losses = {m["step"]: m["dpo-eval/loss"] for m in metrics.read_metrics(smoke) if m.get("dpo-eval/loss")}
    assert torch.equal(best, last if losses[4] < losses[2] else second)
    card = (smoke / "model" / "README.md").read_text()
    assert "| `dpo/loss` | 0.6931 |" in card
    assert "loss_type: sigmoid" in card


def test_samples_hold_both_answers(smoke):
    lines = read_lines(smoke / "samples.jsonl")
    assert len(lines) == 2
    for line in lines:
        assert line["prompt"].startswith("\n\nHuman:")
        assert line["prompt"].endswith("\n\nAssistant:")
        assert {"index", "seed", "reference", "policy", "reference_tokens", "policy_tokens"} <= set(line)
        assert max(line["reference_tokens"], line["policy_tokens"]) <= 16


def test_tensorboard_reads_the_same_numbers(smoke):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(smoke / "tensorboard"))
    events.Reload()
    lines = {m["step"]: m for m in metrics.read_metrics(smoke) if "dpo/loss" in m}
    read = {event.step: event.value for event in events.Scalars("dpo/loss")}
    assert read == pytest.approx({step: line["dpo/loss"] for step, line in lines.items()}, abs=1e-6)
    assert [event.step for event in events.Scalars("dpo-eval/reward_accuracy")] == [2, 4]


def test_each_rank_has_its_log(smoke):
    logs = sorted(path.name for path in (smoke / "logs").iterdir())
    assert logs == ["prepare.log", "rank-0.log", "rank-1.log", "samples.log"]
    first = (smoke / "logs" / "rank-0.log").read_text().splitlines()
    assert first[0].startswith(
        "micro-batches: actor 4,096 tokens (config), ref 4,096 tokens (config); the longest"
    )
    assert first[1] == "reference: 0 of 48 pairs from the cache"
    assert first[2].startswith("first step: loss 0.693147, expected 0.693147 while policy = reference")
    assert (smoke / "logs" / "rank-1.log").read_text() == ""


def test_a_folder_that_was_moved_is_the_same_run(smoke, tmp_path):
    from dpo_kit.tools import samples

    shutil.copytree(smoke, tmp_path / "elsewhere" / "copy")
    run = runs.open(tmp_path / "elsewhere" / "copy")
    assert run.state == "done"
    assert len(run.metrics()) == 7
    (found,) = samples.ask(run.dir, ["Hello?"])
    assert set(found) == {"prompt", "reference", "policy"}
    assert str(smoke) not in run.epitaph()


# ---------------------------------------------------------------- the seed's fragment


def train_folder(run_dir):
    """Trains a prepared run folder on the ranks at hand."""
    worker.run(Path(run_dir), parallel.init_world(cuda=False), lambda: False)


def test_the_fragment_printed_in_the_seed_trains_on_two_ranks(ranks, tmp_path):
    rows = [
        {"chosen": f"\n\nHuman: {i}?\n\nAssistant: yes", "rejected": f"\n\nHuman: {i}?\n\nAssistant: no"}
        for i in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        "actor.path=tiny-random",
        f"train_dataset.path={tmp_path / 'pairs.jsonl'}",
        "train_dataset.num_rows=16",
        "cluster.n_gpus_per_node=0",
        f"cluster.fileroot={tmp_path / 'runs'}",
        "actor.backend=fsdp:d2p1t1",
        "total_train_steps=2",
    ]
    config = launch.resolve_world(config_module.load(DATA / "seed_fragment.yaml", overrides))
    text = config_module.to_yaml(config)
    run_dir = run_folder.create(tmp_path / "runs", "dpo", "fragment", config_text=text, manifest={})
    prepare.prepare(run_dir)
    ranks.run(train_folder, str(run_dir))
    lines = metrics.read_metrics(run_dir)
    assert [m["step"] for m in lines] == [1, 2]
    assert set(TRAIN_KEYS) <= set(lines[0])
    assert lines[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert lines[1]["dpo/loss"] < lines[0]["dpo/loss"]
    assert (run_dir / "model" / "config.json").exists()


# ---------------------------------------------------------------- ends before the end


def make_run(tmp_path, *overrides):
    """A prepared run folder over random pairs, held-out ones included."""
    config = tiny_config(tmp_path / "runs", "evaluator.num_samples=0", *overrides)
    text = config_module.to_yaml(config)
    run_dir = run_folder.create(tmp_path / "runs", "dpo", "one", config_text=text, manifest={})
    for split, num_pairs in (("train", 40), ("valid", 8)):
        store_of(random_pairs(num_pairs), tmp_path / split)
    data = {split: str(tmp_path / split) for split in ("train", "valid")}
    (run_dir / "data.json").write_text(json.dumps(data))
    return run_dir


def supervise(run_dir, monkeypatch, tmp_path):
    """Real ranks after a `prepare` that leaves the folder as it is."""
    (tmp_path / "play.json").write_text(json.dumps({"prepare": []}))
    monkeypatch.setenv("FAKE_PLAY", str(tmp_path / "play.json"))
    return supervisor.supervise(run_dir, foreground=True, prepare_module="tests.fake_prepare")


def test_a_stop_in_mid_training_saves(tmp_path, monkeypatch, capsys):
    run_dir = make_run(tmp_path, "actor.backend=fsdp:d2", "total_train_epochs=9999", "total_train_steps=null")
    done = []

    def stop_it():
        while len(metrics.read_metrics(run_dir)) < 5:
            time.sleep(0.05)
        done.append(cli.main(["runs", "stop", str(run_dir)]))

    thread = threading.Thread(target=stop_it)
    thread.start()
    assert supervise(run_dir, monkeypatch, tmp_path) == 3
    thread.join()
    assert done == [0]
    status = read_status(run_dir)
    assert (status["state"], status["total_steps"]) == ("stopped", 5 * 9999)
    (export,) = (run_dir / "exports").iterdir()
    assert export.name == f"step-{metrics.read_metrics(run_dir)[-1]['step']}" == f"step-{status['step']}"
    assert checkpoint_folders.newest(run_dir / "checkpoints") == (status["step"], [])
    assert "dpo/one: stopped" in capsys.readouterr().out


def test_a_failing_rank_fails_the_run_with_its_cause_in_one_line(tmp_path, monkeypatch):
    run_dir = make_run(tmp_path)
    pairs = random_pairs(8)
    pairs[3].chosen_ids[-1] = 100_000  # no such token
    shutil.rmtree(tmp_path / "train")
    store_of(pairs, tmp_path / "train")
    assert supervise(run_dir, monkeypatch, tmp_path) == 1
    status = read_status(run_dir)
    assert status["state"] == "failed"
    assert status["message"].startswith("rank 0: IndexError: ")
    assert status["message"].endswith("(logs/rank-0.log)")
    assert "\n" not in status["message"]
    assert "Traceback" in (run_dir / "logs" / "rank-0.log").read_text()


def test_a_stop_during_an_evaluation_saves_too(ranks, tmp_path):
    run_dir = make_run(tmp_path, "evaluator.freq_steps=2", "actor.backend=fsdp:d2")
    assert ranks.run(stop_at_evaluation, str(run_dir)) == ["stopped", "stopped"]
    assert [path.name for path in (run_dir / "exports").iterdir()] == ["step-2"]
    assert [path.name for path in (run_dir / "evaluations").iterdir()] == ["step-0.jsonl"]
    assert read_json(run_dir / "checkpoints" / "step-2" / "state.json")["owes_evaluation"] is True
    # What goes on from there makes up for it; its checkpoint stays until the supervisor has written `done`.
    ranks.run(train_folder, str(run_dir))
    numbers = [int(path.stem.removeprefix("step-")) for path in (run_dir / "evaluations").iterdir()]
    assert sorted(numbers) == list(range(0, 21, 2))
    lines = metrics.read_metrics(run_dir)
    assert [line["step"] for line in lines if "dpo/loss" in line] == list(range(1, 21))
    assert [line["step"] for line in lines if "dpo-eval/loss" in line] == list(range(0, 21, 2))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-2"]


def stop_at_evaluation(run_dir):
    """Asks to stop between the record of step 2 and its evaluation."""
    path = Path(run_dir)

    def should_stop():
        return sum("dpo/loss" in m for m in metrics.read_metrics(path)) >= 2

    try:
        worker.run(path, parallel.init_world(cuda=False), should_stop)
    except state.Stopped:
        return "stopped"
    return "done"


@pytest.mark.parametrize("section", ["actor", "ref"])
def test_a_pair_over_the_micro_batch_is_refused_by_name(tmp_path, section):
    config = tiny_config(tmp_path, f"{section}.mb_spec.max_tokens_per_mb=40")
    store = store_of(random_pairs(8), tmp_path / "pairs")
    longest = int(packing.pair_costs(store.all_lengths(), True).max())
    with pytest.raises(
        UserError,
        match=rf"{section}\.mb_spec\.max_tokens_per_mb = 40 is less than the longest pair \({longest}",
    ):
        token_budget.check(config, store)


@pytest.mark.parametrize("logps", ["cached", "online"])
def test_the_references_own_token_bound_holds_and_changes_nothing(tmp_path, monkeypatch, logps):
    widths = []

    def pack(*arguments, **options):
        batch = packing.pack(*arguments, **options)
        widths.append(batch.input_ids.shape[1])
        return batch

    wide = train_tiny(str(tmp_path / "wide"), (f"ref.logps={logps}", "total_train_steps=2"))
    monkeypatch.setattr(step, "pack", pack)
    bound = (f"ref.logps={logps}", "total_train_steps=2", "ref.mb_spec.max_tokens_per_mb=80")
    narrow = train_tiny(str(tmp_path / "narrow"), bound)
    in_training = [width for width in widths if width > 80]
    assert len(widths) > 8  # one a step without a bound
    assert len(in_training) == (2 if logps == "cached" else 0)
    for a, b in zip(wide, narrow, strict=True):
        assert a["dpo/loss"] == pytest.approx(b["dpo/loss"], abs=1e-9)


def test_progress_that_was_held_back_is_told_at_the_end(tmp_path):
    config = tiny_config(tmp_path, "stats_logger.tensorboard=false")
    with one_rank() as world:
        recorder = Recorder(tmp_path, config, world)
        for step in (1, 2, 3):
            recorder.progress("training", step, 100, step=step)
        assert read_json(tmp_path / "progress.json")["step"] == 1
        recorder.flush()
        assert read_json(tmp_path / "progress.json")["step"] == 3
        (tmp_path / "progress.json").unlink()
        recorder.flush()
        assert not (tmp_path / "progress.json").exists()


# ---------------------------------------------------------------- out of memory


def losses(run_dir):
    return [line["dpo/loss"] for line in metrics.read_metrics(run_dir) if "dpo/loss" in line]


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """Runs of one configuration on two ranks, `auto`: undisturbed, short of memory, and that one's command again."""
    fileroot = tmp_path_factory.mktemp("halved")
    overrides = [
        f"cluster.fileroot={fileroot}",
        *("cluster.n_gpus_per_node=0", "actor.backend=fsdp:d2", "actor.dtype=float64", "trial_name=calm"),
        *("actor.mb_spec.max_tokens_per_mb=auto", "ref.mb_spec.max_tokens_per_mb=auto", "saver.freq_steps=1"),
        *("train_dataset.num_rows=80", "train_dataset.batch_size=40", "total_train_epochs=2"),
        *("evaluator.num_samples=0", "valid_dataset.num_rows=4", "stats_logger.tensorboard=false"),
    ]
    config = config_module.load(ROOT / "params" / "smoke.yaml", overrides)
    with pytest.MonkeyPatch.context() as patch:
        assert launch.run_in_foreground(config) == 0
        short = functools.partial(supervisor.supervise, worker_module="tests.engine.short_of_memory")
        patch.setattr(supervisor, "supervise", short)
        patch.setenv("MOST_TOKENS", "2048")
        assert launch.run_in_foreground(dataclasses.replace(config, trial_name="short")) == 0
        command = read_json(fileroot / "smoke" / "short" / "manifest.json")["command"]
        assert cli.main(shlex.split(command)[1:]) == 0  # it would not fit with more than 2,048 tokens
    (again,) = set(run_folder.list_runs(fileroot)) - {fileroot / "smoke" / name for name in ("calm", "short")}
    return {name: fileroot / "smoke" / name for name in ("calm", "short")} | {"again": again}


def test_a_run_that_ran_out_of_memory_ends_as_if_it_had_not(halved):
    calm, short = losses(halved["calm"]), losses(halved["short"])
    assert len(calm) == len(short) == 4
    assert short == pytest.approx(calm, abs=1e-9)
    status = read_status(halved["short"])
    assert (status["state"], status["attempt"], status["step"]) == ("done", 2, 4)
    assert status["message"] == "with 2,048 tokens a micro-batch, after running out of memory with 4,096"
    assert [m["step"] for m in metrics.read_metrics(halved["short"])] == [0, 1, 2, 2, 3, 4, 4]


def test_the_budget_and_its_halving_are_on_record(halved):
    calm, made = (read_json(halved[name] / "budget.json") for name in ("calm", "short"))
    assert (calm["actor"], calm["ref"], calm["halvings"]) == (4096, 4096, [])
    assert calm["source"] == made["source"] == {"actor": "estimated", "ref": "estimated"}
    assert 2048 < calm["largest"]["actor"] <= 4096
    assert 0 < made["largest"]["actor"] <= 2048
    assert (made["actor"], made["ref"]) == (2048, 4096)
    (entry,) = made["halvings"]
    assert [entry[key] for key in ("section", "from", "to", "step", "rank")] == ["actor", 4096, 2048, 2, 1]
    assert "training, step 2, with 4,096 tokens a micro-batch (OutOfMemoryError: " in entry["error"]
    config = config_module.load(halved["short"] / "config.yaml")
    assert config.actor.mb_spec.max_tokens_per_mb == "auto"
    log = (halved["short"] / "logs" / "rank-1.log").read_text()
    assert "Tried to run" in log
    assert "--- attempt 2" in log


def test_the_command_repeats_the_run_with_the_halved_budget(halved):
    made = read_json(halved["again"] / "budget.json")
    assert (made["actor"], made["ref"], made["halvings"]) == (2048, 4096, [])
    assert made["source"] == {"actor": "config", "ref": "config"}
    assert read_status(halved["again"])["attempt"] == 1
    assert losses(halved["again"]) == losses(halved["short"])


def test_ranks_take_rank_0s_word_on_the_reference_cache(ranks, tmp_path):
    first = ranks.run(prepare_with_other_gaps, str(tmp_path), False)
    second = ranks.run(prepare_with_other_gaps, str(tmp_path), True, timeout_s=60.0)  # without: a hang
    assert first[0] == first[1] == second[0] == second[1]
    assert all(np.isfinite(first[0]).ravel())


def prepare_with_other_gaps(folder, gaps):
    """The reference's values of both stores; with `gaps`, rank 1 would find nothing in the full cache."""
    root = Path(folder)
    lookup = reference.lookup
    with one_rank() as world:
        if world.is_main and not gaps:
            store_of(random_pairs(12), root / "pairs")
        world.barrier()
        try:
            if gaps and not world.is_main:
                reference.lookup = lambda _folder, keys: lookup(root / "nowhere", keys)
            config = tiny_config(root / "runs", "total_train_epochs=2")
            state = make_engine(world, config, open_store(root / "pairs"), open_store(root / "pairs"))
        finally:
            reference.lookup = lookup
        return state.ref_train.tolist(), state.ref_valid.tolist()
