"""Three-way comparison in float32 and bfloat16: JAX and PyTorch, each against float64 on the same rounded weights.

    ratio   e_jax <= R * e_torch        one-sided: a symmetric ratio of two errors to one oracle cannot fail
    cap     e_jax <= 16 * d             d: what one rounding unit of noise on every weight changes in float64

Experts are replayed from the oracle, since one flipped choice is discrete and would drown what is compared; flips of
the unreplayed runs are counted and shown, not judged. Trajectories (float32) are judged by the drift that noise of one
unit in the last place makes. Sources: FlashAttention's tests for the one-sided form, arXiv:2506.09280 for the cap.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from convert.parity import rungs, serving, steps
from convert.parity.ask import ask
from convert.parity.compare import Finding, gradient_floors, kl_divergence, norm, relative_error
from convert.parity.inputs import Arrays, next_to, perturbed
from convert.parity.limits import limit
from convert.parity.precision import UNITS
from convert.parity.results import Report, Rung
from convert.parity.rungs import TERMS, Pair, backward_order
from convert.parity.sides import Side, Step, TorchSide, Trainer, recorded_routing
from convert.tree import Flat
from jaxlm.config import RunConfig
from jaxlm.train import KEPT_WIDE

DRAWS = 2  # perturbations that a cap is taken from
MEMBERS = 4  # of the ensemble whose drift a trajectory is measured by
BACKWARD = {"loss", "gradients", "gradients_cap"}  # rungs that need a backward pass
SMALL = 64  # elements under which the error of a tensor is a matter of chance
MARGIN = 4.0  # rms errors by which a token's best logit must lead for its top-1 to be counted


class Passes(NamedTuple):
    """One forward and backward pass of each party on the same weights and routing."""

    batch: Arrays  # with the oracle's routing
    oracle: tuple[Flat, Flat, dict[str, Any]]  # activations, gradients, metrics in float64
    jax: tuple[Flat, Flat, dict[str, Any]]
    torch: tuple[Flat, Flat, dict[str, Any]]
    noise: list[tuple[Flat, Flat]]  # activations and gradients in float64 under perturbed weights


def oracle_run(run: RunConfig) -> RunConfig:
    """The run in float64."""
    train = dataclasses.replace(run.train, dtype="float64", param_dtype="float64")
    return dataclasses.replace(run, train=train)


def rounded(weights: Flat, dtype: str) -> Flat:
    """What the computation sees: weights rounded to its dtype where the training step rounds them, in double."""
    if dtype != "bfloat16":
        return {path: np.asarray(w, np.float64) for path, w in weights.items()}
    return {
        path: (w if path.endswith(KEPT_WIDE) else w.astype(ml_dtypes.bfloat16)).astype(np.float64)
        for path, w in weights.items()
    }


def climb(pairs: list[Pair], options: Any, report: Report, progress: Callable[[str], None]) -> Iterator[Rung]:
    """All rungs that make sense below float64."""
    first = pairs[0]
    for name in ("config", "conversion", "init", "rope", "schedule"):
        if options.wants(name):
            progress(name)
            yield ask(name, "", rungs.RUNGS[name], first)
    for pair in pairs:
        if options.wants("tree"):
            yield ask("tree", pair.case, rungs.tree, pair)
        judged = {
            "activations": activations,
            "activations_cap": activations_cap,
            "loss": loss,
            "kl": kl,
            "gradients": gradients,
            "gradients_cap": gradients_cap,
        }
        judged = {name: question for name, question in judged.items() if options.wants(name)}
        if judged:
            progress(f"forward and backward passes of the three parties [{pair.case}]")
            backward = bool(BACKWARD & set(judged))
            passes = three_passes(pair, options.dtype, backward)
            report.inputs |= {f"flips_{pair.case}": flips(pair, passes)}
            for name, question in judged.items():
                yield ask(name, pair.case, lambda pair, q=question, p=passes: q(pair, p, options.dtype), pair)
    if options.dtype == "bfloat16":
        return
    if options.wants("trajectory"):
        yield ask("trajectory", first.case, lambda pair: trajectory(pair, report, progress), first)
    last = pairs[-1]
    if options.wants("decoding"):
        progress("decoding")
        yield ask("decoding", last.case, lambda p: serving.decoding(p, limit("float32_decode")), last)


def three_passes(pair: Pair, dtype: str, backward: bool) -> Passes:
    """Runs the oracle, both frameworks and the perturbed oracle; without loss and gradients where nobody asks."""

    def passed(side: Side) -> tuple[Flat, Flat, dict[str, Any]]:
        grads, metrics = side.gradients(batch) if backward else ({}, {})
        return side.activations(batch), grads, metrics

    run = oracle_run(pair.run)
    weights = rounded(pair.jax.weights(), dtype)
    oracle = TorchSide.twin(run, weights)
    acts = oracle.activations(pair.batch)
    routing = recorded_routing(pair.model, acts)
    batch = pair.batch | ({} if routing is None else {"expert_ids": routing})
    noise = []
    for seed in range(DRAWS):
        side = TorchSide.twin(run, perturbed(weights, UNITS[dtype], seed))
        noise.append(passed(side)[:2])
    exact, ours, theirs = passed(oracle), passed(pair.jax), passed(pair.torch)
    return Passes(batch, exact, ours, theirs, noise)


def flips(pair: Pair, passes: Passes) -> dict[str, int]:
    """Router decisions of the unreplayed runs that differ from the oracle's, of all decisions on real tokens."""
    if "expert_ids" not in passes.batch:
        return {}
    real = pair.batch["segments"] > 0
    counts = {"decisions": 0}
    for side in (pair.jax, pair.torch):
        acts = side.activations(pair.batch)
        lost = total = 0
        for name, chosen in passes.oracle[0].items():
            if name.endswith("expert_ids"):
                same = (chosen[real][:, :, None] == acts[name][real][:, None, :]).any(-1)
                lost, total = lost + int((~same).sum()), total + same.size
        counts |= {"decisions": total, side.framework: lost}
    return counts


