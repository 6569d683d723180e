"""Quantised weights in both frameworks: the same bytes, the same function, the function of the dequantised weights."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers import QUICK, T, V, random_params, relative_error, tiny  # noqa: E402
from tolerances import tolerance  # noqa: E402

import jaxlm.quant  # noqa: E402
import torchref.layers  # noqa: E402
import torchref.quant  # noqa: E402
from convert.native import build_torch, to_torch  # noqa: E402
from jaxlm.config import InputError, ModelConfig  # noqa: E402
from jaxlm.layers import Backends  # noqa: E402
from jaxlm.model import Split, abstract_model, merge_model  # noqa: E402
from jaxlm.quant import KINDS, is_quantized  # noqa: E402
from jaxlm.sampling import Sampling  # noqa: E402

pytestmark = pytest.mark.torch

# In the tiny models 64 divides no width, so that blocks cross rows; in "even" it divides all.
EVEN = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "d_ff": 128}
CASES: dict[str, ModelConfig] = {
    "dense-biases": tiny(init="fan_in", n_layers=1, qkv_bias=True, attn_out_bias=True, mlp_bias=True),
    "moe-shared": tiny({"shared_d_ff": 28, "shared_gate": True}, init="fan_in", n_layers=1),
    "moe-gelu-biases": tiny(
        {"expert_bias": True, "pattern": (True, False)}, init="fan_in", mlp="gelu_erf", tied=True
    ),
    "even": tiny(init="fan_in", n_layers=1, **EVEN),
}


MODELS = [(name, "nf4") for name in CASES] + [("dense-biases", "int8"), ("moe-gelu-biases", "int4")]


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Compiles the tiny models without optimising them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
        yield


def pair(config: ModelConfig, dtype: Any = np.float64) -> tuple[Split, Any]:
    """One model in both frameworks."""
    params = random_params(config, dtype=dtype)
    model = Split(
        abstract_model(config).graphdef, {path: jnp.asarray(value) for path, value in params.items()}
    )
    return model, build_torch(config, params)


def ids() -> np.ndarray:
    """Rows of random tokens."""
    return np.random.default_rng(3).integers(0, V, (2, T))


def logits(model: Split) -> Any:
    """jaxlm's logits of those rows, compiled without optimising."""
    forward = jax.jit(lambda params: merge_model(model.graphdef, params)(jnp.asarray(ids()))[0])
    return forward(model.params)


@pytest.mark.parametrize("shape", [(7, 33), (3, 5), (1, 1), (128, 64), (96, 80), (3, 64, 96), (640, 512)])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_scales_and_values_are_bitwise_equal(kind: str, shape: tuple[int, ...]) -> None:
    """Both quantisers on the same weight: ordinary, huge, tiny, half precision, zeros, one value all over."""
    rng = np.random.default_rng(0)
    plain = rng.standard_normal(shape).astype(np.float32) * np.float32(0.02)
    holed = plain.copy()
    holed.reshape(-1)[: min(plain.size, 64)] = 0
    weights = (plain, holed, plain * np.float32(1e32), plain * np.float32(1e-28), np.zeros_like(plain))
    for weight in (*weights, np.full_like(plain, -0.3), np.rint(plain * 1e3)):
        ours = jaxlm.quant.quantize_tensor(weight, kind)
        theirs = torchref.quant.quantize_tensor(torch.from_numpy(weight), kind)
        for here, there in zip(ours, theirs, strict=True):
            if here is not None:
                np.testing.assert_array_equal(here, there.numpy())
                assert here.dtype == there.numpy().dtype
        np.testing.assert_array_equal(
            jaxlm.quant.dequantize_tensor(ours, kind, shape),
            torchref.quant.dequantize_tensor(theirs, kind, shape),
        )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(*m, marks=[] if m[1] == "nf4" or m[0] == "moe-shared" else pytest.mark.slow)
        for m in MODELS
    ],
)
def test_quantised_models_are_the_same_model(name: str, kind: str, x64: None) -> None:
    """Parameters by name and to the bit; float64 logits of both, and of a plain decoder that holds the same values."""
    model, decoder = pair(CASES[name])
    ours, theirs = jaxlm.quant.quantize(model, kind), torchref.quant.quantize(decoder, kind)
    state = theirs.state_dict()
    assert ours.params.keys() == state.keys()
    for path in (path for path in state if ".weight." in path or ".experts." in path):
        np.testing.assert_array_equal(ours.params[path], state[path].numpy())
        assert ours.params[path].dtype == state[path].numpy().dtype
    here = logits(ours)
    with torch.no_grad():
        there = theirs(torch.from_numpy(ids()))[0].numpy()
    assert relative_error(here, there) < tolerance("f64_quant")
    stored = {
        path: jaxlm.quant.Quantized(
            *(ours.params.get(f"{path}.{part}") for part in jaxlm.quant.Quantized._fields)
        )
        for path in filter(is_quantized, model.params)
    }
    params = dict(model.params)
    for path, value in params.items():
        if path in stored:
            shape = value.mT.shape
            params[path] = jaxlm.quant.dequantize_tensor(stored[path], kind, shape).mT.astype(value.dtype)
            assert relative_error(params[path], value) > 1e-4, "the weight was not quantised at all"
    plain = logits(Split(model.graphdef, params))
    assert relative_error(here, plain) < tolerance("f64_quant")


