"""Adapters against the peft library itself, in float64: what we write it opens, what it saves we read.

Layouts: a matrix per weight (Llama), stacked experts (transformers 5), a matrix per expert (transformers 4). The last
is checked on a tree of linear layers that has the names of transformers 4's modules.
"""

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from helpers import Arrays, assert_close, random_params, relative_error, tiny, tree_errors  # noqa: E402
from hf64 import double_precision  # noqa: E402
from tolerances import tolerance  # noqa: E402

from convert.hf.express import fields as config_fields  # noqa: E402
from convert.hf.families import FAMILIES  # noqa: E402
from convert.hf.families import pairs as family_pairs  # noqa: E402
from convert.native import build_torch  # noqa: E402
from convert.peft_adapter import (  # noqa: E402
    AdapterConfig,
    Override,
    factor_shapes,
    merge,
    read_adapter,
    unmerge,
    write_adapter,
)
from convert.rules import SAME, ConversionError, Pair, Transform, convert  # noqa: E402
from jaxlm.config import ConfigError, ModelConfig, from_dict, to_dict  # noqa: E402
from jaxlm.tensor_file import Lazy, Planned, open_file, write_file  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # peft looks for patterns of parameters among the modules only, and applies them all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

GATE = tolerance("f64_peft")
CONFIGS: dict[str, ModelConfig] = {
    "llama": tiny(),
    "mixtral": tiny({"balance": "mixtral"}),
    "qwen2_moe": tiny({"renormalize": False, "shared_d_ff": 14, "shared_gate": True}, qkv_bias=True),
    "qwen3_moe": tiny({"pattern": (False, True)}, qk_norm=True),  # one dense layer
}
ROUTER = (r"blocks\.\d+\.moe\.(router|shared_gate)\.weight",)
PLAIN = AdapterConfig(4, 6.0)
MIXED = AdapterConfig(
    3,
    5.0,
    rslora=True,
    targets=(*AdapterConfig(1, 1.0).targets, *ROUTER, r"lm_head\.weight"),
    overrides=(
        Override(r"blocks\.1\.attn\.q_proj\.weight", 2, 1.5),
        Override(r"blocks\.\d+\.(moe\.experts\.gate_up|mlp\.up_proj\.weight)", 5, 2.0),
    ),
)
PARTIAL = AdapterConfig(
    2, 3.0, targets=(r"blocks\.1\.(attn\.o_proj\.weight|moe\.experts\.down|mlp\.down_proj\.weight)",)
)


def pairs_of(family: str, layout: Any = "fused") -> list[Pair]:
    """The table of a tiny model."""
    return family_pairs(CONFIGS[family], family, layout)


def random_adapter(config: AdapterConfig, pairs: list[Pair], seed: int = 1) -> Arrays:
    """Factors of order one for every weight that the config adapts."""
    random = np.random.default_rng(seed)
    shapes = {pair.path: pair.shape for pair in pairs}
    result = {}
    for path in filter(config.adapts, shapes):
        a, b = factor_shapes(shapes[path], config.rank_alpha(path)[0])
        result |= {f"{path}.lora_a": random.normal(size=a), f"{path}.lora_b": random.normal(size=b)}
    return result


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """transformers computes in float64 for the whole test."""
    names = [f"models.{f}.modeling_{f}" for f in CONFIGS] + ["modeling_rope_utils", "masking_utils"]
    with double_precision(*(importlib.import_module(f"transformers.{name}") for name in names)):
        yield


def base_model(family: str, params: Arrays) -> Any:
    """transformers' model with our weights."""
    said = config_fields(CONFIGS[family], FAMILIES[family])
    said |= {"use_cache": False, "attn_implementation": "eager", "experts_implementation": "eager"}
    config = transformers.AutoConfig.for_model(family, **said)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    tensors = convert(pairs_of(family), params)
    model.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in tensors.items()}, strict=True)
    return model


def skeleton(pairs: list[Pair], params: Arrays) -> Any:
    """Linear layers with the names of a table, holding our weights: all that peft needs to make adapters."""
    root = torch.nn.Module()
    for name, weight in convert(pairs, params).items():
        *modules, layer, leaf = name.split(".")
        if leaf != "weight" or weight.ndim != 2:
            continue
        node = root
        for module in modules:
            if not hasattr(node, module):
                node.add_module(module, torch.nn.Module())
            node = getattr(node, module)
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=torch.float64)
        linear.weight.data.copy_(torch.from_numpy(weight.copy()))
        node.add_module(layer, linear)
    return root