def _ratio(
    name: str, ours: Any, theirs: Any, oracle: Any, bound: float, unit: float, floor: float
) -> Finding:
    """e_jax / e_torch; an error below one rounding unit counts as that unit, on either side."""
    e_jax, e_torch = relative_error(ours, oracle, floor), relative_error(theirs, oracle, floor)
    if np.size(oracle) < SMALL:
        bound *= 1 + limit("small_tensor") / math.sqrt(np.size(oracle))
    value = 0.0 if e_jax <= unit else e_jax / max(e_torch, unit)
    return Finding(name, value, bound, {"error_jax": e_jax, "error_torch": e_torch})


def _compared(acts: Flat) -> list[str]:
    """Activations that carry rounding: not the replayed choices."""
    return [name for name in acts if not name.endswith((".expert_ids", ".kept"))]


def activations(pair: Pair, passes: Passes, dtype: str) -> list[Finding]:
    """Every activation, one-sided; the whole logits more strictly in bfloat16."""
    ours, theirs, oracle = passes.jax[0], passes.torch[0], passes.oracle[0]
    findings = []
    for name in _compared(ours):
        strict = name == "logits" and dtype == "bfloat16"
        bound = limit("bfloat16_whole" if strict else f"{dtype}_ratio")
        findings.append(_ratio(name, ours[name], theirs[name], oracle[name], bound, UNITS[dtype], 0.0))
    return findings


def activations_cap(pair: Pair, passes: Passes, dtype: str) -> list[Finding]:
    """Every activation of JAX against what noise on the weights does to it."""
    noise = [acts for acts, _ in passes.noise]
    names = _compared(passes.jax[0])
    return _capped(passes.jax[0], passes.oracle[0], noise, names, UNITS[dtype], dict.fromkeys(names, 0.0))


