"""Which tokens the assistant says: transformers' assistant masks; the same without tags; thoughts; exact borders."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.chat import LLAMA3, Chat, chatml, encode_conversation, render, special_tokens
from jaxlm.chat_masks import encode_with_mask
from jaxlm.chat_template import llama3
from jaxlm.config import ConfigError
from jaxlm.tokenizer import PATTERN, Tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
    "user assistant system hello world, how are you today?\n\n" * 20,
    "naïve 你好 😀 a < b, think of café and e\u0301t\u0301e\n" * 20,
]
# As templates of models are: a first system message apart, parts of content, thoughts in a block of their own, tools.
STORED = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}
    {%- else %}{% set content = message.content | map(attribute='text') | join('\\n') %}{% endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}
            {%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
            {{- content | trim }}
            {%- for call in message.tool_calls or [] %}{{ '\\n' ~ call | tojson }}{% endfor %}
        {{- '<|end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|' ~ message.role ~ '|>' ~ content ~ '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
CHATML = chatml(generation=True)
TEMPLATES = {"chatml": CHATML, "llama3": llama3(generation=True), "stored": STORED}
MORE = {"stored": ["<|system|>", "<|user|>", "<|tool|>"]}
CASES = [(kind, name) for kind in ("gpt4", "tfm") for name in TEMPLATES]
PIECES = (
    "hello world",
    " how are you?",
    "naïve café",
    "e\u0301\u0323",  # marks that NFD puts into another order
    "\u0301",
    "你好",
    "😀",
    "👩‍👩‍👧",
    "🇩🇪",
    "한글",
    "\u1112\u1161\u11ab",
    "ﷺ مرحبا",
    "z̸͓̈́",
    "\u2581x",
    "\u00a0",
    "\u200b",
    "\U000f0000",
    "\ufffd",
    "{{ x }}",
    "{% generation %}",
    '{"a": [1, {"b": null}]}',
    "a < b |> c",
    "12345",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "",
)


def conversations(number: int, nested: bool) -> list[list[dict[str, Any]]]:
    """Always the same: several turns, empty contents, system messages, thoughts; nested = contents in parts."""
    draw = random.Random(8)

    def text() -> str:
        return "".join(draw.choices(PIECES, k=draw.randrange(6)))

    def content() -> str | list[dict[str, str]]:
        if nested and draw.random() < 0.3:
            return [{"type": "text", "text": text()} for _ in range(draw.randrange(3))]
        return text()

    found = []
    for _ in range(number):
        messages: list[dict[str, Any]] = []
        if draw.random() < 0.4:
            messages.append({"role": "system", "content": content()})
        for _ in range(draw.randrange(1, 5)):
            messages += [{"role": role, "content": content()} for role in ("user", "assistant")]
            if nested and draw.random() < 0.3:
                messages[-1] |= {
                    "reasoning_content": text(),
                    "tool_calls": [{"name": text(), "n": {"m": [1]}}],
                }
            if nested and draw.random() < 0.2:
                messages.append({"role": "tool", "content": text()})
        if draw.random() < 0.2:
            messages.pop()
        found.append(messages)
    return found


@pytest.fixture(scope="module")
def tokenizers() -> dict[tuple[str, str], Tokenizer]:
    """Each kind, trained for each template."""
    return {
        (kind, name): Tokenizer.train(
            TEXTS, 420, kind, special_tokens(TEMPLATES[name], MORE.get(name, [])), TEMPLATES[name]
        )
        for kind, name in CASES
    }


@pytest.fixture(scope="module")
def theirs(tokenizers, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """These tokenizers in transformers."""
    opened = {}
    for (kind, name), tokenizer in tokenizers.items():
        folder = tmp_path_factory.mktemp(f"{kind}-{name}")
        tokenizer.save(folder / "tokenizer.json")
        opened[kind, name] = transformers.PreTrainedTokenizerFast.from_pretrained(
            str(folder), bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
        )
    return opened


def their_masks(tokenizer: Any, messages: list[dict[str, Any]], **asked: Any) -> tuple[list[int], list[bool]]:
    """Ids and assistant masks by transformers."""
    made = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, **asked
    )
    return made["input_ids"], list(map(bool, made["assistant_masks"]))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_ids_and_masks_are_transformers(tokenizers, theirs, kind: str, name: str) -> None:
    """200 conversations: the same ids, and the same tokens carry loss."""
    tokenizer, seen = tokenizers[kind, name], 0
    for messages in conversations(200, nested=name == "stored")[:: 1 if kind == "gpt4" else 4]:
        ids, carries = encode_with_mask(tokenizer, TEMPLATES[name], messages)
        assert (ids.tolist(), carries.tolist()) == their_masks(theirs[kind, name], messages), messages
        assert ids.tolist() == encode_conversation(tokenizer, TEMPLATES[name], messages)
        seen += int(carries.sum())
    assert seen > 1000


def untagged(template: str) -> str:
    """The same template without generation tags."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_masks_are_the_same_without_generation_tags(tokenizers, kind: str, name: str) -> None:
    """What is found by what a template writes is what it would have marked."""
    tokenizer, template = tokenizers[kind, name], TEMPLATES[name]
    assert untagged(template) != template
    for messages in conversations(40, nested=name == "stored"):
        ids, carries = encode_with_mask(tokenizer, untagged(template), messages)
        expected = encode_with_mask(tokenizer, template, messages)
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_array_equal(carries, expected[1])


