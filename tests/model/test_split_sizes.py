"""Which models tensor-parallel ranks can share, by their sizes; refused before anything starts."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from dpo_kit.errors import ConfigError
from dpo_kit.launch import preflight
from dpo_kit.model import builtin, split_sizes
from tests.helpers import tiny_config

QWEN = {  # Qwen2.5-7B
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}


@pytest.mark.parametrize(
    ("change", "tp_size", "said"),
    [
        ({}, 1, ""),
        ({}, 2, ""),
        ({}, 4, ""),
        ({}, 8, "28 attention heads and 4 key-value heads do not divide by 8; use t1 or t2 or t4"),
        ({"vocab_size": 152065}, 2, "152065 rows of the vocabulary do not divide by 2; use t1"),
        (
            {"intermediate_size": 18946},
            4,
            "18946 columns of the gated layer do not divide by 4; use t1 or t2",
        ),
        ({"model_type": "gemma2"}, 1, ""),
        ({"model_type": "gemma2"}, 2, "of type 'gemma2' (llama, qwen2, qwen3, mistral); use t1"),
    ],
)
def test_sizes_that_do_not_divide_are_named_with_what_does(change, tp_size, said):
    found = split_sizes.problem(QWEN | change, tp_size)
    assert found.endswith(said)
    assert bool(found) == bool(said)


def test_a_launch_refuses_before_anything_starts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    save_file({}, tmp_path / "model.safetensors")
    builtin.ensure("tiny-random")
    config = tiny_config(tmp_path, "actor.backend=fsdp:d1t8", "ref.backend=fsdp:d1t8", f"ref.path={tmp_path}")
    with pytest.raises(ConfigError) as caught:
        preflight.check_models(config)
    told = "actor.backend = 'fsdp:d1t8' has t = 8, and of"
    assert caught.value.problems == [
        f"{told} actor.path = 'tiny-random' 4 attention heads and 4 key-value heads do not divide by 8; use t1 or t2"
        " or t4",
        f"{told} ref.path = '{tmp_path}' 28 attention heads and 4 key-value heads do not divide by 8; use t1 or t2 or"
        " t4",
    ]
