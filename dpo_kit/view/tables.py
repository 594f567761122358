"""A run's files as tables: steps, held-out accuracy against baselines, answers before and after, where it lies.

Every function takes a `Run` and returns an `Html` fragment with a plain text twin; data in it is escaped.

Deliberately not here: numbers (`analysis`, `baselines`), charts (plots), HTML details (`html`), anything
that loads a model.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_kit import preferences
from dpo_kit.config import Config
from dpo_kit.errors import UserError
from dpo_kit.model import builtin
from dpo_kit.preferences import PairStore
from dpo_kit.records import findings, metrics, status
from dpo_kit.records.findings import Finding
from dpo_kit.system.files import read_json
from dpo_kit.view import analysis, baselines, html, ranking
from dpo_kit.view.html import Html

if TYPE_CHECKING:
    from dpo_kit.runs import Run


_PROMPT_CHARS, _ANSWER_CHARS = 400, 700
_MOST_FITTED = 5000  # training pairs that the rules on one feature are fitted on: seconds, whatever the data


def reading(run: Run) -> Html:
    """The curves of a run in words, after what the checks found."""
    actor = run.config.actor
    lines = analysis.reading(metrics.read_metrics(run.dir), loss_type=actor.loss_type, beta=actor.beta)
    return html.stack(findings_list([run]), *(html.paragraph(line) for line in lines))


def findings_list(runs: Sequence[Run], about: Collection[str] | None = None) -> Html:
    """What a reader of the runs' figures should know, each line once; nothing where no check found anything.

    Args:
        runs: what not all of them share is told with their names.
        about: only findings of these names.
    """
    found: dict[Finding, list[str]] = {}
    for run in runs:
        for finding in findings.read(run.dir):
            if about is None or finding.name in about:
                found.setdefault(finding, []).append(run.dir.name)
    notices = []
    for finding, names in found.items():
        owners = "" if len(names) == len(runs) else f"{', '.join(names)}: "
        notices.append(html.notice(finding.level, owners + finding.told))
    return html.stack(*notices)


def phases_table(run: Run) -> Html:
    """How a run ended, and where its time went."""
    status = run.status
    rows = [[phase["name"], f"{phase['seconds']:.1f} s"] for phase in status.get("phases", [])]
    return html.table(["phase", "time"], rows, caption=f"{run.name}: {status.get('state')}")


def steps_table(run: Run, most: int = 12) -> Html:
    """Loss and rewards over the steps; with more than `most` steps an even choice of them."""
    lines = analysis.training_lines(metrics.read_metrics(run.dir))
    picked = sorted({round(i) for i in np.linspace(0, len(lines) - 1, min(most, len(lines)))})
    beta = run.config.actor.beta
    shown, rows = ("dpo/chosen_reward", "dpo/rejected_reward", "dpo/reward_margin"), []
    for line in (lines[i] for i in picked):
        rewards = [html.signed(line[key]) for key in shown]
        share = None if analysis.is_tied(line, beta) else line["dpo/reward_accuracy"]
        accuracy = analysis.UNDEFINED if share is None else f"{100 * share:.0f} %"
        rows.append([line["step"], f"{line['dpo/loss']:.3f}", *rewards, accuracy])
    header = ["step", "loss", "chosen reward", "rejected reward", "margin", "accuracy"]
    return html.table(header, rows, caption="training pairs; each step's loss is before its update")


def accuracy_table(run: Run) -> Html:
    """Held-out accuracy before and after training, with 95 % intervals and what one gets without training."""
    steps = analysis.evaluation_steps(run.dir)
    if not steps:
        why = "set valid_dataset (and evaluator) to have held-out pairs"
        return html.paragraph(f"No evaluation is on disk: {why}.")
    first, last = steps[0], steps[-1]
    before, after = (analysis.read_evaluation(run.dir, step) for step in (first, last))
    trained = analysis.reward_accuracy(after)
    rules, notes = _text_rules(run)
    rules = {"the reference's own log-prob": analysis.logp_accuracy(after, "ref"), **rules}
    times = [(first, before), (last, after)] if first < last else [(last, after)]
    rows = [
        *(_share_row(f"reward accuracy, step {step}", analysis.reward_accuracy(e)) for step, e in times),
        *(_share_row(f"raw log-prob accuracy, step {step}", analysis.logp_accuracy(e)) for step, e in times),
        *(_share_row(f"without training: {name}", share) for name, share in rules.items()),
    ]
    table = html.table(["held-out pairs", "right", "n", "accuracy", "95 % interval"], rows)
    said = [_verdict(trained, rules), *notes]
    known = findings_list([run], about=("held-out", "first step"))
    return html.stack(known, table, *(html.paragraph(line) for line in said))


def _share_row(name: str, share: analysis.Share) -> list[object]:
    right = f"{share.correct:g}" if share.defined else "-"
    return [name, right, share.n, share.percent, share.interval_percent]


def _text_rules(run: Run) -> tuple[dict[str, analysis.Share], list[str]]:
    """The baselines that read the answers, and what to know about them."""
    try:
        folders = read_json(run.dir / "data.json", {})
        stores = {split: preferences.open_store(folder) for split, folder in folders.items() if folder}
        train = _answers(stores["train"], most=_MOST_FITTED)
        held_out = _answers(stores["valid"])
    except (UserError, OSError, KeyError) as error:
        why = status.one_line(error) if not isinstance(error, KeyError) else "the run names no pair store"
        return {}, [f"The baselines that read the answers are left out: {why}."]
    rule = baselines.best_threshold(train, held_out)
    rules = {
        "shorter wins": baselines.shorter_wins(held_out),
        "longer wins": baselines.longer_wins(held_out),
        "best threshold on one feature": rule.held_out,
    }
    note = (
        f"The best threshold on one feature is: {rule}. It was fitted on the {rule.train.n} training pairs, where "
        f"{100 * rule.train.correct / rule.train.n:.1f} % are right. A tie counts as half a pair."
    )
    return rules, [note]


def _verdict(trained: analysis.Share, rules: Mapping[str, analysis.Share]) -> str:
    if not trained.defined:
        return "Every reward is a tie: the policy has not moved from the reference."
    value = trained.correct / trained.n
    ahead = [name for name, share in rules.items() if share.correct / share.n >= value]
    if ahead:
        return f"Training ({trained.percent}) does not beat: {'; '.join(ahead)}."
    if len(rules) == 1:
        return f"Training ({trained.percent}) beats {next(iter(rules))}."
    best = max(share.correct / share.n for share in rules.values())
    told = f"Training ({trained.percent}) beats all {len(rules)} baselines"
    return f"{told}; the best reaches {100 * best:.1f} %."


def tokenizer_of(store: PairStore) -> Any:
    """The tokenizer that the pairs of a store were made with."""
    return builtin.load_tokenizer(store.tokenizer_path)


def _answers(store: PairStore, most: int | None = None) -> list[tuple[baselines.Answer, baselines.Answer]]:
    """The answers of all pairs, or of at most `most`, evenly picked."""
    tokenizer = tokenizer_of(store)
    step = 1 if most is None else max(1, -(-len(store) // most))
    return [
        (_answer(tokenizer, p.chosen_ids, p.context), _answer(tokenizer, p.rejected_ids, p.context))
        for p in map(store.pair, range(0, len(store), step))
    ]


def _answer(tokenizer: Any, ids: np.ndarray, context: int) -> baselines.Answer:
    own = ids[context:].tolist()
    text = tokenizer.decode(own, skip_special_tokens=True)
    return baselines.Answer(text, len(own), own[0] if own else -1)


# ---------------------------------------------------------------- samples


def samples_table(run: Run, count: int = 4) -> Html:
    """Held-out prompts answered before and after training; the ranking rule's score where it applies."""
    samples = analysis.read_lines(run.dir / "samples.jsonl")
    if not samples:
        note = run.status.get("samples") or "evaluator.num_samples is 0, or there was no prompt"
        return html.paragraph(f"No samples: {note}.")
    if not _rule_applies(run.config):
        why = (
            "The ranking rule scores only the embedded sample, which it ranked; these answers carry no score."
        )
        return html.stack(_answers_table(samples[:count], None), html.paragraph(why))
    before, after = analysis.score_samples(samples, ranking.score)
    scores = list(zip(before.tolist(), after.tolist(), strict=True))
    first = list(range(min(count, len(samples))))
    best, worst = analysis.best_and_worst(after.tolist())

    def table(picked: list[int], caption: str) -> Html:
        return _answers_table([samples[i] for i in picked], [scores[i] for i in picked], caption)

    return html.stack(
        table(first, f"the first {len(first)} of {len(samples)} held-out prompts"),
        html.paragraph(_rule_line(before, after)),
        table(best, "best answers after training"),
        table(worst, "worst answers after training"),
    )


