"""gptoss's checkpoints: the same model and the same next step after import, the same bits after export.

The oracle is a transcription of gptoss's documented formulas (gptoss_files.documented).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gptoss_files import (  # noqa: E402
    CFG,
    FULL,
    ODD,
    SMALL,
    Sizes,
    adam_state,
    bits,
    checkpoint,
    documented,
    is_buffer,
    loaded,
    save,
    shapes_of,
    state_dict,
)
from helpers import assert_close, quick_jit, relative_error, tree_errors  # noqa: E402
from tolerances import tolerance  # noqa: E402

from convert import gptoss, native  # noqa: E402
from convert.gptoss_form import config_of, names_of  # noqa: E402
from convert.optstate import moments_to_torch  # noqa: E402
from convert.rules import convert  # noqa: E402
from convert.tree import from_torch, to_numpy, to_tensor  # noqa: E402
from jaxlm import moe  # noqa: E402
from jaxlm.config import ModelConfig, RunConfig, TrainConfig  # noqa: E402
from jaxlm.layers import Backends  # noqa: E402
from jaxlm.model import abstract_model, merge_model  # noqa: E402
from jaxlm.presets import PRESETS  # noqa: E402
from jaxlm.tensor_file import Lazy  # noqa: E402
from torchref import moe as twin_moe  # noqa: E402
from torchref import optim as twin_optim  # noqa: E402
from torchref import train as twin  # noqa: E402
from torchref.guard import init_guard  # noqa: E402

pytestmark = pytest.mark.torch

GATE, STATE_GATE = tolerance("f64_gptoss"), tolerance("f64_gptoss_state")


def test_names_and_shapes_of_the_full_size_are_those_of_the_preset() -> None:
    """3.66B parameters on the meta device: sizes are read off the shapes, every tensor has one counterpart."""
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes_of(FULL).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    preset = PRESETS["gptoss-original"]
    assert config_of({}, shapes) == config_of({"dropout": 0.1}, shapes) == preset.config.model
    table = gptoss.pairs(preset.config.model)
    weights = {name: shape for name, shape in shapes.items() if not is_buffer(name)}
    assert {pair.other: pair.other_shape for pair in table} == weights
    assert len(table) == len(weights) == 12 * (9 + 32 * 4) + 4
    assert sum(map(math.prod, weights.values())) == preset.params == 3_664_132_435
    assert sum(math.prod(s) for n, s in weights.items() if "attention_bias" in n) == 1_610_612_736
    assert names_of(preset.config.model) == list(shapes)


@functools.cache
def jax_forward(config: ModelConfig) -> Callable[..., Any]:
    """jaxlm's forward of (parameters, ids), compiled once."""
    graphdef = abstract_model(config, Backends(experts="loop"), jnp.float64).graphdef
    return quick_jit(lambda params, ids: merge_model(graphdef, params)(ids))


@pytest.mark.parametrize("init", ["normal", "fan_in"])
@pytest.mark.parametrize("sizes", [SMALL, ODD], ids=["square", "odd"])
def test_the_imported_model_is_gptoss_documented_forward(
    sizes: Sizes, init: str, tmp_path: Path, x64: None
) -> None:
    """Logits and balance loss in float64, both frameworks against the transcription."""
    content = checkpoint(sizes, torch.float64, init=init)
    source = gptoss.read(save(tmp_path, content))
    config, params = source.config, loaded(source)
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, sizes.V, (3, 13)))
    logits, balance = documented(content["model"], ids, sizes)

    decoder = native.build_torch(config, params)
    with torch.no_grad():
        theirs, acts, _ = decoder(ids)
    ours, jax_acts, _ = jax_forward(config)({k: jnp.asarray(x) for k, x in params.items()}, jnp.asarray(ids))
    names = [f"blocks.{i}.moe" for i in range(sizes.L)]
    valid = np.ones(ids.shape, bool)
    terms = [
        kind.balance_loss(
            config.moe.balance,
            *([a[f"{n}.{what}"] for n in names] for what in ("router_logits", "expert_ids")),
            mask,
        )
        for kind, a, mask in ((twin_moe, acts, torch.from_numpy(valid)), (moe, jax_acts, jnp.asarray(valid)))
    ]
    assert_close(
        {
            "torchref logits": relative_error(theirs, logits),
            "jaxlm logits": relative_error(ours, logits),
            "torchref balance": relative_error(config.moe.balance_coef * float(terms[0]), balance),
            "jaxlm balance": relative_error(config.moe.balance_coef * float(terms[1]), balance),
        },
        GATE,
    )


