"""Prompts answered by the reference and by the policy, side by side: `python -m dpo_kit.tools.samples RUN_DIR`.

A process of its own: the weights are read back from the run's export through plain transformers, which also
shows that the export loads; a failure here never fails the run. Prompts are token ids from the pair store, so
they have the layout that the run was trained with. Reference and policy draw from the same seeds.

Not here: judging answers (`ranking`, `analysis`), showing them (`notebook`).
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_kit import config as config_module
from dpo_kit.config import Config
from dpo_kit.dataset import tokens
from dpo_kit.dataset.layouts import ASSISTANT_MARK, CONVERSATION, RAW
from dpo_kit.errors import ExitStatus, UserError
from dpo_kit.model import builtin, model_folder
from dpo_kit.model.pair_model import preload, quiet
from dpo_kit.model.parallel import DTYPES
from dpo_kit.preferences import PairStore, open_store
from dpo_kit.records import checkpoint_folders, manifest, status
from dpo_kit.system import processes
from dpo_kit.system.files import atomic_write, read_json, to_json

BATCH = 20


def distinct_prompts(store: PairStore, most: int) -> list[tuple[list[int], int]]:
    """The first `most` different prompts of a store, as (token ids, source row)."""
    seen: dict[tuple[int, ...], int] = {}
    for i in range(len(store)):
        if len(seen) >= most:
            break
        pair = store.pair(i)
        ids = tuple(int(t) for t in pair.chosen_ids[: pair.context])
        if ids and ids not in seen:
            seen[ids] = pair.index
    return [(list(ids), row) for ids, row in seen.items()]


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    done: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """New tokens for each prompt, without the end token.

    Args:
        model: a transformers causal language model.
        prompts: token ids; batches are left-padded.
        end_ids: tokens that end an answer.
        temperature: 0 takes the likeliest token.
        seed: batch b draws from seed + b, whatever the model.
        done: prompts that earlier calls answered, for `progress`.
        progress: called with the number of prompts answered.
    """
    answers: list[list[int]] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[end_ids[0]] * (width - len(p)) + list(p) for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        torch.manual_seed(seed + start // BATCH)
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            # transformers would cut to the 50 likeliest tokens by itself.
            sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_ids),
            pad_token_id=end_ids[0],
            **sampling,
        )
        for row in out[:, width:].tolist():
            ends = [i for i, token in enumerate(row) if token in end_ids]
            answers.append(row[: ends[0]] if ends else row)
        progress(done + len(answers))
    return answers


def load_plain(path: str, dtype: str, base: str = "") -> Any:
    """A model as anyone would load it from its folder, on the GPU when there is one.

    Args:
        path: of a model, or of adapters.
        base: what adapters are put on: the place that their folder names may be of another machine.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    is_adapter = (Path(path) / model_folder.ADAPTER_CONFIG).is_file()
    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            builtin.folder(base if is_adapter else path),
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
        )
    if is_adapter:
        from peft import PeftModel

        with warnings.catch_warnings():  # peft asks transformers by a name that transformers has given up
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(model, path)
    # Sampling is stated in full by `generate`; defaults that a model ships (top_k, ...) must not mix in.
    model.generation_config = GenerationConfig()
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def latest_export(run_dir: Path) -> Path:
    """The newest weights of a run: `model/`, else the last of `exports/step-N/`.

    Raises:
        UserError: the run has written none yet.
    """
    steps = [run_dir / "exports" / f"step-{step}" for step in checkpoint_folders.steps(run_dir / "exports")]
    for folder in [run_dir / "model", *reversed(steps)]:
        if any((folder / name).is_file() for name in ("config.json", model_folder.ADAPTER_CONFIG)):
            return folder
    raise UserError(f"{run_dir} has no exported model yet; wait for the run to end, or set saver.freq_steps")


def answer(
    config: Config,
    run_dir: Path,
    prompts: list[list[int]],
    end_ids: list[int],
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, list[list[int]]]:
    """Answers of the run's reference and of its newest export, as token ids, under "reference" and "policy"."""
    options = config.evaluator
    models = {
        "reference": (config.ref.path, config.ref.dtype),
        "policy": (str(latest_export(run_dir)), config.actor.dtype),
    }
    found: dict[str, list[list[int]]] = {}
    for name, (path, dtype) in models.items():
        found[name] = generate(
            load_plain(path, dtype, config.actor.path),
            prompts,
            end_ids=end_ids,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.samples_seed,
            done=len(found) * len(prompts),
            progress=progress,
        )
    return found


