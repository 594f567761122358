"""What the benchmarks share: options, children, the kit's engine, memory, and how a report is laid out.

A benchmark script measures in children, one process a measurement, each told what to do by a job (a flat dict
of plain values). Their results are kept in `runs/benchmarks/<script>.jsonl`, keyed by the job and by the kit's
code: the same command again goes on where it was ended (`--fresh` measures anew).

Not here: models and pairs (`inputs`), the other trainer that the kit is compared with (`trl_peer`), what is measured
(the scripts).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import inputs
import psutil

from dpo_kit import config as config_module
from dpo_kit.model import model_folder
from dpo_kit.preferences import PairStore
from dpo_kit.system import processes

LR, BETA = 5e-6, 0.1
# Dense bf16 peak of a chip by its data sheet, FLOP/s
DATASHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12}

# --- options and children -------------------------------------------------------------------------------------


def parser(doc: str | None, *, model: str = model_folder.SMOLLM2, pairs: int = 40) -> argparse.ArgumentParser:
    """The options that every script has."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", default=model, help=f"built-in name, folder, or random:{{{','.join(inputs.SHAPES)}}}"
    )
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--pairs", type=int, default=pairs, help="number of pairs")
    p.add_argument("--data", default=inputs.DATA, help="preference rows, relative to the project")
    p.add_argument(
        "--shape", default="", help="P/C/R: synthetic pairs of these lengths; P/C/R~S spreads them"
    )
    p.add_argument(
        "--max-tokens", type=int, default=0, help="the kit's micro-batch budget (0: 4096, CUDA 32768)"
    )
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override of the kit's config"
    )
    p.add_argument("--fresh", action="store_true", help="measure anew what an earlier command has measured")
    p.add_argument("-o", "--output", help="write the report here too")
    p.add_argument("--job", help=argparse.SUPPRESS)
    return p


def main(p: argparse.ArgumentParser, measure: Callable[[dict], Any], report: Callable[..., str]) -> int:
    """Runs a script: as the parent it reports, as a child it measures one job.

    Args:
        measure: what a child does with its job; returns plain values.
        report: (options, call) -> the finished markdown; `call(job)` is what a child measured.
    """
    o = p.parse_args()
    if o.job:
        processes.die_with_parent()
        result = measure(json.loads(o.job))
        print("RESULT " + json.dumps(result), flush=True)
        return 0
    o.max_tokens = o.max_tokens or (32768 if has_cuda() else 4096)
    script = Path(sys.argv[0]).resolve()
    try:
        text = report(o, lambda job, **options: measured(script, job, fresh=o.fresh, **options))
    except ChildFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(text)
    if o.output:
        Path(o.output).write_text(text + "\n", encoding="utf-8")
    return 0


class ChildFailed(Exception):
    """A child ended without a result; the text is the end of what it said."""

    @property
    def out_of_memory(self) -> bool:
        return "out of memory" in str(self).lower() or "can't allocate memory" in str(self).lower()


_fresh_done: set[str] = set()


def measured(script: Path, job: dict[str, Any], *, fresh: bool = False, env: dict | None = None) -> Any:
    """What a child of `script` measures for `job`, or what it measured when it was asked before.

    Raises:
        ChildFailed: the child ended without a result.
    """
    path = inputs.WORK / f"{script.stem}.jsonl"
    key = json.dumps({**job, "code": code_version(), "env": env}, sort_keys=True)
    if path.exists() and (not fresh or key in _fresh_done):
        for line in map(json.loads, path.read_text().splitlines()[::-1]):
            if line["key"] == key:
                return line["result"]
    label = " ".join(str(job[k]) for k in ("side", "name", "repeat") if job.get(k, "") != "")
    print(f"{datetime.datetime.now():%H:%M:%S} {script.stem}: {label}", file=sys.stderr, flush=True)
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    child = subprocess.run(
        [sys.executable, str(script), "--job", json.dumps(job)],
        env={**os.environ, **quiet, **(env or {})},
        capture_output=True,
        text=True,
        errors="replace",
    )
    lines = [line for line in child.stdout.splitlines() if line.startswith("RESULT ")]
    if child.returncode != 0 or not lines:
        raise ChildFailed(
            f"{label} (exit {child.returncode}):\n{child.stdout[-1000:]}\n{child.stderr[-3000:]}"
        )
    result = json.loads(lines[-1].removeprefix("RESULT "))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"key": key, "result": result}) + "\n")
    _fresh_done.add(key)
    return result


