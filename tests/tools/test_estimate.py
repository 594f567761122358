"""The estimate: plan and counts by hand, refusals with the memory and the disk faked, one real probe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpo_kit import cli, dataset, launch
from dpo_kit import config as config_module
from dpo_kit.engine.schedule import step_rows
from dpo_kit.errors import UserError
from dpo_kit.launch import preflight
from dpo_kit.model import builtin, costs, model_folder
from dpo_kit.model.packing import pair_costs, plan_step
from dpo_kit.supervise import fits
from dpo_kit.system import machine
from dpo_kit.tools import estimate, time_probe
from tests.helpers import random_pairs, store_of, tiny_config

GIB = 2**30
MIB = 2**20
SECONDS = dict.fromkeys(time_probe.PARTS, 1.0) | {"params": 1, "repeats": 2}


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path, "train_dataset.num_rows=40", "actor.dtype=float32", "actor.backend=fsdp:d2")


@pytest.fixture
def memory_of(monkeypatch):
    """Sets how much memory and disk seems to be free."""

    def set_bytes(host, disk=100 * GIB):
        monkeypatch.setattr(machine, "free_host_bytes", lambda: host)
        monkeypatch.setattr(machine, "free_disk", lambda folder: disk)

    set_bytes(64 * GIB)
    return set_bytes


@pytest.fixture
def params_file(tmp_path):
    """A params file for the command line; returns its path."""
    file = tmp_path / "params.yaml"
    config = tiny_config(tmp_path, "actor.dtype=float32", "evaluator.num_samples=0")
    file.write_text(config_module.to_yaml(config))
    return str(file)


def test_tokens_are_those_of_the_plan_that_runs(config, memory_of):
    config = replace(config, total_train_steps=7)
    config.actor.mb_spec.max_tokens_per_mb = 700
    tokens = estimate.make(config, probe=False)["tokens"]
    store = dataset.build(config)
    per_step, largest, micro_batches = [], 0, []
    for step in range(1, 8):
        costs = pair_costs(store.all_lengths()[step_rows(config, len(store), step)], True).tolist()
        plan = plan_step(costs, 2, 700)
        per_step.append(sum(costs))
        micro_batches.append(len(plan[0]))
        largest = max([largest, *(sum(costs[i] for i in m) for rank in plan for m in rank)])
    assert (tokens["pairs"], tokens["steps"]) == (40, 7)
    assert tokens["shared_per_step"] == pytest.approx(np.mean(per_step))
    assert tokens["unshared_per_step"] > tokens["shared_per_step"]
    assert tokens["micro_batches_per_step"] == pytest.approx(np.mean(micro_batches))
    assert tokens["largest_micro_batch"] == pytest.approx(largest, rel=0.011)


def test_ranks_that_share_layers_run_the_same_pairs(config, memory_of):
    one, two, four = (
        estimate.make(with_backend(config, backend), probe=False)
        for backend in ("fsdp:d1", "fsdp:d1t2", "fsdp:d2t2")
    )
    fitting = [found["tokens"].pop("fitting_micro_batch") for found in (one, two)]
    assert fitting[0] != fitting[1]  # their memory is another
    assert one["tokens"] == two["tokens"]
    assert four["tokens"]["busiest_rank_per_step"] < two["tokens"]["busiest_rank_per_step"]
    assert (one["ranks"], two["ranks"], four["ranks"]) == (1, 2, 4)
    with pytest.raises(UserError, match="do not divide by 8; use t1 or t2 or t4"):
        estimate.make(with_backend(config, "fsdp:d1t8"), probe=False)


def with_backend(config, backend):
    return replace(
        config, actor=replace(config.actor, backend=backend), ref=replace(config.ref, backend=backend)
    )


def test_auto_is_what_fits_and_the_references_bound_holds_online(config):
    shape = model_shape()
    config.actor.mb_spec.max_tokens_per_mb = "auto"
    config.ref.mb_spec.max_tokens_per_mb = 300
    assert estimate.micro_batch_bound(config, shape, 1, 64 * GIB) == 4096
    assert estimate.micro_batch_bound(config, shape, 1, 410 * MIB) < 4096
    config.ref.logps = "online"
    assert estimate.micro_batch_bound(config, shape, 1, 64 * GIB) == 300


def model_shape():
    folder = estimate.model_folder("tiny-random")
    return costs.Shape.of(json.loads((folder / "config.json").read_text()))


@pytest.fixture
def probed(monkeypatch):
    """A probe that takes a second for every part, whatever it is given; collects its plans."""
    plans = []

    def measure(config, folder, store, plan):
        plans.append(plan)
        return SECONDS

    monkeypatch.setattr(time_probe, "measure", measure)
    return plans


def test_seconds_of_a_step_by_hand(config, memory_of, probed):
    found = estimate.make(config)
    store, shape = dataset.build(config), model_shape()
    costs = pair_costs(store.all_lengths(), True).tolist()
    tokens = max(sum(costs[r] for m in rank for r in m) for rank in probed[0])
    # Two layers: forward 1 + 2, backward 1 + 2; the update of one parameter takes a second.
    expected = 6 / tokens * found["tokens"]["busiest_rank_per_step"] + shape.params
    assert found["time"]["step"] == pytest.approx(expected)
    assert found["time"]["training"] == pytest.approx(20 * expected)
    # The reference runs forward over all 40 pairs, on two ranks.
    assert found["time"]["reference_pass"] == pytest.approx(3 / tokens * sum(costs) / 2)


def test_an_online_reference_runs_in_every_step_and_not_before(config, memory_of, probed):
    cached = estimate.make(config)["time"]
    config.ref.logps = "online"
    online = estimate.make(config)["time"]
    assert online["reference_pass"] == 0
    assert online["step"] > cached["step"]


def test_pairs_in_the_cache_are_not_run_again(config, memory_of, probed):
    from dpo_kit.engine import reference

    store, root = dataset.build(config), Path(config.cluster.fileroot)
    mark = model_folder.fingerprint(builtin.ensure("tiny-random"))
    folder = reference.cache_folder(root, mark, config.ref.dtype, "shared")
    reference.add(folder, reference.pair_keys(store), np.zeros((len(store), 2)))
    assert estimate.make(config)["time"]["reference_pass"] == 0


def test_how_often_things_come_due(config):
    # 40 pairs: five steps an epoch, 20 in all.
    config.saver.freq_steps = config.recover.freq_steps = 6
    assert estimate._counts(config, 40, 1.0) == (0, 1 + 3, 3)
    config.saver.freq_steps, config.saver.freq_epochs = None, 1
    assert estimate._counts(config, 40, 1.0)[1] == 1 + 3  # after 5, 10, 15; 20 is `model/`
    config.saver.freq_epochs, config.saver.freq_secs = None, 8
    assert estimate._counts(config, 40, 2.0)[1] == 1 + 5
    assert estimate._counts(config, None, 2.0) == (0, 1, None)


def test_a_real_probe_gives_seconds_for_every_part(tmp_path):
    config = tiny_config(tmp_path, "actor.dtype=float32", "actor.gradient_checkpointing=true")
    store = store_of(random_pairs(8), tmp_path / "pairs")
    found = time_probe.measure(config, builtin.ensure("tiny-random"), store, [[[0, 1, 2], [3]]])
    assert all(found[part] > 0 for part in ("block_forward", "block_backward", "update"))
    # Three blocks of 4 * 64 * 64 + 3 * 64 * 128 and two norms each, 264 * 64 twice, the last norm.
    assert found["params"] == 3 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 2 * 264 * 64 + 64
    config.actor.use_lora, config.actor.lora_rank = True, 2
    found = time_probe.measure(config, builtin.ensure("tiny-random"), store, [[[0, 1, 2], [3]]])
    assert all(found[part] > 0 for part in ("block_forward", "block_backward", "update"))
    assert found["params"] == 3 * 2 * (4 * 2 * 64 + 3 * (64 + 128))


def test_7b_with_adapters_fits_on_one_card_of_24_gb_and_without_them_not(tmp_path, monkeypatch):
    """Qwen2.5-7B by its config.json alone; the driver keeps half a GiB of such a card."""
    qwen = {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps({**qwen, **heads, "vocab_size": 152064}))
    monkeypatch.setattr(machine, "free_bytes_of_rank", lambda *_, **__: int(23.5 * GIB))
    monkeypatch.setattr(machine, "free_disk", lambda folder: 100 * GIB)
    file = Path(__file__).parents[2] / "params" / "hhrlhf_qwen2.5-7b_lora.yaml"
    places = [f"actor.path={tmp_path}", f"cluster.fileroot={tmp_path}/runs"]
    found = estimate.make(config_module.load(file, places), probe=False)
    assert found["problems"] == []
    assert found["memory"]["total"] / GIB == pytest.approx(20.8, abs=0.1)
    # q and o 3584 + 3584, k and v 3584 + 512, gate, up and down 3584 + 18944; rank 32, 28 blocks.
    assert found["model"]["trained_params"] == 28 * 32 * (2 * 7168 + 2 * 4096 + 3 * 22528)
    assert found["disk"]["exports"] < 0.2 * GIB
    assert "7,615.3 M parameters (80.7 M in adapters are trained), bfloat16" in estimate.text(found)
    whole = estimate.make(config_module.load(file, [*places, "actor.use_lora=false"]), probe=False)
    assert "no setting makes it fit" in whole["problems"][0]


# --- what does not fit ----------------------------------------------------------------------------------------


def test_what_fits_says_so_in_the_last_line(params_file, memory_of, capsys):
    assert cli.main(["estimate", "--config", params_file, "--no-probe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "fits"
    assert any(line.split()[:2] == ["total", "0.40"] for line in lines), lines


def test_json_has_the_same_numbers(params_file, memory_of, capsys):
    assert cli.main(["estimate", "--config", params_file, "--no-probe", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = {k: v for k, v in found["memory"].items() if k not in ("total", "free")}
    assert found["memory"]["total"] == sum(parts.values())
    assert found["memory"]["free"] == 64 * GIB
    assert found["time"] is None


def test_too_little_memory_is_refused_with_a_setting_that_fits(params_file, memory_of, capsys):
    # Floor 400 MiB; the micro-batch of a whole step of bytes-as-tokens needs more than 5 MiB beside it.
    memory_of(405 * MIB)
    argv = ["estimate", "--config", params_file, "actor.gradient_checkpointing=false"]
    assert cli.main(argv) == 2
    told = capsys.readouterr().err
    assert "1 CPU rank, and 0.40 GiB are free; use actor." in told
    setting = told.strip().split("; use ")[1].split(" or less")[0].split()
    assert cli.main([*argv, "--no-probe", *setting]) == 0


def test_too_little_disk_is_refused(params_file, memory_of, capsys):
    memory_of(64 * GIB, disk=MIB // 10)
    assert cli.main(["estimate", "--config", params_file, "--no-probe"]) == 2
    assert "0.1 MiB are free; use recover.keep=1, " in capsys.readouterr().err


def test_a_launch_that_cannot_fit_leaves_no_folder(config, memory_of, tmp_path):
    memory_of(100 * MIB)
    config = config_module.from_tree(
        config_module.to_tree(config), ["actor.backend=fsdp:d1", "ref.backend=fsdp:d1"]
    )
    with pytest.raises(
        UserError, match=r"weights, optimizer and the longest pair need 0\.\d+ GiB .* 0\.10 GiB"
    ):
        launch.start(config)
    assert not (tmp_path / config.experiment_name).exists()


def test_the_longest_pair_is_known_from_a_built_store(config, memory_of):
    assert fits.longest_known_pair(config) == 1
    store = dataset.build(config)
    longest = int(pair_costs(store.all_lengths(), True).max())
    assert fits.longest_known_pair(config) == longest
    config.train_dataset.max_length -= 1
    assert fits.longest_known_pair(config) == 1


def test_models_that_are_not_here_are_not_judged(config, memory_of):
    memory_of(100 * MIB)
    config.actor.path = config.ref.path = config.tokenizer_path = "nobody/nothing"
    preflight.check(config)


def test_scoring_needs_no_optimizer(config, memory_of):
    memory_of(100 * MIB)
    preflight.check(config, trains=False)


def test_a_model_that_is_nowhere_is_told():
    with pytest.raises(UserError, match=r"nobody/nothing.*config\.json"):
        estimate.model_folder("nobody/nothing")


# --- what is free ---------------------------------------------------------------------------------------------


def test_cpu_ranks_share_the_machine(config, memory_of):
    assert machine.free_bytes_of_rank(4, on_cuda=False) == 16 * GIB


def test_a_control_group_limits_the_host(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(f"{300 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{100 * MIB}\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.free_host_bytes() == 200 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_host_bytes() > 200 * MIB


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert machine.free_disk(tmp_path / "a" / "b") == pytest.approx(machine.free_disk(tmp_path), rel=0.1)
