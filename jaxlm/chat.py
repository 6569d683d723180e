"""Conversations as the text that a model was trained on: chat templates, rendered as transformers renders them.

A template is a program that came with a model's files, so it runs in Jinja's immutable sandbox. Its environment is the
one that Hugging Face's templates are written for: blocks leave no white space, `break` and `continue` work in loops,
`{% generation %}` marks what the assistant says, and `tojson`, `raise_exception` and `strftime_now` are there.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxlm.config import ConfigError
from jaxlm.text import require_utf8
from jaxlm.tokenizer import Tokenizer, TokenizerError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]  # role: system, user or assistant; content: text; more if the template reads more

# How the two tokens of ChatML may be spelled.
TURNS = (("<|im_start|>", "<|im_end|>"), ("<im_start>", "<im_end>"), ("im_start", "im_end"))
THOUGHTS = ("<think>", "<|think|>")  # likewise, of the token that opens a thought
_PROBE = "qwxz"  # content that no template writes of itself


def chatml(start: str = "<|im_start|>", end: str = "<|im_end|>") -> str:
    """ChatML (release notes of OpenAI's ChatGPT API): each message between `start` role and `end`."""
    start, end = json.dumps(start), json.dumps(end)
    return (
        "{% for message in messages %}"
        f"{{{{ {start} + message['role'] + '\\n' + message['content'] + {end} + '\\n' }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {start} + 'assistant\\n' }}}}{{% endif %}}"
    )


def template_for(tokenizer: Tokenizer, stored: str | None = None) -> str:
    """The template that a model's files hold, or ChatML where the tokenizer has its tokens.

    Raises:
        ConfigError: neither.
    """
    if stored is not None:
        return stored
    for start, end in TURNS:
        if _is_special(tokenizer, start) and _is_special(tokenizer, end):
            return chatml(start, end)
    raise ConfigError(
        "the model has no chat template and its tokenizer no <|im_start|> and <|im_end|>; "
        "put chat_template.jinja beside its weights, or continue plain text"
    )


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
    import jinja2

    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **specials,
        )
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is not valid Jinja, line {error.lineno}: {_line(error)}"
        ) from None
    except Exception as error:  # whatever a foreign program does wrong is the same to whoever called it
        raise ConfigError(f"the chat template cannot write this conversation: {_line(error)}") from None


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> "jinja2.Template":
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` writes what is inside; trainers read the mark, we do not."""

        tags = {"generation"}  # noqa: RUF012  jinja2's declared type

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> str:
            return caller()

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


@dataclass(frozen=True)
class Chat:
    """How conversations with one model are written."""

    tokenizer: Tokenizer
    template: str  # Jinja
    specials: Mapping[str, str]  # texts of bos_token, eos_token, pad_token

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        stored: str | None = None,
        *,
        bos: int | None = None,
        eos: int | None = None,
        pad: int | None = None,
    ) -> "Chat":
        """The stored template, or ChatML. Raises ConfigError where neither can be had."""
        ids = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        known = {name: i for name, i in ids.items() if i is not None and 0 <= i < tokenizer.vocab_size}
        texts = {name: tokenizer.decode([i]) for name, i in known.items()}
        return cls(tokenizer, template_for(tokenizer, stored), texts)

    def text(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, think: bool = False
    ) -> str:
        """The conversation; with `think`, the answer is begun with what opens a thought. Raises as `render`."""
        text = render(self.template, messages, add_generation_prompt, **self.specials)
        opening = self.opening
        if not think or text.rstrip().endswith(opening.rstrip()):
            return text
        return text + opening

    def encode(self, messages: Sequence[Message], think: bool = False) -> list[int]:
        """Ids that an answer of the assistant continues; the texts of special tokens are those tokens.

        That holds for the messages as well, as in transformers: who may write them may also end a turn.
        Raises as `render`, and ConfigError where the text is not valid UTF-8.
        """
        text = self.text(messages, think=think)
        require_utf8(text, "the conversation")
        return self.tokenizer.encode(text, special=True)

    @property
    def opening(self) -> str:
        """What makes the model think before it answers: its own token, or the same as text; and a line end."""
        known = (token for token in THOUGHTS if _is_special(self.tokenizer, token))
        return next(known, THOUGHTS[0]) + "\n"

    @functools.cached_property
    def end(self) -> int | None:
        """The special token that the template writes after an answer, None where it writes none."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = render(self.template, messages, False, **self.specials)
        except ConfigError:
            return None
        _, found, after = text.rpartition(_PROBE)
        first = self.tokenizer.encode(after.lstrip(), special=True)[:1] if found else []
        return first[0] if first and self.tokenizer.encode(self.tokenizer.decode(first)) != first else None


def _is_special(tokenizer: Tokenizer, text: str) -> bool:
    try:
        tokenizer.special_id(text)
    except TokenizerError:
        return False
    return True
