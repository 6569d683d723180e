"""An ablation changes what it says and nothing else: same weights, same batches, and errors where a fault is."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, relative_error, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import tolerance

from jaxlm.ablation import (
    Outcome,
    Start,
    initial_weights,
    run_variants,
    serve,
    train_variant,
    validation_batches,
)
from jaxlm.config import ConfigError, OptimConfig, RunConfig, TrainConfig
from jaxlm.data.loader import LoaderSettings, plain_batches
from jaxlm.data.shards import TokenStore
from jaxlm.engine import JaxEngine
from jaxlm.layers import Backends
from jaxlm.layerwise import activations, fingerprint, layer_distances, layer_errors, rerouted
from jaxlm.loop import DivergedError
from jaxlm.model import Split
from jaxlm.presets import preset
from jaxlm.quant import errors, quantize
from jaxlm.variants import AXES, Variant, make_variants, parse_axes, shown

STEPS = 2
# The model, batch and length of tests/experiments/test_ablate.py, so that a session compiles their programs once.
RUN = RunConfig(
    tiny(n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=280, context=24, init="fan_in"),
    optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1),
    train=TrainConfig(steps=STEPS, batch_size=2, seq_len=16, eval_batches=2, seed=5),
)


def variants(*texts: str, run: RunConfig = RUN, **more: Any) -> list[Variant]:
    """The variants of some --vary options."""
    return make_variants(run, parse_axes(texts), more.pop("largest", 16), **more)


@pytest.fixture(scope="module")
def store() -> TokenStore:
    """Ids with structure."""
    ids = (np.arange(900) ** 2 // 7 % RUN.model.vocab_size).astype(np.uint16)
    return TokenStore([ids], {"dtype": "uint16", "shards": [{"sha256": "a"}], "tokenizer": "t"})


@pytest.fixture(scope="module")
def ablated(store: TokenStore) -> tuple[list[Variant], list[Outcome]]:
    """Trained: twice what is the same on a CPU, and once more quantised, which shares its training."""
    made = variants("attention=xla,auto,quant=none,int8")
    chosen = [made[0], made[2], made[3]]
    return chosen, run_variants(chosen, validation_batches(chosen, store), store)


@pytest.fixture(scope="module")
def looked(store: TokenStore) -> dict[str, Outcome]:
    """Stored weights in float32, in another form of attention, in bfloat16, and in int8."""
    made = variants("attention=xla,readable,dtype=float32,bfloat16,quant=none,int8", trains=False)
    chosen = [made[0], made[1], made[2], made[4]]
    outcomes = run_variants(chosen, validation_batches(chosen, store), None, weights())
    return dict(zip(("plain", "int8", "bfloat16", "readable"), outcomes, strict=True))


@functools.cache
def weights() -> dict[str, Any]:
    """Stored weights, drawn wide enough for every part to matter."""
    return {k: jnp.asarray(v) for k, v in random_params(RUN.model, 3, dtype=np.float32).items()}


FIELDS = {"optim.lr": (1e-2, 3e-3, 0.5), "train.seed": (0, 1, 7), "model.tied": (False, True)}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_axes_are_read_as_they_are_spelled(data: st.DataObject) -> None:
    """Any axes and values, in one option or several, with blanks: the full product, first values first."""
    pool = {name: values for name, values in AXES.items() if name != "experts"} | FIELDS
    pool["attention"] = ("readable", "xla", "auto")
    names = data.draw(st.lists(st.sampled_from(sorted(pool)), unique=True, min_size=1, max_size=3))
    chosen = {
        name: data.draw(st.lists(st.sampled_from(pool[name]), unique=True, min_size=1, max_size=2))
        for name in names
    }
    blank, texts = data.draw(st.sampled_from(["", " "])), [""]
    for name, values in chosen.items():
        text = f"{name}={blank}" + f"{blank},{blank}".join(map(shown, values))
        texts = (
            [*texts, text] if data.draw(st.booleans()) else [*texts[:-1], f"{texts[-1]},{text}".lstrip(",")]
        )
    texts = list(filter(None, texts))
    if all(len(values) == 1 for values in chosen.values()):
        with pytest.raises(ConfigError, match="nothing varies"):
            parse_axes(texts)
        return
    axes = parse_axes(texts)
    assert {axis.name: list(axis.values) for axis in axes} == chosen
    made = make_variants(RUN, axes, 1000)
    assert [tuple(v.settings.values()) for v in made] == list(itertools.product(*chosen.values()))
    assert len({v.label for v in made}) == len(made)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("attension=readable,xla", "unknown axis 'attension' (did you mean 'attention'?)"),
        ("lr=1,2", "did you mean 'optim.lr'?"),
        ("optim.lrr=1,2", "did you mean 'optim.lr'?"),
        ("dtype=float32,float8", "dtype='float8' must be one of float32, bfloat16, float16, float64"),
        ("dtype=float32,train.dtype=bfloat16", "axis 'dtype' stands twice"),
        ("dtype=float32,float32", "float32 stands twice"),
        ("optim.lr=1e-2,0.01", "0.01 stands twice"),
        ("dtype=float32,quant=int8", "nothing varies"),
        ("xla,attention=readable", "must begin with AXIS=VALUE"),
        ("attention=,xla", "is empty"),
        ("attention=xla,,readable", "is empty"),
        ("attention=cudnn,xla", "attention=cudnn needs dtype=bfloat16, not float32"),
        ("experts=loop,blocks", "the model has none"),
        ("model.windows=0,4", "it holds a list"),
        ("model.n_kv_heads=1,3", "n_heads=2 must be a multiple of n_kv_heads=3"),
        ("model.n_heads=6,x", "must be a whole number"),
        ("optim.lr=1e-2,inf", "must be a finite number"),
        ("optim.lr=1e-2,1e-4", "optim.min_lr=0.001 must be between 0 and lr=0.0001"),
        ("optimizer=adamw,adam,optim.weight_decay=0.1", "optimizer=adam turns optim.weight_decay off"),
        ("data.path=a,b", "all variants share it"),
        ("model.vocab_size=280,300", "all variants share it"),
        ("train.keep=1,2", "it has no effect"),
        ("mesh.data=1,2", "variants run on one device"),
        ("train.seed=0,1,2,3,4,quant=none,int8,int4,nf4", "makes 20 variants (5 train.seed x 4 quant)"),
        ("model.tied=true,yes", "must be one of true, false"),
    ],
)
def test_bad_axes_are_one_line(text: str, said: str) -> None:
    """What was wrong, with its value, before anything runs."""
    with pytest.raises(ConfigError) as error:
        variants(text)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_two_variants_that_are_the_same_run_are_refused() -> None:
    """Without weight decay, adamw is adam."""
    plain = dataclasses.replace(RUN, optim=dataclasses.replace(RUN.optim, weight_decay=0.0))
    with pytest.raises(ConfigError, match="are the same run"):
        variants("optimizer=adamw,adam", run=plain)


def test_settings_reach_the_configuration() -> None:
    """Each axis changes its own field, one value sets it for all, and the rest is the base's."""
    made = variants("optimizer=adamw,adam,dtype=bfloat16", "optim.min-lr=0,model.rope_theta=100,1e4")
    assert len(made) == 4 and [v.label for v in made][1] == "optimizer=adamw model.rope_theta=10000.0"
    for variant in made:
        optim = dataclasses.replace(RUN.optim, min_lr=0.0, decay_steps=STEPS)
        optim = dataclasses.replace(
            optim, weight_decay=0.1 if variant.settings["optimizer"] == "adamw" else 0.0
        )
        model = dataclasses.replace(RUN.model, rope_theta=variant.settings["model.rope_theta"])
        train = dataclasses.replace(RUN.train, dtype="bfloat16")
        assert variant.run == dataclasses.replace(RUN, model=model, optim=optim, train=train)
    with pytest.raises(ConfigError, match=r"optim\.lr: needs training"):
        variants("optim.lr=1e-2,5e-3", trains=False)
    assert variants("experts=loop,blocks", run=preset("quickstart"))[1].experts == "blocks"


