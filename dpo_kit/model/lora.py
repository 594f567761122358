"""Low-rank adapters of frozen weights (LoRA, https://arxiv.org/abs/2106.09685), made by peft.

    y = W x + (alpha / rank) B A x        W: frozen (out, in), A: (rank, in) drawn from a seed, B: (out, rank) zeros

Before the first update B is zero, so the model is the base; with its adapters off it is the base always, bit for bit:
the reference of a run, with one copy of W in memory. Of a model with adapters only A and B are trained, kept and saved.

    model.layers.0.self_attn.q_proj.weight                            a linear layer of the base
    model.layers.0.self_attn.q_proj.base_layer.weight                 the same in a model with adapters: W
    model.layers.0.self_attn.q_proj.lora_A.default.weight             A, and lora_B: B
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    A in a file, as peft reads it

Not here: sharding and masters (`parallel`), reading W (`pair_model`), the files of an export (`export`).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpo_kit.config import Config
from dpo_kit.config.schema import ALL_LINEAR
from dpo_kit.errors import UserError
from dpo_kit.model.model_folder import NEEDS_PEFT
from dpo_kit.model.parallel import copy_into, full_tensor, weights

_ADAPTER = "default"  # peft's own name for the first
_BASE = ".base_layer."


@dataclass(frozen=True)
class Options:
    """What the adapters of a model are.

    Args:
        rank, alpha: see the module.
        targets: linear layers by name or the end of it (`q_proj`, `self_attn.q_proj`); none means all but the head.
        seed: of A; whatever the number of ranks.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]
    seed: int


def options(config: Config) -> Options | None:
    """The adapters that a run trains; None where it trains the weights themselves."""
    actor = config.actor
    if not actor.use_lora:
        return None
    targets = () if actor.target_modules == [ALL_LINEAR] else tuple(actor.target_modules)
    return Options(actor.lora_rank, actor.lora_alpha, targets, config.seed)


def linear_layers(lm: Any) -> list[str]:
    """Names of a model's linear layers, all but its head."""
    from transformers.pytorch_utils import Conv1D

    head = lm.get_output_embeddings()
    return [
        name
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def problem(targets: Sequence[str], layers: Sequence[str]) -> str:
    """What is wrong with the targets of `Options`, and what a model has; empty when each names a layer.

    Args:
        layers: from `linear_layers`.
    """
    wrong = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in layers)]
    if not wrong:
        return ""
    return (
        f"actor.target_modules: {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} no linear layer of the model"
        f" below its head; it has {', '.join(_ends(layers))}"
    )


def add(lm: Any, options: Options, dtype: torch.dtype) -> None:
    """Puts adapters beside the linear layers of a causal language model, in place and without values (see `fill`).

    Args:
        lm: of transformers, on any device, also meta.
        dtype: of the adapters.

    Raises:
        UserError: peft is missing, or a target is no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(NEEDS_PEFT) from error
    from transformers.pytorch_utils import Conv1D

    if wrong := problem(options.targets, linear_layers(lm)):
        raise UserError(wrong)

    made = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=list(options.targets) or _ends(linear_layers(lm)),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in lm.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.device("meta"):
        inject_adapter_in_model(made, lm, _ADAPTER)
    for layer in _layers(lm).values():
        device = layer.base_layer.weight.device
        for part in (layer.lora_A, layer.lora_B):
            part.to(dtype).to_empty(device=device)
    for name, param in lm.named_parameters():
        param.requires_grad_(is_adapter(name))


@torch.no_grad()
def fill(lm: Any, options: Options) -> None:
    """Gives new adapters their values: A as peft draws it, here from the seed, and zeros; each rank takes its rows."""
    generator = torch.Generator().manual_seed(options.seed)
    for layer in _layers(lm).values():
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        drawn = torch.empty(a.shape)  # in fp32, so that it does not depend on the dtype
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        copy_into(a, drawn)
        copy_into(b, torch.zeros(b.shape))


@contextlib.contextmanager
def off(lm: Any) -> Iterator[None]:
    """What runs inside sees the base alone.

    peft's own switch also changes `requires_grad`, which FSDP2 looks at once only: the flag alone is set here.
    """
    layers = _layers(lm).values()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is A or B of some layer."""
    return ".lora_A." in name or ".lora_B." in name


def plain_name(name: str) -> str:
    """The name that a weight of the base has in a model without adapters."""
    return name.replace(_BASE, ".")


@torch.no_grad()
def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a `pair_model.PairModel` by its plain name, adapters added to their layers. A collective."""
    held, layers = weights(model), _layers(model)
    for name, param in held.items():
        if is_adapter(name):
            continue
        whole, (owner, _, last) = full_tensor(param), name.rpartition(_BASE)
        if owner and last == "weight":
            a, b = (full_tensor(held[f"{owner}.{part}.{_ADAPTER}.weight"]) for part in ("lora_A", "lora_B"))
            change = (b @ a) * layers[owner].scaling[_ADAPTER]
            whole = whole.to(change.dtype) + (change.T if layers[owner].fan_in_fan_out else change)
        yield plain_name(name).removeprefix("lm."), whole


@torch.no_grad()
def adapter_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A and B of every layer of a `pair_model.PairModel`, by the names that peft's files have. A collective."""
    for name, param in weights(model).items():
        if is_adapter(name):
            plain = name.removeprefix("lm.").replace(f".{_ADAPTER}.", ".")
            yield f"base_model.model.{plain}", full_tensor(param)


def config_text(lm: Any, base: str) -> str:
    """adapter_config.json of a model with adapters.

    Args:
        base: where the base was loaded from.
    """
    made = {**lm.peft_config[_ADAPTER].to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in made.items()}
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def _ends(layers: Sequence[str]) -> list[str]:
    """The last parts of names, each once, in their order."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in layers))


def _layers(model: Any) -> dict[str, Any]:
    """The layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
