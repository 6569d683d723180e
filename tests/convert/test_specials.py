"""Special tokens and chat templates travel with a model through every format, and nobody guesses them by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from helpers import random_params, tiny  # noqa: E402

from convert import hf  # noqa: E402
from convert.gguf_header import read_header  # noqa: E402
from convert.targets import open_target  # noqa: E402
from jaxlm.tensor_file import Lazy  # noqa: E402
from jaxlm.tokenizer import Tokenizer  # noqa: E402

pytestmark = pytest.mark.torch

MODEL = tiny(vocab_size=300, init="fan_in")
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
TEXTS = ["hello world", "naïve 😀\n\n x", "<|bos|>"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Llama whose tokenizer puts <|bos|> in front, ends with a token called <|pad|>, and has its own template."""
    path = tmp_path / "source"
    path.mkdir()
    tokenizer = Tokenizer.train(["ab abc abcd hello world"] * 4, 280)
    params = {name: Lazy.of(x) for name, x in random_params(MODEL, dtype=np.float32).items()}
    hf.write(path, MODEL, params, tokenizer=tokenizer)
    bos, end, eos = (tokenizer.special_id(name) for name in ("<|bos|>", "<|pad|>", "<|eos|>"))
    edit(path / "generation_config.json", bos_token_id=bos, eos_token_id=[end, eos], pad_token_id=eos)
    edit(path / "tokenizer_config.json", chat_template=TEMPLATE, eos_token="<|pad|>")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("tools")
    front = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    token = {"<|bos|>": {"id": "<|bos|>", "ids": [bos], "tokens": ["<|bos|>"]}}
    post = {
        "type": "TemplateProcessing",
        "single": [front, sequence],
        "pair": [front, sequence],
        "special_tokens": token,
    }
    edit(path / "tokenizer.json", post_processor=post)
    return path


def edit(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_hugging_face_files_survive_every_directory_of_ours(source: Path, tmp_path: Path, convert) -> None:
    """hf -> jaxlm -> torch -> hf: ids, template, added templates and the ids of texts are transformers' own again."""
    convert("import", source, tmp_path / "jaxlm")
    convert("export", tmp_path / "jaxlm", tmp_path / "torch", "--to", "torch")
    convert("export", tmp_path / "torch", tmp_path / "again", "--to", "hf")
    before, after = (transformers.AutoTokenizer.from_pretrained(p) for p in (source, tmp_path / "again"))
    for text in TEXTS:
        assert before(text)["input_ids"] == after(text)["input_ids"]
    assert before("x")["input_ids"][0] == before.bos_token_id == after.bos_token_id
    turns = [{"role": "user", "content": "hi"}]
    assert after.apply_chat_template(turns, tokenize=False) == "[user] hi"
    for name in ("generation_config.json", "additional_chat_templates/tools.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()


def test_gguf_says_what_the_files_say_and_gives_it_back(source: Path, tmp_path: Path, convert) -> None:
    """hf -> gguf: both ends, bos and whether it is put in front, pad, the template; gguf -> jaxlm -> hf: the same."""
    ids = json.loads((source / "generation_config.json").read_text())
    convert("export", source, tmp_path / "gguf", "--to", "gguf")
    facts = read_header(tmp_path / "gguf" / "model.gguf").metadata
    assert [facts[f"tokenizer.ggml.{end}_token_id"] for end in ("eos", "eot")] == ids["eos_token_id"]
    assert facts["tokenizer.ggml.bos_token_id"] == ids["bos_token_id"]
    assert facts["tokenizer.ggml.padding_token_id"] == ids["pad_token_id"]
    assert facts["tokenizer.ggml.add_bos_token"] is True
    assert facts["tokenizer.chat_template"] == TEMPLATE
    convert("import", tmp_path / "gguf" / "model.gguf", tmp_path / "jaxlm")
    assert open_target(tmp_path / "jaxlm").specials == open_target(source).specials
    convert("export", tmp_path / "jaxlm", tmp_path / "again", "--to", "hf")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == ids
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs.eos_token == "<|pad|>" and theirs.chat_template == TEMPLATE


def test_sampling_starts_and_stops_where_the_files_say(source: Path) -> None:
    """Answers end at the ids of generation_config.json, not at what is called <|eos|>; bos stands in front."""
    from experiments.sample import SampleOptions, Sampler

    ids = json.loads((source / "generation_config.json").read_text())["eos_token_id"]
    sampler = Sampler(open_target(source), SampleOptions(str(source)))
    assert sampler.settings.stop == tuple(ids)
    asked: list[list[int]] = []
    sampler._stream = lambda ids, settings: asked.append(ids) or iter(())
    list(sampler.answer("hello"))
    assert asked == [transformers.AutoTokenizer.from_pretrained(source)("hello")["input_ids"]]


def test_a_tokenizer_that_was_replaced_is_the_one_that_travels(source: Path, tmp_path: Path, convert) -> None:
    """A new tokenizer.json beside the weights counts, not the one that the import kept."""
    convert("import", source, tmp_path / "jaxlm")
    other = Tokenizer.train(["zz zzz yy yyy"] * 4, 275)
    other.save(tmp_path / "jaxlm" / "tokenizer.json")
    convert("export", tmp_path / "jaxlm", tmp_path / "again", "--to", "hf")
    assert Tokenizer.load(tmp_path / "again" / "tokenizer.json").fingerprint() == other.fingerprint()


@pytest.mark.parametrize("format", ["jaxlm", "torch", "pt", "hf", "gguf", "onnx"])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    format: str, source: Path, tmp_path: Path, convert
) -> None:
    """Its ids would have no row; without the tokenizer the export works."""
    shutil.copyfile(source / "tokenizer.json", tmp_path / "small.json")
    Tokenizer.train(["ab abc abcd hello world"] * 4, 310).save(source / "tokenizer.json")
    said = convert("export", source, tmp_path / "new", "--to", format, code=2)
    assert "310" in said.err and "300" in said.err and "--no-tokenizer" in said.err
    assert not (tmp_path / "new").exists()
    convert("export", source, tmp_path / "new", "--to", format, "--no-tokenizer")


def test_a_vocabulary_whose_tokens_stand_by_several_merges_is_read(tmp_path: Path) -> None:
    """As Llama 3's file does: every split of a token is a merge; the ids are those of the tokenizers library."""
    import tokenizers

    ours = Tokenizer.train(["abab baba abba abababab babab aabb bbaa abaab babba"] * 5, 290)
    path = tmp_path / "tokenizer.json"
    ours.save(path)
    facts = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = facts["model"]["vocab"]
    splits = {
        token: [
            (token[:i], token[i:])
            for i in range(1, len(token))
            if {token[:i], token[i:]} <= vocabulary.keys()
        ]
        for token in sorted(vocabulary, key=vocabulary.__getitem__)
    }
    merges = [
        list(pair)
        for pairs in splits.values()
        for pair in sorted(pairs, key=lambda pair: [vocabulary[part] for part in pair])
    ]
    assert len(merges) > len(facts["model"]["merges"]), "the test needs tokens with several splits"
    edit(path, model=facts["model"] | {"merges": merges})
    theirs, again = tokenizers.Tokenizer.from_file(str(path)), Tokenizer.load(path)
    for text in ("abab baba", "abbaabbababab aabbaa", "bababbabaabba ab a"):
        assert again.encode(text) == theirs.encode(text).ids == ours.encode(text)