def test_the_same_variant_twice_is_bitwise(ablated, store: TokenStore) -> None:
    """Losses and weights, whether trained within an ablation or alone."""
    chosen, (first, same, _) = ablated
    again = train_variant(chosen[0], Start(initial_weights(RUN, Start({}, RUN))[0], RUN), store)
    for other in (same.trained, again):
        assert other.losses == first.trained.losses and len(other.losses) == STEPS
        assert all(np.array_equal(first.trained.params[path], other.params[path]) for path in other.params)
    assert same.val_loss == first.val_loss and set(same.distances.values()) == {0.0}


@pytest.mark.slow
def test_losses_are_those_of_pretraining(ablated, store: TokenStore, tmp_path: Path) -> None:
    """The engine of experiments.pretrain on the loader's batches: the same losses and validation loss."""
    chosen, outcomes = ablated
    trained, run = outcomes[0].trained, chosen[0].run
    assert trained is not None and chosen[0].attention == "xla"
    engine = JaxEngine(run, tmp_path, Backends(chosen[0].attention, chosen[0].experts))
    engine.initialise()
    batches = list(itertools.islice(_batches(store, run), STEPS))
    losses = [float(engine.train_step(batch)["loss"]) for batch in batches]
    val_loss = engine.evaluate(validation_batches(chosen, store))
    engine.close()
    limit = tolerance("f32_loss")
    assert all(abs(a / b - 1) <= limit for a, b in zip(trained.losses, losses, strict=True))
    assert abs(outcomes[0].val_loss / val_loss - 1) <= limit


