"""Low-rank adapters (LoRA, arXiv:2106.09685) on a frozen base. Twin: torchref/finetune/lora.py.

    projections                  y = x W (+ bias) + scale * (dropout(x) a) b
    experts, router, lm_head     W + scale * a b in W's place, formed by each call; no dropout

The base lies in the dtype of the computation, norms and router in the masters', or is quantised (QLoRA,
arXiv:2305.14314). Nothing of it is differentiated, trained or saved. Factors have the dtype of their activations where
they are multiplied with them, and that of the weight where they are added to it.

Names: factors are `blocks.0.attn.q_proj.weight.lora_a` and `.lora_b`, frozen parameters have the decoder's own names
(quantised: `….weight.codes`, …). In the tree of modules an adapted weight is a `LoraWeight`, which holds the frozen one
as `base`: the name in the tree without the word `base` is the canonical one.
"""

import functools
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxlm.adapter_config import FACTORS, AdapterConfig, check_targets, factor_shapes
from jaxlm.config import ConfigError, ModelConfig, nearest
from jaxlm.layers import Backends, Linear, add_bias, dropout, upcast
from jaxlm.matmul import matmul
from jaxlm.model import Decoder, Params, Split, abstract_model, abstract_of, merge_model
from jaxlm.quant import (
    QuantLinear,
    QuantWeight,
    check_tensors,
    is_quantized,
    quantize_weight,
    quantized_modules,
)
from jaxlm.shapes import Float
from jaxlm.sharding import Axes, constrain
from jaxlm.train import KEPT_WIDE
from jaxlm.tune_config import TuneRun

_DOMAIN = zlib.crc32(b"lora")  # keeps these random numbers apart from all others of a seed
_BY_PRODUCT = ("_proj.weight", "shared_gate.weight")  # projections: their adapter is a product of its own


class LoraWeight(nnx.Module):
    """A frozen weight and its factors. `weight[...]`: W + scale * a b [..., in, out], in W's dtype.

    Of a quantised one `weight(x)` is that, [..., out, in] in x's dtype.
    """

    def __init__(self, base: nnx.Param | QuantWeight, lora_a: nnx.Param, lora_b: nnx.Param, scale: float):
        self.base, self.lora_a, self.lora_b, self.scale = base, lora_a, lora_b, scale
        self.axes = tuple(_gathered(factor.get_metadata()["axes"]) for factor in (lora_a, lora_b))

    def factors(self, dtype: DTypeLike) -> tuple[Float[Array, "*W I R"], Float[Array, "*W R O"]]:
        """a and b in a dtype, whole but for what `tensor` splits of the weight too."""
        # As they are stored, a mesh may split them along what the activations have whole: those would be exchanged.
        a, b = (
            constrain(factor[...].astype(dtype), axes)
            for factor, axes in zip((self.lora_a, self.lora_b), self.axes, strict=True)
        )
        return a, b

    def __getitem__(self, index: Any) -> Float[Array, "*W I O"]:
        assert index is ..., f"only [...] is known here, not [{index}]"
        assert not isinstance(self.base, QuantWeight)
        return self._added(self.base[...])

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "*W O I"]:
        assert isinstance(self.base, QuantWeight)
        return self._added(self.base(x).mT).mT

    def _added(self, weight: Array) -> Array:
        a, b = self.factors(weight.dtype)
        delta = a @ b
        return (upcast(weight) + self.scale * upcast(delta)).astype(weight.dtype)