def weights_of(model: Any, pairs: list[Pair]) -> Arrays:
    """A merged peft model's adaptable weights, in our layout."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    return convert([pair for pair in pairs if pair.other in state], state, inverse=True)


def logits(model: Any) -> np.ndarray:
    """Over a fixed batch."""
    ids = torch.from_numpy(np.random.default_rng(7).integers(0, 61, (2, 19)))
    with torch.no_grad():
        out = model(ids)
    return (out[0] if isinstance(out, tuple) else out.logits).numpy()


def made_by_peft(model: Any, directory: Path, **fields: Any) -> Any:
    """A peft model with random factors, saved; without a base name, so that nothing is looked up."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=None, **fields))
    generator = torch.Generator().manual_seed(3)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            assert p.dtype == torch.float64
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    adapted.save_pretrained(directory, save_embedding_layers=False)
    return adapted


@pytest.mark.parametrize("config", [PLAIN, MIXED, PARTIAL], ids=["plain", "mixed", "partial"])
@pytest.mark.parametrize("family", CONFIGS)
def test_peft_opens_an_exported_adapter_with_the_logits_of_our_merge(
    family: str, config: AdapterConfig, tmp_path: Path
) -> None:
    """Every tensor of the file is the model's and the other way round; transformers' own loader agrees."""
    params, pairs = random_params(CONFIGS[family], init="fan_in"), pairs_of(family)
    adapter = random_adapter(config, pairs)
    digests = write_adapter(tmp_path, adapter, config, pairs)
    expected = logits(build_torch(CONFIGS[family], merge(params, adapter, config)))
    assert relative_error(logits(build_torch(CONFIGS[family], params)), expected) > 0.1

    model = peft.PeftModel.from_pretrained(base_model(family, params), str(tmp_path))
    held = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = open_file(tmp_path / "adapter_model.safetensors")
    assert held.keys() == stored.keys() == digests.keys()
    assert all(np.array_equal(held[name].numpy(), stored[name].read()) for name in stored)
    assert relative_error(logits(model), expected) < GATE

    plain = base_model(family, params)
    info = plain.load_adapter(str(tmp_path))
    assert not info.missing_keys and not info.unexpected_keys
    assert relative_error(logits(plain), expected) < GATE


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_an_adapter_of_peft_merges_as_peft_merges_it(family: str, rslora: bool, tmp_path: Path) -> None:
    """Patterns of rank and alpha, linear layers and stacked parameters: the same weights after merging."""
    params, pairs = random_params(CONFIGS[family]), pairs_of(family)
    fields: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 7,
        "use_rslora": rslora,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 2},
        "alpha_pattern": {"k_proj": 3, r".*\.gate_up_proj": 4},
    }
    if family == "llama":
        fields["target_modules"] += ["gate_proj", "up_proj", "down_proj"]
    else:
        fields["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
    if family == "qwen2_moe":
        fields["target_modules"] += ["shared_expert_gate"]
        fields["rank_pattern"] |= {"0.mlp.shared_expert_gate": 1}
    model = made_by_peft(base_model(family, params), tmp_path, **fields)
    config, adapter = read_adapter(tmp_path, pairs)
    ours = merge(params, adapter, config)
    assert_close(tree_errors(ours, weights_of(model.merge_and_unload(), pairs)), GATE)
    changed = {path for path in params if not np.array_equal(ours[path], params[path])}
    assert changed == {path for path in params if config.adapts(path)}
    assert len(changed) == {"llama": 15, "mixtral": 15, "qwen2_moe": 17, "qwen3_moe": 12}[family]
    assert config.rank_alpha("blocks.1.attn.q_proj.weight") == (5, 7.0)


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"w1": 2, "experts.2.w3": 5}, "alpha_pattern": {"experts.1.w3": 2, "w2": 9}},
    ],
    ids=["equal", "unequal"],
)
def test_gate_and_up_of_an_expert_with_factors_of_their_own_become_one(
    patterns: dict[str, Any], rslora: bool, tmp_path: Path
) -> None:
    """Names of transformers 4: ranks add up, scales stay, whatever rank and alpha each matrix has."""
    pairs = pairs_of("mixtral", "per_expert")
    params = random_params(CONFIGS["mixtral"])
    model = made_by_peft(
        skeleton(pairs, params),
        tmp_path,
        r=3,
        lora_alpha=7,
        use_rslora=rslora,
        target_modules=["q_proj", "w1", "w2", "w3", "gate"],
        **patterns,
    )
    config, adapter = read_adapter(tmp_path, pairs)
    assert config.rank_alpha("blocks.0.moe.experts.gate_up")[0] == (7 if patterns else 6)
    merged = weights_of(model.merge_and_unload(), [p for p in pairs if len(p.part_shape) == 2])
    ours = merge(params, adapter, config)
    assert_close(tree_errors({path: ours[path] for path in merged}, merged), GATE)