def _batches(store: TokenStore, run: RunConfig) -> Any:
    return plain_batches([store], LoaderSettings.of(run))


def test_all_variants_see_the_same_batches(ablated, store: TokenStore) -> None:
    """And the recorded fingerprint is that of the plain loader's batches."""
    chosen, outcomes = ablated
    expected = fingerprint(itertools.islice(_batches(store, RUN), STEPS))
    for variant, outcome in zip(chosen, outcomes, strict=True):
        assert outcome.trained is not None and outcome.trained.batches_sha256 == expected, variant.label
        assert outcome.trained.started_alike == len(outcome.trained.params)
    assert [o.trained_as for o in outcomes] == [0, 1, 1], "a quantised variant shares a training"


def test_the_baseline_differs_from_itself_by_nothing(ablated) -> None:
    """Exactly zero in every module and every layer, which come in the order of the computation."""
    first = ablated[1][0]
    modules = ["embed", "blocks.0.attn", "blocks.0.mlp", "blocks.0", "final_norm", "logits"]
    assert list(first.activations) == modules
    assert set(first.activations.values()) == {0.0} and set(first.distances.values()) == {0.0}
    assert list(first.distances) == ["embed", "blocks.0.attn", "blocks.0.mlp", "final_norm", "lm_head", "all"]
    deep = {f"blocks.{i}.mlp.up_proj.weight": np.ones(1) for i in range(12)}
    assert list(layer_distances(deep, deep)) == [*(f"blocks.{i}.mlp" for i in range(12)), "all"]


def test_equal_implementations_differ_by_rounding_and_dtypes_by_theirs(looked: dict[str, Outcome]) -> None:
    """readable against xla in float32 about 2^-24, bfloat16 about 2^-8, in every module."""
    assert looked["plain"].trained is None and looked["plain"].distances is None
    assert looked["readable"].activations["embed"] == 0.0
    for name, error in looked["bfloat16"].activations.items():
        assert 1e-3 <= error <= tolerance("bf16_activations"), name
        other = looked["readable"].activations[name]
        assert (other > 0 or name == "embed") and other <= tolerance("f32_attention") <= error / 100, name
    half, plain = looked["bfloat16"], looked["plain"]
    # Norms stay in the masters' precision.
    assert 1.9 < plain.weight_bytes / half.weight_bytes < 2
    assert 0 < abs(half.val_loss - plain.val_loss) <= tolerance("bf16_activations") * plain.val_loss


