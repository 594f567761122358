"""Bytes of a step: parts by hand, activations against what autograd really keeps, settings that fit."""

from __future__ import annotations

import copy
import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpo_kit.engine import state
from dpo_kit.model import builtin, costs
from dpo_kit.model.costs import Shape
from dpo_kit.model.packing import pack
from tests.helpers import one_rank, random_pairs, store_of, tiny_config

SHAPE = Shape(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocab=100, tied=True)
GIB = 2**30


@pytest.fixture
def config(tmp_path):
    made = tiny_config(tmp_path, "actor.dtype=float32", "actor.gradient_checkpointing=false")
    return made


def parts(config, num_ranks=1, tokens=10, shape=SHAPE):
    return costs.step_bytes(shape, config, num_ranks=num_ranks, tokens=tokens)


def test_the_parts_of_a_model_by_hand(config):
    # A block: attention 8 * 4 * (2 * 2 + 2 * 1) = 192, gated layer 3 * 8 * 16 = 384; two blocks and 8 * 100.
    params = 2 * (192 + 384) + 800
    found = parts(config)
    assert found["weights"] == found["gradients"] == 4 * params
    assert found["optimizer"] == 8 * params
    assert found["reference"] == found["copies"] == 0


def test_ranks_share_what_is_sharded(config):
    one, two = parts(config), parts(config, num_ranks=2)
    for name in ("weights", "gradients", "optimizer"):
        assert two[name] == one[name] // 2, name
    assert two["activations"] == one["activations"]
    # FSDP2 gathers the tied head and two blocks, here all there is.
    assert two["copies"] == one["weights"]


def test_tensor_parallel_ranks_split_all_but_the_hidden_states(config):
    shape = replace(SHAPE, kv_heads=2)
    one = parts(config, shape=shape)
    config.actor.backend = "fsdp:d1t2"
    two = parts(config, num_ranks=2, shape=shape)
    for name in ("weights", "gradients", "optimizer", "working"):
        assert two[name] == one[name] // 2, name
    # A token and layer: 2 norms of 3 * 8 values; queries, output, keys, values 4 * 8 and gated layer 4 * 16, halved.
    assert one["activations"] == 10 * 2 * 4 * (48 + 32 + 64)
    assert two["activations"] == 10 * 2 * 4 * (48 + 16 + 32)
    four = parts(config, num_ranks=4, shape=shape)
    assert four["weights"] == two["weights"] // 2
    assert four["activations"] == two["activations"]


def test_bfloat16_keeps_float32_masters(config):
    whole = parts(config)
    config.actor.dtype = "bfloat16"
    half = parts(config)
    assert half["weights"] == whole["weights"]
    assert half["optimizer"] == whole["optimizer"]
    assert half["copies"] == whole["weights"] // 2
    assert half["activations"] < 0.7 * whole["activations"]


def test_optimizer_states_in_bfloat16_take_half(config):
    whole = parts(config)["optimizer"]
    config.actor.optimizer.state_dtype = "bfloat16"
    assert parts(config)["optimizer"] == whole // 2


def test_an_online_reference_is_a_second_model(config):
    config.ref.logps, config.ref.dtype = "online", "bfloat16"
    found = parts(config)
    assert found["reference"] == found["weights"] // 2


def test_adapters_by_hand(config):
    whole = parts(config)
    config.actor.use_lora, config.actor.lora_rank, config.actor.dtype, config.ref.dtype = (
        True,
        2,
        *["bfloat16"] * 2,
    )
    config.ref.logps = "online"
    # Inputs and outputs of q 8+8, k and v 8+4, o 8+8, gate and up 8+16, down 16+8: 128; rank 2, two blocks.
    adapters = 2 * 2 * 128
    found, half = parts(config), whole["weights"] // 2
    assert found["weights"] == half + 4 * adapters
    assert found["copies"] == 2 * adapters
    assert found["gradients"] == 4 * adapters
    assert found["optimizer"] == 8 * adapters
    assert found["reference"] == 0  # the same weights with the adapters off
    assert costs.checkpoint_bytes(SHAPE, config) == 12 * adapters
    assert costs.export_bytes(SHAPE, config) == 2 * adapters
    config.saver.merged = True
    assert costs.export_bytes(SHAPE, config) == half
    config.ref.dtype = "float32"
    assert parts(config)["reference"] == whole["weights"]
    config.actor.target_modules = ["self_attn.q_proj", "v_proj"]
    assert costs.trained_params(SHAPE, config) == 2 * 2 * (16 + 12)
    config.actor.target_modules = ["c_attn"]  # of a family whose layers are not known: as if all
    assert costs.trained_params(SHAPE, config) == adapters


