"""What a row means: its layout, whether its values can be used, and the two texts it stands for.

| layout | columns | text that is tokenized |
|---|---|---|
| `raw` | chosen, rejected: text | as it stands (HH-RLHF) |
| `prompt` | prompt, chosen, rejected: text | prompt + response, joined as they stand |
| `conversation` | chosen, rejected: message lists; prompt: none or a message list | through the chat template |

    raw           "\\n\\nHuman: hi\\n\\nAssistant: Hello!"          scored from the token-level LCP
                  '----- context ------' '- response -'
    conversation  "<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>"
                  '------------- prompt = context -----------------' '-- response ---'

Deliberately not here: reading files (`rows.py`), token ids and the LCP (`dataset.py`).
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_kit.dataset.readers import KNOWN, REQUIRED, type_name
from dpo_kit.dataset.tokens import RESERVED, Chat, Encoder, adopt, end_of_turn, protect, render
from dpo_kit.system.text import show, show_text

RAW, PROMPT, CONVERSATION = "raw", "prompt", "conversation"
ASSISTANT_MARK = "\n\nAssistant:"
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*\\?["'](role|content|from|value)\\?["']\s*:""")


class RowProblem(Exception):
    """What keeps one row from being a pair; the text names the column."""


class NotUtf8(RowProblem):
    """The text holds bytes that are not UTF-8; the file decides what to do about it."""


@dataclass(frozen=True)
class Texts:
    """The two texts of a row, and positions in the chosen one, in characters."""

    chosen: str
    rejected: str
    chosen_eos: bool
    """Whether EOS is still to be added."""
    rejected_eos: bool
    plain: bool
    """Plain text gets the tokenizer's BOS; in a conversation the template writes it."""
    prompt_chars: int | None
    """Where scoring starts; None: at the LCP."""
    context_chars: int | None
    """What an answer is generated from; None: the LCP."""
    prompt_text: str
    """Equal for rows with the same prompt."""
    has_special: bool
    """Whether the data spells a special token."""


def layout_of(kinds: Mapping[str, str]) -> str:
    """The layout of rows whose columns are of these kinds (see `kinds_of`)."""
    if kinds["chosen"] == "a message list":
        return CONVERSATION
    return PROMPT if "prompt" in kinds else RAW


def kinds_of(values: Mapping[str, Any]) -> dict[str, str]:
    """`text` or `a message list` for each known column, after checking every value.

    Raises:
        RowProblem: a value that is neither, or cannot be used.
    """
    kinds = {}
    for column in KNOWN:
        if column not in values:
            if column in REQUIRED:
                raise RowProblem(f"has no column {column!r}")
            continue
        value = values[column]
        if isinstance(value, str):
            _check_characters(value, f"column {column!r}")
            if _MESSAGES_AS_TEXT.match(value):
                raise RowProblem(f"column {column!r} is a message list written as a string{_remedy(value)}")
            kinds[column] = "text"
        elif isinstance(value, list):
            _check_messages(value, f"column {column!r}", column in REQUIRED)
            kinds[column] = "a message list"
        elif isinstance(value, dict):
            raise RowProblem(f"column {column!r} is one object; a message list is needed, [{{...}}, ...]")
        else:
            what = type_name(value)
            shown = f" ({show(value)})" if what not in ("null", "NaN") else ""
            raise RowProblem(f"column {column!r} is {what}{shown}; text or a message list is needed")
    if kinds["chosen"] != kinds["rejected"]:
        raise RowProblem(f"column 'chosen' is {kinds['chosen']}, column 'rejected' is {kinds['rejected']}")
    if kinds["chosen"] == "text" and kinds.get("prompt", "text") != "text":
        raise RowProblem("column 'prompt' is a message list, column 'chosen' is text; make both the same")
    return kinds


def _remedy(text: str) -> str:
    """What makes a list of the text of a message list."""
    for name, read in (("json.loads", json.loads), ("ast.literal_eval", ast.literal_eval)):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            if isinstance(read(text.strip()), list):
                return f"; store it as a list ({name} it, and save as .jsonl or .parquet)"
    return ", and cut or damaged; make it anew, as a list"


def check_kinds(kinds: Mapping[str, str], first: Mapping[str, str]) -> None:
    """Raise `RowProblem` unless a row has the columns and kinds of the first row."""
    for column in KNOWN:
        here, there = kinds.get(column, "not there"), first.get(column, "not there")
        if here != there:
            raise RowProblem(f"column {column!r} is {here}, in the first row it is {there}")


def texts_of(values: Mapping[str, Any], layout: str, encoder: Encoder, chat: Chat | None) -> Texts:
    """The texts of a row that `kinds_of` has checked.

    Raises:
        RowProblem: the prompt is there twice, or the chat template refuses the conversation.
    """
    if layout == CONVERSATION:
        assert chat is not None
        return _conversation_texts(values, encoder, chat)
    chosen, rejected = values["chosen"], values["rejected"]
    has_special = any(encoder.special.search(values[column]) for column in KNOWN if column in values)
    if layout == RAW:
        common = chosen[: common_chars(chosen, rejected)]
        mark = common.rfind(ASSISTANT_MARK)
        context = mark + len(ASSISTANT_MARK) if mark >= 0 else None
        known = common[:context] if context else common[: common.rfind("\n") + 1] or common
        return Texts(chosen, rejected, True, True, True, None, context, known, has_special)
    prompt = values["prompt"]
    if _repeats(prompt, chosen, rejected):
        raise RowProblem(
            f"column 'chosen' repeats the prompt {show(prompt, 40)}; keep it in one place: cut it from chosen and "
            "rejected, or leave the column 'prompt' out"
        )
    at = len(prompt)
    return Texts(prompt + chosen, prompt + rejected, True, True, True, at, at, prompt.strip(), has_special)


