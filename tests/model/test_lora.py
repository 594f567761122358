"""Adapters of a model: the base without them, exports that peft and transformers read, any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_kit import cli, launch
from dpo_kit import config as config_module
from dpo_kit.engine import step
from dpo_kit.engine.optimizer import make_optimizer
from dpo_kit.errors import UserError
from dpo_kit.model import builtin, export, lora, model_folder, packing, pair_model, parallel
from dpo_kit.preferences import open_store
from dpo_kit.records import metrics, run_folder
from dpo_kit.tools import samples
from tests.helpers import make_engine, one_rank, random_pairs, store_of, tiny_config, train_tiny
from tests.model.test_pair_model import small_model
from tests.model.test_parallel import GEMMA, GPT2, other_family

ROOT = Path(__file__).parents[2]
LORA = ("actor.use_lora=true", "actor.lora_rank=4")
IDS = torch.arange(3, 40)[None]
MODELS = {
    "llama tied": lambda folder: small_model(folder, "llama", 2, tied=True),
    "qwen2 untied": lambda folder: small_model(folder, "qwen2", 2),
    "gpt2": lambda folder: other_family(folder, **GPT2),  # not packed, and its layers are Conv1D
    "gemma2": lambda folder: other_family(folder, **GEMMA),
}


def trained(world, folder, *overrides):
    """An engine of a few pairs whose adapters have made a few large steps."""
    config = tiny_config(folder / "runs", *LORA, *overrides)
    engine = make_engine(world, config, store_of(random_pairs(8), folder / "pairs"))
    optimizer = make_optimizer(engine.policy, config.actor.optimizer)
    batches = list(step.micro_batches(engine, engine.train, range(8), 150))
    for _ in range(3):
        step.train_step(engine, optimizer, batches, 8, 3e-2)
    return engine


def logps(engine):
    return step.reference_pass(engine, engine.policy.eval(), engine.train, range(8))


def logits(model):
    given = {"segments": packing.Segments(torch.tensor([[0, IDS.shape[1], 0]]))} if model.packed else {}
    return model.lm(input_ids=IDS, use_cache=False, **given).logits


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_with_adapters_off_the_base_answers_bit_for_bit(tmp_path, dtype):
    with one_rank() as world:
        engine = trained(world, tmp_path, f"actor.dtype={dtype}")
        base = make_engine(world, tiny_config(tmp_path / "base", f"actor.dtype={dtype}"), engine.train)
        assert torch.equal(engine.ref_train, base.ref_train)
        with engine.policy.as_reference():
            assert np.array_equal(logps(engine), base.ref_train.numpy())
        assert np.abs(logps(engine) - base.ref_train.numpy()).min() > 0.01


@pytest.mark.parametrize("kind", MODELS)
def test_exports_answer_as_the_trained_model_does(tmp_path, kind):
    path = MODELS[kind](tmp_path / "m")
    with one_rank() as world:
        places = (f"actor.path={path}", f"ref.path={path}", "actor.dtype=float32", "ref.first_step_check=off")
        engine = trained(world, tmp_path, *places)
        with torch.no_grad():
            here = logits(engine.policy.eval())
            with engine.policy.as_reference() as reference:
                before = logits(reference)
        options = {"dtype": torch.float32, "end_token_id": 1, "card": "# a model\n"}
        tokenizer = builtin.load_tokenizer("tiny-random")
        for name, merged in (("adapter", False), ("merged", True)):
            export.write(engine.policy, tmp_path / name, tokenizer, world, merged=merged, **options)
    assert (here - before).abs().max() > 1e-2
    for name in ("adapter", "merged"):
        again = samples.load_plain(str(tmp_path / name), "float32", path)
        with torch.no_grad():
            assert (again(input_ids=IDS).logits - here).abs().max() < 1e-4
        assert (tmp_path / name / "tokenizer.json").is_file()
        assert (tmp_path / name / "README.md").is_file()
    pair_model.check(tmp_path / "merged")
    with pytest.raises(UserError, match=r"holds an adapter .* saver\.merged=true"):
        model_folder.read_config(tmp_path / "adapter")


def test_targets_are_the_layers_named_and_all_but_the_head_by_default(tmp_path):
    path = small_model(tmp_path / "m", "qwen2", 2)
    with one_rank() as world:

        def adapted(*targets):
            options = lora.Options(rank=2, alpha=4, targets=targets, seed=1)
            given = {"trainable": True, "gradient_checkpointing": False, "longest_tokens": 20}
            model = pair_model.load(path, world, dtype=torch.float32, adapters=options, **given)
            return {name.split(".lora_")[0].rpartition(".")[2] for name in parallel.masters(model)}, model

        all_linear, model = adapted()
        assert all_linear == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert adapted("layers.1.self_attn.q_proj", "mlp.up_proj")[0] == {"q_proj", "up_proj"}
        assert not [n for n, p in model.named_parameters() if p.requires_grad != lora.is_adapter(n)]
        with pytest.raises(
            UserError, match=r"target_modules: qproj, lm_head are no .* has q_proj, k_proj, v_"
        ):
            adapted("qproj", "v_proj", "lm_head")


def test_first_values_depend_on_the_seed_alone(tmp_path):
    def first(dtype, seed):
        with one_rank() as world:
            config = tiny_config(tmp_path, *LORA, f"actor.dtype={dtype}", f"seed={seed}")
            engine = make_engine(world, config, store_of(random_pairs(2), tmp_path / f"{dtype}-{seed}"))
            return [p.detach().float() for p in parallel.masters(engine.policy).values()]

    double = first("float64", 1)
    assert all(map(torch.equal, double, first("bfloat16", 1)))
    assert not any(map(torch.equal, double[::2], first("float64", 2)[::2]))
    assert not any(b.any() for b in double[1::2])
    assert double[0].abs().max() == pytest.approx(1 / 8, rel=0.05)  # uniform within 1 / sqrt(64)


# --- ranks ----------------------------------------------------------------------------------------------------

# family, tied, shared
SHAPES = [("llama", True, True), ("llama", False, False), ("qwen2", False, True), ("qwen2", True, False)]


def runs_of(folder, num_ranks):
    """Losses and gradient norms of 20 steps, by case."""
    found = {}
    for family, tied, share in SHAPES:
        for dtype in ("float64", "float32", "bfloat16"):
            name = f"{family}-{tied}-{share}"
            path = str(Path(folder) / name)
            overrides = (
                *(*LORA, "actor.optimizer.lr=1e-4", f"actor.path={path}", f"ref.path={path}"),
                *(f"actor.dtype={dtype}", f"actor.share_prompt={str(share).lower()}"),
                *(f"actor.backend=fsdp:d{num_ranks}", "actor.mb_spec.max_tokens_per_mb=150"),
            )
            runs = str(Path(folder) / f"{name}-{dtype}-{num_ranks}")
            steps = train_tiny(runs, overrides)
            found[name, dtype] = [[r["dpo/loss"], r["grad_norm"]] for r in steps]
    return found


def test_ranks_do_not_change_the_steps(ranks, tmp_path):
    for family, tied, share in SHAPES:
        small_model(tmp_path / f"{family}-{tied}-{share}", family, 2, tied=tied)
    alone, (both, other) = runs_of(str(tmp_path), 1), ranks.run(runs_of, str(tmp_path), 2)
    assert both == other
    for case, steps in alone.items():
        one, two = np.array(steps), np.array(both[case])
        loss, norm = {"float64": (1e-9, 1e-7), "float32": (1e-5, 1e-3), "bfloat16": (5e-3, 0.1)}[case[1]]
        assert one.shape == (20, 2)
        assert np.abs(one - two)[:, 0].max() < loss, case
        assert (np.abs(one - two) / one)[:, 1].max() < norm, case
        assert one[-1, 0] != one[0, 0]


def merged_of(folder, path, num_ranks):
    """The whole weights after a few large steps; every rank has them."""
    with one_rank() as world:
        pairs = Path(folder) / "pairs"
        if world.is_main and not pairs.exists():
            store_of(random_pairs(8), pairs)
        world.barrier()
        places = (f"actor.path={path}", f"ref.path={path}", f"actor.backend=fsdp:d{num_ranks}")
        config = tiny_config(Path(folder) / "runs", *LORA, *places, "ref.logps=online")
        engine = make_engine(world, config, open_store(pairs))
        assert engine.ref_model is engine.policy
        optimizer = make_optimizer(engine.policy, config.actor.optimizer)
        for _ in range(3):
            batches = list(step.micro_batches(engine, engine.train, range(8), 150))
            step.train_step(engine, optimizer, batches, 8, 3e-2)
        return {name: whole.numpy() for name, whole in lora.whole_weights(engine.policy)}


@pytest.mark.parametrize("kind", ["llama tied", "gpt2"])
def test_ranks_merge_the_weights_that_one_rank_merges(ranks, tmp_path, kind):
    path = MODELS[kind](tmp_path / "m")
    alone = merged_of(str(tmp_path / "1"), path, 1)
    both = ranks.run(merged_of, str(tmp_path / "2"), path, 2)
    held = model_folder.tensors(Path(path))
    assert len(alone) in (len(held), len(held) + 1)  # a tied head is not written twice
    for name, weight in alone.items():
        for other in both:
            np.testing.assert_allclose(other[name], weight, atol=1e-7, rtol=0, err_msg=name)


# --- a real run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The run folder of `params/smoke.yaml` with adapters on two ranks, and exports on the way."""
    fileroot = tmp_path_factory.mktemp("smoke")
    overrides = [
        *(*LORA, f"cluster.fileroot={fileroot}", "cluster.n_gpus_per_node=0", "actor.backend=fsdp:d2"),
        *("saver.freq_steps=2", "saver.best=true", "evaluator.freq_steps=2", "recover.freq_steps=2"),
        *("recover.keep=all", "actor.dtype=bfloat16", "ref.logps=online"),
    ]
    assert launch.run_in_foreground(config_module.load(ROOT / "params" / "smoke.yaml", overrides)) == 0
    (run_dir,) = run_folder.list_runs(fileroot)
    return run_dir


