"""GGUF files are what gguf's own reader says they are, come back bit for bit, and say no where they must."""

import dataclasses
import hashlib
import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import random_params, tiny

from convert import gguf_file
from convert.gguf_config import metadata, rope_factors
from convert.rules import ConversionError
from convert.stream import array
from jaxlm.config import ModelConfig, RopeScaling
from jaxlm.rope_table import rope_frequencies
from jaxlm.tensor_file import Lazy

gguf = pytest.importorskip("gguf")

LLAMA3 = RopeScaling("llama3", 8.0, 16, low_freq_factor=1.5, high_freq_factor=6.0)
MODELS = {
    "dense": tiny(),
    "biased": tiny(qkv_bias=True, attn_out_bias=True, mlp_bias=True, tied=True, init="fan_in", dropout=0.1),
    "moe": tiny({"balance": "megatron", "capacity_factor": 1.5}, qkv_bias=True),
    "linear": tiny(rope_scaling=RopeScaling("linear", 2.5)),
    "llama3": tiny({}, head_dim=16, rope_scaling=LLAMA3),
    "yarn": tiny(head_dim=16, rope_scaling=RopeScaling("yarn", 4.0, 16)),
    "yarn_attention": tiny(head_dim=16, rope_scaling=RopeScaling("yarn", 4.0, 16, attention_factor=0.7)),
    "yarn_ramp": tiny(head_dim=16, rope_scaling=RopeScaling("yarn", 4.0, 16, beta_fast=4.0, beta_slow=0.25)),
}
FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
BLOCKS = tiny(d_model=32, n_heads=8, n_kv_heads=2, head_dim=8, d_ff=64)  # rows of 32 and 64


def lazy(params: dict[str, np.ndarray]) -> dict[str, Lazy]:
    return {path: Lazy.of(value) for path, value in params.items()}


def exported(path, config: ModelConfig, kind: Any = "f32", params=None, tokenizer=None) -> dict[str, str]:
    params = random_params(config, dtype=np.float32) if params is None else params
    return gguf_file.write(path, config, lazy(params), kind=kind, tokenizer=tokenizer, name="test")


