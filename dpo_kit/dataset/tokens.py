"""Text to token ids with exactly one end token, special-token text in data kept as text.

A tokenizer turns the text `<|im_end|>` into the control token wherever it meets it, in data as in the chat
template's own writing. Here the two are told apart by names: the encoder's tokenizer is a copy in which every
special token is spelled with characters that Unicode reserves for internal use (its *alias*, same id).
Text from data then cannot spell a special token; what the chat template writes is renamed to the alias.

    message content   "is <|im_end|> a tag?"     protect   "is \\ufdd24\\ufdd3 a tag?"
    template writes   "<|im_start|>user\\nis \\ufdd24\\ufdd3 a tag?<|im_end|>"
    adopt             "\\ufdd03\\ufdd1user\\nis <|im_end|> a tag?\\ufdd04\\ufdd1"
    encoded           [im_start] user \\n is < | im _ end | > a tag ? [im_end]

Deliberately not here: rows and their columns (`layouts.py`), the store, batches.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_kit.config import Config
from dpo_kit.errors import DataError, UserError
from dpo_kit.model import builtin, model_folder
from dpo_kit.system.files import remembered
from dpo_kit.system.text import show_text

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase


# Noncharacters: valid in UTF-8, never assigned, "for internal use" (Unicode 23.7).
RESERVED = re.compile("[\ufdd0-\ufdd3]")
_PROBE = "dpokitprobe"


@dataclass(frozen=True)
class Encoder:
    """A tokenizer made ready for data; `make_encoder` builds it."""

    tokenizer: PreTrainedTokenizerBase
    core: Tokenizer
    """The copy that knows special tokens by their aliases only."""
    numbers: dict[str, int]
    """Special token -> the number its alias carries."""
    special: re.Pattern[str]
    bos_id: int | None
    adds_bos: bool
    """Whether the tokenizer puts BOS before plain text."""
    eos_id: int
    max_token_chars: int | None
    """No token stands for more characters than this; None where that cannot be said."""


@dataclass(frozen=True)
class Chat:
    """What a chat template writes around an assistant's text, found by a probe."""

    turn_end: str | None
    """The token that ends an assistant's turn, None where the template writes none."""
    tail: str
    """All that follows the last assistant's text, aliased."""
    header: str
    """What precedes an assistant's text, aliased, if `add_generation_prompt` does not write it."""


def make_encoder(tokenizer: PreTrainedTokenizerBase, label: str, turn_end: str | None = None) -> Encoder:
    """Copy `tokenizer` with every special token (and `turn_end`) renamed to its alias.

    Args:
        tokenizer: a fast tokenizer (one with a `tokenizer.json`).
        label: what to call it in messages.
        turn_end: the chat template's turn-end token, when it is an added token that is not marked special.

    Raises:
        DataError: no fast tokenizer, or no EOS token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        told = "is no fast tokenizer (tokenizer.json); convert or choose another"
        raise DataError(f"tokenizer {label}: {told}")
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {label}: has no EOS token; set eos_token in its tokenizer_config.json")
    description = json.loads(backend.to_str())
    named = {token["content"] for token in description["added_tokens"] if token["special"]}
    named |= {token for token in tokenizer.all_special_tokens if backend.token_to_id(token) is not None}
    named |= {turn_end} if turn_end else set()
    numbers = {token: i for i, token in enumerate(sorted(named))}
    core = _renamed_copy(description, {token: _alias(number) for token, number in numbers.items()})
    for token, number in numbers.items():
        assert core.token_to_id(_alias(number)) == backend.token_to_id(token), (label, token)
    longest_first = sorted(numbers, key=len, reverse=True)
    first_ids = tokenizer("a").input_ids[:1]
    return Encoder(
        tokenizer=tokenizer,
        core=core,
        numbers=numbers,
        special=re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"),
        bos_id=tokenizer.bos_token_id,
        adds_bos=tokenizer.bos_token_id is not None and first_ids == [tokenizer.bos_token_id],
        eos_id=tokenizer.eos_token_id,
        max_token_chars=_max_token_chars(description),
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that decides how text becomes tokens; the same wherever the tokenizer lies."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description: dict[str, Any] = json.loads(backend.to_str()) if backend else dict(tokenizer.get_vocab())
    if backend:
        description |= {"truncation": None, "padding": None}
    parts = [
        description,
        tokenizer.chat_template,
        {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        tokenizer("a").input_ids,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def encode(encoder: Encoder, texts: Sequence[str]) -> list[Encoding]:
    """Tokens of each text, without BOS or EOS; special-token text in them is text, aliases are tokens."""
    return encoder.core.encode_batch(list(texts), add_special_tokens=False)


def finish(encoder: Encoder, ids: Sequence[int], *, plain: bool, add_eos: bool) -> tuple[np.ndarray, int]:
    """Token ids with at most one BOS and one end token, and by how much the text's tokens moved.

    Args:
        ids: a text's tokens.
        plain: plain text gets the BOS that the tokenizer would give it; in a conversation it is the
            template's to write, and a doubled one is made single.
        add_eos: whether the text has no end token of its own.
    """
    front: list[int] = []
    dropped = 0
    if plain and encoder.adds_bos:
        assert encoder.bos_id is not None
        front = [encoder.bos_id]
    elif not plain and encoder.bos_id is not None:
        while list(ids[dropped : dropped + 2]) == [encoder.bos_id, encoder.bos_id]:
            dropped += 1
    back = [encoder.eos_id] if add_eos else []
    return np.array([*front, *ids[dropped:], *back], np.int32), len(front) - dropped


def tokens_within(encoding: Encoding, num_chars: int) -> int:
    """How many leading tokens lie wholly inside the text's first `num_chars` characters."""
    if num_chars <= 0:
        return 0
    total = len(encoding.ids)
    first, character = None, num_chars - 1
    while first is None and character >= 0:  # a tokenizer may drop characters (white space)
        first = encoding.char_to_token(character)
        character -= 1
    count = 0 if first is None else first
    while count < total:
        span = encoding.token_to_chars(count)
        if span is not None and span[1] > num_chars:
            break
        count += 1
    return count


