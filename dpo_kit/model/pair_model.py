"""The policy and the frozen reference: built empty, sharded, then filled from safetensors.

Each rank reads its own part of the files (memory-mapped), one tensor at a time, so that nobody ever holds more of a
large model than is its own. Only safetensors are read, remote code is never run.

Not here: what the model computes on a micro-batch beyond calling it (engine), built-in names (`builtin`), what lies
in a folder (`model_folder`), writing one (`export`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_kit.errors import UserError
from dpo_kit.model import attention, blocks, builtin, lora, model_folder, split_sizes, tensor_parallel
from dpo_kit.model.costs import Shape
from dpo_kit.model.logprobs import LogprobHead, logps_of_logits
from dpo_kit.model.packing import MicroBatch
from dpo_kit.model.parallel import World, add_masters, copy_into, shard


class PairModel(nn.Module):
    """A causal language model that answers a packed micro-batch with the log-probs of its scored tokens.

    Args:
        lm: of transformers.
        packed: its attention is `attention.packed_attention`; else each text of a row (packed without sharing)
            is run as a padded row of its own, by the model's own attention.
        source: where it was loaded from, and the small files that lie there (`model_folder.side_files`), for `export`.
        adapted: it has adapters (`lora`).
    """

    def __init__(
        self,
        lm: Any,
        packed: bool = True,
        source: str = "",
        side_files: dict[str, bytes] | None = None,
        adapted: bool = False,
    ):
        super().__init__()
        self.lm, self.packed, self.source, self.side_files = lm, packed, source, side_files or {}
        self.adapted = adapted

    @cached_property
    def shape(self) -> Shape | None:
        """The model's sizes; None of a family that calls them by other names."""
        try:
            return Shape.of(self.lm.config.to_dict())
        except (KeyError, ValueError):
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

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[PairModel]:
        """What runs inside sees the weights that training began with, and no dropout; only adapters are left out."""
        if not self.adapted:
            yield self
            return
        was_training = self.training
        try:
            with lora.off(self.lm):
                yield self.eval()
        finally:
            self.train(was_training)

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


def preload() -> None:
    """Imports what `load` needs of transformers: as long as torch itself, for any model's class."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401


def why_unpacked(path: str, longest_tokens: int) -> str:
    """Why a model cannot be run on packed rows, in words; empty where it can.

    Args:
        path: local folder, hub id or built-in name.
        longest_tokens: longest text of the data.
    """
    return attention.unsupported(_config(builtin.folder(path)), longest_tokens)


def load(
    path: str,
    world: World,
    *,
    dtype: torch.dtype,
    trainable: bool,
    gradient_checkpointing: bool | str,
    longest_tokens: int,
    compiled: bool = False,
    adapters: lora.Options | None = None,
) -> PairModel:
    """Loads a model that `check` accepts, for scoring or training, sharded over `world`.

    Args:
        path: local folder, hub id or built-in name.
        dtype: what it computes in; a trainable model keeps fp32 masters beside it, a frozen one does not.
        trainable: parameters require gradients.
        gradient_checkpointing: run each block again in the backward instead of keeping its activations;
            `selective` keeps what is dear to run again.
        longest_tokens: longest text of the data; a model with a shorter attention window is not packed.
        compiled: compile each block.
        adapters: of a trainable model: they alone are trained, and the weights are kept in `dtype`.
    """
    folder = builtin.folder(path)
    config = _config(folder)
    # A float64 or frozen model is kept in the dtype it computes in; a trained one in fp32 at least.
    master = dtype if not trainable or dtype == torch.float64 else torch.float32
    unpacked = attention.unsupported(config, longest_tokens)
    packed = not unpacked
    if world.tp_size > 1 and (why := unpacked or split_sizes.problem(config.to_dict(), world.tp_size)):
        raise UserError(f"{path}: cannot be split over t = {world.tp_size} tensor-parallel ranks: {why}")
    alone = world.size == 1
    held = dtype if alone or adapters else master
    if packed and config.tie_word_embeddings and model_folder.has_own_head(model_folder.tensors(folder)):
        config.tie_word_embeddings = False
    lm = _empty(config, held) if packed else _whole(folder, held)
    lm.requires_grad_(trainable)
    if adapters:
        lora.add(lm, adapters, dtype if alone else master)
    layers = list(getattr(getattr(lm, "model", None), "layers", []))
    blocks.recompute(layers, gradient_checkpointing if trainable else False)
    if compiled:
        blocks.compile_blocks(layers, dynamic=True)
    sides = model_folder.side_files(folder) if trainable and world.is_main else None
    model = PairModel(lm, packed, builtin.ensure(path), sides, adapted=adapters is not None)
    if world.tp_size > 1:
        tensor_parallel.split(lm, world.mesh["tp"])
    if not alone:
        shard(model, world, dtype)
    if packed:
        model.to_empty(device=world.device)
        rotary = lm.model.rotary_emb
        lm.model.rotary_emb = type(rotary)(config=config).to(world.device)
        if alone and getattr(config, "tie_word_embeddings", False):
            lm.lm_head.weight = lm.model.embed_tokens.weight  # to_empty made two of it
    else:
        model.to(world.device)
    if alone and dtype != master:
        add_masters(model, master)
    if adapters:
        lora.fill(lm, adapters)
    if packed:
        _fill(model, folder)
    elif alone and dtype != master and not adapters:
        exact = dict(_whole(folder, master).named_parameters())
        for name, param in lm.named_parameters():
            copy_into(param, exact[name])
    return model.train(trainable)


def check(folder: Path) -> Any:
    """Refuses a folder that transformers would not load cleanly, by transformers' own word.

    It loads the folder onto the meta device: names and shapes are compared, no weight is read.

    Returns:
        The model as it was loaded, without weights.

    Raises:
        UserError: files that are damaged or missing, an unknown kind of model, weights that are missing, left over
            or of another shape than config.json says.
    """
    from transformers import AutoModelForCausalLM

    model_folder.read_config(folder)
    held = model_folder.tensors(folder)
    with quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except Exception as error:  # of any kind: a field of config.json may be anything
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{folder}: transformers cannot load this model ({said[:300]})") from error
    found: dict[str, Any] = loaded[1]
    missing, left = found["missing_keys"], found["unexpected_keys"]
    shapes = [
        f"{name} is {tuple(is_)}{_in_file(held, name)}, by config.json {tuple(should)}"
        for name, is_, should in sorted(found["mismatched_keys"])
    ]
    problems = [
        *([f"weights are missing: {_some(missing)}"] if missing else []),
        *([f"weights have no place in the model that config.json describes: {_some(left)}"] if left else []),
        *shapes[:3],
    ]
    if missing and all(name.endswith("lm_head.weight") for name in missing):
        problems[0] += " (where it is the embedding, config.json should say tie_word_embeddings: true)"
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}; give the weights and the config.json of one model")
    return loaded[0]


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown}, ... ({len(names)} in all)"


def _in_file(held: dict[str, model_folder.Weight], name: str) -> str:
    return f" in {held[name].file.name}" if name in held else ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and its report, which say in twenty lines what an error says in one."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def text_config(folder: Path) -> Any:
    """The configuration of the language model in a folder, transformers' defaults filled in."""
    return _config(folder).get_text_config()