def theirs(path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_comes_back_bit_for_bit(tmp_path, name):
    """Weights, config with what the format has no place for, and nothing left aside."""
    config = MODELS[name]
    params = random_params(config, dtype=np.float32)
    exported(tmp_path / "m.gguf", config, params=params)
    source = gguf_file.read(tmp_path / "m.gguf")
    assert source.config == config and source.tokenizer is None and source.notes == []
    assert source.tensors.keys() == params.keys()
    for path, value in params.items():
        back = array(source.tensors[path])
        assert back.dtype == np.float32 and np.array_equal(back, value), path


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_matrices_are_of_the_asked_kind_and_the_rest_is_float32(tmp_path, kind):
    """Read by gguf's reader; values rounded once, and again bit for bit through ours."""
    params = random_params(MODELS["moe"], dtype=np.float32)
    exported(tmp_path / "m.gguf", MODELS["moe"], kind, params)
    tensors, source = theirs(tmp_path / "m.gguf"), gguf_file.read(tmp_path / "m.gguf")
    for name, tensor in tensors.items():
        small = len(tensor.shape) == 1 or "gate_inp" in name
        assert tensor.tensor_type.name == ("F32" if small else kind.upper()), name
    wanted = params["lm_head.weight"].astype(FLOATS[kind])
    assert tensors["output.weight"].data.tobytes() == np.ascontiguousarray(wanted.T).tobytes()
    back = array(source.tensors["lm_head.weight"])
    assert back.dtype == wanted.dtype and np.array_equal(back, wanted)
    gate_up = array(source.tensors["blocks.1.moe.experts.gate_up"])
    assert np.array_equal(gate_up, params["blocks.1.moe.experts.gate_up"].astype(FLOATS[kind]))


@pytest.mark.parametrize("stored", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_weights_of_any_dtype_are_written(tmp_path, stored):
    """What the masters hold is rounded to the file's kind, once."""
    params = {path: value.astype(stored) for path, value in random_params(tiny()).items()}
    exported(tmp_path / "m.gguf", tiny(), params=params)
    back = gguf_file.read(tmp_path / "m.gguf").tensors
    assert all(np.array_equal(array(back[path]), value.astype(np.float32)) for path, value in params.items())


@pytest.mark.parametrize("moe", [None, {"d_ff": 32}])
def test_q8_0_is_what_ggufs_quantiser_makes(tmp_path, monkeypatch, moe):
    """Bit for bit, although made in pieces; norms and routers stay; rows that do not fit are F16."""
    import jaxlm.tensor_file

    monkeypatch.setattr(jaxlm.tensor_file, "_PIECE", 1000)
    config = dataclasses.replace(BLOCKS, moe=tiny(moe).moe, vocab_size=50)
    params = random_params(config, dtype=np.float32)
    params["blocks.0.attn.v_proj.weight"][:, 3] = 0  # a block of zeros has scale 0
    exported(tmp_path / "m.gguf", config, "q8_0", params)
    tensors, source = theirs(tmp_path / "m.gguf"), gguf_file.read(tmp_path / "m.gguf")
    q8 = gguf.GGMLQuantizationType.Q8_0
    for pair in gguf_file.pairs(config):
        value = pair.transform(params[pair.path][pair.index])
        tensor = tensors[pair.other]
        if len(tensor.shape) == 1 or "gate_inp" in pair.other:
            assert tensor.tensor_type.name == "F32"
            continue
        assert tensor.tensor_type == q8
        assert np.array_equal(tensor.data, gguf.quants.quantize(value, q8)), pair.other
        read = pair.transform(array(source.tensors[pair.path])[pair.index])
        assert np.array_equal(read, gguf.quants.dequantize(tensor.data, q8)), pair.other
    exported(tmp_path / "odd.gguf", tiny(), "q8_0")
    assert theirs(tmp_path / "odd.gguf")["output.weight"].tensor_type.name == "F16"


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 3), (6, 2), (4, 4)])
def test_q_and_k_are_interleaved_with_their_own_heads(tmp_path, heads, kv_heads):
    """Row h H + 2 i + s there is column h H + s H/2 + i here, for q, for k, and for their biases."""
    config = tiny(n_heads=heads, n_kv_heads=kv_heads, qkv_bias=True)
    params = random_params(config, dtype=np.float32)
    exported(tmp_path / "m.gguf", config, params=params)
    tensors, H = theirs(tmp_path / "m.gguf"), config.head_dim
    for letter, count in (("q", heads), ("k", kv_heads)):
        weight, bias = (params[f"blocks.1.attn.{letter}_proj.{what}"] for what in ("weight", "bias"))
        for h in range(count):
            for i in range(H // 2):
                for s in range(2):
                    there, here = h * H + 2 * i + s, h * H + s * H // 2 + i
                    assert np.array_equal(tensors[f"blk.1.attn_{letter}.weight"].data[there], weight[:, here])
                    assert tensors[f"blk.1.attn_{letter}.bias"].data[there] == bias[here]
    assert np.array_equal(tensors["blk.1.attn_v.weight"].data, params["blocks.1.attn.v_proj.weight"].T)


def test_llama3_factors_are_the_frequencies_ratio():
    """1 for fast pairs, the factor for slow ones: the published formula, pair by pair."""
    config = MODELS["llama3"]
    factors = rope_factors(config)
    assert factors is not None
    expected = []
    for frequency in rope_frequencies(16, config.rope_theta, RopeScaling(), 32)[0]:
        wavelength = 2 * np.pi / frequency
        smooth = (16 / wavelength - 1.5) / (6.0 - 1.5)
        expected.append(1 / ((1 - min(max(smooth, 0), 1)) / 8 + min(max(smooth, 0), 1)))
    np.testing.assert_allclose(factors, expected, rtol=1e-6)
    assert 1 < factors[0] < 8 and factors[-1] == 8


def test_hashes_are_those_of_the_bytes_in_the_file(tmp_path):
    """And progress counts all of them."""
    counted: list[int] = []
    params = lazy(random_params(BLOCKS, dtype=np.float32))
    hashes = gguf_file.write(
        tmp_path / "m.gguf", BLOCKS, params, kind="q8_0", tokenizer=None, name="x", progress=counted.append
    )
    tensors = theirs(tmp_path / "m.gguf")
    assert hashes == {n: hashlib.sha256(t.data.tobytes()).hexdigest() for n, t in tensors.items()}
    assert sum(counted) == sum(t.n_bytes for t in tensors.values())


def test_metadata_says_the_model(tmp_path):
    """Every number that the arithmetic needs, as gguf's reader reads it."""
    exported(tmp_path / "m.gguf", MODELS["moe"], "bf16")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.file_type"] == 32
    assert fields["general.name"] == "test" and fields["tokenizer.ggml.model"] == "none"
    for key, value in metadata(MODELS["moe"]).items():
        assert fields[key] == (np.float32(value) if isinstance(value, float) else value), key
    assert fields["llama.rope.freq_base"] == 5e4 and fields["llama.attention.key_length"] == 6
    assert fields["llama.feed_forward_length"] == 20 and fields["llama.expert_used_count"] == 2


def rewritten(path, changed: dict[str, Any], out) -> None:
    """The file again, written by gguf from what gguf reads, with metadata changed; None drops a key."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(None, "llama")
    facts = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")} | changed
    for key, value in facts.items():
        if value is not None:
            gguf_file._add(writer, key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["dense", "biased", "moe", "linear", "yarn", "yarn_attention"])
def test_a_file_of_another_program_reads_the_same(tmp_path, name):
    """Without our key: everything that decides the arithmetic comes from the format's own."""
    exported(tmp_path / "m.gguf", MODELS[name])
    rewritten(tmp_path / "m.gguf", {"jaxlm.config": None, "quantize.extra": "x"}, tmp_path / "n.gguf")
    source = gguf_file.read(tmp_path / "n.gguf")
    told, wanted = metadata(source.config), metadata(MODELS[name])
    assert told.keys() == wanted.keys()
    for key, value in wanted.items():
        assert told[key] == value or np.float32(told[key]) == np.float32(value), key
    assert source.notes == ["metadata key quantize.extra was ignored"]
    one, two = gguf_file.read(tmp_path / "m.gguf").tensors, source.tensors
    assert all(np.array_equal(array(one[path]), array(two[path])) for path in one)


def test_published_llama3_factors_are_recognised_and_others_refused(tmp_path):
    """8 and 32 are what Llama 3.1 and 3.2 use; a rule that cannot be told from the factors is not guessed."""
    for factor in (8.0, 32.0):
        config = tiny(head_dim=64, rope_theta=5e5, rope_scaling=RopeScaling("llama3", factor, 8192))
        exported(tmp_path / "m.gguf", config)
        rewritten(tmp_path / "m.gguf", {"jaxlm.config": None}, tmp_path / "n.gguf")
        assert gguf_file.read(tmp_path / "n.gguf").config.rope_scaling == config.rope_scaling
    exported(tmp_path / "m.gguf", MODELS["llama3"])
    rewritten(tmp_path / "m.gguf", {"jaxlm.config": None}, tmp_path / "n.gguf")
    with pytest.raises(ConversionError, match="not Llama 3's rule"):
        gguf_file.read(tmp_path / "n.gguf")


def test_changed_metadata_wins_over_our_key(tmp_path):
    """Somebody set another theta: that is the model now, and the note says that our key was stale."""
    exported(tmp_path / "m.gguf", tiny())
    rewritten(tmp_path / "m.gguf", {"llama.rope.freq_base": 1e6}, tmp_path / "n.gguf")
    source = gguf_file.read(tmp_path / "n.gguf")
    assert source.config.rope_theta == 1e6 and "was ignored" in source.notes[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"general.architecture": "qwen2"}, "'qwen2' is not supported; only 'llama' is"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale=0.5 may change the arithmetic"),
        ({"llama.block_count": 1 << 30}, "block_count=1073741824 in a file of 21 tensors"),
        ({"llama.block_count": 3}, "blk.2.attn_norm.weight -> blocks.2.attn_norm.weight: missing"),
        ({"llama.block_count": 1}, "blk.1.attn_norm.weight: unused"),
        ({"llama.feed_forward_length": 39}, "got (40, 24), expected (39, 24)"),
        ({"llama.feed_forward_length": 1 << 31}, "must be between 0 and 2^31"),
        ({"llama.context_length": 1 << 30}, "context_length=1073741824 is above"),
        ({"llama.attention.head_count": 5}, "n_heads=5 must be a multiple of n_kv_heads=2"),
        ({"llama.attention.head_count": "six"}, "must be one int"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4 must be the head's 6"),
        ({"llama.rope.scaling.type": "longrope"}, "type='longrope'"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor=1.5"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_beta_fast": 8.0}, "yarn_beta_fast"),
        ({"split.count": 3}, "merge the parts"),
        ({"llama.vocab_size": 60}, "vocab_size=60, token_embd has 61"),
    ],
)
def test_metadata_that_is_no_such_model_is_refused(tmp_path, changed, message):
    """Also when our own key is still there and says something else; the file is named on every line."""
    exported(tmp_path / "m.gguf", tiny())
    rewritten(tmp_path / "m.gguf", changed, tmp_path / "n.gguf")
    with pytest.raises(ConversionError) as error:
        gguf_file.read(tmp_path / "n.gguf")
    assert message in str(error.value)
    assert all(line.startswith(f"{tmp_path}/n.gguf: ") for line in str(error.value).splitlines())


