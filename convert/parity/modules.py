"""Any NNX module against any torch module: one rule table, the rungs of the parity suite.

    report = compare_modules(mine, theirs, RULES, [x])
    report.passed, report.divergence

In float64 and on copies, so neither module is changed; in evaluation mode. Variables other than nnx.Param (batch
statistics, random streams of dropout) are refused: no table says what corresponds to them.
"""

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from convert.parity.ask import Guard
from convert.parity.compare import Finding, compare, compare_all, compare_gradients, relative_error
from convert.parity.limits import limit
from convert.parity.module_pair import Call, Decays, Inputs, Loss, Two, widen
from convert.parity.precision import ledger, pinned
from convert.parity.recording import WHOLE, module_of
from convert.parity.report import plain
from convert.parity.results import Report
from convert.parity.steps import K
from convert.parity.suite import compare_decoders
from convert.rules import Rule, convert, pair_up
from convert.tree import Flat, from_jax, from_torch, to_tensor
from jaxlm.config import InputError, OptimConfig
from jaxlm.model import Split, merge_model, split_model

Weights = Literal["own", "jax", "drawn"]
DTYPE = "float64"
LEDGER = ("computation", "oracle", "adamw_scalars", "jax", "torch", "python", "machine", "system")


def tree(two: Two) -> list[Finding]:
    """Names, shapes and values of the parameters, bit for bit after the rules, in torch's names and layouts."""
    return _by_source(two, compare_all(_there(two), from_torch(two.module), limit("exact")))


def _there(two: Two) -> Flat:
    """JAX's parameters in torch's names and layouts."""
    return convert(two.pairs, from_jax(two.split.params))


def _by_source(two: Two, findings: list[Finding]) -> list[Finding]:
    names = {pair.other: pair.path for pair in two.pairs}
    return [dataclasses.replace(f, name=names.get(f.name, f.name)) for f in findings]


def conversion(two: Two) -> list[Finding]:
    """Every parameter there and back: the same bits, so that each transform is undone by its inverse."""
    return compare_all(two.here(_there(two)), from_jax(two.split.params), limit("exact"))


def activations(two: Two) -> list[Finding]:
    """Every submodule's output in JAX's order of execution, the whole module's last; what has no partner is noted."""
    ours, theirs = two.records
    findings, compared, alone, last = [], set(), [], ""
    for name, value in ours.outputs.items():
        other, layout = two.partner(name)
        if other not in theirs.outputs and module_of(name) != WHOLE:
            alone.append(name)
            continue
        if other not in theirs.outputs:
            findings.append(Finding(name, math.inf, limit("exact"), {"missing": "torch"}))
            continue
        compared.add(other)
        reference = layout(theirs.outputs[other], inverse=True)
        bound = limit("float64" if value.dtype.kind == "f" else "exact")
        found = compare(name, value, reference, bound)
        if found.passed:
            last = name
        else:
            narrow = {"jax": value.dtype, "torch": reference.dtype}
            narrow = {k: str(d) for k, d in narrow.items() if d.kind == "f" and d.itemsize < 8}
            detail = {"where": _where(two, name, other, last)}
            detail |= {"computed_in": f"{narrow}: something casts to it"} if narrow else {}
            found = dataclasses.replace(found, detail=dict(found.detail) | detail)
        findings.append(found)
    rest = [n for n in theirs.outputs if n not in compared]
    widened = widen(merge_model(two.split.graphdef, two.split.params))
    two.notes["activations"] = {"only_in_jax": alone, "only_in_torch": rest, "dtype_widened": widened}
    return findings


def _where(two: Two, name: str, other: str, last: str) -> str:
    """Whether the failing module's own input agrees: the fault is in it, or in what runs between modules."""
    ours, theirs = two.records
    mine, yours = ours.inputs.get(name.partition("[")[0], []), theirs.inputs.get(other.partition("[")[0], [])
    layout = two.partner(name)[1]
    after = f", after {last}" if last else ""
    errors = [
        min(
            relative_error(a, b),
            relative_error(a, layout(b, inverse=True)) if a.ndim == b.ndim > 1 else math.inf,
        )
        for a, b in zip(mine, yours, strict=False)
    ]
    if not errors:
        return f"in {name} or before it{after}"
    if max(errors) <= limit("float64"):
        return f"inside {name}: its input agrees"
    return f"before {name}{after}: its input differs already, error {max(errors):.1e}"


def loss(two: Two) -> list[Finding]:
    """The loss of the first call."""
    (ours, _), (theirs, _) = two.gradients
    return [compare("loss", ours, theirs, limit("float64"))]


