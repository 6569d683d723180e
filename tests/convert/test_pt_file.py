"""model.pt: what is written opens in PyTorch alone, bit for bit, and nothing that is read can run code."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers import random_params, tiny  # noqa: E402

from convert import pt_file  # noqa: E402
from convert.native import build_torch  # noqa: E402
from convert.rules import ConversionError  # noqa: E402
from convert.tree import to_numpy  # noqa: E402
from jaxlm.config import ConfigError, ModelConfig, save  # noqa: E402
from torchref.model import Decoder  # noqa: E402

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "dense": tiny(),
    "tied-moe": tiny(tied=True, head_bias=True, moe={"pattern": (False, True), "shared_d_ff": 12}),
}


def weights(config: ModelConfig, dtype: Any = np.float32) -> dict[str, Any]:
    """torchref's parameters with random values."""
    model = build_torch(config, random_params(config, init="fan_in", dtype=dtype))
    return {name: p.detach() for name, p in model.named_parameters()}


def directory_with(directory: Path, write: Callable[[Path], object]) -> Path:
    """A directory with the dense model's config.json and what `write` makes of its model.pt."""
    save(CONFIGS["dense"], directory / "config.json")
    write(directory / "model.pt")
    return directory


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bitwise(name: str, dtype: Any, tmp_path: Path) -> None:
    """Arrays and tensors, given at once or one after the other, come back as the same bits, names and dtypes."""
    config = CONFIGS[name]
    tensors = weights(config, dtype)
    arrays = {path: to_numpy(value) for path, value in tensors.items()}
    for given in (tensors, arrays, iter(arrays.items())):
        pt_file.write(tmp_path, config, given)
        back_config, back = pt_file.read(tmp_path)
        assert back_config == config
        assert list(back) == list(tensors)
        for path, value in tensors.items():
            assert back[path].dtype == value.dtype
            assert torch.equal(back[path], value), path


def test_model_opens_in_pytorch_alone(tmp_path: Path) -> None:
    """The documented lines give the logits of the model that was written; jax and convert are never loaded."""
    config = CONFIGS["tied-moe"]
    pt_file.write(tmp_path, config, weights(config))
    example = "\n".join(line[4:] for line in (pt_file.__doc__ or "").splitlines() if line.startswith("    "))
    script = f"""
import sys, torch
{example}
logits = model(torch.arange(12).view(2, 6))[0]
torch.save(logits.detach(), "logits.pt")
assert not {{"jax", "convert", "flax"}} & sys.modules.keys()
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    model = Decoder(config, rngs=None)
    model.load_state_dict(weights(config), strict=True)
    expected = model(torch.arange(12).view(2, 6))[0]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_file_holds_the_weights_and_nothing_else(tmp_path: Path) -> None:
    """Views of larger tensors are stored alone and in C order, a tied head not again: weights and their names."""
    config = CONFIGS["tied-moe"]
    tensors = weights(config)
    views = {path: torch.stack([value] * 50)[7] for path, value in tensors.items()}
    views["embed.weight"] = views["embed.weight"].T.contiguous().T
    pt_file.write(tmp_path, config, views)
    size = sum(value.nbytes for value in tensors.values())
    assert size < (tmp_path / "model.pt").stat().st_size < size + 1000 * len(tensors)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert type(state) is dict
    assert "lm_head.weight" not in state
    assert all(
        value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes for value in state.values()
    )
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)


class Attack:
    """An object whose unpickling would create a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_never_run(form: str, tmp_path: Path) -> None:
    """A file whose unpickling runs a command is refused in one line, and the command did not run."""
    mark = tmp_path / "executed"
    payload = weights(CONFIGS["dense"]) | {"embed.weight": Attack(mark)}

    def write(path: Path) -> None:
        if form == "pickle":
            path.write_bytes(pickle.dumps(Attack(mark)))
        else:
            torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")

    with pytest.raises(ConversionError, match=r"model\.pt: ") as error:
        pt_file.read(directory_with(tmp_path, write))
    assert not mark.exists()
    assert "\n" not in str(error.value)
    if form == "zip":
        assert "needs code, which is never run" in str(error.value)
        torch.load(tmp_path / "model.pt", weights_only=False)
        assert mark.exists(), "the attack itself does not work, so its refusal proves nothing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param([torch.zeros(2)], "it holds list, not a state dict", id="list"),
        pytest.param({"model": {"embed.weight": torch.zeros(2)}}, "'model' is dict", id="nested"),
        pytest.param({"step": 3}, "'step' is int", id="number"),
        pytest.param({0: torch.zeros(2)}, "0 is a tensor of torch.float32", id="numbered"),
        pytest.param({"embed.weight": torch.eye(3).to_sparse()}, "torch.sparse_coo", id="sparse"),
    ],
)
def test_what_is_no_state_dict_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    """Harmless files of another form are refused in one line that names what they hold."""
    with pytest.raises(ConversionError, match="not a state dict") as error:
        pt_file.read(directory_with(tmp_path, lambda path: torch.save(content, path)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing"])
def test_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    """A cut, empty, foreign or missing file gives one line with its name; a missing config.json likewise."""
    config = CONFIGS["dense"]
    pt_file.write(tmp_path, config, weights(config))
    path = tmp_path / "model.pt"
    whole = path.read_bytes()
    broken = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}
    path.write_bytes(broken[damage]) if damage in broken else path.unlink()
    with pytest.raises(ConversionError, match=r"model\.pt: ") as error:
        pt_file.read(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        pt_file.read(tmp_path)


@pytest.mark.parametrize("side", ["write", "read"])
def test_every_wrong_tensor_is_named(side: str, tmp_path: Path) -> None:
    """A missing, an unknown, a misshapen and an integer tensor are reported together, when writing and when reading."""
    config = CONFIGS["dense"]
    bad = weights(config)
    del bad["final_norm.weight"]
    bad["blocks.0.attn.q_proj.weight"] = bad["blocks.0.attn.q_proj.weight"].T
    bad["blocks.1.mlp.up_proj.weight"] = bad["blocks.1.mlp.up_proj.weight"].int()
    bad["extra.weight"] = torch.zeros(2)
    with pytest.raises(ConversionError, match="4 tensors are wrong") as error:
        if side == "write":
            pt_file.write(tmp_path, config, bad)
        else:
            pt_file.read(directory_with(tmp_path, lambda path: torch.save(bad, path)))
    lines = str(error.value).splitlines()[1:]
    assert sorted(line.partition(":")[0] for line in lines) == [
        "blocks.0.attn.q_proj.weight",
        "blocks.1.mlp.up_proj.weight",
        "extra.weight",
        "final_norm.weight",
    ]
    assert side == "read" or not list(tmp_path.iterdir())
