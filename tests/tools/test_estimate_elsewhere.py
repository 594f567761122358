"""Plans for machines that are not this one: a laptop without CUDA, a model that is only its config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dpo_kit import cli, launch
from dpo_kit import config as config_module
from dpo_kit.errors import ConfigError, UserError
from dpo_kit.model import builtin, costs, model_folder
from dpo_kit.system import machine
from dpo_kit.tools import time_probe
from tests import helpers

GIB = 2**30


def tiny_config(root, *overrides):
    """The tiny run in float32: float64 is for CPU ranks."""
    return helpers.tiny_config(root, "actor.dtype=float32", *overrides)


@pytest.fixture(autouse=True)
def laptop(monkeypatch):
    """No CUDA, hardly any memory or disk, and nothing may be tried out."""
    monkeypatch.setattr(machine, "visible_devices", lambda: 0)
    monkeypatch.setattr(machine, "free_device_bytes", lambda: None)
    monkeypatch.setattr(machine, "free_host_bytes", lambda: 2**20)
    monkeypatch.setattr(machine, "free_disk", lambda folder: 2**20)
    monkeypatch.setattr(time_probe, "measure", None)


@pytest.fixture
def plan(tmp_path, capsys):
    """Runs `dpo-kit estimate` on the tiny model with these options; the numbers, or what was told."""
    file = tmp_path / "params.yaml"
    file.write_text(config_module.to_yaml(tiny_config(tmp_path, "train_dataset.num_rows=40")))

    def run(*options):
        status = cli.main(["estimate", "--config", str(file), "--json", *options])
        out, told = capsys.readouterr()
        return json.loads(out) if status == 0 else told

    return run


def test_memory_is_that_of_the_planned_ranks_and_nothing_is_timed(plan):
    found = plan("--devices", "8", "--device-gib", "80", "actor.backend=fsdp", "ref.backend=fsdp")
    config = tiny_config(Path("x"), "actor.backend=fsdp:d8", "cluster.n_gpus_per_node=8")
    shape = model_folder.read_shape(builtin.ensure("tiny-random"))
    largest = found["tokens"]["largest_micro_batch"]
    parts = costs.step_bytes(shape, config, num_ranks=8, tokens=largest)
    assert found["memory"] == {**parts, "total": sum(parts.values()), "free": 80 * GIB}
    assert (found["ranks"], found["device"], found["time"], found["problems"]) == (8, "cuda", None, [])
    assert found["disk"]["free"] is None
    assert found["disk"]["checkpoints"] > 2**20  # more than is free here, and not refused


def test_the_micro_batch_that_fits_is_the_largest_one(plan):
    options = ["actor.gradient_checkpointing=false", "actor.mb_spec.max_tokens_per_mb=auto"]
    found = plan("--devices", "1", "--device-gib", "1.6", *options)
    config = tiny_config(Path("x"), "cluster.n_gpus_per_node=1", options[0])
    shape, fitting = (
        model_folder.read_shape(builtin.ensure("tiny-random")),
        found["tokens"]["fitting_micro_batch"],
    )
    need = [
        sum(costs.step_bytes(shape, config, num_ranks=1, tokens=fitting + more).values()) for more in (0, 1)
    ]
    assert need[0] <= int(1.6 * GIB) < need[1]
    assert found["tokens"]["bound"] == min(fitting, 65536)


def test_a_folder_with_a_config_json_is_enough(plan, tmp_path):
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(Path(builtin.ensure("tiny-random")) / "config.json", only)
    found = plan("--devices", "2", "--device-gib", "80", f"actor.path={only}", f"tokenizer_path={only}")
    assert found["tokens"]["pairs"] is None
    assert found["tokens"]["largest_micro_batch"] == found["tokens"]["bound"]


def test_pairs_of_a_shared_folder_that_is_not_here_are_built_in_the_project(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "project_root", lambda: tmp_path)
    nowhere = tmp_path / "nfs"
    found = plan("--devices", "2", "--device-gib", "80", f"cluster.fileroot={nowhere}")
    assert found["tokens"]["pairs"] == 40
    assert not nowhere.exists()
    assert list((tmp_path / "runs" / ".cache" / "pairs").iterdir())


def test_what_does_not_fit_on_the_devices_is_refused(plan):
    told = plan("--devices", "1", "--device-gib", "1.1")
    assert "need" in told
    assert "GiB on a device, and 1.10 GiB are free; " in told


def test_devices_alone_are_like_those_of_this_machine(plan, monkeypatch):
    assert "add --device-gib, such as --device-gib 80" in plan("--devices", "2")
    monkeypatch.setattr(machine, "free_device_bytes", lambda: 7 * GIB)
    found = plan("--devices", "2")
    assert (found["memory"]["free"], found["time"]) == (7 * GIB, None)


@pytest.mark.parametrize(
    ("overrides", "ranks", "devices"),
    [
        (["cluster.n_gpus_per_node=4", "actor.backend=fsdp", "ref.backend=fsdp"], 4, 4),
        (["cluster.n_gpus_per_node=auto", "actor.backend=fsdp", "ref.backend=fsdp"], 1, 1),
        (["cluster.n_gpus_per_node=0", "actor.backend=fsdp:d3", "ref.backend=fsdp:d3"], 3, 3),
    ],
)
def test_without_a_number_the_devices_are_the_configurations(tmp_path, overrides, ranks, devices):
    config = launch.plan_world(tiny_config(tmp_path, *overrides), None, lambda _: None)
    assert config_module.parse_backend(config.actor.backend).world_size == ranks
    assert config.cluster.n_gpus_per_node == devices


def test_devices_are_spread_over_the_nodes(tmp_path):
    nodes = ["cluster.n_nodes=2", "scheduler.type=ray"]
    config = tiny_config(tmp_path, *nodes, "actor.backend=fsdp", "ref.backend=fsdp")
    said: list[str] = []
    planned = launch.plan_world(config, 8, said.append)
    assert (planned.cluster.n_gpus_per_node, planned.actor.backend) == (4, "fsdp:d8p1t1")
    assert said == ["8 CUDA ranks (NCCL) on 2 nodes, 4 on each"]
    with pytest.raises(
        UserError, match=r"--devices 7 .* cluster.n_nodes = 2; give a multiple of 2, such as 6"
    ):
        launch.plan_world(config, 7)
    with pytest.raises(UserError, match="such as 2"):
        launch.plan_world(config, 1)


def test_an_explicit_backend_needs_no_more_than_there_are(plan, tmp_path):
    said: list[str] = []
    config = tiny_config(tmp_path, "actor.backend=fsdp:d4", "ref.backend=fsdp:d4")
    launch.plan_world(config, 8, said.append)
    assert said[0].startswith("4 CUDA ranks (NCCL) on 1 node, 4 on each; 4 of 8 devices stay unused")
    with pytest.raises(ConfigError, match="needs 4 ranks, more than the 2 devices"):
        launch.plan_world(config, 2)
    # The params file's own number of devices is another machine's.
    backends = ["actor.backend=fsdp:d8", "ref.backend=fsdp:d8"]
    assert plan("--devices", "8", "--device-gib", "80", "cluster.n_gpus_per_node=1", *backends)["ranks"] == 8


@pytest.mark.parametrize(
    ("option", "value"), [("--devices", "-1"), ("--device-gib", "0"), ("--device-gib", "8x")]
)
def test_an_option_that_is_no_such_number_is_refused(plan, option, value):
    told = plan(option, value)
    assert told.startswith(f"dpo-kit: argument {option}: {value!r}")
