"""End tokens and special-token text over a matrix of tokenizers and chat templates."""

from __future__ import annotations

import itertools

import pytest

from dpo_kit.dataset import tokens
from dpo_kit.errors import DataError
from tests.toy_tokenizers import CHATML, TEMPLATES, toy_tokenizer

FAMILIES = ("bytes", "metaspace", "unigram", "wordpiece")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = [*QUESTION, {"role": "assistant", "content": "The answer is Paris."}]
TWO_TURNS = [*ANSWER, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]

# template -> what ends a text: the template's own turn-end token, else EOS
ENDS = {
    "chatml": "<|im_end|>",
    "chatml, no line break": "<|im_end|>",
    "chatml after BOS": "<|im_end|>",
    "chatml after two BOS": "<|im_end|>",
    "chatml, no generation prompt": "<|im_end|>",
    "llama2": "</s>",
    "phi3": "<|end|>",
    "no end token": "</s>",
    "eos between turns only": "</s>",
    "trims": "<|im_end|>",
}


def conversation_ids(tokenizer, messages) -> list[int]:
    """The way `pairing` takes, for one conversation."""
    encoder = tokens.make_encoder(tokenizer, "toy", tokens.probe_turn_end(tokenizer, "toy"))
    chat = tokens.make_chat(encoder, "toy")
    text = tokens.adopt(encoder, tokens.render(tokenizer, tokens.protect(encoder, messages), False))
    text, add_eos = tokens.end_of_turn(encoder, chat, text)
    ids = tokens.encode(encoder, [text])[0].ids
    return tokens.finish(encoder, ids, plain=False, add_eos=add_eos)[0].tolist()


def plain_ids(tokenizer, text) -> list[int]:
    encoder = tokens.make_encoder(tokenizer, "toy")
    ids = tokens.encode(encoder, [text])[0].ids
    return tokens.finish(encoder, ids, plain=True, add_eos=True)[0].tolist()


@pytest.mark.parametrize("messages", [ANSWER, TWO_TURNS], ids=["one turn", "two turns"])
@pytest.mark.parametrize(("family", "template"), itertools.product(FAMILIES, TEMPLATES))
@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
def test_conversation_ends_in_exactly_one_end_token(family, template, messages, eos):
    tokenizer = toy_tokenizer(family, bos="<s>", eos=eos, adds="bos", template=TEMPLATES[template])
    ids = conversation_ids(tokenizer, messages)
    expected = ENDS[template] if ENDS[template] != "</s>" else eos
    ends = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end|>", "</s>"])}
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == expected
    assert ids[-2] not in ends
    assert ids.count(tokenizer.bos_token_id) == ("BOS" in template or template == "llama2")
    # The plain way, which recognises what the template wrote, up to the end token.
    plain = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    if template == "chatml after two BOS":
        plain = plain[1:]
    length = len(ids) - 1
    assert ids[:length] == plain[:length]
    dropped = tokenizer.decode(plain[length:]).replace(expected, "", 1).replace(eos, "")
    assert dropped.strip() == ""


@pytest.mark.parametrize(("family", "adds"), itertools.product(FAMILIES, ["", "bos", "bos eos"]))
def test_plain_text_has_the_tokenizers_bos_and_one_eos(family, adds):
    tokenizer = toy_tokenizer(family, bos="<s>", adds=adds)
    ids = plain_ids(tokenizer, "Hello there. The answer is yes")
    text = tokenizer("Hello there. The answer is yes", add_special_tokens=False).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids == ([bos] if adds else []) + text + [eos]
    assert plain_ids(tokenizer, "") == ([bos] if adds else []) + [eos]