@pytest.mark.parametrize("kind", KINDS)
def test_errors_and_sizes_agree(kind: str) -> None:
    """The report of every weight is the same in both frameworks, paths and order included."""
    model, decoder = pair(CASES["moe-shared"], np.float32)
    ours = jaxlm.quant.errors(model, jaxlm.quant.quantize(model, kind))
    theirs = torchref.quant.errors(decoder, torchref.quant.quantize(decoder, kind))
    assert {row.path for row in ours} == set(filter(is_quantized, model.params))
    theirs_by_path = {row.path: row for row in theirs}
    for row in ours:
        other = theirs_by_path[row.path]
        assert row.error == pytest.approx(other.error, rel=1e-9) and row.error > 0
        assert (row.bytes_before, row.bytes_after) == (other.bytes_before, other.bytes_after)


def test_greedy_decoding_gives_the_same_tokens() -> None:
    """Everything that decodes takes a quantised model, in both frameworks."""
    import jaxlm.generate
    import torchref.generate

    kind = "nf4"
    model, decoder = pair(CASES["moe-shared"], np.float32)
    settings = Sampling(8, greedy=True)
    prompts = [[7, 3, 60, 22], [1, 5]]
    ours = jaxlm.generate.decode(jaxlm.quant.quantize(model, kind), prompts, settings)
    theirs = torchref.generate.decode(torchref.quant.quantize(decoder, kind), prompts, settings)
    assert [best.ids for (best,) in ours] == [best.ids for (best,) in theirs]


@pytest.mark.parametrize("kind", KINDS)
def test_torch_reads_tensors_one_by_one(kind: str) -> None:
    """quantize_params is quantize; the abstract model has its names, shapes and dtypes; the rest is refused."""
    config = CASES["moe-shared"]
    params = random_params(config, dtype=np.float32)
    tensors = {path: torch.from_numpy(value) for path, value in to_torch(config, params).items()}
    expected = torchref.quant.quantize(build_torch(config, params), kind).state_dict()
    found = torchref.quant.quantize_params(config, tensors, kind).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
    abstract = torchref.quant.abstract_quantized(config, kind).state_dict()
    assert {k: (v.shape, v.dtype) for k, v in abstract.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }
    with pytest.raises(InputError, match="embed.weight is missing"):
        torchref.quant.quantize_params(
            config, {k: v for k, v in tensors.items() if k != "embed.weight"}, kind
        )


def test_what_is_not_quantised_is_as_it_was_or_as_asked() -> None:
    """Implementations, remat and mode of the model; the dtype of the other parameters where one is given."""
    config = CASES["moe-shared"]
    params = random_params(config, dtype=np.float32)
    graphdef = abstract_model(config, Backends("readable", "loop"), remat="block").graphdef
    model = Split(graphdef, {path: jnp.asarray(value) for path, value in params.items()})
    decoder = build_torch(config, params, torchref.layers.Backends("readable", "loop")).eval()
    decoder.remat = "block"
    whole = merge_model(*jaxlm.quant.quantize(model, "int8"))
    for found in (whole, torchref.quant.quantize(decoder, "int8")):
        block = found.blocks[0]
        assert (block.attn.backend, block.moe.experts.backend, found.remat) == ("readable", "loop", "block")
    assert not found.training
    in_torch = {path: torch.from_numpy(value) for path, value in to_torch(config, params).items()}
    half = jaxlm.quant.quantize_params(config, params, "int8", dtype=jnp.bfloat16).params
    other = torchref.quant.quantize_params(config, in_torch, "int8", dtype=torch.bfloat16).state_dict()
    for path in filter(lambda path: not is_quantized(path), params):
        assert half[path].dtype == jnp.bfloat16 and other[path].dtype == torch.bfloat16, path
    scales = "blocks.0.attn.q_proj.weight.scales"
    assert half[scales].dtype == jnp.float32 and other[scales].dtype == torch.float32
