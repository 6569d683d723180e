"""The config contract: JSON there and back, and a refusal in one line for whatever cannot work."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxlm.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RopeScaling,
    RunConfig,
    TrainConfig,
    from_dict,
    load,
    save,
    to_dict,
)

MODEL: dict = dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48)
MODEL |= dict(context=64, rope_theta=50_000.0, norm_eps=3e-6)
MOE = MoEConfig(n_experts=4, n_active=2)


def model(**changes: object) -> ModelConfig:
    """A small decoder."""
    return ModelConfig(**(MODEL | changes))


def run(model_changes: dict | None = None, **parts: object) -> RunConfig:
    """A small run."""
    return RunConfig(**({"model": model(**(model_changes or {})), "train": TrainConfig(seq_len=32)} | parts))


def test_run_round_trips_through_json(tmp_path: Path) -> None:
    """A run with every kind of field away from its default is the same object after a file."""
    scaling = RopeScaling(
        "llama3", factor=8.0, original_context=32, low_freq_factor=1.5, high_freq_factor=5.0
    )
    moe = MoEConfig(n_experts=4, n_active=1, d_ff=24, pattern=(False, True), renormalize=False, shared_d_ff=8)
    config = RunConfig(
        model=model(rope_scaling=scaling, windows=(16, 0), mlp="gelu_erf", qk_norm=True, moe=moe),
        data=DataConfig(path="text.txt", val_fraction=0.1, shuffle=False),
        optim=OptimConfig(lr=1e-3, min_lr=0.0, decay="matrices_and_embeddings"),
        train=TrainConfig(seq_len=32, accumulation=2, dtype="bfloat16"),
        mesh=MeshConfig(fsdp=2, expert=2),
    )
    save(config, tmp_path / "config.json")
    again = load(RunConfig, tmp_path / "config.json")
    assert again == config and hash(again) == hash(config)
    assert isinstance(again.model.windows, tuple) and isinstance(again.model.moe.pattern, tuple)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["rope_scaling"]["kind"] == "llama3"


def test_left_out_keys_take_their_defaults_and_whole_numbers_are_floats() -> None:
    """A short file is enough, and `10000` is a good theta."""
    config = from_dict(RunConfig, {"model": MODEL | {"rope_theta": 10_000}, "train": {"seq_len": 64}})
    assert config.optim == OptimConfig()
    assert config.model.rope_theta == 10_000.0 and isinstance(config.model.rope_theta, float)


@pytest.mark.parametrize("name", MODEL)
def test_shape_keys_have_no_default(name: str) -> None:
    """Each key that shapes or numbers depend on is missed by name."""
    values = {key: value for key, value in MODEL.items() if key != name}
    with pytest.raises(ConfigError, match=f"config key 'model.{name}' is missing"):
        from_dict(RunConfig, {"model": values})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"n_head": 4}, ("'model.n_head'", "did you mean 'n_heads'?")),
        ({"moe": {"n_expert": 4}}, ("'model.moe.n_expert'", "did you mean 'n_experts'?")),
        ({"position": "ropes"}, ("model.position='ropes'", "rope, learned", "did you mean 'rope'?")),
        ({"n_layers": "2"}, ("model.n_layers='2'", "int")),
        ({"n_layers": 2.0}, ("model.n_layers=2.0", "int")),
        ({"n_layers": True}, ("model.n_layers=True", "int")),
        ({"n_layers": None}, ("model.n_layers=None", "int")),
        ({"tied": 1}, ("model.tied=1", "bool")),
        ({"norm_eps": "1e-5"}, ("model.norm_eps='1e-5'", "float")),
        ({"norm_eps": 10**400}, ("model.norm_eps", "finite")),
        ({"windows": 16}, ("model.windows=16", "list")),
        ({"windows": "16"}, ("model.windows='16'", "list")),
        ({"windows": [16, "0"]}, ("model.windows='0'", "int")),
        ({"moe": {"pattern": [1]}}, ("model.moe.pattern=1", "bool")),
        ({"moe": 4}, ("'model.moe'", "object", "4")),
        ({"moe": None}, ("'model.moe'", "object", "None")),
    ],
)
def test_unknown_and_mistyped_keys_are_named_by_their_path(values: dict, words: tuple[str, ...]) -> None:
    """The message says which key, what it held and what it should have been."""
    with pytest.raises(ConfigError) as error:
        from_dict(RunConfig, {"model": MODEL | values})
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1, 2]", "must hold an object"),
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"\xff\xfe{}", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model": {"vocab_size": 64}}', "'model.d_model' is missing"),
        (json.dumps({"model": MODEL | {"dropout": 1.5}}).encode(), "dropout=1.5"),
    ],
)
def test_bad_files_are_refused_with_their_name(content: bytes, words: str, tmp_path: Path) -> None:
    """Damaged, foreign and impossible files end in one line that names the file."""
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(RunConfig, path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and words in message and "\n" not in message


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_unreadable_path_is_refused_with_its_name(name: str, tmp_path: Path) -> None:
    """A missing file and a folder are named once."""
    with pytest.raises(ConfigError) as error:
        load(RunConfig, tmp_path / name)
    assert str(error.value).count(str(tmp_path)) == 1


IMPOSSIBLE = [
    *((lambda n=name: model(**{n: 0}), (f"{name}=0", "positive")) for name in list(MODEL)[:8]),
    (lambda: model(n_heads=6, n_kv_heads=4), ("n_heads=6", "n_kv_heads=4")),
    (lambda: model(head_dim=7), ("head_dim=7", "even", "position='rope'")),
    (lambda: model(rope_theta=0.0), ("rope_theta=0.0",)),
    (lambda: model(norm_eps=0.0), ("norm_eps=0.0",)),
    (lambda: model(norm_eps=float("inf")), ("norm_eps=inf", "finite")),
    (lambda: model(norm_eps=float("nan")), ("norm_eps=nan", "finite")),
    (lambda: model(dropout=1.0), ("dropout=1.0", "[0, 1)")),
    (lambda: model(init_std=0.0), ("init_std=0.0",)),
    (lambda: model(windows=()), ("windows", "empty")),
    (lambda: model(windows=(8, -1)), ("windows=(8, -1)", "negative")),
    (
        lambda: model(position="learned", rope_scaling=RopeScaling("linear", 2.0)),
        ("rope_scaling.kind='linear'", "position='learned'"),
    ),
    (
        lambda: model(rope_theta=1.0, rope_scaling=RopeScaling("yarn", 2.0, 32)),
        ("rope_theta=1.0", "rope_scaling.kind='yarn'"),
    ),
    (lambda: RopeScaling("linear", factor=0.0), ("rope_scaling.factor=0.0",)),
    (lambda: RopeScaling("none", factor=2.0), ("rope_scaling.factor=2.0", "kind='none'")),
    (lambda: RopeScaling("llama3", factor=8.0), ("original_context=0", "kind='llama3'")),
    (lambda: RopeScaling("yarn", factor=8.0), ("original_context=0", "kind='yarn'")),
    (lambda: RopeScaling("llama3", 8.0, 32, 4.0, 4.0), ("low_freq_factor=4.0", "high_freq_factor=4.0")),
    (lambda: RopeScaling("llama3", 8.0, 32, 0.0, 4.0), ("low_freq_factor=0.0", "high_freq_factor=4.0")),
    (lambda: RopeScaling("yarn", 8.0, 32, beta_slow=32.0), ("beta_slow=32.0", "beta_fast=32.0")),
    (lambda: RopeScaling("yarn", 8.0, 32, beta_slow=0.0), ("beta_slow=0.0", "beta_fast=32.0")),
    (lambda: RopeScaling("yarn", 8.0, 32, attention_factor=-1.0), ("attention_factor=-1.0",)),
    (lambda: MoEConfig(n_experts=-1), ("moe.n_experts=-1",)),
    (lambda: MoEConfig(n_experts=4, n_active=5), ("moe.n_active=5", "n_experts=4")),
    (lambda: MoEConfig(n_experts=4, n_active=0), ("moe.n_active=0", "n_experts=4")),
    (lambda: MoEConfig(n_experts=4, pattern=()), ("moe.pattern", "empty")),
    (lambda: MoEConfig(n_experts=4, pattern=(False,)), ("moe.pattern=(False,)", "n_experts=4")),
    (lambda: MoEConfig(n_experts=4, capacity_factor=-1.0), ("moe.capacity_factor=-1.0",)),
    (lambda: MoEConfig(n_experts=4, balance_coef=-1.0), ("moe.balance_coef=-1.0",)),
    (lambda: MoEConfig(n_experts=4, router_z_coef=-1.0), ("moe.router_z_coef=-1.0",)),
    (lambda: MoEConfig(n_experts=4, d_ff=-1), ("moe.d_ff=-1",)),
    (lambda: MoEConfig(n_experts=4, shared_d_ff=-1), ("moe.shared_d_ff=-1",)),
    (lambda: MoEConfig(n_experts=4, shared_gate=True), ("moe.shared_gate=True", "shared_d_ff=0")),
    (lambda: DataConfig(val_fraction=0.0), ("data.val_fraction=0.0",)),
    (lambda: DataConfig(val_fraction=1.0), ("data.val_fraction=1.0",)),
    (lambda: OptimConfig(lr=0.0, min_lr=0.0), ("optim.lr=0.0",)),
    (lambda: OptimConfig(lr=float("inf")), ("optim.lr=inf", "finite")),
    (lambda: OptimConfig(lr=1e-4, min_lr=2e-4), ("optim.min_lr=0.0002", "lr=0.0001")),
    (lambda: OptimConfig(b2=1.0), ("optim.b1=0.9", "b2=1.0")),
    (lambda: OptimConfig(eps=0.0), ("optim.eps=0.0",)),
    (lambda: OptimConfig(weight_decay=-0.1), ("optim.weight_decay=-0.1",)),
    (lambda: OptimConfig(clip_norm=-1.0), ("optim.clip_norm=-1.0",)),
    (lambda: OptimConfig(warmup_steps=200, decay_steps=100), ("warmup_steps=200", "decay_steps=100")),
    (lambda: TrainConfig(steps=0), ("train.steps=0",)),
    (lambda: TrainConfig(seed=-1), ("train.seed=-1",)),
    (lambda: TrainConfig(batch_size=8, accumulation=3), ("train.batch_size=8", "accumulation=3")),
    (lambda: TrainConfig(spike_z=3.0, spike_window=1), ("train.spike_window=1", "at least 2", "spike_z=3.0")),
    (lambda: MeshConfig(fsdp=0), ("mesh axis fsdp=0",)),
    (lambda: run(train=TrainConfig(seq_len=65)), ("train.seq_len=65", "model.context=64")),
    (
        lambda: run(
            train=TrainConfig(seq_len=32, batch_size=8, accumulation=4), mesh=MeshConfig(data=2, fsdp=2)
        ),
        ("train.batch_size/accumulation=2", "data*fsdp*expert=4"),
    ),
    (lambda: run(mesh=MeshConfig(expert=2)), ("moe.n_experts=0", "mesh expert=2")),
    (lambda: run({"moe": MOE}, mesh=MeshConfig(expert=8)), ("moe.n_experts=4", "mesh expert=8")),
    (lambda: run(mesh=MeshConfig(tensor=4)), ("n_kv_heads=2", "mesh tensor=4")),
]


@pytest.mark.parametrize(("build", "words"), IMPOSSIBLE, ids=[words[0] for _, words in IMPOSSIBLE])
def test_impossible_combination_is_refused_with_its_numbers(build, words: tuple[str, ...]) -> None:
    """What cannot work is refused while the config is built, in one line that holds the values."""
    with pytest.raises(ConfigError) as error:
        build()
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_refusals_start_where_configs_stop_working() -> None:
    """The nearest neighbours of refused configs are accepted."""
    model(n_heads=6, n_kv_heads=3), model(head_dim=7, position="learned"), model(dropout=0.0, windows=(0, 1))
    MoEConfig(n_experts=4, n_active=4), MoEConfig(n_experts=0, n_active=7)
    OptimConfig(warmup_steps=100, decay_steps=100), OptimConfig(lr=1e-4, min_lr=1e-4)
    run(train=TrainConfig(seq_len=64)), run(mesh=MeshConfig(tensor=2))
    run({"moe": MOE}, mesh=MeshConfig(expert=4))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", MeshConfig()),
        ("fsdp=4,expert=2", MeshConfig(fsdp=4, expert=2)),
        (" data=2 , tensor=3,", MeshConfig(data=2, tensor=3)),
        ("data=1", MeshConfig()),
    ],
)
def test_mesh_is_read_from_text_and_back(text: str, expected: MeshConfig) -> None:
    """The command line's spelling, and `str` as its inverse."""
    assert MeshConfig.parse(text) == expected
    assert MeshConfig.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model=2", ("'model'", "data, fsdp, tensor, expert")),
        ("fsdp=2,fsdp=2", ("'fsdp'", "twice")),
        ("fsdp", ("'fsdp'", "axis=count")),
        ("fsdp=two", ("'fsdp=two'", "axis=count")),
        ("fsdp=-2", ("'fsdp=-2'", "axis=count")),
        ("fsdp=²", ("'fsdp=²'", "axis=count")),
        ("fsdp=2.0", ("'fsdp=2.0'", "axis=count")),
        ("fsdp=0", ("fsdp=0", "at least 1")),
    ],
)
def test_mesh_text_that_means_nothing_is_refused(text: str, words: tuple[str, ...]) -> None:
    """Unknown, repeated, uncountable and empty axes are named."""
    with pytest.raises(ConfigError) as error:
        MeshConfig.parse(text)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_layers_follow_their_patterns() -> None:
    """Windows and MoE patterns repeat over the layers; experts take the dense width unless told."""
    mixed = model(windows=(16, 0, 8), moe=dataclasses.replace(MOE, pattern=(False, True)))
    assert [mixed.window(layer) for layer in range(5)] == [16, 0, 8, 16, 0]
    assert [mixed.is_moe(layer) for layer in range(4)] == [False, True, False, True]
    assert not model().is_moe(0)
    assert mixed.expert_d_ff == 48
    assert model(moe=dataclasses.replace(MOE, d_ff=24)).expert_d_ff == 24


def test_intervals_follow_the_steps() -> None:
    """Validation comes ten times a run and saving with it, unless told."""
    assert (TrainConfig(steps=1000).eval_interval, TrainConfig(steps=1000).save_interval) == (100, 100)
    assert TrainConfig(steps=5).eval_interval == 1
    assert TrainConfig(eval_every=7).save_interval == 7
    assert TrainConfig(eval_every=7, save_every=21).save_interval == 21


def test_to_dict_holds_json_types_only() -> None:
    """`to_dict` holds lists, numbers, strings and objects: what it returns is what a file gives back."""
    values = to_dict(run({"windows": (8, 0)}))
    assert values == json.loads(json.dumps(values)) and values["model"]["windows"] == [8, 0]