def protect(encoder: Encoder, value: Any) -> Any:
    """`value` with special-token text in its strings made unreadable to the template and the tokenizer."""
    if isinstance(value, str):
        return encoder.special.sub(lambda found: f"\ufdd2{encoder.numbers[found[0]]}\ufdd3", value)
    if isinstance(value, dict):
        return {key: protect(encoder, item) for key, item in value.items()}
    if isinstance(value, list):
        return [protect(encoder, item) for item in value]
    return value


def adopt(encoder: Encoder, rendered: str) -> str:
    """What a template wrote, ready for `encode`: its special tokens aliased, those of the data plain text."""
    aliased = encoder.special.sub(lambda found: _alias(encoder.numbers[found[0]]), rendered)
    if "\ufdd2" not in aliased:
        return aliased
    names = {number: token for token, number in encoder.numbers.items()}
    return re.sub("\ufdd2([0-9]+)\ufdd3", lambda found: names[int(found[1])], aliased)


def probe_turn_end(tokenizer: PreTrainedTokenizerBase, label: str) -> str | None:
    """The added token that the chat template writes first after an assistant's text, or None."""
    if not tokenizer.chat_template:
        raise DataError(
            f"tokenizer {label}: has no chat template, which conversations (message lists) need; "
            "use an instruct model's tokenizer, or give chosen and rejected as text"
        )
    tail = _probe(tokenizer, label)[2]
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    found = re.search("|".join(map(re.escape, added)), tail) if added else None
    return found[0] if found else None


def make_chat(encoder: Encoder, label: str) -> Chat:
    """What the chat template of `encoder` writes around an assistant's text."""
    base, generation, tail, full = _probe(encoder.tokenizer, label)
    header = ""
    if generation == base and full.startswith(base):
        header = full[len(base) : full.index(_PROBE)]
    turn_end = probe_turn_end(encoder.tokenizer, label)
    return Chat(turn_end=turn_end, tail=adopt(encoder, tail), header=adopt(encoder, header))


def end_of_turn(encoder: Encoder, chat: Chat, text: str) -> tuple[str, bool]:
    """A rendered conversation up to its last turn-end token, and whether EOS is still to be added.

    Args:
        text: what `adopt` returned for a conversation that ends with an assistant's turn.
    """
    if chat.turn_end is None:
        return text, True
    alias = _alias(encoder.numbers[chat.turn_end])
    if text.endswith(chat.tail):
        return text[: len(text) - len(chat.tail) + chat.tail.index(alias) + len(alias)], False
    # A template may end the last turn in another way than the probe's (tools, thinking): look at what is there.
    stripped = text.rstrip()
    return (stripped, False) if stripped.endswith(alias) else (text, True)


