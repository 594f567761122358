"""On one CUDA card, in minutes: what no test without one can show. `pytest -m gpu tests/test_cuda.py`.

Not here: speed (benchmarks/gpu.sh), several cards.
"""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dpo_kit.engine import reference, schedule, state, step, token_budget, worker
from dpo_kit.engine.optimizer import make_optimizer
from dpo_kit.model import costs, packing, pair_model, parallel
from dpo_kit.model.parallel import full_tensor, masters
from dpo_kit.records import metrics
from dpo_kit.system.files import read_json
from tests.engine.test_worker import make_run
from tests.helpers import make_engine, random_pairs, store_of, tiny_config
from tests.model.test_pair_model import PAIRS, plain_logps, plain_margin, small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="tests/test_cuda.py needs a CUDA device"),
]
ON_CARD = ("cluster.n_gpus_per_node=1", "actor.backend=fsdp:d1", "ref.backend=fsdp:d1")
WEIGHTS = torch.linspace(0.5, 2, len(PAIRS), dtype=torch.float64)


@pytest.fixture
def world():
    """One NCCL rank on the card, which is empty again afterwards."""
    with parallel.alone(cuda=True) as made:
        yield made
    gc.collect()
    torch.cuda.empty_cache()


def settings(tmp_path, *overrides):
    """The tiny run on the card."""
    return tiny_config(tmp_path, *ON_CARD, *overrides)


# ---------------------------------------------------------------- the same numbers


def packed(path, world, dtype, *, share):
    """Weighted margin of the packed model: log-probs and gradients, in float64 on the host."""
    policy = pair_model.load(
        path, world, dtype=dtype, trainable=True, gradient_checkpointing="selective", longest_tokens=64
    )
    batch = packing.pack(PAIRS, range(len(PAIRS)), share=share).to(world.device)
    chosen, rejected = step.response_logps(policy, batch)
    ((chosen - 0.5 * rejected) * WEIGHTS.to(world.device)).sum().backward()
    grads = {name.removeprefix("lm."): full_tensor(p.grad) for name, p in masters(policy).items()}
    return on_host(chosen, rejected, grads)


