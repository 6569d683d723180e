"""The rungs of fine-tuning in float64: supervised, by adapters on a frozen base (plain or quantised), by preferences.

    sft            batches of conversations, loss and gradients; packed rows against each example alone
    lora_init      which weights get factors, how these begin, and that the base is what it was
    lora           adapted and merged weights, loss and gradients of the factors
    lora_updates   one step and a trajectory of the factors: losses, clip and rate, factors and moments, base untouched
    lora_nf4       the same bytes of a quantised base; loss and gradients of the factors
    dpo            preferences: references, loss, rewards and gradients of every kind of loss and reference

Below float64 there is no such rung: what a rounding does to a product, a softmax or a loss is judged by the rungs of
training, and fine-tuning has no other.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from convert.parity import steps
from convert.parity import tuning_inputs as inputs
from convert.parity.compare import Finding, compare, compare_all, compare_gradients
from convert.parity.inputs import Arrays
from convert.parity.limits import limit
from convert.parity.rungs import TERMS, Pair, backward_order, distribution
from convert.parity.tuned_sides import Tuned, tuned
from convert.tree import Flat
from jaxlm.adapter_config import FACTORS, AdapterConfig, Override, factor_shapes
from jaxlm.tune_config import DpoConfig, Quant, TuneConfig, TuneRun

BASE = "the pair's weights"
# Ranks and scales that nothing else equals, so that one cannot be taken for another.
USUAL = AdapterConfig(rank=3, alpha=8.0)
WHOLE = AdapterConfig(
    rank=4,
    alpha=6.0,
    rslora=True,
    targets=(".*",),
    overrides=(Override(r".*\.(o_proj\.weight|router\.weight|experts\.down)", 2, 5.0),),
)
PREFERENCES = {
    "adapter_off": (USUAL, DpoConfig(beta=0.3, label_smoothing=0.1, reference="adapter_off")),
    "frozen": (None, DpoConfig(beta=0.4, loss="ipo", reference="frozen")),
    "stored": (None, DpoConfig(beta=0.2, reference="stored")),
}
# Of the metrics of preferences those that the others are made of.
BEFORE_THE_LOSS = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")


def run_of(pair: Pair, tune: TuneConfig) -> TuneRun:
    """The pair's run, fine-tuning. A policy of its own names weights that are not trained here."""
    run = pair.run
    optim = dataclasses.replace(run.optim, policy=())
    train = dataclasses.replace(run.train, seq_len=length_of(pair))
    return TuneRun(model=run.model, optim=optim, train=train, tune=tune)


def length_of(pair: Pair) -> int:
    """Columns of a row of conversations."""
    return inputs.length_of(pair.batch["inputs"].shape[1])


def _sides(pair: Pair, run: TuneRun, trained: Flat | None = None) -> dict[str, Tuned]:
    return {"jax": tuned(pair.jax, run, trained), "torch": tuned(pair.torch, run, trained)}


def _weights(pair: Pair) -> Flat:
    """What the pair starts from, converted once."""
    if "weights" not in pair.cache:
        pair.cache["weights"] = pair.torch.weights()
    return pair.cache["weights"]


def _under(name: str, findings: list[Finding], mark: str = ":") -> list[Finding]:
    """With `:` it is the name that a divergence is located by, with a space what stands under it."""
    return [dataclasses.replace(f, name=f"{name}{mark}{f.name}") for f in findings]


def _zero(pair: Pair) -> set[str]:
    """What has no gradient but rounding, factors of such weights included."""
    return pair.zero | {f"{path}.{factor}" for path in pair.zero for factor in FACTORS}


def _counted(pair: Pair, flat: Flat) -> Flat:
    return {path: value for path, value in flat.items() if path not in _zero(pair)}


Passes = tuple[Flat, dict[str, Any]]  # gradients and metrics


def _same(
    pair: Pair, passes: Iterable[Passes], names: Mapping[str, str] = TERMS, first: tuple[str, ...] = ()
) -> list[Finding]:
    """Of two passes the terms of the loss, the total last, then gradients in the order of the backward pass."""
    ours, theirs = passes
    terms, others = ({names.get(k, k): v for k, v in metrics.items()} for _, metrics in (ours, theirs))
    order = [*first, *(name for name in others if name != "total_loss"), "total_loss"]
    bound, zero = limit("float64"), limit("float64_zero")
    found = compare_gradients(ours[0], theirs[0], bound, backward_order(theirs[0]), _zero(pair), zero)
    return _terms(terms, others, order) + found


def _terms(ours: Mapping[str, Any], theirs: Mapping[str, Any], order: Iterable[str]) -> list[Finding]:
    """Metrics one by one. Rewards are differences of log-probabilities, which set the scale of their rounding."""
    bound, sizes = limit("float64"), [abs(float(x)) for k, x in theirs.items() if k.startswith("logps/")]
    return [
        compare(f.name, ours[f.name], theirs[f.name], bound, max(sizes))
        if f.name.startswith("rewards/") and "missing" not in f.detail
        else f
        for f in compare_all(ours, theirs, bound, order)
    ]


