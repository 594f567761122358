"""One rank without FSDP2 against FSDP2 over one rank, bit for bit; models that cannot be packed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from dpo_kit.engine import step
from dpo_kit.engine.optimizer import make_optimizer
from dpo_kit.model import packing, pair_model, parallel
from tests.helpers import make_engine, one_rank, random_pairs, store_of, tiny_config
from tests.model.test_pair_model import small_model

PAIRS = random_pairs(6, seed=3)


def trained(folder, dtype, monkeypatch, *, sharded):
    """Losses and master weights after a few steps of two micro-batches each."""
    with one_rank() as world, monkeypatch.context() as patch:
        config = tiny_config(folder, f"actor.dtype={dtype}", "ref.first_step_check=off")
        if sharded:
            load = pair_model.load

            def load_sharded(path, world, **options):
                """As for several ranks: what `pair_model.load` does where the world is larger."""
                two = parallel.World(0, 2, world.device, world.mesh)
                return load(path, two, **options)

            patch.setattr(pair_model, "load", load_sharded)
        state = make_engine(world, config, store_of(random_pairs(8), folder / "pairs"))
        assert any(isinstance(m, parallel.FSDPModule) for m in state.policy.modules()) == sharded
        optimizer = make_optimizer(state.policy, config.actor.optimizer)
        batches = list(step.micro_batches(state, state.train, range(8), 150))
        assert len(batches) == 2
        losses = [float(step.train_step(state, optimizer, batches, 8, 1e-3)[0][1]) for _ in range(4)]
        weights = {n: parallel.full_tensor(p).clone() for n, p in parallel.masters(state.policy).items()}
    return losses, weights


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_one_rank_without_fsdp_equals_fsdp_bit_for_bit(tmp_path, monkeypatch, dtype):
    plain = trained(tmp_path / "a", dtype, monkeypatch, sharded=False)
    sharded = trained(tmp_path / "b", dtype, monkeypatch, sharded=True)
    assert len(set(plain[0])) == 4
    assert plain[0] == sharded[0]
    assert plain[1].keys() == sharded[1].keys()
    for name, weight in plain[1].items():
        assert weight.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        assert torch.equal(weight, sharded[1][name]), name


def test_ranks_that_share_their_pairs_count_once(ranks):
    """`dp_rank` and `sum` follow the mesh; who writes and what is gathered does not."""
    assert ranks.run(two_ranks_of_one_pair) == [(rank, 2, 0, 1, 1.0, [0, 1], 0) for rank in range(2)]


def two_ranks_of_one_pair():
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    world = dataclasses.replace(parallel.init_world(cuda=False), mesh=mesh)
    total = float(world.sum(torch.ones(())))
    told = world.gather(world.rank), world.of_main(world.rank)
    return world.rank, world.size, world.dp_rank, world.dp_size, total, *told


def plain_sums(path, window_free=False):
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    sums = []
    for pair in PAIRS:
        for ids in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor(ids, dtype=torch.long)[None]
            logps = torch.log_softmax(lm(input_ids=ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])
            sums.append(logps[max(pair.prompt, 1) - 1 :].sum())
    return torch.stack(sums).view(-1, 2)


def windowed(folder):
    """A Mistral whose window of 16 tokens is shorter than most texts."""
    import json
    from pathlib import Path

    path = Path(small_model(folder, "mistral", 2))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "sliding_window": 16}))
    return str(path)


def other_family(folder, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**options)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


GPT2 = {"model_type": "gpt2", "vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
GEMMA = {
    **{"model_type": "gemma2", "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"sliding_window": 16, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0},
}
UNPACKED = {
    "a short window": windowed,
    "gpt2": lambda folder: other_family(folder, **GPT2),
    "soft caps": lambda folder: other_family(folder, **GEMMA),
}


@pytest.mark.parametrize("kind", UNPACKED)
def test_what_is_not_packed_gets_its_own_attention_and_the_same_numbers(tmp_path, kind):
    path = UNPACKED[kind](tmp_path / "m")
    longest = max(len(p.chosen_ids) for p in PAIRS)
    assert pair_model.why_unpacked(path, longest)
    with one_rank() as world:
        options = {"trainable": True, "gradient_checkpointing": False, "longest_tokens": longest}
        policy = pair_model.load(path, world, dtype=torch.float64, **options)
        assert not policy.packed
        batch = packing.pack(PAIRS, range(6), share=False)
        found = torch.stack(step.response_logps(policy.eval(), batch), 1)
        torch.testing.assert_close(found, plain_sums(path), atol=1e-6, rtol=0)  # Gemma's softmax is fp32
        found.sum().backward()
        assert all(p.grad is not None for p in parallel.masters(policy).values())
        with pytest.raises(ValueError, match="share=False"):
            policy(packing.pack(PAIRS, range(6), share=True))
        half = pair_model.load(path, world, dtype=torch.bfloat16, **options)
        exact = {n: p for n, p in policy.lm.named_parameters()}
        for name, param in half.lm.named_parameters():
            assert param.dtype == torch.bfloat16
            torch.testing.assert_close(param.master.double(), exact[name], atol=1e-7, rtol=0)