class LoraLinear(nnx.Module):
    """`Linear` or `QuantLinear` with an adapter: x W (+ bias) + scale * (dropout(x) a) b.

    Nothing is dropped without a `key`, a variable with a jax.random key.
    """

    key: nnx.Variable | None = None

    def __init__(self, linear: Linear | QuantLinear, rate: float):
        self.weight, self.bias, self.rate = linear.weight, linear.bias, rate

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        weight: Any = self.weight
        base, (a, b) = weight.base, weight.factors(x.dtype)
        y = base.product(x) if isinstance(base, QuantWeight) else matmul(x, base[...].astype(x.dtype))
        kept = dropout(x, self.rate, None if self.key is None else self.key[...])
        inner = constrain(matmul(kept, a), ("batch", *(None,) * (x.ndim - 1)))
        y = y if self.bias is None else add_bias(y, self.bias[...])
        return (upcast(y) + weight.scale * upcast(matmul(inner, b))).astype(x.dtype)


class Adapted(NamedTuple):
    """An adapted decoder without memory: what is trained and what is frozen, by canonical names."""

    graphdef: nnx.GraphDef
    shapes: dict[str, jax.ShapeDtypeStruct]  # of the factors
    axes: dict[str, Axes]
    frozen_shapes: dict[str, jax.ShapeDtypeStruct]
    frozen_axes: dict[str, Axes]


class _Low(NamedTuple):
    """The adapter of one weight."""

    rank: int
    scale: float


class _Dtypes(NamedTuple):
    """Of the computation, and of masters: factors, norms and router."""

    compute: Any
    master: Any

    def of(self, path: str) -> Any:
        """Of a parameter that is not quantised."""
        return self.master if path.endswith((*KEPT_WIDE, *FACTORS)) else self.compute


def adapted(run: TuneRun, backends: Backends = Backends()) -> Adapted:
    """The decoder of a run with its adapter on its base, whatever its size.

    Raises ConfigError where the adapter's targets match no weight.
    """
    adapter = _adapter_of(run)
    plan = _plan(adapter, abstract_model(run.model).shapes)
    return _abstract(
        run.model, plan, adapter.dropout, run.tune.quant, _dtypes(run), backends, run.train.remat
    )


def init_factors(run: TuneRun) -> Params:
    """Fresh factors, a pure function of the seed: a uniform within 1/sqrt(in), b zero, so that nothing is changed yet.

    Each expert has its own. Source: Kaiming's bound with sqrt(5), which peft takes. Call it under jit.
    """
    key = jax.random.fold_in(jax.random.key(run.train.seed), np.uint32(_DOMAIN))
    factors: Params = {}
    for path, like in adapted(run).shapes.items():
        if path.endswith(FACTORS[1]):
            factors[path] = jnp.zeros(like.shape, like.dtype)
            continue
        own, bound = (
            jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode()))),
            1 / math.sqrt(like.shape[-2]),
        )
        factors[path] = jax.random.uniform(own, like.shape, like.dtype, -bound, bound)
    return factors


def adapted_decoder(
    graphdef: nnx.GraphDef, frozen: Params, factors: Params, key: Array | None = None
) -> Decoder:
    """The decoder of these parameters; cheap, meant to run inside jit.

    key: dropout of the adapters is drawn, for each of them by itself and apart from the decoder's own.
    """
    decoder = merge_model(graphdef, _in_tree(frozen, factors))
    if key is None:
        return decoder
    key = jax.random.fold_in(key, np.uint32(_DOMAIN))
    for i, path in enumerate(sorted(_adapted_paths(factors))):
        owner = _owner(decoder, path)
        if isinstance(owner, LoraLinear):
            owner.key = nnx.Variable(jax.random.fold_in(key, i))
    return decoder


def freeze(
    run: TuneRun, tensors: Mapping[str, Any], sharding: Mapping[str, jax.sharding.Sharding] | None = None
) -> Params:
    """The frozen parameters of a run from the base's weights: cast or quantised, one tensor at a time.

    tensors: by canonical paths, arrays or what has a `read()` that gives one. sharding: where each is to lie; each
    device receives its own part only. Raises InputError where they are not the model's, or hold what cannot be
    quantised.
    """
    check_tensors(run.model, tensors)
    kind, dtypes = run.tune.quant, _dtypes(run)
    frozen: Params = {}
    for path, tensor in tensors.items():
        value = tensor.read() if hasattr(tensor, "read") else tensor
        if kind != "none" and is_quantized(path):
            frozen |= _placed(quantize_weight(path, value, kind), sharding)
        elif sharding is not None:
            frozen[path] = _parts(np.asarray(value), dtypes.of(path), sharding[path])
        elif isinstance(value, Array):
            frozen[path] = value.astype(dtypes.of(path))
        else:  # never the pages of a file
            frozen[path] = jnp.array(value, dtypes.of(path), copy=True).block_until_ready()
    return frozen