def sft(pair: Pair) -> list[Finding]:
    """Batches as they should be, then loss and gradients on packed rows, and against each example alone."""
    length, data = length_of(pair), _conversations(pair)
    alone = inputs.written_out(data, length)
    padded, packed = (inputs.rows_of(data, length, packing, pair.seed) for packing in (False, True))
    findings = inputs.same_rows("padded", padded, alone)
    findings += inputs.same_rows("packed", packed, inputs.packed_rows(data, packed))
    sides = _sides(pair, run_of(pair, TuneConfig("sft", BASE)))
    found = {name: side.gradients(packed) for name, side in sides.items()}
    findings += _same(pair, found.values())
    if why := _rows_matter(pair):
        pair.notes["sft"] = {"packed_rows_not_compared_with_single_ones": why}
    else:
        for name, side in sides.items():
            findings += _under(f"packed in {name}", _same(pair, (found[name], side.gradients(alone))))
    return findings


def _conversations(pair: Pair, turns: int = 1) -> inputs.Examples:
    return inputs.conversations(
        turns * inputs.CONVERSATIONS, length_of(pair), pair.model.vocab_size, pair.seed
    )


def _packed(pair: Pair) -> Arrays:
    return inputs.rows_of(_conversations(pair), length_of(pair), True, pair.seed)


def _rows_matter(pair: Pair) -> str:
    """Why a row of several examples is not, to this model, the same as a row for each."""
    model = pair.model
    if model.attn_bias_table:
        return "the bias of attention is of a key's place in its row"
    if model.moe.n_experts and model.moe.capacity_factor:
        return "what a capacity limit drops depends on the order of the tokens"
    if model.moe.n_experts and model.moe.balance == "maxtext":
        return "the balance loss is a mean over rows"
    return ""


def lora_init(pair: Pair) -> list[Finding]:
    """Which weights have factors, of which shapes, b zero, a of one distribution; the base as it was, to the bit."""
    sides = _sides(pair, run_of(pair, TuneConfig("sft", BASE, adapter=USUAL)))
    expected, drawn = expected_factors(pair, USUAL), {name: side.fresh() for name, side in sides.items()}
    findings = []
    for name, factors in drawn.items():
        for path in sorted({*expected, *factors}):
            wanted, made = expected.get(path), factors[path].shape if path in factors else None
            detail = {} if made == wanted else {name: made, "expected": wanted}
            findings.append(Finding(path, 0.0 if made == wanted else math.inf, limit("exact"), detail))
    if not all(f.passed for f in findings):
        return findings
    for path in expected:
        a, b = (factors[path] for factors in drawn.values())
        started = max(float(np.abs(a).max()), float(np.abs(b).max()))
        zero = Finding(f"start:{path}", started, limit("exact"))
        findings.append(zero if path.endswith(FACTORS[1]) else distribution(f"start:{path}", a, b))
    for name, side in sides.items():
        base = compare_all(side.frozen(), _weights(pair), limit("exact"))
        findings += _under(f"base in {name}", base)
    return findings


def lora(pair: Pair) -> list[Finding]:
    """What factors that are not zero make: activations, merged weights, loss, gradients.

    Under an adapter of every weight that can have one, with ranks and scales of several kinds; `lora_updates` and
    `lora_nf4` have the usual one.
    """
    sides = _with_factors(pair, WHOLE)
    return _merged(pair, sides) + _same(pair, (side.gradients(_packed(pair)) for side in sides.values()))


def _with_factors(pair: Pair, adapter: AdapterConfig, quant: Quant = "none") -> dict[str, Tuned]:
    run = run_of(pair, TuneConfig("sft", BASE, adapter=adapter, quant=quant))
    return _sides(pair, run, inputs.drawn_factors(expected_factors(pair, adapter), pair.seed))