@pytest.mark.parametrize("adapters", ["false", "true"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["false", "true", "selective"])
def test_activations_are_what_autograd_keeps(tmp_path, dtype, checkpointing, adapters):
    overrides = (
        *(f"actor.dtype={dtype}", f"actor.gradient_checkpointing={checkpointing}"),
        *(f"actor.use_lora={adapters}", "actor.lora_rank=8"),
    )
    config = tiny_config(tmp_path, *overrides)
    store = store_of(random_pairs(40, longest=60), tmp_path / "pairs")
    shape = Shape.of(json.loads((Path(builtin.ensure("tiny-random")) / "config.json").read_text()))
    rows = list(range(len(store)))
    batch = pack([store.pair(r) for r in rows], rows, share=True)
    with one_rank() as world:
        policy = state.load_model(config, "actor", world, [store], trainable=True)
        kept = _kept_by_blocks(policy, batch, hidden=checkpointing == "selective")
    tokens = batch.input_ids.shape[1]
    assert costs.kept_bytes(shape, config) == pytest.approx(kept / tokens, rel=0.15)


def _kept_by_blocks(policy, batch, hidden) -> int:
    """Bytes of distinct tensors that the blocks' forward leaves behind for the backward, weights left out.

    Args:
        hidden: count what autograd's hooks do not see, too.
    """
    kept, layers = {}, policy.lm.model.layers
    tensors = []

    def save(tensor):
        tensors.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    layers[0].register_forward_pre_hook(lambda *_: hooks.__enter__(), prepend=True)

    def ends(*_):
        hooks.__exit__()
        tensors.extend(_new(before) if hidden else [])

    layers[-1].register_forward_hook(ends)
    before = {id(tensor) for tensor in _alive()}
    out = policy(batch)
    weights = {p.untyped_storage().data_ptr() for p in layers.parameters()}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
    del out
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def _alive():
    """Tensors that Python holds; what selective recomputation keeps is among them, unseen by autograd's hooks."""
    return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]


def _new(before):
    wide = 8  # smaller ones hold positions or a few numbers
    return [t for t in _alive() if id(t) not in before and t.is_floating_point() and t.shape[-1:] >= (wide,)]


def test_what_fits_fits_and_one_token_more_does_not(config):
    free = GIB
    tokens = costs.tokens_that_fit(SHAPE, config, num_ranks=1, free_bytes=free)
    assert 0 < tokens < costs.MOST_TOKENS
    assert sum(parts(config, tokens=tokens).values()) <= free < sum(parts(config, tokens=tokens + 1).values())


def test_nothing_fits_where_the_weights_do_not(config):
    least = sum(parts(config, tokens=0).values())
    assert costs.tokens_that_fit(SHAPE, config, num_ranks=1, free_bytes=least - 1) == 0


LARGE = Shape(
    layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, tied=True
)


@pytest.mark.parametrize("share_of_need", [0.6, 0.8, 0.95])
def test_the_remedy_fits(config, share_of_need):
    longest = 2000
    needed = sum(parts(config, tokens=longest, shape=LARGE).values())
    free = int(share_of_need * needed)
    said = costs.remedy(LARGE, config, num_ranks=1, free_bytes=free, longest=longest)
    tried = copy.deepcopy(config)
    for setting in said.removeprefix("use ").split():
        field, value = setting.split("=")
        section = tried.actor.mb_spec if "mb_spec" in field else tried.actor
        known = {"true": True, "false": False}
        setattr(section, field.rpartition(".")[2], known.get(value, value))
    tokens = int(tried.actor.mb_spec.max_tokens_per_mb)
    assert tokens >= longest
    assert sum(parts(tried, tokens=tokens, shape=LARGE).values()) <= free


def test_a_micro_batch_that_is_only_too_large_is_made_smaller(config):
    free = sum(parts(config, tokens=1000, shape=LARGE).values())
    said = costs.remedy(LARGE, config, num_ranks=1, free_bytes=free, longest=800)
    assert said == "use actor.mb_spec.max_tokens_per_mb=1000 or less (the longest pair has 800 tokens)"


def test_what_no_setting_makes_fit_is_said(config):
    said = costs.remedy(LARGE, config, num_ranks=1, free_bytes=GIB, longest=800)
    assert "no setting makes it fit; use a smaller model" in said
    assert "800 tokens" in said
