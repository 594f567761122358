"""The configuration: the seed's files, every kind of mistake, types, overrides."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dpo_kit import config
from dpo_kit.config import foreign_names, schema
from dpo_kit.errors import ConfigError
from dpo_kit.loss_types import LOSS_TYPES

DATA = Path(__file__).parents[1] / "data"
PARAMS = Path(__file__).parents[2] / "params"

SMALL = {
    "actor": {"path": "tiny-random"},
    "ref": {"path": "${actor.path}"},
    "train_dataset": {"path": "sample", "batch_size": 8},
}


def problems(overrides=(), tree=SMALL, **sections) -> list[str]:
    """The problems of a small valid tree with overrides or with other sections."""
    with pytest.raises(ConfigError) as caught:
        config.from_tree({**tree, **sections}, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def small(*overrides: str, **sections):
    """A small valid configuration with overrides or with other sections."""
    return config.from_tree({**SMALL, **sections}, overrides)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "params.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# --- the seed's files ------------------------------------------------------------------------------------


def test_the_fragment_of_the_seed_loads_unchanged():
    c = config.load(DATA / "seed_fragment.yaml")
    assert (c.actor.backend, c.actor.path, c.actor.beta) == ("fsdp:d8p1t1", "Qwen/Qwen2.5-7B", 0.1)
    assert (c.actor.optimizer.lr, c.actor.optimizer.warmup_steps_proportion) == (5e-6, 0.1)
    assert (c.ref.backend, c.ref.path, c.ref.optimizer) == ("fsdp:d8p1t1", "Qwen/Qwen2.5-7B", None)
    assert (c.train_dataset.path, c.train_dataset.batch_size) == ("Anthropic/hh-rlhf", 8)
    assert c.tokenizer_path == "Qwen/Qwen2.5-7B"
    assert c.experiment_name == "dpo"
    assert c.trial_name is None


def test_the_fragment_of_the_seed_takes_the_overrides_of_two_cpu_ranks():
    c = config.load(
        DATA / "seed_fragment.yaml",
        [
            "actor.path=tiny-random",
            "train_dataset.path=sample",
            "cluster.n_gpus_per_node=0",
            "actor.backend=fsdp:d2p1t1",
        ],
    )
    assert config.parse_backend(c.ref.backend).world_size == 2
    assert (c.ref.path, c.tokenizer_path, c.cluster.n_gpus_per_node) == ("tiny-random", "tiny-random", 0)


def test_the_full_config_of_the_seed_loads_with_one_warning():
    with pytest.warns(UserWarning, match="^ignored: ") as caught:
        c = config.load(DATA / "seed_full.yaml")
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "\n" not in message
    assert message.startswith("ignored: ")
    assert message.endswith(" (keys of the seed's system without a meaning here)")
    named = set(message.removeprefix("ignored: ").partition(" (keys")[0].split(", "))
    foreign = {
        ".".join(filter(None, (section, key))) for section, keys in schema.FOREIGN.items() for key in keys
    }
    assert named == foreign
    assert (c.train_dataset.batch_size, c.train_dataset.drop_last) == (64, True)
    assert (c.actor.mb_spec.max_tokens_per_mb, c.ref.mb_spec.max_tokens_per_mb) == (4096, 10240)
    assert c.recover.freq_secs == 3600
    assert caught[0].filename == __file__


def test_the_defaults_are_the_seeds():
    c = small()
    o = c.actor.optimizer
    assert (o.type, o.lr, o.weight_decay, o.beta1, o.beta2, o.eps) == ("adam", 5e-6, 0.01, 0.9, 0.999, 1e-8)
    assert (o.lr_scheduler_type, o.warmup_steps_proportion, o.min_lr_ratio) == ("cosine", 0.1, 0.1)
    assert o.gradient_clipping == 10.0
    assert (c.actor.beta, c.actor.loss_type, c.actor.dtype) == (0.1, "sigmoid", "bfloat16")
    assert c.actor.disable_dropout
    assert c.actor.gradient_checkpointing
    assert (c.actor.mb_spec.granularity, c.ref.mb_spec.granularity) == (2, 2)
    assert (c.train_dataset.split, c.train_dataset.max_length) == ("train", 2048)
    assert small("valid_dataset.path=sample").valid_dataset.split == "test"
    assert small("actor.mb_spec.max_tokens_per_mb=99").ref.mb_spec.max_tokens_per_mb == 99
    assert (c.cluster.n_gpus_per_node, c.cluster.grace_s, c.recover.mode) == ("auto", 60.0, "disabled")
    assert (c.ref.logps, c.train_dataset.max_dropped_share) == ("cached", 1.0)


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_params_file_loads_without_a_warning_and_survives_its_own_yaml(path, tmp_path):
    c = config.load(path)
    again = config.load(write(tmp_path, config.to_yaml(c)))
    assert again == c
    assert config.from_tree(config.to_tree(c)) == c


def test_adapters_are_not_cut_over_tensor_parallel_ranks():
    told = problems(["actor.use_lora=true", "actor.backend=fsdp:d2t2", "ref.backend=fsdp:d2t2"])
    assert any("are not cut over tensor-parallel ranks (t = 2); use fsdp:d4, or" in line for line in told)


def test_the_7b_params_are_the_seeds_run():
    theirs = config.load(DATA / "seed_fragment.yaml")
    ours = config.load(PARAMS / "hhrlhf_qwen2.5-7b.yaml")
    assert ours.actor == theirs.actor
    assert ours.ref == theirs.ref
    assert ours.train_dataset == theirs.train_dataset
    assert (ours.cluster.n_nodes, ours.cluster.n_gpus_per_node) == (1, 8)


# --- mistakes, each in one line --------------------------------------------------------------------------

MISTAKES = {
    "actor.betta=0.2": "actor.betta is not a known key; did you mean actor.beta?",
    "actor.lr=1": "actor.lr is not a known key; did you mean actor.optimizer.lr?",
    "scheduler.loss_type=ipo": "scheduler.loss_type is not a known key; did you mean actor.loss_type?",
    "beta=0.2": "beta is not a known key; did you mean actor.beta?",
    "actor.optimzer.lr=1": "actor.optimzer is not a known key; did you mean actor.optimizer?",
    "seed.x=1": "seed.x is not a known key: seed is a value and not a section",
    "actor.mb_spec.granularity=1": "actor.mb_spec.granularity = 1 must be 2: ",
    "ref.mb_spec.granularity=1": "ref.mb_spec.granularity = 1 must be 2: ",
    "actor.backend=fsdp:d1p2": "actor.backend = 'fsdp:d1p2': p must be 1, because fsdp shards every layer",
    "actor.backend=fsdp:d0": "actor.backend = 'fsdp:d0' is wrong: d = 0 leaves no rank; write fsdp",
    "actor.backend=megatron:d8": "'megatron' is not a backend, only fsdp is",
    "ref.backend=fsdp:d4": "ref.backend = 'fsdp:d4' differs from actor.backend = 'fsdp'",
    "actor.target_modules=null": "give a list of texts (none means all linear layers), or []",
    "actor.target_modules=[no]": "actor.target_modules = [False] holds false, which is a boolean, not text",
    "actor.target_modules=3": "actor.target_modules = 3 is a number; give a list of texts (none means all",
    "actor.target_modules=[all-linear, x]": "use [all-linear], or the others alone",
    "actor.lora_rank=0": "actor.lora_rank = 0 is out of range; give a whole number at least 1",
    "actor.lora_r=8": "actor.lora_r is not a known key; did you mean actor.lora_rank?",
    "actor.peft_type=qlora": "actor.peft_type = 'qlora' is not one of lora; qlora is not built here",
    "saver.merged=true": "saver.merged = true merges adapters into their base and actor.use_lora = false trains none",
    "ref.optimizer={type: adam}": "ref.optimizer = {'type': 'adam'} must be null: the reference is frozen",
    "ref.scheduling_strategy.type=separation": "is not one of colocation (the reference shares the actor's",
    "actor.beta=0": "actor.beta = 0 is out of range; give a number greater than 0 (typically 0.05 to 0.5)",
    "actor.loss_type=IPO": "actor.loss_type = 'IPO' is not one of sigmoid, ipo, hinge, robust, "
    "sigmoid_norm; did you mean ipo?",
    "actor.loss_type=dpo": "is not one of sigmoid, ipo, hinge, robust, sigmoid_norm; did you mean sigmoid?",
    "actor.loss_type=cDPO": "; that is sigmoid with actor.label_smoothing",
    "actor.loss_type=robust-DPO": "; did you mean robust?",
    "actor.loss_type=rdpo": "; did you mean robust?",
    "actor.loss_type=SLiC": "; did you mean hinge?",
    "actor.loss_type=SimPO": "is not one of sigmoid, ipo, hinge, robust, sigmoid_norm; simpo is not built here",
    "actor.loss_type=kto_pair": "; kto_pair is not built here",
    "actor.dtype=fp16": "actor.dtype = 'fp16' is not one of bfloat16, float32, float64; it would need loss scal",
    "actor.dtype=bf16": "; did you mean bfloat16?",
    "actor.dtype=torch.float32": "; did you mean float32?",
    "actor.dtype=double": "; did you mean float64?",
    "actor.optimizer.lr_scheduler_type=polynomial": "; polynomial is not built here",
    "actor.optimizer.lr_scheduler_type=constant_with_warmup": "; warm-up is actor.optimizer.warmup_steps_prop",
    "actor.optimizer.type=adamw_torch": "; did you mean adam?",
    "actor.optimizer.type=sgd": "; sgd is not built here",
    "model_name_or_path=x": "model_name_or_path is not a known key; did you mean actor.path?",
    "actor.lr_scheduler=linear": "did you mean actor.optimizer.lr_scheduler_type?",
    "train_dataset.dataset_name=x": "did you mean train_dataset.path?",
    "actor.label_smoothing=0.5": "actor.label_smoothing = 0.5 is out of range; give a number at least 0",
    "actor.optimizer.lr=-1": "actor.optimizer.lr = -1 is out of range; give a number at least 0",
    "actor.optimizer.warmup_steps_proportion=1.1": "give a number at least 0 and at most 1",
    "actor.optimizer.min_lr_ratio=2": "give a number at least 0 and at most 1",
    "train_dataset.max_length=1": "give a whole number at least 2",
    "train_dataset.type=rw": "train_dataset.type = 'rw' is not one of dpo",
    "saver.freq_steps=0": "saver.freq_steps = 0 is out of range; give a whole number at least 1",
    "saver.best=true": "saver.best = true chooses by held-out pairs; add a valid_dataset",
    "total_train_epochs=0": "total_train_epochs = 0 is out of range; give a whole number at least 1",
    "cluster.n_nodes=2": "cluster.n_nodes = 2 needs more than one machine",
    "cluster.n_gpus_per_node=all": "give a whole number at least 0 or auto (0 means CPU ranks)",
    "cluster.fileroot=": "cluster.fileroot = '' is empty; give a text",
    "train_dataset.path=~": "is empty (null, ~ and None mean nothing); give a text (the home folder is ~/)",
    "recover.mode=fault": "recover.mode = 'fault' is not one of disabled, auto (off reads as disabled",
    "actor.is_critic=true": "actor.is_critic = true is not possible: DPO trains a policy and has no critic",
    "actor.init_from_scratch=true": "actor.init_from_scratch = true is not possible",
    "ref.disable_dropout=false": "ref.disable_dropout = false is not possible",
    "enable_offload=true": "enable_offload = true is not possible",
    "valid_dataset.batch_size=4": "valid_dataset.path is missing; give a path, or from_train: 0.05",
    "valid_dataset.from_train=1": "valid_dataset.from_train = 1 is out of range",
    "valid_dataset=3": "valid_dataset = '3' is not a section",
    "actor.path=???": "actor.path is missing; give a folder, a hub id, smollm2-135m-instruct or tiny-random",
    "ref=null": "ref is missing; add the frozen reference, e.g. ref: {path: ${actor.path}}",
    "actor.path=a\0b": "has control characters; leave them out",
    "trial_name=": "trial_name = '' is empty; give a text",
    "actor.beta": "override 'actor.beta' is not an assignment; write key=value with the dotted key",
    "+actor.beta=1": "override '+actor.beta=1' is not an assignment",
    "actor.optimizer={lr: [}": "actor.optimizer = '{lr: [}' cannot be read: ",
}


@pytest.mark.parametrize("override", MISTAKES, ids=str)
def test_a_mistake_is_one_line_with_field_value_and_remedy(override):
    found = problems([override])
    assert any(MISTAKES[override] in line for line in found), found
    assert not any("\n" in line for line in found)


def test_all_problems_of_a_file_are_shown_together(tmp_path):
    path = write(
        tmp_path,
        "actor: {path: tiny-random, beta: 0, loss_type: IPO, bta: 1, mb_spec: {granularity: 1}}\n"
        "train_dataset: {path: sample, batch_size: many}\nsede: 3\n",
    )
    with pytest.raises(ConfigError) as caught:
        config.load(path, ["actor.optimizer.lr=fast"])
    fields = {line.split(" ")[0] for line in caught.value.problems}
    assert fields == {
        "actor.beta",
        "actor.loss_type",
        "actor.bta",
        "actor.mb_spec.granularity",
        "train_dataset.batch_size",
        "sede",
        "actor.optimizer.lr",
        "ref",
    }
    assert len(caught.value.problems) == 8


def test_a_wrong_field_that_another_refers_to_is_reported_once():
    assert problems(["actor.dtype=int3"]) == ["actor.dtype = 'int3' is not one of bfloat16, float32, float64"]
    assert len(problems(["actor.backend=fsdp:x"])) == 1
    assert len(problems(["actor.path=${oc.env:DPO_KIT_NO_SUCH_VARIABLE}"])) == 1


@pytest.mark.parametrize(
    "sections",
    [
        {"valid_dataset": {"path": 5}},
        {"ref": {"backend": 5}},
        {"valid_dataset": 5, "saver": {"best": True}},
        {"actor": {"path": "x", "backend": "fsdp:d4"}, "train_dataset": {"path": "x", "batch_size": "three"}},
    ],
)
def test_a_wrong_field_is_not_reported_again_for_what_depends_on_it(sections):
    assert len(problems(**sections)) == 1


@pytest.mark.parametrize("missing", ["actor", "ref", "train_dataset"])
def test_a_missing_section_says_what_to_add(missing):
    for empty in (None, {}, "absent"):
        tree = {**SMALL, missing: empty}
        if empty == "absent":
            del tree[missing]
        found = [line for line in problems(tree=tree) if line.startswith(f"{missing} is missing; add ")]
        assert len(found) == 1


def test_batch_smaller_than_the_data_parallel_ranks():
    overrides = ["actor.backend=fsdp:d4p1t1", "train_dataset.batch_size=2"]
    assert problems(overrides) == [
        "train_dataset.batch_size = 2 is less than 4 data-parallel ranks; use 4 or more"
    ]
    assert small("actor.backend=fsdp:d4", "train_dataset.batch_size=4").train_dataset.batch_size == 4


def test_more_ranks_than_devices_names_both_numbers():
    found = problems(["actor.backend=fsdp:d8", "cluster.n_gpus_per_node=4"])
    assert found == [
        "actor.backend = 'fsdp:d8' needs 8 ranks, more than the 4 devices of cluster.n_nodes = 1 times "
        "cluster.n_gpus_per_node = 4; use fsdp:d4, or cluster.n_gpus_per_node=0 for CPU ranks"
    ]
    assert small("actor.backend=fsdp:d8", "cluster.n_gpus_per_node=0").cluster.n_gpus_per_node == 0
    assert small("actor.backend=fsdp:d4", "cluster.n_gpus_per_node=8").actor.backend == "fsdp:d4"
    ray = small(
        "actor.backend=fsdp:d8",
        "cluster.n_nodes=2",
        "cluster.n_gpus_per_node=4",
        "scheduler.type=ray",
        "cluster.fileroot=/path/to/nfs",
    )
    assert ray.cluster.fileroot == "/path/to/nfs"


def test_check_sees_the_devices_that_the_launcher_filled_in():
    c = small("actor.backend=fsdp:d8")
    config.check(c)
    c.cluster.n_gpus_per_node = 2
    with pytest.raises(ConfigError, match="needs 8 ranks, more than the 2 devices"):
        config.check(c)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_label_smoothing_only_where_it_has_a_meaning(loss_type):
    overrides = [f"actor.loss_type={loss_type}", "actor.label_smoothing=0.1"]
    if loss_type in ("sigmoid", "robust"):
        assert small(*overrides).actor.label_smoothing == 0.1
    else:
        assert problems(overrides) == [
            f"actor.label_smoothing = 0.1 has no meaning for actor.loss_type = '{loss_type}'; use 0, or a "
            "loss_type of sigmoid or robust"
        ]
    assert small(f"actor.loss_type={loss_type}").actor.label_smoothing == 0


def test_float64_is_for_cpu_ranks():
    assert small("actor.dtype=float64", "cluster.n_gpus_per_node=0").ref.dtype == "float64"
    assert small("actor.dtype=float64").actor.dtype == "float64"
    found = problems(["actor.dtype=float64", "cluster.n_gpus_per_node=1"])
    assert [line.split(" ")[0] for line in found] == ["actor.dtype", "ref.dtype"]
    assert "float64' runs on CPU ranks only and cluster.n_gpus_per_node = 1" in found[0]


def test_valid_dataset_is_a_path_or_a_share_of_the_training_prompts():
    c = small("valid_dataset.from_train=0.05", "train_dataset.max_length=256")
    assert (c.valid_dataset.path, c.valid_dataset.from_train) == (None, 0.05)
    assert c.valid_dataset.max_length == 256
    assert small(valid_dataset={"path": "", "from_train": 0.1}).valid_dataset.path is None
    found = problems(["valid_dataset.path=sample", "valid_dataset.from_train=0.05"])
    assert len(found) == 1
    assert "exclude each other; set one of them to null" in found[0]
    assert small("valid_dataset=null", valid_dataset={"path": "sample"}).valid_dataset is None


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "a\\b",
        "../up",
        "/abs",
        "a..b",
        ".hidden",
        "-flag",
        "~x",
        "x" * 129,
        "é" * 128,
        " x",
        "x ",
        "a\tb",
    ],
)
@pytest.mark.parametrize("field", ["experiment_name", "trial_name"])
def test_names_of_runs_are_one_folder(field, name):
    found = problems([f"{field}={name}"])
    assert len(found) == 1
    assert found[0].startswith(f"{field} = ")


def test_harmless_names_are_taken():
    for name in ("a", "x" * 128, "run 1", "2026-01-02", "试验", "a=b", "v1.2_final-3"):
        assert small(f"trial_name={name}").trial_name == name


# --- types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-6", 5e-6), (" 5E-6", 5e-6), (".5", 0.5), ("1", 1.0), ("-.0", 0.0), ("${actor.beta}", 0.1)],
)
def test_text_that_spells_a_number_is_a_number(text, value):
    lr = small(actor={"path": "tiny-random", "optimizer": {"lr": text}}).actor.optimizer.lr
    assert lr == value
    assert isinstance(lr, float)


def test_text_is_coerced_to_the_type_of_its_field():
    c = small(
        seed="3",
        total_train_steps="null",
        train_dataset={"path": "sample", "batch_size": "16", "shuffle": "false", "num_rows": "null"},
        cluster={"n_gpus_per_node": "0"},
        evaluator="{num_samples: 0, temperature: 1}",
        saver={"freq_secs": "90"},
    )
    assert (c.seed, c.total_train_steps, c.train_dataset.batch_size) == (3, None, 16)
    assert c.train_dataset.shuffle is False
    assert c.train_dataset.num_rows is None
    assert c.cluster.n_gpus_per_node == 0
    assert (c.evaluator.num_samples, c.evaluator.temperature) == (0, 1.0)
    assert c.saver.freq_secs == 90.0


@pytest.mark.parametrize("value", [8, 8.0, "8", "8.0", "8e0"])
def test_a_whole_number_may_be_written_with_a_point(value):
    seed = small(seed=value).seed
    assert seed == 8
    assert type(seed) is int


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("seed", "8.5", "a number"),
        ("seed", "true", "a boolean"),
        ("seed", "x", "text"),
        ("seed", "[1]", "a list"),
        ("actor.beta", "false", "a boolean"),
        ("actor.beta", "{a: 1}", "a section"),
        ("actor.disable_dropout", "1", "a number"),
        ("actor.disable_dropout", "maybe", "text"),
    ],
)
def test_a_wrong_type_says_what_was_given(field, value, kind):
    (line,) = problems([f"{field}={value}"])
    assert f" is {kind}; give " in line


def test_a_number_or_boolean_in_a_file_is_no_text():
    (line,) = problems(trial_name=1)
    assert line.startswith("trial_name = 1 is a number, not text; put it in quotes")
    (line,) = problems(experiment_name=False)
    assert line.startswith("experiment_name = false is a boolean, not text")


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, "nan", ".nan", "-inf", ".inf", "1e999", "NaN"]
)
def test_nan_and_inf_are_errors_everywhere(value):
    for section in ({"actor": {"path": "tiny-random", "beta": value}}, {"cluster": {"grace_s": value}}):
        (line,) = problems(**section)
        assert "is not a finite number" in line
    if isinstance(value, float):
        assert "not finite" in problems(perf_tracer={"deep": [value]})[0]


def test_numpy_values_and_paths_from_a_notebook():
    np = pytest.importorskip("numpy")
    c = small(seed=np.int64(4), actor={"path": Path("tiny-random"), "beta": np.float32(0.5)})
    assert (c.seed, c.actor.beta, c.actor.path) == (4, 0.5, "tiny-random")
    assert type(c.seed) is int
    assert "is a complex; give a text, number or section" in problems(seed=1j)[0]


def test_lr_zero_is_valid():
    assert small("actor.optimizer.lr=0").actor.optimizer.lr == 0


def test_adamw_is_adam():
    assert small("actor.optimizer.type=adamw") == small()


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        (True, "auto"),
        (False, "disabled"),
        ("on", "auto"),
        ("off", "disabled"),
        ("auto", "auto"),
        ("True", "auto"),
    ],
)
def test_recover_mode_reads_booleans_as_on_and_off(given, mode):
    assert small(recover={"mode": given}).recover.mode == mode
    assert small(f"recover.mode={given}").recover.mode == mode


@pytest.mark.parametrize("given", [1, 0, [True], {"a": 1}])
def test_recover_mode_takes_no_number_for_a_boolean(given):
    (line,) = problems(recover={"mode": given})
    assert line.startswith(f"recover.mode = {given} is ")


# --- overrides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["001", "no", "1:30", "1e3", "true", "none", "[1]", "2024-01-01", "0x1f", "'q'"]
)
def test_an_override_of_a_text_field_is_literal(name):
    assert small(f"trial_name={name}").trial_name == name


def test_null_and_references_are_read_in_an_override_of_a_text_field():
    assert small("trial_name=null", trial_name="x").trial_name is None
    assert small("trial_name=run-${seed}", seed=7).trial_name == "run-7"
    assert small("trial_name=${seed}", seed=7).trial_name == "7"


def test_later_overrides_win_and_sections_merge():
    c = small("actor.beta=0.2", "actor.optimizer={lr: 1e-5}", "actor.beta = 0.3")
    assert (c.actor.beta, c.actor.optimizer.lr, c.actor.optimizer.weight_decay) == (0.3, 1e-5, 0.01)
    optimizer = small("actor.optimizer={lr: 1e-5}", "actor.optimizer={eps: 1e-6}").actor.optimizer
    assert (optimizer.lr, optimizer.eps) == (1e-5, 1e-6)


def test_a_single_text_is_one_override():
    assert config.from_tree(SMALL, "actor.beta=0.4").actor.beta == 0.4


def test_overriding_inside_a_reference_is_refused():
    (line,) = problems(["valid_dataset.split=x"], valid_dataset="${train_dataset}")
    assert line.startswith("valid_dataset.split cannot be set because valid_dataset is the reference")


def test_overriding_inside_a_value_is_refused():
    found = problems(["train_dataset.batch_size=4"], train_dataset="sample")
    assert found[0] == "train_dataset = 'sample' is not a section; give keys and values"


def test_an_empty_value_at_the_top_level_is_a_key_left_out():
    plain = small()
    for empty in (None, "", {}, [], "null"):
        assert small(seed=empty, trial_name=empty, evaluator=empty, valid_dataset=empty) == plain
    assert small("tokenizer_path=", "evaluator=null", "trial_name=null") == plain
    assert small("tokenizer_path=null").tokenizer_path == "tiny-random"


def test_the_given_tree_is_not_changed():
    tree = {"actor": {"path": "tiny-random"}, "ref": {"path": "x"}, "train_dataset": {"path": "sample"}}
    config.from_tree(tree, ["actor.beta=0.3", "seed=4"])
    assert tree == {
        "actor": {"path": "tiny-random"},
        "ref": {"path": "x"},
        "train_dataset": {"path": "sample"},
    }


def test_names_from_elsewhere_lead_to_what_there_is():
    names = config.field_names()
    for known, key in foreign_names.KEYS.items():
        assert schema.lookup(key), key
        assert known not in {name.rpartition(".")[2] for name in names}
    for field in (
        "actor.loss_type",
        "actor.dtype",
        "actor.optimizer.lr_scheduler_type",
        "actor.optimizer.type",
        "actor.peft_type",
    ):
        rule = schema.lookup(field)[1]
        for known, told in rule["elsewhere"].items():
            assert known not in rule["choices"]
            assert told in rule["choices"] or " " in told
