"""Model folders as people have them: each is trained at learning rate 0 and comes out as it went in, or is refused.

What transformers loads cleanly is accepted, and the export gives the base's logits bit for bit; anything else is
refused before a rank starts, with the file named.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dpo_kit.dataset import prepare
from dpo_kit.engine import loop
from dpo_kit.errors import ConfigError, UserError
from dpo_kit.launch import preflight
from dpo_kit.model import builtin, export, model_folder, pair_model
from dpo_kit.model.costs import Shape
from dpo_kit.model.parallel import DTYPES, masters
from dpo_kit.preferences import open_store
from tests.helpers import make_engine, one_rank, pair_of, random_pairs, store_of, tiny_config
from tests.model.test_pair_model import load_for_training

SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
LATENT = {
    **{
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    **{"moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "num_key_value_heads": 4},
}


def make(folder: Path, model_type: str = "llama", **fields) -> Path:
    """A random model with the tiny tokenizer beside, saved as anyone would."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **fields}))
    for name, buffer in made.named_buffers():
        if "correction" in name:
            buffer.normal_()
    made.save_pretrained(folder)
    for name, content in model_folder.side_files(Path(builtin.ensure("tiny-random"))).items():
        if name.startswith("tokenizer"):
            (folder / name).write_bytes(content)
    return folder


