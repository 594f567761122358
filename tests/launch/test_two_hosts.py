"""One configuration on two hosts of two ranks each, by Ray and by torchrun, against four ranks of one machine."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from dpo_kit.config import project_root
from dpo_kit.records import metrics
from dpo_kit.records.status import read_status
from dpo_kit.system.processes import is_alive
from tests import ray_cluster as beds
from tests.hosts import hosts

pytestmark = [pytest.mark.skipif(bool(beds.permitted()), reason=beds.permitted())]

STEPS = 80
SETTINGS = [
    *(
        "cluster.n_gpus_per_node=0",
        "actor.backend=fsdp:d4",
        "total_train_epochs=20",
        f"total_train_steps={STEPS}",
    ),
    *(
        "recover.mode=auto",
        "recover.freq_steps=4",
        "evaluator.freq_epochs=20",
        "stats_logger.tensorboard=false",
    ),
]
LIMIT_S = 600
ATOL = 1e-5


def train(*words, script=("-m", "dpo_kit")):
    return [
        sys.executable,
        *script,
        "train",
        "--config",
        str(project_root() / "params" / "smoke.yaml"),
        *SETTINGS,
        *words,
    ]


def figures(run_dir):
    """What every step measured, by name."""
    lines = [line for line in metrics.read_metrics(run_dir) if "dpo/loss" in line]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    names = ("dpo/loss", "dpo/reward_margin", "grad_norm", "lr")
    return {name: [line[name] for line in lines] for name in names}


def same(run_dir, local):
    found = figures(run_dir)
    for name, values in found.items():
        assert values == pytest.approx(local[name], abs=ATOL, rel=ATOL), name


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The figures of four ranks on this machine."""
    root = tmp_path_factory.mktemp("local")
    words = [f"cluster.fileroot={root}", "trial_name=one", "evaluator.num_samples=0"]
    done = subprocess.run(train(*words), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return figures(root / "smoke" / "one")


@pytest.fixture(scope="module")
def cluster():
    """Two hosts with Ray on them."""
    with hosts() as (a, b), beds.ray_cluster(a, b) as made:
        made.hosts = (a, b)
        yield made


@pytest.fixture
def command(cluster, tmp_path):
    """The seed's command, but for its paths and sizes."""
    where = [f"cluster.fileroot={tmp_path}", "trial_name=one", "evaluator.num_samples=0"]
    return train("cluster.n_nodes=2", "scheduler.type=ray", f"scheduler.address={cluster.address}", *where)


def until(condition, process, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.02)


def step(run_dir):
    return read_status(run_dir).get("step") or 0


def test_the_seeds_command_trains_on_two_hosts(cluster, command, local, tmp_path):
    a, _ = cluster.hosts
    done = a.run(command, env=cluster.environment, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 CPU ranks (gloo) on 2 nodes, 2 on each" in done.stdout
    assert "takes anybody's jobs" not in done.stdout
    run_dir = tmp_path / "smoke" / "one"
    same(run_dir, local)
    assert len(list((run_dir / "logs").glob("rank-?.log"))) == 4
    assert (run_dir / "model" / "model.safetensors").is_file()


def test_the_notebook_does_the_same_and_its_charts_are_there(cluster, local, tmp_path):
    a, _ = cluster.hosts
    out = tmp_path / "out.ipynb"
    words = ["cluster.n_nodes=2", "scheduler.type=ray", f"scheduler.address={cluster.address}", *SETTINGS]
    words += [f"cluster.fileroot={tmp_path}", "trial_name=one", "evaluator.num_samples=2"]
    notebook = [str(project_root() / "notebooks" / "train.ipynb"), str(out)]
    given = ["-p", "config", "params/smoke.yaml", "-p", "overrides", json.dumps(words)]
    done = a.run(
        [sys.executable, "-m", "papermill", *notebook, *given],
        env=cluster.environment,
        check=False,
        timeout=LIMIT_S,
        cwd=project_root(),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    same(tmp_path / "smoke" / "one", local)
    made = [output for cell in nbformat.read(out, 4).cells for output in cell.get("outputs", [])]
    kinds = [set(output.get("data", {})) for output in made]
    assert sum({"application/vnd.plotly.v1+json", "image/png"} <= kind for kind in kinds) >= 1


def test_a_host_that_is_cut_off_and_comes_back_changes_nothing(cluster, command, local, tmp_path):
    a, b = cluster.hosts
    run_dir = tmp_path / "smoke" / "one"
    process = a.popen(command, env=cluster.environment, log=tmp_path / "out.log")
    until(lambda: step(run_dir) >= 6, process)
    b.cut()
    at = step(run_dir)
    assert at < STEPS - 10
    until(lambda: read_status(run_dir)["attempt"] == 2, process)
    told = read_status(run_dir)["message"]
    assert f"{b.address} (node " in told
    assert "is lost: " in told
    assert "; going on from checkpoint step-" in told
    b.heal()
    cluster.join(b)
    assert process.wait(LIMIT_S) == 0, (tmp_path / "out.log").read_text()
    same(run_dir, local)


def test_the_same_command_goes_on_after_its_driver_was_killed(cluster, command, local, tmp_path):
    a, b = cluster.hosts
    run_dir = tmp_path / "smoke" / "one"
    process = a.popen(command, env=cluster.environment, log=tmp_path / "out.log")
    until(lambda: step(run_dir) >= 6, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    workers = [p.pid for host in (a, b) for p in host.processes() if "dpo_kit.engine.worker" in p.cmdline()]
    deadline = time.monotonic() + 20
    while any(is_alive({"pid": pid}) for pid in workers):
        assert time.monotonic() < deadline, "ranks outlived their driver"
        time.sleep(0.1)
    done = a.run(command, env=cluster.environment, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on from its last checkpoint, step-" in done.stdout
    same(run_dir, local)


def test_a_client_without_the_token_is_refused(cluster, command, tmp_path):
    a, _ = cluster.hosts
    without = {key: value for key, value in cluster.environment.items() if not key.startswith("RAY_AUTH")}
    done = a.run(command, env={**without, "HOME": str(tmp_path)}, check=False, timeout=LIMIT_S)
    assert done.returncode != 0
    assert "token" in done.stdout + done.stderr
    assert not (tmp_path / "smoke").exists()


def test_fewer_nodes_than_asked_are_refused_with_both_numbers(cluster, command, tmp_path):
    a, _ = cluster.hosts
    words = [*command, "cluster.n_nodes=3", "scheduler.wait_s=2"]
    done = a.run(words, env=cluster.environment, check=False, timeout=LIMIT_S)
    assert done.returncode == 2
    assert "3 nodes are needed, and after 2 s (scheduler.wait_s) Ray has 2: host-" in done.stderr
    assert not (tmp_path / "smoke").exists()


def test_two_torchruns_of_two_processes_give_the_same(cluster, local, tmp_path):
    a, b = cluster.hosts
    where = [
        "scheduler.type=torchrun",
        f"cluster.fileroot={tmp_path}",
        "trial_name=one",
        "evaluator.num_samples=0",
    ]
    torchrun = Path(sys.executable).with_name("torchrun")
    assert torchrun.exists() or shutil.which("torchrun")
    processes = []
    for rank, host in enumerate((a, b)):
        agent = [torchrun, "--nnodes=2", "--nproc-per-node=2", f"--node-rank={rank}"]
        agent += [f"--master-addr={a.address}", "--master-port=29511"]
        words = [*agent, *train(*where)[1:]]
        processes.append(host.popen(words, log=tmp_path / f"{host.name}.log"))
    codes = [process.wait(LIMIT_S) for process in processes]
    assert codes == [0, 0], (tmp_path / "host-a.log").read_text()
    same(tmp_path / "smoke" / "one", local)
