"""Values of users as they are shown in messages: short, on one line.

Deliberately not here: redaction, HTML (view/html).
"""

from __future__ import annotations

from collections.abc import Sequence


def show(value: object, limit: int = 60) -> str:
    """A value for a message: one line, escaped, short."""
    if isinstance(value, str):
        value = value[: limit + 1]
    text = repr(value)
    text = text if len(text) <= limit else f"{text[:limit]}...{text[0] if text[0] in '[{' + chr(39) else ''}"
    return text.encode("utf-8", "backslashreplace").decode()


def show_text(text: str, limit: int = 200) -> str:
    """Somebody else's message inside ours: one line, short."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def listed(names: Sequence[object]) -> str:
    shown = ", ".join(show(name, 40) for name in names[:12])
    return (shown or "none") + (f" and {len(names) - 12} more" if len(names) > 12 else "")
