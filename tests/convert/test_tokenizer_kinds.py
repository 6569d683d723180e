"""Every kind of tokenizer and its template on the way out of a run and to other programs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import random_params, tiny

from convert import hf
from convert.checkpoints import CHECKPOINTS
from convert.gguf_tokenizer import refused_tokenizer
from convert.specials import of_tokenizer
from convert.targets import open_target
from jaxlm.chat import LLAMA3, Chat, special_tokens
from jaxlm.config import RunConfig, TrainConfig, save
from jaxlm.run_dir import RunDir
from jaxlm.tensor_file import Lazy
from jaxlm.tokenizer import Tokenizer, open_tokenizer
from torchref.checkpoint import save_training
from torchref.train import init_state

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.torch

MODEL = tiny(vocab_size=420)
TEXTS = ["user assistant hello world, naïve 你好\n\n 12345 don't" * 20]
HI = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi, é <b>"}]


def trained(kind: str) -> Tokenizer:
    return Tokenizer.train(TEXTS, 420, kind, special_tokens(LLAMA3), LLAMA3)


@pytest.mark.parametrize("kind", ["gpt4", "tfm"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_auto_tokenizer_has_our_ids_and_template(kind: str, family: str, tmp_path: Path) -> None:
    """An export opens as it is; its conversations are ours, and its answers end where turns do."""
    tokenizer, config = trained(kind), tiny(vocab_size=420, qkv_bias=family == "qwen2")
    params = {path: Lazy.of(v) for path, v in random_params(config, dtype=np.float32).items()}
    hf.write(tmp_path, config, params, family=family, tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["<|bos|>hello  world<|eot_id|>", "e\u0301 naïve\x00\r\n 😀"]:
        ids = tokenizer.encode(text, special=True)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
    chat = Chat.of(tokenizer, bos=tokenizer.bos_id)
    assert theirs.apply_chat_template(HI, tokenize=False, add_generation_prompt=True) == chat.text(HI)
    assert theirs.apply_chat_template(HI, add_generation_prompt=True, return_dict=False) == chat.encode(HI)
    end = tokenizer.special_id("<|eot_id|>")
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [
        tokenizer.eos_id,
        end,
    ]


@pytest.mark.parametrize("kind", ["gpt4", "tfm"])
def test_a_template_goes_from_a_run_into_every_format(kind: str, tmp_path: Path, convert: Callable) -> None:
    """A run and our model directories keep it beside the tokenizer, Hugging Face's as ever; ids stay the same."""
    tokenizer, directory = trained(kind), RunDir(tmp_path / "run")
    directory.path.mkdir()
    run = RunConfig(MODEL, train=TrainConfig(seq_len=8))
    save(run, directory.config)
    tokenizer.save(directory.tokenizer)
    save_training(init_state(run), directory.path / CHECKPOINTS["torch"] / "latest", {})
    steps = [
        (directory.path, "torch"),
        (tmp_path / "torch", "jaxlm"),
        (tmp_path / "jaxlm", "hf"),
        (tmp_path / "hf", "jaxlm"),
    ]
    expected = Chat.of(tokenizer, bos=tokenizer.bos_id).encode(HI)
    for n, (source, format) in enumerate([*steps, (tmp_path / "again", "")]):
        target = open_target(source)
        assert target.specials.chat_template == LLAMA3, source
        assert target.specials.eos == (tokenizer.eos_id, tokenizer.special_id("<|eot_id|>"))
        chat = Chat.of(target.tokenizer, target.specials.chat_template, bos=target.specials.bos)
        assert chat.encode(HI) == expected
        if format:
            destination = tmp_path / ("again" if n == 3 else format)
            command = (
                ("import", source, destination) if n == 3 else ("export", source, destination, "--to", format)
            )
            convert(*command, "--no-optimizer")
    assert open_tokenizer(tmp_path / "jaxlm").chat_template == LLAMA3


def test_llama_cpp_has_no_such_tokenizer() -> None:
    """GGUF is refused in one line; byte-level BPE of the same template is not."""
    assert refused_tokenizer(trained("tfm"), 420) == [
        "tokenizer: it is no byte-level BPE, and llama.cpp has none that decomposes letters (NFD)"
    ]
    assert refused_tokenizer(trained("gpt4"), 420) == []


def test_a_template_of_its_own_decides_what_ends_an_answer() -> None:
    """Not the names of other tokens that happen to be there; one that writes nothing after an answer leaves eos."""
    both = (*special_tokens(LLAMA3), "<|im_start|>", "<|im_end|>")
    tokenizer = Tokenizer.train(TEXTS, 420, specials=both, chat_template=LLAMA3)
    assert of_tokenizer(tokenizer).eos == (tokenizer.eos_id, tokenizer.special_id("<|eot_id|>"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert of_tokenizer(tokenizer).eos == (tokenizer.eos_id,)
