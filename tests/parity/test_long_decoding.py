"""Decoding over hundreds of tokens: the cache against the full forward, and greedy answers against transformers."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402
from helpers import QUICK, V, random_params, relative_error, tiny  # noqa: E402
from hf64 import double_precision  # noqa: E402
from tolerances import tolerance  # noqa: E402

import jaxlm.cached  # noqa: E402
import jaxlm.generate  # noqa: E402
import torchref.cached  # noqa: E402
import torchref.generate  # noqa: E402
from convert.native import build_torch  # noqa: E402
from convert.targets import open_target  # noqa: E402
from jaxlm.config import ModelConfig, RopeScaling  # noqa: E402
from jaxlm.model import Split, abstract_model, merge_model  # noqa: E402
from jaxlm.sampling import Sampling  # noqa: E402

pytestmark = pytest.mark.torch

POSITIONS, CONTEXT = 600, 640
LLAMA3 = RopeScaling("llama3", factor=8.0, original_context=64, low_freq_factor=1.5, high_freq_factor=5.0)
OPTIONS: dict[str, ModelConfig] = {
    "tied-llama3": tiny(
        context=CONTEXT, init="fan_in", tied=True, head_bias=True, qk_norm=True, rope_scaling=LLAMA3
    ),
    "moe-window-yarn-shared": tiny(
        {"pattern": (True, False), "shared_d_ff": 12, "shared_gate": True},
        context=CONTEXT,
        init="fan_in",
        windows=(64, 0),
        rope_scaling=RopeScaling("yarn", factor=4.0, original_context=128),
    ),
    "bias-table-learned-gelu": tiny(
        {"expert_bias": True, "renormalize": False},
        context=CONTEXT,
        init="fan_in",
        position="learned",
        attn_bias_table=True,
        attn_out_bias=True,
        mlp="gelu_erf",
    ),
    "biases-window-linear": tiny(
        context=CONTEXT,
        init="fan_in",
        qkv_bias=True,
        mlp_bias=True,
        mlp="gelu_tanh",
        windows=(7, 100),
        rope_scaling=RopeScaling("linear", factor=3.0),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Compiles the tiny models without optimising them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
        yield


def rows(config: ModelConfig) -> tuple[list[int], np.ndarray]:
    """Lengths of the prompts, and ids [B, POSITIONS]; of one length where a bias table does not allow padding."""
    lengths = [21, 21, 21] if config.attn_bias_table else [40, 1, 23]
    return lengths, np.random.default_rng(1).integers(0, V, (3, POSITIONS)).astype(np.int32)


def in_jax(config: ModelConfig, dtype: str) -> Iterator[tuple[Any, Any]]:
    """Cached and full logits of each row, by jaxlm: prompts of unequal lengths, then one token at a time."""
    params = {k: jnp.asarray(v) for k, v in random_params(config, dtype=np.dtype(dtype)).items()}
    model, (lengths, ids) = Split(abstract_model(config).graphdef, params), rows(config)
    full = jax.jit(lambda params, ids: merge_model(model.graphdef, params)(ids)[0])(params, ids)
    prompts = [row[:n].tolist() for row, n in zip(ids, lengths)]
    steps = POSITIONS - max(lengths)
    logits, state = jaxlm.cached.prefill(model, prompts, POSITIONS)
    rest = jnp.stack([row[n : n + steps] for row, n in zip(ids, lengths)], axis=1)

    def one(carry: Any, tokens: Any) -> Any:
        logits, cache, positions = jaxlm.cached.step(model.graphdef, params, carry[0], tokens, carry[1])
        return (cache, positions), logits

    _, made = jax.jit(functools.partial(jax.lax.scan, one))((state.cache, state.positions), rest)
    made = np.concatenate([np.asarray(logits)[None], np.asarray(made)])
    for row, n in enumerate(lengths):
        yield made[:, row], np.asarray(full)[row, n - 1 : n + steps]


def in_torch(config: ModelConfig, dtype: str) -> Iterator[tuple[Any, Any]]:
    """The same by torchref."""
    model, (lengths, ids) = build_torch(config, random_params(config, dtype=np.dtype(dtype))), rows(config)
    steps = POSITIONS - max(lengths)
    with torch.inference_mode():
        full = model(torch.from_numpy(ids).long())[0]
    prompts = [row[:n].tolist() for row, n in zip(ids, lengths)]
    logits, state = torchref.cached.prefill(model, prompts, POSITIONS)
    made = [logits]
    for step in range(steps):
        tokens = torch.tensor([int(row[n + step]) for row, n in zip(ids, lengths)])
        logits, state = torchref.cached.decode_step(model, tokens, state)
        made.append(logits)
    for row, n in enumerate(lengths):
        yield torch.stack(made)[:, row], full[row, n - 1 : n + steps]


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("framework", [in_jax, in_torch])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n.startswith("bias-table") else []) for n in OPTIONS]
)
def test_600_cached_positions_are_the_full_forward(
    name: str, framework: Any, dtype: str, request: pytest.FixtureRequest
) -> None:
    """Logits at every position after unequal prompts, for every option of the architecture."""
    if dtype == "float64":
        request.getfixturevalue("x64")
    limit = tolerance("f64_decode" if dtype == "float64" else "f32_decode")
    for cached, full in framework(OPTIONS[name], dtype):
        assert len(cached) > POSITIONS - 45
        for position, (a, b) in enumerate(zip(cached, full, strict=True)):
            assert relative_error(a, b) < limit, position


NEW, LONGEST = 256, (8, 70, 200)
FAMILIES = {
    "llama": hf_models.CASES["llama"],
    "mistral": hf_models.Case("Mistral", {"sliding_window": 64}),
    "mixtral": hf_models.CASES["mixtral"],
}


def asked(longest: int) -> list[list[int]]:
    """Four prompts of unequal lengths."""
    rng = np.random.default_rng(longest)
    return [rng.integers(0, hf_models.V, n).tolist() for n in (longest, longest // 3, longest - 1, 2)]


def by_transformers(case: hf_models.Case, directory: Path, longest: int, double: bool) -> list[list[int]]:
    """The greedy answers of a model that is then saved to `directory`."""
    prompts = asked(longest)
    ids, mask = torch.zeros((2, len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.tensor(prompt), 1
    arguments = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with double_precision(*case.modules):
        model = hf_models.build(case, max_position_embeddings=CONTEXT).eval()
        model.generation_config.eos_token_id = None
        model.save_pretrained(directory)
        if double:
            return model.generate(ids, attention_mask=mask, **arguments)[:, longest:].tolist()
    return model.float().generate(ids, attention_mask=mask, **arguments)[:, longest:].tolist()


@pytest.mark.parametrize(
    ("family", "longest"),
    [
        pytest.param(family, n, marks=[] if (family, n) == ("mistral", 70) else pytest.mark.slow)
        for family in FAMILIES
        for n in LONGEST
    ],
)
def test_greedy_answers_are_those_of_transformers(
    family: str, longest: int, tmp_path: Path, x64: None
) -> None:
    """256 tokens in float64, token for token in all three, rows of unequal lengths padded on the left."""
    expected = by_transformers(FAMILIES[family], tmp_path, longest, double=True)
    assert len({token for row in expected for token in row}) > 10, (
        "an answer that repeats itself proves little"
    )
    target, settings = open_target(tmp_path), Sampling(NEW, greedy=True)
    model = Split(abstract_model(target.config).graphdef, target.params)
    for module, one in ((jaxlm, model), (torchref, target.decoder)):
        answers = module.generate.decode(one, asked(longest), settings)
        assert [best.ids for (best,) in answers] == expected


@pytest.mark.slow
@pytest.mark.parametrize("longest", LONGEST)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_answers_part_only_at_a_tie(family: str, longest: int, tmp_path: Path) -> None:
    """In float32 the first token that differs is one of two whose logits are closer than 1e-4."""
    expected = by_transformers(FAMILIES[family], tmp_path, longest, double=False)
    target, settings = open_target(tmp_path), Sampling(NEW, greedy=True)
    narrow = {k: jnp.asarray(v.read().astype(np.float32)) for k, v in target.contents.tensors.items()}
    decoder = target.decoder.float()
    model = Split(abstract_model(target.config).graphdef, narrow)
    for module, one in ((jaxlm, model), (torchref, decoder)):
        for row, (best,) in enumerate(module.generate.decode(one, asked(longest), settings)):
            parted = [i for i, (a, b) in enumerate(zip(best.ids, expected[row])) if a != b]
            if not parted:
                continue
            ids = asked(longest)[row] + expected[row][: parted[0]]
            with torch.inference_mode():
                top = decoder(torch.tensor([ids]))[0][0, -1].topk(2).values
            assert float(top[0] - top[1]) < tolerance("f32_tie_margin"), (row, parted[0])
