"""The policy as a Hugging Face folder with a model card: weights in `actor.dtype`, and all that lay beside the base's.

A model with adapters (`lora`) is written as peft writes one (the adapters alone, where their base lies, its tokenizer),
or merged: as the whole model that the two are.

config.json and generation_config.json are the base's, field by field, but for what training changed: the dtype, whether
head and embedding are one, and the end token of the trained texts, on which generation stops as well.

Not here: checkpoints that a run goes on from (engine/checkpoint).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.model import lora, model_folder
from dpo_kit.model.pair_model import PairModel
from dpo_kit.model.parallel import World
from dpo_kit.records.findings import Finding
from dpo_kit.system import folders

FILE_BYTES = 5 * 10**9  # of weights, but for a tensor that is larger; rank 0 holds a file's at a time
_OF_A_TOKENIZER = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    "additional_",
)


def write(
    model: PairModel,
    folder: Path,
    tokenizer: Any,
    world: World,
    *,
    dtype: torch.dtype,
    end_token_id: int,
    merged: bool = False,
    card: str = "",
) -> None:
    """Writes the policy as a Hugging Face folder; a collective, rank 0 writes.

    The folder appears at once and whole (written beside, then renamed; an older one is replaced).

    What lay beside the weights that it was trained from lies beside these, too.

    Args:
        tokenizer: saved beside; the files that it was loaded from as they are, where they are the model's own.
        end_token_id: the token that the trained texts end in; generation stops on it, on what the base stopped on,
            and on the tokenizer's EOS.
        dtype: of the weights written, from the master weights.
        merged: write a whole model also where there are adapters.
        card: text of README.md.
    """
    only_adapters = model.adapted and not merged
    # A collective a tensor: nobody holds more of the whole model than one, and rank 0 one file.
    weights = (lora.adapter_weights if only_adapters else lora.whole_weights)(model)
    if not world.is_main:
        for _ in weights:
            pass
    else:
        with folders.staged(folder, "replace") as part:
            written = ((name, whole.detach().to("cpu", dtype)) for name, whole in weights)
            config = _config_of_export(model, str(dtype).removeprefix("torch."))
            if only_adapters:
                _write_adapters(model, dict(written), part)
            else:
                lasting = model.lm.state_dict().keys()
                buffers = ((name, value.cpu()) for name, value in model.lm.named_buffers() if name in lasting)
                _write_weights(part, chain(written, buffers))
                _write_json(part / "config.json", config)
            is_own = tokenizer.name_or_path == model.source
            if not is_own:
                tokenizer.save_pretrained(part)
            for name, content in model.side_files.items():
                if name != "config.json" and (is_own or not _is_of_a_tokenizer(name)):
                    (part / name).parent.mkdir(exist_ok=True)
                    (part / name).write_bytes(content)
            generation = _generation_of_export(model, tokenizer, end_token_id, config)
            _write_json(part / "generation_config.json", generation)
            if card:
                (part / "README.md").write_text(card, encoding="utf-8")
    world.barrier()


def _write_weights(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Writes weights as they come, file by file, with the index where there are several, as transformers reads them."""
    from safetensors.torch import save_file

    numbers: dict[str, int] = {}
    num_bytes = 0
    for number, held in enumerate(_by_file(weights)):
        save_file(held, folder / f"{number}.safetensors", metadata={"format": "pt"})
        numbers |= dict.fromkeys(held, number)
        num_bytes += sum(value.nbytes for value in held.values())
    count = 1 + max(numbers.values())
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if count == 1:
        names = [model_folder.WEIGHTS]
    else:
        index = {
            "metadata": {"total_size": num_bytes},
            "weight_map": {k: names[n] for k, n in numbers.items()},
        }
        _write_json(folder / model_folder.INDEX, index)
    for number, name in enumerate(names):
        (folder / f"{number}.safetensors").rename(folder / name)


