"""Tokenizers in GGUF files: complete, back again with the same ids, and refused where llama.cpp's ids would differ."""

from typing import Any

import numpy as np
import pytest
from helpers import random_params, tiny

from convert import gguf_file
from convert.gguf_tokenizer import tokenizer_metadata
from convert.rules import ConversionError
from jaxlm.chat import chatml
from jaxlm.config import ModelConfig
from jaxlm.tensor_file import Lazy
from jaxlm.tokenizer import GPT2_PATTERN, PATTERN, SPECIAL_TOKENS, Tokenizer

gguf = pytest.importorskip("gguf")

TEXTS = [
    "def f(x):\n    return x + 1234567\n\n\n",
    "don't I'LL you've aaaa 你好 😀 ñandú e\u0301\t\r\n x ",
] * 40
FORMER = (
    r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++\z|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}{1,3}|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 340)


def model(vocab_size: int) -> ModelConfig:
    return tiny(n_layers=1, vocab_size=vocab_size)


def exported(path, config: ModelConfig, tokenizer: Tokenizer | None) -> Any:
    params = {path: Lazy.of(value) for path, value in random_params(config, dtype=np.float32).items()}
    gguf_file.write(path, config, params, kind="f32", tokenizer=tokenizer, name="test")
    return gguf.GGUFReader(path)


def test_the_tokenizer_is_complete(tokenizer, tmp_path):
    """Tokens, kinds, merges, ids of the special ones, flags and the chat template, as gguf's reader reads them."""
    reader = exported(tmp_path / "m.gguf", model(343), tokenizer)
    facts = {k.removeprefix("tokenizer.ggml."): f.contents() for k, f in reader.fields.items()}
    assert (facts["model"], facts["pre"]) == ("gpt2", "llama-bpe")
    assert len(facts["tokens"]) == len(facts["token_type"]) == 343
    assert facts["tokens"][340:] == ["[PAD340]", "[PAD341]", "[PAD342]"]
    kinds = {"<|eos|>": 3, "a": 1, "[PAD340]": 5, "<|unused_0|>": 3}
    for token, kind in kinds.items():
        if token in facts["tokens"]:
            assert facts["token_type"][facts["tokens"].index(token)] == kind, token
    for token, name in (("<|bos|>", "bos"), ("<|eos|>", "eos"), ("<|pad|>", "padding")):
        assert facts[f"{name}_token_id"] == tokenizer.special_id(token)
    assert not (facts["add_bos_token"] or facts["add_eos_token"] or facts["add_space_prefix"])
    assert facts["merges"] == [" ".join(pair) for pair in tokenizer._to_json()["model"]["merges"]]
    assert facts["tokenizer.chat_template"] == chatml()


def test_a_tokenizer_comes_back_with_the_same_ids(tokenizer, tmp_path):
    """The fingerprint covers pattern, tokens and special tokens; padding of the model's vocabulary is no token."""
    exported(tmp_path / "m.gguf", model(343), tokenizer)
    source = gguf_file.read(tmp_path / "m.gguf")
    assert source.tokenizer is not None and source.notes == []
    assert source.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert source.tokenizer.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_gpt2s_kind_of_tokenizer_is_named_so(tokenizer, tmp_path):
    """One separator for both ends."""
    published = Tokenizer(GPT2_PATTERN, tokenizer.codec.ranks, {"<|endoftext|>": 333})
    reader = exported(tmp_path / "m.gguf", model(published.vocab_size), published)
    facts = {k.removeprefix("tokenizer.ggml."): f.contents() for k, f in reader.fields.items()}
    assert (facts["pre"], facts["bos_token_id"], facts["eos_token_id"]) == ("gpt-2", 333, 333)
    assert "padding_token_id" not in facts and "tokenizer.chat_template" not in facts
    back = gguf_file.read(tmp_path / "m.gguf").tokenizer
    assert back is not None and back.fingerprint() == published.fingerprint()


def test_chatml_renders_a_conversation():
    """As the special tokens of a trained tokenizer mean it."""
    jinja2 = pytest.importorskip("jinja2")
    messages = [{"role": "user", "content": "hi"}]
    rendered = jinja2.Template(chatml()).render(messages=messages, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


SINGLE = {bytes([b]): b for b in range(256)} | {b"ab": 256}
END = {"<|eos|>": 300}
REFUSED = {
    "the pattern of former versions": (
        Tokenizer(FORMER, SINGLE, END),
        "white space at the end of a text together",
    ),
    "o200k's pattern": (Tokenizer(O200K, SINGLE, END), "no pre-tokenizer that splits as this pattern"),
    "a token without merges": (
        Tokenizer(GPT2_PATTERN, SINGLE | {b"xyz": 257}, END),
        "no merge makes the token 'xyz'",
    ),
    "a word as special token": (Tokenizer(PATTERN, SINGLE, END | {"stop": 301}), "the ordinary word 'stop'"),
    "a letter as special token": (Tokenizer(PATTERN, SINGLE, END | {"A": 301}), "for the special token 'A'"),
    "a token that llama.cpp parses": (Tokenizer(PATTERN, SINGLE, END | {"<|start|>": 301}), "'<|start|>'"),
    "no merges": (Tokenizer(PATTERN, dict(list(SINGLE.items())[:256]), END), "no merges at all"),
    "no end": (Tokenizer(PATTERN, SINGLE, {"<|bos|>": 300}), "no token is said to end a text"),
    "more tokens than rows": (
        Tokenizer(PATTERN, SINGLE, END, 700),
        "700 tokens in a model of vocab_size=600",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path, name):
    """With its reason, and only that one; the model alone can still be written."""
    tokenizer, message = REFUSED[name]
    problems = gguf_file.refusals(model(600), tokenizer)
    assert len(problems) == 1 and message in problems[0]
    with pytest.raises(ConversionError):
        exported(tmp_path / "m.gguf", model(600), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_default_tokenizers_are_not_refused(tokenizer):
    """Trained here, with every special token, unused ones too; a token that no merge makes is found whole."""
    assert len(SPECIAL_TOKENS) == 7 and gguf_file.refusals(model(340), tokenizer) == []
    filled = Tokenizer(PATTERN, SINGLE | {b"xyz": 257}, END)
    assert filled.n_unused > 0 and gguf_file.refusals(model(301), filled) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.model", "llama", "model 'llama' with pre-tokenizer 'llama-bpe'"),
        ("tokenizer.ggml.pre", "qwen2", "pre-tokenizer 'qwen2' is not supported"),
        ("tokenizer.ggml.tokens", ["a", "b"], "2 tokens and 340 types in a model of 340"),
        ("tokenizer.ggml.token_type", [6] * 340, "tokens of type 6 are not supported"),
        ("tokenizer.ggml.merges", ["a b"], "damaged, not a tokenizer.json"),
    ],
)
def test_a_foreign_tokenizer_is_left_out_with_a_note(tokenizer, tmp_path, monkeypatch, key, value, message):
    """The model is read all the same."""
    facts = tokenizer_metadata(tokenizer, 340) | {key: value}
    monkeypatch.setattr(gguf_file, "tokenizer_metadata", lambda *given: facts)
    exported(tmp_path / "m.gguf", model(340), tokenizer)
    source = gguf_file.read(tmp_path / "m.gguf")
    assert source.tokenizer is None and message in source.notes[0]
