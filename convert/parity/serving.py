"""The rungs of decoding, and of jaxlm on a mesh: the same numbers through the cache, and on several devices."""

import dataclasses
from typing import Any

import jax
import numpy as np

import jaxlm.train
from convert.parity.compare import Finding, compare, compare_gradients
from convert.parity.inputs import Arrays, prompts
from convert.parity.limits import limit
from convert.parity.rungs import Pair, backward_order
from convert.parity.sides import Side
from jaxlm.config import ConfigError, MeshConfig, RunConfig
from jaxlm.sharding import make_mesh, sharding

STEPS = 5  # cached steps after the prompt
MESHES = (
    MeshConfig(fsdp=2, expert=2),
    MeshConfig(expert=4),
    MeshConfig(fsdp=2, tensor=2),
    MeshConfig(data=2, fsdp=2),
)


def decoding(pair: Pair, bound: float | None = None) -> list[Finding]:
    """Prefill and cached steps against the full forward of the same framework, then one framework against the other."""
    bound = limit("float64") if bound is None else bound
    given = prompts(pair.model, pair.seed, STEPS + 1)
    if pair.model.context <= max(map(len, given)) + STEPS:
        return [Finding("the context leaves no room to decode", 0.0, bound)]
    rng = np.random.default_rng(pair.seed + 1)
    answers = rng.integers(0, pair.model.vocab_size, (len(given), STEPS)).astype(np.int32)
    findings, found = [], {}
    for name, side in {"jax": pair.jax, "torch": pair.torch}.items():
        cached, full = side.cached_logits(given, answers), full_logits(side, given, answers)
        found[name] = cached
        for step, (a, b) in enumerate(zip(cached, full, strict=True)):
            findings.append(compare(f"{name}.{_what(step)}", a, b, bound))
    for step, (a, b) in enumerate(zip(found["jax"], found["torch"], strict=True)):
        findings.append(compare(f"both.{_what(step)}", a, b, bound))
    return findings


def _what(step: int) -> str:
    return "prefill" if step == 0 else f"step:{step}"


def full_logits(side: Side, given: list[list[int]], answers: np.ndarray) -> list[np.ndarray]:
    """Logits [B, V] after the prompts and after each answer's token, without a cache, rows padded on the right."""
    lengths, steps = [len(p) for p in given], answers.shape[1]
    width = max(lengths) + steps
    ids, segments = np.zeros((2, len(given), width), np.int32)
    for row, prompt in enumerate(given):
        ids[row, : lengths[row]] = prompt
        ids[row, lengths[row] : lengths[row] + steps] = answers[row]
        segments[row, : lengths[row] + steps] = 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), ids.shape)
    batch: Arrays = {"inputs": ids, "segments": segments, "positions": np.ascontiguousarray(positions)}
    logits = side.activations(batch, train=False)["logits"]
    return [np.stack([logits[r, n - 1 + step] for r, n in enumerate(lengths)]) for step in range(steps + 1)]


def greedy(pair: Pair) -> list[Finding]:
    """The most likely tokens, to the last one."""
    return _same_answers(pair, None)


def sampling(pair: Pair) -> list[Finding]:
    """Sampled tokens under one noise for both frameworks."""
    rows, vocab = len(prompts(pair.model, pair.seed)), pair.model.vocab_size
    noise = np.random.default_rng(pair.seed + 2).gumbel(size=(STEPS + 1, rows, vocab))
    return _same_answers(pair, noise)


def _same_answers(pair: Pair, noise: np.ndarray | None) -> list[Finding]:
    given = prompts(pair.model, pair.seed, STEPS + 1)
    if pair.model.context <= max(map(len, given)) + STEPS:
        return [Finding("the context leaves no room to decode", 0.0, limit("exact"))]
    ours, theirs = (side.answers(given, noise, STEPS + 1) for side in (pair.jax, pair.torch))
    findings = []
    for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        wrong = sum(x != y for x, y in zip(a, b)) + abs(len(a) - len(b))
        detail = {} if wrong == 0 else {"jax": a, "torch": b}
        findings.append(Finding(f"tokens:row {row}", float(wrong), limit("exact"), detail))
    return findings


def mesh(pair: Pair) -> list[Finding]:
    """jaxlm's loss and gradients on the first mesh that fits for experts and for tensors, against one device."""
    batch = {name: value[:4, : min(value.shape[1], 64)] for name, value in pair.batch.items()}
    if len(batch["inputs"]) < 4:
        batch = {name: np.concatenate([value] * 4)[:4] for name, value in batch.items()}
    reference, terms = pair.jax.gradients(batch)
    findings = []
    for chosen in fitting_meshes(pair.run, len(jax.devices())):
        grads, found = on_mesh(pair, chosen, batch)
        for term in ("total_loss", "loss"):
            findings.append(compare(f"{term}:{chosen}", found[term], terms[term], limit("float64")))
        compared = compare_gradients(
            grads, reference, limit("float64"), backward_order(reference), pair.zero, limit("float64_zero")
        )
        findings += [dataclasses.replace(f, name=f"gradients:{chosen}:{f.name}") for f in compared]
    return findings or [Finding("one device: no mesh to compare", 0.0, limit("float64"))]


def fitting_meshes(run: RunConfig, devices: int) -> list[MeshConfig]:
    """At most two meshes of four devices that the model divides over: one with experts, one with tensors."""
    fitting = []
    for candidate in MESHES:
        try:
            train = dataclasses.replace(run.train, batch_size=4, accumulation=1)
            dataclasses.replace(run, mesh=candidate, train=train)
        except ConfigError:
            continue
        if candidate.size <= devices:
            fitting.append(candidate)
    by_kind = {
        ("expert" if m.expert > 1 else "tensor" if m.tensor > 1 else "data"): m for m in reversed(fitting)
    }
    return [by_kind[kind] for kind in ("expert", "tensor", "data") if kind in by_kind][:2]


def on_mesh(pair: Pair, chosen: MeshConfig, batch: Arrays) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Gradients and metrics with parameters and batch split over the mesh."""
    from convert.parity.precision import COMPILER_OPTIONS
    from jaxlm.model import abstract_model

    run, made = pair.run, make_mesh(chosen)
    axes = abstract_model(run.model).axes
    with jax.set_mesh(made):
        params = {
            path: jax.device_put(np.asarray(value), sharding(made, value.shape, axes[path]))
            for path, value in pair.jax.weights().items()
        }
        rows = jaxlm.train.place_batch(batch, made)
        function = jax.jit(jaxlm.train.make_gradient_fn(run), compiler_options=COMPILER_OPTIONS)
        grads, metrics = function(params, rows)
    return {k: np.asarray(g) for k, g in grads.items()}, {k: np.asarray(v) for k, v in metrics.items()}
