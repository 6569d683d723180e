"""AutoTokenizer on an export: our ids for any text, beside the config of every family."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import random_params, tiny

from convert import hf
from convert.hf.families import FAMILIES
from jaxlm.tensor_file import Lazy
from jaxlm.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

MODELS = {
    "llama": tiny(vocab_size=400),
    "mistral": tiny(vocab_size=400, windows=(8,)),
    "mixtral": tiny({}, vocab_size=400),
    "qwen2": tiny(vocab_size=400, qkv_bias=True),
    "qwen2_moe": tiny({"shared_d_ff": 8, "shared_gate": True}, vocab_size=400),
    "qwen3": tiny(vocab_size=400, qk_norm=True),
    "qwen3_moe": tiny({}, vocab_size=400, qk_norm=True),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE of 400 ids that merges digits, accents and white space."""
    lines = [f"{n} naïve cafe\u0301 {n * 7}\n\n  东京 don't WE'LL {'ab' * (n % 5)}\r\n" for n in range(2000)]
    return Tokenizer.train(lines, 400)


def texts() -> list[str]:
    """Hard cases, special tokens, and random Unicode in which no character is more likely than another."""
    rng = random.Random(0)
    alphabet = [chr(c) for c in range(1, sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    hard = [
        "",
        " ",
        "\n",
        "a\n\n\nb\r\n\tc ",
        "12345678 ٣٤٥",
        "e\u0301 é ﬁ \u2126 \u0958 \u0387",
        "x" + " " * 50,
        " !?... , n't",
    ]
    hard += ["<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|> <unk> <s> </s> [INST]", "don't WE'LL i'm"]
    return hard + ["".join(rng.choices(alphabet, k=200)) for _ in range(60)]


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_tokenizer_gives_our_ids(family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Ids, text, special ids, context and the end of an answer, whatever class transformers picks for the family."""
    transformers.logging.set_verbosity_error()
    config = MODELS[family]
    params = random_params(config, 0, "normal", np.float32)
    hf.write(tmp_path, config, {path: Lazy.of(v) for path, v in params.items()}, tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts():
        ids = tokenizer.encode(text, special=True)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.model_max_length == config.context
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id] == special
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert [read.bos_token_id, read.eos_token_id, read.pad_token_id] == special
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == [tokenizer.eos_id, tokenizer.special_id("<|im_end|>")]


def test_the_chat_template_is_chatml_and_ends_where_the_answer_begins(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The marks become their own tokens."""
    from convert.hf.tokenizer import write_tokenizer

    write_tokenizer(tokenizer, tmp_path, 128)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer.encode(expected, special=True)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["chat_template"] == (tmp_path / "chat_template.jinja").read_text()


def test_a_tokenizer_without_turns_gets_no_template(tmp_path: Path) -> None:
    """One with nothing but <|endoftext|>."""
    from convert.hf.tokenizer import write_tokenizer
    from convert.specials import of_tokenizer
    from jaxlm.tokenizer import PATTERN

    plain = Tokenizer(PATTERN, {bytes([b]): b for b in range(256)}, {"<|endoftext|>": 256})
    write_tokenizer(plain, tmp_path, 128, "qwen2")
    assert not (tmp_path / "chat_template.jinja").exists()
    assert of_tokenizer(plain).generation_config() == {"eos_token_id": 256}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id, len(theirs)) == (
        256,
        None,
        None,
        257,
    )


def test_carried_files_go_before_a_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """An imported model's own files come back byte for byte."""
    first, second = tmp_path / "first", tmp_path / "second"
    config, carried = MODELS["llama"], {}
    params = {path: Lazy.of(v) for path, v in random_params(config, 0, "normal", np.float32).items()}
    for directory in (first, second):
        directory.mkdir()
        hf.write(directory, config, params, tokenizer=tokenizer, carried=carried)
        (first / "tokenizer_config.json").write_text("{}")
        carried = hf.read(first).carried
    assert set(carried) <= set(hf.TOKENIZER_FILES) and "generation_config.json" in carried
    assert all((second / name).read_bytes() == (first / name).read_bytes() for name in carried)