def weights(folder: Path, change) -> None:
    """Rewrites the weights of a folder: `change` takes and gives them by name."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def fields(folder: Path, name: str = "config.json", **changed) -> None:
    made = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**made, **changed}, indent=2))


# --- accepted -------------------------------------------------------------------------------------------------


def with_its_own_head(folder):
    make(folder, tie_word_embeddings=True)
    weights(folder, lambda w: {**w, "lm_head.weight": torch.randn(264, 32)})


def with_its_own_head_unpacked(folder):
    make(folder, "gemma2", tie_word_embeddings=True)
    weights(folder, lambda w: {**w, "lm_head.weight": torch.randn(264, 32)})


def with_its_own_head_in_another_dtype(folder):
    make(folder, tie_word_embeddings=True)
    weights(folder, lambda w: {**w, "lm_head.weight": torch.randn(264, 32, dtype=torch.bfloat16)})


def with_an_equal_head(folder):
    make(folder, tie_word_embeddings=True)
    weights(folder, lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()})


def with_only_the_head(folder):
    make(folder, tie_word_embeddings=True)
    weights(folder, lambda w: {n.replace("model.embed_tokens", "lm_head"): tensor for n, tensor in w.items()})


def with_inverse_frequencies(folder):
    make(folder)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    weights(folder, lambda w: {**w, **old})


def with_consolidated_weights(folder):
    make(folder)
    save_file({"tok_embeddings.weight": torch.ones(3)}, folder / "consolidated.safetensors")


def without_a_prefix(folder):
    make(folder)
    weights(folder, lambda w: {name.removeprefix("model."): tensor for name, tensor in w.items()})


def in_shards(folder):
    make(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder / "shards", max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    for file in (folder / "shards").glob("model*"):
        file.rename(folder / file.name)
    shutil.rmtree(folder / "shards")
    assert len(model_folder.weight_files(folder)) > 1


def in_shards_beside_old_ones(folder):
    in_shards(folder)
    save_file({"old": torch.ones(3)}, folder / "model-00001-of-00099.safetensors")


def in_a_file_of_another_name(folder):
    make(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    fields(folder, transformers_weights="weights.safetensors")


def in_half_precision(folder):
    make(folder)
    weights(folder, lambda w: {name: tensor.half() for name, tensor in w.items()})


def of_an_older_transformers(folder):
    make(folder)
    made = json.loads((folder / "config.json").read_text())
    del made["rope_parameters"], made["dtype"]
    older = {
        "rope_theta": 20000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps({**made, **older}))


def with_a_broken_generation_config(folder):
    make(folder)
    (folder / "generation_config.json").write_text("{")


def with_buffers(folder):
    make(folder, "deepseek_v3", **LATENT)


ACCEPTED = [
    *(lambda folder, kind=kind: make(folder, kind) for kind in ("llama", "qwen2", "qwen3", "mistral")),
    *(lambda folder, kind=kind: make(folder, kind, tie_word_embeddings=True) for kind in ("llama", "qwen3")),
    *(lambda folder, kind=kind: make(folder, kind) for kind in ("gemma2", "gpt2", "gpt_neox", "opt")),
    lambda folder: make(folder, "phi3", pad_token_id=0, eos_token_id=0, bos_token_id=0),
    lambda folder: make(folder, "mixtral", **MOE),
    with_its_own_head,
    with_its_own_head_unpacked,
    with_its_own_head_in_another_dtype,
    with_an_equal_head,
    with_only_the_head,
    with_inverse_frequencies,
    with_consolidated_weights,
    without_a_prefix,
    in_shards,
    in_shards_beside_old_ones,
    in_a_file_of_another_name,
    in_half_precision,
    of_an_older_transformers,
    with_a_broken_generation_config,
    with_buffers,
]
NAMES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "llama-tied",
    "qwen3-tied",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "opt",
]
NAMES += ["phi3", "mixtral", *(maker.__name__ for maker in ACCEPTED[12:])]


def trained_at_zero(root: str, dtype: str) -> int:
    """One step at learning rate 0 from `root/base`, exported as `root/out`; parameters that were trained."""
    folder, out = Path(root) / "base", Path(root) / "out"
    with one_rank() as world:
        overrides = [
            f"actor.path={folder}",
            f"ref.path={folder}",
            f"actor.dtype={dtype}",
            f"ref.dtype={dtype}",
        ]
        overrides += ["actor.optimizer.lr=0", "total_train_steps=1", f"actor.backend=fsdp:d{world.size}"]
        state = make_engine(world, tiny_config(Path(root), *overrides), open_store(Path(root) / "pairs"))
        loop.train(state, loop.Hooks(lambda _: None, lambda *_: None, lambda *_: False, lambda _: None))
        tokenizer = builtin.load_tokenizer(str(folder))
        export.write(state.policy, out, tokenizer, world, dtype=DTYPES[dtype], end_token_id=258)
        return sum(param.numel() for param in masters(state.policy).values())


def logits(folder: Path, dtype: str) -> torch.Tensor:
    lm, found = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], output_loading_info=True)
    assert not any(found.values()), found
    with torch.no_grad():
        return lm.eval()(torch.arange(3, 40)[None]).logits


def assert_comes_out_as_it_went_in(root: Path, dtype: str) -> None:
    before, after = logits(root / "base", dtype), logits(root / "out", dtype)
    assert before.std() > 0
    assert torch.equal(before, after), float((before - after).abs().max())
    base, made = (json.loads((root / name / "config.json").read_text()) for name in ("base", "out"))
    changed = {name for name, value in base.items() if made.get(name, "gone") != value}
    assert changed <= {"dtype", "torch_dtype", "tie_word_embeddings", "transformers_weights"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("maker", ACCEPTED, ids=NAMES)
def test_what_transformers_loads_comes_out_as_it_went_in(tmp_path, maker, dtype):
    maker(tmp_path / "base")
    config = tiny_config(tmp_path, f"actor.path={tmp_path / 'base'}", f"ref.path={tmp_path / 'base'}")
    preflight.check_models(config)
    prepare.check_models(config)
    store_of(random_pairs(4), tmp_path / "pairs")
    trained_at_zero(str(tmp_path), dtype)
    assert_comes_out_as_it_went_in(tmp_path, dtype)


@pytest.mark.parametrize("maker", [with_its_own_head, with_only_the_head, with_buffers])
def test_on_two_ranks_too(ranks, tmp_path, maker):
    maker(tmp_path / "base")
    store_of(random_pairs(4), tmp_path / "pairs")
    ranks.run(trained_at_zero, str(tmp_path), "float32")
    assert_comes_out_as_it_went_in(tmp_path, "float32")


def test_a_head_of_its_own_counts_everywhere(tmp_path):
    """Sizes, optimizer and the exported config.json see two matrices where config.json speaks of one."""
    base = tmp_path / "base"
    with_its_own_head(base)
    store_of(random_pairs(4), tmp_path / "pairs")
    trained = trained_at_zero(str(tmp_path), "float32")
    assert trained == sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    tied = Shape.of(json.loads((base / "config.json").read_text()))
    assert Shape.of(model_folder.config_in_effect(base)).params == tied.params + 264 * 32
    with_an_equal_head(tmp_path / "equal")
    assert Shape.of(model_folder.config_in_effect(tmp_path / "equal")).params == tied.params


# --- refused --------------------------------------------------------------------------------------------------


def cut(folder):
    file = make(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def longer_than_its_header_says(folder):
    file = make(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"0" * 10)


def no_safetensors(folder):
    (make(folder) / "model.safetensors").write_bytes(b"PK\x03\x04 a zip, maybe, or something else")


def empty_file(folder):
    (make(folder) / "model.safetensors").write_bytes(b"")


def lfs_pointer(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (make(folder) / "model.safetensors").write_text(text)


def adapter(folder):
    make(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def pickled(folder):
    (make(folder) / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (make(folder) / "model.safetensors").unlink()


def only_consolidated(folder):
    (make(folder) / "model.safetensors").rename(folder / "consolidated.safetensors")


def a_shard_is_missing(folder):
    in_shards(folder)
    model_folder.weight_files(folder)[1].unlink()


def index_names_nothing(folder):
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def index_is_broken(folder):
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


def no_config(folder):
    (make(folder) / "config.json").unlink()


def broken_config(folder):
    (make(folder) / "config.json").write_text('{"model_type": "llama", ')


def config_is_a_list(folder):
    (make(folder) / "config.json").write_text("[]")


def quantized(folder):
    fields(make(folder), quantization_config={"quant_method": "gptq", "bits": 4})


def unknown_model_type(folder):
    fields(make(folder), model_type="llama9")


def no_language_model(folder):
    fields(make(folder), model_type="clip")


def nonsense_in_config(folder):
    fields(make(folder), hidden_size="many")


def another_shape(folder):
    fields(make(folder), vocab_size=300)


def missing_weights(folder):
    make(folder)
    weights(folder, lambda w: {name: tensor for name, tensor in w.items() if "norm" not in name})


def weights_left_over(folder):
    fields(make(folder), num_hidden_layers=1)


def untied_without_a_head(folder):
    make(folder, tie_word_embeddings=True)
    fields(folder, tie_word_embeddings=False)


REFUSED_BY_FILES = {
    cut: r"model\.safetensors is cut: it has [\d,]+ bytes, by its header [\d,]+; download it again",
    longer_than_its_header_says: r"model\.safetensors holds more than its header tells of",
    no_safetensors: r"model\.safetensors is no safetensors file",
    empty_file: r"model\.safetensors is empty",
    lfs_pointer: r"model\.safetensors is a Git LFS pointer, not the weights; run `git lfs pull`",
    adapter: r"holds an adapter \(adapter_config\.json\), not a whole model; merge it",
    pickled: r"only pickled weights \(pytorch_model\.bin\), which can run code when loaded",
    no_weights: r"needs model\.safetensors or model\.safetensors\.index\.json, found none",
    only_consolidated: r"found only consolidated\.safetensors, which no index names",
    a_shard_is_missing: r"names \d+ files, and 1 of them are missing: model-00002-of-\d+\.safetensors",
    index_names_nothing: r"model\.safetensors\.index\.json has no weight_map",
    index_is_broken: r"model\.safetensors\.index\.json cannot be read \(Expecting value",
    no_config: r"has no config\.json; give a model folder",
    broken_config: r"config\.json cannot be read \(Expecting property name",
    config_is_a_list: r"config\.json holds no JSON object",
    quantized: r"config\.json: quantized weights \(gptq\) cannot be trained",
}
REFUSED_BY_TRANSFORMERS = {
    unknown_model_type: r"transformers cannot load this model \(ValueError: .*`llama9`",
    no_language_model: r"transformers cannot load this model \(ValueError: Unrecognized configuration class",
    nonsense_in_config: r"transformers cannot load this model \(\w+: .*hidden_size",
    another_shape: r"model\.embed_tokens\.weight is \(264, 32\) in model\.safetensors, by config\.json \(300, 32\)",
    missing_weights: r"weights are missing: model\.layers\.0\.input_layernorm\.weight, .* \(5 in all\)",
    weights_left_over: r"weights have no place in the model that config\.json describes: model\.layers\.1",
    untied_without_a_head: r"missing: lm_head\.weight \(.*tie_word_embeddings: true\)",
}


@pytest.mark.parametrize("field", ["actor", "ref"])
@pytest.mark.parametrize("maker", REFUSED_BY_FILES)
def test_damaged_folders_are_refused_in_a_blink(tmp_path, maker, field):
    maker(tmp_path / "base")
    config = tiny_config(tmp_path, f"{field}.path={tmp_path / 'base'}")
    with pytest.raises(ConfigError, match=rf"^{field}\.path: {tmp_path}.*{REFUSED_BY_FILES[maker]}"):
        preflight.check_models(config)
    with pytest.raises(UserError, match=REFUSED_BY_FILES[maker]):
        pair_model.check(tmp_path / "base")


@pytest.mark.parametrize("field", ["actor", "ref"])
@pytest.mark.parametrize("maker", REFUSED_BY_TRANSFORMERS)
def test_weights_that_are_not_the_configs_model_are_refused_before_ranks(tmp_path, maker, field):
    maker(tmp_path / "base")
    config = tiny_config(tmp_path, f"{field}.path={tmp_path / 'base'}")
    expected = rf"^{field}\.path: {tmp_path / 'base'}: .*{REFUSED_BY_TRANSFORMERS[maker]}"
    with pytest.raises(ConfigError, match=expected):
        prepare.check_models(config)


@pytest.mark.parametrize("maker", [*REFUSED_BY_FILES, *REFUSED_BY_TRANSFORMERS])
def test_transformers_does_not_load_cleanly_what_is_refused(tmp_path, maker):
    """The other half of the matrix: nothing is refused that would have worked."""
    maker(tmp_path / "base")
    assert not loads_cleanly(tmp_path / "base")


def loads_cleanly(folder: Path) -> bool:
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
    except Exception:
        return False
    return not any(loaded[1].values())


# --- what does not fit each other -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(tmp_path, kind, value):
    dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    base = make(tmp_path / "base")
    weights(base, lambda w: {name: tensor.to(dtype) for name, tensor in w.items()})
    known = tmp_path / "known.json"
    assert model_folder.fingerprint(str(base), known)
    file = base / "model.safetensors"
    at = model_folder.tensors(base)["model.layers.1.mlp.up_proj.weight"].start
    spoilt = load_file(file)
    spoilt["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(spoilt, file, metadata={"format": "pt"})
    assert model_folder.tensors(base)["model.layers.1.mlp.up_proj.weight"].start == at
    with pytest.raises(
        UserError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight holds values"
    ):
        model_folder.fingerprint(str(base), known)
    with pytest.raises(ConfigError, match=r"^ref\.path: .*up_proj\.weight holds values that are not finite"):
        prepare.check_values(tiny_config(tmp_path, f"ref.path={base}"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_and_the_least_numbers_are_numbers(tmp_path, dtype):
    base, info = make(tmp_path / "base"), torch.finfo(dtype)
    extremes = torch.tensor([info.max, info.min, info.tiny, info.smallest_normal / 2, 0.0, -0.0], dtype=dtype)
    weights(base, lambda w: {**w, "model.norm.weight": extremes.repeat(6)[:32]})
    assert model_folder.fingerprint(str(base))


@pytest.mark.parametrize("field", ["actor", "ref"])
def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path, field):
    base = make(tmp_path / "base", vocab_size=256)
    config = tiny_config(tmp_path, f"{field}.path={base}", "tokenizer_path=tiny-random")
    expected = rf"ids up to 259 \('<\|pad\|>'\), and the embedding of {field}\.path = '{base}' has 256 rows"
    with pytest.raises(ConfigError, match=expected):
        prepare.check_tokenizers(config)


POSITIONS = [
    ("llama", {}, 256),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 1024),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 512),
    (
        "qwen2",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}},
        1024,
    ),
    (
        "llama",
        {
            "rope_scaling": {
                **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_position_embeddings": 16,
            }
        },
        256,
    ),
    ("gpt2", {"n_positions": 128, "max_position_embeddings": None}, 128),
    ("mpt", {}, None),
    ("falcon", {"alibi": True}, None),
]


@pytest.mark.parametrize(("kind", "fields", "most"), POSITIONS)
def test_positions(kind, fields, most):
    asked = {name: value for name, value in {**SIZES, **fields}.items() if value is not None}
    if kind in ("gpt2", "mpt", "falcon"):
        asked = {name: value for name, value in fields.items() if value is not None}
    assert pair_model.positions(AutoConfig.for_model(kind, **asked)) == most


@pytest.mark.parametrize(
    ("split", "more", "remedy"),
    [
        ("train", [], "train_dataset.max_length=256"),
        ("valid", ["valid_dataset.path=sample", "valid_dataset.split=test"], "valid_dataset.max_length=256"),
        ("valid", ["valid_dataset.from_train=0.1"], "train_dataset.max_length=256"),
    ],
)
def test_texts_that_are_longer_than_the_positions_are_refused(tmp_path, split, more, remedy):
    base = make(tmp_path / "base")
    config = tiny_config(tmp_path, f"ref.path={base}", *more)
    fits, long = (store_of([pair_of(240, n, 3)], tmp_path / f"pairs-{n}") for n in (16, 17))
    prepare.check_lengths(config, {"train": fits, "valid": None})
    stores = {"train": fits, "valid": None, split: long}
    expected = (
        f"{split}_dataset: the longest text has 257 tokens, and ref.path = '{base}' has 256 positions; use"
    )
    with pytest.raises(ConfigError) as caught:
        prepare.check_lengths(config, stores)
    assert f"{expected} {remedy}," in str(caught.value)
    assert "actor.path" not in str(caught.value)  # 4,096 positions


# --- what lies beside -----------------------------------------------------------------------------------------


def test_what_lies_beside_the_weights_is_carried_over(tmp_path):
    base = make(tmp_path / "base")
    fields(
        base, my_own_field={"kept": [1, 2.5, None]}, rope_scaling=None, time_step_limit=[0.0, float("inf")]
    )
    sampling = {
        "temperature": 0.6,
        "top_p": 0.9,
        "do_sample": True,
        "eos_token_id": [256, 7],
        "pad_token_id": 9,
    }
    (base / "generation_config.json").write_text(json.dumps(sampling))
    tokens = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**tokens, "my_own": "kept"}))
    kept = {
        "chat_template.jinja": "{{ messages[0]['content'] }}",
        "additional_chat_templates/tool_use.jinja": "{{ 1 }}",
        "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
        "LICENSE": "ours",
        "tokenizer_config.json": (base / "tokenizer_config.json").read_text(),
        "tokenizer.json": (base / "tokenizer.json").read_text(),
    }
    (base / "additional_chat_templates").mkdir()
    for name, text in kept.items():
        (base / name).write_text(text)
    for name in ("trainer_state.json", "optimizer.pt", "README.md", "dpo_kit.json"):
        (base / name).write_text("{}")
    store_of(random_pairs(4), tmp_path / "pairs")
    trained_at_zero(str(tmp_path), "bfloat16")
    out = tmp_path / "out"
    assert {name: (out / name).read_text() for name in kept} == kept
    made = {path.name for path in out.iterdir() if path.is_file()}
    assert made == {*(name for name in kept if "/" not in name)} | {
        *("config.json", "generation_config.json", "model.safetensors")
    }
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    assert after == {**before, "dtype": "bfloat16"}
    after = json.loads((out / "generation_config.json").read_text())
    assert after == {**sampling, "eos_token_id": [258, 256, 7]}
    loaded = GenerationConfig.from_pretrained(out)
    assert (loaded.temperature, loaded.top_p, loaded.eos_token_id) == (0.6, 0.9, [258, 256, 7])
    assert AutoTokenizer.from_pretrained(out).chat_template["default"] == kept["chat_template.jinja"]


def test_a_base_that_is_gone_at_the_end_is_no_loss(tmp_path):
    base = make(tmp_path / "base")
    tokenizer = builtin.load_tokenizer(str(base))
    with one_rank() as world:
        policy = load_for_training(str(base), world)
        before = logits(base, "float32")
        shutil.rmtree(base)
        export.write(policy, tmp_path / "out", tokenizer, world, dtype=torch.float32, end_token_id=258)
    assert torch.equal(logits(tmp_path / "out", "float32"), before)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_a_tokenizer_from_elsewhere_takes_the_place_of_the_models_own(tmp_path):
    base = make(tmp_path / "base")
    (base / "chat_template.jinja").write_text("of the base")
    (base / "merges.txt").write_text("of the base")
    (base / "NOTICE").write_text("of the base")
    tokenizer = builtin.load_tokenizer("tiny-random")
    with one_rank() as world:
        policy = load_for_training(str(base), world)
        export.write(policy, tmp_path / "out", tokenizer, world, dtype=torch.float32, end_token_id=258)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert not (tmp_path / "out" / "merges.txt").exists()
    assert (tmp_path / "out" / "NOTICE").read_text() == "of the base"