def test_bos_and_eos_may_be_one_token():
    tokenizer = toy_tokenizer(bos="</s>", eos="</s>", adds="bos")
    ids = plain_ids(tokenizer, "Hello")
    assert (ids[0], ids[-1], ids.count(ids[0])) == (tokenizer.eos_token_id, tokenizer.eos_token_id, 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelled", ["<|im_end|>", "</s>", "<s>", "x</s><|im_end|>y", "<s</s>", "<unk>"])
def test_special_token_text_in_data_stays_text(family, spelled):
    tokenizer = toy_tokenizer(family, bos="<s>", adds="bos", template=CHATML)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    text = f"a {spelled} tag"
    ids = plain_ids(tokenizer, text)
    assert not special & set(ids[1:-1])
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{spelled}{spelled}"}]
    ids = conversation_ids(tokenizer, messages)
    harmless = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = [i for i in ids if i in special]
    assert found == [i for i in conversation_ids(tokenizer, harmless) if i in special]
    if family == "bytes":
        body = tokenizer.decode(ids)
        assert body.startswith(f"<|im_start|>user\na {spelled} tag<|im_end|>\n")
        assert body.endswith(f"\n{spelled}{spelled}<|im_end|>")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_renamed_copy_tokenizes_as_the_original(family):
    tokenizer = toy_tokenizer(family, bos="<s>", adds="bos")
    encoder = tokens.make_encoder(tokenizer, "toy")
    for text in ("Hello there", "  two  spaces ", "é 你好 🙂", "\n\nHuman: x\n\nAssistant: y", "", "im_end"):
        original = tokenizer(text, add_special_tokens=False).input_ids
        assert tokens.encode(encoder, [text])[0].ids == original
        if family in ("bytes", "metaspace"):
            split = tokenizer(
                "a </s> b" + text, add_special_tokens=False, split_special_tokens=True
            ).input_ids
            assert tokens.encode(encoder, ["a </s> b" + text])[0].ids == split


def test_a_turn_end_that_is_not_marked_special_is_guarded_too():
    template = CHATML.replace("<|im_end|>", "<turn>")
    tokenizer = toy_tokenizer(template=template, plain_tokens=("<turn>", "<think>"))
    messages = [QUESTION[0], {"role": "assistant", "content": "<think>a <turn> b"}]
    ids = conversation_ids(tokenizer, messages)
    turn, think = tokenizer.convert_tokens_to_ids(["<turn>", "<think>"])
    assert ids.count(turn) == 2
    assert ids[-1] == turn
    assert ids.count(think) == 1  # a token for text: data may use it


def test_a_template_that_ends_the_last_turn_in_another_way():
    """The tail is looked up in the text when it is not the probe's."""
    template = CHATML.replace("'<|im_end|>\n'", "('<|im_end|>' if 'x' in m['content'] else '<|im_end|>\n')")
    tokenizer = toy_tokenizer(template=template)
    ids = conversation_ids(tokenizer, [QUESTION[0], {"role": "assistant", "content": "x"}])
    assert tokenizer.decode(ids).endswith("x<|im_end|>")
    template = CHATML.replace("'<|im_end|>\n'", "('' if 'x' in m['content'] else '<|im_end|>\n')")
    tokenizer = toy_tokenizer(template=template)
    ids = conversation_ids(tokenizer, [QUESTION[0], {"role": "assistant", "content": "x"}])
    assert tokenizer.decode(ids).endswith("x</s>")


def test_header_of_a_template_that_writes_no_generation_prompt():
    def header(template: str) -> str:
        tokenizer = toy_tokenizer(template=TEMPLATES[template], bos="<s>")
        return tokens.make_chat(tokens.make_encoder(tokenizer, "toy"), "toy").header

    assert header("chatml") == ""
    assert header("chatml, no generation prompt").endswith("assistant\n")


@pytest.mark.parametrize(
    ("text", "num_chars", "expected"),
    [
        ("Hello there", 0, []),
        ("Hello there", 5, ["Hello"]),
        ("Hello there", 6, ["Hello"]),  # the token " there" lies across: it belongs to what follows
        ("Hello there", 11, ["Hello", "Ġthere"]),
        ("é!", 1, ["Ã", "©"]),  # both byte tokens of one letter
    ],
)
def test_tokens_within(text, num_chars, expected):
    from tests.toy_tokenizers import toy_tokenizer as make

    encoder = tokens.make_encoder(make(), "toy")
    encoding = tokens.encode(encoder, [text])[0]
    found = encoding.tokens[: tokens.tokens_within(encoding, num_chars)]
    joined = "".join(found).replace("Ġ", " ")
    assert joined == "".join(expected).replace("Ġ", " ")


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_within_equals_counting_spans(family):
    encoder = tokens.make_encoder(toy_tokenizer(family), "toy")
    text = "\n\nHuman: Hello  é 你好\n\nAssistant: The answer is yes. "
    encoding = tokens.encode(encoder, [text])[0]
    for num_chars in range(len(text) + 1):
        counted = next(
            (i for i, (_, end) in enumerate(encoding.offsets) if end > num_chars), len(encoding.offsets)
        )
        assert tokens.tokens_within(encoding, num_chars) == (counted if num_chars else 0)


def test_max_token_chars_is_a_true_bound_or_none():
    bounded = tokens.make_encoder(toy_tokenizer("bytes"), "toy")
    assert bounded.max_token_chars is not None
    for text in ("Hello there " * 50, "a" * 500, " " * 500, "é" * 100, "<|im_start|>" * 40):
        num_tokens = len(tokens.encode(bounded, [text])[0].ids)
        assert num_tokens * bounded.max_token_chars >= len(text)
    for family in ("unigram", "wordpiece"):  # a row of unknown letters may be one token
        assert tokens.make_encoder(toy_tokenizer(family), "toy").max_token_chars is None


def test_fingerprint_is_of_what_decides_the_tokens(tmp_path):
    from transformers import AutoTokenizer

    base = toy_tokenizer(bos="<s>", template=CHATML)
    base.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert tokens.tokenizer_fingerprint(again) == tokens.tokenizer_fingerprint(base)
    changed = [
        toy_tokenizer(bos="<s>", template=CHATML + " "),
        toy_tokenizer(bos="<s>", template=CHATML, eos="<|im_end|>"),
        toy_tokenizer(bos="<s>", template=CHATML, adds="bos"),
        toy_tokenizer(bos="<s>", template=CHATML, plain_tokens=("<x>",)),
        toy_tokenizer("metaspace", bos="<s>", template=CHATML),
    ]
    prints = {tokens.tokenizer_fingerprint(tokenizer) for tokenizer in [base, *changed]}
    assert len(prints) == 1 + len(changed)


def test_tokenizers_that_cannot_be_used():
    with pytest.raises(DataError, match="tokenizer toy: has no EOS token; set eos_token"):
        tokens.make_encoder(toy_tokenizer(eos=None), "toy")
    with pytest.raises(DataError, match="tokenizer toy: has no chat template"):
        tokens.probe_turn_end(toy_tokenizer(), "toy")
    with pytest.raises(DataError, match="its chat template fails on a plain question"):
        tokens.probe_turn_end(toy_tokenizer(template="{{ raise_exception('no') }}"), "toy")
    with pytest.raises(DataError, match="does not write the assistant's text"):
        tokens.probe_turn_end(toy_tokenizer(template="hello"), "toy")
    with pytest.raises(DataError, match="tokenizer toy: is no fast tokenizer"):
        tokens.make_encoder(object(), "toy")