def test_training_resumed_from_the_file_takes_gptoss_next_step(tmp_path: Path) -> None:
    """Weights and moments after one AdamW step = torch.optim.AdamW on the file's own state; capacity drops tokens."""
    content = checkpoint(dtype=torch.float64, moments=True)
    source = gptoss.read(save(tmp_path, content))
    rng = np.random.default_rng(3)
    batch = {
        "inputs": rng.integers(0, SMALL.V, (4, 16)),
        "targets": rng.integers(0, SMALL.V, (4, 16)),
        "loss_mask": np.ones((4, 16)),
    }
    lr = (
        0.03 * 8 / 10
    )  # step 7 of a warmup over 10; large, so that an update is no rounding error of a weight
    named = {n: torch.nn.Parameter(p.clone()) for n, p in content["model"].items() if not is_buffer(n)}
    wide = [p for p in named.values() if p.dim() >= 2]
    theirs = torch.optim.AdamW(
        [{"params": wide}, {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0}]
    )
    theirs.load_state_dict(content["optimizer"])
    for group in theirs.param_groups:
        group["lr"] = lr
    logits, balance = documented(named, torch.from_numpy(batch["inputs"]), SMALL, train=True)
    loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch["targets"]).flatten()) + balance
    loss.backward()
    torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
    theirs.step()

    optim = dataclasses.replace(
        PRESETS["gptoss-original"].config.optim, lr=0.03, warmup_steps=10, decay_steps=20
    )
    loop = TrainConfig(steps=10, batch_size=4, seq_len=16, dtype="float64", param_dtype="float64")
    run = RunConfig(source.config, optim=optim, train=loop)
    model = native.build_torch(source.config, loaded(source))
    optimizer = twin_optim.make_optimizer(optim, model)
    moments = source.optimizer
    assert moments is not None
    moments = moments_to_torch(source.config, moments)
    for path, p in model.named_parameters():
        slots = {"exp_avg": to_tensor(moments.m[path]), "exp_avg_sq": to_tensor(moments.v[path])}
        optimizer.state[p] = {"step": torch.tensor(float(moments.step)), **slots}
    state = twin.TrainState(moments.step, model, optimizer, 0, init_guard(run))
    scalars = twin_optim.scalars(optim, moments.step)
    assert scalars.lr == pytest.approx(lr, rel=1e-15)
    state, metrics = twin.make_train_step(run)(state, twin.place_batch(batch), scalars)

    assert 0 < float(metrics["dropped"]) < 0.5 and float(metrics["clip_scale"]) < 1
    assert all(p.grad is not None for p in named.values())
    assert relative_error(float(metrics["total_loss"]), float(loss.detach())) < GATE
    adam = twin_optim.moments(state.model, state.optimizer)
    for what, flat, wanted in (
        ("weights", from_torch(state.model), dict(named)),
        (
            "m",
            {k: to_numpy(x) for k, x in adam.m.items()},
            {n: theirs.state[p]["exp_avg"] for n, p in named.items()},
        ),
        (
            "v",
            {k: to_numpy(x) for k, x in adam.v.items()},
            {n: theirs.state[p]["exp_avg_sq"] for n, p in named.items()},
        ),
    ):
        back = convert(gptoss.pairs(source.config), native.to_jax(source.config, flat))
        errors = tree_errors(back, {n: x.detach().numpy() for n, x in wanted.items()})
        assert_close(errors, STATE_GATE, what)
    before = {n: content["model"][n] for n in named}
    assert all(relative_error(named[n].detach(), before[n]) > 0 for n in named)


