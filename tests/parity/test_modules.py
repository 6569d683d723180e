"""Any NNX module against any torch module: what is equal passes, each planted fault is caught and located."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")

from convert.parity import assert_parity, compare_modules  # noqa: E402
from convert.parity.recording import record_torch, recording  # noqa: E402
from convert.parity.results import Report  # noqa: E402
from convert.rules import SAME, TRANSPOSE, Rule, Transform  # noqa: E402
from jaxlm.config import InputError, OptimConfig  # noqa: E402

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
D = 6
RULES = (
    Rule(r"embed\.embedding", "table.weight", SAME),
    Rule(r"norm\.(?:scale)", "norm.weight", SAME),
    Rule(r"fc(\d)\.kernel", r"mlp.lin\1.weight", TRANSPOSE),
    Rule(r"fc(\d)\.bias", r"mlp.lin\1.bias", SAME),
    Rule(r"norm\.bias", "norm.bias", SAME),
)
INPUTS = {
    "ids": np.random.default_rng(0).integers(0, 9, (4, 5)),
    "shift": np.random.default_rng(1).standard_normal((4, 5, D)),
}


class Jax(nnx.Module):
    """Tokens and a shift, a norm, and a feed-forward whose matrices are square."""

    def __init__(self, eps: float = 1e-5, linear: Any = nnx.Linear):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(9, D, rngs=rngs)
        self.norm = nnx.LayerNorm(D, epsilon=eps, rngs=rngs)
        self.fc1, self.fc2 = (linear(D, D, rngs=rngs, dtype=jnp.bfloat16) for _ in range(2))

    def __call__(self, ids: Any, shift: Any) -> dict[str, Any]:
        x = self.embed(ids) + shift
        hidden = nnx.gelu(self.fc1(self.norm(x)), approximate=False)
        return {"y": x + self.fc2(hidden), "hidden": hidden}


class Mlp(torch.nn.Module):
    def __init__(self, act: Callable[[Any], Any]):
        super().__init__()
        self.lin1, self.lin2, self.act = torch.nn.Linear(D, D), torch.nn.Linear(D, D), act

    def forward(self, x: Any) -> Any:
        hidden = self.act(self.lin1(x))
        return self.lin2(hidden), hidden


class Torch(torch.nn.Module):
    """The same, with other names and one module more."""

    def __init__(self, act: Callable[[Any], Any] = torch.nn.functional.gelu):
        super().__init__()
        self.table, self.norm, self.mlp = torch.nn.Embedding(9, D), torch.nn.LayerNorm(D), Mlp(act)

    def forward(self, ids: Any, shift: Any) -> Any:
        x = self.table(ids) + shift
        y, hidden = self.mlp(self.norm(x))
        return {"y": x + y, "hidden": hidden}


class Biasless(torch.nn.Linear):
    """Holds a bias and forgets to add it."""

    def forward(self, input: Any) -> Any:
        return input @ self.weight.mT


def biasless() -> Torch:
    model = Torch()
    model.mlp.lin1 = Biasless(D, D)
    return model


class Stopped(Torch):
    """The right numbers forward, but no gradient reaches the norm."""

    def forward(self, ids: Any, shift: Any) -> Any:
        stop = self.norm.register_forward_hook(lambda m, _, out: out.detach())
        try:
            return super().forward(ids, shift)
        finally:
            stop.remove()


class Narrow(nnx.Linear):
    """A linear layer with a cast that nobody asked for."""

    def __call__(self, x: Any) -> Any:  # type: ignore[override]
        return super().__call__(x).astype(jnp.float32)


def check(ours: Any = None, theirs: Any = None, rules: Any = RULES, **options: Any) -> Report:
    settings = {"weights": "drawn", "steps": 3} | options
    return compare_modules(ours or Jax(), theirs or Torch(), rules, INPUTS, **settings)


def with_rule(index: int, rule: Rule) -> tuple[Rule, ...]:
    return (*RULES[:index], rule, *RULES[index + 1 :])


def test_equal_modules_pass_every_rung() -> None:
    """Names, weights, activations, loss, gradients, AdamW; what has no partner is listed, and nothing is changed."""
    ours, theirs = Jax(), Torch()
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    report = compare_modules(ours, theirs, RULES, INPUTS, weights="drawn", steps=20)
    assert report.passed, "\n".join(report.lines())
    assert [rung.name for rung in report.rungs] == [
        *("tree", "conversion", "activations", "loss", "gradients", "update", "updates", "trajectory")
    ]
    names = [finding.name for finding in report["activations"].findings]
    assert names == ["embed", "norm", "fc1", "fc2", "<output>[y]", "<output>[hidden]"]
    assert report["activations"].notes == {
        "only_in_torch": ["mlp[0]", "mlp[1]"],
        "dtype_widened": ["embed", "fc1", "fc2"],
    }
    assert len(report.curves["loss_jax"]) == 20 and len(set(report.curves["loss_jax"])) == 20
    assert all(torch.equal(before[k], v) for k, v in theirs.state_dict().items())
    assert theirs.table.weight.dtype == torch.float32 and "__call__" in vars(nnx.Linear)
    json.dumps(report.to_json())


WRONG_INVERSE = Transform("swap", lambda x: x.swapaxes(0, 1), lambda x: x[::-1].swapaxes(0, 1))
FAULTS: dict[str, tuple[Callable[[], Report], str, str, str]] = {
    "eps": (lambda: check(Jax(eps=1e-6)), "activations", "norm", "inside norm: its input agrees"),
    "relu for gelu": (
        lambda: check(theirs=Torch(torch.relu)),
        "activations",
        "fc2",
        "before fc2, after fc1: its input differs already",
    ),
    "tanh for erf": (
        lambda: check(theirs=Torch(lambda x: torch.nn.functional.gelu(x, approximate="tanh"))),
        *("activations", "fc2", "before fc2, after fc1"),
    ),
    "square matrix not transposed": (
        lambda: check(rules=with_rule(2, Rule(r"fc(\d)\.kernel", r"mlp.lin\1.weight", SAME))),
        *("activations", "fc1", "inside fc1"),
    ),
    "bias held but not added": (lambda: check(theirs=biasless()), "activations", "fc1", "inside fc1"),
    "bias of zeros not added": (
        lambda: check(theirs=biasless(), weights="jax"),
        *("gradients", "fc1.bias", "torch's is all zeros"),
    ),
    "rules of two matrices exchanged": (
        lambda: check(
            rules=(
                *with_rule(2, Rule(r"fc1\.kernel", "mlp.lin2.weight", TRANSPOSE)),
                Rule(r"fc2\.kernel", "mlp.lin1.weight", TRANSPOSE),
            ),
            layers=(Rule(r"fc(\d)", r"mlp.lin\1", SAME),),
        ),
        *("activations", "fc1", "inside fc1"),
    ),
    "wrong inverse": (
        lambda: check(rules=with_rule(2, Rule(r"fc(\d)\.kernel", r"mlp.lin\1.weight", WRONG_INVERSE))),
        *("conversion", "fc1.kernel", "in reverse order"),
    ),
    "a rule forgotten": (lambda: check(rules=RULES[:-1]), "tree", "norm.bias", "0 rules match"),
    "a name that torch has not": (
        lambda: check(rules=with_rule(4, Rule(r"norm\.bias", "norm.beta", SAME))),
        *("tree", "norm.bias", "no such parameter"),
    ),
    "weights never converted": (lambda: check(weights="own"), "tree", "embed.embedding", ""),
    "a gradient stopped": (lambda: check(theirs=Stopped()), "gradients", "norm.", "all zeros"),
    "float32 inside": (
        lambda: check(Jax(linear=Narrow)),
        *("activations", "fc1", "computed_in: {'jax': 'float32'}"),
    ),
    "decay of other parameters": (
        lambda: check(weights="drawn", decays=_once_yes()),
        *("update", "delta:", ""),
    ),
}


def _once_yes() -> Callable[[str, tuple[int, ...]], bool]:
    """A policy that tells JAX, which asks first and twice, one thing about the embedding and torch another."""
    asked: list[str] = []

    def decays(path: str, shape: tuple[int, ...]) -> bool:
        asked.append(path)
        return path == "embed.embedding" and asked.count(path) <= 2

    return decays


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught_and_located(name: str) -> None:
    """Rung, module and a hint at the place."""
    make, rung, where, hint = FAULTS[name]
    report = make()
    assert not report.passed
    first = report.divergence
    assert first is not None
    assert first.rung == rung and first.name.startswith(where), first
    assert hint in "\n".join(report.lines())


def test_a_loss_of_ones_own_is_compared() -> None:
    """One function for both, or a pair; a pair of different losses fails at the loss."""

    def square(out: Any) -> Any:
        return (out["y"] ** 2).mean()

    assert check(loss=square).passed
    report = check(loss=(square, lambda out: (out["y"] ** 2).sum()))
    assert report.divergence is not None and report.divergence.rung == "loss"


class Stateful(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.bn = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        self.table = jnp.ones(2)


class Empty(nnx.Module):
    def __call__(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check(Stateful()), r"bn\.mean \(BatchStat\), bn\.var \(BatchStat\), table \(.*\); build it"),
        (lambda: check(Empty()), "Empty has no parameters"),
        (lambda: check(weights="mine"), "weights='mine' one of own, jax, drawn"),
        (lambda: check(steps=0), "steps=0 must be at least 1"),
        (
            lambda: check(optim=OptimConfig(optimizer="muon")),
            "'muon'.*: modules are compared under plain adamw",
        ),
        (lambda: compare_modules(Jax(), Torch(), RULES, INPUTS["shift"]), "inputs is a ndarray; give a list"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(call: Callable[[], Any], message: str) -> None:
    """State beside parameters, no parameters, wrong options."""
    with pytest.raises(InputError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_recording_tells_calls_apart_and_restores_classes() -> None:
    """A module called twice has two entries; a checkpointed one is left out; classes are as before, even on error."""

    class Shared(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.hidden = nnx.Linear(3, 3, rngs=nnx.Rngs(1))

        def __call__(self, x: Any) -> tuple[Any, Any]:
            y = self.fc(self.fc(x))
            return y, jax.checkpoint(lambda z: self.hidden(z))(y)

    class Child(Shared):
        pass

    before, model = nnx.Linear.__call__, Child()

    @jax.jit
    def run(x: Any) -> Any:
        with recording(model) as record:
            model(x)
        return record.outputs

    assert set(run(jnp.ones(3))) == {"fc", "fc#2", "<output>[0]", "<output>[1]"}
    assert nnx.Linear.__call__ is before and "__call__" not in vars(Child)
    with pytest.raises(TypeError), recording(model):
        model(jnp.ones(3), 1)  # type: ignore[call-arg]
    assert nnx.Linear.__call__ is before and "__call__" not in vars(Child)
    fc = torch.nn.Linear(3, 3)
    twice = record_torch(torch.nn.Sequential(fc, fc), (torch.ones(3),), {})
    assert list(twice.outputs) == ["0", "0#2", "<output>"]


def test_entry_point_names_the_plugin() -> None:
    """What pyproject.toml promises to pytest is a file of this project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"jaxlm_parity": PLUGIN}
    assert (ROOT / f"{PLUGIN.replace('.', '/')}.py").exists()