REFUSED = {
    "position='learned'": tiny(position="learned"),
    "windows=(16,)": tiny(windows=(16,)),
    "mlp='gelu_erf'": tiny(mlp="gelu_erf"),
    "qk_norm=True": tiny(qk_norm=True),
    "head_bias=True": tiny(head_bias=True),
    "attn_bias_table=True": tiny(attn_bias_table=True),
    "n_layers=513": tiny(n_layers=513),
    "moe.n_experts=1025": tiny({"n_experts": 1025}),
    "moe.pattern=(False, True)": tiny({"pattern": (False, True)}),
    "moe.renormalize=False": tiny({"renormalize": False}),
    "moe.expert_bias=True": tiny({"expert_bias": True}),
    "moe.shared_d_ff=8": tiny({"shared_d_ff": 8}),
    "llama.rope.freq_base=1e+40 is beyond float32": tiny(rope_theta=1e40),
    "llama.attention.layer_norm_rms_epsilon=1e-60 is beyond float32": tiny(norm_eps=1e-60),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_the_architecture_cannot_say_is_refused(tmp_path, field):
    """With the field and its value, before anything is written."""
    assert [line for line in gguf_file.refusals(REFUSED[field], None) if field in line]
    with pytest.raises(ConversionError):
        gguf_file.write(tmp_path / "m.gguf", REFUSED[field], {}, kind="f32", tokenizer=None, name="x")
    assert list(tmp_path.iterdir()) == []


def test_refusals_come_all_at_once_and_only_where_needed():
    """Three reasons, three lines; a window as long as the context, a capacity limit and dropout are none."""
    config = tiny({"renormalize": False}, qk_norm=True, head_bias=True)
    assert len(gguf_file.refusals(config, None)) == 3
    assert gguf_file.refusals(tiny({"capacity_factor": 1.0}, windows=(32, 0), dropout=0.5), None) == []


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [("f16", 1e5, "F16 cannot hold"), ("q8_0", np.nan, "1 of 2048 values are not finite")],
)
def test_values_beyond_the_kind_are_refused_and_nothing_is_left(tmp_path, kind, value, message):
    """An infinity in place of a weight would be found by nobody."""
    params = random_params(BLOCKS, dtype=np.float32)
    params["blocks.1.mlp.up_proj.weight"][3, 4] = value
    with pytest.raises(ConversionError, match=f"blk.1.ffn_up.weight: {message}"):
        exported(tmp_path / "m.gguf", BLOCKS, kind, params)
    assert list(tmp_path.iterdir()) == []