def plain(path, world, dtype):
    """The same of transformers' own forward in `dtype`, text by text."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(world.device)

    def logps(ids, start):
        row = torch.tensor(np.asarray(ids), dtype=torch.long, device=world.device)[None]
        logits = lm(input_ids=row).logits[0, :-1].float()
        return torch.log_softmax(logits, -1).gather(-1, row[0, 1:, None])[max(start, 1) - 1 :].double().sum()

    chosen = torch.stack([logps(p.chosen_ids, p.prompt) for p in PAIRS])
    rejected = torch.stack([logps(p.rejected_ids, p.prompt) for p in PAIRS])
    ((chosen - 0.5 * rejected) * WEIGHTS.to(world.device)).sum().backward()
    return on_host(chosen, rejected, {name: p.grad for name, p in lm.named_parameters()})


def on_host(chosen, rejected, grads):
    logps = torch.stack([chosen, rejected]).detach().double().cpu()
    return logps, {name: grad.double().cpu() for name, grad in grads.items()}


def errors(found, truth):
    """Largest error of a log-prob in nats, and of a gradient relative to its norm."""
    logps, grads = truth
    apart = max(float((found[1][name] - grads[name]).norm() / grads[name].norm()) for name in found[1])
    return float((found[0] - logps).abs().max()), apart


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("family", [("llama", 4, False), ("qwen2", 2, True)], ids=lambda f: f[0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_rows_equal_the_plain_model(tmp_path, world, dtype, family, share):
    path = small_model(tmp_path / "m", *family)
    chosen, rejected, grads = plain_margin(path, WEIGHTS)
    truth = on_host(chosen, rejected, grads)
    ours = errors(packed(path, world, dtype, share=share), truth)
    if dtype == torch.float32:
        assert ours[0] <= 1e-3
        assert ours[1] <= 1e-4
        return
    # bf16 is judged by the plain path in bf16: no worse against the truth, but for luck.
    theirs = errors(plain(path, world, dtype), truth)
    assert ours[0] <= 2 * theirs[0] + 1e-2
    assert ours[1] <= 2 * theirs[1] + 1e-2


def test_the_plain_path_of_this_file_is_that_of_the_model_tests(tmp_path, world):
    from transformers import AutoModelForCausalLM

    path = small_model(tmp_path / "m")
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected = torch.stack([plain_logps(lm, p.chosen_ids, p.prompt) for p in PAIRS]).detach().double()
    torch.testing.assert_close(plain(path, world, torch.float32)[0][0], expected, atol=1e-3, rtol=0)


# ---------------------------------------------------------------- nothing waits


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("adapters", ["false", "true"], ids=["whole", "lora"])
@pytest.mark.parametrize("recompute", ["false", "true", "selective"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_in_a_step_waits_for_the_card(tmp_path, world, dtype, recompute, adapters):
    if adapters == "true":
        pytest.importorskip("peft")
    config = settings(
        tmp_path,
        f"actor.dtype={dtype}",
        f"actor.gradient_checkpointing={recompute}",
        f"actor.use_lora={adapters}",
    )
    engine = make_engine(world, config, store_of(random_pairs(40), tmp_path / "pairs"))
    optimizer = make_optimizer(engine.policy, config.actor.optimizer)

    def batches(number):
        rows = schedule.step_rows(config, 40, number)
        return list(step.micro_batches(engine, engine.train, rows, 200))

    step.train_step(engine, optimizer, batches(1), 8, 1e-4)  # the first one makes states and workspaces
    second = batches(2)
    assert len(second) > 1
    with waiting_is_an_error():
        sums, norm, _ = step.train_step(engine, optimizer, second, 8, 1e-4)
    assert torch.isfinite(norm)
    assert sums[0] == 8


def test_a_wait_would_be_seen(world):
    value = torch.ones((), device=world.device)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match=r"(?i)synchroniz"):
        value.item()


# ---------------------------------------------------------------- NCCL, memory


def test_collectives_of_one_nccl_rank(world):
    assert world.mesh.get_group("dp")._get_backend(world.device).name() == "nccl"
    here = torch.arange(4.0, device=world.device)
    dist.all_reduce(here)
    dist.broadcast(here, 0)
    out = [torch.empty_like(here)]
    dist.all_gather(out, here)
    assert torch.equal(out[0], here)
    assert here.tolist() == [0, 1, 2, 3]
    assert not world.any(False)  # on the CPU, beside it
    dist.all_reduce(torch.ones(1))


def test_auto_is_measured_on_the_card(tmp_path, world):
    run_dir = make_run(
        tmp_path,
        *ON_CARD,
        "actor.dtype=bfloat16",
        "actor.mb_spec.max_tokens_per_mb=auto",
        "total_train_steps=2",
    )
    worker.run(run_dir, world, lambda: False)
    made = read_json(run_dir / "budget.json")
    assert (made["source"]["actor"], made["halvings"]) == ("measured", [])
    assert made["longest_pair"] <= made["largest"]["actor"] <= made["actor"] <= token_budget.CUDA_TOKENS
    assert [line["step"] for line in metrics.read_metrics(run_dir) if "dpo/loss" in line] == [1, 2]


def test_a_real_out_of_memory_halves_and_training_goes_on(tmp_path, world):
    auto = ("actor.mb_spec.max_tokens_per_mb=auto", "train_dataset.batch_size=2000", "total_train_steps=1")
    config = settings(tmp_path, "actor.dtype=bfloat16", "actor.gradient_checkpointing=false", *auto)
    store = store_of(random_pairs(2000), tmp_path / "pairs")
    engine = make_engine(world, config, store)
    run_costs = packing.pair_costs(store.all_lengths(), True)
    made = token_budget.estimated(engine, run_costs, None, {})
    torch.cuda.reset_peak_memory_stats()
    assert token_budget.measured(engine, run_costs, None, made)["actor"] == made["actor"]
    peak, rest = torch.cuda.max_memory_reserved(), torch.cuda.memory_reserved()
    limit = rest + (peak - rest) // 2
    torch.cuda.set_per_process_memory_fraction(
        limit / torch.cuda.get_device_properties(world.device).total_memory
    )
    try:
        settled = token_budget.measured(engine, run_costs, None, made)
        assert made["longest_pair"] <= settled["actor"] < made["actor"]
        engine.actor_tokens = settled["actor"]
        batches = list(
            step.micro_batches(engine, store, schedule.step_rows(config, 2000, 1), engine.max_tokens)
        )
        assert len(batches) > 1
        optimizer = make_optimizer(engine.policy, config.actor.optimizer)
        sums, norm, _ = step.train_step(engine, optimizer, batches, 2000, 1e-4)
        assert torch.isfinite(norm)
        assert sums[0] == 2000
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("recompute", ["false", "true", "selective"])
def test_the_estimate_against_what_a_step_allocates(tmp_path, world, recompute):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    model_config = AutoConfig.for_model("llama", **sizes, **heads, max_position_embeddings=2048)
    path = tmp_path / "m"
    AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).save_pretrained(path)
    overrides = (
        "actor.dtype=bfloat16",
        f"actor.gradient_checkpointing={recompute}",
        "train_dataset.batch_size=128",
    )
    config = settings(tmp_path, *overrides, f"actor.path={path}", f"ref.path={path}")
    store = store_of(random_pairs(128, longest=80), tmp_path / "pairs")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine = state.build(config, world, store)
    reference.prepare(engine)
    optimizer = make_optimizer(engine.policy, config.actor.optimizer)
    for _ in range(2):  # the second finds the optimizer's states
        torch.cuda.reset_peak_memory_stats()
        batches = list(step.micro_batches(engine, store, np.arange(128), engine.max_tokens))
        step.train_step(engine, optimizer, batches, 128, 1e-5)
    tokens = max(batch.input_ids.shape[1] for batch in batches)
    parts = costs.step_bytes(engine.policy.shape, config, num_ranks=1, tokens=tokens)
    expected = sum(parts.values()) - parts["process"]
    assert 0.8 <= expected / (torch.cuda.max_memory_allocated() - before) <= 1.25


# ---------------------------------------------------------------- again


def test_a_deterministic_run_goes_on_with_the_same_bits(tmp_path, world):
    def run(name, stop_after=None):
        options = ("actor.dtype=bfloat16", "actor.deterministic=true", "total_train_steps=8")
        (tmp_path / name).mkdir()
        run_dir = make_run(tmp_path / name, *ON_CARD, *options)
        if stop_after:
            with pytest.raises(state.Stopped):
                worker.run(run_dir, world, lambda: len(losses(run_dir)) >= stop_after)
        worker.run(run_dir, world, lambda: False)
        return losses(run_dir)

    def losses(run_dir: Path):
        return [
            (line["dpo/loss"], line["grad_norm"])
            for line in metrics.read_metrics(run_dir)
            if "dpo/loss" in line
        ]

    try:
        whole = run("whole")
        assert len(whole) == 8
        assert run("stopped", 3) == whole
    finally:
        torch.use_deterministic_algorithms(False)