def _rule_line(before: np.ndarray, after: np.ndarray) -> str:
    if len(before) < 2:
        return f"The ranking rule scores {before.mean():.3f} before and {after.mean():.3f} after (one prompt only)."
    paired = analysis.paired_interval(before, after)
    verdict = "lies above 0" if paired.low > 0 else "lies below 0" if paired.high < 0 else "includes 0"
    return f"The ranking rule's score over {paired.n} held-out prompts: {paired}; the interval {verdict}."


def _rule_applies(settings: Config) -> bool:
    paths = {settings.train_dataset.path, settings.valid_dataset.path if settings.valid_dataset else None}
    return paths <= {"sample", None}


def _answers_table(
    samples: Sequence[Mapping[str, Any]], scores: Sequence[tuple[float, float]] | None, caption: str = ""
) -> Html:
    header, widths = ["prompt", "reference (before)", "policy (after)"], [26, 37, 37]
    rows: list[list[object]] = [
        [
            _tail(s["prompt"].removesuffix("\n\nAssistant:"), _PROMPT_CHARS),
            _clip(s["reference"], _ANSWER_CHARS),
            _clip(s["policy"], _ANSWER_CHARS),
        ]
        for s in samples
    ]
    if scores is not None:
        header, widths = [*header, "rule before", "rule after"], [22, 33, 33, 6, 6]
        rows = [
            [*row, html.signed(b, 2), html.signed(a, 2)] for row, (b, a) in zip(rows, scores, strict=True)
        ]
    return html.table(header, rows, caption=caption, widths=widths)