def test_quantisation_is_that_of_the_library(looked: dict[str, Outcome]) -> None:
    """Each weight's error is quant.errors'; bytes are the codes' and what stays."""
    model = serve(variants("quant=none,int8", trains=False)[0], weights())
    quantized, found = quantize(model, "int8"), looked["int8"]
    assert looked["plain"].weight_errors == {}
    assert found.weight_errors == {e.path: e.error for e in errors(Split(*model), quantized)}
    assert found.weight_bytes == sum(value.nbytes for value in quantized.params.values())
    assert found.activations["embed"] == 0.0 < found.activations["blocks.0.attn"]


def test_a_fault_in_one_layer_shows_there_first() -> None:
    """Block 1 sees three positions only: nothing before its attention differs, all that follows does."""
    two = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, n_layers=2))
    base = variants("quant=none,int8", run=two)[0]
    model = dataclasses.replace(two.model, windows=(0, 3))
    faulty = base._replace(label="faulty", run=dataclasses.replace(two, model=model))
    params = random_params(two.model, 3, dtype=np.float32)
    inputs = np.arange(32, dtype=np.int32).reshape(2, 16)
    acts = [activations(serve(variant, params), inputs, "float32") for variant in (faulty, base)]
    found = layer_errors(*acts, np.ones((2, 16), bool))
    names = list(found)
    before = names[: names.index("blocks.1.attn")]
    assert [found[name] for name in before] == [0.0] * 4 and len(names) == 9
    assert all(found[name] > 1e-2 for name in names[len(before) :])
    assert acts[0]["logits"].shape == (2, 16, 280)


