"""The command `dpo-kit`; `python -m dpo_kit ...` is the same.

Exit status: 0 done, 2 a user's mistake (one line on stderr, no traceback), 3 stopped or preempted with its state
saved, 1 anything else. Each command is a thin call into the module that does the work.

Not here: logic that a notebook would want, too.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.config.values import coerce
from dpo_kit.errors import ExitStatus, RunError, UserError
from dpo_kit.launch import preflight
from dpo_kit.redaction import guarded_output
from dpo_kit.system import machine
from dpo_kit.view.html import visible

# On a terminal a counter is drawn over; in a log a line comes now and then, so that nothing is silent for 5 s.
_REDRAW_S, _LINE_S = 0.2, 4.0
_DRAWN = re.compile(r"((?:\r|\x1b\[A)*)(.*?)((?:\x1b\[K)?\r?)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    warnings.showwarning = _show_warning
    with guarded_output(_for_terminals):
        return _run(argv)


def _for_terminals(text: str) -> str:
    """Text of data, names and models must not steer the terminal; what draws a line anew (counters, tqdm) may."""
    drawn = _DRAWN.fullmatch(text)
    assert drawn is not None
    return f"{drawn[1]}{visible(drawn[2])}{drawn[3]}"


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parse(argv)
        return arguments.run(arguments) or ExitStatus.DONE
    except UserError as error:
        return _tell(error, ExitStatus.MISTAKE)
    except RunError as error:
        return _tell(error, ExitStatus.of(error.state))
    except KeyboardInterrupt:
        return _tell("interrupted", ExitStatus.FAILED)
    except BrokenPipeError:
        # The reader is gone (`| head`); what Python flushes when it ends must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.FAILED
    except (
        OSError
    ) as error:  # a full disk, a folder that may not be written, a run that does not stop in time
        return _tell(error, ExitStatus.FAILED)


def _tell(message: object, status: ExitStatus) -> int:
    print(f"dpo-kit: {message}", file=sys.stderr)
    return status


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    print(f"dpo-kit: {message}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """A wrong command line is a user's mistake like any other: one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _count(text: str) -> int:
    """An option that is a whole number."""
    return _number(text, int, {"ge": 0})


def _size(text: str) -> float:
    """An option that is an amount of something."""
    return _number(text, float, {"gt": 0})


def _number(text: str, kind: type, allowed: dict[str, Any]) -> Any:
    """An option's number, read as the configuration reads one."""
    try:
        return coerce(text, kind, allowed)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options and `key=value` overrides may come in any order."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(overrides) < len(rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if overrides:
        arguments.overrides += overrides
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dpo-kit", description="Direct Preference Optimization, notebook first.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument("--config", required=True, metavar="FILE", help="a params file (YAML)")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. actor.beta=0.2")
        return command

    train = add("train", _train, "train in the foreground; the last line is the run folder")
    train.add_argument("--detach", action="store_true", help="return once the run has started")
    add("sweep", _sweep, "one run for each combination, e.g. actor.beta=0.05,0.1 actor.loss_type=sigmoid,ipo")
    data = add("data", _data, "build the pair store and print its report")
    data.add_argument("--split", default="train", choices=("train", "valid"))
    score = add("score", _score, "log-probs, rewards and loss of every pair, one JSON line each")
    score.add_argument("-o", "--out", required=True, metavar="FILE", help="where the lines go")
    score.add_argument("--split", default="train", choices=("train", "valid"))
    told = "memory, tokens, time and disk of a run before it starts; refuses what cannot fit"
    estimate = add("estimate", _estimate, told)
    estimate.add_argument("--json", action="store_true", help="the numbers as JSON: bytes, seconds, tokens")
    about = "plan a machine that is not this one, with so many CUDA devices in all (default: as configured)"
    estimate.add_argument("--devices", type=_count, metavar="N", help=about)
    about = "memory of each of its devices (default: what is free on this machine's)"
    estimate.add_argument("--device-gib", type=_size, metavar="GIB", help=about)
    estimate.add_argument("--no-probe", action="store_true", help="no times: nothing is run")
    add("doctor", _doctor, "what is wrong with a run before it starts, one line a check")
    sample = _add_with_runs(commands, "sample", _sample, "answers of reference and policy, side by side")
    sample.add_argument("target", metavar="RUN")
    asked = sample.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT")
    asked.add_argument("--prompts", metavar="FILE", help="one prompt a line")
    export = _add_with_runs(commands, "export", _export, "copy a run's model to a Hugging Face folder")
    export.add_argument("target", metavar="RUN")
    export.add_argument("-o", "--out", required=True, metavar="DIR")
    _add_runs(commands)
    _add_cache(commands)
    return parser


