"""The ONNX graph in onnxruntime (and in onnx's own evaluator) against torchref in float64 on the same weights."""

import copy
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from helpers import V, random_params, relative_error, tiny  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from tolerances import tolerance  # noqa: E402

from convert.native import build_torch  # noqa: E402
from convert.onnx_decoder import OnnxCache, OnnxDecoder  # noqa: E402
from convert.onnx_graph import refusals, write  # noqa: E402
from convert.rules import ConversionError  # noqa: E402
from jaxlm.config import ModelConfig, RopeScaling  # noqa: E402
from torchref.model import Decoder  # noqa: E402

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
GATE = tolerance("f32_onnx")
STEPS = 16
EVERYTHING: dict[str, Any] = {
    "moe": {"pattern": (False, True), "shared_d_ff": 12, "shared_gate": True, "expert_bias": True},
    "n_layers": 4,
    "windows": (0, 5),
    "tied": True,
    "attn_bias_table": True,
    "rope_scaling": RopeScaling("llama3", 4.0, original_context=8),
} | dict.fromkeys(["qk_norm", "qkv_bias", "attn_out_bias", "mlp_bias", "head_bias"], True)
CONFIGS: dict[str, ModelConfig] = {
    "dense": tiny(),
    "moe": tiny(moe={}),
    "everything": tiny(**EVERYTHING),
    "learned-erf": tiny(
        position="learned", mlp="gelu_erf", moe={"expert_bias": True, "shared_d_ff": 8}, head_bias=True
    ),
    "tanh-linear": tiny(mlp="gelu_tanh", rope_scaling=RopeScaling("linear", 3.0), tied=True),
    "yarn-unnormalised": tiny(
        moe={"renormalize": False, "n_active": 1, "capacity_factor": 0.5},
        rope_scaling=RopeScaling("yarn", 4.0, original_context=8),
        windows=(3,),
        n_kv_heads=6,
    ),
}
IN_FLOAT64 = [name for name in CONFIGS if name != "learned-erf"]  # onnxruntime has no Erf of doubles


@functools.cache
def _built(config: ModelConfig, init: str) -> Decoder:
    return build_torch(config, random_params(config, init=init, dtype=np.float32))


def float32_model(config: ModelConfig, init: str = "fan_in") -> Decoder:
    """A decoder of its own with random float32 weights, biases and norms included."""
    return copy.deepcopy(_built(config, init))


def oracle(config: ModelConfig, init: str = "fan_in") -> Decoder:
    """The same float32 weights in a model that computes in float64."""
    return float32_model(config, init).double()


def logits_of(model: Decoder, ids: np.ndarray) -> np.ndarray:
    """torchref's logits of whole rows."""
    with torch.inference_mode():
        return model(torch.from_numpy(ids))[0].numpy()


def weights_named(ending: str, *models: Decoder) -> list[Any]:
    """The weights of some models whose names end so, to be changed in place."""
    return [p.data for model in models for name, p in model.named_parameters() if name.endswith(ending)]


def exported(directory: Path, model: Decoder, **options: Any) -> OnnxDecoder:
    """The model, written and opened."""
    write(directory, model, **options)
    return OnnxDecoder(directory / "model.onnx")