def test_errors_are_relative_norms_over_the_valid_tokens() -> None:
    """Against the formula written out; padding does not count, and layers of another shape are left out."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 3, 4))
    valid = np.array([[True, True, False], [True, False, False]])
    expected = math.sqrt(sum(((a - b)[i, t] ** 2).sum() for i, t in zip(*np.nonzero(valid))))
    expected /= math.sqrt(sum((b[i, t] ** 2).sum() for i, t in zip(*np.nonzero(valid))))
    assert (
        abs(layer_errors({"logits": a}, {"logits": b}, valid)["logits"] / expected - 1)
        <= tolerance("f64_scalar") * 8
    )
    name, ids = "blocks.0.moe.expert_ids", np.array([[[0, 1], [2, 3], [0, 0]], [[4, 5], [0, 0], [0, 0]]])
    others = np.array([[[1, 0], [2, 7], [9, 9]], [[6, 7], [9, 9], [9, 9]]])
    assert rerouted({name: others}, {name: ids}, valid) == {"blocks.0.moe": 0.5}, (
        "order and padding do not count"
    )
    assert layer_errors({name: others}, {name: ids}, valid) == {}
    one = {k: np.asarray(v) for k, v in weights().items()}
    changed = one | {"blocks.0.mlp.up_proj.weight": one["blocks.0.mlp.up_proj.weight"] * 2}
    changed["lm_head.weight"] = np.zeros((24, 7))
    apart = layer_distances(changed, one)
    mlp = [path for path in one if path.startswith("blocks.0.mlp")]
    size = math.sqrt(sum(float((one[path].astype(np.float64) ** 2).sum()) for path in mlp))
    up = float(np.linalg.norm(one["blocks.0.mlp.up_proj.weight"].astype(np.float64)))
    assert "lm_head" not in apart and abs(apart["blocks.0.mlp"] - up / size) <= tolerance("f64_scalar") * 8
    assert {name for name, value in apart.items() if value} == {"blocks.0.mlp", "all"}


@pytest.mark.slow
def test_all_begin_with_the_same_weights_where_shapes_agree() -> None:
    """Another depth keeps what it shares, another seed nothing, another precision the same values."""
    start = Start({path: np.asarray(x) for path, x in weights().items()}, RUN)
    deep, wide_, seed, half = (
        made.run
        for made in (
            *variants("model.n_layers=1,2")[1:],
            *variants("model.d_ff=40,48")[1:],
            *variants("train.seed=5,6")[1:],
            *variants("train.param_dtype=float32,bfloat16")[1:],
        )
    )
    found, alike = initial_weights(deep, start)
    assert alike == len(start.params) and len(found) > alike
    assert all(found[path] is start.params[path] for path in start.params)
    found, alike = initial_weights(wide_, start)
    assert alike == len(start.params) - 3 and found["blocks.0.mlp.up_proj.weight"].shape == (24, 48)
    found, alike = initial_weights(seed, start)
    assert alike == 0 and relative_error(found["embed.weight"], start.params["embed.weight"]) > 0.5
    assert initial_weights(half, start)[1] == len(start.params)


@pytest.mark.slow
def test_a_divergence_ends_a_variant_not_the_ablation(store: TokenStore) -> None:
    """Its step is named and the others are compared; of the baseline it is an error."""
    chosen = variants("optim.lr=1e-2,1e30,optim.clip_norm=0")
    first, second = run_variants(chosen, validation_batches(chosen, store), store)
    assert first.trained.diverged_at is None and math.isfinite(first.val_loss)
    assert second.trained.diverged_at == len(second.trained.losses) > 1 and math.isnan(second.val_loss)
    assert second.distances is None and set(second.activations.values()) == {0.0}
    with pytest.raises(DivergedError, match="the baseline's loss is"):
        run_variants(chosen[::-1], validation_batches(chosen, store), store)


def test_stored_weights_must_fit(store: TokenStore) -> None:
    """A model of another shape cannot be looked at with them, and that is said first."""
    chosen = variants("model.d_ff=40,48", trains=False)
    with pytest.raises(ConfigError, match=r"model\.d_ff=48: the stored weights have other shapes"):
        run_variants(chosen, validation_batches(chosen, store), None, weights())


def test_the_figure_is_drawn_from_the_report_alone(tmp_path: Path, ablated) -> None:
    """With curves and without, with exact zeros and holes; a file that is no report is one line."""
    pytest.importorskip("matplotlib")
    from jaxlm.plots import PlotError
    from jaxlm.plots_ablation import plot_ablation

    rows = []
    for variant, outcome in zip(*ablated, strict=True):
        row = {
            "settings": variant.settings,
            "trained_as": outcome.trained_as,
            "losses": outcome.trained.losses,
        }
        row |= {"val_loss": outcome.val_loss, "change": outcome.val_loss - ablated[1][0].val_loss}
        rows.append(row | {"activations": outcome.activations, "distances": outcome.distances})
    rows[1] |= {"activations": None, "val_loss": None, "change": None}
    report = {"base": "tiny", "axes": {"attention": [1, 2], "quant": [1, 2]}, "variants": rows}
    (tmp_path / "ablation.json").write_text(json.dumps(report))
    assert plot_ablation(tmp_path) == [tmp_path / "ablation.png"]
    drawn = (tmp_path / "ablation.png").read_bytes()
    for row in rows:
        del row["losses"]
        row["distances"] = None
    (tmp_path / "ablation.json").write_text(json.dumps(report))
    plot_ablation(tmp_path)
    assert drawn.startswith(b"\x89PNG") and (tmp_path / "ablation.png").read_bytes() != drawn
    for text in ("[]", "{}", '{"variants": 3, "axes": {}}', "no"):
        (tmp_path / "ablation.json").write_text(text)
        with pytest.raises(PlotError, match="is not a report of an ablation"):
            plot_ablation(tmp_path)