@functools.cache
def code_version() -> str:
    """A hash of the kit's and this benchmark's code: a result of other code is not used again."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    mine = [Path(__file__), here / "inputs.py", here / "trl_peer.py", Path(sys.argv[0]).resolve()]
    for file in [*sorted((inputs.ROOT / "dpo_kit").rglob("*.py")), *mine]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


# --- the kit's engine -----------------------------------------------------------------------------------------


def kit_config(job: dict[str, Any], fileroot: Path) -> Any:
    """The kit's configuration of a job: AdamW at a constant rate without decay, rows in store order."""
    tree = {
        "seed": inputs.SEED,
        "actor": {
            "path": job["model"],
            "dtype": job["dtype"],
            "beta": BETA,
            "gradient_checkpointing": False,
            "mb_spec": {"max_tokens_per_mb": job["max_tokens"]},
            "optimizer": {
                "lr": job.get("lr", LR),
                "weight_decay": 0.0,
                "lr_scheduler_type": "constant",
                "warmup_steps_proportion": 0.0,
                "gradient_clipping": 1.0,
            },
        },
        "ref": {"path": job["model"], "first_step_check": "warn"},
        "train_dataset": {"path": "sample", "batch_size": job["batch_size"], "shuffle": False},
        "cluster": {"fileroot": str(fileroot), "n_gpus_per_node": 1 if has_cuda() else 0},
        "total_train_epochs": 10_000,
        "total_train_steps": job["steps"],
    }
    return config_module.from_tree(tree, job.get("set", []))


@contextlib.contextmanager
def kit_engine(job: dict[str, Any], store: PairStore, fileroot: Path) -> Iterator[tuple[Any, float]]:
    """The engine of a job as a worker makes it, alone on this machine, and the seconds of its reference pass."""
    import torch

    from dpo_kit.engine import reference, state
    from dpo_kit.model import parallel

    torch.manual_seed(inputs.SEED)
    config = kit_config(job, fileroot)
    with parallel.alone(cuda=has_cuda()) as world:
        engine = state.build(config, world, store)
        engine.ref_tokens = job["max_tokens"]
        start = time.perf_counter()
        reference.prepare(engine)
        synchronize()
        yield engine, time.perf_counter() - start


def kit_train(state: Any, stepped: Callable[[dict], Any]) -> None:
    """`loop.train`, with nothing around the steps but `stepped(record)`."""
    from dpo_kit.engine import loop

    hooks = loop.Hooks(stepped=stepped, evaluated=lambda *_: None, due=lambda *_: False, save=lambda _: None)
    loop.train(state, hooks)


# --- devices, memory, time --------------------------------------------------------------------------------------


def has_cuda() -> bool:
    """Whether the benchmarks run on CUDA: always, where there is one."""
    import torch

    return torch.cuda.is_available()


def synchronize() -> None:
    """Waits for the device, so that a clock read after it counts what was launched before it."""
    if has_cuda():
        import torch

        torch.cuda.synchronize()


def current_bytes() -> int:
    """Memory in use now: allocated on CUDA, resident on a CPU."""
    if has_cuda():
        import torch

        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Starts a new high-water mark; on a CPU this needs Linux, elsewhere the mark is the process's."""
    if has_cuda():
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The high-water mark since `reset_peak`."""
    if has_cuda():
        import torch

        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Window:
    """Times and memory of the steps after the warm-up."""

    def __init__(self, warmup: int, steps: int):
        self.warmup, self.last = warmup, steps
        self.lines: list[dict] = []
        self.start = self.seconds = 0.0
        self.peak = 0

    def stepped(self, line: dict) -> None:
        """Notes a step; the clock runs from the end of the warm-up to the end of the last step."""
        self.lines.append(line)
        if len(self.lines) == self.warmup:
            synchronize()
            reset_peak()
            self.start = time.perf_counter()
        if len(self.lines) == self.last:
            synchronize()
            self.seconds = time.perf_counter() - self.start
            self.peak = peak_bytes()


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large square matrix product on this device: the fastest of several."""
    import torch

    size = 8192 if has_cuda() else 2048
    device = "cuda" if has_cuda() else "cpu"
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    seconds = []
    for _ in range(12):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


# --- the report -------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median with min and max: `4.20 (4.15-4.31)`; one value as it is, none as a dash."""
    if not values:
        return "-"
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}-{max(values):{form}})"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def head(title: str, *paragraphs: str) -> str:
    """Title, date, the command, hardware and versions."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(shlex.quote, sys.argv[1:])])
    packages = ("dpo-kit", "torch", "transformers", "trl")
    versions = [f"{name} {v}" for name in packages if (v := _version(name))]
    lines = [
        f"# {title}",
        f"{datetime.date.today().isoformat()}; `{command}`",
        f"{hardware()}. Python {platform.python_version()}, {', '.join(versions)}, code {code_version()}.",
        *paragraphs,
    ]
    return "\n\n".join(lines)


def hardware() -> str:
    """Processor, cores and memory, and the GPU where there is one."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    memory = psutil.virtual_memory().total / 2**30
    text = f"{name}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
    if has_cuda():
        import torch

        text = f"{torch.cuda.get_device_name()}, {text}"
    return text


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def gib(num_bytes: float) -> float:
    """Bytes in GiB."""
    return num_bytes / 2**30