# Round trips.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
def test_reading_writing_and_reading_again_keeps_every_bit(dtype: Any, prefix: str, tmp_path: Path) -> None:
    """Weights, moments, step, loss and cfg; the written file has gptoss's own names, order and optimizer groups."""
    content = checkpoint(dtype=dtype, moments=True)
    special = torch.tensor([math.nan, -0.0, math.inf, 1e-40]).to(dtype)
    content["model"]["norm.weight"][:4] = special
    content["optimizer"]["state"][0]["exp_avg"][0, :4] = special
    shown = content | {"model": {prefix + name: x for name, x in content["model"].items()}}
    first = gptoss.read(save(tmp_path, shown))
    lazies = {path: Lazy.of(value) for path, value in loaded(first).items()}
    moments: Any = first.optimizer
    if prefix:  # moments that are still in a file do as well
        moments = moments._replace(
            **{x: {k: Lazy.of(a) for k, a in getattr(moments, x).items()} for x in "mv"}
        )
    copied: list[int] = []
    gptoss.write(
        tmp_path / "again.pt",
        first.config,
        lazies,
        step=first.step,
        val_loss=first.val_loss,
        moments=moments,
        progress=copied.append,
    )
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert list(again) == ["step", "model", "optimizer", "val_loss", "cfg"]
    assert list(again["model"]) == list(content["model"])
    assert bits({n: x for n, x in again["model"].items() if not is_buffer(n)}) == bits(
        {n: x for n, x in content["model"].items() if not is_buffer(n)}
    )
    for name in filter(is_buffer, content["model"]):
        assert again["model"][name].dtype == torch.float32
        narrow = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(again["model"][name], content["model"][name].float(), rtol=0, atol=narrow)
    assert again["cfg"] == content["cfg"] and (again["step"], again["val_loss"]) == (7, 2.5)
    for group, wanted in zip(
        again["optimizer"]["param_groups"], content["optimizer"]["param_groups"], strict=True
    ):
        assert group == wanted
    for index, entry in content["optimizer"]["state"].items():
        assert bits(again["optimizer"]["state"][index]) == bits(entry)
    count = sum(math.prod(shape) for name, shape in shapes_of(SMALL).items() if not is_buffer(name))
    buffers = 4 * sum(math.prod(shape) for name, shape in shapes_of(SMALL).items() if is_buffer(name))
    assert sum(copied) == 3 * count * dtype.itemsize + buffers

    second = gptoss.read(tmp_path / "again.pt")
    assert bits(loaded(second)) == bits(loaded(first))
    one, other = first.optimizer, second.optimizer
    assert one is not None and other is not None
    assert (bits(one.m), bits(one.v), one.step) == (bits(other.m), bits(other.v), other.step)
    assert (second.config, second.step, second.val_loss) == (first.config, 7, 2.5)


class Tree(torch.nn.Module):
    """Modules of bare parameters and buffers under dotted names, so that torch itself decides the order."""

    def put(self, name: str, value: Any) -> None:
        """Registers a tensor under a dotted name."""
        first, _, rest = name.partition(".")
        if rest:
            if first not in self._modules:
                self.add_module(first, Tree())
            child = self._modules[first]
            assert isinstance(child, Tree)
            child.put(rest, value)
        elif is_buffer(first):
            self.register_buffer(first, value)
        else:
            self.register_parameter(first, torch.nn.Parameter(value))


def test_a_written_file_without_moments_loads_strictly_and_starts_training(tmp_path: Path) -> None:
    """torch's own load_state_dict of model and optimizer; the optimizer is empty, groups and order are gptoss's."""
    source = gptoss.read(save(tmp_path, checkpoint(cfg={"capacity_factor": None, "dropout": 0.1})))
    gptoss.write(tmp_path / "new.pt", source.config, {k: Lazy.of(x) for k, x in loaded(source).items()})
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    assert content["cfg"] == CFG | {"capacity_factor": None, "dropout": 0.1}
    assert content["step"] == 0 and math.isnan(content["val_loss"])
    module = Tree()
    for name, shape in sorted(shapes_of(SMALL).items(), key=lambda item: is_buffer(item[0])):
        module.put(name, torch.zeros(shape))
    module.load_state_dict(content["model"], strict=True)
    named = dict(module.named_parameters())
    assert list(named) == [n for n in content["model"] if not is_buffer(n)]
    groups = [[p for p in named.values() if p.dim() >= 2], [p for p in named.values() if p.dim() < 2]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    optimizer.load_state_dict(content["optimizer"])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0] and not optimizer.state
    assert gptoss.read(tmp_path / "new.pt").notes == ["the optimizer of the file has no moments"]


