"""Adapters at the command line: from peft and back bit for bit, merged into an export, refused where misfit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from entry import run  # noqa: E402
from helpers import random_params, relative_error, tiny  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from tolerances import tolerance  # noqa: E402

from convert import __main__ as entry_point  # noqa: E402
from convert import adapters, hf, peft_adapter  # noqa: E402
from convert.targets import open_target  # noqa: E402
from jaxlm.model_dir import MANIFEST  # noqa: E402
from jaxlm.tensor_file import Lazy  # noqa: E402

pytestmark = pytest.mark.torch

CONFIG = tiny({"d_ff": 16}, init="fan_in")
ADAPTER = peft_adapter.AdapterConfig(rank=3, alpha=5.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral in a Hugging Face directory."""
    path = tmp_path_factory.mktemp("base") / "hf"
    path.mkdir()
    params = {name: Lazy.of(x) for name, x in random_params(CONFIG, dtype=np.float64).items()}
    hf.write(path, CONFIG, params)
    return path


@pytest.fixture(scope="module")
def factors() -> dict[str, np.ndarray]:
    """Random factors for all that the default targets name, experts among them."""
    random, made = np.random.default_rng(7), {}
    for path, value in random_params(CONFIG).items():
        if ADAPTER.adapts(path):
            for slot, shape in zip(
                ("lora_a", "lora_b"), peft_adapter.factor_shapes(value.shape, 3), strict=True
            ):
                made[f"{path}.{slot}"] = random.standard_normal(shape) * 0.3
    assert any("experts" in name for name in made)
    return made


@pytest.fixture
def peft_directory(base: Path, factors: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """The adapter as peft saves it."""
    path = tmp_path / "peft"
    path.mkdir()
    table = adapters.table(adapters.AdapterFacts(ADAPTER, CONFIG, "mixtral"), "fused")
    peft_adapter.write_adapter(path, factors, ADAPTER, table)
    return path


def call(words: list, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """The command line in this process."""
    return run(entry_point.main, [str(word) for word in words], capsys, monkeypatch)


def test_an_adapter_goes_there_and_back_bit_for_bit(
    base: Path, peft_directory: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """peft -> ours -> peft: the same tensors and the same configuration, and a manifest in between."""
    ours, again = tmp_path / "ours", tmp_path / "again"
    said = call(["import", peft_directory, ours, "--base", base], capsys, monkeypatch)
    assert said.code == 0, said.err
    assert {p.name for p in ours.iterdir()} == {"adapter.json", "adapter.safetensors", MANIFEST}
    assert call(["verify", ours], capsys, monkeypatch).code == 0
    said = call(["export", ours, again, "--to", "peft"], capsys, monkeypatch)
    assert said.code == 0, said.err
    before, after = (load_file(p / peft_adapter.TENSORS) for p in (peft_directory, again))
    assert before.keys() == after.keys()
    assert all(
        before[k].tobytes() == after[k].tobytes() and before[k].shape == after[k].shape for k in before
    )
    first, second = (json.loads((p / peft_adapter.CONFIG).read_text()) for p in (peft_directory, again))
    # Where the model lies is known now, and said.
    assert first | {"base_model_name_or_path": second["base_model_name_or_path"]} == second


@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_an_export_with_an_adapter_holds_the_sum(
    kind: str, base: Path, peft_directory: Path, factors: dict, tmp_path: Path, capsys, monkeypatch
) -> None:
    """W + alpha / R * a @ b in every adapted weight, experts too; all others untouched."""
    source = peft_directory
    if kind == "ours":
        source = tmp_path / "ours"
        assert call(["import", peft_directory, source, "--base", base], capsys, monkeypatch).code == 0
    merged = tmp_path / "merged"
    said = call(["export", base, merged, "--to", "jaxlm", "--adapter", source], capsys, monkeypatch)
    assert said.code == 0 and "merged" in said.err, said.err
    old, new = (open_target(p).contents.tensors for p in (base, merged))
    assert not any(ADAPTER.adapts(path) and (old[path].read() == new[path].read()).all() for path in old)
    for path, tensor in new.items():
        expected = old[path].read()
        if ADAPTER.adapts(path):
            expected = expected + 5.0 / 3.0 * (factors[f"{path}.lora_a"] @ factors[f"{path}.lora_b"])
        assert relative_error(tensor.read(), expected) <= tolerance("f64_peft"), path


def test_what_does_not_fit_is_one_clear_message(
    base: Path, peft_directory: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """No base, a base of another shape, a model where an adapter is meant, NaN: exit code 2 and nothing written."""
    other, new = tmp_path / "other", tmp_path / "new"
    other.mkdir()
    config = tiny({"d_ff": 12}, init="fan_in")
    hf.write(other, config, {n: Lazy.of(x) for n, x in random_params(config).items()})
    ours = tmp_path / "ours"
    assert call(["import", peft_directory, ours, "--base", base], capsys, monkeypatch).code == 0
    lost, bad = tmp_path / "lost", tmp_path / "bad"  # the first says of a base that is not there
    shutil.copytree(ours, lost)
    facts = json.loads((lost / "adapter.json").read_text())
    (lost / "adapter.json").write_text(json.dumps(facts | {"base": str(tmp_path / "nowhere")}))
    shutil.copytree(peft_directory, bad)
    tensors = {k: np.array(v) for k, v in load_file(bad / peft_adapter.TENSORS).items()}
    next(iter(tensors.values()))[0, 0] = np.nan
    from safetensors.numpy import save_file

    save_file(tensors, bad / peft_adapter.TENSORS)
    for words, says in {
        ("import", peft_directory, new): "--base",
        ("import", peft_directory, new, "--base", other): "experts",
        ("export", base, new, "--to", "jaxlm", "--adapter", base): "no adapter",
        ("export", other, new, "--to", "jaxlm", "--adapter", ours): "expected",
        ("export", base, new, "--to", "peft"): "no adapter",
        ("import", bad, new, "--base", base): "NaN",
        ("export", lost, new, "--to", "hf"): "--adapter",
    }.items():
        said = call(list(words), capsys, monkeypatch)
        assert said.code == 2 and says in said.err and "Traceback" not in said.err, (words, said.err)
        assert not new.exists()