def _add_with_runs(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """A command or verb on runs that are there."""
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run)
    command.add_argument("--fileroot", metavar="DIR", help="where the runs are (default: runs/)")
    return command


def _group(
    commands: Any, name: str, text: str, verbs: Sequence[tuple[str, Any, str]]
) -> dict[str, argparse.ArgumentParser]:
    """A command with verbs, each (name, what runs, about); every verb's parser, for its own options."""
    group = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    made = group.add_subparsers(required=True, metavar="VERB")
    return {word: _add_with_runs(made, word, run, about) for word, run, about in verbs}


def _add_runs(commands: Any) -> None:
    text = "list, show, stop, resume, fork, prune or remove runs"
    verbs = (
        ("list", _runs_list, "every run below the fileroot, newest first"),
        ("show", _runs_show, "state, figures and places of one run"),
        ("stop", _runs_stop, "end a run with its state saved"),
        ("resume", _runs_resume, "go on from the last whole checkpoint of an interrupted run"),
        ("fork", _runs_fork, "a new run from a checkpoint of another, e.g. --step 40 actor.beta=0.3"),
        ("prune", _runs_prune, "remove checkpoints of ended runs"),
        ("rm", _runs_rm, "remove a run's folder"),
    )
    made = _group(commands, "runs", text, verbs)
    about = "a folder, experiment/trial, or a trial's name"
    for name in ("show", "stop", "resume", "fork", "rm"):
        made[name].add_argument("target", metavar="RUN", help=about)
    # None is taken: the refusal says which command takes them.
    made["resume"].add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    fork, prune = made["fork"], made["prune"]
    fork.add_argument("--step", type=_count, metavar="N", help="of a checkpoint (default: the last one)")
    fork.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. actor.beta=0.3")
    prune.add_argument("target", metavar="RUN", nargs="?", help=about)
    about = "newest ones that stay of each run"
    prune.add_argument("--keep", type=_count, default=1, metavar="N", help=about)
    for name in ("prune", "rm"):
        made[name].add_argument("--yes", action="store_true", help="do not ask")


def _add_cache(commands: Any) -> None:
    text = "list or remove the pair stores and reference caches that runs share"
    verbs = (
        ("list", _cache_list, "what is there, with sizes, oldest first"),
        ("rm", _cache_rm, "remove some, or all; they are made again when a run needs them"),
    )
    rm = _group(commands, "cache", text, verbs)["rm"]
    rm.add_argument("names", nargs="*", metavar="NAME", help="from `cache list`; all when left out")
    rm.add_argument("--yes", action="store_true", help="do not ask")


def _load(arguments: argparse.Namespace) -> Config:
    return config_module.load(arguments.config, arguments.overrides)


def _find(arguments: argparse.Namespace) -> Any:
    from dpo_kit import runs

    return runs.find(arguments.target, _fileroot(arguments))


def _fileroot(arguments: argparse.Namespace) -> Path:
    return config_module.resolve_path(arguments.fileroot or "runs", config_module.project_root())


def _train(arguments: argparse.Namespace) -> int:
    from dpo_kit import launch
    from dpo_kit.launch import slurm

    config = _load(arguments)
    if slurm.submits(config):
        return slurm.submit(config, arguments.config, arguments.overrides)
    if not arguments.detach:
        return launch.run_in_foreground(config, arguments.config)
    print(launch.start(config, detached=True).dir)
    return ExitStatus.DONE


