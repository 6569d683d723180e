"""What quantisation costs: the error of every weight, and the perplexity beside that of bfloat16 weights."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from convert.targets import Target
from experiments.loading import Framework, Quant, load_model, precision
from jaxlm.perplexity import Total


class QuantReport(NamedTuple):
    """A quantised model beside the unquantised one."""

    kind: Quant
    weights: list[dict[str, Any]]  # path, error, bytes_before, bytes_after
    bfloat16: Total  # of the same texts, by the same model in bfloat16


class LayerError(NamedTuple):
    """The quantised weights of one block together."""

    layer: str  # blocks.0
    error: float  # root of the mean square of its weights' relative errors
    worst: str  # the weight with the largest
    largest: float


def quant_report(
    target: Target, framework: Framework, kind: Quant, measure: Callable[[Any], Total]
) -> QuantReport:
    """Quantises the masters again for their errors, and measures the model in bfloat16."""
    if framework == "torch":
        from torchref import quant as torch_quant

        decoder = target.decoder
        found: Any = torch_quant.errors(decoder, torch_quant.quantize(decoder, kind))
    else:
        from jaxlm import quant
        from jaxlm.model import Split, abstract_model

        split = Split(abstract_model(target.config).graphdef, target.params)
        found = quant.errors(split, quant.quantize(split, kind))
    weights = [weight._asdict() for weight in found]
    with precision(framework, "bfloat16"):
        return QuantReport(kind, weights, measure(load_model(target, framework, "bfloat16")))


def by_layer(weights: list[dict[str, Any]]) -> list[LayerError]:
    """The errors of each block, in order."""
    layers: dict[str, list[dict[str, Any]]] = {}
    for weight in weights:
        layers.setdefault(".".join(weight["path"].split(".")[:2]), []).append(weight)
    found = []
    for layer, members in layers.items():
        worst = max(members, key=lambda w: w["error"])
        square = sum(w["error"] ** 2 for w in members) / len(members)
        found.append(LayerError(layer, square**0.5, worst["path"], worst["error"]))
    return found


def show_quant(report: QuantReport, overall: Total) -> None:
    """The table on standard output."""
    before, after = (sum(w[key] for w in report.weights) for key in ("bytes_before", "bytes_after"))
    worse = overall.perplexity / report.bfloat16.perplexity - 1
    compared = f"{worse:+.3%}" if math.isfinite(worse) else f"{overall.perplexity:.6g}"
    print(f"{report.kind:<15}{before / 1e6:,.2f} MB of weights in {after / 1e6:,.2f} MB")
    print(f"{'bfloat16':<15}perplexity {report.bfloat16.perplexity:.6g}, {report.kind} {compared}")
    print(f"\n{'error':>9}  {'largest':>9}  layer")
    for layer in by_layer(report.weights):
        print(f"{layer.error:9.2e}  {layer.largest:9.2e}  {layer.layer} (largest: {layer.worst})")
    print()
