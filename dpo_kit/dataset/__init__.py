"""Raw preferences and a tokenizer become a pair store: `build` one, `open` it again, say what became of the rows.

Deliberately not here: what is done with pairs (engine), the store's files (preferences).
"""

from dpo_kit.dataset.builder import build, open
from dpo_kit.dataset.report import format_report, shared_prompts

__all__ = [
    "build",
    "format_report",
    "open",
    "shared_prompts",
]