def test_missing_tensors_and_strange_names_are_refused(tmp_path):
    """Before the file exists."""
    params = random_params(tiny(), dtype=np.float32)
    del params["final_norm.weight"]
    with pytest.raises(ConversionError, match="final_norm.weight -> output_norm.weight: missing"):
        exported(tmp_path / "m.gguf", tiny(), params=params)
    with pytest.raises(ConversionError, match="llama.cpp treats phi3 in a way of its own"):
        gguf_file.write(tmp_path / "m.gguf", tiny(), {}, kind="f32", tokenizer=None, name="my-Phi3")
    assert list(tmp_path.iterdir()) == []


def test_halves_of_different_kinds_meet_in_float32(tmp_path):
    """Experts whose gate is F16 and whose up is BF16, as other quantisers may leave them."""
    config = tiny({"d_ff": 32}, n_layers=1)
    params = random_params(config, dtype=np.float32)
    exported(tmp_path / "f16.gguf", config, "f16", params)
    exported(tmp_path / "bf16.gguf", config, "bf16", params)
    raw, other = bytearray((tmp_path / "f16.gguf").read_bytes()), theirs(tmp_path / "bf16.gguf")
    name = "blk.0.ffn_up_exps.weight"
    at, start = (
        raw.index(name.encode()) + len(name) + 4 + 3 * 8,
        theirs(tmp_path / "f16.gguf")[name].data_offset,
    )
    raw[at : at + 4] = (30).to_bytes(4, "little")
    raw[start : start + other[name].n_bytes] = other[name].data.tobytes()
    (tmp_path / "mixed.gguf").write_bytes(raw)
    back = array(gguf_file.read(tmp_path / "mixed.gguf").tensors["blocks.0.moe.experts.gate_up"])
    value = params["blocks.0.moe.experts.gate_up"]
    assert np.array_equal(back[..., :32], value[..., :32].astype(np.float16).astype(np.float32))
    assert np.array_equal(back[..., 32:], value[..., 32:].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_the_config_key_is_plain_json(tmp_path):
    """Anybody can read it."""
    exported(tmp_path / "m.gguf", MODELS["moe"])
    text = gguf.GGUFReader(tmp_path / "m.gguf").fields["jaxlm.config"].contents()
    assert json.loads(text)["moe"]["balance"] == "megatron"