def _conversation_texts(values: Mapping[str, Any], encoder: Encoder, chat: Chat) -> Texts:
    prompt, chosen, rejected = _messages_of(values)
    given = prompt or _common_messages(chosen, rejected)
    guarded = protect(encoder, [prompt + chosen, prompt + rejected, given])
    for_answer = all(side[len(given)]["role"] == "assistant" for side in guarded[:2])
    chosen_text, chosen_eos = _rendered(encoder, chat, guarded[0], "chosen")
    rejected_text, rejected_eos = _rendered(encoder, chat, guarded[1], "rejected")
    prompt_chars: int | None = 0
    if given:
        try:
            opening = adopt(encoder, render(encoder.tokenizer, guarded[2], for_answer))
            opening += chat.header if for_answer else ""
            prompt_chars = common_chars(opening, chosen_text)
        except Exception:  # some templates refuse such a conversation when it is cut here: then the LCP
            prompt_chars = None
    return Texts(
        chosen=chosen_text,
        rejected=rejected_text,
        chosen_eos=chosen_eos,
        rejected_eos=rejected_eos,
        plain=False,
        prompt_chars=prompt_chars,
        context_chars=prompt_chars or None,
        prompt_text=json.dumps(given, sort_keys=True, default=str),
        has_special=guarded[:2] != [prompt + chosen, prompt + rejected],
    )


def _messages_of(values: Mapping[str, Any]) -> tuple[list, list, list]:
    """prompt, chosen, rejected without the nulls that Arrow adds for keys other rows have."""
    chosen, rejected = _cleaned(values["chosen"]), _cleaned(values["rejected"])
    prompt = values.get("prompt") or []
    if isinstance(prompt, str):
        for column, messages in (("chosen", chosen), ("rejected", rejected)):
            first = next((message for message in messages if message["role"] == "user"), {"content": None})
            if first["content"] != prompt:
                raise RowProblem(
                    f"column 'prompt' is text that is not the first user message of column {column!r}; "
                    "make it a message list, or leave it out"
                )
        return [], chosen, rejected
    prompt = _cleaned(prompt)
    if prompt:
        for column, messages in (("chosen", chosen), ("rejected", rejected)):
            if messages[: len(prompt)] == prompt:
                raise RowProblem(
                    f"column {column!r} repeats the prompt {show(prompt[-1].get('content'), 40)}; keep it in one "
                    f"place: cut it from chosen and rejected, or leave the column 'prompt' out"
                )
    return prompt, chosen, rejected


def _cleaned(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: item for key, item in message.items() if item is not None} for message in messages]


def _common_messages(chosen: list, rejected: list) -> list:
    """The leading messages both have, leaving each at least one."""
    count = 0
    while count < min(len(chosen), len(rejected)) - 1 and chosen[count] == rejected[count]:
        count += 1
    return chosen[:count]


def _rendered(encoder: Encoder, chat: Chat, messages: list, column: str) -> tuple[str, bool]:
    try:
        text = adopt(encoder, render(encoder.tokenizer, messages, False))
    except Exception as error:  # templates raise jinja's errors and, on odd messages, anything
        cause = show_text(str(error) or type(error).__name__, 100)
        raise RowProblem(f"column {column!r} is refused by the tokenizer's chat template ({cause})") from None
    return end_of_turn(encoder, chat, text)


def _check_characters(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        letter = text[error.start]
        if "\udc80" <= letter <= "\udcff":
            raise NotUtf8(
                f"{what} holds byte 0x{ord(letter) - 0xDC00:02x} at character {error.start}, which is not UTF-8"
            ) from None
        raise RowProblem(
            f"{what} holds half a character at {error.start} (lone surrogate U+{ord(letter):04X}); repair the text"
        ) from None
    if reserved := RESERVED.search(text):
        point = f"U+{ord(reserved[0]):04X}"
        raise RowProblem(f"{what} holds {point}, which Unicode reserves for programs; remove it")


def _check_messages(messages: list, what: str, needs_assistant: bool) -> None:
    if not messages:
        raise RowProblem(f"{what} is an empty list")
    for number, message in enumerate(messages):
        at = f"{what} message {number}"
        if not isinstance(message, dict):
            raise RowProblem(f'{at} is {type_name(message)}; {{"role": ..., "content": ...}} is needed')
        if not isinstance(message.get("role"), str):
            keys = ", ".join(map(show, message)) or "none"
            raise RowProblem(f"{at} has no text under 'role' (keys: {keys})")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise RowProblem(f"{at} has {type_name(content)} under 'content'; text is needed")
        for text in _strings(message):
            _check_characters(text, at)
    if needs_assistant and messages[-1]["role"] != "assistant":
        if not any(message["role"] == "assistant" for message in messages):
            raise RowProblem(f"{what} has no assistant turn; the last message must be the assistant's")
        raise RowProblem(f"{what} ends with a {show(messages[-1]['role'])} turn; it must be the assistant's")


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in _strings(item)]


def _repeats(prompt: str, chosen: str, rejected: str) -> bool:
    """Whether the responses carry the prompt again.

    An answer may echo a word ("Hi" - "Hi there"), so a short prompt has to stand in both responses.
    """
    bare = prompt.strip()
    num_words = len(bare.split())
    if num_words < 2 and len(bare) < 12:
        return False
    if bare in chosen[: common_chars(chosen, rejected)]:
        return True
    return (num_words >= 3 or len(bare) >= 20) and chosen.lstrip().startswith(bare)


def common_chars(a: str, b: str) -> int:
    """Number of leading characters that two texts have in common, by bisection (comparing slices is fast)."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