def _sweep(arguments: argparse.Namespace) -> None:
    from dpo_kit import sweep

    fixed, grid = sweep.split_overrides(arguments.overrides)
    trials = sweep.expand(lambda extra: config_module.load(arguments.config, [*fixed, *extra]), grid)
    made = sweep.Sweep(trials)
    try:
        made.run()
    except KeyboardInterrupt:
        raise RunError("interrupted; the run under way has ended", state="stopped") from None
    finally:
        print(sweep.table(made.trials).text)


def _data(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    store = _build(config, arguments.split)
    from dpo_kit import dataset

    print(dataset.format_report(store, _build(config, "train") if arguments.split == "valid" else None))
    if arguments.split == "train" and config.valid_dataset is not None:
        print(f"\nheld-out pairs\n{dataset.format_report(_build(config, 'valid'), store)}\n")
    print(store.path)


def _build(config: Config, split: str) -> Any:
    from dpo_kit import dataset

    if split == "valid" and config.valid_dataset is None:
        raise UserError("valid_dataset is missing; add the section, or use --split train")
    tell = _counter("rows")
    return dataset.build(config, split, progress=lambda done, total: tell("build pairs", done, total))


def _score(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    out = Path(arguments.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"-o {out} is no file in a folder that exists; give one, such as scores.jsonl")
    preflight.check(config, trains=False)
    store = _build(config, arguments.split)
    from dpo_kit.tools import score

    means = score.score(config, store, out, _counter("pairs"), arguments.split)
    for name, value in means.items():
        told = "undefined (all ties)" if value is None else f"{value:.6g}"
        print(f"{name.removeprefix('dpo-eval/'):>18}  {told}")
    print(out)


def _estimate(arguments: argparse.Namespace) -> None:
    from dpo_kit import launch
    from dpo_kit.system.files import to_json
    from dpo_kit.tools import estimate

    is_elsewhere = arguments.devices is not None or arguments.device_gib is not None
    config = None if is_elsewhere else _load(arguments)
    if config and (config.scheduler.type == "local" or config.cluster.n_gpus_per_node == 0):
        config = launch.resolve_world(config, lambda _: None)
        found = estimate.make(config, probe=not arguments.no_probe)
    else:
        found = estimate.make(_planned(arguments), device_bytes=_device_bytes(arguments))
    print(to_json(found, indent=2) if arguments.json else estimate.text(found))
    estimate.refuse(found)


def _planned(arguments: argparse.Namespace) -> Config:
    """The configuration on the devices of `--devices`, whatever the params file says of them."""
    from dpo_kit import launch

    if arguments.devices is not None:
        arguments.overrides.append("cluster.n_gpus_per_node=auto")
    say = (lambda _: None) if arguments.json else None
    return launch.plan_world(_load(arguments), arguments.devices, say)


def _device_bytes(arguments: argparse.Namespace) -> int:
    if arguments.device_gib is not None:
        return int(arguments.device_gib * 2**30)
    free = machine.free_device_bytes()
    if free is None:
        raise UserError(
            "there is no CUDA device here whose memory could stand for that of the run's; add --device-gib, such as"
            " --device-gib 80"
        )
    return free


def _doctor(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    from dpo_kit.tools import doctor

    found = doctor.examine(config, lambda finding: print(doctor.line(finding), flush=True))
    return ExitStatus.MISTAKE if any(finding.level == "bad" for finding in found) else ExitStatus.DONE


def _counter(unit: str) -> Callable[..., None]:
    """What shows `build pairs: 300 of 2312 rows` on stderr; silent where it would only flash by."""
    shown_at = time.monotonic()
    is_drawn = sys.stderr.isatty()

    def tell(phase: str, done: int = 0, total: int | None = None, **_: Any) -> None:
        nonlocal shown_at
        now = time.monotonic()
        is_last = is_drawn and done == total
        if not is_last and now - shown_at < (_REDRAW_S if is_drawn else _LINE_S):
            return
        shown_at = now
        text = f"{phase}: {done}" + (f" of {total}" if total else "") + f" {unit}"
        end = "\n" if is_last or not is_drawn else ""
        print(f"\r{text}\x1b[K" if is_drawn else text, end=end, file=sys.stderr)

    return tell


def _sample(arguments: argparse.Namespace) -> None:
    run = _find(arguments)
    texts = [arguments.prompt]
    if arguments.prompts:
        try:
            texts = [line for line in Path(arguments.prompts).read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {arguments.prompts}: {error}") from error
    if not texts or not all(t and t.strip() for t in texts):
        raise UserError("the prompt is empty; give --prompt TEXT or a file with one prompt a line")
    from dpo_kit.tools import samples

    for found in samples.ask(run.dir, texts):
        print(
            f"prompt     {found['prompt']}\nreference  {found['reference']}\npolicy     {found['policy']}\n"
        )


def _export(arguments: argparse.Namespace) -> None:
    import shutil

    from dpo_kit.system import folders

    run, out = _find(arguments), Path(arguments.out)
    if out.exists():
        raise UserError(f"-o {out} exists; give a folder that does not")
    from dpo_kit.tools import samples

    source = samples.latest_export(run.dir)
    with folders.staged(out, "refuse") as part:
        shutil.copytree(source, part, dirs_exist_ok=True)
    print(out)


def _runs_list(arguments: argparse.Namespace) -> None:
    from dpo_kit.tools import listing

    print(listing.list_table(_fileroot(arguments)))


def _runs_show(arguments: argparse.Namespace) -> None:
    from dpo_kit.tools import listing

    print(listing.show_text(_find(arguments)))


def _runs_stop(arguments: argparse.Namespace) -> None:
    run = _find(arguments)
    run.stop()
    print(f"{run.name}: {run.state}")


def _runs_resume(arguments: argparse.Namespace) -> int:
    from dpo_kit import launch
    from dpo_kit.records import resuming
    from dpo_kit.records.facts import read_facts

    run = _find(arguments)
    if arguments.overrides:
        others = resuming.with_others(read_facts(run.dir), arguments.overrides)
        raise UserError(f"a run goes on with its own settings; for others: {others}")
    return launch.resume_in_foreground(run)


def _runs_fork(arguments: argparse.Namespace) -> int:
    from dpo_kit.launch import forks

    return forks.fork_in_foreground(_find(arguments), arguments.step, arguments.overrides)


def _runs_prune(arguments: argparse.Namespace) -> int:
    from dpo_kit import runs
    from dpo_kit.records import run_folder
    from dpo_kit.tools import cleanup

    if arguments.target:
        picked = [_find(arguments)]
    else:
        picked = [runs.Run(folder) for folder in run_folder.list_runs(_fileroot(arguments))]
    items = cleanup.spare_checkpoints(picked, arguments.keep)
    return ExitStatus.DONE if cleanup.remove(items, yes=arguments.yes) else ExitStatus.FAILED


def _cache_list(arguments: argparse.Namespace) -> None:
    from dpo_kit.tools import cleanup

    print(cleanup.table(cleanup.cache_items(_fileroot(arguments))))


def _cache_rm(arguments: argparse.Namespace) -> int:
    from dpo_kit import launch
    from dpo_kit.tools import cleanup

    root = _fileroot(arguments)
    live = launch.live(root)
    if live:
        raise UserError(f"{live[0].name} is {live[0].state} and may need the caches; stop it first")
    items = cleanup.pick(cleanup.cache_items(root), arguments.names, f"{root}/.cache")
    return ExitStatus.DONE if cleanup.remove(items, yes=arguments.yes) else ExitStatus.FAILED


def _runs_rm(arguments: argparse.Namespace) -> int:
    from dpo_kit import runs

    return ExitStatus.DONE if runs.remove(_find(arguments), yes=arguments.yes) else ExitStatus.FAILED