def random_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Token ids [rows, length]."""
    return np.random.default_rng(seed).integers(0, V, (rows, length))


def worst(decoder: OnnxDecoder, model: Decoder, rows: int, length: int) -> float:
    """Largest error of a prefill and of 16 cached steps after it."""
    ids = random_ids(rows, length + STEPS)
    expected = logits_of(model, ids)
    logits, cache = decoder.prefill(ids[:, :length])
    errors = [relative_error(logits, expected[:, :length])]
    for step in range(length, length + STEPS):
        logits, cache = decoder.step(ids[:, step : step + 1], cache)
        errors.append(relative_error(logits, expected[:, step : step + 1]))
    return max(errors)


@pytest.mark.parametrize("init", ["normal", "fan_in"])
@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_cached_steps_match_the_reference(name: str, init: str, tmp_path: Path) -> None:
    """One file in float32, several batches and lengths, a prefill and 16 steps each, up to the whole context."""
    config = CONFIGS[name]
    decoder, model = exported(tmp_path, float32_model(config, init)), oracle(config, init)
    errors = {shape: worst(decoder, model, *shape) for shape in ((1, 1), (3, 7), (2, config.context - STEPS))}
    assert max(errors.values()) < GATE, errors


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_graph_is_the_model_to_rounding(name: str, tmp_path: Path) -> None:
    """In float64 nothing is left between the graph and torchref but the order of sums."""
    decoder = exported(tmp_path, float32_model(CONFIGS[name]), dtype="float64")
    assert worst(decoder, oracle(CONFIGS[name]), 3, 7) < tolerance("f64_decode")


@pytest.mark.parametrize("name", ["everything", "learned-erf"])
def test_a_second_runtime_agrees(name: str, tmp_path: Path) -> None:
    """onnx's reference evaluator, in float64 on numpy, computes torchref's logits: 6 tokens, then 3."""
    config = CONFIGS[name]
    facts = write(tmp_path, float32_model(config), dtype="float64")
    run = ReferenceEvaluator(str(tmp_path / "model.onnx")).run
    ids, first = random_ids(2, 9), 6
    shape = (2, config.n_kv_heads, 0, config.head_dim)
    past: list[Any] = [np.zeros(shape) for _ in range(2 * config.n_layers)]
    got = []
    for start, end in ((0, first), (first, 9)):
        feed = [ids[:, start:end], np.ones((2, end), np.int64), *past]
        logits, *past = run(None, dict(zip(facts["inputs"], feed, strict=True)))
        got.append(logits)
    # That evaluator's Erf gives float32, which leaves 1e-8.
    gate = tolerance("f64_decode") if name in IN_FLOAT64 else GATE
    assert relative_error(np.concatenate(got, axis=1), logits_of(oracle(config), ids)) < gate


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_padded_rows_equal_rows_alone(name: str, tmp_path: Path) -> None:
    """Rows of 3, 9 and 7 tokens, padded on the left with any ids, give what each gives alone, the next 8 too."""
    decoder, model = exported(tmp_path, float32_model(CONFIGS[name]), dtype="float64"), oracle(CONFIGS[name])
    lengths, longest, more = (3, 9, 7), 9, 8
    ids = random_ids(3, longest + more)
    mask = (np.arange(longest) >= longest - np.asarray(lengths)[:, None]).astype(np.int64)
    logits, cache = decoder.prefill(ids[:, :longest], mask)
    got = [logits]
    for step in range(longest, longest + more):
        logits, cache = decoder.step(ids[:, step : step + 1], cache)
        got.append(logits)
    together = np.concatenate(got, axis=1)
    assert np.isfinite(together).all()
    for row, length in enumerate(lengths):
        alone = logits_of(model, ids[row : row + 1, longest - length :])
        assert relative_error(together[row : row + 1, longest - length :], alone) < tolerance("f64_decode")


@pytest.mark.parametrize(("n_experts", "n_active"), [(4, 2), (4, 4), (20, 3)])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_ties_go_to_the_lowest_expert(n_experts: int, n_active: int, scale: float, tmp_path: Path) -> None:
    """Router logits that are equal by construction choose the experts that torchref chooses: the lowest indices."""
    config = tiny(moe={"n_experts": n_experts, "n_active": n_active})
    model, reference = float32_model(config), oracle(config)
    for weight in weights_named("router.weight", model, reference):
        # One product per logit, so that equal weights give equal bits: all tie, or all but expert 0.
        weight.zero_()
        weight[:, 3] = scale
        weight[1:, 3] *= 2
    ids = random_ids(3, 21)
    with torch.inference_mode():
        expected, acts, _ = reference(torch.from_numpy(ids))
    if not scale:
        assert (acts["blocks.0.moe.expert_ids"] == torch.arange(n_active)).all()
    logits, _ = exported(tmp_path, model).prefill(ids)
    assert relative_error(logits, expected) < GATE


def test_experts_that_nobody_chose_do_not_run(tmp_path: Path) -> None:
    """Weights of unchosen experts may be NaN: each expert sees its own tokens only, and may see none."""
    config = tiny(moe={})
    model, reference = float32_model(config), oracle(config)
    for weight in weights_named("router.weight", model, reference):
        weight.zero_()  # all tie: experts 0 and 1
    for weight in weights_named("experts.gate_up", model, reference):
        weight[2:] = torch.nan
    ids = random_ids(2, 5)
    logits, _ = exported(tmp_path, model).prefill(ids)
    assert relative_error(logits, logits_of(reference, ids)) < GATE


def test_large_weights_lie_beside_the_graph(tmp_path: Path) -> None:
    """Above the limit the weights are in model.onnx.data, each at a page's begin, and the logits are the same bits."""
    model, counted = float32_model(CONFIGS["everything"]), []
    (tmp_path / "inside").mkdir()
    (tmp_path / "beside").mkdir()
    inside = write(tmp_path / "inside", model)
    beside = write(tmp_path / "beside", model, inline_limit=0, progress=counted.append)
    assert set(inside["files"]) == {"model.onnx"}
    assert set(beside["files"]) == {p.name for p in (tmp_path / "beside").iterdir()}
    assert set(beside["files"]) == {"model.onnx", "model.onnx.data"}
    assert inside["files"]["model.onnx"] - beside["files"]["model.onnx"] > 0.9 * sum(counted)
    graph = onnx.load(tmp_path / "beside" / "model.onnx", load_external_data=False).graph
    entries = [{e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data]
    assert len(entries) == len(counted) == beside["tensors"]
    assert sum(int(e["length"]) for e in entries) == sum(counted)
    assert all(int(e["offset"]) % 4096 == 0 and e["location"] == "model.onnx.data" for e in entries)
    ids = random_ids(2, 6)
    first, second = (OnnxDecoder(tmp_path / d / "model.onnx").prefill(ids)[0] for d in ("inside", "beside"))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_stored_once(name: str, tmp_path: Path) -> None:
    """The stored elements are the parameters and the rotary tables, under torchref's names."""
    config = CONFIGS[name]
    model = float32_model(config)
    facts = write(tmp_path, model)
    sizes = {t.name: int(np.prod(t.dims)) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    weights = {k: n for k, n in sizes.items() if not k.startswith("constant_")}
    tables = config.context * config.head_dim if config.position == "rope" else 0
    assert sum(weights.values()) == facts["parameters"] + tables
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    names = {k if ".experts." not in k else k.rpartition(".")[0] for k in weights}
    assert names - {"rope.cos", "rope.sin"} == {path for path, _ in model.named_parameters()}


@pytest.mark.parametrize("opset", [17, 18, 25])
def test_opset_is_the_one_asked_for(opset: int, tmp_path: Path) -> None:
    """The file says its opset, its maker and its config, names its values as other tools expect, and still computes."""
    config = CONFIGS["everything"]
    facts = write(tmp_path, float32_model(config), opset=opset)
    model = onnx.load(tmp_path / "model.onnx")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert model.producer_name == "jaxlm"
    assert facts["inputs"][:4] == [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert facts["outputs"][:3] == ["logits", "present.0.key", "present.0.value"]
    assert [v.name for v in model.graph.output] == facts["outputs"]
    decoder = OnnxDecoder(tmp_path / "model.onnx")
    assert decoder.config["context"] == config.context
    ids = random_ids(2, 6)
    assert relative_error(decoder.prefill(ids)[0], logits_of(oracle(config), ids)) < GATE


def test_bfloat16_weights_are_widened(tmp_path: Path) -> None:
    """A bfloat16 model gives the file of its float32 copy, byte for byte, and a note that says so."""
    config = CONFIGS["moe"]
    narrow = float32_model(config).bfloat16()
    notes = write(tmp_path, narrow)["notes"]
    first = (tmp_path / "model.onnx").read_bytes()
    assert notes == ["bfloat16 weights are stored as float32"]
    assert write(tmp_path, narrow.float())["notes"] == []
    assert (tmp_path / "model.onnx").read_bytes() == first


def test_runner_needs_neither_torch_nor_jax(tmp_path: Path) -> None:
    """A fresh interpreter decodes greedily with numpy and onnxruntime alone, as torchref does."""
    model, ids = float32_model(CONFIGS["moe"]), random_ids(2, 4)
    write(tmp_path, model)
    script = f"""
import sys
import numpy as np
from convert.onnx_decoder import OnnxDecoder
decoder = OnnxDecoder({str(tmp_path / "model.onnx")!r})
ids = np.asarray({ids.tolist()})
logits, cache = decoder.prefill(ids)
for _ in range(5):
    ids = logits[:, -1:].argmax(-1)
    print(*ids[:, 0])
    logits, cache = decoder.step(ids, cache)
assert not {{"torch", "jax", "onnx"}} & sys.modules.keys()
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        chosen = logits_of(model, ids)[:, -1].argmax(-1)
        assert line.split() == [str(i) for i in chosen]
        ids = np.concatenate([ids, chosen[:, None]], axis=1)
    assert ids.shape == (2, 9)


def test_bad_input_is_refused_in_one_line(tmp_path: Path) -> None:
    """Wrong ids, masks, caches, files and versions each give one line that names the values."""
    model = float32_model(CONFIGS["dense"])
    decoder = exported(tmp_path, model)
    _, cache = decoder.prefill(random_ids(2, 30))
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    stranger = onnx.load(tmp_path / "model.onnx")
    del stranger.metadata_props[:]
    onnx.save(stranger, tmp_path / "stranger.onnx")
    cases = {
        f"from 0 to {V} exceed": lambda: decoder.prefill(np.asarray([[0, V]])),
        "from -1 to 0": lambda: decoder.prefill(np.asarray([[0, -1]])),
        "do not fit": lambda: decoder.prefill(np.arange(4)),
        "cache of 2 rows": lambda: decoder.step(random_ids(1, 1), cache),
        "33 tokens exceeds the model's context of 32": lambda: decoder.step(random_ids(2, 3), cache),
        "it needs 4 arrays": lambda: decoder.step(random_ids(2, 1), OnnxCache(cache.mask, cache.past[:2])),
        "there is no such file": lambda: OnnxDecoder(tmp_path / "missing.onnx"),
        "broken.onnx: ": lambda: OnnxDecoder(tmp_path / "broken.onnx"),
        "no entry 'jaxlm.config'": lambda: OnnxDecoder(tmp_path / "stranger.onnx"),
        "opset=16 is not supported": lambda: write(tmp_path, model, opset=16),
        "dtype='int8' is not supported": lambda: write(tmp_path, model, dtype="int8"),
    }
    for message, action in cases.items():
        with pytest.raises(ConversionError, match=message) as error:
            action()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_refused(name: str) -> None:
    """Every configuration of the tests, which together hold every option, can be exported."""
    assert refusals(CONFIGS[name]) == []
