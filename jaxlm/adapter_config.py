"""Which weights of a decoder carry a low-rank adapter (LoRA), of which rank and scale. No framework here.

An adapter is a flat dict: for a weight `w` [in, out] of the model `w.lora_a` [in, R] and `w.lora_b` [R, out]; for
stacked experts [E, in, out] the factors are [E, in, R] and [E, R, out]. The adapted weight is W + scale * a @ b with
scale = alpha / R (Hu et al. 2021, arXiv 2106.09685, section 4.1) or alpha / sqrt(R) (rsLoRA, Kalajdzievski 2023, arXiv
2312.03732).
"""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxlm.config import ConfigError

ADAPTABLE = re.compile(r"(.*_proj|.*router|.*shared_gate|lm_head)\.weight|.*\.experts\.(gate_up|up|down)")
PROJECTIONS = (
    r"blocks\.\d+\.attn\.[qkvo]_proj\.weight",
    r"blocks\.\d+\.(mlp|moe\.shared)\.(gate|up|down)_proj\.weight",
    r"blocks\.\d+\.moe\.experts\.(gate_up|up|down)",
)
FACTORS = ("lora_a", "lora_b")


@dataclass(frozen=True)
class Override:
    """Another rank and alpha for some of the adapted weights."""

    paths: str  # regular expression over whole paths
    rank: int  # R
    alpha: float  # numerator of the scale

    def __post_init__(self) -> None:
        _check_numbers(self.rank, self.alpha, f"override of {self.paths!r}: ")
        _check_expression(self.paths, "override: paths")


@dataclass(frozen=True)
class AdapterConfig:
    """Which weights have an adapter, of which rank and scale. `jaxlm.config.to_dict` and `from_dict` make it JSON.

    By default the seven projections are adapted, shared and routed experts among them; the router is not: a small
    change there sends tokens elsewhere. Name `blocks\\.\\d+\\.moe\\.router\\.weight` in `targets` to adapt it.
    """

    rank: int  # R
    alpha: float  # numerator of the scale
    dropout: float = 0.0  # of the adapter's input, while training
    rslora: bool = False  # scale = alpha / sqrt(R) instead of alpha / R
    targets: tuple[str, ...] = PROJECTIONS  # regular expressions over whole paths of weights
    overrides: tuple[Override, ...] = ()  # the first that matches a path decides

    def __post_init__(self) -> None:
        _check_numbers(self.rank, self.alpha, "adapter: ")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter: dropout={self.dropout} must be in [0, 1)")
        if not self.targets:
            raise ConfigError("adapter: targets is empty; name at least one weight")
        for text in self.targets:
            _check_expression(text, "adapter: targets")

    def adapts(self, path: str) -> bool:
        """Whether a weight has an adapter; embeddings, norms and biases never have."""
        return bool(ADAPTABLE.fullmatch(path)) and any(re.fullmatch(text, path) for text in self.targets)

    def rank_alpha(self, path: str) -> tuple[int, float]:
        """R and alpha of a weight."""
        chosen = next((o for o in self.overrides if re.fullmatch(o.paths, path)), self)
        return chosen.rank, chosen.alpha

    def scale(self, path: str) -> float:
        """What a @ b of a weight is multiplied by."""
        rank, alpha = self.rank_alpha(path)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _check_numbers(rank: Any, alpha: Any, where: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"{where}rank={rank!r} must be a positive integer")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ConfigError(f"{where}alpha={alpha!r} must be a positive number")


def _check_expression(text: str, where: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(f"{where}: {text!r} is no regular expression ({error})") from None


def factor_shapes(shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of lora_a and lora_b of a weight: [in, out] or [E, in, out]."""
    *experts, width, out = shape
    return (*experts, width, rank), (*experts, rank, out)


def check_targets(adapter: AdapterConfig, paths: Iterable[str]) -> None:
    """Raises ConfigError where targets or overrides name no weight of a model, with the names that come near.

    paths: of all weights of the model. Of the default targets some may match nothing: few models have all of them.
    """
    known = list(paths)
    kinds = dict.fromkeys(
        re.sub(r"\.\d+\.", r".\\d+.", path, count=1) for path in known if ADAPTABLE.fullmatch(path)
    )
    adapted = [path for path in known if adapter.adapts(path)]
    for text in (text for text in adapter.targets if text not in PROJECTIONS):
        if not any(re.fullmatch(text, path) and ADAPTABLE.fullmatch(path) for path in known):
            other = next((path for path in known if re.fullmatch(text, path)), None)
            what = (
                "matches no weight"
                if other is None
                else f"matches {other}, which carries no adapter, and no weight"
            )
            raise ConfigError(
                f"lora.targets: {text!r} {what} of this model; near: {_near(text, list(kinds))}"
            )
    if not adapted:
        raise ConfigError(
            f"lora.targets: {list(adapter.targets)} match no weight of this model; it has {', '.join(kinds)}"
        )
    for one in adapter.overrides:
        if not any(re.fullmatch(one.paths, path) for path in adapted):
            raise ConfigError(
                f"lora.overrides: {one.paths!r} matches no adapted weight; near: {_near(one.paths, list(kinds))}"
            )


def _near(text: str, kinds: list[str]) -> str:
    """The three kinds of weights whose names are most like an expression."""
    plain = text.replace("\\", "").lower()

    def likeness(kind: str) -> float:
        name = kind.replace("\\", "")
        parts = [name, *name.split("."), ".".join(name.split(".")[-2:])]
        return max(difflib.SequenceMatcher(None, plain, part, autojunk=False).ratio() for part in parts)

    return ", ".join(sorted(kinds, key=likeness, reverse=True)[:3])
