"""jaxlm <-> torchref conversion: bit-exact, complete, and loud about anything that does not fit."""

import dataclasses
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers import hard_batch, quick_jit, random_params, relative_error, tiny  # noqa: E402
from tolerances import tolerance  # noqa: E402

from convert import native  # noqa: E402
from convert.rules import ConversionError, pair_up  # noqa: E402
from convert.tree import from_torch, to_numpy, to_tensor  # noqa: E402
from jaxlm.layers import Backends  # noqa: E402
from jaxlm.model import abstract_model, merge_model  # noqa: E402
from jaxlm.presets import PRESETS  # noqa: E402
from torchref.checkpoint import CONFIG, WEIGHTS, CheckpointError, load_model  # noqa: E402
from torchref.model import Decoder  # noqa: E402

pytestmark = pytest.mark.torch

CONFIG_ALL = tiny(
    {"expert_bias": True, "shared_d_ff": 12, "shared_gate": True, "pattern": (True, False)},
    qkv_bias=True,
    attn_out_bias=True,
    mlp_bias=True,
    head_bias=True,
    attn_bias_table=True,
    qk_norm=True,
)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}


def bits(x: np.ndarray) -> bytes:
    """Shape, dtype and every bit, so that NaN and -0.0 count too."""
    return repr((x.shape, x.dtype)).encode() + np.ascontiguousarray(x).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bitwise(dtype: str) -> None:
    """jaxlm -> torch module -> jaxlm gives the same bits, special values included."""
    params = random_params(CONFIG_ALL, dtype=DTYPES[dtype])
    special = np.array([np.nan, -0.0, np.inf, -np.inf, 1e-40, -1e-45], np.float64).astype(DTYPES[dtype])
    params["blocks.0.attn.q_proj.weight"][0, :6] = special
    model = native.build_torch(CONFIG_ALL, params)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    back = native.to_jax(CONFIG_ALL, from_torch(model))
    assert back.keys() == params.keys()
    assert all(bits(back[k]) == bits(params[k]) for k in params)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_from_torch_is_bitwise(dtype: str) -> None:
    """torch -> jaxlm -> torch gives the same bits."""
    model = Decoder(CONFIG_ALL, rngs=torch.Generator().manual_seed(0), dtype=getattr(torch, dtype))
    flat = from_torch(model)
    again = native.to_torch(CONFIG_ALL, native.to_jax(CONFIG_ALL, flat))
    assert again.keys() == flat.keys()
    assert all(bits(again[k]) == bits(flat[k]) for k in flat)


def test_projections_are_transposed_and_stored_contiguously() -> None:
    """Each projection is [in, out] here and [out, in] there; none is square here, so a lost transpose shows."""
    params = random_params(CONFIG_ALL)
    there = native.to_torch(CONFIG_ALL, params)
    for path, value in params.items():
        transposed = path.endswith(
            ("_proj.weight", "router.weight", "lm_head.weight", "shared_gate.weight", "gate_up", "down")
        )
        expected = np.swapaxes(value, -1, -2) if transposed else value
        np.testing.assert_array_equal(there[path], expected, err_msg=path)
        assert there[path].flags.c_contiguous
        if transposed:
            assert value.shape[-1] != value.shape[-2], f"{path} is square and proves nothing"


def test_converted_modules_do_not_share_memory() -> None:
    """Training the torch twin must not change jaxlm's parameters."""
    params = random_params(CONFIG_ALL)
    before = params["final_norm.weight"].copy()
    model = native.build_torch(CONFIG_ALL, params)
    with torch.no_grad():
        model.final_norm.weight.add_(1)
    np.testing.assert_array_equal(params["final_norm.weight"], before)


def test_missing_unused_and_misshapen_tensors_are_reported_together() -> None:
    """One error names all three, whatever the direction."""
    for convert, source in (
        (native.to_torch, random_params(CONFIG_ALL)),
        (native.to_jax, native.to_torch(CONFIG_ALL, random_params(CONFIG_ALL))),
    ):
        broken = dict(source)
        del broken["blocks.1.attn_norm.weight"]
        broken["blocks.9.surprise"] = np.zeros(3)
        broken["blocks.0.attn.q_proj.weight"] = broken["blocks.0.attn.q_proj.weight"].T
        with pytest.raises(ConversionError) as caught:
            convert(CONFIG_ALL, broken)
        message = str(caught.value)
        assert message.startswith("3 of ")
        assert "blocks.1.attn_norm.weight: missing" in message
        assert "blocks.9.surprise: unused" in message
        assert (
            f"blocks.0.attn.q_proj.weight: got {broken['blocks.0.attn.q_proj.weight'].shape}, expected"
            in message
        )


