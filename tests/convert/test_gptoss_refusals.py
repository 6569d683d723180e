"""Files that are no checkpoint of gptoss, and models that gptoss has no word for: refused by name, nothing executed."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gptoss_files import State, checkpoint, loaded, save  # noqa: E402

from convert import gptoss  # noqa: E402
from convert.optstate import AdamMoments  # noqa: E402
from convert.rules import ConversionError  # noqa: E402
from convert.stream import array  # noqa: E402
from jaxlm.config import OptimConfig, RopeScaling  # noqa: E402
from jaxlm.tensor_file import Lazy  # noqa: E402

pytestmark = pytest.mark.torch


class Intruder:
    """A pickle that makes a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_a_pickle_that_wants_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    """One line that names what it wanted, wherever in the file it hides."""
    trap = tmp_path / "executed"
    for content in (Intruder(trap), checkpoint() | {"cfg": Intruder(trap)}, {"model": {"a": Intruder(trap)}}):
        with pytest.raises(
            ConversionError, match=r"latest\.pt: holds a pickled posix\.mkdir.*may run code"
        ) as caught:
            gptoss.read(save(tmp_path, content))
        assert "\n" not in str(caught.value)
    assert not trap.exists()


@pytest.mark.parametrize("kept", [0, 3, 200, 5_000, -1])
def test_truncated_files_are_refused(kept: int, tmp_path: Path) -> None:
    """Wherever the file ends."""
    path = save(tmp_path, checkpoint())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ConversionError, match=r"latest\.pt: (damaged or truncated|not a file of torch)"
    ) as caught:
        gptoss.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100), b"{}"], ids=repr)
def test_other_files_are_refused(raw: bytes, tmp_path: Path) -> None:
    """Empty, a bare pickle, an empty archive, text; a directory and an absent file."""
    path = tmp_path / "latest.pt"
    path.write_bytes(raw)
    for wrong in (path, tmp_path, tmp_path / "absent.pt"):
        with pytest.raises(ConversionError, match=str(wrong)) as caught:
            gptoss.read(wrong)
        assert "\n" not in str(caught.value)


def set_in(*keys: Any, to: Any) -> Callable[[State], None]:
    """An edit: the entry under some keys becomes `to`, or `to` of what it was."""

    def edit(content: State) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to(content[keys[-1]]) if callable(to) else to

    return edit


def drop(*keys: Any) -> Callable[[State], None]:
    """An edit: the entry under some keys goes."""

    def edit(content: State) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return edit


