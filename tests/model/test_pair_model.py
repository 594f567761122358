"""The packed model against plain transformers, row by row; loading, exporting, fingerprints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_kit.engine import step
from dpo_kit.errors import UserError
from dpo_kit.model import attention, builtin, export, model_folder, packing, pair_model
from dpo_kit.model.parallel import full_tensor, masters
from tests.helpers import one_rank, pair_of, random_pairs

PAIRS = [
    *random_pairs(4, seed=3),
    pair_of(0, 1, 4),
    pair_of(1, 3, 1),
    pair_of(5, 1, 1),
    pair_of(9, 2, 6, prompt=4),
]


def small_model(
    folder: Path, model_type: str = "llama", kv_heads: int = 4, tied: bool = False, **sizes: int
) -> str:
    """A random model of one of the supported families, saved as anyone would."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8} | sizes
    config = AutoConfig.for_model(
        model_type,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        sliding_window=None,
        tie_word_embeddings=tied,
        **sizes,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def plain_logps(lm, ids, start):
    """Log-prob of a response by full logits: the code that packing and chunking stand for."""
    ids = torch.tensor(np.asarray(ids), dtype=torch.long)[None]
    logits = lm(input_ids=ids).logits[0, :-1]
    logps = torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0]
    return logps[max(start, 1) - 1 :].sum()


def plain_margin(path, weights):
    """Weighted chosen minus rejected over all pairs, and its gradients, in float64."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    chosen = torch.stack([plain_logps(lm, p.chosen_ids, p.prompt) for p in PAIRS])
    rejected = torch.stack([plain_logps(lm, p.rejected_ids, p.prompt) for p in PAIRS])
    ((chosen - 0.5 * rejected) * weights).sum().backward()
    return chosen.detach(), rejected.detach(), {n: p.grad for n, p in lm.named_parameters()}


def packed_margin(world, path, weights, *, share, checkpointing, dtype=torch.float64):
    policy = pair_model.load(
        path,
        world,
        dtype=dtype,
        trainable=True,
        gradient_checkpointing=checkpointing,
        longest_tokens=64,
    )
    batch = packing.pack(PAIRS, range(len(PAIRS)), share=share)
    chosen, rejected = step.response_logps(policy, batch)
    ((chosen - 0.5 * rejected) * weights).sum().backward()
    grads = {n.removeprefix("lm."): full_tensor(p.grad) for n, p in masters(policy).items()}
    return chosen.detach(), rejected.detach(), grads


FAMILIES = [
    ("llama", 4, False),
    ("llama", 1, True),
    ("qwen2", 2, True),
    ("qwen3", 2, False),
    ("mistral", 2, False),
    ("mistral", 1, False),
    ("qwen2", 4, False),
    ("qwen3", 1, True),
]
BOUNDS = {torch.float64: (1e-10, 1e-6), torch.float32: (1e-4, 1e-5)}


def assert_equals_plain(path, *, share, checkpointing, dtype=torch.float64):
    """Against float64 log-probs in nats, absolute, and gradients, relative to each weight's norm."""
    weights = torch.linspace(0.5, 2, len(PAIRS), dtype=torch.float64)
    truth = plain_margin(path, weights)
    with one_rank() as world:
        found = packed_margin(world, path, weights, share=share, checkpointing=checkpointing, dtype=dtype)
    logps, relative = BOUNDS[dtype]
    for a, b in zip(truth[:2], found[:2], strict=True):
        torch.testing.assert_close(a, b, atol=logps, rtol=0)
    assert found[2].keys() <= truth[2].keys()
    for name, grad in found[2].items():
        assert (grad - truth[2][name]).norm() <= relative * truth[2][name].norm(), name


def test_the_pairs_hold_every_awkward_length():
    """Prefixes of 0 and 1 token, scoring from inside the prefix, responses of one token."""
    shared = {p.shared for p in PAIRS}
    tails = {len(ids) - p.shared for p in PAIRS for ids in (p.chosen_ids, p.rejected_ids)}
    assert {0, 1} <= shared
    assert {1} <= tails
    assert any(p.prompt < p.shared for p in PAIRS)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: "-".join(map(str, f)))
def test_packed_rows_equal_each_row_alone(tmp_path, family):
    path = small_model(tmp_path / "m", *family)
    assert_equals_plain(path, share=True, checkpointing=False)
    assert_equals_plain(path, share=True, checkpointing=False, dtype=torch.float32)
    assert_equals_plain(path, share=False, checkpointing=True)
    assert_equals_plain(path, share=True, checkpointing="selective")


def see_everything(*args, **kwargs):
    """Planted bug: R sees C."""
    p, c, r = kwargs["segments"].lengths.T
    kwargs["segments"] = packing.Segments(torch.stack([p + c, 0 * c, r], 1))
    return attention.packed_attention(*args, **kwargs)


def test_a_planted_mask_bug_is_caught(tmp_path, monkeypatch):
    from transformers import AttentionInterface

    path = small_model(tmp_path / "m")
    monkeypatch.setattr(
        attention, "register", lambda: AttentionInterface.register(attention.NAME, see_everything)
    )
    with pytest.raises(AssertionError):
        assert_equals_plain(path, share=True, checkpointing=False)