def _tail(text: str, limit: int) -> str:
    text = text.strip()
    return text if len(text) <= limit else "… " + text[-limit:]


def _clip(text: str, limit: int) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit] + " …"


# ---------------------------------------------------------------- where things are


def where(run: Run) -> Html:
    """The files of a run, and what one can do next."""
    here = html.paragraph(f"Everything of this run lies in {run.dir}")
    listed = (
        ("config.yaml", "the whole configuration, resolved"),
        ("manifest.json", "versions, seeds, hardware, fingerprints, the command that repeats it"),
        ("metrics.jsonl", "every step and evaluation, one line each"),
        ("evaluations", "every held-out pair at each evaluation"),
        ("samples.jsonl", "the answers before and after"),
        ("model", "the trained model, a Hugging Face folder"),
        ("tensorboard", "the same numbers for TensorBoard"),
        ("logs", "what each rank printed"),
    )
    rows = [[name, what] for name, what in listed if (run.dir / name).exists()]
    folder, there = shlex.quote(str(run.dir)), {name for name, _ in rows}
    commands = [["look at the run again", f"dpo-kit runs show {folder}"]]
    if "model" in there:
        question = "How do I start a vegetable garden?"
        commands.append(["ask the trained model", f'dpo-kit sample {folder} --prompt "{question}"'])
    if "tensorboard" in there:
        commands.append(["see it in TensorBoard", f"tensorboard --logdir {folder}/tensorboard"])
    other = "open notebooks/sweep.ipynb, or set beta, loss_type and lr above and run again"
    commands.append(["try other values", other])
    return html.stack(
        here, html.table(["on disk", "what it is"], rows), html.table(["next", "how"], commands)
    )