def test_assertion_names_the_place_and_writes_the_report(tmp_path: Path) -> None:
    """The function for other test runners."""
    path = tmp_path / "parity.json"
    with pytest.raises(AssertionError, match=r"first divergence: rung activations, norm: error") as failed:
        assert_parity(Jax(eps=1e-6), Torch(), RULES, INPUTS, weights="drawn", steps=1, report_to=path)
    assert str(path) in str(failed.value)
    assert json.loads(path.read_text(encoding="utf-8"))["first_divergence"]["name"] == "norm"


PLUGIN = "convert.parity.pytest_plugin"
PLUGGED = """
import sys
assert not {"jax", "torch", "jaxlm"} & set(sys.modules), "the plugin imports a framework"

import numpy as np, pytest, torch
from flax import nnx
from convert.rules import SAME, TRANSPOSE, Rule

RULES = (Rule("kernel", "weight", TRANSPOSE), Rule("bias", "bias", SAME))

@pytest.mark.parametrize("rule", [TRANSPOSE, SAME])
def test_linear(assert_parity, tmp_path, rule):
    rules = (Rule("kernel", "weight", rule), RULES[1])
    ours, x = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), np.ones((2, 3))
    assert_parity(ours, torch.nn.Linear(3, 3), rules, [x], weights="drawn", steps=2)
    assert (tmp_path / "parity.json").exists()
"""


def plugged() -> list[str]:
    """Where the project is installed pytest finds the plugin itself, and would refuse to have it twice."""
    installed = entry_points(group="pytest11", name="jaxlm_parity")
    assert all(found.value == PLUGIN for found in installed)
    return [] if installed else ["-p", PLUGIN]


def test_fixture_passes_and_fails_in_a_project_of_its_own(tmp_path: Path) -> None:
    """pytest in a process of its own: nothing heavy is imported for the plugin, one test passes, one fails readably."""
    script = tmp_path / "test_port.py"
    script.write_text(PLUGGED, encoding="utf-8")
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        *plugged(),
        "--rootdir",
        str(tmp_path),
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed, 1 passed" in run.stdout
    assert "first divergence: rung activations, <output>: error" in run.stdout
    assert "AssertionError" in run.stdout and "parity.json" in run.stdout