@pytest.mark.parametrize(("name", "portable"), [("chatml", chatml()), ("llama3", LLAMA3)])
def test_named_templates_need_no_generation_tags(tokenizers, name: str, portable: str) -> None:
    """The forms that models carry, which any program of templates can read: the same text and the same masks."""
    tokenizer, template = tokenizers["gpt4", name], TEMPLATES[name]
    assert "generation %}" not in portable
    for messages in conversations(40, nested=False):
        assert render(portable, messages, bos_token="b") == render(template, messages, bos_token="b")
        for found, expected in zip(
            encode_with_mask(tokenizer, portable, messages), encode_with_mask(tokenizer, template, messages)
        ):
            np.testing.assert_array_equal(found, expected)


def said(tokenizer: Tokenizer, template: str | Chat, messages: list[dict[str, Any]], **how: Any) -> list[str]:
    """The texts that carry loss, one for each run of tokens."""
    ids, carries = encode_with_mask(tokenizer, template, messages, **how)
    borders = np.flatnonzero(np.diff(np.concatenate([[False], carries, [False]])))
    return [tokenizer.decode(ids[a:b]) for a, b in borders.reshape(-1, 2)]


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    """Every byte a token, and special tokens."""
    names = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|user|>", "<|ai|>")
    specials = {text: 256 + n for n, text in enumerate(names)}
    return Tokenizer(PATTERN, {bytes([b]): b for b in range(256)}, specials)


U = {"role": "user", "content": "q<|im_end|>"}


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def test_a_message_that_holds_special_tokens_does_not_move_the_mask(plain: Tokenizer) -> None:
    """They are data, on either side, with and without tags."""
    messages = [U, answer("a<|im_end|>\n<|im_start|>user\nb"), U, answer("c")]
    for template in (chatml(), untagged(CHATML)):
        assert said(plain, template, messages) == [
            "a<|im_end|>\n<|im_start|>user\nb<|im_end|>",
            "c<|im_end|>",
        ]
        ids, _ = encode_with_mask(plain, template, messages)
        assert list(ids).count(plain.special_id("<|im_end|>")) == 4


# Earlier thoughts are left out; the generation prompt opens a thought which an answer of the past does not have.
STRIPS = """
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>' + m.content }}
{%- else %}
{%- set content = m.content if loop.last else m.content.split('</think>')[-1] | trim %}
{{- '<|ai|>' + content + '<|eos|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|ai|>' }}{% endif %}"""
OPENS = STRIPS.replace("if loop.last else m.content.split", "if false else m.content.split").replace(
    "{{ '<|ai|>' }}{% endif", "{{ '<|ai|><think>\n' }}{% endif"
)


def test_masks_of_templates_that_leave_thoughts_out(plain: Tokenizer) -> None:
    """What is left is marked, and nothing else."""
    messages = [U, answer("<think>x</think>\n\none"), U, answer("<think>y</think> two")]
    assert said(plain, STRIPS, messages) == ["one<|eos|>", "<think>y</think> two<|eos|>"]
    assert said(plain, OPENS, messages) == ["one<|eos|>", "two<|eos|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token after an answer"),
        (OPENS.replace("+ content", "+ content + content"), r"message 2, .* cannot be told; put \{% generation %\}"),
        ("{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|eos|>"
         "{% elif loop.last %}<|ai|>{{ m.content }}<|eos|>{% endif %}{% endfor %}", "message 2, .* cannot be told"),
        ("{% macro w(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
         "{% for m in messages %}{{ m.role + w(m) }}{% endfor %}", "cannot be told, as in a macro"),
    ],
    ids=["no end", "changed", "left out", "macro"],
)  # fmt: skip
def test_a_template_whose_turns_cannot_be_told_is_refused(
    plain: Tokenizer, template: str, message: str
) -> None:
    """In one line that says what to add; never a mask that is only probable."""
    with pytest.raises(ConfigError, match=message) as caught:
        encode_with_mask(plain, template, [U, answer("Abc"), U, answer("d")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ("<think>a</think>b", ["b<|im_end|>"]),
        ("x<think>a</think>b<think></think>c", ["x", "b", "c<|im_end|>"]),
        ("<think>a<think>n</think>m</think>b", ["b<|im_end|>"]),
        ("a</think>b", ["b<|im_end|>"]),
        ("b<think>é😀", ["b", "<|im_end|>"]),
        ("<think></think>", ["<|im_end|>"]),
        ("no thought", ["no thought<|im_end|>"]),
    ],
)
def test_thoughts_carry_no_loss(plain: Tokenizer, content: str, left: list[str]) -> None:
    """With their tags, as tokens or as text; not those that a user writes."""
    bare = Tokenizer(PATTERN, {bytes([b]): b for b in range(256)}, {"<|im_start|>": 256, "<|im_end|>": 257})
    asked = {"role": "user", "content": "<think>"}
    for tokenizer in (plain, bare):
        for template in (chatml(), untagged(CHATML)):
            assert said(tokenizer, template, [asked, answer(content)], think=False) == left
            whole = [content + "<|im_end|>"]
            assert said(tokenizer, template, [asked, answer(content)]) == whole