def gradients(pair: Pair, passes: Passes, dtype: str) -> list[Finding]:
    """Every parameter's gradient and the whole gradient, one-sided."""
    ours, theirs, oracle = passes.jax[1], passes.torch[1], passes.oracle[1]
    floors, _ = gradient_floors(oracle)
    names = [path for path in backward_order(ours) if path not in pair.zero]
    bound = limit(f"{dtype}_ratio")
    found = [_ratio(n, ours[n], theirs[n], oracle[n], bound, UNITS[dtype], floors[n]) for n in names]
    whole = (
        np.concatenate([np.ravel(np.asarray(g[n], np.float64)) for n in names])
        for g in (ours, theirs, oracle)
    )
    mine, other, exact = whole
    bound = limit("bfloat16_whole" if dtype == "bfloat16" else "float32_ratio")
    return [*found, _ratio("whole gradient", mine, other, exact, bound, UNITS[dtype], 0.0)]


def gradients_cap(pair: Pair, passes: Passes, dtype: str) -> list[Finding]:
    """Every gradient of JAX against what noise on the weights does to it."""
    noise = [grads for _, grads in passes.noise]
    floors, _ = gradient_floors(passes.oracle[1])
    names = [path for path in backward_order(passes.jax[1]) if path not in pair.zero]
    return _capped(passes.jax[1], passes.oracle[1], noise, names, UNITS[dtype], floors)


def _capped(
    ours: Flat, oracle: Flat, noise: list[Flat], names: list[str], unit: float, floors: dict[str, float]
) -> list[Finding]:
    findings = []
    for name in names:
        change = max(relative_error(drawn[name], oracle[name], floors[name]) for drawn in noise)
        error = relative_error(ours[name], oracle[name], floors[name])
        value = error / max(change, unit)
        findings.append(Finding(name, value, limit("perturbation"), {"error_jax": error, "noise": change}))
    return findings


def loss(pair: Pair, passes: Passes, dtype: str) -> list[Finding]:
    """Loss terms of both frameworks against float64."""
    findings = []
    for framework, found in (("jax", passes.jax[2]), ("torch", passes.torch[2])):
        for term in ("loss", "z", "balance", "router_z", "total_loss"):
            value = relative_error(found[term], passes.oracle[2][term])
            findings.append(Finding(f"{framework}.{TERMS.get(term, term)}", value, limit(f"{dtype}_loss")))
    return findings


def kl(pair: Pair, passes: Passes, dtype: str) -> list[Finding]:
    """Largest KL divergence of a real token in nats, and its most likely token where that is no near tie."""
    real = pair.batch["segments"] > 0
    oracle, ours, theirs = (
        np.asarray(p[0]["logits"], np.float64)[real] for p in (passes.oracle, passes.jax, passes.torch)
    )
    divergence = {"oracle to jax": kl_divergence(oracle, ours), "torch to jax": kl_divergence(theirs, ours)}
    findings = [
        Finding(name, float(values.max()), limit(f"{dtype}_kl"), {"mean": float(values.mean())})
        for name, values in divergence.items()
    ]
    lead = np.partition(oracle, -2, axis=-1)
    clear = lead[:, -1] - lead[:, -2] > MARGIN * norm(ours - oracle) / np.sqrt(oracle.size)
    wrong = (ours.argmax(-1) != oracle.argmax(-1)) & clear
    detail = {"counted": int(clear.sum()), "tokens": len(clear)}
    return [*findings, Finding("top-1 of clear tokens", float(wrong.sum()), limit("exact"), detail)]


