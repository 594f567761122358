"""The configuration as typed dataclasses: names, types, defaults and the range of each single field.

The keys are the seed's; keys of our own are marked `ours`. `rule(...)` puts what a field allows beside its
default, so that one walk over the schema can check a whole file.

Deliberately not here: what depends on two fields at once (`checks`), reading files (`load`), and anything
that needs a device, a tokenizer or the data itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING

from dpo_kit.config import foreign_names
from dpo_kit.loss_types import LOSS_TYPES

DTYPES = ("bfloat16", "float32", "float64")
ALL_LINEAR = "all-linear"  # alone in actor.target_modules it means what an empty list means, as in peft


def rule(default: Any, **allowed: Any) -> Any:
    """A dataclass field with what it allows.

    Args:
        default: the default value; `MISSING` makes the field required.
        **allowed: `ge`, `gt`, `le`, `lt` bounds; `choices` a tuple of strings; `alias` other spellings and
            what they mean; `elsewhere` names from other trainers, for the hint; `words` strings that a numeric
            field takes as well; `blank` whether an empty text means null (True) or is an error (False); `why`
            a remark for the error; `missing` the remedy where a required field is not given.
    """
    return field(default=default, metadata=allowed)


@dataclass
class ClusterConfig:
    n_nodes: int = rule(1, ge=1)
    n_gpus_per_node: int | str = rule("auto", ge=0, words=("auto",), why="0 means CPU ranks")
    fileroot: str = "runs"  # absolute after loading
    grace_s: float = rule(60.0, gt=0)  # ours: from the request to stop until ranks are killed
    # Ours: a micro-batch group, a step or an evaluation's part takes no longer; a rank that hangs is then named.
    step_timeout_s: float = rule(1800.0, gt=0)


@dataclass
class SchedulerConfig:
    type: str = rule("local", choices=("local", "ray", "slurm", "torchrun"))
    # Ours: of a Ray cluster; null: RAY_ADDRESS, a running one, else one of the run's own.
    address: str | None = None
    wait_s: float = rule(60.0, ge=0)  # ours: for nodes that are not there yet
    # Ours, for Slurm outside an allocation: further options, print the script only, a notebook in the command's place.
    sbatch: str | None = None
    dry_run: bool = False
    notebook: str | None = None


@dataclass
class MicroBatchSpec:
    granularity: int = 2  # checked in `checks`: must be 2
    max_tokens_per_mb: int | str = rule(16384, ge=1, words=("auto",))


@dataclass
class OptimizerConfig:
    type: str = rule(
        "adam",
        choices=("adam",),
        alias={"adamw": "adam"},
        elsewhere=foreign_names.OPTIMIZERS,
        why="adam is AdamW, as in the seed",
    )
    lr: float = rule(5e-6, ge=0)
    weight_decay: float = rule(0.01, ge=0)
    beta1: float = rule(0.9, ge=0, lt=1)
    beta2: float = rule(0.999, ge=0, lt=1)
    eps: float = rule(1e-8, gt=0)
    lr_scheduler_type: str = rule(
        "cosine", choices=("cosine", "linear", "constant"), elsewhere=foreign_names.SCHEDULES
    )
    warmup_steps_proportion: float = rule(0.1, ge=0, le=1)
    min_lr_ratio: float = rule(0.1, ge=0, le=1)
    gradient_clipping: float = rule(10.0, gt=0)
    # Ours: bfloat16 halves Adam's memory.
    state_dtype: str = rule("float32", choices=("float32", "bfloat16"), elsewhere=foreign_names.DTYPES)


@dataclass
class ActorConfig:
    backend: str = "fsdp"
    path: str = rule(MISSING, missing="give a folder, a hub id, smollm2-135m-instruct or tiny-random")
    beta: float = rule(0.1, gt=0, why="typically 0.05 to 0.5")
    loss_type: str = rule("sigmoid", choices=LOSS_TYPES, elsewhere=foreign_names.LOSS_TYPES)
    label_smoothing: float = rule(0.0, ge=0, lt=0.5)
    dtype: str = rule("bfloat16", choices=DTYPES, elsewhere=foreign_names.DTYPES)
    disable_dropout: bool = True
    gradient_checkpointing: bool | str = rule(True, words=("selective",))  # selective: keeps what is dear
    compile: bool = False  # ours: compile each block
    deterministic: bool = False  # ours
    share_prompt: bool = True  # ours: run the common prefix of a pair once
    use_lora: bool = False  # train low-rank adapters (peft) of frozen weights
    lora_rank: int = rule(32, ge=1)
    lora_alpha: int = rule(16, gt=0)
    target_modules: list[str] = field(default_factory=list, metadata={"why": "none means all linear layers"})
    peft_type: str = rule("lora", choices=("lora",), elsewhere=foreign_names.PEFT_TYPES)
    mb_spec: MicroBatchSpec = field(default_factory=MicroBatchSpec)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class SchedulingStrategy:
    type: str = rule("colocation", choices=("colocation",), why="the reference shares the actor's ranks")
    target: str = rule("actor", choices=("actor",))


@dataclass
class RefConfig:
    backend: str = "${actor.backend}"
    path: str = "${actor.path}"
    dtype: str = rule("${actor.dtype}", choices=DTYPES, elsewhere=foreign_names.DTYPES)
    optimizer: Any = None  # checked in `checks`: the reference is frozen
    scheduling_strategy: SchedulingStrategy = field(default_factory=SchedulingStrategy)
    logps: str = rule("cached", choices=("cached", "online"))  # ours
    first_step_check: str = rule("error", choices=("error", "warn", "off"), alias={False: "off"})  # ours
    mb_spec: MicroBatchSpec = field(
        default_factory=lambda: MicroBatchSpec(max_tokens_per_mb="${actor.mb_spec.max_tokens_per_mb}")
    )


@dataclass
class DatasetConfig:
    path: str = rule(MISSING, missing="give a file, a hub id, or sample")
    type: str = rule("dpo", choices=("dpo",), why="chosen / rejected pairs")
    name: str | None = None  # ours: a hub dataset's configuration or data_dir
    split: str = "train"
    batch_size: int = rule(8, ge=1)  # pairs per optimizer step over all ranks
    max_length: int = rule(2048, ge=2)
    shuffle: bool = True
    num_rows: int | None = rule(None, ge=1)  # ours: the first rows only
    drop_last: bool = False
    max_dropped_share: float = rule(1.0, ge=0, le=1)  # ours
    # Ours: unusable rows are an error, or dropped and each named in the build report.
    bad_rows: str = rule("strict", choices=("strict", "quarantine"))


@dataclass
class ValidDatasetConfig:
    path: str | None = None  # required unless from_train is given; checked in `checks`
    type: str = rule("dpo", choices=("dpo",), why="chosen / rejected pairs")
    name: str | None = None
    split: str = "test"
    batch_size: int = rule(8, ge=1)
    max_length: int = rule("${train_dataset.max_length}", ge=2)
    shuffle: bool = False
    num_rows: int | None = rule(None, ge=1)
    drop_last: bool = False
    max_dropped_share: float = rule(1.0, ge=0, le=1)
    bad_rows: str = rule("${train_dataset.bad_rows}", choices=("strict", "quarantine"))
    from_train: float | None = rule(None, gt=0, lt=1)  # ours: this share of the training prompts


@dataclass
class SaverConfig:
    freq_epochs: int | None = rule(None, ge=1)
    freq_steps: int | None = rule(None, ge=1)
    freq_secs: float | None = rule(None, gt=0)
    best: bool = False  # ours
    merged: bool = False  # ours, with actor.use_lora: write whole models, not adapters


@dataclass
class RecoverConfig:
    # YAML reads `on` and `off` as booleans, and an override hands over the word itself.
    mode: str = rule(
        "disabled",
        choices=("disabled", "auto"),
        alias={
            **dict.fromkeys((False, "off", "no", "false"), "disabled"),
            **dict.fromkeys((True, "on", "yes", "true"), "auto"),
        },
        why="off reads as disabled, on as auto",
    )
    freq_epochs: int | None = rule(None, ge=1)
    freq_steps: int | None = rule(None, ge=1)
    freq_secs: float | None = rule(None, gt=0)
    # Ours: verified checkpoints that stay; a run that ends done keeps none unless `all`.
    keep: int | str = rule(2, ge=1, words=("all",))
    # Ours: with mode auto, failures in a row without a new step before giving up.
    retries: int = rule(3, ge=0)


@dataclass
class EvaluatorConfig:
    freq_epochs: int | None = rule(None, ge=1)
    freq_steps: int | None = rule(None, ge=1)
    freq_secs: float | None = rule(None, gt=0)
    before_training: bool = True  # ours, as everything below
    num_samples: int = rule(8, ge=0)  # held-out prompts answered after training; 0 = none
    max_new_tokens: int = rule(64, ge=1)
    temperature: float = rule(0.0, ge=0)  # 0 = greedy
    samples_seed: int = rule(0, ge=0, le=2**32 - 1)


@dataclass
class StatsLoggerConfig:
    tensorboard: bool = True  # ours


@dataclass
class Config:
    """The whole configuration; after loading every interpolation is resolved and every field is set."""

    experiment_name: str = "dpo"
    trial_name: str | None = rule(None, blank=False)
    seed: int = rule(1, ge=0, le=2**32 - 1)
    total_train_epochs: int = rule(1, ge=1)
    total_train_steps: int | None = rule(None, ge=1)
    tokenizer_path: str = "${actor.path}"
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    train_dataset: DatasetConfig = field(default_factory=DatasetConfig)
    valid_dataset: ValidDatasetConfig | None = None
    saver: SaverConfig = field(default_factory=SaverConfig)
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    evaluator: EvaluatorConfig = field(default_factory=EvaluatorConfig)
    stats_logger: StatsLoggerConfig = field(default_factory=StatsLoggerConfig)


REQUIRED_SECTIONS = {
    "actor": "add it with at least a path, e.g. actor: {path: smollm2-135m-instruct}",
    "ref": "add the frozen reference, e.g. ref: {path: ${actor.path}}",
    "train_dataset": "add it with at least a path, e.g. train_dataset: {path: Anthropic/hh-rlhf}",
}

_RUN_KEYS = frozenset({"experiment_name", "trial_name", "fileroot"})
_MODEL_KEYS = frozenset(
    {"experiment_name", "trial_name", "init_from_scratch", "is_critic", "scheduling_spec"}
)

# Keys that the seed's system has and that mean nothing here, by section ("" is the top level).
FOREIGN: dict[str, frozenset[str]] = {
    "": frozenset({"enable_offload", "perf_tracer"}),
    "cluster": frozenset({"name_resolve"}),
    "actor": _MODEL_KEYS,
    "ref": _MODEL_KEYS | {"gradient_checkpointing", "disable_dropout"},
    "train_dataset": frozenset({"pin_memory", "num_workers"}),
    "valid_dataset": frozenset({"pin_memory", "num_workers"}),
    "saver": _RUN_KEYS | {"mode"},
    "recover": _RUN_KEYS,
    "evaluator": _RUN_KEYS,
    "stats_logger": _RUN_KEYS | {"wandb"},
}

# Foreign keys of which one value only can be ignored: any other asks for something that is not done here.
FOREIGN_FIXED: dict[str, tuple[bool, str]] = {
    "enable_offload": (False, "weights are never moved off their device between steps"),
    "actor.init_from_scratch": (False, "training starts from the weights at actor.path"),
    "ref.init_from_scratch": (False, "the reference is the model at ref.path"),
    "actor.is_critic": (False, "DPO trains a policy and has no critic"),
    "ref.is_critic": (False, "DPO has no critic"),
    "ref.disable_dropout": (True, "the reference never drops out"),
}


def section_type(hint: Any) -> type | None:
    """The dataclass of a section's type hint (`X` or `X | None`), None for a plain field."""
    for candidate in (hint, *get_args(hint)):
        if isinstance(candidate, type) and is_dataclass(candidate):
            return candidate
    return None


@cache
def section_fields(cls: type) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Field name -> (type hint, what `rule` recorded), in the order of declaration."""
    hints = get_type_hints(cls)
    return {f.name: (hints[f.name], dict(f.metadata)) for f in fields(cls)}


def field_names(cls: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration, sections left out: `seed`, `actor.optimizer.lr`, ..."""
    names = []
    for name, (hint, _) in section_fields(cls).items():
        inner = section_type(hint)
        names += field_names(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return names


def lookup(dotted: str) -> tuple[Any, dict[str, Any]] | None:
    """(type hint, rule) of a dotted key or section, None when there is no such key."""
    cls: type | None = Config
    found = None
    for part in dotted.split("."):
        known = section_fields(cls) if cls else {}
        if part not in known:
            return None
        found = known[part]
        cls = section_type(found[0])
    return found


def is_foreign(dotted: str) -> str | None:
    """The ignored key that a dotted name is or lies under (`stats_logger.wandb`), else None."""
    parts = dotted.split(".")
    if parts[0] in FOREIGN[""]:
        return parts[0]
    if len(parts) > 1 and parts[1] in FOREIGN.get(parts[0], ()):
        return ".".join(parts[:2])
    return None