def test_a_run_leaves_adapters_everywhere_and_samples_of_them(smoke, tmp_path, capsys):
    steps = [m for m in metrics.read_metrics(smoke) if "dpo/loss" in m]
    assert steps[0]["dpo/loss"] == pytest.approx(np.log(2), abs=1e-9)
    assert len({m["dpo/loss"] for m in steps}) == len(steps) == 4
    for name in ("model", "exports/best", "exports/step-2"):
        held = {path.name for path in (smoke / name).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= held
        assert not {"model.safetensors", "config.json"} & held
    assert (smoke / "model" / "README.md").read_text().startswith("---\nlibrary_name: peft\n")
    lines = [json.loads(line) for line in (smoke / "samples.jsonl").read_text().splitlines()]
    assert lines
    assert cli.main(["export", str(smoke), "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (
        smoke / "model" / "adapter_config.json"
    ).read_bytes()
    assert cli.main(["sample", str(smoke), "--prompt", "hello?"]) == 0
    assert "policy     " in capsys.readouterr().out


def test_an_adapter_is_no_base_to_train_from(smoke, tmp_path, capsys):
    overrides = [f"actor.path={smoke}/model", f"cluster.fileroot={tmp_path}", f"ref.path={smoke}/model"]
    config = config_module.load(ROOT / "params" / "smoke.yaml", overrides)
    with pytest.raises(
        UserError, match=r"actor\.path: .*model holds an adapter .* with saver\.merged=true writes"
    ):
        launch.start(config)


def test_a_fork_goes_on_with_the_adapters_and_writes_a_whole_model(smoke, capsys):
    told = ["saver.merged=true", "total_train_steps=5", "actor.optimizer.lr=1e-2", "trial_name=merged"]
    assert cli.main(["runs", "fork", str(smoke), "--step", "2", *told]) == 0
    capsys.readouterr()
    fork = smoke.parent / "merged"
    before, now = (
        [m["dpo/loss"] for m in metrics.read_metrics(run) if "dpo/loss" in m] for run in (smoke, fork)
    )
    assert before[:2] == now[:2]
    assert now[2] != now[0]
    pair_model.check(fork / "model")
    assert cli.main(["runs", "fork", str(smoke), "--step", "2", "actor.lora_rank=8"]) == 2
    assert "actor.lora_rank: 4 -> 8; to train those start a run" in capsys.readouterr().err