def _by_file(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    held: dict[str, Tensor] = {}
    for name, value in weights:
        if held and sum(other.nbytes for other in held.values()) + value.nbytes > FILE_BYTES:
            yield held
            held.clear()  # whoever took it is done with it
        held[name] = value.contiguous()
    yield held


def _write_adapters(model: PairModel, state: dict[str, Tensor], part: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, part / model_folder.ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (part / model_folder.ADAPTER_CONFIG).write_text(
        lora.config_text(model.lm, model.source), encoding="utf-8"
    )


def _write_json(file: Path, made: dict[str, Any]) -> None:
    # Not strict: an Infinity in the base's file stays one.
    file.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_of_a_tokenizer(name: str) -> bool:
    return name.startswith(_OF_A_TOKENIZER) or name.endswith((".model", ".tiktoken"))


def _config_of_export(model: PairModel, dtype: str) -> dict[str, Any]:
    """The config.json that the model was loaded with, and what is another now."""
    made = json.loads(model.side_files["config.json"])
    made["architectures"] = [type(model.lm).__name__]
    for field in [name for name in ("torch_dtype", "dtype") if name in made] or ["dtype"]:
        made[field] = dtype
    if not getattr(model.lm.config, "tie_word_embeddings", True):
        made["tie_word_embeddings"] = False
    made.pop("transformers_weights", None)  # names a file that the export does not have
    return made


def _generation_of_export(
    model: PairModel, tokenizer: Any, end_token_id: int, config: dict[str, Any]
) -> dict[str, Any]:
    """The generation config that the model came with; it ends where the trained texts do, too."""
    made: dict[str, Any] = {}
    # There may be none, or one that transformers leaves out as well.
    with contextlib.suppress(KeyError, ValueError, TypeError):
        made = dict(json.loads(model.side_files["generation_config.json"]))
    made.pop("_from_model_config", None)  # it would be made anew from config.json
    known = made.get("eos_token_id", config.get("eos_token_id"))
    ends = [end_token_id, *(known if isinstance(known, list) else [known]), tokenizer.eos_token_id]
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    made["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    for name, value in (("bos_token_id", tokenizer.bos_token_id), ("pad_token_id", pad)):
        if made.get(name) is None and value is not None:
            made[name] = value
    return made


BLOCKS = "▁▂▃▄▅▆▇█"
CURVES = ("dpo/loss", "dpo/reward_margin", "dpo/reward_accuracy", "dpo/chosen_reward", "dpo/rejected_reward")


def sparkline(values: list[float], width: int = 48) -> str:
    """A curve as one line of text: means of `width` equal parts, drawn between their least and greatest."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    parts = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(parts), max(parts) - min(parts)
    return "".join(BLOCKS[int((v - low) / span * (len(BLOCKS) - 1) + 0.5) if span else 0] for v in parts)


def model_card(config: Config, metrics: list[dict[str, Any]], found: Sequence[Finding] = ()) -> str:
    """Markdown of a run's settings, final numbers and curves.

    Args:
        metrics: the lines of `metrics.jsonl` so far.
        found: what a reader of the numbers should know.
    """
    steps = [m for m in metrics if "dpo/loss" in m]
    evaluations = [m for m in metrics if "dpo-eval/loss" in m]
    told = [f"- {finding.level}: {finding.text}" for finding in found]
    lines = [
        "---",
        f"library_name: {'peft' if config.actor.use_lora and not config.saver.merged else 'transformers'}",
        "tags: [dpo, preference-optimization, dpo-kit]",
        "---",
        f"# {config.experiment_name}",
        "",
        f"`{config.actor.path}` trained on preference pairs of `{config.train_dataset.path}` with "
        f"[DPO](https://arxiv.org/abs/2305.18290) (`{config.actor.loss_type}`, beta {config.actor.beta:g}), "
        f"{len(steps)} step{'s' * (len(steps) != 1)}. Generation stops on the end token it was trained with.",
        "",
        *_adapters(config),
        *(["## What the checks found", "", *told, ""] if found else []),
        "## Curves",
        "",
        "| metric | first | last | over the steps |",
        "|---|---|---|---|",
    ]
    for name in CURVES:
        values = [m[name] for m in steps if m.get(name) is not None]
        if values:
            first = "undefined" if steps[0].get(name) is None else f"{values[0]:.4g}"
            lines.append(f"| `{name}` | {first} | {values[-1]:.4g} | `{sparkline(values)}` |")
    if evaluations:
        lines += [
            "",
            "## Held-out pairs",
            "",
            "| step | loss | reward accuracy | reward margin |",
            "|---|---|---|---|",
        ]
        for m in evaluations:
            accuracy = m["dpo-eval/reward_accuracy"]
            shown = "undefined (all ties)" if accuracy is None else f"{accuracy:.1%}"
            lines.append(
                f"| {m['step']} | {m['dpo-eval/loss']:.4f} | {shown} | {m['dpo-eval/reward_margin']:.4g} |"
            )
    lines += ["", "## Configuration", "", "```yaml", config_module.to_yaml(config).rstrip(), "```", ""]
    return "\n".join(lines)


def _adapters(config: Config) -> list[str]:
    """What a reader must know of a model that was trained by adapters."""
    actor = config.actor
    if not actor.use_lora:
        return []
    layers = ", ".join(actor.target_modules) or "all linear layers"
    how = f"load them with `PeftModel.from_pretrained(base, folder)`, the base being `{actor.path}`"
    if config.saver.merged:
        how = "they are merged into the weights here"
    return [
        f"Trained are low-rank adapters of {layers} (rank {actor.lora_rank}, alpha {actor.lora_alpha}); {how}.",
        "",
    ]