def expected_factors(pair: Pair, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an adapter's factors, by its configuration."""
    shapes = {}
    for path, weight in _weights(pair).items():
        if adapter.adapts(path):
            of_weight = factor_shapes(weight.shape, adapter.rank_alpha(path)[0])
            shapes |= {f"{path}.{name}": shape for name, shape in zip(FACTORS, of_weight, strict=True)}
    return shapes


def _merged(pair: Pair, sides: dict[str, Tuned]) -> list[Finding]:
    """Adapted activations, merged weights, their logits and the weights after the adapter was taken off again."""
    batch, bound = _packed(pair), limit("float64")
    acts = {name: side.activations(batch) for name, side in sides.items()}
    weights = {name: side.merged() for name, side in sides.items()}
    findings = compare_all(acts["jax"], acts["torch"], bound)
    findings += _under("merged", compare_all(weights["jax"], weights["torch"], bound))
    # The plain decoders of both frameworks were compared before: one of them is enough.
    whole = pair.torch.replaced(weights["torch"]).activations(batch, explicit=False)["logits"]
    for name, side in sides.items():
        findings.append(compare(f"merged logits in {name}", acts[name]["logits"], whole, bound))
        back = compare_all(side.merged(back=True), _weights(pair), bound)
        findings += _under(f"unmerged in {name}", back)
    return findings


def lora_updates(pair: Pair) -> list[Finding]:
    """Factors under AdamW with a live clip and schedule: the first step, the whole way, the base after it."""
    run = run_of(pair, TuneConfig("sft", BASE, adapter=USUAL))
    factors = inputs.drawn_factors(expected_factors(pair, USUAL), pair.seed)
    data, total = _conversations(pair, 2), pair.steps
    grads, _ = tuned(pair.torch, run, factors).gradients(_packed(pair))
    run = dataclasses.replace(run, optim=steps.live(run.optim, total, grads))
    trainers = [side.trainer() for side in _sides(pair, run, factors).values()]
    ours, theirs = (
        steps.course(trainer, inputs.in_turn(data, length_of(pair), pair.seed), 0, total, {1})
        for trainer in trainers
    )
    made = steps.Courses(run, (factors, factors), ours, theirs)
    findings = steps.changes(made, 1, lambda flat: _counted(pair, flat))
    findings += steps.ways(made, lambda flat: _counted(pair, flat))
    for name, trainer in zip(("jax", "torch"), trainers, strict=True):
        base = compare_all(trainer.frozen(), _weights(pair), limit("exact"))
        findings += _under(f"base in {name}", base)
    return findings


def lora_nf4(pair: Pair) -> list[Finding]:
    """The bytes of a base quantised to nf4 in both frameworks, then loss and gradients of the factors on it."""
    sides = _with_factors(pair, USUAL, "nf4")
    ours, theirs = (side.frozen() for side in sides.values())
    found = (side.gradients(_packed(pair)) for side in sides.values())
    return _under("base", compare_all(ours, theirs, limit("exact"))) + _same(pair, found)


def dpo(pair: Pair) -> list[Finding]:
    """Batches of pairs, then loss, rewards and gradients under each kind of loss and of reference."""
    data = inputs.preferences(inputs.PREFERENCES, length_of(pair), pair.model.vocab_size, pair.seed)
    batch = inputs.rows_of(data, length_of(pair), False, pair.seed)
    sides = (inputs.written_out(side, length_of(pair)) for side in (data.chosen, data.rejected))
    findings = inputs.same_rows("pairs", batch, {k: np.stack(x, 1) for k, x in _zipped(*sides).items()})
    for name, (adapter, config) in PREFERENCES.items():
        findings += _under(name, _preferred(pair, data, batch, adapter, config), " ")
    return findings


def _zipped(a: Arrays, b: Arrays) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {key: (a[key], b[key]) for key in a}


def _preferred(
    pair: Pair, data: inputs.Pairs, batch: Arrays, adapter: AdapterConfig | None, config: DpoConfig
) -> list[Finding]:
    """One kind of preference loss, of a policy that has left its reference."""
    run = run_of(pair, TuneConfig("dpo", BASE, adapter=adapter, dpo=config))
    if adapter is None:
        policy = inputs.shifted(_weights(pair), pair.seed)
    else:
        policy = inputs.drawn_factors(expected_factors(pair, adapter), pair.seed)
    sides = _sides(pair, run, policy)
    if config.reference == "stored":
        return _stored(pair, data, batch, sides)
    parts = 1 if adapter is not None else 2  # of the batch, as micro-batches
    found = (side.gradients(batch, parts) for side in sides.values())
    return _same(pair, found, names={}, first=BEFORE_THE_LOSS)


def _stored(pair: Pair, data: inputs.Pairs, batch: Arrays, sides: dict[str, Tuned]) -> list[Finding]:
    """Log-probabilities that a batch brings along, and what they make of a validation; gradients are no others."""
    stored, findings = written_log_probs(pair, batch), []
    for name, side in sides.items():
        findings.append(compare(f"references in {name}", side.references(batch), stored, limit("float64")))
    batch = inputs.rows_of(data, length_of(pair), False, pair.seed, reference=stored)
    ours, theirs = (side.evaluated(batch) for side in sides.values())
    return findings + _terms(ours, theirs, BEFORE_THE_LOSS)


def written_log_probs(pair: Pair, batch: Arrays) -> np.ndarray:
    """Summed log-probabilities [B, 2] of the answers under the pair's weights, from PyTorch's logits in numpy."""
    rows = {key: value.reshape(-1, value.shape[-1]) for key, value in batch.items()}
    logits = pair.torch.activations(rows, train=False, explicit=False)["logits"]
    chosen = np.take_along_axis(logits, rows["targets"][..., None], -1)[..., 0]
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return ((chosen - log_z) * rows["loss_mask"]).sum(-1).reshape(-1, 2)


RUNGS: dict[str, Callable[[Pair], list[Finding]]] = {
    "sft": sft,
    "lora_init": lora_init,
    "lora": lora,
    "lora_updates": lora_updates,
    "lora_nf4": lora_nf4,
    "dpo": dpo,
}