def test_a_path_with_no_rule_or_two_rules_is_refused() -> None:
    """The table must name each path exactly once."""
    with pytest.raises(ConversionError, match="mystery: 0 rules"):
        pair_up(native.RULES, {"mystery": (1,)})
    with pytest.raises(ConversionError, match=r"embed\.weight: 2 rules"):
        pair_up(native.RULES + native.RULES[:1], {"embed.weight": (2, 2)})


@pytest.mark.parametrize("name", PRESETS)
def test_every_path_of_every_preset_has_exactly_one_rule(name: str) -> None:
    """Each preset's block and ends convert: names and shapes equal those of the torch module."""
    config = PRESETS[name].config.model
    config = dataclasses.replace(config, n_layers=min(config.n_layers, 2 * len(config.moe.pattern)))
    there = {pair.other: tuple(pair.other_shape) for pair in native.pairs(config)}
    with torch.device("meta"):
        model = Decoder(config, rngs=None)
    assert there == {path: tuple(p.shape) for path, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_checkpoint_round_trip_is_bitwise(dtype: str, tmp_path: Path, x64: None) -> None:
    """export_torch then import_torch: config and every bit come back, in the dtype they had."""
    params = random_params(CONFIG_ALL, dtype=DTYPES[dtype])
    native.export_torch(CONFIG_ALL, params, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == sorted([CONFIG, WEIGHTS])
    config, back = native.import_torch(tmp_path / "model")
    assert config == CONFIG_ALL
    assert all(bits(np.asarray(back[k])) == bits(params[k]) for k in params)


def test_a_loaded_checkpoint_computes_what_jaxlm_computes(tmp_path: Path, x64: None) -> None:
    """The file alone is enough: logits of the reloaded torch model equal jaxlm's."""
    params, batch = random_params(CONFIG_ALL), hard_batch()
    native.export_torch(CONFIG_ALL, params, tmp_path)
    rows = {k: torch.from_numpy(v).long() for k, v in batch.items() if k != "loss_mask"}
    with torch.no_grad():
        logits, _, _ = load_model(tmp_path)(rows["inputs"], rows["positions"], rows["segments"])
    graphdef = abstract_model(CONFIG_ALL, Backends(experts="loop")).graphdef
    ours = quick_jit(lambda p, *args: merge_model(graphdef, p)(*args)[0])(
        params, batch["inputs"], batch["positions"], batch["segments"]
    )
    assert relative_error(ours, logits.numpy()) <= tolerance("f64")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint, to be damaged as copies."""
    directory = tmp_path_factory.mktemp("exported")
    native.export_torch(CONFIG_ALL, random_params(CONFIG_ALL, dtype=np.float32), directory)
    return directory


def truncate(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-100])


def garble_header(directory: Path) -> None:
    data = bytearray((directory / WEIGHTS).read_bytes())
    data[8:40] = bytes(32)
    (directory / WEIGHTS).write_bytes(bytes(data))


def remove_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


def empty_weights(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"")


def cut_config(directory: Path) -> None:
    (directory / CONFIG).write_text((directory / CONFIG).read_text()[:50])


def other_config(directory: Path) -> None:
    text = (directory / CONFIG).read_text()
    assert '"d_ff": 40' in text
    (directory / CONFIG).write_text(text.replace('"d_ff": 40', '"d_ff": 44'))


@pytest.mark.parametrize(
    "damage", [truncate, garble_header, remove_weights, empty_weights, cut_config, other_config]
)
def test_a_damaged_checkpoint_gives_one_line(damage, exported: Path, tmp_path: Path) -> None:
    """CheckpointError with the file's name in one line, never a half-loaded model."""
    directory = Path(shutil.copytree(exported, tmp_path / "copy"))
    damage(directory)
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message
    assert message.count(str(directory)) == 1, "the path stands twice"


def test_bfloat16_keeps_its_bits() -> None:
    """All 65,536 bfloat16 values survive numpy -> torch -> numpy."""
    values = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    assert bits(to_numpy(to_tensor(values))) == bits(values)