def _placed(params: Params, sharding: Mapping[str, jax.sharding.Sharding] | None) -> Params:
    return params if sharding is None else {k: jax.device_put(v, sharding[k]) for k, v in params.items()}


def _parts(value: np.ndarray, dtype: DTypeLike, place: jax.sharding.Sharding) -> Array:
    """An array on a mesh, of which no device sees more than its part; no second one is read before it is placed."""
    made = jax.make_array_from_callback(value.shape, place, lambda index: value[index].astype(dtype))
    return made.block_until_ready()


def merge(params: Params, factors: Params, adapter: AdapterConfig) -> Params:
    """W + scale * a b for every adapted weight, in W's dtype; the others are the same arrays.

    Products and sums are upcast. May be traced. Raises ConfigError where a factor's weight is not there.
    """
    return _merged(params, factors, adapter, 1.0)


def unmerge(params: Params, factors: Params, adapter: AdapterConfig) -> Params:
    """The weights before `merge`, but for the rounding of two sums."""
    return _merged(params, factors, adapter, -1.0)


def generation_model(run: TuneRun, frozen: Params, factors: Params, backends: Backends = Backends()) -> Split:
    """What `jaxlm.generate` takes: base and adapter as they are, without a merged copy."""
    adapter = _adapter_of(run)
    plan = _plan(adapter, abstract_model(run.model).shapes)
    form = _abstract(run.model, plan, 0.0, run.tune.quant, _dtypes(run), backends, "none")
    return Split(form.graphdef, _in_tree(frozen, factors))


