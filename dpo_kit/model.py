"""The policy and the frozen reference: built empty, sharded, then filled from safetensors; and written back.

Each rank reads the files itself, one tensor at a time (memory-mapped), and keeps its own rows, so that the
host never holds a second copy of a large model. Only safetensors are read, remote code is never run.

Not here: what the model computes on a micro-batch beyond calling it (`engine`), built-in names (`builtin`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_kit import attention, blocks, commit
from dpo_kit.costs import Shape
from dpo_kit.errors import UserError
from dpo_kit.files import atomic_write, read_json
from dpo_kit.logprobs import LogprobHead, logps_of_logits
from dpo_kit.packing import MicroBatch
from dpo_kit.parallel import World, add_masters, copy_into, full_tensor, masters, shard


class PairModel(nn.Module):
    """A causal language model that answers a packed micro-batch with the log-probs of its scored tokens.

    Args:
        lm: of transformers.
        packed: its attention is `attention.packed_attention`; else each text of a row (packed without sharing)
            is run as a padded row of its own, by the model's own attention.
    """

    def __init__(self, lm: Any, packed: bool = True):
        super().__init__()
        self.lm, self.packed = lm, packed

    @cached_property
    def shape(self) -> Shape | None:
        """The model's sizes; None of a family that calls them by other names."""
        try:
            return Shape.of(self.lm.config.to_dict())
        except KeyError:
            return None

    def forward(self, batch: MicroBatch) -> Tensor:
        """Log-prob of each scored token in nats. Shape: (S,)"""
        if not self.packed:
            return self._text_by_text(batch)
        hidden = self.lm.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            segments=batch.segments,
            use_cache=False,
        ).last_hidden_state[0]
        return self.lm.lm_head(hidden.index_select(0, batch.predictors), batch.targets)

    def _text_by_text(self, batch: MicroBatch) -> Tensor:
        lengths = batch.segments.lengths
        if lengths[:, 0].any():
            raise ValueError("a model that is not packed cannot share prompts; pack with share=False")
        sizes = lengths[:, 1:].flatten().numpy()
        device, longest = batch.input_ids.device, int(sizes.max())
        text = np.repeat(np.arange(len(sizes)), sizes)
        at = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes) + text * longest
        places = torch.from_numpy(at).to(device)
        ids = batch.input_ids.new_zeros(len(sizes) * longest)
        ids[places] = batch.input_ids[0]
        # No mask: padding stands behind every token that counts, and causal attention never looks there.
        logits = self.lm(input_ids=ids.view(len(sizes), longest), use_cache=False).logits
        # The head of another family may scale or cap its logits: only its own forward is right.
        return logps_of_logits(logits.flatten(0, 1)[places[batch.predictors]], batch.targets)