def trajectory(pair: Pair, report: Report, progress: Callable[[str], None]) -> list[Finding]:
    """Drift of JAX from PyTorch over that of PyTorch from itself under one unit in the last place on all weights."""
    run, total = steps.trajectory_run(pair, pair.run.train.seq_len), pair.steps
    experts = pair.model.moe.n_experts > 0
    progress(f"{total} steps in float64" + (", recording the routing" if experts else ""))
    wide = TorchSide.twin(oracle_run(run), rounded(pair.jax.weights(), "float32"))
    oracle, replayed = _recorded(wide, oracle_run(run), pair, total)
    weights = pair.torch.weights()
    curves: dict[str, list[Step]] = {}
    ends: dict[str, Flat] = {}
    ensemble: dict[str, Side] = {
        f"ensemble {seed}": pair.torch.replaced(next_to(weights, seed)) for seed in range(MEMBERS)
    }
    for name, side in ({"torch": pair.torch, "jax": pair.jax} | ensemble).items():
        progress(f"{total} steps of {name} in float32")
        trainer = side.trainer(run)
        curves[name] = [trainer.step(batch) for batch in replayed]
        ends[name] = trainer.state().params
    losses = {name: np.array([s.metrics["loss"] for s in course]) for name, course in curves.items()}
    drift = {name: float(np.max(np.abs(values / losses["torch"] - 1))) for name, values in losses.items()}
    moved = {name: _distance(end, ends["torch"]) for name, end in ends.items()}
    findings = []
    for what, table, bound in (
        ("loss", drift, "float32_trajectory"),
        ("parameters", moved, "float32_trajectory_parameters"),
    ):
        base = max(table[name] for name in ensemble)
        detail = {"drift": table["jax"], "ensemble": base}
        findings.append(Finding(what, table["jax"] / max(base, 1e-300), limit(bound), detail))
    report.curves |= {f"loss_{n}": losses[n].tolist() for n in ("jax", "torch")} | {"loss_float64": oracle}
    if experts:
        progress(f"{total} steps without replay (shown, not judged)")
        pair.notes["trajectory"] = _unreplayed(pair, run, replayed, oracle, report)
    return findings


def _recorded(side: TorchSide, run: RunConfig, pair: Pair, total: int) -> tuple[list[float], list[Arrays]]:
    """The float64 losses, and the batches with the experts that float64 chose at each step."""
    trainer, order = side.trainer(run), steps.batches(run, pair.seed)
    losses, batches = [], []
    for _ in range(total):
        batch = next(order)
        now = TorchSide(run, trainer.torch_state.model)
        routing = recorded_routing(run.model, now.activations(batch)) if run.model.moe.n_experts else None
        batch = batch | ({} if routing is None else {"expert_ids": routing})
        losses.append(trainer.step(batch).metrics["loss"])
        batches.append(batch)
    return losses, batches


def _unreplayed(
    pair: Pair, run: RunConfig, replayed: list[Arrays], oracle: list[float], report: Report
) -> dict[str, Any]:
    """Raw float32 trajectories: drift from float64, and the tokens of the last step that chose other experts."""
    notes: dict[str, Any] = {}
    for side in (pair.jax, pair.torch):
        trainer: Trainer = side.trainer(run)
        raw = [{k: v for k, v in batch.items() if k != "expert_ids"} for batch in replayed]
        losses = [trainer.step(batch).metrics["loss"] for batch in raw[:-1]]
        ended = side.replaced(trainer.state().params).activations(raw[-1])
        losses.append(trainer.step(raw[-1]).metrics["loss"])
        chosen, real = recorded_routing(run.model, ended), raw[-1]["segments"] > 0
        assert chosen is not None
        recorded = replayed[-1]["expert_ids"]
        flipped = int((np.sort(chosen[real], -1) != np.sort(recorded[real], -1)).any(-1).sum())
        report.curves[f"loss_{side.framework}_raw"] = losses
        notes[f"{side.framework}_raw_drift_from_float64"] = max(
            abs(a / b - 1) for a, b in zip(losses, oracle)
        )
        notes[f"{side.framework}_raw_flipped_tokens_in_the_last_step"] = flipped
    return notes


def _distance(a: Flat, b: Flat) -> float:
    gap = sum(norm(np.asarray(a[k], np.float64) - np.asarray(b[k], np.float64)) ** 2 for k in b)
    return float(np.sqrt(gap / sum(norm(x) ** 2 for x in b.values())))