class Adapters:
    """Several adapters on one frozen base; one of them, none or a weighted sum at a time.

    All are brought to a common form (scale in b, ranks padded with zeros), so that what was compiled for one runs the
    others too; weighted sums, whose factors stand side by side and are exact, share a second form.
    """

    def __init__(
        self,
        config: ModelConfig,
        frozen: Params,
        adapters: Mapping[str, tuple[AdapterConfig, Params]],
        quant: str = "none",
        backends: Backends = Backends(),
    ):
        if not adapters:
            raise ConfigError("no adapters were given; name at least one")
        shapes, self._frozen = abstract_model(config).shapes, frozen
        self._plans = {name: _plan(adapter, shapes) for name, (adapter, _) in adapters.items()}
        self._factors = {name: factors for name, (_, factors) in adapters.items()}
        for name, plan in self._plans.items():
            _check_factors(name, self._factors[name], plan, shapes)
        ranks = {path: [plan[path].rank for plan in self._plans.values() if path in plan] for path in shapes}
        self._shapes = {path: shapes[path].shape for path, r in ranks.items() if r}
        self._one, self._all = ({path: size(ranks[path]) for path in self._shapes} for size in (max, sum))
        dtypes = _Dtypes(jnp.float32, jnp.float32)  # of a form without values, which no product sees

        def graph(ranks: dict[str, int]) -> nnx.GraphDef:
            plan = {path: _Low(rank, 1.0) for path, rank in ranks.items()}
            return _abstract(config, plan, 0.0, quant, dtypes, backends, "none").graphdef

        self._graph_of_one, self._graph_of_all = graph(self._one), graph(self._all)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters."""
        return tuple(self._factors)

    def model(self, weights: str | Mapping[str, float] | None = None) -> Split:
        """What `jaxlm.generate` takes: the base with one adapter, with a weighted sum of them, or (None) without any.

        Raises ConfigError on a name that is not known.
        """
        chosen: Mapping[str, float] = (
            {} if weights is None else {weights: 1.0} if isinstance(weights, str) else weights
        )
        for name in chosen:
            if name not in self._factors:
                raise ConfigError(
                    f"no adapter is named {name!r}{nearest(name, self.names)}; there are {list(self.names)}"
                )
        several = len(chosen) > 1
        names = tuple(self.names if several else chosen) or self.names[:1]
        scales = {name: self._scales(name, chosen.get(name, 0.0)) for name in names}
        ranks = self._all if several else self._one
        layout = tuple((path, *factor_shapes(self._shapes[path], rank)) for path, rank in ranks.items())
        factors = _side_by_side(layout, {name: self._factors[name] for name in names}, scales)
        graphdef = self._graph_of_all if several else self._graph_of_one
        return Split(graphdef, _in_tree(self._frozen, factors))

    def _scales(self, name: str, share: float) -> dict[str, float]:
        return {path: share * low.scale for path, low in self._plans[name].items()}


@functools.partial(jax.jit, static_argnums=0)
def _side_by_side(
    layout: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...],
    adapters: dict[str, Params],
    scales: dict[str, dict[str, Array]],
) -> Params:
    """Factors of these shapes whose product is the sum of s a b: [a1 | a2 | 0] and [s1 b1; s2 b2; 0]."""
    factors: Params = {}
    dtype = upcast(jax.tree.leaves(adapters)[0]).dtype
    for path, *shapes in layout:
        a, b = (jnp.zeros(shape, dtype) for shape in shapes)
        start = 0
        for name in (name for name in adapters if path in scales[name]):
            own_a, own_b = (adapters[name][f"{path}.{factor}"].astype(dtype) for factor in FACTORS)
            stop = start + own_a.shape[-1]
            a = a.at[..., start:stop].set(own_a)
            b = b.at[..., start:stop, :].set(own_b * scales[name][path])
            start = stop
        factors |= dict(zip((f"{path}.{factor}" for factor in FACTORS), (a, b), strict=True))
    return factors


def _adapter_of(run: TuneRun) -> AdapterConfig:
    assert run.tune.adapter is not None, "the run has no adapter"
    return run.tune.adapter


def _dtypes(run: TuneRun) -> _Dtypes:
    return _Dtypes(jnp.dtype(run.train.dtype), jnp.dtype(run.train.param_dtype))


def _plan(adapter: AdapterConfig, paths: Iterable[str]) -> dict[str, _Low]:
    """Rank and scale of every adapted weight. Raises ConfigError as `check_targets`."""
    paths = list(paths)
    check_targets(adapter, paths)
    chosen = [path for path in paths if adapter.adapts(path)]
    undropped = [path for path in chosen if not path.endswith(_BY_PRODUCT)]
    if adapter.dropout and undropped:
        raise ConfigError(
            f"lora.dropout={adapter.dropout}: the adapter of {undropped[0]} has no dropout; set it to 0, or leave "
            "that weight out of --lora.targets"
        )
    return {path: _Low(adapter.rank_alpha(path)[0], adapter.scale(path)) for path in chosen}


def _abstract(
    config: ModelConfig,
    plan: Mapping[str, _Low],
    rate: float,
    quant: str,
    dtypes: _Dtypes,
    backends: Backends,
    remat: str,
) -> Adapted:
    def make() -> Decoder:
        decoder = Decoder(config, backends, rngs=nnx.Rngs(params=0), dtype=dtypes.compute, remat=remat)
        weights = {
            ".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(decoder, nnx.Param))
        }
        decoder = decoder if quant == "none" else quantized_modules(decoder, quant)
        for path, low in plan.items():
            _attach(decoder, path, weights[path], low, rate, dtypes.master)
        return decoder

    graphdef, shapes, axes = abstract_of(make)
    factors = {path for path in shapes if path.endswith(FACTORS)}
    names = {path: _canonical(path) for path in shapes if path not in factors}
    frozen = {
        name: shapes[path]
        if jnp.issubdtype(shapes[path].dtype, jnp.integer) or is_quantized(name.rpartition(".")[0])
        else jax.ShapeDtypeStruct(shapes[path].shape, dtypes.of(name))
        for path, name in names.items()
    }
    return Adapted(
        graphdef,
        {path: shapes[path] for path in shapes if path in factors},
        {path: axes[path] for path in shapes if path in factors},
        frozen,
        {name: axes[path] for path, name in names.items()},
    )


def _attach(
    decoder: Decoder, path: str, weight: nnx.Variable, low: _Low, rate: float, dtype: DTypeLike
) -> None:
    """Puts a LoraWeight in a weight's place; a projection becomes a LoraLinear."""
    *lead, inner, outer = weight.get_metadata()["axes"]
    axes = (*lead, inner, None), (*lead, None, outer)
    shapes = factor_shapes(weight.shape, low.rank)
    a, b = (nnx.Param(jnp.zeros(shape, dtype), axes=names) for shape, names in zip(shapes, axes, strict=True))
    owner, name = _owner(decoder, path), path.rpartition(".")[2]
    setattr(owner, name, LoraWeight(getattr(owner, name), a, b, low.scale))
    if path.endswith(_BY_PRODUCT):
        above = path.rpartition(".")[0]
        setattr(_owner(decoder, above), above.rpartition(".")[2], LoraLinear(owner, rate))


