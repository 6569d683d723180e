"""Chat templates: the text and the ids that transformers makes of a conversation; what is refused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.chat import Chat, chatml, render, template_for
from jaxlm.config import ConfigError
from jaxlm.tokenizer import PATTERN, Tokenizer

transformers = pytest.importorskip("transformers")

# In the manner of Llama 3: bos by the template, headers, trimmed content, a default system message with the date.
HEADERS = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = "Today is " ~ strftime_now("%d %b %Y") %}
    {%- set rest = messages %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system + "<|eot_id|>" }}
{%- for message in rest %}
    {%- if message.role not in ['user', 'assistant', 'system'] %}
        {{- raise_exception("no role " + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {% generation %}{{- message['content'] | trim }}{% endgeneration %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# Everything that an environment can do otherwise: white space of blocks, loop controls, tojson, namespaces, undefined.
CORNERS = """
{% set state = namespace(seen=0) %}
  {% for message in messages %}
  {% if message.content == "" %}{% continue %}{% endif %}
  {% if loop.index > 3 %}{% break %}{% endif %}
  {% set state.seen = state.seen + 1 %}
{{ loop.index }}|{{ message | tojson }}|{{ message.content | tojson(indent=2) }}|{{ nothing }}
  {% generation %}
    {{ message.content }}
  {% endgeneration %}
{% endfor %}
{{ state.seen }} {{ tools is none }} {{ documents is defined }} {{ add_generation_prompt }} {{ eos_token }}<end>
"""
ROLES = st.sampled_from(["user", "assistant"])
CONTENT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["<|im_end|>", " <b>\n\n", "{{ x }}", "é漢😀", "<|eot_id|>"]
)
CONVERSATION = st.tuples(
    st.booleans(), st.lists(st.tuples(ROLES, CONTENT), min_size=1, max_size=5), CONTENT
).map(
    lambda drawn: [
        *([{"role": "system", "content": drawn[2]}] if drawn[0] else []),
        *({"role": role, "content": content} for role, content in drawn[1]),
    ]
)
SPECIALS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|eot_id|>") + (
    "<|start_header_id|>",
    "<|end_header_id|>",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Every byte a token, and the special tokens of both templates."""
    specials = {text: 256 + n for n, text in enumerate(SPECIALS)}
    return Tokenizer(PATTERN, {bytes([b]): b for b in range(256)}, specials)


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    """The same tokenizer in transformers."""
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<|bos|>", eos_token="<|eos|>"
    )


@pytest.mark.parametrize("template", [chatml(), HEADERS, CORNERS], ids=["chatml", "headers", "corners"])
@settings(max_examples=40, deadline=None)
@given(messages=CONVERSATION, prompt=st.booleans())
def test_conversations_are_what_transformers_writes(
    tokenizer: Tokenizer, theirs, template: str, messages: list[dict[str, str]], prompt: bool
) -> None:
    """Text and ids of random conversations, special tokens in the messages included."""
    chat = Chat.of(tokenizer, template, bos=256, eos=257)
    asked = {"chat_template": template, "add_generation_prompt": prompt}
    expected = theirs.apply_chat_template(messages, tokenize=False, **asked)
    assert chat.text(messages, prompt) == expected
    if prompt:
        ids = theirs.apply_chat_template(messages, return_dict=False, **asked)
        assert chat.encode(messages) == ids


def test_special_tokens_of_the_text_are_special_ids(tokenizer: Tokenizer) -> None:
    """A turn's borders are one id each, and the answer's end is known from the template alone."""
    start, end = tokenizer.special_id("<|im_start|>"), tokenizer.special_id("<|im_end|>")
    chat = Chat.of(tokenizer)
    hi = [{"role": "user", "content": "hi"}]
    assert chat.encode(hi) == [start, *b"user\nhi", end, *b"\n", start, *b"assistant\n"]
    assert chat.end == end
    assert Chat.of(tokenizer, HEADERS, bos=256).end == tokenizer.special_id("<|eot_id|>")
    assert Chat.of(tokenizer, "{% for m in messages %}{{ m.content }}.\n{% endfor %}").end is None
    assert Chat.of(tokenizer, "{{ raise_exception('never') }}").end is None


def test_thinking_begins_the_answer(tokenizer: Tokenizer) -> None:
    """The opening token and a line end follow the generation prompt once; without such a token they are text."""
    hi = [{"role": "user", "content": "hi"}]
    chat = Chat.of(tokenizer)
    assert chat.text(hi, think=True) == chat.text(hi) + "<think>\n"
    assert chat.encode(hi, think=True) == [*chat.encode(hi), tokenizer.special_id("<think>"), *b"\n"]
    opened = Chat.of(tokenizer, chatml() + "<think>\n")
    assert opened.text(hi, think=True) == opened.text(hi), "the template has done it already"
    bare = {bytes([b]): b for b in range(256)}
    plain = Chat.of(Tokenizer(PATTERN, bare, {"im_start": 256, "im_end": 257}))
    assert plain.encode(hi, think=True)[-8:] == list(b"<think>\n")
    other = Chat.of(Tokenizer(PATTERN, bare, {"<|think|>": 256}), "")
    assert other.encode(hi, think=True) == [256, *b"\n"]


def test_the_stored_template_counts_then_chatml_then_none(tokenizer: Tokenizer) -> None:
    """AstraGPT's spelling of ChatML's tokens is known; a tokenizer without either is refused in one line."""
    bare = {bytes([b]): b for b in range(256)}
    assert template_for(tokenizer, "mine") == "mine"
    assert template_for(tokenizer) == chatml()
    hi = [{"role": "user", "content": "hi"}]
    renamed = Chat.of(Tokenizer(PATTERN, bare, {"im_start": 256, "im_end": 257}))
    assert renamed.encode(hi) == [256, *b"user\nhi", 257, *b"\n", 256, *b"assistant\n"]
    with pytest.raises(ConfigError, match=r"no chat template .*chat_template\.jinja") as caught:
        Chat.of(Tokenizer(PATTERN, bare, {"<|im_start|>": 256}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", r"not valid Jinja, line 1"),
        ("\n{{ raise_exception('roles must\nalternate') }}", r"conversation: roles must$"),
        ("{{ messages[9].content }}", "conversation: .*has no element 9"),
        ("{{ 1 + 'a' }}", "conversation: unsupported operand"),
        ("{{ 1 / 0 }}", "conversation: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "conversation: access to attribute '__class__' .* unsafe"),
        ("{{ messages.append(1) }}", "conversation: access to attribute 'append' .* unsafe"),
        ("{% include 'other' %}", "conversation: "),
        ("{{ cycler.__init__.__globals__ }}", "conversation: .*unsafe"),
    ],
)
def test_a_template_that_cannot_is_one_line(template: str, message: str) -> None:
    """Wrong syntax, a refusal, a slip, and whatever wants out of the sandbox."""
    with pytest.raises(ConfigError, match=message) as caught:
        render(template, [{"role": "user", "content": "hi"}])
    assert "\n" not in str(caught.value)


def test_a_conversation_that_is_not_utf8_is_refused(tokenizer: Tokenizer) -> None:
    """A byte from the command line that was none must not become a replacement character in silence."""
    with pytest.raises(ConfigError, match="conversation is not valid UTF-8"):
        Chat.of(tokenizer).encode([{"role": "user", "content": "a\udcff"}])