def positions(config: Any) -> int | None:
    """The longest text that a model can be given, tokens; None where it has no limit.

    Args:
        config: of transformers; with rope scaling the positions are those that it stretches to.
    """
    most = getattr(config, "max_position_embeddings", None)
    if not most or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    for scaled in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if scaled.get("rope_type", "default") != "default":
            original = scaled.get("original_max_position_embeddings") or config.max_position_embeddings
            most = max(most, int(original * (scaled.get("factor") or 1)))
    return most


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

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    lm, told = loaded
    _refuse_changed(folder, sorted(told["missing_keys"]))
    head = lm.get_output_embeddings()
    if head is not None and head.weight is not lm.get_input_embeddings().weight:
        lm.config.tie_word_embeddings = False  # whatever config.json says
    return lm


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability of the model to 0, those of attention included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Some hand a number to a function: attention_dropout, layerdrop.
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


@torch.no_grad()
def _fill(model: PairModel, folder: Path) -> None:
    """Reads the weights, after `check`: what has no place in the model is what transformers leaves out, too."""
    from safetensors import safe_open

    named = model.lm.named_parameters(remove_duplicate=True)
    params = {lora.plain_name(name): param for name, param in named if not lora.is_adapter(name)}
    missing, other = set(params), []
    for name, weight in model_folder.tensors(folder).items():
        if (place := _place(name, params)) is not None:
            param = params[place]
            if weight.shape != param.shape:
                other.append(name)
                continue
            # Opened for one tensor: until it is closed, all that was read of a file counts as this process's memory.
            with safe_open(weight.file, framework="pt") as file:
                copy_into(param, file.get_slice(name))
            missing.discard(place)
    _refuse_changed(folder, [*other, *sorted(missing)])
    on_meta = [n for n, b in model.named_buffers() if b.is_meta]
    assert not on_meta, f"buffers without values: {on_meta}"


def _refuse_changed(folder: Path, names: Sequence[str]) -> None:
    """`check` has seen a folder whose weights are all there: one that is short of some has changed since."""
    if names:
        first = ", ".join(names[:3])
        raise UserError(
            f"{folder}: weights are missing or of another shape ({first}); were its files changed since the run began?"
        )


def _place(name: str, params: dict[str, Any]) -> str | None:
    """The parameter that a tensor of a file belongs to; None for what is left out.

    Files may name the decoder without `model.` before it. Of a tied head and embedding there may be both or one.
    """
    if name.endswith("lm_head.weight") and "lm_head.weight" not in params:
        name = "model.embed_tokens.weight"
    return next((n for n in (name, name.removeprefix("model."), f"model.{name}") if n in params), None)