def end_tokens(run_dir: Path, tokenizer: Any) -> list[int]:
    """What ends an answer: what the newest export stops on (the trained end token), and the tokenizer's EOS."""
    exported = read_json(latest_export(run_dir) / "generation_config.json", {}).get("eos_token_id")
    trained = exported if isinstance(exported, list) else [exported]
    return list(dict.fromkeys(i for i in (*trained, tokenizer.eos_token_id) if i is not None))


def write_samples(run_dir: Path) -> int:
    """Answers held-out prompts (training prompts where there is no validation set) and writes `samples.jsonl`.

    Returns:
        Number of prompts answered.
    """
    config = config_module.load(run_dir / "config.yaml")
    data = read_json(run_dir / "data.json")
    store = open_store(Path(data.get("valid") or data["train"]))
    picked = distinct_prompts(store, config.evaluator.num_samples)
    if not picked:
        return 0
    prompts = [ids for ids, _ in picked]
    tokenizer = builtin.load_tokenizer(config.tokenizer_path or config.actor.path)

    def progress(done: int) -> None:
        status.write_progress(run_dir, phase="samples", done=done, total=2 * len(prompts))

    progress(0)
    answers = answer(config, run_dir, prompts, end_tokens(run_dir, tokenizer), progress)
    lines = []
    for i, (ids, row) in enumerate(picked):
        line: dict[str, Any] = {"index": row, "seed": config.evaluator.samples_seed + i // BATCH}
        line["prompt"] = tokenizer.decode(ids, skip_special_tokens=False)
        for name in ("reference", "policy"):
            line[name] = _text(tokenizer, answers[name][i])
            line[f"{name}_tokens"] = len(answers[name][i])
        lines.append(to_json(line) + "\n")
    atomic_write(run_dir / "samples.jsonl", "".join(lines))
    return len(lines)


def ask(run_dir: Path, texts: Sequence[str]) -> list[dict[str, str]]:
    """Answers a user's own prompts by reference and policy, in the layout the run was trained with.

    Args:
        texts: what a person would say; wrapped in the run's chat template or in HH-RLHF's plain layout.

    Returns:
        One `{"prompt", "reference", "policy"}` a text.
    """
    config = config_module.load(run_dir / "config.yaml")
    # In the manifest, because the run may have been copied to where its pair store is not.
    layout = manifest.read(run_dir).get("data", {}).get("train", {}).get("layout", RAW)
    tokenizer = builtin.load_tokenizer(config.tokenizer_path or config.actor.path)
    prompts = [prompt_ids(tokenizer, layout, text) for text in texts]
    answers = answer(config, run_dir, prompts, end_tokens(run_dir, tokenizer))
    names = ("reference", "policy")
    return [
        {"prompt": text, **{name: _text(tokenizer, answers[name][i]) for name in names}}
        for i, text in enumerate(texts)
    ]


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def prompt_ids(tokenizer: Any, layout: str, text: str) -> list[int]:
    """Token ids that ask for an answer to `text`: what the pair store of this layout holds before an answer.

    Args:
        tokenizer: a fast tokenizer.
        layout: of the pair store (`layouts`). Raw text that does not say who speaks is put as HH-RLHF does.
        text: what a person says.
    """
    is_chat = layout == CONVERSATION
    turn_end = tokens.probe_turn_end(tokenizer, "of the run") if is_chat else None
    encoder = tokens.make_encoder(tokenizer, "of the run", turn_end)
    if is_chat:
        messages = tokens.protect(encoder, [{"role": "user", "content": text}])
        text = tokens.adopt(encoder, tokens.render(tokenizer, messages, True))
        text += tokens.make_chat(encoder, "of the run").header
        # A template that ends in a space: the model has seen it as part of an answer's first token only.
        encoding = tokens.encode(encoder, [text + "the"])[0]
        ids = encoding.ids[: tokens.tokens_within(encoding, len(text))]
        return [int(i) for i in tokens.finish(encoder, ids, plain=False, add_eos=False)[0]]
    if layout == RAW and "\n\nHuman:" not in text:
        text = f"\n\nHuman: {text}{ASSISTANT_MARK}"
    ids = tokens.encode(encoder, [text])[0].ids
    return [int(i) for i in tokens.finish(encoder, ids, plain=True, add_eos=False)[0]]


def main(run_dir: Path) -> int:
    """Makes the samples of a run; its exit status. The cause of a failure stands in `logs/samples.error.json`."""
    try:
        write_samples(run_dir)
    except Exception as error:
        status.write_rank_error(run_dir, "samples", error)
        traceback.print_exc()
        return ExitStatus.FAILED
    return ExitStatus.DONE


if __name__ == "__main__":
    preload()
    processes.imported()
    processes.leave(main(Path(sys.argv[1])))