FC1 = "layers.1.moe.experts.3.fc1.weight"
COS = "layers.0.gqa.cos_cached"
REFUSALS: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing expert": (drop("model", FC1), f"{FC1} -> blocks.1.moe.experts.up: missing"),
    "missing head": (drop("model", "out_head.bias"), "out_head.bias -> lm_head.bias: missing"),
    "missing embedding": (drop("model", "embed.weight"), "embed.weight: missing"),
    "extra tensor": (set_in("model", "surprise", to=None), "surprise: is a NoneType, not a tensor"),
    "unused tensor": (lambda c: c["model"].update(extra=torch.ones(2)), "extra: unused, no rule takes it"),
    "one expert more": (
        lambda c: c["model"].update({"layers.0.moe.experts.5.fc2.bias": torch.ones(24)}),
        "layers.0.moe.experts.5.fc2.bias: unused",
    ),
    "wrong shape": (
        set_in("model", FC1, to=lambda x: x.T.contiguous()),
        f"{FC1} -> blocks.1.moe.experts.up: got (24, 20), expected (20, 24)",
    ),
    "missing layer": (
        lambda c: [c["model"].pop(n) for n in list(c["model"]) if n.startswith("layers.0.")],
        "layers.0: missing, though layers.1 is there",
    ),
    "integers": (set_in("model", FC1, to=lambda x: x.int()), f"{FC1}: a torch.strided int32 tensor"),
    "sparse": (set_in("model", FC1, to=lambda x: x.to_sparse()), f"{FC1}: a torch.sparse_coo float32 tensor"),
    "no values": (
        set_in("model", FC1, to=lambda x: x.to("meta")),
        f"{FC1}: a torch.strided float32 tensor on meta",
    ),
    "expanded": (
        set_in("model", FC1, to=torch.zeros(()).expand(20, 24)),
        f"{FC1}: (20, 24) of float32, but the file has only 4 bytes for it",
    ),
    "both names": (
        lambda c: c["model"].update({"_orig_mod.norm.weight": torch.ones(24)}),
        "norm.weight: stands twice, with and without _orig_mod.",
    ),
    "heads": (set_in("cfg", "num_heads", to=8), "cfg num_heads=8, but layers.0.gqa.attention_bias says 6"),
    "layers": (set_in("cfg", "transformer_blocks", to=3), "cfg transformer_blocks=3, but layers.1, the last"),
    "context": (
        set_in("cfg", "context_length", to=32),
        "cfg context_length=32, but layers.0.gqa.attention_bias says 16",
    ),
    "width as text": (set_in("cfg", "d_model", to="24"), "cfg d_model='24', but embed.weight says 24"),
    "no rope": (set_in("cfg", "use_rope", to=False), "cfg use_rope=False: only rotary positions"),
    "top_k": (set_in("cfg", "top_k", to=9), "moe.n_active=9 must be between 1 and n_experts=5"),
    "top_k kind": (set_in("cfg", "top_k", to=2.0), "cfg top_k=2.0 must be of type int"),
    "two spellings": (
        lambda c: c["cfg"].update(drop_rate=0.5),
        "cfg contradicts itself: dropout=0.0, drop_rate=0.5",
    ),
    "cfg is a list": (set_in("cfg", to=[1]), "cfg must be a dictionary of fields, got list"),
    "theta": (
        set_in("cfg", to=lambda c: c | {"rope_theta": 10_001.0}),
        f"{COS}: not the rotary table of theta=10001",
    ),
    "one cosine": (lambda c: c["model"][COS][3, 1].add_(1e-3), f"{COS}: not the rotary table of theta=10000"),
    "interleaved": (
        set_in("model", COS, to=lambda x: x[:, :2].repeat_interleave(2, 1)),
        f"{COS}: pairs are (2i, 2i+1); gptoss and this model pair (i, i+2)",
    ),
    "buffer shape": (
        set_in("model", COS, to=torch.ones(5, 4)),
        f"{COS}: got (5, 4), expected (16, 4) or (16, 2)",
    ),
    "step": (set_in("step", to=-1), "step=-1 must be a count"),
    "moment": (
        set_in("optimizer", "state", 0, "exp_avg", to=lambda x: x.T),
        "optimizer exp_avg of embed.weight: got (24, 61), expected (61, 24)",
    ),
    "absent moment": (
        drop("optimizer", "state", 3),
        "optimizer state of layers.0.gqa.W_k.weight: missing (index 3)",
    ),
    "uneven steps": (
        set_in("optimizer", "state", 0, "step", to=torch.tensor(6.0)),
        "optimizer step of embed.weight: 6, others are at 7",
    ),
    "amsgrad": (
        set_in("optimizer", "state", 0, "max_exp_avg_sq", to=None),
        "optimizer max_exp_avg_sq of embed.weight: unknown",
    ),
    "group sizes": (drop("optimizer", "param_groups", 0, "params", 0), "optimizer: groups of ["),
    "one index twice": (
        set_in("optimizer", "param_groups", 0, "params", 0, to=1),
        "optimizer: the groups' parameters must be distinct numbers",
    ),
    "stray state": (
        lambda c: c["optimizer"]["state"].update({999: {}}),
        "optimizer state 999: belongs to no parameter",
    ),
    "no optimizer": (set_in("optimizer", to=[1]), "optimizer: not the state dict of an optimizer"),
    "no model": (drop("model"), "neither a checkpoint (a dictionary with step, model"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_what_is_wrong(name: str, tmp_path: Path) -> None:
    """One clear line for each fault, with the tensor or key and both values; never another exception."""
    content = checkpoint(moments=True)
    edit, expected = REFUSALS[name]
    edit(content)
    with pytest.raises(ConversionError) as caught:
        gptoss.read(save(tmp_path, content))
    lines = str(caught.value).splitlines()
    assert str(tmp_path / "latest.pt") in lines[0]
    assert sum(expected in line for line in lines) == 1, caught.value


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    """Missing, unused, misshapen tensors and a bad buffer in one message; contradictions of cfg in one message."""
    content = checkpoint()
    for name in ("missing expert", "missing head", "unused tensor", "one cosine", "step"):
        REFUSALS[name][0](content)
    with pytest.raises(ConversionError) as caught:
        gptoss.read(save(tmp_path, content))
    assert len(str(caught.value).splitlines()) == 6
    content = checkpoint()
    for name in ("heads", "layers", "context", "no rope", "top_k kind", "two spellings"):
        REFUSALS[name][0](content)
    with pytest.raises(ConversionError) as caught:
        gptoss.read(save(tmp_path, content))
    assert len(str(caught.value).splitlines()) == 7


def test_an_optimizer_that_does_not_fit_can_be_left_out(tmp_path: Path) -> None:
    """The refusal says how, and so it is."""
    content = checkpoint(moments=True)
    REFUSALS["uneven steps"][0](content)
    path = save(tmp_path, content)
    with pytest.raises(ConversionError, match=r"optimizer=False \(--no-optimizer\) leaves it out"):
        gptoss.read(path)
    assert gptoss.read(path, optimizer=False).optimizer is None


def test_what_gptoss_has_no_word_for_is_not_written(tmp_path: Path) -> None:
    """Every field and its value at once; a dense model; tensors that do not fit; no file is made."""
    source = gptoss.read(save(tmp_path, checkpoint()))
    good, tensors = source.config, {k: Lazy.of(x) for k, x in loaded(source).items()}
    out = tmp_path / "out.pt"
    wrong = dataclasses.replace(
        good,
        head_dim=6,
        rope_theta=5e4,
        norm_eps=1e-5,
        rope_scaling=RopeScaling("linear", 2.0),
        mlp="swiglu",
        attn_out_bias=False,
        head_bias=False,
        qk_norm=True,
        tied=True,
        windows=(8,),
        moe=dataclasses.replace(
            good.moe,
            pattern=(True, False),
            renormalize=False,
            expert_bias=False,
            balance="mixtral",
            router_z_coef=0.1,
            shared_d_ff=8,
        ),
    )
    with pytest.raises(ConversionError) as caught:
        gptoss.write(out, wrong, tensors)
    assert len(str(caught.value).splitlines()) == 17
    assert "rope_theta=50000.0: gptoss has 10000.0" in str(caught.value)
    dense = dataclasses.replace(good, moe=type(good.moe)())
    with pytest.raises(ConversionError, match="moe.n_experts > 0=False: gptoss has True"):
        gptoss.write(out, dense, tensors)
    moments = AdamMoments({k: array(p) for k, p in source.tensors.items()}, {}, 1)
    del moments.m["embed.weight"]
    faulty = tensors | {"final_norm.weight": Lazy.of(np.ones(24, np.int32)), "extra": Lazy.of(np.ones(1))}
    with pytest.raises(ConversionError) as caught:
        gptoss.write(out, good, faulty, moments=moments)
    text = str(caught.value)
    for part in (
        "final_norm.weight: int32 is no float",
        "extra: unused",
        "exp_avg of embed.weight",
        "exp_avg_sq of",
    ):
        assert part in text
    with pytest.raises(ConversionError, match=r"missing/out\.pt: cannot be written"):
        gptoss.write(tmp_path / "missing" / "out.pt", good, tensors)
    assert not out.exists()


def test_the_optimizer_written_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    """Hyperparameters reach the groups."""
    source = gptoss.read(save(tmp_path, checkpoint()))
    optim = OptimConfig(lr=1e-3, min_lr=1e-4, b1=0.8, b2=0.99, eps=1e-9, weight_decay=0.2)
    gptoss.write(
        tmp_path / "out.pt", source.config, {k: Lazy.of(x) for k, x in loaded(source).items()}, optim=optim
    )
    groups = torch.load(tmp_path / "out.pt", weights_only=True)["optimizer"]["param_groups"]
    shown = [(g["lr"], g["betas"], g["eps"], g["weight_decay"]) for g in groups]
    assert shown == [(1e-3, (0.8, 0.99), 1e-9, 0.2), (1e-3, (0.8, 0.99), 1e-9, 0.0)]
