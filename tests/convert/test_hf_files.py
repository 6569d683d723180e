"""Directories of Hugging Face checkpoints: shards, indexes, and everything that can be wrong with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import random_params, tiny

from convert import hf
from convert.hf.files import open_checkpoint
from convert.rules import ConversionError
from jaxlm.config import InputError, ModelConfig
from jaxlm.model_dir import INDEX, WEIGHTS
from jaxlm.tensor_file import Lazy, Planned, open_file, write_file

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def export(directory: Path, config: ModelConfig, **options: Any) -> Path:
    """A model with random weights, written into a new directory."""
    directory.mkdir()
    params = random_params(config, 0, "normal", np.float32)
    hf.write(directory, config, {path: Lazy.of(value) for path, value in params.items()}, **options)
    return directory


def rewrite(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes the tensors of a single file."""
    arrays = {name: np.array(tensor.read()) for name, tensor in open_file(directory / WEIGHTS).items()}
    change(arrays)
    planned = {name: Planned.of(Lazy.of(array)) for name, array in arrays.items()}
    write_file(directory / WEIGHTS, planned, {"format": "pt"})


def refusal(directory: Path) -> list[str]:
    """The lines with which a directory is refused."""
    with pytest.raises(InputError) as caught:
        hf.read(directory)
    return str(caught.value).splitlines()


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of several shards."""
    return export(tmp_path / "sharded", tiny(), max_shard_bytes=20_000)


def edit_index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    """Changes the weight_map of an index."""
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_shards_are_filled_in_order_and_none_is_too_large(sharded: Path) -> None:
    """Names, sizes and the index that transformers expects; strangers in the directory are ignored."""
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    n = len(files)
    assert n > 1 and files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert all(sum(t.read().nbytes for t in open_file(sharded / file).values()) <= 20_000 for file in files)
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.read().nbytes for t in open_checkpoint(sharded).values())
    (sharded / "consolidated.safetensors").write_bytes(b"not ours")
    assert set(index["weight_map"]) == set(open_checkpoint(sharded))


def test_every_fault_of_an_index_is_named_at_once(sharded: Path) -> None:
    """A missing shard, a tensor that its shard lacks, a tensor in two shards, one the index forgot, paths outside."""
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    tensors = {file: open_file(sharded / file) for file in files}
    first, second, third = files[:3]
    twice = next(iter(tensors[second]))
    planned = {name: Planned.of(Lazy.of(np.array(t.read()))) for name, t in tensors[first].items()}
    planned[twice] = Planned.of(Lazy.of(np.array(tensors[second][twice].read())))
    write_file(sharded / first, planned, {"format": "pt"})
    (sharded / third).unlink()
    forgotten = list(tensors[second])[1]

    def change(index: dict[str, str]) -> None:
        index["ghost.weight"] = first
        index["up.weight"] = "../model.safetensors"
        index["root.weight"] = "/etc/model.safetensors"
        del index[forgotten]

    edit_index(sharded, change)
    lines = refusal(sharded)
    for part in (
        f"{third}: No such file",
        f"ghost.weight: {INDEX} says it is in {first}",
        "'../model.safetensors'",
    ):
        assert sum(part in line for line in lines) == 1, (part, lines)
    for part in (
        "'/etc/model.safetensors'",
        f"{twice}: is in {first} too",
        f"{forgotten}: is in {second}, but",
    ):
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert len(lines) == 6


def test_an_index_that_is_no_index_is_refused(sharded: Path) -> None:
    """Not JSON, a key twice, no weight_map."""
    for text, part in (
        ("{", "not JSON"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"weight_map": [1]}', "weight_map"),
    ):
        (sharded / INDEX).write_text(text)
        lines = refusal(sharded)
        assert len(lines) == 1 and part in lines[0], lines


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """pytorch_model.bin alone, and a directory with nothing."""
    directory = export(tmp_path / "model", tiny())
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")
    assert "safe_serialization=True" in refusal(directory)[0]
    (directory / "pytorch_model.bin").unlink()
    assert refusal(directory) == [f"{directory}: holds neither {WEIGHTS} nor {INDEX}"]


def test_config_and_files_are_judged_together(tmp_path: Path) -> None:
    """A refused key and a missing file come in one error."""
    directory = export(tmp_path / "model", tiny())
    (directory / WEIGHTS).unlink()
    values = json.loads((directory / "config.json").read_text()) | {"hidden_act": "relu"}
    (directory / "config.json").write_text(json.dumps(values))
    lines = refusal(directory)
    assert len(lines) == 2 and "hidden_act='relu'" in lines[0] and WEIGHTS in lines[1]


def test_missing_unknown_and_misshapen_tensors_are_named_at_once(tmp_path: Path) -> None:
    """One line each, with both shapes."""
    directory = export(tmp_path / "model", tiny())

    def change(arrays: dict[str, np.ndarray]) -> None:
        del arrays["model.norm.weight"]
        arrays["model.extra.weight"] = np.zeros(3, np.float32)
        arrays["model.layers.0.self_attn.k_proj.weight"] = arrays[
            "model.layers.0.self_attn.k_proj.weight"
        ].T.copy()
        arrays["model.layers.0.input_layernorm.weight"] = np.ones(24, np.int32)

    rewrite(directory, change)
    lines = refusal(directory)
    assert len(lines) == 4
    assert any("model.norm.weight" in line and "missing" in line for line in lines)
    assert any("model.extra.weight: unused" in line for line in lines)
    assert any("got (24, 12), expected (12, 24)" in line for line in lines)
    assert any("int32" in line for line in lines)


def test_a_padded_vocabulary_is_named_with_both_numbers(tmp_path: Path) -> None:
    """Rows that config.json does not count, in the embedding and in the head."""
    directory = export(tmp_path / "model", tiny())

    def pad(arrays: dict[str, np.ndarray]) -> None:
        for name in (EMBEDDING, HEAD):
            arrays[name] = np.pad(arrays[name], ((0, 3), (0, 0)))

    rewrite(directory, pad)
    assert refusal(directory) == [
        f"{name}: has 64 rows, config.json says vocab_size=61" for name in (EMBEDDING, HEAD)
    ]


def test_a_stored_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    """Equal bits are read as the tie they are; one other bit is refused."""
    directory = export(tmp_path / "model", tiny(tied=True))
    expected = hf.read(directory)

    def equal(arrays: dict[str, np.ndarray]) -> None:
        arrays[HEAD] = arrays[EMBEDDING].copy()

    def differs(arrays: dict[str, np.ndarray]) -> None:
        arrays[HEAD].view(np.uint32)[60, 23] ^= 1

    rewrite(directory, equal)
    assert hf.read(directory).tensors.keys() == expected.tensors.keys()
    rewrite(directory, differs)
    lines = refusal(directory)
    assert len(lines) == 1 and lines[0].startswith(f"{HEAD}: differs from {EMBEDDING}")


def test_buffers_of_old_files_are_left_alone(tmp_path: Path) -> None:
    """Rotary frequencies that transformers once saved with the weights."""
    directory = export(tmp_path / "model", tiny())

    def change(arrays: dict[str, np.ndarray]) -> None:
        for layer in range(2):
            arrays[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)

    names = hf.read(directory).tensors.keys()
    rewrite(directory, change)
    assert hf.read(directory).tensors.keys() == names


def test_experts_in_two_layouts_are_refused(tmp_path: Path) -> None:
    """A file that mixes them belongs to no reader."""
    directory = export(tmp_path / "model", tiny({}))
    rewrite(
        directory,
        lambda arrays: arrays.update({"model.layers.0.mlp.experts.down_proj": np.zeros(1, np.float32)}),
    )
    assert "two layouts" in refusal(directory)[0]


def test_nothing_is_written_for_a_model_that_no_class_computes(tmp_path: Path) -> None:
    """Refused before the first byte."""
    with pytest.raises(ConversionError, match="position='learned'"):
        export(tmp_path / "model", tiny(position="learned"))
    assert not list((tmp_path / "model").iterdir())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Named in the other side's names, with their number."""
    params = random_params(tiny(), 0, "normal", np.float32)
    params["final_norm.weight"][3] = np.nan
    with pytest.raises(ConversionError, match="model.norm.weight: 1 of 24"):
        hf.write(tmp_path, tiny(), {path: Lazy.of(value) for path, value in params.items()})