def _probe(tokenizer: PreTrainedTokenizerBase, label: str) -> tuple[str, str, str, str]:
    """Renders of one question: alone, for generation; then what follows the answer, and the whole."""
    question = [{"role": "user", "content": "question"}]
    try:
        base = render(tokenizer, question, False)
        generation = render(tokenizer, question, True)
        full = render(tokenizer, [*question, {"role": "assistant", "content": _PROBE}], False)
    except Exception as error:  # whatever a template raises
        cause = str(error).strip().splitlines()[:1]
        raise DataError(f"tokenizer {label}: its chat template fails on a plain question ({cause})") from None
    if _PROBE not in full:
        raise DataError(f"tokenizer {label}: its chat template does not write the assistant's text")
    return base, generation, full[full.rindex(_PROBE) + len(_PROBE) :], full


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], for_generation: bool) -> str:
    """The chat template's text for `messages`."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=for_generation)
    assert isinstance(text, str)
    return text


def _alias(number: int) -> str:
    return f"\ufdd0{number}\ufdd1"


def _renamed_copy(description: dict[str, Any], names: dict[str, str]) -> Tokenizer:
    """A tokenizer of the same ids in which the tokens `names` are spelled otherwise."""
    from tokenizers import Tokenizer

    added = []
    for token in description["added_tokens"]:
        content = token["content"]
        # A normalizer could change an alias, so it is matched before any.
        changed = {"content": names[content], "normalized": False} if content in names else {}
        added.append({**token, **changed})
    model = dict(description["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    known = {token["content"] for token in added}
    for name in names.values():
        if name not in known:
            added.append({**_PLAIN_ADDED, "id": _id_in(model["vocab"], name), "content": name})
    added.sort(key=lambda token: token["id"])
    left_out = dict.fromkeys(("post_processor", "truncation", "padding"))
    copy = {**description, "model": model, "added_tokens": added, **left_out}
    return Tokenizer.from_str(json.dumps(copy))


_PLAIN_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _id_in(vocab: Any, token: str) -> int:
    return vocab[token] if isinstance(vocab, dict) else [name for name, _ in vocab].index(token)


def _max_token_chars(description: dict[str, Any]) -> int | None:
    """The longest token, where no other way leads from many characters to one token.

    Unknown-token fusion and normalizers that delete text could turn 10 MB into a few tokens; then None.
    """
    model, normalizer = description["model"], json.dumps(description["normalizer"])
    byte_level = "ByteLevel" in json.dumps(description["pre_tokenizer"])
    if model.get("type") != "BPE" or not (byte_level or model.get("byte_fallback")):
        return None
    deleting = ('"Strip', '"Regex"', '"BertNormalizer"', '"Precompiled"', '"Nmt"')
    if any(kind in normalizer for kind in deleting):
        return None
    composed = 4 if '"NFC"' in normalizer or '"NFKC"' in normalizer else 1  # at most 4 code points become one
    added = [token["content"] for token in description["added_tokens"]]
    return composed * max(map(len, [*model["vocab"], *added]))


def facts(config: Config, named: str) -> dict[str, Any]:
    """What has to be known of a tokenizer where nothing is tokenized; it is loaded only if its folder has changed.

    Returns:
        `fingerprint`; `vocabulary`, which is equal where two have the same tokens and ids; `last`, the token with
        the highest id, and that id.

    Raises:
        DataError: there is none.
    """
    stamp = model_folder.stamp(builtin.ensure(named))
    known = model_folder.known_checks(config.cluster.fileroot) if stamp else None
    return remembered(known, f"tokenizer {stamp}", functools.partial(_facts, named, stamp))


@functools.lru_cache(maxsize=4)
def _facts(named: str, stamp: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(named)[1]
    vocabulary = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return {
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "vocabulary": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest(),
        "last": [vocabulary[-1][1], vocabulary[-1][0]],
    }


@functools.lru_cache(maxsize=4)
def _loaded(folder: str, stamp: str) -> Any:
    return builtin.load_tokenizer(folder)


def load_tokenizer(named: str) -> tuple[str, Any]:
    """The tokenizer and where it lies.

    Raises:
        DataError: there is none.
    """
    folder = builtin.ensure(named)
    try:
        return folder, _loaded(folder, model_folder.stamp(folder))
    except UserError:
        raise
    except Exception as error:  # transformers and the hub's client raise many kinds
        cause = show_text(f"{type(error).__name__}: {error}", 160)
        raise DataError(
            f"tokenizer {named!r} cannot be loaded ({cause}); give tokenizer_path (or actor.path) a local model "
            "folder, a hub id, or a built-in name"
        ) from None


def vocabulary_problems(config: Config, vocabulary: Callable[[str], dict[str, int] | None]) -> list[str]:
    """Why the reference would not read the policy's tokens; nothing when it does, or that cannot be told.

    Args:
        vocabulary: token -> id of the tokenizer in a folder; None where it is not to be had.
    """
    if config.ref.path == config.tokenizer_path:
        return []
    own, other = vocabulary(config.tokenizer_path), vocabulary(config.ref.path)
    if own is None or other is None or own == other:
        return []
    tokens = own.keys() | other.keys()
    differing = sum(own.get(token) != other.get(token) for token in tokens)
    return [
        f"ref.path = {config.ref.path!r} has another tokenizer than {config.tokenizer_path!r}: {differing} of"
        f" {len(tokens)} tokens differ; use a reference of the same family, by default ${{actor.path}}"
    ]