def test_only_gate_adapted_leaves_up_alone(tmp_path: Path) -> None:
    """A half without factors has zeros in b, and keeps its rank."""
    pairs, params = pairs_of("mixtral", "per_expert"), random_params(CONFIGS["mixtral"])
    model = made_by_peft(
        skeleton(pairs, params), tmp_path, r=2, target_modules=["w1"], layers_to_transform=[1]
    )
    config, adapter = read_adapter(tmp_path, pairs)
    assert set(adapter) == {f"blocks.1.moe.experts.gate_up.lora_{x}" for x in "ab"}
    assert adapter["blocks.1.moe.experts.gate_up.lora_a"].shape == (4, 24, 2)
    merged = weights_of(model.merge_and_unload(), [p for p in pairs if len(p.part_shape) == 2])
    ours = merge(params, adapter, config)
    assert_close(tree_errors({path: ours[path] for path in merged}, merged), GATE)


def test_an_adapter_per_expert_opens_under_both_generations_of_names(tmp_path: Path) -> None:
    """The old names load into linear layers, and through peft's own conversion into stacked experts."""
    family, pairs = "mixtral", pairs_of("mixtral", "per_expert")
    params = random_params(CONFIGS[family], init="fan_in")
    adapter = random_adapter(PLAIN, pairs)
    write_adapter(tmp_path, adapter, PLAIN, pairs)
    merged = merge(params, adapter, PLAIN)
    bare = peft.LoraConfig.from_pretrained(str(tmp_path))
    bare.task_type = None  # the tree of layers cannot generate
    old = peft.PeftModel.from_pretrained(skeleton(pairs, params), str(tmp_path), config=bare)
    theirs = weights_of(old.merge_and_unload(), [p for p in pairs if len(p.part_shape) == 2])
    assert_close(tree_errors({path: merged[path] for path in theirs}, theirs), GATE)
    new = peft.PeftModel.from_pretrained(base_model(family, params), str(tmp_path))
    assert relative_error(logits(new), logits(build_torch(CONFIGS[family], merged))) < GATE


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
@pytest.mark.parametrize("config", [PLAIN, MIXED, PARTIAL], ids=["plain", "mixed", "partial"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_round_trip_is_bitwise(family: str, config: AdapterConfig, layout: str, tmp_path: Path) -> None:
    """Factors, ranks, alphas and files come back as they were, in each dtype."""
    pairs = pairs_of(family, layout)
    adapter = {name: x.astype(np.float32) for name, x in random_adapter(config, pairs).items()}
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    digests = write_adapter(first, adapter, config, pairs, "base")
    back, again = read_adapter(first, pairs)
    assert list(again) == list(adapter)
    for name, x in adapter.items():
        assert again[name].dtype == x.dtype and np.array_equal(again[name], x)
        path = name.rpartition(".")[0]
        assert back.rank_alpha(path) == config.rank_alpha(path) and back.scale(path) == config.scale(path)
    assert write_adapter(second, again, back, pairs, "base") == digests
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
    assert from_dict(AdapterConfig, to_dict(back)) == back


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-15), ("float32", 2e-7), ("bfloat16", 8e-3)])
def test_merge_is_undone_within_the_rounding_of_the_dtype(dtype: str, limit: float) -> None:
    """Adapted weights move and come back; the others are the same arrays; factors keep their own dtype."""
    wide = random_params(CONFIGS["mixtral"], init="fan_in")
    params = {path: cast(x, dtype) for path, x in wide.items()}
    adapter = random_adapter(PLAIN, pairs_of("mixtral"))
    merged = merge(params, adapter, PLAIN)
    back = unmerge(merged, adapter, PLAIN)
    for path, weight in params.items():
        assert merged[path].dtype == back[path].dtype == weight.dtype
        assert (merged[path] is weight) == (not PLAIN.adapts(path))
        if PLAIN.adapts(path):
            assert relative_error(merged[path], weight) > 1
            size = np.linalg.norm(np.asarray(merged[path], np.float64))
            assert (
                np.linalg.norm(np.asarray(back[path], np.float64) - np.asarray(weight, np.float64))
                < limit * size
            )


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    """numpy's cast; bfloat16 is known to it by ml_dtypes."""
    return x.astype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)