def gradients(two: Two) -> list[Finding]:
    """Every parameter's gradient, in the order of the backward pass."""
    (_, ours), (_, theirs) = two.gradients
    zero = limit("float64_zero")
    return compare_gradients(ours, theirs, limit("float64"), two.order, two.zero, zero)


def updates(two: Two, at: int) -> list[Finding]:
    """m, v and the change of every parameter after `at` AdamW steps."""
    findings = []
    a, b = (way.at[at] for way in two.course)
    moved = [{k: way.at[at].params[k] - way.at[0].params[k] for k in way.at[0].params} for way in two.course]
    for slot, mine, other, bound in (
        ("m", a.m, b.m, "float64_state"),
        ("v", a.v, b.v, "float64_state"),
        ("delta", *moved, "float64_delta"),
    ):
        findings += _slot(two, slot, mine, other, bound)
    return findings


def trajectory(two: Two) -> list[Finding]:
    """Loss and gradient norm of every step, then parameters and moments at the end."""
    findings, (ours, theirs) = [], two.course
    for name in ("losses", "norms"):
        a, b = getattr(ours, name), getattr(theirs, name)
        floor = max(map(abs, b))  # an inner product may cross zero on its way
        errors = [relative_error(x, y, floor) for x, y in zip(a, b, strict=True)]
        bad = next((i for i, e in enumerate(errors) if not e <= limit("float64")), None)
        detail = {} if bad is None else {"step": bad, "jax": a[bad], "torch": b[bad]}
        findings.append(Finding(name, max(errors), limit("float64"), detail))
    for slot in ("params", "m", "v"):
        a, b = (getattr(way.at[two.steps], slot) for way in two.course)
        findings += _slot(two, slot, a, b, "float64_state")
    return findings


def _slot(two: Two, slot: str, a: Flat, b: Flat, bound: str) -> list[Finding]:
    a, b = ({k: x for k, x in side.items() if k not in two.zero} for side in (a, b))
    found = compare_gradients(a, b, limit(bound), two.order)
    return [dataclasses.replace(f, name=f"{slot}:{f.name}") for f in found]


RUNGS: dict[str, Callable[[Two], list[Finding]]] = {
    "tree": tree,
    "conversion": conversion,
    "activations": activations,
    "loss": loss,
    "gradients": gradients,
    "update": lambda two: updates(two, 1),
    "updates": lambda two: updates(two, min(K, two.steps)),
    "trajectory": trajectory,
}


def compare_modules(
    jax_module: nnx.Module,
    torch_module: torch.nn.Module,
    rules: Sequence[Rule],
    inputs: Inputs,
    *,
    weights: Weights = "own",
    layers: Sequence[Rule] = (),
    loss: Loss | tuple[Loss, Loss] | None = None,
    steps: int = 20,
    optim: OptimConfig | None = None,
    decays: Decays = lambda path, shape: len(shape) >= 2,
    target: str = "",
    against: str = "",
) -> Report:
    """Climbs the rungs tree, conversion, activations, loss, gradients, update, updates and trajectory.

    rules: parameter path in JAX -> in torch, with the layout. inputs: a list of arrays or a dict by argument name, in
    JAX's layout. weights: "own" compares those that the modules have, "jax" gives JAX's to torch first, "drawn" gives
    both random ones, so that no bias is zero and no scale is one. layers: the same kind of table over module paths, for
    activations whose name or layout differs; "<input>" and "<output>" are the arguments and the result, an empty target
    leaves a module out. loss: of the outputs, one function for both sides or (JAX's, torch's); default an inner
    product with fixed random numbers. decays: whether weight decay touches a parameter, by JAX path and shape.

    Raises InputError where a module holds what cannot be compared; where they differ, the report has not passed.
    """
    started = time.perf_counter()
    if steps < 1 or weights not in ("own", "jax", "drawn"):
        raise InputError(f"steps={steps} must be at least 1, weights={weights!r} one of own, jax, drawn")
    if optim is not None and (optim.optimizer != "adamw" or optim.policy):
        raise InputError(
            f"optim.optimizer={optim.optimizer!r}, policy={optim.policy}: modules are compared under plain adamw, with "
            "`decays` for its policy; only decoders have the paths that the others know"
        )
    _refuse(jax_module)
    names = (target or type(jax_module).__name__, against or type(torch_module).__name__)
    with pinned(DTYPE):
        report = Report(*names, DTYPE, {k: v for k, v in ledger(DTYPE).items() if k in LEDGER})
        call = Call.of(inputs)
        report.inputs = {k: f"{x.dtype} {list(x.shape)}" for k, x in call.arrays.items()} | {
            "weights": weights,
            "steps": steps,
        }
        losses = (loss, loss) if callable(loss) else loss
        split, module = _widened(jax_module, weights), copy.deepcopy(torch_module).cpu().double().eval()
        guard = Guard("tree", "")
        with guard:
            pairs = pair_up(rules, {path: tuple(x.shape) for path, x in split.params.items()})
            two = Two(split, module.requires_grad_(), pairs, layers, call, losses, optim, decays, steps)
            guard.findings = _misfits(two)
        if guard.findings:
            report.rungs.append(guard.rung())
            return report
        if weights != "own":
            _load(module, _there(two))
        _climb(two, report)
    report.seconds = time.perf_counter() - started
    return report


