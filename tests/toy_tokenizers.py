"""Small tokenizers and chat templates of every family the kit meets, made in milliseconds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

TEXT = [
    "What is the capital of France? The capital of France is Paris.",
    "\n\nHuman: Hello there\n\nAssistant: Hello! How can I help you today?",
    "a tag like <|im_end|> or </s> or <s> inside of a text, 1234567890 [INST] [/INST] user assistant system",
    "Assistant: the answer is yes, and User: the question is no. é ü 你好",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>"]


def _core(family: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if family == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif family == "metaspace":  # as Llama 2: text gets a first space, letters it lacks become bytes
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=[*SPECIAL, *bytes_], show_progress=False, max_token_length=8
        )
    elif family == "unigram":
        core = Tokenizer(models.Unigram())
        core.normalizer = normalizers.NFKC()
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:
        assert family == "wordpiece", family
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.normalizer = normalizers.BertNormalizer(lowercase=True)
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator(TEXT * 3, trainer)
    if family == "metaspace":  # the byte tokens were only reserved as special ones: they are plain vocabulary
        import json

        description = json.loads(core.to_str())
        description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] in SPECIAL]
        core = Tokenizer.from_str(json.dumps(description))
    return core


@cache
def _core_text(family: str) -> str:
    return _core(family).to_str()


def toy_tokenizer(
    family: str = "bytes",
    *,
    bos: str | None = None,
    eos: str | None = "</s>",
    adds: str = "",
    template: str | None = None,
    plain_tokens: tuple[str, ...] = (),
) -> Any:
    """A fast tokenizer.

    Args:
        family: bytes, metaspace, unigram or wordpiece.
        adds: what it puts around plain text by itself: "", "bos" or "bos eos".
        template: the chat template.
        plain_tokens: added tokens that are not marked special.
    """
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(_core_text(family))
    if plain_tokens:
        core.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain_tokens])
    if adds:
        around = [(token, core.token_to_id(token)) for token in (bos, eos) if token]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}" if adds == "bos eos" else f"{bos} $A", special_tokens=around
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        unk_token="<unk>",
        additional_special_tokens=[token for token in SPECIAL if token not in (bos, eos, "<unk>")],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def save_tokenizer(folder: Path, **options: Any) -> str:
    """A toy tokenizer as a local folder."""
    toy_tokenizer(**options).save_pretrained(folder)
    return str(folder)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml, no line break": CHATML.replace("<|im_end|>\n", "<|im_end|>"),
    "chatml after BOS": "{{ bos_token }}" + CHATML,
    "chatml after two BOS": "{{ bos_token }}{{ bos_token }}" + CHATML,
    "chatml, no generation prompt": CHATML.split("{% if add")[0],
    "llama2": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ ' ' + m['content'] + ' ' + eos_token }}"
        "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "no end token": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "eos between turns only": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{% if not loop.last or add_generation_prompt %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "trims": CHATML.replace("m['content']", "m['content'].strip()"),
}