# What a file may leave open.


def test_other_spellings_and_a_bare_state_dict_are_understood(tmp_path: Path) -> None:
    """cfg in other words gives the same model; without cfg, gptoss's defaults, and the notes say so."""
    own = gptoss.read(save(tmp_path, checkpoint())).config
    words = {
        "vocab_size": 61,
        "n_layers": 2,
        "n_heads": 6,
        "n_kv_heads": 2,
        "n_experts": 5,
        "max_seq_len": 16,
    }
    content = checkpoint() | {
        "cfg": words | {"hidden_dim": 20, "dropout": 0.0, "colour": "red"},
        "scaler": {},
    }
    other = gptoss.read(save(tmp_path, content))
    assert other.config == own
    assert [n for n in other.notes if "colour" in n or "scaler" in n] == [
        "key 'scaler' of the file was left out",
        "cfg colour='red' is not known and was not used",
    ]
    bare = gptoss.read(save(tmp_path, state_dict()))
    assert bare.config == dataclasses.replace(own, dropout=0.1)
    assert (bare.step, bare.val_loss, bare.optimizer) == (0, None, None)
    assert "no cfg in the file: top_k=2, capacity_factor=1.25, dropout=0.1" in bare.notes[-1]


def test_options_of_gptoss_own_configuration_are_carried(tmp_path: Path) -> None:
    """Biases on q, k and v, no attention bias table, half-width or absent rotary buffers; there and back."""
    content = checkpoint(cfg={"qkv_bias": True, "use_attention_bias": False})
    state = {n: x for n, x in content["model"].items() if "attention_bias" not in n}
    for i in range(SMALL.L):
        for x, heads in (("q", SMALL.N), ("k", SMALL.K), ("v", SMALL.K)):
            state[f"layers.{i}.gqa.W_{x}.bias"] = torch.randn(heads * SMALL.H)
        for x in ("cos", "sin"):
            state[f"layers.{i}.gqa.{x}_cached"] = state[f"layers.{i}.gqa.{x}_cached"][:, :2].clone()
    source = gptoss.read(save(tmp_path, content | {"model": state}))
    assert source.config.qkv_bias and not source.config.attn_bias_table
    assert sum("half-split is assumed" in note for note in source.notes) == 4
    gptoss.write(tmp_path / "out.pt", source.config, {k: Lazy.of(x) for k, x in loaded(source).items()})
    written = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert bits({n: x for n, x in written.items() if not is_buffer(n)}) == bits(
        {n: state[n] for n in written if not is_buffer(n)}
    )
    assert bits(loaded(gptoss.read(tmp_path / "out.pt"))) == bits(loaded(source))
    bare = {n: x for n, x in state.items() if not is_buffer(n)}
    noted = gptoss.read(save(tmp_path, content | {"model": bare}))
    assert noted.config == source.config and "theta=10000, half-split, is assumed" in noted.notes[0]


def test_a_single_parameter_group_is_understood(tmp_path: Path) -> None:
    """All parameters in the model's order."""
    content = checkpoint(moments=True)
    content["optimizer"] = adam_state(content["model"], 7, torch.float32, groups=1)
    moments = gptoss.read(save(tmp_path, content)).optimizer
    assert moments is not None and moments.step == 7
    there = convert(gptoss.pairs(gptoss.read(tmp_path / "latest.pt").config), moments.m)
    names = [n for n in content["model"] if not is_buffer(n)]
    entries = content["optimizer"]["state"]
    assert bits({n: there[n] for n in names}) == bits({n: entries[i]["exp_avg"] for i, n in enumerate(names)})
