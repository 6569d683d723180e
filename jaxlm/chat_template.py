"""Chat templates as programs: the named ones, and what a template writes of a conversation, as transformers writes it.

A template came with a model's files, so it runs in Jinja's immutable sandbox. Its environment is the one that Hugging
Face's templates are written for: blocks leave no white space, `break` and `continue` work in loops,
`{% generation %}` marks what the assistant says, and `tojson`, `raise_exception` and `strftime_now` are there.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxlm.config import ConfigError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]  # role: system, user or assistant; content: text; more if the template reads more
Span = tuple[int, int]  # first character, and the one after the last

# What a thought is called: templates read the first of these names, gpt-oss's the second.
_THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def chatml(start: str = "<|im_start|>", end: str = "<|im_end|>", generation: bool = False) -> str:
    """ChatML (release notes of OpenAI's ChatGPT API): each message between `start` role and `end`.

    Args:
        generation: whether what the assistant says is marked, `end` included and the line end after it not. The text
            is the same; but programs other than transformers may not know the mark, so no model carries it.
    """
    start, end = json.dumps(start), json.dumps(end)
    opened, said = f"{start} + message['role'] + '\\n'", f"message['content'] + {end}"
    message = f"{{{{ {opened} + {said} + '\\n' }}}}"
    if generation:
        message = f"{{{{ {opened} }}}}{_marked(said)}{{{{ '\\n' }}}}"
    return (
        f"{{% for message in messages %}}{message}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {start} + 'assistant\\n' }}}}{{% endif %}}"
    )


def llama3(generation: bool = False) -> str:
    """Llama 3 (its model card's prompt format): bos, then each message behind a header, without white space around it.

    Args:
        generation: as of `chatml`.
    """
    said = "message['content'] | trim + '<|eot_id|>'"
    return (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        f"{_marked(said) if generation else f'{{{{ {said} }}}}'}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    )


def _marked(said: str) -> str:
    """An expression, marked where the assistant says it."""
    return (
        f"{{% if message['role'] == 'assistant' %}}{{% generation %}}{{{{ {said} }}}}{{% endgeneration %}}"
        f"{{% else %}}{{{{ {said} }}}}{{% endif %}}"
    )


LLAMA3 = llama3()
NAMED_TEMPLATES = {"chatml": chatml(), "llama3": LLAMA3}
# How the two tokens of ChatML may be spelled.
TURNS = (("<|im_start|>", "<|im_end|>"), ("<im_start>", "<im_end>"), ("im_start", "im_end"))


@functools.lru_cache(maxsize=8)
def with_generation(template: str) -> str:
    """The same template with what the assistant says marked, where it is one of those made here."""
    known = {chatml(*tokens): chatml(*tokens, generation=True) for tokens in TURNS}
    return (known | {llama3(): llama3(generation=True)}).get(template, template)


def render(
    template: str, messages: Sequence[Message], add_generation_prompt: bool = True, **specials: str
) -> str:
    """The text of a conversation.

    Args:
        template: Jinja.
        add_generation_prompt: whether what opens the assistant's turn is put at the end.
        specials: texts of special tokens that the template may write, such as `bos_token="<s>"`.

    Raises:
        ConfigError: the template is not valid, refuses these messages or cannot work with them.
    """
    return render_spans(template, messages, add_generation_prompt, **specials)[0]


def render_spans(
    template: str, messages: Sequence[Message], add_generation_prompt: bool = False, **specials: str
) -> tuple[str, list[Span]]:
    """(text, characters that the template writes between `{% generation %}` and `{% endgeneration %}`).

    Raises:
        ConfigError: as `render`; or such a part is not where it was written, as that of a macro.
    """
    import jinja2

    said = _Said()
    pieces = []
    try:
        for piece in _compiled(template).generate(
            messages=[_readable(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **specials,
            **{_SAID: said},
        ):
            pieces.append(piece)
            said.length += len(piece)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is not valid Jinja, line {error.lineno}: {_line(error)}"
        ) from None
    except Exception as error:  # whatever a foreign program does wrong is the same to whoever called it
        raise ConfigError(f"the chat template cannot write this conversation: {_line(error)}") from None
    text = "".join(pieces)
    if not all(text.startswith(part, start) for start, part in said.parts):
        raise ConfigError(
            "the chat template has {% generation %} where its place in the text cannot be told, as in a macro; "
            "put it where the text is written"
        )
    return text, [(start, start + len(part)) for start, part in said.parts]


def has_generation(template: str) -> bool:
    """Whether a template marks what the assistant says."""
    return _GENERATION.search(template) is not None


_SAID = "_said"  # variable of a template that is being rendered


@dataclass
class _Said:
    """What was written between generation tags so far."""

    length: int = 0  # characters written so far
    parts: list[tuple[int, str]] = field(default_factory=list)  # (first character, text)


def _readable(message: Message) -> dict[str, Any]:
    """A message without what is null; a thought has all the names that templates read."""
    told = {key: value for key, value in message.items() if value is not None}
    thought = next((told[name] for name in _THOUGHT_FIELDS if name in told), None)
    return told if thought is None else {"thinking": thought} | told | {"reasoning_content": thought}


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> "jinja2.Template":
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` writes what is inside and remembers it."""

        tags = {"generation"}  # noqa: RUF012  jinja2's declared type

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        @jinja2.pass_context
        def _write(self, context: jinja2.runtime.Context, caller: Any) -> str:
            part, said = caller(), context[_SAID]
            said.parts.append((said.length, part))
            return part

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would write `<` as an HTML escape."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
