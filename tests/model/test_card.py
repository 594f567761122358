"""The model card: curves as text, numbers of the run, nothing of the data."""

from __future__ import annotations

import pytest

from dpo_kit.model.export import model_card, sparkline
from tests.helpers import tiny_config


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([3.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], "▁▂▃▄▅▆▇█"),
        ([1.0, 0.0], "█▁"),
    ],
)
def test_a_curve_is_one_line(values, line):
    assert sparkline(values) == line


def test_a_long_curve_is_drawn_by_its_means():
    assert sparkline([0.0, 2.0, 6.0, 8.0], width=2) == "▁█"
    assert len(sparkline([float(i) for i in range(1000)])) == 48


def record(step, loss, accuracy):
    return {"step": step, "dpo/loss": loss, "dpo/reward_accuracy": accuracy, "dpo/reward_margin": 0.5 * step}


def held_out(step, accuracy):
    return {
        "step": step,
        "dpo-eval/loss": 0.6,
        "dpo-eval/reward_accuracy": accuracy,
        "dpo-eval/reward_margin": 0.1,
    }


def test_the_card_holds_settings_curves_and_held_out_numbers(tmp_path):
    lines = [held_out(0, None), record(1, 0.6931, None), record(2, 0.5, 0.75), held_out(2, 0.625)]
    card = model_card(tiny_config(tmp_path, "actor.beta=0.25"), lines)
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "(`sigmoid`, beta 0.25), 2 steps" in card
    assert "| `dpo/loss` | 0.6931 | 0.5 | `█▁` |" in card
    assert "| `dpo/reward_accuracy` | undefined | 0.75 | `▁` |" in card
    assert "| 0 | 0.6000 | undefined (all ties) | 0.1 |" in card
    assert "| 2 | 0.6000 | 62.5% | 0.1 |" in card
    assert "```yaml\nexperiment_name: dpo\n" in card


def test_a_run_without_steps_has_a_card():
    card = model_card(tiny_config("runs"), [])
    assert "0 steps" in card
    assert "## Held-out pairs" not in card


def test_the_card_of_adapters_says_how_they_are_loaded():
    lora = ("actor.use_lora=true", "actor.target_modules=[q_proj,v_proj]")
    card = model_card(tiny_config("runs", *lora), [])
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "adapters of q_proj, v_proj (rank 32, alpha 16); load them with `PeftModel" in card
    card = model_card(tiny_config("runs", *lora, "saver.merged=true"), [])
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "merged into the weights" in card
