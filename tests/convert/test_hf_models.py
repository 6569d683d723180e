"""Models of every Hugging Face family, there and back and in use: transformers itself is the judge."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


from helpers import assert_close, relative_error, tree_errors  # noqa: E402
from hf_models import CASES, ask, build, mark, prompt  # noqa: E402
from tolerances import tolerance  # noqa: E402

from convert import hf, native, rules, stream  # noqa: E402
from convert.hf.families import FAMILIES, pairs  # noqa: E402
from convert.tree import to_numpy  # noqa: E402
from jaxlm.sampling import Sampling  # noqa: E402
from jaxlm.tensor_file import Lazy, open_file  # noqa: E402
from torchref.generate import decode  # noqa: E402

pytestmark = pytest.mark.torch

GATE = tolerance("f64_transformers")
NEW = 64


@pytest.fixture(autouse=True)
def quiet() -> None:
    """transformers' progress bars and advice are not what is tested."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def tensors_of(directory: Path) -> dict[str, Lazy]:
    """Every tensor in the files of a directory."""
    return {
        name: t for path in sorted(directory.glob("*.safetensors")) for name, t in open_file(path).items()
    }


def loaded(source: hf.Source) -> dict[str, Lazy]:
    """An opened directory as tensors in memory."""
    return {path: Lazy.of(stream.array(planned)) for path, planned in source.tensors.items()}


def auto_config(directory: Path) -> dict[str, Any]:
    """What transformers reads from a config.json, without the name of the directory."""
    return transformers.AutoConfig.from_pretrained(directory).to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize("std", [0.02, None], ids=["std", "fan_in"])
@pytest.mark.parametrize("name", CASES)
def test_a_model_imported_computes_what_transformers_computes(
    name: str, std: float | None, tmp_path: Path
) -> None:
    """Logits and the gradient of every parameter in float64, and the same 64 greedy tokens."""
    oracle = ask(CASES[name], std, tmp_path, NEW)
    source = hf.read(tmp_path)
    model = native.build_torch(source.config, {path: t.read() for path, t in loaded(source).items()})
    logits = model(prompt())[0]
    assert relative_error(logits.detach(), oracle.logits) <= GATE
    (logits * mark()).sum().backward()
    ours = native.to_jax(source.config, {path: to_numpy(p.grad) for path, p in model.named_parameters()})
    # In memory transformers keeps the experts fused, in the file they were one by one.
    theirs = rules.convert(pairs(source.config, source.family, "fused"), ours)
    errors = tree_errors(theirs, {name: to_numpy(g) for name, g in oracle.grads.items()})
    assert_close(errors, GATE, "gradients")
    assert [
        best.ids for (best,) in decode(model, prompt().tolist(), Sampling(NEW, greedy=True))
    ] == oracle.generated


@pytest.mark.parametrize("name", CASES)
def test_a_model_comes_out_as_it_went_in(name: str, tmp_path: Path) -> None:
    """Every tensor bit for bit in a sharded bfloat16 checkpoint, every key of the config with its value."""
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    build(CASES[name]).to(torch.bfloat16).save_pretrained(first, max_shard_size="20KB")
    source = hf.read(first)
    hf.write(
        second,
        source.config,
        loaded(source),
        raw=source.raw_config,
        carried=source.carried,
        max_shard_bytes=20_000,
    )
    before, after = tensors_of(first), tensors_of(second)
    assert set(before) == set(after)
    assert len(list(first.glob("*.safetensors"))) > 1 < len(list(second.glob("*.safetensors")))
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert np.array_equal(tensor.read().view(np.uint16), after[key].read().view(np.uint16)), key
    assert auto_config(first) == auto_config(second)
    raw = json.loads((second / "config.json").read_text())
    assert {key: raw.get(key, "lost") for key in source.raw_config} == source.raw_config
    assert (second / "generation_config.json").read_bytes() == (first / "generation_config.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, "per_expert") for name in CASES]
    + [(name, "fused") for name in CASES if name.endswith(("_moe", "mixtral"))],
)
def test_an_export_without_its_origin_opens_and_is_the_same(name: str, layout: Any, tmp_path: Path) -> None:
    """No key missing, unexpected or misshapen, and the same logits, from our config alone."""
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    model = build(CASES[name]).float().eval()
    model.save_pretrained(first)
    source = hf.read(first)
    written = hf.write(second, source.config, loaded(source), layout=layout)
    assert hf.read(second).config == source.config
    assert written.layout == layout == hf.read(second).layout or not FAMILIES[source.family].experts
    opened, info = transformers.AutoModelForCausalLM.from_pretrained(
        second, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not any(info.values()), info
    assert type(opened) is type(model)
    assert torch.equal(opened(input_ids=prompt()).logits, model(input_ids=prompt()).logits)


def test_the_written_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    """Each tensor's digest and file are what a reader finds, and progress counts every byte."""
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    build(CASES["mixtral"]).float().save_pretrained(first)
    source, counted = hf.read(first), []
    written = hf.write(second, source.config, loaded(source), max_shard_bytes=30_000, progress=counted.append)
    assert sum(counted) == sum(tensor.read().nbytes for tensor in tensors_of(second).values())
    for name, stored in written.tensors.items():
        raw = np.ascontiguousarray(open_file(second / stored.file)[name].read()).tobytes()
        assert hashlib.sha256(raw).hexdigest() == stored.sha256
        assert raw == (second / stored.file).read_bytes()[stored.offset : stored.offset + stored.nbytes]
    files = {path.name for path in second.glob("*.safetensors")}
    assert {stored.file for stored in written.tensors.values()} == files


def test_a_cast_is_written_and_said(tmp_path: Path) -> None:
    """Exporting as bfloat16 rounds every tensor once and both dtype keys say so."""
    import ml_dtypes

    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    build(CASES["qwen3"]).float().save_pretrained(first)
    source = hf.read(first)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    hf.write(second, source.config, loaded(source), dtype=bfloat16, raw=source.raw_config)
    raw = json.loads((second / "config.json").read_text())
    assert (raw["dtype"], raw["torch_dtype"]) == ("bfloat16", "bfloat16")
    before = tensors_of(first)
    for name, tensor in tensors_of(second).items():
        assert np.array_equal(tensor.read(), before[name].read().astype(bfloat16)), name


def test_both_expert_layouts_hold_the_same_model(tmp_path: Path) -> None:
    """Fused and per-expert files are read into the same tensors."""
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    build(CASES["qwen3_moe"]).float().save_pretrained(first)
    source = hf.read(first)
    hf.write(second, source.config, loaded(source), layout="fused")
    again = hf.read(second)
    assert (source.layout, again.layout) == ("per_expert", "fused")
    one, other = loaded(source), loaded(again)
    assert all(np.array_equal(one[path].read(), other[path].read()) for path in one)