def snapshot(path: str) -> Path:
    """The local folder of a model: a folder as it is, a hub id through the hub's cache.

    Raises:
        UserError: no such folder and the hub cannot be reached or does not know it.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(path, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
        )
    except Exception as e:
        cause = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"actor.path = {path!r} is neither a local folder nor a model the hub gives ({cause}); "
            "give a folder with config.json and *.safetensors, or the built-in smollm2-135m-instruct"
        ) from e


def why_unpacked(path: str, longest_tokens: int) -> str:
    """Why a model cannot be run on packed rows, in words; empty where it can.

    Args:
        path: local folder or hub id.
        longest_tokens: longest text of the data.
    """
    return attention.unsupported(_config(snapshot(path)), longest_tokens)


def load(
    path: str,
    world: World,
    *,
    dtype: torch.dtype,
    trainable: bool,
    gradient_checkpointing: bool | str,
    longest_tokens: int,
    compiled: bool = False,
) -> PairModel:
    """Loads a model for scoring or training, sharded over `world`.

    Args:
        path: local folder or hub id (built-in names are resolved before).
        dtype: what it computes in; a trainable model keeps fp32 masters beside it, a frozen one does not.
        trainable: parameters require gradients.
        gradient_checkpointing: run each block again in the backward instead of keeping its activations;
            `selective` keeps what is dear to run again.
        longest_tokens: longest text of the data; a model with a shorter attention window is not packed.
        compiled: compile each block.
    """
    folder = snapshot(path)
    config = _config(folder)
    # A float64 or frozen model is kept in the dtype it computes in; a trained one in fp32 at least.
    master = dtype if not trainable or dtype == torch.float64 else torch.float32
    packed = not attention.unsupported(config, longest_tokens)
    held = dtype if world.size == 1 else master
    lm = _empty(config, held) if packed else _whole(folder, held)
    layers = list(getattr(getattr(lm, "model", None), "layers", []))
    blocks.recompute(layers, gradient_checkpointing if trainable else False)
    if compiled:
        blocks.compile_blocks(layers, dynamic=True)
    model = PairModel(lm, packed).requires_grad_(trainable)
    if world.size > 1:
        shard(model, world, dtype)
    if packed:
        model.to_empty(device=world.device)
        rotary = lm.model.rotary_emb
        lm.model.rotary_emb = type(rotary)(config=config).to(world.device)
        if world.size == 1 and getattr(config, "tie_word_embeddings", False):
            lm.lm_head.weight = lm.model.embed_tokens.weight  # to_empty made two of it
    else:
        model.to(world.device)
    if held != master:
        add_masters(model, master)
    if packed:
        _fill(model, folder)
    elif held != master:
        exact = dict(_whole(folder, master).named_parameters())
        for name, param in lm.named_parameters():
            copy_into(param, exact[name])
    return model.train(trainable)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _empty(config: Any, dtype: torch.dtype) -> Any:
    """A model without weights, its attention and its head replaced by ours."""
    from transformers import AutoModelForCausalLM

    attention.register()
    config.dtype = dtype
    with torch.device("meta"):
        lm: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).to(dtype)
        lm.lm_head = LogprobHead.from_linear(lm.lm_head)
    if getattr(config, "tie_word_embeddings", False):
        lm.lm_head.weight = lm.model.embed_tokens.weight
    return lm


def _whole(folder: Path, dtype: torch.dtype) -> Any:
    """A model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    weight_files(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability of the model to 0, those of attention included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in name order.

    Raises:
        UserError: there are none; pickled weights are named and refused.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        found = (
            f"only pickled weights ({', '.join(pickled)}), which can run code when loaded"
            if pickled
            else "none"
        )
        raise UserError(f"{folder}: needs *.safetensors weights, found {found}; convert with save_pretrained")
    return files


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in weight_files(folder):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                yield name, f.get_tensor(name)


@torch.no_grad()
def _fill(model: PairModel, folder: Path) -> None:
    params = dict(model.lm.named_parameters(remove_duplicate=True))
    missing = set(params)
    for name, tensor in _tensors(folder):
        if name in params:
            if params[name].shape != tensor.shape:
                raise UserError(
                    f"{folder}: {name} is {tuple(tensor.shape)}, its config says {tuple(params[name].shape)}"
                )
            copy_into(params[name], tensor)
            missing.discard(name)
        elif name != "lm_head.weight":
            raise UserError(f"{folder}: weight {name!r} has no place in the model its config.json describes")
    if missing:
        raise UserError(
            f"{folder}: weights are missing: {', '.join(sorted(missing)[:3])} ({len(missing)} in all)"
        )
    on_meta = [n for n, b in model.named_buffers() if b.is_meta]
    assert not on_meta, f"buffers without values: {on_meta}"


def fingerprint(path: str, cache: Path | None = None) -> str:
    """sha256 over the config and weight files: two folders with equal content have one fingerprint.

    Args:
        cache: a JSON file that remembers file hashes by path, size and time, so that large files are read once.
    """
    folder = snapshot(path)
    known: dict[str, str] = read_json(cache, {}) if cache else {}
    total = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text())
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(key, None)
    total.update(json.dumps(config, sort_keys=True).encode())
    for file in weight_files(folder):
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in known:
            with file.open("rb") as f:
                known[key] = hashlib.file_digest(f, "sha256").hexdigest()
            if cache:
                cache.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(cache, json.dumps(known, indent=1))
        total.update(known[key].encode())
    return total.hexdigest()


def export(
    model: PairModel,
    folder: Path,
    tokenizer: Any,
    world: World,
    *,
    dtype: torch.dtype,
    end_token_id: int,
    card: str = "",
) -> None:
    """Writes the policy as a Hugging Face folder; a collective, rank 0 writes.

    The folder appears at once and whole (written beside, then renamed; an older one is replaced).

    Args:
        tokenizer: saved beside.
        end_token_id: the token that the trained texts end in; generation stops on it and on the tokenizer's EOS.
        dtype: of the weights written, from the master weights.
        card: text of README.md.
    """
    state: dict[str, Tensor] = {}
    for name, param in masters(model).items():
        whole = full_tensor(param)
        if world.is_main:
            state[name.removeprefix("lm.")] = whole.detach().to("cpu", dtype)
    if world.is_main:
        with commit.replaced(folder) as part:
            _write_files(model.lm, state, part, tokenizer, dtype, end_token_id, card)
    world.barrier()


def _write_files(
    lm: Any,
    state: dict[str, Tensor],
    part: Path,
    tokenizer: Any,
    dtype: torch.dtype,
    end_token_id: int,
    card: str,
) -> None:
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoConfig, GenerationConfig

    save_torch_state_dict(state, part, metadata={"format": "pt"})
    config = AutoConfig.for_model(**{**lm.config.to_dict(), "dtype": str(dtype).removeprefix("torch.")})
    config.architectures = [type(lm).__name__]
    config.save_pretrained(part)
    ends = list(dict.fromkeys(i for i in (end_token_id, tokenizer.eos_token_id) if i is not None))
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    ).save_pretrained(part)
    tokenizer.save_pretrained(part)
    if card:
        (part / "README.md").write_text(card, encoding="utf-8")