@pytest.mark.parametrize("field", ["position_ids", "predictors"])
def test_planted_position_and_boundary_bugs_are_caught(tmp_path, monkeypatch, field):
    path = small_model(tmp_path / "m")
    pack = packing.pack

    def wrong(*args, **kwargs):
        batch = pack(*args, **kwargs)
        if field == "position_ids":
            batch.position_ids = torch.arange(batch.position_ids.shape[1])[None]
        else:
            batch.predictors = (batch.predictors + 1).clamp(max=batch.input_ids.shape[1] - 1)
        return batch

    monkeypatch.setattr(packing, "pack", wrong)
    with pytest.raises(AssertionError):
        assert_equals_plain(path, share=True, checkpointing=False)


def test_a_pairs_log_prob_does_not_depend_on_its_pack_mates(tmp_path):
    with one_rank() as world, torch.no_grad():
        policy = pair_model.load(
            small_model(tmp_path / "m"),
            world,
            dtype=torch.float64,
            trainable=False,
            gradient_checkpointing=False,
            longest_tokens=64,
        )
        together = step.response_logps(policy, packing.pack(PAIRS, range(len(PAIRS)), share=True))
        for i, pair in enumerate(PAIRS):
            alone = step.response_logps(policy, packing.pack([pair], [0], share=True))
            torch.testing.assert_close(alone[0][0], together[0][i], atol=1e-11, rtol=0)
            torch.testing.assert_close(alone[1][0], together[1][i], atol=1e-11, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_loads_with_equal_logits(tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    path = small_model(tmp_path / "m", tied=tied)
    tokenizer = builtin.load_tokenizer(builtin.ensure("tiny-random"))
    with one_rank() as world:
        policy = load_for_training(path, world)
        step.response_logps(policy, packing.pack(PAIRS, range(len(PAIRS)), share=True))
        for _ in range(2):  # the second export replaces the first
            export.write(
                policy,
                tmp_path / "out",
                tokenizer,
                world,
                dtype=torch.float32,
                end_token_id=7,
                card="# hello",
            )
    a, b = (AutoModelForCausalLM.from_pretrained(p) for p in (path, tmp_path / "out"))
    ids = torch.arange(20)[None]
    assert torch.equal(a(ids).logits, b(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert ends == [7, 2, tokenizer.eos_token_id]  # trained, the base's, the tokenizer's
    assert (tmp_path / "out" / "README.md").read_text() == "# hello"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def load_for_training(path, world):
    return pair_model.load(
        path, world, dtype=torch.float32, trainable=True, gradient_checkpointing=False, longest_tokens=64
    )


def export_on_ranks(path, out):
    with one_rank() as world:
        tokenizer = builtin.load_tokenizer(builtin.ensure("tiny-random"))
        policy = load_for_training(path, world)
        export.write(policy, Path(out), tokenizer, world, dtype=torch.float32, end_token_id=7)


def test_two_ranks_export_the_weights_they_loaded(ranks, tmp_path):
    from safetensors.torch import load_file

    path = small_model(tmp_path / "m", kv_heads=1)
    ranks.run(export_on_ranks, path, str(tmp_path / "out"))
    before, after = (load_file(Path(p) / "model.safetensors") for p in (path, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_fingerprint_is_of_content(tmp_path):
    path = Path(small_model(tmp_path / "m"))
    cache = tmp_path / "known.json"
    whole = model_folder.fingerprint(str(path), cache)
    assert model_folder.fingerprint(str(path), cache) == model_folder.fingerprint(str(path)) == whole
    shutil.copytree(path, tmp_path / "copy")
    assert model_folder.fingerprint(str(tmp_path / "copy")) == whole
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert model_folder.fingerprint(str(path)) != whole
    data = bytearray((tmp_path / "copy" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(data)
    assert model_folder.fingerprint(str(tmp_path / "copy")) != whole


def test_models_that_cannot_be_served_are_refused_in_words(tmp_path):
    from safetensors.torch import load_file, save_file

    path = Path(small_model(tmp_path / "m"))
    weights = load_file(path / "model.safetensors")
    save_file({n: w for n, w in weights.items() if "norm" not in n}, path / "model.safetensors")
    with pytest.raises(UserError, match=r"weights are missing: model\.layers\.0"):
        pair_model.check(path)
    changed = r"missing or of another shape \(model\.layers\.0.*were its files changed"
    with one_rank() as world, pytest.raises(UserError, match=changed):  # after it was checked
        load_for_training(str(path), world)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        pair_model.check(path)


def test_a_model_that_changes_after_its_check_is_not_trained_with_random_weights(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    path = tmp_path / "gpt2"  # of a family that transformers loads
    config = AutoConfig.for_model("gpt2", vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    pair_model.check(path)
    weights = load_file(path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "h.1.attn.c_attn.weight" not in name}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    changed = r"missing or of another shape \(.*h\.1\.attn\.c_attn\.weight"
    with one_rank() as world, pytest.raises(UserError, match=changed):
        load_for_training(str(path), world)


def test_a_weight_of_another_shape_is_not_spread_over_its_place(tmp_path):
    from safetensors.torch import load_file, save_file

    path = Path(small_model(tmp_path / "m"))
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:1]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with one_rank() as world, pytest.raises(UserError, match=r"another shape \(model\.norm\.weight"):
        load_for_training(str(path), world)