def test_merge_adds_the_scaled_product_of_each_expert() -> None:
    """Written out with loops, apart from the library."""
    params = random_params(CONFIGS["mixtral"])
    adapter = random_adapter(MIXED, pairs_of("mixtral"))
    merged = merge(params, adapter, MIXED)
    path = "blocks.1.moe.experts.gate_up"
    for e in range(4):
        product = adapter[f"{path}.lora_a"][e].dot(adapter[f"{path}.lora_b"][e])
        assert relative_error(merged[path][e], params[path][e] + 2.0 / 5**0.5 * product) < 1e-15
    path = "blocks.0.attn.k_proj.weight"
    product = adapter[f"{path}.lora_a"].dot(adapter[f"{path}.lora_b"])
    assert relative_error(merged[path], params[path] + 5.0 / 3**0.5 * product) < 1e-15


def change(directory: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Changes a written adapter: fields of its config; tensors to a shape, or away (None)."""
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    held = {
        name: np.array(lazy.read())
        for name, lazy in open_file(directory / "adapter_model.safetensors").items()
    }
    for name, shape in tensors.items():
        held.pop(name, None)
        if shape is not None:
            held[name] = np.ones(shape)
    planned = {name: Planned.of(Lazy.of(x)) for name, x in held.items()}
    write_file(directory / "adapter_model.safetensors", planned, {})


Q = "base_model.model.model.layers.0.self_attn.q_proj."
HEAD, EMBED = "base_model.model.lm_head.base_layer.weight", "base_model.model.model.embed_tokens."
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "other kind": ({"peft_type": "IA3"}, {}, ["peft_type='IA3'"]),
    "several fields at once": (
        {
            "use_dora": True,
            "bias": "all",
            "modules_to_save": ["lm_head"],
            "lora_bias": True,
            "fan_in_fan_out": True,
        },
        {},
        [
            "use_dora=True",
            "bias='all'",
            "modules_to_save=['lm_head']",
            "lora_bias=True",
            "fan_in_fan_out=True",
        ],
    ),
    "a field from the future": ({"use_xlora": {"depth": 2}}, {}, ["use_xlora={'depth': 2}"]),
    "an initialisation that changes the base": (
        {"init_lora_weights": "pissa_niter_4"},
        {},
        ["'pissa_niter_4'"],
    ),
    "wrong types": (
        {
            "target_modules": 3,
            "rank_pattern": {"q_proj": "4"},
            "alpha_pattern": {"q(": 1},
            "layers_to_transform": "0",
        },
        {},
        ["target_modules=3", "rank_pattern['q_proj']='4'", "'q(' is no regular", "layers_to_transform='0'"],
    ),
    "targets elsewhere": ({"target_modules": ".*fc[12]"}, {}, ["targets no weight of this model"]),
    "no targets": ({"target_modules": None}, {}, ["both empty"]),
    "nonsense numbers": ({"r": 0}, {}, ["rank=0"]),
    "infinite alpha": ({"lora_alpha": float("inf")}, {}, ["Infinity"]),
    "unknown and embedding targets": (
        {"target_modules": ["q_proj", "c_attn", "embed_tokens"]},
        {},
        ["'c_attn' names no weight", "'embed_tokens' names no weight", "k_proj.lora_A.weight: unused"],
    ),
    "embedding adapters": (
        {},
        {EMBED + "lora_embedding_A": (4, 61), HEAD: (61, 24)},
        ["lora_embedding_A: unused, adapters of embeddings", "save_embedding_layers=False"],
    ),
    "magnitudes": ({}, {Q + "lora_magnitude_vector": (36,)}, ["lora_magnitude_vector: unused, DoRA"]),
    "missing and misshapen": (
        {},
        {Q + "lora_A.weight": None, Q + "lora_B.weight": (36, 5)},
        [f"{Q}lora_A.weight: missing", f"{Q}lora_B.weight: got (36, 5), expected (36, 4) at rank 4"],
    ),
    "rank of the config": ({"r": 3}, {}, ["lora_A.weight: got (4, 24), expected (3, 24) at rank 3"]),
    "layers left out": (
        {"layers_to_transform": 1},
        {},
        [f"{Q}lora_A.weight: unused, adapter_config.json does not target"],
    ),
    "factors exchanged": (
        {},
        {Q + "lora_A.weight": (36, 4), Q + "lora_B.weight": (4, 24)},
        [f"{Q}lora_A.weight: got (36, 4)", f"{Q}lora_B.weight: got (4, 24)"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(case: str, tmp_path: Path) -> None:
    """Each field with its value, each tensor with its shape, all of them at once."""
    pairs = pairs_of("llama")
    write_adapter(tmp_path, random_adapter(PLAIN, pairs), PLAIN, pairs)
    fields, tensors, expected = REFUSED[case]
    change(tmp_path, fields, tensors)
    with pytest.raises(ConversionError) as caught:
        read_adapter(tmp_path, pairs)
    for text in expected:
        assert text in str(caught.value)


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    """Pickled factors are named and not opened; so are a missing and a broken config."""
    pairs = pairs_of("llama")
    with pytest.raises(ConversionError, match=r"adapter_config\.json: no such file"):
        read_adapter(tmp_path, pairs)
    (tmp_path / "adapter_config.json").write_text("[")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ConversionError, match="pickle, which is never read"):
        read_adapter(tmp_path, pairs)
    write_file(tmp_path / "adapter_model.safetensors", {}, {})
    for text in ("[", "[]", '{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_dropout": null}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ConversionError, match=r"adapter_config\.json"):
            read_adapter(tmp_path, pairs)


def test_an_adapter_that_does_not_fit_is_not_written(tmp_path: Path) -> None:
    """Missing, misshapen and unknown factors are listed; dropout has no place beside stacked experts."""
    pairs = pairs_of("mixtral")
    adapter = random_adapter(PLAIN, pairs)
    del adapter["blocks.0.attn.q_proj.weight.lora_b"]
    adapter["blocks.1.moe.experts.down.lora_a"] = np.zeros((4, 4, 20))
    adapter["embed.weight.lora_a"] = np.zeros((61, 4))
    with pytest.raises(ConversionError) as caught:
        write_adapter(tmp_path, adapter, PLAIN, pairs)
    for text in (
        "q_proj.weight.lora_b: missing",
        "down.lora_a: got (4, 4, 20), expected (4, 20, 4)",
        "embed.weight",
    ):
        assert text in str(caught.value)
    with pytest.raises(ConversionError, match=r"dropout=0\.1"):
        write_adapter(tmp_path, random_adapter(PLAIN, pairs), dataclasses.replace(PLAIN, dropout=0.1), pairs)
    other = Transform("other", SAME.forward, SAME.inverse)
    with pytest.raises(ConversionError, match="'other' layout has no adapter"):
        write_adapter(
            tmp_path,
            random_adapter(PLAIN, pairs),
            PLAIN,
            [dataclasses.replace(p, transform=other) for p in pairs],
        )
    with pytest.raises(ConversionError, match="name no weight of this model"):
        write_adapter(tmp_path, {}, dataclasses.replace(PLAIN, targets=("embed.weight",)), pairs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("q(",)}, "no regular expression"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    """One line with the value."""
    with pytest.raises(ConfigError, match=message):
        from_dict(AdapterConfig, to_dict(PLAIN) | fields)
