"""Names that people know from other trainers and papers, and what they are called here; for hints in errors only.

Each is written in lower case with `_`. A value maps to one of the field's choices, or to the remark that is made.

Deliberately not here: other spellings that are accepted (`schema.rule(alias=...)`).
"""

from __future__ import annotations

KEYS = {
    "adam_beta1": "actor.optimizer.beta1",
    "adam_beta2": "actor.optimizer.beta2",
    "adam_epsilon": "actor.optimizer.eps",
    "dataset": "train_dataset",
    "dataset_name": "train_dataset.path",
    "dataset_path": "train_dataset.path",
    "epochs": "total_train_epochs",
    "eval_dataset": "valid_dataset",
    "eval_steps": "evaluator.freq_steps",
    "learning_rate": "actor.optimizer.lr",
    "loss": "actor.loss_type",
    **dict.fromkeys(("lora_r", "lora_dim"), "actor.lora_rank"),
    "lora_target_modules": "actor.target_modules",
    "lr_scheduler": "actor.optimizer.lr_scheduler_type",
    "max_grad_norm": "actor.optimizer.gradient_clipping",
    "max_seq_length": "train_dataset.max_length",
    "max_steps": "total_train_steps",
    "min_lr": "actor.optimizer.min_lr_ratio",
    "model": "actor.path",
    "model_name": "actor.path",
    "model_name_or_path": "actor.path",
    "model_path": "actor.path",
    "num_epochs": "total_train_epochs",
    "num_train_epochs": "total_train_epochs",
    "optim": "actor.optimizer.type",
    "output_dir": "cluster.fileroot",
    "per_device_train_batch_size": "train_dataset.batch_size",
    "precompute_ref_log_probs": "ref.logps",
    "ref_model": "ref.path",
    "reference_model": "ref.path",
    "run_name": "trial_name",
    "save_steps": "saver.freq_steps",
    "scheduler_type": "actor.optimizer.lr_scheduler_type",
    "steps": "total_train_steps",
    "tokenizer": "tokenizer_path",
    "torch_dtype": "actor.dtype",
    "total_steps": "total_train_steps",
    "train_batch_size": "train_dataset.batch_size",
    "use_peft": "actor.use_lora",
    "warmup_ratio": "actor.optimizer.warmup_steps_proportion",
    "warmup_steps": "actor.optimizer.warmup_steps_proportion",
}


# Keys that have no like here, and what takes their place.
REMARKS = {
    "gradient_accumulation_steps": "micro-batches follow from the tokens in actor.mb_spec.max_tokens_per_mb, and never"
    " change a step; train_dataset.batch_size is the pairs of a step",
    "max_prompt_length": "nothing is cut here: pairs with a text over train_dataset.max_length are left out",
    "max_completion_length": "nothing is cut here: pairs with a text over train_dataset.max_length are left out",
    **dict.fromkeys(("logging_steps", "log_every"), "every step is recorded"),
    **dict.fromkeys(
        ("deepspeed", "accelerate", "fsdp", "fsdp_config"), "ranks and sharding are actor.backend"
    ),
    "lr_scheduler_kwargs": "see lr_scheduler_type, warmup_steps_proportion and min_lr_ratio of actor.optimizer",
}


def _not_built(*names: str) -> dict[str, str]:
    return {name: f"{name} is not built here" for name in names}


_SMOOTHED = "that is sigmoid with actor.label_smoothing"
LOSS_TYPES = {
    **dict.fromkeys(("dpo", "logistic", "log_sigmoid", "logsigmoid", "bradley_terry"), "sigmoid"),
    **dict.fromkeys(("cdpo", "conservative", "conservative_dpo", "label_smoothing"), _SMOOTHED),
    **dict.fromkeys(("rdpo", "robust_dpo", "dpo_robust"), "robust"),
    **dict.fromkeys(("slic", "slic_hf", "slichf"), "hinge"),
    **dict.fromkeys(("dpo_norm", "ln_dpo", "lndpo", "length_normalized"), "sigmoid_norm"),
    "ipo_pair": "ipo",
    **_not_built(
        *("aot", "aot_pair", "aot_unpaired", "apo", "apo_down", "apo_zero", "bco", "bco_pair", "cpo"),
        *("discopop", "exo", "exo_pair", "grpo", "kto", "kto_pair", "nca", "nca_pair", "orpo", "ppo"),
        *("rrhf", "sft", "simpo", "sppo", "sppo_hard"),
    ),
}

_SCALED = "it would need loss scaling, which is not built here; use bfloat16"
DTYPES = {
    "bf16": "bfloat16",
    **dict.fromkeys(("fp32", "f32", "float", "single"), "float32"),
    **dict.fromkeys(("fp64", "f64", "double"), "float64"),
    **dict.fromkeys(("fp16", "f16", "float16", "half"), _SCALED),
    **_not_built("fp8", "float8", "int8", "int4", "nf4"),
}

_WARMED = "warm-up is actor.optimizer.warmup_steps_proportion, before any of them"
SCHEDULES = {
    **dict.fromkeys(("cosine_annealing", "cosine_decay"), "cosine"),
    "cosine_with_min_lr": "that is cosine, with actor.optimizer.min_lr_ratio",
    **dict.fromkeys(("constant_with_warmup", "linear_with_warmup", "cosine_with_warmup", "warmup"), _WARMED),
    **dict.fromkeys(("none", "fixed"), "constant"),
    **_not_built(
        *("cosine_with_restarts", "exponential", "inverse_sqrt", "one_cycle", "polynomial"),
        *("reduce_lr_on_plateau", "step", "warmup_stable_decay", "wsd"),
    ),
}

OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "fused_adam"), "adam"),
    **_not_built("adafactor", "adamw_8bit", "adamw_bnb_8bit", "lamb", "lion", "muon", "paged_adamw_8bit"),
    **_not_built("rmsprop", "sgd", "shampoo", "sophia"),
}

PEFT_TYPES = _not_built(
    "adalora", "dora", "ia3", "loha", "lokr", "oft", "prefix_tuning", "prompt_tuning", "qlora"
)