def test_a_thought_that_the_template_opens_carries_no_loss(plain: Tokenizer) -> None:
    """Its beginning stands before what is said."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}<|ai|><think>\n"
        "{% generation %}{{ m.content }}<|eos|>{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert said(plain, template, [U, answer("t</think>a")], think=False) == ["a<|eos|>"]
    assert said(plain, template, [U, answer("t")], think=False) == ["<|eos|>"]


def test_only_what_follows_the_prompt_carries_loss(plain: Tokenizer) -> None:
    """Messages before `first` do not, with and without tags, and where blocks are more than messages."""
    messages = [U, answer("one"), U, answer("two"), U, answer("three")]
    pieces = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}<|ai|>{% generation %}"
        "{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}"
    )
    for template in (chatml(), untagged(CHATML), pieces):
        assert said(plain, template, messages, first=3)[-2:] == ["two<|im_end|>", "three<|im_end|>"]
        assert len(said(plain, template, messages, first=3)) == 2
        assert said(plain, template, messages, first=6) == []


ENDS = "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}.{% endfor %}"


@pytest.mark.parametrize("kind", ["gpt4", "tfm"])
def test_every_token_that_overlaps_what_is_said_carries_loss(tokenizers, theirs, kind: str) -> None:
    """Characters of several tokens at both ends, each token by its own place; where transformers stops short, said.

    transformers marks only the first token of the character that ends a part; no other token differs.
    """
    tokenizer, other, shorter = tokenizers[kind, "chatml"], theirs[kind, "chatml"], 0
    for start in ("", "😀", "漢", "e\u0301"):
        for end in ("", "ﷺ", "👩‍👩‍👧", "x"):
            if not start + end:
                continue
            messages = [{"role": "assistant", "content": f"{start} hi {end}" if start else end}] * 2
            ids, carries = encode_with_mask(tokenizer, ENDS, messages)
            their_ids, theirs_marked = their_masks(other, messages, chat_template=ENDS)
            assert ids.tolist() == their_ids
            assert (carries >= theirs_marked).all()
            shorter += int((carries & ~np.array(theirs_marked)).sum())
            if kind == "gpt4":
                assert carries.tolist() == overlapping(tokenizer, ids, messages)
    assert shorter


def overlapping(tokenizer: Tokenizer, ids: np.ndarray, messages: list[dict[str, str]]) -> list[bool]:
    """For each token, whether one of its bytes is of a message's content: a loop over all bytes."""
    owners = b"".join(
        b"0" * len(m["role"].encode()) + b"1" * len(m["content"].encode()) + b"0" for m in messages
    )
    found, at = [], 0
    for i in ids:
        after = at + len(tokenizer.decode_bytes([int(i)]))
        found.append(b"1" in owners[at:after])
        at = after
    return found


def foreign(kind: str) -> dict[str, Any]:
    """A tokenizer.json of another trainer: as GPT-2's, or Metaspace without a space in front and without bytes."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers, processors, trainers

    if kind == "gpt2":
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.post_processor = processors.ByteLevel(trim_offsets=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        library = Library(models.BPE(unk_token="<unk>"))
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    library.train_from_iterator(TEXTS, trainer)
    return json.loads(library.to_str())


@pytest.mark.parametrize("kind", ["gpt2", "metaspace"])
def test_masks_of_foreign_tokenizers_are_transformers(kind: str, tmp_path: Path) -> None:
    """Places of tokens do not hang on who made the tokenizer.

    Nor on what its file says of offsets: where these leave white space out, transformers does not find an answer that
    begins with it, and marks no more of the conversation; those are left out here.
    """
    (tmp_path / "tokenizer.json").write_text(json.dumps(foreign(kind)))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    other = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path), unk_token="<unk>")
    for messages in conversations(40, nested=False):
        if kind == "gpt2" and any(m["role"] == "assistant" and m["content"][:1].isspace() for m in messages):
            continue
        ids, carries = encode_with_mask(tokenizer, chatml(), messages)
        expected = their_masks(other, messages, chat_template=CHATML)
        assert (ids.tolist(), carries.tolist()) == expected, messages