def _climb(two: Two, report: Report) -> None:
    for name, question in RUNGS.items():
        guard = Guard(name, "")
        with guard:
            guard.findings = question(two)
        rung = guard.rung()
        rung.notes = {key: value for key, value in two.notes.get(name, {}).items() if value}
        if name == "tree" and (buffers := [path for path, _ in two.module.named_buffers()]):
            rung.notes["buffers_not_compared"] = buffers
        report.rungs.append(rung)
    with Guard("zero", ""):  # gradients that could not be computed have said so in their rung
        report.zero_gradients = sorted(two.zero)
        report.curves = {"loss_jax": two.course.ours.losses, "loss_torch": two.course.theirs.losses}


def _refuse(module: nnx.Module) -> None:
    """Raises InputError, in one line, for a module that holds more than parameters."""
    state = nnx.to_flat_state(nnx.split(module)[1])
    others = [
        f"{'.'.join(map(str, path))} ({type(leaf).__name__})"
        for path, leaf in state
        if not isinstance(leaf, nnx.Param)
    ]
    if others:
        raise InputError(
            f"{type(module).__name__} holds more than nnx.Param: {', '.join(others)}; build it without batch "
            "statistics and dropout, and make constants inside __call__"
        )
    if not state:
        raise InputError(f"{type(module).__name__} has no parameters: there is nothing to compare")


def _widened(module: nnx.Module, weights: Weights) -> Split:
    """The module apart, in double; drawn weights keep the level of vectors, or a norm would scale by nothing."""
    graphdef, params = split_model(module)
    rng, wide = np.random.default_rng(0), {}
    for path, value in params.items():
        x = np.asarray(value).astype(np.float64)
        noise = rng.standard_normal(x.shape)
        drawn = x + 0.1 * noise if x.ndim < 2 else noise / math.sqrt(math.prod(x.shape[:-1]))
        wide[path] = jnp.asarray(drawn if weights == "drawn" else x)
    return Split(graphdef, wide)


def _misfits(two: Two) -> list[Finding]:
    """Names and shapes that the rules do not make; without them nothing can be paired."""
    shapes = {path: tuple(p.shape) for path, p in two.module.named_parameters()}
    wanted = {pair.other: pair.other_shape for pair in two.pairs}
    bad = []
    for name in dict.fromkeys([*wanted, *shapes]):
        if wanted.get(name) != shapes.get(name):
            detail = {
                "torch_name": name,
                "rules_make": str(wanted.get(name, "nothing")),
                "torch_shape": str(shapes.get(name, "no such parameter")),
            }
            bad.append(Finding(name, math.inf, limit("exact"), detail))
    return _by_source(two, bad)


def _load(module: torch.nn.Module, flat: Flat) -> None:
    """Writes parameters only: buffers are not in any table."""
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            parameter.copy_(to_tensor(flat[path]))


def assert_parity(first: Any, *args: Any, report_to: Path | None = None, **kwargs: Any) -> Report:
    """`compare_modules` of an NNX module, or `compare_decoders` of a RunConfig, as an assertion.

    report_to: file for the report as JSON, written whether it passes or not. Raises AssertionError with the report's
    lines where the two differ, InputError where they cannot be compared.
    """
    ask: Callable[..., Report] = compare_modules if isinstance(first, nnx.Module) else compare_decoders
    report = ask(first, *args, **kwargs)
    lines = report.lines()
    if report_to is not None:
        report_to.write_text(
            json.dumps(plain(report.to_json()), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
        lines.append(f"the whole report: {report_to}")
    if not report.passed:
        raise AssertionError("\n".join(lines))
    return report