def _owner(decoder: Decoder, path: str) -> Any:
    """The module that has what a path names: of blocks.0.attn.q_proj.weight, q_proj."""
    module: Any = decoder
    for name in path.split(".")[:-1]:
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def _canonical(path: str) -> str:
    """A frozen parameter's name without the place that it has in the tree."""
    return ".".join(name for name in path.split(".") if name != "base")


def _gathered(axes: Axes) -> Axes:
    return tuple(None if axis == "embed" else axis for axis in axes)


def _adapted_paths(factors: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[0] for path in factors}


def _in_tree(frozen: Params, factors: Params) -> Params:
    """All parameters by their names in the tree of modules."""
    adapted = _adapted_paths(factors)
    tree = dict(factors)
    for path, value in frozen.items():
        owner, _, part = path.rpartition(".")
        tree[f"{path}.base" if path in adapted else f"{owner}.base.{part}" if owner in adapted else path] = (
            value
        )
    return tree


def _check_factors(name: str, factors: Params, plan: Mapping[str, _Low], shapes: Mapping[str, Any]) -> None:
    """Raises ConfigError where factors are not those of their configuration."""
    expected = {
        f"{path}.{factor}": shape
        for path, low in plan.items()
        for factor, shape in zip(FACTORS, factor_shapes(shapes[path].shape, low.rank), strict=True)
    }
    for path in sorted(expected.keys() | factors.keys()):
        got = tuple(factors[path].shape) if path in factors else None
        if got != expected.get(path):
            raise ConfigError(
                f"adapter {name!r} does not fit: {path} is {got}, expected {expected.get(path)}"
            )


def _merged(params: Params, factors: Params, adapter: AdapterConfig, sign: float) -> Params:
    result = dict(params)
    for path in sorted(_adapted_paths(factors)):
        if path not in params:
            raise ConfigError(f"{path} is no weight of this base: an adapter cannot be merged into it")
        weight, (a, b) = params[path], (factors[f"{path}.{name}"] for name in FACTORS)
        wide = jnp.result_type(weight, a, b, jnp.float32)
        delta = jnp.matmul(a.astype(wide), b.astype(wide), precision="highest")
        result[path] = (weight.astype(wide) + sign * adapter.scale(path) * delta).astype(weight.dtype)
    return result
